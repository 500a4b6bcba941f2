"""MMDetection's COCO data set, with its annotation file checked before any work is lost."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout

from mmdet.datasets import CocoDataset
from mmdet.datasets.api_wrappers import COCO
from mmdet.registry import DATASETS
from mmengine.fileio import get_local_path


@DATASETS.register_module()
class CheckedCocoDataset(CocoDataset):
    """``CocoDataset`` that says what is wrong with its annotation file.

    It warns of what trains all the same, such as categories that are left out or in another order
    than the config's classes, and refuses what would end training later or teach nothing. Labels
    and images are those of the stock data set.

    Args:
        ignored_categories (Sequence[str]): Categories of the file that are left out on purpose.
        *args, **kwargs: As for ``mmdet.datasets.CocoDataset``.

    Raises:
        FileNotFoundError: The annotation file or the first image it lists does not exist.
        ValueError: The file is not in COCO's format, lists no images, holds no objects to learn
            from, has none of the config's classes, or is for testing and lacks one of them.
    """

    def __init__(self, *args, ignored_categories: Sequence[str] = (), **kwargs) -> None:
        self.ignored_categories = tuple(ignored_categories)
        super().__init__(*args, **kwargs)

    def COCOAPI(self, annotation_file: str) -> COCO:
        """Read and check the annotation file; the stock class calls this to read it."""
        coco = read_annotations(annotation_file)
        image = os.path.join(self.data_prefix['img'], coco.dataset['images'][0]['file_name'])
        if self.backend_args is None and not os.path.isfile(image):
            raise FileNotFoundError(
                f'image {image}, listed in {annotation_file}, does not exist; check data_root and '
                'data_prefix in the config'
            )
        classes, ignored = self.metainfo['classes'], self.ignored_categories
        for _, remark in check_classes(coco, annotation_file, classes, ignored, self.test_mode):
            warnings.warn(remark, stacklevel=2)
        return coco


def read_annotations(path: str, backend_args: dict | None = None) -> COCO:
    """Read an annotation file in COCO's format, with at least one image and one category.

    ``backend_args`` are those of a data set whose files lie elsewhere. Nothing is printed.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is empty, not JSON, not in COCO's format, or lists no images or categories.
    """
    quiet = redirect_stdout(io.StringIO())  # pycocotools tells of its progress
    try:
        with quiet, get_local_path(path, backend_args=backend_args) as local:
            if not os.path.isfile(local):
                what = f'annotation file {path} does not exist'
                raise FileNotFoundError(f'{what}; check data_root and ann_file in the config')
            coco = COCO(local)
        for image in coco.imgs.values():
            _ = image['file_name'], image['width'], image['height']
        for category in coco.cats.values():
            _ = category['name']
    except (ValueError, AssertionError, TypeError) as error:
        raise ValueError(f'annotation file {path} is empty or not JSON: {error}') from error
    except KeyError as error:
        raise ValueError(
            f"annotation file {path} is not in COCO's format: an entry lacks {error}"
        ) from error
    for part in ('images', 'categories'):
        if not coco.dataset.get(part):
            raise ValueError(f'annotation file {path} lists no {part}')
    return coco


def check_classes(
    coco: COCO, path: str, classes: Sequence[str], ignored: Sequence[str], evaluated: bool
) -> Iterator[tuple[str, str]]:
    """Compare an annotation file with the classes of a config.

    MMDetection's label ``i`` is the ``i``-th category *of the file* that is among the classes.
    ``ignored`` are categories left out on purpose. Where a detector is ``evaluated`` on the file,
    predictions of a class that it lacks end the evaluation.

    Yields:
        tuple[str, str]: ``'classes'`` where labels get wrong names, else ``'categories'``; and a
        sentence on what does not fit and trains all the same.

    Raises:
        ValueError: Nothing could be learned, or the evaluation would fail.
    """
    file, classes = f'annotation file {path}', list(classes)
    categories = [category['name'] for category in coco.dataset['categories']]
    labels = [name for name in categories if name in classes]
    twice = [name for name in dict.fromkeys(labels) if labels.count(name) > 1]
    unknown = [name for name in categories if name not in classes and name not in ignored]
    missing = [name for name in classes if name not in categories]
    if twice:
        raise ValueError(
            f'{file} lists categories twice: {listed(twice)}; MMDetection would give each its own '
            'label; merge them in the file'
        )
    if missing and evaluated:
        raise ValueError(
            f'{file} lacks classes of the config: {listed(missing)}; a prediction of them would '
            'end the evaluation; add them to its categories, or set metainfo.classes to '
            f'{listed(labels or categories)} and bbox_head.num_classes to their number'
        )
    if unknown:
        remark = (
            f'{file} has categories that the config does not know, whose objects are left out: '
            f'{listed(unknown)}; add them to metainfo.classes (now {listed(classes)}) and count '
            'them in bbox_head.num_classes, or name them in ignored_categories'
        )
        yield 'categories', remark
    if labels != classes[: len(labels)]:
        remark = (
            f'{file} has the classes in another order than the config; the order of the file is '
            'what numbers the labels: they will be shown under wrong names; set metainfo.classes '
            f'to {listed(labels + missing)}'
        )
        yield 'classes', remark
    elif missing:
        remark = f'{file} lacks classes of the config: {listed(missing)}; '
        yield 'categories', remark + 'nothing will be learned of them'
    known = set(coco.get_cat_ids(cat_names=classes))
    objects = (entry for entry in coco.anns.values() if entry['category_id'] in known)
    if not evaluated and all(entry.get('iscrowd') for entry in objects):
        raise ValueError(
            f'{file} holds no objects of the classes of the config, {listed(classes)}; set '
            f'metainfo.classes to categories that have some, of {listed(categories)}'
        )


def listed(names: Sequence[str], most: int = 8) -> str:
    """Names between quotes, the first of them."""
    shown = ', '.join(map(repr, names[:most]))
    return shown if len(names) <= most else f'{shown} and {len(names) - most} more'
