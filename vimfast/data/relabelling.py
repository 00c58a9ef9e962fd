"""Labels other than the places of class folders: a class map's, or a row of targets for each image."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

import msgspec
import numpy as np

from vimfast.data.cache import CacheSettings
from vimfast.data.mixed import open_data
from vimfast.data.source import Images, Source
from vimfast.data.tars import Route
from vimfast.errors import UserError

_SUM = 1e-2  # how far from 1 the targets of an image may add up to, in fp16


class ClassMap(NamedTuple):
    """Which number a class folder has."""

    classes: list[str]  # their names; of folders that share a number, joined by " / "
    numbers: Mapping[str, int]  # by the name of the folder


def read_class_map(path: Path) -> ClassMap:
    """A text file with the name of a folder on each line, in the order of their numbers, as timm reads it; or JSON, an
    object of names and numbers, where several folders may have one number.

    Raises:
        UserError: it cannot be read, has a name twice, or its numbers are not 0, 1, 2 and so on.
    """
    try:
        text = path.read_text()
        if path.suffix == ".json":
            numbers = msgspec.convert(json.loads(text), dict[str, int])
        else:
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            numbers = {name: number for number, name in enumerate(lines)}
            if len(numbers) < len(lines):
                twice = Counter(lines).most_common(1)[0][0]
                raise UserError(f"--class-map {path} has {twice!r} twice", "leave it there once")
    except (ValueError, msgspec.ValidationError) as error:
        fix = 'write a class folder\'s name on each line, or JSON such as {"cat": 0, "dog": 1}'
        raise UserError(f"--class-map {path} cannot be used ({error})", fix) from None
    except OSError as error:
        raise UserError(f"--class-map {path} cannot be read ({error.strerror})", "give a text file, or JSON") from None
    found = sorted(set(numbers.values()))
    if found != list(range(len(found))) or not found:
        held = f"the numbers {found[0]} to {found[-1]} for {len(found)} classes" if found else "no class"
        raise UserError(f"--class-map {path} has {held}", "count from 0 and leave none out")
    names = [" / ".join(name for name, number in numbers.items() if number == i) for i in found]
    return ClassMap(names, numbers)


class Relabelled:
    """A source whose labels are others.

    Args:
        source: the images.
        classes: their names.
        labels: int32 [N], positions among them.
        given: int64 [N], handed out with the images in place of labels; None: the labels.
    """

    def __init__(
        self, source: Source, classes: Sequence[str], labels: np.ndarray, given: np.ndarray | None = None
    ) -> None:
        self._source = source
        self.classes, self.labels = classes, labels
        self._given = labels.astype(np.int64) if given is None else given

    @property
    def identity(self) -> str:
        return self._source.identity

    @property
    def mixture(self) -> tuple[tuple[int, int], ...]:
        return self._source.mixture

    def __len__(self) -> int:
        return len(self._source)

    @property
    def widest_window(self) -> int | None:
        return self._source.widest_window

    def follow(self, route: Route, epoch: int, step: int) -> None:
        self._source.follow(route, epoch, step)

    def class_counts(self) -> np.ndarray:
        return np.bincount(self.labels, minlength=len(self.classes))

    def will_need(self, ids: np.ndarray) -> None:
        self._source.will_need(ids)

    def read(self, ids: np.ndarray) -> Images:
        return self._source.read(ids)._replace(labels=self._given[ids])

    def verify(self, ids: np.ndarray, encoded: Sequence[np.ndarray]) -> None:
        self._source.verify(ids, encoded)

    def name(self, i: int) -> str:
        return self._source.name(i)

    def mean_bytes(self) -> float:
        return self._source.mean_bytes()

    def bounds(self) -> tuple[int, ...]:
        return self._source.bounds()


def numbered(source: Source) -> Source:
    """A source that hands out the number of each image in place of its label, by which its targets are found."""
    return Relabelled(source, source.classes, source.labels, np.arange(len(source)))


def open_mapped(path: str | Path, split: str, class_map: str = "", cache: CacheSettings | None = None) -> Source:
    """:func:`open_data`, with the classes of a class map, if there is one.

    Raises:
        UserError: as it does, or a class with images is not in the map.
    """
    source = open_data(path, split, cache)
    if not class_map:
        return source
    known = read_class_map(Path(class_map))
    numbers = np.array([known.numbers.get(name, -1) for name in source.classes], np.int32)
    labels = numbers[source.labels]
    if (labels < 0).any():
        name = source.classes[int(source.labels[int((labels < 0).argmax())])]
        raise UserError(f"{path} has images of class {name!r}, which --class-map {class_map} does not have", "add it")
    return Relabelled(source, known.classes, labels)


def read_soft_targets(path: Path, source: Source, *, sums_to_one: bool = True) -> np.ndarray:
    """The targets of the images of a source, float [N, K], in their order.

    Args:
        path: a ``.npy`` file of rows [rows, K]; a ``.csv`` beside it says in a column ``image`` which image each row is
            for, as ``vimfast embed`` writes it. Of a path, the last folder and the name without its extension count.
        sums_to_one: whether those of an image must.

    Raises:
        UserError: the files cannot be read, do not fit each other or the classes, or an image has no row.
    """
    beside = path.with_suffix(".csv")
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
        with beside.open(newline="", errors="surrogateescape") as file:
            table = csv.DictReader(file)
            if "image" not in (table.fieldnames or ()):
                raise UserError(f"{beside} has no column 'image'", "write there which image each row is for")
            images = [_key(row["image"]) for row in table]
    except OSError as error:
        fix = "--soft-targets takes a .npy file with a .csv beside it (docs/finetune.md)"
        raise UserError(f"{error.filename or path} cannot be read ({error.strerror})", fix) from None
    except (ValueError, csv.Error, TypeError) as error:
        raise UserError(f"--soft-targets {path} cannot be used ({error})", "write it with numpy.save") from None
    wanted = (len(images), len(source.classes))
    if rows.shape != wanted or rows.dtype.kind != "f":
        raise UserError(
            f"--soft-targets {path} is {rows.dtype} {list(rows.shape)}, and {beside.name} and the classes make it"
            f" {list(wanted)}",
            "give a float for each image of the .csv and each class",
        )
    keys = [_key(source.name(i)) for i in range(len(source))]
    for key in (_twice(images), _twice(keys)):
        if key:
            raise UserError(f"two images are called {key}, so their targets cannot be told apart", "rename one")
    row_of = {key: row for row, key in enumerate(images)}
    if missing := next((key for key in keys if key not in row_of), None):
        raise UserError(f"{beside} has no row for the image {missing}", "add it, and its targets")
    targets = np.asarray(rows)[[row_of[key] for key in keys]]
    sums = targets.sum(axis=1, dtype=np.float64)
    wrong = ~np.isfinite(sums) | (targets < 0).any(axis=1) | (sums_to_one & (np.abs(sums - 1) > _SUM))
    if wrong.any():
        i = int(wrong.argmax())
        raise UserError(
            f"the targets of {keys[i]} in {path} add up to {sums[i]:.4g}, the least is {targets[i].min():.4g}",
            "make them 0 or more, and each row add up to 1" if sums_to_one else "make them 0 or more",
        )
    return targets


def _key(name: str) -> str:
    """Folder and name of an image, however its path begins or ends; of one in a shard, its member's."""
    path = PurePath(name.rpartition(": ")[2])
    return f"{path.parent.name}/{path.stem}"


def _twice(keys: Iterable[str]) -> str:
    (key, count), *_ = [*Counter(keys).most_common(1), ("", 0)]
    return key if count > 1 else ""
