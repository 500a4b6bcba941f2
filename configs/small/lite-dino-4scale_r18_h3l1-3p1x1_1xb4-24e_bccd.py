_base_ = '../_base_/dino-4scale_r18_1xb4-24e_bccd.py'
model = dict(type='LiteDINO', encoder=dict(schedule='H3L1-(3+1)x1'), decoder=dict(key_aware=True))
