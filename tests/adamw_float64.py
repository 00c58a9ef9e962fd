"""AdamW with clipping and a weight average in float64, one tensor after the other, for the tests of kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vimfast_kernels.update.tensors import Counts, Judged, Moved, Options

# One element, several, a chunk of the kernels, one more, and what ends in a third chunk.
SHAPES = [(), (3, 5), (2048,), (2049,), (2, 2300)]
# The betas are exact in fp32: torch rounds them on a GPU and not on a CPU.
BETAS = (1 - 2**-3, 1 - 2**-10)
OPTIONS = [Options(1e-2, 0.05, *BETAS, 1e-8), Options(3e-3, 0.0, 0.75, 1 - 2**-5, 1e-6)]
GROUPS = [i % 2 for i in range(len(SHAPES))]
LARGEST = 20.0  # norm: of the gradients below, some are clipped and some are not
AVERAGE_WEIGHTS = [1.0, 0.7, 0.3, 0.01]


@dataclass
class Exact:
    """The same parameters."""

    weights: list[Tensor]
    means: list[Tensor]
    squares: list[Tensor]
    averages: list[Tensor]
    steps: int = 0

    def step(self, gradients: Sequence[Tensor], average_weight: float) -> None:
        exact = [g.double() for g in gradients]
        factor = min(LARGEST / (math.sqrt(sum(float(g.square().sum()) for g in exact)) + 1e-6), 1.0)
        self.steps += 1
        for i, gradient in enumerate(exact):
            o, g = OPTIONS[GROUPS[i]], gradient * factor
            self.means[i] = o.beta1 * self.means[i] + (1 - o.beta1) * g
            self.squares[i] = o.beta2 * self.squares[i] + (1 - o.beta2) * g * g
            mean = self.means[i] / (1 - o.beta1**self.steps)
            root = (self.squares[i] / (1 - o.beta2**self.steps)).sqrt()
            self.weights[i] = self.weights[i] * (1 - o.lr * o.weight_decay) - o.lr * mean / (root + o.eps)
            self.averages[i] = self.averages[i] + average_weight * (self.weights[i] - self.averages[i])


class Parameters:
    """Parameters, gradients and state on a device, in fp32 or less, as the kernels take them."""

    def __init__(self, device: str, dtype: torch.dtype = torch.float32, shift: int = 0) -> None:
        """`shift`: elements between a multiple of 16 bytes and the first of each gradient."""
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
        self.device, self.shift = torch.device(device), shift
        self.weights = [x.to(device, copy=True) for x in drawn]
        self.means, self.squares = ([torch.zeros_like(w) for w in self.weights] for _ in range(2))
        self.averages = [w * 2 for w in self.weights]
        self.steps = [torch.zeros((), device=device) for _ in drawn]
        self.counts = Counts(torch.zeros(3, device=device), torch.zeros(len(drawn), dtype=torch.bool, device=device))
        self.memory = [torch.empty(w.numel() + 8, dtype=dtype, device=device) for w in self.weights]
        self.gradients = [
            m[shift : shift + w.numel()].view(w.shape) for m, w in zip(self.memory, self.weights, strict=True)
        ]

    def exact(self) -> Exact:
        return Exact(*([t.double() for t in own] for own in (self.weights, self.means, self.squares, self.averages)))

    def moved(self) -> Moved:
        tensors = self.gradients, self.weights, self.means, self.squares, self.steps, self.averages
        return Moved(*tensors, places=range(len(SHAPES)), groups=GROUPS)

    def state(self) -> list[Tensor]:
        """Everything but the averages."""
        return [*self.weights, *self.means, *self.squares, *self.steps]

    def draw(self) -> Iterator[float]:
        """Gradients of a few steps, smaller and larger ones; gives the weight of each step in the average."""
        generator = torch.Generator().manual_seed(1)
        for number, average_weight in enumerate(AVERAGE_WEIGHTS):
            for gradient in self.gradients:
                gradient.copy_(torch.randn(gradient.shape, generator=generator) * 0.1**number)
            yield average_weight

    def error(self, exact: Exact) -> float:
        """The largest relative error of a tensor."""
        pairs = [
            (mine, right)
            for name in ("weights", "means", "squares", "averages")
            for mine, right in zip(getattr(self, name), getattr(exact, name), strict=True)
        ]
        return max(float((x.double() - y).norm() / y.norm()) for x, y in pairs)


NOTHING = Judged([], [])
