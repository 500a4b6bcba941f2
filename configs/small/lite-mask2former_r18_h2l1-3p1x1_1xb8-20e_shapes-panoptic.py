# The small segmenter on shapes with the background as a class of its own: panoptic segmentation.
# `mmlite.datasets.generate_panoptic` writes the annotations; panopticapi has to be installed.
_base_ = './lite-mask2former_r18_h2l1-3p1x1_1xb8-20e_shapes.py'

things = _base_.classes
stuff = ('background',)
num_classes = len(things) + len(stuff)
model = dict(
    # Padding is of no class.
    data_preprocessor=dict(pad_seg=True, seg_pad_value=255),
    panoptic_head=dict(
        num_stuff_classes=len(stuff),
        loss_cls=dict(class_weight=[1.0] * num_classes + [0.1]),
    ),
    panoptic_fusion_head=dict(num_stuff_classes=len(stuff)),
    test_cfg=dict(panoptic_on=True),
)

data_root = _base_.data_root
metainfo = dict(classes=things + stuff, thing_classes=things, stuff_classes=stuff)
load_annotations = dict(type='LoadPanopticAnnotations')
train_pipeline = _base_.train_pipeline
train_pipeline[1] = load_annotations
load_image, _, resize, pack = _base_.test_pipeline
test_pipeline = [load_image, resize, load_annotations, pack]
del load_annotations, load_image, resize, pack, _
train_dataloader = dict(
    dataset=dict(
        type='CocoPanopticDataset',
        metainfo=metainfo,
        ann_file='annotations/panoptic_train.json',
        data_prefix=dict(img='train/', seg='annotations/panoptic_train/'),
        pipeline=train_pipeline,
    )
)
val_dataloader = dict(
    dataset=dict(
        type='CocoPanopticDataset',
        metainfo=metainfo,
        ann_file='annotations/panoptic_val.json',
        data_prefix=dict(img='val/', seg='annotations/panoptic_val/'),
        pipeline=test_pipeline,
    )
)
test_dataloader = val_dataloader
val_evaluator = dict(
    _delete_=True,
    type='CocoPanopticMetric',
    ann_file=data_root + 'annotations/panoptic_val.json',
    seg_prefix=data_root + 'annotations/panoptic_val/',
    nproc=1,
)
test_evaluator = val_evaluator
