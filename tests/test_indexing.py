"""``vimfast prepare --index-only``: tars that the webdataset library wrote, and tars that nobody should have."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from conftest import visible, write_image

from vimfast.checks.checking import check
from vimfast.checks.findings import CheckOptions
from vimfast.data.source import open_source
from vimfast.errors import UserError
from vimfast.shards.format import read_manifest
from vimfast.shards.indexing import index_tars
from vimfast.shards.reindex import reindex


@pytest.fixture(scope="module")
def foreign(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared tree as the webdataset library writes it: four tars of training images, one of validation images,
    with members that nobody asked for. Do not write into it."""
    root = tmp_path_factory.mktemp("foreign")
    for split, pattern in (("train", "my-train-{}.tar"), ("val", "my_validation.tar")):
        files = sorted((tree / split).glob("*/*"), key=lambda path: path.stem[::-1])
        for number, part in enumerate(np.array_split(np.array(files), 11 if split == "train" else 1)):
            with webdataset.TarWriter(str(root / pattern.format(number))) as writer:
                for i, path in enumerate(part):
                    label, meta = int(path.parent.name[1:]) - 1, {"text": "é" * 50, "file": path.name}
                    sample = {"__key__": f"{split}/{path.stem}", "JPEG" if i % 2 else "jpg": path.read_bytes()}
                    sample |= {"json": meta, "cls": label} if split == "train" else {"json": {**meta, "label": label}}
                    writer.write(sample)
    return root


def run(folder: Path, out: Path, names: Path | None = None, **options: bool) -> str:
    return index_tars(folder, out, names=names, workers=1, **options)


