"""Hooks for MMEngine's runner: starts from stock, checkpoints that outlive a full disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from mmengine.dist import broadcast, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import CheckpointLoader, Runner
from torch import nn

from ..runner import unwrapped
from .official import unpack
from .warm_start import WarmStart, warm_start


class WarmStartHook(Hook):
    """Starts the training of a Lite detector from trained weights of its stock detector.

    ::

        custom_hooks = [dict(type='WarmStartHook', checkpoint='dino_r50.pth')]

    What is new in the Lite detector is fitted on the first training batch; see
    :func:`mmlite.openmmlab.checkpoints.warm_start`. A training that is resumed is left as it is.

    Args:
        checkpoint (str): Path or URL of the stock detector's checkpoint, in MMDetection's layout.
    """

    priority = 'VERY_HIGH'

    def __init__(self, checkpoint: str) -> None:
        # Read at once, so that a wrong path is reported before anything is built.
        self.state, _ = unpack(CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu'))

    def before_train(self, runner: Runner) -> None:
        """Fill in the weights, after MMEngine has initialised or resumed the model.

        Raises:
            ValueError: The checkpoint is not of the stock detector behind the runner's model.
        """
        if runner.iter > 0:
            return

        def start(model: nn.Module) -> WarmStart:
            data = model.data_preprocessor(next(iter(runner.train_dataloader)))
            return warm_start(model, runner.cfg.model, self.state, data)

        _begin(runner, start)
        self.state = None


class DistillHook(Hook):
    """Starts a ``DistilledDetector`` from its teacher, and notes it down in checkpoints.

    Args:
        fit_images (int): Images that what is new is fitted to before the first iteration.
    """

    priority = 'VERY_HIGH'

    def __init__(self, fit_images: int = 64) -> None:
        self.fit_images = fit_images

    def before_train(self, runner: Runner) -> None:
        """Copy and fit, unless the training is resumed."""
        model = unwrapped(runner)
        model.iterations = runner.iter
        model.encoder.training_calls = runner.iter * model.encoder.turns
        model.max_iterations = runner.max_iters
        model.images = len(runner.train_dataloader.dataset)
        if not runner.iter:
            _begin(runner, partial(self._start, runner))

    def _start(self, runner: Runner, model: nn.Module) -> WarmStart:
        batches: dict[str, list] = {'inputs': [], 'data_samples': []}
        for batch in runner.train_dataloader:
            for name, kept in batches.items():
                kept += list(batch[name])
            if len(batches['inputs']) >= self.fit_images:
                break
        return model.start(model.data_preprocessor(batches, False))

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Say what the weights come from."""
        done = runner.iter + 1  # with the one that has just been done
        checkpoint['meta']['distilled'] = unwrapped(runner).facts(done)


def _begin(runner: Runner, start: Callable[[nn.Module], WarmStart]) -> None:
    """Start in one process, and give the weights to all."""
    model = unwrapped(runner)
    if is_main_process():
        runner.logger.info(f'Start: {start(model)}')
    for value in model.state_dict().values():
        broadcast(value)


@register_backend('atomic')
class AtomicBackend(LocalBackend):
    """Writes a local file whole or not at all."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write beside the file, then take its place. Missing folders are made.

        Raises:
            OSError: It cannot be written. What was at ``filepath`` is still there.
        """
        filepath = Path(filepath)
        filepath.parent.mkdir(parents=True, exist_ok=True)
        beside = filepath.with_name(f'.{filepath.name}.{os.getpid()}')
        try:
            with beside.open('wb') as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())  # the name must not reach the disk before the content
            beside.replace(filepath)
        finally:
            beside.unlink(missing_ok=True)


class SafeCheckpointHook(CheckpointHook):
    """MMEngine's checkpoint hook, with the last checkpoint usable whenever training ends.

    ::

        default_hooks = dict(checkpoint=dict(type='SafeCheckpointHook', max_keep_ckpts=1))

    MMEngine deletes the outdated checkpoint and then writes the new one in place, so that a full
    disk leaves half a file or nothing. Here a checkpoint is written beside and renamed, and only
    then is the outdated one deleted: for a moment the disk holds one more than
    ``max_keep_ckpts``. Takes all arguments of MMEngine's hook.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.backend_args = self.backend_args or {'backend': 'atomic'}

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        # With the step already listed, MMEngine deletes nothing.
        outdated = None
        if self.max_keep_ckpts > 0 and step not in list(self.keep_ckpt_ids)[-1:]:
            if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
                outdated = self.filename_tmpl.format(self.keep_ckpt_ids.popleft())
            self.keep_ckpt_ids.append(step)
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
        super()._save_checkpoint_with_step(runner, step, meta)
        if outdated is not None and is_main_process():
            path = self.file_backend.join_path(self.out_dir, outdated)
            if self.file_backend.isfile(path):
                self.file_backend.remove(path)
            elif self.file_backend.isdir(path):  # of a sharded training
                self.file_backend.rmtree(path)
