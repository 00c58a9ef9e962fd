"""Several data sets mixed by weight: which images come how often, from whom, and resumed."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import write_image
from object_servers import BUCKET, Proxy, wait_for
from remote_shards import IMAGES, IN_SHARD, URL, assert_same, batches, settings
from runs import RECIPE, Stops, differences, refused, train

from vimfast.data.fetching import Timeline
from vimfast.data.mixed import MixedSource, _PartOfRoute, in_stores, open_data, portions
from vimfast.data.order import Order
from vimfast.data.source import BadImage, open_source
from vimfast.errors import UserError
from vimfast.shards.convert import convert
from vimfast.shards.format import ConversionOptions
from vimfast.stores import open_store


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
    assert [in_stores(path) for path in ("s3://b/x", "a:1 s3://b/x:1", "a:1 b:1")] == [True, True, False]


def test_a_weight_that_gives_no_image_is_refused(shards: Path, own: Path) -> None:
    with pytest.raises(UserError, match=r"the weights 1, 0\.0001 gives none of an epoch's 44 images"):
        open_data(f"{shards}:1 {own}:0.0001", "train")
    with pytest.raises(UserError, match="--order window reads one data set"):
        open_data(f"{shards}:1 {own}:1", "train").bounds()


def test_a_set_without_training_images_of_its_own_is_a_sentence(own: Path, tmp_path: Path) -> None:
    convert(own, tmp_path / "shards", ConversionOptions(), workers=1)
    with pytest.raises(UserError, match=r"nowhere.* does not exist"):
        open_data(f"{tmp_path}/shards:1 {tmp_path}/nowhere:1", "train")
    with pytest.raises(UserError, match=r"holds no 'val' split"):
        open_data(f"{tmp_path}/shards:1 {tmp_path}/shards:1", "val")


# In stores


OTHERS = f"s3://{BUCKET}/others"


@pytest.fixture
def others(remote: Proxy, shards: Path) -> Proxy:
    """A second data set in the bucket."""
    store = open_store(OTHERS)
    for path in shards.iterdir():
        if path.is_file():
            store.put(path.name, path)
    remote.requests.clear()
    return remote


@pytest.mark.parametrize("kind", ["stores", "store and folder", "no cache"])
def test_sets_in_stores_give_the_batches_of_the_disk(
    local: Path, shards: Path, own: Path, others: Proxy, tmp_path: Path, kind: str
) -> None:
    """Over the end of an epoch, in the place of a run that was stopped, and once all is in the cache."""
    second = {"store and folder": (own, own)}.get(kind, (shards, OTHERS))
    here = open_data(f"{local}:0.7 {second[0]}:0.3", "train")
    away = [f"{URL}:0.7 {second[1]}:0.3", "train", settings(tmp_path, 0 if kind == "no cache" else None)]
    steps = len(here) // 4 + 3
    wanted = batches(here, steps, mixture=here.mixture)
    assert_same(batches(source := open_data(*away), steps, mixture=source.mixture), wanted)
    assert source.identity == here.identity
    if kind != "no cache":
        wait_for(lambda: len(list(tmp_path.rglob("train-*.tar"))) == IMAGES // IN_SHARD + (kind == "stores"))
    others.requests.clear()
    assert_same(batches(open_data(*away), steps - 5, (0, 5), mixture=here.mixture), wanted[5:])
    if kind != "no cache":
        assert not [path for _, path, _ in others.requests if path.endswith(".tar")]


def test_validation_images_of_sets_in_stores(
    local: Path, own: Path, others: Proxy, shards: Path, tmp_path: Path
) -> None:
    """One set after the other, each shard once; and one that has none."""
    evaluated = {"shuffle": False, "drop_last": False}
    here = open_data(f"{local}:1 {shards}:1 {own}:1", "val")
    away = open_data(f"{URL}:1 {OTHERS}:1 {own}:1", "val", settings(tmp_path))
    assert away.classes == here.classes
    assert_same(batches(away, 7, **evaluated), batches(here, 7, **evaluated))
    assert [others.asked(name) for name in ("shards/val-000000.tar", "shards/val-000001.tar")] == [1, 1]
    assert others.asked("others/val-000000.tar") == 1


def test_shards_come_in_the_order_of_the_images_of_their_set(local: Path, shards: Path, tmp_path: Path) -> None:
    """Also for a run that begins late in an epoch: what has been read before comes last."""
    mixed = open_data(f"{local}:0.5 {shards}:0.5", "train")
    order = Order(len(mixed), 4, mixture=mixed.mixture)
    part = _PartOfRoute(order, 0, IMAGES)
    timeline = Timeline(part, np.arange(0, IMAGES + 1, IN_SHARD))
    for epoch, step in ((0, 0), (1, order.steps // 2), (4, order.steps - 1)):
        ids = np.concatenate([order.step(epoch, place)[1] for place in range(step, order.steps)])
        here = list(dict.fromkeys((ids[ids < IMAGES] // IN_SHARD).tolist()))
        coming = timeline.from_here(epoch, step, IMAGES)
        assert set(coming[: len(here)]) == set(here)
        assert sorted(coming) == list(range(IMAGES // IN_SHARD))


def test_a_cache_too_small_for_all_sets_is_refused(local: Path, others: Proxy, tmp_path: Path) -> None:
    size = sum(path.stat().st_size for path in local.glob("*.tar"))
    with pytest.raises(
        UserError, match=rf"--cache-size {size:,} cannot hold the [\d,]+ bytes .*; give .* or 0 to keep"
    ):
        open_data(f"{URL}:1 {OTHERS}:1", "train", settings(tmp_path, size))


def test_a_run_on_a_mixture_resumes_to_the_same_bits(
    shards: Path, own: Path, others: Proxy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A whole one from the disk, and one in two halves with a set in a store."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    flags = ("--config", str(recipe), "--steps-per-epoch", "3", "--eval-steps", "1", "--epochs", "2")
    data = ("--data-path", f"{shards}:0.6", f"{own}:0.4")
    whole = train(*flags, *data, "--output_dir", str(tmp_path / "whole"))
    assert isinstance(whole.loader.source, MixedSource)
    cache, folder = ("--cache-dir", str(tmp_path / "cache")), ("--output_dir", str(tmp_path / "halves"))
    away = ("--data-path", f"{OTHERS}:0.6", f"{own}:0.4", *cache)
    train(*flags, *away, *folder, control=Stops("epoch 1, step 1 "))
    assert f"all shards in {tmp_path / 'cache'}" in capsys.readouterr().out
    halves = (*cache, *folder, "--resume", "auto")
    refusal = refused(*flags, "--data-path", f"{OTHERS}:0.5", f"{own}:0.5", *halves)
    assert "holds other images, or in another order" in refusal
    train(*flags, *away, *folder, "--resume", "auto")
    assert not differences(tmp_path / "whole", tmp_path / "halves")
