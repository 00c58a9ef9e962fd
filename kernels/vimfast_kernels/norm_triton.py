"""Residual addition and RMSNorm or LayerNorm in one pass, in Triton; the residual stream stays in fp32."""

# Device functions are written in Triton's own dialect: no annotations beyond constexpr.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vimfast_kernels.conv_triton import sum_rows


@triton.jit
def _statistics(v, mask, C: tl.constexpr, eps, CENTER: tl.constexpr):
    """(v - mean, 1 / deviation) of each row; without CENTER the mean is taken as 0."""
    if CENTER:
        v = tl.where(mask, v - tl.sum(v, 1)[:, None] / C, 0.0)
    return v, 1.0 / tl.sqrt(tl.sum(v * v, 1) / C + eps)


@triton.jit(do_not_specialize=["rows", "length"])
def _norm_forward(
    x_ptr, residual_ptr, keep_ptr, weight_ptr, bias_ptr, out_ptr, sum_ptr, rows, length, eps,
    C: tl.constexpr, CENTER: tl.constexpr, RESIDUAL: tl.constexpr, KEEP: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < C)[None, :]
    at = row.to(tl.int64)[:, None] * C + column[None, :]
    v = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if KEEP:
        v *= tl.load(keep_ptr + row // length, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    if RESIDUAL:
        v += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(sum_ptr + at, v.to(sum_ptr.dtype.element_ty), mask=mask)
    v, rstd = _statistics(v, mask, C, eps, CENTER)
    weight = tl.load(weight_ptr + column, mask=column < C, other=0.0).to(tl.float32)
    v = v * rstd[:, None] * weight[None, :]
    if BIAS:
        v += tl.load(bias_ptr + column, mask=column < C, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + at, v.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "length"])
