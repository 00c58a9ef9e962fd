"""``--batch-size auto``: the search for the largest batch, and where its result comes from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from runs import TINY, Stops, refused, train

from vimfast.config import load_config
from vimfast.dist import World
from vimfast.errors import UserError
from vimfast.image_size import ImageSize
from vimfast.train.batch_size import StepTrial
from vimfast.train.fitting import largest_batch


class Limited:
    """A memory that has room for so many images."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.tried: list[int] = []

    def __call__(self, batch: int) -> None:
        self.tried.append(batch)
        if batch > self.room:
            raise torch.OutOfMemoryError(f"{batch} images")


def test_other_errors_are_not_taken_for_too_little_memory() -> None:
    def broken(batch: int) -> None:
        raise RuntimeError("a bug")

    def cublas(batch: int) -> None:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    with pytest.raises(RuntimeError, match="a bug"):
        largest_batch(broken, 8)
    assert largest_batch(cublas, 8) == 0


@pytest.mark.parametrize("most", [1, 7, 8, 100, 5000])
@pytest.mark.parametrize("room", [0, 1, 5, 8, 9, 63, 64, 300, 1000, 10**6])
def test_the_search_ends_close_below_the_limit(room: int, most: int) -> None:
    limited = Limited(room)
    found, best = largest_batch(limited, most), min(room, most)
    assert found <= best
    assert found > best - max(8, best // 16) - 1 if best >= 8 else found == best
    assert found % 8 == 0 or found < 8
    assert max(limited.tried) <= most
    assert len(limited.tried) == len(set(limited.tried)) <= 18


def test_steps_are_tried_as_the_run_trains_them(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(TINY))
    cfg = load_config(["--config", str(tmp_path / "recipe.yaml"), "--accum-steps", "2"])
    trial = StepTrial(cfg, 3, World(), ImageSize(40, 40))
    seen: list[int] = []
    trial._step.model.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    weights = [weight.clone() for weight in trial._step.model.parameters()]

    def limited(batch: int) -> None:
        if batch > 20:
            raise torch.OutOfMemoryError
        trial(batch)

    assert largest_batch(limited, 100) == 16
    assert trial.tried == [8, 16]
    assert seen == [8, 8, 16, 16]
    assert any(not torch.equal(a, b) for a, b in zip(weights, trial._step.model.parameters(), strict=True))


def test_a_run_without_a_gpu_is_told_to_give_a_number(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(TINY | {"data": {"batch_size": "auto"}}))
    sentence = refused("--config", str(tmp_path / "recipe.yaml"), "--data-path", str(tree))
    assert sentence == "--batch-size auto tries what fits into a GPU's memory, and this run is on cpu; give a number"


@pytest.mark.parametrize("value", ["atuo", "1.5"])
def test_other_words_are_refused(value: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"batch_size: {value}\n")
    for argv in (["--batch-size", value], ["--config", str(tmp_path / "recipe.yaml")]):
        with pytest.raises(UserError, match=r"must be an integer or auto"):
            load_config(argv)


def test_a_resumed_run_keeps_the_batch_that_was_found(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(TINY))
    flags = ("--config", str(tmp_path / "recipe.yaml"), "--data-path", str(tree), "--output_dir", str(tmp_path / "run"))
    short = (*flags, "--epochs", "2", "--steps-per-epoch", "2", "--eval-steps", "1")
    train(*short, control=Stops("epoch 1, step 1"))
    capsys.readouterr()
    run = train(*short, "--batch-size", "auto", "--resume", "auto")
    said = capsys.readouterr().out
    assert run.loader.order.batch_size == 2
    assert f"--batch-size auto: 2, as the run of {tmp_path / 'run' / 'checkpoint.pth'} found\n" in said
    assert "resuming at epoch 1, step 1 of 2" in said
    assert "changed since" not in said
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["batch_size"] == 2
    train(*short, "--batch-size", "auto", "--eval", "--resume", str(tmp_path / "run"))
    assert "batch          1 process x 2 images" in capsys.readouterr().out


def test_an_update_of_more_images_than_an_epoch_has_is_told_in_images(tree: Path, tmp_path: Path) -> None:
    """As a recipe for ImageNet has it on a small folder: --accum-steps, which nobody gave, was to be lowered."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(TINY))
    flags = ("--config", str(tmp_path / "recipe.yaml"), "--data-path", str(tree), "--epochs", "1", "--eval-steps", "1")
    sentence = refused(*flags, "--global-batch-size", "1024")
    assert sentence == (
        "an update takes 1,024 images (--global-batch-size) and an epoch has 36; give --global-batch-size 36 or less"
    )
    train(*flags, "--global-batch-size", "36")
    assert "--accum-steps 99 is more than the 18 batches" in refused(*flags, "--accum-steps", "99")
