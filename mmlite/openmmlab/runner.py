"""MMEngine's runners for training by several processes on CPUs, and the model inside of one.

MMEngine's launchers choose a CUDA device before they look whether there is one. On a machine
without CUDA these runners open torch's process group themselves, with the gloo backend; MMEngine
finds it open and goes on. On a GPU they are MMEngine's.
"""

from __future__ import annotations

from typing import Any

import torch
from mmengine.model import is_model_wrapper
from mmengine.registry import RUNNERS
from mmengine.runner import FlexibleRunner, Runner
from torch import distributed, nn


class _OpensGroup:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        is_started = kwargs.get('launcher') == 'pytorch' and not distributed.is_initialized()
        if is_started and not torch.cuda.is_available():
            distributed.init_process_group('gloo')
        super().__init__(*args, **kwargs)


@RUNNERS.register_module()
class CPURunner(_OpensGroup, Runner):
    """``Runner``, chosen by ``--launcher pytorch --cfg-options runner_type=CPURunner``."""

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """As MMEngine's; the wrapper takes the device that the model is on."""
        if model_wrapper_cfg is None and self.distributed and not torch.cuda.is_available():
            unused = self.cfg.get('find_unused_parameters', False)
            model_wrapper_cfg = {'device_ids': None, 'broadcast_buffers': False}
            model_wrapper_cfg['find_unused_parameters'] = unused
        return super().wrap_model(model_wrapper_cfg, model)


@RUNNERS.register_module()
class CPUFlexibleRunner(_OpensGroup, FlexibleRunner):
    """``FlexibleRunner``, whose strategies share out more than the images."""


def unwrapped(runner: Runner) -> nn.Module:
    """The model itself, whatever shares it out."""
    return runner.model.module if is_model_wrapper(runner.model) else runner.model
