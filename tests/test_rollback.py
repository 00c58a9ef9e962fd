"""A run that diverges returns to its last good checkpoint, and goes another way from there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import PACED, RECIPE, TIMEOUT, Stops, differences, records, refused, start, train

from vimfast.data.order import Detour, Order
from vimfast.errors import UserError
from vimfast.train.health import LossHealth
from vimfast.train.loop import Diverged, Hook, Place, TrainingRun


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory, tree: Path) -> tuple[str, ...]:
    recipe = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    words = ("--config", str(recipe), "--data-path", str(tree), "--log-every", "1", "--no-repeated-aug")
    return (*words, "--on-divergence", "rollback", "--skip-limit", "2", "--save-every", "3", "--steps-per-epoch", "8")


class Poison(Hook):
    """The loss is NaN from a step on, as often as it is said."""

    def __init__(self, run: TrainingRun, at: tuple[int, int], times: int) -> None:
        self.run, self.at, self.times = run, at, times
        self.sound = run.train_step.criterion
        self.seen: list[tuple[int, int, list[int]]] = []

    def before_step(self, place: Place) -> None:
        if (place.epoch, place.step) >= self.at and self.times > 0:
            self.run.train_step.criterion = lambda *inputs: float("nan") * self.sound(*inputs)

    def returned(self, place: Place) -> None:
        self.times -= 1
        self.run.train_step.criterion = self.sound


@settings(max_examples=60, deadline=None)
@given(
    samples=st.integers(8, 120),
    batch=st.integers(1, 4),
    world=st.integers(1, 2),
    repeats=st.sampled_from([1, 3]),
    bounds=st.booleans(),
    steps=st.lists(st.integers(0, 20), min_size=1, max_size=3),
)
def test_a_detour_moves_only_what_is_left_and_loses_nothing(
    samples: int, batch: int, world: int, repeats: int, bounds: bool, steps: list[int]
) -> None:
    shards = (0, samples // 2, samples) if bounds else None

    def ids(*detours: Detour) -> np.ndarray:
        """Of all positions of an epoch, those that are dropped included."""
        order = Order(samples, batch, world, repeats=repeats, bounds=shards, window=1, detours=detours)
        return order._ids(1, np.arange(samples * repeats))

    detours = [Detour(1, step, number) for number, step in enumerate(steps, 1)]
    before, after = ids(), ids(*detours)
    first = min(steps) * world * batch
    assert np.array_equal(before[:first], after[:first])
    assert np.array_equal(np.sort(before), np.sort(after))
    assert np.array_equal(before, ids(Detour(0, 0, 1)))  # of another epoch
    if samples * repeats - first > 30:
        assert not np.array_equal(before, after)


def test_a_run_goes_around_what_it_failed_at(flags: tuple[str, ...], tmp_path: Path, capfd: Any) -> None:
    """NaN from step 4 of epoch 1: found two steps later, back to step 3, half the rate, other images."""
    shown: list[tuple[int, int, np.ndarray]] = []

    class Watch(Poison):
        def before_step(self, place: Place) -> None:
            super().before_step(place)
            order = self.run.loader.view.order
            shown.append((place.epoch, place.step, order.step(place.epoch, place.step)[1]))

    def hooks(run: TrainingRun) -> list[Hook]:
        return [Watch(run, (1, 4), 1)]

    run = train(*flags, "--output_dir", str(tmp_path), hooks=hooks)
    said = capfd.readouterr()
    assert "rolled back from epoch 1, step 6 of 8 to epoch 1, step 3 of 8 (checkpoint.pth)" in said.err
    assert "at 0.5 x the learning rate (rollback 1 of 3)" in said.err
    rates = [float(rate) for rate in re.findall(r"epoch 1 \[4/8\].* lr (\S+)", said.out)]
    assert len(rates) == 2
    assert rates[1] == pytest.approx(rates[0] / 2, rel=0.01)
    assert [record["epoch"] for record in records(tmp_path)] == [0, 1]
    assert all(torch.isfinite(p).all() for p in run.model.parameters())
    assert run.turns == ((1, 3),)
    first = {step: ids for epoch, step, ids in shown[: 8 + 6] if epoch == 1}
    then = {step: ids for epoch, step, ids in shown[8 + 6 :] if epoch == 1}
    assert sorted(then) == [3, 4, 5, 6, 7]
    assert not np.array_equal(first[3], then[3])
    seen = np.concatenate([first[0], first[1], first[2], *then.values()])
    assert len(np.unique(seen)) == len(seen)  # no image twice in the epoch as it was trained


def test_an_epoch_that_is_begun_again_knows_nothing_of_the_one_given_up(
    flags: tuple[str, ...], tmp_path: Path, capfd: Any
) -> None:
    """A loss of a million at step 4 of epoch 1, with checkpoints at epoch ends alone."""

    class Blown(Poison):
        def before_step(self, place: Place) -> None:
            if (place.epoch, place.step) >= self.at and self.times > 0:
                self.run.train_step.criterion = lambda *inputs: 1e6 + 0 * self.sound(*inputs)

    def hooks(run: TrainingRun) -> list[Hook]:
        return [Blown(run, (1, 4), 1)]

    train(*flags, "--save-every", "99", "--output_dir", str(tmp_path), hooks=hooks)
    assert capfd.readouterr().err.count("rolled back") == 1
    assert [record["train_loss"] < 9 for record in records(tmp_path)] == [True, True]


def test_it_resumes_to_the_same_bits(flags: tuple[str, ...], tmp_path: Path) -> None:
    def hooks(run: TrainingRun) -> list[Hook]:
        return [Poison(run, (0, 4), 1)]

    train(*flags, "--output_dir", str(tmp_path / "whole"), hooks=hooks)
    part = (*flags, "--output_dir", str(tmp_path / "part"))
    train(*part, hooks=hooks, control=Stops("epoch 1, step 2"))
    train(*part, "--resume", "auto")
    assert differences(tmp_path / "whole", tmp_path / "part") == []
    assert records(tmp_path / "whole") == records(tmp_path / "part")


def test_a_rate_that_diverges_is_halved_until_it_does_not(flags: tuple[str, ...], tmp_path: Path) -> None:
    """Warming up to a rate that no model survives, with checkpoints of ruined weights on the way."""
    rate = ("--opt", "sgd", "--unscale-lr", "--lr", "1", "--warmup-epochs", "1", "--warmup-lr", "1e-3")
    still = ("--drop-path", "0", "--mixup", "0", "--cutmix", "0", "--aa", "none", "--epochs", "3", "--log-every", "2")
    keep = ("--save-every", "1", "--keep-checkpoints", "9", "--max-rollbacks", "12", "--output_dir", str(tmp_path))
    run = train(*flags, *rate, *still, *keep)
    assert run.turns
    assert max(group["lr_scale"] for group in run.optimizer.param_groups) == 0.5 ** len(run.turns)
    losses = [record["train_loss"] for record in records(tmp_path)]
    assert len(losses) == 3
    assert max(losses) < 3


def test_it_gives_up_after_so_many(flags: tuple[str, ...], tmp_path: Path) -> None:
    def hooks(run: TrainingRun) -> list[Hook]:
        return [Poison(run, (0, 3), 9)]

    with pytest.raises(UserError, match=r"2 steps in a row are non-finite, .* after 2 rollbacks \(--max-rollbacks\)"):
        train(*flags, "--max-rollbacks", "2", "--output_dir", str(tmp_path), hooks=hooks)


def test_there_has_to_be_a_checkpoint(flags: tuple[str, ...], tmp_path: Path) -> None:
    assert "there is no --output_dir; add one" in refused(*flags)

    def hooks(run: TrainingRun) -> list[Hook]:
        return [Poison(run, (0, 0), 9)]

    with pytest.raises(UserError, match="before there was a checkpoint to return to"):
        train(*flags, "--output_dir", str(tmp_path), hooks=hooks)


def test_two_processes_return_together(flags: tuple[str, ...], tmp_path: Path) -> None:
    words = (*flags, "--batch-size", "2", "--output_dir", str(tmp_path))
    with start(PACED, *words, FORKS="2", PAUSE="0", FAULT="all:4:nan") as run:
        assert run.wait(TIMEOUT) == 0, run.text
    assert run.text.count("rolled back from") == 1
    assert [json.loads(line)["epoch"] for line in (tmp_path / "log.txt").read_text().splitlines()] == [0, 1]


def test_a_loss_that_blows_up_or_collapses_is_noticed() -> None:
    said: list[str] = []

    class Report:
        def warn(self, text: str) -> None:
            said.append(text)

    class Run:
        report = Report()
        train_step = SimpleNamespace(clip_grad=1.0)

    def fed(losses: list[float], raises: bool) -> None:
        health = LossHealth(Run(), raises=raises)  # type: ignore[arg-type]
        for step, loss in enumerate(losses):
            health.check(loss, Place(100, 0, step), 0.0)

    fed([6.9, 6.7, 6.95, 6.0, 5.9, 6.3, 4.0, 4.4, float("nan"), 3.9, 4.9], raises=True)  # noise, and skipped steps
    for losses in ([6.9, 6.5, 14.0], [6.9, 4.0, 6.5], [2.0, 1.9, 4.2]):
        with pytest.raises(Diverged, match=rf"risen to {losses[2]:.4g} from {losses[1]:.4g}.*try a lower --lr$"):
            fed(losses, raises=True)  # clipping is not advised to who has it
    fed([6.9, 4.0, 6.5, 6.6], raises=False)
    assert len(said) == 1
    assert "--on-divergence rollback" in said[0]
