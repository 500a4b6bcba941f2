"""Inference runtimes: the compiled libraries with our operators (see csrc/), and loaded models.

Importing this imports neither torch nor a runtime.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

_PREFIX, _SUFFIX = {'darwin': ('lib', 'dylib'), 'win32': ('', 'dll')}.get(
    sys.platform, ('lib', 'so')
)
_HOW = {
    'onnxruntime': 'install a C++ compiler (GCC or Clang) and reinstall mmlite',
    'openvino': (
        'build it for the installed OpenVINO, as docs/deploy.md shows '
        '(cmake with OpenVINO_DIR; it needs a C++ compiler)'
    ),
}


def library(runtime: str) -> Path:
    """The library that gives a runtime the operators ``KeyAwareDeformAttn`` and ``MSDeformAttn``.

    C++ programs hand it to ``SessionOptions::RegisterCustomOpsLibrary`` or to
    ``Core::add_extension``.

    Args:
        runtime (str): ``'onnxruntime'`` or ``'openvino'``.

    Returns:
        Path: The file.

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


def import_runtime(name: str) -> Any:
    """Import a runtime.

    Raises:
        ImportError: It is missing; the message says how to install it.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(
            f'{name} cannot be imported ({error}); install it: pip install {name}'
        ) from error


def openvino_core(with_operators: bool = False) -> Any:
    """The one ``openvino.Core`` of this process.

    One for all, because several are not safe: each gives its thread another stack for signal
    handlers and, when it is freed, unmaps it and brings back the stack that it had found. Freed in
    the order in which they were made, the last brings back one that is gone, and the next signal
    that has a handler, such as the end of a child process, ends the process without a word (seen
    with OpenVINO 2026.4).

    Args:
        with_operators (bool): Load our operators, which models need that are not portable.

    Returns:
        openvino.Core: With the operators, if anyone has asked for them yet.

    Raises:
        ImportError: openvino is missing.
        FileNotFoundError: The operators were not built.
        ValueError: OpenVINO does not load the operators.
    """
    core = _core()
    if with_operators:
        operators = library('openvino')
        try:
            _extend(operators)
        except Exception as error:
            raise ValueError(
                f'OpenVINO {import_runtime("openvino").__version__} does not load the operators in '
                f'{operators} (they are built for one version of it; build them again): '
                f'{_one_line(error)}'
            ) from error
    return core


@cache
def _core() -> Any:
    return import_runtime('openvino').Core()


@cache
def _extend(operators: Path) -> None:
    _core().add_extension(str(operators))


def _one_line(error: Exception) -> str:
    return ' '.join(str(error).split())


class Session:
    """A loaded model; several threads may call it at a time.

    Args:
        model (Path): The file.
        portable (bool): It has no operators of ours.
        threads (int, optional): Threads of the runtime; by default its own choice.
        precision (str): ``'float32'`` or ``'bfloat16'``.
        profile (bool): Count the time of every node, where the runtime can.
    """

    def __init__(
        self,
        model: Path,
        portable: bool,
        threads: int | None = None,
        precision: str = 'float32',
        profile: bool = False,
    ) -> None:
        raise NotImplementedError

    def __call__(self, *inputs: np.ndarray) -> Sequence[np.ndarray]:
        """Inputs in the model's order to its outputs."""
        raise NotImplementedError


class ONNXSession(Session):
    """A model in ONNX Runtime, in float32."""

    def __init__(self, model, portable, threads=None, precision='float32', profile=False) -> None:
        onnxruntime = import_runtime('onnxruntime')
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # warnings tell of the exporter's unused constants
        if threads:
            options.intra_op_num_threads = threads
        name = f'ONNX Runtime {onnxruntime.__version__}'
        if not portable:
            operators = library('onnxruntime')
            try:
                options.register_custom_ops_library(str(operators))
            except Exception as error:  # the runtime's errors are of no common class
                raise ValueError(
                    f'{name} does not load the operators in {operators}: {_one_line(error)}'
                ) from error
        try:
            self._session = onnxruntime.InferenceSession(
                str(model),
                options,
                providers=['CPUExecutionProvider'],
                # Fuses an addition and a norm into one node, three times slower than both.
                disabled_optimizers=['SkipLayerNormFusion'],
            )
        except Exception as error:
            raise ValueError(f'{name} does not take {model}: {_one_line(error)}') from error
        self._names = [argument.name for argument in self._session.get_inputs()]

    def __call__(self, *inputs: np.ndarray) -> Sequence[np.ndarray]:
        return self._session.run(None, dict(zip(self._names, inputs)))


class OpenVINOSession(Session):
    """A model in OpenVINO."""

    def __init__(self, model, portable, threads=None, precision='float32', profile=False) -> None:
        hints = {
            'PERFORMANCE_HINT': 'LATENCY',
            # Its own choice would be bfloat16 wherever the processor is fast at it.
            'INFERENCE_PRECISION_HINT': {'float32': 'f32', 'bfloat16': 'bf16'}[precision],
        }
        if threads:
            hints['INFERENCE_NUM_THREADS'] = str(threads)
        if profile:
            hints['PERF_COUNT'] = 'YES'
        core = openvino_core(with_operators=not portable)
        try:
            self._compiled = core.compile_model(str(model), 'CPU', hints)
        except Exception as error:
            version = import_runtime('openvino').__version__
            raise ValueError(
                f'OpenVINO {version} does not take {model}: {_one_line(error)}'
            ) from error
        self._of_thread = threading.local()

    @property
    def request(self) -> Any:
        """The calling thread's own ``InferRequest``, which knows of its last run."""
        if not hasattr(self._of_thread, 'request'):
            self._of_thread.request = self._compiled.create_infer_request()
        return self._of_thread.request

    def __call__(self, *inputs: np.ndarray) -> Sequence[np.ndarray]:
        request = self.request
        request.infer(list(inputs), share_inputs=True)
        # The next run writes into the same memory.
        return [np.array(tensor.data) for tensor in request.output_tensors]


class TorchSession(Session):
    """A program of torch.export."""

    def __init__(self, model, portable, threads=None, precision='float32', profile=False) -> None:
        self._torch = import_runtime('torch')
        import_module('..ops', __package__)  # the operators register on import
        import_module('.nms', __package__)  # so does this one, which is in portable models, too
        self._program = self._torch.export.load(model).module()
        if threads:
            self._torch.set_num_threads(threads)

    def __call__(self, *inputs: np.ndarray) -> Sequence[np.ndarray]:
        with self._torch.inference_mode():
            outputs = self._program(*map(self._torch.from_numpy, inputs))
        return [output.numpy() for output in outputs]


# Format of an export -> what runs it, and the package that this needs.
SESSIONS = {'onnx': ONNXSession, 'openvino': OpenVINOSession, 'torch': TorchSession}
RUNTIMES = {'onnx': 'onnxruntime', 'openvino': 'openvino', 'torch': 'torch'}
