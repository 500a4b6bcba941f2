"""Checks a config's data sets, and whether they fit its model, for ``mmlite check``.

Findings are image files, ids or whole sentences, by data set and kind: a ``defaultdict(list)``. The
data set is ``'train'``, ``'val'``, ``'test'`` or several of them, or ``'model'``; the kind is an
entry of ``PROBLEMS`` or ``REMARKS``.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from multiprocessing.pool import ThreadPool
from typing import Any

import numpy as np
import torch
from mmdet.datasets import CocoDataset, CocoPanopticDataset
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

from ..openmmlab.families import reads_text, type_name, unwrapped_datasets
from .coco import check_classes, listed, read_annotations
from .images import image_problems, quiet_decoders

Findings = defaultdict[tuple[str, str], list[str]]

# Where COCO's small, medium and large objects begin, and the last end: areas in pixels.
_SIZE_EDGES = (0, 32**2, 96**2, math.inf)
COUNTS = ('name', 'images', 'objects', 'small', 'medium', 'large')

# Kind of finding -> what it leads to. Problems end training, lose objects or make the numbers
# wrong; remarks may be meant.
PROBLEMS = {
    'data set': 'it cannot be read at all',
    'evaluator': 'the first validation would fail, or count other objects than those shown',
    'classes': 'labels would get wrong names, or nothing would be learned',
    'model': 'the detector cannot be built or does not fit the data',
    'missing image': 'the file does not exist; training ends there',
    'unreadable image': 'the file is no image that OpenCV reads; training ends there',
    'truncated image': 'the file ends too soon: training ends there, or learns from grey pixels',
    'image of another size': "width and height in the file are not the image's: boxes may be off",
    'image turned by EXIF': 'training turns or mirrors it, maybe not its boxes; save it upright',
    'duplicate image id': 'the later image replaces the earlier one',
    'duplicate object id': 'MMDetection refuses the file',
    'duplicate category id': 'the later category replaces the earlier one',
    'object of no image': 'its image_id is not listed; it is left out',
    'object of no category': 'its category_id is not listed; it is left out',
    'object without a key': 'MMDetection or the evaluation fails on it',
    'broken box': 'its bbox is not four numbers [x, y, width, height], or its area not one',
    'box without area': 'MMDetection leaves it out',
    'box outside the image': 'MMDetection leaves it out',
    'box partly outside': 'it reaches more than a pixel beyond the image',
    'object without a mask': "the config loads masks: training ends with KeyError 'mask'",
    'broken mask': 'no polygon of three points or more: left out; other faults end training',
    'more objects than queries': 'some cannot be found; raise num_queries',
}
REMARKS = {
    'image without objects': 'learned from as background, or left out by filter_empty_gt',
    'image listed twice': 'it counts twice',
    'image in two splits': 'the evaluation is of images that were trained on',
    'categories': 'trained without them, as the config says',
    'class without objects': 'nothing of it is learned, or evaluated',
    'not checked': "not a data set in COCO's format of instances: nothing of it was read",
}


class DataSet:
    """What a data set of instances holds, and what the config does with it.

    ``uses`` are the places where the config names it: split, data set, pipeline, evaluators.
    """

    labels: list[str]  # their names, in the order that MMDetection numbers them
    classes: list[dict]  # for each label what COUNTS names
    images: dict[Any, dict]  # the file's entries by id, with their path, objects and size

    def __init__(self, uses: list[tuple[str, CocoDataset, list, list]]) -> None:
        splits, datasets, pipelines, evaluators = zip(*uses)
        self.name = ', '.join(dict.fromkeys(splits))
        self.evaluated = set(splits) != {'train'}
        self.dataset = datasets[0]
        self.config_classes = list(self.dataset.metainfo['classes'])
        self.pipeline = pipelines[-1]  # of the evaluation, which is without chance
        self.evaluators = list(chain(*evaluators))
        self.has_masks = any(step.get('with_mask') for step in chain(*pipelines)) or any(
            'segm' in np.atleast_1d(e.get('metric') or 'bbox') for e in self.evaluators
        )

    def as_json(self) -> dict:
        """What it holds: objects of the config's classes, without crowds, also most in an image."""
        objects = [image['objects'] for image in self.images.values()]
        numbers = {'images': len(objects), 'objects': sum(objects), 'most_objects': max(objects)}
        file = self.dataset.ann_file
        return {'name': self.name, **numbers, 'annotation_file': file, 'classes': self.classes}

    def read(self) -> Iterator[tuple[str, str]]:
        """Read the annotation file, and yield the kind and place of what is wrong with it."""
        file = self.dataset.ann_file
        coco = read_annotations(file, self.dataset.backend_args)
        content = {'annotations': (), **coco.dataset}
        self.images = coco.imgs
        for image in self.images.values():
            path = os.path.join(self.dataset.data_prefix['img'], image['file_name'])
            image.update(path=path, objects=0, size=(image['width'], image['height']))
        names = {number: category['name'] for number, category in coco.cats.items()}
        self.labels = [name for name in names.values() if name in self.config_classes]
        for part, kind, describe in (
            ('images', 'image', '{id}: {file_name}'.format_map),
            ('annotations', 'object', self._place),
            ('categories', 'category', '{id}: {name}'.format_map),
        ):
            ids = Counter(entry['id'] for entry in content[part])
            for entry in content[part]:
                if ids[entry['id']] > 1:
                    yield f'duplicate {kind} id', describe(entry)
        for path, count in Counter(image['path'] for image in self.images.values()).items():
            if count > 1:
                yield 'image listed twice', path

        found: dict[str, list[tuple]] = {name: [] for name in self.labels}  # image ids and areas
        for entry in content['annotations']:
            image_id, name = entry['image_id'], names.get(entry['category_id'])
            for kind, what in self._object_problems(entry, name):
                yield kind, f'{self._place(entry)}{what}'
            if image_id in self.images and name in found and not entry.get('iscrowd'):
                self.images[image_id]['objects'] += 1
                area = entry.get('area')
                found[name].append((image_id, area if _is_number(area) else 0))
        self.classes = []
        for name, objects in found.items():
            sizes = np.histogram([area for _, area in objects], _SIZE_EDGES)[0].tolist()
            numbers = (len(dict(objects)), len(objects), *sizes)  # first, images
            self.classes.append(dict(zip(COUNTS, (name, *numbers))))
            if not objects:
                yield 'class without objects', name
        for number in self.images.keys() - {entry['image_id'] for entry in content['annotations']}:
            yield 'image without objects', self.images[number]['path']
        ignored = getattr(self.dataset, 'ignored_categories', ())
        try:
            yield from check_classes(coco, file, self.config_classes, ignored, self.evaluated)
        except ValueError as error:
            yield 'classes', str(error)

    def _place(self, entry: dict) -> str:
        number = entry['image_id']
        image = self.images.get(number, {'path': f'no image, image_id {number}'})
        return f'object {entry["id"]} in {image["path"]}'

    def _object_problems(self, entry: dict, category: str | None) -> Iterator[tuple[str, str]]:
        """The kind of everything that is wrong with an object, and what to say of it."""
        if entry['image_id'] not in self.images:
            yield 'object of no image', ''
            return
        if category is None:
            yield 'object of no category', f', category_id {entry["category_id"]}'
        # pycocotools' evaluation reads iscrowd, MMDetection's data set does without.
        for key in ('area', 'bbox', 'iscrowd') if self.evaluated else ('area', 'bbox'):
            if key not in entry:
                yield 'object without a key', f' lacks {key!r}'
        if 'bbox' not in entry:
            return
        box = entry['bbox']
        numbers = box if isinstance(box, list) and len(box) == 4 else [None]
        if not all(map(_is_number, [*numbers, entry.get('area', 1)])):
            yield 'broken box', f': {box}, area {entry.get("area", "missing")}'
            return
        x, y, w, h = box
        width, height = self.images[entry['image_id']]['size']
        across, down = min(x + w, width) - max(x, 0), min(y + h, height) - max(y, 0)
        # The first that holds is said; MMDetection leaves the object out for each of the first two.
        checks = {
            'box without area': min(w, h) < 1 or entry.get('area', 1) <= 0,
            'box outside the image': min(across, down) <= 0,
            'box partly outside': max(w - across, h - down) > 1,
        }
        wrong = next((kind for kind, holds in checks.items() if holds), None)
        if wrong:
            yield wrong, f': {box}, image {width}x{height}'
        if self.has_masks and wrong in (None, 'box partly outside') and category in self.labels:
            mask = entry.get('segmentation')
            if not mask:
                yield 'object without a mask', ''
            elif isinstance(mask, dict):  # run lengths
                if 'counts' not in mask or mask.get('size') != [height, width]:
                    told = f'of the keys {", ".join(mask)}, size {mask.get("size")}'
                    yield 'broken mask', f': {told}, image {width}x{height}'
            elif not _has_polygons(mask):
                yield 'broken mask', f': {mask}'

    def image_problems(self, image: dict) -> list[tuple[str, str]]:
        """Decode an image as the config's pipeline does: kinds and places of what is wrong."""
        load = next((s for s in self.pipeline if type_name(s['type']).startswith('LoadImage')), {})
        color, backend = load.get('color_type', 'color'), load.get('imdecode_backend') or 'cv2'
        turns = color in ('color', 'grayscale') and backend in ('cv2', 'pillow')
        problems = image_problems(image, self.dataset.backend_args, turns)
        return [(kind, f'{image["path"]}{what}') for kind, what in problems]

    def check_evaluators(self) -> None:
        """Raises ValueError where an evaluator reads another file than this data set's."""
        own = self.dataset.ann_file
        for path in {e.get('ann_file') or own for e in self.evaluators}:
            if os.path.abspath(path) != os.path.abspath(own):
                coco = read_annotations(path)
                names = [coco.cats[number]['name'] for number in coco.get_cat_ids()]
                labels = [name for name in names if name in self.config_classes]
                if self.images.keys() - coco.imgs.keys() or labels != self.labels:
                    wrong = f'its ann_file {path} is not the one of the data set, {own}, and lacks'
                    raise ValueError(
                        f'{wrong} images or orders categories otherwise: set both alike'
                    )


