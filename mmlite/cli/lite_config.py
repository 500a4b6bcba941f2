"""``mmlite lite-config``: the Lite config of a stock config."""

from __future__ import annotations

import os
from pathlib import Path

import click

from . import shared


@click.command()
@click.argument('stock')
@click.option('--schedule', help="Such as 'H2L2-(2+1)x3'. With --out alone: the main that fits.")
@click.option('--backbone', help='NAME or NAME,CHECKPOINT of timm, in place of its own.')
@shared.out_option('Write the config here. Default: print it.', '.py')
@shared.image_size_option(help='What GFLOPs are counted at.')
@shared.cfg_options
def lite_config(stock: str, schedule, backbone, out: Path | None, image_size, cfg_options) -> None:
    """Write the Lite config of a STOCK config, or say why there is none.

    STOCK is a path or mmdet::folder/config.py. Without --schedule and --out the schedules that fit
    are shown, with the GFLOPs of the encoder before and after.

    \b
    Example:
      mmlite lite-config mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py -o lite.py
      mmlite lite-config dino.py --backbone tf_efficientnet_lite0,weights.pth -o lite.py
    """
    config = shared.read_config(stock, cfg_options)
    from ..openmmlab.lite_config import backbone_change, main_schedule
    from ..openmmlab.lite_config import lite_config as text_of

    if backbone:
        cfg_options = {**cfg_options, **backbone_change(config.model, *backbone.split(',', 1))}
    if schedule is None and out is None:
        _show(config, image_size)
        return
    base = stock
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
    from .. import fuse, restore, to_lite
    from ..analysis.complexity import count_flops, encoder_call
    from ..analysis.report import giga, size
    from ..openmmlab.build import build_detector
    from ..openmmlab.families import encoder_name
    from ..openmmlab.lite_config import fitting_schedules

    fitting = fitting_schedules(config.model)
    model = fuse(build_detector(config))  # which counts the same and takes less time
    at, call = encoder_name(model), encoder_call(model, image_size)
    before, rows = count_flops(model.get_submodule(at), **call).total, []
    for schedule in fitting:
        to_lite(model, schedule)
        after = count_flops(model.get_submodule(at), **call).total
        restore(model)
        rows.append([schedule, giga(after), f'{1 - after / before:.0%}'])
    columns = ('schedule', 'encoder GFLOPs', 'saved')
    rows = [['stock', giga(before), ''], *rows]
    shared.print_table(f'Schedules that fit, at {size(image_size)}', columns, rows, 'right')
