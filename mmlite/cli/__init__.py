"""The ``mmlite`` command. Each subcommand lives in the file of its name and is imported on use."""

from __future__ import annotations

import atexit
import gc
import importlib
import warnings

import click

from .shared import HELP, spread

# Subcommand -> the line that `mmlite --help` shows for it.
COMMANDS = {
    'demo': 'Train and evaluate a small Lite-DINO on shapes drawn for it.',
    'detect': 'Find objects in images, folders, videos or a camera, and draw them.',
    'check': 'Read every image and annotation of a config, and see whether they fit its model.',
    'convert': "Convert the authors' checkpoints to MMDetection and back, or start from stock.",
    'tune': 'Find the schedule, image size and depth that fit a budget of time best.',
    'export': 'Write a detector for ONNX Runtime, OpenVINO or torch.export.',
    'quantize': 'Write an exported OpenVINO detector in 8 bits.',
    'lite-config': 'Write the Lite config of a stock config, or say which schedules fit.',
    'env': 'Show versions, devices and which backend of the operators runs.',
    'benchmark': 'Measure operators, encoders or detectors against each other.',
    'visualize': 'Draw sampling points, and detections beside the ground truth.',
}

STACK = ('torch', 'mmengine', 'mmcv', 'mmdet')  # what an installation for exports alone lacks


class _Commands(click.Group):
    """Imports a subcommand when it is used, and turns bad input into one sentence."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, spread(args))

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = name.replace('-', '_')
        return getattr(importlib.import_module(f'{__name__}.{module}'), module)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # The table above spares `mmlite --help` the import of every subcommand.
        with formatter.section('Commands'):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context):
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, ImportError) as error:
            if ctx.params['debug']:
                raise
            reason = str(error)
            if getattr(error, 'name', None) in STACK:
                reason = f"this needs {error.name}: pip install 'mmlite-detr[openmmlab]'"
            raise click.ClickException(reason) from error


@click.group(cls=_Commands, context_settings=HELP)
@click.option('--debug', is_flag=True, help='Show the traceback of an error.')
@click.version_option(package_name='mmlite-detr')
def main(debug: bool) -> None:
    """Lite DETR for MMDetection: efficient encoders that are fast on the clock."""
    warnings.filterwarnings('ignore')  # those of the stack about itself bury what is printed
    atexit.register(gc.freeze)  # or Python's last act is to look through millions of objects
