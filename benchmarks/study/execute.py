"""Runs of a plan in processes pinned to cores, each of them once."""

from __future__ import annotations

import json
import os
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pprint import pformat
from typing import Any

from mmengine.config import Config

from mmlite.analysis.timing import Start
from mmlite.datasets import STYLES, generate_shapes
from mmlite.openmmlab.distillation import distillation_config

from .plan import Data, Plan, Run, fingerprint
from .run import CONFIG, PROGRESS, RESULT, WEIGHTS

_LOG = 'log.txt'


@dataclass
class Study:
    """A plan and the folder of its results."""

    plan: Plan
    folder: Path
    configs: dict[Run, Config] = field(default_factory=dict)

    def folder_of(self, run: Run) -> Path:
        return self.folder / run.name

    def check(self) -> None:
        """Read every config and look for every data set, before anything is run.

        Raises:
            FileNotFoundError: A config, a data set or one of its files is missing.
            ValueError: A config does not fit a study, or a run was made with another one.
        """
        for run in self.plan.runs:
            self.configs[run] = self.plan.config(run)
        for data in self.plan.data.values():
            if data.root is None:
                continue
            run = next(run for run in self.plan.runs if run.data is data)
            for file in _files(self.configs[run], data.root):
                if not file.exists():
                    raise FileNotFoundError(
                        f'data set {data.name} of plan {self.plan.path} is not there: {file} does '
                        f'not exist; put it there or name its folder with --data {data.name}=FOLDER'
                    )
        for run in self.plan.runs:
            if 'max_epochs' not in self.configs[run].train_cfg:
                raise ValueError(
                    f'{self.plan.config_reference(run)} does not train by epochs, as a study needs '
                    'it to resume; set train_cfg.max_epochs'
                )
            self.result(run)

    def result(self, run: Run) -> dict | None:
        """What a finished run found.

        Raises:
            ValueError: It was made with another config than the plan's.
        """
        path = self.folder_of(run) / RESULT
        if not path.is_file():
            return None
        result = json.loads(path.read_text())
        config = self.configs.get(run) or self.plan.config(run)
        self.configs[run] = config
        if result['fingerprint'] != fingerprint(config):
            raise ValueError(
                f'{path} was made with another config than the plan has now; remove that folder to '
                'run it again, or give the plan another name'
            )
        return result

    def results(self) -> dict[Run, dict]:
        """The finished runs, those without a finite loss among them."""
        found = {run: self.result(run) for run in self.plan.runs}
        return {run: result for run, result in found.items() if result is not None}

    def prepare(self, run: Run) -> Path:
        """Write the complete config of a run into its folder."""
        folder = self.folder_of(run)
        folder.mkdir(parents=True, exist_ok=True)
        config = Config(self.configs[run].to_dict())
        study = {
            'plan': self.plan.name,
            'data': run.data.name,
            'row': run.row.name,
            'seed': run.seed,
            'fingerprint': fingerprint(self.configs[run]),
        }
        _place(config, self.data_root(run.data))
        hooks = list(config.get('custom_hooks') or ())
        checkpoint = {'type': 'SafeCheckpointHook', 'interval': 1, 'max_keep_ckpts': 1}
        source = self.waits_for(run)
        weights = str((self.folder_of(source) / WEIGHTS).resolve()) if source else None
        if run.row.warm_start:
            hooks.append({'type': 'WarmStartHook', 'checkpoint': weights})
        elif run.row.evaluate:
            study['evaluate'] = weights
        elif run.row.convert:
            config = _conversion(config, weights)
            hooks += config.custom_hooks
            checkpoint = config.default_hooks.checkpoint.to_dict()
        config.merge_from_dict(
            {
                'study': study,
                'work_dir': str(folder),
                'resume': True,
                'load_from': None,
                'log_level': 'WARNING',
                'randomness': {'seed': run.seed},
                'default_hooks': {'checkpoint': {'_delete_': True, **checkpoint}},
            }
        )
        config.custom_hooks = hooks
        # mmengine's own dump takes seconds to format them.
        entries = config.to_dict().items()
        lines = [
            f'{name} = {pformat(value, width=99, sort_dicts=False)}' for name, value in entries
        ]
        (folder / CONFIG).write_text('\n'.join(lines) + '\n')
        return folder

    def data_root(self, data: Data) -> Path:
        """Where a data set lies; those that are drawn, in the folder of the study."""
        return data.root or self.folder / 'data' / data.name

    def draw(self, start: Start) -> None:
        """Draw the data sets that are not there yet."""
        for data in self.plan.data.values():
            if data.draw is None:
                continue
            root = self.data_root(data)
            done = root / 'drawn.json'
            if done.is_file() and json.loads(done.read_text()) == dict(data.draw):
                continue
            splits = {split: data.draw[split] for split in ('train', 'val')}
            generate_shapes(
                root,
                splits,
                image_size=data.draw['image_size'],
                seed=data.draw['seed'],
                progress=start(f'drawing {data.name}', sum(splits.values())),
                style=STYLES[data.draw['style']],
            )
            done.write_text(json.dumps(dict(data.draw)))

    def waits_for(self, run: Run) -> Run | None:
        """The run whose weights a run starts from."""
        source = run.row.source
        return None if source is None else Run(run.data, self.plan.rows[source], run.seed)


