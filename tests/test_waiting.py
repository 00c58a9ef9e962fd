"""What a run says on a terminal: of the time that it waits for data, of the time it will end, and how it looks."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from runs import TINY, train

from vimfast.cli import report_once
from vimfast.config import DataConfig, load_config
from vimfast.data.hardware import available_cores
from vimfast.data.loader import Loader
from vimfast.data.source import FolderSource, Images
from vimfast.dist import World
from vimfast.errors import duration
from vimfast.processes.control import Control
from vimfast.train.build import build
from vimfast.train.loop import Place, TrainingRun
from vimfast.train.pace import Stretch
from vimfast.train.report import Reporter
from vimfast.train.waiting import SETTLED_AFTER, DataWaits, decoding_advice, reading_advice

HIDE, SHOW, ERASE = "\x1b[?25l", "\x1b[?25h", "\x1b[2K"  # what a terminal does with its cursor and a line
SLOW = "of its time for data: reading is slow"


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory, tree: Path) -> tuple[str, ...]:
    recipe = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(TINY))
    return ("--config", str(recipe), "--data-path", str(tree), "--log-every", "2", "--eval-steps", "1")


def test_a_run_says_when_it_ends_and_that_reading_is_slow_once(
    flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fast = FolderSource.read

    def read(source: FolderSource, ids: np.ndarray) -> Images:
        time.sleep(0.2)  # a slow disk: a step takes a tenth of it
        return fast(source, ids)

    monkeypatch.setattr(FolderSource, "read", read)
    monkeypatch.setattr("vimfast.train.waiting.SETTLED_AFTER", 4)
    monkeypatch.setattr("vimfast.train.hooks.FORECAST_AFTER", 6)
    monkeypatch.setattr("vimfast.train.hooks.FORECAST_FROM", 0.0)
    train(*flags, "--epochs", "2", "--steps-per-epoch", "8")
    said = capsys.readouterr().out
    assert len(re.findall(rf"^training waits \d+% {SLOW}; vimfast prepare makes shards of the folder", said, re.M)) == 1
    assert said.index("epoch 0 [4/8]") < said.index(SLOW) < said.index("epoch 1 [2/8]")
    found = re.findall(r"^at this pace the last step ends on (\w+ \d\d \w+ at \d\d:\d\d); evaluations take", said, re.M)
    today = [time.strftime("%A %d %B at %H:%M", time.localtime(time.time() - 60 * back)) for back in range(-1, 5)]
    assert len(found) == 1
    assert found[0] in today


def test_an_end_that_is_near_is_not_foretold(
    flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was a time of day, on a day of the week, with a second left."""
    monkeypatch.setattr("vimfast.train.hooks.FORECAST_AFTER", 4)
    train(*flags, "--epochs", "1", "--steps-per-epoch", "8")
    said = capsys.readouterr().out
    assert len(re.findall(r" \d:\d\d:\d\d left$", said, re.M)) == 4
    assert "the last step ends" not in said


