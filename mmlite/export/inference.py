"""Faster predictions in PyTorch itself: the same modules and numbers, less work."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from ..models import changing, restore
from ..openmmlab.layers import fuse_into
from ..openmmlab.runner import unwrapped
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
    for reason in refusals(model, 'graph.DetectorGraph'):
        raise ValueError(f'{type(model).__name__} cannot be optimised: {reason}')
    with changing(model, 'optimize') as change:
        for name, _ in model.named_modules():
            change.set(model, name, 'training', False)
        fuse_into(change, model)
        image = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
        image = image.to(next(model.parameters()))
        pairs, expected = _norms_of_convolutions(model, image)
        names = ('backbone', 'neck') if model.with_neck else ('backbone',)
        parts = {name: getattr(model, name) for name in names}
        for chosen in (pairs, {}):  # none, where folding shows after all
            for name, part in parts.items():
                change.set(model, '', name, _folded(part, chosen))
            if _agree(model, image, expected):
                break
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


class _Reads(TorchDispatchMode):
    """Counts the operations that get a tensor, by its id."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[int] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given, _ = tree_flatten((args, kwargs))
        self.counts.update(id(each) for each in given if isinstance(each, Tensor))
        return function(*args, **(kwargs or {}))


def _norms_of_convolutions(
    model: nn.Module, image: Tensor
) -> tuple[dict[nn.Module, nn.Module], tuple[Tensor, ...]]:
    """Batch norms that alone get what a convolution gives, as they run once; and the features."""
    given: dict[nn.Module, list[Tensor]] = {}  # to norms
    gave: dict[nn.Module, list[Tensor]] = {}
    reads = _Reads()

    def keep(conv: nn.Module, args: tuple, output: Tensor) -> None:
        gave.setdefault(conv, []).append(output)
        reads.counts[id(output)] = 0  # of one that is gone

    with ExitStack() as stack:
        for module in model.modules():
            # What may change input, weights or output, such as weight norm, is left alone.
            if module._forward_hooks or module._forward_pre_hooks or 'forward' in vars(module):
                continue
            if type(module) is nn.Conv2d:  # subclasses may do more, such as an activation
                stack.enter_context(module.register_forward_hook(keep))
            elif type(module) is nn.BatchNorm2d and module.track_running_stats:
                hook = module.register_forward_pre_hook(
                    lambda norm, args: given.setdefault(norm, []).extend(args)
                )
                stack.enter_context(hook)
        with torch.no_grad(), reads:
            features = model.extract_feat(image)
    source = {id(each[0]): conv for conv, each in gave.items() if len(each) == 1}
    return {
        norm: source[id(each[0])]
        for norm, each in given.items()
        if len(each) == 1 and id(each[0]) in source and reads.counts[id(each[0])] == 1
    }, features


def _agree(model: nn.Module, image: Tensor, expected: tuple[Tensor, ...]) -> bool:
    """Whether a model's features are the expected ones but for rounding."""
    with torch.no_grad():
        pairs = zip(model.extract_feat(image), expected)
    error = torch.finfo(image.dtype).eps ** 0.5
    return all((new - old).abs().max() <= error * old.abs().max() for new, old in pairs)


def _folded(part: nn.Module, pairs: dict[nn.Module, nn.Module]) -> nn.Module:
    """A channels-last copy, each batch norm folded into the convolution before it."""
    folded = copy.deepcopy(part).to(memory_format=torch.channels_last)
    copies = dict(zip(part.modules(), folded.modules()))
    for norm, conv in ((copies.get(n), copies.get(c)) for n, c in pairs.items()):
        if norm and conv:
            stats = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *stats)
            norm.__class__ = nn.Identity  # under each of its names
    return folded


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
            optimize(unwrapped(runner))
            runner.logger.info('the detector predicts optimised')

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Restore the model."""
        restore(unwrapped(runner), last=True)
