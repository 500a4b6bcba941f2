"""One run of a study, in a process of its own: ``python -m benchmarks.study.run FOLDER``.

The folder holds ``config.py``, complete. The process trains, goes on from the last checkpoint where
there is one, and leaves ``result.json`` and ``weights.pth``. Random numbers are drawn anew each
epoch from the seed and the epoch, so that a run that was killed ends where it would have.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULT = 'result.json'
CONFIG = 'config.py'
WEIGHTS = 'weights.pth'
PROGRESS = '@progress'  # starts the lines that say how far it is


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('folder', type=Path)
    parser.add_argument('--core', type=int)
    parser.add_argument('--launcher', default='none')
    options = parser.parse_args()
    if options.core is not None and hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, {options.core})  # before torch counts the cores
    if options.launcher == 'none':
        threading.Thread(target=_end_with_parent, daemon=True).start()
    progress, sys.stdout = sys.stdout, sys.stderr  # what the stack prints goes to the log
    warnings.filterwarnings('ignore')

    def report(share: float, note: str) -> None:
        print(PROGRESS, f'{share:.4f}', note, file=progress, flush=True)

    train(options.folder, options.launcher, report)


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def train(
    folder: Path,
    launcher: str = 'none',
    report: Callable[[float, str], None] = lambda share, note: None,
) -> None:
    """Train what ``config.py`` says and write ``result.json``.

    Args:
        folder (Path): The run's folder.
        launcher (str): mmengine's, for a run on several devices.
        report (Callable): Told the share that is done and the loss.
    """
    import torch
    from mmengine.config import Config
    from mmengine.dist import is_main_process
    from mmengine.runner import Runner

    from mmlite.openmmlab.checkpoints.hooks import AtomicBackend
    from mmlite.openmmlab.runner import unwrapped

    from .record import NonFiniteLoss, Recorder

    if not torch.cuda.is_available():
        torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 1)))
    config = Config.fromfile(folder / CONFIG)
    facts = config.study.to_dict()
    config.launcher = launcher
    runner = Runner.from_cfg(config)
    recorder = Recorder(facts['seed'], report)
    runner.register_hook(recorder, priority='VERY_LOW')
    problem = None
    try:
        if 'evaluate' in facts:
            runner.load_checkpoint(facts.pop('evaluate'))
            runner.val()
        else:
            runner.train()
    except NonFiniteLoss as error:
        problem = str(error)
    if not is_main_process():
        return
    model = unwrapped(runner)
    result = {**facts, 'finite': problem is None, 'problem': problem, **recorder.result()}
    result.update(_cost(getattr(model, 'student', model), config))
    write = AtomicBackend().put
    if problem is None:
        torch.save({'state_dict': model.state_dict()}, folder / f'.{WEIGHTS}')
        os.replace(folder / f'.{WEIGHTS}', folder / WEIGHTS)
    lines = [f'{json.dumps(name)}: {json.dumps(value)}' for name, value in result.items()]
    write(('{\n' + ',\n'.join(lines) + '\n}\n').encode(), folder / RESULT)
    # With the optimiser's state, which nothing needs any more.
    for outdated in [*folder.glob('*_*.pth'), folder / 'last_checkpoint']:
        outdated.unlink(missing_ok=True)


def _cost(model: Any, config: Any) -> dict:
    from mmlite.analysis.complexity import count_detector
    from mmlite.analysis.timing import describe_machine

    device = next(model.parameters()).device
    cost = count_detector(model, tuple(config.get('image_size', (800, 1333))))
    return {
        'gflops': cost.flops / 1e9,
        'encoder_gflops': cost.stage_flops['encoder'] / 1e9,
        'params': cost.params,
        'machine': describe_machine(device),
    }


if __name__ == '__main__':
    main()
