"""Hooks of mmengine that show costs, pictures and progress of a training.

Costs and pictures go through the runner's visualizer, hence to every backend that the config names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor

from ..openmmlab.runner import unwrapped
from .attention import attention_at_point, level_masses
from .complexity import count_detector
from .report import giga, size
from .timing import Start


class EfficiencyHook(Hook):
    """Counts GFLOPs and parameters before training starts.

    They go to the log, to the visualizer as scalars of step 0 (``efficiency/...``), and to
    ``efficiency.json`` in the work directory.

    Args:
        image_size (Sequence[int]): Height and width to count at, in pixels.
    """

    def __init__(self, image_size: Sequence[int] = (800, 1333)) -> None:
        self.image_size = tuple(image_size)

    def before_train(self, runner: Runner) -> None:
        if not is_main_process():
            return
        cost = count_detector(unwrapped(runner), self.image_size)
        gflops = {f'gflops_{stage}': flops / 1e9 for stage, flops in cost.stage_flops.items()}
        scalars = {'gflops': cost.flops / 1e9, 'params_m': cost.params / 1e6, **gflops}
        scalars = {f'efficiency/{name}': value for name, value in scalars.items()}
        runner.visualizer.add_scalars(scalars, step=0)
        path = Path(runner.work_dir) / 'efficiency.json'
        path.write_text(json.dumps(asdict(cost), indent=2) + '\n')
        runner.logger.info(
            f'{giga(cost.flops)} GFLOPs, of which encoder {giga(cost.stage_flops["encoder"])}, at '
            f'{size(self.image_size)}; {cost.params / 1e6:.2f} M parameters'
        )


class AttentionMapHook(Hook):
    """Draws, while validating, where the encoder looks.

    For the first images of the data set: the sampling points of the token in the middle of the
    surest detection (``attention_<i>``), and over these images how the attention is spread over
    the levels (``attention_levels``).

    Args:
        interval (int): Draw at every so many epochs of validation.
        num_images (int): How many images.
        layer (int): Encoder layer of the sampling points, negative from the last.
    """

    def __init__(self, interval: int = 1, num_images: int = 2, layer: int = -1) -> None:
        self.interval = interval
        self.num_images = num_images
        self.layer = layer

    def before_val_epoch(self, runner: Runner) -> None:
        self._masses: list[Tensor] = []

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        is_due = batch_idx < self.num_images and runner.epoch % self.interval == 0
        if not is_due or not is_main_process():
            return
        from .pictures import draw_attention, pixels_of  # late: it loads what draws

        model = unwrapped(runner)
        image = cv2.imread(outputs[0].img_path)[..., ::-1]
        last = torch.tensor([image.shape[1] - 1, image.shape[0] - 1])
        found, middle = outputs[0].pred_instances, last / 2
        if len(found):
            box = found.bboxes[found.scores.argmax()].cpu()
            middle = (box[:2] + box[2:]) / 2
        # A box may reach beyond the image.
        point = tuple(middle.clamp(torch.zeros(2), last).tolist())
        with torch.no_grad():
            run = partial(model.val_step, data_batch)
            seen = attention_at_point(model, run, point, self.layer)
            self._masses.append(level_masses(model, run))
        picture = pixels_of(draw_attention(image, [(type(model).__name__, seen)]))
        runner.visualizer.add_image(f'attention_{batch_idx}', picture, step=runner.epoch)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        if self._masses:
            from .pictures import draw_level_masses, pixels_of

            masses = {type(unwrapped(runner)).__name__: torch.stack(self._masses).mean(0)}
            picture = pixels_of(draw_level_masses(masses))
            runner.visualizer.add_image('attention_levels', picture, step=runner.epoch)


class ProgressHook(Hook):
    """Shows how far a training is.

    Args:
        start (Callable): Begins a bar of so many iterations, with ``text`` beside it.
        note (Callable): What stands behind the bar, of a runner.
        report (Callable): Called with a runner and the number of iterations done: before training,
            and after each of so many ``parts`` of it.
    """

    priority = 'VERY_LOW'

    def __init__(
        self,
        start: Start,
        text: str,
        note: Callable[[Runner], str],
        report: Callable[[Runner, int], None],
        parts: int,
    ) -> None:
        self.start, self.text, self.note, self.report, self.parts = start, text, note, report, parts

    def before_train(self, runner: Runner) -> None:
        self.report(runner, runner.iter)
        self.step = self.start(self.text, runner.max_iters)
        for _ in range(runner.iter):
            self.step()

    def after_train_iter(self, runner: Runner, batch_idx: int, *_: Any, **__: Any) -> None:
        self.step(self.note(runner))
        done = runner.iter + 1
        if done % max(runner.max_iters // self.parts, 1) == 0:
            self.report(runner, done)
