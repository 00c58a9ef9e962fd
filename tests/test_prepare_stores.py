"""``vimfast prepare`` from a store and to one: the bytes of a disk, whatever happens on the way."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import visible, write_image
from object_servers import BUCKET, Proxy, Trouble

from vimfast import prepare
from vimfast.cli import run_main
from vimfast.errors import UserError
from vimfast.shards import convert as conversions
from vimfast.shards import stored, workers
from vimfast.shards.convert import classes_without_images, convert
from vimfast.shards.format import MANIFEST, ConversionOptions
from vimfast.stores import open_store

OPTIONS = ConversionOptions(shard_samples=10)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, one without validation images, an image that is a PNG, and files that are none. Do not write."""
    root = tmp_path_factory.mktemp("images")
    for label, name in enumerate(("a", "b", "c")):
        for i in range(12):
            write_image(root / f"train/{name}/deeper/{i}.JPEG", 20 * label + i, (50 + i, 40))
        for i in range(0 if name == "b" else 4):
            write_image(root / f"val/{name}/{i}.JPEG", 300 + 20 * label + i)
    write_image(root / "train/a/odd.png", 7)
    (root / "train/a/odd.png").rename(root / "train/a/odd.JPEG")
    (root / "train/a/notes.txt").write_text("no image")
    (root / "train/a/.hidden.JPEG").write_text("of macOS")
    return root


