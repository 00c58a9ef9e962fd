"""Top-1, top-5 and loss over a validation set: every image once, whatever the world size."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vimfast.data.loader import Loader
from vimfast.dist import World
from vimfast.errors import UserError
from vimfast.processes.control import Control, Stopped
from vimfast.train.answers import Answers
from vimfast.train.forward import Forward
from vimfast.train.report import Reporter
from vimfast.train.sums import Sums


class Scores(NamedTuple):
    """Percentages, and the mean cross entropy, over so many images."""

    acc1: float
    acc5: float
    loss: float
    images: int

    def describe(self, classes: int) -> str:
        """In words; of five classes or fewer, every image's is among the first five answers."""
        top5 = f"top-5 {self.acc5:.2f} %, " if classes > 5 else ""
        return f"top-1 {self.acc1:.2f} %, {top5}loss {self.loss:.3f}"

    def like_the_original(self, network: str) -> list[str]:
        """The lines that hustvl/Vim prints, of the "network" or the "ema network"."""
        return [
            f"* Acc@1 {self.acc1:.3f} Acc@5 {self.acc5:.3f} loss {self.loss:.3f}",
            f"Accuracy of the {network} on the {self.images} test images: {self.acc1:.1f}%",
        ]


@torch.no_grad()
def evaluate(
    forward: Forward,
    loader: Loader,
    report: Reporter,
    control: Control | None = None,
    answers: Answers | None = None,
) -> list[Scores]:
    """Scores of each model on all that `loader` hands out on all processes; each image is decoded once for all of them.

    Sums, not means of means, are added over batches and processes, so short last batches weigh what they hold.

    Args:
        forward: the models, and how they are run.
        loader: an evaluation loader; processes may have different numbers of batches.
        control: is asked before every step whether to stop.
        answers: collects those of the first model.

    Raises:
        Stopped: it said so.
        UserError: the split is empty.
    """
    control = control or Control(World())
    training = [model.training for model in forward.models]
    for model in forward.models:
        model.eval()
    sums = [Sums(("top1", "top5", "loss", "count"), loader.device) for _ in forward.models]
    if answers is not None:
        answers.begin()
    with report.steps("evaluate", loader.steps):
        batches = loader.epoch(0)
        for _ in range(loader.steps):  # every process asks as often, also one that has no images left
            if control.should_stop():
                raise Stopped
            control.doing("waiting for data")
            batch = next(batches, None)
            control.doing("evaluating")
            if batch is None:
                continue
            found = forward(batch.images)
            for logits, own in zip(found, sums, strict=True):
                own.add(*_scored(logits, batch.labels))
            if answers is not None:
                answers.add(found[0], batch.labels)
            report.advance()
    if answers is not None:
        answers.end(loader)
    loader.pause()
    for model, was in zip(forward.models, training, strict=True):
        model.train(was)
    return [_scores(own.read()) for own in sums]


def _scored(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Hits among the first and the first five answers, summed cross entropy, and how many images."""
    hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    return hits[:, 0].sum(), hits.sum(), F.cross_entropy(logits, labels, reduction="sum"), len(labels)


def _scores(total: dict[str, float]) -> Scores:
    count = round(total["count"])
    if count == 0:
        raise UserError("the validation split holds no images", "check it with python -m vimfast.check_data")
    return Scores(100 * total["top1"] / count, 100 * total["top5"] / count, total["loss"] / count, count)
