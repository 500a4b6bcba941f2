"""``mmlite tune``: the most accurate detector within a time, of one set of weights."""

from __future__ import annotations

import base64
import re
import warnings
from pathlib import Path

import click

from . import shared


class Milliseconds(click.ParamType):
    """A time, written 300ms or 0.3s; in seconds."""

    name = 'TIME'

    def convert(self, value, param, ctx) -> float:
        match = re.fullmatch(r'(\d+(?:\.\d*)?)(ms|s)', str(value))
        if not match or not float(match[1]):
            self.fail(f'{value!r} is no time; write for example 300ms')
        return float(match[1]) / (1000 if match[2] == 'ms' else 1)


@click.command()
@shared.config_argument
@click.argument('checkpoint')
@click.option('--budget', type=Milliseconds(), help='Of an image, for example 300ms.')
@shared.option(
    '--runtime', type=click.Choice(['pytorch', 'onnxruntime', 'openvino']), default='pytorch'
)
@shared.image_size_option(
    'image_sizes', multiple=True, default=[(800, 1333)], help='Give it more than once for more.'
)
@shared.count_option('--decoder-layers', multiple=True, help='Layers to keep. Default: all.')
@shared.flag('--int8', help='Also in 8 bits, in OpenVINO; needs NNCF.')
@shared.images_option(help='Images or folders: to agree on, and to calibrate 8 bits.')
@shared.annotations_option(help='COCO annotations, to measure AP instead of agreement.')
@shared.option('--annotated-images', type=shared.FOLDER, help='Folder of their images.')
@shared.out_option('Folder for the chosen detector, the picture and the page.', required=True)
@shared.count_option('--rounds', default=4, help='Measurements of each.')
@shared.threads_option
@shared.cfg_options
@shared.json_option
def tune(
    config: str,
    checkpoint: str,
    budget: float | None,
    runtime: str,
    image_paths: tuple[Path, ...],
    annotations: Path | None,
    annotated_images: Path | None,
    out: Path,
    rounds: int,
    threads: int | None,
    cfg_options: dict,
    json_path: Path | None,
    **options,
) -> None:
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
    if (annotations is None) != (annotated_images is None):
        raise ValueError('--annotations and --annotated-images go together')
    cfg = shared.read_config(config, cfg_options)
    import torch

    from ..analysis import tune as tuning
    from ..analysis.accuracy import Dataset
    from ..analysis.report import Report, milliseconds
    from ..analysis.timing import Setting, describe_machine, measure
    from ..export.detector import read_image
    from ..export.pipeline import preprocessing
    from ..openmmlab.build import build_detector

    warnings.filterwarnings('ignore')
    if threads:
        torch.set_num_threads(threads)
    annotated = None
    if annotations is not None:
        Dataset(annotations, annotated_images).check()
        annotated = annotations, annotated_images
    files = shared.image_files(image_paths) if image_paths else []
    decoder = preprocessing(cfg)['decoder']
    images = [read_image(file, decoder) for file in files]
    model = build_detector(cfg, checkpoint)
    out.mkdir(parents=True, exist_ok=True)
    with shared.progress() as start:
        points = tuning.tune(
            model,
            cfg,
            runtime,
            images=images,
            annotated=annotated,
            rounds=rounds,
            folder=out / 'exports',
            start=start,
            **options,
        )
    best = tuning.front(points)
    tables = [
        tuning.table(best, 'What nothing else beats in time and accuracy'),
        tuning.table(points, 'All that was tried'),
    ]
    settings = {'runtime': runtime, 'config': config, 'checkpoint': checkpoint, 'budget': budget}
    page = {'title': 'Time against accuracy', 'intro': f'In {runtime}, one image at a time.'}
    page |= {'how': 'All choices were timed in turns.', 'bars': {}}
    report = Report(settings, points, tables, page=page, machine=describe_machine('cpu'))
    for each in tables:
        shared.print_table(each.title, each.columns, each.rows, justify='right')
    tuning.draw(points, out / 'front.png', budget)
    page['picture'] = base64.b64encode((out / 'front.png').read_bytes()).decode()
    (out / 'report.html').write_text(report.html())
    shared.write_json(json_path, report.as_json())
    click.echo(f'Drawn: {out / "front.png"}; page: {out / "report.html"}')
    if budget is not None:
        chosen = tuning.choose(points, budget)
        again = measure({0: chosen.call}, Setting(rounds=rounds, warmup=1))[0].median
        click.echo(
            f'Chosen: {chosen.choice}; predicted {milliseconds(chosen.seconds)} ms, '
            f'measured again {milliseconds(again)} ms'
        )
        if runtime == 'pytorch':
            base = config if '::' in config else str(Path(config).resolve())
            click.echo(f'Wrote {tuning.write_choice(chosen, model, cfg, base, out)}')
        else:
            click.echo(f'Export: {tuning.export_folder(chosen.choice, out / "exports")}')
