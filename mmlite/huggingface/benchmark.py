"""``python -m`` of this is an older way to say ``mmlite benchmark transformers``."""

from __future__ import annotations

import sys


def translate(arguments: list[str]) -> list[str]:
    """The arguments of that time as those of ``mmlite``."""
    line = ['benchmark', 'transformers']
    rest = iter(arguments)
    for word in rest:
        if word == '--size':
            line += ['--image-size', f'{next(rest)}x{next(rest)}']
        else:
            line.append('--rounds' if word == '--repeat' else word)
    return line


if __name__ == '__main__':
    from mmlite.cli import main

    main(translate(sys.argv[1:]))
