"""Images from shards and from a folder: the same bytes, sizes, labels and batches; and errors that name the file."""

from __future__ import annotations

import errno
import gc
import itertools
import json
import os
import resource
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_image
from forked import run_forked, run_in_forks, run_text
from loaders import make_loader
from PIL import Image
from torchvision import transforms

from vimfast.data import source as source_module
from vimfast.data.order import Order
from vimfast.data.source import BadImage, FolderSource, ShardSource, Source, open_source
from vimfast.errors import UserError
from vimfast.shards import rows as rows_module
from vimfast.shards.format import INDEX_DTYPE


def prepare(root: Path, out: Path, *flags: str) -> Path:
    done = run_forked(run_in_forks, "vimfast.prepare", str(root), "--out", str(out), "--workers", "1", *flags)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def odd_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, of which validation has two, with every kind of odd file among the plain ones."""
    root = tmp_path_factory.mktemp("odd")
    for label, name in enumerate(("a", "b", "c")):
        for i in range(8):
            write_image(root / "train" / name / f"{name}{i}.JPEG", 10 * label + i, (70 + 3 * i, 64 + label))
            if name != "b":
                write_image(root / "val" / name / f"{name}{i}.JPEG", 500 + 10 * label + i)
    for split in ("train", "val"):
        write_image(root / split / "a" / "a1.JPEG", 1, (80, 60), "CMYK")
        write_image(root / split / "a" / "a2.JPEG", 2, (80, 60), "L")
        write_image(root / split / "c" / "c3.png", 3, (50, 90))
        (root / split / "c" / "c3.png").rename(root / split / "c" / "c3.JPEG")
        path = root / split / "c" / "c4.JPEG"
        with Image.open(path) as image:
            image.save(path, "JPEG", progressive=True)
        with open(root / split / "c" / "c5.JPEG", "ab") as file:
            file.write(b"a tail that some cameras leave")
    return root


@pytest.fixture(scope="module")
def odd_shards(odd_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(odd_tree, tmp_path_factory.mktemp("shards") / "out", "--shard-samples", "7")


def stem(name: str) -> str:
    """``a/a1`` from ``.../train/a/a1.JPEG`` or ``.../train-000000.tar: a/a1.jpg``."""
    return "/".join(Path(name.split(": ")[-1]).with_suffix("").parts[-2:])


def test_bounds_are_those_of_the_shards(odd_tree: Path, odd_shards: Path) -> None:
    source = open_source(odd_shards, "train")
    bounds = source.bounds()
    assert len(bounds) == 5
    assert bounds[0] == 0
    assert bounds[-1] == len(source) == 24
    for number, (first, end) in enumerate(itertools.pairwise(bounds)):
        assert all(f"train-{number:06d}.tar: " in source.name(i) for i in range(first, end))
    with pytest.raises(UserError, match=r"--order window reads a few shards .*odd.* is a folder of images; convert"):
        open_source(odd_tree, "train").bounds()


def test_mean_bytes(odd_tree: Path, odd_shards: Path) -> None:
    for source in (open_source(odd_tree, "train"), open_source(odd_shards, "train")):
        paths = [source.name(i) for i in range(len(source))]
        if isinstance(source, FolderSource):
            sizes = [Path(path).stat().st_size for path in paths]
        else:
            sizes = [len(encoded) for encoded in source.read(np.arange(len(source))).encoded]
        assert source.mean_bytes() == pytest.approx(np.mean(sizes))


def folder_ids(folder: Source, shards: Source) -> np.ndarray:
    """For each image of the shards, its id in the folder, by name."""
    ids = {stem(folder.name(i)): i for i in range(len(folder))}
    return np.array([ids[stem(shards.name(i))] for i in range(len(shards))])


@pytest.mark.parametrize("split", ["train", "val"])
def test_shards_hold_what_the_folder_source_reads(odd_tree: Path, odd_shards: Path, split: str) -> None:
    folder, shards = open_source(odd_tree, split), open_source(odd_shards, split)
    assert isinstance(folder, FolderSource)
    assert isinstance(shards, ShardSource)
    ids = folder_ids(folder, shards)
    np.testing.assert_array_equal(np.sort(ids), np.arange(len(folder)))
    ours, theirs = shards.read(np.arange(len(shards))), folder.read(ids)
    for one, other in zip(ours.encoded, theirs.encoded, strict=True):
        assert one.tobytes() == other.tobytes()
    np.testing.assert_array_equal(ours.sizes, theirs.sizes)
    np.testing.assert_array_equal(ours.labels, theirs.labels)
    np.testing.assert_array_equal(shards.labels, folder.labels[ids])
    assert list(shards.classes) == list(folder.classes) == ["a", "b", "c"]
    assert ours.sizes.dtype == np.int32
    assert ours.labels.dtype == np.int64


def evaluate(source: Source) -> tuple[torch.Tensor, torch.Tensor]:
    order = Order(len(source), len(source), shuffle=False, drop_last=False)
    (batch,) = make_loader(source, order, device="cpu", training=False, size=32).epoch(0)
    return batch.images, batch.labels


@pytest.mark.parametrize("split", ["train", "val"])
def test_batches_from_shards_and_folder_are_the_same(odd_tree: Path, odd_shards: Path, split: str) -> None:
    folder, shards = open_source(odd_tree, split), open_source(odd_shards, split)
    ids = folder_ids(folder, shards)
    images, labels = evaluate(folder)
    assert torch.equal(evaluate(shards)[0], images[ids])
    assert torch.equal(evaluate(shards)[1], labels[ids])


def test_odd_files_look_as_pillow_shows_them(odd_tree: Path) -> None:
    source = open_source(odd_tree, "train")
    by_stem = {stem(source.name(i)): i for i in range(len(source))}
    for name in ("a/a1", "a/a2", "c/c3", "c/c4", "c/c5"):
        i = by_stem[name]
        encoded, sizes, _ = source.read(np.array([i]))
        with Image.open(source.name(i)) as original:
            expected = np.asarray(original.convert("RGB"), int)
        path = odd_tree / "decoded"
        path.write_bytes(encoded[0].tobytes())
        with Image.open(path) as image:
            assert image.format == "JPEG"
            decoded = np.asarray(image.convert("RGB"), int)
        assert tuple(sizes[0]) == decoded.shape[:2] == expected.shape[:2]
        assert np.abs(decoded - expected).mean() < 1.5, name


KINDS: dict[str, tuple[str, tuple[int, int], str, dict[str, object]]] = {
    "rgb": ("RGB", (80, 60), "JPEG", {}),
    "grey": ("L", (80, 60), "JPEG", {}),
    "cmyk": ("CMYK", (60, 80), "JPEG", {"quality": 95}),
    "progressive": ("RGB", (61, 47), "JPEG", {"progressive": True}),
    "not_subsampled": ("RGB", (61, 47), "JPEG", {"subsampling": "4:4:4"}),
    "stored_as_rgb": ("RGB", (61, 47), "JPEG", {"keep_rgb": True}),
    "restart_markers": ("RGB", (61, 47), "JPEG", {"restart_marker_rows": 1}),
    "one_pixel": ("RGB", (1, 1), "JPEG", {}),
    "one_grey_pixel": ("L", (1, 1), "JPEG", {}),
    "one_row": ("RGB", (50, 1), "JPEG", {}),
    "one_progressive_column": ("RGB", (1, 50), "JPEG", {"progressive": True}),
    "png": ("RGB", (50, 90), "PNG", {}),
    "transparent_png": ("RGBA", (50, 90), "PNG", {}),
    "palette": ("P", (50, 90), "PNG", {}),
    "one_bit": ("1", (50, 90), "PNG", {}),
    "tiny_png": ("RGB", (1, 1), "PNG", {}),
    "webp": ("RGB", (50, 90), "WEBP", {}),
    "gif": ("P", (50, 90), "GIF", {}),
    "bmp": ("RGB", (50, 90), "BMP", {}),
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One image of each kind, all named .JPEG, in a tree and as shards."""
    root = tmp_path_factory.mktemp("kinds")
    folder = root / "tree" / "train" / "a"
    folder.mkdir(parents=True)
    for seed, (name, (mode, size, format, options)) in enumerate(KINDS.items()):
        cells = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC).convert(mode)
        image.save(folder / f"{name}.JPEG", format, **options)
    shades = np.linspace(0, 65535, 60 * 60).astype(np.uint16).reshape(60, 60)
    Image.fromarray(shades).save(folder / "sixteen_bits.JPEG", "PNG")
    prepare(root / "tree", root / "shards")
    return root


