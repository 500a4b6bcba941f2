# DDQ-DETR as small as the demo's detector, on the same shapes.
_base_ = './lite-dino-4scale_r18_h3l1-3p1x1_1xb8-14e_shapes.py'

model = dict(
    type='LiteDDQDETR',
    dense_topk_ratio=1.5,
    dqs_cfg=dict(type='nms', iou_threshold=0.8),
    bbox_head=dict(type='DDQDETRHead'),
)
