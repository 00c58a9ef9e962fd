"""Where what was measured or compiled once is kept for later processes."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``vimfast`` in ``$XDG_CACHE_HOME``, or in ``~/.cache`` where that is not set or, as its specification says, is a
    relative path.

    Raises:
        RuntimeError: this user has no home.
    """
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "vimfast"
