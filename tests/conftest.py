"""Fixtures that several test modules share."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter, which has to be chosen before
# anything imports Triton.
if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')

SHARED = Path(__file__).parents[2] / 'shared'


@pytest.fixture(scope='session')
def golden():
    """Load a file of the golden vectors as tensors, with its meta data as a dict."""

    def load(name: str) -> tuple[dict[str, torch.Tensor], dict]:
        path = SHARED / 'golden' / name
        if not path.exists():
            pytest.skip(f'the golden vectors are not here: {path}')
        with np.load(path) as arrays:
            meta = json.loads(str(arrays['meta']))
            return {k: torch.from_numpy(arrays[k]) for k in arrays.files if k != 'meta'}, meta

    return load
