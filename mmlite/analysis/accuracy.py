"""COCO's metrics of a detector on a data set, by MMDetection's own evaluation."""

from __future__ import annotations

import copy
import io
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
from mmdet.datasets.api_wrappers import COCO
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


@dataclass(frozen=True)
class Dataset:
    """Images and annotations in COCO's format."""

    annotations: Path  # the JSON file
    images: Path  # folder

    def check(self) -> COCO:
        """Read the annotations.

        Raises:
            FileNotFoundError: The file or the folder does not exist.
            ValueError: The file is no JSON in COCO's format, or holds no annotations.
        """
        for what, path in (('annotation file', self.annotations), ('image folder', self.images)):
            if not path.exists():
                raise FileNotFoundError(f'{what} {path} does not exist')
        with redirect_stdout(io.StringIO()):  # pycocotools prints
            coco = read_annotations(str(self.annotations))
        if not coco.anns:
            raise ValueError(
                f'{self.annotations} holds no annotations, so there is nothing to evaluate on'
            )
        return coco

    def objects(self, image: str) -> tuple[InstanceData, list[str]]:
        """The objects of the image with this file name, and the names of all classes."""
        coco = self.check()
        ids = [i for i, entry in coco.imgs.items() if Path(entry['file_name']).name == image]
        if not ids:
            raise ValueError(f'{self.annotations} does not list {image}')
        objects, categories = coco.imgToAnns[ids[0]], list(coco.cats)
        boxes = torch.tensor([one['bbox'] for one in objects], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([categories.index(one['category_id']) for one in objects]).long()
        names = [category['name'] for category in coco.cats.values()]
        return InstanceData(bboxes=boxes, labels=labels), names


def evaluate(
    config: Config, checkpoint: str, dataset: Dataset, device: str = 'cpu'
) -> dict[str, float]:
    """Test a detector as ``mim test`` does, on ``dataset`` in place of the config's.

    Returns:
        dict[str, float]: MMDetection's names of :data:`METRICS`, in percent; -100 where there are
        no such objects.
    """
    config, annotations = config.copy(), str(dataset.annotations)
    loader = config.test_dataloader
    images = {'data_root': '', 'data_prefix': {'img': str(dataset.images)}}
    loader.dataset.update(ann_file=annotations, **images)
    if device == 'cpu':
        loader.update(num_workers=0, persistent_workers=False)
    config.test_evaluator = {'type': 'CocoMetric', 'ann_file': annotations, 'metric': 'bbox'}
    with tempfile.TemporaryDirectory() as work_dir:
        # A visualizer of its own: mmengine hands an instance with a known name on to later runners.
        visualizer = {'type': 'Visualizer', 'name': work_dir}
        config.update(work_dir=work_dir, visualizer=visualizer)
        config.update(load_from=checkpoint, log_level='ERROR')
        metrics = Runner.from_cfg(config).test()
    return {name: 100 * metrics[f'coco/bbox_{name}'] for name in METRICS.values()}


@torch.no_grad()
def evaluate_model(model: nn.Module, config: Config, dataset: Dataset) -> dict[str, float]:
    """As :func:`evaluate`, of a model that is there; its mode stays as it was.

    Args:
        model (nn.Module): A detector, or what is tested as one.
        config (Config): Its config, whose test pipeline reads the images.
        dataset (Dataset): Images and annotations.
    """
    loader = copy.deepcopy(config.test_dataloader)
    annotations, images = str(dataset.annotations), {'img': str(dataset.images)}
    loader.dataset.update(ann_file=annotations, data_root='', data_prefix=images)
    loader.update(num_workers=0, persistent_workers=False)
    training = model.training
    model.eval()
    with redirect_stdout(io.StringIO()):
        loader = Runner.build_dataloader(loader)
        metric = {'type': 'CocoMetric', 'ann_file': annotations, 'metric': 'bbox'}
        evaluator = Evaluator(metric)
        evaluator.dataset_meta = loader.dataset.metainfo
        for batch in loader:
            evaluator.process(model.test_step(batch), batch)
        metrics = evaluator.evaluate(len(loader.dataset))
    model.train(training)
    return {name: 100 * metrics[f'coco/bbox_{name}'] for name in METRICS.values()}
