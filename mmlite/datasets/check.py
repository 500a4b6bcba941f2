"""Checks a config's data sets, and whether they fit its model.

``mmlite check`` shows it; :func:`check_data` and :func:`check_model` find it.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from mmcv.transforms import Compose
from mmdet.datasets import CocoDataset, CocoPanopticDataset
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.fileio import get_local_path
from mmengine.registry import init_default_scope
from torch import nn

from .coco import check_categories, read_annotations
from .images import DecodedImage, ImageFile, decode_images

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
    'image turned by EXIF': 'training sees it turned or mirrored, and its boxes may be for the '
    'other way round; save it upright',
    'image too thin': 'fewer tokens than queries: prediction ends there; leave it out',
    'duplicate image id': 'the later image replaces the earlier one',
    'duplicate object id': 'MMDetection refuses the file',
    'duplicate category id': 'the later category replaces the earlier one',
    'object of no image': 'its image_id is not listed; it is left out',
    'object of no category': 'its category_id is not listed; it is left out',
    'object without a key': 'MMDetection or the evaluation fails on it',
    'broken box': 'its bbox is not four numbers [x, y, width, height]',
    'box without area': 'MMDetection leaves it out',
    'box outside the image': 'MMDetection leaves it out',
    'box partly outside': 'it reaches more than a pixel beyond the image',
    'object without a mask': "the config loads masks: training ends with KeyError 'mask'",
    'broken mask': 'no polygon of three points or more: MMDetection leaves the object out',
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


class Findings(dict[tuple[str, str], list[str]]):
    """Where something was found: image files, ids or whole sentences, by data set and kind.

    The data set is ``'train'``, ``'val'``, ``'test'``, or several of them; ``'model'`` for the
    model. The kind is an entry of ``PROBLEMS`` or ``REMARKS``.
    """

    def add(self, data: str, kind: str, *places: Any) -> None:
        if places:
            self.setdefault((data, kind), []).extend(map(str, places))

    @contextlib.contextmanager
    def of_errors(self, data: str, kind: str) -> Iterator[None]:
        """What the code inside raises becomes a finding."""
        try:
            yield
        except Exception as error:  # a registry and a file that anybody wrote fail in many ways
            self.add(data, kind, ' '.join(str(error).split()) or type(error).__name__)

    def sorted(self) -> list[tuple[tuple[str, str], list[str]]]:
        """Problems first."""
        return sorted(self.items(), key=lambda finding: finding[0][1] not in PROBLEMS)


@dataclass
class _Image:
    file: ImageFile
    size: tuple[int, int]
    objects: int = 0


class _Use(NamedTuple):
    """Where a config names a data set."""

    split: str
    dataset: CocoDataset
    pipeline: list
    evaluators: list


class DataSummary:
    """What a data set holds, and what the config does with it.

    Attributes:
        name (str): ``'train'``, ``'val'``, ``'test'``, or several that are the same.
        annotation_file (str): Its annotation file.
        config_classes (list[str]): ``metainfo.classes`` of the config.
        labels (list[str]): Name of each label, in the order that MMDetection numbers them.
        classes (list[dict]): For each label its ``name``, the number of ``images`` and ``objects``,
            and of ``small``, ``medium`` and ``large`` objects.
        listed (dict): The images of the file, by id.
    """

    def __init__(self, uses: list[_Use]) -> None:
        self.name = ', '.join(dict.fromkeys(use.split for use in uses))
        self.dataset = uses[0].dataset
        self.annotation_file: str = self.dataset.ann_file
        self.config_classes = list(self.dataset.metainfo['classes'])
        self.pipeline = uses[-1].pipeline  # of the evaluation, which is without chance
        self.evaluated = any(use.split != 'train' for use in uses)
        evaluators = [evaluator for use in uses for evaluator in use.evaluators]
        self.evaluated_with = {e['ann_file'] for e in evaluators if e.get('ann_file')}
        self.has_masks = any(step.get('with_mask') for use in uses for step in use.pipeline) or any(
            'segm' in np.atleast_1d(e.get('metric') or 'bbox') for e in evaluators
        )
        load = next((s for s in uses[0].pipeline if _name(s).startswith('LoadImage')), {})
        color = load.get('color_type', 'color')
        self.ignore_orientation = (
            color == 'unchanged'
            or color.endswith('_ignore_orientation')
            or load.get('imdecode_backend') not in (None, 'cv2', 'pillow')
        )
        self.labels: list[str] = []
        self.classes: list[dict] = []
        self.listed: dict[Any, _Image] = {}

    def as_json(self) -> dict:
        """What the data set holds; ``objects`` are of the config's classes, crowds apart."""
        return {
            'name': self.name,
            'annotation_file': self.annotation_file,
            'images': len(self.listed),
            'objects': sum(count['objects'] for count in self.classes),
            'most_objects': max(image.objects for image in self.listed.values()),  # in one image
            'labels': self.labels,
            'config_classes': self.config_classes,
            'classes': self.classes,
        }


