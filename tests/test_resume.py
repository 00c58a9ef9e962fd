"""What a resumed run must have in common with its checkpoint, and what may change."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from runs import RECIPE, Stops, call, differences, records, refused, train

from vimfast.data import order


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


def test_a_run_begun_before_orders_were_computed_continues_in_its_own(
    flags: tuple[str, ...], halves: Path, copy: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so do those that continue it; a new one does not."""
    monkeypatch.setattr(order, "MOST_DRAWN", 1)
    run = Path(copy("middle"))
    path = run / "checkpoint.pth"
    state = torch.load(path, weights_only=True)
    assert state.pop("order_version") == 2
    torch.save(state, path)
    train(*flags, "--output_dir", str(run), "--resume", "auto", "--epochs", "1")
    assert not differences(run, halves / "end")
    assert torch.load(path, weights_only=True)["order_version"] == 1
    resumed = train(*flags, "--output_dir", str(run), "--resume", "auto", "--epochs", "2")
    assert resumed.loader.order.computed is False
    begun = train(*flags, "--epochs", "1")
    assert begun.loader.order.computed is None


def test_changed_settings_are_listed_and_take_effect(
    flags: tuple[str, ...], copy: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy("middle")
    changed = ("--lr", "1e-3", "--weight-decay", "0.2", "--opt-betas", "0.8", "0.9", "--aa", "none", "--epochs", "2")
    capsys.readouterr()
    resumed = train(*flags, *changed, "--log-every", "1", "--num-workers", "2", "--output_dir", run, "--resume", "auto")
    out = capsys.readouterr().out
    assert "changed since the checkpoint" in out
    for row in ("lr 0.0005 0.001", "weight_decay 0.05 0.2", "opt_betas None [0.8, 0.9]", "epochs 1 2"):
        assert row in " ".join(out.split())
    assert all(name not in out for name in ("num_workers", "log_every", "run.resume", "output_dir"))
    assert "optim.lr | 0.0005 | 0.001" in (Path(run) / "train.log").read_text()
    assert {group["weight_decay"] for group in resumed.optimizer.param_groups} == {0.2, 0.0}
    assert {group["betas"] for group in resumed.optimizer.param_groups} == {(0.8, 0.9)}
    train(*flags, *changed, "--output_dir", run, "--resume", "auto")
    assert "changed since" not in capsys.readouterr().out


def test_another_global_batch_is_listed_with_the_flag_that_keeps_it(
    flags: tuple[str, ...], copy: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It follows from the number of processes too, which is no setting: here one continues what two have begun."""
    run = copy("end")
    path = Path(run) / "checkpoint.pth"
    torch.save({**torch.load(path, weights_only=True), "global_batch": 8}, path)
    more = ("--epochs", "2", "--steps-per-epoch", "1", "--output_dir", run, "--resume", "auto")
    capsys.readouterr()
    train(*flags, *more, "--global-batch-size", "8")
    assert "on all processes" not in capsys.readouterr().out
    for name in ("checkpoint.pth", "checkpoint.1.pth"):  # after the evaluation of an epoch, and before it
        train(*flags, *more, "--resume", str(Path(run) / name), "--output_dir", str(tmp_path / name))
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("images an update, on all processes 8 4") == 2
    assert "--global-batch-size 8 keeps the updates, and with them the learning rate, as they were" in said


@pytest.mark.parametrize("opt", ["sgd", "lamb", "lion"])
def test_another_optimizer_is_one_sentence(flags: tuple[str, ...], halves: Path, opt: str) -> None:
    path = str(halves / "middle" / "checkpoint.pth")
    assert "--opt adamw and this run has --opt " + opt in refused(*flags, "--resume", path, "--opt", opt)
    assert "does not fit this run" in refused(*flags, "--resume", path, "--freeze-layers", "1")


def test_the_loss_of_an_epoch_weighs_each_image_once(flags: tuple[str, ...], halves: Path, tmp_path: Path) -> None:
    """Also where a step was of other processes, or of other batches, before the checkpoint."""

    def resumed(batch_size: int, processes: int, accum_steps: int) -> float:
        state = torch.load(halves / "middle" / "checkpoint.pth", weights_only=True)
        terms = 2 * accum_steps
        own = {**state["processes"][0], "sums": [3.0 * terms, float(terms)]}  # each of the two steps had a loss of 3
        torch.save({**state, "processes": processes * [own], "accum_steps": accum_steps}, tmp_path / "c.pth")
        out = tmp_path / f"{batch_size} {processes} {accum_steps}"
        more = (
            "--batch-size",
            str(batch_size),
            "--accum-steps",
            str(4 // batch_size),
            "--epochs",
            "1",
            "--drop-path",
            "0",
        )
        train(*flags, *more, "--resume", str(tmp_path / "c.pth"), "--output_dir", str(out))
        return records(out)[0]["train_loss"]

    whole = resumed(4, 1, 1)
    third = 3 * whole - 6
    assert 0.5 < third < 2
    assert [resumed(4, 2, 1), resumed(4, 1, 2), resumed(4, 4, 1)] == pytest.approx(3 * [whole], rel=1e-12)
    assert [resumed(2, 2, 1), resumed(2, 1, 1)] == pytest.approx(2 * [whole], rel=2e-2)  # mixup draws by batch


def test_the_loss_of_an_epoch_is_that_of_an_uninterrupted_run(
    flags: tuple[str, ...], halves: Path, copy: Callable[[str], str]
) -> None:
    run = copy("middle")
    train(*flags, "--output_dir", run, "--resume", "auto", "--epochs", "1")
    assert (Path(run) / "log.txt").read_text() == (halves / "end" / "log.txt").read_text()


def test_the_first_evaluation_is_the_best_so_far(
    flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no image is classified right."""
    monkeypatch.setattr(
        "vimfast.train.evaluation._scored", lambda logits, labels: (*3 * [logits.sum() * 0], len(labels))
    )
    train(*flags, "--output_dir", str(tmp_path), control=Stops("epoch 0, step 3 "))
    assert not (tmp_path / "best_checkpoint.pth").exists()
    train(*flags, "--output_dir", str(tmp_path), "--resume", "auto")
    assert torch.load(tmp_path / "best_checkpoint.pth", weights_only=True)["epoch"] == 0
    assert [r["test_acc1"] for r in records(tmp_path)] == [0.0, 0.0]