def assert_pillows_pixels(root: Path, device: str, limit: float) -> None:
    """At no resizing, but for images smaller than 40 pixels, and at some."""
    for size, crop_ratio in ((40, 1.0), (24, 0.875)):
        for kind in ("tree", "shards"):
            source, files = open_source(root / kind, "train"), open_source(root / "tree", "train")
            order = Order(len(source), 8, shuffle=False, drop_last=False)
            identity: dict[str, tuple[float, float, float]] = {"mean": (0, 0, 0), "std": (1 / 255, 1 / 255, 1 / 255)}
            loader = make_loader(
                source, order, device=device, training=False, size=size, crop_ratio=crop_ratio, **identity
            )
            images = torch.cat([batch.images.cpu() for batch in loader.epoch(0)])
            transform = transforms.Compose(
                [
                    transforms.Resize(int(size / crop_ratio), transforms.InterpolationMode.BICUBIC),
                    transforms.CenterCrop(size),
                    transforms.PILToTensor(),
                ]
            )
            for image, i in zip(
                images, folder_ids(files, source) if kind == "shards" else range(len(files)), strict=True
            ):
                with Image.open(files.name(i)) as original:
                    wide = original.mode.startswith("I;16")  # scaled, where Pillow's convert clips
                    shown = Image.fromarray((np.asarray(original) / 257).astype(np.uint8)) if wide else original
                    expected = transform(shown.convert("RGB")).float()
                assert (image - expected).abs().max() <= limit, f"{kind}: {files.name(i)}"


