"""What a stranger would add to the views, added: a crop of their own, and sizes that change in the course of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vimfast.augment.crops import Boxes, RandomResizedCrop
from vimfast.augment.draws import CROP_LEFT, CROP_TOP
from vimfast.augment.recipe import Recipe
from vimfast.config import AugmentConfig
from vimfast.data.loader import Loader, LoaderSettings
from vimfast.data.order import Order
from vimfast.data.source import Source, open_source
from vimfast.data.views import Stage, View, crop_view

CPU = torch.device("cpu")


class MiddleCrop:
    """A random resized crop from the middle half of where it could be."""

    def boxes(self, u: np.ndarray, sizes: np.ndarray) -> Boxes:
        _, extent = RandomResizedCrop().boxes(u, sizes)
        place = (u[:, [CROP_TOP, CROP_LEFT]] + 0.5) / 2
        return Boxes((place * (sizes - extent + 1)).astype(np.int32), extent)


@pytest.fixture(scope="module")
def source(textured: Path) -> Source:
    return open_source(textured, "train")


def loader(source: Source, view: View) -> Loader:
    return Loader(source, view, LoaderSettings(threads=1))


@pytest.mark.parametrize("repeats", [1, 3])
def test_a_crop_of_ones_own(source: Source, repeats: int) -> None:
    """One class, also where copies of an image come from one decode."""
    order = Order(len(source), 6, repeats=repeats, seed=1)
    stage = Stage(40, Recipe(None))
    images = {}
    for crop in (MiddleCrop(), RandomResizedCrop()):
        view = crop_view(order, CPU, crop, lambda epoch: stage)
        images[type(crop)] = next(loader(source, view).epoch(0)).images
        # The images of a batch are those that the crop's boxes show, whoever decodes them.
        alone = crop_view(replace(order, world=3, rank=1, batch_size=2), CPU, crop, lambda epoch: stage)
        assert torch.equal(next(loader(source, alone).epoch(0)).images, images[type(crop)][1::3])
    assert not torch.equal(*images.values())


def test_size_and_strength_by_epoch(source: Source) -> None:
    """One value; batches read ahead over the end of an epoch included, and a run that begins in a later one."""
    stages = [
        Stage(32 + 8 * epoch, Recipe(AugmentConfig(aa=f"rand-m{3 * epoch}-mstd0.5"))) for epoch in range(9)
    ]  # some are read ahead
    view = crop_view(Order(len(source), 3, seed=1), CPU, RandomResizedCrop(), stages.__getitem__)
    running = Loader(source, view, LoaderSettings(threads=1, steps_at_once=3, readahead=1))
    seen = [[batch.images for batch in running.epoch(epoch)] for epoch in range(2)]
    assert [{tuple(images.shape[2:]) for images in epoch} for epoch in seen] == [{(32, 32)}, {(40, 40)}]
    resumed = Loader(source, view, LoaderSettings(threads=1))
    assert torch.equal(next(resumed.epoch(1, 1)).images, seen[1][1])
