_base_ = 'mmdet::ddq/ddq-detr-4scale_r50_8xb2-12e_coco.py'
custom_imports = dict(imports=['mmlite'])
model = dict(type='LiteDDQDETR', encoder=dict(schedule='H2L2-(2+1)x3'))
