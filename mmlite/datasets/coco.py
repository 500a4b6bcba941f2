"""MMDetection's COCO data set, with its annotation file checked before any work is lost."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence

from mmdet.datasets import CocoDataset
from mmdet.datasets.api_wrappers import COCO
from mmdet.registry import DATASETS


@DATASETS.register_module()
class CheckedCocoDataset(CocoDataset):
    """``CocoDataset`` that says what is wrong with its annotation file.

    The stock data set leaves out objects of categories that the config does not know, and numbers
    the others in the order of the file, whatever the order of the config's classes. It says
    neither. This one warns of what trains all the same and refuses what would end training later
    or teach nothing. Labels and images are those of the stock data set.

    Args:
        ignored_categories (Sequence[str]): Categories of the annotation file that are left out on
            purpose, without a warning.
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
        names = [category['name'] for category in coco.dataset['categories']]
        classes = self.metainfo['classes']
        for remark in check_categories(
            annotation_file, names, classes, self.ignored_categories, self.test_mode
        ):
            warnings.warn(remark, stacklevel=2)
        known = set(coco.get_cat_ids(cat_names=classes))
        has_objects = any(annotation['category_id'] in known for annotation in coco.anns.values())
        if not self.test_mode and not has_objects:
            raise ValueError(
                f'annotation file {annotation_file} holds no objects of the classes of the '
                'config: there is nothing to learn'
            )
        return coco


def read_annotations(path: str) -> COCO:
    """Read an annotation file in COCO's format, with at least one image and one category.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is empty, not JSON, not in COCO's format, or lists no images or categories.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f'annotation file {path} does not exist; check data_root and ann_file in the config'
        )
    try:
        coco = COCO(path)
        for image in coco.imgs.values():
            _ = image['file_name'], image['width'], image['height']
        for category in coco.cats.values():
            _ = category['name']
    except (json.JSONDecodeError, UnicodeDecodeError, AssertionError, TypeError) as error:
        raise ValueError(f'annotation file {path} is empty or not JSON: {error}') from error
    except KeyError as error:
        raise ValueError(
            f"annotation file {path} is not in COCO's format: an entry lacks {error}"
        ) from error
    for part in ('images', 'categories'):
        if not coco.dataset.get(part):
            raise ValueError(f'annotation file {path} lists no {part}')
    return coco


def check_categories(
    path: str,
    categories: Sequence[str],
    classes: Sequence[str],
    ignored: Sequence[str] = (),
    evaluated: bool = False,
) -> list[str]:
    """Compare the categories of an annotation file with the classes of a config.

    MMDetection's label ``i`` is the ``i``-th category *of the file* that is among the classes.
    ``ignored`` are categories left out on purpose. Where a detector is ``evaluated`` on the file,
    predictions of a class that it lacks end the evaluation.

    Returns:
        list[str]: What does not fit and trains all the same, a sentence each.

    Raises:
        ValueError: Nothing could be learned, or the evaluation would fail.
    """
    classes = list(classes)
    labels = [name for name in categories if name in classes]
    twice = [name for name in dict.fromkeys(labels) if labels.count(name) > 1]
    unknown = [name for name in categories if name not in classes and name not in ignored]
    missing = [name for name in classes if name not in categories]
    reordered = labels != classes[: len(labels)]
    errors = [
        (
            not labels,
            f'has none of the classes of the config, {_listed(classes)}; set metainfo.classes to '
            f'its categories, {_listed(categories)}, and bbox_head.num_classes to their number',
        ),
        (
            twice,
            f'lists categories twice: {_listed(twice)}; MMDetection would give each its own '
            'label; merge them in the file',
        ),
        (
            missing and evaluated,
            f'lacks classes of the config: {_listed(missing)}; a prediction of them would end the '
            f'evaluation; add them to its categories, or set metainfo.classes to {_listed(labels)} '
            'and bbox_head.num_classes to their number',
        ),
    ]
    remarks = [
        (
            unknown,
            'has categories that the config does not know, and their objects are left out: '
            f'{_listed(unknown)}; add them to metainfo.classes (now {_listed(classes)}) and count '
            'them in bbox_head.num_classes, or name them in ignored_categories of a '
            'CheckedCocoDataset',
        ),
        (
            reordered,
            'has the classes in another order than the config, and the order of the file is what '
            'numbers the labels: they will be shown under wrong names; set metainfo.classes to '
            f'{_listed(labels + missing)}',
        ),
        (
            missing and not reordered,
            f'lacks classes of the config: {_listed(missing)}; nothing will be learned of them',
        ),
    ]
    for applies, text in errors:
        if applies:
            raise ValueError(f'annotation file {path} {text}')
    return [f'annotation file {path} {text}' for applies, text in remarks if applies]


def _listed(names: Sequence[str], most: int = 8) -> str:
    shown = ', '.join(map(repr, names[:most]))
    return shown if len(names) <= most else f'{shown} and {len(names) - most} more'
