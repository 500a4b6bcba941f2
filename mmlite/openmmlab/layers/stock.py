"""Stock MMDetection models on the fused kernels.

mmcv has no CPU kernel for deformable attention, and its CUDA kernel knows no bfloat16 and adds up
half precision in half precision, in no fixed order. A config of any detector gets ours with ::

    custom_imports = dict(imports=['mmlite'])
    custom_hooks = [dict(type='FusedAttentionHook')]
"""

from __future__ import annotations

from mmcv.ops import MultiScaleDeformableAttention
from mmdet.registry import HOOKS
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn

from .attention import FusedDeformableAttention


class _Fused(FusedDeformableAttention):
    """mmcv's module, fused on CPUs and CUDA, and on mmcv's own kernels for all that is left."""

    def forward(self, query: Tensor, *args, **kwargs) -> Tensor:
        has_ours = query.is_cpu or query.is_cuda
        cls = FusedDeformableAttention if has_ours else MultiScaleDeformableAttention
        return cls.forward(self, query, *args, **kwargs)


def fuse_attention(model: nn.Module) -> int:
    """Let a model's deformable attention run through :func:`mmlite.ops.ms_deform_attn`.

    On CPUs and CUDA, in float32, float16 and bfloat16; under deterministic algorithms of torch the
    backward pass repeats bit for bit. Where Triton is too old that operator is mmcv's own again.
    Changes every ``MultiScaleDeformableAttention`` of mmcv in ``model`` in place; subclasses of
    it keep what they do. Parameters, their names and the numbers stay the same, and so does
    everything on other devices, for which mmcv has kernels of its own.

    Args:
        model (nn.Module): Any model, for instance one built from an MMDetection config.

    Returns:
        int: The number of modules changed.
    """
    stock = [module for module in model.modules() if type(module) is MultiScaleDeformableAttention]
    for module in stock:
        module.__class__ = _Fused
    return len(stock)


@HOOKS.register_module()
class FusedAttentionHook(Hook):
    """Calls :func:`fuse_attention` on the runner's model before training or testing."""

    # Before the hooks that copy the model.
    priority = 'VERY_HIGH'

    def before_run(self, runner: Runner) -> None:
        """Change the model, and say how many modules it concerns.

        Args:
            runner (Runner): The runner, its model built.
        """
        count = fuse_attention(runner.model)
        runner.logger.info(f'{count} deformable attention modules run fused')
