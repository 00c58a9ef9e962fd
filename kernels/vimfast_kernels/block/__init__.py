"""The bidirectional mixer, alone and in its block: fused if the backend can, else composed of the other ops."""

from __future__ import annotations

from torch import Tensor

from vimfast_kernels.arithmetic import autocast_dtype
from vimfast_kernels.backends import AUTO, dispatch
from vimfast_kernels.block.reference import bidirectional_mixer
from vimfast_kernels.block.weights import Direction, MixerWeights

__all__ = ["Direction", "MixerWeights", "bidirectional_block", "bidirectional_mixer"]


def bidirectional_block(
    x: Tensor,  # [b, L, C]
    residual: Tensor | None,  # [b, L, C]; None as zeros
    norm_weight: Tensor,  # [C]
    norm_bias: Tensor | None,  # [C]; None for RMSNorm's
    weights: MixerWeights,
    *,
    rms: bool = True,
    eps: float = 1e-5,
    noise: Tensor | None = None,  # [b], uniform in [0, 1), for stochastic depth
    drop_rate: float = 0.0,
    scale: float = 1.0,
    overwrite: bool = False,
    backend: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """r = residual + keep x; (bidirectional_mixer(norm(r)), r), the norm an RMSNorm or, if not ``rms``, a LayerNorm.

    keep is as in :func:`add_rms_norm`. The first is in x's dtype or autocast's, r in fp32 (float64 for float64).
    ``overwrite`` lets r take the residual's memory, or x's where there is none, if no gradient is needed.
    Differentiable in every tensor but the noise. Raises ValueError as :func:`bidirectional_mixer` does.
    """
    run = dispatch("block", backend, x.device, autocast_dtype(x), weights.forth.A_log.shape[1])
    out: tuple[Tensor, Tensor] = run(
        x, residual, norm_weight, norm_bias, weights, rms=rms, eps=eps, noise=noise, drop_rate=drop_rate, scale=scale,
        overwrite=overwrite, backend=backend,
    )  # fmt: skip
    return out
