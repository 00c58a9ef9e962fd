"""Inputs that are not square: flags and files, the loader's pixels, a run, and what is made of its checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from runs import RECIPE, refused, train

from vimfast import check_data, export
from vimfast.augment.colours import to_pixels
from vimfast.checkpoint import described, load_checkpoint
from vimfast.commands import bench, predict, show
from vimfast.config import AugmentConfig, Config, load_config
from vimfast.data.opening import evaluation_loader, training_loader
from vimfast.errors import UserError
from vimfast.image_size import ImageSize
from vimfast.inference import load_classifier
from vimfast.inference import predict as ask

Main = Callable[..., Any]


@pytest.mark.parametrize(
    ("words", "value"),
    [(["384"], 384), (["192", "256"], (192, 256)), (["192x256"], (192, 256)), (["224", "224"], 224)],
)
def test_a_size_from_flags_and_files(words: list[str], value: object, tmp_path: Path) -> None:
    config = load_config(["--input-size", *words, "--seed", "3"])
    assert (config.model.input_size, config.run.seed) == (value, 3)
    assert load_config([f"--input-size={words[0]}", *words[1:]] if len(words) == 1 else ["--seed", "3"])
    config.save(tmp_path / "config.yaml")
    stored = yaml.safe_load((tmp_path / "config.yaml").read_text())["model"]["input_size"]
    assert stored == (list(value) if isinstance(value, tuple) else value)
    again = load_config(["--config", str(tmp_path / "config.yaml")])
    assert again == config
    assert again.changed_since(config.to_dict()) == []
    assert len(Config().changed_since(config.to_dict())) == 1 + (value != 224)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["0"], "--input-size is 0; it must be >= 1"),
        (["192", "0"], "--input-size is 0; it must be >= 1"),
        (["192.5"], "--input-size is '192.5'; it must be an integer >= 1, or two"),
        (["192xx256"], "--input-size is '192xx256'; it must be an integer >= 1, or two"),
        (["192", "256", "3"], "unrecognized arguments: 3"),
        (["-192"], "--input-size is '-192'; it must be an integer >= 1, or two"),
    ],
)
def test_flags_that_are_no_size(words: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_config(["--input-size", *words])


@pytest.mark.parametrize(
    "value", ["[192]", "[192, 256, 3]", "192x256", "[192, 2.5]", "true", "[]", "null", "0", "[64, 0]"]
)
def test_files_that_hold_no_size(value: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"input_size: {value}\n")
    with pytest.raises(UserError, match=r"input_size is .*must be"):
        load_config(["--config", str(tmp_path / "a.yaml")])


@pytest.mark.parametrize("value", ["224", [1, 2, 3], [0, 5], -1, None, True])
def test_a_checkpoint_that_holds_no_size(value: object) -> None:
    with pytest.raises(UserError, match="says that its images are of size"):
        described({"config": {"model": {"model": "resnet18", "input_size": value}}})


def test_batches(textured: Path) -> None:
    """Boxes and squares, by whichever view of the CPU; the evaluation's pixels are those of timm's transform."""
    for size, augmentation in (
        ((40, 56), AugmentConfig()),
        ((24, 32), AugmentConfig()),
        ((56, 40), AugmentConfig(src=True)),
    ):
        with training_loader(textured, 3, size=size, augmentation=augmentation, device="cpu") as loader:
            (batch, *_) = loader.epoch(0)
        assert batch.images.shape == (3, 3, *size)
        assert batch.images.std() > 0.1
    size = (48, 96)
    with evaluation_loader(textured, 7, size=size, split="train", device="cpu") as loader:
        (batch,) = loader.epoch(0)
    transform = timm.data.create_transform(size, interpolation="bicubic", crop_pct=0.875)
    paths = sorted((textured / "train" / "a").iterdir())
    wanted = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    levels = np.abs(to_pixels(batch.images).astype(int) - to_pixels(wanted))
    assert levels.max() <= 2
    assert (levels > 0).mean() < 0.01
    with pytest.raises(UserError, match="size is 0"):
        training_loader(textured, 3, size=(0, 40), device="cpu")


@pytest.fixture(scope="module")
def run(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on images of 32 x 48 pixels."""
    folder = tmp_path_factory.mktemp("wide")
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump({**RECIPE, "model": {**RECIPE["model"], "input_size": [32, 48]}})
    )
    flags = ("--config", str(folder / "recipe.yaml"), "--epochs", "1", "--model-ema-decay", "0.5")
    train(*flags, "--data-path", str(tree), "--output_dir", str(folder / "run"))
    return folder / "run"


