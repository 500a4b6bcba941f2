# The baseline of H-Deformable-DETR: the same model and training without the one-to-many branch.
_base_ = 'h-deformable-detr_swin-t_8xb2-36e_coco.py'

model = dict(num_one2many_queries=0)
