_base_ = 'mmdet::mm_grounding_dino/coco/grounding_dino_swin-t_finetune_16xb4_1x_coco.py'
custom_imports = dict(imports=['mmlite'])
model = dict(type='LiteGroundingDINO', encoder=dict(schedule='H3L1-(2+1)x3'))
# The stock weights that MMDetection fine-tunes are copied and fitted; see docs/checkpoints.md.
load_from = None
custom_hooks = [
    dict(
        type='WarmStartHook',
        checkpoint='https://download.openmmlab.com/mmdetection/v3.0/mm_grounding_dino/grounding_dino_swin-t_pretrain_obj365_goldg_grit9m_v3det/grounding_dino_swin-t_pretrain_obj365_goldg_grit9m_v3det_20231204_095047-b448804b.pth',
    )
]
