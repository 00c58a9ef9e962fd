"""What a checkpoint says of its model, whoever wrote it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from typing import Any, NamedTuple

import msgspec

from vimfast.config import DataConfig, ModelConfig
from vimfast.errors import UserError
from vimfast.image_size import ImageSize, SizeLike

_SIZE, _CROP_RATIO = ModelConfig().size, DataConfig.eval_crop_ratio


class Description(NamedTuple):
    """A model, and the images that it is evaluated on."""

    model: str = ""  # its name; empty: the checkpoint does not say
    input_size: ImageSize = _SIZE
    options: Mapping[str, Any] = {}  # of its constructor
    classes: tuple[str, ...] = ()  # their names; empty: the checkpoint does not say
    crop_ratio: float = _CROP_RATIO  # of the evaluation
    preprocessing: Mapping[str, Any] = {}  # the hub's, by timm's names: ``mean``, ``std``, ``interpolation``

    @property
    def img_size(self) -> ImageSize | None:
        """Of the images that the weights are of; None: the checkpoint does not say."""
        return self.input_size if self.model else None


def described(state: Mapping[str, Any]) -> Description:
    """What is found in a checkpoint of ours or of hustvl/Vim, or in a folder in the hub's layout.

    Args:
        state: as :func:`~vimfast.checkpoint.load_checkpoint` returns it.

    Raises:
        UserError: what it says of its images is no size.
    """
    classes = tuple(state.get("classes") or ())
    config = state.get("config")
    if config is not None and "model" in config:
        known = {f.name for f in fields(ModelConfig)}
        model = ModelConfig(**{name: value for name, value in config["model"].items() if name in known})
        ratio = config.get("data", {}).get("eval_crop_ratio", _CROP_RATIO)
        return Description(model.model, _size(model.input_size), model.options(), classes, ratio)
    if isinstance(args := state.get("args"), argparse.Namespace):
        size, ratio = getattr(args, "input_size", _SIZE), getattr(args, "eval_crop_ratio", _CROP_RATIO)
        return Description(getattr(args, "model", ""), _size(size), {}, classes, ratio)
    if isinstance(hub := state.get("hub"), dict) and "architecture" in hub:
        options = {name: value for name, value in hub.get("model_args", {}).items() if name != "img_size"}
        if "num_classes" in hub:
            options["num_classes"] = hub["num_classes"]
        told = hub.get("pretrained_cfg", {})
        size, ratio = _size(told.get("input_size", _SIZE)[-2:]), told.get("crop_pct", _CROP_RATIO)
        names = {name: told[name] for name in ("mean", "std", "interpolation") if name in told}
        return Description(hub["architecture"], size, options, tuple(hub.get("label_names") or ()), ratio, names)
    return Description(classes=classes)


def _size(value: Any) -> ImageSize:
    """As it is on the disk: one number, or height and width."""
    with suppress(msgspec.ValidationError):
        size = ImageSize.of(msgspec.convert(value, SizeLike))
        if min(size) > 0:
            return size
    raise UserError(f"the checkpoint says that its images are of size {value!r}", "use another checkpoint")
