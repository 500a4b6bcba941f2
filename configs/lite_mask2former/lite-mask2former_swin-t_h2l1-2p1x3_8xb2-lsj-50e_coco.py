_base_ = 'mmdet::mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco.py'
custom_imports = dict(imports=['mmlite'])
model = dict(
    panoptic_head=dict(
        pixel_decoder=dict(
            type='LiteMSDeformAttnPixelDecoder', encoder=dict(schedule='H2L1-(2+1)x3')
        )
    )
)
