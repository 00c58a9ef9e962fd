"""A checkpoint's model as files of an exported folder, each compared with the model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from vimfast.augment.colours import IMAGENET_MEAN, IMAGENET_STD
from vimfast.augment.recipe import evaluation_crop
from vimfast.checkpoint import HUB_WEIGHTS, Description, described, load_found, load_weights
from vimfast.cli import LiveLine, fit_terminal
from vimfast.errors import UserError, printable, remedy
from vimfast.formats import (
    TOLERANCE,
    example_images,
    largest_difference,
    read_onnx,
    read_program,
    require_onnx,
    write_onnx,
    write_program,
)
from vimfast.image_size import ImageSize, SizeLike
from vimfast.inference import OTHER_MODEL, rebuild
from vimfast.models.grey import GREY_MEAN, GREY_STD
from vimfast.models.hub import save_for_hub
from vimfast.models.registry import MODELS

PROGRAM, ONNX = "model.pt2", "model.onnx"  # beside the hub's files


def export(
    checkpoint: Path,
    out: Path,
    *,
    weights: Literal["raw", "ema"] = "raw",
    model: str = "",
    input_size: SizeLike | None = None,
    pt2: bool = False,
    onnx: bool = False,
) -> None:
    """Write the folder, and say for each of its files how far it is from the model.

    Args:
        checkpoint: a run folder, a checkpoint of ours or of hustvl/Vim, or weights alone.
        out: the folder; what an earlier export left there and this one does not write is removed.
        weights: the trained ones, or their average.
        model, input_size: its name, and the side of its images in pixels or (height, width), where the checkpoint does
            not say or is not to be followed.
        pt2, onnx: write a program of torch.export too, and an ONNX model.

    Raises:
        UserError: the checkpoint cannot be used, or a file cannot be written or computes something else.
    """
    _check_out(out)
    if onnx:
        require_onnx()
    checkpoint, state, passed_over = load_found(checkpoint, best=True)
    for note in passed_over:
        print(fit_terminal(f"warning: {note}", sys.stderr), file=sys.stderr)
    values = state["model"] if weights == "raw" else state.get("model_ema")
    if values is None:
        raise UserError(f"{checkpoint} holds no averaged weights", "write the trained ones (--weights raw)")
    told = described(state)
    built = rebuild(told, values, str(checkpoint), model=model, input_size=input_size)
    load_weights(built, values, str(checkpoint), fix=OTHER_MODEL)
    cfg: Any = built.pretrained_cfg
    name, size, model_args = cfg["architecture"], ImageSize.of(input_size or told.input_size), None
    if name not in MODELS:  # those know their own
        model_args = {**told.options, **({"img_size": size.plain} if cfg.get("fixed_input_size") else {})}
    if told.model:  # else the model's own is the best guess
        cfg.update({"input_size": (told.options.get("in_chans", 3), *size), **_preprocessing(told, size)})
    save_for_hub(built, out, model_args=model_args, classes=told.classes)
    whose = "trained" if weights == "raw" else "averaged"
    print(fit_terminal(printable(f"{out}: {name}, {whose} weights of {checkpoint}"), sys.stdout))
    for other in (PROGRAM, ONNX):  # an earlier export's, of other weights
        (out / other).unlink(missing_ok=True)
    images = example_images((told.options.get("in_chans", cfg["input_size"][0]), *size))
    _check(built, out / HUB_WEIGHTS, _read_weights, images)
    if pt2:
        _write(write_program, built, images, out / PROGRAM)
        _check(built, out / PROGRAM, read_program, images)
    if onnx:
        _write(write_onnx, built, images, out / ONNX)
        _check(built, out / ONNX, read_onnx, images)


def _read_weights(path: Path) -> nn.Module:
    """The model that an exported folder is of, in evaluation mode."""
    _, state, _ = load_found(path.parent, best=True)
    model = rebuild(described(state), state["model"], str(path))
    load_weights(model, state["model"], str(path))
    return model.eval()


def _write(write: Callable[[nn.Module, Tensor, Path], object], model: nn.Module, images: Tensor, path: Path) -> None:
    """It is traced first, which takes long."""
    with LiveLine() as live:
        live.say(f"writing {path}")
        write(model, images, path)


def _check(model: nn.Module, path: Path, read: Callable[[Path], Callable[[Tensor], Tensor]], images: Tensor) -> None:
    """Say how far what was written is from the model."""
    with LiveLine() as live:
        live.say(f"comparing {path} with the model")
        difference = largest_difference(model, read(path), images)
    if difference > TOLERANCE:
        raise UserError(
            f"{path} differs from the model by {difference:.1e}, more than {TOLERANCE:g}", "do not use it; report this"
        )
    close = f"differ from the model's by at most {difference:.2g}" if difference else "are the model's, bit for bit"
    print(fit_terminal(printable(f"{path}: outputs {close}"), sys.stdout))


def _check_out(out: Path) -> None:
    """What is there already must not be mixed with an export, or lost to it."""
    try:
        if not out.exists() or not any(out.iterdir()) or _is_export(out):
            return
    except NotADirectoryError:
        raise UserError(f"--out {out} is a file", "give a folder") from None
    except OSError as error:
        fix = remedy(error, "choose another folder")
        raise UserError(f"--out {out} cannot be read ({error.strerror})", fix) from None
    raise UserError(
        f"--out {out} holds other files than an export's", "give a new folder, an empty one or an earlier export"
    )


def _is_export(folder: Path) -> bool:
    """Whether it is in the hub's layout, of any program."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return False
    return (folder / HUB_WEIGHTS).is_file() and isinstance(config, dict) and "architecture" in config


def _preprocessing(told: Description, images: ImageSize) -> dict[str, Any]:
    """What the model was evaluated with, by timm's names."""
    ratio = evaluation_crop(images, told.crop_ratio).ratio
    mean, std = (GREY_MEAN, GREY_STD) if told.options.get("in_chans") == 1 else (IMAGENET_MEAN, IMAGENET_STD)
    trained = {"mean": mean, "std": std, "interpolation": "bicubic", "crop_mode": "center"}
    return {**trained, "crop_pct": ratio, **told.preprocessing}
