"""Writing shards, each from its part of the plan, and the index from the records of all of them.

A shard is a pure function of its part of the plan and of the files named there, so any process or machine may write it
at any time, and writing it twice gives the same bytes. A finished shard has a record, written last into the hidden
``.prepare``: its rows of the index, and what was changed or left out.
"""

from __future__ import annotations

import json
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
from msgspec import Struct

from vimfast.errors import UserError, remedy
from vimfast.files import atomic_write, read_file
from vimfast.shards import jpeg
from vimfast.shards.format import (
    INDEX_DTYPE,
    STATE_FOLDER,
    ConversionOptions,
    Count,
    dali_index_name,
    index_header,
    shard_name,
)
from vimfast.shards.origin import MOST_BYTES, SOURCE_DTYPE
from vimfast.shards.plan import Part, ShardPlan

_FLUSH_BYTES = 8 << 20


class Record(Struct, frozen=True):
    """What happened to one shard.

    `tar_bytes` is the size of the tar, `image_bytes` that of all images in it. `sources` is a checksum of the source
    files' sizes and times, for records without a table of them. `changed` and `skipped` hold pairs of a file and why.
    """

    samples: Count
    tar_bytes: Count
    image_bytes: Count = msgspec.field(name="picture_bytes")  # as conversions of today call it on the disk
    sources: int
    changed: list[tuple[str, str]]
    skipped: list[tuple[str, str]]


def stored(data: bytes, options: ConversionOptions) -> tuple[bytes, tuple[int, int], str | None]:
    """What a shard holds of a file's bytes: the JPEG, its (height, width), and why it is another file, if it is.

    A JPEG that was resized as requested does not count as changed; one that is small enough is kept byte for byte.

    Raises:
        ValueError: unreadable; the message says why.
        MemoryError: there is too little of it.
    """
    info = jpeg.inspect(data)
    plain = jpeg.is_plain(info)
    if plain and (options.resize is None or min(info.height, info.width) <= options.resize):
        if not info.complete:
            jpeg.to_rgb_jpeg(data)  # damaged or merely odd? What decodes is kept as it is
        return data, (info.height, info.width), None
    if options.resize is None:
        image, size = jpeg.to_rgb_jpeg(data)
    else:
        image, size = jpeg.to_rgb_jpeg(data, resize=options.resize, quality=options.quality or 90)
    if plain:
        return image, size, None
    if info.format == "jpeg":
        kind = f"jpeg of {info.components} components"
    else:
        wide = jpeg.wide_samples(data)
        kind = f"{wide} {info.format}" if wide else info.format
    return image, size, f"{kind}, stored as an RGB JPEG"


