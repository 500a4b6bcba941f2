"""Compare the lines of Python of every room with its budget in CONTRIBUTING.md.

    python tools/budget.py

Ends with 1 where a room has outgrown its budget.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROW = re.compile(r'^\| `(\w+(?:/\w+)?)` \| ([\d,]+) \|$', re.MULTILINE)


def count_lines(folder: Path) -> int:
    """Lines of all Python files in a folder."""
    return sum(len(path.read_bytes().splitlines()) for path in folder.rglob('*.py'))


def main(root: Path = ROOT) -> int:
    """Print the table and give the number of rooms that are too large."""
    outgrown = 0
    for room, number in ROW.findall((root / 'CONTRIBUTING.md').read_text()):
        lines, budget = count_lines(root / room), int(number.replace(',', ''))
        over = f'  {lines - budget:,} too many' if lines > budget else ''
        outgrown += lines > budget
        print(f'{room:20} {lines:7,} / {budget:6,}{over}')
    return outgrown


if __name__ == '__main__':
    sys.exit(main() > 0)
