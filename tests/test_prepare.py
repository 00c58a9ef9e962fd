"""vimfast-prepare, run as people run it: what shards hold, who reads them, and what is left after a failure."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import enlarged, forbidden, visible, write_image
from forked import run_forked, run_in_forks
from PIL import Image

from vimfast import prepare
from vimfast.data.source import open_source
from vimfast.errors import UserError
from vimfast.shards import convert, jpeg, origin, writer
from vimfast.shards.format import MANIFEST, ConversionOptions, index_name, read_index, read_manifest
from vimfast.shards.plan import ShardPlan
from vimfast.shards.tree import FileList, scan_split

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "vimfast.prepare"]
TIMEOUT = 300.0  # seconds for what takes a few


def run(*words: object, status: int = 0, **options: Any) -> str:
    """Run vimfast-prepare, expect this exit status, return all that it said.

    Its workers are forks, too: as new interpreters, which those of COMMAND are, each takes longer than its images.
    """
    words = ("--workers", "1", *words)  # the last --workers counts
    done = run_forked(run_in_forks, "vimfast.prepare", *map(str, words), together=True, seconds=TIMEOUT, **options)
    assert done.returncode == status, done.stdout
    assert "Traceback" not in done.stdout
    return done.stdout


def run_short_of_room(size: int, *words: object) -> str:
    """The same where no file may be larger than `size` bytes: what it says when it is refused."""
    done = subprocess.run(
        [*COMMAND, "--workers", "1", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )
    assert done.returncode == 2, done.stdout
    assert "Traceback" not in done.stdout
    return done.stdout


def members(tar: Path) -> dict[str, bytes]:
    with tarfile.open(tar) as archive:
        return {m.name: archive.extractfile(m).read() for m in archive}  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def out(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared tree as shards of at most 10 samples. Do not write into it."""
    folder = tmp_path_factory.mktemp("shards")
    run(tree, "--out", folder, "--shard-samples", 10, "--workers", 2)
    return folder


