# The detector of the study: DINO with six encoder layers, as in the paper, and everything else
# small enough for one CPU core. ResNet-18 at half width, 128 channels.
_base_ = '../../../configs/small/lite-dino-4scale_r18_h3l1-3p1x1_1xb8-14e_shapes.py'

custom_imports = dict(imports=['mmlite', 'benchmarks.study.narrow_dino'])

classes = ('stripes', 'checks', 'rim')
dims = 128
ffn_cfg = dict(embed_dims=dims, feedforward_channels=2 * dims, ffn_drop=0.0)
attention_cfg = dict(embed_dims=dims, num_levels=4, dropout=0.0)
model = dict(
    type='NarrowDINO',
    neck=dict(out_channels=dims),
    positional_encoding=dict(num_feats=dims // 2),
    encoder=dict(
        _delete_=True,
        num_layers=6,
        layer_cfg=dict(self_attn_cfg=attention_cfg, ffn_cfg=ffn_cfg),
    ),
    decoder=dict(
        _delete_=True,
        num_layers=3,
        return_intermediate=True,
        layer_cfg=dict(
            self_attn_cfg=dict(embed_dims=dims, num_heads=8, dropout=0.0),
            cross_attn_cfg=attention_cfg,
            ffn_cfg=ffn_cfg,
        ),
        post_norm_cfg=None,
    ),
    bbox_head=dict(num_classes=len(classes), embed_dims=dims),
)
custom_hooks = [dict(type='FusedAttentionHook')]

data_root = 'data/details/'
metainfo = dict(classes=classes)
image_size = (96, 96)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=image_size, keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=image_size, keep_ratio=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
train_dataloader = dict(
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=train_pipeline)
)
val_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
test_evaluator = val_evaluator

max_epochs = 8
train_cfg = dict(max_epochs=max_epochs, val_interval=2)
default_hooks = dict(checkpoint=dict(type='SafeCheckpointHook', max_keep_ckpts=1))
optim_wrapper = dict(optimizer=dict(fused=True))  # one pass over all parameters
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', T_max=max_epochs, eta_min=1e-6, convert_to_iter_based=True),
]
