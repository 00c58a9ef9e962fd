"""A folder tree is listed in one order, and what is wrong with it is reported in one sentence."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import deep_folder, forbidden

from vimfast.data.source import open_source
from vimfast.errors import UserError
from vimfast.shards.tree import scan_split


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def test_sorted_by_class_and_name(tmp_path: Path) -> None:
    touch(tmp_path, *(f"train/{name}" for name in ("n2/b.JPEG", "n2/a.jpg", "n10/z.png", "n1/deep/er/c.jpeg")))
    files = scan_split(tmp_path, "train")
    assert files.classes == ["n1", "n10", "n2"]
    assert [files.name(i) for i in range(len(files))] == ["n1/deep/er/c.jpeg", "n10/z.png", "n2/a.jpg", "n2/b.JPEG"]
    assert files.labels.tolist() == [0, 1, 2, 2]
    assert files.labels.dtype == np.int32
    assert all(files.path(i).is_file() for i in range(len(files)))


def test_only_images_count(tmp_path: Path) -> None:
    touch(
        tmp_path, "train/n1/a.JPEG", "train/n1/._a.JPEG", "train/n1/list.txt", "train/.cache/b.jpg", "train/readme.jpg"
    )
    touch(tmp_path, "train/n1/.hidden/c.jpg")
    files = scan_split(tmp_path, "train")
    assert [files.name(i) for i in range(len(files))] == ["n1/a.JPEG"]


def test_other_files_are_counted(tmp_path: Path) -> None:
    touch(
        tmp_path,
        *(f"train/n1/{name}" for name in ("a.JPEG", "b.gif", "c.avif", "d.HEIC", "e.heic", "f", ".g", "h.jp2")),
    )
    files = scan_split(tmp_path, "train")
    assert [files.name(i) for i in range(len(files))] == [
        f"n1/{name}" for name in ("a.JPEG", "b.gif", "c.avif", "h.jp2")
    ]
    assert files.others == {".heic": 2, "no extension": 1}


def test_a_class_without_images_keeps_its_index(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.jpg", "train/c/1.jpg")
    (tmp_path / "train/b").mkdir()
    files = scan_split(tmp_path, "train")
    assert files.classes == ["a", "b", "c"]
    assert files.labels.tolist() == [0, 2]


def test_validation_has_the_training_classes(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/b/2.jpg")
    files = scan_split(tmp_path, "val", ["a", "b"])
    assert files.labels.tolist() == [1]
    assert files.name(0) == "b/2.jpg"
    touch(tmp_path, "val/z/2.jpg")
    with pytest.raises(UserError, match=r"val/z is not a training class"):
        scan_split(tmp_path, "val", ["a", "b"])


def test_names_of_any_bytes_and_links(tmp_path: Path) -> None:
    touch(tmp_path, "elsewhere/x.jpg", "train/狗/图片 1.jpg")
    odd = os.fsdecode(b"\xff\xfe.jpg")
    touch(tmp_path, f"train/狗/{odd}")
    (tmp_path / "train/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train/linked/dead.jpg").symlink_to(tmp_path / "nowhere")
    files = scan_split(tmp_path, "train")
    assert [files.name(i) for i in range(len(files))] == [
        "linked/dead.jpg",
        "linked/x.jpg",
        "狗/图片 1.jpg",
        f"狗/{odd}",
    ]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["val/n1/a.jpg"], "has no train/"),
        (["train/a.jpg", "train/b.jpg"], r"holds 2 images and no class folders.*n01440764"),
        (["train/list.txt"], r"train is empty"),
        (["train/train/n1/a.jpg"], r"holds another train/ .*move it up"),
        (["train/train/n1/a.jpg", "train/val/n1/a.jpg"], r"holds another train/"),
        (["train/n1/a.tar"], r"no images in the 1 class folder of .*unpack"),
        (["train/n1/a.tar", "train/n2/b.txt"], r"no images in the 2 class folders .*unpack"),
        (["inner/train/n1/a.jpg"], r"did you mean .*inner\?"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, names: list[str], said: str) -> None:
    touch(tmp_path, *names)
    with pytest.raises(UserError, match=said):
        scan_split(tmp_path, "train")


def test_a_root_that_is_none(tmp_path: Path) -> None:
    touch(tmp_path, "train/n1/a.jpg", "data.tar")
    for root, said in (
        ("nowhere", "does not exist"),
        ("data.tar", "is a file"),
        ("train", rf"did you mean {tmp_path}\?"),
    ):
        with pytest.raises(UserError, match=said):
            scan_split(tmp_path / root, "train")


def test_a_loop_of_links_is_reported(tmp_path: Path) -> None:
    touch(tmp_path, "train/n1/a.jpg")
    (tmp_path / "train/n1/loop").symlink_to("loop")
    with pytest.raises(UserError, match="loop cannot be read"):
        scan_split(tmp_path, "train")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_class_that_is_a_link_to_nowhere_is_no_class_less(tmp_path: Path, split: str) -> None:
    """A disk that is not mounted: the class was dropped without a word, and those after it had other labels."""
    touch(tmp_path, "train/a/1.jpg", "train/c/1.jpg", "val/a/1.jpg", "val/c/1.jpg")
    (tmp_path / "train/b").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"train/b is a link to nowhere; bring back what it leads to, or delete it"):
        open_source(tmp_path, split)
    touch(tmp_path, "elsewhere/1.jpg")
    assert open_source(tmp_path, split).labels.tolist() == ([0, 1, 2] if split == "train" else [0, 2])


def test_a_folder_inside_a_class_that_is_a_link_to_nowhere(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.jpg")
    (tmp_path / "train/a/more").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"train/a/more is a link to nowhere"):
        scan_split(tmp_path, "train")


@pytest.mark.parametrize("to", [".", ".."])
def test_a_link_to_a_folder_above_is_reported(tmp_path: Path, to: str) -> None:
    touch(tmp_path, "train/a/b/1.jpg")
    (tmp_path / "train/a/b/up").symlink_to(to)
    with pytest.raises(UserError, match=r"train/a/b/up is a link to a folder that it is in; delete it"):
        scan_split(tmp_path, "train")


def test_folders_may_be_deep(tmp_path: Path) -> None:
    """It was a RecursionError."""
    with deep_folder(tmp_path / "train" / "a", 1000) as inside:
        assert scan_split(tmp_path, "train").name(0) == f"a/{inside}/1.jpg"


def test_what_lies_beside_the_class_folders_is_counted(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.jpg", "train/b.tar", "train/a/c.tar", "train/2.jpg", "train/.hidden.jpg")
    files = scan_split(tmp_path, "train")
    assert (files.others, files.loose, len(files)) == ({".tar": 2}, 1, 1)


def test_a_folder_that_may_not_be_looked_into(tmp_path: Path) -> None:
    """It was a PermissionError."""
    touch(tmp_path, "root/train/a/1.jpg")
    with forbidden(tmp_path / "root"):
        for look in (scan_split, open_source):
            with pytest.raises(UserError, match=r"root.* cannot be read \(Permission denied\)"):
                look(tmp_path / "root", "train")


def test_an_error_ends_what_watches_the_listing(tmp_path: Path) -> None:
    """Else a bar would still be drawn, and the cursor hidden, while the error is printed."""
    ended = []

    def watched(folders: Sequence[str]) -> Generator[str, None, None]:
        try:
            yield from folders
        finally:
            ended.append(True)

    touch(tmp_path, "train/a/1.jpg")
    (tmp_path / "train/a/again").symlink_to("..", target_is_directory=True)
    with pytest.raises(UserError) as kept:
        scan_split(tmp_path, "train", watched=watched)
    assert (ended, "is a link to" in str(kept.value)) == ([True], True)
