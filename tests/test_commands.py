"""Every command that README and docs name exists, and something runs it."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import click
import mmdet
import pytest
from torch.distributed.run import get_args_parser

from mmlite.cli import main

mim = pytest.importorskip('mim.cli', reason='openmim is not installed')

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / 'README.md',
    ROOT / 'CONTRIBUTING.md',
    *sorted(ROOT.glob('docs/*.md')),
    *sorted(ROOT.glob('configs/*/README.md')),
]
PROGRAMS = ('mmlite', 'mim', 'make', 'torchrun', 'python')
TOOLS = Path(mmdet.__path__[0]) / '.mim/tools'

# What the pages name -> what runs it, and has these words in it.
RUN_BY = {
    'mmlite benchmark': ('tests/cli/test_benchmark.py', "'benchmark'"),
    'mmlite check': ('tests/cli/test_check.py', "'check'"),
    'mmlite convert': ('tests/cli/test_convert.py', "'convert'"),
    'mmlite demo': ('tests/cli/test_demo.py', "'demo'"),
    'mmlite export': ('tests/export/test_export.py', "'export'"),
    'mmlite env': ('tests/cli/test_env.py', "'env'"),
    'mmlite lite-config': ('tests/cli/test_lite_config.py', "'lite-config'"),
    'python -m benchmarks.study': ('tests/benchmarks/study/test_command.py', 'benchmarks.study'),
    'mmlite quantize': ('tests/export/test_int8.py', "'quantize'"),
    'mmlite visualize': ('tests/cli/test_visualize.py', "'visualize'"),
    'mim run': ('tests/analysis/test_complexity.py', 'get_flops'),
    'mim search': ('tests/test_mim.py', "'search'"),
    'mim test': ('tests/test_mim.py', "'test'"),
    'mim train': ('tests/test_mim.py', "'train'"),
    'torchrun': ('tests/test_cluster.py', 'torch.distributed.run'),
    'python $TOOLS/train.py': ('tests/test_mim.py', "mmdetection('train'"),
    'python $TOOLS/test.py': ('tests/test_mim.py', "mmdetection('test'"),
    'python tools/wheels.py': ('Makefile', 'tools/wheels.py'),
    'python benchmarks/peers.py': ('tests/benchmarks/test_peers.py', 'peers'),
    'python benchmarks/busy_machine.py': ('tests/test_tools.py', "'busy_machine.py'"),
    'python benchmarks/compare_builds.py': ('tests/test_tools.py', "'compare_builds.py'"),
    'python benchmarks/decompositions.py': ('tests/test_tools.py', "'decompositions.py'"),
    'python tests/helpers/triton_compile.py': ('tests/ops/test_triton.py', 'triton_compile'),
}


class Command(NamedTuple):
    page: str
    text: str
    words: list[str]


def commands() -> list[Command]:
    """Lines of shell blocks and code between backticks that start with one of the programs."""
    found = []
    for page in PAGES:
        text = page.read_text()
        fenced = re.compile(r'^ *```(\w*)[^\n]*\n(.*?)^ *```', re.DOTALL | re.MULTILINE)
        blocks = [code for language, code in fenced.findall(text) if language in ('', 'sh')]
        lines = re.sub(r'\\\n\s*', '', '\n'.join(blocks)).splitlines()
        prose = fenced.sub('', text)
        for line in [*map(str.strip, lines), *re.findall(r'`([^`\n]+)`', prose)]:
            if not re.match(rf'(\w+=\S+ )*({"|".join(PROGRAMS)}) ', line):
                continue
            words = shlex.split(line, comments=True)
            while '=' in words[0]:
                del words[0]
            if len(words) > 1 and not set(words) & {'...', '|'}:
                found.append(Command(str(page.relative_to(ROOT)), line, words))
    return found


FOUND = commands()


def of(*programs: str):
    chosen = [command for command in FOUND if command.words[0] in programs]
    return pytest.mark.parametrize('command', chosen, ids=lambda c: f'{c.page}: {c.text}')


def options(words: list[str]) -> set[str]:
    return {word.partition('=')[0] for word in words if re.match(r'--?[a-z]', word)}


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
    assert subcommand is not None
    known = {o for p in subcommand.params for o in (*p.opts, *p.secondary_opts)}
    # What mim does not know it hands on to the script.
    script = {'train': 'train.py', 'test': 'test.py', 'run': 'analysis_tools/get_flops.py'}.get(
        name
    )
    if script is not None:
        known |= set(re.findall(r"'(--[\w-]+)'", (TOOLS / script).read_text()))
    assert options(rest) <= known


@of('make')
def test_make(command):
    makefile = (ROOT / 'Makefile').read_text()
    for word in command.words[1:]:
        if '=' in word:
            assert f'$({word.partition("=")[0]})' in makefile
        else:
            assert re.search(rf'^{word}:', makefile, re.MULTILINE), f'no target {word}'


@of('torchrun')
def test_torchrun(command):
    parsed = get_args_parser().parse_args(command.words[1:])
    assert parsed.training_script == '$TRAIN'
    script = parsed.training_script_args
    assert options(script) <= set(re.findall(r"'(--[\w-]+)'", (TOOLS / 'train.py').read_text()))


@of('python')
def test_python(command):
    _, first, *rest = command.words
    if first == '-m':
        assert find_spec(rest[0])
    elif first == '-c':
        compile(rest[0], command.text, 'exec')
    elif first.startswith('$TOOLS/'):
        script = (TOOLS / first[7:]).read_text()
        assert options(rest) <= set(re.findall(r"'(--[\w-]+)'", script))
    else:
        assert (ROOT / first).is_file()


def test_configs_that_are_named_are_there():
    for command in FOUND:
        for word in command.words:
            assert not word.startswith('configs/') or (ROOT / word).is_file(), command


def test_each_is_run_by_something():
    named = set()
    for command in FOUND:
        program, first, *_ = command.words
        if program in ('mmlite', 'mim') or (program == 'python' and first.endswith('.py')):
            named.add(f'{program} {first}')
        elif program == 'torchrun':
            named.add(program)
    assert named <= set(RUN_BY), 'say in RUN_BY which test runs it'
    for path, words in RUN_BY.values():
        assert words in (ROOT / path).read_text(), path
