"""Are shards fit to train on? Manifest, index, tars and DALI's indexes against one another, and every picture's
checksum.
"""

from __future__ import annotations

import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vimfast.checks.findings import (
    ClassCheck,
    Finding,
    Flaw,
    Options,
    Report,
    SplitSummary,
    Tally,
    check_picture,
    run_tasks,
)
from vimfast.data import index, jpeg
from vimfast.errors import UserError
from vimfast.files import TEMPORARY

_MEND = "complete the source folder and run vimfast-prepare on it again"
_SOURCE = "mend the picture in the source folder, or delete it there, and run vimfast-prepare again"
_CHUNK = 256  # pictures a task
_BLOCK = tarfile.BLOCKSIZE


def _again(name: str) -> str:
    """The fix for a damaged file."""
    return f"copy {name} anew, or delete it and run the same vimfast-prepare again: it writes what is missing"


def check_shards(folder: Path, options: Options) -> Report:
    """Look at every byte of a shards folder.

    Raises:
        UserError: a worker process was killed.
    """
    report = Report(str(folder), "shards")
    manifest_path = folder / index.MANIFEST
    try:
        manifest = index.read_manifest(folder)
    except UserError as error:
        report.findings.append(Finding.of(error, "", manifest_path))
        return report
    if why := _malformed(manifest):
        report.findings.append(Finding("error", "", str(manifest_path), why, _again(index.MANIFEST)))
        return report
    report.findings += _leftovers(folder, manifest)
    counts: dict[str, dict[str, int]] = {}
    for split in options.splits:
        if split not in manifest["splits"]:
            fix = f"run vimfast-prepare on a folder that has {split}/, or pass --splits if {split} is not meant to be"
            report.findings.append(Finding("error", split, str(manifest_path), f"has no {split} split", fix))
            continue
        check = _SplitCheck(folder, split, manifest, options)
        tars = check.find_tars()
        rows = check.read_index()
        if rows is not None:
            labels = rows["label"][(rows["label"] >= 0) & (rows["label"] < len(manifest["classes"]))]
            held = np.bincount(labels, minlength=len(manifest["classes"])).tolist()
            counts[split] = dict(zip(manifest["classes"], held, strict=True))
            check.check_shards(rows, tars)
            size = int(rows["size"].sum(dtype=np.int64))
            report.splits.append(SplitSummary(split, len(held), len(rows), min(held), max(held), size))
        report.findings += check.findings
    if counts:
        place = lambda split, name: f"{folder / index.index_name(split)}{name and ': '}{name}"  # noqa: E731
        report.findings += ClassCheck(counts, options.classes, place, _MEND).run()
    return report


def _malformed(manifest: dict[str, Any]) -> str | None:
    """Why the manifest cannot be followed, if it cannot."""
    try:
        classes = manifest["classes"]
        if not classes or not all(isinstance(name, str) for name in classes) or len(set(classes)) < len(classes):
            return "its classes are no list of different names"
        for split, described in manifest["splits"].items():
            shards = described["shards"]
            if [shard["name"] for shard in shards] != [index.shard_name(split, k) for k in range(len(shards))]:
                return (
                    f"its {split} shards are not {index.shard_name(split, 0)}, {index.shard_name(split, 1)} and so on"
                )
            numbers = [described[name] for name in ("samples", "bytes", "index_crc32")]
            numbers += [shard[name] for shard in shards for name in ("samples", "bytes")]
            if not all(type(number) is int and number >= 0 for number in numbers):
                return f"its {split} split holds a number that is none"
            if sum(shard["samples"] for shard in shards) != described["samples"]:
                return f"its {split} shards do not add up to {described['samples']:,} samples"
            for note in described["skipped"]:
                _ = note["file"], note["why"]
    except (KeyError, TypeError, AttributeError) as error:
        return f"damaged or of another program ({type(error).__name__}: {error})"
    return None


