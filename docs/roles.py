"""Docstrings use Sphinx's roles, which Markdown shows as they stand; here they become code."""

from __future__ import annotations

import re

from griffe import Docstring, Extension, Object

_ROLE = re.compile(r':(?:attr|class|data|exc|func|math|meth|mod):(`+)~?(.+?)\1', re.DOTALL)


class Roles(Extension):
    """Turns ``:class:`x``` into ``x`` before the docstrings are parsed."""

    def on_object(self, *, obj: Object, **kwargs: object) -> None:
        if isinstance(obj.docstring, Docstring):
            obj.docstring.value = _ROLE.sub(r'`\2`', obj.docstring.value)
