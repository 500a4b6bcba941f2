"""MMDetection's own train.py and test.py, as mim runs them, but many runs in one process.

Importing the stack takes longer than an epoch of a small detector; tests/test_mim.py goes the whole
way of a user.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import mmdet

TOOLS = Path(mmdet.__path__[0]) / '.mim/tools'
RUNS = """
import json, runpy, sys
for sys.argv in json.loads(sys.argv[1]):
    runpy.run_path(sys.argv[0], run_name='__main__')
"""


def run_python(*arguments: str | Path, cwd: Path, **environment: str) -> str:
    """What a fresh interpreter on one thread prints; it must end well."""
    process = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, 'OMP_NUM_THREADS': '1', **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.returncode == 0, process.stdout[-3000:]
    return process.stdout


def fresh(code: str, *arguments: str | Path, path: str | Path = '') -> list[str]:
    """The lines that code prints in an interpreter that looks in ``path`` first."""
    path = os.pathsep.join([str(path), os.environ.get('PYTHONPATH', '')])
    # In a folder where no other mmlite than the installed one is found.
    folder = Path(__file__).parent
    return run_python('-c', code, *arguments, cwd=folder, PYTHONPATH=path).splitlines()


def run_tools(runs: Sequence[Sequence[str | Path]], cwd: Path, **environment: str) -> str:
    """What MMDetection's scripts print, run one after the other in a process.

    Each run is ``'train'`` or ``'test'`` and the script's arguments.
    """
    lines = [[str(TOOLS / f'{tool}.py'), *map(str, arguments)] for tool, *arguments in runs]
    return run_python('-c', RUNS, json.dumps(lines), cwd=cwd, **environment)
