"""A model as a folder in the layout that the Hugging Face hub, and so timm, expects: safetensors and a config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from vimfast.errors import UserError, remedy
from vimfast.files import write_bytes, write_text

PREPROCESSING = (
    "interpolation",
    "crop_pct",
    "crop_mode",
    "mean",
    "std",
    "fixed_input_size",
    "first_conv",
    "classifier",
)


def save_for_hub(
    model: nn.Module,
    folder: Path,
    *,
    weights: Mapping[str, Tensor] | None = None,
    model_args: Mapping[str, Any] | None = None,
    classes: Sequence[str] = (),
) -> None:
    """Write ``model.safetensors`` and ``config.json``: ``timm.create_model("local-dir:FOLDER", pretrained=True)`` and
    transformers' ``TimmWrapperForImageClassification.from_pretrained("FOLDER")`` read them (after ``import
    vimfast.models``), as does ``hf-hub:`` once the folder is uploaded.

    Args:
        model: a named one, of :func:`vimfast.models.create_model` or of timm.
        folder: created if it does not exist.
        weights: its state dict; default: the model's own values.
        model_args: constructor options; default: those that a Vision Mamba was built with.
        classes: names, as many as the head has.

    Raises:
        UserError: the model has no name, an option is not a plain value, the names are too few or many, or the folder
            cannot be written.
    """
    cfg: Mapping[str, Any] = getattr(model, "pretrained_cfg", {})
    if "architecture" not in cfg:
        raise UserError("a model without a name cannot be built again", "make it with vimfast.models.create_model")
    num_classes: Any = model.num_classes
    if classes and len(classes) != num_classes:
        raise UserError(
            f"there are {len(classes)} class names for a head of {num_classes} classes", "give one for each"
        )
    options = dict(getattr(model, "model_args", {}) if model_args is None else model_args)
    options.pop("num_classes", None)  # it stands beside them, and whoever passes both is told so by Python
    channels, *size = cfg["input_size"]
    channels = options.get("in_chans", channels)
    if "img_size" in options:
        side = options["img_size"]
        size = [side, side] if isinstance(side, int) else list(side)
    config = {
        "architecture": cfg["architecture"],
        "num_classes": num_classes,
        "num_features": model.num_features,
        **({"label_names": list(classes)} if classes else {}),
        "model_args": options,
        "pretrained_cfg": {
            **{name: cfg[name] for name in PREPROCESSING if cfg.get(name) is not None},
            "input_size": [channels, *size],
            "num_classes": num_classes,
        },
    }
    try:
        text = json.dumps(config, indent=2)
    except TypeError as error:
        raise UserError(
            f"a constructor option cannot be written as JSON ({error})", "pass it as a plain value"
        ) from None
    tensors = {name: t.detach().cpu().contiguous() for name, t in (weights or model.state_dict()).items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / "model.safetensors", save(tensors, metadata={"format": "pt"}))
        write_text(folder / "config.json", text + "\n")
    except OSError as error:
        fix = remedy(error, "choose another folder")
        raise UserError(f"{folder} cannot be written ({error.strerror})", fix) from None
