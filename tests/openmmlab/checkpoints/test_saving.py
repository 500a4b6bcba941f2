from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner, find_latest_checkpoint

from mmlite.openmmlab.checkpoints import load_checkpoint
from mmlite.openmmlab.checkpoints.hooks import AtomicBackend, SafeCheckpointHook

resource = pytest.importorskip('resource', reason='limits of file sizes are for Unix')


class Model(BaseModel):
    """A model whose checkpoint is larger than 4 kB, unlike everything else that is written."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1000))

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return {'loss': (self.weight - 1).square().sum()}


@contextmanager
def full_disk():
    """No file may grow beyond 4000 bytes, which fails as a full disk does: part of it is there."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def train(work_dir: Path, epochs: int) -> None:
    data = {'dataset': [{'inputs': torch.zeros(1)}] * 2, 'sampler': {'type': 'DefaultSampler'}}
    Runner(
        Model(),
        str(work_dir),
        train_dataloader={**data, 'batch_size': 1, 'num_workers': 0},
        train_cfg={'by_epoch': True, 'max_epochs': epochs},
        optim_wrapper={'optimizer': {'type': 'SGD', 'lr': 0.1}},
        default_hooks={'checkpoint': SafeCheckpointHook(interval=1, max_keep_ckpts=1)},
        resume=True,
        experiment_name=f'{work_dir.name}-{epochs}-{len(list(work_dir.glob("*")))}',
        log_level='ERROR',
    ).train()


def checkpoints(work_dir: Path) -> set[str]:
    return {path.name for path in work_dir.iterdir() if '.pth' in path.name}


def test_full_disk_leaves_the_previous_checkpoint(tmp_path):
    train(tmp_path, 1)
    with full_disk(), pytest.raises(OSError, match='too large'):
        train(tmp_path, 2)
    assert checkpoints(tmp_path) == {'epoch_1.pth'}
    assert find_latest_checkpoint(tmp_path) == str(tmp_path / 'epoch_1.pth')

    train(tmp_path, 3)
    assert checkpoints(tmp_path) == {'epoch_3.pth'}  # one is kept
    assert load_checkpoint(tmp_path / 'epoch_3.pth')['meta']['iter'] == 6


def test_overwriting_takes_all_or_nothing(tmp_path):
    backend, path = AtomicBackend(), tmp_path / 'folder/file'
    backend.put(b'old', path)
    with full_disk(), pytest.raises(OSError, match='too large'):
        backend.put(bytes(5000), path)
    assert path.read_bytes() == b'old'
    assert list(path.parent.iterdir()) == [path]
    backend.put(b'new', path)
    assert path.read_bytes() == b'new'
