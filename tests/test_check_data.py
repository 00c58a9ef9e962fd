"""Every kind of damage is found, by the file's name; and healthy data pass."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import look, needs_browser
from conftest import deep_folder, enlarged, forbidden, write_image
from forked import run_forked, run_in_forks
from PIL import Image
from runs import call
from timm.data import ImageNetInfo

from vimfast import check_data
from vimfast.checks import checking, page
from vimfast.checks import findings as findings_module
from vimfast.checks.findings import CheckOptions, ClassCheck, Finding, imagenet_wnids, run_tasks
from vimfast.config import load_config
from vimfast.data.source import open_source
from vimfast.errors import UserError
from vimfast.samples import draw_samples
from vimfast.shards.format import INDEX_DTYPE, MANIFEST

Check = Callable[..., tuple[int, dict[str, Any]]]
IMAGE = "n01/n01_3.JPEG"


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Check:
    """The command: words -> (exit status, the JSON object)."""

    def run(*words: str | Path) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["check_data", *map(str, words), "--json"])
        status = check_data.main()
        return status, json.loads(capsys.readouterr().out)

    return run


def prepare(*words: object) -> None:
    """``vimfast prepare``."""
    done = run_forked(run_in_forks, "vimfast.prepare", *map(str, words))
    assert done.returncode == 0, done.stderr


@pytest.fixture
def root(tree: Path, tmp_path: Path) -> Path:
    """A tree to damage."""
    return shutil.copytree(tree, tmp_path / "tree")


@pytest.fixture(scope="module")
def healthy_shards(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("check") / "shards"
    prepare(tree, "--out", out, "--shard-samples", 12)
    return out


@pytest.fixture
def shards(healthy_shards: Path, tmp_path: Path) -> Path:
    """Shards to damage: three of 12 training images, two of validation's 15."""
    return shutil.copytree(healthy_shards, tmp_path / "shards")


def only(report: dict[str, Any], severity: str = "error") -> dict[str, str]:
    """The one finding there is."""
    (finding,) = report["findings"]
    assert finding["severity"] == severity
    assert finding["fix"]
    return finding


def overwrite(path: Path, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


# A folder tree


def test_a_healthy_tree_is_fit(check: Check, tree: Path) -> None:
    status, report = check(tree, "--decode")
    assert (status, report["fit"], report["findings"]) == (0, True, [])
    size = sum(path.stat().st_size for path in (tree / "train").rglob("*.JPEG"))
    train, val = report["splits"]
    assert train == {"split": "train", "classes": 3, "images": 36, "least": 12, "most": 12, "bytes": size}
    assert (val["split"], val["images"], val["least"]) == ("val", 15, 5)


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_text(path: Path) -> None:
    path.write_text("<html>404</html>")


def damage_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def damage_png_cut(path: Path) -> None:
    write_image(path.with_suffix(".png"), 5)
    path.with_suffix(".png").rename(path)
    damage_cut(path)


def damage_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


@pytest.mark.parametrize("decode", [[], ["--decode"]])
@pytest.mark.parametrize("damage", [damage_empty, damage_text, damage_cut, damage_png_cut, damage_link])
def test_an_unreadable_image_is_an_error(
    check: Check, root: Path, damage: Callable[[Path], None], decode: list[str]
) -> None:
    damage(root / "train" / IMAGE)
    status, report = check(root, *decode)
    assert status == 1
    errors = [finding for finding in report["findings"] if finding["severity"] == "error"]
    assert [(error["file"], error["split"]) for error in errors] == [(str(root / "train" / IMAGE), "train")]


def test_only_decoding_finds_damage_inside(check: Check, root: Path) -> None:
    path = root / "val" / IMAGE
    with Image.open(path) as image:
        image.save(path.with_suffix(".png"))
    data = path.with_suffix(".png").read_bytes()
    path.unlink()
    at = data.index(b"IDAT") + 10
    path.with_suffix(".png").write_bytes(data[:at] + bytes(20) + data[at + 20 :])
    assert check(root)[0] == 0
    status, report = check(root, "--decode")
    assert status == 1
    assert only(report)["file"] == str(path.with_suffix(".png"))


@pytest.mark.parametrize(("mode", "kind"), [("RGB", "PNG"), ("CMYK", "JPEG"), ("RGB", "GIF")])
def test_what_prepare_converts_is_a_warning(check: Check, root: Path, mode: str, kind: str) -> None:
    path = root / "train" / IMAGE
    with Image.open(path) as image:
        image.convert(mode).save(path, format=kind)
    status, report = check(root)
    assert status == 0
    assert only(report, "warning")["file"] == str(path)
    assert "vimfast-prepare" in only(report, "warning")["fix"]


def test_a_jpeg_of_12_bits_is_one_finding(check: Check, root: Path) -> None:
    file = root / "train" / IMAGE
    data = bytearray(file.read_bytes())
    data[data.index(b"\xff\xc0") + 4] = 12
    file.write_bytes(data)
    status, report = check(root, "--decode")
    (found,) = report["findings"]
    assert status == 1
    assert (found["severity"], found["file"]) == ("error", str(file))
    assert "12 bits" in found["what"]
    assert found["fix"] == "save it with 8 bits, or delete it"


def test_samples_of_more_than_eight_bits(check: Check, root: Path) -> None:
    shades = np.linspace(0, 65535, 60 * 60).reshape(60, 60)
    path = root / "train" / "n01" / "deep.png"
    Image.fromarray(shades.astype(np.uint16)).save(path)
    status, report = check(root)
    assert (status, only(report, "warning")["what"]) == (0, "a 16-bit PNG, scaled to 8 bits")
    path.unlink()
    Image.fromarray(shades.astype(np.float32)).save(path.with_suffix(".tif"))
    status, report = check(root)
    assert status == 1
    assert "samples are floats" in only(report)["what"]


def test_a_missing_split(check: Check, root: Path) -> None:
    (root / "val").rename(root / "validation")
    status, report = check(root)
    assert status == 1
    assert only(report)["file"] == str(root / "val")
    assert "rename" in only(report)["fix"]
    assert check(root, "--splits", "train")[0] == 0
    (root / "validation").rename(root / "test")
    (root / "ILSVRC2012_img_val.tar").write_bytes(b"")
    assert "unpack" in only(check(root)[1])["fix"]


def test_shards_of_other_programs(check: Check, shards: Path, tmp_path: Path) -> None:
    """They are not to be unpacked where they are: that gives neither splits nor classes."""
    flat, split = tmp_path / "flat", tmp_path / "split"
    for name in ("train", "val"):
        tar = next(iter(sorted(shards.glob(f"{name}-*.tar"))))
        for to in (flat / f"imagenet1k-{name}-0000.tar", split / name / "0000.tar"):
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tar, to)
    for root in (flat, split):
        findings = check(root)[1]["findings"]
        assert len(findings) == 2
        for finding in findings:
            assert "WebDataset shard" in finding["what"] + finding["fix"]
            assert finding["fix"].endswith("after vimfast prepare --index-only FOLDER --out indexed/")
        with pytest.raises(UserError, match=r"holds WebDataset shards of another program, such as .*--index-only"):
            open_source(root, "val")
    (split / "val" / "0000.tar").write_bytes(b"no tar")
    assert "an archive that is not unpacked" in {finding["what"] for finding in check(split)[1]["findings"]}