def test_shards_hold_the_tree_byte_for_byte(tree: Path, out: Path) -> None:
    manifest = read_manifest(out)
    assert manifest.classes == ["n01", "n02", "n03"]
    for split, count in (("train", 36), ("val", 15)):
        entry = manifest.splits[split]
        assert (entry.samples, entry.changed, entry.skipped) == (count, [], [])
        rows = read_index(out, split, count)
        assert zlib.crc32((out / index_name(split)).read_bytes()) == entry.index_crc32
        assert entry.bytes == rows["size"].sum()
        tars = [out / shard.name for shard in entry.shards]
        found = {}
        for tar, shard in zip(tars, entry.shards, strict=True):
            assert tar.stat().st_size == shard.bytes
            content = members(tar)
            assert len(content) == 2 * shard.samples
            found |= content
        sources = {str(p.relative_to(tree / split).with_suffix("")): p for p in (tree / split).glob("*/*")}
        assert {name[:-4]: data for name, data in found.items() if name.endswith(".jpg")} == {
            key: path.read_bytes() for key, path in sources.items()
        }
        for key, path in sources.items():
            assert found[key + ".cls"] == str(manifest.classes.index(path.parent.name)).encode()
        for row in rows:
            data = tars[row["shard"]].read_bytes()[row["offset"] : row["offset"] + row["size"]]
            assert row["crc32"] == zlib.crc32(data)
            assert (row["height"], row["width"]) == jpeg.inspect(data)[1:3]
        assert sorted(rows["label"].tolist()) == sorted([0, 1, 2] * (count // 3))


def test_training_order_is_shuffled_and_validation_sorted(out: Path) -> None:
    train, val = np.load(out / "train.index.npy")["label"], np.load(out / "val.index.npy")["label"]
    assert sorted(val) == val.tolist()
    assert all(len(set(part)) >= 2 for part in np.array_split(train, 4))


def test_extracted_it_is_the_tree_again(tree: Path, out: Path, tmp_path: Path) -> None:
    for tar in out.glob("val-*.tar"):
        subprocess.run(["tar", "xf", str(tar), "-C", str(tmp_path)], check=True)
    for path in (tree / "val").glob("*/*"):
        copy = tmp_path / path.relative_to(tree / "val").with_suffix(".jpg")
        assert copy.read_bytes() == path.read_bytes()


def test_webdataset_reads_them(out: Path) -> None:
    wds = pytest.importorskip("webdataset")
    tars = sorted(map(str, out.glob("train-*.tar")))
    samples = list(wds.WebDataset(tars, shardshuffle=False).decode("pil").to_tuple("jpg", "cls"))
    rows = np.load(out / "train.index.npy")
    assert [label for _, label in samples] == rows["label"].tolist()
    assert [image.size for image, _ in samples] == list(zip(rows["width"], rows["height"], strict=True))


def test_dali_reads_them(out: Path) -> None:
    dali = pytest.importorskip("nvidia.dali")
    paths = sorted(map(str, out.glob("train-*.tar")))

    @dali.pipeline_def(batch_size=36, num_threads=1, device_id=None)
    def pipeline() -> tuple[object, object]:
        return tuple(
            dali.fn.readers.webdataset(
                paths=paths, index_paths=[path[:-3] + "idx" for path in paths], ext=["jpg", "cls"], name="reader"
            )
        )

    reader = pipeline()
    reader.build()
    assert reader.epoch_size("reader") == 36
    encoded, labels = reader.run()
    rows = np.load(out / "train.index.npy")
    assert [int(np.array(labels[i]).tobytes()) for i in range(36)] == rows["label"].tolist()
    assert [zlib.crc32(np.array(encoded[i])) for i in range(36)] == rows["crc32"].tolist()


def test_dali_index_is_what_its_own_tool_writes(out: Path, tmp_path: Path) -> None:
    wds2idx = pytest.importorskip("wds2idx")
    for tar in out.glob("*.tar"):
        with wds2idx.IndexCreator(str(tar), str(tmp_path / "x.idx"), verbose=False) as creator:
            creator.create_index()
        assert (tmp_path / "x.idx").read_text() == tar.with_suffix(".idx").read_text()


def test_the_plan_alone_decides_the_bytes(tree: Path, out: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(tree, moved)
    run(moved, "--out", tmp_path / "same", "--shard-samples", 10, "--workers", 1)
    assert visible(tmp_path / "same") == visible(out)
    run(tree, "--out", tmp_path / "other", "--shard-samples", 10, "--seed", 1)
    assert (tmp_path / "other/val-000000.tar").read_bytes() == (out / "val-000000.tar").read_bytes()
    assert (tmp_path / "other/train-000000.tar").read_bytes() != (out / "train-000000.tar").read_bytes()


@pytest.mark.parametrize(("samples", "most"), [(1, 4096), (10, 3), (511, 4096), (10_000, 4096), (100_000, 1000)])
def test_every_sample_is_in_one_part(samples: int, most: int) -> None:
    offsets = np.arange(0, 10 * (samples + 1), 10, dtype=np.int64)
    names = np.frombuffer("".join(f"{i:06d}.jpg" for i in range(samples)).encode(), np.uint8)
    files = FileList(Path("train"), ["a", "b"], np.sort(np.arange(samples, dtype=np.int32) % 2), names, offsets)
    plan = ShardPlan("train", files, ConversionOptions(shard_samples=most))
    parts = [plan.part(number) for number in range(plan.shards)]
    lengths = [len(part.names) for part in parts]
    assert max(lengths) <= most
    assert max(lengths) - min(lengths) <= 1
    keys = Counter(key for part in parts for key in part.keys)
    assert len(keys) == samples == sum(keys.values())


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A tree with one of each file that cannot be stored as it is, among good ones."""
    root = tmp_path / "odd"
    for i in range(4):
        write_image(root / f"train/n1/good_{i}.JPEG", i)
    Image.fromarray(np.full((20, 30, 3), 200, np.uint8)).save(root / "train/n1/is_png.JPEG", format="PNG")
    write_image(root / "train/n1/is_cmyk.JPEG", 7, mode="CMYK")
    write_image(root / "train/n1/is_grey.JPEG", 8, mode="L")
    return root


def test_odd_files_become_rgb_jpegs(odd: Path, tmp_path: Path) -> None:
    said = run(odd, "--out", tmp_path / "out")
    assert "has no val/" in said
    entry = read_manifest(tmp_path / "out").splits["train"]
    assert [note.file for note in entry.changed] == ["n1/is_cmyk.JPEG", "n1/is_png.JPEG"]
    assert ["4 components" in entry.changed[0].why, "png" in entry.changed[1].why] == [True, True]
    content = members(tmp_path / "out/train-000000.tar")
    for name in ("is_png", "is_cmyk"):
        source = (odd / f"train/n1/{name}.JPEG").read_bytes()
        assert content[f"n1/{name}.jpg"] == jpeg.to_rgb_jpeg(source)[0]
    assert content["n1/is_grey.jpg"] == (odd / "train/n1/is_grey.JPEG").read_bytes()


def spoil(root: Path) -> list[str]:
    """Add one of each unreadable file; returns their paths."""
    good = (root / "train/n1/good_0.JPEG").read_bytes()
    bad = {"empty": b"", "cut": good[: len(good) // 2], "page": b"<html>404</html>", "zeros": good[:200] + bytes(900)}
    for name, data in bad.items():
        (root / f"train/n1/{name}.JPEG").write_bytes(data)
    (root / "train/n1/dead.JPEG").symlink_to("nowhere")
    return [str(root / f"train/n1/{name}.JPEG") for name in (*bad, "dead")]


def test_all_unreadable_images_are_listed_and_nothing_looks_complete(odd: Path, tmp_path: Path) -> None:
    bad, out = spoil(odd), tmp_path / "out"
    said = run(odd, "--out", out, "--shard-samples", 3, status=2)
    for path in bad:
        assert f"{path}: " in said
    assert "good" not in said.split("error:")[0]
    assert "5 of 12 images" in said.splitlines()[-1]
    assert "--skip-bad" in said.splitlines()[-1]
    assert not (out / MANIFEST).exists()
    assert not list(out.glob("*.tmp"))
    with pytest.raises(
        UserError, match=rf"conversion of {odd} into {out} is not finished; run the same vimfast-prepare"
    ):
        read_manifest(out)

    run(odd, "--out", out, "--shard-samples", 3, "--skip-bad")
    entry = read_manifest(out).splits["train"]
    assert sorted(str(odd / "train" / note.file) for note in entry.skipped) == sorted(bad)
    assert entry.samples == 7 == len(read_index(out, "train", 7))
    run(odd, "--out", tmp_path / "at_once", "--shard-samples", 3, "--skip-bad")
    assert visible(out) == visible(tmp_path / "at_once")


def test_a_class_that_lost_its_last_image_is_the_last_word(odd: Path, tmp_path: Path) -> None:
    """Only that the conversion is complete was."""
    (odd / "train/n2").mkdir()
    (odd / "train/n2/cut.JPEG").write_bytes((odd / "train/n1/good_0.JPEG").read_bytes()[:100])
    for state in ("complete", "complete already"):
        *_, complete, warning = run(odd, "--out", tmp_path / "out", "--skip-bad").splitlines()
        assert f" is {state}: " in complete
        assert warning == "warning: class n2 has no images in train"


def test_a_fixed_image_is_stored_by_the_next_run(odd: Path, tmp_path: Path) -> None:
    spoil(odd)
    run(odd, "--out", tmp_path / "out", status=2)
    for path in (odd / "train/n1").iterdir():
        if path.name.split(".")[0] in ("empty", "cut", "page", "zeros", "dead"):
            path.unlink()
            write_image(path, 9)
    run(odd, "--out", tmp_path / "out")
    assert read_manifest(tmp_path / "out").splits["train"].samples == 12


def test_a_shard_of_nothing_but_unreadable_images_is_reported(odd: Path, tmp_path: Path) -> None:
    spoil(odd)
    said = run(odd, "--out", tmp_path / "out", "--shard-samples", 1, "--skip-bad", status=2)
    assert "no empty shard" in said.splitlines()[-1]
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_resize(odd: Path, tmp_path: Path) -> None:
    write_image(odd / "train/n2/large.JPEG", 1, (400, 200))
    write_image(odd / "train/n2/small.JPEG", 1, (30, 90))
    out = tmp_path / "out"
    run(odd, "--out", out, "--resize", 40, "--quality", 80)
    manifest = read_manifest(out)
    assert (manifest.resize, manifest.quality) == (40, 80)
    assert [note.file for note in manifest.splits["train"].changed] == ["n1/is_cmyk.JPEG", "n1/is_png.JPEG"]
    content = members(out / "train-000000.tar")
    assert jpeg.inspect(content["n2/large.jpg"])[1:3] == (40, 80)
    assert content["n2/small.jpg"] == (odd / "train/n2/small.JPEG").read_bytes()
    rows = np.load(out / "train.index.npy")
    assert np.minimum(rows["height"], rows["width"]).max() == 40


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 images."""
    root = tmp_path_factory.mktemp("many")
    for i in range(6):
        write_image(root / f"train/n{i % 3}/{i}.JPEG", i, (140, 120))
    for i in range(6, 300):
        os.link(root / f"train/n{i % 3}/{i % 6}.JPEG", root / f"train/n{i % 3}/{i}.JPEG")
    return root


@contextmanager
def held_after(images: int, *words: str) -> Iterator[subprocess.Popen[str]]:
    """A conversion that pauses after so many images; it is stopped or killed there."""
    environment = {**os.environ, "HOLD": str(images), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "held_prepare.py"), *words]
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.01)


def test_killed_it_resumes_to_the_same_bytes(many: Path, tmp_path: Path) -> None:
    words = [str(many), "--resize", "64", "--shard-samples", "10", "--workers", "2"]
    out = tmp_path / "out"
    with held_after(60, *words, "--out", str(out)) as process:
        # Of 61 images two workers have at most 20 in unfinished shards.
        wait_for(process, lambda: len(list(out.glob(".prepare/*.npz"))) >= 4)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (out / MANIFEST).exists()
    finished = {path: path.stat().st_ino for path in out.glob("*.tar")}
    recorded = [out / path.with_suffix(".tar").name for path in out.glob(".prepare/*.npz")]
    assert 4 <= len(recorded) <= 6
    run(*words, "--out", out)
    assert all((path.stat().st_ino, path) == (finished[path], path) for path in recorded), "finished shards stay"
    run(*words, "--out", tmp_path / "at_once")
    assert visible(out) == visible(tmp_path / "at_once")
    assert not list(out.rglob("*.tmp"))


def test_interrupted_it_stops_at_the_next_image(many: Path, tmp_path: Path) -> None:
    words = [str(many), "--out", str(tmp_path / "out"), "--resize", "64", "--shard-samples", "100"]
    with held_after(0, *words) as process:
        wait_for(process, lambda: bool(list(tmp_path.glob("out/*.tar.tmp"))))
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        said = process.communicate(timeout=TIMEOUT)[1]
    assert process.returncode == 130
    assert re.fullmatch(
        r"interrupted: no shard of \d+ is finished; the same command begins again", said.splitlines()[-1]
    )
    assert "Traceback" not in said
    assert visible(tmp_path / "out") == {}
    with pytest.raises(UserError, match=rf"the conversion of {many} into {tmp_path / 'out'} is not finished"):
        open_source(tmp_path / "out", "train")


def test_interrupted_it_says_what_stays(many: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with held_after(60, str(many), "--shard-samples", "10", "--workers", "2", "--out", str(out)) as process:
        wait_for(process, lambda: len(list(out.glob(".prepare/*.npz"))) >= 4)
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=TIMEOUT)[1]
    assert process.returncode == 130
    done = len(list(out.glob(".prepare/*.npz")))
    sentence = rf"interrupted: {done} of \d+ shards are finished and stay in {out}; the same command verifies them .*"
    assert re.fullmatch(sentence, said.splitlines()[-1])


def test_shards_are_not_converted_again(tree: Path, out: Path, tmp_path: Path) -> None:
    said = run(out, "--out", tmp_path / "again", status=2)
    assert f"error: {out} holds shards already; train on them with --data-path {out}, or give the folder" in said
    assert not (tmp_path / "again").exists()


def test_a_subset_of_imagenet_is_recognized(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("n01440764", "n01443537"):
            write_image(tmp_path / "data" / split / name / "1.JPEG", 1)
    said = run(tmp_path / "data", "--out", tmp_path / "subset")
    assert "data looks like a subset of ImageNet, with 2 of its 1,000 classes; " in said
    assert "vimfast check --classes 2" in said
    os.rename(tmp_path / "data" / "train" / "n01443537", tmp_path / "data" / "train" / "cat")
    os.rename(tmp_path / "data" / "val" / "n01443537", tmp_path / "data" / "val" / "cat")
    assert "subset of ImageNet" not in run(tmp_path / "data", "--out", tmp_path / "other")


def test_a_finished_folder_is_left_alone(tree: Path, out: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != "lock"}
    said = run(tree, "--out", out, "--shard-samples", 10)
    assert "is complete already: 36 train images" in said
    assert said.endswith(f", {sum(tar.stat().st_size for tar in out.glob('*.tar')) / 1e6:.1f} MB of tars\n")
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != "lock"}


@pytest.mark.parametrize("damage", ["tar gone", "tar cut", "idx gone", "index gone", "manifest cut"])
def test_a_damaged_folder_is_repaired(tree: Path, out: Path, tmp_path: Path, damage: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    what, how = damage.split()
    path = copy / {"tar": "train-000001.tar", "idx": "train-000001.idx", "index": "val.index.npy"}.get(what, MANIFEST)
    if how == "gone":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size // 2)
    other = (copy / "train-000000.tar").stat().st_ino
    run(tree, "--out", copy, "--shard-samples", 10)
    assert visible(copy) == visible(out)
    assert (copy / "train-000000.tar").stat().st_ino == other


def test_a_replaced_image_is_noticed_when_resuming(tree: Path, out: Path, tmp_path: Path) -> None:
    root, copy = tmp_path / "root", tmp_path / "copy"
    shutil.copytree(tree, root)
    run(root, "--out", copy, "--shard-samples", 10)
    (copy / MANIFEST).unlink()
    file = root / "train/n02/n02_3.JPEG"
    write_image(file, 99)
    run(root, "--out", copy, "--shard-samples", 10)
    found = {name: data for tar in copy.glob("train-*.tar") for name, data in members(tar).items()}
    assert found["n02/n02_3.jpg"] == file.read_bytes()


@pytest.mark.parametrize("damage", ["dangling tar", "manifest is a folder", "record is a folder", "tmp is a folder"])
def test_what_is_no_file_in_the_folder_is_a_sentence(tree: Path, out: Path, tmp_path: Path, damage: str) -> None:
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    name = {"dangling": "train-000001.tar", "manifest": MANIFEST, "record": ".prepare/val-000000.npz", "tmp": "x"}
    path = copy / name[damage.split()[0]]
    if damage.startswith("tmp"):
        (copy / MANIFEST).unlink()
        path = copy / f"{MANIFEST}.tmp"
    else:
        path.unlink()
    path.symlink_to("nowhere") if damage.startswith("dangling") else path.mkdir()
    if damage.startswith("dangling"):
        run(tree, "--out", copy, "--shard-samples", 10)
        assert visible(copy) == visible(out)
    else:
        said = run(tree, "--out", copy, "--shard-samples", 10, status=2)
        assert "cannot be written (Is a directory); fix that and run again, it resumes" in said.splitlines()[-1]


def test_what_a_conversion_keeps_for_itself_may_be_a_fifo(tree: Path, out: Path, tmp_path: Path) -> None:
    """It was waited for without end."""
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    for name in ("plan.json", "source.txt"):
        (copy / ".prepare" / name).unlink()
        os.mkfifo(copy / ".prepare" / name)
    run(tree, "--out", copy, "--shard-samples", 10)
    (copy / MANIFEST).unlink()
    with pytest.raises(UserError, match="is not finished"):
        read_manifest(copy)


def edit_index(out: Path) -> None:
    rows = np.load(out / "train.index.npy")
    rows["offset"][5] = 10**9
    np.save(out / "train.index.npy", rows)


def test_a_damaged_index_is_made_again(tree: Path, out: Path, tmp_path: Path) -> None:
    """It was called complete, while the trainer said to run vimfast-prepare again."""
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    tars = {path: path.stat().st_mtime_ns for path in copy.glob("*.tar")}
    edit_index(copy)
    said = run(tree, "--out", copy, "--shard-samples", 10)
    assert "train.index.npy is damaged: its checksum is" in said
    assert visible(copy) == visible(out)
    assert tars == {path: path.stat().st_mtime_ns for path in copy.glob("*.tar")}
    edit_index(copy)
    shutil.rmtree(copy / ".prepare")
    run(tree, "--out", copy, "--shard-samples", 10)
    assert visible(copy) == visible(out)


@pytest.mark.parametrize("column", ["label", "height", "shard"])
def test_an_index_that_is_wrong_with_a_checksum_that_is_right_is_made_again(
    tree: Path, out: Path, tmp_path: Path, column: str
) -> None:
    """The trainer refused it, and said to run what called it complete."""
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    rows = np.load(copy / "train.index.npy")
    rows[column][5] = 0 if column == "height" else 77
    np.save(copy / "train.index.npy", rows)
    raw = json.loads((copy / MANIFEST).read_text())
    raw["splits"]["train"]["index_crc32"] = zlib.crc32((copy / "train.index.npy").read_bytes())
    del raw["crc32"]
    (copy / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"train\.index\.npy is damaged: it .*run vimfast-prepare again"):
        open_source(copy, "train")
    assert "differs from the records of its shards: it is made again" in run(tree, "--out", copy, "--shard-samples", 10)
    assert visible(copy) == visible(out)


def spoil_index(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-30] ^= 1
    path.write_bytes(data)


INDEXES = ("train.index.npy", "val.index.npy", "train-000002.idx")


@pytest.mark.parametrize("spoil", [spoil_index, Path.unlink, lambda path: path.write_bytes(b""), None])
@pytest.mark.parametrize("records", [True, False])
def test_indexes_are_rebuilt_from_the_tars_alone(
    out: Path, tmp_path: Path, spoil: Callable[[Path], None] | None, records: bool
) -> None:
    """Where the images are gone, the trainer's advice could not be followed."""
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    if not records:
        shutil.rmtree(copy / ".prepare")
    for name in INDEXES if spoil else ():
        spoil(copy / name)
    if spoil:
        with pytest.raises(UserError, match=rf"train\.index\.npy .*rebuild it with vimfast-prepare --reindex {copy}"):
            open_source(copy, "train")
    said = run("--reindex", copy)
    assert visible(copy) == visible(out)
    listed = "wrote train.index.npy, train-000002.idx, val.index.npy" if spoil else "every index is what is in the tars"
    assert said == f"{copy}: {listed}\n"


@pytest.mark.parametrize("records", [True, False])
def test_indexes_are_not_rebuilt_from_other_tars(out: Path, tmp_path: Path, records: bool) -> None:
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    if not records:
        shutil.rmtree(copy / ".prepare")
    spoil_index(copy / "train.index.npy")
    before = visible(copy)
    row = np.load(out / "train.index.npy")[9]
    tar = copy / "train-000001.tar"
    data = bytearray(tar.read_bytes())
    data[int(row["offset"]) + 300] ^= 2
    tar.write_bytes(data)
    said = run("--reindex", copy, status=2)
    which = "train-000001.tar" if records else "the train tars"
    assert f"manifest.json is of other images than those in {which}; " in said
    data[int(row["offset"]) - 512] ^= 2
    tar.write_bytes(data)
    os.truncate(copy / "val-000001.tar", 1000)
    said = run("--reindex", copy, status=2)
    assert "has damaged tars: train-000001.tar is damaged (the tar header at byte" in said
    assert "; val-000001.tar has 1,000 bytes, the manifest says" in said
    (copy / "val-000001.tar").unlink()
    assert "val-000001.tar cannot be read (No such file" in run("--reindex", copy, status=2)
    assert {name: data for name, data in visible(copy).items() if not name.endswith(".tar")} == {
        name: data for name, data in before.items() if not name.endswith(".tar")
    }


def test_an_unfinished_folder_has_no_indexes_to_rebuild(out: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    (copy / MANIFEST).unlink()
    assert "is not finished; run the same vimfast-prepare" in run("--reindex", copy, status=2)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("place", ["image", "header", "checksum", "label", "padding", "end", "idx", "record"])
def test_a_shard_damaged_in_place_is_made_again(
    tree: Path, out: Path, tmp_path: Path, place: str, finished: bool
) -> None:
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    tar, row = copy / "train-000001.tar", np.load(out / "train.index.npy")[9]
    assert row["shard"] == 1
    start, end = int(row["offset"]), int(row["offset"] + row["size"])
    label = end + -end % 512 + 512
    where = {
        "image": start + 300,
        "header": start - 512,
        "checksum": start - 512 + 155,
        "label": label,
        "padding": label + 9,
        "end": -1,
    }
    path = {"idx": tar.with_suffix(".idx"), "record": copy / ".prepare/train-000001.npz"}.get(place, tar)
    data = bytearray(path.read_bytes())
    data[where.get(place, 60)] ^= 2
    path.write_bytes(data)
    if not finished:
        (copy / MANIFEST).unlink()
    others = {path: path.stat().st_mtime_ns for path in copy.glob("*.tar") if path != tar}
    said = run(tree, "--out", copy, "--shard-samples", 10)
    assert "train-000001.tar" in said
    assert "it is made again" in said
    assert visible(copy) == visible(out)
    assert others == {path: path.stat().st_mtime_ns for path in others}
    assert "is complete already" in run(tree, "--out", copy, "--shard-samples", 10)


def test_only_shards_of_other_images_are_made_again(tree: Path, out: Path, tmp_path: Path) -> None:
    """A finished folder, too, was called complete. A copy of the tree with other times is the same tree."""
    root, copy = tmp_path / "root", tmp_path / "copy"
    shutil.copytree(tree, root)
    run(root, "--out", copy, "--shard-samples", 10)
    for path in root.rglob("*.JPEG"):
        os.utime(path, (1, 1))
    for _ in range(2):
        assert "is complete already" in run(root, "--out", copy, "--shard-samples", 10)
    file = root / "train/n02/n02_3.JPEG"
    data = bytearray(file.read_bytes())
    data[-40] ^= 1
    file.write_bytes(data)
    times = {path: path.stat().st_mtime_ns for path in copy.glob("*.tar")}
    said = run(root, "--out", copy, "--shard-samples", 10)
    assert "was made from another n02/n02_3.JPEG: it is made again" in said
    assert sum(path.stat().st_mtime_ns != time for path, time in times.items()) == 1
    found = {name: data for tar in copy.glob("train-*.tar") for name, data in members(tar).items()}
    assert found["n02/n02_3.jpg"] == bytes(data)


def test_an_image_replaced_by_one_of_the_same_size_and_time_is_noticed(tree: Path, tmp_path: Path) -> None:
    """As copying it back from a backup does: a damaged image stayed in the shards."""
    root, copy = tmp_path / "root", tmp_path / "copy"
    shutil.copytree(tree, root)
    file = root / "train/n02/n02_3.JPEG"
    whole, times = file.read_bytes(), file.stat()
    file.write_bytes(whole[:300] + bytes(9) + whole[309:])
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    run(root, "--out", copy, "--shard-samples", 10)
    file.write_bytes(whole)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert "was made from another n02/n02_3.JPEG: it is made again" in run(root, "--out", copy, "--shard-samples", 10)
    assert "is complete already" in run(root, "--out", copy, "--shard-samples", 10)


@pytest.mark.parametrize("year", [1600, 1900, 2300])
def test_images_of_any_date(odd: Path, tmp_path: Path, year: int) -> None:
    """Some archives have such; it was an OverflowError."""
    file = odd / "train/n1/good_0.JPEG"
    subprocess.run(["touch", "-d", f"{year}-01-01", str(file)], check=True)
    run(odd, "--out", tmp_path / "out")
    assert "is complete already" in run(odd, "--out", tmp_path / "out")
    file.write_bytes((odd / "train/n1/good_1.JPEG").read_bytes())
    assert "made from another n1/good_0.JPEG" in run(odd, "--out", tmp_path / "out")


def test_an_image_that_was_skipped_is_taken_in_once_it_is_fixed(odd: Path, tmp_path: Path) -> None:
    """The file, its link and its permission."""
    out, words = tmp_path / "out", [odd, "--out", tmp_path / "out", "--skip-bad"]
    spoil(odd)
    run(*words)
    assert "5 skipped" in run(*words)
    write_image(odd / "train/n1/cut.JPEG", 9)
    (odd / "train/n1/nowhere").write_bytes((odd / "train/n1/cut.JPEG").read_bytes())
    assert "made from another n1/cut.JPEG" in run(*words)
    assert [note.file for note in read_manifest(out).splits["train"].skipped] == [
        f"n1/{name}.JPEG" for name in ("empty", "page", "zeros")
    ]


def test_records_of_earlier_versions_serve(tree: Path, out: Path, tmp_path: Path) -> None:
    """They have one checksum of all sizes and times."""
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    for path in copy.glob(".prepare/*.npz"):
        with np.load(path) as saved:
            tables = {name: saved[name] for name in ("rows", "record")}
        np.savez(path, **tables)
    assert "is complete already" in run(tree, "--out", copy, "--shard-samples", 10)


def test_another_plan_is_refused_and_overwrite_is_the_fix(tree: Path, tmp_path: Path) -> None:
    root, out = tmp_path / "root", tmp_path / "out"
    shutil.copytree(tree / "val", root / "val")
    run(root, "--out", out)
    before = visible(out)
    said = run(root, "--out", out, "--resize", 32, status=2)
    assert "--resize 32 --quality 90" in said
    assert "--overwrite" in said
    (root / "val/n01/n01_0.JPEG").rename(root / "val/n01/new.JPEG")
    assert "from other files in val/" in run(root, "--out", out, status=2)
    assert visible(out) == before
    (out / "notes.txt").write_text("mine")
    (out / "val-000007.tar").write_bytes(b"left over")
    run(root, "--out", out, "--resize", 32, "--overwrite")
    assert read_manifest(out).resize == 32
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out / "val-000007.tar").exists()


def test_a_split_may_come_later(tree: Path, out: Path, tmp_path: Path) -> None:
    root, copy = tmp_path / "root", tmp_path / "copy"
    root.mkdir()
    (root / "train").symlink_to(tree / "train")
    run(root, "--out", copy, "--shard-samples", 10)
    first = (copy / "train-000000.tar").stat().st_ino
    (root / "val").symlink_to(tree / "val")
    run(root, "--out", copy, "--shard-samples", 10)
    assert (copy / "train-000000.tar").stat().st_ino == first
    assert visible(copy) == visible(out)


def test_names_that_confuse_readers_get_other_keys(tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset")
    root = tmp_path / "root"
    names = [
        "v1.0 final.jpg",
        "same.jpg",
        "same.png",
        "sa me.jpg",
        "sa_me.jpg",
        "file-1.jpg",
        "x" * 120 + ".jpg",
        "狗.jpg",
    ]
    for i, name in enumerate(names):
        write_image(root / "val/Egyptian cat" / name, i, (20 + i, 20))
        write_image(root / "val/Egyptian_cat" / name, i, (40 + i, 20))
    write_image(root / "val" / ("long " * 20) / "sub" / "a.jpg", 0, (60, 20))
    run(root, "--out", tmp_path / "out")
    tar, rows = tmp_path / "out/val-000000.tar", np.load(tmp_path / "out/val.index.npy")
    found = list(wds.WebDataset(str(tar), shardshuffle=False).decode("pil"))
    assert len({sample["__key__"] for sample in found}) == len(found) == 2 * len(names) + 1
    assert [sample["jpg"].size for sample in found] == list(zip(rows["width"], rows["height"], strict=True))
    assert sorted(width for width, _ in (sample["jpg"].size for sample in found)) == sorted(
        [20 + i for i in range(8)] + [40 + i for i in range(8)] + [60]
    )
    lines = tar.with_suffix(".idx").read_text().splitlines()[1:]
    assert [len(line.split()) for line in lines] == [8] * len(found)
    with tarfile.open(tar) as archive:
        assert all(not member.pax_headers and len(os.fsencode(member.name)) <= 100 for member in archive)
    assert "Egyptian_cat/v1_0_final" in {sample["__key__"] for sample in found}


def test_too_little_space_is_reported_before_it_starts(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=10_000))
    for extra in ([], ["--resize", "32"]):
        monkeypatch.setattr(sys, "argv", ["vimfast-prepare", str(tree), "--out", str(tmp_path / "out"), *extra])
        with pytest.raises(UserError, match=r"needs about 0\.\d MB more, 0\.0 MB are free"):
            prepare.run()
    assert visible(tmp_path / "out") == {}


def test_the_estimate_is_near(tree: Path, out: Path) -> None:
    estimate = writer.estimate_bytes(ShardPlan("train", scan_split(tree, "train"), ConversionOptions(shard_samples=10)))
    written = sum(path.stat().st_size for path in out.glob("train*"))
    assert 0.8 < estimate / written < 1.25


def test_a_full_disk_is_reported_and_resumed_from(tree: Path, out: Path, tmp_path: Path) -> None:
    words = [tree, "--out", tmp_path / "out", "--shard-samples", 10]
    said = run_short_of_room((out / "train-000000.tar").stat().st_size // 2, *words)
    assert "cannot be written (File too large)" in said.splitlines()[-1]
    assert not (tmp_path / "out" / MANIFEST).exists()
    assert not list(tmp_path.glob("out/*.tmp"))
    run(*words)
    assert visible(tmp_path / "out") == visible(out)


def test_a_disk_that_is_full_at_once_is_reported(tree: Path, tmp_path: Path) -> None:
    """Before there are workers; it was a traceback."""
    said = run_short_of_room(100, tree, "--out", tmp_path / "out")
    sentence = f"error: {tmp_path / 'out'} cannot be written (File too large); make room there and run again"
    assert said.splitlines()[-1].startswith(sentence)
    assert visible(tmp_path / "out") == {}
    run(tree, "--out", tmp_path / "out")


def test_a_source_that_went_away_is_not_skipped(tree: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(tree, root)
    part = ShardPlan("train", scan_split(root, "train"), ConversionOptions()).part(0)
    shutil.rmtree(root)
    (tmp_path / "out/.prepare").mkdir(parents=True)
    with pytest.raises(UserError, match=r"cannot be read .*resumes"):
        writer.write_shard(part, tmp_path / "out", skip_bad=True, tick=lambda name: None)
    assert visible(tmp_path / "out") == {}


def test_links_to_a_disk_that_went_away_are_not_skipped(odd: Path, tmp_path: Path) -> None:
    """A tree of links lost all its images under --skip-bad when their disk did, without an error."""
    (tmp_path / "disk").mkdir()
    for i in range(4):
        (odd / f"train/n1/good_{i}.JPEG").rename(tmp_path / f"disk/{i}.JPEG")
        (odd / f"train/n1/good_{i}.JPEG").symlink_to(tmp_path / f"disk/{i}.JPEG")
    (tmp_path / "disk").rename(tmp_path / "away")
    said = run(odd, "--out", tmp_path / "out", "--skip-bad", status=2)
    assert "JPEG cannot be read (No such file or directory); once the source folder is back, run again" in said
    (tmp_path / "away").rename(tmp_path / "disk")
    (tmp_path / "disk/0.JPEG").unlink()
    said = run(odd, "--out", tmp_path / "out", "--skip-bad")
    assert "6 train images in 1 shard, 2 converted to RGB JPEG, 1 skipped" in said
    (tmp_path / "disk").rename(tmp_path / "away")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.name != "lock"}
    said = run(odd, "--out", tmp_path / "out", "--skip-bad", status=2)
    assert "cannot be read (No such file or directory); once the source folder is back" in said
    assert before == {path: path.stat().st_mtime_ns for path in before}, "what is complete stays complete"


def test_files_that_may_no_longer_be_read_are_not_skipped(odd: Path) -> None:
    """As when a ticket for a network file system expires; one file alone, in a folder that can be listed, is bad."""
    file = odd / "train/n1/good_0.JPEG"
    with forbidden(odd), pytest.raises(UserError, match=r"good_0\.JPEG cannot be read \(Permission denied\); once"):
        origin.read_source(file)
    with tempfile.TemporaryDirectory() as name:  # what is in pytest's folders is for their owner only
        os.chmod(name, 0o755)
        alone = Path(shutil.copy(file, name))
        with forbidden(alone), pytest.raises(ValueError, match=r"cannot be opened: Permission denied"):
            origin.read_source(alone)


KILLED_BY_AN_IMAGE = """
import os, signal
from vimfast.prepare import main
from vimfast.shards import origin

read_source = origin.read_source

def read(path):
    if path.name == "good_2.JPEG":
        os.kill(os.getpid(), signal.SIGKILL)
    return read_source(path)

origin.read_source = read  # in each worker too: they import this file

if __name__ == "__main__":
    main()
"""


def test_the_image_that_kills_a_worker_is_named(odd: Path, tmp_path: Path) -> None:
    """One of a million, which makes its decoder crash or takes all memory, each time."""
    (tmp_path / "killed.py").write_text(KILLED_BY_AN_IMAGE)
    command = [sys.executable, str(tmp_path / "killed.py"), str(odd), "--out", str(tmp_path / "out"), "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 2, done.stderr
    assert "a worker process was killed, perhaps for lack of memory, with n1/good_2.JPEG in work; " in done.stderr


def test_a_log_that_is_full_does_not_end_a_conversion(odd: Path, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        subprocess.run([*COMMAND, str(odd), "--out", str(tmp_path / "out")], stderr=full, stdout=subprocess.DEVNULL)
    assert read_manifest(tmp_path / "out").splits["train"].samples == 7


def test_too_little_memory_is_not_skipped(odd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was: "why: MemoryError"."""

    def short(*args: object, **options: object) -> None:
        raise MemoryError

    part = ShardPlan("train", scan_split(odd, "train"), ConversionOptions()).part(0)
    (tmp_path / "out/.prepare").mkdir(parents=True)
    monkeypatch.setattr(jpeg, "to_rgb_jpeg", short)
    with pytest.raises(UserError, match=r"too little memory to decode .*is_(png|cmyk)\.JPEG; free some.*resumes"):
        writer.write_shard(part, tmp_path / "out", skip_bad=True, tick=lambda name: None)
    assert visible(tmp_path / "out") == {}


def test_sixteen_bits_are_scaled_and_floats_refused(odd: Path, tmp_path: Path) -> None:
    shades = np.linspace(0, 65535, 60 * 60).reshape(60, 60)
    Image.fromarray(shades.astype(np.uint16)).save(odd / "train/n1/deep.png")
    Image.fromarray(shades.astype(np.float32)).save(odd / "train/n1/float.tif")
    said = run(odd, "--out", tmp_path / "out", status=2)
    assert "float.tif: its samples are floats of 16 or 32 bits in a range that it does not say" in said
    run(odd, "--out", tmp_path / "out", "--skip-bad")
    changed = {note.file: note.why for note in read_manifest(tmp_path / "out").splits["train"].changed}
    assert changed["n1/deep.png"] == "16-bit png, stored as an RGB JPEG"
    (tmp_path / "deep.jpg").write_bytes(members(tmp_path / "out/train-000000.tar")["n1/deep.jpg"])
    with Image.open(tmp_path / "deep.jpg") as image:
        assert np.abs(np.asarray(image.convert("L"), float) - shades / 257).max() <= 4


def test_formats_that_pillow_reads_are_converted_and_other_files_counted(odd: Path, tmp_path: Path) -> None:
    with Image.open(odd / "train/n1/good_0.JPEG") as image:
        for name in ("a.gif", "b.jp2", "c.avif", "d.tiff", "e.jfif"):
            image.save(odd / "train/n1" / name, {".jfif": "JPEG"}.get(name[1:]))
    for name in ("x.heic", "y.HEIC", "z.txt"):
        (odd / "train/n1" / name).write_bytes(b"x")
    for _ in range(2):
        said = run(odd, "--out", tmp_path / "out")
        assert "train: not converted, since the names are not of images: 2 .heic, 1 .txt" in said
    entry = read_manifest(tmp_path / "out").splits["train"]
    assert entry.samples == 12
    assert {note.file[3:] for note in entry.changed} >= {"a.gif", "b.jp2", "c.avif", "d.tiff"}


def test_what_is_passed_over_is_said(odd: Path, tmp_path: Path) -> None:
    """A class archive that was not unpacked, images beside the class folders, and a class without any."""
    (odd / "train/n2").mkdir()
    (odd / "train/n3.tar").touch()
    shutil.copy(odd / "train/n1/good_0.JPEG", odd / "train/loose.JPEG")
    said = run(odd, "--out", tmp_path / "out")
    assert f"{odd}/train: 7 images of 2 classes\nclass n2 has no images in {odd}/train\n" in said
    assert f"{odd}/train: not converted, since the names are not of images: 1 .tar" in said
    assert f"{odd}/train: not converted, outside any class folder: 1 image" in said


def test_files_and_frames_larger_than_images_are(odd: Path, tmp_path: Path) -> None:
    """A sparse file was too little space, too little memory or an OverflowError; a damaged header passed."""
    good = (odd / "train/n1/good_0.JPEG").read_bytes()
    for name, size in (("x.JPEG", 100 << 30), ("y.JPEG", 5 << 30)):
        (odd / f"train/n1/{name}").write_bytes(good)
        os.truncate(odd / f"train/n1/{name}", size)
    (odd / "train/n1/z.JPEG").write_bytes(enlarged(good))
    for extra in ([], ["--resize", 32]):
        said = run(odd, "--out", tmp_path / "out", *extra, status=2)
        assert "x.JPEG: 107,374,182,400 bytes, which is more than 1,073,741,824" in said
        assert "y.JPEG: 5,368,709,120 bytes, which is more" in said
        assert "z.JPEG: Image size (4290250000 pixels) exceeds limit" in said
        run(odd, "--out", tmp_path / "out", *extra, "--skip-bad")
        assert read_manifest(tmp_path / "out").splits["train"].samples == 7
        shutil.rmtree(tmp_path / "out")


def test_a_name_with_a_line_end_is_on_one_line(odd: Path, tmp_path: Path) -> None:
    (odd / "train/n1/a\nb.JPEG").write_bytes(b"")
    assert f"\n{odd}/train/n1/a\\nb.JPEG: the file is empty\n" in run(odd, "--out", tmp_path / "out", status=2)


def test_a_folder_that_may_not_be_looked_into(odd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["vimfast-prepare", str(odd), "--out", str(tmp_path / "out")])
    with forbidden(odd), pytest.raises(UserError, match=r"odd/train cannot be read \(Permission denied\)"):
        prepare.run()


def test_only_regular_files_are_read(odd: Path, tmp_path: Path) -> None:
    """A FIFO was waited for without end, and 5 GB were read of a link to /dev/zero."""
    folder = odd / "train/n1"
    os.mkfifo(folder / "fifo.JPEG")
    (folder / "zero.JPEG").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(folder / "socket.JPEG"))
    for extra in ([], ["--resize", 32]):
        said = run(odd, "--out", tmp_path / "out", *extra, status=2)
        assert "fifo.JPEG: not a regular file, but a FIFO" in said
        assert "zero.JPEG: not a regular file, but a device" in said
        assert "socket.JPEG: not a regular file, but a socket or a device" in said
        run(odd, "--out", tmp_path / "out", *extra, "--skip-bad")
        assert read_manifest(tmp_path / "out").splits["train"].samples == 7
        shutil.rmtree(tmp_path / "out")


def test_home_is_known_in_every_path(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "tree").symlink_to(tree)
    home = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    (tmp_path / "elsewhere").mkdir()
    run("~/tree", "--out=~/out", env=home, folder=tmp_path / "elsewhere")
    assert (tmp_path / "out" / MANIFEST).is_file()
    assert not list((tmp_path / "elsewhere").iterdir())


def test_two_at_once_are_kept_apart(tree: Path, tmp_path: Path) -> None:
    with convert.locked(tmp_path):
        assert "another vimfast-prepare" in run(tree, "--out", tmp_path, status=2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{tree}", "--uot", "x"], "unknown flag --uot; did you mean '--out'?"),
        (["{tree}", "--out", "x", "--resise=256"], "unknown flag --resise; did you mean '--resize'?"),
        (["{tree}", "extra", "--out", "x"], "unrecognized arguments: extra"),
        (["{tree}"], "--out is missing"),
        (["--out", "x"], "IMAGENET_ROOT is missing"),
        (["--reindex", "x", "--out", "y"], "--reindex takes the folder of shards alone"),
        (["--reindex", "nowhere"], "nowhere is not a folder"),
        (["{tree}", "--out", "x", "--resize", "big"], "--resize is 'big'; it must be an integer >= 1"),
        (["{tree}", "--out", "x", "--resize", "0"], "--resize is 0; it must be >= 1"),
        (["{tree}", "--out", "x", "--quality", "90"], "--quality needs --resize"),
        (["{tree}", "--out", "x", "--resize", "64", "--quality", "101"], "--quality is 101; it must be from 1 to 100"),
        (["nowhere", "--out", "x"], "nowhere does not exist"),
        (["{tree}", "--out", "{tree}/train/shards"], "is inside the images"),
        (["{tree}", "--out", "{tree}"], "is inside the images"),
        (["{tree}", "--out", "{tree}/train/n01/n01_0.JPEG"], "is inside the images"),
        (["{tree}", "--out", "/dev/null"], "is a file"),
        (["{tree}", "--out", "/proc/x"], "cannot be written to"),
    ],
)
def test_bad_input_is_reported_in_a_sentence(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["vimfast-prepare", *(word.format(tree=tree) for word in words)])
    with pytest.raises(UserError) as caught:
        prepare.run()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_foreign_tars_are_not_touched(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "train-000000.tar").write_bytes(b"somebody's")
    said = run(tree, "--out", tmp_path, status=2)
    assert "unknown origin" in said
    assert (tmp_path / "train-000000.tar").read_bytes() == b"somebody's"


def test_help_and_the_checkouts_script() -> None:
    script = ROOT / "tools" / "make_shards.py"
    said = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True).stdout
    assert all(flag in said for flag in ("--out", "--resize", "--quality", "--skip-bad", "--overwrite"))
