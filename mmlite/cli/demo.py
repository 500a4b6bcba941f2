"""``mmlite demo``: trains a small Lite detector on drawn shapes, on this machine."""

from __future__ import annotations

import io
import os
import shlex
import sys
import time
import warnings
from contextlib import redirect_stdout
from functools import partial
from itertools import chain, islice
from pathlib import Path

import click

from ..openmmlab import require
from . import shared
from .shared import count_option, option, print_table, progress

# Task -> its config, that of --full, which of COCO's metrics evaluate it, and what is drawn.
TASKS = {
    'detection': (
        'lite-dino-4scale_r18_h3l1-2p1x1_1xb8-5e_large-shapes',
        'lite-dino-4scale_r18_h3l1-3p1x1_1xb8-14e_shapes',
        'bbox',
        'large-shapes',
    ),
    'segmentation': (
        'lite-mask2former_r18_h2l1-2p1x1_1xb8-7e_three-shapes',
        'lite-mask2former_r18_h2l1-3p1x1_1xb8-20e_shapes',
        'segm',
        'three-shapes',
    ),
}
SHOWN_IMAGES = 6
SHOWN_SCORE = 0.3
ENCODER_SIDE = 640  # of the image that both encoders are timed on


@click.command()
@option('--task', type=click.Choice(list(TASKS)), default='detection', help='Boxes, or masks.')
@shared.flag('--full', help='Harder shapes and a larger model, for a quarter of an hour.')
@shared.out_option('Folder to write. Default: work_dirs/demo, or work_dirs/demo-segmentation.')
@count_option('--epochs', help='Default: as in the config.')
@option('--train-images', type=click.IntRange(8), help='Default: 1000, with --full 600.')
@count_option('--val-images', default=100)
@option('--seed', type=click.IntRange(0), default=0)
def demo(task, full: bool, out: Path | None, epochs, train_images, val_images: int, seed) -> None:
    """Train and evaluate a small Lite detector on shapes that are drawn for it.

    Draws a data set in COCO's format, trains on it from nothing, evaluates with pycocotools on
    images held out, times the encoder beside the stock one, and draws what was detected.

    \b
    Example:
      mmlite demo
      mmlite demo --full --epochs 2 --out /tmp/demo
      mmlite demo --task segmentation
    """
    _sleep_while_waiting()
    quick, long, measured, drawn = TASKS[task]
    require()
    from ..analysis.accuracy import METRICS
    from ..datasets import STYLES, generate_shapes

    warnings.filterwarnings('ignore')  # those of the stack about itself bury the progress
    began = time.monotonic()
    out = out or Path('work_dirs', 'demo' if task == 'detection' else f'demo-{task}')
    out.mkdir(parents=True, exist_ok=True)
    (out / 'results.json').write_text('{}\n')
    train_images = train_images or (600 if full else 1000)
    with progress() as start:
        step = start('Drawing images', train_images + val_images)
        splits = {'train': train_images, 'val': val_images}
        style = STYLES['shapes' if full else drawn]
        generate_shapes(out / 'data', splits, seed=seed, progress=step, style=style)
    runner = _build(f'small/{long if full else quick}.py', out, epochs, seed)
    _train(runner, threads=None if full else 1)
    click.echo('Evaluating on the held-out images')
    with _quiet():
        metrics = runner.val()
    seconds = round(time.monotonic() - began)
    picture = _draw_predictions(runner, out / 'predictions.png')
    results = {
        **{name: metrics[f'coco/{measured}_{key}'] for name, key in METRICS.items()},
        **_compare_encoders(runner),
        'epochs': runner.max_epochs,
        'seconds': seconds,
    }
    shared.write_json(out / 'results.json', results)
    of = 'boxes' if measured == 'bbox' else 'masks'
    click.echo(f'COCO metrics of {of} after {runner.max_epochs} epochs, {seconds} s, seed {seed}')
    shown = {name: results[name] for name in METRICS if results[name] >= 0}  # else of no objects
    print_table('', list(shown), [[f'{100 * value:.1f}' for value in shown.values()]])
    click.echo(
        'Encoder of as many layers, {0}x{0}: MMDetection {stock_encoder_ms:.0f} ms and '
        '{stock_encoder_gflops:.1f} GFLOPs, Lite {encoder_ms:.0f} ms and {encoder_gflops:.1f} '
        'GFLOPs\nGround truth and predictions: {1}\nNext:'.format(ENCODER_SIDE, picture, **results)
    )
    config, weights = out / Path(runner.cfg.filename).name, out / f'epoch_{runner.max_epochs}.pth'
    both, images = (config, weights), out / 'data/val'
    for command in (
        ('detect', f'{config},{weights}', images, '-o', out / 'detected'),
        ('visualize', 'attention', *both, images / '00000.png', '-o', out / 'attention.png'),
        ('export', *both, '--images', images, '-o', out / 'exported'),
    ):
        click.echo('  ' + shlex.join(['mmlite', *map(str, command)]))


