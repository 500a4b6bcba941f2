"""MMEngine's runners for training by several processes on CPUs.

MMEngine's launchers choose a CUDA device before they look whether there is one. On a machine
without CUDA these runners open torch's process group themselves, with the gloo backend; MMEngine
finds it open and goes on. On a GPU they are MMEngine's.
"""

from __future__ import annotations

from typing import Any

import torch
from mmengine.registry import RUNNERS
from mmengine.runner import FlexibleRunner, Runner
from torch import distributed, nn


def _open_group(launcher: str | None) -> None:
    is_started = launcher == 'pytorch' and not distributed.is_initialized()
    if is_started and not torch.cuda.is_available():
        distributed.init_process_group('gloo')


@RUNNERS.register_module()
class CPURunner(Runner):
    """``Runner``, chosen by ``--launcher pytorch --cfg-options runner_type=CPURunner``."""

    def __init__(self, *args: Any, launcher: str = 'none', **kwargs: Any) -> None:
        _open_group(launcher)
        super().__init__(*args, launcher=launcher, **kwargs)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """As MMEngine's; the wrapper takes the device that the model is on."""
        if model_wrapper_cfg is None and self.distributed and not torch.cuda.is_available():
            model_wrapper_cfg = {'device_ids': None, 'broadcast_buffers': False}
        return super().wrap_model(model_wrapper_cfg, model)


@RUNNERS.register_module()
class CPUFlexibleRunner(FlexibleRunner):
    """``FlexibleRunner``, whose strategies share out more than the images."""

    def __init__(self, *args: Any, launcher: str | None = None, **kwargs: Any) -> None:
        _open_group(launcher)
        super().__init__(*args, launcher=launcher, **kwargs)
