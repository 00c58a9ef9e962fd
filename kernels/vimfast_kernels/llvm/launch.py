"""Tensors to the arguments of kernels, which read and write fp32. Any float dtype and any strides come in."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vimfast_kernels.block.weights import MixerWeights
from vimfast_kernels.llvm.kernels import Conv, Norm, Scan
from vimfast_kernels.llvm.machine import run

BOTH = (False, True)


def norm(
    x: Tensor,  # [..., c]
    residual: Tensor | None,  # [..., c]
    weight: Tensor,  # [c]
    bias: Tensor | None,  # [c]
    eps: float,
    rms: bool,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:  # 2 x [..., c], fp32
    """(norm(r), r) with r = residual + x, in the residual's memory if that may be overwritten."""
    _check("norm", {"weight": (weight, x.shape[-1:]), "bias": (bias, x.shape[-1:]), "residual": (residual, x.shape)})
    x, weight = _packed(x), _packed(weight)
    own = None if residual is None else _packed(residual)
    bias = None if bias is None else _packed(bias)
    total = own if overwrite and own is not None else torch.empty_like(x)
    out = torch.empty_like(x)
    channels = x.shape[-1]
    run(
        Norm(rms, own is not None, bias is not None),
        channels,
        (x.numel() // channels, channels, x.data_ptr(), _at(own), weight.data_ptr(), _at(bias),
         _numbers(eps, 1 / channels).data_ptr(), total.data_ptr(), out.data_ptr()),
    )  # fmt: skip
    return out, total


def conv(
    x: Tensor,  # [b, L, d]
    weights: Sequence[Tensor],  # [d, W] for each direction
    biases: Sequence[Tensor | None],  # [d]
    reverse: tuple[bool, ...],
) -> Tensor:  # [k, b, L, d], fp32
    """:func:`vimfast_kernels.bidirectional_conv1d_silu`, in one direction or in two."""
    x, filters, offsets = _rows(x), [_packed(w) for w in weights], [None if b is None else _packed(b) for b in biases]
    batch, length, channels = x.shape
    out = x.new_empty(len(reverse), batch, length, channels)
    arguments = [batch, length, channels, x.data_ptr(), *x.stride()[:2], out.data_ptr()]
    for pair in zip(filters, offsets, strict=True):
        arguments += map(_at, pair)
    run(Conv(reverse, weights[0].shape[1], biases[0] is not None), channels, arguments)
    return out


def scan(
    u: Tensor,  # [k, b, L, d]
    delta: Tensor,  # [k, b, L, d]
    A: Tensor,  # [k, d, N]
    B: Tensor,  # [k, b, L, N]
    C: Tensor,  # [k, b, L, N]
    D: Tensor | None,  # [k, d]
    z: Tensor | None,  # [b, L, d]
    delta_bias: Tensor | None,  # [k, d]
    reverse: tuple[bool, ...],
    scale: float,
) -> Tensor:  # [b, L, d], fp32
    """:func:`vimfast_kernels.bidirectional_scan`, in one direction or in two."""
    u, delta, B, C, A = _rows(u), _rows(delta), _rows(B), _rows(C), _packed(A)
    if B.stride() != C.stride():
        B, C = B.contiguous(), C.contiguous()
    z = None if z is None else _rows(z)
    D, bias = (None if x is None else _packed(x) for x in (D, delta_bias))
    _, batch, length, channels = u.shape
    out = u.new_empty(batch, length, channels)
    arguments = [
        batch, length, channels, *u.stride()[1:3], *delta.stride()[1:3], *B.stride()[1:3], *_gate(z),
        _numbers(scale).data_ptr(), out.data_ptr(),
    ]  # fmt: skip
    for k in range(len(reverse)):
        arguments += (_at(None if x is None else x[k]) for x in (u, delta, None, A, B, C, D, bias))
    kernel = Scan(reverse, A.shape[2], 0, False, D is not None, bias is not None, z is not None)
    run(kernel, channels, arguments)
    return out


def mixer(x: Tensor, weights: MixerWeights, scale: float) -> Tensor:
    """:func:`vimfast_kernels.bidirectional_mixer`: [b, L, C] -> [b, L, C] in x's dtype or autocast's.

    The products of the time steps are made in the scan, so that they never reach memory.
    """
    ways = weights.forth, weights.back
    channels, states = weights.forth.A_log.shape
    rank, taps = weights.forth.dt_weight.shape[1], weights.forth.conv_weight.shape[1]
    _check("mixer", {"in_weight": (weights.in_weight, (2 * channels, x.shape[-1]))})
    for way in ways:
        own = (channels,)
        shapes = (channels, taps), own, (rank + 2 * states, channels), (channels, rank), own, (channels, states), own
        _check("mixer", dict(zip(way._fields, zip(way, shapes, strict=True), strict=True)))
    xz = F.linear(x, weights.in_weight, weights.in_bias)
    z = _rows(xz[..., channels:])
    u = conv(xz[..., :channels], [way.conv_weight for way in ways], [way.conv_bias for way in ways], BOTH)
    # [b, L, R + 2 N] of both: time steps, B, C
    projected = [_packed(F.linear(u[k].to(xz.dtype), way.x_weight)) for k, way in enumerate(ways)]
    packed = [[_packed(w) for w in (way.dt_weight, way.A_log, way.D, way.dt_bias)] for way in ways]
    y = torch.empty_like(u[0])
    steps = projected[0].stride()[:2]
    arguments = [*u.shape[1:], *u.stride()[1:3], *steps, *steps, *_gate(z), _numbers(scale).data_ptr(), y.data_ptr()]
    for k, (dt_weight, A_log, D, dt_bias) in enumerate(packed):
        at = projected[k].data_ptr()
        arguments += (
            u[k].data_ptr(), at, dt_weight.data_ptr(), A_log.data_ptr(), at + 4 * rank, at + 4 * (rank + states),
            D.data_ptr(), dt_bias.data_ptr(),
        )  # fmt: skip
    run(Scan(BOTH, states, rank, log=True, skip=True, bias=True, gate=True), channels, arguments)
    return F.linear(y.to(xz.dtype), weights.out_weight, weights.out_bias)


def _check(op: str, expected: Mapping[str, tuple[Tensor | None, Sequence[int]]]) -> None:
    """ValueError for the first tensor of another shape, outside of which a kernel would read."""
    for name, (x, shape) in expected.items():
        if x is not None and tuple(x.shape) != tuple(shape):
            raise ValueError(f"{op}: {name} is {tuple(x.shape)}, and the other tensors imply {tuple(shape)}")


def _packed(x: Tensor) -> Tensor:
    return x.float().contiguous()


def _rows(x: Tensor) -> Tensor:
    """fp32, and entries of the last dimension next to each other."""
    x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def _at(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _gate(z: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if z is None else (z.data_ptr(), z.stride(0), z.stride(1))


@functools.cache
def _numbers(*values: float) -> Tensor:
    """Floats for a kernel, whose arguments are integers and addresses."""
    return torch.tensor(values, dtype=torch.float32, device="cpu")
