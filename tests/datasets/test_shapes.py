from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from mmlite.datasets import CLASSES, generate_panoptic, generate_shapes

# COCO's limits of small and large objects, in pixels of area.
SMALL, LARGE = 32**2, 96**2


def contents(root):
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob('*'))
        if path.is_file()
    }


def annotations(root, split):
    return json.loads((root / 'annotations' / f'instances_{split}.json').read_text())


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp('shapes')
    generate_shapes(root, {'train': 60, 'val': 20}, seed=3)
    return root


def test_same_seed_same_files(shapes, tmp_path):
    for seed in (3, 4):
        generate_shapes(tmp_path / str(seed), {'train': 60, 'val': 20}, seed=seed)
    assert contents(tmp_path / '3') == contents(shapes) != contents(tmp_path / '4')


def test_all_classes_and_sizes_occur(shapes):
    content = annotations(shapes, 'train')
    assert [category['name'] for category in content['categories']] == list(CLASSES)
    assert {a['category_id'] for a in content['annotations']} == {1, 2, 3, 4}
    areas = np.array([a['area'] for a in content['annotations']])
    assert (areas < SMALL).sum() > 10
    assert ((areas > SMALL) & (areas < LARGE)).sum() > 10
    assert (areas > LARGE).sum() > 3


def test_boxes_fit_the_drawing(tmp_path, monkeypatch):
    """On a plain background, the pixels that differ from it are those in the boxes."""
    from mmlite.datasets import shapes

    monkeypatch.setattr(
        shapes, 'background', lambda rng, size: np.full((size, size, 3), 130, np.uint8)
    )
    for seed in range(20):
        pixels, drawn = shapes.draw_image(np.random.default_rng(seed), 160)
        painted = (np.abs(pixels.astype(int) - 130) > 40).any(axis=2)
        covered = np.zeros_like(painted)
        masks = np.zeros_like(painted)
        for _, (x, y, width, height), area, polygon in drawn:
            mask = coco_mask.decode(coco_mask.frPyObjects([polygon], 160, 160))[..., 0]
            masks |= mask.astype(bool)
            assert 0 <= x < x + width <= 160
            assert 0 <= y < y + height <= 160
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


def test_images_are_of_the_listed_size_and_differ(tmp_path):
    done = []
    generate_shapes(tmp_path, {'train': 2, 'val': 1}, progress=lambda: done.append(1))
    assert len(done) == 3
    images = [path for path in contents(tmp_path) if path.endswith('.png')]
    pixels = [cv2.imread(str(tmp_path / path)) for path in images]
    assert {image.shape for image in pixels} == {(128, 128, 3)}
    assert len({image.tobytes() for image in pixels}) == 3
    for image in annotations(tmp_path, 'train')['images']:
        assert (image['width'], image['height']) == (128, 128)


def test_refuses_images_that_are_too_small(tmp_path):
    with pytest.raises(ValueError, match='at least 128'):
        generate_shapes(tmp_path, {'train': 1}, image_size=100)
    assert not any(tmp_path.iterdir())


def test_panoptic_segments_are_the_masks(shapes):
    generate_panoptic(shapes, 'val')
    content = json.loads((shapes / 'annotations/panoptic_val.json').read_text())
    assert [c['name'] for c in content['categories'] if not c['isthing']] == ['background']
    own = annotations(shapes, 'val')
    for panoptic in content['annotations']:
        pixels = cv2.imread(str(shapes / 'annotations/panoptic_val' / panoptic['file_name']))
        ids = pixels[..., ::-1].astype(int) @ [1, 256, 256**2]
        segments = panoptic['segments_info']
        assert sorted(s['id'] for s in segments) == np.unique(ids).tolist()
        for segment in segments:
            mask = ids == segment['id']
            assert mask.sum() == segment['area']
            x, y, width, height = segment['bbox']
            assert mask[y : y + height, x : x + width].sum() == segment['area']
        objects = [a for a in own['annotations'] if a['image_id'] == panoptic['image_id']]
        assert [s['category_id'] for s in segments[1:]] == [o['category_id'] for o in objects]
        runs = [r for o in objects for r in coco_mask.frPyObjects(o['segmentation'], *ids.shape)]
        union = coco_mask.merge(runs)
        differ = (coco_mask.decode(union) != (ids > 1)).mean()
        assert differ < 0.02  # pixels at the rim
