"""Scripts that the documentation names, and nothing else runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

TOOLS = Path(__file__).parents[1] / 'tools'


def test_company_measures_an_operator_and_a_step():
    # The process that it starts for each setting; all of them take minutes.
    printed = subprocess.check_output(
        [sys.executable, TOOLS / 'company.py', '--measure', '--seconds', '0'],
        input='go\n',
        text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )
    ready, measured = map(json.loads, printed.splitlines()[-2:])
    assert ready == {}
    assert measured.keys() == {'call', 'step'}
    assert all(milliseconds > 0 for milliseconds in measured.values())
