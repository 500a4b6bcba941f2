"""COCO's metrics of a detector on a data set, by MMDetection's own evaluation."""

from __future__ import annotations

import copy
import io
from contextlib import redirect_stdout
from itertools import chain
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from torch import nn

from ..datasets.coco import read_annotations

# COCO's name -> MMDetection's.
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
        with redirect_stdout(io.StringIO()):  # pycocotools prints
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


@torch.no_grad()
def evaluate_model(model: nn.Module, config: Config, dataset: Dataset) -> dict[str, float]:
    """Test a detector on ``dataset`` as MMDetection does, with the test pipeline of its config.

    Returns:
        dict[str, float]: MMDetection's names of :data:`METRICS`, in percent; -100 where there are
        no such objects.
    """
    loader = copy.deepcopy(config.test_dataloader)
    annotations, images = str(dataset.annotations), {'img': str(dataset.images)}
    loader.dataset.update(ann_file=annotations, data_root='', data_prefix=images)
    loader.update(num_workers=0, persistent_workers=False)
    training = model.training
    model.eval()
    with redirect_stdout(io.StringIO()):
        loader = Runner.build_dataloader(loader)
        evaluator = Evaluator({'type': 'CocoMetric', 'ann_file': annotations, 'metric': 'bbox'})
        evaluator.dataset_meta = loader.dataset.metainfo
        found = chain.from_iterable(map(model.test_step, loader))
        metrics = evaluator.offline_evaluate(found)
    model.train(training)
    return {name: 100 * metrics[f'coco/bbox_{name}'] for name in METRICS.values()}
