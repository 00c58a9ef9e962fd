"""All of the bidirectional mixer between its two outer projections as one op: convolution, x and time-step
projections, scan, gate. One node for autograd, the compiler and DDP, one gradient buffer, no copies in between."""

# mypy: allow-untyped-defs
from __future__ import annotations

import math

import torch
from torch import Tensor

from vimfast_kernels import conv_triton, scan_gluon

REVERSE = [False, True]


def _padded_weights(x_weight: Tensor, dt_weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x_weight [2, P + 2N, d], dt_weight [2, d, P]) with the rank R filled up by zeros to P, a multiple of 8.

    Rows of x_dbl then start on 16 bytes; at R = 12 the matrix products are several times faster for it.
    """
    rank = dt_weight.shape[2]
    padded = x_weight.new_zeros(2, x_weight.shape[1] + -rank % 8, x_weight.shape[2], dtype=dtype)
    padded[:, :rank] = x_weight[:, :rank]
    padded[:, rank + -rank % 8 :] = x_weight[:, rank:]
    return padded, torch.nn.functional.pad(dt_weight.to(dtype), (0, -rank % 8))


def _sum_of_products(a: Tensor, b: Tensor, parts: int) -> Tensor:
    """a^T b [k, p, q] of a [k, m, p] and b [k, m, q], in `parts` products over m that fill the GPU, then summed."""
    k, m, p = a.shape
    q = b.shape[2]
    pieces = torch.matmul(a.view(k, parts, m // parts, p).transpose(2, 3), b.view(k, parts, m // parts, q))
    return pieces.sum(1, dtype=torch.float32)


@torch.library.custom_op("vimfast::mixer_gluon", mutates_args=(), device_types="cuda")
def _mixer(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    scale: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out [b, L, d], and for backward: the padded weights, x_dbl, the sum before the gate, states; the last two
    empty unless save)."""
    b, length, _ = xz.shape
    d, n = A.shape[1:]
    x, z = xz[..., :d], xz[..., d:]
    u = conv_triton.launch_forward(x, conv_weight, conv_bias, REVERSE)
    x_wide, dt_wide = _padded_weights(x_weight, dt_weight, xz.dtype)
    flat = torch.bmm(u.view(2, b * length, d), x_wide.transpose(1, 2))
    delta = torch.bmm(flat[..., : dt_wide.shape[2]], dt_wide.transpose(1, 2)).view_as(u)
    x_dbl = flat.view(2, b, length, -1)
    B, C = x_dbl[..., -2 * n : -n], x_dbl[..., -n:]
    out, y, states = scan_gluon.launch_forward(u, delta, A, B, C, D, z, dt_bias, REVERSE, scale, save)
    return out, x_wide, dt_wide, x_dbl, y, states


@_mixer.register_fake
def _(xz, conv_weight, conv_bias, x_weight, dt_weight, dt_bias, A, D, scale, save):
    b, length, _ = xz.shape
    d, n = A.shape[1:]
    y, states = scan_gluon.empty_saved(xz, 2, b, length, d, n, save, gate=True)
    pad = -dt_weight.shape[2] % 8
    x_wide = xz.new_empty(2, x_weight.shape[1] + pad, d)
    dt_wide = xz.new_empty(2, d, dt_weight.shape[2] + pad)
    return xz.new_empty(b, length, d), x_wide, dt_wide, xz.new_empty(2, b, length, x_wide.shape[1]), y, states


