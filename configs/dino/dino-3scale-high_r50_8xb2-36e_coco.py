# DINO on the three high-level maps alone, strides 16, 32 and 64: what is lost when the encoder is
# made cheap by leaving the largest map out.
_base_ = 'mmdet::dino/dino-4scale_r50_8xb2-36e_coco.py'
num_levels = 3
model = dict(
    num_feature_levels=num_levels,
    backbone=dict(out_indices=(2, 3)),
    neck=dict(in_channels=[1024, 2048], num_outs=num_levels),
    encoder=dict(layer_cfg=dict(self_attn_cfg=dict(num_levels=num_levels))),
    decoder=dict(layer_cfg=dict(cross_attn_cfg=dict(num_levels=num_levels))),
)
