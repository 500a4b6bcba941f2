"""What a run of a study remembers while it trains."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from mmengine.hooks import Hook
from mmengine.runner import Runner, set_random_seed

from mmlite.analysis.accuracy import METRICS

LOSSES = 60  # points of a loss curve


class NonFiniteLoss(RuntimeError):
    """The loss has become infinite or not a number."""


class Recorder(Hook):
    """Keeps learning curves and times, through checkpoints as well.

    Args:
        seed (int): Of the run.
        report (Callable[[float, str], None]): Told the share that is done, and the loss.
    """

    def __init__(self, seed: int, report: Callable[[float, str], None]) -> None:
        self.seed, self.report = seed, report
        self.state: dict = {
            'curve': [],
            'loss': [],
            'train_seconds': 0.0,
            'iterations': 0,
            'inference_ms': None,
            'resumed': 0,
        }
        self._losses: list[float] = []
        self._since = self._val_since = 0.0
        self._images = 0

    def _clock(self, runner: Runner) -> float:
        """Seconds of this process's CPU time, or of the wall where another device computes."""
        on_cpu = next(runner.model.parameters()).device.type == 'cpu'
        return time.process_time() if on_cpu else time.perf_counter()

    def before_train(self, runner: Runner) -> None:
        """Catch up on an evaluation that a kill came before."""
        loop = runner.train_loop
        if runner.iter == 0:
            return
        self.state['resumed'] += 1
        done = [point['iteration'] for point in self.state['curve']]
        due = runner.epoch >= loop.val_begin and (
            runner.epoch % loop.val_interval == 0 or runner.epoch == loop.max_epochs
        )
        if due and runner.iter not in done:
            runner.val_loop.run()

    def before_train_epoch(self, runner: Runner) -> None:
        set_random_seed((1000 * self.seed + runner.epoch) % 2**32)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        self._since = self._clock(runner)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs: dict | None = None
    ) -> None:
        loss = float(outputs['loss'].detach())
        self.state['train_seconds'] += self._clock(runner) - self._since
        self.state['iterations'] = done = runner.iter + 1
        if not math.isfinite(loss):
            raise NonFiniteLoss(f'the loss is {loss} at iteration {done} of {runner.max_iters}')
        self._losses.append(loss)
        if done % max(1, runner.max_iters // LOSSES) == 0 or done == runner.max_iters:
            mean = sum(self._losses) / len(self._losses)
            self.state['loss'].append([done, round(mean, 4)])
            self._losses = []
        self.report(done / runner.max_iters, f'loss {loss:.2f}')

    def before_val_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        if batch_idx == 0:
            self._images, self._val_since = 0, self._clock(runner)

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        self._images += len(outputs)
        seconds = self._clock(runner) - self._val_since
        self.state['inference_ms'] = round(1000 * seconds / self._images, 4)

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        found = {name: metrics[f'coco/bbox_{key}'] for name, key in METRICS.items()}
        # COCO's evaluation says -1 where there are no such objects.
        percent = {n: None if v < 0 else round(100 * v, 4) for n, v in found.items()}
        point = {'iteration': runner.iter, 'epoch': runner.epoch, **percent}
        curve = [p for p in self.state['curve'] if p['iteration'] != runner.iter]
        self.state['curve'] = [*curve, point]

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        checkpoint['study'] = {**self.state, 'losses': self._losses}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if 'study' in checkpoint:
            self.state = dict(checkpoint['study'])
            self._losses = self.state.pop('losses')

    def result(self) -> dict:
        """For ``result.json``: the last evaluation's metrics, the curves and the times."""
        state = dict(self.state)
        seconds = state.pop('train_seconds')
        last = state['curve'][-1] if state['curve'] else {}
        return {
            'metrics': {name: last.get(name) for name in METRICS},
            'train_ms': round(1000 * seconds / max(1, state['iterations']), 2),
            'train_seconds': round(seconds, 1),
            **state,
        }