@torch.library.custom_op("vimfast::mixer_gluon_backward", mutates_args=(), device_types="cuda")
def _mixer_grad(
    dout: Tensor,
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    x_wide: Tensor,
    dt_wide: Tensor,
    x_dbl: Tensor,
    y: Tensor,
    states: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (xz, conv_weight, conv_bias, x_weight, dt_weight, dt_bias, A, D)."""
    b, length, _ = xz.shape
    d, n = A.shape[1:]
    rank, pad, rows = dt_weight.shape[2], dt_wide.shape[2], b * length
    x, z = xz[..., :d], xz[..., d:]
    # Two products and a convolution again cost less than keeping 4 [b, L, d] arrays a layer.
    u = conv_triton.launch_forward(x, conv_weight, conv_bias, REVERSE)
    flat = x_dbl.view(2, rows, -1)
    delta = torch.bmm(flat[..., :pad], dt_wide.transpose(1, 2)).view_as(u)
    dxz, dx_dbl = torch.empty_like(xz), torch.empty_like(x_dbl)
    du, ddelta, dA, dD, ddt_bias = scan_gluon.launch_backward(
        scan_gluon.copyable(dout), u, delta, A, x_dbl[..., -2 * n : -n], x_dbl[..., -n:], D, z, dt_bias, y, states,
        REVERSE, scale, dx_dbl[..., -2 * n : -n], dx_dbl[..., -n:], dxz[..., d:],
    )  # fmt: skip
    ddelta, du, dflat = ddelta.view(2, rows, d), du.view(2, rows, d), dx_dbl.view(2, rows, -1)
    torch.bmm(ddelta, dt_wide, out=dflat[..., :pad])
    parts = math.gcd(b, 16)
    ddt_weight = _sum_of_products(ddelta, flat[..., :pad], parts)[..., :rank]
    dx_weight = _sum_of_products(dflat, u.view(2, rows, d), parts)
    dx_weight = torch.cat((dx_weight[:, :rank], dx_weight[:, pad:]), 1)
    torch.baddbmm(du, dflat, x_wide, out=du)
    dconv, dconv_bias = conv_triton.launch_backward(du.view_as(u), x, conv_weight, conv_bias, REVERSE, dxz[..., :d])
    return (
        dxz, _as(conv_weight, dconv), _as(conv_weight, dconv_bias), dx_weight.to(x_weight.dtype),
        _as(dt_weight, ddt_weight), ddt_bias, dA, dD,
    )  # fmt: skip


def _as(weight: Tensor, grad: Tensor) -> Tensor:
    """A contiguous gradient of the weight's dtype, shared with no other."""
    return grad.to(weight.dtype, copy=True, memory_format=torch.contiguous_format)


@_mixer_grad.register_fake
def _(dout, xz, conv_weight, conv_bias, x_weight, dt_weight, dt_bias, A, D, *_):
    like = (xz, conv_weight, D, x_weight, dt_weight, dt_bias, A, D)
    out = [v.new_empty(v.shape) for v in like]
    out[2] = conv_weight.new_empty(D.shape)
    return tuple(out)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)  # else zeros are written for what is only kept


def _backward(ctx, dout, *_):
    if dout is None:
        return (None,) * 10
    saved = ctx.saved_tensors
    grads = list(_mixer_grad(dout, *saved, ctx.scale))
    if saved[2] is None:
        grads[2] = None
    return (*grads, None, None)


_mixer.register_autograd(_backward, setup_context=_setup_context)


def bidirectional_mixer(
    xz: Tensor,  # [b, L, 2d], the input projection's result
    conv_weight: Tensor,  # [2, d, w]
    conv_bias: Tensor | None,  # [2, d]
    x_weight: Tensor,  # [2, R + 2N, d]
    dt_weight: Tensor,  # [2, d, R]
    dt_bias: Tensor,  # [2, d]
    A: Tensor,  # [2, d, N]
    D: Tensor,  # [2, d]
    *,
    scale: float = 1.0,
) -> Tensor:
    """scale * silu(z) * sum_k scan_k(u_k), u_k = silu(conv_k(x)), (dt, B, C)_k = split(u_k x_weight_k^T)  [b, L, d]

    with dt_k = softplus(dt dt_weight_k^T + dt_bias_k); direction 1 runs from the last time to the first, its
    convolution too. Kept for backward, beside the inputs: x_dbl, the sum before the gate, every 8th state.
    Weights of any dtype; the products run in xz's. Raises ValueError where `scan_gluon.selective_scan` would, and
    for a d that is no multiple of 16.
    """
    d, n = A.shape[1:]
    scan_gluon.check(xz.dtype, n, xz.shape[1])
    if d % 16 or xz.shape[2] != 2 * d:
        raise ValueError(f"xz has {xz.shape[2]} channels and A {d}; take twice a multiple of 16 and its half")
    if not xz.is_contiguous():
        xz = xz.contiguous()
    tensors = (xz, conv_weight.contiguous(), conv_bias, x_weight, dt_weight, dt_bias.float(), A.float(), D.float())
    save = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors)
    return _mixer(*tensors, scale, save)[0]