def _leftovers(folder: Path, manifest: dict[str, Any]) -> Iterator[Finding]:
    """Files that nobody reads, and pictures that were left out."""
    known = {index.MANIFEST}
    for split, described in manifest["splits"].items():
        known.add(index.index_name(split))
        known |= {shard["name"] for shard in described["shards"]}
        known |= {index.dali_index_name(split, number) for number in range(len(described["shards"]))}
        for note in described["skipped"]:
            fix = "nothing to do, if it may be missing; else get it anew and run vimfast-prepare again"
            yield Finding(
                "warning", split, f"{split}/{note['file']}", f"was left out by --skip-bad: {note['why']}", fix
            )
    for path in sorted(folder.iterdir()):
        if path.name in known or path.name.startswith("."):
            continue
        what = "a temporary file" if path.name.endswith(TEMPORARY) else "no part of these shards"
        yield Finding("warning", "", str(path), what, "delete it, unless a vimfast-prepare is running")


class _SplitCheck:
    """The checks of one split; `findings` is what they have found."""

    def __init__(self, folder: Path, split: str, manifest: dict[str, Any], options: Options) -> None:
        self.folder, self.split, self.options = folder, split, options
        self.classes = len(manifest["classes"])
        self.described = manifest["splits"][split]
        self.findings: list[Finding] = []

    def _error(self, name: str, what: str) -> None:
        self.findings.append(Finding("error", self.split, str(self.folder / name), what, _again(name)))

    def read_index(self) -> np.ndarray | None:
        """The index if it can be used at all."""
        name, samples = index.index_name(self.split), self.described["samples"]
        try:
            rows = index.read_index(self.folder, self.split, samples)
        except UserError as error:
            self.findings.append(Finding.of(error, self.split, self.folder / name))
            return None
        if _crc32_of_file(self.folder / name) != self.described["index_crc32"]:
            self._error(name, "differs from its checksum in the manifest")
        if (stored := int(rows["size"].sum(dtype=np.int64))) != self.described["bytes"]:
            self._error(name, f"has pictures of {stored:,} bytes in all, the manifest {self.described['bytes']:,}")
        per_shard = [shard["samples"] for shard in self.described["shards"]]
        if not np.array_equal(rows["shard"], np.repeat(np.arange(len(per_shard)), per_shard)):
            self._error(name, "spreads its samples over other shards than the manifest")
            return None
        return rows

    def find_tars(self) -> set[str]:
        """The names of the tars that are there."""
        found = set()
        for shard in self.described["shards"]:
            name = shard["name"]
            try:
                size = (self.folder / name).stat().st_size
            except OSError as error:
                self._error(name, f"cannot be found, with {shard['samples']:,} samples: {error.strerror}")
                continue
            found.add(name)
            if size != shard["bytes"]:
                self._error(name, f"has {size:,} bytes, the manifest says {shard['bytes']:,}")
        return found

    def check_shards(self, rows: np.ndarray, tars: set[str]) -> None:
        """Every DALI index, and every sample in these tars."""
        todo: list[tuple[str, np.ndarray]] = []
        start = 0
        for number, shard in enumerate(self.described["shards"]):
            mine = rows[start : start + shard["samples"]]
            start += shard["samples"]
            self._check_dali_index(index.dali_index_name(self.split, number), mine)
            if shard["name"] in tars:
                todo.append((str(self.folder / shard["name"]), mine))
        total = sum(len(mine) for _, mine in todo)
        tasks = (
            (tar, self.split, np.array(mine[at : at + _CHUNK]), self.classes, self.options.decode)
            for tar, mine in todo
            for at in range(0, len(mine), _CHUNK)
        )
        for tally in run_tasks(_check_samples, tasks, self.split, total, self.options.workers):
            self.findings += tally.findings

    def _check_dali_index(self, name: str, rows: np.ndarray) -> None:
        try:
            head, *lines = (self.folder / name).read_bytes().splitlines()
        except FileNotFoundError:
            self._error(name, "missing; only DALI's own webdataset reader needs it")
            return
        except (OSError, ValueError) as error:
            self._error(name, f"cannot be read: {error}")
            return
        if head.split() != [b"v1.2", b"%d" % len(rows)] or len(lines) != len(rows):
            said = head[:40].decode(errors="replace")
            self._error(name, f"begins with {said!r} and has {len(lines):,} samples, the index {len(rows):,}")
            return
        places = np.stack([rows["offset"], rows["size"]], axis=1).tolist()
        for number, (line, (offset, size)) in enumerate(zip(lines, places, strict=True), 2):
            label_at = offset + _padded(size) + _BLOCK
            words = line.split()
            if words[:3] + words[4:6] != [b"jpg", b"%d" % offset, b"%d" % size, b"cls", b"%d" % label_at]:
                self._error(name, f"disagrees with {index.index_name(self.split)}, from line {number} on")
                return


