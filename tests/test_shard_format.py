"""The files of a shards folder are read back as they were written, or refused in one sentence."""

from __future__ import annotations

import json
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vimfast.checks import checking
from vimfast.checks.findings import CheckOptions
from vimfast.data.source import open_source
from vimfast.errors import UserError
from vimfast.shards.convert import convert
from vimfast.shards.format import (
    INDEX_DTYPE,
    MANIFEST,
    ConversionOptions,
    Manifest,
    Note,
    PlanDigest,
    ShardEntry,
    SplitEntry,
    index_name,
    read_index,
    read_manifest,
    write_manifest,
)
from vimfast.shards.verify import read_tar
from vimfast.shards.writer import STATE_FOLDER, Record, join_rows, read_record, record_path, write_record

COLUMNS = [INDEX_DTYPE[name] for name in INDEX_DTYPE.names or ()]
ROWS = st.tuples(*(st.integers(np.iinfo(column).min, np.iinfo(column).max) for column in COLUMNS))
SHARDS = st.lists(st.lists(ROWS, min_size=1, max_size=4), min_size=1, max_size=4)


def write_rows(folder: Path, shards: list[list[tuple[int, ...]]]) -> tuple[np.ndarray, int]:
    """Shards' records and the index over them; returns all rows and the index's checksum."""
    (folder / STATE_FOLDER).mkdir()
    parts = [np.array(rows, INDEX_DTYPE) for rows in shards]
    for number, rows in enumerate(parts):
        record = Record(len(rows), 10, 5, number, [("a.png", "png")], [("\udcff.JPEG", "the file is empty")])
        write_record(record_path(folder, "train", number), record, rows)
        assert read_record(folder, "train", number) == record
    rows = np.concatenate(parts)
    index = join_rows(folder, "train", len(parts))
    (folder / index_name("train")).write_bytes(index)
    return rows, zlib.crc32(index)


