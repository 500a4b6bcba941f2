# The three maps of the backbone itself, strides 8, 16 and 32, without the extra stride-64 map.
_base_ = 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'
custom_imports = dict(imports=['mmlite'])
num_levels = 3
model = dict(
    type='LiteDINO',
    num_feature_levels=num_levels,
    neck=dict(num_outs=num_levels),
    encoder=dict(
        schedule='H2L1-(2+1)x3', layer_cfg=dict(self_attn_cfg=dict(num_levels=num_levels))
    ),
    decoder=dict(layer_cfg=dict(cross_attn_cfg=dict(num_levels=num_levels))),
)