def estimate_bytes(plan: ShardPlan) -> int:
    """About how many bytes the split's shards take, from a sample of its files."""
    rng = np.random.default_rng(0)
    resized = plan.options.resize is not None
    count = min(len(plan), 64 if resized else 10_000)
    total = 0
    origin = plan.files.origin(rng.choice(len(plan), count, replace=False).tolist())
    for i, size in enumerate(origin.stat()["size"].tolist()):
        with suppress(UserError, ValueError, MemoryError):  # reported when its turn comes
            if 0 <= size <= MOST_BYTES:
                total += len(stored(origin.read(i), plan.options)[0]) if resized else size
    each = total / count + 3.5 * tarfile.BLOCKSIZE + 2 * INDEX_DTYPE.itemsize + 100  # two headers, padding, indexes
    return round(len(plan) * each) + plan.shards * (2 * tarfile.BLOCKSIZE + tarfile.RECORDSIZE // 2)


def write_shard(part: Part, out: Path, skip_bad: bool, tick: Callable[[str], None], mark: str = "") -> Record:
    """Write one shard, its DALI index and its record.

    Args:
        skip_bad: leave unreadable images out. Otherwise one is enough to leave the shard unwritten, and the rest is
            only checked for more.
        tick: called with the name of each image, before it.
        mark: of temporary names, where somebody else may be writing the same shard.

    Returns:
        The record, whose `skipped` lists all unreadable images.

    Raises:
        UserError: the disk is full, or the source folder is gone.
    """
    sources = part.origin.stat()
    tar_path = out / shard_name(part.split, part.number)
    try:
        record_path(out, part.split, part.number).unlink(missing_ok=True)  # its tar is about to be replaced
        with atomic_write(tar_path, mark=mark) as file:
            record, rows, lines = _write_samples(part, _Tar(file), sources, skip_bad, tick)
            if record.skipped and not skip_bad:
                raise _Unwritten
        with atomic_write(out / dali_index_name(part.split, part.number), mark=mark) as file:
            file.write(dali_index(lines))
        write_record(record_path(out, part.split, part.number), record, rows, sources, mark)
    except _Unwritten:
        pass
    except OSError as error:
        raise unwritable(error, tar_path) from None
    return record


def unwritable(error: OSError, path: Path | str) -> UserError:
    """What a conversion that cannot write says: what it has written serves the next."""
    fix = f"{remedy(error) or 'fix that'} and run again, it resumes"
    return UserError(f"{path} cannot be written ({error.strerror})", fix)


def dali_index(lines: list[str]) -> bytes:
    """The content of DALI's index beside a tar, from a line for each sample."""
    return f"v1.2 {len(lines)}\n{''.join(lines)}".encode("utf-8", "surrogateescape")


class _Unwritten(Exception):
    """Leaves ``atomic_write`` without a file."""


class _Tar:
    """A tar that grows by one member at a time, in the plainest form there is."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._end = self._flushed = 0

    def add(self, name: str, content: bytes) -> int:
        """Append a member; returns where its content starts."""
        info = tarfile.TarInfo(name)
        info.size = len(content)  # the rest of TarInfo's defaults is constant: mode 0644, owner and time 0
        header = info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")
        start = self._end + len(header)
        padding = -len(content) % tarfile.BLOCKSIZE
        for part in (header, content, bytes(padding)):
            self._file.write(part)
        self._end = start + len(content) + padding
        return start

    def flush(self) -> None:
        """Send what has accumulated to the disk, so that fsync has little left to wait for, and a data set larger
        than memory does not evict everyone else's pages."""
        if self._end - self._flushed >= _FLUSH_BYTES:
            self._file.flush()
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self._flushed = self._end

    def finish(self) -> int:
        """End the archive; returns its size."""
        end_of_archive = 2 * tarfile.BLOCKSIZE
        self._file.write(bytes(end_of_archive + -(self._end + end_of_archive) % tarfile.RECORDSIZE))
        return self._file.tell()


def _write_samples(
    part: Part, tar: _Tar, sources: np.ndarray, skip_bad: bool, tick: Callable[[str], None]
) -> tuple[Record, np.ndarray, list[str]]:
    """The tar's content; returns the shard's record, its rows of the index, and the lines of DALI's index. Notes in
    `sources` what was read."""
    rows = np.zeros(len(part.names), INDEX_DTYPE)
    samples = image_bytes = 0
    changed: list[tuple[str, str]] = []
    skipped: list[tuple[str, str]] = []
    lines: list[str] = []
    for i, (name, key, label) in enumerate(zip(part.names, part.keys, part.labels, strict=True)):
        tick(name)
        try:
            data = part.origin.read(i)
            checksum = zlib.crc32(data)
            sources[i]["crc32"], sources[i]["read"] = checksum, True
            image, (height, width), why = stored(data, part.options)
        except ValueError as error:
            skipped.append((name, str(error)))
            continue
        except MemoryError:
            raise UserError(
                f"there is too little memory to decode {part.origin.name(i)}",
                "free some, or run again with fewer --workers: it resumes",
            ) from None
        if why:
            changed.append((name, why))
        if skipped and not skip_bad:
            continue
        digits = str(label).encode()
        if image is not data:
            checksum = zlib.crc32(image)
        at, label_at = tar.add(f"{key}.jpg", image), tar.add(f"{key}.cls", digits)
        rows[samples] = (at, len(image), part.number, label, checksum, height, width)
        lines.append(f"jpg {at} {len(image)} {key}.jpg cls {label_at} {len(digits)} {key}.cls\n")
        samples += 1
        image_bytes += len(image)
        tar.flush()
    record = Record(samples, tar.finish(), image_bytes, checksum_sources(sources), changed, skipped)
    return record, rows[:samples], lines


def checksum_sources(sources: np.ndarray) -> int:
    """Of the sizes and times of those that are there."""
    checksum = 0
    for size, mtime in zip(sources["size"].tolist(), sources["mtime"].tolist(), strict=True):
        if size >= 0:
            checksum = zlib.crc32(struct.pack("<qq", size, mtime), checksum)
    return checksum


def record_path(out: Path, split: str, number: int) -> Path:
    """``.prepare/train-000042.npz``."""
    return (out / STATE_FOLDER / shard_name(split, number)).with_suffix(".npz")


def write_record(
    path: Path, record: Record, rows: np.ndarray, sources: np.ndarray | None = None, mark: str = ""
) -> None:
    """Mark a shard as finished."""
    tables: dict[str, Any] = {"rows": rows} if sources is None else {"rows": rows, "sources": sources}
    text = json.dumps(msgspec.to_builtins(record)).encode()
    # A record that a power failure cuts off is recognized as damaged, so there is no need to wait for the disk.
    with atomic_write(path, durable=False, mark=mark) as file:
        np.savez(file, record=np.frombuffer(text, np.uint8), **tables)


def read_record(out: Path, split: str, number: int) -> Record | None:
    """The record of a shard, None where there is none or it is damaged."""
    text = _read_table(out, split, number, "record")
    try:
        return None if text is None else msgspec.convert(json.loads(text.tobytes()), Record)
    except (ValueError, RecursionError, OverflowError):
        return None


def read_rows(out: Path, split: str, number: int) -> np.ndarray:
    """The rows of the index that a shard's record holds; none where they are damaged."""
    rows = _read_table(out, split, number, "rows")
    return rows if rows is not None and rows.dtype == INDEX_DTYPE and rows.ndim == 1 else np.zeros(0, INDEX_DTYPE)


def read_sources(out: Path, split: str, number: int) -> np.ndarray | None:
    """The source files of a shard, as rows of ``SOURCE_DTYPE``; None in the record of an earlier version."""
    sources = _read_table(out, split, number, "sources")
    return sources if sources is not None and sources.dtype == SOURCE_DTYPE and sources.ndim == 1 else None


def _read_table(out: Path, split: str, number: int, name: str) -> np.ndarray | None:
    try:
        with np.load(BytesIO(read_file(record_path(out, split, number))), allow_pickle=False) as saved:
            table: np.ndarray = saved[name]
            return table
    except Exception:  # zipfile's and numpy's readers raise nearly anything on garbage
        return None


def join_rows(out: Path, split: str, shards: int) -> bytes:
    """The content of ``<split>.index.npy``: the rows of all finished shards."""
    rows = [read_rows(out, split, number) for number in range(shards)]
    return index_header(sum(map(len, rows))) + b"".join(part.tobytes() for part in rows)
