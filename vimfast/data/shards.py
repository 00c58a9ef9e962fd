"""Writing shards: the plan of a split, and one shard from its part of the plan.

The plan says which picture goes where; it follows from the list of files and the options alone. A shard is a pure
function of its part of the plan and of those files, so any process or machine may write it, at any time, and twice
gives the same bytes. What is finished is known from its record, written last into the folder's hidden ``.prepare``:
the shard's rows of the index, and what was changed or left out.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from vimfast.data import jpeg
from vimfast.data.index import INDEX_DTYPE, VERSION, dali_index_name, index_name, shard_name
from vimfast.data.tree import FileList
from vimfast.errors import UserError
from vimfast.files import atomic_write

STATE_FOLDER = ".prepare"

_KEY_BYTES = 96  # with its extension, what the name field of a plain tar header holds
_FOLDER_BYTES = 64
_FLUSH_BYTES = 8 << 20
_MANY_SHARDS, _FEW_SAMPLES = 64, 512

# What opening a file answers when the fault is the file's own. Other errors (a network file system that went away)
# would hit the next file as well and must not empty the data set under --skip-bad.
_FILE_ERRORS = frozenset({errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP})


@dataclass(frozen=True)
class Options:
    """All that decides the shards' bytes beside the files themselves.

    `resize` is the short side in pixels or None for the original bytes; `quality` that of resized JPEGs;
    `shard_samples` the most samples of a shard.
    """

    seed: int = 0
    resize: int | None = None
    quality: int | None = None
    shard_samples: int = 4096


class Note(NamedTuple):
    """What was done to one file, and why."""

    file: str
    why: str


@dataclass(frozen=True)
class Part:
    """One shard's part of the plan: all that writing it needs."""

    split: str
    number: int
    folder: str
    names: list[str]  # below `folder`
    keys: list[str]
    labels: list[int]
    options: Options


@dataclass(frozen=True)
class Record:
    """What became of one shard.

    `tar_bytes` is the tar's size, `picture_bytes` the sum of the pictures' in it. `sources` is a checksum of the source
    files' sizes and times, so that a resumed run notices a file that was replaced.
    """

    samples: int
    tar_bytes: int
    picture_bytes: int
    sources: int
    changed: list[Note]
    skipped: list[Note]


