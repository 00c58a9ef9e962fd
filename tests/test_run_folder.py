"""A run folder belongs to one run at a time, and what is in it stays right whatever the disk does."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from runs import (
    PACED,
    RECIPE,
    TIMEOUT,
    Stops,
    assert_gone,
    call,
    differences,
    environment,
    records,
    refused,
    start,
    train,
)

from vimfast import export
from vimfast.checkpoint import find_checkpoint, load_checkpoint
from vimfast.errors import UserError
from vimfast.run_report import read_facts
from vimfast.train.folder import RunFolder
from vimfast.train.loop import EpochEnd, Hook, Place, TrainingRun
from vimfast.train.records import RecordFile


@pytest.fixture(scope="module")
def flags(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return ("--config", str(path), "--steps-per-epoch", "2", "--eval-steps", "1", "--data-path", str(tree))


@contextmanager
def room(size: int) -> Iterator[None]:
    """No file can grow beyond so many bytes, as on a disk that fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# One run at a time


def test_a_second_run_is_refused_and_changes_nothing(flags: tuple[str, ...], tmp_path: Path) -> None:
    run = tmp_path / "run"
    held = RunFolder(run, is_main=True)
    assert refused(*flags, "--output_dir", str(run)) == (
        f"another run, process {os.getpid()} of {socket.gethostname()}, writes to {run}; "
        "wait for it, or choose another --output_dir"
    )
    assert [path.name for path in run.iterdir()] == [".lock"]
    held.release()
    train(*flags, "--output_dir", str(run), "--epochs", "1")
    assert refused(*flags, "--output_dir", str(run), "--resume", "auto", "--opt", "sgd")
    train(*flags, "--output_dir", str(run), "--resume", "auto")  # neither holds it any more
    assert [r["epoch"] for r in records(run)] == [0, 1]


class Does(Hook):
    """Something before a step of epoch 1."""

    def __init__(self, deed: Callable[[], object]) -> None:
        self.deed = deed

    def before_step(self, place: Place) -> None:
        if (place.epoch, place.step) == (1, 1):
            self.deed()


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's, too
def test_a_folder_that_is_removed_under_a_run_is_made_again(
    flags: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    train(*flags, "--output_dir", str(whole))
    # At once, even if the checkpoint of the epoch before is still being written.
    train(*flags, "--output_dir", str(run), hooks=lambda _: [Does(lambda: run.rename(tmp_path / "gone"))])
    told = capsys.readouterr().err
    assert f"warning: {run} was removed or moved; made again, without what was in it" in told
    assert f"warning: TensorBoard's file in {run} cannot be written" in told
    assert differences(run, whole) == []
    assert records(run) == records(whole)[1:]


def test_a_folder_that_is_another_runs_by_now_is_left_alone(flags: tuple[str, ...], tmp_path: Path) -> None:
    """The first one is removed or moved away while its run still trains, and another run begins under its name."""
    run, moved, others = tmp_path / "run", tmp_path / "moved", []

    def begin_again() -> None:
        while not load_checkpoint(run / "checkpoint.pth")["evaluated"]:  # it is still being written
            time.sleep(0.05)
        run.rename(moved)
        others.append(RunFolder(run, is_main=True))

    with pytest.raises(UserError, match=rf"^another run, process \d+ of .*, writes to {run}; wait for it"):
        train(*flags, "--output_dir", str(run), hooks=lambda _: [Does(begin_again)])
    assert {path.name for path in run.iterdir()} <= {".lock", "train.log"}
    assert (moved / "checkpoint.pth").exists()
    others[0].release()


def test_the_folder_of_a_killed_process_is_free(tmp_path: Path) -> None:
    code = f"import time, pathlib; from vimfast.train.folder import RunFolder\n\
held = RunFolder(pathlib.Path({str(tmp_path)!r}), is_main=True); print('held', flush=True); time.sleep(600)"
    env = {**os.environ, **environment()}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"another run, process {process.pid} of"):
            RunFolder(tmp_path, is_main=True)
        RunFolder(tmp_path, is_main=False)  # another rank of a run
        process.send_signal(signal.SIGKILL)
    RunFolder(tmp_path, is_main=True).release()


