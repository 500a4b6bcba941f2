_base_ = 'mmdet::grounding_dino/grounding_dino_swin-t_finetune_16xb2_1x_coco.py'
custom_imports = dict(imports=['mmlite'])
model = dict(type='LiteGroundingDINO', encoder=dict(schedule='H3L1-(2+1)x3'))
# The stock weights that MMDetection fine-tunes are copied and fitted; see docs/checkpoints.md.
load_from = None
custom_hooks = [
    dict(
        type='WarmStartHook',
        checkpoint='https://download.openmmlab.com/mmdetection/v3.0/grounding_dino/groundingdino_swint_ogc_mmdet-822d7e9d.pth',
    )
]
