"""Are shards fit to train on? Compares the manifest, the index, the tars and DALI's indexes with one another,
and checks every image's checksum.
"""

from __future__ import annotations

import os
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from vimfast.checks.findings import (
    CheckOptions,
    ClassCheck,
    Finding,
    Findings,
    Flaw,
    Report,
    SplitSummary,
    Tally,
    check_image,
    run_tasks,
)
from vimfast.errors import UserError
from vimfast.files import TEMPORARY, read_file
from vimfast.shards import jpeg
from vimfast.shards.format import (
    MANIFEST,
    Manifest,
    crc32_of_file,
    dali_index_name,
    index_name,
    read_index,
    read_manifest,
)
from vimfast.shards.verify import tar_header

_COMPLETE = "complete the source folder and run vimfast-prepare on it again"
_SOURCE = "fix the image in the source folder, or delete it there, and run vimfast-prepare again"
_CHUNK = 256  # images per task
_BLOCK = tarfile.BLOCKSIZE


def _again(name: str) -> str:
    """The fix for a damaged file."""
    if not name.endswith(".tar"):
        return f"copy {name} again, or rebuild it with vimfast-prepare --reindex"
    return f"copy {name} again, or delete it and run the same vimfast-prepare again: it writes what is missing"


def check_shards(folder: Path, options: CheckOptions) -> Report:
    """Check every byte of a shards folder.

    Raises:
        UserError: a worker process was killed.
    """
    report = Report(str(folder), "shards")
    manifest_path = folder / MANIFEST
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        report.findings.append(Finding.of(error, "", manifest_path))
        return report
    report.findings += _leftovers(folder, manifest)
    counts = report.classes
    for split in options.splits:
        if split not in manifest.splits:
            fix = f"run vimfast-prepare on a folder that has {split}/, or pass --splits if {split} is not needed"
            report.findings.append(Finding("error", split, str(manifest_path), f"has no {split} split", fix))
            continue
        check = _SplitCheck(folder, split, manifest, options, report.findings)
        tars = check.find_tars()
        rows = check.read_index()
        if rows is not None:
            labels = rows["label"][(rows["label"] >= 0) & (rows["label"] < len(manifest.classes))]
            held = np.bincount(labels, minlength=len(manifest.classes)).tolist()
            counts[split] = dict(zip(manifest.classes, held, strict=True))
            check.check_shards(rows, tars)
            size = int(rows["size"].sum(dtype=np.int64))
            report.sizes[split] = np.stack([rows["height"], rows["width"]], axis=1).astype(np.int64)
            report.splits.append(SplitSummary(split, len(held), len(rows), min(held), max(held), size))
    if counts:
        place = lambda split, name: f"{folder / index_name(split)}{name and ': '}{name}"  # noqa: E731
        report.findings += ClassCheck(counts, options.classes, place, _COMPLETE).run()
    return report


def _leftovers(folder: Path, manifest: Manifest) -> Iterator[Finding]:
    """Files that nobody reads, and images that were left out."""
    known = {MANIFEST}
    for split, entry in manifest.splits.items():
        known.add(index_name(split))
        known |= {shard.name for shard in entry.shards}
        known |= {dali_index_name(split, number) for number in range(len(entry.shards))}
        for note in entry.skipped:
            fix = "nothing to do if you can do without it; otherwise download it again and run vimfast-prepare again"
            yield Finding("warning", split, f"{split}/{note.file}", f"was left out by --skip-bad: {note.why}", fix)
    for path in sorted(folder.iterdir()):
        if path.name in known or path.name.startswith("."):
            continue
        what = "a temporary file" if path.name.endswith(TEMPORARY) else "not part of these shards"
        yield Finding("warning", "", str(path), what, "delete it, unless a vimfast-prepare is running")