@given(SHARDS)
def test_the_index_is_read_as_it_was_written(shards: list[list[tuple[int, ...]]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows, checksum = write_rows(folder, shards)
        index = read_index(folder, "train", len(rows))
        assert index.dtype == rows.dtype
        assert index.tobytes() == rows.tobytes()
        assert zlib.crc32((folder / index_name("train")).read_bytes()) == checksum
        with pytest.raises(UserError, match=f"has {len(rows)} samples, the manifest says {len(rows) + 1}"):
            read_index(folder, "train", len(rows) + 1)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("index")
    write_rows(folder, [[(512, 100, 0, 1, 2, 30, 40)], [(512, 90, 1, 0, 3, 50, 60)]])
    return (folder / index_name("train")).read_bytes()


def read_damaged(data: bytes) -> np.ndarray | UserError:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / index_name("train")
        path.write_bytes(data)
        try:
            return np.array(read_index(Path(name), "train", 2))
        except UserError as error:
            assert str(path) in error.problem  # noqa: PT017
            return error


@given(st.integers(0, 319))
@example(0)
@example(256)
@example(319)
def test_an_index_cut_short_is_refused(index: bytes, length: int) -> None:
    assert len(index) == 320
    assert isinstance(read_damaged(index[:length]), UserError)


@given(st.lists(st.tuples(st.integers(0, 255), st.integers(0, 255)), min_size=1, max_size=4))
@example([(0, ord("P")), (1, ord("K")), (2, 3), (3, 4)])
@example([(8, 0)])
@example([(8, 255), (9, 255)])
def test_an_index_with_a_damaged_header_is_refused_or_still_serves(index: bytes, edits: list[tuple[int, int]]) -> None:
    data = bytearray(index)
    for at, value in edits:
        data[at] = value
    rows = read_damaged(bytes(data))
    assert isinstance(rows, UserError) or rows.tobytes() == index[256:]


@pytest.fixture
def manifest() -> Manifest:
    shards = [ShardEntry("val-000000.tar", 3, 10_240), ShardEntry("val-000001.tar", 2, 10_240)]
    entry = SplitEntry(5, 900, shards, 123, [], [Note("a/\udcff.JPEG", "the file is empty")])
    options = ConversionOptions(1, 64, 90)
    return Manifest(
        "vimfast-shards", 1, "0.1", "today", ["a", "狗"], 1, 64, 90, {"val": entry}, {"val": PlanDigest("f", options)}
    )


def test_the_manifest_is_read_as_it_was_written(tmp_path: Path, manifest: Manifest) -> None:
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert (tmp_path / MANIFEST).read_bytes().isascii()


def test_what_a_later_version_adds_is_ignored(tmp_path: Path, manifest: Manifest) -> None:
    write_manifest(tmp_path, manifest)
    raw = json.loads((tmp_path / MANIFEST).read_text())
    del raw["crc32"]
    raw["checksums"] = raw["splits"]["val"]["license"] = "new"
    (tmp_path / MANIFEST).write_text(json.dumps(raw))
    assert read_manifest(tmp_path) == manifest


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda m: m.update(format="other"), "says format 'other', not 'vimfast-shards'; give a folder"),
        (lambda m: m.update(version=2), "is of format 2, this vimfast reads up to 1; upgrade vimfast"),
        (lambda m: m.update(version="1"), "(version: expected int, got str); copy it again, or run"),
        (lambda m: m.pop("splits"), "(object missing required field splits)"),
        (lambda m: m["splits"]["val"].update(bytes="many"), "(splits[...].bytes: expected int, got str)"),
        (lambda m: m["splits"]["val"].update(bytes=True), "(splits[...].bytes: expected int, got bool)"),
        (lambda m: m["splits"]["val"].update(index_crc32=-1), "(splits[...].index_crc32: expected int >= 0)"),
        (lambda m: m["splits"]["val"]["shards"][0].update(bytes=2**64), "(splits[...].shards[0].bytes: expected int"),
        (lambda m: m["splits"]["val"]["shards"][1].pop("name"), "(splits[...].shards[1]: object missing required"),
        (lambda m: m["splits"]["val"].update(samples=6), "(splits[...]: its shards hold 5 samples in all, not 6)"),
        (lambda m: m["splits"]["val"]["shards"][0].update(name="../x.tar"), "(its val shards are not val-000000.tar, "),
        (lambda m: m.update(classes=["a", "a"]), "(its classes are not a list of different names)"),
        (lambda m: m.update(classes=[]), "(its classes are not a list of different names)"),
        (lambda m: m["splits"]["val"]["skipped"].append({}), "(splits[...].skipped[1]: object missing required"),
    ],
)
def test_a_manifest_that_does_not_serve(
    tmp_path: Path, manifest: Manifest, edit: Callable[[dict[str, Any]], None], said: str
) -> None:
    write_manifest(tmp_path, manifest)
    raw = json.loads((tmp_path / MANIFEST).read_text())
    edit(raw)
    (tmp_path / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(UserError) as caught:
        read_manifest(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / MANIFEST} ")
    assert said in str(caught.value)


def test_a_manifest_that_was_edited_is_refused(tmp_path: Path, manifest: Manifest) -> None:
    """However it is laid out; one without a checksum, of an earlier version, is read."""
    write_manifest(tmp_path, manifest)
    raw = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(raw, indent=4))
    assert read_manifest(tmp_path) == manifest
    raw["classes"].reverse()
    (tmp_path / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"manifest\.json is damaged or was edited: its checksum is \d+, it says \d+; "):
        read_manifest(tmp_path)
    del raw["crc32"]
    (tmp_path / MANIFEST).write_text(json.dumps(raw))
    assert read_manifest(tmp_path).classes == manifest.classes[::-1]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to everything inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in inner for place in places(part, (*path, key)))]