def check_data(
    config: Config,
    findings: Findings,
    workers: int,
    progress: Callable[[str, int], Callable[[], None]] = lambda text, total: lambda: None,
) -> list[DataSummary]:
    """Read every annotation and decode every image of the data sets that a config names.

    Wrappers such as ``RepeatDataset`` are opened, and the evaluators are compared. ``workers`` is
    the number of processes that decode; what ``progress`` returns is called after each image.

    Returns:
        list[DataSummary]: What the data sets hold that could be read.

    Raises:
        ValueError: The config names no data set.
    """
    init_default_scope(config.get('default_scope', 'mmdet'))
    checked = []
    for data in _data_sets(config, findings):
        with findings.of_errors(data.name, 'data set'):
            _read(data, findings)
            checked.append(data)
    images = [(data, image) for data in checked for image in data.listed.values()]
    step = progress('Decoding images', len(images))
    found = decode_images([image.file for _, image in images], workers)
    queries = _num_queries(config.model)
    splits: dict[str, dict[str, None]] = defaultdict(dict)
    for (data, image), decoded in zip(images, found):
        for kind, what in _image_problems(image, decoded, queries):
            findings.add(data.name, kind, f'{image.file.path}{what}')
        image.size = decoded.size or image.size
        splits[os.path.abspath(image.file.path)][data.name] = None
        step()
    for path, names in splits.items():
        if len(names) > 1:
            findings.add(' and '.join(names), 'image in two splits', path)
    for one, two in zip(checked, checked[1:]):
        for label, (first, second) in enumerate(zip(one.labels, two.labels)):
            if first != second:
                findings.add(
                    f'{one.name} and {two.name}',
                    'classes',
                    f'label {label} is {first!r} in {one.name} and {second!r} in {two.name}: list '
                    'the categories of both files in the same order',
                )
                break
    for data in checked:
        for path in sorted(data.evaluated_with):
            with findings.of_errors(data.name, 'evaluator'):
                _check_evaluator(path, data)
    return checked


