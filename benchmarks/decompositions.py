"""What one layer of deformable attention takes in ONNX Runtime and OpenVINO, in several forms.

    python benchmarks/decompositions.py --rounds 5 --threads 2

All tokens of an image attend to all four maps. `gridsample` and `gather` are the forms of
mmlite/export/operators.py.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch
from torch import Tensor, nn

from mmlite.analysis.inputs import operator_inputs
from mmlite.export import openvino_core
from mmlite.export.operators import PORTABLE
from mmlite.ops import reference

SIZES: list[tuple[int, int]] = []  # of the maps; main() fills it in


def flat() -> list[int]:
    return [side for size in SIZES for side in size]


def levels_points_last(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """Every level stays as grid_sample leaves it, points behind queries."""
    batch, _, heads, _ = value.shape
    grids = (2 * locations - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)
    weights = weights.permute(3, 0, 2, 1, 4).flatten(1, 2)
    maps, start, total = value.permute(0, 2, 3, 1).flatten(0, 1), 0, 0.0
    for grid, weight, (height, width) in zip(grids, weights, SIZES):
        level = maps.narrow(-1, start, height * width).unflatten(-1, (height, width))
        start += height * width
        samples = F.grid_sample(level, grid, align_corners=False)
        total = total + (samples * weight.unsqueeze(1)).sum(-1)
    return total.unflatten(0, (batch, heads)).flatten(1, 2).transpose(1, 2)


def shipped(name: str, query, value: Tensor, locations: Tensor, weights) -> Tensor:
    """A form of ``mmlite export --portable``."""
    (form,) = PORTABLE[name].values()
    return form(query, None, value, flat(), None, locations, weights)


STANDARD = {
    "MMCV's": lambda v, x, w: multi_scale_deformable_attn_pytorch(v, SIZES, x, w),
    'gridsample': lambda v, x, w: shipped('gridsample', None, v, x, w),
    'points last': levels_points_last,
    'gather': lambda v, x, w: shipped('gather', None, v, x, w),
}
KEY_AWARE = {
    'samples of all levels': lambda v, x, q: reference.key_aware_deform_attn(q, None, v, SIZES, x),
    'gridsample': lambda v, x, q: shipped('gridsample', q, v, x, None),
    'gather': lambda v, x, q: shipped('gather', q, v, x, None),
}


class Form(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def sessions(path: Path, arrays: list[np.ndarray], threads: int) -> dict:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, threads
    session = onnxruntime.InferenceSession(str(path), options)
    inputs = dict(zip([one.name for one in session.get_inputs()], arrays))
    hints = {
        'PERFORMANCE_HINT': 'LATENCY',
        'INFERENCE_PRECISION_HINT': 'f32',
        'INFERENCE_NUM_THREADS': str(threads),
    }
    request = openvino_core().compile_model(str(path), 'CPU', hints).create_infer_request()
    return {
        'ONNX Runtime': lambda: session.run(None, inputs)[0],
        'OpenVINO': lambda: request.infer(arrays, share_inputs=True)[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--image-size', type=int, nargs=2, default=(800, 1333), metavar=('H', 'W'))
    arguments = parser.parse_args()

    logging.disable(logging.WARNING)  # the exporter's, of torchvision
    x = operator_inputs(tuple(arguments.image_size))
    SIZES[:] = x.level_sizes
    value, locations = x.value, x.sampling_locations
    runs = {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for kind, forms, third in (
            ('standard', STANDARD, x.attention_weights),
            ('key-aware', KEY_AWARE, x.query),
        ):
            inputs = (value, locations, third)
            expected = next(iter(forms.values()))(*inputs).numpy()
            for name, function in forms.items():
                path = Path(folder) / 'form.onnx'
                program = torch.export.export(Form(function), inputs, strict=False)
                torch.onnx.export(program, dynamo=True, opset_version=18, verbose=False).save(path)
                arrays = [tensor.numpy() for tensor in inputs]
                for runtime, run in sessions(path, arrays, arguments.threads).items():
                    error = np.abs(run() - expected).max()
                    assert error < 1e-4, (kind, name, runtime, error)
                    runs[kind, name, runtime] = run
        seconds: dict = {key: [] for key in runs}
        for _ in range(arguments.rounds):
            for key, run in runs.items():
                start = time.perf_counter()
                run()
                seconds[key].append(time.perf_counter() - start)
    for (kind, name, runtime), times in seconds.items():
        print(f'{kind:10} {name:22} {runtime:13} {statistics.median(times) * 1e3:7.0f} ms')


if __name__ == '__main__':
    main()