def check_data(
    config: Config, findings: Findings, workers: int, progress: Callable[[str, int], Callable]
) -> list[DataSet]:
    """Read every annotation and decode every image of the data sets that a config names.

    ``workers`` threads decode; what ``progress`` returns is called after each image. Data sets that
    cannot be read are not returned. A config without data is a ValueError.
    """
    init_default_scope(config.get('default_scope', 'mmdet'))
    checked = []
    for data in _data_sets(config, findings):
        with _noting(findings[data.name, 'data set']):
            for kind, place in data.read():
                findings[data.name, kind].append(place)
            checked.append(data)
    images = [(data, image) for data in checked for image in data.images.values()]
    step = progress('Decoding images', len(images))
    most = config.model.get('num_queries') or math.inf
    splits = defaultdict(dict)  # image -> its splits, in order
    with quiet_decoders(), ThreadPool(workers) as pool:
        decoded = pool.imap(lambda pair: pair[0].image_problems(pair[1]), images)
        for (data, image), problems in zip(images, decoded):
            splits[os.path.abspath(image['path'])][data.name] = None
            for kind, place in problems:
                findings[data.name, kind].append(place)
            if image['objects'] > most:
                what = f'{image["path"]} ({image["objects"]} objects, {most} queries)'
                findings[data.name, 'more objects than queries'].append(what)
            step()
    for path, names in splits.items():
        if len(names) > 1:
            findings[' and '.join(names), 'image in two splits'].append(path)
    for one, two in zip(checked, checked[1:]):
        if any(first != second for first, second in zip(one.labels, two.labels)):
            findings[f'{one.name} and {two.name}', 'classes'].append(
                f'labels are {listed(one.labels)} in {one.name} and {listed(two.labels)} in '
                f'{two.name}: list the categories of both files in the same order'
            )
    for data in checked:
        with _noting(findings[data.name, 'evaluator']):
            data.check_evaluators()
    return checked