def check_model(
    model: nn.Module, config: Config, summaries: Sequence[DataSummary], findings: Findings
) -> None:
    """Compare a detector with the data that its config names.

    Args:
        model (nn.Module): The detector, built from ``config``.
        config (Config): Its config.
        summaries (Sequence[DataSummary]): The data sets, from :func:`check_data`.
        findings (Findings): Gets what does not fit.
    """
    from ..openmmlab.families import family_of, reads_text

    add = partial(findings.add, 'model', 'model')
    head = getattr(model, 'bbox_head', None)
    num_classes = getattr(head, 'num_classes', None)
    if head is not None and reads_text(model):
        if num_classes != head.max_text_len:
            add(
                f'bbox_head.num_classes is {num_classes}, but of a detector that reads a text it '
                f'is the number of tokens, whatever the classes; set it to {head.max_text_len}'
            )
    elif num_classes is not None:
        for data in summaries:
            if num_classes != len(data.config_classes):
                add(
                    f'bbox_head.num_classes is {num_classes}, but metainfo.classes of {data.name} '
                    f'has {len(data.config_classes)}; set both to the same number'
                )
    num_queries = getattr(model, 'num_queries', None)
    asked = (getattr(model, 'test_cfg', None) or {}).get('max_per_img', 0)
    if num_queries and num_classes and asked > num_queries * num_classes:
        add(
            f'test_cfg.max_per_img={asked} asks for more predictions than {num_queries} queries of '
            f'{num_classes} classes give; lower it or raise num_queries'
        )
    start = config.get('load_from')
    if start and '://' not in start and not os.path.isfile(start):
        add(f'load_from={start} does not exist')
    wanted = getattr(model, 'num_feature_levels', None)
    if wanted is None:
        return
    try:
        with torch.no_grad():
            maps = model.extract_feat(torch.zeros(1, 3, 256, 256))
    except Exception as error:  # whatever a backbone and a neck that do not fit raise
        add(f'the backbone and the neck do not run: {error}')
        return
    if len(maps) != wanted:
        add(
            f'num_feature_levels is {wanted}, but the neck gives {len(maps)} maps; set '
            'neck.num_outs, num_feature_levels and num_levels of the attention alike'
        )
    family = family_of(model)
    # DDQ-DETR fills up what is missing.
    if getattr(model, 'as_two_stage', False) and family and family.graph != 'ddq':
        strides = [256 // feature_map.shape[-1] for feature_map in maps]
        for data in summaries:
            if data.evaluated:
                findings.add(data.name, 'image too thin', *_thin_images(data, strides, num_queries))


def _data_sets(config: Config, findings: Findings) -> list[DataSummary]:
    """The data sets of a config, unwrapped; each once."""
    found: dict[tuple, list[_Use]] = defaultdict(list)
    loaders = {split: config.get(f'{split}_dataloader') for split in ('train', 'val', 'test')}
    if not any(loaders.values()):
        raise ValueError(
            'the config names no data set: train_dataloader, val_dataloader and test_dataloader '
            'are missing'
        )
    for split, loader in loaders.items():
        evaluators = config.get(f'{split}_evaluator') or []
        evaluators = list(evaluators) if isinstance(evaluators, (list, tuple)) else [evaluators]
        for cfg in _unwrapped(loader.dataset) if loader else ():
            with findings.of_errors(split, 'data set'):
                kind = DATASETS.get(cfg['type']) if isinstance(cfg['type'], str) else cfg['type']
                if not issubclass(kind, CocoDataset) or issubclass(kind, CocoPanopticDataset):
                    findings.add(split, 'not checked', kind.__name__)
                    continue
                # Read by us, not by its constructor, which only makes the paths whole.
                dataset = DATASETS.build({**cfg, 'pipeline': [], 'lazy_init': True})
                files = (dataset.ann_file, dataset.data_prefix['img'])
                use = _Use(split, dataset, list(cfg.get('pipeline') or ()), evaluators)
                found[(*files, *dataset.metainfo['classes'])].append(use)
    return [DataSummary(uses) for uses in found.values()]


def _unwrapped(cfg: dict) -> Iterator[dict]:
    """The data sets inside of wrappers such as ``RepeatDataset`` and ``ConcatDataset``."""
    inner = cfg.get('datasets') or cfg.get('dataset')
    if inner is None:
        yield cfg
    for part in inner if isinstance(inner, (list, tuple)) else filter(None, [inner]):
        yield from _unwrapped(part)


def _name(step: dict) -> str:
    """The class of a pipeline's step, which a config names in several ways."""
    return getattr(step['type'], '__name__', step['type']).rpartition('.')[2]


def _read_quietly(path: str, backend_args: dict | None = None) -> Any:
    quiet = contextlib.redirect_stdout(io.StringIO())  # pycocotools tells of its progress
    with quiet, get_local_path(path, backend_args=backend_args) as local_path:
        return read_annotations(local_path)


def _read(data: DataSummary, findings: Findings) -> None:
    """Fill in what a data set holds, and find what is wrong with its annotation file."""
    dataset, classes = data.dataset, data.config_classes
    add = partial(findings.add, data.name)
    coco = _read_quietly(dataset.ann_file, dataset.backend_args)
    content = {'annotations': (), **coco.dataset}
    names = {category['id']: category['name'] for category in content['categories']}
    data.labels = [name for name in names.values() if name in classes]
    with findings.of_errors(data.name, 'classes'):
        wrong_names = data.labels != classes[: len(data.labels)]
        ignored = getattr(dataset, 'ignored_categories', ())
        for remark in check_categories(
            dataset.ann_file, list(names.values()), classes, ignored, data.evaluated
        ):
            add('classes' if wrong_names and 'another order' in remark else 'categories', remark)

    def image_of(entry: dict) -> _Image:
        path = os.path.join(dataset.data_prefix['img'], entry['file_name'])
        file = ImageFile(path, dataset.backend_args, data.ignore_orientation)
        return _Image(file, (entry['width'], entry['height']))

    def place_of(annotation: dict) -> str:
        image = images.get(annotation['image_id'])
        path = image.file.path if image else f'no image, image_id {annotation["image_id"]}'
        return f'object {annotation["id"]} in {path}'

    images = data.listed = {number: image_of(entry) for number, entry in coco.imgs.items()}
    for part, kind, describe in (
        ('images', 'image', '{id}: {file_name}'.format_map),
        ('annotations', 'object', place_of),
        ('categories', 'category', '{id}: {name}'.format_map),
    ):
        ids = Counter(entry['id'] for entry in content[part])
        twice = [describe(entry) for entry in content[part] if ids[entry['id']] > 1]
        add(f'duplicate {kind} id', *twice)
    paths = Counter(image.file.path for image in images.values())
    add('image listed twice', *(path for path, count in paths.items() if count > 1))

    found: dict[str, list[tuple]] = {name: [] for name in data.labels}  # image ids and areas
    for annotation in content['annotations']:
        image, name = images.get(annotation['image_id']), names.get(annotation['category_id'])
        for kind, what in _object_problems(annotation, image, name, data):
            add(kind, f'{place_of(annotation)}{what}')
        if image is not None and name in found and not annotation.get('iscrowd'):
            image.objects += 1
            found[name].append((annotation['image_id'], _area(annotation)))
    for name, objects in found.items():
        sizes = np.histogram([area for _, area in objects], _SIZE_EDGES)[0].tolist()
        numbers = (len(dict(objects)), len(objects), *sizes)  # first, images
        data.classes.append(dict(zip(COUNTS, (name, *numbers))))
    add('class without objects', *(name for name, objects in found.items() if not objects))
    annotated = {annotation['image_id'] for annotation in content['annotations']}
    bare = (image.file.path for number, image in images.items() if number not in annotated)
    add('image without objects', *bare)
    if not data.evaluated and not any(found.values()):
        add('classes', 'it holds no objects of the classes of the config: nothing to learn')


def _object_problems(
    annotation: dict, image: _Image | None, category: str | None, data: DataSummary
) -> Iterator[tuple[str, str]]:
    """The kind of everything that is wrong with an object, and what to say of it."""
    if image is None:
        yield 'object of no image', ''
        return
    if category is None:
        yield 'object of no category', f', category_id {annotation["category_id"]}'
    # pycocotools' evaluation reads iscrowd, MMDetection's data set does without.
    missing = {'bbox', 'area', *(['iscrowd'] if data.evaluated else [])} - annotation.keys()
    for key in sorted(missing):
        yield 'object without a key', f' lacks {key!r}'
    if 'bbox' in missing:
        return
    box, (width, height) = annotation['bbox'], image.size
    if not _is_box(box):
        yield 'broken box', f': {box}'
        return
    inside = [
        min(start + length, limit) - max(start, 0)
        for start, length, limit in zip(box[:2], box[2:], image.size)
    ]
    # The first that holds is said; MMDetection leaves the object out for each of the first two.
    checks = {
        'box without area': min(box[2:]) < 1 or _area(annotation) <= 0,
        'box outside the image': min(inside) <= 0,
        'box partly outside': box[2] - inside[0] > 1 or box[3] - inside[1] > 1,
    }
    wrong = next((kind for kind, holds in checks.items() if holds), None)
    if wrong:
        yield wrong, f': {box}, image {width}x{height}'
    if data.has_masks and wrong in (None, 'box partly outside') and category in data.labels:
        mask = annotation.get('segmentation')
        if not mask:
            yield 'object without a mask', ''
        elif isinstance(mask, list) and not any(len(p) >= 6 and len(p) % 2 == 0 for p in mask):
            yield 'broken mask', f': {mask}'
        elif isinstance(mask, dict) and not mask.keys() >= {'counts', 'size'}:
            yield 'broken mask', f': of the keys {", ".join(mask)}'


def _is_box(box: Any) -> bool:
    numbers = box if isinstance(box, list) and len(box) == 4 else [None]
    return all(isinstance(x, (int, float)) and math.isfinite(x) for x in numbers)


def _area(annotation: dict) -> float:
    """What COCO's evaluation goes by: ``area``, of the mask where there is one."""
    box = annotation.get('bbox')
    return annotation.get('area', box[2] * box[3] if _is_box(box) else 0)


def _image_problems(
    image: _Image, found: DecodedImage, num_queries: int | None
) -> Iterator[tuple[str, str]]:
    if num_queries is not None and image.objects > num_queries:
        yield 'more objects than queries', f' ({image.objects} objects, {num_queries} queries)'
    if found.size is None:
        yield found.problem or '', ''
        return
    sizes = ' in the file, '.join(f'{width}x{height}' for width, height in (image.size, found.size))
    # Width and height exchanged, and listed so: the boxes are for the turned image.
    meant = found.orientation >= 5 and found.size == image.size and len(set(found.size)) > 1
    if found.orientation != 1 and not meant:
        yield 'image turned by EXIF', f': orientation {found.orientation}, {sizes} in truth'
    elif found.size != image.size:
        yield 'image of another size', f': {sizes} in truth'


def _check_evaluator(path: str, data: DataSummary) -> None:
    """Raises ValueError where an evaluator reads another file than the data set's."""
    if os.path.abspath(path) == os.path.abspath(data.annotation_file):
        return
    coco = _read_quietly(path)
    unknown = data.listed.keys() - coco.imgs.keys()
    names = [category['name'] for category in coco.dataset['categories']]
    if unknown:
        wrong = f'lacks {len(unknown)} of its images'
    elif [name for name in names if name in data.config_classes] != data.labels:
        wrong = 'has other categories or another order'
    else:
        return
    raise ValueError(
        f'its ann_file {path} is not the one of the data set, {data.annotation_file}, and '
        f'{wrong}: set both to the same file'
    )


def _thin_images(data: DataSummary, strides: list[int], num_queries: int) -> Iterator[str]:
    """The images with fewer tokens than queries, resized as for the evaluation."""
    resize = Compose([s for s in data.pipeline if _name(s) in ('Resize', 'FixScaleResize', 'Pad')])

    @cache
    def tokens(size: tuple[int, int]) -> int:
        pixels = np.zeros((size[1], size[0]), np.uint8)
        height, width = resize({'img': pixels, 'img_shape': pixels.shape})['img'].shape[:2]
        return sum(math.ceil(height / s) * math.ceil(width / s) for s in strides)

    for image in data.listed.values():
        if tokens(image.size) < num_queries:
            yield f'{image.file.path} ({tokens(image.size)} tokens, {num_queries} queries)'


def _num_queries(model: dict) -> int | None:
    """Queries of a detector's config, where MMDetection's detectors have the number."""
    parts = (model, model.get('bbox_head') or {})
    found = (part.get(name) for part in parts for name in ('num_queries', 'num_query'))
    return next((number for number in found if number is not None), None)
