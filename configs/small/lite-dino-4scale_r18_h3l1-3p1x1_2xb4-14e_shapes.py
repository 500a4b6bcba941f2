# The demo's detector on two processes (DDP), each with half of every batch: on two GPUs, or on CPUs
# through gloo.
_base_ = './lite-dino-4scale_r18_h3l1-3p1x1_1xb8-14e_shapes.py'
custom_imports = dict(imports=['mmlite', 'mmlite.openmmlab.gloo'])

train_dataloader = dict(batch_size=4)
# MMEngine asks for a CUDA device by default; this takes the one that the model is on.
model_wrapper_cfg = dict(type='MMDistributedDataParallel', broadcast_buffers=False, device_ids=None)
