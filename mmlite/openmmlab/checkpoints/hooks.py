"""A warm start as an entry of a config."""

from __future__ import annotations

from mmengine.dist import broadcast, is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import CheckpointLoader, Runner

from .official import unpack
from .warm_start import warm_start


class WarmStartHook(Hook):
    """Starts the training of a Lite detector from trained weights of its stock detector.

    ::

        custom_hooks = [dict(type='WarmStartHook', checkpoint='dino_r50.pth')]

    What is new in the Lite detector is fitted on the first training batch; see
    :func:`mmlite.openmmlab.checkpoints.warm_start`. A training that is resumed is left as it is.

    Args:
        checkpoint (str): Path or URL of the stock detector's checkpoint, in MMDetection's layout.
    """

    priority = 'VERY_HIGH'

    def __init__(self, checkpoint: str) -> None:
        # Read at once, so that a wrong path is reported before anything is built.
        self.state, _ = unpack(CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu'))

    def before_train(self, runner: Runner) -> None:
        """Fill in the weights, after mmengine has initialised or resumed the model.

        Args:
            runner (Runner): The runner.

        Raises:
            ValueError: The checkpoint is not of the stock detector behind the runner's model.
        """
        if runner.iter > 0:
            return
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if is_main_process():
            data = model.data_preprocessor(next(iter(runner.train_dataloader)))
            report = warm_start(model, runner.cfg.model, self.state, data)
            runner.logger.info(f'Warm start: {report}')
        for value in model.state_dict().values():
            broadcast(value)
        self.state = None
