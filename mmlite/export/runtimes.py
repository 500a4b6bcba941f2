"""Inference runtimes, imported when used: libraries with our operators (csrc/), loaded models."""

from __future__ import annotations

import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from importlib import import_module
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

_PREFIX, _SUFFIX = {'darwin': ('lib', 'dylib'), 'win32': ('', 'dll')}.get(
    sys.platform, ('lib', 'so')
)
MOST_THREADS = max(64, os.cpu_count() or 1)  # each takes memory: thousands end the process
_HOW = {
    'onnxruntime': 'install a C++ compiler (GCC or Clang) and reinstall mmlite',
    'openvino': 'build it for the installed OpenVINO, as docs/deploy.md shows '
    '(cmake with OpenVINO_DIR; it needs a C++ compiler)',
}


def library(runtime: str) -> Path:
    """The library with our operators for a runtime, for C++ programs, too.

    Args:
        runtime (str): ``'onnxruntime'`` or ``'openvino'``.

    Returns:
        Path: What ``SessionOptions::RegisterCustomOpsLibrary`` or ``Core::add_extension`` takes.

    Raises:
        ValueError: There is no such runtime.
        FileNotFoundError: The library was not built; the message says how to get it.
    """
    if runtime not in _HOW:
        raise ValueError(f'runtime must be one of {", ".join(_HOW)}; got {runtime!r}')
    path = Path(__file__).with_name(f'{_PREFIX}mmlite_{runtime}.{_SUFFIX}')
    if not path.exists():
        raise FileNotFoundError(
            f"mmlite's operators for {runtime} were not built ({path.name} is missing): "
            f'{_HOW[runtime]}, or export with --portable, which needs no operators'
        )
    return path


def import_runtime(name: str, package: str | None = None) -> Any:
    """Import a runtime, or say how to install it."""
    try:
        return import_module(name)
    except ImportError as error:
        how = f'install it: pip install {package or name}'
        raise ImportError(f'{name} cannot be imported ({error}); {how}') from error


def openvino_core(with_operators: bool = False) -> Any:
    """The one ``openvino.Core`` of this process, with our operators once anyone asked for them.

    Several are not safe: each, when it is freed, brings back the stack of signal handlers that it
    had found. Freed in the order in which they were made, the last brings back one that is gone,
    and the next signal, such as the end of a child, ends the process (seen with OpenVINO 2026.4).

    Raises:
        ImportError: openvino is missing.
        FileNotFoundError: The operators were not built.
        ValueError: OpenVINO does not load the operators.
    """
    openvino = import_runtime('openvino')
    core = _make_once(openvino.Core)
    if with_operators:
        operators = library('openvino')
        name = f'OpenVINO {openvino.__version__}'
        hint = '(they are built for one version of it; build them again)'
        with _refusal(f'{name} does not load the operators in {operators} {hint}'):
            _make_once(core.add_extension, str(operators))
    return core


@cache
def _make_once(make: Callable, *arguments: Any) -> Any:
    return make(*arguments)


def check_threads(threads: int | None) -> None:
    """Refuse with a ValueError what is no number of threads; None is the runtime's choice."""
    is_number = isinstance(threads, Integral) and not isinstance(threads, bool)
    if threads is not None and not (is_number and 0 < threads <= MOST_THREADS):
        what = f'a whole number from 1 to {MOST_THREADS}, or None'
        raise ValueError(f'threads must be {what}; got {threads!r}')


def check_device(device: str) -> None:
    """Refuse with a ValueError a device that torch cannot use here."""
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).partition('\n')[0]
        raise ValueError(
            f"device {device!r} cannot be used here: {reason}; 'cpu' can, and where there are GPUs "
            "'cuda' and 'cuda:1'"
        ) from error


