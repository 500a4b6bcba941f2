"""Models of Hugging Face transformers: stock, on our operators, and with the Lite encoder.

Models are made from configs, with random weights; nothing is downloaded.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..huggingface import fuse, to_lite
from ..huggingface.attention import check_version
from .compare import FUSED, Contestant

TEXT_TOKENS = 195  # the 80 categories of COCO as one prompt


@dataclass(frozen=True)
class Kind:
    """A model to measure, at its default size."""

    title: str
    classes: tuple[str, str]  # of its config and of itself, in transformers
    backbone: str  # class of its config
    stages: Sequence[int] = (2, 3, 4)  # of the backbone, that are read
    schedule: str = 'H3L1-(2+1)x3'  # of the Lite encoder
    encoder: str = 'model.encoder'  # of Mask2Former the pixel decoder: it and a few convolutions

    def build(self) -> nn.Module:
        import transformers as hf

        config, model = (getattr(hf, name) for name in self.classes)
        backbone = getattr(hf, self.backbone)(out_features=[f'stage{i}' for i in self.stages])
        return model(config(backbone_config=backbone))


MODELS = {
    'deformable-detr': Kind(
        'Deformable DETR, ResNet-50',
        ('DeformableDetrConfig', 'DeformableDetrForObjectDetection'),
        'ResNetConfig',
    ),
    'grounding-dino': Kind(
        'Grounding DINO, Swin-T',
        ('GroundingDinoConfig', 'GroundingDinoForObjectDetection'),
        'SwinConfig',
    ),
    'mask2former': Kind(
        'Mask2Former, ResNet-50',
        ('Mask2FormerConfig', 'Mask2FormerForUniversalSegmentation'),
        'ResNetConfig',
        (1, 2, 3, 4),
        'H2L1-(2+1)x3',
        'model.pixel_level_module.decoder',
    ),
}


class Transformer(Contestant):
    """A model of transformers."""

    fuse = staticmethod(fuse)

    def arguments(self, image_size, batch_size, device) -> dict:
        generator = torch.Generator().manual_seed(0)
        size = (batch_size, *image_size)
        batch = {
            'pixel_values': torch.randn(batch_size, 3, *image_size, generator=generator),
            'pixel_mask': torch.ones(size, dtype=torch.long),
        }
        if hasattr(self.model.config, 'text_config'):
            vocabulary = self.model.config.text_config.vocab_size
            size = (batch_size, TEXT_TOKENS)
            words = torch.randint(1100, vocabulary, size, generator=generator)
            words[:, 2::2] = 1012  # every other token is the full stop behind a category
            words[:, 0], words[:, -1] = 101, 102
            batch['input_ids'] = words
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def outputs(self, prediction) -> list[Tensor]:
        names = ('logits', 'pred_boxes', 'class_queries_logits', 'masks_queries_logits')
        return [prediction[name] for name in names if name in prediction]


def make_contestants(
    names: Sequence[str], schedule: str | None, device: str
) -> Iterator[list[Contestant]]:
    """Of each model the stock one, the same on our operators, and the Lite one.

    ``names`` are of :data:`MODELS`, none for all; ``schedule`` takes the place of each model's own.

    Raises:
        ValueError: There is no such model, or the schedule does not fit one.
        ImportError: transformers is missing or too old.
    """
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise ValueError(f'there is no model {unknown[0]!r}; choose among {", ".join(MODELS)}')
    check_version()
    from transformers.utils import logging

    logging.set_verbosity_error()
    for kind in (MODELS[name] for name in names or MODELS):
        torch.manual_seed(0)
        stock = kind.build().eval().to(device)
        lite = copy.deepcopy(stock)
        to_lite(lite, schedule or kind.schedule)
        fuse(lite)
        baseline = Transformer(kind.title, stock, kind.encoder)
        title = f'{kind.title}, Lite {schedule or kind.schedule}'
        yield [baseline, baseline.in_form(FUSED, device), Transformer(title, lite, kind.encoder)]
