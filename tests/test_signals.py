"""Two gloo processes under torchrun, stopped, killed and frozen: they end in time and say why in one sentence.

Each step pauses for a while (``paced_train``), so a busy machine makes a test slower and changes nothing else. Starting
interpreters is what takes the time, so torchrun's workers are forks (``forking_torchrun``) and only the kinds that show
most are run. With ALL_SIGNALS=N in the environment every kind runs N times, on torchrun's own workers.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml
from conftest import write_image
from runs import FORKING, PACED, STOPPED, TIMEOUT, TINY, TORCHRUN, assert_gone, assert_holds, start
from watch import Watched

TRIES = int(os.environ.get("ALL_SIGNALS", "0"))
LAUNCHER = TORCHRUN if TRIES else FORKING
Hit = Callable[[Watched, dict[int, int]], None]  # with the process ids of the ranks


@pytest.fixture(autouse=True, params=range(max(TRIES, 1)), ids="try{}".format)
def _repeated() -> None:
    """Each test runs this many times."""


def kinds(every: Sequence, most_telling: Sequence) -> Sequence:
    return every if TRIES else most_telling


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory, tree: Path) -> tuple[str, ...]:
    recipe = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(TINY))
    return ("--config", str(recipe), "--data-path", str(tree), "--output_dir")


def train(*flags: str, restarts: int = 0, **environment: str) -> Watched:
    """Start a run on two processes."""
    launcher = (*LAUNCHER, f"--max-restarts={restarts}")
    return start(PACED, *flags, processes=2, launcher=launcher, **environment)


def in_step(run: Watched, step: str = r"[1-9]\d*", attempt: int = 0) -> dict[int, int]:
    """Process ids by rank, once each has reached such a step: any but the first, for there is nothing to save in it."""
    pattern = rf"^rank {{}} pid (\d+) attempt {attempt} step \d+/{step}$"
    return {rank: int(run.wait_for(pattern.format(rank), TIMEOUT)[1]) for rank in (0, 1)}


def starting(words: str, run: Watched) -> list[str]:
    """Lines of the output."""
    return [line for line in run.text.splitlines() if line.startswith(words)]


def only_error(run: Watched) -> str:
    """The one line that reports an error."""
    found = starting("error:", run)
    assert len(found) == 1, run.text
    return found[0]


def before_torchrun_reports(run: Watched) -> str:
    return run.text.split("torch/distributed/elastic")[0].split("ChildFailedError")[0]


def assert_reports_death(sentence: str, rank: int, pid: int) -> None:
    assert sentence.startswith(f"error: rank {rank} (pid {pid} on ")
    assert "exited unexpectedly" in sentence


def to_torchrun(*numbers: signal.Signals) -> Hit:
    def hit(run: Watched, ranks: dict[int, int]) -> None:
        for number in numbers:
            run.process.send_signal(number)
            time.sleep(0.05)

    return hit


def to_ranks(number: signal.Signals, *which: int) -> Hit:
    def hit(run: Watched, ranks: dict[int, int]) -> None:
        for rank in which:
            os.kill(ranks[rank], number)

    return hit


def to_all(*numbers: signal.Signals) -> Hit:
    def hit(run: Watched, ranks: dict[int, int]) -> None:
        for number in numbers:
            to_ranks(number, 0, 1)(run, ranks)
            to_torchrun(number)(run, ranks)

    return hit


SAVED: dict[str, tuple[Hit, str]] = {
    "TERM to torchrun": (to_torchrun(signal.SIGTERM), "SIGTERM received"),
    "TERM to all at once": (to_all(signal.SIGTERM), "SIGTERM received"),
    "TERM to torchrun twice": (to_torchrun(signal.SIGTERM, signal.SIGTERM), "SIGTERM received"),
    "TERM to all twice": (to_all(signal.SIGTERM, signal.SIGTERM), "SIGTERM received"),
    "INT to all at once": (to_all(signal.SIGINT), "SIGINT received"),
    "HUP to torchrun": (to_torchrun(signal.SIGHUP), "SIGHUP received"),
    "USR1 to torchrun, which it kills": (to_torchrun(signal.SIGUSR1), "torchrun is gone"),
    "USR1 to one rank": (to_ranks(signal.SIGUSR1, 1), "SIGUSR1 received by rank 1"),
    "HUP to the ranks": (to_ranks(signal.SIGHUP, 0, 1), "SIGHUP received"),
    "KILL to torchrun": (to_torchrun(signal.SIGKILL), "torchrun is gone"),
}


# HUP to the ranks is part of the test of restarts.
@pytest.mark.parametrize("name", kinds(list(SAVED), ["TERM to all twice", "USR1 to torchrun, which it kills"]))
def test_the_place_is_saved(name: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    hit, answer = SAVED[name]
    with train(*flags, str(tmp_path)) as run:
        hit(run, in_step(run))
        assert_gone(run, 10 if "torchrun is gone" in answer else 30)
        place = re.search(STOPPED, run.text)
        assert place, run.text
        assert len(starting(answer, run)) == 1, run.text
        assert not starting("error:", run), run.text
    assert_holds(tmp_path, place)


STATUS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 75, "SIGUSR1": 75}


@pytest.mark.parametrize(("number", "status"), kinds(list(STATUS.items()), [("SIGINT", 130)]))
def test_the_exit_status_of_one_process(number: str, status: int, flags: tuple[str, ...], tmp_path: Path) -> None:
    with start(PACED, *flags, str(tmp_path), PAUSE="0.3") as run:
        run.wait_for("step 0/1$", TIMEOUT)
        run.process.send_signal(getattr(signal, number))
        assert run.wait(60) == status, run.text
        assert "stopped at epoch 0" in run.text
    assert (tmp_path / "checkpoint.pth").exists()


def test_a_second_interrupt_ends_at_once(flags: tuple[str, ...], tmp_path: Path) -> None:
    with train(*flags, str(tmp_path), PAUSE="60") as run:
        in_step(run, "0")
        run.process.send_signal(signal.SIGINT)
        run.wait_for("SIGINT received.*: finishing the step", TIMEOUT)
        time.sleep(1.5)
        run.process.send_signal(signal.SIGINT)
        assert_gone(run, 10)
        assert len(starting("interrupted again", run)) == 1, run.text


@pytest.mark.parametrize("victim", kinds([0, 1], [0]))  # the test of restarts kills rank 1
def test_a_killed_rank_is_named(victim: int, flags: tuple[str, ...], tmp_path: Path) -> None:
    with train(*flags, str(tmp_path)) as run:
        ranks = in_step(run)
        os.kill(ranks[victim], signal.SIGKILL)
        assert_gone(run, 10)
        sentence = only_error(run)
        assert_reports_death(sentence, victim, ranks[victim])
        assert "Traceback" not in before_torchrun_reports(run)


@pytest.mark.parametrize("victim", kinds([0, 1], [1]))
def test_a_frozen_rank_is_named(victim: int, flags: tuple[str, ...], tmp_path: Path) -> None:
    with train(*flags, str(tmp_path), "--stall-timeout", "6") as run:
        # Until rank 0 has heard of its first step, a rank is starting and may take longer: a beat a second tells it.
        ranks = in_step(run, r"[3-9]\d*")
        os.kill(ranks[victim], signal.SIGSTOP)
        assert_gone(run, 30)
        sentence = only_error(run)
        assert f"rank {victim} (pid {ranks[victim]} on " in sentence, run.text
        assert "--stall-timeout" in sentence
        assert "state T (stopped)" in sentence, sentence
    assert (tmp_path / f"stall-rank{1 - victim}.txt").read_text().count("in _train_batch") == 1


def test_a_stuck_rank_is_named_with_its_stack(flags: tuple[str, ...], tmp_path: Path) -> None:
    with train(*flags, str(tmp_path), "--stall-timeout", "6", FAULT="1:1:stuck") as run:
        in_step(run)
        assert_gone(run, 40)
        sentence = only_error(run)
        assert re.search(
            r"error: no progress for \d+ s .*: rank 1 .*is stuck at epoch 0, step 1 of .*paced_train.py", sentence
        ), run.text
    assert "in do" in (tmp_path / "stall-rank1.txt").read_text()


def test_torchrun_restarts_and_the_run_resumes(flags: tuple[str, ...], tmp_path: Path) -> None:
    """After HUP to the ranks, and after the death of one; the last attempt trains to the end."""
    extra = ("--resume", "auto", "--save-every", "1", "--steps-per-epoch", "8", "--epochs", "1")
    with train(*flags, str(tmp_path), *extra, restarts=2) as run:
        to_ranks(signal.SIGHUP, 0, 1)(run, in_step(run))
        place = run.wait_for(STOPPED, TIMEOUT)
        run.wait_for(rf"^resuming at epoch {place[1]}, step {place[2]} of 8", TIMEOUT)
        assert len(starting("SIGHUP received", run)) == 1
        ranks = in_step(run, attempt=1)
        os.kill(ranks[1], signal.SIGKILL)
        assert_within(10, lambda: not run.processes().keys() & set(ranks.values()))
        assert run.wait(TIMEOUT) == 0, run.text
        assert_gone(run, 5)
        sentence = only_error(run)
        assert_reports_death(sentence, 1, ranks[1])
        assert len(starting("resuming at epoch 0, step ", run)) == 2
        assert "Traceback" not in run.text


def assert_within(seconds: float, happens: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("fault", "sentence"),
    kinds(
        faults := [
            ("1:1:crash", "error: rank 1: ValueError: a bug of ours"),
            ("1:1:user", "error: rank 1: the image is upside down; turn it"),
            ("all:1:user", "error: the image is upside down; turn it"),
            ("1:1:memory", "error: rank 1: cpu has too little memory for 2 images a step; try --batch-size 1 --global"),
        ],
        faults[:1],
    ),
)
def test_a_failure_is_reported_once(fault: str, sentence: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    with train(*flags, str(tmp_path), PAUSE="0.1", FAULT=fault) as run:
        run.wait_for("error: .*", TIMEOUT)
        assert_gone(run, 5 + 5)
        reported = only_error(run)
        assert reported.startswith(sentence), run.text
        assert run.process.returncode != 0
        trace, bug, _ = run.text.partition("ValueError: a bug of ours\n")
        assert bool(bug) == ("crash" in fault)
        assert not bug or reported not in trace  # the sentence comes last
        assert "exitcode  : 2" in run.text or "exitcode  : 1" in run.text
        assert f"\n  traceback : {reported}\n{'=' * 60}\n" in run.err  # torchrun's table ends in it


def test_a_damaged_image_that_only_one_rank_reads(flags: tuple[str, ...], tmp_path: Path) -> None:
    for split in ("train", "val"):
        for i in range(8):
            write_image(tmp_path / "tree" / split / f"n{i % 2}" / f"{split}{i}.JPEG", i)
    bad = tmp_path / "tree" / "train" / "n1" / "train3.JPEG"
    bad.write_bytes(bad.read_bytes()[:200])
    extra = ("--data-path", str(tmp_path / "tree"), "--no-repeated-aug")
    with train(*flags, str(tmp_path / "run"), *extra, PAUSE="0.1") as run:
        run.wait_for("error: .*", TIMEOUT)
        assert_gone(run, 10)
        sentence = only_error(run)
        assert "train3.JPEG" in sentence, run.text
        assert "Traceback" not in before_torchrun_reports(run)
