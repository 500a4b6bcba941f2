"""``mmlite quantize``: an exported detector in 8 bits."""

from __future__ import annotations

from pathlib import Path

import click
from rich.markup import escape

from . import shared


@click.command()
@click.argument('source', type=shared.FOLDER)
@shared.out_option('The folder to write.', required=True)
@shared.images_option(required=True, help='An image or a folder to calibrate on; can be repeated.')
@shared.count_option('--count', default=128, help='Calibrate on so many images, evenly spread.')
@shared.dataset_options('COCO annotations to measure AP on, before and after.')
def quantize(source: Path, out: Path, files: list[Path], count: int, dataset) -> None:
    """Write the OpenVINO export in SOURCE once more, in 8 bits, calibrated on your images.

    It needs NNCF: pip install 'mmlite-detr[quantize]'. Heads, sampling offsets and positions stay
    in float32. An export for images of one size gains most.

    \b
    Example:
      mmlite export my_config.py epoch_12.pth --format openvino --image-size 800 1333 -o exported
      mmlite quantize exported -o exported-int8 --images data/train
    """
    from ..export import load
    from ..export import quantize as write_quantized
    from ..export.int8 import import_nncf

    import_nncf()
    count = min(count, len(files))
    chosen = [files[index * len(files) // count] for index in range(count)]
    detector = write_quantized(source, out, chosen)
    console = shared.console()
    console.print(f'[bold]{escape(str(out))}[/bold]: {detector.description["model"]}')
    if dataset is not None:
        before, after = (dataset.evaluate(each)['mAP'] for each in (load(source), detector))
        console.print(f'AP {before:.1f} before, {after:.1f} after')
