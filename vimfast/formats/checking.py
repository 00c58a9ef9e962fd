"""Whether a file computes what its model does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

TOLERANCE = 1e-4  # of an output, or of its size where it is above 1: other orders of summation differ by much less
_EXAMPLES = 3  # images: as many at once, and one


def example_images(size: Sequence[int]) -> Tensor:
    """The same few normally distributed images [3, *size] each time; size is channels, height, width."""
    return torch.randn(_EXAMPLES, *size, generator=torch.Generator().manual_seed(0))


def largest_difference(model: nn.Module, run: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """Between what `run` and the model in evaluation mode make of images, all at once and the first alone.

    As a share of the largest output where that is above 1; infinite where an output is not finite.
    """
    training = model.training
    with torch.no_grad():
        model.eval()
        pairs = [(run(batch), model(batch)) for batch in (images, images[:1])]
        model.train(training)
    found = [float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1)) for got, wanted in pairs]
    return max(x if x == x else float("inf") for x in found)
