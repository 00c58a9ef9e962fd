"""From a template and what it shows to a page."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import vimfast.pages.charts as charts

_OWN = Path(__file__).parent


def render(template: Path, **shown: Any) -> bytes:
    """A page of HTML in UTF-8.

    It loads nothing and runs nothing, which it forbids its browser too: what names of files and classes say is text.

    Args:
        template: extends ``base.html``, and may import ``charts.html``.
        shown: what it refers to. Text that is not valid Unicode, as names of files may be, is shown escaped.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, _OWN]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["jpeg"] = lambda data: f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
    environment.filters["paths"] = lambda text: Markup("/<wbr>").join(text.split("/"))  # they may break after a slash
    environment.globals["style"] = Markup((_OWN / "style.css").read_text())
    environment.globals["plot"] = charts
    return environment.get_template(template.name).render(shown).encode("utf-8", "backslashreplace")
