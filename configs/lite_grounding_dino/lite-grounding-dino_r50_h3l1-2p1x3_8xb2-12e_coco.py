_base_ = 'mmdet::grounding_dino/grounding_dino_r50_scratch_8xb2_1x_coco.py'
custom_imports = dict(imports=['mmlite'])
model = dict(type='LiteGroundingDINO', encoder=dict(schedule='H3L1-(2+1)x3'))
