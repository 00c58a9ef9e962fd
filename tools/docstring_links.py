"""An extension of Griffe, which reads the docstrings for docs/api.md: Sphinx's roles become links of the site.

Docstrings say ``:class:`~vimfast.data.loader.Loader```, as Python's own documentation does.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`(~?)([^`]+)`")


class DocstringLinks(Extension):
    """Puts links where roles are, object by object."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(_linked, obj.docstring.value)


def _linked(role: re.Match[str]) -> str:
    """The name as code; a link where the site has what it means, which takes a name in full."""
    short, name = role.groups()
    return f'<autoref identifier="{name}" optional><code>{name.rpartition(".")[2] if short else name}</code></autoref>'
