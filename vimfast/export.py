"""A checkpoint as a folder in the Hugging Face hub's layout: model.safetensors and config.json.

    python -m vimfast.export runs/tiny/best_checkpoint.pth --out exported/
    python -c "import timm, vimfast.models; timm.create_model('local-dir:exported/', pretrained=True)"

The model is the one that the checkpoint says it is of; --model and the flags of vimfast.train say it where it does not.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from vimfast.checkpoint import load_checkpoint, load_weights
from vimfast.cli import Parser, run_main
from vimfast.config import ModelConfig
from vimfast.errors import UserError
from vimfast.models import create_model
from vimfast.models.hub import save_for_hub
from vimfast.models.registry import MODELS


def main() -> None:
    parser = Parser("python -m vimfast.export", "Write a checkpoint's weights in the Hugging Face hub's layout.")
    parser.add_argument("checkpoint", type=Path, help="of vimfast.train, of hustvl/Vim, or a file of weights alone")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--weights", choices=("raw", "ema"), default="raw", help="which to write [raw]")
    parser.add_argument("--model", help="name of the model, where the checkpoint does not say")
    parser.add_argument("--input-size", type=int, help="side of its images, where the checkpoint does not say [224]")
    args = parser.parse_args(sys.argv[1:])
    state = load_checkpoint(args.checkpoint)
    weights = state["model"] if args.weights == "raw" else state.get("model_ema")
    if weights is None:
        raise UserError(f"{args.checkpoint} holds no averaged weights; write the raw ones (--weights raw)")
    name, size, options = described(state)
    name, size = args.model or name, args.input_size or size
    if not name:
        raise UserError(f"{args.checkpoint} does not say which model it is of; give its --model")
    head = weights.get("head.weight", weights.get("fc.weight"))
    if head is not None:
        options["num_classes"] = len(head)
    model = create_model(name, img_size=size, **options)
    load_weights(model, weights, str(args.checkpoint))
    model_args = None if name in MODELS else {**options, **({"img_size": size} if fixed_size(model) else {})}
    save_for_hub(model, args.out, model_args=model_args, classes=state.get("classes", ()))
    print(f"{args.out}: {name}, {args.weights} weights of {args.checkpoint}")


def described(state: dict[str, Any]) -> tuple[str, int, dict[str, Any]]:
    """(name, input size, constructor options) as found in a checkpoint of ours or of hustvl/Vim."""
    if isinstance(state.get("config"), dict):
        known = {f.name for f in fields(ModelConfig)}
        model = ModelConfig(**{name: value for name, value in state["config"]["model"].items() if name in known})
        return model.model, model.input_size, model.options()
    if isinstance(state.get("args"), argparse.Namespace):
        return getattr(state["args"], "model", ""), getattr(state["args"], "input_size", 224), {}
    return "", 224, {}


def fixed_size(model: Any) -> bool:
    return bool(model.pretrained_cfg.get("fixed_input_size"))


if __name__ == "__main__":
    run_main(main)
