import json
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from mmlite.cli import COMMANDS, main
from mmlite.cli.shared import cfg_options, image_size_option, out_option, spread
from mmlite.export.runtimes import processor_gains


@click.command()
@click.argument('config')
@cfg_options
@image_size_option()
@out_option('A picture.', '.png')
def command(**values):
    for name, value in values.items():
        click.echo(f'{name} {value}')


def run(*arguments):
    return CliRunner().invoke(command, spread(arguments)).output


@pytest.mark.parametrize(
    ('arguments', 'understood'),
    [
        # Several changes follow one option, as in MMDetection's tools.
        (
            '--cfg-options model.a=3 model.b=1,2.5 c=[(1,x)] -o a=b my.py',
            "cfg_options {'model.a': 3, 'model.b': [1, 2.5], 'c': [(1, 'x')]}",
        ),
        ('--cfg-options model.a=3 -o a=b my.py', 'out a=b.png'),
        ('my.py --cfg-options model', 'write KEY=VALUE'),
        ('my.py --image-size 320 480', 'image_size (320, 480)'),
        ('my.py --image-size=320x480', 'image_size (320, 480)'),
        ('my.py --out a', 'out a.png'),
        ('my.py --out a/b.pdf', 'out a/b.pdf'),
    ],
)
def test_options(arguments, understood):
    assert understood in CliRunner().invoke(command, spread(arguments.split())).output


def test_spellings_of_the_first_version_go_on_working():
    assert spread(['--image', 'a.png', '--image=b.png']) == ['--images', 'a.png', '--images=b.png']
    assert spread(['--image-size', '8x9']) == ['--image-size', '8', '9']


def test_help_imports_neither_torch_nor_mmdetection():
    code = (
        "import sys; from mmlite.cli import main; main(['--help'], standalone_mode=False); "
        "sys.exit(bool({'torch', 'mmengine', 'mmdet'} & set(sys.modules)))"
    )
    assert 'lite-config' in subprocess.check_output([sys.executable, '-c', code], text=True)


SUBCOMMANDS = [
    f'{name} {own}'
    for name in ('benchmark', 'visualize')
    for own in main.get_command(None, name).commands
]


@pytest.mark.parametrize('name', [*COMMANDS, *SUBCOMMANDS])
def test_help_has_an_example(name):
    result = CliRunner().invoke(main, [*name.split(), '--help'])
    assert result.exit_code == 0
    assert f'mmlite {name}' in result.output.partition('Example:')[2]


def test_env_speaks_to_people_and_programs(tmp_path):
    result = CliRunner().invoke(main, ['env', '--json', str(tmp_path / 'env.json')])
    assert result.exit_code == 0, result.output
    assert all(text in result.output for text in ('torch', 'mmdet', 'reference'))
    written = json.loads((tmp_path / 'env.json').read_text())
    printed = json.loads(CliRunner().invoke(main, ['env', '--json']).output)
    assert written['versions'] == printed['versions']
    gains = {f'{kind} in OpenVINO': text for kind, (_, text) in processor_gains().items()}
    assert gains.items() <= written['machine'].items()


@pytest.mark.parametrize(
    ('command', 'sentence'),
    [
        ('env', "this needs torch: pip install 'mmlite-detr[openmmlab]'"),
        ('detect nowhere 0 -o out', 'nowhere does not exist: give a config and its checkpoint, or'),
    ],
)
def test_without_torch_a_sentence_says_what_to_do(command, sentence):
    code = (
        "import sys; sys.modules['torch'] = None; from mmlite.cli import main; "
        f'main({command.split()})'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 1 and sentence in done.stderr
