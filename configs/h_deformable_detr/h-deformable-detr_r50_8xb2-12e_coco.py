_base_ = 'mmdet::deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco.py'
custom_imports = dict(imports=['mmlite'])

# Dropout 0 and wide FFNs in the encoder and the decoder.
ffn_cfg = dict(feedforward_channels=2048, ffn_drop=0.0)
model = dict(
    type='HDeformableDETR',
    num_one2many_queries=1500,
    neck=dict(bias=True),
    encoder=dict(layer_cfg=dict(self_attn_cfg=dict(dropout=0.0), ffn_cfg=ffn_cfg)),
    decoder=dict(
        layer_cfg=dict(
            self_attn_cfg=dict(dropout=0.0), cross_attn_cfg=dict(dropout=0.0), ffn_cfg=ffn_cfg
        )
    ),
    bbox_head=dict(type='HDeformableDETRHead', one2many_repeats=6, one2many_weight=1.0),
)

max_epochs = 12
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [
    dict(type='MultiStepLR', begin=0, end=max_epochs, by_epoch=True, milestones=[11], gamma=0.1)
]
# 8 GPUs x 2 images
auto_scale_lr = dict(base_batch_size=16)
