"""``--class-map`` and ``--soft-targets``: what images are trained on as, in place of the order of their folders."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from runs import RECIPE, refused, train

from vimfast.checkpoint import load_checkpoint
from vimfast.config import MixConfig, load_config
from vimfast.data.relabelling import numbered, open_mapped, read_class_map, read_soft_targets
from vimfast.data.source import Source, open_source
from vimfast.errors import UserError
from vimfast.inference import predict
from vimfast.prepare import run as prepare
from vimfast.samples import draw_samples
from vimfast.train.mixing import build_mixup

PLAIN = ("--mixup", "0", "--cutmix", "0", "--no-repeated-aug", "--steps-per-epoch", "2", "--epochs", "1")


@pytest.fixture(scope="module")
def shards(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["vimfast prepare", str(tree), "--out", str(folder), "--workers", "1"])
        prepare()
    return folder


@pytest.fixture
def flags(tree: Path, tmp_path: Path) -> tuple[str, ...]:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return ("--config", str(tmp_path / "recipe.yaml"), "--data-path", str(tree), *PLAIN)


@pytest.mark.parametrize("kind", ["tree", "shards"])
def test_numbers_of_a_class_map(kind: str, tree: Path, shards: Path, tmp_path: Path) -> None:
    data, path = {"tree": tree, "shards": shards}[kind], tmp_path / "map.txt"
    path.write_text("n03\n n09\n\nn01\nn02\n")
    plain, mapped = (open_mapped(data, "train", name) for name in ("", str(path)))
    assert list(mapped.classes) == ["n03", "n09", "n01", "n02"]
    assert [mapped.classes[label] for label in mapped.labels] == [plain.classes[label] for label in plain.labels]
    ids = np.array([30, 3, 15])
    images = mapped.read(ids)
    assert [mapped.classes[label] for label in images.labels] == [plain.classes[label] for label in plain.labels[ids]]
    assert all(map(np.array_equal, images.encoded, plain.read(ids).encoded))
    assert (mapped.identity, len(mapped), mapped.name(3)) == (plain.identity, 36, plain.name(3))
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"n01": 1, "n02": 0, "n03": 1}))
    merged = open_mapped(data, "val", str(path))
    assert list(merged.classes) == ["n02", "n01 / n03"]
    assert [plain.classes[label] == "n02" for label in open_mapped(data, "val").labels] == (merged.labels == 0).tolist()


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.txt", "n01\nn02\nn01\n", "has 'n01' twice"),
        ("a.txt", "\n", "has no class"),
        ("a.json", '{"n01": 1, "n02": 2}', "has the numbers 1 to 2 for 2 classes; count from 0"),
        ("a.json", '{"n01": "0"}', "cannot be used"),
        ("a.json", "n01\nn02", "cannot be used"),
        ("b.txt", "", "cannot be read"),
        ("a.txt", "n01\nn02\n", "has images of class 'n03', which --class-map"),
    ],
)
def test_class_maps_that_are_refused(name: str, text: str, sentence: str, tree: Path, tmp_path: Path) -> None:
    (tmp_path / name.replace("b", "a")).write_text(text)
    with pytest.raises(UserError, match=sentence):
        open_mapped(tree, "train", str(tmp_path / name))


def test_a_run_with_a_class_map(flags: tuple[str, ...], tree: Path, tmp_path: Path) -> None:
    """Its head, its checkpoint and what it predicts are numbered by the map, also classes without images."""
    (tmp_path / "map.txt").write_text("n03\nother\nn02\nn01\n")
    out = str(tmp_path / "run")
    run = train(*flags, "--class-map", str(tmp_path / "map.txt"), "--output_dir", out)
    assert len(run.model.head.weight) == 4
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pth")["classes"] == ["n03", "other", "n02", "n01"]
    assert predict(out, [tree / "val" / "n01"], top=4).images[0].guesses[0].name in ("n03", "other", "n02", "n01")
    sentence = refused(*flags, "--resume", f"{out}/checkpoint.pth")
    assert "was trained on 4 classes" in sentence
    assert read_class_map(tmp_path / "map.txt").numbers["n01"] == 3


def write_targets(folder: Path, source: Source, targets: np.ndarray) -> Path:
    """In another order than the source's, with a row more."""
    order = np.random.default_rng(0).permutation(len(source))
    names = [f"elsewhere/{source.name(i).rpartition(': ')[2]}".replace(".jpg", ".png") for i in order.tolist()]
    np.save(folder / "soft.npy", np.concatenate([targets[order], np.ones((1, targets.shape[1]), targets.dtype)]))
    with (folder / "soft.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["label", "image"], *([i, name] for i, name in enumerate(names)), ["x", "a/b.jpg"]])
    return folder / "soft.npy"


def some_targets(dtype: Any = np.float32) -> np.ndarray:
    drawn = np.random.default_rng(1).random((36, 3))
    return (drawn / drawn.sum(1, keepdims=True)).astype(dtype)


@pytest.mark.parametrize(("kind", "dtype"), [("tree", np.float32), ("shards", np.float16)])
def test_targets_find_their_images(kind: str, dtype: Any, tree: Path, shards: Path, tmp_path: Path) -> None:
    source, targets = open_source({"tree": tree, "shards": shards}[kind], "train"), some_targets(dtype)
    path = write_targets(tmp_path, source, targets)
    np.testing.assert_array_equal(read_soft_targets(path, source), targets)
    ids = np.array([7, 0, 35])
    assert numbered(source).read(ids).labels.tolist() == ids.tolist()
    images, labels = torch.rand(3, 3, 8, 8), torch.from_numpy(ids)
    cfg = MixConfig(mixup=0.0, cutmix=0.0, smoothing=0.1, soft_targets=str(path))
    smoothed = torch.from_numpy(targets[ids]).float() * 0.9 + 0.1 / 3
    torch.testing.assert_close(build_mixup(cfg, source, 0, 0)(images, labels, 0)[1], smoothed)
    cfg = MixConfig(mixup=0.8, cutmix=0.0, smoothing=0.0, soft_targets=str(path))
    mixed = build_mixup(cfg, source, 0, 0)(images, labels, 0)[1]
    share = (mixed[0, 0] - targets[35, 0]) / (targets[7, 0] - targets[35, 0])
    torch.testing.assert_close(mixed[0], torch.lerp(*(torch.from_numpy(targets[i]).float() for i in (35, 7)), share))
    bce = MixConfig(mixup=0.0, cutmix=0.0, bce_loss=True, soft_targets=str(path))
    as_they_are = build_mixup(bce, source, 0, 0)(images, labels, 0)[1]
    torch.testing.assert_close(as_they_are, torch.from_numpy(targets[ids]).float())


def test_a_run_on_soft_targets(flags: tuple[str, ...], tree: Path, tmp_path: Path) -> None:
    """Those that are one-hot train as labels do, to the bit; others do not."""
    source = open_source(tree, "train")
    weights = []
    for name, targets in (("", None), ("hard", np.eye(3, dtype=np.float32)[source.labels]), ("soft", some_targets())):
        more: tuple[str, ...] = ()
        if targets is not None:
            (tmp_path / name).mkdir()
            more = ("--soft-targets", str(write_targets(tmp_path / name, source, targets)))
        weights.append(train(*flags, *more, "--output_dir", "").model.head.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    cfg = load_config([*flags, "--soft-targets", str(tmp_path / "soft" / "soft.npy"), "--device", "cpu"])
    assert draw_samples(cfg, "train", 2, "").width > 100


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda rows, images: (rows[:, :2], images), r"is float32 \[36, 2\], and .* make it \[36, 3\]"),
        (lambda rows, images: (rows[:-1], images), r"is float32 \[35, 3\]"),
        (lambda rows, images: (rows.astype(int), images), "is int64"),
        (lambda rows, images: (rows * 2, images), "of .* add up to 2"),
        (lambda rows, images: (rows - 0.5, images), "the least is -"),
        (lambda rows, images: (rows[:-1], images[:-1]), "has no row for the image n03/n03_"),
        (lambda rows, images: (rows, [*images[:-1], images[0]]), "two images are called n01/n01_0"),
    ],
)
def test_targets_that_are_refused(change: Any, sentence: str, tree: Path, tmp_path: Path) -> None:
    source = open_source(tree, "train")
    rows, images = change(some_targets(), [source.name(i) for i in range(36)])
    np.save(tmp_path / "t.npy", rows)
    (tmp_path / "t.csv").write_text("image\n" + "\n".join(images))
    with pytest.raises(UserError, match=sentence):
        read_soft_targets(tmp_path / "t.npy", source)


def test_files_of_targets_that_are_refused(tree: Path, tmp_path: Path) -> None:
    source = open_source(tree, "train")
    with pytest.raises(UserError, match=r"nowhere.npy cannot be read .* takes a .npy file with a .csv beside it"):
        read_soft_targets(tmp_path / "nowhere.npy", source)
    np.save(tmp_path / "t.npy", some_targets())
    with pytest.raises(UserError, match=r"t.csv cannot be read"):
        read_soft_targets(tmp_path / "t.npy", source)
    (tmp_path / "t.csv").write_text("file\na/b.jpg\n")
    with pytest.raises(UserError, match="has no column 'image'"):
        read_soft_targets(tmp_path / "t.npy", source)
    np.save(tmp_path / "o.npy", np.array([{"a": 1}], object))  # which would run code
    shutil.copy(tmp_path / "t.csv", tmp_path / "o.csv")
    with pytest.raises(UserError, match="cannot be used"):
        read_soft_targets(tmp_path / "o.npy", source)
