"""How far the evaluation's pixels are from Pillow's: resize of the short side, bicubic, and centre crop.

    python tools/parity.py imagenet_data/ --split val --decoders cpu cuda hardware

Differences are in levels, 0 to 255, over all values of all images; "worst" is the image with the largest mean.
"""

from __future__ import annotations

import argparse
from io import BytesIO

import numpy as np
import torch
from PIL import Image

from vimfast.augment.colours import Normalization
from vimfast.augment.crops import CentreCrop
from vimfast.cli import run_main
from vimfast.config.choices import Decoder
from vimfast.data.hardware import DECODERS
from vimfast.data.loader import Loader, LoaderSettings
from vimfast.data.order import Order
from vimfast.data.source import Source, open_source
from vimfast.data.views import Evaluation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="shards folder, or folder tree")
    parser.add_argument("--split", default="train", choices=["train", "val"])
    parser.add_argument("--decoders", nargs="+", choices=DECODERS, default=["cpu"])
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--input-size", type=int, default=224)
    parser.add_argument("--crop-ratio", type=float, default=0.875)
    parser.add_argument("--images", type=int, default=400, help="the first so many")
    args = parser.parse_args()
    source = open_source(args.data, args.split)
    count = min(args.images, len(source))
    expected = torch.stack([pillow(source, i, args.input_size, args.crop_ratio) for i in range(count)])
    columns = ("equal", "<= 1", "<= 2", "<= 4")
    print(f"{'decoder':10} {'mean':>7} {'worst':>7} {'max':>5} " + " ".join(f"{name:>9}" for name in columns))
    for decoder in args.decoders:
        difference = (evaluated(source, count, decoder, args) - expected).abs()
        shares = [(difference <= limit).float().mean().item() for limit in (0, 1, 2, 4)]
        worst = difference.flatten(1).mean(1).max().item()
        figures = f"{difference.mean():7.4f} {worst:7.3f} {difference.max():5.0f} "
        print(f"{decoder:10} {figures}" + " ".join(f"{100 * share:8.4f}%" for share in shares))


def pillow(source: Source, i: int, size: int, crop_ratio: float) -> torch.Tensor:  # float32 [3, size, size]
    """Image i as torchvision and timm evaluate it, with Pillow alone."""
    with Image.open(BytesIO(source.read(np.array([i])).encoded[0].tobytes())) as image:
        rgb = image.convert("RGB")
    target = int(size / crop_ratio)
    short = min(rgb.size)
    width, height = (target if side == short else int(target * side / short) for side in rgb.size)
    resized = rgb.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    pixels = np.asarray(resized.crop((left, top, left + size, top + size)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float()


def evaluated(source: Source, count: int, decoder: Decoder, args: argparse.Namespace) -> torch.Tensor:
    """The loader's evaluation images as levels, float32 [count, 3, size, size]."""
    order, levels = Order(count, 50, shuffle=False, drop_last=False), Normalization((0.0,) * 3, (1 / 255,) * 3)
    crop = CentreCrop(args.crop_ratio)
    view = Evaluation(order, torch.device(args.device), args.input_size, crop, normalization=levels)
    loader = Loader(source, view, LoaderSettings(decoder))
    return torch.cat([batch.images.cpu() for batch in loader.epoch(0)])


if __name__ == "__main__":
    run_main(main)
