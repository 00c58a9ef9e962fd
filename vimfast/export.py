"""A checkpoint as a folder in the Hugging Face hub's layout, and as files that run without this package.

    python -m vimfast.export runs/tiny/best_checkpoint.pth --out exported/ --pt2 --onnx
    python -c "import timm, vimfast.models; timm.create_model('local-dir:exported/', pretrained=True)"

Each file is read back after it is written and run on a few images beside the model.

The model is the one that the checkpoint says it is of; --model and --input-size say it where it does not.
"""

from __future__ import annotations

import sys

from vimfast.cli import SIZE, Parser, image_size, path, run_main


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
    parser.add_argument(
        "--weights", choices=("raw", "ema"), default="raw", help="the trained ones, or their average [raw]"
    )
    parser.add_argument("--model", help="name of the model, where the checkpoint does not say")
    text = "side of its images, pixels, or height and width; default: the checkpoint's"
    parser.add_argument("--input-size", metavar=SIZE, type=image_size, help=text)
    parser.add_argument("--pt2", action="store_true", help="write model.pt2 too, a program of torch.export")
    parser.add_argument("--onnx", action="store_true", help="write model.onnx too, for onnxruntime and others")
    return parser


def main() -> None:
    """Export as the command line says."""
    args = parser().parse_args(sys.argv[1:])
    from vimfast.exporting import export  # torch and timm, seconds that --help need not take

    export(
        args.checkpoint,
        args.out,
        weights=args.weights,
        model=args.model or "",
        input_size=args.input_size,
        pt2=args.pt2,
        onnx=args.onnx,
    )


if __name__ == "__main__":
    run_main(main)
