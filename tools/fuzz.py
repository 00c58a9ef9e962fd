"""Coverage-guided fuzzing of whatever reads files that somebody else copied: by atheris (libFuzzer), one reader a run.

    python tools/fuzz.py index --seconds 60 --seed 1
    python tools/fuzz.py index --input crash-1f2e...      # what an earlier run found, once

A reader may accept its input, or refuse it in the way that its docstring promises. Anything else ends the run with
status 77, a traceback, and the input in a file ``crash-...`` of the folder `--found`.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import atheris
import numpy as np
import torch
import torch._weights_only_unpickler
from PIL import Image

with atheris.instrument_imports(include=["vimfast", "tarfile"]):
    from vimfast.checkpoint import load_checkpoint
    from vimfast.checks.findings import CheckOptions
    from vimfast.checks.shards import check_shards
    from vimfast.data.source import open_source
    from vimfast.errors import UserError
    from vimfast.shards import jpeg
    from vimfast.shards.format import MANIFEST, index_name
    from vimfast.shards.verify import read_tar
    from vimfast.shards.writer import read_record, record_path

_unpickler: Any = torch._weights_only_unpickler.Unpickler
_unpickler.load = atheris.instrument_func(_unpickler.load)

_LONGEST = 1 << 14  # bytes of an input
_MOST_PIXELS = 1 << 20  # that are decoded: to look at more takes seconds
_BLOCK = 512
_WORDS = (
    "null",
    "true",
    "[]",
    "{}",
    '""',
    "-1",
    "1e999",
    "Infinity",
    "NaN",
    "18446744073709551616",
    '"\\ud800"',
    "\\u0000",
)
_TAR = "train-000000.tar"


class Target(NamedTuple):
    """A reader: what it is tried on at first, and how it is tried."""

    seeds: list[bytes]
    read: Callable[[bytes], None]


def targets(folder: Path) -> dict[str, Target]:
    """All of them, by name.

    Args:
        folder: empty; for the files that are read.
    """
    images, shards = folder / "images", folder / "shards"
    _draw(images)
    words = ["--out", str(shards), "--shard-samples", "4", "--workers", "1"]
    subprocess.run([sys.executable, "-m", "vimfast.prepare", str(images), *words], check=True, capture_output=True)
    files = {path.name: path.read_bytes() for path in shards.iterdir() if path.is_file()}
    record = record_path(shards, "train", 0)
    with np.load(record) as tables:
        text = tables["record"]
    manifest = json.loads(files[MANIFEST])
    del manifest["crc32"]  # as in one of an earlier version, which is read too
    (shards / MANIFEST).write_text(json.dumps(manifest))

    def read_manifest(data: bytes) -> None:
        (shards / MANIFEST).write_bytes(data)
        _read_shards(shards)

    def read_index(data: bytes) -> None:
        """With a manifest that has its checksum."""
        manifest["splits"]["train"]["index_crc32"] = zlib.crc32(data)
        (shards / MANIFEST).write_text(json.dumps(manifest))
        (shards / index_name("train")).write_bytes(data)
        _read_shards(shards)

    def read_shard(data: bytes) -> None:
        path = shards / _TAR
        path.write_bytes(_with_checksums(data))
        with suppress(ValueError):
            read_tar(path, 0)
        _read_shards(shards)

    def read_records(data: bytes) -> None:
        """As the text in a sound archive."""
        with open(record, "wb") as file:
            np.savez(file, record=np.frombuffer(data, np.uint8))
        read_record(shards, "train", 0)

    def read_checkpoint(data: bytes) -> None:
        """As a file, or as the pickle in a sound archive."""
        path = folder / "checkpoint.pth"
        path.write_bytes(_archive(data[1:]) if data[:1] == b"\0" else data[1:])
        try:
            load_checkpoint(path)
        except UserError as error:
            _check_sentence(error)

    return {
        "manifest": Target([json.dumps(manifest).encode()], read_manifest),
        "index": Target([files[index_name("train")]], read_index),
        "tar": Target([files[_TAR]], read_shard),
        "header": Target([_encode(kind) for kind in _KINDS], _read_image),
        "record": Target([text.tobytes()], read_records),
        "checkpoint": Target(_checkpoints(), read_checkpoint),
    }


def _read_shards(folder: Path) -> None:
    """As a trainer and check_data do."""
    try:
        source = open_source(folder, "train")
        source.read(np.arange(len(source)))
        [source.name(i) for i in range(len(source))]
    except UserError as error:
        _check_sentence(error)
    check_shards(folder, CheckOptions(splits=("train",)))


def _check_sentence(error: UserError) -> None:
    assert "\n" not in str(error), str(error)


def _read_image(data: bytes) -> None:
    """The header says of an image what Pillow makes of it."""
    outcomes: list[jpeg.ImageInfo | str] = []
    for form in (data, memoryview(data), np.frombuffer(data, np.uint8)):
        try:
            outcomes.append(jpeg.inspect(form))
        except ValueError as error:  # noqa: PERF203
            outcomes.append(str(error))
    assert outcomes[1:] == outcomes[:1] * 2, outcomes
    told = outcomes[0]
    if isinstance(told, jpeg.ImageInfo) and told.height * told.width > _MOST_PIXELS:
        return
    try:
        jpeg.wide_samples(data)
        _, size = jpeg.to_rgb_jpeg(data)
    except (ValueError, MemoryError):
        return
    assert isinstance(told, jpeg.ImageInfo), f"refused ({told}), and Pillow decodes it"
    assert not jpeg.is_plain(told) or size == (told.height, told.width), f"{told}, decoded {size}"


def _with_checksums(tar: bytes) -> bytes:
    """Each header with the checksum of its bytes, for a damaged one is not looked at any further."""
    data = bytearray(tar)
    for at in range(0, len(data) - _BLOCK + 1, _BLOCK):
        if data[at + 257 : at + 262] == b"ustar":
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + _BLOCK])
    return bytes(data)


_KINDS = ("JPEG", "progressive", "L", "CMYK", "PNG", "I;16", "GIF", "BMP", "WEBP", "TIFF", "PPM")


def _encode(kind: str, seed: int = 0) -> bytes:
    """A small image of this format, mode or kind of JPEG."""
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    image, file = Image.fromarray(pixels), io.BytesIO()
    if kind in ("L", "CMYK"):
        image.convert(kind).save(file, "JPEG")
    elif kind == "I;16":
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(file, "PNG")
    elif kind == "progressive":
        image.save(file, "JPEG", progressive=True)
    else:
        image.save(file, kind)
    return file.getvalue()


def _draw(root: Path) -> None:
    for i in range(8):
        path = root / ("val" if i % 4 == 3 else "train") / f"c{i % 2}" / f"{i}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_encode("JPEG", i))


def _checkpoints() -> list[bytes]:
    state = {"model": {"a.weight": torch.ones(2, 3)}, "epoch": 1, "args": argparse.Namespace(lr=0.1)}
    new, old = io.BytesIO(), io.BytesIO()
    torch.save(state, new)
    torch.save(state, old, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(new) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        return [b"\0" + archive.read(name), b"\1" + old.getvalue()]


def _archive(pickled: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        records = {"data.pkl": pickled, "byteorder": b"little", "data/0": bytes(24), "version": b"3\n"}
        for name, content in records.items():
            archive.writestr(f"a/{name}", content)
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description="Try one reader of files on damaged ones.")
    parser.add_argument("target", choices=("manifest", "index", "tar", "header", "record", "checkpoint"))
    parser.add_argument("--seconds", type=int, default=60, help="how long [60]")
    parser.add_argument("--seed", type=int, default=1, help="what is tried follows from it, and from the time [1]")
    parser.add_argument("--found", type=Path, default=Path(), help="folder for inputs that fail [.]")
    parser.add_argument("--input", type=Path, help="try this file alone")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        warnings.simplefilter("ignore")
        target = targets(Path(name))[args.target]
        if args.input:
            target.read(args.input.read_bytes())
            return
        corpus = Path(name) / "corpus"
        corpus.mkdir()
        for number, seed in enumerate(target.seeds):
            (corpus / f"{number}").write_bytes(seed)
        dictionary = Path(name) / "dictionary"
        dictionary.write_text("".join(f"{json.dumps(word)}\n" for word in _WORDS))
        options = [
            f"-dict={dictionary}",
            f"-seed={args.seed}",
            f"-max_total_time={args.seconds}",
            f"-max_len={_LONGEST}",
            "-timeout=20",
        ]
        options += [f"-artifact_prefix={args.found}/", "-rss_limit_mb=4096", "-print_final_stats=1"]
        atheris.Setup([sys.argv[0], *options, str(corpus)], target.read)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
