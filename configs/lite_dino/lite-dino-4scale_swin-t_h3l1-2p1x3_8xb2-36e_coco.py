_base_ = '../dino/dino-4scale_swin-t_8xb2-36e_coco.py'
custom_imports = dict(imports=['mmlite'])
model = dict(type='LiteDINO', encoder=dict(schedule='H3L1-(2+1)x3'))
