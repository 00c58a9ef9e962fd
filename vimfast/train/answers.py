"""What a model answers to each image of an evaluation."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vimfast import dist
from vimfast.data.loader import Loader


class Answered(NamedTuple):
    """The answers to all images, in no order; each array has an element for each image."""

    ids: np.ndarray  # int64 [n]: numbers of the images in their source
    guesses: np.ndarray  # int32 [n]: the most probable class
    probabilities: np.ndarray  # float32 [n], of that class
    own: np.ndarray  # float32 [n]: the probability of the image's own class


class Answers:
    """Collects them on the device, 12 bytes an image, so that the host waits for none of them before the end."""

    def __init__(self) -> None:
        self._held: list[Tensor] = []
        self.last: Answered | None = None  # of the last evaluation that was complete, on rank 0

    def begin(self) -> None:
        """Before an evaluation; what an incomplete one has left is forgotten."""
        self._held.clear()
        self.last = None

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Those of the next batch: float32 [B, K], and the images' own classes, int64 [B]."""
        probabilities = logits.softmax(1)
        best = probabilities.max(1)
        own = probabilities.gather(1, labels[:, None])[:, 0]
        self._held.append(torch.stack([best.indices.float(), best.values, own]))  # classes below 2**24 stay exact

    def end(self, loader: Loader) -> None:
        """After the last batch; every process must call it.

        Args:
            loader: that has handed out the batches, and knows by now which images were left out.
        """
        ids = np.concatenate([np.zeros(0, np.int64), *(loader.ids(0, step) for step in range(loader.steps))])
        held = torch.cat([torch.zeros(3, 0, device=loader.device), *self._held], dim=1).cpu().numpy()
        self._held.clear()
        found = dist.gather_objects((ids, held))
        ids, table = np.concatenate([own for own, _ in found]), np.concatenate([own for _, own in found], axis=1)
        guesses, probabilities, own = np.nan_to_num(table)
        self.last = Answered(ids, guesses.astype(np.int32), probabilities, own)
