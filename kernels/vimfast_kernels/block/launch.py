"""A whole block of Vision Mamba as one op: residual addition, norm, projections, convolution, scan, gate. One node for
autograd, the compiler and DDP, which takes the parameters as they are and writes all their gradients in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from vimfast_kernels.block.device_steps import step_gradients
from vimfast_kernels.block.packing import (
    Packed,
    Pieces,
    empty_packed,
    pack_and_normalize_rows,
    padded,
    unpack,
    write_gradients,
)
from vimfast_kernels.block.weights import MixerWeights, flatten, unflatten
from vimfast_kernels.conv import launch as conv
from vimfast_kernels.flops import Shape, conv_flops, counted, scan_flops
from vimfast_kernels.norm import launch as norms
from vimfast_kernels.norm.launch import Norm, Normalized, contiguous
from vimfast_kernels.product.launch import multiply, sum_of_products
from vimfast_kernels.scan import launch as scan
from vimfast_kernels.tuning import multiprocessors

REVERSE = [False, True]
CHANNELS = 16  # d is a multiple of it
# Programs of step_gradients, for gradients of dt_weight of at most so many entries, which each sums in registers.
NARROW_STEPS = {"ROWS": 32, "CHANNELS": 64, "num_warps": 4, "num_stages": 3}
NARROW_ENTRIES = 384 * 16
WIDE_STEPS = {"ROWS": 16, "CHANNELS": 128, "num_warps": 8, "num_stages": 3}
WIDE_ENTRIES = 768 * 32
MOST_PARTIALS = 48  # 32-bit words of dB and dC that a thread of such a program loads at a time

_DIRECTION = (
    "Tensor conv_weight{0}, Tensor? conv_bias{0}, Tensor x_weight{0}, Tensor dt_weight{0}, Tensor dt_bias{0},"
    " Tensor A_log{0}, Tensor D{0}"
)
_WEIGHTS = (  # norm, then `flatten` of the mixer's
    "Tensor norm_weight, Tensor? norm_bias, Tensor in_weight, Tensor? in_bias, "
    f"{_DIRECTION.format('')}, {_DIRECTION.format('_b')}, Tensor out_weight, Tensor? out_bias"
)
_OPTIONS = "float drop_rate, float eps, bool rms, float scale"
NORMS = 2  # of the weights that the ops take: those of the norm come first


def _between(w: Packed, xz: Tensor) -> tuple[Tensor, Tensor]:
    """(u [2, b, L, d], x_dbl [2, b, L, P + 2 N])."""
    b, length, _ = xz.shape
    d = w.D.shape[1]
    u = conv.launch_forward(xz[..., :d], w.taps.mT, w.conv_bias, REVERSE)
    flat = multiply(u.view(2, b * length, d), w.x_weight.transpose(1, 2))
    return u, flat.view(2, b, length, -1)


def _project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight (+ bias) [b, L, N] of x [b, L, K], contiguous, and weight [K, N]."""
    return multiply(x.view(-1, x.shape[2]), weight, bias).view(*x.shape[:2], -1)


def _states(w: Packed, x_dbl: Tensor) -> tuple[Tensor, Tensor]:
    """B and C [2, b, L, N], views."""
    n = w.A.shape[2]
    return x_dbl[..., -2 * n : -n], x_dbl[..., -n:]


def _scan_inputs(w: Packed, u: Tensor, x_dbl: Tensor, z: Tensor, scale: float) -> scan.Inputs:
    low = x_dbl[..., : w.dt_weight.shape[2]]
    return scan.Inputs(u, low, w.A, *_states(w, x_dbl), w.D, z, w.dt_bias, REVERSE, scale, w.dt_weight)


def _in_bias(weights: MixerWeights, w: Packed, norm: Norm) -> Tensor | None:
    """Of in_proj's product with normalized rows [2 d]: its own, and what it makes of the norm's."""
    if norm.bias is None:
        return w.in_bias
    # As a sum: autocast, which is on within an op too, would round the factors and the result of a matrix product.
    total = (weights.in_weight.float() * norm.bias.float()).sum(1)
    return (total if weights.in_bias is None else total + weights.in_bias).to(w.in_weight.dtype)


def _normalize_and_project(
    x: Tensor, residual: Tensor | None, total: Tensor, weights: MixerWeights, norm: Norm, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Normalized, Packed, Tensor]:
    """(the packed weights' buffers, the normalized rows, the buffers' contents, xz [b, L, 2 d]); writes total."""
    narrow, wide, normed = pack_and_normalize_rows(weights, norm, x.contiguous(), contiguous(residual), total, dtype)
    w = unpack(weights, narrow, wide)
    return narrow, wide, normed, w, _project(normed.rows, w.in_scaled.t(), _in_bias(weights, w, norm))


