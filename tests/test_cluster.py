"""Training by several processes on CPUs, and the faults that it goes on from."""

import os
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmdet_tools import TOOLS, run_python
from mmengine.config import Config
from small_detectors import small_model, write_pair

from mmlite.datasets import generate_shapes
from mmlite.openmmlab.checkpoints import load_checkpoint

ROOT = Path(__file__).parents[1]
SMALL = 'lite-dino-4scale_r18_h3l1-3p1x1_1xb8-14e_shapes.py'

HOOKS = """
import os
import signal
from pathlib import Path
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class SaveEachRank(Hook):
    def after_train(self, runner):
        torch.save(runner.model.module.state_dict(), f'{runner.work_dir}/rank{runner.rank}.pth')

@HOOKS.register_module()
class KilledOnce(Hook):
    '''The second process dies in the middle of the second epoch, without a word.'''

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        dead = Path(runner.work_dir, 'is_dead')
        if runner.rank == 1 and runner.iter == 2 and not dead.exists():
            dead.touch()
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A working directory with a tiny data set: two iterations an epoch for two processes."""
    folder = tmp_path_factory.mktemp('cluster')
    generate_shapes(folder / 'data/shapes', {'train': 8, 'val': 2})
    (folder / 'faults.py').write_text(HOOKS)
    return folder


def train(folder: Path, name: str, *settings: str, runner='CPURunner', restarts=0) -> str:
    """Train a small config with torchrun, as docs/cluster.md says, and give what it printed."""
    lines = (
        f'_base_ = {str(ROOT / "configs/small" / SMALL)!r}',
        f'runner_type = {runner!r}',
        "custom_imports = dict(imports=['mmlite', 'faults'])",
        'train_dataloader = dict(batch_size=2)',
        *settings,
    )
    (folder / f'{name}.py').write_text('\n'.join(lines))
    return run_python(
        *('-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2'),
        *(f'--max-restarts={restarts}', TOOLS / 'train.py', f'{name}.py'),
        *('--launcher', 'pytorch', '--work-dir', name, '--resume'),
        cwd=folder,
        PYTHONPATH=os.pathsep.join([str(folder), os.environ.get('PYTHONPATH', '')]),
        # Or a process that is started again may find the addresses of those that are gone.
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE='1',
    )


def test_two_processes_end_with_the_same_weights(folder):
    printed = train(
        folder,
        'ddp',
        'train_cfg = dict(max_epochs=1)',
        'auto_scale_lr = dict(enable=True)',
        'optim_wrapper = dict(accumulative_counts=2)',
        "custom_hooks = [dict(type='SaveEachRank')]",
    )
    assert 'Scaling the original LR by 0.5.' in printed  # batches of 2 x 2 where 8 are meant
    first, second = (load_checkpoint(folder / 'ddp' / f'rank{rank}.pth') for rank in (0, 1))
    differ = {name for name in first if not torch.equal(first[name], second[name])}
    # The running statistics of BatchNorm are each process's own; what is learned is shared.
    assert differ and all('running_' in name for name in differ)
    assert len(first.keys() - differ) > 100


@pytest.mark.slow
def test_two_processes_convert_an_elastic_encoder(folder, tmp_path):
    """In an iteration most of what only other schedules need gets no gradient."""
    schedules = ['H3L1-(2+1)x1', 'H3L1-(1+1)x2', 'H4L0-1234x2']
    resize = {'type': 'Resize', 'scale': (64, 64), 'keep_ratio': True}
    steps = [{'type': 'LoadImageFromFile'}, resize, {'type': 'PackDetInputs'}]
    changes = {'test_dataloader.dataset.pipeline': steps, 'train_dataloader.num_workers': 0}
    write_pair(tmp_path, 'DINO', **changes)
    torch.save(small_model('DINO', std=0.1).state_dict(), tmp_path / 'stock.pth')
    options = [f'model.encoder.elastic={schedules}'.replace(' ', '')]
    printed = run_python(
        *('-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2'),
        *('-m', 'mmlite.cli', 'convert', 'stock.pth', 'out.pth', '--from-stock', 'lite.py'),
        *('--images', folder / 'data/shapes/train', '--iterations', '3', '--batch-size', '2'),
        *('--cfg-options', *options),
        cwd=tmp_path,
    )
    assert 'Wrote out.pth' in printed
    content = torch.load(tmp_path / 'out.pth')
    assert sorted(content['meta']['distilled']['schedules']) == sorted(schedules)


@pytest.mark.slow
def test_goes_on_from_the_last_checkpoint_when_a_process_is_killed(folder):
    printed = train(
        folder,
        'killed',
        'train_cfg = dict(max_epochs=2, val_interval=3)',
        "custom_hooks = [dict(type='KilledOnce')]",
        restarts=3,
    )
    work_dir = folder / 'killed'
    assert (work_dir / 'is_dead').exists()
    assert 'resumed epoch: 1, iter: 2' in printed
    content = load_checkpoint(work_dir / 'epoch_2.pth')
    assert content['meta']['iter'] == 4
    assert len(content['message_hub']['log_scalars']['train/loss'].data[0]) == 4


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason='for CPUs')
def test_fsdp_saves_a_whole_model(folder):
    _, found, text = (ROOT / 'docs/cluster.md').read_text().partition('strategy = ')
    strategy = (found + text.partition('```')[0]).replace(
        'use_orig_params', "device_id='cpu', use_orig_params"
    )
    short = 'train_cfg = dict(max_epochs=1, val_interval=2)'
    train(folder, 'fsdp', short, strategy, runner='CPUFlexibleRunner')
    content = load_checkpoint(folder / 'fsdp/epoch_1.pth')
    assert content['meta']['iter'] == 2
    config = Config.fromfile(folder / 'fsdp.py', import_custom_modules=False)
    MODELS.build(config.model).load_state_dict(content['state_dict'])  # strict
