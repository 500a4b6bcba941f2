"""What is wrong with the data sets of a config, and what of it does not fit the model.

``mmlite check`` shows it; :func:`check_data` and :func:`check_model` find it.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.fileio import get_local_path
from mmengine.registry import init_default_scope
from torch import nn

from .coco import check_categories, read_annotations
from .images import ImageFile, decode_images

# COCO's ranges of an object's area in pixels.
SIZES = {'small': (0, 32**2), 'medium': (32**2, 96**2), 'large': (96**2, math.inf)}

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
    'image turned by EXIF': 'training sees it turned; boxes made for the unturned one are off',
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
    'more objects than queries': 'some cannot be found; raise num_queries',
}
REMARKS = {
    'image without objects': 'learned from as background, or left out by filter_empty_gt',
    'image listed twice': 'it counts twice',
    'image in two splits': 'the evaluation is of images that were trained on',
    'categories': 'trained without them, as the config says',
    'class without objects': 'nothing of it is learned, or evaluated',
    'not checked': 'not a data set in COCO format',
}


@dataclass
class Finding:
    """Something about the data or the model that somebody should know.

    Attributes:
        data (str): The data set: ``'train'``, ``'val'``, ``'test'``, or several; ``'model'``.
        kind (str): Entry of ``PROBLEMS`` or ``REMARKS``.
        places (list[str]): Where: image files, ids, or whole sentences.
    """

    data: str
    kind: str
    places: list[str] = field(default_factory=list)

    @property
    def is_problem(self) -> bool:
        return self.kind in PROBLEMS

    @property
    def meaning(self) -> str:
        return PROBLEMS.get(self.kind) or REMARKS[self.kind]


@dataclass
class ClassCount:
    """How often a class occurs in a data set, by size: ``SIZES`` in area."""

    name: str
    images: int = 0
    objects: int = 0
    small: int = 0
    medium: int = 0
    large: int = 0


@dataclass
class DataSummary:
    """What a data set holds.

    Attributes:
        name (str): ``'train'``, ``'val'``, ``'test'``, or several that are the same.
        annotation_file (str): Its annotation file.
        images (int): Images that the file lists.
        objects (int): Objects of the config's classes, crowds apart.
        most_objects (int): Objects in the fullest image.
        labels (list[str]): Name of each label, in the order that MMDetection numbers them.
        config_classes (list[str]): ``metainfo.classes`` of the config.
        classes (list[ClassCount]): Counts by class.
    """

    name: str
    annotation_file: str
    images: int = 0
    objects: int = 0
    most_objects: int = 0
    labels: list[str] = field(default_factory=list)
    config_classes: list[str] = field(default_factory=list)
    classes: list[ClassCount] = field(default_factory=list)


class Findings:
    """Findings as they come up, those of a kind together."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], Finding] = {}

    def add(self, data: str, kind: str, place: Any) -> None:
        self._found.setdefault((data, kind), Finding(data, kind)).places.append(str(place))

    def sorted(self) -> list[Finding]:
        """Problems first."""
        return sorted(self._found.values(), key=lambda finding: not finding.is_problem)


