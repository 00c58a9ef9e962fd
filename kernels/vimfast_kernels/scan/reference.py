"""The selective scan in plain torch: what every faster one is compared with, on any device.

A forward and a hand-derived backward, registered as torch custom ops with shape functions, so that ``torch.compile``
sees one node instead of an unrolled loop. Arithmetic is fp32 (float64 for
float64 inputs) whatever dtype comes in, in elementwise ops and sums only, which neither autocast nor TF32 touches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vimfast_kernels.arithmetic import empty_gradients, silu_slope, wide
from vimfast_kernels.flops import counted, scan_flops

STEP_ELEMENTS = 1 << 16  # states in one step on a CPU: the least that keeps two threads busy
CHUNK_ELEMENTS = 1 << 19  # states in one chunk on a CPU: the few arrays of this size stay in its caches
CHUNK_ELEMENTS_GPU = 1 << 24  # on a GPU few launches count for more: 64 MiB an array
MIN_CHUNK_STEPS = 8  # at state 16 the saved states then take as much as two activations in fp32


# Selective scan. For one direction, time running up (or down) over L:
#   dt_t = softplus(delta_t + delta_bias)             [d]
#   h_t  = exp(dt_t A) * h_{t-1} + (dt_t u_t) B_t     [N, d]
#   y_t  = sum_n C_t h_t + D u_t                      [d]
# and for all directions k together: out_t = scale * silu(z_t) * sum_k y_{k,t}.
#
# Batch and length are cut into pieces. What needs no order is done for all steps of a piece at once; a step itself is
# one multiply-add on [b, N, d]. Channels are innermost, so that every product runs over long rows. Forward keeps the
# state before each chunk of the length; backward recomputes the states of the chunk from it.


def piece(batch: int, length: int, channels: int, states: int, on_gpu: bool) -> tuple[int, int]:
    """(sequences, steps) of a piece: of shape and place alone, since the steps decide how many states are saved."""
    size = max(1, channels * states)
    rows = batch if on_gpu else max(1, min(batch, STEP_ELEMENTS // size))
    room = (CHUNK_ELEMENTS_GPU if on_gpu else CHUNK_ELEMENTS) // max(1, rows * size)
    return rows, min(length, max(MIN_CHUNK_STEPS, room))


def _ordered(x: Tensor, reverse: bool) -> tuple[Tensor, ...]:
    """Views of the steps of x [b, T, ...], first scanned first."""
    return x.unbind(1)[::-1] if reverse else x.unbind(1)


class _Direction:
    """One direction of some sequences: wide inputs, and the buffers in which the chunks are made one by one."""

    def __init__(
        self,
        u: Tensor,  # [b, L, d]
        delta: Tensor,  # [b, L, d]
        A: Tensor,  # [d, N]
        B: Tensor,  # [b, L, N]
        C: Tensor,  # [b, L, N]
        delta_bias: Tensor | None,  # [d]
        reverse: bool,
        steps: int,  # in a chunk
    ) -> None:
        batch, self.length, channels = u.shape
        self.steps, self.reverse = steps, reverse
        self.u, self.A = wide(u), wide(A).t().contiguous()  # [b, L, d], [N, d]
        self.B, self.C = wide(B).unsqueeze(3), wide(C).unsqueeze(3)  # [b, L, N, 1]
        self.A_log2e = self.A * math.log2(math.e)  # exp2 is three times as fast as exp on a CPU
        self.raw_dt = wide(delta) if delta_bias is None else wide(delta) + wide(delta_bias)
        self.dt = F.softplus(self.raw_dt)
        self.dtu = self.dt * self.u
        self._decay = self.u.new_empty(batch, self.steps, len(self.A), channels)
        self._trail = self.u.new_empty(batch, self.steps + 1, len(self.A), channels)
        self._adjoint, self._scratch = torch.empty_like(self._decay), torch.empty_like(self._decay)

    def chunks(self) -> list[tuple[int, slice]]:
        """(number, positions) of the chunks, first scanned first."""
        starts = range(0, self.length, self.steps)
        chunks = [(i, slice(t, min(t + self.steps, self.length))) for i, t in enumerate(starts)]
        return chunks[::-1] if self.reverse else chunks

    def states(self, t: slice, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(decay, state before each step, state after it), each [b, T, N, d], of the chunk at t from its start."""
        steps = t.stop - t.start
        decay, trail = self._decay[:, :steps], self._trail[:, : steps + 1]
        before, after = (trail[:, 1:], trail[:, :-1]) if self.reverse else (trail[:, :-1], trail[:, 1:])
        torch.mul(self.dt[:, t].unsqueeze(2), self.A_log2e, out=decay).exp2_()
        torch.mul(self.dtu[:, t].unsqueeze(2), self.B[:, t], out=after)
        state = _ordered(before, self.reverse)[0].copy_(start)
        for a, h in zip(_ordered(decay, self.reverse), _ordered(after, self.reverse), strict=True):
            state = h.addcmul_(a, state)
        return decay, before, after

    def adjoints(self, t: slice, dy: Tensor, decay: Tensor, carry: Tensor) -> Tensor:
        """Gradients of the states of the chunk at t, [b, T, N, d]; `carry` comes from the next chunk."""
        adjoint = torch.mul(dy[:, t].unsqueeze(2), self.C[:, t], out=self._adjoint[:, : t.stop - t.start])
        later, *rest = _ordered(adjoint, not self.reverse)
        later.add_(carry)
        for a, g in zip(_ordered(decay, not self.reverse), rest, strict=False):
            later = g.addcmul_(a, later)
        return adjoint

    def dot(self, x: Tensor, y: Tensor, dim: int | tuple[int, ...]) -> Tensor:
        """sum(x * y, dim) through the scratch buffer."""
        return torch.mul(x, y, out=self._scratch[:, : x.shape[1]]).sum(dim)