def test_one_slow_report_changes_no_decoder(flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint or the beginning of an epoch makes one; a decoder that is too slow makes two in a row."""
    shares = ((0.2, 0.0), (0.2, 0.0), (0.0, 0.0, 0.2, 0.2), (0.2, 0.2, 0.2))
    assert [place for _, place in decoders(flags, monkeypatch, shares)] == [(3, 2)]


@pytest.mark.parametrize(("then", "again"), [(0.1, []), (0.3, [("cpu", (0, 4))])], ids=["better", "worse"])
def test_a_decoder_for_which_training_waits_longer_is_given_up(
    flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, then: float, again: list[tuple[str, tuple[int, int]]]
) -> None:
    """Tiny images: 11 % for the CPU's decoder, and up to 19 % for the GPU's, for the rest of the run."""
    shares = ((0.2, 0.2, then, then), (then, then, then))
    assert decoders(flags, monkeypatch, shares) == [("cuda", (0, 2)), *again]


def test_a_trial_ends_with_its_stage(
    tree: Path, flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loader of the next stage has chosen a decoder for its own images, and its waiting says nothing of another."""
    recipe = tmp_path / "recipe.yaml"
    stages = {"epochs": 2, "stages": [{"epochs": 1, "input_size": 48}, {"epochs": 1}]}
    recipe.write_text(yaml.safe_dump({**TINY, "schedule": {**TINY["schedule"], **stages}}))
    flags = ("--config", str(recipe), *flags[2:])
    assert decoders(flags, monkeypatch, ((0.2, 0.2), (0.3, 0.3, 0.3))) == [("cuda", (0, 2))]


def test_processes_with_different_decoders_look_at_the_same_steps(
    flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One with more cores than the others may have decoded by them: it turns to the GPU, where the others are."""
    asked: dict[bool, list[str]] = {}
    for turns in (True, False):
        own = asked[turns] = []

        def gather(value: object, own: list[str] = own, turns: bool = turns) -> list[object]:
            own.append(type(value).__name__)
            return [value, not turns if isinstance(value, bool) else value]

        monkeypatch.setattr("vimfast.train.waiting.dist.gather_objects", gather)
        monkeypatch.setattr(Loader, "reconsider", lambda *_, turns=turns: "cuda" if turns else None)
        for _ in look(flags, ((0.2, 0.2, 0.3, 0.3, 0.3), (0.3, 0.3))):
            pass
    assert asked[True] == asked[False]


def decoders(
    flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, shares: Sequence[Sequence[float]]
) -> list[tuple[str, tuple[int, int]]]:
    """Which is turned to, and in which epoch and after which report, where reports have such shares of waiting."""
    found: list[tuple[str, tuple[int, int]]] = []

    def reconsider(loader: Loader, decoder: str = "cuda") -> str:
        found.append((decoder, (place.epoch, place.step // SETTLED_AFTER)))
        loader._settings = replace(loader.settings, decoder=decoder)
        return decoder

    monkeypatch.setattr(Loader, "reconsider", reconsider)
    for place in look(flags, shares):  # noqa: B007  # what `reconsider` writes down
        pass
    return found


def look(flags: tuple[str, ...], shares: Sequence[Sequence[float]]) -> Iterator[Place]:
    """Reports of such shares of waiting; the places, each before it is looked at."""
    with build(load_config(list(flags)), World()) as run:
        assert isinstance(run, TrainingRun)
        waits = DataWaits(run, DataConfig())
        for epoch, own in enumerate(shares):
            for report, share in enumerate(own, 1):
                place = Place(10 * SETTLED_AFTER, epoch, report * SETTLED_AFTER)
                run.move(epoch)
                yield place
                for _ in range(SETTLED_AFTER):
                    waits.after_step()
                waits.look(share, Stretch(SETTLED_AFTER, 1, share, [], False), place)


def test_what_helps_depends_on_data_and_flags(flags: tuple[str, ...]) -> None:
    threads = available_cores()
    with build(load_config([*flags, "--num-workers", "1"]), World()) as run:
        assert isinstance(run, TrainingRun)
        loader = run.loader
        assert "vimfast prepare makes shards" in reading_advice(DataConfig(), loader)
        given = decoding_advice(DataConfig(num_workers=1), loader)
        assert given.startswith(f"--num-workers {threads} " if threads > 1 else "more cores")
        assert decoding_advice(DataConfig(), loader).startswith(f"more cores than {threads} for this process")


def test_a_bar_and_its_figures_fit_into_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of a long run, where they are longest."""
    shown = io.StringIO()
    monkeypatch.setattr("sys.stdout", shown)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    report = Reporter(None, active=True)
    assert report.live
    brief = f"loss 2.298 21,500 img/s, data wait 21%, {duration(97300)} left"
    with report.steps("epoch 299", 1251, 1250):
        report.news("", "x" * 200, brief)
        report.advance()
    line = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.getvalue().replace("\r", "\n")).strip().splitlines()[-1]
    assert line.strip() == f"epoch 299 1251/1251 {brief}"
    before = len(shown.getvalue())
    report.row("trains on", "20,000 images of 10 classes in " + "folder/" * 4 + ", at 224 pixels; 4,000 to validate")
    rows = shown.getvalue()[before:].splitlines()
    assert len(rows) == 2
    assert all(len(row) <= 80 for row in rows)
    assert rows[1].startswith(" " * 15)


def test_a_process_that_ends_at_once_leaves_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a second Ctrl-C: the bar stayed, and the terminal had no cursor."""
    shown = io.StringIO()
    monkeypatch.setattr("sys.stdout", shown)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    report, control = Reporter(None, active=True), Control(World())
    control.let_go = report.let_go
    with report.steps("epoch 0", 10):
        report.advance()
        assert shown.getvalue().rindex(HIDE) > shown.getvalue().find(SHOW)
        control._report("interrupted again")
        assert shown.getvalue().rindex(SHOW) > shown.getvalue().rindex("epoch 0")
        assert shown.getvalue().endswith(ERASE)


def test_a_sentence_is_not_broken_inside_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is longer than a terminal is wide. What reads a pipe or a file gets it in one line."""
    shown = io.StringIO()
    sentence = "error: " + "a word, " * 20 + "/a/path/longer/than/" * 5
    monkeypatch.setattr("sys.stderr", shown)
    monkeypatch.setenv("COLUMNS", "80")
    report_once(sentence)
    assert shown.getvalue() == f"{sentence}\n"
    monkeypatch.setattr(shown, "isatty", lambda: True)
    report_once(sentence)
    lines = shown.getvalue().splitlines()[1:]
    assert [word for line in lines for word in line.split()] == sentence.split()
    assert [len(line) <= 80 for line in lines] == [True, True, True, False]
