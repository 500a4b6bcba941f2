"""Run ``mmlite`` in this process."""

import re

from click.testing import CliRunner, Result

from mmlite.cli import main


def invoke(*words) -> Result:
    """Run the command of these words, which may be paths and numbers."""
    return CliRunner().invoke(main, [*map(str, words)])


def mmlite(*words) -> str:
    """What a command prints that succeeds."""
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    return result.output


def refused(sentence: str, *words) -> str:
    """What a command prints that fails with a sentence, a regular expression, and no traceback."""
    result = invoke(*words)
    assert result.exit_code != 0 and isinstance(result.exception, SystemExit), result.output
    assert re.search(sentence, ' '.join(result.output.split())), result.output
    return result.output
