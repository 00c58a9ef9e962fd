"""The shard format, in one place: names, the manifest, and the index that finds any image in O(1).

A shards folder is flat::

    train-000000.tar  train-000000.idx  train-000001.tar  ...   WebDataset tars, and DALI's own index beside each
    train.index.npy                                             one row per sample, in shard order, memory-mappable
    val-000000.tar  ...  val.index.npy
    manifest.json                                               written last: a folder without it is not complete

A sample is two tar members, ``<key>.jpg`` (the image's bytes) and ``<key>.cls`` (the class index in ASCII).
"""

from __future__ import annotations

import json
import os
import re
import zlib
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta, Struct

from vimfast.errors import UserError
from vimfast.files import read_file, write_text
from vimfast.shards.tree import is_folder
from vimfast.stores import Missing, Store, name_in

FORMAT = "vimfast-shards"
VERSION = 1
MANIFEST = "manifest.json"
STATE_FOLDER = ".prepare"  # what a conversion keeps for its next run
PLAN, SOURCE = "plan.json", "source.txt"  # in there: what is converted how, and the folder it comes from
SPLITS = ("train", "val")

# Offsets and sizes are of the JPEG's bytes inside the tar; height and width are those of the decoded image
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

_AGAIN = "run vimfast-prepare again"
_COPY_AGAIN = "copy it again, or run vimfast-prepare again"
_BLOCK_BYTES = 1 << 20
_HEADER_BYTES = 1 << 14  # of an index: more than it has

Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]


def shard_name(split: str, number: int) -> str:
    """``train-000042.tar``."""
    return f"{split}-{number:06d}.tar"


def dali_index_name(split: str, number: int) -> str:
    """``train-000042.idx``: the index that DALI's ``fn.readers.webdataset`` needs beside a tar."""
    return f"{split}-{number:06d}.idx"


def index_name(split: str) -> str:
    """``train.index.npy``."""
    return f"{split}.index.npy"


def is_shards_folder(folder: Path) -> bool:
    """Whether `folder` holds shards, finished or not: tars named as ours, a conversion's plan, or a manifest, which
    beside the folders of images may be anybody's.

    Raises:
        UserError: it cannot be read.
    """
    try:
        if (folder / STATE_FOLDER / PLAN).exists() or any(_is_tar(name) for name in _names(folder)):
            return True
        return (folder / MANIFEST).exists() and not any((folder / split).is_dir() for split in SPLITS)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror})", "fix that and run again") from None


def is_shard_name(name: str) -> bool:
    """``train-000042.tar`` or its index."""
    return re.fullmatch(rf"({'|'.join(SPLITS)})-\d{{6,}}\.(tar|idx)", name) is not None


