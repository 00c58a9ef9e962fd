"""WebDataset tars that somebody else wrote, as a shards folder: links to the tars, and indexes of what is in them.

A sample is what WebDataset takes for one: neighbouring members whose names are the same up to the first dot of their
base name. One of them has to be a JPEG that every decoder reads, and another the label: ``.cls`` with a number, or
``.json`` with a number under ``label`` or ``cls``.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vimfast import __version__
from vimfast.errors import UserError, counted
from vimfast.files import read_at, write_bytes
from vimfast.shards import jpeg
from vimfast.shards.convert import delete_shards, locked, our_files
from vimfast.shards.format import (
    FORMAT,
    INDEX_DTYPE,
    MANIFEST,
    SPLITS,
    STATE_FOLDER,
    VERSION,
    Manifest,
    Note,
    ShardEntry,
    SplitEntry,
    dali_index_name,
    index_header,
    index_name,
    read_manifest,
    shard_name,
    write_manifest,
)
from vimfast.shards.members import members
from vimfast.shards.origin import MOST_BYTES, missing_sources, put_stat
from vimfast.shards.tree import EXTENSIONS, is_folder
from vimfast.shards.workers import Pace, report, run, tick
from vimfast.shards.writer import (
    Record,
    dali_index,
    join_rows,
    read_record,
    read_sources,
    record_path,
    unwritable,
    write_record,
)

_DOWNLOAD = "copy it again, or leave it out"
_VALIDATION = re.compile(r"(^|[^a-z])val(id|idation)?([^a-z]|$)", re.IGNORECASE)
_LABELS = {"cls": lambda data: int(data), "json": lambda data: _label_in(json.loads(data))}
_MOST_LABEL_BYTES = 1 << 20
_MOST_CLASSES = 1 << 20  # beyond any; a label above is none


class _Sample(NamedTuple):
    """The members of a sample: of each, its extension, name, first byte and size."""

    key: str
    parts: list[tuple[str, str, int, int]]


def index_tars(
    folder: Path, out: Path, *, names: Path | None, workers: int, skip_bad: bool = False, overwrite: bool = False
) -> str:
    """Make `out` a shards folder of the tars in `folder`, which stay where they are. Run again it resumes.

    Args:
        folder: holds tars, those of validation images with ``val`` in their names; or ``train/`` and ``val/``.
        names: a file with the name of a class on each line; None: they are named by their numbers.
        workers: processes.
        skip_bad: leave out samples without a label or a readable JPEG. Otherwise they are an error, and listed.
        overwrite: first delete the shards in `out`.

    Returns:
        a line that describes what `out` holds now.

    Raises:
        UserError: there are no tars, they or `out` cannot be used, or labels do not fit the names.
    """
    tars = _find_tars(folder)
    classes = None if names is None else _read_names(names)
    if out.resolve() in {path.resolve().parent for paths in tars.values() for path in paths}:
        raise UserError(f"--out {out} holds the tars themselves", "give a folder of its own for the indexes")
    with locked(out):
        if overwrite:
            delete_shards(out)
        _check_out(out)
        try:
            (out / MANIFEST).unlink(missing_ok=True)
            manifest = _index(tars, classes, out, workers, skip_bad)
            write_manifest(out, manifest)
        except OSError as error:
            raise unwritable(error, error.filename or out) from None
    counts = ", ".join(
        f"{counted(entry.samples, f'{split} image')} in {counted(len(entry.shards), 'tar')}"
        for split, entry in manifest.splits.items()
    )
    return f"{out} is complete: {counts}, {len(manifest.classes):,} classes"


def _find_tars(folder: Path) -> dict[str, list[Path]]:
    """By split, sorted by name, those with numbers by their numbers."""
    try:
        if any(is_folder(folder / split) for split in SPLITS):
            found = {split: _tars_in(folder / split) for split in SPLITS if is_folder(folder / split)}
        else:
            every = _tars_in(folder)
            of_val = [path for path in every if _VALIDATION.search(path.name)]
            found = {"train": [path for path in every if path not in of_val], "val": of_val}
    except OSError as error:
        raise UserError(
            f"{error.filename or folder} cannot be read ({error.strerror})", "give the folder of the tars"
        ) from None
    found = {split: paths for split, paths in found.items() if paths}
    if not found:
        raise UserError(f"{folder} holds no tars", "give the folder of the tars")
    return found


def _tars_in(folder: Path) -> list[Path]:
    paths = [path for path in folder.iterdir() if path.suffix == ".tar" and not path.name.startswith(".")]
    return sorted(paths, key=lambda path: [int(w) if w.isdigit() else w for w in re.split(r"(\d+)", path.name)])


def _read_names(path: Path) -> list[str]:
    try:
        names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"--class-names {path} cannot be read ({error})", "give a text file") from None
    if len(set(names)) < len(names):
        raise UserError(f"--class-names {path} has a name twice", "give each class a name of its own")
    return names


def _check_out(out: Path) -> None:
    """What is there must be of an earlier run of this kind, if it is anything."""
    known = False
    with suppress(UserError):
        known = read_manifest(out).indexed
    if not known and any(not path.is_symlink() and path.suffix == ".tar" for path in our_files(out)):
        raise UserError(f"{out} holds shards of its own", "give another --out, or delete them with --overwrite")


def _index(tars: dict[str, list[Path]], classes: list[str] | None, out: Path, workers: int, skip_bad: bool) -> Manifest:
    places = [(split, number, path) for split, paths in tars.items() for number, path in enumerate(paths)]
    todo = [place for place in places if not _is_done(out, *place)]
    pace = Pace(len(places), "tars read", len(places) - len(todo), unit="tars")
    for _ in run(_index_tar, todo, lambda place: (out, *place), workers, pace):
        pass  # what came of it is in the records
    entries = {split: _entry(out, split, paths) for split, paths in tars.items()}
    bad = [note for entry in entries.values() for note in entry.skipped]
    for note in bad:
        report(f"{note.file}: {note.why}")
    if bad and not skip_bad:
        raise UserError(f"{counted(len(bad), 'sample')} cannot be used, listed above", "leave them out with --skip-bad")
    return _manifest(out, classes, entries)


def _is_done(out: Path, split: str, number: int, path: Path) -> bool:
    """Whether an earlier run indexed this very file, which has not changed since."""
    before = read_sources(out, split, number)
    if before is None or read_record(out, split, number) is None:
        return False
    link = out / shard_name(split, number)
    linked = link.is_symlink() and os.readlink(link) == str(path.resolve())
    return linked and (out / dali_index_name(split, number)).exists() and before.tobytes() == _stat(path).tobytes()


def _stat(path: Path) -> np.ndarray:
    sources = missing_sources(1)
    put_stat(sources, path.stat())
    return sources


# In a worker


def _index_tar(out: Path, split: str, number: int, path: Path) -> None:
    """Link a tar, and write its DALI index and its record."""
    stat = _stat(path)
    rows: list[tuple[int, ...]] = []
    lines: list[str] = []
    skipped: list[tuple[str, str]] = []
    try:
        with open(path, "rb", buffering=0) as file:
            for sample in _samples(members(file, str(path), _DOWNLOAD)):
                tick(f"{path}: {sample.key}", 0)
                try:
                    row, line = _row(file.fileno(), sample, number)
                    rows.append(row)
                    lines.append(line)
                except ValueError as error:
                    skipped.append((sample.key, str(error)))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})", "fix that and run again, it resumes") from None
    link = out / shard_name(split, number)
    link.unlink(missing_ok=True)
    link.symlink_to(path.resolve())
    write_bytes(out / dali_index_name(split, number), dali_index(lines))
    table = np.array(rows, INDEX_DTYPE)
    size = int(table["size"].sum(dtype=np.int64))
    record = Record(len(rows), int(stat["size"][0]), size, 0, [], skipped)
    write_record(record_path(out, split, number), record, table, stat)
    tick(str(path))


def _samples(found: Iterator[tuple[str, int, int]]) -> Iterator[_Sample]:
    """Neighbours of one key."""
    for key, parts in itertools.groupby(found, key=lambda member: _split_name(member[0])[0]):
        if not os.path.basename(key).startswith(".") and os.path.basename(key):
            yield _Sample(key, [(_split_name(name)[1], name, offset, size) for name, offset, size in parts])


def _split_name(name: str) -> tuple[str, str]:
    """Key and extension, as WebDataset has them."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _row(file: int, sample: _Sample, number: int) -> tuple[tuple[int, ...], str]:
    """A row of the index, and a line of DALI's.

    Raises:
        ValueError: it cannot be used; the message says why.
    """
    image = next((part for part in sample.parts if f".{part[0]}" in EXTENSIONS["jpeg"]), None)
    label = next((part for kind in _LABELS for part in sample.parts if part[0] == kind), None)
    if image is None or label is None:
        kinds = ", ".join(part[0] or "no extension" for part in sample.parts)
        raise ValueError(f"it has {kinds}, and {'no JPEG' if image is None else 'no label in .cls or .json'}")
    if image[3] > MOST_BYTES or label[3] > _MOST_LABEL_BYTES:
        raise ValueError("it is larger than a sample can be")
    offset, size = image[2:]
    data = read_at(file, offset, size)
    info = jpeg.inspect(data)
    if not jpeg.is_plain(info):
        raise ValueError(f"a {info.format} of {info.components} components, which not every decoder reads")
    if not info.complete:
        jpeg.to_rgb_jpeg(data)  # damaged or merely odd?
    try:
        value = _LABELS[label[0]](read_at(file, label[2], label[3]))
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"its .{label[0]} holds no label") from None
    if not 0 <= value < _MOST_CLASSES:
        raise ValueError(f"its label is {value}")
    row = (offset, size, number, value, zlib.crc32(data), info.height, info.width)
    parts = [f"{kind} {at} {length} {inside}" for kind, inside, at, length in (image, label)]
    return row, " ".join(parts) + "\n"