def test_every_image_decodes_to_pillows_pixels(kinds: Path) -> None:
    """What is no JPEG, or one of four components, is stored again as a JPEG: that is off by up to 4 levels."""
    assert_pillows_pixels(kinds, "cpu", 4.01)


@pytest.mark.gpu
def test_every_image_decodes_to_pillows_pixels_on_a_gpu(kinds: Path) -> None:
    assert_pillows_pixels(kinds, "cuda", 6.01)


def test_validation_labels_are_places_among_the_training_classes(odd_tree: Path, tree: Path) -> None:
    assert set(open_source(odd_tree, "val").labels.tolist()) == {0, 2}
    assert set(open_source(tree, "val").labels.tolist()) == {0, 1, 2}


def test_validation_alone_counts_its_own_classes(odd_tree: Path, tmp_path: Path) -> None:
    shutil.copytree(odd_tree / "val", tmp_path / "val")
    source = open_source(tmp_path, "val")
    assert list(source.classes) == ["a", "c"]
    assert set(source.labels.tolist()) == {0, 1}


@pytest.mark.parametrize("kind", ["odd_tree", "odd_shards"])
def test_threads_may_read_at_once(kind: str, request: pytest.FixtureRequest) -> None:
    source = open_source(request.getfixturevalue(kind), "train")
    expected = [
        data.tobytes() for data in open_source(request.getfixturevalue(kind), "train").read(np.arange(24)).encoded
    ]
    with ThreadPoolExecutor(8) as pool:
        for images in pool.map(source.read, [np.arange(24)[::-1]] * 32):
            assert [data.tobytes() for data in images.encoded] == expected[::-1]


def test_nothing_read_is_fine(odd_tree: Path, odd_shards: Path) -> None:
    for root in (odd_tree, odd_shards):
        encoded, sizes, labels = open_source(root, "train").read(np.array([], np.int64))
        assert (encoded, sizes.shape, labels.shape) == ([], (0, 2), (0,))


