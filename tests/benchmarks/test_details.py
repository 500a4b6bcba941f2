import numpy as np

from benchmarks.study import details


def test_boxes_fit_the_drawing_and_the_texture_is_the_class(monkeypatch):
    plain = np.full((96, 96, 3), 128, np.uint8)
    monkeypatch.setattr(details, 'background', lambda rng, size: plain.copy())
    areas = []
    for seed in range(30):
        pixels, objects = details.draw_details(np.random.default_rng(seed), 96)
        painted = (np.abs(pixels.astype(int) - 128) > 25).any(axis=2)
        covered = np.zeros_like(painted)
        for label, (x, y, width, height), area, polygon in objects:
            areas.append(area)
            assert area == width * height
            assert x <= min(polygon[::2]) < max(polygon[::2]) <= x + width
            inside = painted[y : y + height, x : x + width]
            covered[y : y + height, x : x + width] = True
            assert inside.shape == (height, width)
            for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
                assert edge.any()
            if 2 * len(polygon) == 16 and min(width, height) >= 10:  # a rectangle
                gray = pixels[y : y + height, x : x + width].mean(2) > 128
                changes = [(np.diff(gray.astype(int), axis=axis) != 0).mean() for axis in (0, 1)]
                expected = {0: 1, 1: 2, 2: 0}[label]  # directions in which it alternates
                assert sum(change > 0.35 for change in changes) == expected
        assert not (painted & ~covered).any()
    assert 0.8 < np.mean(np.array(areas) < 32**2) < 1  # most are small by COCO's measure
