import json

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from mmlite.datasets import CLASSES, generate_shapes, shapes


def contents(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob('*.*')}


def annotations(root, name):
    return json.loads((root / f'annotations/{name}.json').read_text())


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp('shapes')
    done = []
    generate_shapes(root, {'train': 60, 'val': 20}, seed=3, progress=lambda: done.append(1))
    assert len(done) == 80
    return root


def test_same_seed_same_files(drawn, tmp_path):
    for seed in (3, 4):
        generate_shapes(tmp_path / str(seed), {'train': 60, 'val': 20}, seed=seed)
    assert contents(tmp_path / '3') == contents(drawn) != contents(tmp_path / '4')
    images = [content for path, content in contents(drawn).items() if path[0] in 'tv']
    assert len(set(images)) == 80
    with pytest.raises(ValueError, match='at least 128'):
        generate_shapes(tmp_path / 'small', {'train': 1}, image_size=100)
    assert not (tmp_path / 'small').exists()


def test_all_classes_and_sizes_occur(drawn):
    content = annotations(drawn, 'instances_train')
    assert [category['name'] for category in content['categories']] == list(CLASSES)
    assert {a['category_id'] for a in content['annotations']} == {1, 2, 3, 4}
    areas = np.array([a['area'] for a in content['annotations']])
    small, medium, large = np.histogram(areas, (0, 32**2, 96**2, np.inf))[0]  # COCO's limits
    assert small > 10 and medium > 10 and large > 3
    for image in content['images']:
        pixels = cv2.imread(str(drawn / 'train' / image['file_name']))
        assert pixels.shape[:2] == (image['height'], image['width']) == (128, 128)


def test_three_shapes_are_apart_and_no_two_alike():
    counts = set()
    for index in range(100):
        _, objects = shapes.THREE_SHAPES.draw(np.random.default_rng(index), 128)
        labels = [label for label, *_ in objects]
        assert len(set(labels)) == len(labels) and set(labels) <= {0, 1, 2}
        corners = [
            np.array([x, y, x + width, y + height]) for _, (x, y, width, height), *_ in objects
        ]
        for number, box in enumerate(corners):
            around = box + np.array([-8, -8, 8, 8])  # ten less what rounding up takes
            assert all(shapes.overlap(around, other) == 0 for other in corners[:number])
        counts.add(len(objects))
    assert {1, 2, 3} <= counts


def test_semantic_maps_are_the_masks(drawn):
    content = annotations(drawn, 'instances_val')
    for image in content['images']:
        found = cv2.imread(str(drawn / 'semantic/val' / image['file_name']), cv2.IMREAD_UNCHANGED)
        assert found.dtype == np.uint8 and found.shape == (128, 128)
        expected = np.zeros_like(found)
        for each in content['annotations']:
            if each['image_id'] == image['id']:
                encoded = coco_mask.frPyObjects(each['segmentation'], 128, 128)
                expected[coco_mask.decode(encoded).any(2)] = each['category_id']
        # The edges of a filled polygon are its own in OpenCV.
        assert (found != expected).mean() < 0.05 and set(np.unique(found)) == set(
            np.unique(expected)
        )


def test_boxes_fit_the_drawing(monkeypatch):
    """On a plain background, the pixels that differ from it are those in the boxes."""
    plain = np.full((160, 160, 3), 130, np.uint8)
    monkeypatch.setattr(shapes, 'background', lambda rng, size: plain.copy())
    for seed in range(20):
        pixels, objects = shapes.draw_image(np.random.default_rng(seed), 160)
        painted = (np.abs(pixels.astype(int) - 130) > 40).any(axis=2)
        covered = np.zeros_like(painted)
        masks = np.zeros_like(painted)
        for _, (x, y, width, height), area, polygon in objects:
            mask = coco_mask.decode(coco_mask.frPyObjects([polygon], 160, 160))[..., 0]
            masks |= mask.astype(bool)
            assert 0 <= x < x + width <= 160 and 0 <= y < y + height <= 160
            assert area == width * height
            # the soft edge of the drawing may reach one pixel further
            covered[max(y - 1, 0) : y + height + 1, max(x - 1, 0) : x + width + 1] = True
            inside = painted[y : y + height, x : x + width]
            # touched on every side
            for edge in (inside[:3], inside[-3:], inside[:, :3], inside[:, -3:]):
                assert edge.any()
        assert not (painted & ~covered).any()
        # holes of rings and all; the soft edges count for much where shapes are small
        assert (painted & masks).sum() > 0.75 * (painted | masks).sum()
