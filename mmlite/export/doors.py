"""The compiled libraries that give inference runtimes our operators; see csrc/.

Neither torch nor a runtime is imported here.
"""

from __future__ import annotations

import sys
from pathlib import Path

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
