# The same with DeepSpeed's ZeRO, stage 2: gradients and optimizer states are shared out.
_base_ = './lite-dino-4scale_r18_h3l1-3p1x1_2xb4-14e_shapes.py'

runner_type = 'FlexibleRunner'
strategy = dict(
    type='DeepSpeedStrategy',
    zero_optimization=dict(stage=2),
    gradient_clipping=1.0,  # the optimizer wrapper's clip_grad is not for DeepSpeed
    train_micro_batch_size_per_gpu=4,
)
optim_wrapper = dict(
    _delete_=True,
    type='DeepSpeedOptimWrapper',
    optimizer=dict(type='AdamW', lr=4e-4, weight_decay=1e-4),
)
