"""A folder in the ImageNet layout: ``<root>/<split>/<class>/**/<image>``; the class index is the position of the
class among the sorted folder names.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from vimfast.errors import UserError, counted
from vimfast.shards.foreign import INDEX_SHARDS, first_shard
from vimfast.shards.origin import FolderOrigin, Origin

T = TypeVar("T")

_SPLITS = ("train", "val")
# The file name extensions of each format that is read (see jpeg.py).
EXTENSIONS = {
    "jpeg": {".jpg", ".jpeg", ".jpe", ".jfif"},
    "png": {".png", ".apng"},
    "webp": {".webp"},
    "bmp": {".bmp", ".dib"},
    "gif": {".gif"},
    "tiff": {".tif", ".tiff"},
    "ppm": {".ppm", ".pgm", ".pbm", ".pnm", ".pfm"},
    "jpeg2000": {".jp2", ".j2k", ".jpx", ".j2c", ".jpc"},
    "avif": {".avif"},
}
IMAGE_EXTENSIONS = frozenset().union(*EXTENSIONS.values())


@dataclass(frozen=True)
class FileList:
    """The images of one split, sorted by class and name, in three arrays, without a Python object per sample.

    Attributes:
        folder: the split's folder.
        classes: class names; a label is a position in this list.
        labels: int32 [N].
        names: uint8 [bytes], the paths inside their class folders, one after the other.
        offsets: int64 [N + 1], the start of each path in `names`.
        others: how many files were passed over that are not hidden, by extension.
        loose: how many images lie beside the class folders, which were passed over too.
    """

    folder: Path
    classes: list[str]
    labels: np.ndarray
    names: np.ndarray
    offsets: np.ndarray
    others: Mapping[str, int] = field(default_factory=dict)
    loose: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        """The path below the split's folder: ``n01440764/n01440764_10026.JPEG``."""
        inside = self.names[self.offsets[i] : self.offsets[i + 1]].tobytes()
        return f"{self.classes[self.labels[i]]}/{os.fsdecode(inside)}"

    def path(self, i: int) -> Path:
        """The image's file."""
        return self.folder / self.name(i)

    @property
    def where(self) -> str:
        """The images are, for a person to find them."""
        return str(self.folder)

    def describe(self, name: str) -> str:
        """Where the image of this :meth:`name` is, for a person to find it."""
        return str(self.folder / name)

    def origin(self, ids: Sequence[int]) -> Origin:
        """These images, for whoever reads them."""
        return FolderOrigin(str(self.folder), [self.name(i) for i in ids])


def pack_names(names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Names and offsets as :class:`FileList` has them."""
    encoded = [os.fsencode(name) for name in names]
    lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    return np.frombuffer(b"".join(encoded), np.uint8), offsets


def is_image_name(name: str) -> bool:
    """Whether a file of this name counts as an image. Hidden ones (``._x.JPEG`` of macOS archives) do not."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS


def is_folder(path: Path) -> bool:
    """Whether there is a folder.

    Raises:
        UserError: that cannot be found out, for lack of a permission or because of a failing disk.
    """
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise _unreadable(error) from None


def _unreadable(error: OSError) -> UserError:
    return UserError(f"{error.filename} cannot be read ({error.strerror})", "fix that and run again")


def unwatched(things: Iterable[T]) -> Generator[T, None, None]:
    """The same."""
    yield from things


Watched = Callable[[Sequence[str]], Generator[str, None, None]]


def scan_split(root: Path, split: str, classes: Sequence[str] | None = None, watched: Watched = unwatched) -> FileList:
    """List the images of `root`/`split`.

    Images may lie deeper than their class folder (``n01443537/images/x.JPEG``), as torchvision reads them too. Links
    are followed. Class folders without images keep their index.

    Args:
        classes: the training classes, if the split's own folder names are not to define them. A folder that is not
            among them is an error, a missing one is not.
        watched: the names of its class folders go through this, which may show how many are listed.

    Raises:
        UserError: no such folder, no class folders, a doubled level, an unknown class, a link that may have led to a
            class, or no images at all.
    """
    try:
        if not is_folder(root / split):
            raise _missing(root, split)
        return _scan(root, split, classes, watched)
    except OSError as error:  # no permission, a loop of links, a failing disk
        raise _unreadable(error) from None


def class_folders(folder: Path) -> list[str]:
    """The names of the classes of a split, sorted; none where there is no such folder.

    Raises:
        UserError: it cannot be read, or has a link that may have led to a class.
    """
    if not is_folder(folder):
        return []
    try:
        return _class_folders(folder)[0]
    except OSError as error:
        raise _unreadable(error) from None


def _class_folders(folder: Path) -> tuple[list[str], list[str]]:
    """The names of the folders in `folder`, and of what else is there, sorted."""
    with os.scandir(folder) as entries:
        found = sorted((e.name, _is_folder(e)) for e in entries if not e.name.startswith("."))
    return [name for name, is_folder in found if is_folder], [name for name, is_folder in found if not is_folder]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Without a class that is a link to a disk that went away, all classes after it would have other labels."""
    if entry.is_dir():
        return True
    if is_dead_link(entry.path) and not is_image_name(entry.name):
        raise UserError(f"{entry.path} is a link to nowhere", "bring back what it leads to, or delete it")
    return False


Identity = tuple[int, int]
Ancestors = tuple[Identity, ...]


def identity(folder: Path) -> Identity:
    """What a folder is recognized by, whatever links led to it."""
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def is_dead_link(path: str | Path) -> bool:
    return os.path.islink(path) and not os.path.exists(path)


def _scan(root: Path, split: str, classes: Sequence[str] | None, watched: Watched) -> FileList:
    folder = root / split
    folders, rest = _class_folders(folder)
    flat = sum(map(is_image_name, rest))
    if not folders:
        if flat:
            raise UserError(
                f"{folder} holds {counted(flat, 'image')} and no class folders",
                f"move each image into a folder named after its class, such as {split}/n01440764/",
            )
        if (shard := first_shard(folder)) is not None:
            raise UserError(f"{folder} holds WebDataset shards of another program, such as {shard.name}", INDEX_SHARDS)
        raise UserError(f"{folder} is empty", "put one folder of images per class there")
    if folders == [split] or folders == sorted(_SPLITS):
        raise UserError(f"{folder} holds another {folders[0]}/ instead of class folders", "move it up one level")
    known = folders if classes is None else list(classes)
    if unknown := sorted(set(folders) - set(known)):
        raise UserError(
            f"{folder / unknown[0]} is not a training class ({len(unknown)} of {len(folders)} folders are not)",
            f"remove it, or add the class to {root / 'train'}",
        )
    others = Counter(file_kind(name) for name in rest if not is_image_name(name))
    files = replace(_list(folder, folders, watched, known, others), loose=flat)
    if not len(files):
        where = f"{counted(len(folders), 'class folder')} of {folder}"
        raise UserError(f"no images in the {where}", "unpack the class archives there")
    return files


def _list(folder: Path, folders: list[str], watched: Watched, classes: list[str], others: Counter[str]) -> FileList:
    """The arrays, grown class by class: at most one class's names are Python objects at a time."""
    places = {name: i for i, name in enumerate(classes)}
    blobs, lengths, counts = [], [], []
    with closing(watched(folders)) as names:  # also where an error or Ctrl-C ends it
        for name in names:
            encoded = [os.fsencode(inside) for inside in sorted(_images(folder / name, others))]
            blobs.append(b"".join(encoded))
            lengths.append(np.fromiter(map(len, encoded), np.int64, len(encoded)))
            counts.append(len(encoded))
    labels = np.repeat(np.array([places[name] for name in folders], np.int32), counts)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(lengths), dtype=np.int64)])
    return FileList(folder, classes, labels, np.frombuffer(b"".join(blobs), np.uint8), offsets, others)


