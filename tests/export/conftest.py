import os
from pathlib import Path

import numpy as np
import pytest
import torch
from exported import DETECTORS, export_for_all
from filelock import FileLock
from mmdet.registry import MODELS
from small_detectors import small_config

import mmlite  # noqa: F401  (registers the Lite detectors)
from mmlite.openmmlab.detectors.grounding_dino import adapt_bert


@pytest.fixture(scope='session')
def detector(tiny_bert):
    """Build a detector of :data:`DETECTORS` whose parameters all matter."""

    def build(name: str) -> torch.nn.Module:
        base, changes = DETECTORS[name]
        is_mask2former, reads_text = 'Mask2Former' in name, 'Grounding' in name
        config = small_config(base, tiny_bert if reads_text else '')
        config.merge_from_dict(dict(model=changes))
        torch.manual_seed(0)
        model = MODELS.build(config.model)
        if is_mask2former:
            return speak_masks(model, 20.0 if name == 'Mask2Former' else 0.0).eval()
        for module in (model.encoder, model.decoder, model.bbox_head):
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter, std=0.05)
        torch.nn.init.normal_(model.level_embed)
        for branch in model.bbox_head.cls_branches:
            if reads_text:
                torch.nn.init.constant_(branch.bias, -1.0)
            else:
                # Suppression ranks by the score: sure ones would be 1 but for rounding, all alike.
                torch.nn.init.normal_(branch.weight, std=0.05 if 'DDQ' in name else 0.3)
        for branch in model.bbox_head.reg_branches:
            torch.nn.init.normal_(branch[-1].weight, std=0.2)
        if reads_text:
            adapt_bert(model.language_model)
        return model.eval()

    return build


@pytest.fixture(scope='session')
def exported_lite_dino(detector, tmp_path_factory) -> tuple[torch.nn.Module, Path]:
    """A LiteDINO, and a folder with its export for each runtime, for one image of any size.

    All processes of pytest-xdist have it from the first that asks.
    """
    model = detector('LiteDINO with a key-aware decoder')
    folder = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        folder = folder.parent
    with FileLock(folder / 'lite_dino.lock'):
        if not (folder / 'lite_dino').exists():
            export_for_all(model, folder / 'lite_dino')
    return model, folder / 'lite_dino'


def speak_masks(model: torch.nn.Module, lower: float) -> torch.nn.Module:
    """A Mask2Former whose queries see different masks, some of them surely."""
    head = model.panoptic_head
    for parameter in head.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    for embedding in (head.query_feat, head.query_embed, head.level_embed):
        torch.nn.init.normal_(embedding.weight)
    torch.nn.init.normal_(head.cls_embed.weight, std=0.5)
    # One channel that lowers every mask, so that they are no larger than objects.
    features, embedding = head.pixel_decoder.mask_feature, head.mask_embed[-1]
    with torch.no_grad():
        features.weight[0], features.bias[0] = 0.0, 1.0
        embedding.weight[0], embedding.bias[0] = 0.0, -lower
    return model


@pytest.fixture(scope='session')
def images():
    """Two images of different sizes, and one without anything in it."""
    random = np.random.default_rng(0)
    drawn = [random.integers(0, 256, size, np.uint8) for size in ((200, 260, 3), (261, 210, 3))]
    return [*drawn, np.zeros((220, 220, 3), np.uint8)]
