"""The Lite encoder in models of transformers, made from the layers of their stock encoder."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..models import StockLiteEncoder, changing
from ..nn import EncoderSchedule, InterleavedEncoder
from ..nn.geometry import LevelSizes
from .attention import check_version

CONFIG_NAME = 'lite_encoder'  # where `save_pretrained` writes down how it was made


def to_lite(model: nn.Module, schedule: str | EncoderSchedule, **options: Any) -> nn.Module:
    """Give a built model the Lite encoder in place of its own; see :func:`mmlite.to_lite`.

    With a schedule that updates every level in every layer, such as ``'H3L1-(1+1)x6'``, and
    ``key_aware`` and ``small_ffn`` off, the model computes exactly what it did.

    Args:
        model (nn.Module): Deformable DETR, Grounding DINO, MM-Grounding DINO, Mask2Former or
            OneFormer of transformers. Changed in place.
        schedule (str | EncoderSchedule): A * B is the number of layers of the stock encoder.
        **options: ``key_aware``, ``small_ffn``, ``update``, ``num_cp``, ``proj_key``,
            ``same_loc`` and ``elastic`` of :class:`mmlite.nn.LiteEncoder`.

    Returns:
        nn.Module: ``model``.

    Raises:
        ValueError: The model has no such encoder or a Lite one, or the schedule does not fit;
            the message says what would. Nothing is changed then.
        ImportError: The installed transformers is too old.
    """
    check_version()
    schedule, kind = EncoderSchedule.parse(schedule), type(model).__name__
    if 'elastic' in options:  # as a JSON file may hold it
        options['elastic'] = [*map(str, EncoderSchedule.parse_all(options['elastic']))]
    stock = [part for name, part in model.named_modules() if name and _lite_class(part)]
    if not stock and any(isinstance(part, InterleavedEncoder) for part in model.modules()):
        raise ValueError(f'{kind} has a Lite encoder already')
    if not stock:
        raise ValueError(
            f'{kind} holds no encoder that the Lite encoder can replace; '
            'Deformable DETR, Grounding DINO, MM-Grounding DINO, Mask2Former and OneFormer do'
        )
    with changing(model, 'to_lite') as change:
        for part in stock:
            change.replace(model, part, _lite_class(part)(part, schedule, **options))
        if hasattr(model, 'config'):
            change.set(model, 'config', CONFIG_NAME, {'schedule': str(schedule), **options})
    log = logging.getLogger('mmlite')
    log.info('to_lite: %s with schedule %s; train what is new', kind, schedule)
    return model


def load_lite(model_class: type[nn.Module], folder: str, **kwargs: Any) -> nn.Module:
    """Load what ``save_pretrained`` wrote of a model that :func:`to_lite` changed.

    Args:
        model_class (type[nn.Module]): For example ``DeformableDetrForObjectDetection``.
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
        how = f'load it by {model_class.__name__}.from_pretrained, then call to_lite'
        raise ValueError(f'{folder} was saved without a Lite encoder: {how}')

    def build(self, config, *args, **kwargs):
        model_class.__init__(self, config, *args, **kwargs)
        to_lite(self, **settings)

    # Under the name of the model's class, which transformers looks at.
    lite_class = type(model_class.__name__, (model_class,), {'__init__': build})
    lite_class.__module__ = model_class.__module__
    model = lite_class.from_pretrained(folder, **kwargs)
    model.__class__ = model_class
    return model


class _Encoder(StockLiteEncoder):
    """In transformers, which switches checkpointing on and off in a model that is built."""

    smallest_first = False
    gradient_checkpointing = False  # transformers sets it in all modules that have it

    def __init__(self, stock: nn.Module, schedule: EncoderSchedule, **options: Any) -> None:
        super().__init__(stock, schedule, **options)
        self.dropout = nn.Dropout(stock.dropout)  # of the tokens, in Deformable DETR
        if getattr(stock.layers[0], 'gradient_checkpointing', False):
            self.gradient_checkpointing = True
            self._gradient_checkpointing_func = stock.layers[0]._gradient_checkpointing_func

    def run(self, index: int, module: Callable, *arguments: Any) -> Any:
        """As ``num_cp`` says, and all layers after ``gradient_checkpointing_enable``."""
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(module, *arguments)
        return super().run(index, module, *arguments)


