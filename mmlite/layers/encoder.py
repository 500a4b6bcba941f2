"""The interleaved multi-scale encoder of Lite DETR."""

from __future__ import annotations

from functools import lru_cache

import torch
from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks.transformer import FFN
from mmdet.models.layers import DeformableDetrTransformerEncoder
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from mmengine.model import BaseModule, ModuleList
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .attention import FusedDeformableAttention, KeyAwareDeformableAttention
from .schedule import EncoderSchedule, EncoderStep

# On the CPU the hidden features of so many tokens (8 MB at 2048 channels) stay in the cache between
# the two matrix products of an FFN, which all tokens' together (180 MB at 800x1333) do not.
_TOKENS_IN_CACHE = 1024


@MODELS.register_module()
class LiteEncoderLayer(BaseModule):
    """One encoder layer, over all tokens or over the high- or low-level ones alone.

    High-level tokens go through the FFN and the second norm of the stock layer. Low-level tokens
    do so too, or, with ``small_ffn``, through an FFN of ``embed_dims`` hidden channels with a
    norm of its own (Lite DETR, section 4.2). The norm after the attention is shared. A layer has
    only the modules that its step uses.

    Args:
        step (EncoderStep): Which tokens the layer updates.
        self_attn_cfg (dict): Arguments of the attention.
        ffn_cfg (dict): Arguments of mmcv's ``FFN``.
        norm_cfg (dict): Config of the norms.
        key_aware (bool): Key-aware deformable attention, or standard.
        small_ffn (bool): Whether low-level tokens have the small FFN.
        init_cfg (dict, optional): Initialisation config of mmengine.
    """

    def __init__(
        self,
        step: EncoderStep,
        self_attn_cfg: ConfigDict | dict | None = None,
        ffn_cfg: ConfigDict | dict | None = None,
        norm_cfg: ConfigDict | dict | None = None,
        key_aware: bool = True,
        small_ffn: bool = True,
        init_cfg: ConfigDict | dict | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        self.step = step
        attention = KeyAwareDeformableAttention if key_aware else FusedDeformableAttention
        self.self_attn = attention(**{**(self_attn_cfg or {}), 'batch_first': True})
        self.embed_dims = self.self_attn.embed_dims

        ffn_cfg = dict(ffn_cfg or {})
        norm_cfg = norm_cfg or {'type': 'LN'}
        self.norms = ModuleList([build_norm_layer(norm_cfg, self.embed_dims)[1]])
        self.has_small_ffn = step.updates_low and small_ffn
        if step.updates_high or not self.has_small_ffn:
            self.ffn = FFN(**ffn_cfg)
            self.norms.append(build_norm_layer(norm_cfg, self.embed_dims)[1])
        if self.has_small_ffn:
            self.small_ffn = FFN(**{**ffn_cfg, 'feedforward_channels': self.embed_dims})
            self.small_norm = build_norm_layer(norm_cfg, self.embed_dims)[1]

    def forward(
        self,
        memory: Tensor,
        query_pos: Tensor,
        num_low_tokens: int,
        key_padding_mask: Tensor | None,
        reference_points: Tensor,
        spatial_shapes: Tensor,
        level_start_index: Tensor,
    ) -> Tensor:
        """Update the tokens of the step.

        Args:
            memory (Tensor): All tokens, low-level ones first, shape (bs, num_tokens, embed_dims).
            query_pos (Tensor): Their positional embedding, same shape.
            num_low_tokens (int): How many of them are low-level tokens.
            key_padding_mask (Tensor, optional): bool, True on padding, shape (bs, num_tokens).
            reference_points (Tensor): shape (bs, num_tokens, num_levels, 2).
            spatial_shapes (Tensor): shape (num_levels, 2).
            level_start_index (Tensor): shape (num_levels, ).

        Returns:
            Tensor: All tokens with those of the step updated. Where gradients are off this is
            ``memory`` itself, written in place.
        """
        start = 0 if self.step.updates_low else num_low_tokens
        stop = memory.shape[1] if self.step.updates_high else num_low_tokens
        query = self.self_attn(
            memory[:, start:stop],
            value=memory,
            query_pos=query_pos[:, start:stop],
            key_padding_mask=key_padding_mask,
            reference_points=reference_points[:, start:stop],
            spatial_shapes=spatial_shapes,
            level_start_index=level_start_index,
        )
        query = self.norms[0](query)

        num_small = num_low_tokens - start if self.has_small_ffn else 0
        runs = []  # consecutive tokens with the FFN and the norm they go through
        if num_small:
            runs.append((query[:, :num_small], self.small_ffn, self.small_norm))
        if num_small < query.shape[1]:
            runs.append((query[:, num_small:], self.ffn, self.norms[1]))
        if torch.is_grad_enabled():
            updated = [norm(ffn(tokens)) for tokens, ffn, norm in runs]
            pieces = [memory[:, :start], *updated, memory[:, stop:]]
            pieces = [piece for piece in pieces if piece.shape[1]]
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
        for tokens, ffn, norm in runs:
            size = _TOKENS_IN_CACHE if tokens.device.type == 'cpu' else tokens.shape[1]
            for chunk in tokens.split(size, 1):
                memory[:, start : start + chunk.shape[1]] = norm(ffn(chunk))
                start += chunk.shape[1]
        return memory


@MODELS.register_module()
class LiteEncoder(DeformableDetrTransformerEncoder):
    """Interleaved multi-scale encoder (Lite DETR, section 4).

    Takes the place of MMDetection's ``DeformableDetrTransformerEncoder``: same call, same output.
    High-level tokens (the few of the small maps) are updated in every layer, low-level tokens
    (the many of the largest maps) once in a block. Every layer reads all tokens.

    Args:
        schedule (str | EncoderSchedule): For example ``'H3L1-(2+1)x3'``.
        num_layers (int, optional): Layers of the stock encoder that this one replaces; must be
            A * B of the schedule. It is there because stock configs have it.
        layer_cfg (dict): ``self_attn_cfg``, ``ffn_cfg`` and ``norm_cfg`` of the stock layer;
            ``self_attn_cfg`` may hold ``proj_key`` and ``same_loc`` where ``key_aware`` is on.
        key_aware (bool): Key-aware deformable attention (KDA), or standard.
        small_ffn (bool): Give low-level tokens an FFN of ``embed_dims`` hidden channels.
        update (str): ``'joint'`` or ``'sequential'``; see :meth:`EncoderSchedule.steps`.
        num_cp (int): Layers, counted from the first, whose activations are recomputed in the
            backward pass (torch's checkpointing). -1 for none.
        init_cfg (dict, optional): Initialisation config of mmengine.

    Raises:
        ValueError: The schedule is malformed, or does not fit ``num_layers`` or the number of
            levels of the attention; the message says what would fit.
    """

    def __init__(
        self,
        schedule: str | EncoderSchedule,
        num_layers: int | None = None,
        layer_cfg: ConfigDict | dict | None = None,
        key_aware: bool = True,
        small_ffn: bool = True,
        update: str = 'joint',
        num_cp: int = -1,
        init_cfg: ConfigDict | dict | None = None,
    ) -> None:
        self.schedule = EncoderSchedule.parse(schedule)
        self.steps = self.schedule.steps(update)
        self.key_aware = key_aware
        self.small_ffn = small_ffn
        self.update = update
        layer_cfg = dict(layer_cfg or {})
        _check_fit(self.schedule, len(self.steps), num_layers, layer_cfg)
        super().__init__(
            num_layers=len(self.steps), layer_cfg=layer_cfg, num_cp=num_cp, init_cfg=init_cfg
        )
        # Weights fit several schedules (H3L1 and H2L2 have the same names and shapes) and are right
        # for one, so they carry it. As a buffer it is in every checkpoint, whoever writes it.
        self.register_buffer('schedule_code', self.schedule.encode(update))

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """Refuse weights of another schedule, with strict loading and without.

        Weights that carry no schedule, such as the stock encoder's, are taken as they are.

        Raises:
            ValueError: The weights were trained with another schedule; the message names it.
        """
        key = f'{prefix}schedule_code'
        if key in state_dict:
            theirs, update = EncoderSchedule.decode(state_dict[key])
            if (theirs, update) != (self.schedule, self.update):
                raise ValueError(
                    f'the weights were trained with schedule {theirs} and {update} updates, but '
                    f"this encoder's is {self.schedule} with {self.update} updates; set "
                    f"encoder=dict(schedule='{theirs}', update='{update}')"
                )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if key in missing_keys:
            missing_keys.remove(key)

    def _init_layers(self) -> None:
        self.layers = ModuleList(
            LiteEncoderLayer(
                step, key_aware=self.key_aware, small_ffn=self.small_ffn, **self.layer_cfg
            )
            for step in self.steps
        )
        self.embed_dims = self.layers[0].embed_dims

    def forward(
        self,
        query: Tensor,
        query_pos: Tensor,
        key_padding_mask: Tensor | None,
        spatial_shapes: Tensor,
        level_start_index: Tensor,
        valid_ratios: Tensor,
        **kwargs,
    ) -> Tensor:
        """Encode the flattened pyramid, largest map first.

        Args:
            query (Tensor): Tokens of all levels, shape (bs, num_tokens, embed_dims).
            query_pos (Tensor): Their positional embedding, same shape.
            key_padding_mask (Tensor, optional): bool, True on padding, shape (bs, num_tokens).
            spatial_shapes (Tensor): (h, w) of each level, integer, shape (num_levels, 2).
            level_start_index (Tensor): First token of each level, shape (num_levels, ).
            valid_ratios (Tensor): Valid part (w, h) of each level, shape (bs, num_levels, 2).

        Returns:
            Tensor: The memory, shape (bs, num_tokens, embed_dims).

        Raises:
            ValueError: The number of levels or tokens is not the schedule's.
        """
        shapes = tuple(map(tuple, spatial_shapes.tolist()))
        num_tokens = sum(height * width for height, width in shapes)
        if len(shapes) != self.schedule.num_levels or num_tokens != query.shape[1]:
            raise ValueError(
                f'schedule {self.schedule} takes {self.schedule.num_levels} feature levels; got '
                f'{len(shapes)} of sizes {list(shapes)} ({num_tokens} tokens) and '
                f'{query.shape[1]} tokens'
            )
        num_low = sum(h * w for h, w in shapes[: self.schedule.num_low_levels])
        reference_points = self.get_encoder_reference_points(
            spatial_shapes, valid_ratios, device=query.device
        )
        # Without gradients the layers write in place, which the caller's tensor must not notice.
        memory = query if torch.is_grad_enabled() else query.clone()
        arguments = (
            query_pos,
            num_low,
            key_padding_mask,
            reference_points,
            spatial_shapes,
            level_start_index,
        )
        for index, layer in enumerate(self.layers):
            if index < self.num_cp and self.training and torch.is_grad_enabled():
                memory = checkpoint(layer, memory, *arguments, use_reentrant=False)
            else:
                memory = layer(memory, *arguments)
        return memory

    @staticmethod
    def get_encoder_reference_points(
        spatial_shapes: Tensor, valid_ratios: Tensor, device: torch.device | str
    ) -> Tensor:
        """Centre of every token on every level, as the stock encoder's; made once per shape.

        Args:
            spatial_shapes (Tensor): shape (num_levels, 2).
            valid_ratios (Tensor): shape (bs, num_levels, 2).
            device (torch.device | str): Where the points are wanted.

        Returns:
            Tensor: Normalised (x, y), float32, shape (bs, num_tokens, num_levels, 2).
        """
        shapes = tuple(map(tuple, spatial_shapes.tolist()))
        centres, level = _token_centres(shapes, str(torch.device(device)))
        centres = centres / valid_ratios[:, level]
        return centres[:, :, None] * valid_ratios[:, None]


@lru_cache(maxsize=32)
def _token_centres(shapes: tuple[tuple[int, int], ...], device: str) -> tuple[Tensor, Tensor]:
    """Normalised (x, y) of every token on its own map, (num_tokens, 2), and its level."""
    centres, level = [], []
    # Cached tensors must be usable under autograd even if first needed in inference mode.
    with torch.inference_mode(False):
        for index, (height, width) in enumerate(shapes):
            y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
            x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
            y, x = torch.meshgrid(y, x, indexing='ij')
            centres.append(torch.stack([x, y], -1).flatten(0, 1))
            level.append(torch.full((height * width,), index, device=device))
        return torch.cat(centres), torch.cat(level)


def _check_fit(
    schedule: EncoderSchedule, num_steps: int, num_layers: int | None, layer_cfg: dict
) -> None:
    """Refuse a schedule that does not fit the stock config it is put into."""
    levels = f'H{schedule.num_high_levels}L{schedule.num_low_levels}'
    if num_layers is not None and num_layers not in (schedule.num_layers, num_steps):
        fitting = ', '.join(
            f'{levels}-({num_layers // blocks}+1)x{blocks}'
            for blocks in range(num_layers, 0, -1)
            if num_layers % blocks == 0
        )
        raise ValueError(
            f'schedule {schedule} makes {schedule.num_layers} layers, but num_layers is '
            f'{num_layers}; use one of {fitting}, or num_layers={schedule.num_layers}'
        )
    num_levels = (layer_cfg.get('self_attn_cfg') or {}).get('num_levels', 4)
    if schedule.num_levels != num_levels:
        blocks = f'({schedule.high_updates}+1)x{schedule.num_blocks}'
        fitting = ', '.join(
            f'H{num_levels - low}L{low}-{blocks}' for low in range(1, min(num_levels, 3))
        )
        raise ValueError(
            f'schedule {schedule} is for {schedule.num_levels} feature levels, but the '
            f"encoder's attention has num_levels={num_levels}; use {fitting or 'more levels'}"
        )
