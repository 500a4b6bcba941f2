# The detector of the study: DINO with six encoder layers, as in the paper, and everything else
# small enough for one CPU core. ResNet-18 at half width, 128 channels.
_base_ = '../../../configs/_base_/dino-4scale_r18_1xb8-14e_shapes.py'

custom_imports = dict(imports=['mmlite', 'benchmarks.study.narrow_dino'])

classes = ('stripes', 'checks', 'rim')
dims = 128
ffn_cfg = dict(embed_dims=dims, feedforward_channels=2 * dims)
layer_cfg = dict(
    self_attn_cfg=dict(embed_dims=dims), cross_attn_cfg=dict(embed_dims=dims), ffn_cfg=ffn_cfg
)
model = dict(
    type='NarrowDINO',
    neck=dict(out_channels=dims),
    positional_encoding=dict(num_feats=dims // 2),
    encoder=dict(
        num_layers=6, layer_cfg=dict(self_attn_cfg=dict(embed_dims=dims), ffn_cfg=ffn_cfg)
    ),
    decoder=dict(layer_cfg=layer_cfg),
    bbox_head=dict(num_classes=len(classes), embed_dims=dims),
)
custom_hooks = [dict(type='FusedAttentionHook')]

data_root = 'data/details/'
metainfo = dict(classes=classes)
image_size = (96, 96)
train_pipeline = _base_.train_pipeline
train_pipeline[2].scale = image_size
test_pipeline = _base_.test_pipeline
test_pipeline[2].scale = image_size
data = dict(data_root=data_root, metainfo=metainfo)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline, **data))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline, **data))
del data
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
test_evaluator = val_evaluator

max_epochs = 8
train_cfg = dict(max_epochs=max_epochs, val_interval=2)
default_hooks = dict(checkpoint=dict(type='SafeCheckpointHook', max_keep_ckpts=1))
optim_wrapper = dict(optimizer=dict(fused=True))  # one pass over all parameters
param_scheduler = _base_.param_scheduler
param_scheduler[1].T_max = max_epochs
