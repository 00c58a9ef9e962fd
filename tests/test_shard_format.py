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

from vimfast.errors import UserError
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
from vimfast.shards.writer import STATE_FOLDER, Record, read_record, record_path, write_index, write_record

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
    return rows, write_index(folder, "train", len(parts), len(rows))


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
        (lambda m: m.update(version="1"), "(version: expected int, got str); run vimfast-prepare again"),
        (lambda m: m.pop("splits"), "(object missing required field splits)"),
        (lambda m: m["splits"]["val"].update(bytes="many"), "(splits[...].bytes: expected int, got str)"),
        (lambda m: m["splits"]["val"].update(bytes=True), "(splits[...].bytes: expected int, got bool)"),
        (lambda m: m["splits"]["val"].update(index_crc32=-1), "(splits[...].index_crc32: expected int >= 0)"),
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


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"format": ', b"\xff\xfe{", b"null"])
def test_what_is_not_a_manifest_at_all(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(UserError, match=r"is damaged \(.*\); run vimfast-prepare again"):
        read_manifest(tmp_path)
