"""Results as Lite DETR (arXiv 2303.07335) publishes them, on COCO val2017.

None of these was measured here. Their GFLOPs follow the paper's own rule and image size; reports
show them beside ours and label them as published.
"""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace

# Tables of the paper; published.csv holds their rows.
PRESETS = ('paper-table3', 'paper-table4')
_TEXTS = ('model', 'backbone', 'config')  # the paper's names, and what builds the model


def preset(name: str) -> list[list[SimpleNamespace]]:
    """The rows of one of :data:`PRESETS` in groups, each with its baseline first.

    A row has the columns of published.csv: metrics in percent, ``gflops`` of the whole detector,
    ``encoder_gflops``, ``params`` in millions.
    """
    groups: dict[str, list[SimpleNamespace]] = {}
    with Path(__file__).with_suffix('.csv').open(newline='') as file:
        for row in csv.DictReader(file):
            if row.pop('preset') == name:
                group = groups.setdefault(row.pop('group'), [])
                figures = {k: v if k in _TEXTS else float(v) for k, v in row.items()}
                group.append(SimpleNamespace(**figures))
    return list(groups.values())
