"""Detectors and encoders of MMDetection as contestants, stock and Lite."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from mmdet.datasets import CocoDataset
from mmdet.models.layers import DeformableDetrTransformerEncoder
from mmengine.config import Config
from torch import Tensor

from ..openmmlab.build import build_detector
from ..openmmlab.families import find_holder, is_lite, reads_text
from ..openmmlab.layers import LiteEncoder, fuse
from ..openmmlab.lite_config import stock_config
from .compare import Contestant
from .complexity import Complexity, count_detector, find_encoder
from .inputs import encoder_inputs, image_batch, pyramid_sizes
from .report import size
from .timing import Start, silent

STOCK, STOCK_FUSED = 'stock (mmcv)', 'stock (ms_deform_attn)'
EMBED_DIMS = 256


class Detector(Contestant):
    """A detector of MMDetection or mmlite."""

    def arguments(self, image_size, batch_size, device) -> dict:
        # Classes of objects: of the text (see image_batch), of the head, or a segmenter's things.
        model = getattr(self.model, 'bbox_head', self.model)
        classes = getattr(model, 'num_classes', getattr(model, 'num_things_classes', 80))
        if reads_text(self.model):
            classes = len(CocoDataset.METAINFO['classes'])
        images, samples = image_batch(batch_size, image_size, classes, device)
        return {'inputs': images, 'data_samples': samples, 'mode': 'predict'}

    def count(self, image_size) -> Complexity:
        try:
            return count_detector(self.model, image_size)
        except (RuntimeError, AttributeError, TypeError) as error:
            reason = str(error).partition('\n')[0]
            raise ValueError(
                f'{self.name} does not run on an image of {size(image_size)}: {reason}'
            ) from error

    def loss(self, arguments) -> Tensor:
        return self.model.parse_losses(self.model(**{**arguments, 'mode': 'loss'}))[0]


class Encoder(Contestant):
    """An encoder alone, over four levels."""

    def arguments(self, image_size, batch_size, device) -> dict:
        return encoder_inputs(pyramid_sizes(image_size), EMBED_DIMS, batch_size, device)

    def loss(self, arguments) -> Tensor:
        query = arguments['query'].detach().requires_grad_()  # the backbone learns, too
        memory = self.model(**{**arguments, 'query': query})
        return (memory * memory.detach()).sum()

    def stages(self, call, setting) -> dict[str, float]:
        return {}  # it is one stage


def build_detectors(
    wanted: Sequence[tuple[str, Config, str | None]], device: str, start: Start = silent
) -> list[Contestant]:
    """Build detectors; a Lite one alone gets its stock one as baseline.

    Args:
        wanted (Sequence[tuple[str, Config, str | None]]): Name, config and checkpoint of each.
        device (str): Where they go.
        start (Start): Shows progress.

    Raises:
        FileNotFoundError: A checkpoint is missing.
        ValueError: A config cannot be built, or a checkpoint does not fit.
    """
    if len(wanted) == 1 and _has_lite_encoder(wanted[0][1].model):
        stock = copy.deepcopy(wanted[0][1])
        stock.model = stock_config(stock.model)
        wanted = [('stock', stock, None), *wanted]
    step = start('building', len(wanted))
    detectors = []
    for name, config, checkpoint in wanted:
        torch.manual_seed(0)
        model = build_detector(config, checkpoint, device)
        detectors.append(Detector(name, model, find_encoder(model), checkpoint))
        step()
    return detectors


def _has_lite_encoder(model_config: dict) -> bool:
    try:
        return is_lite(find_holder(model_config)[1]['type'])
    except ValueError:
        return False


def build_encoders(
    schedules: Sequence[str], ffn_channels: int, device: torch.device | str = 'cpu'
) -> list[Contestant]:
    """The stock encoder with mmcv's operator and with ours, and each schedule with both attentions.

    All have six layers over four levels, 256 channels and random weights.

    Raises:
        ValueError: A schedule is malformed or does not make six layers over four levels.
    """
    dims = {'embed_dims': EMBED_DIMS}
    layer_cfg = {
        'self_attn_cfg': {**dims, 'num_levels': 4, 'dropout': 0.0, 'batch_first': True},
        'ffn_cfg': {**dims, 'feedforward_channels': ffn_channels, 'ffn_drop': 0.0},
    }
    options = {'num_layers': 6, 'layer_cfg': layer_cfg}
    encoders = {name: DeformableDetrTransformerEncoder(**options) for name in (STOCK, STOCK_FUSED)}
    fuse(encoders[STOCK_FUSED])
    for schedule in schedules:
        encoders[f'Lite {schedule}'] = LiteEncoder(schedule, **options)
        encoders[f'Lite {schedule}, no KDA'] = LiteEncoder(schedule, **options, key_aware=False)
    return [Encoder(name, encoder.to(device), '') for name, encoder in encoders.items()]
