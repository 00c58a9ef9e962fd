"""The shard format, in one place: names, the manifest, and the index that finds any picture in O(1).

A shards folder is flat::

    train-000000.tar  train-000000.idx  train-000001.tar  ...   WebDataset tars, and DALI's own index beside each
    train.index.npy                                             one row a sample, in shard order, memory-mappable
    val-000000.tar  ...  val.index.npy
    manifest.json                                               written last: a folder without it is not complete

A sample is two tar members, ``<key>.jpg`` (the picture's bytes) and ``<key>.cls`` (the class index in ASCII).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from vimfast.errors import UserError

FORMAT = "vimfast-shards"
VERSION = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "val")

_AGAIN = "run vimfast-prepare again"

# Offsets and sizes are of the JPEG's bytes inside the tar; height and width are those of the decoded picture
# before any EXIF rotation (which nobody here applies); crc32 is zlib's, of the JPEG's bytes.
INDEX_DTYPE = np.dtype(
    [
        ("offset", "<u8"),
        ("size", "<u4"),
        ("shard", "<u4"),
        ("label", "<i4"),
        ("crc32", "<u4"),
        ("height", "<u4"),
        ("width", "<u4"),
    ]
)


def shard_name(split: str, number: int) -> str:
    """``train-000042.tar``."""
    return f"{split}-{number:06d}.tar"


def dali_index_name(split: str, number: int) -> str:
    """``train-000042.idx``: the index that DALI's ``fn.readers.webdataset`` wants beside a tar."""
    return f"{split}-{number:06d}.idx"


def index_name(split: str) -> str:
    """``train.index.npy``."""
    return f"{split}.index.npy"


def is_shards_folder(folder: Path) -> bool:
    """Whether `folder` holds shards, finished or not: a manifest, or tars named as ours."""
    return (folder / MANIFEST).is_file() or any(any(folder.glob(f"{split}-*.tar*")) for split in SPLITS)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished shards folder.

    Raises:
        UserError: no manifest (the conversion did not finish), not ours, damaged, or of a newer format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(
            f"{folder} has no {MANIFEST}: the conversion did not finish", "run vimfast-prepare again, it resumes"
        )
    try:
        manifest = json.loads(path.read_text())
        name, version = manifest["format"], int(manifest["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error})", _AGAIN) from None
    if name != FORMAT:
        raise UserError(f"{path} says format {name!r}, not {FORMAT!r}", "point at a folder that vimfast-prepare wrote")
    if version > VERSION:
        raise UserError(
            f"{path} is of format {version}, this vimfast reads up to {VERSION}", "upgrade vimfast to read it"
        )
    return manifest


def read_index(folder: Path, split: str, samples: int) -> np.ndarray:
    """The memory-mapped index of one split: `samples` rows of ``INDEX_DTYPE``.

    Raises:
        UserError: missing, damaged, or with another number of rows than the manifest says.
    """
    path = folder / index_name(split)
    try:
        index = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path} is missing", _AGAIN) from None
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path} is damaged ({error})", _AGAIN) from None
    if index.dtype != INDEX_DTYPE:
        raise UserError(f"{path} has columns {index.dtype}, not {INDEX_DTYPE}", _AGAIN)
    if index.shape != (samples,):
        raise UserError(f"{path} has {index.shape[0]} samples, the manifest says {samples}", _AGAIN)
    return index