def check_model(
    model: nn.Module, config: Config, data_sets: Sequence[DataSet], findings: Findings
) -> None:
    """Compare a detector, built from ``config``, with the data that :func:`check_data` read."""
    add = findings['model', 'model'].append
    head = getattr(model, 'bbox_head', None)
    num_classes = getattr(head, 'num_classes', None)
    if head is not None and reads_text(model):
        number = head.max_text_len
        expected = [(number, f'a detector that reads a text counts tokens: set it to {number}')]
    else:
        sizes = [(len(data.config_classes), data.name) for data in data_sets]
        expected = [(n, f'metainfo.classes of {name} has {n}: set both alike') for n, name in sizes]
    for number, what in expected:
        if num_classes not in (None, number):
            add(f'bbox_head.num_classes is {num_classes}, but {what}')
    num_queries = getattr(model, 'num_queries', None)
    asked = (getattr(model, 'test_cfg', None) or {}).get('max_per_img', 0)
    if num_queries and num_classes and asked > num_queries * num_classes:
        given = f'{num_queries} queries of {num_classes} classes give'
        add(f'test_cfg.max_per_img={asked} is more than {given}; lower it or raise num_queries')
    start = config.get('load_from')
    if start and '://' not in start and not os.path.isfile(start):
        add(f'load_from={start} does not exist')
    levels = getattr(model, 'num_feature_levels', None)
    if levels is None:
        return
    try:
        with torch.no_grad():
            maps = model.extract_feat(torch.zeros(1, 3, 256, 256))
    except Exception as error:  # whatever a backbone and a neck that do not fit raise
        add(f'the backbone and the neck do not run: {error}')
        return
    if len(maps) != levels:
        add(
            f'num_feature_levels is {levels}, but the neck gives {len(maps)} maps; set '
            'neck.num_outs, num_feature_levels and num_levels of the attention alike'
        )


