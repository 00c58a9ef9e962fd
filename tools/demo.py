"""The whole road in minutes, without a download: scikit-learn's handwritten digits become shards, a small Vision
Mamba, a training curve and a grid of predictions.

    make demo                       (or: python tools/demo.py [--out demo])
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CONFIG = Path(__file__).parent.parent / "configs" / "demo.yaml"
SIDE = 32  # pixels: the scans are 8 x 8
CLASSES = 10


def write_digits(root: Path) -> None:
    """1,797 scans as JPEGs, ``root/{train,val}/<digit>/*.jpg``; each fifth goes to validation."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number, (scan, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        folder = root / ("val" if number % 5 == 0 else "train") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((scan * 255 / 16).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        image.convert("RGB").save(folder / f"digit_{number:04d}.jpg", quality=95)


def run(*command: str) -> str:
    """Run a command as a user would type it, showing it and its output; returns the output."""
    print(f"\n$ {shlex.join(command).replace(sys.executable, 'python')}", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        sys.exit(process.returncode)
    return "".join(lines)


def draw_curve(log: Path, out: Path) -> None:
    """Losses and accuracy by epoch, and why the losses are not of one kind."""
    from vimfast.config import load_config

    smoothing = load_config(["--config", str(CONFIG)]).mix.smoothing
    floor = smoothed_floor(smoothing, CLASSES)
    epochs = [json.loads(line) for line in log.read_text().splitlines()]
    x = [e["epoch"] for e in epochs]  # as log and report number them
    best = max(e["test_acc1"] for e in epochs)
    figure, left = plt.subplots(figsize=(8, 4.8), layout="constrained")
    left.plot(x, [e["train_loss"] for e in epochs], color="tab:orange", label="training loss")
    left.plot(x, [e["test_loss"] for e in epochs], color="tab:orange", linestyle="--", label="validation loss")
    left.axhline(floor, color="tab:gray", linewidth=1, linestyle=":", label="lowest training loss possible")
    left.set(xlabel="epoch", ylabel="loss", ylim=(0, None), xticks=x)
    right = left.twinx()
    right.plot(x, [e["test_acc1"] for e in epochs], color="tab:blue", marker="o", label="validation top-1")
    right.set(ylabel="top-1, %", ylim=(0, 101))
    left.set_title(f"A small Vision Mamba learns handwritten digits: {best:.1f} % top-1", loc="left")
    lines = [*left.get_lines(), *right.get_lines()]
    left.legend(handles=lines, loc="center right", bbox_to_anchor=(1, 0.58), frameon=False, fontsize=9)
    why = (
        f"Training loss lies above validation loss: its labels are smoothed by {smoothing:g}, so no model gets below\n"
        f"{floor:.2f}, its images are cropped at random, and it is the mean of an epoch, in which the model learns."
    )
    figure.supxlabel(why, fontsize=9, color="dimgray")
    figure.savefig(out, dpi=120)
    plt.close(figure)


def smoothed_floor(smoothing: float, classes: int) -> float:
    """The entropy of a smoothed label, below which no cross entropy with it can be."""
    rest = smoothing / classes
    label = [1 - smoothing + rest, *[rest] * (classes - 1)]
    return -sum(p * math.log(p) for p in label if p > 0)


def draw_predictions(checkpoint: Path, shards: Path, out: Path) -> None:
    """Validation images with what the trained model sees in them; mistakes first, in red."""
    from vimfast.augment.colours import IMAGENET_MEAN, IMAGENET_STD
    from vimfast.augment.crops import CentreCrop
    from vimfast.checkpoint import load_checkpoint, load_weights
    from vimfast.config import load_config
    from vimfast.data.loader import Loader
    from vimfast.data.order import Order
    from vimfast.data.source import open_source
    from vimfast.data.views import Evaluation
    from vimfast.models import create_model

    config = load_config(["--config", str(CONFIG)])
    cfg, crop_ratio = config.model, config.data.eval_crop_ratio
    source = open_source(shards, "val")
    model = create_model(cfg.model, num_classes=len(source.classes), img_size=cfg.input_size, **cfg.model_kwargs).eval()
    load_weights(model, load_checkpoint(checkpoint)["model"], str(checkpoint))
    order = Order(samples=len(source), batch_size=len(source), shuffle=False, drop_last=False)
    loader = Loader(source, Evaluation(order, torch.device("cpu"), cfg.input_size, CentreCrop(crop_ratio)))
    images, labels = next(loader.epoch(0))
    with torch.no_grad():
        probability, predicted = (column.tolist() for column in model(images).softmax(1).max(1))
    truth = labels.tolist()
    wrong = [i for i, label in enumerate(truth) if predicted[i] != label]
    mistakes, right = wrong[:10], [i for i, label in enumerate(truth) if predicted[i] == label]
    spread = np.linspace(0, len(right) - 1, 40 - len(mistakes)).astype(int)
    chosen = [*mistakes, *(right[i] for i in spread)]
    mean, std = (torch.tensor(value)[:, None, None] for value in (IMAGENET_MEAN, IMAGENET_STD))
    shown = (images * std + mean).clamp(0, 1).permute(0, 2, 3, 1)
    figure, axes = plt.subplots(4, 10, figsize=(10, 5.6), layout="constrained")
    first = f"the first {len(mistakes)} of {len(wrong)}" if len(wrong) > len(mistakes) else f"all {len(wrong)}"
    title = f"What the model sees in validation images: mistakes first ({first}, in red), then some that are right"
    figure.suptitle(
        f"{title}\n{len(right)} of {len(truth)} are right; in brackets is how sure the model is", fontsize=11
    )
    for axis, i in zip(axes.flat, chosen, strict=True):
        is_right = predicted[i] == truth[i]
        text = f"{source.classes[predicted[i]]} ({probability[i]:.0%})"
        text += "" if is_right else f"\nis {source.classes[truth[i]]}"
        axis.imshow(shown[i])
        axis.set_title(text, fontsize=9, color="black" if is_right else "tab:red")
        axis.axis("off")
    figure.savefig(out, dpi=120)
    plt.close(figure)
    loader.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder to work in, emptied first [demo]")
    out = parser.parse_args().out
    if out.exists() and not (out / "digits").exists() and any(out.iterdir()):
        sys.exit(f"error: {out} exists and is no earlier demo; choose another --out")
    shutil.rmtree(out, ignore_errors=True)
    begin = time.perf_counter()
    python, digits, shards, folder = sys.executable, out / "digits", out / "shards", out / "run"
    write_digits(digits)
    processes = torch.cuda.device_count() if torch.cuda.is_available() else min(2, os.cpu_count() or 1)
    torchrun = [python, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    train = ["-m", "vimfast.train", "--config", str(CONFIG), "--data-path", str(shards)]
    run(python, "-m", "vimfast.prepare", str(digits), "--out", str(shards))
    run(python, "-m", "vimfast.check_data", str(shards), "--html", str(out / "check.html"))
    run(python, "-m", "vimfast", "show", str(shards), "--config", str(CONFIG), "--out", str(out / "samples.png"))
    run(*torchrun, *train, "--output_dir", str(folder))
    run(python, *train, "--eval", "--resume", str(folder / "best_checkpoint.pth"))
    draw_curve(folder / "log.txt", out / "curve.png")
    draw_predictions(folder / "best_checkpoint.pth", shards, out / "predictions.png")
    accuracy = max(json.loads(line)["test_acc1"] for line in (folder / "log.txt").read_text().splitlines())
    print(
        f"\n{accuracy:.1f} % top-1 in {time.perf_counter() - begin:.0f} s; look at",
        *sorted(out.glob("*.png")),
        out / "check.html",
        folder / "report.html",
    )


if __name__ == "__main__":
    main()