def test_names_lead_to_the_image(odd_tree: Path, odd_shards: Path) -> None:
    folder, shards = open_source(odd_tree, "train"), open_source(odd_shards, "train")
    assert Path(folder.name(0)) == odd_tree / "train" / "a" / "a0.JPEG"
    name = shards.name(len(shards) - 1)
    assert name.startswith(f"{odd_shards}/train-000003.tar: ")
    assert name.endswith(".jpg")


FEW_FILES = """
import os, resource, sys
import numpy as np
from vimfast.data.source import open_source
limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
source = open_source(sys.argv[1], "train")
assert len(os.listdir("/proc/self/fd")) < limit
for _ in range(2):
    source.will_need(np.arange(len(source)))
    print([len(encoded) for encoded in source.read(np.arange(len(source))).encoded])
"""


def in_a_process(code: str, *words: object) -> str:
    """What it prints."""
    done = run_forked(run_text, code, *map(str, words))
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout


@pytest.fixture(scope="module")
def many_shards(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 of one image."""
    return prepare(tree, tmp_path_factory.mktemp("many") / "out", "--shard-samples", "1")


def test_more_shards_than_files_may_be_open(many_shards: Path) -> None:
    """3,467 shards with 4,096 files ended a run at a later batch."""
    source = open_source(many_shards, "train")
    sizes = [len(encoded) for encoded in source.read(np.arange(36)).encoded]
    assert in_a_process(FEW_FILES, many_shards, 30) == f"{sizes}\n{sizes}\n"


def test_a_low_limit_of_open_files_is_raised(many_shards: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 12, before[1]))
    try:
        source = open_source(many_shards, "train")
        held = {os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}
        assert len({path for path in held if path.startswith(f"{many_shards}/train-")}) == len(source) == 36
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_shards_are_closed_with_their_source(shards_copy: Path) -> None:
    def files() -> int:
        links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        return sum(link.startswith(str(shards_copy)) for link in links)

    source = open_source(shards_copy, "train")
    assert files() == 4
    del source
    gc.collect()
    assert files() == 0


def test_shards_may_be_moved_or_replaced_while_they_are_read(shards_copy: Path) -> None:
    """A run reads those that it began with, from images to names."""
    source = open_source(shards_copy, "train")
    before, name = source.read(np.arange(24)), source.name(20)
    for path in shards_copy.glob("train-*.tar"):
        path.with_suffix(".new").write_bytes(bytes(path.stat().st_size))
        path.with_suffix(".new").replace(path)
    shards_copy.rename(shards_copy.with_name("moved"))
    after = source.read(np.arange(24))
    assert all(one.tobytes() == other.tobytes() for one, other in zip(before.encoded, after.encoded, strict=True))
    assert source.name(20) == name


@pytest.mark.parametrize("size", [0, 5000])
def test_a_shard_cut_off_while_it_is_in_use_is_named(shards_copy: Path, size: int) -> None:
    """It was SIGBUS: status -7, and not a word."""
    source = open_source(shards_copy, "train")
    source.read(np.arange(24))
    os.truncate(shards_copy / "train-000001.tar", size)
    with pytest.raises(UserError, match=r"train-000001\.tar was cut off while it was in use: .*, then resume"):
        source.read(np.arange(24))
    assert len(source.read(np.arange(6)).encoded) == 6


def test_a_disk_that_fails_is_no_bad_image(shards_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(shards_copy, "train")

    def fail(*args: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(UserError, match=r"train-000000\.tar cannot be read \(Input/output error\)") as caught:
        source.read(np.arange(24))
    assert not isinstance(caught.value, BadImage)


def test_a_disk_that_gives_less_than_it_was_asked_for(shards_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pread, source = os.pread, open_source(shards_copy, "train")
    whole = source.read(np.arange(24)).encoded
    monkeypatch.setattr(os, "pread", lambda file, size, at: pread(file, min(size, 100), at))
    for one, other in zip(source.read(np.arange(24)).encoded, whole, strict=True):
        assert one.tobytes() == other.tobytes()


CUT_WHILE_TRAINING = """
import os, sys
from loaders import make_loader
from vimfast.config import AugmentConfig
from vimfast.data.order import Order
from vimfast.data.source import open_source
from vimfast.errors import UserError
from vimfast.shards import rows as rows_module
source = open_source(sys.argv[1], "train")
loader = make_loader(source, Order(24, 4), device="cpu", training=True, augmentation=AugmentConfig(), size=40,
                     on_bad_image="skip")
try:
    for epoch in range(1000):
        for batch in loader.epoch(epoch):
            for number in range(4):
                os.truncate(f"{sys.argv[1]}/train-00000{number}.tar", 0)
except UserError as error:
    print(error)
    print(loader.skipped)
"""


def test_a_shard_cut_off_under_a_loader_is_named(shards_copy: Path) -> None:
    """And is no bad image."""
    said, skipped = in_a_process(CUT_WHILE_TRAINING, shards_copy).splitlines()
    assert "was cut off while it was in use" in said
    assert skipped == "[]"


@pytest.mark.parametrize("split", ["train", "val"])
def test_one_bit_of_an_image(shards_copy: Path, split: str) -> None:
    """Trained on and evaluated, before images were compared with their checksums when they are first read."""
    row = np.load(shards_copy / f"{split}.index.npy")[9]
    tar = shards_copy / f"{split}-{row['shard']:06d}.tar"
    data = bytearray(tar.read_bytes())
    data[int(row["offset"]) + int(row["size"]) // 2] ^= 1
    tar.write_bytes(data)
    source = open_source(shards_copy, split)
    assert len(source.read(np.arange(9)).encoded) == 9
    name = rf"{tar.name}: [abc]/.*\.jpg"
    for _ in range(2):
        with pytest.raises(UserError, match=rf"{name} is damaged: it differs from its checksum in the index; copy"):
            source.read(np.arange(12))


WRITTEN_OVER = """
import os, sys
import numpy as np
from loaders import make_loader
from vimfast.data.order import Order
from vimfast.data.source import open_source
from vimfast.errors import UserError
from vimfast.shards import rows as rows_module
source = open_source(sys.argv[1], "train")
source.read(np.arange(24))
with open(sys.argv[1] + "/train-000001.tar", "r+b") as file:
    file.write(bytes(os.fstat(file.fileno()).st_size))
loader = make_loader(source, Order(24, 4), device="cpu", training=sys.argv[2] == "training", size=40,
                     on_bad_image="skip")
try:
    for epoch in range(2):
        for batch in loader.epoch(epoch):
            pass
except UserError as error:
    print(error)
    print(loader.skipped)
"""


@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_a_shard_that_is_written_over_is_no_bad_image(shards_copy: Path, kind: str) -> None:
    """By another copy of it, say, which is not complete. Its images were left out, one after the other."""
    said, skipped = in_a_process(WRITTEN_OVER, shards_copy, kind).splitlines()
    assert f"{shards_copy}/train-000001.tar: the image at byte" in said
    assert "is damaged: it differs from its checksum in the index; copy it again" in said
    assert skipped == "[]"


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_is_requested_while_the_one_before_is_read(
    odd_shards: Path, monkeypatch: pytest.MonkeyPatch, training: bool
) -> None:
    """In order and once each, over the ends of epochs too."""
    source, events = open_source(odd_shards, "train"), list[tuple[str, list[int]]]()
    read, will_need = ShardSource.read, ShardSource.will_need

    def note(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, ids: (events.append((what, sorted(ids.tolist()))), function(self, ids))[1]

    monkeypatch.setattr(ShardSource, "read", note("read", read))
    monkeypatch.setattr(ShardSource, "will_need", note("need", will_need))
    order = Order(24, 8, shuffle=training, drop_last=training)
    loader = make_loader(source, order, device="cpu", training=training, size=32)
    for epoch in range(2):
        for _ in loader.epoch(epoch):
            pass
    loader.close()
    for epoch, seen in enumerate([events] if training else [events[:6], events[6:]]):
        assert [what for what, _ in seen[:6]] == [
            "need",
            "need",
            "read",
            "need",
            "read",
            "need" if training else "read",
        ]
        needed, done = ([ids for what, ids in seen if what == kind] for kind in ("need", "read"))
        assert needed[: len(done)] == done
        expected = [sorted(order.step(epoch, step)[1].tolist()) for step in range(3)]
        assert done[:3] == expected


@pytest.fixture
def shards_copy(odd_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(odd_shards, tmp_path / "copy"))


def test_missing_shard(shards_copy: Path) -> None:
    (shards_copy / "train-000001.tar").unlink()
    with pytest.raises(UserError, match=r"train-000001\.tar is missing; copy it again or run vimfast-prepare again"):
        open_source(shards_copy, "train")


def test_shard_cut_off(shards_copy: Path) -> None:
    os.truncate(shards_copy / "train-000002.tar", 5000)
    with pytest.raises(UserError, match=r"train-000002\.tar has 5000 bytes, the manifest says \d+"):
        open_source(shards_copy, "train")


def test_index_that_points_past_its_shard(shards_copy: Path) -> None:
    path = shards_copy / "train.index.npy"
    rows = np.load(path)
    assert rows.dtype == INDEX_DTYPE
    rows["offset"][4] = 10**9
    np.save(path, rows)
    with pytest.raises(UserError, match=r"train\.index\.npy is damaged: its checksum is \d+, the manifest says \d+"):
        open_source(shards_copy, "train")


def test_one_bit_of_a_label(shards_copy: Path) -> None:
    """Trained on, before the checksum was compared."""
    path = shards_copy / "train.index.npy"
    rows = np.load(path)
    rows["label"][7] ^= 1
    np.save(path, rows)
    fix = f"copy it again, or rebuild it with vimfast-prepare --reindex {shards_copy}"
    with pytest.raises(UserError, match=rf"train\.index\.npy is damaged: its checksum .* says \d+; {fix}"):
        open_source(shards_copy, "train")
    assert len(open_source(shards_copy, "val")) == 16


@pytest.mark.parametrize("name", ["train-000001.tar", "train.index.npy", "manifest.json"])
def test_only_regular_files_are_opened(shards_copy: Path, name: str) -> None:
    (shards_copy / name).unlink()
    os.mkfifo(shards_copy / name)
    with pytest.raises(UserError, match=rf"{name} is not a regular file"):
        open_source(shards_copy, "train")


def test_only_regular_images_are_read(tmp_path: Path) -> None:
    write_image(tmp_path / "train/a/0.JPEG", 0)
    os.mkfifo(tmp_path / "train/a/1.JPEG")
    with pytest.raises(UserError, match=r"1\.JPEG is not a readable image \(not a regular file, but a FIFO\)"):
        open_source(tmp_path, "train").read(np.arange(2))


def test_shards_without_the_split(shards_copy: Path) -> None:
    manifest = json.loads((shards_copy / "manifest.json").read_text())
    del manifest["splits"]["val"], manifest["crc32"]
    (shards_copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        UserError, match=r"holds no 'val' split, only train; run vimfast-prepare on a folder that has val/"
    ):
        open_source(shards_copy, "val")


def test_unfinished_shards(shards_copy: Path) -> None:
    (shards_copy / "manifest.json").unlink()
    with pytest.raises(UserError, match="is not finished; run the same vimfast-prepare again"):
        open_source(shards_copy, "train")


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        open_source(tmp_path / "nowhere", "train")


@pytest.mark.parametrize(
    ("content", "why"),
    [(b"", "the file is empty"), (b"hello, world", "not an image"), (None, "truncated")],
)
def test_unreadable_file_is_named(tmp_path: Path, content: bytes | None, why: str) -> None:
    for i in range(3):
        write_image(tmp_path / "train" / "a" / f"{i}.JPEG", i)
    path = tmp_path / "train" / "a" / "1.JPEG"
    path.write_bytes(path.read_bytes()[:-50] if content is None else content)
    with pytest.raises(UserError, match=rf"a/1\.JPEG is not a readable image \(.*{why}.*vimfast-prepare --skip-bad"):
        open_source(tmp_path, "train").read(np.arange(3))


def test_slow_files_are_read_by_more_threads(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a disk or network that takes 3 ms an answer."""
    read_image, lock = source_module.read_image, threading.Lock()
    now, most = 0, 0

    def slowly(path: Path) -> bytes:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.003)
        with lock:
            now -= 1
        return read_image(path)

    source, ids = open_source(tree, "train"), np.arange(36)
    expected = [data.tobytes() for data in source.read(ids).encoded]
    monkeypatch.setattr(source_module, "read_image", slowly)
    for _ in range(8):
        assert [data.tobytes() for data in source.read(ids).encoded] == expected
    assert 8 < most <= 32


