"""``vimfast train`` on two processes: forks, signals that arrive as they were sent, and one exit status."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml
from forked import WatchedFork, run_text
from runs import (
    PACED,
    STOPPED,
    TIMEOUT,
    TINY,
    assert_gone,
    assert_holds,
    call,
    differences,
    environment,
    start,
    wait_until_read,
)
from watch import Watched


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory, tree: Path) -> tuple[str, ...]:
    recipe = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(TINY))
    short = ("--epochs", "1", "--steps-per-epoch", "8")
    return ("--config", str(recipe), *short, "--data-path", str(tree), "--output_dir")


def train(*flags: str, **env: str) -> Watched:
    return start(PACED, *flags, FORKS="2", **env)


def in_step(run: Watched, attempt: int = 0) -> dict[int, int]:
    """Process ids by rank, once each has done a step."""
    pattern = rf"^rank {{}} pid (\d+) attempt {attempt} step 0/[1-9]"
    return {rank: int(run.wait_for(pattern.format(rank), TIMEOUT)[1]) for rank in (0, 1)}


def assert_saved(run: Watched, folder: Path) -> None:
    place = re.search(STOPPED, run.text)
    assert place, run.text
    assert_holds(folder, place)
    assert "error:" not in run.text


def test_it_is_the_run_that_torchrun_starts(flags: tuple[str, ...], tmp_path: Path) -> None:
    call("vimfast", "train", "--processes", "2", *flags, str(tmp_path / "forks"))
    call("vimfast.train", *flags, str(tmp_path / "torchrun"), processes=2)
    assert differences(tmp_path / "forks", tmp_path / "torchrun") == []


@pytest.mark.parametrize(("number", "status"), [("SIGTERM", 143), ("SIGUSR1", 75)])
def test_a_signal_saves_the_place_and_becomes_the_status(
    number: str, status: int, flags: tuple[str, ...], tmp_path: Path
) -> None:
    with train(*flags, str(tmp_path), RESTARTS="1") as run:
        in_step(run)
        run.process.send_signal(getattr(signal, number))
        assert run.wait(60) == status, run.text  # and no restart
        assert f"{number} received" in run.text
        assert_gone(run, 5)
        assert_saved(run, tmp_path)


def test_only_a_second_interrupt_ends_at_once(flags: tuple[str, ...], tmp_path: Path) -> None:
    with train(*flags, str(tmp_path / "one"), PAUSE="4") as run:
        in_step(run)
        run.process.send_signal(signal.SIGINT)
        run.wait_for("SIGINT received.*finishing the step", TIMEOUT)
        time.sleep(1.5)
        run.process.send_signal(signal.SIGTERM)  # under torchrun this cannot be told from an interrupt
        assert run.wait(60) == 130, run.text
        assert_saved(run, tmp_path / "one")
    with train(*flags, str(tmp_path / "two"), PAUSE="60") as run:
        run.wait_for("^rank 1 ", TIMEOUT)
        run.process.send_signal(signal.SIGINT)
        run.wait_for("SIGINT received.*finishing the step.*; Ctrl-C again ends it at once$", TIMEOUT)
        time.sleep(1.5)
        run.process.send_signal(signal.SIGINT)
        assert run.wait(30) == 130, run.text
        assert "interrupted again" in run.text


def test_no_process_outlives_a_killed_launcher(flags: tuple[str, ...], tmp_path: Path) -> None:
    with train(*flags, str(tmp_path)) as run:
        in_step(run)
        run.process.kill()
        assert_gone(run, 10)
        assert "vimfast train is gone" in run.text
        assert_saved(run, tmp_path)


def test_a_suspended_launcher_comes_back_to_its_run(flags: tuple[str, ...], tmp_path: Path) -> None:
    """Ctrl-Z and, seconds later, fg: the ranks train meanwhile, and the next signal does what it always does."""
    with train(*flags, str(tmp_path), "--epochs", "99", PAUSE="0.3") as run:
        in_step(run)
        run.process.send_signal(signal.SIGTSTP)
        run.wait_for("suspended: this command alone, its processes keep training", TIMEOUT)
        time.sleep(1.5)
        assert "\nState:\tT " in Path(f"/proc/{run.process.pid}/status").read_text()
        run.wait_for("^rank 0 .* step 1/", TIMEOUT)
        run.process.send_signal(signal.SIGCONT)
        run.wait_for("^rank 0 .* step 2/", TIMEOUT)
        run.process.send_signal(signal.SIGTERM)
        assert run.wait(60) == 143, run.text
        assert_saved(run, tmp_path)


def test_a_killed_rank_is_named_and_the_run_starts_again(flags: tuple[str, ...], tmp_path: Path) -> None:
    extra, killed = ("--resume", "auto", "--save-every", "1"), tmp_path / "killed"
    with train(*flags, str(tmp_path / "run"), *extra, RESTARTS="1", PAUSE="0.1", HOLD=f"0/4 {killed}") as run:
        ranks = in_step(run)
        os.kill(ranks[1], signal.SIGKILL)
        killed.touch()
        assert run.wait(TIMEOUT) == 0, run.text
        assert f"error: rank 1 (pid {ranks[1]} on " in run.text
        assert "exit status 3; starting again (1 of 1)" in run.err
        assert "resuming at epoch 0" in run.text
        assert_gone(run, 5)


def test_killed_ranks_are_named_where_none_is_left_to_do_it(flags: tuple[str, ...], tmp_path: Path) -> None:
    with train(*flags, str(tmp_path), PAUSE="30") as run:
        ranks = {rank: int(run.wait_for(rf"^rank {rank} pid (\d+)", TIMEOUT)[1]) for rank in (0, 1)}
        for pid in ranks.values():
            os.kill(pid, signal.SIGSTOP)  # so that neither can say anything
        for pid in ranks.values():
            os.kill(pid, signal.SIGKILL)
        assert run.wait(TIMEOUT) == 3, run.text
        assert re.search(r"^error: rank \d \(pid \d+\) was killed by SIGKILL$", run.err, re.MULTILINE), run.text


FROZEN = """
import os, signal
from vimfast.processes import launch
launch.IMPATIENCE = 0.5
def rank():
    os.write(1, f"rank {os.environ['RANK']}\\n".encode())
    os.kill(os.getpid(), signal.SIGSTOP)
