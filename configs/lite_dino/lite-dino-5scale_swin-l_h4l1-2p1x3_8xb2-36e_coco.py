_base_ = 'mmdet::dino/dino-5scale_swin-l_8xb2-36e_coco.py'
custom_imports = dict(imports=['mmlite'])
model = dict(type='LiteDINO', encoder=dict(schedule='H4L1-(2+1)x3'))
