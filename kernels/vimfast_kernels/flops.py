"""What torch's FlopCounterMode counts for our ops: the operations of their definitions, a multiply-add as two.

The same on every backend: what one recomputes or pads is not counted, and backward counts twice forward, as torch has
it for products. Norms and activations are not counted, as torch counts none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.flop_counter import register_flop_formula

Shape = Sequence[int]


def counted(op: Any, formula: Callable[..., int], skip: int = 0, times: int = 1) -> None:
    """Have `op` (``torch.ops.vimfast...``) counted by a formula of its arguments, tensors as their shapes.

    Args:
        skip: arguments before those that the formula takes.
        times: 1 for a forward pass, 2 for a backward pass.
    """

    def count(*given: Any, out_shape: Any = None, **_: Any) -> int:
        return times * formula(*given[skip:])

    register_flop_formula(op)(count)


def scan_flops(u: Shape, delta: Shape, A: Shape, *_: Any) -> int:
    """u [k, b, L, d], A [k, d, N]: for a state dt A, its exponential, (dt u) B, h = a h + x and y += C h; then dt u and
    y += D u.
    """
    k, b, length, d = u
    return k * b * length * d * (7 * A[2] + 3)


def conv_flops(x: Shape, weight: Shape, *_: Any) -> int:
    """x [b, L, d], weight [k, d, W]."""
    b, length, d = x
    return 2 * weight[0] * b * length * d * weight[2]
