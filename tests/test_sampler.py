"""The order of the pictures, by property: the same for any number of ranks, and a function of its arguments alone."""

from __future__ import annotations

import numpy as np
import pytest

from vimfast.data.sampler import Order, permutation


def global_sequence(world: int, batch_size: int, epoch: int = 0, **order: int | bool) -> tuple[np.ndarray, np.ndarray]:
    """Positions and ids of one epoch as all ranks together see them, in the order of the positions."""
    ranks = [Order(batch_size=batch_size, world=world, rank=rank, **order) for rank in range(world)]
    seen = [rank.step(epoch, step) for step in range(ranks[0].steps) for rank in ranks]
    positions = np.concatenate([positions for positions, _ in seen])
    ids = np.concatenate([ids for _, ids in seen])
    by_position = np.argsort(positions, kind="stable")
    return positions[by_position], ids[by_position]


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


def test_copies_of_a_picture_go_to_different_ranks() -> None:
    """As in the original's repeated augmentation: no rank's batch holds a picture twice."""
    ids = [Order(300, 8, world=3, rank=rank, repeats=3).step(0, 5)[1] for rank in range(3)]
    np.testing.assert_array_equal(ids[0], ids[1])
    np.testing.assert_array_equal(ids[0], ids[2])
    assert len(np.unique(ids[0])) == 8


def test_imagenet_epoch_has_1251_steps_on_eight_ranks() -> None:
    assert Order(1_281_167, 128, world=8).steps == 1251
    assert Order(1_281_167, 128, world=8, repeats=3).steps == 1251


@pytest.mark.parametrize("samples", [1, 2, 47, 48, 49, 97])
@pytest.mark.parametrize(("world", "batch_size"), [(1, 48), (3, 16), (8, 7), (5, 1)])
def test_evaluation_sees_every_picture_once(samples: int, world: int, batch_size: int) -> None:
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
