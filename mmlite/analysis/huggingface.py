"""Models of Hugging Face transformers to measure, as :func:`.pytorch.variants` takes them.

They have their default size and random weights; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .contestants import Inputs

TEXT_TOKENS = 195  # the 80 categories of COCO as one prompt


def build(kind: str, backbone: str, stages: Sequence[int]) -> tuple[nn.Module, Inputs]:
    """A model that reads some stages of a backbone, and what makes its inputs."""
    import transformers as hf

    hf.utils.logging.set_verbosity_error()
    cls, features = getattr(hf, kind), getattr(hf, f'{backbone}Config')
    features = features(out_features=[f'stage{stage}' for stage in stages])
    model = cls(cls.config_class(backbone_config=features))
    return model, partial(inputs, getattr(model.config, 'text_config', None))


def inputs(text_config, image_size: tuple[int, int], batch_size: int) -> dict[str, Tensor]:
    """Random images, (batch, 3, h, w), and a random text where the model reads one."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, *image_size, generator=generator)
    found = {'pixel_values': images, 'pixel_mask': torch.ones_like(images[:, 0]).long()}
    if text_config is not None:
        size = (batch_size, TEXT_TOKENS)
        text = torch.randint(1100, text_config.vocab_size, size, generator=generator)
        text[:, 2::2] = 1012  # every other token is the full stop behind a category
        text[:, 0], text[:, -1] = 101, 102
        found['input_ids'] = text
    return found


MODELS = {
    'deformable-detr': partial(build, 'DeformableDetrForObjectDetection', 'ResNet', (2, 3, 4)),
    'grounding-dino': partial(build, 'GroundingDinoForObjectDetection', 'Swin', (2, 3, 4)),
    'mask2former': partial(
        build, 'Mask2FormerForUniversalSegmentation', 'ResNet', stages=(1, 2, 3, 4)
    ),
}
