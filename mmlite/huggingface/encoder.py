"""The Lite encoder in models of transformers.

A stock encoder is read, layer by layer, for what the Lite encoder needs to know (channels, heads,
points, activation, dropout), so that no config has to be understood, and for its weights.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import (
    FFN,
    DeformableAttention,
    EncoderSchedule,
    EncoderStep,
    KeyAwareDeformableAttention,
    LiteEncoder,
    LiteEncoderLayer,
    StepTokens,
)
from .attention import LevelSizes, check_version

# Where `save_pretrained` writes down how the encoder was made.
CONFIG_NAME = 'lite_encoder'


def to_lite(
    model: nn.Module,
    schedule: str | EncoderSchedule,
    *,
    key_aware: bool = True,
    small_ffn: bool = True,
    update: str = 'joint',
    proj_key: bool = False,
    same_loc: bool = False,
    num_cp: int = -1,
) -> nn.Module:
    """Give a built model the Lite encoder in place of its own.

    Whatever has a counterpart in the stock encoder starts with its weights; the query projections
    of key-aware attention and the small FFNs start at random and need training. With a schedule
    that updates every level in every layer, such as ``'H3L1-(1+1)x6'``, and ``key_aware`` and
    ``small_ffn`` off, the model computes exactly what it did.

    Args:
        model (nn.Module): A model of transformers: Deformable DETR, Grounding DINO,
            MM-Grounding DINO, Mask2Former or OneFormer. Changed in place.
        schedule (str | EncoderSchedule): For example ``'H3L1-(2+1)x3'``; A * B is the number of
            layers of the stock encoder.
        key_aware (bool): Key-aware deformable attention (KDA), or standard.
        small_ffn (bool): Give low-level tokens an FFN with as many hidden channels as the model
            has channels.
        update (str): ``'joint'`` or ``'sequential'``; see :meth:`mmlite.nn.EncoderSchedule.steps`.
        proj_key (bool): See :class:`mmlite.nn.KeyAwareDeformableAttention`.
        same_loc (bool): See :class:`mmlite.nn.KeyAwareDeformableAttention`.
        num_cp (int): Layers, counted from the first, whose activations are recomputed in the
            backward pass of training.

    Returns:
        nn.Module: ``model``.

    Raises:
        ValueError: The model has no encoder to replace or has a Lite one, or the schedule does
            not fit it; the message says what would. Nothing is changed then.
        ImportError: The installed transformers is too old.
    """
    check_version()
    settings = dict(
        schedule=str(EncoderSchedule.parse(schedule)),
        key_aware=key_aware,
        small_ffn=small_ffn,
        update=update,
        proj_key=proj_key,
        same_loc=same_loc,
        num_cp=num_cp,
    )
    stock = {name: part for name, part in model.named_modules() if type(part).__name__ in _LITE}
    if not stock or '' in stock:
        if any(isinstance(part, LiteEncoder) for part in model.modules()):
            raise ValueError(f'{type(model).__name__} has a Lite encoder already')
        raise ValueError(
            f'{type(model).__name__} holds no encoder that the Lite encoder can replace; '
            'Deformable DETR, Grounding DINO, MM-Grounding DINO, Mask2Former and OneFormer do'
        )
    lite = {name: _LITE[type(part).__name__](part, **settings) for name, part in stock.items()}
    for name, encoder in lite.items():
        parent, _, attribute = name.rpartition('.')
        setattr(model.get_submodule(parent), attribute, encoder)
    if hasattr(model, 'config'):
        setattr(model.config, CONFIG_NAME, settings)
    return model


def load_lite(model_class: type[nn.Module], folder: str, **kwargs: Any) -> nn.Module:
    """Load what ``save_pretrained`` wrote of a model that :func:`to_lite` changed.

    Args:
        model_class (type[nn.Module]): The model's class, for example
            ``transformers.DeformableDetrForObjectDetection``.
        folder (str): Whatever the class's ``from_pretrained`` takes.
        **kwargs: The other arguments of ``from_pretrained``.

    Returns:
        nn.Module: An instance of ``model_class`` with the Lite encoder that was saved.

    Raises:
        ValueError: What was saved has no Lite encoder.
        ImportError: The installed transformers is too old.
    """
    check_version()
    settings = getattr(model_class.config_class.from_pretrained(folder), CONFIG_NAME, None)
    if settings is None:
        raise ValueError(
            f'{folder} was saved without a Lite encoder: load it by '
            f'{model_class.__name__}.from_pretrained, then call to_lite'
        )

    def build(self, config, *args, **kwargs):
        model_class.__init__(self, config, *args, **kwargs)
        to_lite(self, **settings)

    # Under the name of the model's class, which transformers looks at.
    lite_class = type(model_class.__name__, (model_class,), {'__init__': build})
    lite_class.__module__ = model_class.__module__
    model = lite_class.from_pretrained(folder, **kwargs)
    model.__class__ = model_class
    return model


class _Encoder(LiteEncoder):
    """A Lite encoder built after a stock encoder of transformers, and warm-started from it.

    Args:
        stock (nn.Module): The encoder it replaces.
        schedule (str): The other arguments are those of :func:`to_lite`.

    Raises:
        ValueError: The schedule does not fit the stock encoder.
    """

    smallest_first = False  # the order of the maps in the family's pyramid

    def __init__(
        self,
        stock: nn.Module,
        schedule: str | EncoderSchedule,
        key_aware: bool,
        small_ffn: bool,
        update: str,
        proj_key: bool,
        same_loc: bool,
        num_cp: int,
    ) -> None:
        nn.Module.__init__(self)
        if (proj_key or same_loc) and not key_aware:
            raise ValueError('proj_key and same_loc are of key-aware attention; set key_aware=True')
        schedule = EncoderSchedule.parse(schedule)
        parts = [_parts(layer) for layer in stock.layers]
        like = parts[0]
        attn = like['self_attn']
        schedule.check_fit(len(parts), attn.n_levels, update)

        def make_layer(step: EncoderStep) -> LiteEncoderLayer:
            arguments = (attn.d_model, attn.n_heads, attn.n_levels, attn.n_points, like['dropout'])
            return LiteEncoderLayer(
                step,
                KeyAwareDeformableAttention(*arguments, proj_key=proj_key, same_loc=same_loc)
                if key_aware
                else DeformableAttention(*arguments),
                lambda channels: _make_ffn(like, channels),
                lambda: nn.LayerNorm(attn.d_model, eps=like['final_layer_norm'].eps),
                small_ffn,
                chunk_size=1024,
            )

        self._assemble(schedule, update, make_layer, num_cp, self._low_levels(schedule))
        self.stock_layers = _stock_layers(self.steps)
        for layer, index in zip(self.layers, self.stock_layers):
            _copy_layer(layer, parts[index])
        self.to(attn.value_proj.weight)
        self.schedule_code = self.schedule_code.long()
        self.train(stock.training)

    def _low_levels(self, schedule: EncoderSchedule) -> Collection[int]:
        levels = range(schedule.num_levels)
        count = schedule.num_low_levels
        return levels[-count:] if self.smallest_first else levels[:count]


class DeformableDetrLiteEncoder(_Encoder):
    """In the place of ``DeformableDetrEncoder``."""

    def __init__(self, stock: nn.Module, *args, **kwargs) -> None:
        super().__init__(stock, *args, **kwargs)
        self.dropout = nn.Dropout(stock.dropout)

    def forward(  # type: ignore[override]
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        spatial_position_embeddings: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        spatial_shapes_list: LevelSizes | None = None,
        level_start_index: Tensor | None = None,
        valid_ratios: Tensor | None = None,
        **kwargs,
    ):
        """Encode the pyramid, largest map first; the attention mask is True on what is real."""
        from transformers.modeling_outputs import BaseModelOutput

        memory = super().forward(
            self.dropout(inputs_embeds),
            spatial_position_embeddings,
            spatial_shapes_list,
            padding_mask=None if attention_mask is None else ~attention_mask,
            valid_ratios=valid_ratios,
        )
        return BaseModelOutput(last_hidden_state=memory)


class PixelDecoderLiteEncoder(_Encoder):
    """In the place of Mask2Former's and OneFormer's ``...PixelDecoderEncoderOnly``."""

    smallest_first = True

    def forward(  # type: ignore[override]
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        spatial_shapes_list: LevelSizes | None = None,
        level_start_index: Tensor | None = None,
        valid_ratios: Tensor | None = None,
        **kwargs,
    ):
        """Encode the pyramid, smallest map first; the attention mask is True on padding."""
        from transformers.modeling_outputs import BaseModelOutput

        memory = super().forward(
            inputs_embeds,
            position_embeddings,
            spatial_shapes_list,
            padding_mask=attention_mask,
            valid_ratios=valid_ratios,
        )
        return BaseModelOutput(last_hidden_state=memory)


class GroundingDinoLiteEncoder(_Encoder):
    """In the place of Grounding DINO's and MM-Grounding DINO's encoder.

    The stock encoder fuses all image tokens with the text before each of its layers. Here the
    queries of a layer are fused with the text before it, and the other tokens wait: a low-level
    token meets the text as often as it is updated, and the text reads the tokens of the step.
    """

    def __init__(self, stock: nn.Module, *args, **kwargs) -> None:
        super().__init__(stock, *args, **kwargs)
        layers = [copy.deepcopy(stock.layers[index]) for index in self.stock_layers]
        self.fusion_layers = nn.ModuleList(layer.fusion_layer for layer in layers)
        self.text_enhancer_layers = nn.ModuleList(layer.text_enhancer_layer for layer in layers)
        # A method of the stock layer that reads `d_model` of it and nothing else.
        self.d_model = self.embed_dims
        self.text_positions = type(stock.layers[0]).get_text_position_embeddings

    def forward(  # type: ignore[override]
        self,
        vision_features: Tensor,
        vision_attention_mask: Tensor | None = None,
        vision_position_embedding: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        spatial_shapes_list: LevelSizes | None = None,
        level_start_index: Tensor | None = None,
        valid_ratios: Tensor | None = None,
        text_features: Tensor | None = None,
        text_attention_mask: Tensor | None = None,
        text_position_embedding: Tensor | None = None,
        text_self_attention_masks: Tensor | None = None,
        text_position_ids: Tensor | None = None,
        return_dict: bool | None = True,
        **kwargs,
    ):
        """Encode the pyramid, largest map first, and the text; masks are True on padding."""
        text = text_features
        text_pos = self.text_positions(self, text, text_position_embedding, text_position_ids)

        def fuse(index: int, memory: Tensor, step_tokens: StepTokens) -> Tensor:
            nonlocal text
            mask = vision_attention_mask
            (tokens, _), (text, _) = self.fusion_layers[index](
                vision_features=step_tokens.pick(memory),
                text_features=text,
                attention_mask_vision=None if mask is None else step_tokens.pick(mask),
                attention_mask_text=text_attention_mask,
            )
            text, _ = self.text_enhancer_layers[index](
                hidden_states=text,
                attention_masks=~text_self_attention_masks,
                position_embeddings=text_pos,
            )
            return step_tokens.put_back(memory, [run for _, run in step_tokens.split(tokens)])

        memory = super().forward(
            vision_features,
            vision_position_embedding,
            spatial_shapes_list,
            padding_mask=vision_attention_mask,
            valid_ratios=valid_ratios,
            before_layer=fuse,
        )
        if return_dict is False:
            return memory, text
        from transformers.models.grounding_dino.modeling_grounding_dino import (
            GroundingDinoEncoderOutput,
        )

        return GroundingDinoEncoderOutput(
            last_hidden_state_vision=memory, last_hidden_state_text=text
        )


_LITE = {
    'DeformableDetrEncoder': DeformableDetrLiteEncoder,
    'GroundingDinoEncoder': GroundingDinoLiteEncoder,
    'MMGroundingDinoEncoder': GroundingDinoLiteEncoder,
    'Mask2FormerPixelDecoderEncoderOnly': PixelDecoderLiteEncoder,
    'OneFormerPixelDecoderEncoderOnly': PixelDecoderLiteEncoder,
}


def _parts(layer: nn.Module) -> dict[str, Any]:
    """What an encoder layer is made of, wherever its family keeps it."""
    layer = getattr(layer, 'deformable_layer', layer)  # Grounding DINO: beside the text's layers
    ffn = getattr(layer, 'mlp', layer)  # Deformable DETR
    names = ('self_attn', 'self_attn_layer_norm', 'final_layer_norm', 'dropout')
    of_ffn = ('fc1', 'fc2', 'activation_fn', 'activation_dropout')
    return {
        **{name: getattr(layer, name) for name in names},
        **{name: getattr(ffn, name) for name in of_ffn},
    }


def _make_ffn(like: dict[str, Any], channels: int | None) -> FFN:
    fc1 = like['fc1']
    ffn = FFN(fc1.in_features, channels or fc1.out_features, like['dropout'])
    activation = like['activation_fn']
    if isinstance(activation, nn.Module) and not isinstance(activation, nn.ReLU):
        ffn.layers[0][1] = copy.deepcopy(activation)
    ffn.layers[0][2].p = like['activation_dropout']
    return ffn


def _stock_layers(steps: Collection[EncoderStep]) -> list[int]:
    """For each layer the stock layer that updates the high-level tokens as often."""
    layers, updates = [], -1
    for step in steps:
        updates += step.updates_high
        layers.append(updates)
    return layers


@torch.no_grad()
def _copy_layer(layer: LiteEncoderLayer, stock: dict[str, Any]) -> None:
    """Copy what has a counterpart of the same shape."""
    pairs = [
        (getattr(layer.self_attn, name, None), getattr(stock['self_attn'], name))
        for name in ('sampling_offsets', 'attention_weights', 'value_proj', 'output_proj')
    ]
    pairs.append((layer.norms[0], stock['self_attn_layer_norm']))
    if hasattr(layer, 'ffn'):
        pairs.append((layer.ffn.layers[0][0], stock['fc1']))
        pairs.append((layer.ffn.layers[1], stock['fc2']))
        pairs.append((layer.norms[1], stock['final_layer_norm']))
    if layer.has_small_ffn:
        pairs.append((layer.small_norm, stock['final_layer_norm']))
    for target, source in pairs:
        if target is not None and target.weight.shape == source.weight.shape:
            target.load_state_dict(source.state_dict())