def execute(
    study: Study,
    jobs: int,
    start: Start,
    on_end: Callable[[Run, dict | None, str], None],
    gpus: int = 0,
) -> bool:
    """Run what is not finished.

    Args:
        study (Study): The plan, checked.
        jobs (int): Processes at a time, each on a core of its own.
        start (Start): Shows progress, in hundredths of a run.
        on_end (Callable): Told of each run that ended, its result and, where there is none, why.
        gpus (int): Devices of each run, through torchrun; 0 for runs on a CPU core.

    Returns:
        bool: Whether every run has a result now.

    Raises:
        OSError: The folder of the study cannot be written.
    """
    study.draw(start)
    finished = study.results()
    waiting = [run for run in study.plan.runs if run not in finished]
    step = start('training', max(1, 100 * len(waiting)))
    free: list[int | None] = list(_cores())[:jobs] if not gpus else [None]
    running: dict[Run, _Process] = {}
    events: queue.Queue[tuple[Run, str | None]] = queue.Queue()
    complete = True
    try:
        while waiting or running:
            for run in list(waiting):
                teacher = study.waits_for(run)
                if not free:
                    break
                if teacher is not None and teacher in (*waiting, *running):
                    continue
                waiting.remove(run)
                if teacher is not None and not (study.folder_of(teacher) / WEIGHTS).is_file():
                    complete = False
                    on_end(run, None, f'{teacher.title} left no weights to start from')
                    continue
                running[run] = _Process(study.prepare(run), free.pop(0), gpus)
                running[run].listen(run, events)
            if not running:
                break
            run, line = events.get()
            if line is not None:
                running[run].advance(line, run.title, step)
                continue
            process = running.pop(run)
            free.append(process.core)
            process.end(step)
            result = study.result(run)
            complete &= result is not None
            on_end(run, result, '' if result else process.why())
    finally:
        for process in running.values():
            process.kill()
    return complete


class _Process:
    def __init__(self, folder: Path, core: int | None, gpus: int) -> None:
        self.core, self.folder, self.percent = core, folder, 0
        command = [sys.executable, '-m']
        if gpus:
            command += ['torch.distributed.run', '--standalone', f'--nproc-per-node={gpus}', '-m']
        command += [f'{__package__}.run', str(folder)]
        command += ['--launcher', 'pytorch'] if gpus else ['--core', str(core)]
        threads = {} if gpus else {'OMP_NUM_THREADS': '1'}
        with (folder / _LOG).open('a') as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **threads, 'PYTHONPATH': os.pathsep.join(sys.path)},
            )

    def listen(self, run: Run, events: queue.Queue) -> None:
        def read() -> None:
            for line in self.process.stdout:
                if line.startswith(PROGRESS):
                    events.put((run, line))
            self.process.wait()
            events.put((run, None))

        threading.Thread(target=read, daemon=True).start()

    def advance(self, line: str, title: str, step: Callable[..., None]) -> None:
        _, share, note = line.split(maxsplit=2)
        while self.percent < min(100, int(100 * float(share))):
            self.percent += 1
            step(f'{title}: {note.strip()}')

    def end(self, step: Callable[..., None]) -> None:
        for _ in range(self.percent, 100):
            step()

    def why(self) -> str:
        """The last line that the process wrote."""
        lines = (self.folder / _LOG).read_text().strip().splitlines()
        last = lines[-1].strip() if lines else f'ended with {self.process.returncode}'
        return f'{last} (more in {self.folder / _LOG})'

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def _cores() -> Sequence[int]:
    if hasattr(os, 'sched_getaffinity'):
        return sorted(os.sched_getaffinity(0))
    return range(os.cpu_count() or 1)


def _innermost(dataset: dict) -> dict:
    return _innermost(dataset['dataset']) if 'dataset' in dataset else dataset


def _files(config: Config, root: Path) -> list[Path]:
    """What has to be there for training and evaluation."""
    found = []
    for split in ('train', 'val'):
        dataset = _innermost(config[f'{split}_dataloader'].dataset)
        found += [root / dataset.ann_file, root / dataset.data_prefix.img]
    return found


def _conversion(config: Config, teacher: str) -> Config:
    """Training without labels on the same images, evaluated at each quarter."""
    data, how = _innermost(config.train_dataloader.dataset), config.convert
    root = Path(data.data_root)
    listed = json.loads((root / data.ann_file).read_text())['images']
    files = [root / data.data_prefix.img / image['file_name'] for image in listed]
    result = distillation_config(config, teacher, files, how.iterations, how.batch_size)
    for name in ('val_cfg', 'val_dataloader', 'val_evaluator'):
        result[name] = config[name]
    result.train_cfg.val_interval = -(-how.iterations // 4)
    return result


def _place(config: Config, root: Path) -> None:
    """Tell a config where its data lies."""
    root = root.resolve()
    for split in ('train', 'val', 'test'):
        dataset = _innermost(config[f'{split}_dataloader'].dataset)
        dataset.data_root = str(root)
        if split != 'train':
            config[f'{split}_evaluator'].ann_file = str(root / dataset.ann_file)


def unfinished(study: Study) -> dict[str, Any]:
    """Progress of runs that have begun and not ended, by their names: the epoch they reached."""
    found = {}
    for run in study.plan.runs:
        folder = study.folder_of(run)
        if (folder / RESULT).is_file():
            continue
        epochs = [re.search(r'(\d+)', path.stem) for path in folder.glob('epoch_*.pth')]
        if epochs:
            found[run.title] = max(int(match[1]) for match in epochs)
    return found
