"""``mmlite tune``: the most accurate detector within a time, of one set of weights."""

from __future__ import annotations

import re
from pathlib import Path

import click

from . import shared

RUNTIMES = click.Choice(['pytorch', 'onnxruntime', 'openvino'])


def seconds(text: str) -> float:
    """A time, written 300ms or 0.3s."""
    match = re.fullmatch(r'(\d+(?:\.\d*)?)(m?)s', text)
    if not match or not float(match[1]):
        raise click.BadParameter(f'{text!r} is no time; write for example 300ms')
    return float(match[1]) / (1000 if match[2] else 1)


@click.command()
@shared.config_argument
@click.argument('checkpoint')
@click.option('--budget', type=seconds, metavar='TIME', help='Of an image, for example 300ms.')
@shared.option('--runtime', type=RUNTIMES, default='pytorch')
@shared.image_size_option(
    'image_sizes', multiple=True, default=[(800, 1333)], help='Give it more than once for more.'
)
@shared.count_option('--decoder-layers', multiple=True, help='Layers to keep. Default: all.')
@shared.flag('--int8', help='Also in 8 bits, in OpenVINO; needs NNCF.')
@shared.images_option(help='Images or folders: to agree on, and to calibrate 8 bits.')
@shared.dataset_options('COCO annotations, to measure AP instead of agreement.')
@shared.out_option('Folder for the chosen detector, the picture and the page.', required=True)
@shared.count_option('--rounds', default=4, help='Measurements of each.')
@shared.threads_option
@shared.cfg_options
@shared.json_option
def tune(config, checkpoint, budget, files, out: Path, cfg_options, json_path, **options) -> None:
    """Try every schedule that CHECKPOINT was trained with, at every size and depth you name.

    Each choice is timed on this machine, in turns with all others, in the runtime that you deploy
    with, and its AP is measured on your images; without labels, how many detections of the most
    expensive choice it finds. Printed and drawn is what nothing else beats in both. With --budget
    the best detector that is fast enough is written to OUT: an export, or for PyTorch a config
    (tuned.py) with its weights.

    \b
    Example:
      mmlite tune elastic.py elastic.pth --budget 300ms --runtime openvino --images val/ -o tuned
      mmlite tune elastic.py elastic.pth --image-size 800 1333 --image-size 640 1066 \\
          --decoder-layers 6 --decoder-layers 4 --annotations val.json --annotated-images val -o t
    """
    cfg = shared.read_config(config, cfg_options)
    from ..analysis import tune as tuning
    from ..analysis.report import Report, milliseconds
    from ..analysis.timing import Setting, describe_machine, take_turns
    from ..export.detector import read_image
    from ..export.pipeline import preprocessing
    from ..openmmlab.build import build_detector

    decoder = preprocessing(cfg)['decoder']
    images = [read_image(file, decoder) for file in files]
    model = build_detector(cfg, checkpoint)
    out.mkdir(parents=True, exist_ok=True)
    exports, picture, page = out / 'exports', out / 'front.png', out / 'report.html'
    with shared.progress() as start:
        points = tuning.tune(model, cfg, images=images, folder=exports, start=start, **options)
    tuning.draw(points, picture, budget)
    runtime = options['runtime']
    settings = {'runtime': runtime, 'config': config, 'checkpoint': checkpoint, 'budget': budget}
    told = {'intro': f'In {runtime}, one image at a time.', 'how': 'Choices were timed in turns.'}
    told |= {'title': 'Time against accuracy', 'picture': picture}
    machine = describe_machine('cpu')
    report = Report(settings, points, tuning.tables(points), page=told, machine=machine)
    shared.show(report, json_path=json_path, html_path=page)
    click.echo(f'Drawn: {picture}; page: {page}')
    if budget is None:
        return
    chosen = tuning.choose(points, budget)
    predicted = milliseconds(chosen.seconds)
    take_turns([chosen], Setting(rounds=options['rounds'], warmup=1))
    again = milliseconds(chosen.seconds)
    click.echo(f'Chosen: {chosen}; predicted {predicted} ms, measured again {again} ms')
    if runtime == 'pytorch':
        base = config if '::' in config else str(Path(config).resolve())
        click.echo(f'Wrote {tuning.write_choice(chosen, model, cfg, base, out)}')
    else:
        click.echo(f'Export: {chosen.folder(exports)}')
