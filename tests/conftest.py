"""What every test may use: small trees of real JPEGs, and the skipping of GPU tests where there is no GPU."""

from __future__ import annotations

import gc
import os
import random
import signal

# Before torch is imported, here and in every process that a test starts: what tests compute is small, and a second
# thread that waits for the first by spinning takes minutes where cores are busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import WorkersInForks
from hypothesis import settings
from object_servers import moto, s3
from PIL import Image
from remote_shards import local, remote

from vimfast.checks import findings
from vimfast.shards import workers
from vimfast.shards.convert import convert
from vimfast.shards.format import MANIFEST, ConversionOptions

__all__ = ["local", "moto", "remote", "s3"]  # fixtures; imported by a module of tests, one would be another there

# A shell has background jobs ignore it, and every process that a test starts would too.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Of tests/test_faults.py; the processes of pytest-xdist inherit it.
os.environ.setdefault("FAULTS_SEED", str(random.SystemRandom().randrange(10**6)))

# The same few examples on every machine, however slow it is, and no files left in the checkout.
settings.register_profile("vimfast", derandomize=True, deadline=None, max_examples=60, database=None)
settings.load_profile("vimfast")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "faults" not in config.getoption("markexpr"):  # minutes, and no two times the same
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("faults")])
        items[:] = [item for item in items if not item.get_closest_marker("faults")]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        if item.get_closest_marker("gpus") and count < 2:
            item.add_marker(pytest.mark.skip(reason=f"needs two or more CUDA devices; {count} here"))
        elif item.get_closest_marker("gpu") and count == 0:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """As a run does once everything is imported: a collection then looks at what came later alone.

    The modules of all tests are a million objects, and whatever closes a loader collects.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else bindings complain of leaks when the interpreter ends


def write_image(path: Path, seed: int, size: tuple[int, int] = (64, 48), mode: str = "RGB") -> None:
    """A smooth coloured image (JPEG, or what the extension says), one for each seed; `size` is (width, height)."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse.convert(mode).save(path, format="JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else None)


def enlarged(jpeg: bytes) -> bytes:
    """A JPEG whose header, damaged, says 65,500 pixels a side."""
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + b"\xff\xdc\xff\xdc" + jpeg[at + 4 :]


def visible(out: Path) -> dict[str, bytes]:
    """Of a shards folder, the files by name, without the line of the manifest that contains the time."""
    files = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    if manifest := files.get(MANIFEST):
        files[MANIFEST] = b"\n".join(line for line in manifest.split(b"\n") if b'"created"' not in line)
    return files


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if "faults" in config.getoption("markexpr"):
        terminalreporter.write_line(f"FAULTS_SEED={os.environ['FAULTS_SEED']} draws the same again")


@contextmanager
def deep_folder(top: Path, depth: int) -> Iterator[str]:
    """In the block, folders inside one another, with an empty image in the last; the way to it."""
    top.mkdir(parents=True)
    before = os.getcwd()
    try:
        os.chdir(top)
        for _ in range(depth):
            os.mkdir("d")
            os.chdir("d")
        Path("1.jpg").touch()
    finally:
        os.chdir(before)
    try:
        yield "/".join("d" * depth)
    finally:
        subprocess.run(["rm", "-r", str(top)], check=True)  # shutil, which pytest uses, does not get so deep


@contextmanager
def forbidden(folder: Path) -> Iterator[None]:
    """In the block, this process has no permission to look into `folder`."""
    mode, user = folder.stat().st_mode, os.geteuid()
    folder.chmod(0)
    if user == 0:
        os.seteuid(65534)  # nobody: root may look everywhere
    try:
        yield
    finally:
        os.seteuid(user)
        folder.chmod(mode)


@pytest.fixture
def poison() -> Iterator[None]:
    """Every torch.empty full of NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def poison_gpu() -> Iterator[None]:
    """The same beside products of cuBLAS, which are deterministic only by a setting of the environment."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session", autouse=True)
def _workers_in_forks() -> Iterator[None]:
    """Of conversions and checks inside this process; a command's are the new interpreters that a user's are."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (workers, findings):
            patch.setattr(module, "multiprocessing", WorkersInForks())
        yield


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageNet-layout tree: 3 classes, 12 + 5 images each, of differing sizes. Do not write into it."""
    root = tmp_path_factory.mktemp("tree")
    for split, count in (("train", 12), ("val", 5)):
        for label, name in enumerate(("n01", "n02", "n03")):
            for i in range(count):
                seed = 1000 * label + i + (500 if split == "val" else 0)
                write_image(root / split / name / f"{name}_{i}.JPEG", seed, (60 + 7 * i, 50 + 11 * label))
    return root


@pytest.fixture(scope="session")
def shards(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree as shards, one for each split. Do not write into it."""
    out = tmp_path_factory.mktemp("shards") / "shards"
    convert(tree, out, ConversionOptions(), workers=1)
    return out


@pytest.fixture(scope="session")
def textured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with detail at every scale, of many shapes and kinds of JPEG."""
    root = tmp_path_factory.mktemp("textured")
    rng = np.random.default_rng(0)
    kinds: list[dict[str, object]] = [{}, {"progressive": True}, {"subsampling": "4:4:4"}, {"quality": 60}]
    for i, (width, height) in enumerate([(500, 375), (333, 500), (61, 47), (257, 255), (640, 90), (40, 200), (96, 96)]):
        detail = np.zeros((height, width, 3))
        for cells in (3, 12, 40, 150):
            noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            detail += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), float) / 4
        image = Image.fromarray(detail.astype(np.uint8)).convert("L" if i == 3 else "RGB")
        path = root / "train" / "a" / f"{i}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        exif[0x0112] = 6  # "rotate me": nobody may
        image.save(path, "JPEG", exif=exif, **kinds[i % len(kinds)])
    return root
