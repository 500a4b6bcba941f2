"""A runner for training by several processes on CPUs."""

from __future__ import annotations

import torch
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch import distributed


@RUNNERS.register_module()
class CPURunner(Runner):
    """MMEngine's runner, whose processes also find each other without a GPU.

    MMEngine's launchers choose a CUDA device before they look whether there is one. Started with
    ``--launcher pytorch --cfg-options runner_type=CPURunner`` on a machine without CUDA, this
    opens torch's process group with the gloo backend, and asks no wrapper for a CUDA device.
    """

    def setup_env(self, env_cfg: dict) -> None:
        """Open the process group, then as MMEngine's.

        Args:
            env_cfg (dict): ``env_cfg`` of the config.
        """
        if self.distributed and not torch.cuda.is_available() and not distributed.is_initialized():
            distributed.init_process_group('gloo')
        super().setup_env(env_cfg)
