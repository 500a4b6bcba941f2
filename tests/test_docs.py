"""The Python in the documentation runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / 'docs'
# Pages whose blocks can run anywhere, each going on where the one before it ended.
PAGES = ['core.md']


@pytest.mark.parametrize('page', PAGES)
def test_blocks_run(page):
    blocks = re.findall(r'```python\n(.*?)```', (DOCS / page).read_text(), re.DOTALL)
    assert blocks
    namespace: dict = {}
    for block in blocks:
        exec(block, namespace)
