"""The compiled libraries that give inference runtimes our operators; see csrc/.

Importing this imports neither torch nor a runtime.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

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


def openvino_core(operators: Path | None = None) -> Any:
    """The one ``openvino.Core`` of this process.

    One for all, because several are not safe: each gives its thread another stack for signal
    handlers and, when it is freed, unmaps it and brings back the stack that it had found. Freed in
    the order in which they were made, the last brings back one that is gone, and the next signal
    that has a handler, such as the end of a child process, ends the process without a word (seen
    with OpenVINO 2026.4).

    Args:
        operators (Path, optional): What :func:`library` returns, for models that are not portable.

    Returns:
        openvino.Core: With the operators, if they were asked for.

    Raises:
        ImportError: openvino is missing.
        RuntimeError: OpenVINO does not load the operators.
    """
    if operators is not None:
        _extend(operators)
    return _core()


@cache
def _core() -> Any:
    import openvino

    return openvino.Core()


@cache
def _extend(operators: Path) -> None:
    _core().add_extension(str(operators))
