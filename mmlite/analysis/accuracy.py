"""COCO's metrics of a detector on a data set, in PyTorch or exported, by pycocotools."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
from mmengine.structures import InstanceData

from ..datasets.coco import read_annotations
from ..export.detector import Detector

# COCO's name -> MMDetection's, in the order of pycocotools.
METRICS = {
    'AP': 'mAP',
    **{f'AP{iou}': f'mAP_{iou}' for iou in (50, 75)},
    **{f'AP{size}': f'mAP_{size}' for size in 'sml'},
}


class Dataset:
    """Images in a folder, and their annotations in COCO's format.

    Raises:
        FileNotFoundError: The folder or the file does not exist.
        ValueError: The annotations cannot be read, or there are none.
    """

    def __init__(self, annotations: Path, images: Path) -> None:
        self.annotations, self.images = annotations, images
        if not images.exists():
            raise FileNotFoundError(f'image folder {images} does not exist')
        self.coco = read_annotations(str(annotations))
        if not self.coco.anns:
            raise ValueError(f'{annotations} holds no annotations to evaluate on')

    def objects(self, image: str) -> tuple[InstanceData, list[str]]:
        """The objects of the image with this file name, and the names of all classes."""
        coco = self.coco
        ids = [i for i, entry in coco.imgs.items() if Path(entry['file_name']).name == image]
        if not ids:
            raise ValueError(f'{self.annotations} does not list {image}')
        objects, categories = coco.imgToAnns[ids[0]], list(coco.cats)
        boxes = torch.tensor([one['bbox'] for one in objects], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([categories.index(one['category_id']) for one in objects]).long()
        names = [category['name'] for category in coco.cats.values()]
        return InstanceData(bboxes=boxes, labels=labels), names

    def evaluate(self, detector: Detector) -> dict[str, float]:
        """Metrics of boxes: MMDetection's names of :data:`METRICS`, in percent.

        -100 stands where there are no such objects. ValueError where the annotations lack a class
        of the detector.
        """
        from pycocotools.cocoeval import COCOeval

        category = {entry['name']: number for number, entry in self.coco.cats.items()}
        if missing := [name for name in detector.classes if name not in category]:
            what = f'no category {missing[0]!r}, a class of the model'
            raise ValueError(f'{self.annotations} has {what}')
        numbers = np.array([category[name] for name in detector.classes])
        rows = []
        for image, entry in self.coco.imgs.items():
            boxes, scores, labels = detector.detect(self.images / entry['file_name'])[:3]
            sides = boxes[:, 2:] - boxes[:, :2]
            place = np.full(len(boxes), image)
            rows.append(np.column_stack([place, boxes[:, :2], sides, scores, numbers[labels]]))
        with redirect_stdout(io.StringIO()):
            found = self.coco.loadRes(np.concatenate(rows))
            evaluation = COCOeval(self.coco, found, 'bbox')
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return dict(zip(METRICS.values(), (100 * evaluation.stats[:6]).tolist()))
