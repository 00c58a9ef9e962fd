"""Writing shards, each from its part of the plan, and the index from the records of all of them.

A shard is a pure function of its part of the plan and of the files named there, so any process or machine may write it
at any time, and writing it twice gives the same bytes. A finished shard has a record, written last into the hidden
``.prepare``: its rows of the index, and what was changed or left out.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np
from msgspec import Struct

from vimfast.errors import UserError
from vimfast.files import atomic_write
from vimfast.shards import jpeg
from vimfast.shards.format import (
    INDEX_DTYPE,
    ConversionOptions,
    Count,
    dali_index_name,
    index_header,
    index_name,
    shard_name,
)
from vimfast.shards.plan import Part, ShardPlan

STATE_FOLDER = ".prepare"

_FLUSH_BYTES = 8 << 20

# What opening a file answers when the fault is the file's own. Other errors (a network file system that went away)
# would hit the next file as well and must not empty the data set under --skip-bad.
_FILE_ERRORS = frozenset({errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP})


class Record(Struct, frozen=True):
    """What happened to one shard.

    `tar_bytes` is the size of the tar, `image_bytes` that of all images in it. `sources` is a checksum of the source
    files' sizes and times, so that a resumed run notices a file that was replaced. `changed` and `skipped` hold pairs
    of a file and why.
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
    channels = f" of {info.components} components" if info.format == "jpeg" else ""
    return image, size, f"{info.format}{channels}, stored as an RGB JPEG"


def estimate_bytes(plan: ShardPlan) -> int:
    """About how many bytes the split's shards take, from a sample of its files."""
    rng = np.random.default_rng(0)
    resized = plan.options.resize is not None
    count = min(len(plan), 64 if resized else 10_000)
    total = 0
    for i in rng.choice(len(plan), count, replace=False).tolist():
        path = plan.files.path(i)
        with suppress(OSError, ValueError):  # reported when its turn comes
            total += len(stored(path.read_bytes(), plan.options)[0]) if resized else path.stat().st_size
    each = total / count + 3.5 * tarfile.BLOCKSIZE + 2 * INDEX_DTYPE.itemsize + 100  # two headers, padding, indexes
    return round(len(plan) * each) + plan.shards * (2 * tarfile.BLOCKSIZE + tarfile.RECORDSIZE // 2)


def write_shard(part: Part, out: Path, skip_bad: bool, tick: Callable[[], None]) -> tuple[Record, bool]:
    """Write one shard, its DALI index and its record, unless they exist already.

    Args:
        skip_bad: leave unreadable images out. Otherwise one is enough to leave the shard unwritten, and the rest is
            only checked for more.
        tick: called before each image.

    Returns:
        The record, whose `skipped` lists all unreadable images, and whether the shard existed already.

    Raises:
        UserError: the disk is full, or the source folder is gone.
    """
    sources = _checksum_sources(part)
    existing = read_record(out, part.split, part.number)
    if existing and existing.sources == sources and _is_there(part, out, existing):
        return existing, True
    tar_path = out / shard_name(part.split, part.number)
    try:
        record_path(out, part.split, part.number).unlink(missing_ok=True)  # its tar is about to be replaced
        with atomic_write(tar_path) as file:
            record, rows, lines = _write_samples(part, _Tar(file), sources, skip_bad, tick)
            if record.skipped and not skip_bad:
                raise _Unwritten
        with atomic_write(out / dali_index_name(part.split, part.number)) as file:
            file.write(f"v1.2 {len(lines)}\n{''.join(lines)}".encode("utf-8", "surrogateescape"))
        write_record(record_path(out, part.split, part.number), record, rows)
    except _Unwritten:
        pass
    except OSError as error:
        raise UserError(
            f"{tar_path} cannot be written ({error.strerror})", "fix that and run again, it resumes"
        ) from None
    return record, False


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
    part: Part, tar: _Tar, sources: int, skip_bad: bool, tick: Callable[[], None]
) -> tuple[Record, np.ndarray, list[str]]:
    """The tar's content; returns the shard's record, its rows of the index, and the lines of DALI's index."""
    rows = np.zeros(len(part.names), INDEX_DTYPE)
    samples = image_bytes = 0
    changed: list[tuple[str, str]] = []
    skipped: list[tuple[str, str]] = []
    lines: list[str] = []
    for name, key, label in zip(part.names, part.keys, part.labels, strict=True):
        tick()
        try:
            image, (height, width), why = stored(_read(Path(part.folder, name)), part.options)
        except ValueError as error:
            skipped.append((name, str(error)))
            continue
        if why:
            changed.append((name, why))
        if skipped and not skip_bad:
            continue
        digits = str(label).encode()
        at, label_at = tar.add(f"{key}.jpg", image), tar.add(f"{key}.cls", digits)
        rows[samples] = (at, len(image), part.number, label, zlib.crc32(image), height, width)
        lines.append(f"jpg {at} {len(image)} {key}.jpg cls {label_at} {len(digits)} {key}.cls\n")
        samples += 1
        image_bytes += len(image)
        tar.flush()
    record = Record(samples, tar.finish(), image_bytes, sources, changed, skipped)
    return record, rows[:samples], lines


def _read(path: Path) -> bytes:
    """The file's bytes; a ValueError if the file itself is at fault, a UserError if it is more than that."""
    try:
        return path.read_bytes()
    except OSError as error:
        if error.errno in _FILE_ERRORS or path.is_symlink():
            raise ValueError(f"cannot be opened: {error.strerror}") from None
        raise UserError(
            f"{path} cannot be read ({error.strerror})", "once the source folder is back, run again, it resumes"
        ) from None


def _checksum_sources(part: Part) -> int:
    checksum = 0
    for name in part.names:
        try:
            stat = os.stat(f"{part.folder}/{name}")
        except OSError:
            continue  # reported when it is read
        checksum = zlib.crc32(struct.pack("<qq", stat.st_size, stat.st_mtime_ns), checksum)
    return checksum


def _is_there(part: Part, out: Path, record: Record) -> bool:
    tar = out / shard_name(part.split, part.number)
    idx = out / dali_index_name(part.split, part.number)
    return idx.is_file() and tar.is_file() and tar.stat().st_size == record.tar_bytes


def record_path(out: Path, split: str, number: int) -> Path:
    """``.prepare/train-000042.npz``."""
    return (out / STATE_FOLDER / shard_name(split, number)).with_suffix(".npz")


def write_record(path: Path, record: Record, rows: np.ndarray) -> None:
    """Mark a shard as finished."""
    text = json.dumps(msgspec.to_builtins(record)).encode()
    # A record that a power failure cuts off is recognized as damaged, so there is no need to wait for the disk.
    with atomic_write(path, durable=False) as file:
        np.savez(file, rows=rows, record=np.frombuffer(text, np.uint8))


def read_record(out: Path, split: str, number: int) -> Record | None:
    """The record of a shard, None where there is none or it is damaged."""
    try:
        with np.load(record_path(out, split, number), allow_pickle=False) as saved:
            return msgspec.convert(json.loads(saved["record"].tobytes()), Record)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None


def write_index(out: Path, split: str, shards: int, samples: int) -> int:
    """Join the rows of all finished shards into ``<split>.index.npy``; returns the crc32 of the whole file."""
    header = index_header(samples)
    checksum = zlib.crc32(header)
    with atomic_write(out / index_name(split)) as file:
        file.write(header)
        for number in range(shards):
            with np.load(record_path(out, split, number), allow_pickle=False) as saved:
                rows = saved["rows"].tobytes()
            file.write(rows)
            checksum = zlib.crc32(rows, checksum)
    return checksum
