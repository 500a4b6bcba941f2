"""Results as Lite DETR (arXiv 2303.07335) publishes them, on COCO val2017.

None of these was measured here. Their GFLOPs follow the paper's own rule and image size; reports
show them beside ours and label them as published.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

# Tables of the paper; published.csv holds their rows.
PRESETS = ('paper-table3', 'paper-table4')


@dataclass(frozen=True)
class Published:
    """One row of a published table."""

    model: str  # the paper's name for it
    backbone: str  # R50 or Swin-T
    config: str  # what builds this model
    ap: float  # COCO's metrics, in percent
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    gflops: float  # of the whole detector
    encoder_gflops: float
    params: float  # in millions


def preset(name: str) -> list[list[Published]]:
    """The rows of one of :data:`PRESETS` in groups, each with its baseline first."""
    groups: dict[str, list[Published]] = {}
    with Path(__file__).with_suffix('.csv').open(newline='') as file:
        for row in csv.DictReader(file):
            if row.pop('preset') == name:
                group = groups.setdefault(row.pop('group'), [])
                texts = {field: row.pop(field) for field in ('model', 'backbone', 'config')}
                group.append(Published(**texts, **{k: float(v) for k, v in row.items()}))
    return list(groups.values())
