# The small segmenter that `mmlite demo --task segmentation` trains from scratch in minutes: a
# quarter of ResNet-18's channels, 64 in the transformer, two encoder and three decoder layers,
# images of 96x96.
_base_ = './lite-mask2former_r18_h2l1-3p1x1_1xb8-20e_shapes.py'

classes = ('disc', 'ring', 'triangle')
channels = 64
attention = dict(embed_dims=channels, num_heads=4)
ffn_cfg = dict(embed_dims=channels, feedforward_channels=128)
positional_encoding = dict(num_feats=channels // 2)
layer_cfg = dict(self_attn_cfg=attention, ffn_cfg=ffn_cfg)
model = dict(
    backbone=dict(base_channels=16),
    panoptic_head=dict(
        in_channels=[16, 32, 64, 128],
        feat_channels=channels,
        out_channels=channels,
        num_things_classes=len(classes),
        num_queries=8,
        pixel_decoder=dict(
            encoder=dict(schedule='H2L1-(2+1)x1', num_layers=2, layer_cfg=layer_cfg),
            positional_encoding=positional_encoding,
        ),
        positional_encoding=positional_encoding,
        transformer_decoder=dict(layer_cfg=dict(cross_attn_cfg=attention, **layer_cfg)),
        # Classes are learned later than masks here; few queries are left without an object, so
        # what is none counts for more than the stock config's 0.1.
        loss_cls=dict(loss_weight=4.0, class_weight=[1.0] * len(classes) + [0.5]),
    ),
    panoptic_fusion_head=dict(num_things_classes=len(classes)),
    train_cfg=dict(num_points=256),
    test_cfg=dict(max_per_image=8),
)

image_size = (96, 96)
train_pipeline = _base_.train_pipeline
train_pipeline[2].scale = image_size
load, annotations, resize, pack = _base_.test_pipeline
resize.scale = image_size
test_pipeline = [load, resize, annotations, pack]  # objects stay in pixels of the file
metainfo = dict(classes=classes)
train_dataloader = dict(dataset=dict(metainfo=metainfo, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(metainfo=metainfo, pipeline=test_pipeline))
test_dataloader = val_dataloader

max_epochs = 7
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
# Muon learns convolutions and matrices in half the iterations of AdamW.
optim_wrapper = dict(optimizer=dict(_delete_=True, type='EncoderOptimizer', lr=6e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.02, by_epoch=False, begin=0, end=40),
    dict(
        type='CosineAnnealingLR', T_max=max_epochs, eta_min_ratio=0.01, convert_to_iter_based=True
    ),
]
