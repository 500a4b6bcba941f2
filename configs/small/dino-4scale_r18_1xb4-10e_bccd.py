# A stock DINO on blood cells at a quarter of their size: the teacher of the warm start in
# docs/checkpoints.md. It is small enough to be trained on one CPU core in minutes.
_base_ = 'lite-dino-4scale_r18_h3l1-3p1x1_1xb4-24e_bccd.py'

num_queries = 60
ffn_cfg = dict(embed_dims=256, feedforward_channels=512, ffn_drop=0.0)
attention_cfg = dict(embed_dims=256, num_levels=4, dropout=0.0)
model = dict(
    type='DINO',
    num_queries=num_queries,
    encoder=dict(
        _delete_=True,
        num_layers=2,
        layer_cfg=dict(self_attn_cfg=attention_cfg, ffn_cfg=ffn_cfg),
    ),
    decoder=dict(
        _delete_=True,
        num_layers=2,
        return_intermediate=True,
        layer_cfg=dict(
            self_attn_cfg=dict(embed_dims=256, num_heads=8, dropout=0.0),
            cross_attn_cfg=attention_cfg,
            ffn_cfg=ffn_cfg,
        ),
        post_norm_cfg=None,
    ),
    dn_cfg=dict(group_cfg=dict(num_dn_queries=20)),
    test_cfg=dict(max_per_img=num_queries),
)
custom_hooks = [dict(type='FusedAttentionHook')]

image_size = (120, 160)
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
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=8, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

max_epochs = 10
train_cfg = dict(max_epochs=max_epochs, val_interval=1)
optim_wrapper = dict(optimizer=dict(lr=3e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', T_max=max_epochs, eta_min=1e-6, convert_to_iter_based=True),
]
