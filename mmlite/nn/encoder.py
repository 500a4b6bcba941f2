"""The interleaved multi-scale encoder of Lite DETR, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .attention import make_attention
from .geometry import LevelSizes, encoder_reference_points
from .schedule import (
    EncoderSchedule,
    EncoderStep,
    decode_schedules,
    encode_schedules,
    layer_steps,
    level_ranks,
    stock_layers,
)
from .tokens import StepTokens

# What a family does between two layers: gets the number of the layer that comes next, all tokens
# and the tokens of its step; returns all tokens.
BeforeLayer = Callable[[int, Tensor, StepTokens], Tensor]

# torch 2.1 has it elsewhere.
_is_compiling = getattr(torch.compiler, 'is_compiling', None) or torch._dynamo.is_compiling


class FFN(nn.Module):
    """Feed-forward network with its identity added, under the names of mmcv's ``FFN``.

    Args:
        embed_dims (int): Channels.
        feedforward_channels (int): Hidden channels.
        dropout (float): Dropout behind each of the two layers.
        activation (nn.Module, optional): Behind the first layer. Defaults to ReLU.
        activation_dropout (float, optional): Dropout behind the first layer, where it differs.
    """

    def __init__(
        self,
        embed_dims: int,
        feedforward_channels: int,
        dropout: float = 0.0,
        activation: nn.Module | None = None,
        activation_dropout: float | None = None,
    ) -> None:
        super().__init__()
        hidden = nn.Sequential(
            nn.Linear(embed_dims, feedforward_channels),
            activation or nn.ReLU(inplace=True),
            nn.Dropout(dropout if activation_dropout is None else activation_dropout),
        )
        output = nn.Linear(feedforward_channels, embed_dims)
        self.layers = nn.Sequential(hidden, output, nn.Dropout(dropout))

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., embed_dims) -> (..., embed_dims)."""
        return tokens + self.layers(tokens)


