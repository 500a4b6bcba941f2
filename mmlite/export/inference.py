"""Faster predictions in PyTorch itself: the same modules and numbers, less work."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..models import Change, changing, restore
from ..openmmlab.layers import fuse_into
from .graph import last_layer, refusals


def optimize(model: nn.Module) -> nn.Module:
    """Make a detector's predictions faster, the same but for rounding (1e-4).

    Batch norms are folded into the convolutions before them. Backbone and neck run in the
    channels-last layout, deformable attention on :mod:`mmlite.ops`. Heads run on the chosen tokens
    and behind the last decoder layer alone.

    The detector is changed in place and put in eval mode. It predicts through the same methods
    (``predict``, ``test_step``, ``mim test``). Until it is restored it must neither be trained nor
    saved.

    Args:
        model (nn.Module): Deformable DETR, DINO or H-Deformable-DETR, stock or Lite.

    Returns:
        nn.Module: The same model; :func:`mmlite.restore` makes it what it was.

    Raises:
        ValueError: The detector is none of these. It is unchanged then.
    """
    for reason in refusals(model):
        raise ValueError(f'{type(model).__name__} cannot be optimised: {reason}')
    with changing(model, 'optimize') as change:
        for name, _ in model.named_modules():
            change.set(model, name, 'training', False)
        fuse_into(change, model)
        for part in ('backbone', 'neck') if model.with_neck else ('backbone',):
            _fold_batch_norms(model, part, change)
            for name, module in model.get_submodule(part).named_modules(prefix=part):
                if isinstance(module, nn.Conv2d):
                    weight = module.weight.detach().contiguous(memory_format=torch.channels_last)
                    weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
                    change.set(model, name, 'weight', weight)
        change.set(model, '', 'predict', partial(_predict, model))
    logging.getLogger('mmlite').info('optimize: %s predicts faster', type(model).__name__)
    return model


def _predict(model: nn.Module, batch_inputs: Tensor, batch_data_samples, rescale: bool = True):
    """``predict`` of MMDetection's transformers, by way of :func:`last_layer`."""
    batch_inputs = batch_inputs.contiguous(memory_format=torch.channels_last)
    metas = [sample.metainfo for sample in batch_data_samples]
    sizes = [tuple(meta['img_shape'][:2]) for meta in metas]
    image_sizes = None
    if any(size != tuple(batch_inputs.shape[-2:]) for size in sizes):
        image_sizes = torch.tensor(sizes, device=batch_inputs.device)
    logits, boxes = last_layer(model, batch_inputs, image_sizes)
    results = model.bbox_head.predict_by_feat(
        logits[None], boxes[None], batch_img_metas=metas, rescale=rescale
    )
    return model.add_pred_to_datasample(batch_data_samples, results)


def _fold_batch_norms(model: nn.Module, part: str, change: Change) -> None:
    """Fold every batch norm into the convolution that is registered right before it."""
    for name, module in model.get_submodule(part).named_modules(prefix=part):
        before: tuple[str, nn.Module] = ('', module)
        for child_name, child in list(module.named_children()):
            # Subclasses may do more, such as an activation.
            is_norm = type(child) is nn.BatchNorm2d and child.track_running_stats
            if is_norm and type(before[1]) is nn.Conv2d:
                folded = fuse_conv_bn_eval(before[1], child)
                for what in ('weight', 'bias'):
                    change.set(model, f'{name}.{before[0]}', what, getattr(folded, what))
                change.set(model, name, child_name, nn.Identity().eval())
            before = child_name, child


class OptimizeHook(Hook):
    """Calls :func:`optimize` on the runner's model for ``mim test``; training is left alone.

    In a config::

        custom_imports = dict(imports=['mmlite'])
        custom_hooks = [dict(type='OptimizeHook')]
    """

    # Hooks such as EMAHook exchange the weights before and after the epoch. What they exchange must
    # be the model itself: it is optimised after the first exchange and restored before the second.
    priority = 'VERY_HIGH'

    def before_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Optimise the model before the first batch."""
        if batch_idx == 0:
            optimize(getattr(runner.model, 'module', runner.model))
            runner.logger.info('the detector predicts optimised')

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Restore the model."""
        restore(getattr(runner.model, 'module', runner.model), last=True)
