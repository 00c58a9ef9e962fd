"""How long a recipe takes: its training step at the size and the batch of each stage, measured here, and what follows.

    python tools/bench_stages.py vim_tiny_evening         # on this GPU, and predicted for an RTX 4090
    python tools/bench_stages.py mine.yaml --images 100000 --validation 10000

Steps are the trainer's own, mixing included, on images that are in memory already: where the loader is slower, it
decides. The prediction assumes that a step on the other GPU takes the same multiple of its floor (tools/floors.py).
Evaluations are of the weights and their average, as often as the recipe has them, and replayed as the trainer does it.
GiB are what torch holds of the GPU's memory; the loader needs about one more.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from floors import RTX_4090, Gpu, step, this_gpu
from rich.console import Console
from rich.table import Table

from vimfast.cli import run_main
from vimfast.config import Config, load_config, plan_batches, staged
from vimfast.errors import UserError
from vimfast.models.vision_mamba import VisionMamba
from vimfast.speed import milliseconds
from vimfast.train.compiling import captures
from vimfast.train.device import kernels
from vimfast.train.forward import Forward
from vimfast.train.losses import Objective
from vimfast.train.mixing import Mixup
from vimfast.train.model import Models, build_models, build_step
from vimfast.train.optim import build_optimizer, peak_lr
from vimfast.train.report import Reporter
from vimfast_kernels.tune import tune_once


@dataclass(frozen=True)
class Measured:
    """Passes over images of one size.

    Args:
        epochs: over all images.
        size: of an image, pixels.
        batch: images of a pass.
        parts: passes of an update.
        ms: of a pass; with its share of the update, in training.
        gib: of the GPU's memory.
        floors: of a pass, seconds: on the GPU that measured it, and on the one that it is predicted for; on a CPU none.
    """

    what: str
    epochs: int
    size: int
    batch: int
    parts: int
    ms: float
    gib: float = 0.0
    floors: tuple[float, ...] = ()

    @property
    def rate(self) -> float:
        """Images per second as measured."""
        return 1000 * self.batch / self.ms

    @property
    def predicted(self) -> float:
        """Images per second on the other GPU."""
        here, there = self.floors
        return self.rate * here / there

    def hours(self, images: int, rate: float) -> float:
        return self.epochs * images / rate / 3600


class Trial:
    """The parts of a run with these settings that are on the GPU."""

    def __init__(self, config: Config, device: torch.device, repeats: int, gpus: tuple[Gpu, ...]) -> None:
        self._config, self._device, self._repeats, self._gpus = config, device, repeats, gpus
        sizes = {own.config.model.size for own in staged(config)}
        rates = [own.config.model.drop_path for own in staged(config)]
        classes = config.model.num_classes or 1000
        self._models: Models = build_models(
            config, classes, None, device, Reporter(None, active=True), sizes, max(rates)
        )
        model = self._models.model
        if not isinstance(model, VisionMamba):
            raise UserError(
                f"{config.model.model} is not a Vision Mamba, and no floor is known for other models",
                "give a recipe that trains one",
            )
        self._model = model
        self._mixup = Mixup(config.mix, classes, config.run.seed, 0)
        if kernels(model, self._models.precision) == "gluon":
            tune_once(torch.cuda.current_device(), print)

    def _floors(self, batch: int, size: int, training: bool) -> tuple[float, ...]:
        model = self._model
        fp32 = self._models.precision.dtype == torch.float32
        patch = self._config.model.size.height // model.patch_embed.grid_size[0]
        ops = step(
            batch, size, model.embed_dim, depth=len(model.layers), patch=patch, classes=model.num_classes, fp32=fp32,
            training=training,
        )  # fmt: skip
        return tuple(gpu.seconds(ops, fp32) for gpu in self._gpus)

    def training(self) -> list[Measured]:
        """The stages."""
        model, device = self._model.train(), self._device
        objective = Objective(self._config.distill, self._config.mix.bce_loss, None, self._models.precision.amp)
        optimizer = build_optimizer(self._config.optim, model, peak_lr(self._config.optim, 512))
        trained = build_step(self._models, optimizer, objective, self._config.optim.clip_grad, 1, 1)
        found = []
        for number, (epochs, own) in enumerate(staged(self._config), 1):
            batch, parts = plan_batches(own, 1)
            trained.restart(parts)
            gc.collect()
            images = torch.randn(batch, 3, *own.model.size, device=device)
            labels = torch.arange(batch, device=device) % self._mixup.num_classes
            mixup = self._mixup.as_in(own.mix)
            if captures(model, own.model, device):
                trained.capture(*mixup(images, labels, 0))

            def update(mixup: Mixup = mixup, images: torch.Tensor = images, labels: torch.Tensor = labels) -> None:
                for part in range(trained.accum_steps):
                    trained(*mixup(images, labels, part), first=part == 0, last=part == trained.accum_steps - 1)

            ms = milliseconds(update, device, max(5, self._repeats // parts)) / parts
            size, floors = own.model.size.height, self._floors(batch, own.model.size.height, True)
            found.append(Measured(f"stage {number}", len(epochs), size, batch, parts, ms, self._gib(), floors))
        trained.restart(1)
        return found

    def _gib(self) -> float:
        return torch.cuda.memory_reserved() / 2**30 if self._device.type == "cuda" else 0.0

    def evaluation(self) -> Measured:
        """A pass of the weights and one of their average, over each image of all evaluations; times and floors are of
        both."""
        config, models, device = self._config, [*self._models.evaluated.values()], self._device
        batch = config.data.eval_batch_size or plan_batches(config, 1).batch_size
        images = torch.randn(batch, 3, *config.model.size, device=device)
        for model in models:
            model.eval()
        captured = captures(self._model, config.model, device)
        forward = Forward(models, self._models.precision.amp, device, batch=batch if captured else None, warn=print)
        size, epochs = config.model.size.height, -(-config.schedule.epochs // config.run.eval_every)
        ms = milliseconds(lambda: forward(images), device, self._repeats)
        floors = tuple(len(models) * floor for floor in self._floors(batch, size, False))
        return Measured("evaluations", epochs, size, batch, 1, ms, self._gib(), floors)


def table(found: Sequence[Measured], gpus: Sequence[Gpu]) -> Table:
    """A row for each; predictions only where there is a GPU that measured."""
    names = [gpu.name for gpu in gpus] or ["this CPU"]
    shown = Table("", "epochs", "pixels", "batch", "ms", *(f"img/s, {name}" for name in names))
    if gpus:
        shown.add_column("GiB")
        shown.add_column("x floor")
        shown.add_column("floor there / here")
    for column in shown.columns[1:]:
        column.justify = "right"
    for own in found:
        cells = [own.what, str(own.epochs), str(own.size), f"{own.parts} x {own.batch}", f"{own.ms:.2f}"]
        cells.append(f"{own.rate:,.0f}")
        if own.floors:
            here, there = own.floors
            cells += [f"{own.predicted:,.0f}", f"{own.gib:.1f}", f"{own.ms / 1000 / here:.2f}", f"{there / here:.2f}"]
        shown.add_row(*cells)
    return shown


def arithmetic(found: Sequence[Measured], images: Sequence[int], rates: Sequence[float]) -> list[str]:
    """A line for each, and their sum.

    Args:
        images: that each has in an epoch.
        rates: images per second of each.
    """
    hours = [own.hours(count, rate) for own, count, rate in zip(found, images, rates, strict=True)]
    lines = [
        f"{own.what}: {own.epochs} x {count:,} images / {rate:,.0f} img/s = {its:.2f} h"
        for own, count, rate, its in zip(found, images, rates, hours, strict=True)
    ]
    return [*lines, f"in all {sum(hours):.2f} h"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a name of configs/, or a YAML file")
    parser.add_argument("--images", type=int, default=1_281_167, help="to train on [%(default)s]")
    parser.add_argument("--validation", type=int, default=50_000, help="images to validate on [%(default)s]")
    parser.add_argument("--repeats", type=int, default=40, help="passes to time [%(default)s]")
    args, flags = parser.parse_known_args()
    config = load_config(["--config", args.recipe, *flags])
    device = torch.device("cuda" if torch.cuda.is_available() and config.run.device != "cpu" else "cpu")
    gpus = (this_gpu(), RTX_4090) if device.type == "cuda" else ()
    trial = Trial(config, device, args.repeats, gpus)
    found = [*trial.training(), trial.evaluation()]
    console = Console(width=150, highlight=False)
    console.print(table(found, gpus))
    images = [args.images] * (len(found) - 1) + [args.validation]
    rates = {"as measured": [own.rate for own in found]}
    if gpus:
        rates[f"{RTX_4090.name}, predicted"] = [own.predicted for own in found]
    for name, own in rates.items():
        console.print(f"{name}:", *arithmetic(found, images, own), sep="\n  ")


if __name__ == "__main__":
    run_main(main)
