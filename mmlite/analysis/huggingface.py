"""Models of Hugging Face transformers as contestants: stock, on our operators, and Lite.

They have their default size and random weights; nothing is downloaded.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from .. import fuse, to_lite
from .contestants import FUSED, Model

TEXT_TOKENS = 195  # the 80 categories of COCO as one prompt


class Transformer(Model):
    """A model of transformers."""

    def arguments(self, setting, batch_size=1) -> dict:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(batch_size, 3, *setting.image_size, generator=generator)
        batch = {'pixel_values': images, 'pixel_mask': torch.ones_like(images[:, 0]).long()}
        if hasattr(self.model.config, 'text_config'):
            words = self.model.config.text_config.vocab_size
            text = torch.randint(1100, words, (batch_size, TEXT_TOKENS), generator=generator)
            text[:, 2::2] = 1012  # every other token is the full stop behind a category
            text[:, 0], text[:, -1] = 101, 102
            batch['input_ids'] = text
        return {name: tensor.to(setting.device) for name, tensor in batch.items()}


class Kind(NamedTuple):
    """A model of transformers to measure."""

    title: str
    model: str  # its class
    backbone: str = 'ResNet'
    stages: Sequence[int] = (2, 3, 4)  # of the backbone, that are read
    schedule: str = 'H3L1-(2+1)x3'  # of the Lite encoder
    encoder_at: str = 'model.encoder'

    def build(self) -> nn.Module:
        import transformers as hf

        cls, config = getattr(hf, self.model), getattr(hf, f'{self.backbone}Config')
        features = config(out_features=[f'stage{i}' for i in self.stages])
        return cls(cls.config_class(backbone_config=features))


MODELS = {
    'deformable-detr': Kind('Deformable DETR, ResNet-50', 'DeformableDetrForObjectDetection'),
    'grounding-dino': Kind('Grounding DINO, Swin-T', 'GroundingDinoForObjectDetection', 'Swin'),
    'mask2former': Kind(
        *('Mask2Former, ResNet-50', 'Mask2FormerForUniversalSegmentation', 'ResNet'),
        *((1, 2, 3, 4), 'H2L1-(2+1)x3', 'model.pixel_level_module.decoder'),
    ),
}


def transformers_models(
    names: Sequence[str], schedule: str | None, device: str
) -> Iterator[list[Model]]:
    """Of each of :data:`MODELS`, or those named: stock, on our operators, and Lite."""
    from transformers.utils import logging

    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise ValueError(f'{unknown[0]!r} is none of the models: {", ".join(MODELS)}')
    logging.set_verbosity_error()
    for one in (MODELS[name] for name in names or MODELS):
        torch.manual_seed(0)
        stock = Transformer(one.title, one.build().eval().to(device), one.encoder_at)
        chosen = schedule or one.schedule
        lite = fuse(to_lite(copy.deepcopy(stock.model), chosen))
        title = f'{one.title}, Lite {chosen}'
        yield [stock, stock.in_mode(FUSED), Transformer(title, lite, one.encoder_at)]
