"""What a config says of images before the model: its test pipeline and its classes."""

from __future__ import annotations

from typing import Any

import numpy as np
from mmcv.transforms import Pad, Resize
from mmdet.datasets.transforms import FixScaleResize
from mmdet.registry import DATASETS, TRANSFORMS
from mmengine.config import Config
from mmengine.dataset import Compose
from torch import nn

from ..openmmlab.families import type_name, unwrapped_datasets

# Transforms that leave the pixels of an image as they are, or are how one comes from a file.
_LOADED = ('LoadImageFromFile', 'LoadImageFromNDArray')
_LOADED += ('LoadAnnotations', 'LoadPanopticAnnotations', 'LoadEmptyAnnotations', 'LoadProposals')
_LOADED += ('PackDetInputs', 'PackSegInputs')


def preprocessing(config: Config | None) -> dict[str, Any]:
    """What the test pipeline of a config does to an image, as ``detector.json`` says it.

    ``decoder`` is what :func:`.detector.read_image` takes, ``resize`` and ``pad`` what
    :func:`.detector.resized_size` and :func:`.detector.padded_image` take, or None; with
    ``to_float32`` neither rounds pixels. Other transforms are refused.
    """
    decoder, is_float, resize, pad = 'cv2', False, None, None
    for name, step in _transforms(config):
        if name == 'LoadImageFromFile':
            decoder = step.get('imdecode_backend', decoder) or decoder
            color = step.get('color_type', 'color')
            is_float = step.get('to_float32', False)
            if decoder not in ('cv2', 'pillow') or color != 'color':
                raise ValueError(
                    f'the test pipeline reads images by {decoder} with color_type {color!r}; '
                    "'cv2' and 'pillow' with 'color' can be read: change LoadImageFromFile"
                )
        if name in _LOADED:
            continue
        transform = TRANSFORMS.build(step) if name in ('Resize', 'FixScaleResize', 'Pad') else None
        is_plain = getattr(transform, 'interpolation', 'bilinear') == 'bilinear'
        if isinstance(transform, Resize) and resize is pad is None and transform.scale and is_plain:
            resize = {
                'scale': list(transform.scale),
                'keep_ratio': transform.keep_ratio,
                'rounds_down': isinstance(transform, FixScaleResize),
                'backend': transform.backend,
            }
        elif isinstance(transform, Pad) and not (
            pad or transform.pad_to_square or transform.padding_mode != 'constant'
        ):
            pad = {'value': transform.pad_val['img'], 'size_divisor': transform.size_divisor or 1}
            pad['size'] = (transform.size or (0, 0))[::-1]  # (h, w)
        else:
            raise ValueError(
                f'the test pipeline has {name} as exported detectors do not do it: they take one '
                'Resize or FixScaleResize (scale, keep_ratio, bilinear) and then one Pad (size or '
                'size_divisor); change the pipeline of test_dataloader in the config'
            )
    return {'decoder': decoder, 'to_float32': is_float, 'resize': resize, 'pad': pad}


def prepare(config: Config, image: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """What the test pipeline gives the model, float32 (3, h, w), and its factors (w, h)."""
    steps = [step for name, step in _transforms(config) if name not in _LOADED]
    if preprocessing(config)['to_float32']:
        image = image.astype(np.float32)
    found = Compose(steps)({'img': image, 'img_shape': image.shape[:2]})
    content = np.ascontiguousarray(found['img'].transpose(2, 0, 1), np.float32)
    return content, found.get('scale_factor', (1.0, 1.0))


def class_names(
    config: Config | None, model: nn.Module | None = None, count: int | None = None
) -> list[str]:
    """The first names, ``count`` of them, of a model, its config and its data set; else numbers."""
    dataset = _datasets(config)[0]
    kind = dataset.get('type')
    kind = DATASETS.get(kind) if isinstance(kind, str) else kind
    told = getattr(model, 'dataset_meta', None), dataset.get('metainfo')
    for meta in (*told, getattr(kind, 'METAINFO', None)):
        names = (meta or {}).get('classes', ())
        if names and not isinstance(names, str) and len(names) == (count or len(names)):
            return list(names)
    return [str(label) for label in range(count or 0)]


def _datasets(config: Config | None) -> list[dict]:
    """The test data sets themselves, out of whatever wraps them."""
    # A config without a test, or one that inherits none, says None.
    return unwrapped_datasets(((config or {}).get('test_dataloader') or {}).get('dataset', {}))


def _transforms(config: Config | None) -> list[tuple[str, dict]]:
    """The name of the class of each transform, however a config names it, and its config."""
    first, *others = (dataset.get('pipeline', []) for dataset in _datasets(config))
    if any(other != first for other in others):
        raise ValueError(
            'the test data sets of the config have different pipelines; leave one data set in '
            'test_dataloader'
        )
    return [(type_name(step['type']), step) for step in first]