def _names(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


def _is_tar(name: str) -> bool:
    return re.match(rf"({'|'.join(SPLITS)})-\d{{6,}}\.tar", name) is not None


# The manifest. Fields that a later vimfast adds are ignored, so that it need not raise VERSION for them.


class ConversionOptions(Struct, frozen=True):
    """Everything that decides the shards' bytes besides the files themselves.

    `resize` is the short side in pixels or None for the original bytes; `quality` that of resized JPEGs;
    `shard_samples` the most samples in a shard.
    """

    seed: int = 0
    resize: int | None = None
    quality: int | None = None
    shard_samples: int = 4096


class PlanDigest(Struct, frozen=True):
    """What a split was converted from and how: two plans of the same fingerprint write the same shards."""

    fingerprint: str
    options: ConversionOptions


class Note(Struct, frozen=True, order=True):
    """What was done to one file, and why."""

    file: str
    why: str


class ShardEntry(Struct, frozen=True):
    """One tar; `bytes` is its size."""

    name: str
    samples: Count
    bytes: Count


class SplitEntry(Struct, frozen=True):
    """One split; `bytes` is the total size of its images; `index_crc32` is of the whole index file."""

    samples: Count
    bytes: Count
    shards: list[ShardEntry]
    index_crc32: Count
    changed: list[Note]
    skipped: list[Note]

    def __post_init__(self) -> None:
        if (found := sum(shard.samples for shard in self.shards)) != self.samples:
            raise ValueError(f"its shards hold {found:,} samples in all, not {self.samples:,}")


class Manifest(Struct, frozen=True, omit_defaults=True):
    """What a finished shards folder holds; a label is a position in `classes`. `indexed`: the tars are links to those
    of somebody else, and hold whatever they like beside images and labels."""

    format: str
    version: int
    vimfast: str
    created: str
    classes: list[str]
    seed: int
    resize: int | None
    quality: int | None
    splits: dict[str, SplitEntry]
    plan: dict[str, PlanDigest] = {}
    indexed: bool = False

    def __post_init__(self) -> None:
        if not self.classes or len(set(self.classes)) < len(self.classes):
            raise ValueError("its classes are not a list of different names")
        for split, entry in self.splits.items():
            names = [shard_name(split, number) for number in range(len(entry.shards))]
            if [shard.name for shard in entry.shards] != names:
                raise ValueError(f"its {split} shards are not {shard_name(split, 0)}, {shard_name(split, 1)}, ...")


class _Header(Struct):
    """What every version of the format has."""

    format: str
    version: int


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished shards folder.

    Raises:
        UserError: no manifest (the conversion did not finish), not ours, damaged, edited, or of a newer format.
    """
    path = folder / MANIFEST
    if not is_folder(folder):
        raise UserError(f"{folder} is not a folder", "give one that vimfast-prepare wrote")
    try:
        data = read_file(path)
    except FileNotFoundError:
        raise _unfinished(folder) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})", "fix its permissions, or the disk") from None
    except ValueError as error:
        raise UserError(f"{path} is {error}", _AGAIN) from None
    return _parse_manifest(data, str(path))


def fetch_manifest(store: Store) -> Manifest:
    """The manifest of a finished shards folder in a store.

    Raises:
        UserError: as :func:`read_manifest`, or the store does not answer.
    """
    try:
        data = store.read(MANIFEST)
    except Missing as error:
        raise UserError(error.problem, "give the URL of a folder that vimfast prepare wrote and finished") from None
    return _parse_manifest(data, name_in(store, MANIFEST))


def _parse_manifest(data: bytes, where: str) -> Manifest:
    try:
        # Not msgspec's decoder: file names need not be UTF-8, and it refuses JSON's escapes of those that are not.
        raw = json.loads(data)
        header = msgspec.convert(raw, _Header)
        if header.format != FORMAT:
            raise UserError(
                f"{where} says format {header.format!r}, not {FORMAT!r}", "give a folder that vimfast-prepare wrote"
            )
        if header.version > VERSION:
            raise UserError(
                f"{where} is of format {header.version}, this vimfast reads up to {VERSION}",
                "upgrade vimfast to read it",
            )
        manifest = msgspec.convert(raw, Manifest)
    except msgspec.ValidationError as error:
        raise UserError(f"{where} is damaged ({_describe(error)})", _COPY_AGAIN) from None
    except (ValueError, RecursionError, OverflowError) as error:
        raise UserError(f"{where} is damaged ({error})", _COPY_AGAIN) from None
    if (stated := raw.get("crc32")) is not None and stated != (found := _manifest_crc32(raw)):
        raise UserError(f"{where} is damaged or was edited: its checksum is {found}, it says {stated}", _COPY_AGAIN)
    return manifest


def _unfinished(folder: Path) -> UserError:
    try:
        source = os.fsdecode(read_file(folder / STATE_FOLDER / SOURCE))
    except (OSError, ValueError):
        return UserError(
            f"the conversion into {folder} is not finished: it has no {MANIFEST}",
            "run vimfast-prepare again, it resumes",
        )
    return UserError(
        f"the conversion of {source} into {folder} is not finished", "run the same vimfast-prepare again, it resumes"
    )


def _manifest_crc32(raw: dict[str, Any]) -> int:
    """Of the content, whatever its layout; manifests of earlier versions have none."""
    content = {key: value for key, value in raw.items() if key != "crc32"}
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _describe(error: msgspec.ValidationError) -> str:
    """``splits[...].bytes: expected int, got str``, of msgspec's ``Expected `int`, got `str` - at `$.splits...```."""
    what, _, where = str(error).replace("`", "").partition(" - at $")
    what = what[0].lower() + what[1:]
    return f"{where.lstrip('.')}: {what}" if where else what


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Declare the folder complete."""
    raw = msgspec.to_builtins(manifest)
    # On the line of `created`, so that two conversions of the same images still differ in one line only.
    text = _dump(raw).replace('"created": ', f'"crc32": {_manifest_crc32(raw)}, "created": ', 1)
    write_text(folder / MANIFEST, text)


def write_json(path: Path, value: Any) -> None:
    """Structs as JSON that a person can read."""
    write_text(path, _dump(msgspec.to_builtins(value)))


def _dump(raw: Any) -> str:
    return json.dumps(raw, indent=1) + "\n"


def read_plan_digests(path: Path) -> dict[str, PlanDigest]:
    """The plans in a file of :func:`write_json`, by split; none where it is missing or damaged."""
    try:
        return msgspec.convert(json.loads(read_file(path)), dict[str, PlanDigest])
    except (OSError, ValueError, RecursionError, OverflowError):
        return {}


# The index


def index_header(samples: int) -> bytes:
    """The header of an index file with so many rows."""
    header = BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(INDEX_DTYPE), "fortran_order": False, "shape": (samples,)}
    np.lib.format.write_array_header_1_0(header, described)
    return header.getvalue()


def read_index(folder: Path, split: str, samples: int, crc32: int | None = None) -> np.ndarray:
    """The index of one split, read-only: `samples` rows of ``INDEX_DTYPE``.

    Args:
        crc32: what the manifest says of the whole file (10 ms for ImageNet); None: not compared.

    Raises:
        UserError: missing, damaged, or other than the manifest says.
    """
    path = folder / index_name(split)
    fix = f"copy it again, or rebuild it with vimfast-prepare --reindex {folder}"
    try:
        data = read_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing", fix) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})", "fix its permissions, or the disk") from None
    except ValueError as error:
        raise UserError(f"{path} is {error}", fix) from None
    return _parse_index(data, str(path), fix, samples, crc32)


def fetch_index(store: Store, split: str, samples: int, crc32: int) -> np.ndarray:
    """:func:`read_index` of a shards folder in a store.

    Raises:
        UserError: as it does, or the store does not answer.
    """
    where = name_in(store, index_name(split))
    return _parse_index(store.read(index_name(split)), where, "copy it to the store again", samples, crc32)


def _parse_index(data: bytes, where: str, fix: str, samples: int, crc32: int | None) -> np.ndarray:
    try:
        index = _parse_array(data)
    except Exception as error:  # numpy's parser of the header raises nearly anything on garbage
        raise UserError(f"{where} is damaged ({error})", fix) from None
    if index.dtype != INDEX_DTYPE:
        raise UserError(f"{where} has columns {index.dtype}, not {INDEX_DTYPE}", fix)
    if index.shape != (samples,):
        raise UserError(f"{where} has {index.size} samples, the manifest says {samples}", fix)
    if crc32 is not None and (found := zlib.crc32(data)) != crc32:
        raise UserError(f"{where} is damaged: its checksum is {found}, the manifest says {crc32}", fix)
    return index


def _parse_array(data: bytes) -> np.ndarray:
    header = BytesIO(data[:_HEADER_BYTES])
    version = np.lib.format.read_magic(header)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, _, dtype = read(header)
    return np.frombuffer(data, np.uint8, offset=header.tell()).view(dtype).reshape(shape)


def crc32_of_file(path: Path) -> int:
    """zlib's checksum of the file's bytes."""
    checksum = 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            checksum = zlib.crc32(block, checksum)
    return checksum
