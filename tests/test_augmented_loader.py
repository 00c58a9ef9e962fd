"""Augmentation in the loader: drawn changes after drawn crops, of each kind, on any number of ranks, at any place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_image
from PIL import Image
from test_loader import assert_same, levels, training_loader
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tvf

from vimfast.augment import crops, draws, pixels
from vimfast.augment.colours import IMAGENET_MEAN, IMAGENET_STD
from vimfast.augment.recipe import Recipe
from vimfast.config import AugmentConfig
from vimfast.data.source import Source, open_source
from vimfast.data.views import Batch

SETTINGS = {
    "timm": AugmentConfig(recount=2),
    "ThreeAugment": AugmentConfig(three_augment=True, src=True),
    "jitter": AugmentConfig(aa="", reprob=0.0),
}


@pytest.fixture(scope="module")
def source(tree: Path) -> Source:
    return open_source(tree, "train")


def bytes_of(images: Tensor) -> Tensor:
    """Normalized [b, 3, h, w] -> uint8 [b, h, w, 3]."""
    return levels(images).round().byte().permute(0, 2, 3, 1).contiguous()


@pytest.mark.parametrize("size", [24, 48])
def test_changes_come_after_the_crop(source: Source, size: int) -> None:
    cfg = SETTINGS["timm"]
    plain_cfg = AugmentConfig(aa="", color_jitter=0.0, reprob=0.0)
    plain, augmented = (next(training_loader(source, 36, size=size, augmentation=c).epoch(1)) for c in (plain_cfg, cfg))
    plan = Recipe(cfg).draw(3, 1, np.arange(36), size)
    expected = pixels.carry_out(bytes_of(plain.images), plan, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    assert torch.equal(augmented.images, expected)
    changed = (augmented.images - plain.images).abs().amax((1, 2, 3)) > 0.1
    assert 20 < changed.sum() < 36  # some have neither operation nor box


@pytest.mark.parametrize("name", SETTINGS)
def test_draws_depend_on_the_place_alone(source: Source, name: str) -> None:
    cfg = SETTINGS[name]
    through = [list(training_loader(source, 6, augmentation=cfg).epoch(epoch)) for epoch in range(2)]
    assert not torch.equal(through[0][0].images, through[1][0].images)
    assert_same(list(training_loader(source, 6, augmentation=cfg).epoch(1, start=3)), through[1][3:])
    for rank in range(3):
        shared = training_loader(source, 2, world=3, rank=rank, augmentation=cfg)
        assert_same(list(shared.epoch(0)), [Batch(b.images[rank::3], b.labels[rank::3]) for b in through[0]])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Source:
    root = tmp_path_factory.mktemp("small")
    for i, size in enumerate([(32, 32), (32, 32), (28, 28), (33, 40), (60, 25), (32, 90)]):
        write_image(root / "train" / "a" / f"{i}.JPEG", i, size)
    return open_source(root, "train")


@pytest.mark.parametrize("crop", ["padded", "simple"])
def test_crops_without_a_free_resize_are_torchvisions(small: Source, crop: str) -> None:
    """Measured: a mean difference of at most 0.007 levels, of the resize's rounding alone."""
    size = 32
    cfg = AugmentConfig(aa="", color_jitter=0.0, reprob=0.0, src=crop == "simple")
    loader = training_loader(small, 6, size=size, augmentation=cfg)
    outside = mirrored = 0
    for epoch in range(6):
        (batch,) = loader.epoch(epoch)
        positions, ids = loader.order.step(epoch, 0)
        u = draws.uniforms(3, epoch, positions)
        for image, row, i in zip(levels(batch.images), u, ids.tolist(), strict=True):
            original = Image.open(small.name(i)).convert("RGB")
            if crop == "simple":
                original = tvf.resize(original, size, InterpolationMode.BICUBIC)
            padded = tvf.pad(original, 4, padding_mode="reflect" if crop == "simple" else "constant")
            top, left = crops.padded_crop(row[None], np.array([original.size[::-1]]), size)[0].tolist()
            outside += top < 0 or left < 0
            cut = tvf.crop(padded, top + 4, left + 4, size, size)
            flip = draws.flips(row[None])[0]
            mirrored += flip
            expected = tvf.pil_to_tensor(tvf.hflip(cut) if flip else cut).float()
            difference = (image - expected).abs()
            assert difference.mean() < (0.02 if crop == "simple" else 1e-4)
            assert difference.max() < (1.01 if crop == "simple" else 1e-4)
    assert outside > 10
    assert 5 < mirrored < 31


def test_places_of_padded_crops() -> None:
    u = draws.uniforms(0, 0, np.arange(4000))
    corners = crops.padded_crop(u, np.tile((40, 32), (4000, 1)), 32)
    assert [corners.min(axis=0).tolist(), corners.max(axis=0).tolist()] == [[-4, -4], [12, 4]]
    _, counts = np.unique(corners[:, 1], return_counts=True)
    assert abs(counts - 4000 / 9).max() < 100
    assert crops.padded_crop(u[:1], np.array([[20, 20]]), 32).tolist() == [[-6, -6]]


def test_random_interpolation_is_either_filter(source: Source) -> None:
    kinds = {k: next(training_loader(source, 24, interpolation=k).epoch(0)).images for k in ("bicubic", "bilinear")}
    drawn = next(training_loader(source, 24, interpolation="random").epoch(0)).images
    cubic, linear = (((drawn - images) == 0).all(dim=3).all(dim=2).all(dim=1) for images in kinds.values())
    assert (cubic ^ linear).all()
    assert 4 < cubic.sum() < 20


@pytest.mark.gpu
def test_gpu_augments_as_the_cpu(source: Source) -> None:
    """The difference is the decoder's; noise apart, which is drawn otherwise."""
    cfg = AugmentConfig(remode="const")
    on_gpu, on_cpu = (
        next(training_loader(source, 24, device=d, augmentation=cfg).epoch(0)).images.cpu() for d in ("cuda", "cpu")
    )
    assert (levels(on_gpu) - levels(on_cpu)).abs().mean() < 6


@pytest.mark.gpu
def test_gpu_images_do_not_change_while_others_are_in_work(source: Source) -> None:
    """DALI's memory is given back while our kernels are still to run; it must wait for them."""
    loader = training_loader(source, 12, device="cuda", size=224, augmentation=AugmentConfig())
    first = [batch.images.clone() for epoch in range(10) for batch in loader.epoch(epoch)]
    again = [batch.images for epoch in range(10) for batch in loader.epoch(epoch)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    loader.close()
