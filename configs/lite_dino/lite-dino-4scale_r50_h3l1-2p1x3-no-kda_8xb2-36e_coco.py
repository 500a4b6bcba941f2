_base_ = './lite-dino-4scale_r50_h3l1-2p1x3_8xb2-36e_coco.py'
model = dict(encoder=dict(key_aware=False))
