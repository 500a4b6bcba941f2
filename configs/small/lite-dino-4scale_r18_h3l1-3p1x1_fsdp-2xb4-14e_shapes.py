# The same with FSDP: each process keeps half of the parameters, gradients and optimizer states. On
# CPUs, add strategy.model_wrapper.device_id=cpu to --cfg-options.
_base_ = './lite-dino-4scale_r18_h3l1-3p1x1_2xb4-14e_shapes.py'

runner_type = 'FlexibleRunner'
strategy = dict(
    type='FSDPStrategy',
    model_wrapper=dict(type='MMFullyShardedDataParallel', use_orig_params=True),
    # One file, like that of any other training. The short form, 'full', also moves it to the CPU,
    # which ends in a crash where it is there already.
    state_dict_cfg=dict(
        state_dict_type='FULL_STATE_DICT',
        state_dict_config=dict(type='FullStateDictConfig', rank0_only=True),
        optim_state_dict_config=dict(type='FullOptimStateDictConfig', rank0_only=True),
    ),
)