def _label_in(content: dict[str, int]) -> int:
    return int(content["label"] if "label" in content else content["cls"])


# The end


def _entry(out: Path, split: str, paths: Sequence[Path]) -> SplitEntry:
    """From the records; writes the index."""
    index = join_rows(out, split, len(paths))
    records = [read_record(out, split, number) for number in range(len(paths))]
    shards, skipped, size = [], [], 0
    for number, (path, record) in enumerate(zip(paths, records, strict=True)):
        if record is None:
            raise UserError(f"{out / STATE_FOLDER} changed while it was used", "run again, it resumes")
        if record.samples == 0:
            raise UserError(f"{path} holds no sample with a JPEG and a label", "leave it out")
        shards.append(ShardEntry(shard_name(split, number), record.samples, record.tar_bytes))
        skipped += [Note(f"{path.name}: {key}", why) for key, why in record.skipped]
        size += record.image_bytes
    samples = sum(shard.samples for shard in shards)
    assert len(index) == len(index_header(samples)) + samples * INDEX_DTYPE.itemsize
    write_bytes(out / index_name(split), index)
    return SplitEntry(samples, size, shards, zlib.crc32(index), [], sorted(skipped))


def _manifest(out: Path, classes: list[str] | None, entries: dict[str, SplitEntry]) -> Manifest:
    labels = [np.load(out / index_name(split), allow_pickle=False)["label"] for split in entries]
    count = 1 + max(int(own.max()) for own in labels)
    if classes is None:
        classes = [f"{number:0{len(str(count - 1))}d}" for number in range(count)]
    if count > len(classes):
        raise UserError(
            f"the tars have a label {count - 1} and --class-names {len(classes):,} names", "name every class"
        )
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Manifest(FORMAT, VERSION, __version__, created, classes, 0, None, None, entries, indexed=True)
