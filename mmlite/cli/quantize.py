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
@shared.annotations_option(help='COCO annotations to measure AP on, before and after.')
@shared.option('--annotated-images', type=shared.FOLDER, help='Folder of their images.')
def quantize(source: Path, out: Path, image_paths, count, annotations, annotated_images) -> None:
    """Write the OpenVINO export in SOURCE once more, in 8 bits, calibrated on your images.

    It needs NNCF: pip install 'mmlite-detr[quantize]'. Heads, sampling offsets and positions stay
    in float32. An export for images of one size gains most.

    \b
    Example:
      mmlite export my_config.py epoch_12.pth --format openvino --image-size 800 1333 -o exported
      mmlite quantize exported -o exported-int8 --images data/train
    """
    from ..analysis.accuracy import Dataset
    from ..export import load
    from ..export import quantize as write_quantized
    from ..export.int8 import coco_ap, import_nncf

    import_nncf()
    if (annotations is None) != (annotated_images is None):
        raise ValueError('--annotations and --annotated-images go together')
    if annotations is not None:
        Dataset(annotations, annotated_images).check()
    files = shared.image_files(image_paths)
    count = min(count, len(files))
    chosen = [files[index * len(files) // count] for index in range(count)]
    detector = write_quantized(source, out, chosen)
    console = shared.console()
    console.print(f'[bold]{escape(str(out))}[/bold]: {detector.description["model"]}')
    if annotations is not None:
        before, after = (
            coco_ap(d, annotations, annotated_images) for d in (load(source), detector)
        )
        console.print(f'AP {before:.1f} before, {after:.1f} after')
