"""``mmlite export``: a detector for ONNX Runtime, OpenVINO or torch.export."""

from __future__ import annotations

import gc
from pathlib import Path

import click
from rich.markup import escape

from . import shared
from .shared import option

# What float32 leaves of a box, in parts of the image, and of a score. A pixel whose logit is near
# zero may be on either side of it, and moves the box around a mask by whole pixels.
TOLERANCE, MASK_TOLERANCE = 1e-4, 1e-2
_FORMATS = ['onnx', 'openvino', 'torch', 'web', 'tensorrt', 'executorch', 'coreml']


@click.command()
@shared.config_argument
@click.argument('checkpoint', required=False)
@option(
    '--format',
    type=click.Choice(_FORMATS),
    default='onnx',
    help='torch: a .pt2 file of torch.export; web: a page for browsers, with a runtime from npm; '
    'tensorrt: ONNX with its plugin, and coreml: an .mlpackage, which are not run here; executorch '
    'and coreml take one --image-size.',
)
@shared.out_option('The folder to write.', required=True)
@option('--schedule', help='One of those that an elastic detector was trained with.')
@shared.image_size_option('size', default=None, help='Fit images into a canvas. Default: any size.')
@option('--batch-size', default='1', metavar='N|any', help='Images at a time.')
@click.option(
    '--portable',
    type=click.Choice(['gridsample', 'gather']),
    is_flag=False,
    flag_value='gridsample',
    help='Use no operators of mmlite: for runtimes that take none. Slower. gather is for those '
    'without GridSample, too. Alone: gridsample.',
)
@option('--opset', default=18, help="Version of ONNX's operators, 18 to 21.")
@shared.images_option(help='An image or a folder to compare with PyTorch on; can be repeated.')
@option('--text', help='Of Grounding DINO: "cat . dog". Default: the classes of the config.')
@shared.cfg_options
def export(
    config,
    checkpoint,
    out: Path,
    schedule,
    portable,
    batch_size: str,
    files,
    text,
    cfg_options,
    **options,
) -> None:
    """Export the detector of CONFIG with the weights of CHECKPOINT, from image to boxes.

    CONFIG is a path, or the name of a packaged config such as mmdet::dino/x.py. Exported are
    Deformable DETR, DINO, H-Deformable-DETR, DDQ-DETR, Grounding DINO (for one text) and
    Mask2Former, stock and Lite. Written are the model, detector.json, which describes it, and
    report.json: the largest difference from PyTorch and the time of both. Without --images a drawn
    image is compared. mmlite.export.load(FOLDER) runs the model without torch and MMDetection.

    \b
    Example:
      mmlite export my_config.py epoch_12.pth --format openvino -o exported --images data/val
    """
    gc.disable()  # looking through millions of objects takes a sixth of an export
    click.get_current_context().call_on_close(gc.enable)
    cfg = shared.read_config(config, cfg_options)
    import cv2
    import numpy as np

    from ..export.compare import REPORT, compare
    from ..export.detector import read_image
    from ..export.pipeline import preprocessing
    from ..export.program import check_config
    from ..export.write import export_detector, need_packages
    from ..models import use_schedule
    from ..openmmlab.build import build_detector

    if batch_size != 'any' and not (batch_size.isdecimal() and int(batch_size)):
        raise ValueError(f"--batch-size must be a number of images or 'any'; got {batch_size!r}")
    need_packages(options['format'])
    options['portable'] = portable or False
    options['batch'] = None if batch_size == 'any' else int(batch_size)
    if text is not None:
        options['text'] = [name.strip() for name in text.split('.') if name.strip()]
    decoder = preprocessing(cfg)['decoder']
    images = [read_image(file, decoder) for file in files]
    if not images:  # soft random colours
        coarse = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
        images = [cv2.resize(coarse, (1333, 800), interpolation=cv2.INTER_CUBIC)]
    check_config(cfg.model)
    model = build_detector(cfg, checkpoint)
    if schedule is not None:
        use_schedule(model, schedule)
    console = shared.console()
    with console.status('Tracing and writing the model'):
        detector = export_detector(model, out, config=cfg, **options)
    if detector is None:
        console.print(f'[bold]{escape(str(out))}[/bold]: not run here; docs/deploy.md says how')
        return
    with console.status('Comparing with PyTorch'):
        report = compare(model, detector, images, cfg)
    shared.write_json(out / REPORT, report)

    has_masks = 'masks' in detector.description['outputs']
    times = ', '.join(f'{name} {time:.0f} ms' for name, time in report['latency_ms'].items())
    console.print(
        f'[bold]{escape(str(out))}[/bold]: {detector.description["model"]}\n'
        f'largest difference from PyTorch on {report["images"]} images: '
        f'{report["boxes"]:.1e} of a side of the image, scores {report["scores"]:.1e}'
        + (f', {report["masks"]:.1e} of the pixels of a mask' if has_masks else '')
        + f'\none run of {report["batch"]} images: {times} on {report["threads"]} threads'
    )
    tolerated = report['masks'] <= MASK_TOLERANCE if has_masks else report['boxes'] <= TOLERANCE
    if tolerated and report['scores'] <= TOLERANCE:
        return
    differs = (
        f'the exported model differs from PyTorch by more than {TOLERANCE} ({MASK_TOLERANCE} of '
        f'the pixels of a mask); see {out / REPORT}'
    )
    if checkpoint is not None:
        raise ValueError(differs)
    console.print(f'[yellow]{escape(differs)}. Random weights score all alike, so rounding chooses')
