_base_ = 'mmdet::deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco.py'
custom_imports = dict(imports=['mmlite'])
model = dict(type='LiteDeformableDETR', encoder=dict(schedule='H3L1-(6+1)x1'))
