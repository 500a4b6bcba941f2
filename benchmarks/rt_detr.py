"""Lite-DINO's choices beside RT-DETR R50 of transformers in OpenVINO, random weights, in turns.

    python benchmarks/rt_detr.py --threads 2 --layers 6 4 3

One canvas of 640x640, float32. Accuracy is another matter: `mmlite tune` measures it.
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import product
from pathlib import Path

import openvino
import torch
from torch import Tensor, nn
from transformers import RTDetrConfig, RTDetrForObjectDetection

from mmlite import use_schedule
from mmlite.analysis.contestants import session_call
from mmlite.analysis.timing import Call, Setting, measure
from mmlite.analysis.tune import with_decoder_layers
from mmlite.export import export_detector, load
from mmlite.openmmlab.build import build_detector, load_config

CONFIG = 'mmlite::lite_dino/lite-dino-4scale_r50_h3l1-2p1x3_8xb2-36e_coco.py'
RT_DETR = 'RT-DETR R50, 6 decoder layers, 300 queries'
SCHEDULES = ('H3L1-(2+1)x3', 'H2L2-(2+1)x3', 'H3L1-(6+1)x1')


class Outputs(nn.Module):
    """RT-DETR from an image in [0, 1] to its logits and boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.model = RTDetrForObjectDetection(RTDetrConfig()).eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        found = self.model(images)
        return found.logits, found.pred_boxes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--rounds', type=int, default=10)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--layers', type=int, nargs='+', default=[6, 4, 3], help='Of the decoder.')
    parser.add_argument('--image-size', type=int, nargs=2, default=(640, 640), metavar=('H', 'W'))
    arguments = parser.parse_args()

    size = tuple(arguments.image_size)
    image = torch.rand(1, 3, *size)
    hints = {
        'PERFORMANCE_HINT': 'LATENCY',
        'INFERENCE_PRECISION_HINT': 'f32',
        'INFERENCE_NUM_THREADS': str(arguments.threads),
    }
    program = torch.export.export(Outputs(), (image,), strict=False)
    request = openvino.Core().compile_model(openvino.convert_model(program), 'CPU', hints)
    request = request.create_infer_request()
    runs: dict[str, Call] = {RT_DETR: lambda index: request.infer([image.numpy()])}

    config = load_config(CONFIG, {'model.backbone.init_cfg': None})
    config.model.encoder.elastic = list(SCHEDULES)
    model = build_detector(config)
    with tempfile.TemporaryDirectory() as folder:
        for schedule, layers in product(SCHEDULES, arguments.layers):
            use_schedule(model, schedule)
            path = Path(folder, f'{schedule}-{layers}')
            export_detector(with_decoder_layers(model, layers), path, 'openvino', config, size)
            name = f'Lite-DINO R50 {schedule}, {layers} decoder layers, 900 queries'
            runs[name] = session_call(load(path, arguments.threads), size)
        against = {RT_DETR: lambda name: RT_DETR}
        timings = measure(runs, Setting(rounds=arguments.rounds, warmup=1), against=against)
    where = f'{arguments.threads} threads, OpenVINO {openvino.__version__}'
    print(f'{size[0]}x{size[1]}, float32, {where}')
    for name, timing in timings.items():
        share = 1 / timing.faster[RT_DETR].median
        print(f"{name}: {1e3 * timing.median:.0f} ms, {share:.2f} of RT-DETR's")


if __name__ == '__main__':
    main()
