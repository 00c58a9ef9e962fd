"""Top-1, top-5 and loss over a validation set: every picture once, whatever the world size."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from vimfast.control import Control, Stopped
from vimfast.data.loader import Loader
from vimfast.dist import World
from vimfast.errors import UserError
from vimfast.metrics import Reporter, Sums


class Scores(NamedTuple):
    """Percentages, and the mean cross entropy, over so many pictures."""

    acc1: float
    acc5: float
    loss: float
    pictures: int

    def __str__(self) -> str:
        return f"* Acc@1 {self.acc1:.3f} Acc@5 {self.acc5:.3f} loss {self.loss:.3f}"


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Loader,
    amp: torch.autocast,
    report: Reporter,
    title: str = "evaluate",
    control: Control | None = None,
) -> Scores:
    """Scores of `model` on all that `loader` hands out on all processes.

    Sums, not means of means, are added over batches and processes, so short last batches weigh what they hold.

    Args:
        model: pictures [B, 3, S, S] to logits [B, K].
        loader: an evaluation loader; processes may have different numbers of batches.
        amp: the autocast context to run under.
        control: is asked in front of every step whether to stop.

    Raises:
        Stopped: it said so.
    """
    control = control or Control(World())
    training = model.training
    model.eval()
    sums = Sums(("top1", "top5", "loss", "count"), loader.device)
    with report.steps(title, loader.steps):
        batches = loader.epoch(0)
        for _ in range(loader.steps):  # every process asks as often, also one that has no pictures left
            if control.should_stop():
                raise Stopped
            control.doing("waiting for data")
            batch = next(batches, None)
            control.doing("evaluating")
            if batch is None:
                continue
            images, labels = batch
            with amp:
                logits = model(images)
            logits = logits.float()
            hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            sums.add(hits[:, 0].sum(), hits.sum(), loss, len(labels))
            report.advance()
    loader.close()  # gives its memory back
    model.train(training)
    total = sums.read()
    count = round(total["count"])
    if count == 0:
        raise UserError("the validation split holds no pictures; check it with python -m vimfast.check_data")
    return Scores(100 * total["top1"] / count, 100 * total["top5"] / count, total["loss"] / count, count)
