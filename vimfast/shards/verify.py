"""Whether a shard that an earlier run finished still holds: its sources are what they were, and every byte of it is
what its record says.
"""

from __future__ import annotations

import os
import stat
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from vimfast.files import read_file
from vimfast.shards import jpeg
from vimfast.shards.format import INDEX_DTYPE, dali_index_name, shard_name
from vimfast.shards.plan import Part
from vimfast.shards.writer import (
    Record,
    checksum_sources,
    dali_index,
    read_record,
    read_rows,
    read_sources,
    record_path,
    write_record,
)

_BLOCK = tarfile.BLOCKSIZE
_CHECKSUM = slice(148, 156)  # of a header, in it


class Differs(Exception):
    """Why a shard has to be made again."""


def verify_shard(part: Part, out: Path, tick: Callable[[str], None]) -> Record:
    """The record of a shard that holds.

    Args:
        tick: called with the name of each image, before it.

    Raises:
        Differs: it was never finished, was damaged, or a source image is another than was converted.
        UserError: source images cannot be read, which is no fault of theirs.
    """
    record = read_record(out, part.split, part.number)
    if record is None:
        raise Differs("has no record")
    verify_sources(part, out, record)
    skipped = {name for name, _ in record.skipped}
    kept = [i for i, name in enumerate(part.names) if name not in skipped]
    keys = [part.keys[i] for i in kept]
    labels = [part.labels[i] for i in kept]
    path = out / shard_name(part.split, part.number)
    try:
        rows, lines = read_tar(path, part.number, tick, keys)
        if (end := path.stat().st_size) != record.tar_bytes:
            raise Differs(f"has {end:,} bytes, not {record.tar_bytes:,} as written")
        if rows["label"].tolist() != labels:
            raise Differs("has other labels than its source folders")
        recorded = read_rows(out, part.split, part.number)
        if recorded.tobytes() != rows.tobytes():
            differing = np.flatnonzero(recorded != rows) if len(recorded) == len(rows) else np.zeros(1, int)
            raise Differs(f"is damaged: {keys[differing[0]]}.jpg differs from its checksum")
        idx = out / dali_index_name(part.split, part.number)
        if read_file(idx) != dali_index(lines):
            raise Differs(f"does not agree with {idx.name}")
    except OSError as error:
        raise Differs(f"cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise Differs(f"is damaged ({error})") from None
    return record


def verify_sources(part: Part, out: Path, record: Record) -> None:
    """Compare the source files with those that were converted, by size and times, and by content where only a time
    differs (a tree that was copied).

    Raises:
        Differs: one is another.
        UserError: they cannot be read, which is no fault of theirs.
    """
    now = part.origin.stat()
    before = read_sources(out, part.split, part.number)
    if before is None or len(before) != len(now):  # a record of an earlier version
        if checksum_sources(now) != record.sources:
            raise Differs("was made from other images")
        return
    touched = False
    for i, name in enumerate(part.names):
        was, found = before[i], now[i]
        same_times = was["read"] and (was["mtime"], was["ctime"]) == (found["mtime"], found["ctime"])
        if same_times and was["size"] == found["size"]:
            continue
        try:
            checksum = zlib.crc32(part.origin.read(i))
        except ValueError:
            if was["read"]:
                raise Differs(f"was made from another {name}") from None
            continue  # as unreadable as it was
        if not was["read"] or was["size"] != found["size"] or checksum != was["crc32"]:
            raise Differs(f"was made from another {name}")
        before[i]["mtime"], before[i]["ctime"] = found["mtime"], found["ctime"]
        touched = True
    if touched:
        path, rows = record_path(out, part.split, part.number), read_rows(out, part.split, part.number)
        write_record(path, record, rows, before)


def read_tar(
    path: Path, number: int, tick: Callable[[str], None] = lambda name: None, keys: list[str] | None = None
) -> tuple[np.ndarray, list[str]]:
    """A shard as its members tell: its rows of the index, and the lines of DALI's index.

    Args:
        number: of the shard, as the rows have it.
        tick: called with the name of each image, before it.
        keys: those that the samples have to have, in this order; None: any.

    Raises:
        ValueError: not a whole tar of samples; the message says why.
        OSError: cannot be read.
    """
    rows: list[tuple[int, ...]] = []
    lines: list[str] = []
    with open(path, "rb", buffering=1 << 20, opener=_open_regular) as file:
        end = os.fstat(file.fileno()).st_size
        while (header := _member(file, end)) is not None:
            tick(header.name)
            key, extension = os.path.splitext(header.name)
            if extension != ".jpg" or (keys is not None and (len(rows) >= len(keys) or key != keys[len(rows)])):
                raise ValueError(f"{header.name} is not the member that belongs there")
            at = file.tell()
            image = _content(file, header)
            second = _member(file, end)
            if second is None or second.name != f"{key}.cls":
                raise ValueError(f"{header.name} is not followed by its .cls")
            label_at = file.tell()
            digits = _content(file, second)
            if not digits.isdigit() or len(digits) > 9:
                raise ValueError(f"{second.name} holds no label")
            height, width = jpeg.inspect(image)[1:3]
            rows.append((at, len(image), number, int(digits), zlib.crc32(image), height, width))
            lines.append(f"jpg {at} {len(image)} {key}.jpg cls {label_at} {len(digits)} {key}.cls\n")
        if file.read().strip(b"\0"):
            raise ValueError("it has more behind its end")
    if keys is not None and len(rows) != len(keys):
        raise ValueError(f"it holds {len(rows):,} images, not {len(keys):,}")
    return np.array(rows, INDEX_DTYPE), lines


def _open_regular(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("it is not a regular file")
    return descriptor


def tar_header(block: bytes) -> tarfile.TarInfo:
    """A tar header, all of its bytes verified.

    Raises:
        tarfile.HeaderError: it is damaged.
    """
    header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    if block[_CHECKSUM] != b"%06o\0 " % header.chksum:  # the one field that the checksum does not cover
        raise tarfile.HeaderError("bad checksum")
    return header


def _member(file: BinaryIO, end: int) -> tarfile.TarInfo | None:
    """The next member's header; None at the end of the archive, which has `end` bytes."""
    block = file.read(_BLOCK)
    if block == bytes(_BLOCK):
        return None
    try:
        header = tar_header(block)
    except tarfile.HeaderError as error:
        raise ValueError(f"the tar header at byte {file.tell() - len(block):,}: {error}") from None
    if not header.isreg() or header.size < 0:
        raise ValueError(f"{header.name} is not a plain member")
    if header.size > end - file.tell():
        raise ValueError(f"it is cut off in {header.name}")
    return header


def _content(file: BinaryIO, header: tarfile.TarInfo) -> bytes:
    data = file.read(header.size)
    padding = file.read(-header.size % _BLOCK)
    if len(data) < header.size or len(padding) < -header.size % _BLOCK:
        raise ValueError(f"it is cut off in {header.name}")
    if padding.strip(b"\0"):
        raise ValueError(f"there is something after {header.name}")
    return data
