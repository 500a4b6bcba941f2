# The small segmenter that `mmlite demo --full --task segmentation` trains from scratch on a CPU:
# ResNet-18 at half width, 128x128 images, three encoder and three decoder layers.
_base_ = 'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py'
custom_imports = dict(imports=['mmlite'])

classes = ('disc', 'ring', 'triangle', 'cross')
channels = 128
attention = dict(embed_dims=channels)
ffn_cfg = dict(embed_dims=channels, feedforward_channels=256)
positional_encoding = dict(num_feats=channels // 2)
model = dict(
    data_preprocessor=dict(batch_augments=None),
    backbone=dict(
        depth=18,
        base_channels=32,
        norm_cfg=dict(type='BN', requires_grad=True),
        norm_eval=False,
        init_cfg=None,
    ),
    panoptic_head=dict(
        in_channels=[32, 64, 128, 256],
        feat_channels=channels,
        out_channels=channels,
        num_things_classes=len(classes),
        num_queries=20,
        pixel_decoder=dict(
            type='LiteMSDeformAttnPixelDecoder',
            encoder=dict(
                schedule='H2L1-(3+1)x1',
                num_layers=3,
                layer_cfg=dict(self_attn_cfg=attention, ffn_cfg=ffn_cfg),
            ),
            positional_encoding=positional_encoding,
        ),
        positional_encoding=positional_encoding,
        transformer_decoder=dict(
            num_layers=3,
            layer_cfg=dict(self_attn_cfg=attention, cross_attn_cfg=attention, ffn_cfg=ffn_cfg),
        ),
        loss_cls=dict(class_weight=[1.0] * len(classes) + [0.1]),
    ),
    panoptic_fusion_head=dict(num_things_classes=len(classes)),
    train_cfg=dict(num_points=1024),
    test_cfg=dict(max_per_image=20),
)

data_root = 'data/shapes/'
metainfo = dict(classes=classes)
image_size = (128, 128)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=image_size, keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=image_size, keep_ratio=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        type='CheckedCocoDataset',
        data_root=data_root,
        metainfo=metainfo,
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img='train/'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        type='CheckedCocoDataset',
        data_root=data_root,
        metainfo=metainfo,
        ann_file='annotations/instances_val.json',
        data_prefix=dict(img='val/'),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
test_evaluator = val_evaluator

max_epochs = 20
train_cfg = dict(
    _delete_=True, type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=max_epochs
)
# Nothing is pretrained, so the whole model learns at one rate, higher than the stock config's.
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=5e-4, weight_decay=0.01),
    clip_grad=dict(max_norm=1.0, norm_type=2),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', T_max=max_epochs, eta_min=1e-6, convert_to_iter_based=True),
]
default_hooks = dict(checkpoint=dict(by_epoch=True, interval=1, save_last=False))
log_processor = dict(by_epoch=True)
auto_scale_lr = dict(base_batch_size=8)