def test_a_folder_that_is_not_yet_split(check: Check, root: Path, tmp_path: Path) -> None:
    """Each was told only what a folder of ImageNet holds."""
    shutil.rmtree(root / "val")
    fix = only(check(root)[1])["fix"]
    assert fix.startswith(f"put images to evaluate with into {root}/val/<class>/; if there are none, move a part")
    assert "docs/own_images.md" in fix
    assert fix.endswith("or pass --splits train")

    (root / "train").rename(tmp_path / "nosplit")
    (tmp_path / "nosplit" / "n00").mkdir()
    fix = only(check(tmp_path / "nosplit", "--splits", "train")[1])["fix"]
    nosplit = tmp_path / "nosplit"
    both = [finding["fix"] for finding in check(nosplit)[1]["findings"]]
    for own in (fix, *both):
        assert own.startswith(
            f"{nosplit} holds class folders such as n01, n02: move them into {nosplit}/train/, and then"
        )
        assert own.endswith(f"into {nosplit}/val/<class>/")

    flat = shutil.copytree(tmp_path / "nosplit" / "n01", tmp_path / "flat")
    fix = only(check(flat, "--splits", "train")[1])["fix"]
    assert fix == f"{flat} holds 12 images and no class folders: sort them into {flat}/train/<class>/"

    shutil.rmtree(flat)
    flat.mkdir()
    fix = only(check(flat, "--splits", "train")[1])["fix"]
    assert fix == f"{flat} is empty: put train/ and val/ there, with one folder of images per class in each"


def test_a_flat_validation_folder(check: Check, root: Path) -> None:
    for i, path in enumerate(sorted((root / "val").rglob("*.JPEG")), 1):
        path.rename(root / "val" / f"ILSVRC2012_val_{i:08d}.JPEG")
    for folder in (root / "val").glob("n0*"):
        folder.rmdir()
    status, report = check(root)
    assert status == 1
    assert only(report)["file"] == str(root / "val")
    assert "15" in only(report)["what"]
    assert "valprep" in only(report)["fix"]


def test_a_doubled_level(check: Check, root: Path) -> None:
    (root / "train").rename(root / "inner")
    (root / "train").mkdir()
    (root / "inner").rename(root / "train" / "train")
    status, report = check(root)
    assert status == 1
    assert only(report)["file"] == str(root / "train" / "train")


def test_a_level_too_many_by_another_name(check: Check, root: Path) -> None:
    (root / "train").rename(root / "inner")
    (root / "train").mkdir()
    (root / "inner").rename(root / "train" / "images")
    status, report = check(root, "--splits", "train")
    assert status == 1
    assert only(report)["file"] == str(root / "train" / "images")


