_base_ = '../h_deformable_detr/h-deformable-detr_r50_8xb2-36e_coco.py'

model = dict(type='LiteHDeformableDETR', encoder=dict(schedule='H3L1-(2+1)x3'))