os._exit(launch.launch(rank, 2))
"""


def test_a_second_interrupt_ends_frozen_ranks() -> None:
    with WatchedFork(run_text, FROZEN, env={}) as run:
        for rank in (0, 1):
            run.wait_for(f"^rank {rank}$", TIMEOUT)
        run.process.send_signal(signal.SIGINT)
        time.sleep(1.5)
        run.process.send_signal(signal.SIGINT)
        assert run.wait(TIMEOUT) == 130, run.text
        assert run.err == "interrupted again: the processes do not answer and are killed\n"
        assert_gone(run, 5)


KILLER = """
import os, signal, time
from vimfast.processes import launch
reading, writing = os.pipe()
def rank():
    if os.environ["RANK"] == "1":
        os.write(writing, str(os.getpid()).encode())
        time.sleep(3600)
    os.kill(int(os.read(reading, 10)), signal.SIGKILL)
    time.sleep(1)  # until the launcher has seen it
    os._exit(4)
os._exit(launch.launch(rank, 2))
"""


def test_a_stall_is_the_status_though_the_frozen_rank_is_killed_first() -> None:
    with WatchedFork(run_text, KILLER, env={}) as run:
        assert run.wait(TIMEOUT) == 4
        assert run.err == ""  # the rank that kills another has said why


STUBBORN = """
import os, signal, time
from vimfast.processes import launch
launch.PATIENCE = 0.5
def rank():
    if os.environ["RANK"] == "0":
        os._exit(3)
    time.sleep(3600)  # and hears no signal, as they are blocked
print("status", launch.launch(rank, 2, restarts=1), flush=True)
os.kill(os.getpid(), signal.SIGTERM)  # it is no longer blocked, nor is a late alarm waiting
"""


def test_a_rank_that_outlives_another_is_killed() -> None:
    with WatchedFork(run_text, STUBBORN, env={}) as run:
        assert run.wait(TIMEOUT) == -signal.SIGTERM
        assert run.out == "status 3\n"
        assert run.err == "exit status 3; starting again (1 of 1)\n"


@pytest.mark.parametrize(("number", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 75), ("SIGHUP", 75)])
def test_a_signal_before_there_are_ranks(number: str, status: int) -> None:
    code = "from vimfast.processes.launch import end_at_signals as f; f(); print('ready', flush=True); "
    code += "import time\nwhile True:\n    try: time.sleep(9)\n    except BaseException: pass"
    with Watched([sys.executable, "-c", code], env=environment()) as run:
        run.wait_for("ready", TIMEOUT)
        run.process.send_signal(getattr(signal, number))
        assert run.wait(TIMEOUT) == status
        assert run.err == f"{number} received: stopped before the first step; there is nothing to save\n"


@pytest.mark.parametrize(("number", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 75), ("SIGHUP", 75)])
def test_a_signal_while_the_settings_are_read(number: str, status: int, tmp_path: Path) -> None:
    """They are a named pipe, so the command waits for them."""
    settings = tmp_path / "settings.yaml"
    os.mkfifo(settings)
    with start("vimfast", "train", "--config", str(settings), fresh=True) as run:
        wait_until_read(settings, run)
        run.process.send_signal(getattr(signal, number))
        assert run.wait(TIMEOUT) == status
        assert run.err == f"{number} received: stopped before the first step; there is nothing to save\n"


def test_a_failure_is_one_sentence_and_bad_input_is_not_tried_again(flags: tuple[str, ...], tmp_path: Path) -> None:
    with train(*flags, str(tmp_path), RESTARTS="3", PAUSE="0.1", FAULT="1:1:user") as run:
        assert run.wait(TIMEOUT) == 2, run.text
        assert run.err == "error: rank 1: the image is upside down; turn it\n"
        assert_gone(run, 5)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--processes 0 --data-path x", "--processes is '0'; it must be an integer >= 1, or gpus"),
        ("--max-restarts x", "--max-restarts is 'x'; it must be an integer >= 0"),
        ("--processes 2", "--data-path is missing"),
        ("--data-path x --output_dir y --max-restarts 2", "would not continue the run; add --resume auto"),
        ("--lrr 1", "unknown flag --lrr; did you mean '--lr'?"),
        ("--proceses 2", "unknown flag --proceses; did you mean '--processes'?"),
    ],
)
def test_wrong_flags_are_refused_before_anything_starts(words: str, sentence: str) -> None:
    done = call("vimfast", "train", *words.split(), ok=False, importtime=True)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert len(lines) == 1
    assert sentence in lines[0]
    assert re.search(r"\| +vimfast\.config$", done.stderr, re.MULTILINE)
    assert not re.search(r"\| +torch$", done.stderr, re.MULTILINE)


def test_it_refuses_to_start_under_torchrun(flags: tuple[str, ...], tmp_path: Path) -> None:
    with start("vimfast", "train", "--processes", "2", *flags, str(tmp_path), RANK="0") as run:
        assert run.wait(TIMEOUT) == 2
        assert "torchrun has started this one already; drop one of them" in run.err
