"""A checkpoint as a folder in the Hugging Face hub's layout, and as files that run without this package.

    python -m vimfast.export runs/tiny/best_checkpoint.pth --out exported/ --pt2 --onnx
    python -c "import timm, vimfast.models; timm.create_model('local-dir:exported/', pretrained=True)"

Each file is read back after it is written and run on a few images beside the model.

The model is the one that the checkpoint says it is of; --model and the flags of vimfast.train say it where it does not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vimfast.augment.colours import IMAGENET_MEAN, IMAGENET_STD
from vimfast.augment.recipe import evaluation_crop
from vimfast.checkpoint import HUB_WEIGHTS, Description, described, load_found, load_weights
from vimfast.cli import SIZE, Parser, image_size, path, run_main
from vimfast.errors import UserError
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
from vimfast.image_size import ImageSize
from vimfast.inference import rebuild
from vimfast.models.grey import GREY_MEAN, GREY_STD
from vimfast.models.hub import save_for_hub
from vimfast.models.registry import MODELS

PROGRAM, ONNX = "model.pt2", "model.onnx"  # beside the hub's files


def parser() -> Parser:
    """Of the command line."""
    parser = Parser(
        "python -m vimfast.export",
        "Write a checkpoint's weights in the Hugging Face hub's layout, and as files that run without vimfast.",
        epilog="example: vimfast export runs/tiny --out exported/ --onnx",
    )
    parser.add_argument(
        "checkpoint",
        metavar="CKPT",
        type=path,
        help="a run folder, a checkpoint of ours or of hustvl/Vim, or weights alone",
    )
    parser.add_argument(
        "--out", type=path, required=True, help="folder to write: a new or empty one, or an earlier export"
    )
    parser.add_argument("--weights", choices=("raw", "ema"), default="raw", help="which to write [raw]")
    parser.add_argument("--model", help="name of the model, where the checkpoint does not say")
    text = "side of its images, pixels, or height and width; default: the checkpoint's"
    parser.add_argument("--input-size", metavar=SIZE, type=image_size, help=text)
    parser.add_argument("--pt2", action="store_true", help=f"write {PROGRAM} too, a program of torch.export")
    parser.add_argument("--onnx", action="store_true", help=f"write {ONNX} too, for onnxruntime and others")
    return parser


def main() -> None:
    """Export as the command line says."""
    args = parser().parse_args(sys.argv[1:])
    _check_out(args.out)
    if args.onnx:
        require_onnx()
    args.checkpoint, state, passed_over = load_found(args.checkpoint, best=True)
    for note in passed_over:
        print(f"warning: {note}", file=sys.stderr)
    weights = state["model"] if args.weights == "raw" else state.get("model_ema")
    if weights is None:
        raise UserError(f"{args.checkpoint} holds no averaged weights; write the raw ones (--weights raw)")
    told = described(state)
    model = rebuild(told, weights, str(args.checkpoint), model=args.model or "", input_size=args.input_size)
    load_weights(model, weights, str(args.checkpoint))
    cfg: Any = model.pretrained_cfg
    name, size, model_args = cfg["architecture"], ImageSize.of(args.input_size or told.input_size), None
    if name not in MODELS:  # those know their own
        model_args = {**told.options, **({"img_size": size.plain} if cfg.get("fixed_input_size") else {})}
    if told.model:  # else the model's own is the best guess
        cfg.update({"input_size": (told.options.get("in_chans", 3), *size), **_preprocessing(told, size)})
    save_for_hub(model, args.out, model_args=model_args, classes=told.classes)
    print(f"{args.out}: {name}, {args.weights} weights of {args.checkpoint}")
    for other in (PROGRAM, ONNX):  # an earlier export's, of other weights
        (args.out / other).unlink(missing_ok=True)
    images = example_images((told.options.get("in_chans", cfg["input_size"][0]), *size))
    _check(model, args.out / HUB_WEIGHTS, _read_weights, images)
    if args.pt2:
        write_program(model, images, args.out / PROGRAM)
        _check(model, args.out / PROGRAM, read_program, images)
    if args.onnx:
        write_onnx(model, images, args.out / ONNX)
        _check(model, args.out / ONNX, read_onnx, images)


def _read_weights(path: Path) -> nn.Module:
    """The model that an exported folder is of, in evaluation mode."""
    _, state, _ = load_found(path.parent, best=True)
    model = rebuild(described(state), state["model"], str(path))
    load_weights(model, state["model"], str(path))
    return model.eval()


def _check(model: nn.Module, path: Path, read: Callable[[Path], Callable[[Tensor], Tensor]], images: Tensor) -> None:
    """Say how far what was written is from the model."""
    difference = largest_difference(model, read(path), images)
    if difference > TOLERANCE:
        raise UserError(
            f"{path} differs from the model by {difference:.1e}, more than {TOLERANCE:g}", "do not use it; report this"
        )
    print(f"{path}: outputs differ from the model's by at most {difference:.1e}")


def _check_out(out: Path) -> None:
    """What is there already must not be mixed with an export, or lost to it."""
    try:
        if not out.exists() or not any(out.iterdir()) or _is_export(out):
            return
    except NotADirectoryError:
        raise UserError(f"--out {out} is a file", "give a folder") from None
    except OSError as error:
        fix = "choose another folder, or fix its permissions"
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


if __name__ == "__main__":
    run_main(main)
