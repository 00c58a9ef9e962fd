"""Inputs and comparisons that the tests of the ops share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
SEQUENCES = ("u", "delta", "B", "C", "z")


def make(batch: int, length: int, channels: int, states: int, ways: int = 0, seed: int = 0) -> Inputs:
    """Float64 inputs as in a model; with `ways` directions stacked in front where there is one for each."""
    g = torch.Generator().manual_seed(seed)
    k = (ways,) if ways else ()

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return {
        "u": normal(*k, batch, length, channels),
        "delta": normal(*k, batch, length, channels),
        "A": -torch.exp(normal(*k, channels, states)),
        "B": normal(*k, batch, length, states),
        "C": normal(*k, batch, length, states),
        "D": normal(*k, channels),
        "z": normal(batch, length, channels),
        "delta_bias": normal(*k, channels) - 1,
    }


def results(function: Callable[..., Tensor], inputs: Inputs) -> Inputs:
    """The output and the gradient of each input, of a loss that weighs every output differently."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out = function(**leaves)
    weights = torch.sin(torch.arange(out.numel())).bfloat16().double().view(out.shape)  # exact in any dtype
    grads = torch.autograd.grad((out.double() * weights).sum(), list(leaves.values()))
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def agree(got: Inputs, want: Inputs, tolerance: float) -> None:
    """Relative errors in norm; a NaN agrees with nothing."""
    for name, x in want.items():
        assert got[name].shape == x.shape, name
        error = (got[name].double() - x.double()).norm() / x.double().norm().clamp(min=1e-30)
        assert error <= tolerance, f"{name}: {error:.1e}"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(out: Tensor | tuple[Tensor, ...], leaves: list[Tensor]) -> list[Tensor]:
    """Of a loss that weighs every output differently, by weights that are exact in any dtype."""
    outs = out if isinstance(out, tuple) else (out,)
    weights = [torch.sin(torch.arange(y.numel()) + i).bfloat16().double().view(y.shape) for i, y in enumerate(outs)]
    return list(torch.autograd.grad(sum((y.double() * w).sum() for y, w in zip(outs, weights, strict=True)), leaves))