@pytest.fixture(scope="module")
def indexed(foreign: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("indexed")
    assert run(foreign, out).endswith("is complete: 36 train images in 11 tars, 15 val images in 1 tar, 3 classes")
    return out


def test_images_are_read_out_of_the_tars(tree: Path, foreign: Path, indexed: Path) -> None:
    assert os.readlink(indexed / "train-000009.tar") == str(foreign / "my-train-9.tar"), "numbers are sorted as numbers"
    plain = open_source(tree, "train")
    for split in ("train", "val"):
        source = open_source(indexed, split)
        assert source.classes == ["0", "1", "2"]
        images = source.read(np.arange(len(source)))
        found = {}
        for i, (data, label) in enumerate(zip(images.encoded, images.labels.tolist(), strict=True)):
            found[source.name(i).rpartition("/")[2].partition(".")[0]] = (bytes(data), plain.classes[label])
        expected = {path.stem: (path.read_bytes(), path.parent.name) for path in (tree / split).glob("*/*")}
        assert found == expected


def test_they_are_checked_for_what_is_known_of_them(indexed: Path, tmp_path: Path) -> None:
    options = CheckOptions(classes=None, splits=("train", "val"), decode=True, workers=1)
    report = check(indexed, options)
    assert (report.fit, report.findings) == (True, [])
    copy = Path(shutil.copytree(indexed, tmp_path / "copy"))
    row = np.load(copy / "train.index.npy")[5]
    tar = copy / f"train-{row['shard']:06d}.tar"
    data = bytearray(tar.read_bytes())
    data[int(row["offset"]) + 300] ^= 1
    tar.write_bytes(data)
    (finding,) = check(copy, options).findings
    assert finding.what == "differs from its checksum in the index"


def test_dali_reads_them(indexed: Path) -> None:
    dali = pytest.importorskip("nvidia.dali")
    paths = sorted(map(str, indexed.glob("train-*.tar")))

    @dali.pipeline_def(batch_size=36, num_threads=1, device_id=None)
    def pipeline() -> tuple[object, object]:
        indexes = [path[:-3] + "idx" for path in paths]
        return tuple(dali.fn.readers.webdataset(paths=paths, index_paths=indexes, ext=["jpg;jpeg", "cls"], name="r"))

    reader = pipeline()
    reader.build()
    _, labels = reader.run()
    rows = np.load(indexed / "train.index.npy")
    assert [int(np.array(labels[i]).tobytes()) for i in range(36)] == rows["label"].tolist()


def test_it_resumes(foreign: Path, indexed: Path, tmp_path: Path) -> None:
    root, out = Path(shutil.copytree(foreign, tmp_path / "root")), tmp_path / "out"
    run(root, out)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.idx")}
    (out / "manifest.json").unlink()
    (out / "train-000003.tar").unlink()
    os.utime(root / "my_validation.tar", (1, 1))
    run(root, out)
    assert visible(out) == visible(indexed)
    again = {path.name for path, was in kept.items() if path.stat().st_mtime_ns != was}
    assert again == {"train-000003.idx", "val-000000.idx"}


def test_classes_may_have_names(foreign: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n\nfish\nowl\n")
    run(foreign, tmp_path / "out", names)
    assert open_source(tmp_path / "out", "train").classes == ["cat", "dog", "fish", "owl"]
    for text, sentence in (("cat\ndog\n", "have a label 2 and --class-names 2 names"), ("a\na\n", "has a name twice")):
        names.write_text(text)
        with pytest.raises(UserError, match=sentence):
            run(foreign, tmp_path / "out", names)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def test_samples_that_cannot_be_used_are_listed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_image(tmp_path / "1.jpg", 1)
    write_image(tmp_path / "1.png", 1)
    write_image(tmp_path / "cmyk.jpg", 1, mode="CMYK")
    image = (tmp_path / "1.jpg").read_bytes()
    odd = {
        "unlabelled": {"jpg": image},
        "png": {"png": (tmp_path / "1.png").read_bytes(), "cls": b"1"},
        "cmyk": {"jpg": (tmp_path / "cmyk.jpg").read_bytes(), "cls": b"1"},
        "cut": {"jpg": image[:300], "cls": b"1"},
        "word": {"jpg": image, "cls": b"cat"},
        "list": {"jpg": image, "json": b"[1]"},
        "negative": {"jpg": image, "json": json.dumps({"label": -1}).encode()},
    }
    (tmp_path / "root").mkdir()
    with tarfile.open(tmp_path / "root/a.tar", "w") as tar:
        for key, parts in {"good": {"jpg": image, "cls": b"0\n"}, **odd}.items():
            for kind, content in parts.items():
                add(tar, f"{key}.{kind}", content)
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"7 samples cannot be used, listed above; leave them out with --skip-bad"):
        run(tmp_path / "root", out)
    said = capfd.readouterr().err
    assert all(f"a.tar: {key}: " in said for key in odd)
    assert not (out / "manifest.json").exists()
    assert "is complete: 1 train image in 1 tar" in run(tmp_path / "root", out, skip_bad=True)
    assert len(read_manifest(out).splits["train"].skipped) == 7


def cut(root: Path) -> None:
    os.truncate(root / "my-train-2.tar", (root / "my-train-2.tar").stat().st_size // 2)


def empty(root: Path) -> None:
    for path in root.iterdir():
        path.unlink()


def no_images(root: Path) -> None:
    with tarfile.open(root / "my-train-2.tar", "w") as tar:
        add(tar, ".hidden", b"")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (cut, r"my-train-2\.tar is damaged \("),
        (empty, r"holds no tars; give the folder of the tars"),
        (shutil.rmtree, r"cannot be read \(No such file or directory\); give the folder of the tars"),
        (no_images, r"my-train-2\.tar holds no sample with a JPEG and a label; leave it out"),
    ],
)
def test_tars_that_cannot_be_used_are_a_sentence(
    foreign: Path, tmp_path: Path, damage: Callable[[Path], None], sentence: str
) -> None:
    root = Path(shutil.copytree(foreign, tmp_path / "root"))
    damage(root)
    with pytest.raises(UserError, match=sentence):
        run(root, tmp_path / "out")


def test_nothing_of_somebody_else_is_replaced(foreign: Path, indexed: Path, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds the tars themselves; give a folder of its own"):
        run(foreign, foreign)
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    with pytest.raises(UserError, match="holds shards of its own; give another --out"):
        run(foreign, copy)
    assert visible(copy) == visible(shards)
    with pytest.raises(UserError, match=r"are links to others; index those again with vimfast-prepare --index-only"):
        reindex(indexed, workers=1)
