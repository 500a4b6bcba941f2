# The same detector on blood cells (BCCD) at a fifth of their size.
_base_ = './dino-4scale_r18_1xb8-8e_details.py'

classes = ('RBC', 'WBC', 'Platelets')
num_queries = 60  # an image holds up to 30 cells
model = dict(
    num_queries=num_queries,
    dn_cfg=dict(group_cfg=dict(num_dn_queries=30)),
    test_cfg=dict(max_per_img=num_queries),
)

data_root = 'data/bccd/'
metainfo = dict(classes=classes)
image_size = (96, 128)
train_pipeline = _base_.train_pipeline
train_pipeline[2].scale = image_size
train_pipeline[3] = dict(
    type='RandomFlip', prob=[0.25, 0.25, 0.25], direction=['horizontal', 'vertical', 'diagonal']
)
test_pipeline = _base_.test_pipeline
test_pipeline[2].scale = image_size
data = dict(data_root=data_root, metainfo=metainfo, data_prefix=dict(img='images/'))
train_dataloader = dict(dataset=dict(pipeline=train_pipeline, **data))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline, **data))
del data
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
test_evaluator = val_evaluator

max_epochs = 40
train_cfg = dict(max_epochs=max_epochs, val_interval=4)
param_scheduler = _base_.param_scheduler
param_scheduler[1].T_max = max_epochs
