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

GOLDEN = Path(__file__).parent / 'data/golden'


@pytest.fixture(scope='session')
def golden():
    """Load a file of the golden vectors as tensors, with its meta data as a dict."""

    def load(name: str) -> tuple[dict[str, torch.Tensor], dict]:
        with np.load(GOLDEN / name) as arrays:
            meta = json.loads(str(arrays['meta']))
            return {k: torch.from_numpy(arrays[k]) for k in arrays.files if k != 'meta'}, meta

    return load
