"""``mmlite env``: what runs here."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click

from .shared import FILE, print_table, write_json

# Import name -> the distributions that provide it. The first one found is shown.
_PACKAGES = {
    'mmlite': ('mmlite-detr',),
    'torch': ('torch',),
    'triton': ('triton',),
    'mmengine': ('mmengine', 'onedl-mmengine'),
    'mmcv': ('mmcv', 'mmcv-lite', 'onedl-mmcv'),
    'mmdet': ('mmdet', 'onedl-mmdetection'),
    'pycocotools': ('pycocotools',),
}


@click.command()
@click.option(
    '--json',
    'json_path',
    type=FILE,
    is_flag=False,
    flag_value='-',
    help='Write the results here, too. Without a file: print them instead of tables.',
)
def env(json_path: Path | None) -> None:
    """Show versions, devices and which backend of the operators runs, and why.

    \b
    Example:
      mmlite env
      mmlite env --json env.json
    """
    report = collect()
    if json_path == Path('-'):
        click.echo(json.dumps(report, indent=2))
        return
    write_json(json_path, report)
    print_table('Versions', ('package', 'version'), report['versions'].items())
    print_table('Machine', ('device', 'detail'), report['machine'].items())
    backends = [
        (backend['name'], 'yes' if backend['available'] else 'no', backend['detail'])
        for backend in report['backends']
    ]
    print_table('Backends of mmlite.ops', ('backend', 'runs', 'detail'), backends)


def collect() -> dict:
    """What ``mmlite env --json FILE`` writes."""
    import torch

    from ..ops import backends

    devices = range(torch.cuda.device_count())
    gpus = {f'cuda:{index}': torch.cuda.get_device_name(index) for index in devices}
    capability = torch.backends.cpu.get_cpu_capability()
    cpu = f'{platform.machine()}, {torch.get_num_threads()} threads, {capability}'
    return {
        'versions': {'python': platform.python_version(), **{n: _version(n) for n in _PACKAGES}},
        'machine': {'cpu': cpu, **(gpus or {'cuda': 'none'}), **_tools()},
        'backends': [status._asdict() for status in backends()],
    }


def _tools() -> dict[str, str]:
    """Compilers and libraries, as far as mmengine is there to collect them."""
    try:
        from mmengine.utils.dl_utils import collect_env
    except ImportError:
        return {}
    found = collect_env()
    return {name: found[name] for name in ('GCC', 'CUDA_HOME', 'NVCC', 'OpenCV') if name in found}


def _version(name: str) -> str:
    for distribution in _PACKAGES[name]:
        try:
            found = version(distribution)
        except PackageNotFoundError:
            continue
        return found if distribution == _PACKAGES[name][0] else f'{found} ({distribution})'
    return 'not installed'
