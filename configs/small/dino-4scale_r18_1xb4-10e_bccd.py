# A stock DINO on blood cells at a quarter of their size: the teacher of the warm start in
# docs/checkpoints.md. It is small enough to be trained on one CPU core in minutes.
_base_ = '../_base_/dino-4scale_r18_1xb4-24e_bccd.py'

num_queries = 60
model = dict(
    num_queries=num_queries,
    encoder=dict(num_layers=2),
    decoder=dict(num_layers=2),
    dn_cfg=dict(group_cfg=dict(num_dn_queries=20)),
    test_cfg=dict(max_per_img=num_queries),
)
custom_hooks = [dict(type='FusedAttentionHook')]

image_size = (120, 160)
train_pipeline = _base_.train_pipeline
train_pipeline[2].scale = image_size
train_pipeline[3] = dict(type='RandomFlip', prob=0.5)
test_pipeline = _base_.test_pipeline
test_pipeline[2].scale = image_size
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=8, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

max_epochs = 10
train_cfg = dict(max_epochs=max_epochs, val_interval=1)
optim_wrapper = dict(optimizer=dict(lr=3e-4))
param_scheduler = _base_.param_scheduler
param_scheduler[1].T_max = max_epochs
