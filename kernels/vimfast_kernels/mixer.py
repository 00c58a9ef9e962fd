"""The bidirectional mixer between its two outer projections: one op on a GPU, a composition of the others elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from vimfast_kernels.backends import resolve
from vimfast_kernels.conv import bidirectional_conv1d_silu
from vimfast_kernels.scan import bidirectional_scan


def bidirectional_mixer(
    xz: Tensor,  # [b, L, 2 d], x and the gate z
    conv_weight: Tensor,  # [2, d, W]
    conv_bias: Tensor | None,  # [2, d]
    x_weight: Tensor,  # [2, R + 2 N, d]
    dt_weight: Tensor,  # [2, d, R]
    dt_bias: Tensor,  # [2, d]
    A: Tensor,  # [2, d, N]
    D: Tensor,  # [2, d]
    *,
    scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:  # [b, L, d] in xz's dtype
    """scale * silu(z) * sum_k scan_k(u_k), with u_k = silu(conv_k(x)) and (dt, B, C)_k = split(x_weight_k u_k).

    delta_k = dt_weight_k dt_k. Direction 1 runs from the last position to the first, its convolution too.
    Differentiable in every tensor; a ValueError tells of shapes that do not fit. Source: Zhu et al., "Vision Mamba",
    2024, algorithm 1.
    """
    d, n = A.shape[1:]
    if resolve(backend, xz, n) == "gluon" and d % 16 == 0:
        from vimfast_kernels import mixer_gluon

        return mixer_gluon.bidirectional_mixer(
            xz, conv_weight, conv_bias, x_weight, dt_weight, dt_bias, A, D, scale=scale
        )
    x, z = xz.chunk(2, dim=-1)  # 2 x [b, L, d]
    u = bidirectional_conv1d_silu(x, conv_weight, conv_bias, backend=backend)  # [2, b, L, d]
    x_dbl = torch.einsum("kbld,krd->kblr", u, x_weight)  # [2, b, L, R + 2 N]
    dt, B, C = x_dbl.split([dt_weight.shape[2], n, n], dim=-1)
    delta = torch.einsum("kblr,kdr->kbld", dt, dt_weight)  # [2, b, L, d]
    return bidirectional_scan(u, delta, A, B, C, D, z, dt_bias, scale=scale, backend=backend)
