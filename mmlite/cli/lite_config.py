"""``mmlite lite-config``: the Lite config of a stock config."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import click

from .shared import HELP, file_option, image_size_option, print_table


@click.command(context_settings=HELP)
@click.argument('stock')
@click.option('--schedule', help='For example H3L1-(2+1)x3. Without it, those that fit are shown.')
@file_option('-o', '--out', help='Write the config here. Default: print it.')
@image_size_option(help='What GFLOPs are counted at.')
def lite_config(stock: str, schedule: str | None, out: Path | None, image_size) -> None:
    """Write the Lite config of a STOCK config, or say why there is none.

    STOCK is a path or mmdet::folder/config.py. Without a schedule the schedules that fit are shown,
    with the GFLOPs of the encoder before and after, and what the Lite DETR paper reports for the
    like.

    \b
    Example:
      mmlite lite-config mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py
      mmlite lite-config mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py --schedule 'H3L1-(2+1)x3' -o lite.py
    """  # noqa: E501
    from ..openmmlab.build import load_config
    from ..openmmlab.checkpoints import lite_config as text_of

    config = load_config(stock)
    if schedule is None:
        if out is not None:
            raise ValueError('a config has one schedule; choose it with --schedule')
        _show(stock, config, image_size)
        return
    base: str | Path = stock
    if '::' not in stock:
        folder = out.resolve().parent if out else Path.cwd()
        base = Path(os.path.relpath(Path(stock).resolve(), folder)).as_posix()
        if out is not None and out.resolve() == Path(stock).resolve():
            raise ValueError(f'{out} is the stock config itself; choose another name')
    text = text_of(config, base, schedule)
    if out is None:
        click.echo(text, nl=False)
    else:
        out.write_text(text)
        click.echo(f'wrote {out}')


def _show(stock: str, config, image_size: tuple[int, int]) -> None:
    from mmengine.config import Config

    from ..analysis.complexity import encoder_flops
    from ..analysis.report import giga, size
    from ..openmmlab.checkpoints import fitting_schedules, lite_change

    schedules = fitting_schedules(config.model)
    changes = {schedule: lite_change(config.model, schedule) for schedule in schedules}
    reported = _published(stock, config.model)
    before = encoder_flops(config.model, image_size)
    rows = [('stock', giga(before), '', _cell(reported.get('stock')))]
    for schedule, change in changes.items():
        lite = Config({'model': copy.deepcopy(config.model)})
        lite.merge_from_dict({'model': change})
        after = encoder_flops(lite.model, image_size)
        rows.append(
            (schedule, giga(after), f'{1 - after / before:.0%}', _cell(reported.get(schedule)))
        )
    columns = ('schedule', 'encoder GFLOPs', 'saved', 'published box AP (GFLOPs)')
    print_table(f'Schedules that fit, at {size(image_size)}', columns, rows, 'right')
    if reported:
        click.echo('Published: Lite DETR (arXiv 2303.07335), COCO val2017; not measured here.')


def _published(stock: str, model) -> dict:
    """Schedule, or 'stock' -> the paper's row for the same detector and backbone."""
    from ..analysis.published import PRESETS, preset

    families = {'DINO': 'DINO', 'DeformableDETR': 'Deformable DETR', 'HDeformableDETR': 'H-DETR'}
    depth = model.backbone.get('depth')
    backbone = {('ResNet', 50): 'R50', ('SwinTransformer', 96): 'Swin-T'}.get(
        (model.backbone.type, depth or model.backbone.get('embed_dims'))
    )
    if list(model.backbone.get('depths', (2, 2, 6, 2))) != [2, 2, 6, 2]:  # Swin-S is as wide
        backbone = None
    for group in (group for name in PRESETS for group in preset(name)):
        if (group[0].model, group[0].backbone) == (families.get(model.type), backbone):
            return {
                row.model.split()[-1] if index else 'stock': row for index, row in enumerate(group)
            }
    return {}


def _cell(row) -> str:
    return (
        '' if row is None else f'{row.ap:.1f} ({row.gflops:.0f}, encoder {row.encoder_gflops:.0f})'
    )
