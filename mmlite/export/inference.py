"""Faster predictions in PyTorch itself: the same modules and numbers, less work."""

from __future__ import annotations

import copy
import logging
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..models import changing, restore
from ..openmmlab.layers import fuse_into
from .graph import last_layer, refusals


def optimize(model: nn.Module) -> nn.Module:
    """Make a detector's predictions faster, the same but for rounding (1e-4).

    Batch norms are folded into the convolutions before them. Backbone and neck run in the
    channels-last layout, deformable attention on :mod:`mmlite.ops`. Heads run on the chosen tokens
    and behind the last decoder layer alone. The detector is changed in place and put in eval mode.
    Until it is restored it must neither be trained nor saved.

    Args:
        model (nn.Module): Deformable DETR, DINO or H-Deformable-DETR, stock or Lite.

    Returns:
        nn.Module: The same model; :func:`mmlite.restore` makes it what it was.

    Raises:
        ValueError: The detector is none of these. It is unchanged then.
    """
    for reason in refusals(model, 'detector'):
        raise ValueError(f'{type(model).__name__} cannot be optimised: {reason}')
    with changing(model, 'optimize') as change:
        for name, _ in model.named_modules():
            change.set(model, name, 'training', False)
        fuse_into(change, model)
        pairs = _norms_of_convolutions(model)
        for part in ('backbone', 'neck') if model.with_neck else ('backbone',):
            change.set(model, '', part, _folded(getattr(model, part), pairs))
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
    found = [tensor[None] for tensor in last_layer(model, batch_inputs, image_sizes)]
    results = model.bbox_head.predict_by_feat(*found, batch_img_metas=metas, rescale=rescale)
    return model.add_pred_to_datasample(batch_data_samples, results)


def _norms_of_convolutions(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Batch norms that get just what a convolution gives, as they run on an image."""
    kept: list[tuple[Tensor, nn.Module]] = []
    pairs: dict[nn.Module, nn.Module] = {}

    def look(norm: nn.Module, args: tuple) -> None:
        pairs.update((norm, conv) for output, conv in kept if output is args[0])

    with ExitStack() as stack:
        for module in model.modules():
            if type(module) is nn.Conv2d:  # subclasses may do more, such as an activation
                hook = module.register_forward_hook(lambda m, _, output: kept.append((output, m)))
                stack.enter_context(hook)
            elif type(module) is nn.BatchNorm2d and module.track_running_stats:
                stack.enter_context(module.register_forward_pre_hook(look))
        with torch.no_grad():
            model.extract_feat(next(model.parameters()).new_zeros(1, 3, 128, 128))
    return pairs


def _folded(part: nn.Module, pairs: dict[nn.Module, nn.Module]) -> nn.Module:
    """A channels-last copy, each batch norm folded into the convolution before it."""
    names = {module: name for name, module in part.named_modules()}
    part = copy.deepcopy(part).to(memory_format=torch.channels_last)
    for norm, conv in pairs.items():
        if norm in names and conv in names:
            both = [part.get_submodule(names[module]) for module in (conv, norm)]
            for module, new in zip((conv, norm), (fuse_conv_bn_eval(*both), nn.Identity().eval())):
                parent, _, name = names[module].rpartition('.')
                setattr(part.get_submodule(parent), name, new)
    return part


class OptimizeHook(Hook):
    """Calls :func:`optimize` on the runner's model for ``mim test``; training is left alone::

    custom_imports = dict(imports=['mmlite'])
    custom_hooks = [dict(type='OptimizeHook')]
    """

    # Hooks such as EMAHook exchange the weights before and after the epoch: the model is optimised
    # after the first exchange and restored before the second.
    priority = 'VERY_HIGH'

    def before_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Optimise the model before the first batch."""
        if batch_idx == 0:
            optimize(getattr(runner.model, 'module', runner.model))
            runner.logger.info('the detector predicts optimised')

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Restore the model."""
        restore(getattr(runner.model, 'module', runner.model), last=True)
