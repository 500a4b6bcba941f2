"""DINO and Lite-DINO with several backbones: GFLOPs, time and the encoder's share of both.

    python benchmarks/backbones.py --image-size 800 1333

Every detector is built as ``mmlite lite-config --backbone`` does it, with random weights, counted,
timed beside its stock one, run forward and backward, and exported to ONNX. It needs timm.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from tempfile import TemporaryDirectory

import click
import torch
from mmdet.models.necks import ChannelMapper
from mmdet.registry import MODELS
from mmengine.config import Config
from torch import Tensor, nn

from mmlite.analysis.complexity import find_encoder
from mmlite.analysis.contestants import Model, detector_loss
from mmlite.analysis.timing import Setting, take_turns
from mmlite.cli import shared
from mmlite.export import export_detector
from mmlite.openmmlab import require
from mmlite.openmmlab.build import build_detector, load_config
from mmlite.openmmlab.lite_config import backbone_change, lite_change

STOCK = 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'
SCHEDULE = 'H3L1-(2+1)x3'
PARTS = ('inference', 'encoder')
SMALL = (256, 320)  # of the image that is trained on, and exported for
VIT = 'vit_small_patch16_224'
# Name in timm, or of the config's own backbone -> what its config needs besides.
BACKBONES = {
    'resnet50': {},
    'tf_efficientnet_lite0': {},
    'mobilenetv4_conv_medium': {},
    'convnext_tiny': {},
    'swin_tiny_patch4_window7_224': {
        'model.backbone.strict_img_size': False,
        'model.data_preprocessor.pad_size_divisor': 4,  # timm's takes whole patches alone
    },
    VIT: {
        'model.backbone': {
            '_delete_': True,
            'type': 'TimmBackbone',
            'model_name': VIT,
            'out_indices': [11],
            'dynamic_img_size': True,
            'dynamic_img_pad': True,
        },
        'model.neck': {'type': 'SimplePyramid', 'in_channels': [384]},
    },
}


@MODELS.register_module()
class SimplePyramid(ChannelMapper):
    """Maps of strides 8, 16 and 32 from the one of a ViT, as in ViTDet (Li et al. 2022)."""

    def __init__(self, in_channels: Sequence[int], **kwargs) -> None:
        (width,) = in_channels
        super().__init__(in_channels=[width // 2, width, width], **kwargs)
        self.finer = nn.ConvTranspose2d(width, width // 2, 2, stride=2)
        self.coarser = nn.MaxPool2d(2)

    def forward(self, inputs: tuple[Tensor]) -> tuple[Tensor, ...]:
        """One map (B, width, H, W) -> ``num_outs`` maps, the first (B, out_channels, 2H, 2W)."""
        (feat,) = inputs
        return super().forward((self.finer(feat), feat, self.coarser(feat)))


def stock_of(backbone: str) -> Config:
    """The stock config with a backbone."""
    config = load_config(STOCK)
    if backbone not in ('resnet50', VIT):  # lite-config refuses a ViT, which has one map
        config.merge_from_dict(backbone_change(config.model, backbone))
    config.merge_from_dict(BACKBONES[backbone])
    return config


def detector(name: str, config: Config) -> Model:
    torch.manual_seed(0)
    model = build_detector(config)
    return Model(name, model, find_encoder(model), loss=detector_loss)


def trains(model: Model, setting: Setting) -> bool:
    """Whether a backward pass gives gradients, all of them finite."""
    module = model.model.train()
    model.loss(module, model.arguments(setting)).backward()
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    module.zero_grad(set_to_none=True)
    return len(grads) > 0 and all(bool(grad.isfinite().all()) for grad in grads)


@click.command()
@shared.image_size_option()
@shared.threads_option
@shared.count_option('--rounds', default=3)
@click.option('--only', multiple=True, type=click.Choice(list(BACKBONES)), help='Default: all.')
def main(image_size, rounds: int, only) -> None:
    """Print a table with a line for each backbone."""
    require()
    setting = Setting(image_size, rounds=rounds, warmup=1, parts=PARTS)
    columns = ('backbone', 'params M', 'GFLOPs stock', 'Lite', 'encoder stock', 'Lite')
    columns += ('ms stock', 'Lite', 'encoder stock', 'Lite', 'trains', 'ONNX')
    rows = []
    for name in only or BACKBONES:
        config = stock_of(name)
        lite_config = copy.deepcopy(config)
        lite_config.merge_from_dict({'model': lite_change(config.model, SCHEDULE)})
        pair = [detector('stock', config), detector('Lite', lite_config)]
        costs = [each.count(setting) for each in pair]
        take_turns(pair, setting)
        times = [[1e3 * each.timings[part][1].median for each in pair] for part in PARTS]
        lite = pair[1].model
        exported = 'yes'
        with TemporaryDirectory() as folder:
            try:
                export_detector(lite.eval(), folder, 'onnx', lite_config, size=SMALL)
            except ValueError as error:
                exported = str(error)
        whole = [cost.flops / 1e9 for cost in costs]
        encoder = [cost.stage_flops['encoder'] / 1e9 for cost in costs]
        rows.append(
            [name, f'{costs[1].params / 1e6:.1f}']
            + [f'{value:.1f}' for value in whole]
            + [f'{e:.1f} ({e / w:.0%})' for e, w in zip(encoder, whole)]
            + [f'{value:.0f}' for value in times[0]]
            + [f'{e:.0f} ({e / w:.0%})' for e, w in zip(times[1], times[0])]
            + ['yes' if trains(pair[1], Setting(SMALL)) else 'no', exported]
        )
        shared.print_table(f'At {image_size[0]}x{image_size[1]}', columns, rows, 'right')


if __name__ == '__main__':
    main()
