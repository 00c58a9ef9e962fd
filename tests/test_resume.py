"""What a resumed run must have in common with its checkpoint, and what may change."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from runs import RECIPE, Stops, call, differences, records, refused, train


@pytest.fixture(scope="module")
def shards(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "shards"
    call("vimfast.prepare", str(tree), "--out", str(out))
    return out


@pytest.fixture(scope="module")
def flags(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return ("--config", str(path), "--steps-per-epoch", "3", "--eval-steps", "1", "--data-path", str(shards))


@pytest.fixture(scope="module")
def halves(flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `middle`, a run that stands at epoch 0, step 2, and `end`, one that stands at the end of that epoch."""
    root = tmp_path_factory.mktemp("halves")
    train(*flags, "--output_dir", str(root / "middle"), "--epochs", "1", control=Stops("epoch 0, step 2 "))
    train(*flags, "--output_dir", str(root / "end"), "--epochs", "1")
    return root


@pytest.fixture
def copy(halves: Path, tmp_path: Path) -> Callable[[str], str]:
    """The flags that resume a copy of one of them."""

    def copied(name: str) -> str:
        shutil.copytree(halves / name, tmp_path / name)
        return str(tmp_path / name)

    return copied


def renamed(tree: Path, to: Path, names: dict[str, str]) -> Path:
    shutil.copytree(tree, to)
    for split in ("train", "val"):
        for old, new in names.items():
            (to / split / old).rename(to / split / f"{new}.moved")
        for new in names.values():
            (to / split / f"{new}.moved").rename(to / split / new)
    return to


def test_classes_of_other_names_are_refused(
    flags: tuple[str, ...], halves: Path, tree: Path, tmp_path: Path, copy: Callable[[str], str]
) -> None:
    path = str(halves / "end" / "checkpoint.pth")
    other = renamed(tree, tmp_path / "other", {"n02": "n02b"})
    for more in (("--eval",), ("--output_dir", str(tmp_path / "new"))):
        sentence = refused(*flags, *more, "--resume", path, "--data-path", str(other))
        assert f"class 1 is 'n02' there and 'n02b' in {other}; point --data-path at" in sentence
    state = torch.load(path, weights_only=True)
    state["classes"].reverse()
    torch.save(state, tmp_path / "reversed.pth")
    assert "class 0 is 'n03' there and 'n01'" in refused(*flags, "--eval", "--resume", str(tmp_path / "reversed.pth"))
    del state["classes"]
    torch.save(state, tmp_path / "nameless.pth")
    train(*flags, "--eval", "--resume", str(tmp_path / "nameless.pth"))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--seed", "7"), "--seed 7 was --seed 0"),
        (("--no-repeated-aug",), "--no-repeated-aug was --repeated-aug"),
        (("--order", "window"), "--order window was --order permutation"),
        (("--data-path", "reshuffled"), "reshuffled holds other images, or in another order"),
        (("--data-path", "tree"), "tree holds other images, or in another order"),
    ],
)
def test_another_order_is_refused_in_mid_epoch_alone(
    flags: tuple[str, ...],
    tree: Path,
    tmp_path: Path,
    more: tuple[str, ...],
    words: str,
    copy: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tree").symlink_to(tree)
    if "reshuffled" in more:
        call("vimfast.prepare", str(tree), "--out", str(tmp_path / "reshuffled"), "--seed", "5")
    run = copy("middle")
    sentence = refused(*flags, *more, "--output_dir", run, "--resume", "auto")
    assert f"stands at epoch 0, step 2 of 3, and {words}: images would be repeated or missed; keep" in sentence
    train(*flags, *more, "--output_dir", run, "--resume", "auto", "--start-epoch", "0", "--epochs", "1")
    assert [r["epoch"] for r in records(Path(run))] == [0]
    capsys.readouterr()
    train(*flags, *more, "--output_dir", copy("end"), "--resume", "auto")
    assert f"from epoch 1 on in another order: {words}" in capsys.readouterr().out


def test_what_says_nothing_of_the_order_may_change_in_mid_epoch(
    flags: tuple[str, ...], halves: Path, shards: Path, tmp_path: Path, copy: Callable[[str], str]
) -> None:
    """Among it the path of the data; and a checkpoint of an earlier version has no identity of it."""
    shutil.copytree(shards, tmp_path / "moved")
    more = ("--data-path", str(tmp_path / "moved"), "--order-window", "3", "--repeated-aug-on", "one-rank")
    run = copy("middle")
    train(*flags, *more, "--output_dir", run, "--resume", "auto", "--epochs", "1")
    assert not differences(Path(run), halves / "end")
    state = torch.load(halves / "middle" / "checkpoint.pth", weights_only=True)
    del state["images"]
    torch.save(state, tmp_path / "earlier.pth")
    train(*flags, "--resume", str(tmp_path / "earlier.pth"), "--epochs", "1")
