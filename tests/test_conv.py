"""Causal convolution + SiLU against float64: output and every gradient."""

from __future__ import annotations

import pytest
import torch
import vim_float64
from numerics import gradients, normal
from torch import Tensor

from vimfast_kernels import bidirectional_conv1d_silu, causal_conv1d_silu
from vimfast_kernels.conv import reference


def step_by_step(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    return vim_float64.conv_silu(x.flip(1), weight, bias).flip(1) if reverse else vim_float64.conv_silu(x, weight, bias)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(
    ("batch", "length", "channels", "taps"), [(1, 1, 3, 4), (2, 3, 5, 4), (1, 17, 1, 2), (3, 63, 7, 4), (2, 5, 3, 1)]
)
def test_convolution(batch: int, length: int, channels: int, taps: int, with_bias: bool, reverse: bool) -> None:
    leaves = [normal(batch, length, channels), normal(channels, taps, seed=1), normal(channels, seed=2)]
    leaves = [x.requires_grad_() for x in leaves[: 2 + with_bias]]
    got = causal_conv1d_silu(*leaves, reverse=reverse)
    want = step_by_step(*leaves, *(() if with_bias else (None,)), reverse)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(got, leaves), gradients(want, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("poison")
def test_convolution_in_both_directions_of_a_slice() -> None:
    """One x, half of a wider projection, read by two filters."""
    leaves = [normal(2, 17, 10), normal(2, 5, 4, seed=1), normal(2, 5, seed=2)]
    wide, weight, bias = (x.requires_grad_() for x in leaves)
    got = bidirectional_conv1d_silu(wide[..., 5:], weight, bias)
    want = torch.stack([step_by_step(wide[..., 5:], weight[k], bias[k], k == 1) for k in (0, 1)])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(got, leaves), gradients(want, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-3), (torch.float16, 4e-4)])
def test_convolution_is_fp32_inside(dtype: torch.dtype, tolerance: float) -> None:
    """The rounding of the output and of x's gradient is all that a narrow dtype costs."""
    x, weight, bias = normal(2, 63, 5).to(dtype), normal(2, 5, 4, seed=1).float(), normal(2, 5, seed=2).float()
    low = [v.requires_grad_() for v in (x, weight, bias)]
    exact = [v.detach().double().requires_grad_() for v in low]
    got, want = bidirectional_conv1d_silu(*low), bidirectional_conv1d_silu(*exact)
    assert got.dtype == dtype
    pairs = [(got, want), *zip(gradients(got, low), gradients(want, exact), strict=True)]
    for (a, b), like in zip(pairs, [got, *low], strict=True):
        assert a.dtype == like.dtype
        assert (a.double() - b).norm() <= tolerance * b.norm()


def test_convolution_under_the_compiler() -> None:
    leaves = [v.float().requires_grad_() for v in (normal(2, 9, 3), normal(2, 3, 4, seed=1), normal(2, 3, seed=2))]
    compiled = torch.compile(bidirectional_conv1d_silu, fullgraph=True, backend="aot_eager")
    got, want = compiled(*leaves), bidirectional_conv1d_silu(*leaves)
    assert torch.equal(got, want)
    assert all(map(torch.equal, gradients(got, leaves), gradients(want, leaves)))
    torch.library.opcheck(reference.conv_silu, (*leaves, [False, True]))
    torch.library.opcheck(reference.conv_silu, (*leaves[:2], None, [False, True]))


def test_convolution_names_wrong_shapes() -> None:
    with pytest.raises(ValueError, match=r"weight \(4, 3\); expected"):
        causal_conv1d_silu(torch.zeros(2, 9, 3), torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"bias is \(1, 4\), expected \(1, 3\)"):
        causal_conv1d_silu(torch.zeros(2, 9, 3), torch.zeros(3, 4), torch.zeros(4))
