"""Checkpoints are written while training continues, hold the moment they were asked for, and fail with a sentence."""

from __future__ import annotations

import re
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import PACED, RECIPE, TIMEOUT, Stops, differences, start, train

from vimfast.checkpoint import Background, copied, load_checkpoint
from vimfast.errors import UserError
from vimfast.train import run_state
from vimfast.train.loop import Hook, Place


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory, tree: Path) -> tuple[str, ...]:
    recipe = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    return ("--config", str(recipe), "--data-path", str(tree), "--epochs", "1")


class At(Hook):
    """Does something before a step."""

    def __init__(self, step: int, deed: Any) -> None:
        self.step, self.deed = step, deed

    def before_step(self, place: Place) -> None:
        if place.step == self.step:
            self.deed()


def test_training_goes_on_and_the_checkpoint_holds_its_step(
    flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of step 3 that cannot be written before step 5 is that of a run that stopped at step 3."""
    flags = (*flags, "--steps-per-epoch", "6", "--save-every", "3", "--keep-checkpoints", "9")
    train(*flags, "--output_dir", str(tmp_path / "stopped"), control=Stops("epoch 0, step 3"))
    reached, save_last = threading.Event(), run_state.save_last

    def wait_and_save(*args: Any) -> None:
        assert reached.wait(TIMEOUT)
        save_last(*args)

    monkeypatch.setattr(run_state, "save_last", wait_and_save)
    train(*flags, "--output_dir", str(tmp_path / "run"), hooks=lambda run: [At(5, reached.set)])
    (tmp_path / "first").mkdir()
    (tmp_path / "run" / "checkpoint.2.pth").rename(tmp_path / "first" / "checkpoint.pth")
    assert differences(tmp_path / "stopped", tmp_path / "first") == []


def test_an_error_of_the_disk_ends_the_run(
    flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise UserError("the disk is full", "make room")

    monkeypatch.setattr(run_state, "save_last", full)
    with pytest.raises(UserError, match="the disk is full"):
        train(*flags, "--save-every", "1", "--output_dir", str(tmp_path))
    with pytest.raises(UserError, match="the disk is full"):  # the last save of a run counts too
        train(*flags, "--steps-per-epoch", "1", "--output_dir", str(tmp_path))


def test_work_is_done_in_order_and_errors_are_raised_once() -> None:
    background, done = Background(), []
    gate = threading.Event()
    background.submit(lambda: (gate.wait(TIMEOUT), done.append(1))[0] and None)
    background.check()  # nothing has failed yet
    assert not done
    gate.set()
    background.submit(lambda: done.append(2))
    background.finish()
    assert done == [1, 2]

    def fail() -> None:
        raise OSError("no")

    background.submit(fail)
    with pytest.raises(OSError, match="no"):
        background.finish()
    background.finish()
    background.submit(fail)
    background.close()  # raises nothing: another error ends the run


def test_a_copy_is_of_its_moment() -> None:
    state = {"a": [torch.ones(2), (torch.zeros(1), None)], "b": {"n": 3, "text": "x"}}
    copy = copied(state)
    state["a"][0].add_(1)  # type: ignore[index]
    assert torch.equal(copy["a"][0], torch.ones(2))
    assert copy["b"] == state["b"]
    assert isinstance(copy["a"][1], tuple)


def test_minutes_between_checkpoints(flags: tuple[str, ...], tmp_path: Path) -> None:
    """On two processes, which have to agree. Time is asked for every ten steps, and the answer is there at the next."""
    words = (*flags, "--epochs", "9", "--save-minutes", "0", "--batch-size", "1", "--eval-steps", "1")
    words += ("--keep-checkpoints", "9")
    with start(PACED, *words, "--output_dir", str(tmp_path), FORKS="2", PAUSE="0.02") as run:
        run.wait_for("step 0/1[3-9]", TIMEOUT)
        run.process.send_signal(signal.SIGKILL)
        assert not run.gone_within(30)
    place = re.search(r"stopped at epoch (\d+), step (\d+)", run.text)
    assert place, run.text
    kept = [load_checkpoint(path) for path in tmp_path.glob("checkpoint.*")]
    assert (0, 11) in [(state["epoch"], state["step"]) for state in kept]