class _SplitCheck:
    """The checks of one split, which add what they find to `findings`."""

    def __init__(self, folder: Path, split: str, manifest: Manifest, options: CheckOptions, findings: Findings) -> None:
        self.folder, self.split, self.options = folder, split, options
        self.classes, self.ours = len(manifest.classes), not manifest.indexed
        self.entry = manifest.splits[split]
        self.findings = findings

    def _error(self, name: str, what: str) -> None:
        self.findings.append(Finding("error", self.split, str(self.folder / name), what, _again(name)))

    def read_index(self) -> np.ndarray | None:
        """The index, if it can be used at all."""
        name, samples = index_name(self.split), self.entry.samples
        try:
            rows = read_index(self.folder, self.split, samples)
        except UserError as error:
            self.findings.append(Finding.of(error, self.split, self.folder / name))
            return None
        if crc32_of_file(self.folder / name) != self.entry.index_crc32:
            self._error(name, "differs from its checksum in the manifest")
        if (stored := int(rows["size"].sum(dtype=np.int64))) != self.entry.bytes:
            self._error(name, f"has images of {stored:,} bytes in all, the manifest says {self.entry.bytes:,}")
        per_shard = [shard.samples for shard in self.entry.shards]
        if not np.array_equal(rows["shard"], np.repeat(np.arange(len(per_shard)), per_shard)):
            self._error(name, "assigns its samples to other shards than the manifest")
            return None
        return rows

    def find_tars(self) -> set[str]:
        """The names of the tars that exist."""
        found = set()
        for shard in self.entry.shards:
            name = shard.name
            try:
                size = (self.folder / name).stat().st_size
                if not (self.folder / name).is_file():
                    self._error(name, "not a regular file")
                    continue
            except OSError as error:
                self._error(name, f"cannot be found, with {shard.samples:,} samples: {error.strerror}")
                continue
            found.add(name)
            if size != shard.bytes:
                self._error(name, f"has {size:,} bytes, the manifest says {shard.bytes:,}")
        return found

    def check_shards(self, rows: np.ndarray, tars: set[str]) -> None:
        """Every DALI index, and every sample in these tars."""
        todo: list[tuple[str, np.ndarray]] = []
        start = 0
        for number, shard in enumerate(self.entry.shards):
            mine = rows[start : start + shard.samples]
            start += shard.samples
            if self.ours:
                self._check_dali_index(dali_index_name(self.split, number), mine)
            if shard.name in tars:
                todo.append((str(self.folder / shard.name), mine))
        total = sum(len(mine) for _, mine in todo)
        tasks = (
            (
                tar,
                self.split,
                np.array(mine[at : at + _CHUNK]),
                self.classes,
                self.options.decode,
                self.ours,
                at + _CHUNK >= len(mine),
            )
            for tar, mine in todo
            for at in range(0, len(mine), _CHUNK)
        )
        for tally in run_tasks(_check_samples, tasks, self.split, total, self.options.workers):
            self.findings += tally.findings

    def _check_dali_index(self, name: str, rows: np.ndarray) -> None:
        try:
            head, *lines = read_file(self.folder / name).split(b"\n")
        except FileNotFoundError:
            self._error(name, "missing (only DALI's own webdataset reader needs it)")
            return
        except (OSError, ValueError) as error:
            self._error(name, f"cannot be read: {error}")
            return
        if head != b"v1.2 %d" % len(rows) or len(lines) != len(rows) + 1 or lines.pop():
            said = head[:40].decode(errors="replace")
            self._error(
                name, f"begins with {said!r} and has {len(lines):,} lines behind, the index {len(rows):,} samples"
            )
            return
        places = zip(*(rows[column].tolist() for column in ("offset", "size", "label")), strict=True)
        for number, (line, (offset, size, label)) in enumerate(zip(lines, places, strict=True), 2):
            label_at, digits = offset + _padded(size) + _BLOCK, len(b"%d" % label)
            key = line.split(b" ")[-1].removesuffix(b".cls")
            if line != b"jpg %d %d %s.jpg cls %d %d %s.cls" % (offset, size, key, label_at, digits, key):
                self._error(name, f"disagrees with {index_name(self.split)}, from line {number} on")
                return


def _padded(size: int) -> int:
    return size + -size % _BLOCK


