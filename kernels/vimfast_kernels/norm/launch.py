"""Residual addition and RMSNorm or LayerNorm in one pass, in Triton; the residual stream stays in fp32."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from vimfast_kernels.norm.device import norm_backward, norm_forward
from vimfast_kernels.sums import sum_rows
from vimfast_kernels.tuning import multiprocessors, tuning_of


class Norm(NamedTuple):
    """What a norm is given besides its rows."""

    weight: Tensor  # [c]
    bias: Tensor | None  # [c]
    noise: Tensor | None  # [b]
    drop_rate: float
    eps: float
    rms: bool


class Normalized(NamedTuple):
    """Rows without the norm's weight and bias, and the inverse of each one's deviation."""

    rows: Tensor  # [b, ..., c]
    rstd: Tensor  # [b ...], fp32


def meta(x: Tensor, norm: Norm) -> dict[str, Any]:
    """Sizes, shapes of programs and launch options for rows x [b, ..., c]."""
    c = x.shape[-1]
    columns = triton.next_power_of_2(c)
    entries, warps, _ = tuning_of(x.device).norm
    return {
        "rows": x.numel() // c, "length": x[0].numel() // c, "rate": norm.drop_rate,
        "kept": 1 / (1 - norm.drop_rate) if norm.drop_rate < 1 else 0.0, "eps": norm.eps, "C": c,
        "CENTER": not norm.rms,
        "ROWS": max(1, min(16, entries // columns)), "COLUMNS": columns, "num_warps": warps,
    }  # fmt: skip


def launch_forward(
    x: Tensor,  # [b, ..., c], as all the tensors contiguous
    residual: Tensor | None,  # as x
    norm: Norm,
    out: Tensor,  # as x, written
    total: Tensor,  # as x, written: keep * x + residual; may be the residual
) -> None:
    sizes = meta(x, norm)
    grid = (triton.cdiv(sizes["rows"], sizes["ROWS"]),)
    norm_forward[grid](x, residual, norm.noise, norm.weight, norm.bias, out, total, **sizes)


def launch_backward(
    dout: Tensor,  # [b, ..., c], as all the tensors contiguous
    dtotal: Tensor | None,
    of: Tensor | Normalized,  # forward's total, or that normalized
    norm: Norm,
    dx: Tensor,  # as dout, written
    dresidual: Tensor | None,  # as dout, written
) -> Tensor:
    """Gradients of weight and bias [rows, 2, c], to be summed over the rows; 0 for a bias that is None."""
    sizes = meta(dout, norm)
    most = tuning_of(dout.device).norm.programs * multiprocessors(dout.device)
    programs = min(most, triton.cdiv(sizes["rows"], sizes["ROWS"]))
    partial = dout.new_empty(programs, 2, sizes["C"], dtype=torch.float32)
    total, normed, rstd = (None, *of) if isinstance(of, Normalized) else (of, None, None)
    norm_backward[(programs,)](
        dout, dtotal, total, normed, rstd, norm.noise, norm.weight, norm.bias, dx, dresidual, partial, **sizes
    )
    return partial


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


@torch.library.custom_op("vimfast::add_norm_triton", mutates_args=())
def _norm(
    x: Tensor, residual: Tensor | None, noise: Tensor | None, weight: Tensor, bias: Tensor | None,
    drop_rate: float, eps: float, rms: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x = x.contiguous()
    out, total = torch.empty_like(x), torch.empty_like(x, dtype=torch.float32)
    norm = Norm(weight.contiguous(), contiguous(bias), contiguous(noise), drop_rate, eps, rms)
    launch_forward(x, contiguous(residual), norm, out, total)
    return out, total


@_norm.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.float32)


@torch.library.custom_op("vimfast::add_norm_triton_backward", mutates_args=())
def _norm_grad(
    dout: Tensor, dtotal: Tensor | None, total: Tensor, residual_dtype: torch.dtype | None, noise: Tensor | None,
    weight: Tensor, bias: Tensor | None, drop_rate: float, eps: float, rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of (x, residual, weight, bias); the residual's is empty where there is none."""
    dout = dout.contiguous()
    dx = torch.empty_like(dout)
    dresidual = None if residual_dtype is None else torch.empty_like(dout, dtype=residual_dtype)
    norm = Norm(weight.contiguous(), contiguous(bias), contiguous(noise), drop_rate, eps, rms)
    partial = launch_backward(dout, contiguous(dtotal), total, norm, dx, dresidual)
    dweight, dbias = sum_rows(partial).to(weight.dtype).unbind()
    return dx, dout.new_empty(0) if dresidual is None else dresidual, dweight.clone(), dbias.clone()


@_norm_grad.register_fake
def _(
    dout: Tensor, dtotal: Tensor | None, total: Tensor, residual_dtype: torch.dtype | None, noise: Tensor | None,
    weight: Tensor, *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dresidual = dout.new_empty(dout.shape if residual_dtype is not None else (0,), dtype=residual_dtype)
    return dout.new_empty(dout.shape), dresidual, weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, residual, noise, weight, bias, *ctx.options = inputs
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.save_for_backward(output[1], noise, weight, bias)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
    total, noise, weight, bias = ctx.saved_tensors
    if dout is None:
        raise RuntimeError("the norm's output has no gradient although its residual has; use the residual directly")
    dx, dresidual, dweight, dbias = _norm_grad(
        dout, dtotal, total, ctx.residual_dtype, noise, weight, bias, *ctx.options
    )
    dresidual = None if ctx.residual_dtype is None else dresidual
    return dx, dresidual, None, dweight, None if bias is None else dbias, None, None, None


_norm.register_autograd(_backward, setup_context=_setup_context)


def check(x: Tensor, residual: Tensor | None, noise: Tensor | None, weight: Tensor) -> None:
    """Raises ValueError for shapes that do not match."""
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight is {tuple(weight.shape)} for {x.shape[-1]} channels; they must agree")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual is {tuple(residual.shape)}, x is {tuple(x.shape)}; they must agree")
    if noise is not None and noise.shape != x.shape[:1]:
        raise ValueError(f"noise is {tuple(noise.shape)} for {x.shape[0]} samples; give one number for each")


def add_norm(
    x: Tensor,  # [b, ..., c]
    residual: Tensor | None,  # [b, ..., c]
    weight: Tensor,  # [c]
    bias: Tensor | None = None,  # [c]
    *,
    noise: Tensor | None = None,  # [b], uniform in [0, 1)
    drop_rate: float = 0.0,
    eps: float = 1e-5,
    rms: bool = True,
) -> tuple[Tensor, Tensor]:
    """sum = keep * x + residual;  out = (sum - mean) / sqrt(var + eps) * weight + bias, mean = 0 where ``rms``.

    keep is 1 without noise, else for each sample 0 where its noise is below ``drop_rate`` and 1 / (1 - drop_rate)
    where not: stochastic depth. Returns (out in x's dtype, sum in fp32). fp32 inside. Deterministic.
    """
    check(x, residual, noise, weight)
    out: tuple[Tensor, Tensor] = _norm(x, residual, noise, weight, bias, drop_rate, eps, rms)
    return out
