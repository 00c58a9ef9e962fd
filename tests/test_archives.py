"""``vimfast prepare`` from ImageNet's own archives: small ones of that very layout, against the unpacked folders."""

from __future__ import annotations

import builtins
import io
import os
import re
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import visible, write_image
from object_server import Server
from object_servers import BUCKET, Proxy
from scipy.io import savemat

from vimfast.errors import UserError
from vimfast.shards import archives, homes, stored, workers
from vimfast.shards.convert import convert
from vimfast.shards.format import ConversionOptions, read_manifest
from vimfast.stores import open_store

WNIDS = ("n01440764", "n01443537", "n02110341")
IDS = {"n01440764": 3, "n01443537": 1, "n02110341": 2}  # ILSVRC2012_ID: not in the order of the names
OPTIONS = ConversionOptions(shard_samples=5)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ImageNet's names; one training image is a PNG, as one of ImageNet's is. Do not write into it."""
    root = tmp_path_factory.mktemp("unpacked")
    for label, wnid in enumerate(WNIDS):
        for i in range(5):
            write_image(root / "train" / wnid / f"{wnid}_{100 - 7 * i}.JPEG", 10 * label + i, (40 + i, 30 + label))
    odd = root / "train" / WNIDS[1] / f"{WNIDS[1]}_5.JPEG"
    write_image(odd.with_suffix(".png"), 77)
    odd.with_suffix(".png").rename(odd)
    for number in range(1, 9):
        wnid = WNIDS[number * 5 % 3]
        write_image(root / "val" / wnid / f"ILSVRC2012_val_{number:08d}.JPEG", 100 + number)
    return root


@pytest.fixture(scope="module")
def packed(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as image-net.org has it. Do not write into it."""
    root = tmp_path_factory.mktemp("packed")
    for wnid in WNIDS:
        names = os.listdir(unpacked / "train" / wnid)  # in no order
        subprocess.run(["tar", "-cf", root / f"{wnid}.tar", "-C", unpacked / "train" / wnid, *names], check=True)
    tars = [f"{wnid}.tar" for wnid in WNIDS]
    subprocess.run(["tar", "-cf", root / "ILSVRC2012_img_train.tar", "-C", root, *tars], check=True)
    for name in tars:
        (root / name).unlink()
    classes = {}
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as tar:
        for path in sorted((unpacked / "val").glob("*/*"), key=lambda path: path.name):
            add(tar, path.name, path.read_bytes())
            classes[path.name] = IDS[path.parent.name]
    table = np.zeros(len(WNIDS) + 1, [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")])
    rows = [*((number, wnid, wnid, 0) for wnid, number in IDS.items()), (1001, "n00001740", "entity", 3)]
    table[:] = sorted(rows)
    meta = io.BytesIO()
    savemat(meta, {"synsets": table}, do_compression=True)
    truth = "".join(f"{classes[name]}\n" for name in sorted(classes)).encode()
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth)
        add(tar, "ILSVRC2012_devkit_t12/data/._meta.mat", b"of macOS")
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
    return root


@pytest.fixture(scope="module")
def expected(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("expected")
    convert(unpacked, out, OPTIONS, workers=1)
    return visible(out)


def test_archives_give_the_shards_of_the_unpacked_folder(
    packed: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    said = convert(packed, out, OPTIONS, workers=2)
    assert "is complete: 16 train images" in said
    assert visible(out) == expected
    assert [note.file for note in read_manifest(out).splits["train"].changed] == [f"{WNIDS[1]}/{WNIDS[1]}_5.JPEG"]

    def not_again(*_: Any) -> None:
        raise AssertionError("the headers were read again")

    monkeypatch.setattr(archives, "members", not_again)
    (out / "train-000001.tar").unlink()
    convert(packed, out, OPTIONS, workers=1)
    assert visible(out) == expected
    assert "is complete already" in convert(packed, out, OPTIONS, workers=1)


def test_a_conversion_begun_from_folders_is_finished_from_archives(
    unpacked: Path, packed: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """And the other way round; one split of each will do, too."""
    out = tmp_path / "out"
    convert(unpacked, out, OPTIONS, workers=1)
    kept = (out / "train-000000.tar").stat().st_ino
    (out / "manifest.json").unlink()
    (out / "val-000000.tar").unlink()
    convert(packed, out, OPTIONS, workers=1)
    assert visible(out) == expected
    assert (out / "train-000000.tar").stat().st_ino == kept
    mixed = tmp_path / "mixed"
    shutil.copytree(packed, mixed)
    (mixed / "ILSVRC2012_img_train.tar").unlink()
    os.symlink(unpacked / "train", mixed / "train")
    assert "is complete already" in convert(mixed, out, OPTIONS, workers=1)


def test_a_devkit_may_be_unpacked(packed: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    for name in ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"):
        os.symlink(packed / name, tmp_path / name)
    subprocess.run(["tar", "-xf", packed / "ILSVRC2012_devkit_t12.tar.gz", "-C", tmp_path], check=True)
    convert(tmp_path, tmp_path / "out", OPTIONS, workers=1)
    assert visible(tmp_path / "out") == expected


def damaged_header(root: Path) -> None:
    """Of the last class's third image: tarfile takes what follows for the end."""
    path = root / "ILSVRC2012_img_train.tar"
    data = bytearray(path.read_bytes())
    at = data.rindex(f"{WNIDS[2]}_".encode(), 0, len(data))
    data[at] ^= 1
    path.write_bytes(data)


def cut(root: Path) -> None:
    os.truncate(root / "ILSVRC2012_img_val.tar", (root / "ILSVRC2012_img_val.tar").stat().st_size // 2)


def no_truth(root: Path) -> None:
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", b"")


def garbled_meta(root: Path) -> None:
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", b"1\n")
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", b"MATLAB 5.0" * 40)


def short_truth(root: Path) -> None:
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz") as tar:
        meta = tar.extractfile("ILSVRC2012_devkit_t12/data/meta.mat").read()  # type: ignore[union-attr]
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", b"1\n2\n3\n")
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", meta)


def flat_train(root: Path) -> None:
    shutil.copy(root / "ILSVRC2012_img_val.tar", root / "ILSVRC2012_img_train.tar")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (damaged_header, rf"train\.tar: {WNIDS[2]}\.tar is damaged \(at byte [\d,]+ is neither a header nor its end"),
        (cut, r"ILSVRC2012_img_val\.tar is damaged \("),
        (no_truth, r"devkit_t12\.tar\.gz is damaged \(it has no data/ILSVRC2012_validation_ground_truth\.txt\)"),
        (garbled_meta, r"devkit_t12\.tar\.gz is damaged \(data/meta\.mat: "),
        (short_truth, r"has ILSVRC2012_val_00000004\.JPEG, of which the devkit knows no class"),
        (flat_train, r"train\.tar holds no tar of a class, such as n01440764\.tar"),
        (lambda root: (root / "ILSVRC2012_devkit_t12.tar.gz").unlink(), r"but not ILSVRC2012_devkit_t12\.tar\.gz"),
    ],
)
def test_damaged_archives_are_a_sentence(
    packed: Path, tmp_path: Path, damage: Callable[[Path], None], sentence: str
) -> None:
    root = Path(shutil.copytree(packed, tmp_path / "root"))
    damage(root)
    with pytest.raises(UserError, match=sentence):
        convert(root, tmp_path / "out", OPTIONS, workers=1)
    assert visible(tmp_path / "out") == {} if (tmp_path / "out").exists() else True


def test_without_scipy_nothing_is_looked_through_in_vain(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any, **options: Any) -> Any:
        if name.startswith("scipy"):
            raise ModuleNotFoundError(name)
        return real(name, *rest, **options)

    root = Path(shutil.copytree(packed, tmp_path / "root"))
    (root / "ILSVRC2012_img_train.tar").unlink()
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r"scipy, which is not installed; pip install scipy"):
        convert(root, tmp_path / "out", OPTIONS, workers=1)


def test_an_archive_that_shrinks_or_goes_away_ends_the_conversion(packed: Path, tmp_path: Path) -> None:
    files = archives.list_archive(packed, "val", None, 1, tmp_path)
    origin = files.origin([0, len(files) - 1])
    for damage, sentence in (
        (lambda: cut(tmp_path), "is cut off in"),
        (lambda: (tmp_path / "ILSVRC2012_img_val.tar").unlink(), r"cannot be read \(No such file"),
    ):
        shutil.copy(packed / "ILSVRC2012_img_val.tar", tmp_path)
        moved = homes.ArchiveOrigin(str(tmp_path / "ILSVRC2012_img_val.tar"), ["a", "b"], files.places[[0, -1]])
        damage()
        with pytest.raises(UserError, match=sentence):
            [moved.read(i) for i in (1, 0)]
    assert origin.stat()["size"].tolist() == files.places[[0, -1], 1].tolist()


# In a store


@pytest.fixture
def bucket(packed: Path, s3: Proxy, tmp_path: Path) -> str:
    """The archives in a store; where in it."""
    stored.store_at.cache_clear()
    store = open_store(f"s3://{BUCKET}/{tmp_path.name}/raw")
    for path in packed.iterdir():
        store.put(path.name, path)
    s3.requests.clear()
    return f"{BUCKET}/{tmp_path.name}/raw"


def test_archives_in_a_store_give_the_same_shards_there(
    bucket: str, expected: dict[str, bytes], s3: Proxy, tmp_path: Path
) -> None:
    out = f"s3://{BUCKET}/{tmp_path.name}/out"
    assert "is complete: 16 train images" in convert(f"s3://{bucket}", out, OPTIONS, workers=1)
    spans = [span for method, path, span in s3.requests if method == "GET" and path.endswith("train.tar")]
    assert all(spans), "it is never read whole"
    store = open_store(out)
    store.remove("train-000001.tar")
    s3.requests.clear()
    convert(f"s3://{bucket}", out, OPTIONS, workers=1)
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in expected:
        (copy / name).write_bytes(store.read(name))
    assert visible(copy) == expected
    assert s3.asked("train.tar") == 4, "the images of one shard: the headers are known"


@pytest.mark.parametrize(("split", "kind"), [("train", "training"), ("val", "validation")])
def test_while_an_archive_is_read_it_is_said_how_far(
    split: str,
    kind: str,
    packed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From a store all 6.7 GB of ImageNet's validation images have to come; of the other, a header for each class."""
    monkeypatch.setattr(archives, "_MB", 1000)
    monkeypatch.setattr(workers, "_SECONDS_BETWEEN_LINES", 0.0)
    archives.list_archive(packed, split, WNIDS, 1, tmp_path)
    size = (packed / archives.ARCHIVES[split]).stat().st_size // 1000
    line = rf"^(\d+) of {size} MB of the {kind} images' archive, [\d,]+ MB/s, \d+:\d\d:\d\d left$"
    said = re.findall(line, capsys.readouterr().err, re.MULTILINE)
    assert len(said) >= len(WNIDS)
    assert [int(done) for done in said] == sorted({int(done) for done in said})
    assert size / 2 < int(said[-1]) <= size


def test_archives_on_a_web_server(packed: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    """Which cannot list its files."""
    server = Server(packed)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    convert(f"{url}/imagenet", tmp_path / "out", OPTIONS, workers=1)
    assert visible(tmp_path / "out") == expected
    with pytest.raises(UserError, match=r"/no/thing is on a web server, .* none of ImageNet's archives there; give"):
        convert(f"{url}/no/thing", tmp_path / "none", OPTIONS, workers=1)
    server.shutdown()
    server.server_close()


def test_an_archive_instead_of_its_folder(packed: Path, tmp_path: Path) -> None:
    for root in (packed / "ILSVRC2012_img_val.tar", "s3://raw/imagenet/ILSVRC2012_img_train.tar"):
        folder = str(root).rpartition("/")[0]
        with pytest.raises(UserError, match=f"is one of ImageNet's archives; give the folder .* in, {folder}$"):
            convert(root, tmp_path / "out", OPTIONS, workers=1)
