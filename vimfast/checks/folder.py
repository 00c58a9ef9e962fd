"""Is a folder in the ImageNet layout fit to train on? Reports everything that is wrong, where ``tree.scan_split`` stops
at the first problem.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vimfast.checks.findings import (
    WNID,
    CheckOptions,
    ClassCheck,
    Finding,
    Findings,
    Report,
    Severity,
    SplitSummary,
    Tally,
    check_image,
    run_tasks,
)
from vimfast.errors import UserError, counted
from vimfast.shards.foreign import INDEX_SHARDS, first_shard, is_shard
from vimfast.shards.format import SPLITS
from vimfast.shards.origin import read_image
from vimfast.shards.tree import Ancestors, identity, is_dead_link, is_folder, is_image_name, scan_split

_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".zip", ".rar", ".7z")
_UNPACK = "put the class's images there: unpack its archive again"
_DELETE = ", or delete the folder, in each split"
_SORT = (
    "move each image into a folder named after its class; for ImageNet's validation images "
    "valprep.sh of github.com/soumith/imagenetloader.torch does that"
)
_CHUNK = 256  # images per task


class _ClassFolder(NamedTuple):
    """The images of a class; `paths` are those inside the folder, each terminated by a zero byte: a million Python
    strings would take five times the memory."""

    name: str
    images: int
    paths: bytes


def check_folder(root: Path, options: CheckOptions) -> Report:
    """Check every file of a folder tree.

    Raises:
        UserError: no such folder, or a worker process was killed.
    """
    report = Report(str(root), "folder tree")
    folders: dict[str, list[_ClassFolder]] = {}
    for split in options.splits:
        if is_folder(root / split):
            folders[split] = _Lister(root / split, split, report.findings).list_classes()
        else:
            report.findings.append(_missing_split(root, split))
    report.classes = {split: {folder.name: folder.images for folder in held} for split, held in folders.items() if held}
    if counts := report.classes:
        place = lambda split, name: str(root / split / name)  # noqa: E731
        report.findings += ClassCheck(counts, options.classes, place, _UNPACK, _DELETE).run()
    for split, held in folders.items():
        total = sum(folder.images for folder in held)
        tasks = _tasks(root / split, split, held, options.decode)
        size, sizes = 0, [np.zeros((0, 2), np.int64)]
        for tally in run_tasks(_check_files, tasks, split, total, options.workers):
            size += tally.bytes
            sizes.append(tally.sizes)
            report.findings += tally.findings
        report.sizes[split] = np.concatenate(sizes)
        images = [folder.images for folder in held] or [0]
        report.splits.append(SplitSummary(split, len(held), total, min(images), max(images), size))
    return report


def _missing_split(root: Path, split: str) -> Finding:
    """What is wrong where a split's folder is not there, with a guess at what the user meant.

    Raises:
        UserError: the root folder does not exist either.
    """
    path = root / split
    names = sorted(entry.name for entry in root.iterdir()) if root.is_dir() else []
    close = [name for name in names if split in name.lower()]
    if folders := [name for name in close if (root / name).is_dir()]:
        return Finding("error", split, str(path), "missing", f"rename {root / folders[0]}/ to {path}/")
    archives = [name for name in close if name.lower().endswith(_ARCHIVES)]
    if archives and first_shard(root) is None:
        return Finding("error", split, str(path), "missing", f"unpack {root / archives[0]} into {path}/")
    try:
        scan_split(root, split)
    except UserError as error:
        if not root.is_dir():
            raise
        found = Finding.of(error, split, path)
        return replace(found, fix=f"{found.fix}; or pass --splits train") if _lacks_val(root, split) else found
    return Finding("error", split, str(path), "has appeared since the check began", "check again")


def _lacks_val(root: Path, split: str) -> bool:
    return split == "val" and is_folder(root / "train")


class _Lister:
    """Lists the class folders of a split, and notes what else is in there."""

    def __init__(self, folder: Path, split: str, findings: Findings) -> None:
        self.folder, self.split, self.findings = folder, split, findings

    def _note(self, severity: Severity, path: Path, what: str, fix: str) -> None:
        self.findings.append(Finding(severity, self.split, str(path), what, fix))

    def list_classes(self) -> list[_ClassFolder]:
        folders, loose = [], []
        before = self.findings.total
        for name, leads_on in self._entries(self.folder)[0]:
            if name.startswith("."):
                self._hidden(self.folder / name)
            elif leads_on:
                folders.append(name)
            elif is_image_name(name):
                loose.append(name)
            else:
                self._stray(self.folder / name, unpacked=False)
        if loose:
            what = f"holds {counted(len(loose), 'image')} outside class folders, the first is {loose[0]}"
            self._note("error", self.folder, what, _SORT)
        for name in [name for name in folders if name in SPLITS]:
            fix = f"move its contents up into {self.folder}/ and delete it, then check again"
            self._note("error", self.folder / name, "a level too many: class folders belong here", fix)
            folders.remove(name)
        if not folders and self.findings.total == before:
            self._note("error", self.folder, "empty", "put one folder of images per class there")
        classes = [self._list_class(name, set(folders)) for name in folders]
        if len(classes) == 1:
            self._check_sole(classes[0])
        return classes

    def _list_class(self, name: str, classes: set[str]) -> _ClassFolder:
        folder = self.folder / name
        paths: list[str] = []
        others: list[str] = []
        for path in self._walk(folder):
            (paths if is_image_name(os.path.basename(path)) else others).append(path)
        for path in others:
            self._stray(folder / path, unpacked=bool(paths))
        inner = {path.partition("/")[0] for path in paths if "/" in path}
        for other in sorted(inner & (classes - {name})):
            fix = f"move its images to {self.folder / other}/"
            self._note("error", folder / other, f"is inside another class, so its images count as {name}", fix)
        return _ClassFolder(name, len(paths), b"".join(os.fsencode(path) + b"\0" for path in paths))

    def _check_sole(self, only: _ClassFolder) -> None:
        inner = {path.partition(b"/")[0] for path in only.paths.split(b"\0") if b"/" in path}
        if len(inner) > 1:
            what = f"the only class folder, with {len(inner):,} folders in it: a level too many?"
            self._note("error", self.folder / only.name, what, f"move its folders up into {self.folder}/")

    def _walk(self, folder: Path) -> Iterator[str]:
        """Paths, relative to `folder`, of all files that are not hidden."""
        waiting: list[tuple[str, Ancestors]] = [("", ())]
        while waiting:
            inside, above = waiting.pop()
            entries, here = self._entries(folder / inside, above)
            for name, leads_on in entries:
                if name.startswith("."):
                    self._hidden(folder / inside / name)
                elif leads_on:
                    waiting.append((f"{inside}{name}/", here))
                else:
                    yield inside + name

    def _entries(self, folder: Path, above: Ancestors = ()) -> tuple[list[tuple[str, bool]], Ancestors]:
        """What is in there, sorted: names, and whether they are folders; and `above` with this folder."""
        found: list[tuple[str, bool]] = []
        try:
            known = identity(folder)
            if known in above:
                self._note("error", folder, "a link to a folder that it is in", "delete it")
                return found, above
            above = *above, known
            with os.scandir(folder) as entries:
                found += [(entry.name, self._leads_on(entry)) for entry in entries]
        except OSError as error:
            self._note("error", folder, f"cannot be listed: {error.strerror}", "fix its permissions, or the disk")
        return sorted(found), above

    def _leads_on(self, entry: os.DirEntry[str]) -> bool:
        """Whether it is a folder."""
        try:
            return entry.is_dir()
        except OSError as error:
            fix = "delete it, or fix the link or the disk"
            self._note("error", Path(entry.path), f"cannot be read: {error.strerror}", fix)
            return False

    def _hidden(self, path: Path) -> None:
        self._note("warning", path, "hidden, so not read", "delete it, or rename it if it is an image")

    def _stray(self, path: Path, unpacked: bool) -> None:
        if path.name.lower().endswith(_ARCHIVES):
            if unpacked:
                self._note("warning", path, "an archive beside images", "delete it once it is unpacked")
            elif is_shard(path):
                self._note("error", path, "a WebDataset shard of another program", INDEX_SHARDS)
            else:
                fix = "unpack it into a class folder of the same name, and delete it"
                self._note("error", path, "an archive that is not unpacked", fix)
        elif is_dead_link(path):
            self._note("error", path, "a link to nowhere", "bring back what it leads to, or delete it")
        else:
            fix = "delete it, or rename it if it is an image"
            self._note("warning", path, "does not have an image's extension, so is not read", fix)


def _tasks(folder: Path, split: str, classes: list[_ClassFolder], decode: bool) -> Iterator[tuple[object, ...]]:
    """Arguments for :func:`_check_files`."""
    for held in classes:
        paths = held.paths.split(b"\0")[:-1]
        for start in range(0, len(paths), _CHUNK):
            yield str(folder), split, held.name, paths[start : start + _CHUNK], decode


def _check_files(folder: str, split: str, name: str, paths: list[bytes], decode: bool) -> Tally:
    """Check some images of a class, in a worker process."""
    size, sizes = 0, []
    findings: list[Finding] = []
    is_wnid = WNID.fullmatch(name) is not None
    for encoded in paths:
        path = os.fsdecode(encoded)
        file = f"{folder}/{name}/{path}"
        base = os.path.basename(path)
        if is_wnid and (others := set(WNID.findall(base)) - {name}):
            what = f"has the name of class {others.pop()}"
            findings.append(Finding("error", split, file, what, "move it to the folder of its class"))
        try:
            data = read_image(Path(file))
        except ValueError as error:
            findings.append(Finding("error", split, file, str(error), "delete it"))
            continue
        except MemoryError:
            raise UserError(f"there is too little memory to read {file}", "free some, or lower --workers") from None
        except OSError as error:
            fix = "fix the link, the permissions or the disk, or delete it"
            findings.append(Finding("error", split, file, f"cannot be read: {error.strerror}", fix))
            continue
        size += len(data)
        info, flaws = check_image(data, os.path.splitext(base)[1].lower(), decode)
        if info is not None:
            sizes.append((info.height, info.width))
        findings += [Finding(flaw.severity, split, file, flaw.what, flaw.fix) for flaw in flaws]
    return Tally(len(paths), size, findings, np.array(sizes, np.int64).reshape(-1, 2))
