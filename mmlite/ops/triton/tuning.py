"""The choice of a launch configuration: a rule, timings that may beat it, and a memory of them.

Tuning must not be able to hurt. So a configuration that does not fit the device is passed over,
nothing is timed where the wait or the choice would matter to others (:func:`_may_time`), and
timings are kept on disk, where a file that is missing, broken or not writable means that there is
none.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import statistics
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

Result = TypeVar('Result')


class Config(NamedTuple):
    """How the queries are spread over programs.

    Attributes:
        block_q (int): Queries of a program.
        num_warps (int): Warps of a program.
        ahead (bool): In the forward pass, load where a level's points lie one level early.
    """

    block_q: int
    num_warps: int
    ahead: bool = False


@functools.cache
def candidates(points: int, dim: int) -> tuple[Config, ...]:
    """The configurations worth timing for tiles of (points, block_q, dim); the first is the rule.

    A thread holds 16 or 32 elements of a tile. With 32 the points' coordinates are worked out once
    a point and passed round, with 16 by every thread that needs them, but more warps fit. Programs
    of several warps share a first-level cache among more neighbouring queries.
    """
    found = []
    for elements, num_warps in ((16, 4), (32, 1), (32, 4), (16, 8), (16, 2), (16, 1)):
        block_q = max(1, elements * 32 * num_warps // (points * dim))
        config = Config(block_q, num_warps)
        if config not in found:
            found.append(config)
    return tuple(found)


# Pairs of a query and a head, of which four make a warp, that give three warps to each of the four
# schedulers of about 130 multiprocessors.
_FEW_PAIRS = 4 * 3 * 4 * 132


def by_rule(
    configs: Sequence[Config], kernel: str, capability: tuple[int, int], pairs: int
) -> tuple[Config, ...]:
    """The candidates with the one first that serves where nothing was timed.

    Below compute capability 9.0 the backward adds one number an instruction, and the layout that
    suits that makes 16 elements a thread work every coordinate out again: 3,336 instructions a
    query against 1,510 with 32 elements and one warp.

    Loading a level ahead is worth timing in the forward pass alone. It costs registers and 4 % more
    instructions, and saves a wait that other warps fill as long as there are three or more of them
    for each scheduler; so it is the rule where there are fewer.
    """
    if kernel == 'forward':
        ahead = tuple(config._replace(ahead=True) for config in configs[:2])
        is_few = pairs < _FEW_PAIRS
        return (*ahead, *configs) if is_few else (*configs, *ahead)
    if kernel == 'backward' and capability < (9, 0) and len(configs) > 1:
        return (configs[1], configs[0], *configs[2:])
    return tuple(configs)


def work_class(pairs: int) -> int:
    """The bucket of an amount of work, counted in pairs of a query and a head.

    Wide ones, a factor of eight each: the images of multi-scale training fall into one or two.
    """
    return (max(pairs, 1).bit_length() + 1) // 3


class Tuner:
    """Launches kernels with the fastest configuration known.

    Args:
        folder (Path, optional): Where timings are kept. Default: ``MMLITE_CACHE_DIR``, else
            ``mmlite`` in the user's cache folder.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._known: dict[str, dict[str, Config]] = {}
        self._unfit: set[tuple[str, Config]] = set()
        self._lock = threading.Lock()

    def run(
        self,
        launch: Callable[[Config], Result],
        key: str,
        configs: Sequence[Config],
        maker: str | None,
    ) -> Result:
        """``launch`` with the fastest of ``configs``, timed at the first call with ``key``.

        ``launch`` must be free of side effects. The rule ``configs[0]`` is used where runs must
        repeat bit for bit (deterministic algorithms), and where nothing is known and nothing may
        be timed. A configuration for which the device has too few registers or too little shared
        memory gives way to the next.

        Args:
            launch (Callable[[Config], Result]): What to time and to run.
            key (str): What the choice depends on.
            configs (Sequence[Config]): The candidates.
            maker (str, optional): What makes the timings, which are worth nothing on another
                device or for other kernels; see :func:`maker`. None where the rule decides.

        Raises:
            triton.runtime.errors.OutOfResources: No configuration fits the device.
        """
        chosen = configs[0]
        if maker is not None and not torch.are_deterministic_algorithms_enabled():
            chosen = self._fastest(launch, key, configs, maker)
        if (key, chosen) not in self._unfit:
            try:
                return launch(chosen)
            except _out_of_resources():
                self._unfit.add((key, chosen))
        others = [c for c in configs if (key, c) not in self._unfit] or list(configs)
        for config in others[:-1]:
            try:
                return launch(config)
            except _out_of_resources():
                self._unfit.add((key, config))
        return launch(others[-1])

    def _fastest(
        self, launch: Callable[[Config], object], key: str, configs: Sequence[Config], maker: str
    ) -> Config:
        if maker not in self._known:
            self._known[maker] = _read(self.path(maker))
        known = self._known[maker]
        if known.get(key) not in configs and _may_time():
            with self._lock:  # the backward pass has threads of its own
                if known.get(key) not in configs:
                    known[key] = _time(launch, configs)
                    _write(self.path(maker), {key: known[key]})
        config = known.get(key)
        return config if config is not None and config in configs else configs[0]

    def path(self, maker: str) -> Path:
        """The file of the timings made by ``maker``."""
        digest = hashlib.sha256(maker.encode()).hexdigest()[:16]
        return (self._folder or _cache_folder()) / f'tuning-{digest}.json'


