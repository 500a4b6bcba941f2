"""What a config says of images before the model: its test pipeline and its classes."""

from __future__ import annotations

from typing import Any

import numpy as np
from mmdet.registry import DATASETS, TRANSFORMS
from mmengine.config import Config
from mmengine.dataset import Compose
from torch import nn

# Names of transforms that a detector, which is given images, does without.
_NOT_NEEDED = ('Load', 'Pack')


def preprocessing(config: Config | None) -> dict[str, Any]:
    """What the test pipeline of a config does to an image.

    Args:
        config (Config, optional): None for a pipeline that does nothing.

    Returns:
        dict: ``resize``: ``scale`` (w, h), ``keep_ratio``, ``rounds_down`` and ``backend``, or
        None; ``pad``: ``size`` (h, w) or ``size_divisor``, and ``value``, or None.

    Raises:
        ValueError: The pipeline has a transform, or an argument of one, that exported detectors
            do not have; the message names it.
    """
    prepared: dict[str, Any] = {'resize': None, 'pad': None}
    for name, step in _steps(config):
        if name in ('Resize', 'FixScaleResize') and prepared == {'resize': None, 'pad': None}:
            scale = step.pop('scale', None)
            backend = step.pop('backend', 'cv2')
            prepared['resize'] = {
                'scale': [scale, scale] if isinstance(scale, (int, float)) else scale and [*scale],
                'keep_ratio': bool(step.pop('keep_ratio', False)),
                'rounds_down': name == 'FixScaleResize',
                'backend': backend,
            }
            served = (
                scale is not None
                and backend in ('cv2', 'pillow')
                and step.pop('interpolation', 'bilinear') == 'bilinear'
            )
            step.pop('clip_object_border', None)  # concerns annotations
        elif name == 'Pad' and prepared['pad'] is None:
            size, divisor = step.pop('size', None), step.pop('size_divisor', None)
            value = step.pop('pad_val', 0)
            value = value.get('img', 0) if isinstance(value, dict) else value
            prepared['pad'] = {'value': value if isinstance(value, int) else [*value]}
            if size is not None:
                prepared['pad']['size'] = [size[1], size[0]]
            if divisor is not None:
                prepared['pad']['size_divisor'] = divisor
            served = (size is None) != (divisor is None)
        else:
            served = False
        if not served or step:
            what = f' with {", ".join(sorted(step))}' if served else ''
            raise ValueError(
                f'the test pipeline has {name}{what}, which exported detectors do not do: they '
                'take one Resize or FixScaleResize (scale, keep_ratio) and then one Pad (size or '
                'size_divisor); change the pipeline of test_dataloader in the config'
            )
    return prepared


def prepare(config: Config, image: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """Run the test pipeline of a config itself on an image.

    Returns:
        tuple[np.ndarray, tuple[float, float]]: What the model gets, float32, shape (3, h, w), and
        the factors (width, height) by which the image was resized.
    """
    steps = [step for step in _pipeline(config) if not _name(step).startswith('Load')]
    size = image.shape[:2]
    found = Compose(steps)({'img': image, 'img_shape': size, 'ori_shape': size})
    factors = found['data_samples'].metainfo.get('scale_factor', (1.0, 1.0))
    return found['inputs'].numpy().astype(np.float32), factors


def class_names(
    config: Config | None, model: nn.Module | None = None, count: int | None = None
) -> list[str]:
    """Names of the classes: what a checkpoint told the model, the config's, the data set's.

    Args:
        config (Config, optional): Whose test data set is asked.
        model (nn.Module, optional): What is asked first.
        count (int, optional): How many there must be.

    Returns:
        list[str]: The first names that are as many; else numbers, or none without ``count``.
    """
    dataset = _datasets(config)[0]
    kind = DATASETS.get(dataset['type']) if isinstance(dataset.get('type'), str) else None
    for meta in (
        getattr(model, 'dataset_meta', None),
        dataset.get('metainfo'),
        getattr(kind or dataset.get('type'), 'METAINFO', None),
    ):
        names = (meta or {}).get('classes', ())
        if names and not isinstance(names, str) and len(names) == (count or len(names)):
            return list(names)
    return [str(label) for label in range(count or 0)]


def _datasets(config: Config | None) -> list[dict]:
    """The test data sets themselves, out of whatever wraps them."""

    def unwrapped(dataset: dict) -> list[dict]:
        inner = dataset.get('datasets') or [
            dataset[name] for name in ('dataset',) if name in dataset
        ]
        return [leaf for one in inner for leaf in unwrapped(one)] or [dataset]

    return unwrapped((config or {}).get('test_dataloader', {}).get('dataset', {}))


def _pipeline(config: Config | None) -> list[dict]:
    first, *others = (dataset.get('pipeline', []) for dataset in _datasets(config))
    if any(other != first for other in others):
        raise ValueError(
            'the test data sets of the config have different pipelines; leave one data set in '
            'test_dataloader'
        )
    return first


def _name(step: dict) -> str:
    """The class of a transform, however the config names it."""
    kind = step['type']
    found = TRANSFORMS.get(kind) if isinstance(kind, str) else kind
    return getattr(found, '__name__', kind)


def _steps(config: Config | None) -> list[tuple[str, dict]]:
    """Name and arguments of each transform that changes images."""
    steps = [(_name(step), dict(step)) for step in _pipeline(config)]
    for _, step in steps:
        del step['type']
    return [(name, step) for name, step in steps if not name.startswith(_NOT_NEEDED)]
