"""What an examination finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["green", "yellow", "red"]


@dataclass(frozen=True)
class Line:
    """One thing that was looked at.

    Attributes:
        part: what it is a part of, ``"software"`` or ``"machine"``.
        what: its name.
        state: yellow: works, but slower or with less than it could; red: something that vimfast needs does not work.
        found: what is there, or what is wrong.
        fix: what to do; empty only where the state is green.
        figures: those in `found`, as numbers.
    """

    part: str
    what: str
    state: State
    found: str
    fix: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.fix or self.state == "green", f"{self.what} has no fix"
