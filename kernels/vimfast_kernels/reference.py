"""The backend ``reference``: every op in plain torch, on any device. Every backend's ops have these signatures.

    scan(u, delta, A, B, C, D, z, delta_bias, reverse, scale) -> [b, L, d]
    conv(x, weight, bias, reverse) -> [k, b, L, d]
    norm(x, residual, weight, bias, noise, drop_rate, eps, rms) -> (y, new residual)
    block(...) -> (out, new residual), as :func:`vimfast_kernels.bidirectional_block`; ``backend`` is the requested one

k is the number of directions, 1 or 2; ``reverse`` has k entries, True for a direction that runs from the last position
to the first.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vimfast_kernels.backends import REFERENCE, Backend
from vimfast_kernels.block.reference import block
from vimfast_kernels.conv.reference import conv_silu
from vimfast_kernels.norm.reference import add_norm
from vimfast_kernels.scan import reference as scan_reference


def scan(
    u: Tensor,  # [k, b, L, d]
    delta: Tensor,  # [k, b, L, d]
    A: Tensor,  # [k, d, N]
    B: Tensor,  # [k, b, L, N]
    C: Tensor,  # [k, b, L, N]
    D: Tensor | None,  # [k, d]
    z: Tensor | None,  # [b, L, d]
    delta_bias: Tensor | None,  # [k, d]
    reverse: Sequence[bool],  # [k]
    scale: float,
) -> Tensor:  # [b, L, d]
    out: Tensor = scan_reference.scan(u, delta, A, B, C, D, z, delta_bias, reverse, scale)[0]
    return out


BACKEND = Backend(REFERENCE, ops={"scan": scan, "conv": conv_silu, "norm": add_norm, "block": block})
