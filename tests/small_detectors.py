"""MMDetection's own detectors in small: every stock config shrunk so that it runs in a moment."""

from __future__ import annotations

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
