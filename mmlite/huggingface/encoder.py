"""The Lite encoder in models of transformers.

A stock encoder is read, layer by layer, for what the Lite encoder needs to know (channels, heads,
points, activation, dropout), so that no config has to be understood, and for its weights.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..models import EncoderLayerParts, changing, stock_layers
from ..nn import EncoderSchedule, InterleavedEncoder, StepTokens
from .attention import LevelSizes, check_version

# Where `save_pretrained` writes down how the encoder was made.
CONFIG_NAME = 'lite_encoder'
_LOG = logging.getLogger('mmlite')


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
        key_aware (bool): This and what follows is as for :class:`mmlite.nn.LiteEncoder`.
        small_ffn (bool): A small FFN for low-level tokens.
        update (str): ``'joint'`` or ``'sequential'``.
        proj_key (bool): Keys have a projection of their own.
        same_loc (bool): All levels share the offsets.
        num_cp (int): Layers whose activations are recomputed in the backward pass.

    Returns:
        nn.Module: ``model``.

    Raises:
        ValueError: The model has no encoder to replace or has a Lite one, or the schedule does
            not fit it; the message says what would. Nothing is changed then.
        ImportError: The installed transformers is too old.
    """
    check_version()
    if (proj_key or same_loc) and not key_aware:
        raise ValueError('proj_key and same_loc are of key-aware attention; set key_aware=True')
    settings = dict(
        schedule=str(EncoderSchedule.parse(schedule)),
        key_aware=key_aware,
        small_ffn=small_ffn,
        update=update,
        proj_key=proj_key,
        same_loc=same_loc,
        num_cp=num_cp,
    )
    name_of = type(model).__name__
    stock = {name: part for name, part in model.named_modules() if type(part).__name__ in _LITE}
    if not stock or '' in stock:
        if any(isinstance(part, InterleavedEncoder) for part in model.modules()):
            raise ValueError(f'{name_of} has a Lite encoder already')
        raise ValueError(
            f'{name_of} holds no encoder that the Lite encoder can replace; '
            'Deformable DETR, Grounding DINO, MM-Grounding DINO, Mask2Former and OneFormer do'
        )
    with changing(model, 'to_lite') as change:
        for name, part in stock.items():
            parent, _, attribute = name.rpartition('.')
            change.set(model, parent, attribute, _LITE[type(part).__name__](part, **settings))
        if hasattr(model, 'config'):
            change.set(model, 'config', CONFIG_NAME, settings)
    _LOG.info('to_lite: %s with schedule %s; train what is new', name_of, settings['schedule'])
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


class _Encoder(InterleavedEncoder):
    """A Lite encoder with the sizes and weights of the stock encoder it replaces."""

    smallest_first = False  # the order of the maps in the family's pyramid
    gradient_checkpointing = False  # transformers sets it in all modules that have it

    def __init__(
        self,
        stock: nn.Module,
        schedule: str | EncoderSchedule,
        update: str,
        num_cp: int,
        **layer: bool,
    ) -> None:
        schedule = EncoderSchedule.parse(schedule)
        parts = [_parts(stock_layer) for stock_layer in stock.layers]
        schedule.check_fit(len(parts), parts[0].shape[2], update)
        steps = schedule.steps(update)
        indices = stock_layers(steps)
        layers = [parts[index].lite(step, **layer) for step, index in zip(steps, indices)]
        levels, count = range(schedule.num_levels), schedule.num_low_levels
        low_levels = levels[-count:] if self.smallest_first else levels[:count]
        super().__init__(schedule, layers, update, num_cp, low_levels)
        self.stock_layers = indices
        self.to(parts[0].attention.value_proj.weight)
        self.schedule_code = self.schedule_code.long()  # .to() casts it, too
        self.train(stock.training)
        if getattr(stock.layers[0], 'gradient_checkpointing', False):
            self.gradient_checkpointing = True
            self._gradient_checkpointing_func = stock.layers[0]._gradient_checkpointing_func

    def encode(
        self,
        tokens: Tensor,
        pos: Tensor | None,
        sizes: LevelSizes,
        padding: Tensor | None,
        valid_ratios: Tensor | None,
    ):
        """The memory as transformers' models return it."""
        from transformers.modeling_outputs import BaseModelOutput

        memory = InterleavedEncoder.forward(
            self, tokens, pos, sizes, padding_mask=padding, valid_ratios=valid_ratios
        )
        return BaseModelOutput(last_hidden_state=memory)

    def run(self, index: int, module: Callable, *arguments: Any) -> Any:
        """As ``num_cp`` says, and all layers after ``gradient_checkpointing_enable``."""
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(module, *arguments)
        return super().run(index, module, *arguments)


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
        *,
        spatial_shapes_list: LevelSizes,
        valid_ratios: Tensor | None = None,
        **kwargs,
    ):
        """Encode the pyramid, largest map first; the attention mask is True on what is real."""
        padding = None if attention_mask is None else ~attention_mask
        tokens, pos = self.dropout(inputs_embeds), spatial_position_embeddings
        return self.encode(tokens, pos, spatial_shapes_list, padding, valid_ratios)


class PixelDecoderLiteEncoder(_Encoder):
    """In the place of Mask2Former's and OneFormer's ``...PixelDecoderEncoderOnly``."""

    smallest_first = True

    def forward(  # type: ignore[override]
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        *,
        spatial_shapes_list: LevelSizes,
        valid_ratios: Tensor | None = None,
        **kwargs,
    ):
        """Encode the pyramid, smallest map first; the attention mask is True on padding."""
        sizes = spatial_shapes_list
        return self.encode(inputs_embeds, position_embeddings, sizes, attention_mask, valid_ratios)


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
        *,
        spatial_shapes_list: LevelSizes,
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


def _parts(layer: nn.Module) -> EncoderLayerParts:
    """What an encoder layer is made of, wherever its family keeps it."""
    layer = getattr(layer, 'deformable_layer', layer)  # Grounding DINO: beside the text's layers
    ffn = getattr(layer, 'mlp', layer)  # Deformable DETR
    attention, activation = layer.self_attn, ffn.activation_fn
    is_relu = isinstance(activation, nn.ReLU) or not isinstance(activation, nn.Module)
    return EncoderLayerParts(
        attention,
        (attention.d_model, attention.n_heads, attention.n_levels, attention.n_points),
        (layer.self_attn_layer_norm, layer.final_layer_norm),
        (ffn.fc1, ffn.fc2),
        None if is_relu else activation,
        layer.dropout,
        ffn.activation_dropout,
    )
