"""Every command that README and docs name exists."""

import re
import shlex
from collections import namedtuple
from importlib.util import find_spec
from pathlib import Path

import click
import mmdet
import pytest
from torch.distributed.run import get_args_parser

from mmlite.cli import main

mim = pytest.importorskip('mim.cli', reason='openmim is not installed')

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / 'README.md', ROOT / 'CONTRIBUTING.md'),
    *sorted([*ROOT.glob('docs/*.md'), *ROOT.glob('configs/*/README.md')]),
]
PROGRAMS = 'mmlite|mim|make|torchrun|python'
TOOLS = Path(mmdet.__path__[0]) / '.mim/tools'
# What mim hands on to a script of MMDetection.
SCRIPTS = {'train': 'train.py', 'test': 'test.py', 'run': 'analysis_tools/get_flops.py'}


Command = namedtuple('Command', 'page text words')


def commands() -> list[Command]:
    """Lines of shell blocks and code between backticks that start with one of the programs."""
    found = []
    fenced = re.compile(r'^ *```(\w*)[^\n]*\n(.*?)^ *```', re.DOTALL | re.MULTILINE)
    for page in PAGES:
        text = page.read_text()
        blocks = [code for language, code in fenced.findall(text) if language in ('', 'sh')]
        lines = re.sub(r'\\\n\s*', '', '\n'.join(blocks)).splitlines()
        prose = re.findall(r'`([^`\n]+)`', fenced.sub('', text))
        for line in [*map(str.strip, lines), *prose]:
            if not re.match(rf'(\w+=\S+ )*({PROGRAMS}) ', line):
                continue
            words = shlex.split(line, comments=True)
            while '=' in words[0]:
                del words[0]
            if len(words) > 1 and not set(words) & {'...', '|'}:
                found.append(Command(str(page.relative_to(ROOT)), line, words))
    return found


FOUND = commands()


def of(program: str):
    chosen = [command for command in FOUND if command.words[0] == program]
    return pytest.mark.parametrize('command', chosen, ids=lambda c: f'{c.page}: {c.text}')


def options(words: list[str]) -> set[str]:
    return {word.partition('=')[0] for word in words if re.match(r'--?[a-z]', word)}


def options_of(script: str) -> set[str]:
    """The options of a script of MMDetection."""
    return set(re.findall(r"'(--[\w-]+)'", (TOOLS / script).read_text()))


@of('mmlite')
def test_mmlite(command):
    parse(main, command.words)


def parse(group: click.Command, words: list[str]) -> None:
    """Parse the words as the command would, down to the values of choices, and run nothing."""
    name, *rest = words
    context = click.Context(group, info_name=name)
    values, positional, order = group.make_parser(context).parse_args(list(rest))
    for parameter in order:
        if isinstance(parameter.type, click.Choice) and isinstance(values[parameter.name], str):
            parameter.type.convert(values[parameter.name], parameter, context)
    if isinstance(group, click.Group) and positional:
        command = group.get_command(context, positional[0])
        assert command is not None, f'{positional[0]} is no command of {name}'
        parse(command, rest[rest.index(positional[0]) :])


@of('mim')
def test_mim(command):
    _, name, *rest = command.words
    subcommand = mim.cli.get_command(click.Context(mim.cli), name)
    known = {o for p in subcommand.params for o in (*p.opts, *p.secondary_opts)}
    assert options(rest) <= known | (options_of(SCRIPTS[name]) if name in SCRIPTS else set())


@of('make')
def test_make(command):
    makefile = (ROOT / 'Makefile').read_text()
    for word in command.words[1:]:
        variable, is_set, _ = word.partition('=')
        pattern = rf'\$\({variable}\)' if is_set else rf'^{word}:'
        assert re.search(pattern, makefile, re.MULTILINE), f'no {word}'


@of('torchrun')
def test_torchrun(command):
    parsed = get_args_parser().parse_args(command.words[1:])
    assert parsed.training_script == '$TRAIN'
    assert options(parsed.training_script_args) <= options_of('train.py')


@of('python')
def test_python(command):
    _, first, *rest = command.words
    if first == '-m':
        assert find_spec(rest[0])
    elif first == '-c':
        compile(rest[0], command.text, 'exec')
    elif first.startswith('$TOOLS/'):
        assert options(rest) <= options_of(first[7:])
    else:
        assert (ROOT / first).is_file()


def test_configs_that_are_named_are_there():
    for command in FOUND:
        for word in command.words:
            assert not word.startswith('configs/') or (ROOT / word).is_file(), command