def check_data(
    config: Config,
    findings: Findings,
    workers: int,
    progress: Callable[[str, int], Callable[[], None]] = lambda text, total: lambda: None,
) -> list[DataSummary]:
    """Read every annotation and decode every image of the data sets that a config names.

    Args:
        config (Config): Its ``train_dataloader``, ``val_dataloader``, ``test_dataloader`` and their
            evaluators are followed, through wrappers such as ``RepeatDataset`` too.
        findings (Findings): Gets what is found.
        workers (int): Processes that decode.
        progress (Callable): Called with a text and the number of images; what it returns is
            called after each.

    Returns:
        list[DataSummary]: What the data sets hold that could be read.

    Raises:
        ValueError: The config names no data set.
    """
    init_default_scope(config.get('default_scope', 'mmdet'))
    num_queries = _num_queries(config.model)
    checked = []
    for data in _data_sets(config, findings):
        summary = DataSummary(data.name, data.dataset.ann_file)
        with _problem_of(findings, data.name, 'data set'):
            checked.append((data, summary, _check_annotations(data, summary, findings)))
    images = [image for _, _, of_data in checked for image in of_data]
    step = progress('Decoding images', len(images))
    for image, found in zip(images, decode_images([image.file for image in images], workers)):
        for kind, place in _image_problems(image, found):
            findings.add(image.data, kind, place)
        step()
    for image in images:
        if num_queries is not None and image.objects > num_queries:
            place = f'{image.file.path} ({image.objects} objects, {num_queries} queries)'
            findings.add(image.data, 'more objects than queries', place)
    summaries = [summary for _, summary, _ in checked]
    _check_splits(summaries, images, findings)
    for data, summary, of_data in checked:
        for path in data.evaluated_with:
            with _problem_of(findings, data.name, 'evaluator'):
                _check_evaluator(path, summary, {image.id for image in of_data})
    return summaries


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
    num_classes = getattr(getattr(model, 'bbox_head', None), 'num_classes', None)
    for summary in summaries:
        if num_classes is not None and num_classes != len(summary.config_classes):
            findings.add(
                'model',
                'model',
                f'bbox_head.num_classes is {num_classes}, but metainfo.classes of {summary.name} '
                f'has {len(summary.config_classes)}; set both to the same number',
            )
    num_queries = getattr(model, 'num_queries', None)
    asked = (getattr(model, 'test_cfg', None) or {}).get('max_per_img', 0)
    if num_queries and num_classes and asked > num_queries * num_classes:
        findings.add(
            'model',
            'model',
            f'test_cfg.max_per_img={asked} asks for more predictions than {num_queries} queries of '
            f'{num_classes} classes give; lower it or raise num_queries',
        )
    wanted = getattr(model, 'num_feature_levels', None)
    if wanted is not None:
        try:
            with torch.no_grad():
                found = len(model.extract_feat(torch.zeros(1, 3, 256, 256)))
        except Exception as error:  # whatever a backbone and a neck that do not fit raise
            findings.add('model', 'model', f'the backbone and the neck do not run: {error}')
        else:
            if found != wanted:
                findings.add(
                    'model',
                    'model',
                    f'num_feature_levels is {wanted}, but the neck gives {found} maps; set '
                    'neck.num_outs, num_feature_levels and num_levels of the attention alike',
                )
    start = config.get('load_from')
    if start and '://' not in start and not os.path.isfile(start):
        findings.add('model', 'model', f'load_from={start} does not exist')


@dataclass
class _DataSet:
    """A data set that a config names, not yet read."""

    name: str
    dataset: CocoDataset
    evaluated: bool
    evaluated_with: list[str]
    ignore_orientation: bool

    @property
    def source(self) -> tuple:
        dataset = self.dataset
        return (dataset.ann_file, dataset.data_prefix['img'], tuple(dataset.metainfo['classes']))


@dataclass
class _Image:
    data: str
    id: Any
    file: ImageFile
    size: tuple[int, int]
    objects: int = 0


def _data_sets(config: Config, findings: Findings) -> list[_DataSet]:
    """The data sets of a config, unwrapped; those of several splits that are the same, once."""
    found: dict[tuple, _DataSet] = {}
    named = False
    for split in ('train', 'val', 'test'):
        loader = config.get(f'{split}_dataloader')
        if not loader:
            continue
        evaluators = config.get(f'{split}_evaluator') or []
        evaluators = evaluators if isinstance(evaluators, (list, tuple)) else [evaluators]
        files = [e['ann_file'] for e in evaluators if e.get('ann_file')]
        for cfg in _unwrapped(loader.dataset):
            named = True
            with _problem_of(findings, split, 'data set'):
                # Read by us, not by its constructor, which only makes the paths whole.
                dataset = DATASETS.build({**cfg, 'pipeline': [], 'lazy_init': True})
                if not isinstance(dataset, CocoDataset):
                    findings.add(split, 'not checked', type(dataset).__name__)
                    continue
                load = next(iter(cfg.get('pipeline') or ()), {})
                data = _DataSet(
                    split,
                    dataset,
                    split != 'train',
                    list(files),
                    load.get('color_type') == 'color_ignore_orientation',
                )
                known = found.setdefault(data.source, data)
                if known is not data:
                    known.name += f', {split}' if split not in known.name.split(', ') else ''
                    known.evaluated |= data.evaluated
                    known.evaluated_with += [f for f in files if f not in known.evaluated_with]
    if not named:
        raise ValueError(
            'the config names no data set: train_dataloader, val_dataloader and test_dataloader '
            'are missing'
        )
    return list(found.values())


