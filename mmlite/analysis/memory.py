"""Peak memory of a call, beyond what was in use before it."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS = Path('/proc/self/status')
_CLEAR_REFS = Path('/proc/self/clear_refs')


def peak_memory(call: Callable[[], object], device: torch.device | str = 'cpu') -> int | None:
    """Bytes that ``call`` needs at its peak, its result included.

    On CUDA this is what torch's allocator hands out. On the CPU it is the high-water mark of the
    process, which also sees the scratch memory of kernels. It is exact to about 1 MiB, as pages
    that the system had taken away come back; what was allocated but never touched does not count.

    Run it before, too: what a first call sets up for good would count. None on a CPU whose
    operating system does not tell (other than Linux).
    """
    device = torch.device(device)
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    try:
        # Give back what the allocator holds in reserve; the call would otherwise use it unseen.
        ctypes.CDLL(None).malloc_trim(0)
        before = _from_status('VmRSS')
        _CLEAR_REFS.write_text('5')  # sets the high-water mark back to now
    except (OSError, AttributeError):
        return None
    result = call()
    peak = _from_status('VmHWM')
    del result
    return max(0, peak - before)


def _from_status(field: str) -> int:
    return 1024 * int(re.search(rf'^{field}:\s*(\d+) kB', _STATUS.read_text(), re.MULTILINE)[1])
