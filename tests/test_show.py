"""``vimfast show``: what is on the sheet is what a run of these settings trains on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import write_image
from PIL import Image
from runs import RECIPE, train
from torch import Tensor, nn

from vimfast.augment.colours import to_pixels
from vimfast.class_names import english_names
from vimfast.commands import show
from vimfast.config import Batches, Config, load_config
from vimfast.data.source import open_source
from vimfast.dist import World
from vimfast.errors import UserError
from vimfast.samples import _Sample, _samples, _target, draw_samples
from vimfast.sheet import Caption, Sheet, Tile
from vimfast.train.hooks import Hook
from vimfast.train.loaders import open_training
from vimfast.train.loop import TrainingRun
from vimfast.train.mixing import Mixup
from vimfast.train.report import Reporter

PLAIN = ("--aa", "none", "--color-jitter", "0", "--reprob", "0", "--hflip", "0", "--no-repeated-aug")


class Witness(Hook):
    """Keeps the images that the model is given in training, up to a step."""

    def __init__(self, run: TrainingRun) -> None:
        self.steps: list[np.ndarray] = []
        run.model.register_forward_pre_hook(self._see)

    def _see(self, model: nn.Module, given: tuple[Tensor, ...]) -> None:
        if model.training:
            self.steps.append(to_pixels(given[0]))


def config(tree: Path, *flags: str) -> Config:
    return load_config(["--data-path", str(tree), "--device", "cpu", "--input-size", "48", *flags])


def samples(cfg: Config, count: int) -> list[_Sample]:
    source = open_source(cfg.data.data_path, "train")
    batches = Batches(cfg.data.batch_size, 1)
    loader = open_training(source, cfg, batches, World(), Reporter(None, False))
    mixup = Mixup(cfg.mix, len(source.classes), cfg.run.seed, 0)
    found = list(_samples(loader, mixup, count))[:count]
    loader.close()
    return found


@pytest.mark.parametrize("flags", [(), ("--no-repeated-aug", "--mixup-mode", "elem", "--ThreeAugment")])
def test_what_is_shown_is_what_the_model_is_given(tree: Path, tmp_path: Path, flags: tuple[str, ...]) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    words = ("--config", str(tmp_path / "recipe.yaml"), "--data-path", str(tree), "--batch-size", "6", *flags)
    seen: list[Witness] = []

    def hooks(run: TrainingRun) -> list[Hook]:
        seen.append(Witness(run))
        return [*seen]

    train(*words, "--epochs", "1", "--steps-per-epoch", "3", hooks=hooks)
    found = samples(load_config(list(words)), 6)
    assert [sample.step for sample in found] == [0, 1, 2, 3, 4, 5]
    for sample in found[:3]:
        given = seen[0].steps[sample.step]
        for copy in sample.copies:
            assert any(np.array_equal(copy.mixed, image) for image in given)
    assert {len(sample.copies) for sample in found} == {1 if flags else 3}


@pytest.mark.parametrize("flags", [(), ("--src",)])
def test_the_outlined_crop_is_the_one_that_is_cut_out(textured: Path, flags: tuple[str, ...]) -> None:
    """Cut out of the original by Pillow, it is nearly the image that is trained on."""
    cfg = config(textured, *PLAIN, "--batch-size", "7", *flags)
    found = samples(cfg, 7)
    assert len(found) == 7
    for sample in found:
        (copy,) = sample.copies
        if flags:
            assert copy.done in ([], ["shift"])
            if copy.done:
                continue
        else:
            assert copy.done == []
        top, left, height, width = copy.box
        box = (left, top, left + width, top + height)
        own = sample.original.resize((48, 48), Image.Resampling.BICUBIC, box=box)
        difference = np.abs(np.asarray(own, int) - copy.pixels.astype(int))
        assert difference.mean() < 6, sample.original.size


def test_small_inputs_are_cut_out_of_the_padded_image(tree: Path) -> None:
    cfg = config(tree, *PLAIN, "--input-size", "32", "--batch-size", "12")
    found = samples(cfg, 8)
    for sample in found:
        (copy,) = sample.copies
        top, left, height, width = copy.box.astype(int).tolist()
        assert (height, width) == (32, 32)
        own = sample.original.crop((left, top, left + width, top + height))
        assert np.abs(np.asarray(own, int) - copy.pixels).mean() < 2


def test_what_was_done_is_said(tree: Path) -> None:
    flags = ("--hflip", "1", "--reprob", "1", "--aa", "rand-m9-n2-p1", "--batch-size", "12")
    for sample in samples(config(tree, *flags), 4):
        for copy in sample.copies:
            assert copy.done[0] == "flip"
            assert copy.done[-1] == "erase"
            assert len(copy.done) > 2
    for sample in samples(config(tree, "--aa", "none", "--reprob", "0", "--batch-size", "12"), 4):
        for copy in sample.copies:
            assert {"brightness", "contrast", "saturation"} <= set(copy.done)


def test_targets_are_those_of_the_mixing(tree: Path) -> None:
    cfg = config(tree, "--mixup", "0", "--cutmix", "0", "--batch-size", "12")
    for sample in samples(cfg, 4):
        for copy in sample.copies:
            assert copy.target[sample.label] == pytest.approx(1 - 0.1 + 0.1 / 3)
            assert np.array_equal(copy.mixed, copy.pixels)


@pytest.mark.parametrize(
    ("target", "named"),
    [
        ([0.03, 0.74, 0.23], ["b", "c"]),  # two of three classes mixed, and what smoothing gives to the third
        ([0.03, 0.94, 0.03], ["b"]),
        ([0.3, 0.7], ["b", "a"]),
    ],
)
def test_a_sheet_names_the_classes_that_were_mixed(target: list[float], named: list[str]) -> None:
    assert [caption.text for caption in _target(np.array(target), ["a", "b", "c"])] == named


def test_bad_images_end_it_or_others_take_their_place(tmp_path: Path) -> None:
    for label in ("a", "b"):
        for i in range(4):
            write_image(tmp_path / "train" / label / f"{i}.jpg", i, (60 + 10 * i, 50))
    (tmp_path / "train" / "a" / "1.jpg").write_bytes(b"no image")
    cfg = config(tmp_path, *PLAIN, "--batch-size", "8")
    with pytest.raises(UserError, match=r"a/1.jpg is not a readable image"):
        draw_samples(cfg, "train", 8, "")
    cfg = config(tmp_path, *PLAIN, "--batch-size", "8", "--on-bad-image", "skip")
    for sample in samples(cfg, 8):
        (copy,) = sample.copies
        top, left, height, width = copy.box
        own = sample.original.resize((48, 48), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        assert np.abs(np.asarray(own, int) - copy.pixels.astype(int)).mean() < 6


def run_show(*words: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["vimfast show", *map(str, words)])
        show.main()


def test_the_command(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = {"augment": {"aa": "none", "color_jitter": 0.0, "reprob": 0.0}, "mix": {"mixup": 0.0, "cutmix": 0.0}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**recipe, "data": {"data_path": "elsewhere"}}))
    flags = ("--config", tmp_path / "mine.yaml", "--input-size", 48, "--count", 2, "--device", "cpu")
    run_show(tree, "--out", tmp_path / "one.png", *flags)
    assert capsys.readouterr().out == f"written to {tmp_path / 'one.png'}\n"
    run_show(*flags, tree, "--out", tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    run_show(tree, *flags, "--out", tmp_path / "mixed.png", "--mixup", "0.8")
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "mixed.png") as mixed:
        assert mixed.width == one.width + 3 * 170
    with pytest.raises(UserError, match=r"no/one.png is in a folder that does not exist; give a file in one that does"):
        run_show(tree, *flags, "--out", tmp_path / "no" / "one.png")
    with pytest.raises(UserError, match="has no train/"):
        run_show(tmp_path, *flags)
    with pytest.raises(UserError, match="unknown flag --mixupp; did you mean '--mixup'"):
        run_show(tree, "--mixupp", "1")


def test_a_batch_may_be_larger_than_the_data_and_an_update_than_a_batch(tree: Path) -> None:
    cfg = config(tree, "--batch-size", "128", "--global-batch-size", "1024")
    assert draw_samples(cfg, "train", 4, "").width > 1000


def test_evaluation_is_shown_as_it_is(textured: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / split).mkdir(exist_ok=True)
            (tmp_path / split / label).symlink_to(textured / "train" / "a")
    cfg = config(tmp_path, "--eval-crop-ratio", "0.8", "--input-size", "160")
    sheet = np.asarray(draw_samples(cfg, "val", 1, ""))
    evaluated = train(
        *("--model", "resnet10t", "--data-path", str(tmp_path), "--input-size", "160", "--eval-crop-ratio", "0.8"),
        *("--device", "cpu", "--epochs", "1", "--steps-per-epoch", "1", "--batch-size", "2"),
    ).evaluated
    every = np.concatenate([to_pixels(batch.images) for batch in evaluated.loader.epoch(0)])
    inner = [image[4:-4, 4:-4] for image in every]  # without the frame
    windows = [sheet[y : y + 152, x : x + 152] for y, x in _places(sheet, inner)]
    assert len(windows) == 1


def _places(sheet: np.ndarray, images: list[np.ndarray]) -> list[tuple[int, int]]:
    """Where one of these images lies, to the pixel."""
    found = []
    for image in images:
        rows = (sheet[: -len(image), : -len(image)] == image[0, 0]).all(axis=2)
        for y, x in np.argwhere(rows).tolist():
            if np.array_equal(sheet[y : y + len(image), x : x + len(image)], image):
                found.append((y, x))
    return list(dict.fromkeys(found))


def test_names_are_english_for_imagenets_classes_only() -> None:
    assert english_names(["n01440764", "n15075141"]) == ["tench", "toilet tissue"]
    assert english_names(["cat", "n01440764", "n99999999"]) == ["cat", "tench", "n99999999"]
    assert english_names(["n00005787"]) == ["benthos"]  # of ImageNet-22k


# The sheet


def tile(*captions: Caption, size: tuple[int, int] = (40, 40), **options: Any) -> Tile:
    return Tile(Image.new("RGB", size, (200, 30, 30)), captions, **options)


def ink(sheet: Image.Image) -> tuple[int, int, int, int]:
    """The box of all that is drawn."""
    pixels = np.asarray(sheet).astype(int)
    marked = (np.abs(pixels - pixels[0, 0]) > 12).any(axis=2)
    rows, columns = np.flatnonzero(marked.any(axis=1)), np.flatnonzero(marked.any(axis=0))
    return rows[0], sheet.height - 1 - rows[-1], columns[0], sheet.width - 1 - columns[-1]


@pytest.mark.parametrize("across", [1, 3])
@pytest.mark.parametrize("word", ["short", "a very long text that no column has room for, " * 9, "unbroken" * 40])
def test_there_is_a_margin_around_whatever_is_written(across: int, word: str) -> None:
    panel = [tile(Caption(word, "100 %", 0.5), Caption(word, faint=True)), tile(size=(10, 300), frame=(0, 0, 0))]
    sheet = Sheet(word, [word, word], [panel] * 4, across, [word, word], [word]).draw()
    assert min(ink(sheet)) >= 20
    assert max(ink(sheet)[2:]) <= (700 if across == 1 else 40)


def test_images_keep_their_proportions_and_small_ones_their_pixels() -> None:
    pixels = np.zeros((2, 4, 3), np.uint8)
    pixels[0, 1] = 255
    sheet = np.asarray(Sheet("", [], [[Tile(Image.fromarray(pixels))]], 1, side=160).draw())
    white = (sheet == 255).all(axis=2)
    black = (sheet == 0).all(axis=2)
    assert black.sum() == 7 * 40 * 40
    rows, columns = np.flatnonzero(black.any(axis=1)), np.flatnonzero(black.any(axis=0))
    assert (len(rows), len(columns)) == (80, 160)
    assert white[rows[0] : rows[0] + 40, columns[0] + 40 : columns[0] + 80].all()


def test_letters_that_pillows_own_font_lacks() -> None:
    """Are drawn by a font of the system's where it has one. No name is one that cannot be drawn."""
    for text in ("café × ½", "金鱼", "рыба", "\U0001f41f", "a\nb", "\udcff"):
        drawn = Sheet(text, [text], [[tile(Caption(text, text))]], 1).draw()
        assert min(ink(drawn)) >= 20