def test_a_run_is_planned_resumed_and_evaluated(run: Path, tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "32 x 48 pixels" in (run / "train.log").read_text()
    state = load_checkpoint(run / "checkpoint.pth")
    assert state["config"]["model"]["input_size"] == [32, 48]
    assert state["model"]["pos_embed"].shape[1] == 4 * 6 + 1
    flags = ("--config", str(run / "config.yaml"), "--data-path", str(tree), "--output_dir", "")
    resumed = train(*flags, "--resume", str(run / "checkpoint.pth"), "--epochs", "1")
    assert "changed since the checkpoint" not in capsys.readouterr().out
    assert next(iter(resumed.loader.epoch(0))).images.shape == (4, 3, 32, 48)
    resumed.loader.close()
    evaluated = train(*flags, "--resume", str(run / "checkpoint.pth"), "--eval", "--input-size", "48", "32")
    assert evaluated.evaluated.loader.view.size_in(0) == (48, 32)
    patches = ("--input-size", "36", "52", "--eval-crop-ratio", "1")
    assert "the last 4 rows and columns would never be seen; give 32 48 or 40 56" in refused(*flags, *patches)
    assert "the last 4 columns would never be seen; give 32 48 or 32 56" in refused(*flags, "--input-size", "32", "52")


def test_a_run_predicts_and_is_exported(run: Path, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide, tall = load_classifier(run), load_classifier(run, input_size=(48, 32))
    assert (wide.view.size_in(0), tall.view.size_in(0)) == ((32, 48), (48, 32))
    assert not wide.notes
    monkeypatch.setattr(sys, "argv", ["x", str(run), "--out", str(tmp_path / "out"), "--weights", "ema"])
    export.main()
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    config = timm.data.resolve_data_config(model=model)
    assert config["input_size"] == (3, 32, 48)
    transform = timm.data.create_transform(**config)
    paths = sorted((tree / "val" / "n02").iterdir())
    with torch.no_grad():
        wanted = model(torch.stack([transform(Image.open(path)) for path in paths])).softmax(1)
    for image, probabilities in zip(ask(wide, paths, top=3).images, wanted, strict=True):
        got = torch.tensor([guess.probability for guess in sorted(image.guesses, key=lambda g: g.number)])
        torch.testing.assert_close(got, probabilities, atol=2e-3, rtol=0)  # DALI's pixels may be a level off
    assert torch.equal(load_classifier(tmp_path / "out").model.pos_embed, wide.model.pos_embed)  # type: ignore[arg-type]


def test_other_commands(run: Path, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A size of two numbers may stand before a path."""

    def call(main: Main, *words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["vimfast", *map(str, words)])
        main()
        out, err = capsys.readouterr()
        return str(out + err)

    image = next((tree / "val" / "n01").iterdir())
    call(predict.main, "--input-size", 48, 32, run, image, "--grid", tmp_path / "seen.png")
    call(predict.main, "--device", "cpu", "--input-size", 48, run, image, "--grid", tmp_path / "seen.png")
    settings = ("--config", run / "config.yaml", "--device", "cpu", "--count", 1)
    call(show.main, tree, *settings, "--input-size", 24, 48, "--out", tmp_path / "show.png")
    call(show.main, tree, *settings, "--split", "val", "--src", "--input-size", 48, 24, "--out", tmp_path / "show.png")
    tiny = ("--device", "cpu", "--batch-size", 1, "--seconds", 0.02, "--no-deit", "--model", "vim_tiny_patch16_224")
    assert "1 image of 16 x 32 pixels" in call(bench.main, *tiny, "--input-size", 16, 32)
    call(check_data.main, "--input-size", 60, 90, tree, "--splits", "val", "--html", tmp_path / "check.html")
    page = (tmp_path / "check.html").read_text()
    assert "below 60 pixels in height or 90 in width" in page


def test_sizes_in_words() -> None:
    wide, square = ImageSize.of((192, 256)), ImageSize.of(224)
    assert (str(wide), wide.words, wide.plain, wide.pixels) == ("192 x 256", "192 256", (192, 256), 49152)
    assert (str(square), square.words, square.plain) == ("224", "224", 224)