def _compare_encoders(runner) -> dict[str, float]:
    """GFLOPs and milliseconds of the Lite encoder and the stock one, in turns on one image."""
    import torch

    from ..analysis.complexity import count_flops, encoder_call
    from ..analysis.timing import Setting, measure
    from ..openmmlab.build import build_detector
    from ..openmmlab.families import encoder_name
    from ..openmmlab.lite_config import stock_config

    config = runner.cfg.copy()
    config.model = stock_config(config.model)
    stock, at = build_detector(config), encoder_name(runner.model)
    call, found, calls = encoder_call(stock, (ENCODER_SIDE, ENCODER_SIDE)), {}, {}
    for name, model in {'stock_': stock, '': runner.model}.items():
        encoder = model.eval().get_submodule(at)
        found[f'{name}encoder_gflops'] = count_flops(encoder, **call).total / 1e9
        calls[name] = lambda index, encoder=encoder: encoder(**call)
    with progress() as start, torch.inference_mode():
        timings = measure(calls, Setting(rounds=4, warmup=1), start, 'Timing both encoders')
    return found | {f'{name}encoder_ms': 1e3 * one.median for name, one in timings.items()}


def _sleep_while_waiting() -> None:
    """Let threads without work sleep, before torch is imported: other processes may be busy."""
    if 'GOMP_SPINCOUNT' not in os.environ:
        os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')


def _build(config: str, out: Path, epochs: int | None, seed: int):
    """The runner of a packaged config, on the data in ``out``."""
    from mmengine.runner import Runner

    cfg = shared.read_config(f'mmlite::{config}')
    epochs = epochs or cfg.train_cfg.max_epochs
    cfg.merge_from_dict({'work_dir': str(out), 'log_level': 'ERROR', 'randomness': {'seed': seed}})
    cfg.train_cfg.max_epochs = cfg.param_scheduler[-1].T_max = epochs
    cfg.train_cfg.val_interval = epochs + 1  # evaluated once, after training
    cfg.default_hooks.checkpoint.interval = epochs
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.data_root = str(out / 'data')
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        evaluator.ann_file = str(out / 'data/annotations/instances_val.json')
    with _quiet():
        return Runner.from_cfg(cfg)


def _train(runner, threads: int | None) -> None:
    """Train, on so many threads: small operations lose more to a second one than it saves."""
    import torch

    from ..analysis.hooks import ProgressHook

    say, is_terminal = partial(print, file=sys.stdout, flush=True), sys.stdout.isatty()

    def loss(runner) -> str:  # mean over the last 20 iterations
        return f'loss {runner.message_hub.get_scalar("train/loss").mean(20):.2f}'

    def report(runner, done: int) -> None:
        if done and not is_terminal:  # where there is no bar to look at
            minutes, seconds = divmod(round(runner.message_hub.get_info('eta')), 60)
            epoch = f'Epoch {runner.epoch + 1} of {runner.max_epochs}'
            say(f'{epoch}: {loss(runner)}, {minutes} min {seconds} s left')

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    with progress() as start, _quiet():
        runner.register_hook(ProgressHook(start, 'Training', loss, report, runner.max_epochs))
        runner.train()
    torch.set_num_threads(before)


def _draw_predictions(runner, path: Path) -> Path:
    """Draw a few held-out images with their objects above and what was detected below."""
    import torch

    from ..analysis.pictures import draw_objects, draw_panels
    from ..export import read_image

    with torch.no_grad():
        samples = chain.from_iterable(map(runner.model.val_step, runner.val_dataloader))
        samples = list(islice(samples, SHOWN_IMAGES))
    classes = runner.val_dataloader.dataset.metainfo['classes']
    above, below = [], []
    for sample in samples:
        image = read_image(sample.img_path)
        found = sample.pred_instances[sample.pred_instances.scores > SHOWN_SCORE]
        above.append(('ground truth', draw_objects(image, sample.gt_instances, classes)))
        below.append((f'score above {SHOWN_SCORE}', draw_objects(image, found, classes)))
    draw_panels([above, below], panel_width=3.0).savefig(path, dpi=100)
    return path


def _quiet() -> redirect_stdout:
    """Keep what the stack prints from tearing up the progress bar; errors still come through."""
    return redirect_stdout(io.StringIO())