@functools.cache
def maker(device_index: int) -> str:
    """What timings depend on besides the call: the device, Triton and the kernels themselves."""
    import triton

    kernels = Path(__file__).with_name('kernels.py').read_bytes()
    properties = torch.cuda.get_device_properties(device_index)
    return ', '.join(
        (
            properties.name,
            f'compute capability {properties.major}.{properties.minor}',
            f'{properties.multi_processor_count} multiprocessors',
            f'Triton {triton.__version__}',
            f'kernels {hashlib.sha256(kernels).hexdigest()[:16]}',
        )
    )


def _may_time() -> bool:
    """Whether timing can harm nobody.

    Not during the capture of a CUDA graph, which cannot hold it. Not in a distributed run: while
    one rank times, the others wait for it in the next collective; ranks that time for themselves
    choose differently; and asking rank 0 would be a collective of its own, in which ranks hang
    that need no choice, since their images are of another size. There the timings of an earlier
    run on one GPU decide, or the rule.
    """
    return (
        os.environ.get('MMLITE_AUTOTUNE', '1') != '0'
        and torch.cuda.is_available()
        and not torch.cuda.is_current_stream_capturing()
        and not _is_distributed()
    )


def _is_distributed() -> bool:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size() > 1
    # Launched as one of several, and the first call came before they met.
    return os.environ.get('WORLD_SIZE', '1') not in ('', '0', '1')


def _time(launch: Callable[[Config], object], configs: Sequence[Config], rounds: int = 7) -> Config:
    """The fastest, by the median over rounds in which all of them run.

    Caches stay as warm as the call before left them: in a model the layer before has just written
    what the kernels read. Those that do not run here drop out; if all do, the rule is left.
    """
    seconds: dict[Config, list[float]] = {}
    for config in configs:
        with contextlib.suppress(*_out_of_resources(), torch.cuda.OutOfMemoryError):
            _clock(launch, config)  # compiles
            seconds[config] = []
    for _ in range(rounds):
        for config in list(seconds):
            try:
                seconds[config].append(_clock(launch, config))
            except torch.cuda.OutOfMemoryError:
                del seconds[config]
    return min(seconds, key=lambda config: statistics.median(seconds[config]), default=configs[0])


def _clock(launch: Callable[[Config], object], config: Config, repeats: int = 3) -> float:
    """Milliseconds of a launch on the current stream, the first of them not counted."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    launch(config)
    start.record()
    for _ in range(repeats):
        launch(config)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def _out_of_resources() -> tuple[type[Exception], ...]:
    """What Triton raises where a kernel needs more than the device has."""
    from triton.runtime import errors

    # Raised since Triton 3.2 by the assembler, where registers run out for so many warps.
    return tuple({errors.OutOfResources, getattr(errors, 'PTXASError', errors.OutOfResources)})


def _cache_folder() -> Path:
    own = os.environ.get('MMLITE_CACHE_DIR')
    if own:
        return Path(own)
    return Path(os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')) / 'mmlite'


def _read(path: Path) -> dict[str, Config]:
    try:
        content = json.loads(path.read_text())
        return {
            key: Config(int(q), int(warps), bool(ahead))
            for key, (q, warps, ahead) in content.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(path: Path, new: dict[str, Config]) -> None:
    """Add to a file what is new; others see it before or after, never in between."""
    content = json.dumps({**_read(path), **new}, indent=1)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile('w', dir=path.parent, delete=False) as file:
            temporary = file.name
            file.write(content)
        os.replace(temporary, path)
    except OSError:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


TUNER = Tuner()
