_base_ = 'dino-4scale_r18_1xb4-10e_bccd.py'
model = dict(type='LiteDINO', encoder=dict(schedule='H3L1-(2+1)x1'))
