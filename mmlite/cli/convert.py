"""``mmlite convert``: other people's checkpoints, and starting points from stock ones."""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .shared import (
    PATH,
    cfg_options,
    console,
    flag,
    image_files,
    images_option,
    json_option,
    option,
    print_table,
    read_config,
    write_json,
)

if TYPE_CHECKING:
    import torch
    from mmengine.config import Config

    from ..openmmlab.checkpoints import Conversion


@click.command()
@click.argument('source', type=PATH)
@click.argument('target', type=PATH)
@click.option(
    '--model',
    'family',
    metavar='FAMILY',
    help='Refuse any other model in the file than this one: deformable-detr, h-deformable-detr, '
    'dino or lite-dino.',
)
@click.option('--schedule', help="A Lite model's schedule, for example 'H3L1-(2+1)x3'.")
@option(
    '--classes',
    type=click.Choice(['coco', 'keep']),
    default='coco',
    help="Turn the authors' 91 category slots into MMDetection's 80 classes (and back), or keep "
    'the rows of the class layers as they are.',
)
@click.option('--num-queries', type=int, help='Queries at inference, if the file does not say.')
@flag('--ema', help='Take the averaged weights of the file.')
@flag('--to-official', help="The way back: to the authors' layout.")
@click.option(
    '--from-stock',
    'lite_config',
    metavar='CONFIG',
    help='Start the Lite detector of this config from a stock detector.',
)
@images_option(
    help='An image, or a folder of them, to fit and compare on with --from-stock; can be repeated.'
)
@cfg_options
@json_option
def convert(
    source: Path,
    target: Path,
    to_official: bool,
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
    if not target.suffix:
        target = target.with_suffix('.pth')
    _refuse_target(target, source)
    if lite_config or image_paths or cfg_options:
        if to_official or options['family'] or options['ema'] or options['num_queries']:
            raise ValueError(
                'of the other options, --from-stock takes --schedule, --images and --cfg-options'
            )
        if lite_config is None or not image_paths:
            raise ValueError(
                'a warm start needs the config of the Lite detector and images to fit on: '
                '--from-stock CONFIG --images IMAGE'
            )
        if options['schedule']:
            cfg_options['model.encoder.schedule'] = options['schedule']
        config = read_config(lite_config, cfg_options)
        report = _from_stock(source, target, config, image_files(image_paths))
    else:
        if to_official and (options['schedule'] or options['ema']):
            raise ValueError('--to-official takes neither --schedule nor --ema; leave them out')
        report = (_to_official if to_official else _from_official)(source, target, **options)
        _print(report)
    write_json(json_path, report)


def _from_official(source, target, family, schedule, classes, ema, num_queries) -> dict:
    import torch

    from ..openmmlab import checkpoints

    checkpoint = checkpoints.load_checkpoint(source, allow=[Namespace])
    conversion = checkpoints.from_official(checkpoint, family, schedule, classes == 'coco', ema)
    _, args = checkpoints.unpack(checkpoint, ema)
    config = checkpoints.official_config(conversion, args, num_queries)
    checkpoints.check_conversion(conversion, config)
    content = dict(
        meta=_meta(conversion.state_dict),
        state_dict=conversion.state_dict,
        # What MMDetection has no place for; it makes the way back exact.
        official=dict(family=conversion.layout.family, left=conversion.left),
    )
    torch.save(content, target)
    target.with_suffix('.py').write_text(config)
    return _report(conversion, source, [target, target.with_suffix('.py')])


def _to_official(source, target, family, classes, **_) -> dict:
    import torch

    from ..openmmlab import checkpoints

    checkpoint = checkpoints.load_checkpoint(source, allow=[Namespace])
    state, _ = checkpoints.unpack(checkpoint)
    kept = checkpoint.get('official', {}) if isinstance(checkpoint, dict) else {}
    conversion = checkpoints.to_official(state, family, classes == 'coco', kept.get('left'))
    content = dict(model=conversion.state_dict)
    if conversion.schedule:
        # Under the names of the authors' own run arguments.
        high, blocks = conversion.schedule.num_high_levels, conversion.schedule.num_blocks
        content['args'] = Namespace(enc_scale=high, num_expansion=blocks)
    torch.save(content, target)
    return _report(conversion, source, [target])


def _from_stock(source: Path, target: Path, config: Config, images: list[Path]) -> dict:
    import torch
    from mmengine.registry import init_default_scope

    from ..openmmlab.build import build_initialised
    from ..openmmlab.checkpoints import load_checkpoint, unpack, warm_start

    state, _ = unpack(load_checkpoint(source))
    init_default_scope('mmdet')
    model = build_initialised(config.model)
    with console().status('Fitting what is new to the stock detector'):
        report = warm_start(model, config.model, state, _load_images(model, config, images))
    torch.save(dict(meta={}, state_dict=model.state_dict()), target)
    click.echo(f'{report}\nWrote {target}')
    return dict(source=str(source), written=[str(target)], **asdict(report))


def _load_images(model: torch.nn.Module, config: Config, images: list[Path]) -> dict:
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


def _report(conversion: Conversion, source: Path, written: list[Path]) -> dict:
    """What became of the entries of the file, as printed and as written with ``--json``."""
    layout = conversion.layout
    return dict(
        source=str(source),
        written=[str(path) for path in written],
        model=layout.family,
        schedule=conversion.schedule and str(conversion.schedule),
        layout=dict(layout._asdict()),
        mapped=conversion.mapped,
        left=conversion.reasons,
        filled=conversion.filled,
    )


def _print(report: dict) -> None:
    from ..openmmlab.checkpoints.official import FAMILIES

    title = f'{FAMILIES[report["model"]]} {report["schedule"] or ""}'.strip()
    parts = Counter(map(_part, report['mapped'].values()))
    rows = [(part, str(count)) for part, count in (*parts.items(), ('all', len(report['mapped'])))]
    print_table(f'{title}: mapped', ('part', 'entries'), rows)
    for heading in ('left', 'filled'):
        kinds = Counter(
            'repeats another entry' if why.startswith('repeats ') else why
            for why in report[heading].values()
        )
        if kinds:
            print_table(heading, ('entries', 'why'), [(str(n), kind) for kind, n in kinds.items()])
    click.echo(f'Wrote {" and ".join(report["written"])}')


def _part(name: str) -> str:
    """The module of the detector that an entry belongs to."""
    return '.'.join(name.split('.')[: 2 if name.startswith('transformer.') else 1])


def _meta(state: dict) -> dict:
    """Class names of COCO for a model of its 80 classes, as MMDetection stores them."""
    from mmdet.datasets import CocoDataset

    is_coco = len(state['bbox_head.cls_branches.0.weight']) == len(CocoDataset.METAINFO['classes'])
    return dict(dataset_meta=CocoDataset.METAINFO) if is_coco else {}


def _refuse_target(target: Path, source: Path) -> None:
    if target.suffix not in ('.pth', '.pt'):
        raise ValueError(f'{target} is no name of a checkpoint; let it end in .pth')
    if target.resolve() == source.resolve():
        raise ValueError(f'{target} is the source; give another name for the converted file')
    if not target.parent.is_dir():
        raise FileNotFoundError(f'{target.parent} does not exist; create the folder first')
