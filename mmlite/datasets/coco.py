"""MMDetection's COCO data set, with its annotation file checked before any work is lost."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from mmdet.datasets import CocoDataset
from mmdet.datasets.api_wrappers import COCO
from mmdet.registry import DATASETS


# Takes the stock name, so that any config is checked once mmlite is imported.
@DATASETS.register_module(name='CocoDataset', force=True)
class CheckedCocoDataset(CocoDataset):
    """``CocoDataset`` that refuses annotations which do not fit the config.

    The stock data set leaves out objects of categories that the config does not know, and where
    the file lacks a class or has them in another order it gives labels the wrong names. It says
    neither; a detector then learns little and nobody knows why.

    Args:
        ignored_categories (Sequence[str]): Categories of the annotation file to leave out on
            purpose.
        *args: As for ``mmdet.datasets.CocoDataset``.
        **kwargs: As for ``mmdet.datasets.CocoDataset``.

    Raises:
        FileNotFoundError: The annotation file or the first image it lists does not exist.
        ValueError: The file is not in COCO's format, lists no images, holds no objects to learn
            from, or its categories are not the config's classes.
    """

    def __init__(self, *args, ignored_categories: Sequence[str] = (), **kwargs) -> None:
        self.ignored_categories = tuple(ignored_categories)
        super().__init__(*args, **kwargs)

    def COCOAPI(self, annotation_file: str) -> COCO:
        """Read and check the annotation file; the stock class calls this to read it."""
        if not os.path.isfile(annotation_file):
            raise FileNotFoundError(
                f'annotation file {annotation_file} does not exist; check data_root and ann_file '
                'in the config'
            )
        try:
            coco = COCO(annotation_file)
        except (json.JSONDecodeError, UnicodeDecodeError, AssertionError, TypeError) as error:
            raise ValueError(
                f'annotation file {annotation_file} is empty or not JSON: {error}'
            ) from error
        except KeyError as error:
            raise ValueError(
                f"annotation file {annotation_file} is not in COCO's format: an entry lacks {error}"
            ) from error
        self._check_content(coco, annotation_file)
        self._check_categories(coco, annotation_file)
        return coco

    def _check_content(self, coco: COCO, annotation_file: str) -> None:
        for part in ('images', 'categories'):
            if not coco.dataset.get(part):
                raise ValueError(f'annotation file {annotation_file} lists no {part}')
        if not self.test_mode and not coco.dataset.get('annotations'):
            raise ValueError(
                f'annotation file {annotation_file} holds no objects: there is nothing to learn'
            )
        image = os.path.join(self.data_prefix['img'], coco.dataset['images'][0]['file_name'])
        if self.backend_args is None and not os.path.isfile(image):
            raise FileNotFoundError(
                f'image {image}, listed in {annotation_file}, does not exist; check data_root and '
                'data_prefix in the config'
            )

    def _check_categories(self, coco: COCO, annotation_file: str) -> None:
        classes = list(self.metainfo['classes'])
        found = [category['name'] for category in coco.dataset['categories']]
        found = [name for name in found if name not in self.ignored_categories]
        unknown = [name for name in found if name not in classes]
        missing = [name for name in classes if name not in found]
        if unknown:
            raise ValueError(
                f'annotation file {annotation_file} has categories that the config does not know: '
                f'{_listed(unknown)}; add them to metainfo.classes (now {_listed(classes)}) and '
                'count them in bbox_head.num_classes, or name them in ignored_categories'
            )
        if missing:
            raise ValueError(
                f'annotation file {annotation_file} lacks classes of the config: '
                f'{_listed(missing)}; set metainfo.classes to its categories, {_listed(found)}, '
                'and bbox_head.num_classes to their number'
            )
        if found != classes:
            raise ValueError(
                f'annotation file {annotation_file} has the classes in another order than the '
                f'config; set metainfo.classes to {_listed(found)}'
            )


def _listed(names: Sequence[str], most: int = 8) -> str:
    shown = ', '.join(repr(name) for name in names[:most])
    return shown if len(names) <= most else f'{shown} and {len(names) - most} more'
