"""The order of the images, by property: the same for any number of ranks, and a function of its arguments alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from vimfast.data import order as order_module
from vimfast.data.computed import permuted, permuted_in_windows
from vimfast.data.order import Order, permutation, windowed_permutation

BOUNDS = (0, 100, 130, 130, 260, 400, 401, 500)  # seven shards, one of them empty


def global_sequence(world: int, batch_size: int, epoch: int = 0, **order: Any) -> tuple[np.ndarray, np.ndarray]:
    """Positions and ids of one epoch as all ranks together see them, in the order of the positions."""
    ranks = [Order(batch_size=batch_size, world=world, rank=rank, **order) for rank in range(world)]
    seen = [rank.step(epoch, step) for step in range(ranks[0].steps) for rank in ranks]
    positions = np.concatenate([positions for positions, _ in seen])
    ids = np.concatenate([ids for _, ids in seen])
    by_position = np.argsort(positions, kind="stable")
    return positions[by_position], ids[by_position]


def shards_of(ids: np.ndarray, window: int) -> np.ndarray:
    """Of all images in an order, which is checked to need no more than `window` shards at a time."""
    np.testing.assert_array_equal(np.sort(ids), np.arange(500))
    shards = np.searchsorted(BOUNDS[1:], ids, side="right")
    first = {shard: np.flatnonzero(shards == shard)[0] for shard in np.unique(shards).tolist()}
    last = {shard: np.flatnonzero(shards == shard)[-1] for shard in first}
    for place in range(0, 500, 7):
        assert sum(first[shard] <= place <= last[shard] for shard in first) <= window
    return shards


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("repeats", [1, 3])
def test_global_sequence_is_the_same_on_any_number_of_ranks(world: int, repeats: int) -> None:
    alone = global_sequence(1, 48, epoch=2, samples=1000, seed=5, repeats=repeats)
    shared = global_sequence(world, 48 // world, epoch=2, samples=1000, seed=5, repeats=repeats)
    for one, other in zip(alone, shared, strict=True):
        np.testing.assert_array_equal(one, other)


def test_each_global_batch_is_the_same_on_any_number_of_ranks() -> None:
    alone = Order(500, 24, seed=1)
    ranks = [Order(500, 8, world=3, rank=rank, seed=1) for rank in range(3)]
    for step in range(alone.steps):
        shared = np.concatenate([rank.step(4, step)[1] for rank in ranks])
        np.testing.assert_array_equal(np.sort(shared), np.sort(alone.step(4, step)[1]))


def test_every_epoch_is_another_permutation() -> None:
    epochs = [global_sequence(2, 25, epoch=epoch, samples=100, seed=3)[1] for epoch in range(4)]
    for ids in epochs:
        np.testing.assert_array_equal(np.sort(ids), np.arange(100))
    assert len({ids.tobytes() for ids in epochs}) == 4
    assert not np.array_equal(global_sequence(2, 25, samples=100, seed=4)[1], epochs[0])


def test_permutation_is_numpys_for_seed_and_epoch() -> None:
    expected = np.random.default_rng((7, 11)).permutation(100_003)
    np.testing.assert_array_equal(permutation(7, 11, 100_003), expected)


def test_repeats_stand_side_by_side() -> None:
    positions, ids = global_sequence(4, 30, samples=1000, repeats=3)
    np.testing.assert_array_equal(positions, np.arange(960))  # the usual length
    np.testing.assert_array_equal(ids.reshape(-1, 3), np.repeat(ids[::3, None], 3, axis=1))
    assert len(np.unique(ids)) == 320


def test_copies_of_an_image_go_to_different_ranks() -> None:
    """As in the original's repeated augmentation: no rank's batch holds an image twice."""
    ids = [Order(300, 8, world=3, rank=rank, repeats=3).step(0, 5)[1] for rank in range(3)]
    np.testing.assert_array_equal(ids[0], ids[1])
    np.testing.assert_array_equal(ids[0], ids[2])
    assert len(np.unique(ids[0])) == 8


def test_imagenet_epoch_has_1251_steps_on_eight_ranks() -> None:
    assert Order(1_281_167, 128, world=8).steps == 1251
    assert Order(1_281_167, 128, world=8, repeats=3).steps == 1251


@pytest.mark.parametrize("samples", [1, 2, 47, 48, 49, 97])
@pytest.mark.parametrize(("world", "batch_size"), [(1, 48), (3, 16), (8, 7), (5, 1)])
def test_evaluation_sees_every_image_once(samples: int, world: int, batch_size: int) -> None:
    positions, ids = global_sequence(world, batch_size, samples=samples, shuffle=False, drop_last=False)
    np.testing.assert_array_equal(positions, np.arange(samples))
    np.testing.assert_array_equal(ids, np.arange(samples))


def test_a_step_does_not_depend_on_those_before() -> None:
    order = Order(samples=1000, batch_size=16, world=2, rank=1, seed=9, repeats=3)
    in_turn = {(epoch, step): order.step(epoch, step) for epoch in range(3) for step in range(order.steps)}
    permutation.cache_clear()
    for place in [(2, 7), (0, 0), (2, 6), (1, 30)]:
        for fresh, before in zip(order.step(*place), in_turn[place], strict=True):
            np.testing.assert_array_equal(fresh, before)


def test_limit_shortens_an_epoch_and_changes_nothing_else() -> None:
    whole, short = Order(100, 8), Order(100, 8, limit=5)
    assert (whole.steps, short.steps, Order(100, 8, limit=50).steps) == (12, 5, 12)
    np.testing.assert_array_equal(short.step(1, 4)[1], whole.step(1, 4)[1])


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(IndexError, match="step 12 of an epoch of 12 steps"):
        Order(100, 8).step(0, 12)
    with pytest.raises(ValueError, match="rank 2"):
        Order(100, 8, world=2, rank=2)
    with pytest.raises(ValueError, match="positive"):
        Order(100, 0)


@pytest.mark.parametrize(("world", "batch_size"), [(1, 12), (2, 6), (3, 4), (4, 3), (6, 2)])
def test_neighbours_share_out_the_same_global_batches(world: int, batch_size: int) -> None:
    ranks = [
        Order(500, batch_size, world=world, rank=rank, seed=1, repeats=3, neighbours=True) for rank in range(world)
    ]
    alone = Order(500, 12, seed=1, repeats=3)
    for step in (0, 7, alone.steps - 1):
        parts = [rank.step(2, step) for rank in ranks]
        for shared, whole in zip(map(np.concatenate, zip(*parts, strict=True)), alone.step(2, step), strict=True):
            np.testing.assert_array_equal(shared, whole)


def test_neighbours_keep_copies_on_one_rank() -> None:
    ranks = [Order(500, 6, world=4, rank=rank, repeats=3, neighbours=True) for rank in range(4)]
    for rank in ranks:
        np.testing.assert_array_equal(np.unique(rank.step(1, 3)[1], return_counts=True)[1], [3, 3])


@pytest.mark.parametrize("window", [1, 2, 3, 7, 100])
def test_window_reads_a_few_shards_at_a_time(window: int) -> None:
    shards = shards_of(windowed_permutation(5, 1, BOUNDS, window), window)
    if window > 1:  # mixed within a window, not shard after shard
        assert (np.diff(shards) != 0).sum() > len(np.unique(shards))


def test_window_is_a_function_of_seed_and_epoch() -> None:
    orders = [windowed_permutation(seed, epoch, BOUNDS, 2).tobytes() for seed in range(2) for epoch in range(3)]
    windowed_permutation.cache_clear()
    assert orders == [windowed_permutation(seed, epoch, BOUNDS, 2).tobytes() for seed in range(2) for epoch in range(3)]
    assert len(set(orders)) == 6


@pytest.mark.parametrize("world", [1, 2, 4])
def test_window_is_the_same_on_any_number_of_ranks(world: int) -> None:
    _, ids = global_sequence(world, 20 // world, epoch=3, samples=500, seed=2, bounds=BOUNDS, window=3)
    np.testing.assert_array_equal(ids, windowed_permutation(2, 3, BOUNDS, 3))


def test_bounds_that_are_of_other_data_are_refused() -> None:
    with pytest.raises(ValueError, match="400 images, shards up to 500"):
        Order(400, 8, bounds=BOUNDS)


def test_a_permutation_computed_by_place_is_like_one_drawn() -> None:
    """Each is one; fixed points and neighbours that stay neighbours are as many as in drawn ones, one on average each;
    and all places are as likely. Of 2 or 4 rounds rather than 8, this fails."""
    samples, fixed, successors = 1009, [], []
    landed = np.zeros((8, 8))
    for seed in range(300):
        ids = permuted(np.arange(samples), samples, seed, 0)
        assert np.array_equal(np.sort(ids), np.arange(samples))
        fixed.append(int((ids == np.arange(samples)).sum()))
        successors.append(int((np.diff(ids) == 1).sum()))
        np.add.at(landed, (np.arange(samples) * 8 // samples, ids * 8 // samples), 1)
    for counts in (fixed, successors):
        assert np.mean(counts) == pytest.approx(1, abs=0.25)  # of a Poisson distribution; 4 standard errors
        assert np.var(counts) == pytest.approx(1, abs=0.4)
    expected = landed.sum() / 64
    assert 20 < ((landed - expected) ** 2 / expected).sum() < 90  # chi-squared of 49 degrees of freedom


def test_large_sets_have_their_orders_computed_and_others_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the size of the data is made: this one has more images than memory has bytes."""
    order = Order(10**13, 64, seed=3)
    positions, ids = order.step(7, 10**9)
    assert len(np.unique(ids)) == 64
    assert ids.min() >= 0
    assert ids.max() < 10**13
    assert np.array_equal(ids, permuted(positions, 10**13, 3, 7))
    drawn = Order(500, 8, seed=1)
    assert np.array_equal(drawn.step(2, 3)[1], permutation(1, 2, 500)[24:32])
    monkeypatch.setattr(order_module, "MOST_DRAWN", 499)
    assert np.array_equal(drawn.step(2, 3)[1], permuted(np.arange(24, 32), 500, 1, 2))
    assert np.array_equal(replace(drawn, computed=False).step(2, 3)[1], permutation(1, 2, 500)[24:32])


def test_computed_orders_stay_what_they_are() -> None:
    """Checkpoints rely on it: a run resumed with a later version continues in the same order."""
    assert permuted(np.arange(6), 10**7, 0, 0).tolist() == [2811296, 2062027, 7809443, 2265820, 1860741, 1120968]
    assert permuted_in_windows(np.arange(6), BOUNDS, 2, 5, 1).tolist() == [328, 304, 359, 386, 320, 329]
    mixed = Order(50, 6, seed=3, mixture=((20, 10), (7, 40)))
    assert mixed.step(4, 2)[1].tolist() == [20, 26, 24, 22, 13, 21]


@pytest.mark.parametrize("window", [1, 2, 3, 7, 100])
def test_a_computed_window_reads_a_few_shards_at_a_time(window: int) -> None:
    shards_of(permuted_in_windows(np.arange(500), BOUNDS, window, 5, 1), window)
