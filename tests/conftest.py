"""What every test may use: small trees of real JPEGs, and the skipping of GPU tests where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

# The same few examples on every machine, however slow it is, and no files left in the checkout.
settings.register_profile("vimfast", derandomize=True, deadline=None, max_examples=60, database=None)
settings.load_profile("vimfast")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        if item.get_closest_marker("gpus") and count < 2:
            item.add_marker(pytest.mark.skip(reason=f"needs two or more CUDA devices; {count} here"))
        elif item.get_closest_marker("gpu") and count == 0:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def write_picture(path: Path, seed: int, size: tuple[int, int] = (64, 48), mode: str = "RGB") -> None:
    """A smooth coloured picture (JPEG, or what the extension says), one for each seed; `size` is (width, height)."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse.convert(mode).save(path, format="JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else None)


@pytest.fixture
def poison() -> Iterator[None]:
    """Every torch.empty full of NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageNet-layout tree: 3 classes, 12 + 5 pictures each, of differing sizes. Do not write into it."""
    root = tmp_path_factory.mktemp("tree")
    for split, count in (("train", 12), ("val", 5)):
        for label, name in enumerate(("n01", "n02", "n03")):
            for i in range(count):
                seed = 1000 * label + i + (500 if split == "val" else 0)
                write_picture(root / split / name / f"{name}_{i}.JPEG", seed, (60 + 7 * i, 50 + 11 * label))
    return root
