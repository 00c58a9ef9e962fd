"""ImageNet's own archives, read where they are: nothing is unpacked.

``ILSVRC2012_img_train.tar`` holds a tar for each class, ``ILSVRC2012_img_val.tar`` all validation images side by side,
and the devkit says which class each of those is of. The headers of the tars are read once; from then on an image is
found by its place in the archive. The plan that follows, and so the shards, are those of the unpacked folders.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from vimfast.errors import UserError
from vimfast.files import atomic_write, read_at, read_file
from vimfast.shards.members import members
from vimfast.shards.origin import MOST_BYTES, Origin, missing_sources, put_stat
from vimfast.shards.tree import FileList, file_kind, is_image_name, pack_names
from vimfast.shards.workers import Pace, run, tick

ARCHIVES = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
DEVKIT = "ILSVRC2012_devkit_t12"
_TRUTH, _META = "data/ILSVRC2012_validation_ground_truth.txt", "data/meta.mat"
_MOST_DEVKIT_BYTES = 64 << 20  # of one of its files
_DOWNLOAD = "download it again, or compare its checksum with image-net.org's"


class _Found(NamedTuple):
    """Images in a tar, in its order: their names, where they begin in the archive, and their sizes in bytes."""

    names: list[str]
    offsets: list[int]
    sizes: list[int]
    others: Counter[str]  # of the other files, how many there are of each extension


@dataclass(frozen=True)
class ArchivedFiles(FileList):
    """The images of one split; `folder` is their archive, and `places` says where they are in it.

    Attributes:
        places: int64 [N, 2]: the first byte, and how many.
    """

    places: np.ndarray = field(kw_only=True)

    def describe(self, name: str) -> str:
        return f"{self.folder}: {name}"

    def origin(self, ids: Sequence[int]) -> Origin:
        return ArchiveOrigin(str(self.folder), [self.name(i) for i in ids], self.places[ids])


class ArchiveOrigin:
    """Members of an archive, by their places.

    Args:
        places: int64 [n, 2]: the first byte of each, and how many.
    """

    def __init__(self, archive: str, names: Sequence[str], places: np.ndarray) -> None:
        self._archive, self._names, self._places = archive, names, places
        self._file: int | None = None

    def __getstate__(self) -> tuple[str, Sequence[str], np.ndarray]:
        return self._archive, self._names, self._places

    def __setstate__(self, state: tuple[str, Sequence[str], np.ndarray]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def name(self, i: int) -> str:
        return f"{self._archive}: {self._names[i]}"

    def stat(self) -> np.ndarray:
        sources = missing_sources(len(self._names))
        with suppress(OSError):  # reported when it is read
            put_stat(sources, os.stat(self._archive), self._places[:, 1])
        return sources

    def read(self, i: int) -> bytes:
        offset, size = self._places[i].tolist()
        if size > MOST_BYTES:
            raise ValueError(f"{size:,} bytes, which is more than {MOST_BYTES:,}")
        try:
            if self._file is None:
                self._file = os.open(self._archive, os.O_RDONLY | os.O_CLOEXEC)
                weakref.finalize(self, os.close, self._file)
            data = read_at(self._file, offset, size)
        except OSError as error:
            raise UserError(
                f"{self.name(i)} cannot be read ({error.strerror})", "once the archive is back, run again, it resumes"
            ) from None
        if len(data) < size:
            raise UserError(f"{self._archive} is cut off in {self._names[i]}", _DOWNLOAD)
        return data


def archive_of(root: Path, split: str) -> Path | None:
    """The archive in `root` that holds this split, if there is one."""
    path = root / ARCHIVES[split]
    return path if path.is_file() else None


def list_archive(root: Path, split: str, classes: Sequence[str] | None, workers: int, notes: Path) -> ArchivedFiles:
    """The images of a split as its archive has them, sorted and labelled as those of the unpacked folder.

    Args:
        classes: the training classes, if the split is not to define them.
        workers: processes.
        notes: a folder for what was found, so that a later run need not look again.

    Raises:
        UserError: the archive or the devkit is missing, damaged or of another layout, or has an unknown class.
    """
    archive = root / ARCHIVES[split]
    note = notes / f"{split}.archive.npz"
    try:
        stat = archive.stat()
        key = json.dumps([str(archive.absolute()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, classes])
        if (known_files := _read_note(note, key, archive)) is not None:
            return known_files
        files = _look_through(root, archive, split, classes, workers)
    except OSError as error:
        raise UserError(f"{archive} cannot be read ({error.strerror})", "fix that and run again") from None
    with suppress(OSError):  # where nothing can be written, the conversion is about to say so
        _write_note(note, key, files)
    return files


def _look_through(root: Path, archive: Path, split: str, classes: Sequence[str] | None, workers: int) -> ArchivedFiles:
    labels_of = _validation_classes(root) if split == "val" else None  # first: a minute passes before it is needed
    by_class = _list_train(archive, workers) if labels_of is None else _list_val(archive, labels_of)
    known = sorted(by_class) if classes is None else list(classes)
    if unknown := sorted(set(by_class) - set(known)):
        raise UserError(
            f"{archive} has images of {unknown[0]}, which is not a training class ({len(unknown)} are not)",
            "put the training images of the same data set beside it",
        )
    return _sorted(archive, known, by_class)


def _sorted(archive: Path, classes: list[str], by_class: dict[str, _Found]) -> ArchivedFiles:
    """In the order of a folder's: by class, then by name. Of members with one name the last counts, as in unpacking."""
    names: list[str] = []
    labels, places, others = [], [], Counter[str]()
    for label, name in enumerate(classes):
        found = by_class.get(name, _Found([], [], [], Counter()))
        others += found.others
        last = {inside: place for inside, *place in zip(found.names, found.offsets, found.sizes, strict=True)}
        for inside in sorted(last):
            names.append(inside)
            labels.append(label)
            places.append(last[inside])
    if not labels:
        raise UserError(f"{archive} holds no images", _DOWNLOAD)
    packed = pack_names(names)
    return ArchivedFiles(
        archive, classes, np.array(labels, np.int32), *packed, others, places=np.array(places, np.int64)
    )


