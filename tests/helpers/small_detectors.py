"""MMDetection's own detectors in small: every stock config shrunk so that it runs in a moment."""

from __future__ import annotations

import torch
from torch import nn

# MMDetection ties two-stage models to 256 channels, so the channels stay.
SMALL = dict(
    num_queries=30,
    backbone=dict(depth=18, init_cfg=None, frozen_stages=-1),
    neck=dict(in_channels=[128, 256, 512]),
    encoder=dict(
        num_layers=2,
        layer_cfg=dict(
            self_attn_cfg=dict(dropout=0.0),
            ffn_cfg=dict(feedforward_channels=64, ffn_drop=0.0),
        ),
    ),
    decoder=dict(
        num_layers=2,
        layer_cfg=dict(
            self_attn_cfg=dict(dropout=0.0),
            cross_attn_cfg=dict(dropout=0.0),
            ffn_cfg=dict(feedforward_channels=64, ffn_drop=0.0),
        ),
    ),
    bbox_head=dict(num_classes=5),
    test_cfg=dict(max_per_img=30),
)

# What a config can say of the Lite encoder and its decoder beside the defaults.
ENCODERS = {
    'standard': dict(key_aware=False),
    'proj_key': dict(layer_cfg=dict(self_attn_cfg=dict(proj_key=True))),
    'same_loc': dict(layer_cfg=dict(self_attn_cfg=dict(same_loc=True))),
    'one_ffn': dict(small_ffn=False),
    'sequential': dict(update='sequential'),
    'recomputed': dict(num_cp=2),
}
DECODERS = {
    'proj_key': dict(layer_cfg=dict(cross_attn_cfg=dict(proj_key=True))),
    'same_loc': dict(layer_cfg=dict(cross_attn_cfg=dict(same_loc=True))),
}


def without_gradient(model: nn.Module, data: dict) -> list[str]:
    """Names of the parameters that a training step gives no gradient, or one that is not finite.

    Args:
        model (nn.Module): A model of MMDetection.
        data (dict): A batch of its data preprocessor.

    Returns:
        list[str]: None of them should be there: DDP waits for every gradient.
    """
    torch.manual_seed(0)
    model.zero_grad()
    total, _ = model.parse_losses(model.train()(**data, mode='loss'))
    total.backward()
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and (parameter.grad is None or not parameter.grad.isfinite().all())
    ]