def test_a_class_inside_another(check: Check, root: Path) -> None:
    shutil.copytree(root / "train" / "n02", root / "train" / "n01" / "n02")
    assert only(check(root)[1])["file"] == str(root / "train" / "n01" / "n02")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_class_missing_in_one_split(check: Check, root: Path, split: str) -> None:
    shutil.rmtree(root / split / "n02")
    status, report = check(root)
    assert status == 1
    assert only(report)["file"] == str(root / split / "n02")
    assert only(report)["split"] == split


def test_archives_that_are_not_unpacked(check: Check, root: Path) -> None:
    shutil.rmtree(root / "train" / "n02")
    (root / "train" / "n02.tar").write_bytes(b"")
    (root / "val" / "n01" / "n01.tar").write_bytes(b"")
    (root / "val" / "n03" / "n03.tar").write_bytes(b"")
    for path in (root / "val" / "n03").glob("*.JPEG"):
        path.unlink()
    found = {(f["severity"], f["file"]) for f in check(root)[1]["findings"]}
    assert found == {
        ("error", str(root / "train" / "n02.tar")),
        ("error", str(root / "train" / "n02")),
        ("warning", str(root / "val" / "n01" / "n01.tar")),
        ("error", str(root / "val" / "n03" / "n03.tar")),
        ("error", str(root / "val" / "n03")),
    }


@pytest.mark.parametrize("name", ["n01/notes.txt", "n01/._n01_1.JPEG", ".DS_Store", "labels.csv", "n01/x.heic"])
def test_files_that_nobody_reads(check: Check, root: Path, name: str) -> None:
    (root / "train" / name).write_bytes(b"x")
    status, report = check(root)
    assert status == 0
    assert only(report, "warning")["file"] == str(root / "train" / name)


def test_only_regular_files_are_read(check: Check, root: Path, shards: Path) -> None:
    os.mkfifo(root / "train" / "n01" / "fifo.JPEG")
    (root / "train" / "n01" / "zero.JPEG").symlink_to("/dev/zero")
    status, report = check(root)
    assert status == 1
    assert [f["what"] for f in report["findings"]] == [
        f"not a regular file, but a {what}" for what in ("FIFO", "device")
    ]
    for name in ("train-000001.tar", "train-000001.idx", "val.index.npy"):
        (shards / name).unlink()
        os.mkfifo(shards / name)
    status, report = check(shards)
    assert status == 1
    assert {f["file"] for f in report["findings"]} == {
        str(shards / name) for name in ("train-000001.tar", "train-000001.idx", "val.index.npy")
    }


def test_links_to_nowhere_and_in_circles(check: Check, root: Path) -> None:
    """They were warnings, and an error that ended the check."""
    (root / "train" / "n02").rename(root / "away")
    (root / "train" / "n02").symlink_to("nowhere")
    (root / "train" / "n03" / "more").symlink_to("nowhere")
    (root / "train" / "n01" / "loop").symlink_to(".")
    (root / "train" / "n01" / "self").symlink_to("self")
    status, report = check(root)
    assert status == 1
    found = {(f["severity"], f["file"], f["what"]) for f in report["findings"]}
    for name, what in (
        ("n02", "a link to nowhere"),
        ("n03/more", "a link to nowhere"),
        ("n01/loop", "a link to a folder that it is in"),
        ("n01/self", "cannot be read: Too many levels of symbolic links"),
    ):
        assert ("error", str(root / "train" / name), what) in found


def test_deep_folders_are_checked(check: Check, root: Path) -> None:
    with deep_folder(root / "train" / "n01" / "deep", 1000):
        status, report = check(root)
    assert (status, only(report)["what"]) == (1, "empty (0 bytes)")


def test_files_and_frames_larger_than_images_are(check: Check, root: Path) -> None:
    """A sparse file of 100 GB was a MemoryError. A header that is damaged in its size passed."""
    (root / "train" / "n01" / "x.JPEG").touch()
    os.truncate(root / "train" / "n01" / "x.JPEG", 100 << 30)
    status, report = check(root)
    assert (status, only(report)["what"]) == (1, "107,374,182,400 bytes, which is more than 1,073,741,824")
    (root / "train" / "n01" / "x.JPEG").write_bytes(enlarged((root / "train" / IMAGE).read_bytes()))
    status, report = check(root)
    assert status == 1
    assert "exceeds limit" in only(report)["what"]


def test_a_tree_with_files_named_nearly_as_of_shards(check: Check, root: Path) -> None:
    """Each made it a conversion that is not finished, or a damaged one, for the trainer too."""
    for name in (MANIFEST, "train-images.tar", "val-1.tar.gz"):
        (root / name).write_bytes(b"{}")
        status, report = check(root)
        assert (status, report["kind"]) == (0, "folder tree"), name
        assert len(open_source(root, "train")) == 36


def test_a_folder_that_may_not_be_looked_into(check: Check, root: Path) -> None:
    with forbidden(root):
        status, report = check(root)
    assert status == 1
    assert "Permission denied" in only(report)["what"]


