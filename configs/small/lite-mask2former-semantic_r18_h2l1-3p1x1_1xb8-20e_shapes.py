# A small semantic segmenter of MMSegmentation, trained from scratch on a CPU: ResNet-18 at half
# width, 128x128 images, three encoder and three decoder layers. Its maps are drawn with the shapes.
_base_ = 'mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py'
custom_imports = dict(imports=['mmdet.models', 'mmlite'])

classes = ('background', 'disc', 'ring', 'triangle', 'cross')
channels = 128
attention = dict(embed_dims=channels)
ffn_cfg = dict(embed_dims=channels, feedforward_channels=256)
positional_encoding = dict(num_feats=channels // 2)
image_size = (128, 128)
model = dict(
    data_preprocessor=dict(size=image_size),
    backbone=dict(
        depth=18,
        base_channels=32,
        norm_cfg=dict(type='BN', requires_grad=True),
        init_cfg=None,
    ),
    decode_head=dict(
        in_channels=[32, 64, 128, 256],
        feat_channels=channels,
        out_channels=channels,
        num_classes=len(classes),
        num_queries=20,
        pixel_decoder=dict(
            type='mmdet.LiteMSDeformAttnPixelDecoder',
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
        train_cfg=dict(num_points=1024),
    ),
)

data_root = 'data/shapes/'
metainfo = dict(
    classes=classes,
    palette=[[0, 0, 0], [230, 60, 60], [60, 180, 75], [60, 100, 230], [240, 200, 40]],
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='Resize', scale=image_size, keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=image_size, keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(_delete_=True, type='DefaultSampler', shuffle=True),
    dataset=dict(
        _delete_=True,
        type='BaseSegDataset',
        data_root=data_root,
        metainfo=metainfo,
        img_suffix='.png',
        data_prefix=dict(img_path='train', seg_map_path='semantic/train'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        _delete_=True,
        type='BaseSegDataset',
        data_root=data_root,
        metainfo=metainfo,
        img_suffix='.png',
        data_prefix=dict(img_path='val', seg_map_path='semantic/val'),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader

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
default_hooks = dict(
    logger=dict(log_metric_by_epoch=True),
    checkpoint=dict(by_epoch=True, interval=1, save_best=None),
)
log_processor = dict(by_epoch=True)
auto_scale_lr = dict(base_batch_size=8)