def _write_note(note: Path, key: str, files: ArchivedFiles) -> None:
    text = np.frombuffer(json.dumps([key, files.classes, files.others]).encode(), np.uint8)
    note.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(note, durable=False) as file:
        np.savez(file, text=text, labels=files.labels, names=files.names, offsets=files.offsets, places=files.places)


def _read_note(note: Path, key: str, archive: Path) -> ArchivedFiles | None:
    """What an earlier run found in this archive; None where there is no sound note of it."""
    try:
        with np.load(io.BytesIO(read_file(note)), allow_pickle=False) as saved:
            known, classes, others = json.loads(saved["text"].tobytes())
            labels, names, offsets, places = (saved[name] for name in ("labels", "names", "offsets", "places"))
            shapes = (labels.shape, places.shape, offsets.shape, int(offsets[-1]))
    except Exception:  # zipfile's and numpy's readers raise nearly anything on garbage
        return None
    if known != key or shapes != ((len(labels),), (len(labels), 2), (len(labels) + 1,), len(names)):
        return None
    return ArchivedFiles(archive, classes, labels, names, offsets, others, places=places)


# The archives


def _list_train(archive: Path, workers: int) -> dict[str, _Found]:
    """The images of each class, from the tars in the archive, which are looked through by worker processes."""
    with open(archive, "rb", buffering=0) as file:
        inside = list(members(file, str(archive), _DOWNLOAD))
    tars = [(name, offset, size) for name, offset, size in inside if name.endswith(".tar")]
    if not tars:
        raise UserError(
            f"{archive} holds no tar of a class, such as n01440764.tar", "give ImageNet's archive as it was downloaded"
        )
    found: dict[str, _Found] = {}
    pace = Pace(len(tars), "classes listed", unit="classes")
    for (name, _, _), images in run(_list_class, tars, lambda tar: (str(archive), *tar), workers, pace):
        found[name.removesuffix(".tar")] = images
    return found


