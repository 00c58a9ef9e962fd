"""Residual addition and norms against float64: outputs and every gradient."""

from __future__ import annotations

import pytest
import torch
import vim_float64
from numerics import gradients, normal

from vimfast_kernels import add_layer_norm, add_rms_norm


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("first", [True, False])
def test_add_and_norm(kind: str, first: bool) -> None:
    x, residual = normal(2, 5, 7), None if first else normal(2, 5, 7, seed=1)
    weight, bias = normal(7, seed=2), normal(7, seed=3)
    leaves = [v.requires_grad_() for v in (x, residual, weight, *([bias] if kind == "layer" else [])) if v is not None]
    got = add_rms_norm(x, residual, weight) if kind == "rms" else add_layer_norm(x, residual, weight, bias)
    total = x if residual is None else residual + x
    want = vim_float64.norm(total, weight, bias if kind == "layer" else None), total
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    for a, b in zip(gradients(got, leaves), gradients(want, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_norm_keeps_the_residual_in_fp32(dtype: torch.dtype) -> None:
    x, residual, weight = normal(2, 5, 64).to(dtype), 100 * normal(2, 5, 64, seed=1).float(), normal(64, seed=2).float()
    y, total = add_rms_norm(x, residual, weight)
    assert (y.dtype, total.dtype) == (dtype, torch.float32)
    assert torch.equal(total, residual + x.float())
    exact = vim_float64.norm(residual.double() + x.double(), weight.double())
    assert (y.double() - exact).norm() <= 2 * torch.finfo(dtype).eps * exact.norm()
    assert add_rms_norm(x, None, weight)[1].dtype == torch.float32


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm_drops_whole_samples(kind: str) -> None:
    """A noise below the rate takes a sample's x away; the others make up for it, so that the mean stays."""
    x, residual, weight = normal(4, 5, 7).float(), normal(4, 5, 7, seed=1).float(), normal(7, seed=2).float()
    noise = torch.tensor([0.0, 0.24, 0.25, 0.99])
    norm = add_rms_norm if kind == "rms" else add_layer_norm
    leaves = [v.requires_grad_() for v in (x, residual, weight)]
    got = norm(x, residual, weight, noise=noise, drop_rate=0.25)
    want = norm(x * torch.tensor([0, 0, 4 / 3, 4 / 3])[:, None, None], residual, weight)
    for a, b in zip((*got, *gradients(got, leaves)), (*want, *gradients(want, leaves)), strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(norm(x, residual, weight, noise=noise, drop_rate=1.0)[1], residual)
    low = norm(x.bfloat16(), residual, weight, noise=noise, drop_rate=0.25)
    assert (low[0].dtype, low[1].dtype) == (torch.bfloat16, torch.float32)
