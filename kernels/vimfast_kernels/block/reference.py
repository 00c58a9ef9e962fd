"""The bidirectional mixer and its block, composed of the other ops, each on the requested backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vimfast_kernels.arithmetic import wide
from vimfast_kernels.backends import AUTO
from vimfast_kernels.block.weights import MixerWeights
from vimfast_kernels.conv import bidirectional_conv1d_silu
from vimfast_kernels.norm import add_layer_norm, add_rms_norm
from vimfast_kernels.scan import bidirectional_scan


def block(
    x: Tensor,  # [b, L, C]
    residual: Tensor | None,  # [b, L, C]
    norm_weight: Tensor,  # [C]
    norm_bias: Tensor | None,  # [C]
    weights: MixerWeights,
    *,
    rms: bool,
    eps: float,
    noise: Tensor | None,  # [b]
    drop_rate: float,
    scale: float,
    overwrite: bool,  # no effect here
    backend: str,
) -> tuple[Tensor, Tensor]:
    """:func:`vimfast_kernels.bidirectional_block`."""
    if rms:
        x, residual = add_rms_norm(x, residual, norm_weight, eps=eps, noise=noise, drop_rate=drop_rate, backend=backend)
    else:
        x, residual = add_layer_norm(
            x, residual, norm_weight, norm_bias, eps=eps, noise=noise, drop_rate=drop_rate, backend=backend
        )
    return bidirectional_mixer(x, weights, scale=scale, backend=backend), residual


def bidirectional_mixer(
    x: Tensor,  # [b, L, C]
    weights: MixerWeights,
    *,
    scale: float = 1.0,
    backend: str = AUTO,
) -> Tensor:  # [b, L, C] in x's dtype, or autocast's
    """out_proj(scale * silu(z) * sum_k scan_k(u_k)), with x', z = split(in_proj(x)) and u_k = silu(conv_k(x')).

    (dt, B, C)_k = split(x_weight_k u_k) and delta_k = dt_weight_k dt_k. Direction 1, ``weights.back``, runs from the
    last position to the first, its convolution too. Differentiable in every tensor. Raises ValueError for shapes that
    do not match. Source: Zhu et al., "Vision Mamba", 2024, algorithm 1.
    """
    ways = weights.forth, weights.back
    n = weights.forth.A_log.shape[1]
    x, z = F.linear(x, weights.in_weight, weights.in_bias).chunk(2, dim=-1)  # 2 x [b, L, d]
    conv_weight = torch.stack([way.conv_weight for way in ways])  # [2, d, W]
    conv_bias = _stack(weights.forth.conv_bias, weights.back.conv_bias)  # [2, d]
    u = bidirectional_conv1d_silu(x, conv_weight, conv_bias, backend=backend)  # [2, b, L, d]
    x_weight = torch.stack([way.x_weight for way in ways])  # [2, R + 2 N, d]
    x_dbl = torch.einsum("kbld,krd->kblr", u, x_weight)  # [2, b, L, R + 2 N]
    dt, B, C = x_dbl.split([x_weight.shape[1] - 2 * n, n, n], dim=-1)
    dt_weight = torch.stack([way.dt_weight for way in ways])  # [2, d, R]
    delta = torch.einsum("kblr,kdr->kbld", dt, dt_weight)  # [2, b, L, d]
    A = -torch.exp(torch.stack([wide(way.A_log) for way in ways]))  # [2, d, N]
    D, dt_bias = torch.stack([way.D for way in ways]), torch.stack([way.dt_bias for way in ways])  # [2, d]
    y = bidirectional_scan(u, delta, A, B, C, D, z, dt_bias, scale=scale, backend=backend)  # [b, L, d]
    return F.linear(y, weights.out_weight, weights.out_bias)


def _stack(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else torch.stack([a, b])
