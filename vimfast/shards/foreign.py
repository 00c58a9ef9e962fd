"""WebDataset shards that other programs wrote: samples of a tar are members of one name with several extensions."""

from __future__ import annotations

import os
import tarfile
from contextlib import suppress
from itertools import islice
from pathlib import Path

INDEX_SHARDS = "train on them where they are, after vimfast prepare --index-only FOLDER --out indexed/"

_IMAGES, _LABELS = {".jpg", ".jpeg", ".png", ".webp"}, {".cls", ".json", ".txt", ".index"}
_FEW = 8  # members that show it


def is_shard(path: Path) -> bool:
    """Whether a tar holds images with labels in members of their own."""
    if path.suffix != ".tar":
        return False
    with suppress(OSError, tarfile.TarError), tarfile.open(path, "r:") as tar:
        members = [os.path.splitext(member.name) for member in islice(tar, _FEW)]
        images, labels = ({stem for stem, end in members if end.lower() in ends} for ends in (_IMAGES, _LABELS))
        return bool(images & labels)
    return False


def first_shard(folder: Path) -> Path | None:
    """The first of the WebDataset shards in a folder; None: its first tar is none, or it has no tars."""
    with suppress(OSError):
        tars = sorted(path for path in folder.iterdir() if path.suffix == ".tar" and path.is_file())
        return tars[0] if tars and is_shard(tars[0]) else None
    return None
