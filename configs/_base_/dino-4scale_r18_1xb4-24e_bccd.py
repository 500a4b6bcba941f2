# The small DINO on blood cells (BCCD) at half their size: a real data set that a CPU can train on.
# Point DATA_ROOT at the folder that holds annotations/ and images/, or put it at data/bccd.
_base_ = './dino-4scale_r18_1xb8-14e_shapes.py'

classes = ('RBC', 'WBC', 'Platelets')
num_queries = 100
model = dict(
    num_queries=num_queries,
    bbox_head=dict(num_classes=len(classes)),
    dn_cfg=dict(group_cfg=dict(num_dn_queries=30)),
    test_cfg=dict(max_per_img=num_queries),
)

data_root = '{{$DATA_ROOT:data/bccd/}}'
metainfo = dict(classes=classes)
image_size = (240, 320)
train_pipeline = _base_.train_pipeline
train_pipeline[2].scale = image_size
train_pipeline[3] = dict(
    type='RandomFlip', prob=[0.25, 0.25, 0.25], direction=['horizontal', 'vertical', 'diagonal']
)
test_pipeline = _base_.test_pipeline
test_pipeline[2].scale = image_size
data = dict(data_root=data_root, metainfo=metainfo, data_prefix=dict(img='images/'))
train_dataloader = dict(batch_size=4, dataset=dict(pipeline=train_pipeline, **data))
val_dataloader = dict(batch_size=4, dataset=dict(pipeline=test_pipeline, **data))
del data
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + '/annotations/instances_val.json')
test_evaluator = val_evaluator

max_epochs = 24
train_cfg = dict(max_epochs=max_epochs, val_interval=4)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
optim_wrapper = dict(optimizer=dict(lr=2e-4))
param_scheduler = _base_.param_scheduler
param_scheduler[1].T_max = max_epochs
auto_scale_lr = dict(base_batch_size=4)