class PixelDecoderLiteEncoder(_Encoder):
    """In the place of Mask2Former's and OneFormer's ``...PixelDecoderEncoderOnly``."""

    smallest_first = True

    def forward(  # type: ignore[override]
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        position_embeddings: Tensor | None,
        spatial_shapes_list: LevelSizes,
        valid_ratios: Tensor | None,
        **kwargs,
    ):
        """Encode the pyramid; the attention mask is True on padding."""
        from transformers.modeling_outputs import BaseModelOutput

        masks = dict(padding_mask=attention_mask, valid_ratios=valid_ratios)
        memory = super().forward(inputs_embeds, position_embeddings, spatial_shapes_list, **masks)
        return BaseModelOutput(last_hidden_state=memory)


class DeformableDetrLiteEncoder(PixelDecoderLiteEncoder):
    """In the place of ``DeformableDetrEncoder``."""

    smallest_first = False

    def forward(self, inputs_embeds, attention_mask=None, **kwargs):
        """Encode the pyramid; the attention mask is True on what is real."""
        padding = None if attention_mask is None else ~attention_mask
        pos = kwargs.pop('spatial_position_embeddings')
        return super().forward(self.dropout(inputs_embeds), padding, pos, **kwargs)


class GroundingDinoLiteEncoder(_Encoder):
    """In the place of Grounding DINO's and MM-Grounding DINO's encoder."""

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
        vision_attention_mask: Tensor,
        vision_position_embedding: Tensor,
        spatial_shapes_list: LevelSizes,
        valid_ratios: Tensor,
        text_features: Tensor,
        text_attention_mask: Tensor,
        text_self_attention_masks: Tensor,
        text_position_embedding: Tensor | None = None,
        text_position_ids: Tensor | None = None,
        return_dict: bool | None = True,
        **kwargs,
    ):
        """Encode the pyramid and the text; masks are True on padding."""
        text_pos = self.text_positions(
            self, text_features, text_position_embedding, text_position_ids
        )

        def enhance(index: int, text: Tensor) -> Tensor:
            return self.text_enhancer_layers[index](text, ~text_self_attention_masks, text_pos)[0]

        arguments = dict(
            tokens=vision_features,
            pos=vision_position_embedding,
            level_sizes=spatial_shapes_list,
            padding_mask=vision_attention_mask,
            valid_ratios=valid_ratios,
        )
        memory, text = self.encode_with_text(arguments, text_features, text_attention_mask, enhance)
        if return_dict is False:
            return memory, text
        from transformers.models.grounding_dino import modeling_grounding_dino

        return modeling_grounding_dino.GroundingDinoEncoderOutput(
            last_hidden_state_vision=memory, last_hidden_state_text=text
        )


# Encoders of transformers by the name of their class.
_LITE = {
    'DeformableDetrEncoder': DeformableDetrLiteEncoder,
    'GroundingDinoEncoder': GroundingDinoLiteEncoder,
    'MMGroundingDinoEncoder': GroundingDinoLiteEncoder,
    'Mask2FormerPixelDecoderEncoderOnly': PixelDecoderLiteEncoder,
    'OneFormerPixelDecoderEncoderOnly': PixelDecoderLiteEncoder,
}


def _lite_class(stock: nn.Module) -> type[_Encoder] | None:
    """What replaces an encoder, by its very class: others may have one of the same name."""
    is_theirs = type(stock).__module__.startswith('transformers.models.')
    return _LITE.get(type(stock).__qualname__) if is_theirs else None