@pytest.fixture(scope="module")
def expected(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("expected")
    convert(images, out, OPTIONS, workers=1)
    return visible(out)


@pytest.fixture
def source(images: Path, s3: Proxy, tmp_path: Path) -> str:
    """The images in a store."""
    url = f"s3://{BUCKET}/{tmp_path.name}/raw"
    store = open_store(url)
    for path in images.rglob("*.*"):
        store.put(str(path.relative_to(images)), path)
    stored.store_at.cache_clear()  # of a server that is gone
    return url


@pytest.fixture
def out(s3: Proxy, tmp_path: Path) -> str:
    stored.store_at.cache_clear()
    return f"s3://{BUCKET}/{tmp_path.name}/shards"


def held(url: str, folder: Path) -> dict[str, bytes]:
    """What :func:`visible` says of a copy of it."""
    store = open_store(url)
    folder.mkdir(parents=True)
    for entry in store.entries():
        if "/" not in entry.name:
            (folder / entry.name).write_bytes(store.read(entry.name))
    return visible(folder)


def test_from_store_to_store_the_bytes_are_those_of_the_disk(
    source: str, out: str, expected: dict[str, bytes], s3: Proxy, tmp_path: Path
) -> None:
    said = convert(source, out, OPTIONS, workers=1)
    summary = "37 train images in 4 shards, 1 converted to RGB JPEG, 8 val images in 1 shard"
    assert said.startswith(f"{out} is complete: {summary}")
    assert held(out, tmp_path / "copy") == expected
    s3.requests.clear()
    assert f"{out} is complete already: 37 train images" in convert(source, out, OPTIONS, workers=1)
    assert not [request for request in s3.requests if request[0] in ("PUT", "POST", "DELETE")]
    assert not [request for request in s3.requests if ".JPEG" in request[1]], "images are not read again"
    assert list(classes_without_images(out)) == ["class b has no images in val"]


def test_while_images_are_listed_it_is_said_how_many(
    source: str, out: str, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of ImageNet's 1.3 million objects it takes minutes, and of its folders on a network disk."""
    monkeypatch.setattr(conversions, "_LISTED", 10)
    monkeypatch.setattr(workers, "_SECONDS_BETWEEN_LINES", 0.0)
    conversions._make_plans(source, OPTIONS, Path(out), 1)
    said = re.findall(r"^(\d+) objects of train listed, [\d,]+ objects/s$", capsys.readouterr().err, re.MULTILINE)
    assert said[:-1] == ["10", "20", "30"]
    conversions._make_plans(images, OPTIONS, Path(out), 1)
    line = r"^(\d) of 3 classes of train listed, [\d,]+ classes/s, [\d:]+ left$"
    assert re.findall(line, capsys.readouterr().err, re.MULTILINE)[:3] == ["1", "2", "3"]


def test_each_end_may_be_a_disk(
    source: str, images: Path, s3: Proxy, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the stores of two kinds. Google's API is S3's where it speaks XML, as obstore does."""
    monkeypatch.setenv("GOOGLE_BASE_URL", s3.url)
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", "token")
    convert(source, tmp_path / "disk", OPTIONS, workers=1)
    assert visible(tmp_path / "disk") == expected
    for number, root in enumerate((images, source)):
        out = f"gs://{BUCKET}/{tmp_path.name}/{number}/"
        convert(root, out, OPTIONS, workers=1)
        assert held(out, tmp_path / "copies" / str(number)) == expected


def test_what_is_missing_in_the_store_is_made_again(
    images: Path, out: str, expected: dict[str, bytes], s3: Proxy, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    convert(images, out, OPTIONS, workers=1)
    store = open_store(out)
    store.remove("train-000001.tar")
    store.put("train-000002.tar", b"cut off")
    store.remove("train-000003.idx")
    store.remove(".prepare/val-000000.npz")
    store.remove(MANIFEST)
    s3.requests.clear()
    convert(images, out, OPTIONS, workers=1)
    written = {path.rpartition("/")[2] for method, path, _ in s3.requests if method == "PUT"}
    assert {name for name in written if name.endswith(".tar")} == {
        *(f"train-00000{i}.tar" for i in (1, 2, 3)),
        "val-000000.tar",
    }
    assert held(out, tmp_path / "copy") == expected
    said = capfd.readouterr().err
    assert f"{out}/train-000002.tar has 7 bytes, not" in said
    assert "vimfast-" not in said.replace("vimfast-prepare", ""), "no temporary folder is named"


def test_shards_of_something_else_are_refused_or_deleted(
    images: Path, out: str, expected: dict[str, bytes], tmp_path: Path
) -> None:
    convert(images, out, ConversionOptions(shard_samples=20), workers=1)
    with pytest.raises(UserError, match=rf"{out} holds shards made with .*--shard-samples 20, not with .*; add --over"):
        convert(images, out, OPTIONS, workers=1)
    store = open_store(out)
    store.put("train-000009.tar", b"of a larger set")
    store.put("mine.txt", b"stays")
    convert(images, out, OPTIONS, workers=1, overwrite=True)
    found = held(out, tmp_path / "copy")
    assert found.pop("mine.txt") == b"stays"
    assert found == expected
    for name in (MANIFEST, ".prepare/plan.json"):
        store.remove(name)
    with pytest.raises(UserError, match=f"{out} holds shards of unknown origin"):
        convert(images, out, OPTIONS, workers=1)


def test_a_store_that_throttles_is_waited_for(
    source: str, out: str, expected: dict[str, bytes], s3: Proxy, tmp_path: Path
) -> None:
    s3.troubles.append(Trouble(".JPEG", times=5, status=503))
    s3.troubles.append(Trouble(".tar", times=2, status=503))
    convert(source, out, OPTIONS, workers=1)
    assert held(out, tmp_path / "copy") == expected


def test_what_goes_wrong_is_one_sentence(
    source: str, images: Path, out: str, s3: Proxy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=f"{source}/train has no images in train/<class>/ or val/<class>/"):
        convert(f"{source}/train", out, OPTIONS, workers=1)
    with pytest.raises(UserError, match=rf"--out {source}/train/x is inside the images of {source}"):
        convert(source, f"{source}/train/x", OPTIONS, workers=1)
    open_store(source).put("val/d/1.JPEG", b"")
    with pytest.raises(UserError, match=f"{source}/val/d is not a training class"):
        convert(source, out, OPTIONS, workers=1)
    monkeypatch.setattr("sys.argv", ["vimfast-prepare", str(images), "--out", out, "--index-only"])
    with pytest.raises(SystemExit) as status:
        run_main(prepare.run)
    assert status.value.code == 2
    assert "--index-only links to tars of this machine" in capsys.readouterr().err


def test_an_unreadable_image_leaves_no_manifest(source: str, out: str, capfd: pytest.CaptureFixture[str]) -> None:
    open_store(source).put("train/a/cut.JPEG", b"no image")
    with pytest.raises(UserError, match="1 of 46 images cannot be read, listed above"):
        convert(source, out, OPTIONS, workers=1)
    assert f"{source}/train/a/cut.JPEG: " in capfd.readouterr().err
    assert open_store(out).find(MANIFEST) is None
    convert(source, out, OPTIONS, workers=1, skip_bad=True)
    assert open_store(out).find(MANIFEST) is not None
