"""The Lite encoder in models of transformers, made from the layers of their stock encoder."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..models import StockLiteEncoder, changing, encode_with_text, replace_encoders
from ..nn import EncoderSchedule
from .attention import check_version

CONFIG_NAME = 'lite_encoder'  # where `save_pretrained` writes down how it was made


def to_lite(model: nn.Module, schedule: str | EncoderSchedule, **options: Any) -> nn.Module:
    """Give a built model the Lite encoder in place of its own; see :func:`mmlite.to_lite`.

    Of transformers, Deformable DETR, Grounding DINO, MM-Grounding DINO, Mask2Former and OneFormer
    have one. Options and errors are those of :func:`mmlite.models.to_lite`; an ImportError says
    that the installed transformers is too old.
    """
    check_version()
    schedule = EncoderSchedule.parse(schedule)
    if 'elastic' in options:  # as a JSON file may hold it
        options['elastic'] = [*map(str, EncoderSchedule.parse_all(options['elastic']))]
    with changing(model, 'to_lite') as change:
        replace_encoders(change, model, schedule, options, _replacement, _NONE)
        if hasattr(model, 'config'):
            change.set(model, 'config', CONFIG_NAME, {'schedule': str(schedule), **options})
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


_OURS = ('tokens', 'pos', 'level_sizes', 'padding_mask', 'valid_ratios')
_PIXEL_DECODER = ('inputs_embeds', 'position_embeddings', 'spatial_shapes_list')
_PIXEL_DECODER += ('attention_mask', 'valid_ratios')
_GROUNDING_DINO = ('vision_features', 'vision_position_embedding', 'spatial_shapes_list')
_GROUNDING_DINO += ('vision_attention_mask', 'valid_ratios')


class _Encoder(StockLiteEncoder):
    """In transformers, which switches checkpointing on and off in a model that is built."""

    smallest_first = False
    gradient_checkpointing = False  # transformers sets it in all modules that have it
    # What tokens, positions, level sizes, padding mask and valid ratios are called there.
    names = _PIXEL_DECODER

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

    def ours(self, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments of :meth:`mmlite.nn.InterleavedEncoder.forward` among those given."""
        return dict(zip(_OURS, map(given.get, self.names)))


class PixelDecoderLiteEncoder(_Encoder):
    """In the place of Mask2Former's and OneFormer's ``...PixelDecoderEncoderOnly``."""

    smallest_first = True

    def forward(self, **given: Any):  # type: ignore[override]
        """Encode the pyramid; the attention mask is True on padding."""
        from transformers.modeling_outputs import BaseModelOutput

        return BaseModelOutput(last_hidden_state=super().forward(**self.ours(given)))


class DeformableDetrLiteEncoder(PixelDecoderLiteEncoder):
    """In the place of ``DeformableDetrEncoder``."""

    smallest_first = False
    names = ('inputs_embeds', 'spatial_position_embeddings', *_PIXEL_DECODER[2:])

    def forward(self, **given: Any):  # type: ignore[override]
        """Encode the pyramid; the attention mask is True on what is real."""
        mask = given.get('attention_mask')
        given['attention_mask'] = None if mask is None else ~mask
        given['inputs_embeds'] = self.dropout(given['inputs_embeds'])
        return super().forward(**given)


class GroundingDinoLiteEncoder(_Encoder):
    """In the place of Grounding DINO's and MM-Grounding DINO's encoder."""

    names = _GROUNDING_DINO

    def __init__(self, stock: nn.Module, *args, **kwargs) -> None:
        super().__init__(stock, *args, **kwargs)
        layers = [copy.deepcopy(stock.layers[index]) for index in self.stock_layers]
        self.fusion_layers = nn.ModuleList(layer.fusion_layer for layer in layers)
        self.text_enhancer_layers = nn.ModuleList(layer.text_enhancer_layer for layer in layers)
        # A method of the stock layer that reads `d_model` of it and nothing else.
        self.d_model = self.embed_dims
        self.text_positions = type(stock.layers[0]).get_text_position_embeddings

    def forward(self, **given: Any):  # type: ignore[override]
        """Encode the pyramid and the text, as the stock encoder; masks are True on padding."""
        text = given['text_features']
        places = map(given.get, ('text_position_embedding', 'text_position_ids'))
        text_pos = self.text_positions(self, text, *places)
        blocked = ~given['text_self_attention_masks']

        def enhance(index: int, text: Tensor) -> Tensor:
            return self.text_enhancer_layers[index](text, blocked, text_pos)[0]

        mask = given['text_attention_mask']
        memory, text = encode_with_text(self, self.ours(given), text, mask, enhance)
        if given.get('return_dict') is False:
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
_NONE = 'Deformable DETR, Grounding DINO, MM-Grounding DINO, Mask2Former and OneFormer have one'


def _replacement(stock: nn.Module, schedule: EncoderSchedule, options: dict) -> _Encoder | None:
    """What replaces an encoder, by its very class: others may have one of the same name."""
    is_theirs = type(stock).__module__.startswith('transformers.models.')
    lite_class = _LITE.get(type(stock).__qualname__) if is_theirs else None
    return lite_class and lite_class(stock, schedule, **options)
