from __future__ import annotations

import sys

import pytest
import torch

from mmlite.analysis.memory import peak_memory

MIB = 2**20


@pytest.mark.skipif(sys.platform != 'linux', reason='the high-water mark is read from Linux')
@pytest.mark.parametrize(('kept', 'freed'), [(24, 0), (24, 72), (0, 160), (4, 0)])
def test_peak_on_the_cpu(kept, freed):
    def call():
        result = torch.ones(kept * MIB, dtype=torch.uint8)
        scratch = torch.ones(freed * MIB, dtype=torch.uint8)
        del scratch
        return result

    call()
    assert peak_memory(call) / MIB == pytest.approx(kept + freed, abs=2)