def _norm_backward(
    dout_ptr, dsum_ptr, sum_ptr, keep_ptr, weight_ptr, dx_ptr, dresidual_ptr, partial_ptr, rows, length, eps,
    C: tl.constexpr, CENTER: tl.constexpr, RESIDUAL: tl.constexpr, DSUM: tl.constexpr, KEEP: tl.constexpr,
    BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # A program takes every num_programs-th block of rows and keeps its share of the weight's gradient.
    column = tl.arange(0, COLUMNS)
    weight = tl.load(weight_ptr + column, mask=column < C, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros((ROWS, COLUMNS), tl.float32)
    dbias = tl.zeros((ROWS, COLUMNS), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (column < C)[None, :]
        at = row.to(tl.int64)[:, None] * C + column[None, :]
        v = tl.load(sum_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + at, mask=mask, other=0.0).to(tl.float32)
        v, rstd = _statistics(v, mask, C, eps, CENTER)
        v *= rstd[:, None]
        dweight += dout * v
        if BIAS:
            dbias += dout
        g = dout * weight
        dv = g - v * (tl.sum(g * v, 1) / C)[:, None]
        if CENTER:
            dv -= (tl.sum(g, 1) / C)[:, None]
        dv *= rstd[:, None]
        if DSUM:
            dv += tl.load(dsum_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if RESIDUAL:
            tl.store(dresidual_ptr + at, dv.to(dresidual_ptr.dtype.element_ty), mask=mask)
        if KEEP:
            dv *= tl.load(keep_ptr + row // length, mask=row < rows, other=0.0).to(tl.float32)[:, None]
        tl.store(dx_ptr + at, dv.to(dx_ptr.dtype.element_ty), mask=mask)
    at = partial_ptr + tl.program_id(0) * (2 * C) + column
    tl.store(at, tl.sum(dweight, 0), mask=column < C)
    tl.store(at + C, tl.sum(dbias, 0), mask=column < C)


PROGRAMS = 528  # of the backward pass: each leaves one row of partial sums
BLOCK = 1024  # entries a program works on at a time


def _shape(x: Tensor) -> tuple[int, int, int, dict[str, int]]:
    """(rows, channels, rows of one sample, block sizes)."""
    c = x.shape[-1]
    columns = triton.next_power_of_2(c)
    return x.numel() // c, c, x[0].numel() // c, {"ROWS": max(1, min(16, BLOCK // columns)), "COLUMNS": columns}


@torch.library.custom_op("vimfast::add_norm_triton", mutates_args=())
def _norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, keep: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    rows, c, length, blocks = _shape(x)
    out = torch.empty_like(x)
    total = torch.empty_like(x, dtype=torch.float32)
    _norm_forward[(triton.cdiv(rows, blocks["ROWS"]),)](
        x, x if residual is None else residual.contiguous(), x if keep is None else keep.contiguous(), weight,
        weight if bias is None else bias, out, total, rows, length, eps,
        C=c, CENTER=not rms, RESIDUAL=residual is not None, KEEP=keep is not None, BIAS=bias is not None,
        num_warps=4, **blocks,
    )  # fmt: skip
    return out, total


@_norm.register_fake
def _(x, residual, weight, bias, keep, eps, rms):
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.float32)


@torch.library.custom_op("vimfast::add_norm_triton_backward", mutates_args=())
def _norm_grad(
    dout: Tensor, dsum: Tensor | None, total: Tensor, residual_dtype: torch.dtype | None, weight: Tensor,
    bias: Tensor | None, keep: Tensor | None, eps: float, rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of (x, residual, weight, bias); the residual's is empty where there is none."""
    dout = dout.contiguous()
    rows, c, length, blocks = _shape(dout)
    dx = torch.empty_like(dout)
    has_residual = residual_dtype is not None
    dresidual = dout.new_empty(dout.shape if has_residual else (0,), dtype=residual_dtype)
    programs = min(PROGRAMS, triton.cdiv(rows, blocks["ROWS"]))
    partial = total.new_empty(programs, 2, c)
    _norm_backward[(programs,)](
        dout, total if dsum is None else dsum.contiguous(), total, dout if keep is None else keep.contiguous(),
        weight, dx, dresidual, partial, rows, length, eps,
        C=c, CENTER=not rms, RESIDUAL=has_residual, DSUM=dsum is not None, KEEP=keep is not None,
        BIAS=bias is not None, num_warps=4, **blocks,
    )  # fmt: skip
    dweight, dbias = sum_rows(partial).to(weight.dtype).unbind()
    return dx, dresidual, dweight.clone(), dbias.clone()


@_norm_grad.register_fake
def _(dout, dsum, total, residual_dtype, weight, bias, keep, eps, rms):
    dresidual = dout.new_empty(dout.shape if residual_dtype is not None else (0,), dtype=residual_dtype)
    return dout.new_empty(dout.shape), dresidual, weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _setup_context(ctx, inputs, output):
    _, residual, weight, bias, keep, ctx.eps, ctx.rms = inputs
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.save_for_backward(output[1], weight, bias, keep)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dsum):
    total, weight, bias, keep = ctx.saved_tensors
    if dout is None:
        raise RuntimeError("the norm's output has no gradient although its residual has; use the residual directly")
    dx, dresidual, dweight, dbias = _norm_grad(
        dout, dsum, total, ctx.residual_dtype, weight, bias, keep, ctx.eps, ctx.rms
    )
    no_residual = ctx.residual_dtype is None
    return dx, None if no_residual else dresidual, dweight, None if bias is None else dbias, None, None, None


_norm.register_autograd(_backward, setup_context=_setup_context)


def add_norm(
    x: Tensor,  # [b, ..., c]
    residual: Tensor | None,  # [b, ..., c]
    weight: Tensor,  # [c]
    bias: Tensor | None = None,  # [c]
    *,
    keep: Tensor | None = None,  # [b], stochastic depth: 0 or 1 / (1 - rate) for each sample
    eps: float = 1e-5,
    rms: bool = True,
) -> tuple[Tensor, Tensor]:
    """sum = keep * x + residual;  out = (sum - mean) / sqrt(var + eps) * weight + bias, mean = 0 where ``rms``.

    Returns (out in x's dtype, sum in fp32). fp32 inside. Deterministic.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight is {tuple(weight.shape)} for {x.shape[-1]} channels; they must agree")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual is {tuple(residual.shape)}, x is {tuple(x.shape)}; they must agree")
    return _norm(x, residual, weight, bias, keep, eps, rms)
