"""The selective scan of Mamba, in one direction or in both at once."""

from __future__ import annotations

from torch import Tensor

from vimfast_kernels.backends import AUTO, dispatch


def selective_scan(
    u: Tensor,  # [b, L, d]
    delta: Tensor,  # [b, L, d]
    A: Tensor,  # [d, N]
    B: Tensor,  # [b, L, N]
    C: Tensor,  # [b, L, N]
    D: Tensor | None = None,  # [d]
    z: Tensor | None = None,  # [b, L, d]
    delta_bias: Tensor | None = None,  # [d]
    *,
    reverse: bool = False,
    backend: str = AUTO,
) -> Tensor:  # [b, L, d] in u's dtype
    """h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t; y_t = (C_t . h_t + D u_t) silu(z_t); dt = softplus(delta + delta_bias).

    State and arithmetic are fp32 whatever the dtypes (float64 for a float64 u, on the reference). ``reverse`` scans
    from the last position to the first. Differentiable in every tensor. Raises ValueError for shapes that do not
    match and for a backend that cannot run here (see :mod:`vimfast_kernels.backends`).
    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, section 3.
    """
    stacked = u[None], delta[None], A[None], B[None], C[None], _stack(D), z, _stack(delta_bias)
    _check(*stacked, 1)
    out: Tensor = dispatch("scan", backend, u.device, u.dtype, A.shape[1])(*stacked, [reverse], 1.0)
    return out


def bidirectional_scan(
    u: Tensor,  # [2, b, L, d], forward and backward direction; an expanded view if they share it, as in all below
    delta: Tensor,  # [2, b, L, d]
    A: Tensor,  # [2, d, N]
    B: Tensor,  # [2, b, L, N]
    C: Tensor,  # [2, b, L, N]
    D: Tensor | None = None,  # [2, d]
    z: Tensor | None = None,  # [b, L, d], shared
    delta_bias: Tensor | None = None,  # [2, d]
    *,
    scale: float = 1.0,
    backend: str = AUTO,
) -> Tensor:  # [b, L, d] in u's dtype
    """scale * silu(z) * (scan of u[0] + reversed scan of u[1]): :func:`selective_scan` in both directions, one gate.

    The second direction runs from the last position to the first; nothing is flipped in memory.
    """
    _check(u, delta, A, B, C, D, z, delta_bias, 2)
    run = dispatch("scan", backend, u.device, u.dtype, A.shape[2])
    out: Tensor = run(u, delta, A, B, C, D, z, delta_bias, [False, True], scale)
    return out


def _stack(x: Tensor | None) -> Tensor | None:
    return None if x is None else x[None]


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    ways: int,
) -> None:
    """Raises ValueError for the first tensor whose shape does not match u and A."""
    if u.dim() != 4 or A.dim() != 3 or u.shape[0] != ways or not u.is_floating_point():
        lead = "[2, " if ways == 2 else "["
        raise ValueError(
            f"selective scan: expected a float u {lead}batch, length, channels] and A {lead}channels, states], got"
            f" u {u.dtype} {tuple(u.shape[2 - ways :])} and A {tuple(A.shape[2 - ways :])}"
        )
    _, b, length, d = u.shape
    n = A.shape[2]
    expected = {
        "delta": (delta, (ways, b, length, d)),
        "A": (A, (ways, d, n)),
        "B": (B, (ways, b, length, n)),
        "C": (C, (ways, b, length, n)),
        "D": (D, (ways, d)),
        "z": (z, (b, length, d)),
        "delta_bias": (delta_bias, (ways, d)),
    }
    for name, (x, shape) in expected.items():
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"selective scan: {name} is {tuple(x.shape)}, but u and A imply {shape}")
