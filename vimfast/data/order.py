"""Which image comes when: a pure function of (seed, epoch, step, world size, rank, repeats).

One global sequence of positions 0, 1, 2, ... runs through an epoch. Step s of a world of W ranks with B samples each
takes the positions [s * W * B, (s + 1) * W * B), and rank r of them every W-th, starting at r (or, with `neighbours`,
the r-th stretch of B). So a run gives the same global batches on any number of ranks as long as W * B stays the same,
and any step is found without those before.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vimfast.data.computed import permuted, permuted_in_windows

# Above so many images an order is computed by position rather than drawn: drawing 14 million takes a second an epoch,
# and keeping two of them 114 MB, in each rank. Not below, where runs resume in the orders that they began with.
MOST_DRAWN = 1 << 22


@functools.lru_cache(maxsize=2)  # reading ahead crosses from one epoch to the next
def permutation(seed: int, epoch: int, samples: int) -> np.ndarray:
    """The order of the training images in one epoch: all of them, each once; int32 or int64 [samples], read-only.

    Equal to ``np.random.default_rng((seed, epoch)).permutation(samples)``, in half the memory where int32 will do.
    """
    dtype = np.int32 if samples <= np.iinfo(np.int32).max else np.int64
    ids = np.random.default_rng((seed, epoch)).permutation(np.arange(samples, dtype=dtype))
    ids.flags.writeable = False
    return ids


@functools.lru_cache(maxsize=2)
def windowed_permutation(seed: int, epoch: int, bounds: tuple[int, ...], window: int) -> np.ndarray:
    """An order that needs `window` shards at a time: shards shuffled, then all images of each `window` of them.

    Every image once; int32 or int64 [samples], read-only. How near it comes to :func:`permutation` is a matter of the
    window: ``tools/order_quality.py`` measures it.

    Args:
        bounds: the first image of each shard, and the number of all images.
    """
    dtype = np.int32 if bounds[-1] <= np.iinfo(np.int32).max else np.int64
    generator = np.random.default_rng((seed, epoch))
    shards = len(bounds) - 1
    parts = []
    for members in np.array_split(generator.permutation(shards), -(-shards // window)):
        ids = [np.arange(bounds[shard], bounds[shard + 1], dtype=dtype) for shard in members.tolist()]
        parts.append(generator.permutation(np.concatenate(ids)))
    ordered = np.concatenate(parts)
    ordered.flags.writeable = False
    return ordered


class Detour(NamedTuple):
    """What is left of an epoch at a step comes in another order."""

    epoch: int
    step: int
    number: int  # of the order; from 1 on


@functools.lru_cache(maxsize=2)
def shuffled(
    seed: int, samples: int, bounds: tuple[int, ...] | None, window: int, epoch: int, turns: tuple[tuple[int, int], ...]
) -> np.ndarray:
    """:func:`permutation` (with bounds, :func:`windowed_permutation`), its tail shuffled again at each turn.

    Args:
        turns: (where the tail begins, a number that makes the shuffle another one), in the order of their making.
    """
    ids = permutation(seed, epoch, samples) if bounds is None else windowed_permutation(seed, epoch, bounds, window)
    if not turns:
        return ids
    ids = np.array(ids)
    for first, number in turns:
        ids[first:] = np.random.default_rng((seed, epoch, number)).permutation(ids[first:])
    ids.flags.writeable = False
    return ids


@dataclass(frozen=True)
class Order:
    """The order in which one rank sees `samples` images.

    Args:
        samples: images in the split.
        batch_size: per rank.
        seed: of the shuffle; not negative.
        repeats: how many adjacent positions show the same image (repeated augmentation: 3). An epoch keeps its
            usual length, so it then shows one in `repeats` of the images.
        shuffle: draw a new permutation each epoch; else image i is at position i.
        drop_last: leave out the images that do not fill a global batch (training); else the last batches are
            short or empty (evaluation: every image exactly once over all ranks).
        limit: end an epoch after this many steps.
        neighbours: a rank takes neighbouring positions of a step rather than every `world`-th. The images of all
            ranks together stay the same; the copies of an image then come to one rank.
        node: ranks of this rank's host, of `world` ranks in all; they have consecutive numbers and decode for each
            other (:meth:`decoded`).
        bounds, window: shuffle as :func:`windowed_permutation` does; without bounds, all images at once.
        computed: compute permutations by position, in no memory (`computed.py`); None: of more than ``MOST_DRAWN``.
        mixture: of several data sets whose images are numbered one set after the other, for each how many images it
            has and how many positions of an epoch are its own. Each set is shown in passes, every image once in a
            pass, which continue from epoch to epoch; its positions are spread at random.
        detours: epochs that continue in another order from a step on. Every image still comes once. (With `bounds`,
            the rest of such an epoch comes from all its shards.)
    """

    samples: int
    batch_size: int
    world: int = 1
    rank: int = 0
    seed: int = 0
    repeats: int = 1
    shuffle: bool = True
    drop_last: bool = True
    limit: int | None = None
    neighbours: bool = False
    node: int = 1
    bounds: tuple[int, ...] | None = None
    window: int = 64
    detours: tuple[Detour, ...] = ()
    computed: bool | None = None
    mixture: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if min(self.samples, self.seed) < 0 or min(self.batch_size, self.world, self.repeats) < 1:
            raise ValueError(f"sizes and repeats must be positive and the seed not negative: {self}")
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank {self.rank} is not one of {self.world}")
        if self.world % self.node or (self.node > 1 and (self.neighbours or not self.drop_last)):
            raise ValueError(f"{self.node} ranks of {self.world} cannot decode for each other: {self}")
        if self.bounds is not None and (self.bounds[-1] != self.samples or self.window < 1):
            raise ValueError(f"{self.samples} images, shards up to {self.bounds[-1]}, a window of {self.window}")
        if self.mixture and (sum(share for _, share in self.mixture) != self.samples or self.bounds is not None):
            raise ValueError(f"{self.samples} images, all at once, of data sets with {self.mixture}")

    @property
    def global_batch(self) -> int:
        """Samples in one step of all ranks."""
        return self.world * self.batch_size

    @property
    def steps(self) -> int:
        """Steps in an epoch, the same on every rank."""
        whole, rest = divmod(self.samples, self.global_batch)
        steps = whole + (rest > 0 and not self.drop_last)
        return steps if self.limit is None else min(steps, self.limit)

    @property
    def by_shard(self) -> bool:
        """Whether few shards are read at a time, rather than all of them at once."""
        return self.bounds is not None or not self.shuffle

    @property
    def endless(self) -> bool:
        """Whether another epoch follows each, as in training."""
        return self.shuffle

    @property
    def length(self) -> int:
        """How many images all ranks see in an epoch, without repeats."""
        return min(-(-self.steps * self.global_batch // self.repeats), self.samples)

    def drawn(self, epoch: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """The images that all ranks see from one to another place of an epoch without repeats: those places, and the
        images; int64 [n]."""
        places = np.arange(begin, min(end, self.length))
        return places, self._images(epoch, places.copy())

    def drawn_before(self, step: int) -> int:
        """How many images are seen before a step, in any epoch; one that is seen in it too does not count."""
        return step * self.global_batch // self.repeats

    def step(self, epoch: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """What this rank sees at one step.

        Returns:
            positions: int64 [b], the places in the epoch's global sequence (what random draws are keyed by).
            ids: int64 [b], the images there. b is `batch_size`, or less at the end when nothing is dropped.

        Raises:
            IndexError: the epoch has no such step.
        """
        self._check_step(step)
        first = step * self.global_batch
        last = min(first + self.global_batch, self.samples)
        if self.neighbours:
            first = min(first + self.rank * self.batch_size, last)
            positions = np.arange(first, min(first + self.batch_size, last), dtype=np.int64)
        else:
            positions = np.arange(first + self.rank, last, self.world, dtype=np.int64)
        return positions, self._ids(epoch, positions)

    def decoded(self, epoch: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """What this rank decodes at one step, for itself and the others of its host.

        The host's positions of the step, in ascending order, are cut into as many equal stretches as it has ranks, so
        that the copies of an image come to one of them. Place i of all of them is wanted by the host's rank i % node
        (:meth:`step`); this rank's stretch begins at i = (rank % node) * batch_size.

        Returns:
            positions, ids: as :meth:`step` returns them, int64 [batch_size].

        Raises:
            IndexError: the epoch has no such step.
        """
        if self.node == 1:
            return self.step(epoch, step)
        self._check_step(step)
        local = self.rank % self.node
        turn, place = np.divmod(np.arange(local * self.batch_size, (local + 1) * self.batch_size), self.node)
        positions = step * self.global_batch + turn * self.world + (self.rank - local) + place
        return positions, self._ids(epoch, positions)

    def _check_step(self, step: int) -> None:
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of an epoch of {self.steps} steps")

    def _ids(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        return self._images(epoch, positions // self.repeats)

    def _images(self, epoch: int, drawn: np.ndarray) -> np.ndarray:
        """The images at these places of an epoch without repeats."""
        if not self.shuffle:
            return drawn
        turns = self._turns(epoch)
        computed = self.samples > MOST_DRAWN if self.computed is None else self.computed
        if not (computed or self.mixture):
            ids: np.ndarray = shuffled(self.seed, self.samples, self.bounds, self.window, epoch, turns)[drawn]
            return ids.astype(np.int64)
        for first, number in reversed(turns):
            tail = drawn >= first
            drawn[tail] = first + permuted(drawn[tail] - first, self.samples - first, self.seed, epoch, number)
        if self.mixture:
            return self._mixed(epoch, drawn)
        if self.bounds is not None:
            return permuted_in_windows(drawn, self.bounds, self.window, self.seed, epoch)
        return permuted(drawn, self.samples, self.seed, epoch)

    def _turns(self, epoch: int) -> tuple[tuple[int, int], ...]:
        return tuple(
            # An image of which copies have been shown already keeps its place.
            (-(-detour.step * self.global_batch // self.repeats), detour.number)
            for detour in self.detours
            if detour.epoch == epoch
        )

    def _mixed(self, epoch: int, drawn: np.ndarray) -> np.ndarray:
        """The images at these places of an epoch of several data sets."""
        spread = permuted(drawn, self.samples, self.seed, epoch)
        ids = np.empty_like(spread)
        first = begin = 0  # of the images and of the places of a set
        for number, (images, share) in enumerate(self.mixture):
            own = np.flatnonzero((spread >= begin) & (spread < begin + share))
            passes, places = np.divmod(epoch * share + spread[own] - begin, max(images, 1))
            for turn in np.unique(passes).tolist():
                now = passes == turn
                ids[own[now]] = first + permuted(places[now], images, self.seed, turn, number, 1)
            first, begin = first + images, begin + share
        return ids
