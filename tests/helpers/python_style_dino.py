"""A small DINO in MMEngine's pure Python style, where types are classes."""

from mmdet.datasets import CocoDataset
from mmdet.models import DINO, ChannelMapper, DetDataPreprocessor, DINOHead, ResNet
from mmdet.models.losses import FocalLoss
from mmengine.model import PretrainedInit
from torch import nn

default_scope = None
attention = dict(embed_dims=256, num_heads=8)
ffn = dict(embed_dims=256, feedforward_channels=64, ffn_drop=0.0)
model = dict(
    type=DINO,
    num_queries=20,
    with_box_refine=True,
    as_two_stage=True,
    data_preprocessor=dict(type=DetDataPreprocessor),
    backbone=dict(
        type=ResNet,
        depth=18,
        base_channels=8,
        out_indices=(1, 2, 3),
        init_cfg=dict(type=PretrainedInit, checkpoint='torchvision://resnet18'),
    ),
    neck=dict(
        type=ChannelMapper,
        in_channels=[16, 32, 64],
        kernel_size=1,
        out_channels=256,
        act_cfg=None,
        norm_cfg=dict(type=nn.GroupNorm, num_groups=32),
        num_outs=4,
    ),
    encoder=dict(num_layers=2, layer_cfg=dict(self_attn_cfg=attention, ffn_cfg=ffn)),
    decoder=dict(
        num_layers=2,
        return_intermediate=True,
        layer_cfg=dict(self_attn_cfg=attention, cross_attn_cfg=attention, ffn_cfg=ffn),
        post_norm_cfg=None,
    ),
    positional_encoding=dict(num_feats=128, normalize=True),
    bbox_head=dict(type=DINOHead, num_classes=5, loss_cls=dict(type=FocalLoss, use_sigmoid=True)),
    dn_cfg=dict(label_noise_scale=0.5, box_noise_scale=1.0, group_cfg=dict(num_groups=2)),
    test_cfg=dict(max_per_img=20),
)
test_dataloader = dict(dataset=dict(type=CocoDataset))
