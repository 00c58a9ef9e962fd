"""The figures of a run arrive where they are asked for: as a table, and in Weights & Biases' files."""

from __future__ import annotations

import csv
import errno
import json
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from runs import RECIPE, Stops, records, refused, train

from vimfast.errors import UserError
from vimfast.run_report import write_table
from vimfast.train.boards import WandB
from vimfast.train.report import Reporter

needs_wandb = pytest.mark.skipif(find_spec("wandb") is None, reason="needs the package wandb")


@pytest.fixture(scope="module")
def flags(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return ("--config", str(path), "--eval-batch-size", "8", "--data-path", str(tree))


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


@needs_wandb
def test_both_have_what_the_log_has_also_of_a_resumed_run(
    flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    flags = (*flags, "--output_dir", str(tmp_path), "--csv", "--wandb", "--resume", "auto")
    train(*flags, control=Stops("epoch 1, step 1"))
    assert len(rows(tmp_path)) == 1
    train(*flags)
    log = records(tmp_path)
    assert [record["epoch"] for record in log] == [0, 1]
    for record, row in zip(log, rows(tmp_path), strict=True):
        assert {name: float(value) for name, value in row.items()} == record
    parts = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    own = (tmp_path / "wandb" / "run-id").read_text().strip()
    assert [path.stem for path in parts] == [f"run-{own}"] * 2  # one run, in two parts, for wandb sync
    for part, record in zip(parts, log, strict=True):
        content = part.read_bytes()
        for name in ("train_loss", "test_loss", "ema_test_loss"):
            assert f"epoch/{name}".encode() in content
            assert json.dumps(record[name]).encode() in content
        assert b"train/img_s" in content
        assert b"model_ema_decay" in content


@needs_wandb
def test_a_run_from_nothing_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    found = []
    for resumed in (False, True, False):
        WandB(tmp_path, {}, resumed=resumed).close()
        found.append((tmp_path / "wandb" / "run-id").read_text())
    assert found[0] == found[1] != found[2]


def test_a_missing_folder_or_package_is_refused(
    flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for flag in ("--csv", "--wandb"):
        assert refused(*flags, flag) == f"{flag} writes to the run folder, and there is no --output_dir; add one"
    monkeypatch.setattr("vimfast.train.boards.find_spec", lambda name: None)
    sentence = refused(*flags, "--wandb", "--output_dir", str(tmp_path / "run"))
    assert sentence == "--wandb needs the package wandb, which is not installed; pip install wandb, or drop --wandb"
    assert not (tmp_path / "run").exists()


class Full:
    """A board on a disk that is full."""

    calls = 0

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.calls += 1
        raise OSError(errno.ENOSPC, "No space left on device")

    def close(self) -> None:
        raise AssertionError("it was given up")


def test_a_board_that_fails_is_given_up_with_one_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, full = Reporter(tmp_path, active=True), Full()
    report.add("the full board", full)
    for step in range(3):
        report.scalars({"train/loss": 1.0}, step)
    report.close()
    assert full.calls == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: the full board in {tmp_path} cannot be written (No space left on device)")
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert events.read_bytes().count(b"train/loss") == 3


def test_the_table_has_a_column_for_every_field(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no log\.txt"):
        write_table(tmp_path)
    lines = ['{"loss": 1.5, "epoch": 1}', '{"epoch": 0, "loss": null, "a,b": "x\\ny"}', "half a li"]
    (tmp_path / "log.txt").write_text("\n".join(lines))
    write_table(tmp_path)
    assert rows(tmp_path) == [{"epoch": "0", "loss": "", "a,b": "x\ny"}, {"epoch": "1", "loss": "1.5", "a,b": ""}]
    assert re.match(r"epoch,", (tmp_path / "log.csv").read_text())