@torch.library.custom_op(
    "vimfast::block_gluon",
    mutates_args=(),
    schema=f"(Tensor x, Tensor? residual, Tensor? noise, {_WEIGHTS}, {_OPTIONS}, ScalarType dtype) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _block(x: Tensor, residual: Tensor | None, noise: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    """(out, the new residual, and for backward: that normalized and the inverse of each row's deviation, the packed
    weights' buffers, xz, x_dbl, the sum before the gate, states)."""
    *flat, drop_rate, eps, rms, scale, dtype = rest
    weights, norm = unflatten(flat[NORMS:]), Norm(flat[0], flat[1], noise, drop_rate, eps, rms)
    total = x.new_empty(x.shape, dtype=torch.float32)
    narrow, wide, normed, w, xz = _normalize_and_project(x, residual, total, weights, norm, dtype)
    u, x_dbl = _between(w, xz)
    z = xz[..., w.D.shape[1] :]
    gated, y, states = scan.launch_forward(_scan_inputs(w, u, x_dbl, z, scale), save=True)
    out = _project(gated, w.out_weight.t(), w.out_bias)
    return out, total, *normed, narrow, wide, xz, x_dbl, y, states


@_block.register_fake
def _(x: Tensor, residual: Tensor | None, noise: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    *flat, _, _, _, _, dtype = rest
    weights = unflatten(flat[NORMS:])
    b, length, _ = x.shape
    d, n = weights.forth.A_log.shape
    xz = x.new_empty(b, length, 2 * d, dtype=dtype)
    x_dbl = xz.new_empty(2, b, length, padded(weights.forth.dt_weight.shape[1]) + 2 * n)
    saved = scan.empty_saved(xz, 2, b, length, d, n, save=True, gate=True)
    out, total = xz.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.float32)
    rows = xz.new_empty(x.shape), total.new_empty(b * length)
    return out, total, *rows, *empty_packed(weights, dtype), xz, x_dbl, *saved


@torch.library.custom_op(
    "vimfast::block_gluon_inference",
    mutates_args={"total"},
    schema=f"(Tensor x, Tensor? residual, Tensor(a!) total, Tensor? noise, {_WEIGHTS}, {_OPTIONS}, ScalarType dtype)"
    " -> Tensor",
)
def _block_inference(x: Tensor, residual: Tensor | None, total: Tensor, noise: Tensor | None, *rest: Any) -> Tensor:
    """out; the new residual goes into total, which may be the old one."""
    *flat, drop_rate, eps, rms, scale, dtype = rest
    weights, norm = unflatten(flat[NORMS:]), Norm(flat[0], flat[1], noise, drop_rate, eps, rms)
    w, xz = _normalize_and_project(x, residual, total, weights, norm, dtype)[-2:]  # the rows are freed
    u, x_dbl = _between(w, xz)
    x_half, z = xz.chunk(2, dim=-1)
    scan.launch_forward(_scan_inputs(w, u, x_dbl, z, scale), save=False, out=x_half)
    del u, x_dbl
    rows = xz.view(-1, xz.shape[2])[:, : x_half.shape[2]]  # a matrix with long rows: no copy
    return multiply(rows, w.out_weight.t(), w.out_bias).view(x.shape)


@_block_inference.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=rest[-1])


def _step_program(ddelta: Tensor, columns: int) -> dict[str, int] | None:
    """Shape and launch options of a program of step_gradients; None where products of cuBLAS are used instead."""
    entries = ddelta.shape[-1] * columns
    if ddelta.element_size() > 2 or entries > WIDE_ENTRIES:
        return None
    return NARROW_STEPS if entries <= NARROW_ENTRIES else WIDE_STEPS


def projection_gradients(
    ddelta: Tensor, weight: Tensor, x_dbl: Tensor, dstates: scan.StateGradients, dx_dbl: Tensor
) -> Tensor:
    """Writes dx_dbl [k, b, L, P + 2 N] and returns pieces [k, parts, d, P], fp32, whose sum is ddelta^T x_dbl[..., :P].

    dx_dbl's columns are ddelta weight, of ddelta [k, b, L, d] and weight [k, d, P], and the sum of dstates. x_dbl and
    dx_dbl are contiguous; ddelta is read once.
    """
    k, b, length, d = ddelta.shape
    rows, rank = b * length, weight.shape[2]
    partials, *_, states = dstates.sums.shape
    columns = max(16, triton.next_power_of_2(rank))
    program = _step_program(ddelta, columns)
    words = partials * states * dstates.sums.element_size() // 4
    if program is None or words * program["ROWS"] > MOST_PARTIALS * 32 * program["num_warps"]:
        partials = 0
        dB, dC = dx_dbl[..., rank:].chunk(2, dim=-1)
        scan.sum_partials(dstates, dB, dC)
    if program is None:
        ddelta = ddelta.view(k, rows, d)
        low, dlow = (x.view(k, rows, -1)[..., :rank] for x in (x_dbl, dx_dbl))
        multiply(ddelta, weight, out=dlow)
        return sum_of_products(ddelta, low)
    at_once = 8 // program["num_warps"]  # on a multiprocessor, of both directions
    parts = min(max(1, at_once * multiprocessors(ddelta.device) // k), triton.cdiv(rows, program["ROWS"]))
    pieces = torch.empty(k, parts, d, rank, device=ddelta.device)
    step_gradients[(parts, k)](
        ddelta, x_dbl, weight, *dstates, dx_dbl, pieces, rows,
        D=d, RANK=rank, COLUMNS=columns, STATES=states, PARTIALS=partials, **program,
    )  # fmt: skip
    return pieces


@torch.library.custom_op(
    "vimfast::block_gluon_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor? dtotal, Tensor? noise, Tensor normed, Tensor rstd, Tensor narrow, Tensor wide,"
    f" Tensor xz, Tensor x_dbl, Tensor y, Tensor states, {_WEIGHTS}, {_OPTIONS}, ScalarType x_dtype,"
    " ScalarType? residual_dtype, bool[] needed) -> Tensor[]",
)
def _block_grad(
    dout: Tensor, dtotal: Tensor | None, noise: Tensor | None, normed: Tensor, rstd: Tensor, narrow: Tensor,
    wide: Tensor, xz: Tensor, x_dbl: Tensor, y: Tensor, states: Tensor, *rest: Any,
) -> list[Tensor]:  # fmt: skip
    """Gradients of x, the residual and the weights, empty where none is needed."""
    *flat, drop_rate, eps, rms, scale, x_dtype, residual_dtype, needed = rest
    weights, norm = unflatten(flat[NORMS:]), Norm(flat[0], flat[1], noise, drop_rate, eps, rms)
    grads = _empty_gradients(normed, flat, x_dtype, residual_dtype, needed)
    dx = grads[0]
    dresidual, dnorm_weight, dnorm_bias, *own = (g if g.numel() else None for g in grads[1:])
    asked = unflatten(own)
    w = unpack(weights, narrow, wide)
    b, length, _ = xz.shape
    rows, d = b * length, w.D.shape[1]
    x, z = xz[..., :d], xz[..., d:]
    # Recomputing the convolution and the time steps costs less than keeping four [b, L, d] arrays per layer.
    u = conv.launch_forward(x, w.taps.mT, w.conv_bias, REVERSE)
    dxz, dx_dbl, gated = torch.empty_like(xz), torch.empty_like(x_dbl), torch.empty_like(y)
    dout = dout.contiguous()
    du, ddelta, dstates, dparameters = scan.launch_backward_programs(
        _project(dout, w.out_weight), _scan_inputs(w, u, x_dbl, z, scale), y, states, dxz[..., d:], out=gated
    )
    ddt_weight = projection_gradients(ddelta, w.dt_weight, x_dbl, dstates, dx_dbl)
    del ddelta, dstates
    dout = dout.view(1, rows, -1)
    dout_weight = None
    if asked.out_weight is not None:
        dout_weight = sum_of_products(dout, gated.view(1, rows, d))[0]
    del gated
    dx_weight = sum_of_products(dx_dbl.view(2, rows, -1), u.view(2, rows, d))
    dconv = conv.launch_backward_of_sum(du, dx_dbl, w.x_weight, x, w.conv_weight, w.conv_bias, REVERSE, dxz[..., :d])
    del u, du
    dnormed = _project(dxz, w.in_weight)
    din_weight = None
    if asked.in_weight is not None:  # right after a product that reads dxz too
        din_weight = sum_of_products(dxz.view(1, rows, 2 * d), normed.view(1, rows, -1))[0]
    dnorm = norms.launch_backward(dnormed, contiguous(dtotal), Normalized(normed, rstd), norm, dx, dresidual)
    din_bias = None
    if asked.in_bias is not None or (asked.in_weight is not None and norm.bias is not None):
        din_bias = dxz.sum((0, 1), dtype=torch.float32)
    pieces = Pieces(
        in_weight=din_weight,
        in_bias=din_bias,
        out_weight=dout_weight,
        out_bias=None if asked.out_bias is None else dout.sum((0, 1), dtype=torch.float32),
        x_weight=dx_weight,
        dt_weight=ddt_weight,
        conv=dconv,
        norm=dnorm,
        scan=dparameters,
        A=w.A,
    )
    write_gradients(pieces, weights, norm, asked, dnorm_weight, dnorm_bias)
    return grads


def _empty_gradients(
    normed: Tensor,
    flat: Sequence[Any],
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    needed: Sequence[bool],
) -> list[Tensor]:
    dx = normed.new_empty(normed.shape, dtype=x_dtype)
    dresidual = normed.new_empty((0,) if residual_dtype is None else normed.shape, dtype=residual_dtype)
    own = [v.new_empty(v.shape) if need else normed.new_empty(0) for v, need in zip(flat, needed, strict=True)]
    return [dx, dresidual, *own]


@_block_grad.register_fake
def _(dout: Tensor, dtotal: Tensor | None, noise: Tensor | None, normed: Tensor, *rest: Any) -> list[Tensor]:
    *flat, _, _, _, _, x_dtype, residual_dtype, needed = rest[7:]
    return _empty_gradients(normed, flat, x_dtype, residual_dtype, needed)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, noise, *rest = inputs
    *flat, drop_rate, eps, rms, scale, _ = rest
    residual_dtype = None if residual is None else residual.dtype
    ctx.options = drop_rate, eps, rms, scale, x.dtype, residual_dtype
    ctx.save_for_backward(noise, *output[2:], *flat)
    ctx.set_materialize_grads(False)  # otherwise zeros are written for outputs that are only saved


def _backward(ctx: Any, dout: Tensor | None, dtotal: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    noise, normed, *saved = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(normed)
    needed = list(ctx.needs_input_grad[3:-5])
    grads = _block_grad(dout, dtotal, noise, normed, *saved, *ctx.options, needed)
    dx, dresidual, *others = (g if g.numel() else None for g in grads)
    return dx, dresidual, None, *others, None, None, None, None, None


_block.register_autograd(_backward, setup_context=_setup_context)


def _flops(x: Shape, *flat: Any) -> int:
    """x [b, L, C] and the weights of norm and mixer: four products, the convolutions and the scans."""
    weights = unflatten(flat[NORMS : NORMS + 18])
    b, length, width = x
    d, states = weights.forth.A_log
    rank = weights.forth.dt_weight[1]
    products = width * 2 * d + 2 * d * (rank + 2 * states) + 2 * rank * d + d * width
    convolutions = conv_flops((b, length, d), (2, *weights.forth.conv_weight))
    return int(2 * b * length * products) + convolutions + scan_flops((2, b, length, d), (), (2, d, states))


counted(torch.ops.vimfast.block_gluon, lambda x, residual, noise, *flat: _flops(x, *flat))
counted(torch.ops.vimfast.block_gluon_inference, lambda x, residual, total, noise, *flat: _flops(x, *flat))
# Ten more tensors come before the weights.
counted(torch.ops.vimfast.block_gluon_backward, lambda dout, *rest: _flops(dout, *rest[10:]), times=2)


def bidirectional_block(
    x: Tensor,  # [b, L, C]
    residual: Tensor | None,  # [b, L, C]
    norm_weight: Tensor,  # [C]
    norm_bias: Tensor | None,  # [C]
    weights: MixerWeights,
    *,
    dtype: torch.dtype,
    noise: Tensor | None = None,  # [b]
    drop_rate: float = 0.0,
    eps: float = 1e-5,
    rms: bool = True,
    scale: float = 1.0,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """`vimfast_kernels.bidirectional_block`, its products in ``dtype``, which is that of the output.

    Saved for backward, besides the inputs: the normalized x, xz, x_dbl, the sum before the gate, every 8th state; the
    convolution, the time steps and the gated sum are recomputed. Raises ValueError for a d that is
    not a multiple of 16, and where `scan.selective_scan` and `norm.add_norm` do.
    """
    norms.check(x, residual, noise, norm_weight)
    d, n = weights.forth.A_log.shape
    scan.check(dtype, n, x.shape[1])
    if d % CHANNELS or tuple(weights.in_weight.shape) != (2 * d, x.shape[2]):
        raise ValueError(
            f"in_weight is {tuple(weights.in_weight.shape)} for {x.shape[2]} channels and A_log of {d}; take twice a"
            f" multiple of {CHANNELS} rows and its half"
        )
    flat = [None if v is None else v.contiguous() for v in (norm_weight, norm_bias, *flatten(weights))]
    noise = None if noise is None else noise.contiguous()
    options = drop_rate, eps, rms, scale, dtype
    if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in (x, residual, *flat)):
        out, total, *_ = _block(x, residual, noise, *flat, *options)
        return out, total
    stream = x if residual is None else residual
    if not (overwrite and stream.dtype == torch.float32 and stream.is_contiguous()):
        stream = x.new_empty(x.shape, dtype=torch.float32)
    return _block_inference(x, residual, stream, noise, *flat, *options), stream
