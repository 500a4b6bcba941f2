# The small detector that `mmlite demo --full` trains from scratch on a CPU.
_base_ = '../_base_/dino-4scale_r18_1xb8-14e_shapes.py'

model = dict(type='LiteDINO', encoder=dict(schedule='H3L1-(3+1)x1'), decoder=dict(key_aware=True))
