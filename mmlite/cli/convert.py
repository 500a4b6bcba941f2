"""``mmlite convert``: other people's checkpoints, and starting points from stock ones."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
from argparse import Namespace
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import click

from . import shared

# So many are worth learning from.
ENOUGH_IMAGES = 32
MODELS = click.Choice(['deformable-detr', 'h-deformable-detr', 'dino', 'lite-dino'])
CLASSES = "Turn the authors' 91 category slots into MMDetection's 80 classes and back, or keep all."
ITERATIONS = (
    'With --from-stock: updates of the Lite encoder; 0 fits it alone. Default: 400 with '
    f'{ENOUGH_IMAGES} images or more, otherwise 0.'
)


@click.command()
@click.argument('source', type=shared.PATH)
@click.argument('target', type=shared.PATH)
@click.option('--model', 'family', type=MODELS, help='Refuse a file of any other model.')
@click.option('--schedule', help="A Lite model's schedule, for example 'H3L1-(2+1)x3'.")
@shared.option('--classes', type=click.Choice(['coco', 'keep']), default='coco', help=CLASSES)
@click.option('--num-queries', type=int, help='Queries at inference, if the file does not say.')
@shared.flag('--ema', help='Take the averaged weights of the file.')
@shared.flag('--to-official', help="The way back: to the authors' layout.")
@click.option(
    *('--from-stock', 'lite_config'),
    metavar='CONFIG',
    help='Start the Lite detector of this config from a stock detector.',
)
@shared.images_option(
    help='With --from-stock: images or folders to learn from, without labels; can be repeated.'
)
@shared.count_option('--iterations', type=click.IntRange(0), help=ITERATIONS)
@shared.count_option('--batch-size', default=16, help='Images of an update, in each process.')
@shared.dataset_options('COCO annotations: measure AP of both detectors on the way.')
@shared.cfg_options
@shared.json_option
def convert(
    source: Path, target: Path, lite_config, files, cfg_options, json_path, **options
) -> None:
    """Convert a checkpoint of the original authors to MMDetection or back, or start from stock.

    SOURCE is a file of Deformable DETR, H-Deformable-DETR, DINO or Lite-DINO as their authors
    released it. TARGET gets the converted weights, and the file of the same name with .py the
    config that goes with them.

    With --from-stock, SOURCE holds trained weights of MMDetection's detector, and TARGET gets those
    of the Lite detector of CONFIG: what both have is copied, and the Lite encoder learns from the
    stock detector on any images. A command that was stopped goes on where it was. Several
    processes: torchrun --nproc-per-node N -m mmlite.cli convert ...

    \b
    Example:
      mmlite convert r50_s3ex3_50.4.pth lite_dino.pth --schedule 'H3L1-(2+1)x3'
      mim test mmdet lite_dino.py --checkpoint lite_dino.pth
      mmlite convert lite_dino.pth original_again.pth --to-official
      mmlite convert dino_r50.pth lite.pth --from-stock my_lite_dino.py --images train2017/
    """
    target = target if target.suffix else target.with_suffix('.pth')
    if target.suffix not in ('.pth', '.pt'):
        raise ValueError(f'{target} is no name of a checkpoint; let it end in .pth')
    if target.resolve() == source.resolve():
        raise ValueError(f'{target} is the source; give another name for the converted file')
    if not target.parent.is_dir():
        raise FileNotFoundError(f'{target.parent} does not exist; create the folder first')
    training = {name: options.pop(name) for name in ('iterations', 'batch_size', 'dataset')}
    if not (lite_config or files or cfg_options):
        report = _official(source, target, **options)
    elif any(options[name] for name in ('to_official', 'family', 'ema', 'num_queries')):
        raise ValueError(
            '--from-stock takes none of --to-official, --model, --ema and --num-queries'
        )
    elif not (lite_config and files):
        raise ValueError(
            'a Lite detector from a stock one needs the config of the Lite one, and images: '
            '--from-stock CONFIG --images FOLDER'
        )
    else:
        config = shared.read_config(lite_config, cfg_options)
        report = _from_stock(source, target, config, files, options['schedule'], **training)
    if report:  # of several processes, the first has one
        shared.write_json(json_path, {'source': str(source), **report})


def _official(source, target, to_official, family, schedule, classes, ema, num_queries) -> dict:
    """From the authors' layout to MMDetection's, or back; what became of every entry."""
    if to_official and (schedule or ema):
        raise ValueError('--to-official takes neither --schedule nor --ema; leave them out')
    import torch
    from mmdet.datasets import CocoDataset

    from ..openmmlab import checkpoints
    from ..openmmlab.checkpoints.official import FAMILIES

    checkpoint = checkpoints.load_checkpoint(source, allow=[Namespace])
    state, args = checkpoints.unpack(checkpoint, ema)
    written, config = [target], target.with_suffix('.py')
    if to_official:
        left = checkpoint.get('official', {}).get('left')
        done = checkpoints.to_official(state, family, classes == 'coco', left)
        content = {'model': done.state_dict}
        if done.schedule:  # under the names of the authors' own run arguments
            high, blocks = done.schedule.num_high_levels, done.schedule.num_blocks
            content['args'] = Namespace(enc_scale=high, num_expansion=blocks)
    else:
        done = checkpoints.from_official(checkpoint, family, schedule, classes == 'coco', ema)
        text = checkpoints.official_config(done, args, num_queries)
        checkpoints.check_conversion(done, text)
        is_coco = len(done.state_dict['bbox_head.cls_branches.0.weight']) == 80
        meta = {'dataset_meta': CocoDataset.METAINFO} if is_coco else {}
        # What is left makes the way back exact.
        official = {'left': done.left}
        content = {'meta': meta, 'state_dict': done.state_dict, 'official': official}
        config.write_text(text)
        written.append(config)
    torch.save(content, target)
    layout, found = done.layout, done.schedule and str(done.schedule)
    title = ' '.join(filter(None, (FAMILIES[layout.family], found)))
    click.echo(f'{title}: {len(done.mapped)} entries mapped')
    for what, entries in (('left', done.reasons), ('filled', done.filled)):
        for why, count in Counter(entries.values()).items():
            click.echo(f'{count} entries {what} ({why})')
    written = list(map(str, written))
    click.echo(f'Wrote {" and ".join(written)}')
    told = {'written': written, 'model': layout.family, 'schedule': found, 'layout': vars(layout)}
    return {**told, 'mapped': done.mapped, 'left': done.reasons, 'filled': done.filled}


def _from_stock(
    source, target, config, files, schedule, iterations, batch_size, dataset
) -> dict | None:
    """A Lite detector that is copied and fitted, and learns if there are images enough."""
    if dataset is not None and 'decode_head' in config.model:
        raise ValueError(
            '--annotations measures AP of boxes, and a model of MMSegmentation gives maps: '
            'leave it out, and test the result with mim test mmsegmentation'
        )
    if schedule:
        from ..openmmlab.families import find_holder

        find_holder(config.model)[1]['encoder']['schedule'] = schedule
    if iterations is None:
        iterations = 400 if len(files) >= ENOUGH_IMAGES else 0
    if iterations:
        report = _distill(source, target, config, files, iterations, batch_size, dataset)
    else:
        report = _start(source, target, config, files)
    return report and {'written': [str(target)], **report}


def _start(source: Path, target: Path, config, files: list[Path]) -> dict:
    """A Lite detector that is copied and fitted, to be trained."""
    import torch
    from mmdet.registry import DATASETS
    from mmengine.dataset import pseudo_collate
    from mmengine.registry import init_default_scope

    from ..openmmlab.build import build_initialised
    from ..openmmlab.checkpoints import load_checkpoint, unpack, warm_start
    from ..openmmlab.distillation import images_without_labels

    state, _ = unpack(load_checkpoint(source))
    init_default_scope(config.get('default_scope') or 'mmdet')
    model = build_initialised(config.model)
    dataset = DATASETS.build(images_without_labels(config, files))
    data = model.data_preprocessor(pseudo_collate(list(dataset)), False)
    with shared.console().status('Fitting what is new to the stock detector'):
        report = warm_start(model, config.model, state, data)
    torch.save({'meta': {}, 'state_dict': model.state_dict()}, target)
    click.echo(f'{report}\nWrote {target}')
    return asdict(report)


def _distill(source, target, config, files, iterations, batch_size, dataset) -> dict:
    """A Lite detector that has learnt from its stock detector; the first process alone reports."""
    import torch
    from mmengine.registry import RUNNERS

    from ..analysis.hooks import ProgressHook
    from ..export.pytorch import pytorch_detector
    from ..openmmlab.distillation import check_resumable, distillation_config
    from ..openmmlab.runner import unwrapped

    folder, rank = target.with_suffix('.distill'), os.environ.get('RANK')
    settings = distillation_config(config, source, files, iterations, batch_size, folder)
    if rank is not None:
        settings.launcher = 'pytorch'
        settings.runner_type = 'Runner' if torch.cuda.is_available() else 'CPURunner'
    is_main = not int(rank or 0)
    if is_main:
        check_resumable(settings)
    settings.log_level = 'ERROR'
    measured: dict[str, float] = {}
    output = sys.stdout  # past what keeps MMEngine quiet

    def measure(runner, done: int) -> None:
        if dataset is None or not is_main:
            return
        model = unwrapped(runner)
        detectors = {'stock detector': model.teacher}
        detectors[f'Lite detector after {done} iterations'] = model.student
        for name, detector in detectors.items():
            if name not in measured:
                detector = pytorch_detector(detector.eval(), config)
                measured[name] = dataset.evaluate(detector)['mAP']
                click.echo(f'{name}: {measured[name]:.1f} AP', output)
        model.train()

    def note(runner) -> str:
        return f'distance {unwrapped(runner).distance:.3f}'

    with shared.progress() as start, contextlib.redirect_stdout(io.StringIO()):
        runner = RUNNERS.build(settings)
        text = 'Learning from the stock detector'
        runner.register_hook(ProgressHook(start, text, note, measure, parts=4))
        runner.train()
    if not is_main:
        return {}
    model = unwrapped(runner)
    distilled = model.facts(iterations)
    torch.save({'meta': {'distilled': distilled}, 'state_dict': model.state_dict()}, target)
    shutil.rmtree(folder)
    click.echo(
        f'{iterations} iterations on {len(files)} images: tokens within {model.distance:.3f} of '
        f"their variance from the stock detector's\nWrote {target}"
    )
    return {**distilled, 'distance': model.distance, 'ap': measured}
