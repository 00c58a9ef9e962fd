"""Small shards of small images, here and in a bucket, and the batches of a training loader that reads them."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loaders import make_loader
from object_servers import BUCKET, Proxy
from PIL import Image
from torch import Tensor

from vimfast.data.cache import CacheSettings
from vimfast.data.order import Order
from vimfast.data.source import Source
from vimfast.shards.convert import convert
from vimfast.shards.format import ConversionOptions
from vimfast.stores import open_store

URL = f"s3://{BUCKET}/shards"
IMAGES, IN_SHARD = 60, 5  # 12 training shards


def small_shards(root: Path, images: int, in_shard: int) -> Path:
    """Shards of so many small images to train on, of 2 classes, and of 10 to validate; the tree is beside them."""
    noise = np.random.default_rng(0)
    for split, count in (("train", images), ("val", 10)):
        for i in range(count):
            path = root / "tree" / split / "ab"[i % 2] / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise.integers(0, 256, (48, 40 + i % 7, 3), dtype=np.uint8)).save(path)
    convert(root / "tree", root / "shards", ConversionOptions(shard_samples=in_shard), workers=1)
    return root / "shards"


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shards(tmp_path_factory.mktemp("remote"), IMAGES, IN_SHARD)


@pytest.fixture
def remote(local: Path, s3: Proxy) -> Proxy:
    """The same in a bucket."""
    store = open_store(URL)
    if store.find("manifest.json") is None:
        for path in local.iterdir():
            if path.is_file():
                store.put(path.name, path)
    s3.requests.clear()
    return s3


def shard_bytes(local: Path) -> int:
    """Of the largest."""
    return max(path.stat().st_size for path in local.glob("*.tar"))


def batches(source: Source, count: int, start: tuple[int, int] = (0, 0), **order: Any) -> list[tuple[Tensor, Tensor]]:
    """So many of a training loader, over the ends of epochs."""
    ordered = Order(len(source), **{"batch_size": 4, "seed": 3, **order})
    loader = make_loader(source, ordered, size=32, threads=1, prefetch=1, readahead=1)
    found, (epoch, step) = [], start
    while len(found) < count:
        found += [tuple(batch[:2]) for batch in islice(loader.epoch(epoch, step), count - len(found))]
        epoch, step = epoch + 1, 0
    loader.close()
    return found


def assert_same(found: list[tuple[Tensor, Tensor]], wanted: list[tuple[Tensor, Tensor]]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def settings(folder: Path, size: int | None = None) -> CacheSettings:
    return CacheSettings(str(folder), size)


def by_window(source: Source, window: int = 3) -> dict[str, Any]:
    return {"bounds": source.bounds(), "window": window}
