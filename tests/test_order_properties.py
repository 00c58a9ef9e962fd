"""What holds for every order: each position once over the ranks, and the same images whoever decodes them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import accumulate

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vimfast.data.order import Detour, Order

TURNS = st.tuples(st.integers(0, 2), st.integers(0, 8))  # epoch and step


@st.composite
def orders(draw: st.DrawFn, *, drop_last: bool | None = None) -> Order:
    """Rank 0 of some world, with hosts of one or more ranks, with copies or without, shuffled in any way or not, in
    another order from some steps on."""
    dropping = draw(st.booleans()) if drop_last is None else drop_last
    node, hosts = draw(st.integers(1, 4)) if dropping else 1, draw(st.integers(1, 3))
    shards = draw(st.lists(st.integers(0, 60) | st.integers(30, 60), min_size=2, max_size=8))
    return Order(
        samples=sum(shards),
        batch_size=draw(st.integers(1, 9)),
        world=node * hosts,
        seed=draw(st.integers(0, 2**40)),
        repeats=draw(st.integers(1, 4)) if dropping else 1,
        shuffle=draw(st.booleans()),
        drop_last=dropping,
        limit=draw(st.none() | st.integers(1, 5)),
        neighbours=draw(st.booleans()) if node == 1 else False,
        node=node,
        bounds=(0, *accumulate(shards)) if draw(st.booleans()) else None,
        window=draw(st.integers(1, 4)),
        computed=draw(st.booleans()),
        detours=tuple(Detour(*turn, number) for number, turn in enumerate(draw(st.lists(TURNS, max_size=2)), 1)),
    )


def ranks(order: Order) -> list[Order]:
    return [replace(order, rank=rank) for rank in range(order.world)]


def together(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Positions in ascending order, and the ids there."""
    positions, ids = (np.concatenate([np.empty(0, np.int64), *part]) for part in zip(*parts, strict=True))
    ascending = np.argsort(positions, kind="stable")
    return positions[ascending], ids[ascending]


@given(orders(), st.integers(0, 5))
def test_each_position_comes_once(order: Order, epoch: int) -> None:
    for step in range(order.steps):
        parts = [rank.step(epoch, step) for rank in ranks(order)]
        positions, ids = together(parts)
        first, last = step * order.global_batch, min((step + 1) * order.global_batch, order.samples)
        np.testing.assert_array_equal(positions, np.arange(first, last))
        assert ((ids >= 0) & (ids < order.samples)).all()
        lengths = [len(part) for part, _ in parts]
        assert max(lengths) == order.batch_size or not order.drop_last
        assert not order.drop_last or set(lengths) == {order.batch_size}


@given(orders(), st.integers(0, 5))
def test_copies_are_neighbours_and_no_image_comes_again(order: Order, epoch: int) -> None:
    parts = [rank.step(epoch, step) for step in range(order.steps) for rank in ranks(order)]
    if parts:
        positions, ids = together(parts)
        shown = ids[:: order.repeats]
        np.testing.assert_array_equal(ids, shown[positions // order.repeats])
        assert len(np.unique(shown)) == len(shown)


@given(orders(drop_last=True), st.integers(0, 5))
def test_a_host_decodes_what_its_ranks_are_to_see(order: Order, epoch: int) -> None:
    for step in range(order.steps):
        everyone = ranks(order)
        for first in range(0, order.world, order.node):
            host = everyone[first : first + order.node]
            stretches = [rank.decoded(epoch, step) for rank in host]
            assert [len(positions) for positions, _ in stretches] == [order.batch_size] * order.node
            seen = together([rank.step(epoch, step) for rank in host])
            for part, whole in zip(map(np.concatenate, zip(*stretches, strict=True)), seen, strict=True):
                np.testing.assert_array_equal(part, whole)  # in ascending order, one stretch after the other
            if order.node > 1:  # the place of a position says whose it is
                for local, rank in enumerate(host):
                    np.testing.assert_array_equal(seen[0][local :: order.node], rank.step(epoch, step)[0])


@given(orders(), st.integers(1, 12), st.integers(0, 3))
def test_a_global_batch_is_the_same_on_any_number_of_ranks(order: Order, world: int, epoch: int) -> None:
    batch = order.batch_size * order.world
    if batch % world:
        batch = order.batch_size * world
        order = replace(order, batch_size=batch, world=1, node=1)
    shared = replace(order, batch_size=batch // world, world=world, node=1)
    assert shared.steps == order.steps
    for step in range(order.steps):
        one, other = (together([rank.step(epoch, step) for rank in ranks(o)]) for o in (order, shared))
        for mine, theirs in zip(one, other, strict=True):
            np.testing.assert_array_equal(mine, theirs)


@given(orders(), st.integers(0, 5))
def test_a_step_needs_none_before_it(order: Order, epoch: int) -> None:
    """What a resumed run relies on; another epoch in between leaves nothing behind."""
    for step in reversed(range(order.steps)):
        once = order.step(epoch, step)
        order.step(epoch + 1, 0)
        order.step(epoch + 2, 0)
        for one, again in zip(once, replace(order).step(epoch, step), strict=True):
            np.testing.assert_array_equal(one, again)


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 60)), min_size=1, max_size=4), st.integers(0, 2**40))
def test_sets_are_mixed_in_passes_that_continue_from_epoch_to_epoch(sets: list[tuple[int, int]], seed: int) -> None:
    """An epoch has each set's share to the image, and no image comes again before all of its set have come."""
    samples = sum(share for _, share in sets)
    if samples == 0:
        return
    order = Order(samples, 1, seed=seed, drop_last=False, mixture=tuple(sets))
    firsts = np.cumsum([0, *(images for images, _ in sets)])
    shown = Counter()  # by image
    for epoch in range(3):
        ids = order._ids(epoch, np.arange(samples))
        which = np.searchsorted(firsts, ids, "right") - 1
        assert np.bincount(which, minlength=len(sets)).tolist() == [share for _, share in sets]
        shown.update(ids.tolist())
        for first, (images, _) in zip(firsts[:-1].tolist(), sets, strict=True):
            counts = [shown[i] for i in range(first, first + images)]
            assert max(counts) - min(counts) <= 1
