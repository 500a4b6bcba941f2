"""``mmlite env``: what runs here."""

from __future__ import annotations

import json
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click

from .shared import FILE, print_table, write_json

# What a package is called here -> the distributions that provide it; the first one found is shown.
_PACKAGES = {
    'mmlite': ('mmlite-detr',),
    **{name: (name,) for name in ('torch', 'triton', 'pycocotools')},
    'mmengine': ('mmengine', 'onedl-mmengine'),
    'mmcv': ('mmcv', 'mmcv-lite', 'onedl-mmcv'),
    'mmdet': ('mmdet', 'onedl-mmdetection'),
}
_HELP = 'Write the results here, too. Without a file: print them instead of tables.'


@click.command()
@click.option('--json', 'json_path', type=FILE, is_flag=False, flag_value='-', help=_HELP)
def env(json_path: Path | None) -> None:
    """Show versions, devices and which backend of the operators runs, and why.

    \b
    Example:
      mmlite env --json env.json
    """
    import torch

    from ..analysis.timing import describe_machine
    from ..export.runtimes import processor_gains
    from ..ops import backends

    devices = range(torch.cuda.device_count())
    gpus = {f'cuda:{index}': torch.cuda.get_device_name(index) for index in devices}
    machine = {**describe_machine(), **(gpus or {'cuda': 'none'})}
    machine |= {f'{kind} in OpenVINO': text for kind, (_, text) in processor_gains().items()}
    with suppress(ImportError):  # mmengine collects compilers and libraries
        from mmengine.utils.dl_utils import collect_env

        wanted = ('GCC', 'CUDA_HOME', 'NVCC', 'OpenCV')
        machine |= {name: found for name, found in collect_env().items() if name in wanted}
    status = [status._asdict() for status in backends()]
    versions = {name: _version(name) for name in _PACKAGES}
    report = {'versions': versions, 'machine': machine, 'backends': status}
    if json_path == Path('-'):
        click.echo(json.dumps(report, indent=2))
        return
    write_json(json_path, report)
    print_table('Versions', ('package', 'version'), versions.items())
    print_table('Machine', ('device', 'detail'), machine.items())
    rows = [(s.name, 'yes' if s.available else 'no', s.detail) for s in backends()]
    print_table('Backends of mmlite.ops', ('backend', 'runs', 'detail'), rows)


def _version(name: str) -> str:
    for distribution in _PACKAGES[name]:
        with suppress(PackageNotFoundError):
            own = '' if distribution == _PACKAGES[name][0] else f' ({distribution})'
            return f'{version(distribution)}{own}'
    return 'not installed'
