"""Importing this lets repositories run without compiling; see :mod:`mmlite.models.standins`."""

from .models.standins import install

install()