def _data_sets(config: Config, findings: Findings) -> list[DataSet]:
    """The data sets of a config, unwrapped; each once."""
    found: dict[tuple, list[tuple]] = defaultdict(list)
    loaders = {split: config.get(f'{split}_dataloader') for split in ('train', 'val', 'test')}
    if not any(loaders.values()):
        raise ValueError(
            f'the config names no data set: {", ".join(loaders)}_dataloader is missing'
        )
    for split, loader in loaders.items():
        evaluators = config.get(f'{split}_evaluator') or []
        evaluators = evaluators if isinstance(evaluators, (list, tuple)) else [evaluators]
        for cfg in unwrapped_datasets(loader.dataset) if loader else ():
            with _noting(findings[split, 'data set']):
                kind = DATASETS.get(cfg['type']) if isinstance(cfg['type'], str) else cfg['type']
                if not issubclass(kind, CocoDataset) or issubclass(kind, CocoPanopticDataset):
                    findings[split, 'not checked'].append(kind.__name__)
                    continue
                # Read by us, not by its constructor, which only makes the paths whole.
                dataset = DATASETS.build({**cfg, 'pipeline': [], 'lazy_init': True})
                key = (dataset.ann_file, dataset.data_prefix['img'], *dataset.metainfo['classes'])
                found[key].append((split, dataset, cfg.get('pipeline') or [], evaluators))
    return [DataSet(uses) for uses in found.values()]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _has_polygons(mask: Any) -> bool:
    """Whether a mask is polygons, one of them at least of three points or more."""
    if not isinstance(mask, list) or not all(isinstance(polygon, list) for polygon in mask):
        return False
    are_numbers = all(_is_number(x) for polygon in mask for x in polygon)
    return are_numbers and any(len(p) >= 6 and len(p) % 2 == 0 for p in mask)


@contextlib.contextmanager
def _noting(places: list[str]) -> Iterator[None]:
    """What the code inside raises becomes a finding."""
    try:
        yield
    except Exception as error:  # a registry and a file that anybody wrote fail in many ways
        places.append(' '.join(str(error).split()) or type(error).__name__)