class Plan:
    """Which picture of a split goes to which place of which shard, under which key.

    The training set is shuffled as a whole, validation stays sorted. Shards are of equal length within one sample,
    and a small set is cut into more of them than it must, for readers that share out whole shards.
    """

    def __init__(self, split: str, files: FileList, options: Options) -> None:
        self.split, self.files, self.options = split, files, options
        samples = len(files)
        shuffled = split == "train"
        self.order = np.random.default_rng(options.seed).permutation(samples) if shuffled else np.arange(samples)
        self.shards = max(-(-samples // options.shard_samples), min(_MANY_SHARDS, -(-samples // _FEW_SAMPLES)))
        self._folders = _folder_names(files.classes)
        self._numbered, self._tags = self._find_numbered()

    def __len__(self) -> int:
        return len(self.files)

    def part(self, number: int) -> Part:
        """The part of shard `number`."""
        first, last = len(self) * number // self.shards, len(self) * (number + 1) // self.shards
        ids = self.order[first:last].tolist()
        names = [self.files.name(i) for i in ids]
        keys = [self._key(i, name) for i, name in zip(ids, names, strict=True)]
        labels = self.files.labels[ids].tolist()
        return Part(self.split, number, str(self.files.folder), names, keys, labels, self.options)

    def describe(self) -> dict[str, Any]:
        """The options and a fingerprint: two plans of the same fingerprint write the same shards."""
        options = asdict(self.options)
        digest = hashlib.sha256(json.dumps([VERSION, self.split, options, self.files.classes]).encode())
        for array in (self.files.names, self.files.offsets, self.files.labels):
            digest.update(array.data)
        return {"fingerprint": digest.hexdigest(), "options": options}

    def _key(self, i: int, name: str) -> str:
        label = int(self.files.labels[i])
        if self._numbered[i]:
            return f"{self._folders[label]}/{self._tags[label]}{i:08d}"
        return f"{self._folders[label]}/{_stem(name)}"

    def _find_numbered(self) -> tuple[np.ndarray, dict[int, str]]:
        """Which samples cannot be called after their file, and for each class that has such ones, what the numbers
        that they get instead begin with."""
        numbered, tags = np.zeros(len(self), bool), {}
        starts = np.searchsorted(self.files.labels, np.arange(len(self.files.classes) + 1))
        for label, (start, stop) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
            taken: set[str] = set()
            room = _KEY_BYTES - len(os.fsencode(self._folders[label])) - 1
            for i in range(start, stop):
                stem = _stem(self.files.name(i))
                numbered[i] = stem in taken or len(os.fsencode(stem)) > room
                taken.add(stem)
            if numbered[start:stop].any():
                tag = "file-"
                while any(stem.startswith(tag) for stem in taken):
                    tag = "_" + tag
                tags[label] = tag
        return numbered, tags


def _stem(name: str) -> str:
    """The path inside the class folder, without what would confuse readers: WebDataset takes all behind the first dot
    of a file name for its extension, and DALI's index separates names by white space."""
    inside = name.split("/", 1)[1]
    folder, slash, base = os.path.splitext(inside)[0].rpartition("/")
    return re.sub(r"\s", "_", folder + slash + base.replace(".", "_"))


def _folder_names(classes: Sequence[str]) -> list[str]:
    """The class names as folders inside the tars, still unique."""
    names: list[str] = []
    taken: set[str] = set()
    for label, name in enumerate(classes):
        folder = re.sub(r"\s", "_", name)
        if len(os.fsencode(folder)) > _FOLDER_BYTES:
            folder = f"class-{label:05d}"
        while folder in taken:
            folder += f"-{label}"
        taken.add(folder)
        names.append(folder)
    return names


def stored(data: bytes, options: Options) -> tuple[bytes, tuple[int, int], str | None]:
    """What a shard holds of a file's bytes: the JPEG, its (height, width), and why it is another file, if it is.

    A resized JPEG counts as what was asked for, not as changed; one that is small enough stays byte for byte.

    Raises:
        ValueError: unreadable; the message says why.
    """
    info = jpeg.inspect(data)
    plain = jpeg.is_plain(info)
    if plain and (options.resize is None or min(info.height, info.width) <= options.resize):
        if not info.complete:
            jpeg.to_rgb_jpeg(data)  # damaged or only odd? What decodes is kept as it is
        return data, (info.height, info.width), None
    if options.resize is None:
        picture, size = jpeg.to_rgb_jpeg(data)
    else:
        picture, size = jpeg.to_rgb_jpeg(data, resize=options.resize, quality=options.quality or 90)
    if plain:
        return picture, size, None
    channels = f" of {info.components} components" if info.format == "jpeg" else ""
    return picture, size, f"{info.format}{channels}, stored as an RGB JPEG"


def estimate_bytes(plan: Plan) -> int:
    """About how many bytes the split's shards take, from a sample of its files."""
    rng = np.random.default_rng(0)
    resized = plan.options.resize is not None
    count = min(len(plan), 64 if resized else 10_000)
    total = 0
    for i in rng.choice(len(plan), count, replace=False).tolist():
        path = plan.files.path(i)
        with suppress(OSError, ValueError):  # told when its turn comes
            total += len(stored(path.read_bytes(), plan.options)[0]) if resized else path.stat().st_size
    each = total / count + 3.5 * tarfile.BLOCKSIZE + 2 * INDEX_DTYPE.itemsize + 100  # two headers, padding, indexes
    return round(len(plan) * each) + plan.shards * (2 * tarfile.BLOCKSIZE + tarfile.RECORDSIZE // 2)


def write_shard(part: Part, out: Path, skip_bad: bool, tick: Callable[[], None]) -> tuple[Record, bool]:
    """Write one shard, its DALI index and its record, unless they are there.

    Args:
        skip_bad: go on without unreadable pictures. Otherwise one of them leaves the shard unwritten, and the rest is
            only looked through for more.
        tick: called after each picture.

    Returns:
        The record, whose `skipped` lists all unreadable pictures, and whether the shard was there already.

    Raises:
        UserError: the disk is full, or the source folder went away.
    """
    sources = _checksum_sources(part)
    existing = read_record(out, part.split, part.number)
    if existing and existing.sources == sources and _is_there(part, out, existing):
        return existing, True
    tar_path = out / shard_name(part.split, part.number)
    try:
        _record_path(out, part.split, part.number).unlink(missing_ok=True)  # of a tar that is about to go
        with atomic_write(tar_path) as tar:
            record, rows, lines = _write_samples(part, tar, sources, skip_bad, tick)
            if record.skipped and not skip_bad:
                raise _Unwritten
        with atomic_write(out / dali_index_name(part.split, part.number)) as file:
            file.write(f"v1.2 {len(lines)}\n{''.join(lines)}".encode("utf-8", "surrogateescape"))
        # A record that a power failure cuts off is seen to be damaged, so it need not be waited for.
        with atomic_write(_record_path(out, part.split, part.number), durable=False) as file:
            np.savez(file, rows=rows, record=np.frombuffer(json.dumps(asdict(record)).encode(), np.uint8))
    except _Unwritten:
        pass
    except OSError as error:
        raise UserError(
            f"{tar_path} cannot be written ({error.strerror})", "fix that and run again, it resumes"
        ) from None
    return record, False


class _Unwritten(Exception):
    """Leaves ``atomic_write`` without a file."""


def _write_samples(
    part: Part, tar: BinaryIO, sources: int, skip_bad: bool, tick: Callable[[], None]
) -> tuple[Record, np.ndarray, list[str]]:
    """The tar's content; returns the shard's record, its rows of the index, and the lines of DALI's index."""
    rows = np.zeros(len(part.names), INDEX_DTYPE)
    samples = picture_bytes = end = flushed = 0
    changed: list[Note] = []
    skipped: list[Note] = []
    lines: list[str] = []

    def add(name: str, content: bytes) -> int:
        nonlocal end
        header = _tar_header(name, len(content))
        start = end + len(header)
        padding = -len(content) % tarfile.BLOCKSIZE
        tar.write(header)
        tar.write(content)
        tar.write(bytes(padding))
        end = start + len(content) + padding
        return start

    for name, key, label in zip(part.names, part.keys, part.labels, strict=True):
        tick()
        try:
            picture, (height, width), why = stored(_read(Path(part.folder, name)), part.options)
        except ValueError as error:
            skipped.append(Note(name, str(error)))
            continue
        if why:
            changed.append(Note(name, why))
        if skipped and not skip_bad:
            continue
        digits = str(label).encode()
        at, label_at = add(f"{key}.jpg", picture), add(f"{key}.cls", digits)
        rows[samples] = (at, len(picture), part.number, label, zlib.crc32(picture), height, width)
        lines.append(f"jpg {at} {len(picture)} {key}.jpg cls {label_at} {len(digits)} {key}.cls\n")
        samples += 1
        picture_bytes += len(picture)
        if end - flushed >= _FLUSH_BYTES:
            # The disk starts on these pages while we go on, so little is left for fsync to wait for; and a data set
            # larger than memory does not push everybody else's pages out.
            tar.flush()
            os.posix_fadvise(tar.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            flushed = end
    end_of_archive = 2 * tarfile.BLOCKSIZE
    tar.write(bytes(end_of_archive + -(end + end_of_archive) % tarfile.RECORDSIZE))
    record = Record(samples, tar.tell(), picture_bytes, sources, changed, skipped)
    return record, rows[:samples], lines


def _tar_header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size  # the rest of TarInfo's defaults is constant: mode 0644, owner and time 0
    return info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")


def _read(path: Path) -> bytes:
    """The file's bytes; a ValueError where the file itself is at fault, a UserError where more than it is."""
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
            continue  # told when it is read
        checksum = zlib.crc32(struct.pack("<qq", stat.st_size, stat.st_mtime_ns), checksum)
    return checksum


def _is_there(part: Part, out: Path, record: Record) -> bool:
    tar = out / shard_name(part.split, part.number)
    idx = out / dali_index_name(part.split, part.number)
    return idx.is_file() and tar.is_file() and tar.stat().st_size == record.tar_bytes


def _record_path(out: Path, split: str, number: int) -> Path:
    return (out / STATE_FOLDER / shard_name(split, number)).with_suffix(".npz")


def read_record(out: Path, split: str, number: int) -> Record | None:
    """The record of a shard, None where there is none or it is damaged."""
    try:
        with np.load(_record_path(out, split, number), allow_pickle=False) as saved:
            values = json.loads(saved["record"].tobytes())
        changed, skipped = ([Note(*note) for note in values.pop(name)] for name in ("changed", "skipped"))
        return Record(**values, changed=changed, skipped=skipped)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None


def write_index(plan: Plan, out: Path, samples: int) -> int:
    """Join the rows of all finished shards into ``<split>.index.npy``; returns the crc32 of the whole file."""
    header = BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": np.lib.format.dtype_to_descr(INDEX_DTYPE), "fortran_order": False, "shape": (samples,)}
    )
    checksum = zlib.crc32(header.getvalue())
    with atomic_write(out / index_name(plan.split)) as file:
        file.write(header.getvalue())
        for number in range(plan.shards):
            with np.load(_record_path(out, plan.split, number), allow_pickle=False) as saved:
                rows = saved["rows"].tobytes()
            file.write(rows)
            checksum = zlib.crc32(rows, checksum)
    return checksum
