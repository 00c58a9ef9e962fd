"""The backend ``portable``: every op in torch's own operators, for programs that run without this package.

torch.export, ONNX and TorchScript record the operators that they meet. A kernel or a custom op would tie the recorded
program to this package, and a loop over the sequence would be recorded step by step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, library

from vimfast_kernels.arithmetic import wide
from vimfast_kernels.backends import PORTABLE, Backend
from vimfast_kernels.block.reference import block
from vimfast_kernels.norm.reference import add_norm, drop_path

CHUNK = 8  # steps that are recorded one by one

_as_one_op: ContextVar[bool] = ContextVar("as_one_op", default=False)


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
    dtype, (channels, states) = u.dtype, A.shape[1:]
    u, delta, A, B, C = (wide(x) for x in (u, delta, A, B, C))
    dt = F.softplus(delta if delta_bias is None else delta + wide(delta_bias)[:, None, None])
    moved = _in_order(torch.cat([dt, dt * u, B, C], dim=3), reverse).permute(2, 0, 1, 3)  # [L, k, b, 2 d + 2 N]
    dt, dtu, B, C = moved.split([channels, channels, states, states], dim=3)
    y = recurrence(A.transpose(1, 2).unsqueeze(1), dt.unsqueeze(3), dtu.unsqueeze(3), B.unsqueeze(4), C.unsqueeze(3))
    y = _in_order(y.squeeze(3).permute(1, 2, 0, 3), reverse)  # [k, b, L, d]
    if D is not None:
        y = y + u * wide(D)[:, None, None]
    y = y.sum(0) * scale
    return (y if z is None else y * F.silu(wide(z))).to(dtype)


def _in_order(x: Tensor, reverse: Sequence[bool]) -> Tensor:
    """x [k, b, L, c] with what is scanned first in front, or back again."""
    return torch.stack([x[k].flip(1) if back else x[k] for k, back in enumerate(reverse)])


def recurrence(
    A: Tensor,  # [k, 1, N, d], negative
    dt: Tensor,  # [L, k, b, 1, d], not negative
    dtu: Tensor,  # [L, k, b, 1, d]
    B: Tensor,  # [L, k, b, N, 1]
    C: Tensor,  # [L, k, b, 1, N]
) -> Tensor:  # [L, k, b, 1, d]
    """h_t = exp(dt_t A) h_{t-1} + dtu_t B_t from h = 0; y_t = C_t h_t."""
    if _as_one_op.get():
        start = dtu.new_zeros((dtu[0] * B[0]).shape)
        out: Tensor = recurrence_op(start, A, dt, dtu, B, C)
        return out
    return _outputs(C, _states(dt * A, dtu * B))


def _outputs(C: Tensor, states: Tensor) -> Tensor:
    """C_t h_t, as a sum: a matrix product would be rounded by autocast and TF32."""
    return (C.transpose(3, 4) * states).sum(3, keepdim=True)


def _states(log_decay: Tensor, inputs: Tensor) -> Tensor:
    """h_t = exp(log_decay_t) h_{t-1} + inputs_t from h = 0, all [L, ...].

    In chunks that each start from 0, then over the chunks' ends in the same way; last, what the state before a chunk
    adds in it. Decays are multiplied and never divided by. They are at most 1: nothing overflows, and what underflows
    has decayed to 0.
    """
    length = inputs.shape[0]
    if length <= CHUNK:
        return _steps(log_decay.exp(), inputs)
    chunks = (length + CHUNK - 1) // CHUNK
    padding = (*(0, 0) * (inputs.dim() - 1), 0, chunks * CHUNK - length)
    log_decay, inputs = (
        F.pad(x, padding).unflatten(0, (chunks, CHUNK)).transpose(0, 1) for x in (log_decay, inputs)
    )  # [CHUNK, chunks, ...]
    own = _steps(log_decay.exp(), inputs)
    total = log_decay.cumsum(0)
    ends = _states(total[-1], own[-1])  # [chunks, ...]
    before = torch.cat([torch.zeros_like(ends[:1]), ends[:-1]])
    return torch.addcmul(own, total.exp(), before).transpose(0, 1).flatten(0, 1)[:length]


def _steps(decay: Tensor, inputs: Tensor) -> Tensor:
    """One after another along the first dimension."""
    state, states = torch.zeros_like(inputs[0]), []
    for i in range(inputs.shape[0]):
        state = torch.addcmul(inputs[i], decay[i], state)
        states.append(state)
    return torch.stack(states)


@library.custom_op("vimfast::recurrence", mutates_args=())
def recurrence_op(start: Tensor, A: Tensor, dt: Tensor, dtu: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """:func:`recurrence` from h = start [k, b, N, d], for formats that have an operator of their own for it."""
    first = torch.addcmul(dtu[:1] * B[:1], (dt[:1] * A).exp(), start)
    return _outputs(C, _states(dt * A, torch.cat([first, dtu[1:] * B[1:]])))


@recurrence_op.register_fake
def _(start: Tensor, A: Tensor, dt: Tensor, dtu: Tensor, B: Tensor, C: Tensor) -> Tensor:
    return torch.empty_like(dtu, memory_format=torch.contiguous_format)


@contextmanager
def recurrences_as_one_op() -> Iterator[None]:
    """In this block each recurrence is recorded as one ``vimfast::recurrence``."""
    token = _as_one_op.set(True)
    try:
        yield
    finally:
        _as_one_op.reset(token)


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: Sequence[bool]) -> Tensor:
    """x [b, L, d], weight [k, d, W], bias [k, d] -> [k, b, L, d], as a sum of shifted copies."""
    length, width = x.shape[1], weight.shape[2]
    weight, padded = wide(weight), F.pad(wide(x), (0, 0, width - 1, width - 1))
    ways = []
    for k, back in enumerate(reverse):
        total = torch.zeros_like(weight[k, :, 0]) if bias is None else wide(bias[k])
        for tap in range(width):
            first = 2 * (width - 1) - tap if back else tap
            total = total + padded[:, first : first + length] * weight[k, :, tap]
        ways.append(F.silu(total))
    return torch.stack(ways).to(x.dtype)


def norm(
    x: Tensor,  # [b, ..., c]
    residual: Tensor | None,  # [b, ..., c]
    weight: Tensor,  # [c]
    bias: Tensor | None,  # [c]
    noise: Tensor | None,  # [b]
    drop_rate: float,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor]:
    if not rms:
        return add_norm(x, residual, weight, bias, noise, drop_rate, eps, rms)
    kept = drop_path(wide(x), noise, drop_rate)
    total = kept if residual is None else wide(residual) + kept
    # By hand: F.rms_norm and rsqrt are unknown to older converters.
    scaled = total / torch.sqrt((total * total).mean(-1, keepdim=True) + eps)
    return (scaled * weight.to(total.dtype)).to(x.dtype), total


BACKEND = Backend(PORTABLE, ops={"scan": scan, "conv": conv, "norm": norm, "block": block})
