# The small detector that `mmlite demo` trains from scratch in minutes: a quarter of ResNet-18's
# channels, 64 in the transformer, two encoder and two decoder layers, images of 96x96.
_base_ = '../_base_/dino-4scale_r18_1xb8-14e_shapes.py'

channels = 64
num_queries = 30
attention = dict(embed_dims=channels, num_heads=4)
ffn_cfg = dict(embed_dims=channels, feedforward_channels=128)
model = dict(
    type='LiteDINO',
    num_queries=num_queries,
    backbone=dict(base_channels=16),
    neck=dict(in_channels=[32, 64, 128], out_channels=channels),
    encoder=dict(
        schedule='H3L1-(2+1)x1',
        num_layers=2,
        layer_cfg=dict(self_attn_cfg=attention, ffn_cfg=ffn_cfg),
    ),
    decoder=dict(
        num_layers=2,
        key_aware=True,
        layer_cfg=dict(self_attn_cfg=attention, cross_attn_cfg=attention, ffn_cfg=ffn_cfg),
    ),
    positional_encoding=dict(num_feats=channels // 2),
    bbox_head=dict(embed_dims=channels, loss_cls=dict(loss_weight=2.0)),
    dn_cfg=dict(group_cfg=dict(num_dn_queries=10)),
    test_cfg=dict(max_per_img=num_queries),
)

image_size = (96, 96)
train_pipeline = _base_.train_pipeline
train_pipeline[2].scale = image_size
load, annotations, resize, pack = _base_.test_pipeline
resize.scale = image_size
test_pipeline = [load, resize, annotations, pack]  # objects stay in pixels of the file
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

max_epochs = 5
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
# Muon learns convolutions and matrices in half the iterations of AdamW.
optim_wrapper = dict(optimizer=dict(_delete_=True, type='EncoderOptimizer', lr=8e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.02, by_epoch=False, begin=0, end=40),
    dict(
        type='CosineAnnealingLR', T_max=max_epochs, eta_min_ratio=0.01, convert_to_iter_based=True
    ),
]
