from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.study import details as module
from mmlite.datasets import STYLES, generate_shapes


def test_data_set(tmp_path):
    style = STYLES['details']
    for folder in ('a', 'b'):
        generate_shapes(tmp_path / folder, {'train': 40}, image_size=96, seed=1, style=style)
    first, second = (
        (tmp_path / folder / 'annotations/instances_train.json').read_text() for folder in 'ab'
    )
    assert first == second
    content = json.loads(first)
    assert [category['name'] for category in content['categories']] == list(style.classes)
    assert {a['category_id'] for a in content['annotations']} == {1, 2, 3}
    small = np.mean([a['area'] < 32**2 for a in content['annotations']])
    assert 0.8 < small < 1
    with pytest.raises(ValueError, match='at least 64'):
        generate_shapes(tmp_path, {'train': 1}, image_size=48, style=style)


def test_boxes_fit_the_drawing_and_the_texture_is_the_class(monkeypatch):
    monkeypatch.setattr(
        module, 'background', lambda rng, size: np.full((size, size, 3), 128, np.uint8)
    )
    for seed in range(30):
        pixels, objects = module.draw_details(np.random.default_rng(seed), 96)
        painted = (np.abs(pixels.astype(int) - 128) > 25).any(axis=2)
        covered = np.zeros_like(painted)
        for label, (x, y, width, height), area, polygon in objects:
            assert 0 <= x < x + width <= 96
            assert 0 <= y < y + height <= 96
            assert area == width * height
            assert min(polygon[::2]) >= x
            assert max(polygon[::2]) <= x + width
            covered[y : y + height, x : x + width] = True
            inside = painted[y : y + height, x : x + width]
            for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
                assert edge.any()
            if 2 * len(polygon) == 16 and min(width, height) >= 10:  # a rectangle
                gray = pixels[y : y + height, x : x + width].mean(2) > 128
                changes = [(np.diff(gray.astype(int), axis=axis) != 0).mean() for axis in (0, 1)]
                expected = {0: 1, 1: 2, 2: 0}[label]  # directions in which it alternates
                assert sum(change > 0.35 for change in changes) == expected
        assert not (painted & ~covered).any()
