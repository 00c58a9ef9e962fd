"""Loaders for a training loop of your own, from a path. For anything unusual, put the parts together yourself."""

from __future__ import annotations

from pathlib import Path

import torch

from vimfast.augment.recipe import evaluation_crop
from vimfast.config import AugmentConfig
from vimfast.data.cache import CacheSettings
from vimfast.data.loader import Loader, LoaderSettings
from vimfast.data.mixed import open_data
from vimfast.data.order import Order
from vimfast.data.views import Evaluation, training_view
from vimfast.dist import ranks
from vimfast.errors import UserError
from vimfast.image_size import ImageSize, SizeLike


def training_loader(
    path: str | Path,
    batch_size: int,
    *,
    size: SizeLike = 224,
    augmentation: AugmentConfig | None = None,
    repeats: int = 1,
    seed: int = 0,
    split: str = "train",
    device: torch.device | str | None = None,
    settings: LoaderSettings | None = None,
    cache: CacheSettings | None = None,
) -> Loader:
    """Random crops in a new order each epoch, the same on any number of processes with the same global batch.

    With a process group (``torch.distributed``), each rank gets its share. What does not fill a step of all ranks is
    left out of an epoch.

    Args:
        path: a shards folder or a folder tree, or the URL of a shards folder in a store; several sets with weights as
            ``"a:0.7 b:0.3"``.
        batch_size: images a step on this rank.
        size: side of the square, pixels; or (height, width).
        augmentation: what is done after crop and flip, ``AugmentConfig()`` for the recipe of Vision Mamba (RandAugment
            and erasing); None: nothing.
        repeats: so many crops of each image in a step (repeated augmentation: 3). An epoch keeps its length, and shows
            one in `repeats` of the images.
        seed: of order, crops and augmentation.
        split: of the data.
        device: where batches come out; None: the current GPU if there is one.
        settings: how the loader works.
        cache: of a store's shards. One that cannot hold all of them is for orders by window, which this has not: images
            that are not in it are read one by one.

    Raises:
        UserError: the data cannot be used, or is too little for one step.
    """
    _check(batch_size=batch_size, size=min(ImageSize.of(size)), repeats=repeats)
    source = open_data(path, split, cache)
    rank, world = ranks()
    order = Order(
        len(source),
        batch_size,
        world=world,
        rank=rank,
        seed=seed,
        repeats=repeats,
        neighbours=repeats > 1,  # an image is then decoded once, for all its crops
        mixture=source.mixture,
    )
    return Loader(source, training_view(order, _device(device), augmentation, size=size), settings)


def evaluation_loader(
    path: str | Path,
    batch_size: int,
    *,
    size: SizeLike = 224,
    crop_ratio: float = 0.875,
    split: str = "val",
    device: torch.device | str | None = None,
    settings: LoaderSettings | None = None,
    cache: CacheSettings | None = None,
) -> Loader:
    """The middle of every image, each once over all ranks, resized as Pillow does it.

    The last batch may be short, and with several ranks some may have one batch fewer than others: sum counts over
    ranks rather than average accuracies.

    Args:
        path, batch_size, size, split, device, settings, cache: as for :func:`training_loader`.
        crop_ratio: images are resized to cover size / this, then the middle is cut out; 1 for sizes up to 32.

    Raises:
        UserError: the data cannot be used.
    """
    _check(batch_size=batch_size, size=min(ImageSize.of(size)))
    source = open_data(path, split, cache)
    rank, world = ranks()
    order = Order(len(source), batch_size, world=world, rank=rank, shuffle=False, drop_last=False)
    crop = evaluation_crop(ImageSize.of(size), crop_ratio)
    return Loader(source, Evaluation(order, _device(device), size, crop), settings)


def _check(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise UserError(f"{name} is {value}", "it must be at least 1")


def _device(device: torch.device | str | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
