_base_ = 'mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py'
custom_imports = dict(imports=['mmdet.models', 'mmlite'])
model = dict(
    decode_head=dict(
        pixel_decoder=dict(
            type='mmdet.LiteMSDeformAttnPixelDecoder', encoder=dict(schedule='H2L1-(2+1)x3')
        )
    )
)
