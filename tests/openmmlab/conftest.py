"""What tests of this room share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from mmdet_tools import run_python


@pytest.fixture
def fresh():
    """Runs code in a fresh interpreter that looks in ``path`` first; the lines it prints."""

    def run(code: str, *arguments: str | Path, path: str | Path = '') -> list[str]:
        path = os.pathsep.join([str(path), os.environ.get('PYTHONPATH', '')])
        # In a folder where no other mmlite than the installed one is found.
        folder = Path(__file__).parent
        return run_python('-c', code, *arguments, cwd=folder, PYTHONPATH=path).splitlines()

    return run
