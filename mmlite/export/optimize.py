"""The whole detector faster in PyTorch itself: the same modules and numbers, less work."""

from __future__ import annotations

from collections.abc import Callable

import torch
from mmdet.registry import HOOKS
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..openmmlab.layers import fuse_attention
from .graph import check_detector, last_layer


class Optimized:
    """What :func:`optimize` did to a detector; :meth:`undo` takes it back."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def undo(self) -> None:
        """Give the detector its own modules and parameters back, to train on or to save."""
        while self._undo:
            self._undo.pop()()

    def _do(self, undo: Callable[[], None]) -> None:
        self._undo.append(undo)


def optimize(model: nn.Module) -> Optimized:
    """Make a detector's predictions faster, within rounding the same (1e-4).

    - Batch norms are folded into the convolutions before them, and backbone and neck run in the
      channels-last layout.
    - Deformable attention runs on :mod:`mmlite.ops`.
    - Level sizes stay Python ints, boxes of the first stage are computed for the chosen tokens
      alone, and class and box heads run behind the last decoder layer alone.

    The detector is changed in place and put in eval mode. It predicts through the same methods
    (``predict``, ``test_step``, ``mim test``). While it is optimised it must neither be trained nor
    saved.

    Args:
        model (nn.Module): Deformable DETR, DINO or H-Deformable-DETR, stock or Lite.

    Returns:
        Optimized: Whose ``undo()`` makes the detector what it was.

    Raises:
        ValueError: The detector is none of these.
    """
    check_detector(model)
    done = Optimized()
    training = {module: module.training for module in model.modules()}

    def restore_mode() -> None:
        for module, mode in training.items():
            module.training = mode

    done._do(restore_mode)
    model.eval()

    classes = {module: type(module) for module in model.modules()}

    def restore_classes() -> None:
        for module, cls in classes.items():
            module.__class__ = cls

    done._do(restore_classes)
    fuse_attention(model)

    parts = [model.backbone, *([model.neck] if model.with_neck else [])]
    for part in parts:
        _fold_batch_norms(part, done)
        _channels_last(part, done)
    hook = model.backbone.register_forward_pre_hook(
        lambda module, inputs: (inputs[0].contiguous(memory_format=torch.channels_last),)
    )
    done._do(hook.remove)

    model.predict = lambda *arguments, **options: _predict(model, *arguments, **options)
    done._do(lambda: delattr(model, 'predict'))
    return done


def _predict(model: nn.Module, batch_inputs: Tensor, batch_data_samples, rescale: bool = True):
    """``predict`` of MMDetection's transformers, by way of :func:`last_layer`."""
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


def _fold_batch_norms(part: nn.Module, done: Optimized) -> None:
    """Fold every batch norm into the convolution that is registered right before it."""
    for module in part.modules():
        convolution = None
        for name, child in list(module.named_children()):
            is_norm = isinstance(child, nn.modules.batchnorm._BatchNorm)
            if is_norm and convolution is not None and child.track_running_stats:
                _fold(module, convolution, name, child, done)
            convolution = child if type(child) is nn.Conv2d else None


def _fold(
    parent: nn.Module, convolution: nn.Conv2d, name: str, norm: nn.Module, done: Optimized
) -> None:
    weight, bias = convolution.weight, convolution.bias
    with torch.no_grad():
        folded = fuse_conv_bn_weights(
            weight, bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
    convolution.weight, convolution.bias = folded
    parent._modules[name] = nn.Identity()

    def undo() -> None:
        convolution.weight, convolution.bias = weight, bias
        parent._modules[name] = norm

    done._do(undo)


def _channels_last(part: nn.Module, done: Optimized) -> None:
    for module in part.modules():
        if isinstance(module, nn.Conv2d):
            _set_layout(module, done)


def _set_layout(convolution: nn.Conv2d, done: Optimized) -> None:
    weight = convolution.weight
    original = weight.data
    weight.data = original.contiguous(memory_format=torch.channels_last)

    def undo() -> None:
        weight.data = original

    done._do(undo)


@HOOKS.register_module()
class OptimizeHook(Hook):
    """Calls :func:`optimize` on the runner's model for ``mim test``; training is left alone.

    In a config::

        custom_imports = dict(imports=['mmlite'])
        custom_hooks = [dict(type='OptimizeHook')]
    """

    def __init__(self) -> None:
        self.optimized: Optimized | None = None

    def before_test(self, runner: Runner) -> None:
        """Optimise the model, whose weights are loaded by now.

        Args:
            runner (Runner): The runner.
        """
        model = getattr(runner.model, 'module', runner.model)
        self.optimized = optimize(model)
        runner.logger.info('the detector predicts optimised')

    def after_test(self, runner: Runner) -> None:
        """Take it back.

        Args:
            runner (Runner): The runner.
        """
        if self.optimized is not None:
            self.optimized.undo()
            self.optimized = None
