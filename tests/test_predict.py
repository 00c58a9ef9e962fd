"""``vimfast predict``: checkpoints of all kinds, images from anywhere, and the pixels of the trainer's evaluation."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import write_image
from PIL import Image
from runs import RECIPE, call, train
from safetensors.torch import save_file

from vimfast import export
from vimfast.commands import predict as command
from vimfast.errors import UserError
from vimfast.inference import Classifier, _recognized, embed, find_images, load_classifier, predict
from vimfast.models import create_model
from vimfast.models.registry import MODELS

NAME = "vim_tiny_patch16_224"


@pytest.fixture(scope="module")
def run(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs, with both checkpoints, whose average has left the initial weights behind."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    flags = ("--config", str(folder / "recipe.yaml"), "--data-path", str(tree), "--model-ema-decay", "0.5")
    train(*flags, "--output_dir", str(folder / "run"))
    return folder / "run"


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command: its exit status, stdout and stderr."""

    def run_it(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vimfast predict", *map(str, words)])
        status = command.main()
        return status, *capsys.readouterr()

    return run_it


def probabilities(classifier: Classifier, folder: Path) -> torch.Tensor:
    """[images, classes] of all images of a folder."""
    seen = predict(classifier, [folder], top=1000, batch_size=4).images
    by_number = [sorted(image.guesses, key=lambda guess: guess.number) for image in seen]
    return torch.tensor([[guess.probability for guess in guesses] for guesses in by_number])


def evaluate(run: Path, data: Path, *flags: str) -> Any:
    checkpoint = run / "best_checkpoint.pth"
    flags = ("--config", str(run / "config.yaml"), "--resume", str(checkpoint), "--eval", *flags)
    return train(*flags, "--data-path", str(data), "--output_dir", "").evaluated


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_a_run_folder_predicts_what_its_evaluation_does(run: Path, tree: Path, weights: Any) -> None:
    evaluated = evaluate(run, tree)
    model = evaluated.models["" if weights == "raw" else "ema_"].eval()
    with torch.no_grad():
        wanted = torch.cat([model(batch.images).softmax(1) for batch in evaluated.loader.epoch(0)])
    classifier = load_classifier(run, weights=weights)
    assert (classifier.origin, classifier.weights) == (run / "best_checkpoint.pth", weights)
    assert list(classifier.classes) == ["n01", "n02", "n03"]
    torch.testing.assert_close(probabilities(classifier, tree / "val"), wanted)
    # Another batch has other sums, and all else is the same.
    assert load_classifier(run).weights == "ema"


@pytest.mark.parametrize("size", [48, 224])
def test_the_pixels_are_those_of_the_trainers_evaluation(run: Path, textured: Path, tmp_path: Path, size: int) -> None:
    """Of images of many shapes and kinds, at small and large inputs, with another crop than the default's."""
    for i in range(3):
        shutil.copytree(textured / "train" / "a", tmp_path / "data" / "val" / f"n0{i + 1}")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["model"]["input_size"], settings["data"]["eval_crop_ratio"] = size, 0.9
    state = torch.load(run / "best_checkpoint.pth", weights_only=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(settings))
    torch.save({**state, "config": settings}, tmp_path / "run" / "best_checkpoint.pth")
    evaluated = evaluate(tmp_path / "run", tmp_path / "data")
    classifier = load_classifier(tmp_path / "run")
    paths = find_images([tmp_path / "data" / "val"])[0]
    assert classifier.view.crop == evaluated.loader.view.crop
    wanted = torch.cat([batch.images for batch in evaluated.loader.epoch(0)])
    got = torch.cat([batch.images for batch in classifier.loader(paths, 5).epoch(0)])
    assert wanted.shape == (21, 3, size, size)
    assert torch.equal(got, wanted)


def test_which_checkpoint_of_a_run_folder(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    best = tmp_path / "run" / "best_checkpoint.pth"
    content = bytearray(best.read_bytes())
    content[len(content) // 2] ^= 1
    best.write_bytes(content)
    classifier = load_classifier(tmp_path / "run", weights="raw")
    assert classifier.origin == tmp_path / "run" / "checkpoint.pth"
    (note,) = classifier.notes
    assert note.startswith(f"{best} is no checkpoint, or a damaged one")
    assert note.endswith(f"; taking {best.with_name('checkpoint.pth')} instead")
    best.unlink()
    assert load_classifier(tmp_path / "run").origin == tmp_path / "run" / "checkpoint.pth"
    for path in (tmp_path / "run").glob("checkpoint*.pth"):
        path.unlink()
    with pytest.raises(UserError, match=r"is a folder without a checkpoint; give a run folder"):
        load_classifier(tmp_path / "run")


def test_an_average_that_has_learned_little_is_not_taken_unasked(run: Path, tmp_path: Path) -> None:
    assert load_classifier(run).weights == "ema"
    state = torch.load(run / "best_checkpoint.pth", weights_only=True)
    state["config"]["ema"]["model_ema_decay"] = 0.99
    torch.save(state, tmp_path / "young.pth")
    unasked = load_classifier(tmp_path / "young.pth")
    assert unasked.weights == "raw"
    (note,) = unasked.notes
    updates = state["epoch"] * state["steps"] + state["step"]
    assert f"are still {0.99**updates:.0%} initial weights, so the trained ones are taken" in note
    for asked in ("raw", "ema"):
        assert load_classifier(tmp_path / "young.pth", weights=asked).notes == []


def test_an_exported_folder(run: Path, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "exported"
    monkeypatch.setattr(sys, "argv", ["vimfast export", str(run / "best_checkpoint.pth"), "--out", str(out)])
    export.main()
    own, exported = load_classifier(run, weights="raw"), load_classifier(out)
    assert (exported.classes, exported.weights) == (own.classes, "raw")
    assert exported.view == own.view
    torch.testing.assert_close(probabilities(exported, tree / "val"), probabilities(own, tree / "val"))
    with pytest.raises(UserError, match="holds no averaged weights; drop --weights ema"):
        load_classifier(out, weights="ema")
    (out / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is not JSON"):
        load_classifier(out)


def test_an_export_replaces_nothing_but_an_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It wrote into any folder, such as one of photos, whose config.json was lost."""
    config = {"model": {"model": "resnet18", "input_size": 64}}
    torch.save({"model": create_model("resnet18", num_classes=3).state_dict(), "config": config}, tmp_path / "run.pth")
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["vimfast export", str(tmp_path / "run.pth"), "--out", str(out)])
    out.mkdir()
    export.main()
    written = (out / "config.json").read_bytes()
    (out / "README.md").touch()
    (out / "config.json").write_bytes(written.replace(b"64", b"96"))
    export.main()
    assert (out / "config.json").read_bytes() == written
    for other in ('{"architectures": []}', "[]", "{"):
        (out / "config.json").write_text(other)
        with pytest.raises(UserError, match=r"--out .*/out holds other files than an export's; give a new folder"):
            export.main()
        assert (out / "config.json").read_text() == other
    shutil.rmtree(out)
    write_image(out / "photo.jpg", 1)
    with pytest.raises(UserError, match="holds other files"):
        export.main()
    assert [path.name for path in out.iterdir()] == ["photo.jpg"]
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], str(out / "photo.jpg")])
    with pytest.raises(UserError, match=r"photo.jpg is a file; give a folder"):
        export.main()


def test_an_exported_model_is_evaluated_as_it_was_in_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever timm says of its own weights of that name."""
    model = create_model("resnet18", num_classes=3)
    config = {"model": {"model": "resnet18", "input_size": 64}, "data": {"eval_crop_ratio": 0.8}}
    torch.save({"model": model.state_dict(), "config": config}, tmp_path / "run.pth")
    monkeypatch.setattr(sys, "argv", ["vimfast export", str(tmp_path / "run.pth"), "--out", str(tmp_path / "out")])
    export.main()
    told = json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]
    assert (told["crop_pct"], told["interpolation"], told["mean"]) == (0.8, "bicubic", [0.485, 0.456, 0.406])
    assert load_classifier(tmp_path / "out").view == load_classifier(tmp_path / "run.pth").view


def test_a_published_checkpoint(tmp_path: Path) -> None:
    """Weights alone are recognized by their shapes; 1,000 classes are ImageNet's, in English."""
    torch.manual_seed(0)
    model = create_model(NAME).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "alone.pth")
    args = argparse.Namespace(model=NAME, input_size=224, eval_crop_ratio=0.9)
    torch.save({"model": model.state_dict(), "args": args}, tmp_path / "vim.pth")
    write_image(tmp_path / "a.jpg", 1, (300, 260))
    alone, vim = (load_classifier(tmp_path / f"{name}.pth") for name in ("alone", "vim"))
    assert (len(alone.classes), alone.classes[0], alone.labels[0]) == (1000, "n01440764", "tench")
    assert (alone.view.crop.ratio, vim.view.crop.ratio) == (0.875, 0.9)
    (image,) = predict(alone, [tmp_path / "a.jpg"], top=3).images
    (batch,) = alone.loader([tmp_path / "a.jpg"]).epoch(0)
    with torch.no_grad():
        wanted = model(batch.images)[0].softmax(0).topk(3)
    assert [guess.number for guess in image.guesses] == wanted.indices.tolist()
    assert [guess.probability for guess in image.guesses] == pytest.approx(wanted.values.tolist(), rel=1e-4)
    assert [guess.label for guess in image.guesses] == [alone.labels[guess.number] for guess in image.guesses]


def test_every_named_vision_mamba_is_recognized_by_its_weights() -> None:
    for name in MODELS:
        assert MODELS[_recognized(create_model(name, device="meta").state_dict())] == MODELS[name]
    other = create_model(NAME, device="meta", depth=4).state_dict()
    assert _recognized(other) == _recognized({"head.weight": torch.zeros(1)}) == ""


def test_one_path_is_one_path(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Letter by letter, its dot would be the folder that one is in, with all images there."""
    write_image(tmp_path / "cat.jpg", 1)
    write_image(tmp_path / "other.jpg", 2)
    monkeypatch.chdir(tmp_path)
    classifier = load_classifier(run)
    for path in ("cat.jpg", Path("cat.jpg")):
        seen = predict(classifier, path)
        assert ([image.path for image in seen.images], seen.unreadable) == ([Path("cat.jpg")], [])
        assert embed(classifier, path).images == [Path("cat.jpg")]
    for other in (Image.open("cat.jpg"), np.zeros((9, 9, 3), np.uint8), b"cat.jpg"):
        with pytest.raises(
            UserError, match=r"^a \w+ is no path of an image; give files or folders; for images in memory"
        ):
            predict(classifier, [other])


def test_weights_alone_need_the_name_of_their_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(create_model("resnet18", num_classes=3).state_dict(), tmp_path / "resnet.safetensors")
    with pytest.raises(UserError, match=r"resnet.safetensors does not say which model it is of; give its --model"):
        load_classifier(tmp_path / "resnet.safetensors")
    classifier = load_classifier(tmp_path / "resnet.safetensors", model="resnet18", input_size=64)
    assert classifier.classes == ["class 0", "class 1", "class 2"]
    write_image(tmp_path / "a.jpg", 1)
    (image,) = predict(classifier, [tmp_path / "a.jpg"]).images
    assert sum(guess.probability for guess in image.guesses) == pytest.approx(1)
    with pytest.raises(UserError, match=r"is of another model.*; give the --model it is of; if that had other options"):
        load_classifier(tmp_path / "resnet.safetensors", model="resnet34")


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_what_cannot_be_read_does_not_stop_the_rest(run: Path, tmp_path: Path, batch_size: int) -> None:
    for i in range(4):
        write_image(tmp_path / "album" / f"{i}.jpg", i)
    write_image(tmp_path / "album" / "deep" / "er" / "4.png", 4)
    (tmp_path / "album" / "2a.jpg").write_bytes(b"no image")
    (tmp_path / "album" / "2b.jpg").write_bytes((tmp_path / "album" / "2.jpg").read_bytes()[:-200])
    (tmp_path / "album" / "notes.txt").write_text("no image either")
    (tmp_path / "album" / ".hidden.jpg").write_bytes(b"")
    (tmp_path / "album" / "deep" / "round").symlink_to(tmp_path / "album")
    (tmp_path / "empty").mkdir()
    wanted = [tmp_path / "none.jpg", tmp_path / "album", tmp_path / "empty", tmp_path / "album" / "0.jpg"]
    classifier = load_classifier(run)
    done = []
    found = predict(classifier, wanted, batch_size=batch_size, report=done.append)
    assert [str(image.path.relative_to(tmp_path / "album")) for image in found.images] == [
        *("0.jpg", "1.jpg", "2.jpg", "3.jpg"),
        *("deep/er/4.png", "0.jpg"),
    ]
    assert done[-1] == 6
    assert [(path.name, why.removeprefix(str(path)).split(" (")[0]) for path, why in found.unreadable] == [
        ("none.jpg", " does not exist"),
        ("empty", " holds no images"),
        ("2a.jpg", " is not a readable image"),
        ("2b.jpg", " is not a readable image"),
    ]
    # Each has its own probabilities, whatever was left out before it.
    for image in found.images:
        (alone,) = predict(classifier, [image.path]).images
        for one, other in zip(image.guesses, alone.guesses, strict=True):
            assert one.probability == pytest.approx(other.probability, abs=1e-5)


def test_only_what_cannot_be_read(run: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no image")
    assert predict(run, [tmp_path / "a.jpg"]).images == []
    assert [path.name for path, _ in predict(run, [tmp_path / "a.jpg", tmp_path / "b.jpg"]).unreadable] == [
        "b.jpg",
        "a.jpg",
    ]


def test_the_command(main: Callable[..., tuple[int, str, str]], run: Path, tree: Path, tmp_path: Path) -> None:
    images = sorted((tree / "val" / "n01").iterdir())
    status, out, err = main(run, *images, "--json", "--top", 2, "--grid", tmp_path / "grid.png")
    report = json.loads(out)
    assert err.splitlines()[-1] == f"written to {tmp_path / 'grid.png'}"
    assert (status, report["unreadable"], report["weights"]) == (0, [], "ema")
    assert [image["image"] for image in report["images"]] == [str(path) for path in images]
    for image, seen in zip(report["images"], predict(run, images, top=2).images, strict=True):
        assert image["guesses"] == [guess._asdict() for guess in seen.guesses]
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.mode == "RGB"
        assert grid.width > 5 * 176
    status, out, err = main(run, images[0], tmp_path / "none.jpg", "--weights", "raw")
    assert (status, err) == (1, f"warning: {tmp_path / 'none.jpg'} does not exist\n")
    assert "best_checkpoint.pth, trained weights" in " ".join(out.split())  # the table may be narrower than a path
    assert out.count("%") == 3
    with pytest.raises(
        UserError, match=r"no/grid.png is in a folder that does not exist; give a file in one that does"
    ):
        main(run, images[0], "--grid", tmp_path / "no" / "grid.png")


def test_images_that_are_not_there_are_said_before_a_model_is_read(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pth").touch()
    with pytest.raises(UserError, match=r"a.jpg does not exist; give images, or folders of images"):
        command.check_order(tmp_path / "checkpoint.pth", [tmp_path / "a.jpg"], "predict")
    images = [tmp_path / "a.jpg", tmp_path / "b.jpg", tmp_path / "c"]
    with pytest.raises(UserError, match=r"a.jpg does not exist, nor do the 2 others; give"):
        command.check_order(tmp_path / "checkpoint.pth", images, "predict")
    images[2].mkdir()
    command.check_order(tmp_path / "checkpoint.pth", images, "predict")  # the others are a warning each


def test_names_that_are_odd(main: Callable[..., tuple[int, str, str]], run: Path, tmp_path: Path) -> None:
    for name in (b"a\nb.jpg", b"\xff.jpg"):
        write_image(tmp_path / "image.jpg", 1)
        os.rename(tmp_path / "image.jpg", os.path.join(os.fsencode(tmp_path), name))
    (tmp_path / ".seen").mkdir()  # where no images are looked for
    status, out, _ = main(run, tmp_path, "--grid", tmp_path / ".seen" / "grid.png")
    assert status == 0
    assert out.endswith(f"\nwritten to {tmp_path / '.seen' / 'grid.png'}\n")
    flat = "".join(line.split("  ")[0].strip() for line in out.splitlines())
    assert "a\\nb.jpg" in flat
    assert "\\udcff.jpg" in flat
    status, out, _ = main(run, tmp_path, "--json")
    assert [Path(image["image"]).name for image in json.loads(out)["images"]] == ["a\nb.jpg", "\udcff.jpg"]


def test_swapped_words_are_noticed(main: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """It was a damaged checkpoint."""
    write_image(tmp_path / "cat.jpg", 1)
    with pytest.raises(UserError, match=r"cat\.jpg is an image; the checkpoint comes first: vimfast predict CKPT"):
        main(tmp_path / "cat.jpg", tmp_path)


def test_from_the_command_line(tmp_path: Path) -> None:
    write_image(tmp_path / "a.jpg", 1)
    done = call("vimfast", "predict", str(tmp_path), str(tmp_path / "a.jpg"), ok=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {tmp_path} is a folder without a checkpoint; give a run folder")
