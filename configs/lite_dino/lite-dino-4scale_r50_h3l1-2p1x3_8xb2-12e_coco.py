_base_ = 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'
custom_imports = dict(imports=['mmlite'])
model = dict(type='LiteDINO', encoder=dict(schedule='H3L1-(2+1)x3'))