def test_a_second_run_of_several_processes_leaves_the_first_alone(flags: tuple[str, ...], tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ("--output_dir", str(run), "--batch-size", "2", "--epochs", "1")
    with start(PACED, *flags, *more, processes=2, PAUSE="600") as first:
        first.wait_for(r"^rank 0 .* step 0/0", TIMEOUT)
        log = (run / "train.log").read_text()
        second = call("vimfast.train", *flags, *more, processes=2, ok=False)
        sentence = re.search("^error: another run, process .*$", second.stderr, re.MULTILINE)
        assert sentence
        assert second.stderr.rstrip("=\n").endswith(f"  traceback : {sentence[0]}")  # below torchrun's own report
        assert (run / "train.log").read_text() == log
        first.kill()
        assert_gone(first, 10)
    call("vimfast.train", *flags, *more, processes=2)
    assert [r["epoch"] for r in records(run)] == [0]
    facts = read_facts(run)  # of both processes
    assert facts is not None
    assert facts.mistakes is not None
    assert (facts.processes, facts.mistakes.images) == (2, 4)
    assert len({image.file for image in facts.mistakes.hardest}) == 4
    assert all(image.file.split("/")[1] == image.label for image in facts.mistakes.hardest)


# Settings


def test_settings_are_written_once_the_run_stands_and_earlier_ones_kept(flags: tuple[str, ...], tmp_path: Path) -> None:
    out = ("--output_dir", str(tmp_path), "--resume", "auto")
    train(*flags, *out, "--epochs", "1")
    before = (tmp_path / "config.yaml").read_text()
    refused(*flags, *out, "--input-size", "48")
    assert (tmp_path / "config.yaml").read_text() == before
    train(*flags, *out, "--epochs", "1")
    assert not (tmp_path / "config.1.yaml").exists()
    for lr in ("1e-4", "2e-4"):
        train(*flags, *out, "--epochs", "1", "--lr", lr)
    assert (tmp_path / "config.1.yaml").read_text() == before
    rates = [yaml.safe_load((tmp_path / f"config{n}.yaml").read_text())["optim"]["lr"] for n in (".1", ".2", "")]
    assert rates == [5e-4, 1e-4, 2e-4]


# Disks


@pytest.mark.parametrize("size", [0, 100])  # at the lock, at the settings
def test_a_full_disk_refuses_a_run_in_a_sentence(flags: tuple[str, ...], tmp_path: Path, size: int) -> None:
    with room(size):
        sentence = refused(*flags, "--output_dir", str(tmp_path / "run"))
    assert sentence.endswith("run cannot be written to (File too large); make room there, or choose another folder")
    assert not [path for path in (tmp_path / "run").iterdir() if path.suffix == ".tmp" or "config" in path.name]


def test_a_folder_that_takes_no_files_is_one_sentence(flags: tuple[str, ...]) -> None:
    assert "--output_dir /proc/self cannot be written to (" in refused(*flags, "--output_dir", "/proc/self")


def test_what_only_reports_does_not_end_a_run(
    flags: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.log").mkdir()
    (tmp_path / "tensorboard").touch()
    (tmp_path / "report.html").mkdir()
    train(*flags, "--output_dir", str(tmp_path))
    assert [r["epoch"] for r in records(tmp_path)] == [0, 1]
    told = capsys.readouterr().err.splitlines()
    for what in ("train.log", "TensorBoard's file", "report.html"):
        (line,) = (line for line in told if f"warning: {what} in" in line)
        assert "the run continues" in line


# Records


def test_records_wait_for_room(tmp_path: Path) -> None:
    told: list[str] = []
    file = RecordFile(tmp_path / "log.txt", told.append)
    file.append({"epoch": 0})
    with room(20):
        file.append({"epoch": 1})
        assert (tmp_path / "log.txt").read_text() == '{"epoch": 0}\n'
        file.append({"epoch": 2})
    assert "log.txt cannot be written" in told[0]
    assert "2 records wait" in told[1]
    file.append({"epoch": 3, "loss": float("nan"), "acc": 0.5})
    assert [r["epoch"] for r in records(tmp_path)] == [0, 1, 2, 3]
    assert '"loss": null, "acc": 0.5' in (tmp_path / "log.txt").read_text()
    file.close()
    assert len(told) == 2
    with room(20):
        file.append({"epoch": 4})
        file.close()
    assert "ends without 1 records" in told[3]


@pytest.mark.parametrize(
    "tail", ['{"train_loss": 1.0, "ep', '{"epoch": 5}\n{"epo', "null\n", '{"epoch": 2}', "[" * 100_000]
)
def test_a_half_written_line_is_not_glued_to_the_next(tmp_path: Path, tail: str) -> None:
    told: list[str] = []
    path = tmp_path / "log.txt"
    path.write_text('{"epoch": 0}\n{"epoch": 1}\n' + tail)
    file = RecordFile(path, told.append)
    file.begin(3)
    file.append({"epoch": 3})
    last = [2] if tail == '{"epoch": 2}' else []  # whole, but for the end of the line
    assert [r["epoch"] for r in records(tmp_path)] == [0, 1, *last, 3]
    assert bool(told) == (not last)
    if not last:
        assert (tmp_path / "log.dropped.txt").read_text().rstrip("\n") == tail.rstrip("\n")


class DiesAfterTheRecord(Hook):
    """As the hooks stand, those of the caller come before the records: this one goes to the end of them."""

    def __init__(self, run: TrainingRun) -> None:
        self.run = run

    def epoch_begin(self, place: Place) -> None:
        if self not in self.run.hooks[-2:]:
            hooks = [hook for hook in self.run.hooks if hook is not self]
            self.run.hooks = [*hooks[:-1], self, hooks[-1]]

    def epoch_end(self, place: Place, end: EpochEnd) -> None:
        if place.epoch == 1:
            raise RuntimeError("power cut")


def test_a_kill_between_record_and_save_records_no_epoch_twice(flags: tuple[str, ...], tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(*flags, "--output_dir", str(whole))
    with pytest.raises(RuntimeError, match="power cut"):
        train(*flags, "--output_dir", str(parts), hooks=lambda run: [DiesAfterTheRecord(run)])
    assert [r["epoch"] for r in records(parts)] == [0, 1]
    with open(parts / "log.txt", "a") as file:
        file.write('{"train_lr": 0.00')
    train(*flags, "--output_dir", str(parts), "--resume", "auto", control=Stops("epoch 1, step 2 "))
    assert [r["epoch"] for r in records(parts)] == [0]
    train(*flags, "--output_dir", str(parts), "--resume", "auto")
    assert (whole / "log.txt").read_text() == (parts / "log.txt").read_text()
    assert len((parts / "log.dropped.txt").read_text().splitlines()) == 2
    assert json.loads((parts / "log.dropped.txt").read_text().splitlines()[0])["epoch"] == 1


def test_a_run_folder_stands_for_its_checkpoint(flags: tuple[str, ...], tmp_path: Path) -> None:
    """The last one to resume from; the best one, if there is any, for all that only wants its weights."""
    for name in ("checkpoint.pth", "best_checkpoint.pth", "checkpoint.1.pth"):
        (tmp_path / name).touch()
    assert find_checkpoint(tmp_path, best=True) == tmp_path / "best_checkpoint.pth"
    assert find_checkpoint(tmp_path, best=False) == tmp_path / "checkpoint.pth"
    (tmp_path / "best_checkpoint.pth").unlink()
    assert find_checkpoint(tmp_path, best=True) == tmp_path / "checkpoint.pth"
    (tmp_path / "checkpoint.pth").unlink()
    assert find_checkpoint(tmp_path, best=False) == tmp_path / "checkpoint.1.pth"
    (tmp_path / "model.safetensors").touch()
    assert find_checkpoint(tmp_path, best=True) == tmp_path  # in the hub's layout
    assert "is a folder without a checkpoint; give a run folder" in refused(*flags, "--resume", "/dev")


def test_a_run_folder_is_resumed_evaluated_and_finetuned(flags: tuple[str, ...], tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    train(*flags, "--output_dir", run, control=Stops("epoch 1, step 1"))
    train(*flags, "--output_dir", str(tmp_path / "again"), "--resume", run)
    assert [record["epoch"] for record in records(tmp_path / "again")] == [1]
    train(*flags, "--eval", "--resume", run)
    train(*flags, "--finetune", run, "--epochs", "1")


def test_a_damaged_checkpoint_of_a_run_folder_is_passed_over(
    flags: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best one for the last, and the last one for the one before; the home folder has its short name."""
    monkeypatch.setenv("HOME", str(tmp_path))
    run = tmp_path / "run"
    train(*flags, "--output_dir", str(run))
    for name in ("best_checkpoint.pth", "checkpoint.pth"):
        content = bytearray((run / name).read_bytes())
        content[len(content) // 2] ^= 4
        (run / name).write_bytes(content)
    note = "warning: {} is no checkpoint, or a damaged one (its checksum does not match); taking {} instead"
    last = note.format(run / "checkpoint.pth", run / "checkpoint.1.pth")
    best = note.format(run / "best_checkpoint.pth", run / "checkpoint.1.pth")
    train(*flags, "--resume", str(run))
    assert last in capsys.readouterr().err.splitlines()
    train(*flags, "--eval", "--resume", str(run))
    assert {last, best} <= set(capsys.readouterr().err.splitlines())
    train(*flags, "--finetune", str(run), "--epochs", "1")
    assert {last, best} <= set(capsys.readouterr().err.splitlines())
    monkeypatch.setattr(sys, "argv", ["vimfast export", "~/run", "--out=~/exported"])
    export.main()
    assert {last, best} <= set(capsys.readouterr().err.splitlines())
    assert (tmp_path / "exported" / "model.safetensors").exists()
