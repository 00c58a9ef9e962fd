"""Several data sets mixed by weight: which images come how often, from whom, and resumed."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import write_image
from runs import RECIPE, Stops, differences, refused, train

from vimfast.data.mixed import MixedSource, open_data, portions
from vimfast.data.order import Order
from vimfast.data.source import BadImage, open_source
from vimfast.errors import UserError
from vimfast.shards.convert import convert
from vimfast.shards.format import ConversionOptions


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images of its own, with a class of the shared tree and one more, and no val/. Do not write to it."""
    root = tmp_path_factory.mktemp("own")
    for label, name in enumerate(("a1", "n02")):
        for i in range(4):
            write_image(root / "train" / name / f"{i}.JPEG", 50 * label + i, (70, 60))
    return root


def test_a_mixture_has_the_images_of_its_sets(shards: Path, own: Path) -> None:
    mixed = open_data(f"{shards}:0.7 {own}:0.3", "train")
    parts = [open_source(shards, "train"), open_source(own, "train")]
    assert mixed.classes == ["a1", "n01", "n02", "n03"]
    assert len(mixed) == 44
    assert mixed.mixture == ((36, 31), (8, 13))  # 30.8 and 13.2 of an epoch of 44
    ids = np.array([43, 0, 35, 36, 7, 36])
    images = mixed.read(ids)
    for place, i in enumerate(ids.tolist()):
        source, local = (parts[0], i) if i < 36 else (parts[1], i - 36)
        theirs = source.read(np.array([local]))
        assert np.array_equal(images.encoded[place], theirs.encoded[0])
        assert np.array_equal(images.sizes[place], theirs.sizes[0])
        assert mixed.classes[images.labels[place]] == source.classes[theirs.labels[0]]
        assert mixed.name(i) == source.name(local)
        assert mixed.labels[i] == images.labels[place]
    mixed.verify(ids, images.encoded)
    assert mixed.class_counts().tolist() == np.bincount(mixed.labels).tolist() == [4, 12, 16, 12]
    val = open_data(f"{shards}:0.7 {own}:0.3", "val")
    assert (len(val), val.classes) == (15, mixed.classes)


def test_sets_of_the_same_classes_keep_them(shards: Path, tree: Path) -> None:
    mixed = open_data(f"{shards}:1 {tree}:3", "val")
    assert (mixed.classes, len(mixed)) == (["n01", "n02", "n03"], 30)


def test_an_epoch_shows_the_sets_by_weight(shards: Path, own: Path) -> None:
    mixed = open_data(f"{shards}:1 {own}:1", "train")
    order = Order(len(mixed), 44, mixture=mixed.mixture)
    ids = order.step(0, 0)[1]
    assert (ids < 36).sum() == (ids >= 36).sum() == 22
    assert len(np.unique(ids[ids < 36])) == 22
    assert set(np.bincount(ids[ids >= 36] - 36).tolist()) == {2, 3}


def test_a_bad_image_is_named_by_its_number_in_the_mixture(shards: Path, own: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(own, tmp_path / "bad"))
    (bad / "train/a1/2.JPEG").write_bytes(b"no image")
    with pytest.raises(BadImage, match=r"a1/2\.JPEG is not a readable image") as caught:
        open_data(f"{shards}:1 {bad}:1", "train").read(np.arange(44))
    assert caught.value.image == 38


def test_what_is_a_mixture(tmp_path: Path) -> None:
    assert portions("shards") == portions("shards:0.5") == portions("s3://bucket/shards") == []
    (tmp_path / "my data:1").mkdir()
    assert portions(f"{tmp_path}/my data:1") == []
    assert [tuple(part) for part in portions("s3://b/x:2 /c:d:1e-3")] == [("s3://b/x", 2.0), ("/c:d", 0.001)]
    for words, which in (("a b", "a"), ("a:1 b", "b"), ("a:0 b:1", "a:0"), ("a:1 b:1.2.3", "b:1.2.3")):
        with pytest.raises(UserError, match=f"2 data sets, and '{which}' has no weight above 0; give each its weight"):
            portions(words)
    with pytest.raises(UserError, match=r"s3://b/x is one of several data sets; copy it to a disk"):
        open_data("s3://b/x:1 y:1", "train")


def test_a_weight_that_gives_no_image_is_refused(shards: Path, own: Path) -> None:
    with pytest.raises(UserError, match=r"the weights 1, 0\.0001 gives none of an epoch's 44 images"):
        open_data(f"{shards}:1 {own}:0.0001", "train")
    with pytest.raises(UserError, match="--order window reads one data set"):
        open_data(f"{shards}:1 {own}:1", "train").bounds()


def test_a_run_on_a_mixture_resumes_to_the_same_bits(shards: Path, own: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    flags = ("--config", str(recipe), "--steps-per-epoch", "3", "--eval-steps", "1", "--epochs", "2")
    data = ("--data-path", f"{shards}:0.6", f"{own}:0.4")
    whole = train(*flags, *data, "--output_dir", str(tmp_path / "whole"))
    assert isinstance(whole.loader.source, MixedSource)
    train(*flags, *data, "--output_dir", str(tmp_path / "halves"), control=Stops("epoch 1, step 1 "))
    halves = ("--output_dir", str(tmp_path / "halves"), "--resume", "auto")
    other = refused(*flags, "--data-path", f"{shards}:0.5", f"{own}:0.5", *halves)
    assert "holds other images, or in another order" in other
    train(*flags, *data, *halves)
    assert not differences(tmp_path / "whole", tmp_path / "halves")


def test_a_set_without_training_images_of_its_own_is_a_sentence(own: Path, tmp_path: Path) -> None:
    convert(own, tmp_path / "shards", ConversionOptions(), workers=1)
    with pytest.raises(UserError, match=r"nowhere.* does not exist"):
        open_data(f"{tmp_path}/shards:1 {tmp_path}/nowhere:1", "train")
    with pytest.raises(UserError, match=r"holds no 'val' split"):
        open_data(f"{tmp_path}/shards:1 {tmp_path}/shards:1", "val")
