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
    """One row of a published table.

    Attributes:
        model (str): The paper's name for it.
        backbone (str): ``R50`` or ``Swin-T``.
        config (str): The config that builds this model.
        ap, ap50, ap75, ap_small, ap_medium, ap_large (float): COCO's metrics.
        gflops (float): Of the whole detector.
        encoder_gflops (float): Of its encoder.
        params (float): In millions.
    """

    model: str
    backbone: str
    config: str
    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    gflops: float
    encoder_gflops: float
    params: float


# Other work that the paper compares with: name -> GFLOPs of the encoder, AP.
OTHER_WORK = {
    'Sparse DETR, rho 0.1': (24, 45.3),
    'Sparse DETR, rho 0.2': (32, 45.6),
    'Sparse DETR, rho 0.3': (40, 46.0),
    'Sparse DETR, rho 0.5': (54, 46.3),
    'Efficient DETR': (79, 44.2),
}


def preset(name: str) -> list[list[Published]]:
    """The rows of a published table.

    Args:
        name (str): One of :data:`PRESETS`.

    Returns:
        list[list[Published]]: Groups; the first row of each is the baseline of the others.
    """
    groups: dict[str, list[Published]] = {}
    with Path(__file__).with_suffix('.csv').open(newline='') as file:
        for row in csv.DictReader(file):
            if row.pop('preset') == name:
                group = groups.setdefault(row.pop('group'), [])
                texts = {field: row.pop(field) for field in ('model', 'backbone', 'config')}
                group.append(Published(**texts, **{k: float(v) for k, v in row.items()}))
    return list(groups.values())