def _crc32_of_file(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _padded(size: int) -> int:
    return size + -size % _BLOCK


def _check_samples(tar: str, split: str, rows: np.ndarray, classes: int, decode: bool) -> Tally:
    """Look at some samples of a shard, in a worker process."""
    findings: list[Finding] = []
    try:
        with open(tar, "rb") as file:
            end = os.fstat(file.fileno()).st_size
            for row in rows:
                offset, length = int(row["offset"]), _padded(int(row["size"])) + 3 * _BLOCK
                if _BLOCK <= offset <= end + _BLOCK - length:
                    file.seek(offset - _BLOCK)
                    name, flaws = _check_sample(tar, file.read(length), row, classes, decode)
                else:
                    name = f"the sample at byte {offset}"
                    flaws = [_damaged(tar, f"lies outside of the tar's {end:,} bytes")]
                findings += [Finding(flaw.severity, split, f"{tar}: {name}", flaw.what, flaw.fix) for flaw in flaws]
    except OSError as error:
        flaw = _damaged(tar, f"cannot be read: {error.strerror}")
        findings.append(Finding(flaw.severity, split, tar, flaw.what, flaw.fix))
    return Tally(len(rows), int(rows["size"].sum(dtype=np.int64)), findings)


def _header(block: bytes) -> tarfile.TarInfo:
    return tarfile.TarInfo.frombuf(block[:_BLOCK], "utf-8", "surrogateescape")


def _damaged(tar: str, what: str) -> Flaw:
    return Flaw("error", what, _again(os.path.basename(tar)))


def _check_sample(tar: str, block: bytes, row: np.void, classes: int, decode: bool) -> tuple[str, list[Flaw]]:
    """The name and flaws of a sample whose bytes in the tar, two headers and their contents, are `block`."""
    size, label = int(row["size"]), int(row["label"])
    picture, second = block[_BLOCK : _BLOCK + size], block[_BLOCK + _padded(size) :]
    name = f"the sample at byte {row['offset']}"
    try:
        header = _header(block)
        name = header.name
        if header.size != size:
            return name, [_damaged(tar, f"has {header.size:,} bytes by the tar, {size:,} by the index")]
        label_header = _header(second)
    except tarfile.HeaderError as error:
        return name, [_damaged(tar, f"has a damaged tar header ({error})")]
    if zlib.crc32(picture) != row["crc32"]:
        return name, [_damaged(tar, "differs from its checksum in the index")]
    stem, extension = os.path.splitext(name)
    if extension != ".jpg" or label_header.name != f"{stem}.cls":
        return name, [_damaged(tar, f"no .jpg with its .cls behind it, but with {label_header.name}")]
    stored = second[_BLOCK : _BLOCK + label_header.size]
    if stored != b"%d" % label:
        return name, [
            _damaged(tar, f"has label {stored[:20].decode(errors='replace')} in the tar, {label} in the index")
        ]
    if not 0 <= label < classes:
        return name, [_damaged(tar, f"has label {label}, the manifest {classes:,} classes")]
    info, flaws = check_picture(picture, None, decode)
    flaws = [Flaw(flaw.severity, flaw.what, _SOURCE) for flaw in flaws]
    if info is not None and not jpeg.is_plain(info):
        return name, [Flaw("error", f"a {info.format} of {info.components} components, want an RGB JPEG", _SOURCE)]
    if info is not None and (info.height, info.width) != (row["height"], row["width"]):
        what = f"{info.width} x {info.height} pixels, by the index {row['width']} x {row['height']}"
        flaws.append(_damaged(tar, what))
    return name, flaws