@pytest.fixture
def in_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """An index of any size is too large for memory."""
    monkeypatch.setattr(rows_module, "MOST_IN_MEMORY", 1)


def test_a_large_index_is_read_where_it_is(
    shards: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    small = open_source(shards, "train")
    request.getfixturevalue("in_its_file")
    monkeypatch.setattr(rows_module, "_ROWS", 7)
    monkeypatch.setattr(rows_module, "read_index", None)
    large = open_source(shards, "train")
    ids = np.array([3, 35, 0, 3, 17])
    for mine, theirs in zip(small.read(ids), large.read(ids), strict=True):
        assert all(np.array_equal(one, other) for one, other in zip(mine, theirs, strict=True))
    assert np.array_equal(small.labels, large.labels)
    assert np.array_equal(small.class_counts(), large.class_counts())
    assert small.class_counts().tolist() == [12, 12, 12]
    assert (small.identity, small.bounds(), small.name(20)) == (large.identity, large.bounds(), large.name(20))
    assert small.mean_bytes() == large.mean_bytes()


@pytest.mark.usefixtures("in_its_file")
@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ("gone", r"train\.index\.npy is missing; copy it again, or rebuild it with vimfast-prepare --reindex"),
        ("cut", r"train\.index\.npy has [\d,]+ bytes, not the [\d,]+ of its samples"),
        ("folder", r"train\.index\.npy is not a regular file, but a folder"),
        ("header", r"train\.index\.npy is damaged: its header is another"),
        ("checksum", r"train\.index\.npy is damaged: its checksum is \d+, the manifest says"),
        ("offset", r"train\.index\.npy is damaged: it has a place outside its tar, in sample 5"),
    ],
)
def test_damage_of_a_large_index_is_found(shards: Path, tmp_path: Path, damage: str, sentence: str) -> None:
    """A row before it is used; the rest by the time that all have been looked through."""
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    path = copy / "train.index.npy"
    data = bytearray(path.read_bytes())
    row = len(data) - (36 - 5) * 32
    if damage in ("gone", "folder"):
        path.unlink()
    if damage == "folder":
        path.mkdir()
    if damage in ("cut", "header", "checksum", "offset"):
        data[{"cut": 0, "header": 20, "checksum": row + 20, "offset": row + 6}[damage]] ^= 1
        path.write_bytes(data[:-10] if damage == "cut" else data)
    with pytest.raises(UserError, match=sentence):
        open_source(copy, "train").class_counts()
    if damage == "offset":
        with pytest.raises(UserError, match=sentence):
            open_source(copy, "train").read(np.array([5]))


@pytest.mark.usefixtures("in_its_file")
def test_a_large_index_cut_off_while_in_use_is_a_sentence(shards: Path, tmp_path: Path) -> None:
    """Mapped, it would be a signal that ends the process."""
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    source = open_source(copy, "train")
    source.class_counts()
    os.truncate(copy / "train.index.npy", 200)
    with pytest.raises(UserError, match=r"train\.index\.npy was cut off while it was in use; .*, then resume"):
        source.read(np.array([30]))