def _unwrapped(cfg: dict) -> Iterator[dict]:
    """The data sets inside of wrappers such as ``RepeatDataset`` and ``ConcatDataset``."""
    inner = cfg.get('datasets') or cfg.get('dataset')
    if inner is None:
        yield cfg
    for part in inner if isinstance(inner, (list, tuple)) else filter(None, [inner]):
        yield from _unwrapped(part)


@contextlib.contextmanager
def _problem_of(findings: Findings, data: str, kind: str) -> Iterator[None]:
    """What the code inside raises becomes a finding."""
    try:
        yield
    except Exception as error:  # a registry and a file that anybody wrote fail in many ways
        findings.add(data, kind, ' '.join(str(error).split()) or type(error).__name__)


def _read_quietly(path: str, backend_args: dict | None = None) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools tells of its progress
        if backend_args is None:
            return read_annotations(path)
        with get_local_path(path, backend_args=backend_args) as local_path:
            return read_annotations(local_path)


def _check_annotations(data: _DataSet, summary: DataSummary, findings: Findings) -> list[_Image]:
    """Fill in ``summary``, find what is wrong with the annotation file, and list its images."""
    dataset = data.dataset
    coco = _read_quietly(dataset.ann_file, dataset.backend_args)
    content = coco.dataset
    classes = list(dataset.metainfo['classes'])
    names = {category['id']: category['name'] for category in content['categories']}
    summary.config_classes = classes
    summary.labels = [name for name in names.values() if name in classes]

    def add(kind: str, place: Any) -> None:
        findings.add(data.name, kind, place)

    try:
        remarks = check_categories(
            dataset.ann_file,
            list(names.values()),
            classes,
            ignored=getattr(dataset, 'ignored_categories', ()),
            evaluated=data.evaluated,
        )
        wrong_names = summary.labels != classes[: len(summary.labels)]
        for remark in remarks:
            add('classes' if wrong_names and 'another order' in remark else 'categories', remark)
    except ValueError as error:
        add('classes', error)

    for part, kind in (
        ('images', 'duplicate image id'),
        ('annotations', 'duplicate object id'),
        ('categories', 'duplicate category id'),
    ):
        ids = Counter(entry['id'] for entry in content.get(part, ()))
        for number in (number for number, count in ids.items() if count > 1):
            add(kind, number)

    images = {
        number: _Image(
            data.name,
            number,
            ImageFile(
                os.path.join(dataset.data_prefix['img'], image['file_name']),
                dataset.backend_args,
                data.ignore_orientation,
            ),
            (image['width'], image['height']),
        )
        for number, image in coco.imgs.items()
    }
    paths = Counter(image.file.path for image in images.values())
    for path in (path for path, count in paths.items() if count > 1):
        add('image listed twice', path)

    counts = {name: ClassCount(name) for name in summary.labels}
    images_of = defaultdict(set)
    annotated = set()
    for annotation in content.get('annotations', ()):
        image = images.get(annotation['image_id'])
        name = names.get(annotation['category_id'])
        annotated.add(annotation['image_id'])
        for kind, place in _object_problems(annotation, image, name, data.evaluated):
            add(kind, place)
        if image is None or name not in counts or annotation.get('iscrowd'):
            continue
        image.objects += 1
        images_of[name].add(image.id)
        counts[name].objects += 1
        for size, (low, high) in SIZES.items():
            if low <= _area(annotation) < high:
                setattr(counts[name], size, getattr(counts[name], size) + 1)
    for name, count in counts.items():
        count.images = len(images_of[name])
        if not count.objects:
            add('class without objects', name)
    for image in images.values():
        if image.id not in annotated:
            add('image without objects', image.file.path)
    summary.classes = list(counts.values())
    summary.images = len(images)
    summary.objects = sum(count.objects for count in counts.values())
    summary.most_objects = max(image.objects for image in images.values())
    if not data.evaluated and not summary.objects:
        add('classes', 'it holds no objects of the classes of the config: nothing to learn')
    return list(images.values())


