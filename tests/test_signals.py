"""Two gloo processes under torchrun, told to stop, killed and frozen: they end, in time, and say why in one sentence.

Steps last a second by sleeping (``slow_train``), so that a busy machine makes a test slower and not different.
Starting processes is what takes the time: with ``ALL_SIGNALS=1`` every kind is tried, else those that tell most.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import write_picture
from torchrun import Run

from vimfast.checkpoint import load_checkpoint

RECIPE = {
    "model": {
        "model": "vim_tiny_patch16_224",
        "input_size": 40,
        "model_kwargs": {"patch_size": 8, "stride": 8, "depth": 1, "embed_dim": 32},
    },
    "data": {"batch_size": 2, "num_workers": 1},
    "augment": {"aa": "none", "reprob": 0.0},
    "schedule": {"epochs": 100, "warmup_epochs": 0},
    "run": {"device": "cpu", "log_every": 50},
}

ALL = os.environ.get("ALL_SIGNALS") == "1"
Hit = Callable[[Run, dict[int, int]], None]


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory, tree: Path) -> tuple[str, ...]:
    recipe = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    return ("--config", str(recipe), "--data-path", str(tree), "--output_dir")


def to_torchrun(*numbers: signal.Signals, pause: float = 0.05) -> Hit:
    def hit(run: Run, ranks: dict[int, int]) -> None:
        for number in numbers:
            os.kill(run.process.pid, number)
            time.sleep(pause)

    return hit


def to_ranks(number: signal.Signals, *which: int) -> Hit:
    def hit(run: Run, ranks: dict[int, int]) -> None:
        for rank in which:
            os.kill(ranks[rank], number)

    return hit


def to_all(number: signal.Signals) -> Hit:
    def hit(run: Run, ranks: dict[int, int]) -> None:
        to_ranks(number, 0, 1)(run, ranks)
        to_torchrun(number)(run, ranks)

    return hit


SAVED: dict[str, tuple[Hit, str]] = {
    "TERM to torchrun": (to_torchrun(signal.SIGTERM), "SIGTERM received"),
    "TERM to all at once": (to_all(signal.SIGTERM), "SIGTERM received"),
    "TERM twice": (to_torchrun(signal.SIGTERM, signal.SIGTERM), "SIGTERM received"),
    "INT to all at once": (to_all(signal.SIGINT), "SIGINT received"),
    "HUP to torchrun": (to_torchrun(signal.SIGHUP), "SIGHUP received"),
    "USR1 to torchrun, which it kills": (to_torchrun(signal.SIGUSR1), "torchrun is gone"),
    "USR1 to one rank": (to_ranks(signal.SIGUSR1, 1), "SIGUSR1 received by rank 1"),
    "HUP to the ranks": (to_ranks(signal.SIGHUP, 0, 1), "SIGHUP received"),
    "KILL to torchrun": (to_torchrun(signal.SIGKILL), "torchrun is gone"),
}


OFTEN = ["TERM to all at once", "TERM twice", "USR1 to torchrun, which it kills", "HUP to the ranks"]


@pytest.mark.parametrize("name", SAVED if ALL else OFTEN)
def test_the_place_is_saved(name: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    hit, answer = SAVED[name]
    with Run(*flags, str(tmp_path)) as run:
        hit(run, run.ranks())
        run.gone_within(30 if "torchrun is gone" not in answer else 10)
        place = re.search(r"stopped at epoch (\d+), step (\d+) of \d+; \S+ holds it, resume with", run.text)
        assert place, run.text
        assert len(run.lines(f"{answer}")) == 1, run.text
        assert not run.lines("error:"), run.text
    state = load_checkpoint(tmp_path / "checkpoint.pth")
    assert (state["epoch"], state["step"]) == tuple(map(int, place.groups()))


STATUS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 75, "SIGUSR1": 75}


@pytest.mark.parametrize(("number", "status"), list(STATUS.items()) if ALL else [("SIGINT", 130)])
def test_one_process_tells_by_its_status(number: str, status: int, flags: tuple[str, ...], tmp_path: Path) -> None:
    with Run(*flags, str(tmp_path), processes=0, STEP_SECONDS="0.3") as run:
        run.wait_for("step 0/1")
        run.process.send_signal(getattr(signal, number))
        assert run.process.wait(60) == status, run.text
        assert "stopped at epoch 0" in run.text
    assert (tmp_path / "checkpoint.pth").exists()


def test_a_second_interrupt_ends_at_once(flags: tuple[str, ...], tmp_path: Path) -> None:
    with Run(*flags, str(tmp_path), STEP_SECONDS="60") as run:
        run.ranks(step=0)
        to_torchrun(signal.SIGINT)(run, {})
        run.wait_for("SIGINT received.*: finishing the step")
        time.sleep(1.5)
        to_torchrun(signal.SIGINT)(run, {})
        run.gone_within(10)
        assert len(run.lines("interrupted again")) == 1, run.text


@pytest.mark.parametrize("victim", [0, 1] if ALL else [0])  # the test of restarts kills rank 1
def test_a_killed_rank_is_named(victim: int, flags: tuple[str, ...], tmp_path: Path) -> None:
    with Run(*flags, str(tmp_path)) as run:
        ranks = run.ranks()
        os.kill(ranks[victim], signal.SIGKILL)
        run.gone_within(10)
        (sentence,) = run.lines("error:")
        assert sentence.startswith(f"error: rank {victim} (pid {ranks[victim]} on "), run.text
        assert "exited unexpectedly" in sentence
        assert not re.search(r"^Traceback.*gloo", run.text, re.DOTALL), run.text


@pytest.mark.parametrize("victim", [0, 1] if ALL else [1])
def test_a_frozen_rank_is_named(victim: int, flags: tuple[str, ...], tmp_path: Path) -> None:
    with Run(*flags, str(tmp_path), "--stall-timeout", "6") as run:
        ranks = run.ranks()
        os.kill(ranks[victim], signal.SIGSTOP)
        run.gone_within(30)
        (sentence,) = run.lines("error:")
        assert f"rank {victim} (pid {ranks[victim]} on " in sentence, run.text
        assert "--stall-timeout" in sentence
        assert "state T (stopped)" in sentence, sentence
    assert (tmp_path / f"stall-rank{1 - victim}.txt").read_text().count("slow_train_batch") == 1


def test_a_rank_that_stands_still_is_named_with_its_stack(flags: tuple[str, ...], tmp_path: Path) -> None:
    with Run(*flags, str(tmp_path), "--stall-timeout", "6", FAULT="1:1:stuck") as run:
        run.ranks()
        run.gone_within(40)
        (sentence,) = run.lines("error:")
        assert re.search(
            r"error: no progress for \d+ s .*: rank 1 .*is stuck at epoch 0, step 1 of .*slow_train.py", sentence
        ), run.text
    assert "in do" in (tmp_path / "stall-rank1.txt").read_text()


def test_torchrun_restarts_and_the_run_goes_on(flags: tuple[str, ...], tmp_path: Path) -> None:
    extra = ("--resume", "auto", "--save-every", "1", "--steps-per-epoch", "3", "--epochs", "1")
    launcher = ("--max-restarts=1",)
    with Run(*flags, str(tmp_path), *extra, launcher=launcher, STEP_SECONDS="0.2", FAULT="1:2:once") as run:
        assert run.process.wait(180) == 0, run.text
        assert run.gone_within(5) < 5
        assert "resuming at epoch 0, step 2 of 3" in run.text
        assert len(run.lines("error: rank 1 ")) == 1


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("1:1:crash", "error: rank 1: ValueError: a bug of ours"),
        ("1:1:user", "error: rank 1: the picture is upside down; turn it"),
        ("all:1:user", "error: the picture is upside down; turn it"),
        ("1:1:memory", "error: rank 1: cpu has too little memory for 2 pictures a step; try --batch-size 1,"),
    ][: None if ALL else 1],
)
def test_a_failure_is_told_once(fault: str, sentence: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    with Run(*flags, str(tmp_path), STEP_SECONDS="0.1", FAULT=fault) as run:
        told = run.wait_for("error: .*")
        run.gone_within(5 + 5)
        assert told[0].startswith(sentence), run.text
        assert len(run.lines("error:")) == 1, run.text
        assert run.process.returncode != 0
        assert ("ValueError: a bug of ours\n" in run.text) == ("crash" in fault)
        assert "exitcode  : 2" in run.text or "exitcode  : 1" in run.text


def test_a_picture_that_only_one_rank_reads(flags: tuple[str, ...], tmp_path: Path) -> None:
    for split in ("train", "val"):
        for i in range(8):
            write_picture(tmp_path / "tree" / split / f"n{i % 2}" / f"{split}{i}.JPEG", i)
    bad = tmp_path / "tree" / "train" / "n1" / "train3.JPEG"
    bad.write_bytes(bad.read_bytes()[:200])
    extra = ("--data-path", str(tmp_path / "tree"), "--no-repeated-aug")
    with Run(*flags, str(tmp_path / "run"), *extra, STEP_SECONDS="0.1") as run:
        run.wait_for("error: .*")
        run.gone_within(10)
        (sentence,) = run.lines("error:")
        assert "train3.JPEG" in sentence, run.text
        assert "Traceback" not in run.text.split("torch/distributed/elastic")[0].split("ChildFailedError")[0]
