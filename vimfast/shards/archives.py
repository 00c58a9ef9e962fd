"""ImageNet's own archives, read where they are: nothing is unpacked.

``ILSVRC2012_img_train.tar`` holds a tar for each class, ``ILSVRC2012_img_val.tar`` all validation images side by side,
and the devkit says which class each of those is of. The headers of the tars are read once; from then on an image is
found by its place in the archive. The plan that follows, and so the shards, are those of the unpacked folders.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from vimfast.errors import UserError
from vimfast.files import atomic_write, read_file
from vimfast.shards.homes import DOWNLOAD_AGAIN, Home, home_of
from vimfast.shards.members import members
from vimfast.shards.origin import Origin
from vimfast.shards.tree import FileList, file_kind, is_image_name, pack_names
from vimfast.shards.workers import Pace, progress, run, tick

ARCHIVES = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
DEVKIT = "ILSVRC2012_devkit_t12"
NOTE = ".archive.npz"  # with a split before it: the name of a note of what its archive holds
_TRUTH, _META = "data/ILSVRC2012_validation_ground_truth.txt", "data/meta.mat"
_MB = 1_000_000  # bytes
_MOST_DEVKIT_BYTES = 64 << 20  # of one of its files


class _Tar(NamedTuple):
    """Of a class, and where it lies in the archive."""

    name: str
    offset: int
    size: int


class _Found(NamedTuple):
    """Images in a tar, in its order: their names, where they begin in the archive, and their sizes in bytes."""

    names: list[str]
    offsets: list[int]
    sizes: list[int]
    others: Counter[str]  # of the other files, how many there are of each extension


@dataclass(frozen=True)
class ArchivedFiles(FileList):
    """The images of one split; `folder` is their archive's name in its `home`, and `places` says where they are in it.

    Attributes:
        places: int64 [N, 2]: the first byte, and how many.
    """

    home: Home = field(kw_only=True)
    places: np.ndarray = field(kw_only=True)

    @property
    def where(self) -> str:
        return self.home.where(str(self.folder))

    def describe(self, name: str) -> str:
        return f"{self.where}: {name}"

    def origin(self, ids: Sequence[int]) -> Origin:
        return self.home.origin(str(self.folder), [self.name(i) for i in ids], self.places[ids])


def has_archive(root: Path | str, split: str) -> bool:
    """Whether the archive of this split is in a folder, or below a URL."""
    return home_of(root).stamp(ARCHIVES[split]) is not None


def list_archive(
    root: Path | str, split: str, classes: Sequence[str] | None, workers: int, notes: Path
) -> ArchivedFiles:
    """The images of a split as its archive has them, sorted and labelled as those of the unpacked folder.

    Args:
        root: where the archive is: a folder, or a URL.
        classes: the training classes, if the split is not to define them.
        workers: processes.
        notes: a folder for what was found, so that a later run need not look again.

    Raises:
        UserError: the archive or the devkit is missing, damaged or of another layout, or has an unknown class.
    """
    home, archive = home_of(root), ARCHIVES[split]
    note = notes / f"{split}{NOTE}"
    try:
        key = json.dumps([os.path.abspath(root) if isinstance(root, Path) else root, home.stamp(archive), classes])
        if (known_files := _read_note(note, key, home, archive)) is not None:
            return known_files
        files = _look_through(home, split, classes, workers)
    except OSError as error:
        raise UserError(f"{home.where(archive)} cannot be read ({error.strerror})", "fix that and run again") from None
    with suppress(OSError):  # where nothing can be written, the conversion is about to say so
        _write_note(note, key, files)
    return files


def _look_through(home: Home, split: str, classes: Sequence[str] | None, workers: int) -> ArchivedFiles:
    labels_of = _validation_classes(home) if split == "val" else None  # first: a minute passes before it is needed
    by_class = _list_train(home, workers) if labels_of is None else _list_val(home, labels_of)
    known = sorted(by_class) if classes is None else list(classes)
    if unknown := sorted(set(by_class) - set(known)):
        raise UserError(
            f"{home.where(ARCHIVES[split])} has images of {unknown[0]}, which is not a training class "
            f"({len(unknown)} are not)",
            "put the training images of the same data set beside it",
        )
    return _sorted(home, ARCHIVES[split], known, by_class)


def _sorted(home: Home, archive: str, classes: list[str], by_class: dict[str, _Found]) -> ArchivedFiles:
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
        raise UserError(f"{home.where(archive)} holds no images", DOWNLOAD_AGAIN)
    packed = pack_names(names)
    return ArchivedFiles(
        Path(archive),
        classes,
        np.array(labels, np.int32),
        *packed,
        others,
        home=home,
        places=np.array(places, np.int64),
    )


def _write_note(note: Path, key: str, files: ArchivedFiles) -> None:
    text = np.frombuffer(json.dumps([key, files.classes, files.others]).encode(), np.uint8)
    note.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(note, durable=False) as file:
        np.savez(file, text=text, labels=files.labels, names=files.names, offsets=files.offsets, places=files.places)


def _read_note(note: Path, key: str, home: Home, archive: str) -> ArchivedFiles | None:
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
    return ArchivedFiles(Path(archive), classes, labels, names, offsets, others, home=home, places=places)


# The archives


def _list_train(home: Home, workers: int) -> dict[str, _Found]:
    """The images of each class, from the tars in the archive, which are looked through by worker processes."""
    archive = ARCHIVES["train"]
    with home.open(archive, headers=True) as file:
        found_in_tar = members(file, home.where(archive), DOWNLOAD_AGAIN)
        # In a store, the header of each class is a request that waits for the one before: half a minute.
        inside = list(_with_progress(found_in_tar, file.seek(0, os.SEEK_END), "training"))
    tars = [_Tar(*member) for member in inside if member[0].endswith(".tar")]
    if not tars:
        raise UserError(
            f"{home.where(archive)} holds no tar of a class, such as n01440764.tar",
            "give ImageNet's archive as it was downloaded",
        )
    found: dict[str, _Found] = {}
    groups = [tars[first : first + home.at_once] for first in range(0, len(tars), home.at_once)]
    pace = Pace(len(tars), "classes listed", unit="classes")
    for group, images in run(_list_classes, groups, lambda group: (home, group), workers, pace):
        found |= {tar.name.removesuffix(".tar"): of_class for tar, of_class in zip(group, images, strict=True)}
    return found


def _list_classes(home: Home, tars: Sequence[_Tar]) -> list[_Found]:
    """In a worker, all of these classes at a time."""
    ended = threading.Event()
    with ThreadPoolExecutor(len(tars)) as pool:
        try:
            found = [pool.submit(_list_class, home, tar, ended) for tar in tars]
            left = set(found)
            while left:
                done, left = wait(left, timeout=0.2, return_when=FIRST_COMPLETED)
                tick(tars[0].name, len(done))
        finally:
            ended.set()
    return [images.result() for images in found]


def _list_class(home: Home, tar: _Tar, ended: threading.Event) -> _Found:
    archive = ARCHIVES["train"]
    with home.open(archive, headers=True) as file:
        inside = members(file, f"{home.where(archive)}: {tar.name}", DOWNLOAD_AGAIN, tar.offset, tar.size)
        return _images(itertools.takewhile(lambda _: not ended.is_set(), inside))


def _images(found_in_tar: Iterable[tuple[str, int, int]]) -> _Found:
    found = _Found([], [], [], Counter())
    for name, offset, size in found_in_tar:
        if is_image_name(os.path.basename(name)):
            found.names.append(name)
            found.offsets.append(offset)
            found.sizes.append(size)
        elif not os.path.basename(name).startswith("."):
            found.others[file_kind(name)] += 1
    return found


def _list_val(home: Home, class_of: Callable[[int], str | None]) -> dict[str, _Found]:
    """A header follows from the one before, so 50,000 requests would wait for each other: it is read as a whole."""
    where = home.where(ARCHIVES["val"])
    with home.open(ARCHIVES["val"], headers=False) as file:
        images = _images(_with_progress(members(file, where, DOWNLOAD_AGAIN), file.seek(0, os.SEEK_END), "validation"))
    found: dict[str, _Found] = {}
    for name, offset, size in zip(images.names, images.offsets, images.sizes, strict=True):
        number = re.search(r"(\d{8})\.\w+$", name)
        wnid = class_of(int(number[1])) if number else None
        if wnid is None:
            raise UserError(f"{where} has {name}, of which the devkit knows no class", DOWNLOAD_AGAIN)
        own = found.setdefault(wnid, _Found([], [], [], Counter()))
        own.names.append(os.path.basename(name))
        own.offsets.append(offset)
        own.sizes.append(size)
    for kind, count in images.others.items():
        next(iter(found.values()), images).others[kind] += count
    return found


def _with_progress(
    found_in_tar: Iterable[tuple[str, int, int]], size: int, kind: str
) -> Iterator[tuple[str, int, int]]:
    """The same; meanwhile it is shown how many of the archive's bytes have been passed."""
    pace = Pace(size // _MB, f"MB of the {kind} images' archive", unit="MB")
    with progress(pace) as show:
        for member in found_in_tar:
            if (done := (member[1] + member[2]) // _MB) > pace.done:
                pace.done = done
                show()
            yield member


# The devkit


def _validation_classes(home: Home) -> Callable[[int], str | None]:
    """From the number of a validation image, from 1 on, to its class, such as n01440764.

    Raises:
        UserError: the devkit is not there, is damaged, or scipy is missing, which reads it.
    """
    packed = f"{DEVKIT}.tar.gz"
    name = packed if home.stamp(packed) else DEVKIT
    if name == DEVKIT and home.stamp(f"{DEVKIT}/{_TRUTH}") is None:
        raise UserError(
            f"{home.where(ARCHIVES['val'])} is there, but not {packed} beside it, which says what its images show",
            "put it there too, from image-net.org",
        )
    where = home.where(name)
    try:
        truth, meta = _devkit_files(home, name)
        numbers = [int(line) for line in truth.split()]
        wnids = _read_meta(meta)
    except OSError as error:
        raise UserError(f"{where} cannot be read ({error.strerror or error})", DOWNLOAD_AGAIN) from None
    except (tarfile.TarError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{where} is damaged ({error})", DOWNLOAD_AGAIN) from None
    return lambda image: wnids.get(numbers[image - 1]) if 0 < image <= len(numbers) else None


def _devkit_files(home: Home, name: str) -> tuple[bytes, bytes]:
    """The numbers of the classes of the validation images, and the table of classes."""
    if name == DEVKIT:  # unpacked
        return home.read(f"{name}/{_TRUTH}"), home.read(f"{name}/{_META}")
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(home.read(name))) as tar:
        for member in tar:
            inside = os.path.normpath(member.name).removeprefix(f"{DEVKIT}/")
            if inside in (_TRUTH, _META) and member.isreg() and member.size <= _MOST_DEVKIT_BYTES:
                content = tar.extractfile(member)
                assert content is not None
                found[inside] = content.read()
    if missing := [inside for inside in (_TRUTH, _META) if inside not in found]:
        raise ValueError(f"it has no {missing[0]}")
    return found[_TRUTH], found[_META]


def _read_meta(data: bytes) -> dict[int, str]:
    """The class of each ILSVRC2012_ID, from MATLAB's table of classes."""
    try:
        from scipy.io import loadmat
    except ModuleNotFoundError:
        raise UserError(f"the devkit's {_META} is read by scipy, which is not installed", "pip install scipy") from None
    content: BinaryIO = io.BytesIO(data)
    try:
        synsets = loadmat(content, squeeze_me=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in np.atleast_1d(synsets)}
    except Exception as error:  # scipy's reader raises nearly anything on garbage
        raise ValueError(f"{_META}: {error}") from None
