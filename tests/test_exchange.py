"""Ranks that decode for each other train on the batches that each would decode by itself, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import write_image
from loaders import make_loader
from PIL import Image
from processes import run_on
from torch import Tensor

from vimfast.augment import crops, draws
from vimfast.config import AugmentConfig
from vimfast.data.order import Order
from vimfast.data.source import Images, Source, open_source

STEPS = 3


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for i in range(70):
        write_image(root / "train" / f"class{i % 3}" / f"{i}.JPEG", i, (70 + i, 60 + 2 * i))
    return root


class Counted:
    """A source that counts what is read of it."""

    def __init__(self, source: Source) -> None:
        self.source, self.count = source, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def __len__(self) -> int:
        return len(self.source)

    def read(self, ids: np.ndarray) -> Images:
        self.count += len(ids)
        return self.source.read(ids)


def batches(
    root: Path, rank: int, world: int, batch_size: int, node: int, start: int = 0, **options: Any
) -> tuple[list[Tensor], list[Tensor], int]:
    source = Counted(open_source(root, "train"))
    order = Order(len(source), batch_size, world=world, rank=rank, seed=5, repeats=3, node=node)
    loader = make_loader(
        source, order, device="cpu", training=True, augmentation=AugmentConfig(), size=40, threads=1, readahead=1,
        prefetch=1, **options,
    )  # fmt: skip
    taken = [next(stream) for stream in [loader.epoch(1, start)] for _ in range(STEPS)]
    loader.close()
    return [batch.images for batch in taken], [batch.labels for batch in taken], source.count


def exchanged(root: Path, batch_size: int, nodes: int, steps_at_once: int) -> tuple[list[Tensor], list[Tensor], int]:
    rank, world = dist.get_rank(), dist.get_world_size()
    node = world // nodes
    groups = [dist.new_group(list(range(first, first + node))) for first in range(0, world, node)]
    group = groups[rank // node]
    return batches(root, rank, world, batch_size, node, steps_at_once=steps_at_once, group=group)


@pytest.mark.parametrize(
    ("world", "nodes", "batch_size", "steps_at_once"), [(2, 1, 6, 1), (3, 1, 4, 2), (4, 2, 3, 1), (4, 1, 5, 3)]
)
def test_batches_are_those_that_each_rank_would_decode(
    images: Path, tmp_path: Path, world: int, nodes: int, batch_size: int, steps_at_once: int
) -> None:
    ranks = run_on(world, exchanged, tmp_path, images, batch_size, nodes, steps_at_once)
    read = 0
    for rank, (pixels, labels, count) in enumerate(ranks):
        expected_pixels, expected_labels, alone = batches(images, rank, world, batch_size, node=1)
        assert all(torch.equal(a, b) for a, b in zip(pixels, expected_pixels, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(labels, expected_labels, strict=True))
        assert count < 0.8 * alone * (STEPS + 2 * steps_at_once) / STEPS  # more is read ahead
        read += count
    assert read > 0


@pytest.mark.parametrize("steps_at_once", [2, 4])
def test_steps_decoded_together_are_those_decoded_one_by_one(images: Path, steps_at_once: int) -> None:
    for start in (0, 1):
        one = batches(images, 0, 1, 8, 1, start)
        several = batches(images, 0, 1, 8, 1, start, steps_at_once=steps_at_once)
        for a, b in zip(one[:2], several[:2], strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("world", "node", "batch_size"), [(4, 4, 128), (8, 8, 5), (16, 8, 128), (6, 2, 7), (8, 4, 3)])
def test_every_position_is_decoded_once_on_its_host(world: int, node: int, batch_size: int) -> None:
    orders = [Order(10_000, batch_size, world=world, rank=r, seed=1, repeats=3, node=node) for r in range(world)]
    for first in range(0, world, node):
        host = orders[first : first + node]
        decoded = np.concatenate([order.decoded(0, 3)[0] for order in host])
        wanted = [order.step(0, 3) for order in host]
        assert np.array_equal(decoded, np.sort(np.concatenate([positions for positions, _ in wanted])))
        for rank, (positions, ids) in enumerate(wanted):
            assert np.array_equal(decoded[rank::node], positions)
            shown = np.concatenate([order.decoded(0, 3)[1] for order in host])
            assert np.array_equal(shown[rank::node], ids)


def test_crops_are_pillows_within_two_levels(images: Path) -> None:
    """Decoded as parts of images, and several from one part."""
    source = open_source(images, "train")
    for repeats in (1, 3):
        order = Order(len(source), 8, seed=5, repeats=repeats)
        loader = make_loader(source, order, size=40, threads=2, std=(1 / 255,) * 3, mean=(0.0,) * 3)
        shown = next(loader.epoch(1, 1)).images
        loader.close()
        positions, ids = order.step(1, 1)
        u = draws.uniforms(5, 1, positions)
        _, sizes, _ = source.read(ids)
        boxes = crops.random_resized_crop(u, sizes)
        for k, (i, flipped) in enumerate(zip(ids.tolist(), draws.flips(u).tolist(), strict=True)):
            top, left, height, width = boxes[k].tolist()
            image = Image.open(source.name(i)).convert("RGB").crop((left, top, left + width, top + height))
            square = np.array(image.resize((40, 40), Image.Resampling.BICUBIC))
            expected = torch.from_numpy(np.ascontiguousarray(square[:, ::-1] if flipped else square)).permute(2, 0, 1)
            difference = (shown[k] - expected).abs()
            assert difference.max() < 2.01
            assert difference.mean() < 0.02  # measured: 0.002
