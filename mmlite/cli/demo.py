"""``mmlite demo``: a small Lite-DINO learns to find shapes, from nothing, on this machine."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
import warnings
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..integrations import require

CONFIG = 'small/lite-dino-4scale_r18_h3l1-3p1x1_1xb8-14e_shapes.py'
METRICS = {
    'AP': 'coco/bbox_mAP',
    'AP50': 'coco/bbox_mAP_50',
    'AP75': 'coco/bbox_mAP_75',
    'APs': 'coco/bbox_mAP_s',
    'APm': 'coco/bbox_mAP_m',
    'APl': 'coco/bbox_mAP_l',
}
SHOWN_IMAGES = 6
SHOWN_SCORE = 0.3


@click.command()
@click.option(
    '--out',
    type=click.Path(file_okay=False, path_type=Path),
    default='work_dirs/demo',
    show_default=True,
    help='Folder for the data, the checkpoint, the results and the picture.',
)
@click.option('--epochs', type=click.IntRange(1), help='Default: as in the config.')
@click.option('--train-images', type=click.IntRange(8), default=600, show_default=True)
@click.option('--val-images', type=click.IntRange(1), default=100, show_default=True)
@click.option('--seed', type=click.IntRange(0), default=0, show_default=True)
def demo(out: Path, epochs: int | None, train_images: int, val_images: int, seed: int) -> None:
    """Train and evaluate a small Lite-DINO on shapes that are drawn for it.

    Draws a data set in COCO's format, trains on it, evaluates with pycocotools on images held
    out, compares the encoder's GFLOPs with the stock encoder's and draws what was detected.

    \b
    Example:
      mmlite demo
      mmlite demo --epochs 2 --out /tmp/demo
    """
    require()
    warnings.filterwarnings('ignore')  # those of the stack about itself bury the progress
    console = Console(file=sys.stdout)  # not what _quiet() puts in its place
    start = time.monotonic()
    _make_writable(out)

    _draw_data(console, out / 'data', {'train': train_images, 'val': val_images}, seed)
    runner = _build(out, epochs, seed)
    _train(console, runner)
    console.print('Evaluating on the held-out images')
    with _quiet():
        metrics = runner.val()
    lite, stock = _encoder_gflops(runner.cfg)
    picture = _draw_predictions(runner, out / 'predictions.png')

    results = {
        **{name: metrics[key] for name, key in METRICS.items()},
        'encoder_gflops': lite,
        'stock_encoder_gflops': stock,
        'epochs': runner.max_epochs,
        'seconds': round(time.monotonic() - start),
    }
    (out / 'results.json').write_text(json.dumps(results, indent=2) + '\n')
    _show(console, results)
    console.print(f'Ground truth and predictions: {picture}', soft_wrap=True)
    console.print(f'Checkpoint, config and results: {out}', soft_wrap=True)


def _make_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / 'results.json').write_text('{}\n')
    except OSError as error:
        raise OSError(
            f'{out} cannot be written ({error.strerror}); choose another folder with --out'
        ) from error


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn('{task.description}'),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn('{task.fields[note]}'),
        console=console,
    )


def _draw_data(console: Console, root: Path, splits: dict[str, int], seed: int) -> None:
    from ..datasets import generate_shapes

    with _progress(console) as progress:
        task = progress.add_task('Drawing images', total=sum(splits.values()), note='')
        generate_shapes(root, splits, seed=seed, progress=lambda: progress.advance(task))


def _build(out: Path, epochs: int | None, seed: int):
    """The runner of the embedded config, on the data in ``out``."""
    from mmengine.config import Config
    from mmengine.runner import Runner

    cfg = Config.fromfile(Path(__file__).parents[1] / '.mim' / 'configs' / CONFIG)
    cfg.work_dir = str(out)
    cfg.log_level = 'ERROR'
    cfg.randomness = {'seed': seed}
    if epochs is not None:
        cfg.train_cfg.max_epochs = epochs
        cfg.param_scheduler[-1].T_max = epochs
    epochs = cfg.train_cfg.max_epochs
    cfg.train_cfg.val_interval = epochs + 1  # evaluated once, after training
    cfg.default_hooks.checkpoint.interval = epochs
    data_root = str(out / 'data')
    annotations = str(out / 'data' / 'annotations' / 'instances_val.json')
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.data_root = data_root
    for split in ('val', 'test'):
        cfg[f'{split}_evaluator'].ann_file = annotations
    with _quiet():
        return Runner.from_cfg(cfg)


def _train(console: Console, runner) -> None:
    from mmengine.hooks import Hook

    with _progress(console) as progress, _quiet():

        class ShowProgress(Hook):
            def before_train(self, runner) -> None:
                self.task = progress.add_task('Training', total=runner.max_iters, note='')

            def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
                loss = runner.message_hub.get_scalar('train/loss').mean(20)
                progress.update(self.task, advance=1, note=f'loss {loss:.2f}')

        runner.register_hook(ShowProgress(), priority='VERY_LOW')
        runner.train()


def _encoder_gflops(cfg) -> tuple[float, float]:
    """GFLOPs of the Lite encoder and of the stock encoder with the same number of layers."""
    import copy

    from mmdet.registry import MODELS

    from ..analysis.complexity import count_detector

    lite = cfg.model
    stock = copy.deepcopy(lite)
    stock.type = 'DINO'
    stock.encoder.pop('schedule')
    stock.decoder.pop('key_aware')
    return tuple(
        count_detector(MODELS.build(model), cfg.image_size).stage_flops['encoder'] / 1e9
        for model in (lite, stock)
    )


def _draw_predictions(runner, path: Path) -> Path:
    """Draw a few held-out images with their objects above and what was detected below."""
    import cv2
    from matplotlib.figure import Figure

    from ..analysis.pictures import show_boxes

    samples = []
    for batch in runner.val_dataloader:
        samples += runner.model.val_step(batch)
        if len(samples) >= SHOWN_IMAGES:
            break
    samples = samples[:SHOWN_IMAGES]
    classes = runner.val_dataloader.dataset.metainfo['classes']
    figure = Figure(figsize=(3 * len(samples), 6.4), layout='tight')
    axes = figure.subplots(2, len(samples), squeeze=False)
    for column, sample in enumerate(samples):
        image = cv2.imread(sample.img_path)[..., ::-1]
        detected = sample.pred_instances
        detected = detected[detected.scores > SHOWN_SCORE]
        for axis, instances in zip(axes[:, column], (sample.gt_instances, detected)):
            texts = [classes[label] for label in instances.labels.tolist()]
            if 'scores' in instances:
                texts = [f'{t} {s:.2f}' for t, s in zip(texts, instances.scores.tolist())]
            show_boxes(axis, image, instances.bboxes.tolist(), texts, classes)
    axes[0, 0].set_title('ground truth', loc='left')
    axes[1, 0].set_title(f'predictions with a score above {SHOWN_SCORE}', loc='left')
    figure.savefig(path, dpi=100)
    return path


def _show(console: Console, results: dict) -> None:
    table = Table(
        *METRICS, title=f'COCO metrics after {results["epochs"]} epochs, {results["seconds"]} s'
    )
    table.add_row(*(f'{100 * results[name]:.1f}' for name in METRICS))
    console.print(table)
    lite, stock = results['encoder_gflops'], results['stock_encoder_gflops']
    console.print(
        f'Encoder: {lite:.3f} GFLOPs; the stock encoder of as many layers needs {stock:.3f} '
        f'({1 - lite / stock:.0%} saved)'
    )


@contextlib.contextmanager
def _quiet():
    """Keep what the stack prints from tearing up the progress bar; errors still come through."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
