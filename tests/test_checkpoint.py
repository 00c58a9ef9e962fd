"""Checkpoint files: atomic, strict, and unable to run code."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from vimfast.checkpoint import load_checkpoint, load_weights, save_checkpoint
from vimfast.errors import UserError


class Evil:
    def __reduce__(self) -> tuple:
        return (os.system, ("touch hacked",))


def test_round_trip_and_the_original_layout(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    model = nn.Linear(3, 2)
    save_checkpoint(
        path,
        {"model": model.state_dict(), "args": argparse.Namespace(lr=5e-4, model="vim"), "scaler": "none"},
    )
    state = load_checkpoint(path)
    assert state["args"].lr == 5e-4
    other = nn.Linear(3, 2)
    load_weights(other, state["model"], str(path))
    assert torch.equal(other.weight, model.weight)
    assert list(tmp_path.iterdir()) == [path]


def test_a_bare_state_dict_is_weights(tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "w.pth")
    assert set(load_checkpoint(tmp_path / "w.pth")) == {"model"}


def test_a_failed_write_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.pth"
    save_checkpoint(path, {"model": {"a": torch.ones(2)}})
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="No space left"):
        save_checkpoint(path, {"model": {"a": torch.zeros(2)}})
    assert load_checkpoint(path)["model"]["a"].tolist() == [1, 1]
    assert list(tmp_path.iterdir()) == [path]


def test_a_hostile_pickle_is_refused_and_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"w": torch.ones(1)}, "args": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="could run code"):
        load_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 torn"])
def test_rubbish_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.pth").write_bytes(content)
    with pytest.raises(UserError, match="no checkpoint, or a damaged one"):
        load_checkpoint(tmp_path / "c.pth")


def test_a_torn_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    save_checkpoint(path, {"model": {"a": torch.ones(1000)}})
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(path)
    with pytest.raises(UserError, match="does not exist"):
        load_checkpoint(tmp_path / "nowhere.pth")


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"weight": torch.ones(2, 4), "bias": torch.ones(2)}, ["weight is (2, 4) there and (2, 3) here"]),
        ({"weight": torch.ones(2, 3)}, ["bias is missing there"]),
        ({"weight": torch.ones(2, 3), "bias": torch.ones(2), "x": torch.ones(1)}, ["x is unknown here"]),
    ],
)
def test_another_model_is_told_by_name_and_shape(weights: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load_weights(nn.Linear(3, 2), weights, "c.pth")
    assert all(word in str(error.value) for word in words)