def _images(folder: Path, others: Counter[str]) -> Iterator[str]:
    """Paths of the images below `folder`, relative to it, in no order. Counts the other files."""
    waiting: list[tuple[str, Ancestors]] = [("", ())]
    while waiting:
        inside, above = waiting.pop()
        known = identity(folder / inside)
        if known in above:
            raise UserError(f"{folder / inside} is a link to a folder that it is in", "delete it")
        with os.scandir(folder / inside) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if _is_folder(entry):
                    waiting.append((f"{inside}{entry.name}/", (*above, known)))
                elif is_image_name(entry.name):
                    yield inside + entry.name
                else:
                    others[file_kind(entry.name)] += 1


def file_kind(name: str) -> str:
    """The extension of a file that is no image, for counting."""
    """The extension of a name that is no image's, for counting."""
    return os.path.splitext(name)[1].lower() or "no extension"


def _missing(root: Path, split: str) -> UserError:
    """The error for a split's folder that is not there, with a guess at what the user meant."""
    if not root.exists():
        return UserError(f"{root} does not exist", "give the folder that holds train/ and val/")
    if not root.is_dir():
        return UserError(f"{root} is a file", "give the folder that holds train/ and val/ (unpack archives first)")
    meant = sorted(str(child.parent) for s in _SPLITS for child in root.glob(f"*/{s}") if child.is_dir())
    if not meant and root.name in _SPLITS:
        meant = [str(root.absolute().parent)]
    return UserError(f"{root} has no {split}/", f"did you mean {meant[0]}?" if meant else _layout(root, split))


def _layout(root: Path, split: str) -> str:
    """How to make what `root` holds into a folder with this split."""
    if split == "val" and is_folder(root / "train"):
        return (
            f"put images to evaluate with into {root}/val/<class>/; if there are none, move a part of each class of "
            "train/ there, as the snippet in docs/own_images.md does with a tenth"
        )
    entries = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    if classes := [path.name for path in entries if path.name not in _SPLITS and _holds_images(path)]:
        held = f"{root} holds class folders such as {', '.join(classes[:2])}"
        if any(is_folder(root / own) for own in _SPLITS):
            return f"{held}: move them into {root / split}/"
        return (
            f"{held}: move them into {root}/train/, and then a part of each, such as a tenth, into {root}/val/<class>/"
        )
    if images := sum(is_image_name(path.name) for path in entries):
        return f"{root} holds {counted(images, 'image')} and no class folders: sort them into {root / split}/<class>/"
    if (shard := first_shard(root)) is not None:
        return f"{root} holds WebDataset shards of another program, such as {shard.name}: {INDEX_SHARDS}"
    layout = "with one folder of images per class in each"
    return (
        f"{root} must hold train/ and val/, {layout}"
        if entries
        else f"{root} is empty: put train/ and val/ there, {layout}"
    )


def _holds_images(folder: Path) -> bool:
    """Not looking into its folders."""
    with suppress(OSError):
        return any(map(is_image_name, os.listdir(folder)))
    return False
