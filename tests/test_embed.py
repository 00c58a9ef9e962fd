"""``vimfast embed``: the vectors are what the head reads, each beside the name of its image."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import write_image

import vimfast
from vimfast.commands import embed as command
from vimfast.errors import UserError
from vimfast.inference import embed, load_classifier, predict
from vimfast.models.hub import save_for_hub

NAME = "vim_tiny_patch16_224"
Main = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    save_for_hub(timm.create_model(NAME, img_size=(32, 48), depth=2, embed_dim=16, num_classes=3), folder)
    return folder


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Main:
    """The command: its exit status, and what it prints."""

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["vimfast embed", *map(str, words)])
        status = command.main()
        return status, "".join(capsys.readouterr())

    return run


@pytest.mark.parametrize("name", ["predict", "embed"])
def test_a_folder_is_listed_once(
    name: str, exported: Path, tmp_path: Path, main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file's kind was asked for twice."""
    write_image(tmp_path / "photos" / "cat.jpg", 0)
    asked: list[Path] = []
    is_dir = Path.is_dir
    monkeypatch.setattr(Path, "is_dir", lambda path: asked.append(path) or is_dir(path))
    if name == "embed":
        status, text = main(exported, tmp_path / "photos", "--out", tmp_path / "x.npy", "--device", "cpu")
        assert (status, "written to" in text) == (0, True)
    else:
        monkeypatch.setattr(sys, "argv", ["vimfast predict", str(exported), str(tmp_path / "photos")])
        assert import_module("vimfast.commands.predict").main() == 0
    assert [path for path in asked if "photos" in path.parts] == [tmp_path / "photos"]


def test_vectors_are_what_the_head_reads(exported: Path, tree: Path, tmp_path: Path, main: Main) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    out = tmp_path / "features.npy"
    status, text = main(exported, tree / "val", broken, "--out", out, "--batch-size", 4, "--device", "cpu")
    assert status == 1
    assert "broken.jpg" in text
    assert f"written to {out}" in text
    vectors = np.load(out)
    assert (vectors.shape, vectors.dtype) == ((15, 16), np.float32)
    rows = list(csv.DictReader((tmp_path / "features.csv").open(newline="")))
    assert [row["label"] for row in rows] == ["n01"] * 5 + ["n02"] * 5 + ["n03"] * 5
    classifier = load_classifier(exported, device="cpu")
    with torch.no_grad():
        head: Any = classifier.model.get_classifier()  # type: ignore[operator]
        wanted = head(torch.from_numpy(vectors)).softmax(1)
    seen = predict(classifier, [row["image"] for row in rows], top=3).images
    got = torch.tensor([[g.probability for g in sorted(s.guesses, key=lambda g: g.number)] for s in seen])
    torch.testing.assert_close(got, wanted)


def test_the_same_from_python(exported: Path, tmp_path: Path) -> None:
    for i in range(3):
        write_image(tmp_path / f"{i}.jpg", i)
    found = vimfast.embed(exported, [tmp_path], batch_size=2)
    assert [path.name for path in found.images] == ["0.jpg", "1.jpg", "2.jpg"]
    alone = vimfast.embed(exported, [tmp_path / "1.jpg", tmp_path / "nowhere.jpg"])
    np.testing.assert_allclose(alone.features, found.features[1:2], rtol=1e-4, atol=1e-5)
    assert [path.name for path, _ in alone.unreadable] == ["nowhere.jpg"]
    assert embed(exported, []).features.shape == (0, 16)


def test_what_is_refused(exported: Path, tmp_path: Path, main: Main) -> None:
    write_image(tmp_path / "a.jpg", 1)
    with pytest.raises(UserError, match=r"--out is features.txt; give a file name ending in .npy"):
        main(exported, tmp_path, "--out", "features.txt")
    with pytest.raises(UserError, match="vimfast embed CKPT IMAGE"):
        main(tmp_path / "a.jpg", exported, "--out", "f.npy")
    with pytest.raises(UserError, match=r"--out .* is in a folder that does not exist"):
        main(exported, tmp_path, "--out", tmp_path / "nowhere" / "f.npy")
    save_for_hub(timm.create_model(NAME, img_size=32, depth=1, embed_dim=16, global_pool=""), tmp_path / "tokens")
    with pytest.raises(UserError, match="makes 5 x 16 features of an image; use one that pools them"):
        main(tmp_path / "tokens", tmp_path / "a.jpg", "--out", tmp_path / "f.npy")
    assert not list(tmp_path.glob("*.npy"))
