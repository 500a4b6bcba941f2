"""Writing checkpoints so that the one before outlives a full disk or a kill."""

from __future__ import annotations

import os
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner


@register_backend('atomic')
class AtomicBackend(LocalBackend):
    """A local file has its old content or its new one, never a part of either."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write beside the file, then take its place.

        Args:
            obj (bytes): The content.
            filepath (str | Path): Where it goes; missing folders are made.

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
        except BaseException:
            beside.unlink(missing_ok=True)
            raise


class SafeCheckpointHook(CheckpointHook):
    """MMEngine's checkpoint hook, with the last checkpoint usable whenever training ends.

    ::

        default_hooks = dict(checkpoint=dict(type='SafeCheckpointHook', max_keep_ckpts=1))

    MMEngine writes a checkpoint in place and deletes the one that ``max_keep_ckpts`` no longer
    allows before it does. A full disk then leaves half a file, or nothing where one is kept. Here a
    checkpoint is written beside and renamed, and only then is the outdated one deleted: for a
    moment the disk holds one more than is kept. Takes all arguments of MMEngine's hook.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.backend_args is None:
            self.backend_args = {'backend': 'atomic'}

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        # With the step already listed, MMEngine deletes nothing.
        outdated = None
        if self.max_keep_ckpts > 0 and step not in list(self.keep_ckpt_ids)[-1:]:
            if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
                outdated = self.keep_ckpt_ids.popleft()
            self.keep_ckpt_ids.append(step)
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
        super()._save_checkpoint_with_step(runner, step, meta)
        if outdated is not None and is_main_process():
            path = self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(outdated))
            if self.file_backend.isfile(path):
                self.file_backend.remove(path)
            elif self.file_backend.isdir(path):  # of a sharded training
                self.file_backend.rmtree(path)