def _object_problems(
    annotation: dict, image: _Image | None, category: str | None, evaluated: bool
) -> Iterator[tuple[str, str]]:
    """Kind and place of everything that is wrong with an object."""
    place = f'object {annotation["id"]}'
    if image is None:
        yield 'object of no image', f'{place}, image_id {annotation["image_id"]}'
        return
    if category is None:
        yield 'object of no category', f'{place}, category_id {annotation["category_id"]}'
    # pycocotools' evaluation reads iscrowd, MMDetection's data set does without.
    for key in ('bbox', 'area', 'iscrowd') if evaluated else ('bbox', 'area'):
        if key not in annotation:
            yield 'object without a key', f'{place} lacks {key!r}'
    if 'bbox' not in annotation:
        return
    box = annotation['bbox']
    place = f'{place} in {image.file.path}: {box}'
    if not _is_box(box):
        yield 'broken box', place
        return
    x, y, width, height = box
    inside = [
        min(start + length, limit) - max(start, 0)
        for start, length, limit in zip((x, y), (width, height), image.size)
    ]
    if width < 1 or height < 1 or _area(annotation) <= 0:
        yield 'box without area', place
    elif min(inside) <= 0:
        yield 'box outside the image', f'{place}, image {image.size[0]}x{image.size[1]}'
    elif width - inside[0] > 1 or height - inside[1] > 1:
        yield 'box partly outside', f'{place}, image {image.size[0]}x{image.size[1]}'


def _is_box(box: Any) -> bool:
    return (
        isinstance(box, (list, tuple))
        and len(box) == 4
        and all(isinstance(x, (int, float)) and math.isfinite(x) for x in box)
    )


def _area(annotation: dict) -> float:
    """What COCO's evaluation goes by: ``area``, of the mask where there is one."""
    if 'area' in annotation:
        return annotation['area']
    box = annotation.get('bbox')
    return box[2] * box[3] if _is_box(box) else 0


def _image_problems(image: _Image, found) -> Iterator[tuple[str, str]]:
    path = image.file.path
    if found.problem is not None:
        yield found.problem, path
    elif found.size != image.size:
        sizes = f'{image.size[0]}x{image.size[1]} in the file, {found.size[0]}x{found.size[1]}'
        kind = 'image turned by EXIF' if found.turned else 'image of another size'
        yield kind, f'{path}: {sizes} in truth'


def _check_splits(
    summaries: Sequence[DataSummary], images: Sequence[_Image], findings: Findings
) -> None:
    """What the data sets say of the same thing."""
    for first, second in zip(summaries, summaries[1:]):
        for label, names in enumerate(zip(first.labels, second.labels)):
            if names[0] != names[1]:
                findings.add(
                    f'{first.name} and {second.name}',
                    'classes',
                    f'label {label} is {names[0]!r} in {first.name} and {names[1]!r} in '
                    f'{second.name}: list the categories of both files in the same order',
                )
                break
    splits = defaultdict(dict)
    for image in images:
        splits[os.path.abspath(image.file.path)][image.data] = None
    for path, names in splits.items():
        if len(names) > 1:
            findings.add(' and '.join(names), 'image in two splits', path)


def _check_evaluator(path: str, summary: DataSummary, image_ids: set) -> None:
    """Raises ValueError where an evaluator reads another file than the data set's."""
    if os.path.abspath(path) == os.path.abspath(summary.annotation_file):
        return
    coco = _read_quietly(path)
    unknown = image_ids - set(coco.imgs)
    if unknown:
        raise ValueError(
            f'its ann_file {path} is not the one of the data set, {summary.annotation_file}, and '
            f'lacks {len(unknown)} of its images: set both to the same file'
        )
    labels = [c['name'] for c in coco.dataset['categories'] if c['name'] in summary.config_classes]
    if labels != summary.labels:
        raise ValueError(
            f'its ann_file {path} is not the one of the data set, {summary.annotation_file}, and '
            'has other categories or another order: set both to the same file'
        )


def _num_queries(model: dict) -> int | None:
    """Queries of a detector's config, where MMDetection's detectors have the number."""
    for part in (model, model.get('bbox_head') or {}):
        for name in ('num_queries', 'num_query'):
            if isinstance(part, dict) and name in part:
                return part[name]
    return None
