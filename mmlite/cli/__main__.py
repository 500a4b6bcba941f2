"""``python -m mmlite.cli`` is the ``mmlite`` command."""

from . import main

main(prog_name='mmlite')