def test_a_name_with_a_line_end_is_on_one_line(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "train" / "n01" / "a\nb.JPEG").write_bytes(b"")
    monkeypatch.setattr(sys, "argv", ["check_data", str(root)])
    assert check_data.main() == 1
    assert "n01/a\\nb.JPEG: empty (0 bytes)\n" in capsys.readouterr().out


def test_an_empty_class_and_an_empty_split(check: Check, root: Path) -> None:
    shutil.rmtree(root / "val")
    (root / "val").mkdir()
    for path in (root / "train" / "n03").iterdir():
        path.unlink()
    status, report = check(root)
    assert status == 1
    assert {f["file"] for f in report["findings"]} == {str(root / "val"), str(root / "train" / "n03")}
    (empty,) = (f for f in report["findings"] if f["what"] == "holds no images")
    assert empty["fix"].endswith("unpack its archive again, or delete the folder, in each split")


def test_an_empty_split_after_findings_in_another(check: Check, root: Path) -> None:
    """It was fit to train on."""
    (root / "train" / ".DS_Store").write_bytes(b"x")
    shutil.rmtree(root / "val")
    (root / "val").mkdir()
    status, report = check(root)
    assert (status, report["errors"]) == (1, 1)


def test_the_number_of_classes(check: Check, tree: Path) -> None:
    assert check(tree, "--classes", "3")[0] == 0
    status, report = check(tree, "--classes", "4")
    assert status == 1
    assert [f["file"] for f in report["findings"]] == [str(tree / "train"), str(tree / "val")]


