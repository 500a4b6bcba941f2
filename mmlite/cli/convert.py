"""``mmlite convert``: other people's checkpoints, and starting points from stock ones."""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import shared

if TYPE_CHECKING:
    from torch import nn


@click.command()
@click.argument('source', type=shared.PATH)
@click.argument('target', type=shared.PATH)
@click.option(
    '--model',
    'family',
    type=click.Choice(['deformable-detr', 'h-deformable-detr', 'dino', 'lite-dino']),
    help='Refuse any other model in the file than this one.',
)
@click.option('--schedule', help="A Lite model's schedule, for example 'H3L1-(2+1)x3'.")
@shared.option(
    '--classes',
    type=click.Choice(['coco', 'keep']),
    default='coco',
    help="Turn the authors' 91 category slots into MMDetection's 80 classes and back, or keep all.",
)
@click.option('--num-queries', type=int, help='Queries at inference, if the file does not say.')
@shared.flag('--ema', help='Take the averaged weights of the file.')
@shared.flag('--to-official', help="The way back: to the authors' layout.")
@click.option(
    '--from-stock',
    'lite_config',
    metavar='CONFIG',
    help='Start the Lite detector of this config from a stock detector.',
)
@shared.images_option(
    help='An image, or a folder of them, to fit and compare on with --from-stock; can be repeated.'
)
@shared.cfg_options
@shared.json_option
def convert(
    source: Path,
    target: Path,
    lite_config: str | None,
    image_paths: tuple[Path, ...],
    cfg_options: dict,
    json_path: Path | None,
    **options,
) -> None:
    """Convert a checkpoint of the original authors to MMDetection or back, or start from stock.

    SOURCE is a file of Deformable DETR, H-Deformable-DETR, DINO or Lite-DINO as their authors
    released it. TARGET gets the converted weights, and the file of the same name with .py the
    config that goes with them.

    With --from-stock, SOURCE holds trained weights of MMDetection's detector, and TARGET gets a
    starting point for the Lite detector of CONFIG: `load_from` of its training.

    \b
    Example:
      mmlite convert r50_s3ex3_50.4.pth lite_dino.pth --schedule 'H3L1-(2+1)x3'
      mim test mmdet lite_dino.py --checkpoint lite_dino.pth
      mmlite convert lite_dino.pth original_again.pth --to-official
      mmlite convert dino_r50.pth start.pth --from-stock my_lite_dino.py --images street.jpg
    """
    target = target if target.suffix else target.with_suffix('.pth')
    if target.suffix not in ('.pth', '.pt'):
        raise ValueError(f'{target} is no name of a checkpoint; let it end in .pth')
    if target.resolve() == source.resolve():
        raise ValueError(f'{target} is the source; give another name for the converted file')
    if not target.parent.is_dir():
        raise FileNotFoundError(f'{target.parent} does not exist; create the folder first')
    if not (lite_config or image_paths or cfg_options):
        report = _convert(source, target, **options)
    elif any(options[name] for name in ('to_official', 'family', 'ema', 'num_queries')):
        raise ValueError(
            'of the other options, --from-stock takes --schedule, --images and --cfg-options'
        )
    elif lite_config and image_paths:
        if options['schedule']:
            cfg_options['model.encoder.schedule'] = options['schedule']
        report = _start(source, target, lite_config, cfg_options, image_paths)
    else:
        raise ValueError(
            'a warm start needs the config of the Lite detector and images to fit on: '
            '--from-stock CONFIG --images IMAGE'
        )
    shared.write_json(json_path, report)


def _convert(source, target, to_official, family, schedule, classes, ema, num_queries) -> dict:
    """From the authors' layout to MMDetection's, or back; what became of every entry."""
    if to_official and (schedule or ema):
        raise ValueError('--to-official takes neither --schedule nor --ema; leave them out')
    import torch
    from mmdet.datasets import CocoDataset

    from ..openmmlab import checkpoints
    from ..openmmlab.checkpoints.official import FAMILIES

    checkpoint = checkpoints.load_checkpoint(source, allow=[Namespace])
    state, args = checkpoints.unpack(checkpoint, ema)
    written = [target]
    if to_official:
        left = checkpoint.get('official', {}).get('left')
        done = checkpoints.to_official(state, family, classes == 'coco', left)
        content = dict(model=done.state_dict)
        if done.schedule:  # under the names of the authors' own run arguments
            high, blocks = done.schedule.num_high_levels, done.schedule.num_blocks
            content['args'] = Namespace(enc_scale=high, num_expansion=blocks)
    else:
        done = checkpoints.from_official(checkpoint, family, schedule, classes == 'coco', ema)
        config = checkpoints.official_config(done, args, num_queries)
        checkpoints.check_conversion(done, config)
        is_coco = len(done.state_dict['bbox_head.cls_branches.0.weight']) == 80
        content = dict(
            meta=dict(dataset_meta=CocoDataset.METAINFO) if is_coco else {},
            state_dict=done.state_dict,
            official=dict(left=done.left),  # makes the way back exact
        )
        written.append(target.with_suffix('.py'))
        written[1].write_text(config)
    torch.save(content, target)
    layout = done.layout
    schedule = done.schedule and str(done.schedule)
    title = ' '.join(filter(None, (FAMILIES[layout.family], schedule)))
    click.echo(f'{title}: {len(done.mapped)} entries mapped')
    for what, entries in (('left', done.reasons), ('filled', done.filled)):
        for why, count in Counter(entries.values()).items():
            click.echo(f'{count} entries {what} ({why})')
    click.echo(f'Wrote {" and ".join(map(str, written))}')
    return dict(
        source=str(source),
        written=list(map(str, written)),
        model=layout.family,
        schedule=schedule,
        layout=vars(layout),
        mapped=done.mapped,
        left=done.reasons,
        filled=done.filled,
    )


def _start(source, target, lite_config, cfg_options, image_paths) -> dict:
    """A starting point for a Lite detector."""
    config = shared.read_config(lite_config, cfg_options)
    images = shared.image_files(image_paths)
    import torch
    from mmengine.registry import init_default_scope

    from ..openmmlab.build import build_initialised
    from ..openmmlab.checkpoints import load_checkpoint, unpack, warm_start

    state, _ = unpack(load_checkpoint(source))
    init_default_scope('mmdet')
    model = build_initialised(config.model)
    with shared.console().status('Fitting what is new to the stock detector'):
        report = warm_start(model, config.model, state, _load_images(model, config, images))
    torch.save(dict(meta={}, state_dict=model.state_dict()), target)
    click.echo(f'{report}\nWrote {target}')
    return dict(source=str(source), written=[str(target)], **asdict(report))


def _load_images(model: nn.Module, config, images: list[Path]) -> dict:
    """The images as one batch, read and resized as the config's test images are."""
    from mmcv.transforms import Compose
    from mmdet.datasets import CocoDataset

    from ..openmmlab.families import reads_text, type_name

    dataset = config.test_dataloader.dataset
    steps = [step for step in dataset.pipeline if not type_name(step.type).endswith('Annotations')]
    # A detector that reads a text is asked for the classes of its data.
    classes = (dataset.get('metainfo') or CocoDataset.METAINFO)['classes']
    asked = dict(text=classes, custom_entities=True) if reads_text(model) else {}
    pipeline = Compose(steps)
    packed = [pipeline(dict(img_path=str(p), img_id=i, **asked)) for i, p in enumerate(images)]
    batch = {name: [item[name] for item in packed] for name in ('inputs', 'data_samples')}
    return model.data_preprocessor(batch, False)