def _directions(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, delta_bias: Tensor | None, reverse: list[bool]
) -> Iterator[tuple[int, slice, _Direction]]:
    """(direction, sequences, the part of the work that they are)."""
    _, batch, length, channels = u.shape
    rows, steps = piece(batch, length, channels, A.shape[2], u.is_cuda)
    for k, back in enumerate(reverse):
        bias = None if delta_bias is None else delta_bias[k]
        for b in (slice(i, i + rows) for i in range(0, batch, rows)):
            yield k, b, _Direction(u[k, b], delta[k, b], A[k], B[k, b], C[k, b], bias, back, steps)


_SCAN_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias,"
    " bool[] reverse, float scale"
)


@torch.library.custom_op("vimfast::scan", mutates_args=(), schema=f"({_SCAN_INPUTS}) -> (Tensor, Tensor)")
def scan(
    u: Tensor,  # [k, b, L, d], one scan for each of the k directions
    delta: Tensor,  # [k, b, L, d]
    A: Tensor,  # [k, d, N]
    B: Tensor,  # [k, b, L, N]
    C: Tensor,  # [k, b, L, N]
    D: Tensor | None,  # [k, d]
    z: Tensor | None,  # [b, L, d], one gate for the sum of the directions
    delta_bias: Tensor | None,  # [k, d]
    reverse: list[bool],  # [k], True where time runs down
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out [b, L, d] in u's dtype, state before each chunk [k, b, chunks, N, d])."""
    y = wide(torch.zeros_like(u[0]))
    saved = _empty_saved(u, A)
    for k, b, part in _directions(u, delta, A, B, C, delta_bias, reverse):
        state = torch.zeros_like(saved[k, b, 0])
        for i, t in part.chunks():
            saved[k, b, i] = state
            _, _, after = part.states(t, state)
            y[b, t] += part.dot(after, part.C[:, t], 2)
            state = _ordered(after, part.reverse)[-1].clone()
        if D is not None:
            y[b].addcmul_(part.u, wide(D[k]))
    if z is not None:
        y.mul_(F.silu(wide(z)))
    return y.mul_(scale).to(u.dtype), saved


def _empty_saved(u: Tensor, A: Tensor) -> Tensor:
    directions, batch, length, channels = u.shape
    _, steps = piece(batch, length, channels, A.shape[2], u.is_cuda)
    dtype = torch.promote_types(u.dtype, torch.float32)
    return u.new_empty(directions, batch, (length + steps - 1) // steps, A.shape[2], channels, dtype=dtype)


@torch.library.custom_op(
    "vimfast::scan_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor saved, {_SCAN_INPUTS}) -> Tensor[]",
)
def scan_backward(
    grad: Tensor,  # [b, L, d]
    saved: Tensor,  # [k, b, chunks, N, d]
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    reverse: list[bool],
    scale: float,
) -> list[Tensor]:
    """Gradients of the eight tensors in their order, an empty one for each that is None."""
    grads = empty_gradients(u, delta, A, B, C, D, z, delta_bias)
    du, ddelta, _, dB, dC, _, dz, _ = grads
    dA, dD, dbias = (torch.zeros_like(x, dtype=saved.dtype) for x in (A, A[..., 0], A[..., 0]))
    dout = wide(grad) * scale
    dy = dout if z is None else dout * F.silu(wide(z))
    y = torch.zeros_like(dy)  # recomputed for dz only
    for k, b, part in _directions(u, delta, A, B, C, delta_bias, reverse):
        ddt, ddtu = torch.empty_like(part.dt), torch.empty_like(part.dt)
        carry = torch.zeros_like(saved[k, b, 0])
        for i, t in reversed(part.chunks()):
            decay, before, after = part.states(t, saved[k, b, i])
            g = part.adjoints(t, dy[b], decay, carry)
            if z is not None:
                y[b, t] += part.dot(after, part.C[:, t], 2)
            dC[k, b, t] = part.dot(after, dy[b, t].unsqueeze(2), 3)
            dB[k, b, t] = part.dot(g, part.dtu[:, t].unsqueeze(2), 3)
            ddtu[:, t] = part.dot(g, part.B[:, t], 2)
            g.mul_(decay)
            carry = _ordered(g, part.reverse)[0].clone()
            g.mul_(before)  # gradient of dt A
            ddt[:, t] = part.dot(g, part.A, 2)
            dA[k] += part.dot(g, part.dt[:, t].unsqueeze(2), (0, 1)).t()
        ddelta_part = ddt.addcmul_(ddtu, part.u).mul_(torch.sigmoid(part.raw_dt))
        ddelta[k, b] = ddelta_part
        dbias[k] += ddelta_part.sum((0, 1))
        du_part = ddtu.mul_(part.dt)
        if D is not None:
            dD[k] += (dy[b] * part.u).sum((0, 1))
            du_part.addcmul_(dy[b], wide(D[k]))
            y[b].addcmul_(part.u, wide(D[k]))
        du[k, b] = du_part
    if z is not None:
        dz.copy_(dout * y * silu_slope(wide(z)))
    for i, x in ((2, dA), (5, dD), (7, dbias)):
        if grads[i].numel():
            grads[i].copy_(x)
    return grads


@scan.register_fake
def _(u: Tensor, delta: Tensor, A: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape[1:]), _empty_saved(u, A)


@scan_backward.register_fake
def _(grad: Tensor, saved: Tensor, *inputs: Any) -> list[Tensor]:
    return empty_gradients(*inputs[:8])


def _scan_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.reverse, ctx.scale = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.set_materialize_grads(False)


def _scan_gradients(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    saved, *tensors = ctx.saved_tensors
    grads = scan_backward(grad, saved, *tensors, ctx.reverse, ctx.scale)
    return (*(None if x is None else g for x, g in zip(tensors, grads, strict=True)), None, None)


scan.register_autograd(_scan_gradients, setup_context=_scan_context)
counted(torch.ops.vimfast.scan, scan_flops)
counted(torch.ops.vimfast.scan_backward, scan_flops, skip=2, times=2)