class LiteEncoderLayer(nn.Module):
    """One encoder layer, over all tokens or over the high- or low-level ones alone.

    High-level tokens go through the FFN and the second norm of the stock layer. Low-level tokens
    do so too, or, with ``small_ffn``, through an FFN of ``embed_dims`` hidden channels with a
    norm of its own (Lite DETR, section 4.2). The norm after the attention is shared. A layer has
    only the modules that its step uses.

    Args:
        step (EncoderStep): Which tokens the layer updates.
        self_attn (nn.Module): The attention; adds its input to its output.
        norm (nn.Module): The norm behind it.
        make_ffn (Callable): Makes an FFN, which adds its input to its output, and its norm: called
            with the number of hidden channels, None for those of the stock layer.
        small_ffn (bool): Whether low-level tokens have a small one.
        chunk_size (int, optional): See :class:`LiteEncoder`.
    """

    def __init__(
        self,
        step: EncoderStep,
        self_attn: nn.Module,
        norm: nn.Module,
        make_ffn: Callable[[int | None], tuple[nn.Module, nn.Module]],
        small_ffn: bool = True,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        self.step = step
        self.chunk_size = chunk_size
        self.self_attn = self_attn
        self.embed_dims: int = self_attn.embed_dims  # type: ignore[assignment]
        self.norms = nn.ModuleList([norm])
        has_ffn, self.has_small_ffn = step.ffns(small_ffn)
        if has_ffn:
            self.ffn, norm = make_ffn(None)
            self.norms.append(norm)
        if self.has_small_ffn:
            self.small_ffn, self.small_norm = make_ffn(self.embed_dims)

    def forward(
        self,
        memory: Tensor,
        query_pos: Tensor | None,
        step_tokens: StepTokens,
        key_padding_mask: Tensor | None,
        reference_points: Tensor,
        spatial_shapes: LevelSizes,
    ) -> Tensor:
        """Update the tokens of the step.

        Args:
            memory (Tensor): All tokens, shape (bs, num_tokens, embed_dims). This and what follows
                is as for :meth:`InterleavedEncoder.forward`.
            query_pos (Tensor, optional): Their positional embedding.
            step_tokens (StepTokens): Which of them the layer updates.
            key_padding_mask (Tensor, optional): True on padding.
            reference_points (Tensor): shape (bs or 1, num_tokens, num_levels, 2).
            spatial_shapes (Sequence[tuple[int, int]]): (h, w) of every level.

        Returns:
            Tensor: All tokens with those of the step updated, a new tensor.
        """
        pick, keys, options = step_tokens.pick, step_tokens.keys, {}
        points = pick(reference_points)
        if step_tokens.read is not None:
            points, options['levels'] = points[:, :, list(step_tokens.read)], step_tokens.read
            spatial_shapes = [spatial_shapes[level] for level in step_tokens.read]
        query = self.self_attn(
            pick(memory),
            value=keys(memory),
            query_pos=None if query_pos is None else pick(query_pos),
            key_padding_mask=None if key_padding_mask is None else keys(key_padding_mask),
            reference_points=points,
            spatial_shapes=spatial_shapes,
            **options,
        )
        query = self.norms[0](query)
        updated = []
        for run, tokens in step_tokens.split(query):
            is_small = run.is_low and self.has_small_ffn
            ffn = (self.small_ffn, self.small_norm) if is_small else (self.ffn, self.norms[1])
            updated.append(self._feed(tokens, *ffn))
        return step_tokens.put_back(memory, updated)

    def _feed(self, tokens: Tensor, ffn: nn.Module, norm: nn.Module) -> Tensor:
        """An FFN and its norm on every token; see ``chunk_size`` of :class:`LiteEncoder`."""
        size, is_tracing = self.chunk_size, _is_compiling() or torch.jit.is_tracing()
        if size is None or tokens.device.type != 'cpu' or is_tracing or tokens.shape[1] <= size:
            return norm(ffn(tokens))
        return torch.cat([norm(ffn(chunk)) for chunk in tokens.split(size, 1)], 1)


class TokenRecalibration(nn.Module):
    """Weights the tokens of smaller maps by what the largest map shows in their place.

    The token re-calibration of PRO-SCALE (arXiv 2404.14657): a token times
    ``sigmoid(0.1 * linear(largest map))``. A score is taken of every token of the largest map and
    resized, which is the linear layer of the resized map.

    Args:
        embed_dims (int): Channels of the tokens.
    """

    def __init__(self, embed_dims: int) -> None:
        super().__init__()
        self.score = nn.Linear(embed_dims, 1)

    def forward(self, tokens: Tensor, level_sizes: LevelSizes, largest: int) -> Tensor:
        """Weight tokens, shape (bs, num_tokens, embed_dims), of maps of (h, w) each."""
        levels = list(tokens.split([height * width for height, width in level_sizes], 1))
        scores = self.score(levels[largest]).transpose(1, 2).unflatten(2, level_sizes[largest])
        for index, size in enumerate(level_sizes):
            if index != largest:
                there = F.interpolate(scores, size, mode='bilinear').flatten(2).transpose(1, 2)
                levels[index] = levels[index] * (0.1 * there).sigmoid()
        return torch.cat(levels, 1)


class InterleavedEncoder(nn.Module):
    """The interleaved encoder over layers of any make (Lite DETR, section 4).

    High-level tokens (the few of the small maps) are updated in every layer, low-level tokens
    (the many of the largest maps) once in a block. Every layer reads all tokens, unless the
    schedule names what it reads. Needs nothing but PyTorch; compiles and exports whole.

    Args:
        schedule (str | EncoderSchedule): Which tokens are updated when.
        make_layer (Callable): Makes a :class:`LiteEncoderLayer`: called with its step, and the
            number of the stock layer that has updated the high-level tokens as often.
        update (str): ``'joint'`` or ``'sequential'``; see :meth:`EncoderSchedule.steps`.
        num_cp (int): Layers, counted from the first, whose activations are recomputed in the
            backward pass of training (torch's checkpointing). -1 for none.
        low_levels (Collection[int], optional): Indices of the low-level maps among the levels. By
            default the largest maps, as many as the schedule says.
        elastic (Sequence[str | EncoderSchedule]): Further schedules that the layers serve. In
            training every call takes another one: see :attr:`turns`.
        recalibrate (bool): Weight the tokens first; see :class:`TokenRecalibration`.

    Attributes:
        schedule (EncoderSchedule): The one that is computed; :meth:`use_schedule` chooses it.
        schedules (tuple[EncoderSchedule, ...]): All that there are weights for.
        level_ranks (tuple[int, ...], optional): Of every level, how many are smaller, where that
            is known beforehand. Otherwise the sizes of the maps say so.
        stock_layers (list[int]): For each layer the stock layer that it was made for.

    Raises:
        ValueError: A schedule is malformed, or ``low_levels`` or a further schedule does not fit.
    """

    swaps = False  # whether the stock layers have the axis of the tokens first

    def __init__(
        self,
        schedule: str | EncoderSchedule,
        make_layer: Callable[[EncoderStep, int], nn.Module],
        update: str = 'joint',
        num_cp: int = -1,
        low_levels: Collection[int] | None = None,
        elastic: Sequence[str | EncoderSchedule] = (),
        recalibrate: bool = False,
    ) -> None:
        super().__init__()
        every = EncoderSchedule.parse(schedule), *EncoderSchedule.parse_all(elastic)
        self.schedules = tuple(dict.fromkeys(every))
        self.update = update
        self.use_schedule(schedule)
        self.num_cp = num_cp
        self.level_ranks: tuple[int, ...] | None = None
        if low_levels is not None:
            self.level_ranks = self.schedule.chosen_ranks(low_levels)
        steps = layer_steps(self.schedules, update)
        self.stock_layers = stock_layers(steps)
        self.layers = nn.ModuleList(map(make_layer, steps, self.stock_layers))
        self.embed_dims: int = self.layers[0].embed_dims  # type: ignore[assignment]
        self.recalibration = TokenRecalibration(self.embed_dims) if recalibrate else None
        self.training_calls = 0  # which says whose turn it is
        # Weights fit several schedules (H3L1 and H2L2 have the same names and shapes) and are right
        # for some, so they carry them. As a buffer they are in every checkpoint.
        self.register_buffer('schedule_code', encode_schedules(self.schedules, update))

    def use_schedule(self, schedule: str | EncoderSchedule) -> None:
        """Choose the schedule to compute.

        Raises:
            ValueError: It is none of those that the encoder was made for.
        """
        schedule = EncoderSchedule.parse(schedule)
        if schedule not in self.schedules:
            names = ', '.join(map(str, self.schedules))
            raise ValueError(f'schedule {schedule} has no trained weights here; there are {names}')
        self.schedule = schedule
        self.steps = schedule.steps(self.update)

    @property
    def turns(self) -> int:
        """Calls of a round in training: the most expensive schedule, the cheapest, one between."""
        return 1 if len(self.schedules) == 1 else 3

    @property
    def next_schedule(self) -> EncoderSchedule:
        """The next call's schedule: the chosen one, or in training the one whose turn it is."""
        if not self.training or self.turns == 1:
            return self.schedule
        ordered = sorted(self.schedules, key=lambda schedule: -schedule.cost)
        between = ordered[1:-1] or ordered
        number, turn = divmod(self.training_calls, self.turns)
        return (ordered[0], ordered[-1], between[number % len(between)])[turn]

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """Refuse weights of other schedules; those without one, such as stock ones, are taken."""
        key = f'{prefix}schedule_code'
        if key in state_dict:
            theirs, update = decode_schedules(state_dict[key])
            if update != self.update or not set(self.schedules) <= set(theirs):
                names, ours = (' and '.join(map(str, each)) for each in (theirs, self.schedules))
                others = [*map(str, theirs[1:])]
                elastic = f', elastic={others}' if others or len(self.schedules) > 1 else ''
                raise ValueError(
                    f'the weights were trained with schedule {names} and {update} updates, but '
                    f"this encoder's is {ours} with {self.update} updates; set "
                    f"encoder=dict(schedule='{theirs[0]}'{elastic}, update='{update}')"
                )
            # Other weights may have more schedules, or integers, as version 0.1.0 wrote.
            code = encode_schedules(self.schedules, update)
            state_dict[key] = code.to(state_dict[key].device)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if key in missing_keys:
            missing_keys.remove(key)

    def forward(
        self,
        tokens: Tensor,
        pos: Tensor | None,
        level_sizes: LevelSizes,
        *,
        padding_mask: Tensor | None = None,
        valid_ratios: Tensor | None = None,
        before_layer: BeforeLayer | None = None,
        reference_points: Tensor | None = None,
    ) -> Tensor:
        """Encode a flattened pyramid.

        Args:
            tokens (Tensor): Tokens of all levels, level after level, shape
                (bs, num_tokens, embed_dims).
            pos (Tensor, optional): Their positional embedding, same shape.
            level_sizes (Sequence[tuple[int, int]]): (h, w) of every level, Python ints, in the
                order of the tokens, which may be any.
            padding_mask (Tensor, optional): bool, True on padding, shape (bs, num_tokens).
            valid_ratios (Tensor, optional): Valid part (w, h) of each level, shape
                (bs, num_levels, 2). None where no image is padded.
            before_layer (Callable, optional): A step of one's own before each layer, such as
                fusing with text: called with the number of the layer, all tokens and the layer's
                :class:`StepTokens`, returns all tokens.
            reference_points (Tensor, optional): Where the tokens lie on each level, shape
                (bs or 1, num_tokens, num_levels, 2); by default as ``valid_ratios`` says.

        Returns:
            Tensor: The memory, shape (bs, num_tokens, embed_dims), in the order of the tokens.

        Raises:
            ValueError: The number of levels or tokens is not the schedule's.
        """
        num_tokens = sum(height * width for height, width in level_sizes)
        if len(level_sizes) != self.schedule.num_levels or num_tokens != tokens.shape[1]:
            raise ValueError(
                f'schedule {self.schedule} takes {self.schedule.num_levels} feature levels; got '
                f'{len(level_sizes)} of sizes {list(level_sizes)} ({num_tokens} tokens) and '
                f'{tokens.shape[1]} tokens'
            )
        schedule = self.next_schedule
        if self.training and self.turns > 1:  # a compiled one is compiled for each turn
            calls = self.turns * (len(self.schedules) - 2 or len(self.schedules))
            self.training_calls = (self.training_calls + 1) % calls
        ranks = self.level_ranks or level_ranks(level_sizes)
        if reference_points is None:
            device = tokens.device
            reference_points = encoder_reference_points(level_sizes, valid_ratios, device=device)
        memory = tokens
        if self.recalibration is not None:
            memory = self.recalibration(tokens, level_sizes, ranks.index(max(ranks)))
        for index, (step, layer) in enumerate(zip(schedule.steps(self.update), self.layers)):
            step_tokens = StepTokens(step, level_sizes, ranks, schedule.num_high_levels)
            if before_layer is not None:
                memory = before_layer(index, memory, step_tokens)
            arguments = (memory, pos, step_tokens, padding_mask, reference_points, level_sizes)
            memory = self.run(index, layer, *arguments)
        return memory

    def step_tokens(self, index: int, level_sizes: LevelSizes) -> StepTokens:
        """What a layer updates and reads of such a pyramid, by the chosen schedule."""
        ranks = self.level_ranks or level_ranks(level_sizes)
        return StepTokens(self.steps[index], level_sizes, ranks, self.schedule.num_high_levels)

    def run(self, index: int, module: nn.Module, *arguments):
        """Call what belongs to layer ``index``; ``num_cp`` says if activations are recomputed."""
        if index < self.num_cp and self.training and torch.is_grad_enabled():
            return checkpoint(module, *arguments, use_reentrant=False)
        return module(*arguments)


class LiteEncoder(InterleavedEncoder):
    """:class:`InterleavedEncoder` made of this package's attention and FFNs.

    ``update``, ``num_cp``, ``low_levels``, ``elastic`` and ``recalibrate`` are those of
    :class:`InterleavedEncoder`; ``proj_key`` and ``same_loc`` need ``key_aware``, see
    :class:`KeyAwareDeformableAttention`.

    Args:
        schedule (str | EncoderSchedule): For example ``'H3L1-(2+1)x3'``.
        embed_dims (int): Channels of the tokens, a multiple of ``num_heads``.
        num_heads (int): Attention heads.
        num_points (int): Sampling points per head and level.
        feedforward_channels (int): Hidden channels of the FFN.
        key_aware (bool): Key-aware deformable attention (KDA), or standard.
        small_ffn (bool): Give low-level tokens an FFN of ``embed_dims`` hidden channels.
        dropout (float): Dropout behind the attention and in the FFNs.
        chunk_size (int, optional): On a CPU, so many tokens at a time go through the FFNs: their
            hidden features then stay in the cache (8 MB at 2048 channels, where all tokens of an
            800x1333 image make 180 MB). Other devices and traced graphs take all at once, and so
            does None.

    Raises:
        ValueError: The schedule is malformed, or an argument does not fit it.
    """

    def __init__(
        self,
        schedule: str | EncoderSchedule,
        embed_dims: int = 256,
        num_heads: int = 8,
        num_points: int = 4,
        feedforward_channels: int = 2048,
        key_aware: bool = True,
        small_ffn: bool = True,
        update: str = 'joint',
        proj_key: bool = False,
        same_loc: bool = False,
        num_cp: int = -1,
        *,
        dropout: float = 0.0,
        low_levels: Collection[int] | None = None,
        chunk_size: int | None = 1024,
        elastic: Sequence[str | EncoderSchedule] = (),
        recalibrate: bool = False,
    ) -> None:
        schedule = EncoderSchedule.parse(schedule)
        shape = (embed_dims, num_heads, schedule.num_levels, num_points)

        def make_ffn(channels: int | None) -> tuple[nn.Module, nn.Module]:
            ffn = FFN(embed_dims, channels or feedforward_channels, dropout)
            return ffn, nn.LayerNorm(embed_dims)

        def make_layer(step: EncoderStep, stock: int) -> nn.Module:
            attention = make_attention(key_aware, shape, dropout, proj_key, same_loc)
            norm = nn.LayerNorm(embed_dims)
            return LiteEncoderLayer(step, attention, norm, make_ffn, small_ffn, chunk_size)

        super().__init__(schedule, make_layer, update, num_cp, low_levels, elastic, recalibrate)
