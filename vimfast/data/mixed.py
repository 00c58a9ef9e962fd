"""Several data sets as one: their images one set after the other, mixed by weight in the order of training."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vimfast.data.cache import CacheSettings
from vimfast.data.remote import check_room_for_all
from vimfast.data.source import BadImage, Images, Source, open_source
from vimfast.data.tars import Route
from vimfast.errors import UserError
from vimfast.shards.format import Manifest, fetch_manifest, is_shards_folder, read_manifest
from vimfast.shards.tree import class_folders, is_folder
from vimfast.stores import is_url, open_store

_WEIGHTED = re.compile(r"(?P<path>.+):(?P<weight>[0-9.]+(e-?[0-9]+)?)")


class Portion(NamedTuple):
    """A data set of a mixture; weights need not add up to 1."""

    path: str
    weight: float


def open_data(path: str | Path, split: str, cache: CacheSettings | None = None) -> Source:
    """:func:`open_source`, also of several data sets with weights: ``"a:0.7 b:0.3"``.

    Their classes are those of all of them together, by name. Of validation images, which are not mixed, some of the
    sets may have none.

    Raises:
        UserError: a set cannot be used, or a weight.
    """
    parts = portions(str(path))
    if not parts:
        return open_source(path, split, cache)
    manifests = {part.path: _manifest(part.path) for part in parts}
    stored = [held for name, held in manifests.items() if is_url(name) and held is not None]
    if stored:
        check_room_for_all(stored, split, cache or CacheSettings())
    having = parts if split == "train" else [part for part in parts if _has(part.path, manifests[part.path], split)]
    having = having or parts
    opened = [open_source(part.path, split, cache) for part in having]
    known = [list(source.classes) for source in opened]
    known += [_classes(part.path, manifests[part.path]) for part in parts if part not in having]
    alike = all(classes == known[0] for classes in known)
    classes = known[0] if alike else sorted({name for classes in known for name in classes})
    return MixedSource(opened, classes, [part.weight for part in having] if split == "train" else None)


def portions(path: str) -> list[Portion]:
    """The data sets of a mixture; none where `path` is a path.

    Raises:
        UserError: a set has no weight, or none that is a number above 0.
    """
    words = path.split()
    if len(words) < 2 or os.path.exists(os.path.expanduser(path)):
        return []
    parts = []
    for word in words:
        found = _WEIGHTED.fullmatch(word)
        weight = float(found["weight"]) if found and found["weight"].count(".") < 2 else 0.0
        if found is None or not (0 < weight < math.inf):
            raise UserError(
                f"--data-path has {len(words)} data sets, and {word!r} has no weight above 0",
                "give each its weight, such as --data-path a:0.7 b:0.3",
            )
        parts.append(Portion(os.path.expanduser(found["path"]), weight))
    return parts


def in_stores(path: str) -> bool:
    """Whether the data set of this ``--data-path``, or one of several, is in a store."""
    return any(is_url(part.path) for part in portions(path)) or is_url(path)


def _manifest(path: str) -> Manifest | None:
    """Of shards; None for a folder of images."""
    if is_url(path):
        return fetch_manifest(open_store(path))
    return read_manifest(Path(path)) if is_shards_folder(Path(path)) else None


def _has(path: str, manifest: Manifest | None, split: str) -> bool:
    return is_folder(Path(path, split)) if manifest is None else split in manifest.splits


def _classes(path: str, manifest: Manifest | None) -> list[str]:
    """Of the training images."""
    return class_folders(Path(path, "train")) if manifest is None else manifest.classes


def _shares(weights: Sequence[float], samples: int) -> list[int]:
    """So many positions of an epoch for each weight, by largest remainders."""
    exact = [weight / math.fsum(weights) * samples for weight in weights]
    shares = [int(share) for share in exact]
    for place in sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])[: samples - sum(shares)]:
        shares[place] += 1
    return shares


class _PartOfRoute:
    """What of a route is images of one of the sources, by their numbers there.

    Args:
        first, end: the numbers of its images in the whole.
    """

    def __init__(self, whole: Route, first: int, end: int) -> None:
        self.whole, self._first, self._end = whole, first, end

    @property
    def by_shard(self) -> bool:
        return self.whole.by_shard

    @property
    def endless(self) -> bool:
        return self.whole.endless

    @property
    def length(self) -> int:
        return self.whole.length

    def drawn(self, epoch: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        places, ids = self.whole.drawn(epoch, begin, end)
        own = (ids >= self._first) & (ids < self._end)
        return places[own], ids[own] - self._first

    def drawn_before(self, step: int) -> int:
        return self.whole.drawn_before(step)


class MixedSource:
    """The images of several sources, one after the other.

    Args:
        classes: class names, those of all sources among them.
        weights: how often images come from each source, in training; None: each image once.
    """

    def __init__(self, sources: Sequence[Source], classes: list[str], weights: Sequence[float] | None) -> None:
        self.classes = classes
        self._sources = sources
        lengths = [len(source) for source in sources]
        self._firsts = np.cumsum([0, *lengths])
        numbers = {name: number for number, name in enumerate(classes)}
        self._label_of = [np.array([numbers[name] for name in source.classes], np.int64) for source in sources]
        shares = lengths if weights is None else _shares(weights, sum(lengths))
        if weights is not None and 0 in shares:
            raise UserError(
                f"the smallest of the weights {', '.join(f'{w:g}' for w in weights)} gives none of an epoch's "
                f"{sum(lengths):,} images",
                "raise it, or leave that data set out",
            )
        self.mixture = tuple(zip(lengths, shares, strict=True))
        self._routes: list[_PartOfRoute] | None = None

    @property
    def labels(self) -> np.ndarray:
        parts = [of[source.labels] for of, source in zip(self._label_of, self._sources, strict=True)]
        return np.concatenate(parts).astype(np.int32)

    def class_counts(self) -> np.ndarray:
        counts = np.zeros(len(self.classes), np.int64)
        for of, source in zip(self._label_of, self._sources, strict=True):
            np.add.at(counts, of, source.class_counts())
        return counts

    @property
    def identity(self) -> str:
        parts = zip(self._sources, self.mixture, strict=True)
        return "mixed " + ", ".join(f"{share} of {source.identity}" for source, (_, share) in parts)

    def __len__(self) -> int:
        return int(self._firsts[-1])

    @property
    def widest_window(self) -> int | None:
        return None

    def follow(self, route: Route, epoch: int, step: int) -> None:
        if self._routes is None or self._routes[0].whole is not route:
            bounds = itertools.pairwise(self._firsts.tolist())
            self._routes = [_PartOfRoute(route, *own) for own in bounds]
        for source, own in zip(self._sources, self._routes, strict=True):
            source.follow(own, epoch, step)

    def will_need(self, ids: np.ndarray) -> None:
        for number, places in self._by_source(ids):
            self._sources[number].will_need(ids[places] - self._firsts[number])

    def read(self, ids: np.ndarray) -> Images:
        encoded: list[np.ndarray] = [np.empty(0, np.uint8)] * len(ids)
        sizes, labels = np.zeros((len(ids), 2), np.int32), np.zeros(len(ids), np.int64)
        for number, places in self._by_source(ids):
            first = int(self._firsts[number])
            try:
                images = self._sources[number].read(ids[places] - first)
            except BadImage as bad:
                raise BadImage(first + bad.image, bad.found) from None
            for place, data in zip(places.tolist(), images.encoded, strict=True):
                encoded[place] = data
            sizes[places], labels[places] = images.sizes, self._label_of[number][images.labels]
        return Images(encoded, sizes, labels)

    def verify(self, ids: np.ndarray, encoded: Sequence[np.ndarray]) -> None:
        for number, places in self._by_source(ids):
            own = [encoded[place] for place in places.tolist()]
            self._sources[number].verify(ids[places] - self._firsts[number], own)

    def name(self, i: int) -> str:
        number = int(np.searchsorted(self._firsts, i, "right")) - 1
        return self._sources[number].name(i - int(self._firsts[number]))

    def mean_bytes(self) -> float:
        """Of an image, as often as it comes."""
        means = [source.mean_bytes() for source in self._sources]
        return sum(share * mean for (_, share), mean in zip(self.mixture, means, strict=True)) / max(len(self), 1)

    def bounds(self) -> tuple[int, ...]:
        """None that would serve.

        Raises:
            UserError: always.
        """
        raise UserError("--order window reads one data set, a few shards at a time", "drop it to mix several")

    def _by_source(self, ids: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """The sources that these images are from, and the places of those among `ids`."""
        which = np.searchsorted(self._firsts, ids, "right") - 1
        return [(number, np.flatnonzero(which == number)) for number in np.unique(which).tolist()]
