"""Loaders for tests, from keywords."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

from vimfast.augment.colours import Normalization
from vimfast.augment.crops import CentreCrop
from vimfast.config import AugmentConfig
from vimfast.data.loader import Loader, LoaderSettings
from vimfast.data.order import Order
from vimfast.data.source import Source
from vimfast.data.views import Evaluation, View, training_view

SETTINGS = {field.name for field in fields(LoaderSettings)}


def make_loader(
    source: Source,
    order: Order,
    *,
    device: Any = "cpu",
    training: bool = True,
    augmentation: AugmentConfig | None = None,
    crop_ratio: float = 0.875,
    **options: Any,
) -> Loader:
    """Options are those of LoaderSettings, Normalization and training_view (or Evaluation)."""
    settings = LoaderSettings(**{name: options.pop(name) for name in SETTINGS & options.keys()})
    names = set(Normalization._fields) & options.keys()
    normalization = Normalization(**{name: options.pop(name) for name in names})
    device = torch.device(device)
    view: View
    if training:
        view = training_view(order, device, augmentation, normalization=normalization, **options)
    else:
        view = Evaluation(order, device, crop=CentreCrop(crop_ratio), normalization=normalization, **options)
    return Loader(source, view, settings)