def test_an_image_of_another_class(check: Check, tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("n01440764", "n01443537"):
            write_image(tmp_path / split / name / f"{name}_1.JPEG", 1)
    moved = tmp_path / "train" / "n01440764" / "n01443537_2.JPEG"
    write_image(moved, 2)
    status, report = check(tmp_path, "--classes", "2")
    assert status == 1
    assert only(report)["file"] == str(moved)


def test_numbers_as_class_names(check: Check, tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("0", "1", "2", "10"):
            write_image(tmp_path / split / name / "a.jpg", 1)
    assert "'10' is class 2" in only(check(tmp_path)[1], "warning")["what"]
    assert check(tmp_path)[0] == 0
    for split in ("train", "val"):
        (tmp_path / split / "10").rename(tmp_path / split / "3")
    assert check(tmp_path)[1]["findings"] == []


@pytest.mark.parametrize("word", ["nowhere", "file", "tree/train", "."])
def test_a_wrong_path_is_one_finding_with_exit_status_1(
    check: Check, root: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    monkeypatch.chdir(root.parent)
    Path("file").write_text("")
    status, report = check(word, "--splits", "train")
    assert status == 1
    assert only(report)["fix"]


def test_many_files_are_shared_out_among_processes(check: Check, tmp_path: Path) -> None:
    write_image(tmp_path / "a.jpg", 1, (8, 8))
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(600):
                (tmp_path / split / name / f"{i:04d}.jpg").hardlink_to(tmp_path / "a.jpg")
    bad = [tmp_path / "train" / name for name in ("a/0007.jpg", "a/0599.jpg", "b/0300.jpg")]
    for path in bad:
        path.unlink()
        path.write_bytes(b"")
    status, report = check(tmp_path, "--workers", "2")
    assert status == 1
    assert [f["file"] for f in report["findings"]] == [str(path) for path in bad]
    assert report["splits"][0]["bytes"] == (1200 - 3) * (tmp_path / "a.jpg").stat().st_size


# ImageNet


@pytest.fixture(scope="module")
def wnids() -> list[str]:
    return sorted(imagenet_wnids(["n01440764"]))


def imagenet_counts(wnids: list[str]) -> dict[str, dict[str, int]]:
    """Numbers of images that add up to ImageNet-1k's."""
    train = {name: 1281 + (i < 167) for i, name in enumerate(wnids)}
    return {"train": train, "val": dict.fromkeys(wnids, 50)}


def judge(counts: dict[str, dict[str, int]], wanted: int | None = None) -> list[Finding]:
    return list(ClassCheck(counts, wanted, lambda split, name: f"{split}/{name}", "unpack it").run())


def test_imagenet_itself_is_fit(wnids: list[str]) -> None:
    assert wnids == ImageNetInfo().label_names()
    assert len(wnids) == 1000
    assert (wnids[0], wnids[-1]) == ("n01440764", "n15075141")
    assert judge(imagenet_counts(wnids)) == []
    assert judge(imagenet_counts(wnids), 1000) == []


def test_imagenet_short_of_a_few_images(wnids: list[str]) -> None:
    counts = imagenet_counts(wnids)
    counts["train"][wnids[3]] = 731
    counts["val"][wnids[4]] = 49
    places = [f"train/{wnids[3]}", "train/", f"val/{wnids[4]}", "val/"]
    assert [(f.severity, f.file) for f in judge(counts)] == [("error", place) for place in places]
    assert [(f.severity, f.file) for f in judge(counts, 1000)] == [("warning", place) for place in places]


def test_imagenet_with_a_renamed_class(wnids: list[str]) -> None:
    counts = imagenet_counts(wnids)
    for held in counts.values():
        held["tench"] = held.pop("n01440764")
    found = {(f.severity, f.file) for f in judge(counts)}
    places = {f"{split}/{name}" for split in counts for name in ("tench", "n01440764")}
    assert found == {("error", place) for place in places}
    assert {(f.severity, f.file) for f in judge(counts, 1000)} == {("warning", place) for place in places}


def test_a_part_of_imagenet_must_be_asked_for(wnids: list[str]) -> None:
    counts = {split: dict.fromkeys(wnids[:100], 7) for split in ("train", "val")}
    (finding,) = judge(counts)
    assert finding.severity == "error"
    assert finding.what == "looks like a subset of ImageNet-1k: 100 of its 1,000 classes, the same in train and val"
    assert finding.fix == "pass --classes 100 if that is what you want; otherwise add the other classes"
    assert judge(counts, 100) == []
    (finding,) = judge({"train": counts["train"]})
    assert finding.what.endswith("its 1,000 classes")


def test_what_is_no_consistent_part_of_imagenet_is_held_to_all_of_it(wnids: list[str]) -> None:
    counts = {split: dict.fromkeys(wnids[:100], 7) for split in ("train", "val")}
    counts["val"].pop(wnids[3])
    assert {f.file for f in judge(counts) if f.what == "missing, a class of train"} == {f"val/{wnids[3]}"}
    assert {f.file for f in judge(counts) if "ImageNet-1k" in f.what} >= {f"train/{name}" for name in wnids[100:]}
    counts = {split: {**dict.fromkeys(wnids[:100], 7), "cat": 7} for split in ("train", "val")}
    assert {f.file for f in judge(counts) if "not a class of" in f.what} == {"train/cat", "val/cat"}
    counts = {split: {**dict.fromkeys(wnids[:100], 7), wnids[5]: 0} for split in ("train", "val")}
    assert [f.what for f in judge(counts)][1:] == ["holds no images"] * 2


def test_other_wordnet_classes_are_not_held_to_imagenet_1k() -> None:
    counts = {split: {f"n{i:08d}": 5 for i in range(20)} for split in ("train", "val")}
    assert judge(counts) == []


# Shards


def test_healthy_shards_are_fit(check: Check, healthy_shards: Path, tree: Path) -> None:
    status, report = check(healthy_shards, "--decode")
    assert (status, report["fit"], report["findings"]) == (0, True, [])
    assert report["splits"] == check(tree)[1]["splits"]


def test_a_flipped_byte_in_an_image(check: Check, shards: Path) -> None:
    row = np.load(shards / "train.index.npy")[13]
    overwrite(shards / "train-000001.tar", int(row["offset"] + row["size"]) - 9, b"\x00\x01\x02")
    status, report = check(shards)
    assert status == 1
    assert only(report)["file"] == open_source(shards, "train").name(13)
    assert "checksum" in only(report)["what"]


@pytest.mark.parametrize("byte", [12, 155])  # the last one is of the checksum itself
def test_a_damaged_tar_header(check: Check, shards: Path, byte: int) -> None:
    offset = int(np.load(shards / "train.index.npy")[13]["offset"])
    overwrite(shards / "train-000001.tar", offset - 512 + byte, b"\xff" if byte == 12 else b"\x22")
    finding = only(check(shards)[1])
    assert finding["file"].startswith(str(shards / "train-000001.tar"))
    assert str(offset) in finding["file"]


def test_a_label_that_differs(check: Check, shards: Path) -> None:
    row = np.load(shards / "val.index.npy")[2]
    end = int(row["offset"] + row["size"])
    overwrite(shards / "val-000000.tar", end + -end % 512 + 512, b"7")
    finding = only(check(shards)[1])
    assert finding["file"] == open_source(shards, "val").name(2)
    assert "label 7" in finding["what"]


@pytest.mark.parametrize("place", ["image", "label", "end"])
def test_a_flipped_byte_between_the_members(check: Check, shards: Path, place: str) -> None:
    """Nobody reads it, but it is a sign of a disk or a copy that cannot be trusted."""
    row, tar = np.load(shards / "val.index.npy")[2], shards / "val-000000.tar"
    end = int(row["offset"] + row["size"])
    assert end % 512
    overwrite(tar, {"image": end, "label": end + -end % 512 + 512 + 9, "end": tar.stat().st_size - 1}[place], b"x")
    finding = only(check(shards)[1])
    assert finding["file"] == (str(tar) if place == "end" else open_source(shards, "val").name(2))
    assert "has something" in finding["what"]


def test_a_truncated_tar(check: Check, shards: Path) -> None:
    path = shards / "train-000002.tar"
    lost = np.load(shards / "train.index.npy")[-2:]
    with open(path, "r+b") as file:
        file.truncate(int(lost[0]["offset"]) + 5)
    status, report = check(shards)
    assert status == 1
    assert report["errors"] == len(report["findings"]) == 3
    assert all(f["file"].startswith(str(path)) for f in report["findings"])
    assert "the manifest says" in report["findings"][0]["what"]
    for finding, row in zip(report["findings"][1:], lost, strict=True):
        assert str(row["offset"]) in finding["file"]
        assert "outside" in finding["what"]


@pytest.mark.parametrize("name", ["train-000001.tar", "train-000001.idx", "train.index.npy", MANIFEST])
def test_a_file_that_is_gone(check: Check, shards: Path, name: str) -> None:
    (shards / name).unlink()
    status, report = check(shards)
    assert status == 1
    finding = only(report)
    assert name in finding["file"] + finding["what"]
    assert "vimfast-prepare" in finding["fix"]


def test_dalis_index_of_another_shard(check: Check, shards: Path) -> None:
    shutil.copy(shards / "train-000001.idx", shards / "train-000002.idx")
    assert only(check(shards)[1])["file"] == str(shards / "train-000002.idx")
    text = (shards / "train-000001.idx").read_text()
    (shards / "train-000001.idx").write_text(text.replace("v1.2 12", "v1.2 13"))
    assert [f["file"] for f in check(shards)[1]["findings"]] == [
        str(shards / "train-000001.idx"),
        str(shards / "train-000002.idx"),
    ]
    for old, new in (("n0", "n8"), (" cls ", " cls  "), (" 1 n0", " 2 n0"), (".cls", ".clt")):
        (shards / "train-000001.idx").write_text(text.replace(old, new, 1))
        assert str(shards / "train-000001.idx") in [f["file"] for f in check(shards)[1]["findings"]], old
    (shards / "train-000001.idx").write_text(text)
    (shards / "train-000002.idx").write_text("v1.2 3\n")
    assert only(check(shards)[1])["file"] == str(shards / "train-000002.idx")
    (shards / "train-000002.idx").write_text("")
    assert only(check(shards)[1])["file"] == str(shards / "train-000002.idx")


@pytest.mark.parametrize(
    ("column", "value", "contradiction"),
    [
        ("label", 9, "in the tar, 9 in the index"),
        ("crc32", 1, "differs from its checksum"),
        ("height", 1, "by the index"),
        ("shard", 2, "other shards than the manifest"),
        ("offset", 0, "is outside"),
        ("size", 7, "by the tar, 7 by the index"),
    ],
)
def test_an_edited_index(check: Check, shards: Path, column: str, value: int, contradiction: str) -> None:
    rows = np.load(shards / "train.index.npy")
    rows[column][4] = value
    assert rows.dtype == INDEX_DTYPE
    np.save(shards / "train.index.npy", rows)
    status, report = check(shards)
    assert status == 1
    first, *others = report["findings"]
    assert first["file"] == str(shards / "train.index.npy")
    assert "checksum" in first["what"]
    assert any(contradiction in f["what"] for f in others), others
    assert all("train" in f["file"] for f in others)


def test_an_index_cut_short(check: Check, shards: Path) -> None:
    path = shards / "val.index.npy"
    path.write_bytes(path.read_bytes()[:-40])
    assert only(check(shards)[1])["file"] == str(path)


@pytest.mark.parametrize(
    "edit",
    [
        lambda manifest: manifest.update(format="other"),
        lambda manifest: manifest.update(version=99),
        lambda manifest: manifest.pop("splits"),
        lambda manifest: manifest.update(classes=["a", "a", "b"]),
        lambda manifest: manifest["splits"]["train"].update(samples=35),
        lambda manifest: manifest["splits"]["train"].pop("shards"),
        lambda manifest: manifest["splits"]["train"]["shards"][0].update(name="../x.tar"),
        lambda manifest: manifest["splits"]["train"].update(bytes="many"),
    ],
)
def test_an_edited_manifest(check: Check, shards: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((shards / MANIFEST).read_text())
    edit(manifest)
    (shards / MANIFEST).write_text(json.dumps(manifest))
    status, report = check(shards)
    assert status == 1
    assert only(report)["file"] == str(shards / MANIFEST)


def test_a_manifest_that_promises_other_bytes(check: Check, shards: Path) -> None:
    manifest = json.loads((shards / MANIFEST).read_text())
    manifest["splits"]["val"]["shards"][1]["bytes"] += 512
    del manifest["crc32"]
    (shards / MANIFEST).write_text(json.dumps(manifest))
    assert only(check(shards)[1])["file"] == str(shards / "val-000001.tar")


def test_shards_with_a_class_too_few(check: Check, shards: Path) -> None:
    manifest = json.loads((shards / MANIFEST).read_text())
    manifest["classes"] = manifest["classes"][:2]
    del manifest["crc32"]
    (shards / MANIFEST).write_text(json.dumps(manifest))
    status, report = check(shards)
    assert status == 1
    assert {f["what"] for f in report["findings"]} == {"has label 2, the manifest has 2 classes"}
    assert len(report["findings"]) == 12 + 5


def test_leftovers_and_images_left_out_are_warnings(check: Check, root: Path, tmp_path: Path) -> None:
    (root / "train" / IMAGE).write_bytes(b"")
    out = tmp_path / "out"
    prepare(root, "--out", out, "--skip-bad")
    (out / "train-000000.tar.tmp").write_bytes(b"")
    (out / "train-000099.tar").write_bytes(b"")
    status, report = check(out)
    assert status == 0
    assert [f["severity"] for f in report["findings"]] == ["warning"] * 3
    named = {f"train/{IMAGE}", str(out / "train-000000.tar.tmp"), str(out / "train-000099.tar")}
    assert {f["file"] for f in report["findings"]} == named


def test_shards_without_validation(check: Check, tree: Path, tmp_path: Path) -> None:
    shutil.copytree(tree / "train", tmp_path / "tree" / "train")
    out = tmp_path / "out"
    prepare(tmp_path / "tree", "--out", out)
    assert check(out)[0] == 1
    assert check(out, "--splits", "train")[0] == 0


# The screen and the sheet


def test_the_size_of_shards_is_said_to_be_that_of_their_images(
    shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their tars, of which a conversion gives the size, are larger."""
    monkeypatch.setattr(sys, "argv", ["check_data", str(shards)])
    check_data.main()
    assert re.search(r"most per class +image bytes \n", capsys.readouterr().out)


def test_the_table_caps_long_lists(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (root / "train" / "n01").iterdir():
        path.write_bytes(b"")
    monkeypatch.setattr(sys, "argv", ["check_data", str(root)])
    assert check_data.main() == 1
    text = capsys.readouterr().out
    assert text.count(": empty (0 bytes)") == 5
    assert "and 7 more; --json" in text
    assert "download the file again" in text
    assert "not fit to train on: 12 errors, 0 warnings" in text


def test_findings_beyond_a_limit_are_counted(
    root: Path, check: Check, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(findings_module, "_KEPT", 10)
    for path in (root / "train" / "n01").iterdir():
        path.write_bytes(b"")
    status, report = check(root)
    assert (status, report["errors"], report["not_listed"], len(report["findings"])) == (1, 12, 2, 10)
    sys.argv.remove("--json")
    assert check_data.main() == 1
    text = capsys.readouterr().out
    assert "and 7 more; --json lists some" in text
    assert "12 errors" in text


def test_from_the_command_line(root: Path) -> None:
    done = call("vimfast.check_data", str(root), "--workers", "1", fresh=True)
    assert done.stderr == ""
    assert "fit to train on" in done.stdout
    done = call("vimfast.check_data", str(root), "--clases", "3", ok=False)
    assert done.returncode != 0
    assert "did you mean '--classes'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_name_that_is_no_utf8(check: Check, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = bytes(root / "train" / "n01" / "a") + b"\xff.JPEG"
    with open(path, "wb"):
        pass
    assert check(root)[0] == 1
    sys.argv.remove("--json")
    assert check_data.main() == 1
    assert "a\\udcff.JPEG: empty" in capsys.readouterr().out


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_sheet_is_that_of_the_default_settings(check: Check, tree: Path, tmp_path: Path, split: str) -> None:
    out = tmp_path / "sheet.png"
    flags = ("--splits", split, "--sample-grid", out, "--input-size", "192", "--seed", "3")
    assert check(tree, *flags)[0] == 0
    cfg = load_config(["--data-path", str(tree), "--input-size", "192", "--seed", "3", "--device", "cpu"])
    with Image.open(out) as sheet:
        assert (sheet.format, sheet.mode) == ("PNG", "RGB")
        np.testing.assert_array_equal(np.asarray(sheet), np.asarray(draw_samples(cfg, split, 8, "")))


def test_the_sheet_of_few_images_and_unreadable_ones(check: Check, tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_image(tmp_path / split / "only" / "one.jpg", 1)
    assert check(tmp_path, "--sample-grid", tmp_path / "one.png")[0] == 0
    assert (tmp_path / "one.png").exists()
    damage_cut(tmp_path / "train" / "only" / "one.jpg")
    status, report = check(tmp_path, "--sample-grid", tmp_path / "two.png")
    assert status == 1
    assert not (tmp_path / "two.png").exists()
    assert any(str(tmp_path / "train" / "only" / "one.jpg") in f["what"] for f in report["findings"])


# The page


@pytest.fixture
def odd(root: Path) -> Path:
    """A tree of one image wider than tall, one far larger, one that does not decode, and one of an odd name."""
    write_image(root / "train/n01/wide.jpg", 1, (300, 40))
    write_image(root / "train/n01/large.jpg", 2, (900, 1200), "CMYK")
    (root / "train/n02/broken.jpg").write_bytes((root / "train/n02/n02_0.JPEG").read_bytes()[:300])
    write_image(root / "val/n03/<b>&.jpg", 3, (60, 60), "CMYK")
    return root


def test_the_page_has_what_the_json_has(check: Check, odd: Path, tmp_path: Path) -> None:
    status, report = check(odd, "--html", tmp_path / "page.html", "--input-size", "52")
    text = (tmp_path / "page.html").read_text()
    assert (status, report["errors"]) == (1, 1)
    assert "not fit to train on</span>" in text
    assert f"folder tree · 1 error, {report['warnings']} warnings" in text
    for finding in report["findings"]:
        name = "/".join(Path(finding["file"]).parts[-2:])
        assert name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("/", "/<wbr>") in text
        assert finding["fix"].replace("'", "&#39;") in text
    assert "<b>&" not in text
    assert text.count("data:image/jpeg;base64,") == 2  # the two of CMYK
    assert text.count(">does not decode<") == 1
    tiles = re.findall(r"<dt>(.*?)</dt><dd>(.*?)<small>", text)
    assert tiles[0] == ("Images of train", "39")
    files = [[path for path in odd.glob(f"{split}/*/*") if path.name != "broken.jpg"] for split in ("train", "val")]
    small = [sum(min(Image.open(path).size) < 52 for path in of_split) for of_split in files]
    said = [figure for title, figure in tiles if title == "Smaller than the input"]
    assert said == [str(count) for count in small]
    assert text.count("short side below 52 pixels, for training with --input-size 52</small>") == 2


def test_bars_count_every_image_and_class(odd: Path) -> None:
    report = checking.check(odd, CheckOptions())
    assert report.classes["train"] == {"n01": 14, "n02": 13, "n03": 12}
    read = [Image.open(path).size for path in sorted(odd.glob("val/*/*"))]
    assert sorted(map(tuple, report.sizes["val"][:, ::-1].tolist())) == sorted(read)
    for split, images in (("train", 39), ("val", 16)):
        classes, sides, shapes = page.SplitPage(split, report, 224).charts
        assert sum(bar.height for bar in classes.bars) == 3
        assert sum(bar.height for bar in sides.bars) == sum(bar.height for bar in shapes.bars) == images
        (wide,) = (bar for bar in shapes.bars if bar.left <= 1e-9 < bar.right)
        square = sum(0.9 < width / height < 1.1 for height, width in report.sizes[split].tolist())
        assert wide.height >= min(1, square)
        assert [bar.left for bar in sides.bars[1:]] == [bar.right for bar in sides.bars[:-1]]


def test_the_page_of_shards_and_of_nothing(check: Check, shards: Path, tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    damaged = shards / "val-000000.tar"
    overwrite(damaged, 1200, b"\x00\x01\x02")
    status, report = check(shards, "--html", target)
    assert (status, report["errors"]) == (1, 1)
    member = report["findings"][0]["file"].partition(": ")[2]
    assert f"{damaged.name}: {member}".replace("/", "/<wbr>") in target.read_text()
    status, report = check(tmp_path / "none", "--html", target)
    assert (status, report["errors"]) == (1, 1)
    assert "is not a folder" in target.read_text() or "does not exist" in target.read_text()


@pytest.mark.parametrize("flag", ["--html", "--sample-grid"])
def test_what_cannot_be_written_is_refused_first(check: Check, shards: Path, tmp_path: Path, flag: str) -> None:
    """It says nothing of the data, which may be fit."""
    with pytest.raises(UserError, match=f"{flag} .* is in a folder that does not exist; give a file in one that does"):
        check(shards, flag, tmp_path / "none" / "page.png")
    folder = tmp_path / "folder.png"
    folder.mkdir()
    with pytest.raises(UserError, match=rf"{flag} .* cannot be written \(Is a directory\)"):
        check(shards, flag, folder)


def test_a_page_that_fails_late_is_no_fault_of_the_data(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("vimfast.checks.page.write_page", full)
    monkeypatch.setattr(sys, "argv", ["check_data", str(tree), "--html", str(tmp_path / "page.html")])
    with pytest.raises(UserError, match=r"No space left on device.*; make room there, or give --html a file"):
        check_data.main()
    assert "\nfit to train on: 0 errors" in capsys.readouterr().out


def test_where_a_page_is_stands_before_the_verdict(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["check_data", str(tree), "--html", str(tmp_path / "page.html")]
    said = f"written to {tmp_path / 'page.html'}"
    monkeypatch.setattr(sys, "argv", words)
    check_data.main()
    assert capsys.readouterr().out.splitlines()[-2:] == [said, "fit to train on: 0 errors, 0 warnings"]
    monkeypatch.setattr(sys, "argv", [*words, "--json"])
    check_data.main()
    assert capsys.readouterr().err == f"{said}\n"


@needs_browser
def test_a_browser_shows_the_page(check: Check, odd: Path, tmp_path: Path) -> None:
    check(odd, "--html", tmp_path / "page.html")
    for width, dark in ((1200, False), (400, True)):
        found, complaints = look(tmp_path / "page.html", tmp_path, width=width, dark=dark)
        assert complaints == []
        assert (found["width"], found["content"]) == (width, width)
        assert (found["charts"], found["images"], found["broken"]) == (6, 2, 0)
        assert found["bars"] >= 6
        assert found["columns"] == (3 if width == 1200 else 1)
        assert found["outside"] == []


def test_a_killed_worker_is_one_sentence() -> None:
    with pytest.raises(UserError, match="killed"):
        list(run_tasks(os._exit, [(9,)], "train", 10_000, workers=2))  # type: ignore[arg-type]
