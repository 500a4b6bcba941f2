"""Hooks for MMEngine's runner that are cheap to import."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.runner import Runner


class FusedAttentionHook(Hook):
    """Runs a stock detector's deformable attention on our kernels, in training and testing.

    mmcv has no CPU kernel for it, and its CUDA kernel knows no bfloat16 and adds up half precision
    in half precision, in no fixed order. A config of any detector gets ours with ::

        custom_imports = dict(imports=['mmlite'])
        custom_hooks = [dict(type='FusedAttentionHook')]
    """

    # Before the hooks that copy the model.
    priority = 'VERY_HIGH'

    def before_run(self, runner: Runner) -> None:
        """Change the model, and say how many modules it concerns.

        Args:
            runner (Runner): The runner, its model built.
        """
        from .layers import fuse_attention

        count = fuse_attention(runner.model)
        runner.logger.info(f'{count} deformable attention modules run fused')
