_base_ = '../dino/dino-4scale_convnext-t_8xb2-12e_coco.py'
custom_imports = dict(imports=['mmlite', 'mmpretrain.models'])
model = dict(type='LiteDINO', encoder=dict(schedule='H3L1-(2+1)x3'))
