"""Several processes on CPUs: what a config imports to be trained by them.

::

    custom_imports = dict(imports=['mmlite', 'mmlite.openmmlab.gloo'])

MMEngine's launchers choose a CUDA device before they look whether there is one. Importing this
module in a process that torchrun has started, on a machine without CUDA, opens torch's process
group with the gloo backend; MMEngine finds it open and goes on. Anywhere else it does nothing.
"""

from __future__ import annotations

import os

import torch
from torch import distributed

_STARTED = all(name in os.environ for name in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'))

if _STARTED and not torch.cuda.is_available() and not distributed.is_initialized():
    distributed.init_process_group('gloo')