def _list_class(archive: str, name: str, offset: int, size: int) -> _Found:
    """In a worker."""
    tick(name)
    with open(archive, "rb", buffering=0) as file:
        return _images(members(file, f"{archive}: {name}", _DOWNLOAD, offset, size))


def _images(found_in_tar: Iterator[tuple[str, int, int]]) -> _Found:
    found = _Found([], [], [], Counter())
    for name, offset, size in found_in_tar:
        if is_image_name(os.path.basename(name)):
            found.names.append(name)
            found.offsets.append(offset)
            found.sizes.append(size)
        elif not os.path.basename(name).startswith("."):
            found.others[file_kind(name)] += 1
    return found


def _list_val(archive: Path, class_of: Callable[[int], str | None]) -> dict[str, _Found]:
    with open(archive, "rb", buffering=0) as file:
        images = _images(members(file, str(archive), _DOWNLOAD))
    found: dict[str, _Found] = {}
    for name, offset, size in zip(images.names, images.offsets, images.sizes, strict=True):
        number = re.search(r"(\d{8})\.\w+$", name)
        wnid = class_of(int(number[1])) if number else None
        if wnid is None:
            raise UserError(f"{archive} has {name}, of which the devkit knows no class", _DOWNLOAD)
        own = found.setdefault(wnid, _Found([], [], [], Counter()))
        own.names.append(os.path.basename(name))
        own.offsets.append(offset)
        own.sizes.append(size)
    for kind, count in images.others.items():
        next(iter(found.values()), images).others[kind] += count
    return found


# The devkit


def _validation_classes(root: Path) -> Callable[[int], str | None]:
    """From the number of a validation image, from 1 on, to its class, such as n01440764.

    Raises:
        UserError: the devkit is not there, is damaged, or scipy is missing, which reads it.
    """
    archive, folder = root / f"{DEVKIT}.tar.gz", root / DEVKIT
    where = archive if archive.is_file() else folder
    if not where.exists():
        raise UserError(
            f"{root} has {ARCHIVES['val']}, but not {archive.name}, which says what its images show",
            "put it there too, from image-net.org",
        )
    try:
        truth, meta = _devkit_files(where)
        numbers = [int(line) for line in truth.split()]
        wnids = _read_meta(meta)
    except OSError as error:
        raise UserError(f"{where} cannot be read ({error.strerror or error})", _DOWNLOAD) from None
    except (tarfile.TarError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{where} is damaged ({error})", _DOWNLOAD) from None
    return lambda image: wnids.get(numbers[image - 1]) if 0 < image <= len(numbers) else None


def _devkit_files(where: Path) -> tuple[bytes, bytes]:
    """The numbers of the classes of the validation images, and the table of classes."""
    found: dict[str, bytes] = {}
    if where.is_dir():
        for name in (_TRUTH, _META):
            found[name] = (where / name).read_bytes()
    else:
        with tarfile.open(where) as tar:
            for member in tar:
                name = os.path.normpath(member.name).removeprefix(f"{DEVKIT}/")
                if name in (_TRUTH, _META) and member.isreg() and member.size <= _MOST_DEVKIT_BYTES:
                    content = tar.extractfile(member)
                    assert content is not None
                    found[name] = content.read()
    if missing := [name for name in (_TRUTH, _META) if name not in found]:
        raise ValueError(f"it has no {missing[0]}")
    return found[_TRUTH], found[_META]


def _read_meta(data: bytes) -> dict[int, str]:
    """The class of each ILSVRC2012_ID, from MATLAB's table of classes."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(f"the devkit's {_META} is read by scipy, which is not installed", "pip install scipy") from None
    content: BinaryIO = io.BytesIO(data)
    try:
        synsets = loadmat(content, squeeze_me=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in np.atleast_1d(synsets)}
    except Exception as error:  # scipy's reader raises nearly anything on garbage
        raise ValueError(f"{_META}: {error}") from None