def processor_gains() -> dict[str, tuple[bool, str]]:
    """What OpenVINO gains here from ``bfloat16`` and ``int8``: whether, and a sentence.

    Nothing is said of processors that are not x86 on Linux.
    """
    file = Path('/proc/cpuinfo')
    found = re.search(r'^flags\s*:(.*)$', file.read_text() if file.exists() else '', re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    if not flags:
        return {}
    amx, vnni = 'amx_bf16' in flags, bool(flags & {'avx512_vnni', 'avx_vnni', 'amx_int8'})
    slower = 'slower' if 'avx512_bf16' in flags else 'no faster'
    bfloat16 = 'faster than float32 by AMX' if amx else f'{slower} than float32 without AMX'
    one_size = 'without VNNI 8 bits are faster for images of one size alone (--image-size)'
    eight = 'faster than float32 by VNNI' if vnni else one_size
    return {'bfloat16': (amx, bfloat16), 'int8': (vnni, eight)}


@contextmanager
def _refusal(what: str) -> Iterator[None]:
    """Turn an error of a runtime, which are of no common class, into one sentence."""
    try:
        yield
    except Exception as error:
        raise ValueError(f'{what}: {" ".join(str(error).split())}') from error


def _opening(runtime: str, model: Path) -> AbstractContextManager[None]:
    return _refusal(f'{runtime} does not take {model} (if it is damaged, export again)')


# A loaded model: inputs in their order to outputs. Several threads may call one at a time.
Session = Callable[..., Sequence[np.ndarray]]


def _open_onnx(model: Path, portable: bool, threads: int | None, *_: Any) -> Session:
    onnxruntime = import_runtime('onnxruntime')
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # warnings tell of the exporter's unused constants
    if threads:
        options.intra_op_num_threads = threads
    name = f'ONNX Runtime {onnxruntime.__version__}'
    if not portable:
        operators = library('onnxruntime')
        with _refusal(f'{name} does not load the operators in {operators}'):
            options.register_custom_ops_library(str(operators))
    with _opening(name, model):
        # This fusion makes of an addition and a norm a node that is three times slower than both.
        slow, providers = ['SkipLayerNormFusion'], ['CPUExecutionProvider']
        session = onnxruntime.InferenceSession(
            str(model), options, providers, disabled_optimizers=slow
        )
    names = [argument.name for argument in session.get_inputs()]
    return lambda *inputs: session.run(None, dict(zip(names, inputs)))


def _cache_of(model: Path) -> dict[str, str]:
    """Where OpenVINO keeps what it made of a model: beside it, of its present files alone.

    It opens a Lite-DINO R50 in a quarter of the time again. OpenVINO itself looks at its version,
    the processor and the options. Nothing is kept where nothing can be written.
    """
    files = [file.stat() for file in sorted(model.parent.glob(f'{model.stem}.*'))]
    key = '-'.join(f'{file.st_size:x}.{file.st_mtime_ns:x}' for file in files)
    caches = model.parent / '.openvino'
    try:
        for old in caches.glob('*'):
            if old.name != key:
                shutil.rmtree(old, ignore_errors=True)
        (caches / key).mkdir(parents=True, exist_ok=True)
    except OSError:
        return {}
    return {'CACHE_DIR': str(caches / key)} if os.access(caches / key, os.W_OK) else {}


def _open_openvino(model: Path, portable: bool, threads: int | None, precision: str) -> Session:
    # Its own choice would be bfloat16 wherever the processor is fast at it.
    kind = {'float32': 'f32', 'bfloat16': 'bf16'}[precision]
    hints = {'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_PRECISION_HINT': kind}
    if threads:
        hints['INFERENCE_NUM_THREADS'] = str(threads)
    core = openvino_core(with_operators=not portable)
    with _opening(f'OpenVINO {import_runtime("openvino").__version__}', model):
        compiled = core.compile_model(str(model), 'CPU', hints | _cache_of(model))
    own = threading.local()

    def run(*inputs: np.ndarray) -> list[np.ndarray]:
        if not hasattr(own, 'request'):
            own.request = compiled.create_infer_request()
        # On one core `infer` says nothing of what an operator refuses, in OpenVINO 2026.4.
        own.request.start_async(list(inputs), share_inputs=True)
        own.request.wait()
        # Copies, as the next run writes into the same memory.
        return [np.array(tensor.data) for tensor in own.request.output_tensors]

    return run


def _open_torch(model: Path, portable: bool, threads: int | None, *_: Any) -> Session:
    torch = import_runtime('torch')
    for operators in ('mmlite.ops', 'mmlite.export.operators'):  # they register on import
        import_module(operators)
    with _opening(f'PyTorch {torch.__version__}', model):
        program = torch.export.load(model).module()
    if threads:
        torch.set_num_threads(threads)

    @torch.inference_mode()
    def run(*inputs: np.ndarray) -> list[np.ndarray]:
        return [output.numpy() for output in program(*map(torch.from_numpy, inputs))]

    return run


def _open_executorch(model: Path, *_: Any) -> Session:
    torch = import_runtime('torch')
    runtime = import_runtime('executorch.runtime', 'executorch').Runtime.get()
    method = runtime.load_program(model).load_method('forward')
    return lambda *inputs: [
        output.numpy().copy() for output in method.execute([*map(torch.from_numpy, inputs)])
    ]


# Format of an export -> what opens its model, and the package that runs it.
OPEN = {'onnx': _open_onnx, 'web': _open_onnx, 'openvino': _open_openvino, 'torch': _open_torch}
OPEN['executorch'] = _open_executorch
RUNTIMES = {'onnx': 'onnxruntime', 'openvino': 'openvino', 'torch': 'torch'}
