"""Data that fail under a running training: the file is named, and the place saved."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from runs import RECIPE, call, differences, records, train

from vimfast.checkpoint import load_checkpoint
from vimfast.errors import UserError
from vimfast.train.loop import Hook, Place


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return str(path)


class InStep(Hook):
    """Does something before the second step."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act

    def before_step(self, place: Place) -> None:
        if (place.epoch, place.step) == (0, 1):
            self._act()


def test_a_shard_cut_off_under_a_training_is_named_and_the_place_saved(tree: Path, tmp_path: Path, recipe: str) -> None:
    """Its process ended with SIGBUS, silently. Here the shard is copied again, and the run resumed to the same bits."""
    shards = tmp_path / "shards"
    call("vimfast.prepare", str(tree), "--out", str(shards), "--shard-samples", "9")
    flags = ("--config", recipe, "--data-path", str(shards), "--epochs", "3", "--eval-steps", "1", "--output_dir")
    train(*flags, str(tmp_path / "undisturbed"))

    tar = shards / "train-000002.tar"
    whole = tar.read_bytes()
    cut = InStep(lambda: os.truncate(tar, 100))
    with pytest.raises(UserError, match=rf"{tar} was cut off while it was in use: .*, then resume"):
        train(*flags, str(tmp_path / "cut"), hooks=lambda run: [cut])
    saved = load_checkpoint(tmp_path / "cut" / "checkpoint.pth")
    assert (saved["epoch"], saved["step"]) >= (0, 1)
    tar.write_bytes(whole)
    train(*flags, str(tmp_path / "cut"), "--resume", "auto")
    assert differences(tmp_path / "cut", tmp_path / "undisturbed") == []
    assert records(tmp_path / "cut") == records(tmp_path / "undisturbed")