def _check_samples(tar: str, split: str, rows: np.ndarray, classes: int, decode: bool, ours: bool, last: bool) -> Tally:
    """Check some samples of a shard, and what follows the `last`, in a worker process. Where tars are not `ours`, only
    their images are known."""
    findings: list[Finding] = []
    try:
        with open(tar, "rb") as file:
            end = os.fstat(file.fileno()).st_size
            for row in rows:
                offset, length = int(row["offset"]), _padded(int(row["size"])) + 3 * _BLOCK
                if _BLOCK <= offset <= end + _BLOCK - length or not ours:
                    file.seek(offset - _BLOCK)
                    check = _check_sample if ours else _check_foreign
                    name, flaws = check(tar, file.read(length), row, classes, decode)
                else:
                    name = f"the sample at byte {offset}"
                    flaws = [_damaged(tar, f"is outside the tar's {end:,} bytes")]
                findings += [Finding(flaw.severity, split, f"{tar}: {name}", flaw.what, flaw.fix) for flaw in flaws]
            if ours and last and not findings and file.read().strip(b"\0"):
                flaw = _damaged(tar, "has something behind its last sample")
                findings.append(Finding(flaw.severity, split, tar, flaw.what, flaw.fix))
    except OSError as error:
        flaw = _damaged(tar, f"cannot be read: {error.strerror}")
        findings.append(Finding(flaw.severity, split, tar, flaw.what, flaw.fix))
    return Tally(len(rows), int(rows["size"].sum(dtype=np.int64)), findings)


def _damaged(tar: str, what: str) -> Flaw:
    return Flaw("error", what, _again(os.path.basename(tar)))


def _check_sample(tar: str, block: bytes, row: np.void, classes: int, decode: bool) -> tuple[str, list[Flaw]]:
    """The name and flaws of a sample whose bytes in the tar, two headers and their contents, are `block`."""
    size, label = int(row["size"]), int(row["label"])
    image, second = block[_BLOCK : _BLOCK + size], block[_BLOCK + _padded(size) :]
    name = f"the sample at byte {row['offset']}"
    try:
        header = tar_header(block[:_BLOCK])
        name = header.name
        if header.size != size:
            return name, [_damaged(tar, f"has {header.size:,} bytes by the tar, {size:,} by the index")]
        label_header = tar_header(second[:_BLOCK])
    except tarfile.HeaderError as error:
        return name, [_damaged(tar, f"has a damaged tar header ({error})")]
    if zlib.crc32(image) != row["crc32"]:
        return name, [_damaged(tar, "differs from its checksum in the index")]
    stem, extension = os.path.splitext(name)
    if extension != ".jpg" or label_header.name != f"{stem}.cls":
        return name, [_damaged(tar, f"not a .jpg followed by its .cls, but {name} followed by {label_header.name}")]
    stored = second[_BLOCK : _BLOCK + label_header.size]
    if stored != b"%d" % label:
        return name, [
            _damaged(tar, f"has label {stored[:20].decode(errors='replace')} in the tar, {label} in the index")
        ]
    if not 0 <= label < classes:
        return name, [_damaged(tar, f"has label {label}, the manifest has {classes:,} classes")]
    if (block[_BLOCK + size : _BLOCK + _padded(size)] + second[_BLOCK + label_header.size :]).strip(b"\0"):
        return name, [_damaged(tar, "has something between its members")]
    return name, _check_stored(tar, image, row, decode)


def _check_foreign(tar: str, block: bytes, row: np.void, classes: int, decode: bool) -> tuple[str, list[Flaw]]:
    """The same of a tar of somebody else."""
    image, name = block[_BLOCK : _BLOCK + int(row["size"])], f"the image at byte {row['offset']}"
    with suppress(tarfile.HeaderError):
        name = tarfile.TarInfo.frombuf(block[:_BLOCK], "utf-8", "surrogateescape").name
    if zlib.crc32(image) != row["crc32"]:
        return name, [_damaged(tar, "differs from its checksum in the index")]
    return name, _check_stored(tar, image, row, decode)


def _check_stored(tar: str, image: bytes, row: np.void, decode: bool) -> list[Flaw]:
    """Of bytes that are what was stored."""
    info, flaws = check_image(image, None, decode)
    flaws = [Flaw(flaw.severity, flaw.what, _SOURCE) for flaw in flaws]
    if info is not None and not jpeg.is_plain(info):
        return [Flaw("error", f"a {info.format} of {info.components} components, not an RGB JPEG", _SOURCE)]
    if info is not None and (info.height, info.width) != (row["height"], row["width"]):
        what = f"{info.width} x {info.height} pixels, by the index {row['width']} x {row['height']}"
        flaws.append(_damaged(tar, what))
    return flaws
