"""Two training steps of several models by the processes that torchrun has started.

``torchrun --nproc-per-node 2 train_together.py CONFIG ...`` says of each config that its model was
trained. DDP waits for the gradient of every parameter, and refuses the second step where one did
not come.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from torch import distributed
from torch.nn.utils import parameters_to_vector

from mmlite.openmmlab.families import reads_text


def batch(rank: int, model: torch.nn.Module) -> dict:
    """An image, another one in each process."""
    packed = demo_mm_inputs(
        1, [(3, 64, 96)], num_items=[3], num_classes=4, with_mask=True, with_semantic=True
    )
    packed['inputs'] = [image // (1 + rank) for image in packed['inputs']]
    if reads_text(model):
        text = ('red circle', 'green circle', 'blue square', 'red square')
        packed['data_samples'][0].set_metainfo(dict(text=text, custom_entities=True))
    return packed


def main(paths: list[str]) -> None:
    """Train the model of each config."""
    distributed.init_process_group('gloo')
    rank = distributed.get_rank()
    for path in paths:
        register_all_modules()
        torch.manual_seed(0)
        model = MODELS.build(Config.fromfile(path).model)
        model.init_weights()
        before = parameters_to_vector(model.parameters()).detach().clone()
        ddp = MMDistributedDataParallel(model.train(), device_ids=None, broadcast_buffers=False)
        optimizer = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1e-3))
        for _ in range(2):
            ddp.train_step(batch(rank, model), optimizer)
        weights = parameters_to_vector(model.parameters()).detach()
        assert not torch.equal(weights, before)
        everybody = [torch.empty_like(weights) for _ in range(distributed.get_world_size())]
        distributed.all_gather(everybody, weights)
        assert all(torch.equal(each, weights) for each in everybody), path
        if rank == 0:
            print(f'trained {Path(path).stem}', flush=True)
    distributed.destroy_process_group()


if __name__ == '__main__':
    main(sys.argv[1:])