@pytest.fixture(scope="module")
def whole(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A folder of shards, by name."""
    out = tmp_path_factory.mktemp("whole")
    convert(tree, out, ConversionOptions(shard_samples=20), workers=1)
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def read_all(files: dict[str, bytes]) -> None:
    """As a trainer and check_data do; only a sentence may come out."""
    with tempfile.TemporaryDirectory() as name:
        for file, content in files.items():
            (Path(name) / file).write_bytes(content)
        try:
            source = open_source(name, "train")
            source.read(np.arange(len(source)))
            [source.name(i) for i in range(len(source))]
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017
        checking.check(Path(name), CheckOptions())


@given(st.data())
def test_any_manifest_is_read_or_refused(whole: dict[str, bytes], data: st.DataObject) -> None:
    raw = json.loads(whole[MANIFEST])
    del raw["crc32"]
    for _ in range(data.draw(st.integers(1, 2))):
        *path, last = data.draw(st.sampled_from([place for place in places(raw) if place]))
        parent = raw
        for key in path:
            parent = parent[key]
        if data.draw(st.booleans()):
            del parent[last]
        else:
            parent[last] = data.draw(JSON)
    read_all({**whole, MANIFEST: json.dumps(raw).encode()})


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"format": ' * 100_000, '{"format": "vimfast-shards", "version": Infinity}']
)
def test_json_that_is_hard_to_read_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(UserError, match=r"is damaged \("):
        read_manifest(tmp_path)


@given(st.data())
def test_any_index_is_read_or_refused(whole: dict[str, bytes], data: st.DataObject) -> None:
    """Also where the manifest has its checksum."""
    index = bytearray(whole[index_name("train")])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, 127) | st.integers(0, len(index) - 1))
        width = data.draw(st.sampled_from([1, 4]))
        index[at : at + width] = data.draw(st.binary(min_size=width, max_size=width))
    content = bytes(index[: data.draw(st.just(len(index)) | st.integers(0, len(index)))])
    raw = json.loads(whole[MANIFEST])
    del raw["crc32"]
    raw["splits"]["train"]["index_crc32"] = zlib.crc32(content)
    read_all({**whole, index_name("train"): content, MANIFEST: json.dumps(raw).encode()})


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("shard", 999, "assigns its samples to other shards than the manifest"),
        ("label", -1, "has a label that is not from 0 to 2, in sample 7"),
        ("label", 3, "has a label that is not from 0 to 2"),
        ("height", 0, "has a side not from 1 to 65535, in sample 7"),
        ("width", 2**32 - 1, "has a side not from"),
        ("offset", 2**64 - 1, "has a place outside its tar"),
        ("size", 2**32 - 1, "has a place outside its tar"),
    ],
)
def test_rows_that_cannot_be(whole: dict[str, bytes], tmp_path: Path, column: str, value: int, said: str) -> None:
    for file, content in whole.items():
        (tmp_path / file).write_bytes(content)
    rows = np.load(tmp_path / index_name("train"))
    rows[column][7] = value
    np.save(tmp_path / index_name("train"), rows)
    raw = json.loads(whole[MANIFEST])
    del raw["crc32"]
    raw["splits"]["train"]["index_crc32"] = zlib.crc32((tmp_path / index_name("train")).read_bytes())
    (tmp_path / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(UserError, match=rf"train\.index\.npy is damaged: it {said}"):
        open_source(tmp_path, "train")


@given(st.data())
def test_any_tar_is_read_or_refused(whole: dict[str, bytes], data: st.DataObject) -> None:
    name = "train-000000.tar"
    tar = bytearray(whole[name])
    blocks = len(tar) // 512
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, blocks - 1)) * 512 + data.draw(st.integers(0, 511))
        tar[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.just(len(tar)) | st.integers(0, len(tar)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(tar[:cut])
        try:
            rows, _ = read_tar(path, 0)
            assert rows.dtype == INDEX_DTYPE
        except ValueError:
            pass
    read_all({**whole, name: bytes(tar)})


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"format": ', b"\xff\xfe{", b"null"])
def test_what_is_not_a_manifest_at_all(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(UserError, match=r"is damaged \(.*\); copy it again, or run vimfast-prepare again"):
        read_manifest(tmp_path)
