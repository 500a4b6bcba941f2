"""``mmlite lite-config``: the Lite config of a stock config."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import click

from .shared import cfg_options, image_size_option, out_option, print_table, read_config


@click.command()
@click.argument('stock')
@click.option(
    '--schedule', help="For example 'H3L1-(2+1)x3'. With --out alone: the main schedule that fits."
)
@out_option('Write the config here. Default: print it.', '.py')
@image_size_option(help='What GFLOPs are counted at.')
@cfg_options
def lite_config(
    stock: str,
    schedule: str | None,
    out: Path | None,
    image_size: tuple[int, int],
    cfg_options: dict,
) -> None:
    """Write the Lite config of a STOCK config, or say why there is none.

    STOCK is a path or mmdet::folder/config.py. Without --schedule and --out the schedules that fit
    are shown, with the GFLOPs of the encoder before and after, and what the Lite DETR paper reports
    for the like.

    \b
    Example:
      mmlite lite-config mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py
      mmlite lite-config mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py -o lite.py
      mmlite lite-config mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py --schedule 'H2L2-(2+1)x3'
    """
    config = read_config(stock, cfg_options)
    from ..openmmlab.lite_config import lite_config as text_of
    from ..openmmlab.lite_config import main_schedule

    if schedule is None and out is None:
        _show(config, image_size)
        return
    base: str | Path = stock
    if '::' not in stock:
        folder = out.resolve().parent if out else Path.cwd()
        base = Path(os.path.relpath(Path(stock).resolve(), folder)).as_posix()
        if out is not None and out.resolve() == Path(stock).resolve():
            raise ValueError(f'{out} is the stock config itself; choose another name')
    chosen = schedule or main_schedule(config.model)
    text = text_of(config, base, chosen, cfg_options)
    if out is None:
        click.echo(text, nl=False)
        return
    out.write_text(text)
    why = '' if schedule else ', the main one that fits; choose another with --schedule'
    click.echo(f'Wrote {out} with schedule {chosen}{why}')


def _show(config, image_size: tuple[int, int]) -> None:
    from mmengine.config import Config

    from ..analysis.complexity import encoder_flops
    from ..analysis.report import giga, size
    from ..openmmlab.lite_config import fitting_schedules, lite_change

    reported = _published(config.model)
    before = encoder_flops(config.model, image_size)
    rows = [('stock', giga(before), '', _cell(reported.get('stock')))]
    for schedule in fitting_schedules(config.model):
        lite = Config({'model': copy.deepcopy(config.model)})
        lite.merge_from_dict({'model': lite_change(config.model, schedule)})
        after = encoder_flops(lite.model, image_size)
        saved = f'{1 - after / before:.0%}'
        rows.append((schedule, giga(after), saved, _cell(reported.get(schedule))))
    columns = ('schedule', 'encoder GFLOPs', 'saved', 'published box AP (GFLOPs)')
    print_table(f'Schedules that fit, at {size(image_size)}', columns, rows, 'right')
    if reported:
        click.echo('Published: Lite DETR (arXiv 2303.07335), COCO val2017; not measured here.')


# As the paper names detectors, and backbones by their depths.
_DETECTORS = {'DINO': 'DINO', 'DeformableDETR': 'Deformable DETR', 'HDeformableDETR': 'H-DETR'}
_BACKBONES = {('ResNet', (50,)): 'R50', ('SwinTransformer', (2, 2, 6, 2)): 'Swin-T'}


def _published(model) -> dict:
    """Schedule, or 'stock' -> the paper's row for the same detector and backbone."""
    from ..analysis.published import PRESETS, preset
    from ..openmmlab.families import type_name

    backbone = model.backbone
    depths = (backbone.depth,) if 'depth' in backbone else backbone.get('depths', (2, 2, 6, 2))
    kind = type_name(backbone.type), tuple(depths)
    wanted = _DETECTORS.get(type_name(model.type)), _BACKBONES.get(kind)
    for stock, *lite in (group for name in PRESETS for group in preset(name)):
        if (stock.model, stock.backbone) == wanted:
            return {'stock': stock, **{row.model.split()[-1]: row for row in lite}}
    return {}


def _cell(row) -> str:
    if row is None:
        return ''
    return f'{row.ap:.1f} ({row.gflops:.0f}, encoder {row.encoder_gflops:.0f})'
