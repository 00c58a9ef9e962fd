"""Bidirectional selective scan on NVIDIA GPUs, forward and backward, without a compiler on the machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from vimfast_kernels.flops import counted, scan_flops
from vimfast_kernels.product.launch import multiply
from vimfast_kernels.scan.device_backward import scan_backward
from vimfast_kernels.scan.device_backward import sum_partials as sum_partials_kernel
from vimfast_kernels.scan.device_forward import scan_forward
from vimfast_kernels.tuning import ScanForward, multiprocessors, tuning_of

CHUNK = 8  # steps between saved states, and steps worked on at a time
# Forward programs by state size. Wide: 32 states a thread (16 at state size 8), the fewest instructions; for state size
# 16 the tuning has it. Narrow: fewer states a thread and more threads, for a GPU that wide ones would leave mostly
# empty, as few long sequences do.
FORWARD_WIDE = {
    8: ScanForward(64, 1, 4, 168), 32: ScanForward(32, 1, 2, 168), 64: ScanForward(16, 2, 2, 168),
}  # fmt: skip
FORWARD_NARROW = {
    8: ScanForward(32, 1, 4, 168), 16: ScanForward(16, 2, 8, 168), 32: ScanForward(16, 2, 2, 168),
    64: ScanForward(16, 2, 2, 168),
}  # fmt: skip
WIDE_PROGRAMS = 6  # at once on a multiprocessor
# Backward programs by state size: 16 states a thread (32 at the larger sizes); for state size 16 the tuning has it.
BACKWARD = {
    8: {"BD": 64, "WARPS": 1, "PER_THREAD": 8, "UNROLL": 4, "PRODUCTS": False},
    32: {"BD": 32, "WARPS": 1, "PER_THREAD": 16, "UNROLL": 2, "PRODUCTS": False},
    64: {"BD": 16, "WARPS": 1, "PER_THREAD": 32, "UNROLL": 2, "PRODUCTS": False},
}
# In bf16, dB and dC are products with the states and their gradients as bf16, rounded once more. On average that adds a
# third to the error that bf16 outputs have anyway, but a single sum whose terms cancel may be off by more: only used
# where there are at least this many sums.
PRODUCTS_SUMS = 128
BACKWARD_REGISTERS = 168  # in bf16: 12 warps reside on a multiprocessor
# The kernels compute the time steps from a factor of up to so many columns, so that they never reach memory: weights of
# 16-bit types, since fp32's tensor cores would round. More columns take shared memory that programs need to reside.
WIDEST_RANK = 64
# Of a program that sums partial results: over blocks of channels, or over the batch.
SUM_ROWS, SUM_COLUMNS, SUM_BATCHES, SUM_WARPS = 64, 32, 128, 4
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Inputs(NamedTuple):
    """What the kernels read. d is a multiple of 16, and rows are 16-byte aligned."""

    u: Tensor  # [k, b, L, d], one scan for each of the k directions
    delta: Tensor  # [k, b, L, d], or where dt_weight is given [k, b, L, P], P a multiple of 8: see there
    A: Tensor  # [k, d, N] fp32
    B: Tensor  # [k, b, L, N]
    C: Tensor  # [k, b, L, N]
    D: Tensor  # [k, d] fp32
    z: Tensor | None  # [b, L, d]
    delta_bias: Tensor  # [k, d] fp32
    reverse: Sequence[bool]  # [k]
    scale: float
    dt_weight: Tensor | None = None  # [k, d, P]: dt_weight delta_t takes the place of delta_t


class StateGradients(NamedTuple):
    """dB and dC as the programs of the backward pass leave them, to be summed over the blocks of channels."""

    sums: Tensor  # [blocks, k, b, L, 2 N]: dB's N states, then dC's; fp32, or fp16 where there are
    scales: Tensor | None  # [blocks, k, b, L], fp32 powers of two to multiply each row with


def _strides(x: Tensor) -> tuple[int, ...]:
    """Strides of all but the last dimension, 0 where it has one entry: its stride is arbitrary and never used."""
    return tuple(s if n > 1 else 0 for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True))


def copyable(x: Tensor) -> Tensor:
    """x, or a copy whose rows can be fetched 16 bytes at a time."""
    rows_aligned = all(s % 16 == 0 for s in _strides(x))
    good = x.stride(-1) == 1 and rows_aligned and x.data_ptr() % 16 == 0
    return x if good else x.clone(memory_format=torch.contiguous_format)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _meta(inputs: Inputs) -> dict[str, object]:
    u, weight = inputs.u, inputs.dt_weight
    return {
        "D": u.shape[-1], "N": inputs.A.shape[-1], "DIRS": u.shape[0], "CHUNK": CHUNK, "FLIP": int(inputs.reverse[0]),
        "RANK": 0 if weight is None else weight.shape[-1], "GATE": inputs.z is not None,
        "PRECISE": u.dtype != torch.bfloat16,
    }  # fmt: skip


def projected(x: Inputs) -> Inputs:
    """x, its time steps from a product outside where the kernels' tensor cores cannot make them."""
    if x.dt_weight is None or (x.u.element_size() == 2 and x.dt_weight.shape[-1] <= WIDEST_RANK):
        return x
    delta = multiply(x.delta.flatten(1, 2), x.dt_weight.transpose(1, 2))
    return x._replace(delta=delta.view_as(x.u), dt_weight=None)


def check(dtype: torch.dtype, states: int, length: int) -> None:
    """Raises ValueError for what no kernel supports."""
    if dtype not in DTYPES:
        raise ValueError(f"u is {dtype}; this scan takes bfloat16, float16 or float32")
    if states not in FORWARD_NARROW:
        raise ValueError(f"state size {states} has no kernel; take one of {sorted(FORWARD_NARROW)}")
    if length == 0:
        raise ValueError("the sequence is empty; L must be >= 1")


def empty_saved(
    like: Tensor, k: int, b: int, length: int, d: int, n: int, save: bool, gate: bool
) -> tuple[Tensor, Tensor]:
    """(sum before the gate, states every CHUNK steps) for backward, without elements where there is nothing to save."""
    keep = torch.bfloat16 if like.dtype == torch.bfloat16 else torch.float32
    y = like.new_empty((b, length, d) if save and gate else (0,))
    return y, like.new_empty((k, b, (length + CHUNK - 1) // CHUNK, d, n) if save else (0,), dtype=keep)


def forward_program(dtype: torch.dtype, batch: int, channels: int, states: int, device: torch.device) -> dict[str, Any]:
    """Shape and launch options of a forward program."""
    tuning = tuning_of(device)
    program = FORWARD_WIDE.get(states) or (tuning.scan_forward_fp32 if dtype == torch.float32 else tuning.scan_forward)
    if 3 * batch * triton.cdiv(channels, program.channels) <= WIDE_PROGRAMS * multiprocessors(device):
        program = FORWARD_NARROW[states]
    shape = {"BD": program.channels, "LANES": program.lanes, "UNROLL": program.unroll}
    return shape | {
        "maxnreg": program.registers,
        "enable_fp_fusion": True,
    }  # newer Tritons only fuse on request


def backward_program(dtype: torch.dtype, states: int, sums: int, device: torch.device) -> dict[str, Any]:
    """Shape and launch options of a backward program where dB and dC are so many sums over channels for each state."""
    products = dtype == torch.bfloat16 and states == 16 and sums >= PRODUCTS_SUMS
    tuning = tuning_of(device)
    tuned = tuning.scan_backward if products else tuning.scan_backward_fp32
    program = BACKWARD.get(states) or {
        "BD": 32 * tuned.warps, "WARPS": tuned.warps, "PER_THREAD": 8, "UNROLL": tuned.unroll, "PRODUCTS": products,
    }  # fmt: skip
    registers = tuned.registers if states == 16 else None
    if dtype == torch.bfloat16 and states <= 16:
        registers = registers or BACKWARD_REGISTERS
    return program | {"num_warps": program["WARPS"], "maxnreg": registers, "enable_fp_fusion": True}


def launch_forward(
    inputs: Inputs,
    save: bool,
    out: Tensor | None = None,  # [b, L, d], written
) -> tuple[Tensor, Tensor, Tensor]:
    """(out [b, L, d], sum of directions before the gate [b, L, d], states every CHUNK steps [k, b, chunks, d, N]);
    the last two are empty unless ``save``. A given ``out`` may be any memory with 16-byte aligned rows that no input
    lies in."""
    inputs = projected(inputs)
    u, delta, A, B, C, D, z, delta_bias, _, scale, dt_weight = inputs
    k, b, length, d = u.shape
    N = A.shape[-1]
    out = u.new_empty(b, length, d) if out is None else out
    y, states = empty_saved(u, k, b, length, d, N, save, z is not None)
    sums = y if y.numel() else out  # where a direction leaves its share for the other
    program = forward_program(u.dtype, b, d, N, u.device)
    scan_forward[(triton.cdiv(d, program["BD"]), b)](
        u, delta, u if dt_weight is None else dt_weight, B, C, u if z is None else z, A, D, delta_bias,
        out, sums, states, length, scale, *_strides(u), *_strides(delta), *_strides(B), *_strides(C),
        *((0, 0) if z is None else _strides(z)), *_strides(out), *_strides(sums),
        SAVE=save, num_warps=k, **program, **_meta(inputs),
    )  # fmt: skip
    return out, y, states


def launch_backward_programs(
    dout: Tensor,  # [b, L, d]
    inputs: Inputs,
    y: Tensor,
    states: Tensor,
    dz: Tensor | None,  # [b, L, d], written
    out: Tensor | None = None,  # [b, L, d], forward's output, written again; needs z
) -> tuple[Tensor, Tensor, StateGradients, Tensor]:
    """(du, the gradient of the projected time steps [k, b, L, d], and as the programs leave it: dB and dC, and dA, dD,
    ddelta_bias [k, b, d (N + 2)] in fp32, to be summed over the batch)."""
    inputs = projected(inputs)
    u, delta, A, B, C, D, z, delta_bias, _, scale, dt_weight = inputs
    k, b, length, d = u.shape
    N = A.shape[-1]
    program = backward_program(u.dtype, N, k * b * length, u.device)
    blocks = triton.cdiv(d, program["BD"])
    du, ddelta = u.new_empty(u.shape), u.new_empty(u.shape)
    scaled = program["PRODUCTS"]
    sums = A.new_empty(blocks, k, b, length, 2 * N, dtype=torch.float16 if scaled else torch.float32)
    dstates = StateGradients(sums, A.new_empty(blocks, k, b, length) if scaled else None)
    dparameters = A.new_empty(k, b, d * (N + 2))
    gate = z is not None
    scan_backward[(blocks, b, k)](
        u, delta, u if dt_weight is None else dt_weight, B, C, z if gate else u, A, D, delta_bias, y, states, dout,
        du, ddelta, dz if gate else du, du if out is None else out, *dstates, dparameters, length, scale,
        *_strides(u), *_strides(delta), *_strides(B), *_strides(C), *(_strides(z) if z is not None else (0, 0)),
        *_strides(dout), *(_strides(dz) if dz is not None else (0, 0)), *(_strides(out) if out is not None else (0, 0)),
        OUT=out is not None, **program, **_meta(inputs),
    )  # fmt: skip
    return du, ddelta, dstates, dparameters


def sum_partials(
    dstates: StateGradients,
    dB: Tensor,  # [k, b, L, N], written; rows are evenly spaced
    dC: Tensor,  # [k, b, L, N], written; rows are evenly spaced
    dparameters: Tensor | None = None,  # [k, b, d (N + 2)]
    sums: Sequence[Tensor] = (),  # dA [k, d, N], dD, ddelta_bias [k, d], written from dparameters
) -> None:
    """Adds up what the programs of the backward pass left, in one launch."""
    blocks, k, b, length, columns = dstates.sums.shape
    rows, width = k * b * length, 0 if dparameters is None else dparameters.shape[2]
    programs = k * triton.cdiv(width, SUM_COLUMNS)
    sum_partials_kernel[(programs + triton.cdiv(rows, SUM_ROWS),)](
        *dstates, dB, dC, *((dparameters, *sums) if sums else (dB,) * 4), rows, b, programs,
        dB.stride(2), dC.stride(2), D=width // (columns // 2 + 2), N=columns // 2, PARTIALS=blocks, ROWS=SUM_ROWS,
        COLUMNS=SUM_COLUMNS, BATCHES=SUM_BATCHES, num_warps=SUM_WARPS,
    )  # fmt: skip


def launch_backward(
    dout: Tensor,  # [b, L, d]
    inputs: Inputs,
    y: Tensor,
    states: Tensor,
    dB: Tensor,  # [k, b, L, N], written; rows are evenly spaced
    dC: Tensor,  # [k, b, L, N], written; rows are evenly spaced
    dz: Tensor | None,  # [b, L, d], written
    out: Tensor | None = None,  # [b, L, d], forward's output, written again; needs z
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(du, the gradient of the projected time steps [k, b, L, d], dA [k, d, N], dD, ddelta_bias [k, d]), the last three
    fp32."""
    du, ddelta, dstates, dparameters = launch_backward_programs(dout, inputs, y, states, dz, out)
    dA, dD, dbias = (torch.empty_like(x) for x in (inputs.A, inputs.D, inputs.delta_bias))
    sum_partials(dstates, dB, dC, dparameters, (dA, dD, dbias))
    return du, ddelta, dA, dD, dbias


@torch.library.custom_op("vimfast::selective_scan_gluon", mutates_args=(), device_types="cuda")
def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    delta_bias: Tensor,
    reverse: Sequence[bool],
    scale: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_forward(_readable(Inputs(u, delta, A, B, C, D, z, delta_bias, reverse, scale)), save)


def _readable(x: Inputs) -> Inputs:
    """The same inputs in memory that the kernels can read."""
    return Inputs(
        copyable(x.u), copyable(x.delta), x.A.contiguous(), _rows(x.B), _rows(x.C), x.D.contiguous(),
        None if x.z is None else copyable(x.z), x.delta_bias.contiguous(), x.reverse, x.scale,
    )  # fmt: skip


@_scan.register_fake
def _(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None, delta_bias: Tensor,
    reverse: Sequence[bool], scale: float, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    k, b, length, d = u.shape
    y, states = empty_saved(u, k, b, length, d, A.shape[-1], save, z is not None)
    return u.new_empty(b, length, d), y, states


@torch.library.custom_op("vimfast::selective_scan_gluon_backward", mutates_args=(), device_types="cuda")
def _scan_grad(
    dout: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    delta_bias: Tensor,
    saved: Sequence[Tensor],
    reverse: Sequence[bool],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (u, delta, A, B, C, D, z, delta_bias); z's is empty where there is no z.

    ``saved``: the sum before the gate and the states, as forward leaves them.
    """
    y, states = saved
    dB, dC = B.new_empty(B.shape), C.new_empty(C.shape)
    dz = None if z is None else u.new_empty(z.shape)
    inputs = _readable(Inputs(u, delta, A, B, C, D, z, delta_bias, reverse, scale))
    du, ddelta, dA, dD, dbias = launch_backward(copyable(dout), inputs, y, states, dB, dC, dz)
    return du, ddelta, dA, dB, dC, dD, u.new_empty(0) if dz is None else dz, dbias


@_scan_grad.register_fake
def _(
    dout: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None,
    delta_bias: Tensor, *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    dz = u.new_empty(0 if z is None else z.shape)
    return (
        u.new_empty(u.shape), u.new_empty(u.shape), A.new_empty(A.shape), B.new_empty(B.shape), C.new_empty(C.shape),
        A.new_empty(D.shape), dz, A.new_empty(delta_bias.shape),
    )  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.reverse, ctx.scale, _ = inputs
    _, y, states = output
    ctx.save_for_backward(*tensors, y, states)
    ctx.set_materialize_grads(False)  # otherwise zeros are written for y and states


def _backward(ctx: Any, dout: Tensor | None, _dy: None, _dstates: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 11
    *tensors, y, states = ctx.saved_tensors
    du, ddelta, dA, dB, dC, dD, dz, dbias = _scan_grad(dout, *tensors, [y, states], ctx.reverse, ctx.scale)
    dz = None if tensors[6] is None else dz
    return du, ddelta, dA, dB, dC, dD, dz, dbias, None, None, None


_scan.register_autograd(_backward, setup_context=_setup_context)
counted(torch.ops.vimfast.selective_scan_gluon, scan_flops)
counted(torch.ops.vimfast.selective_scan_gluon_backward, scan_flops, skip=1, times=2)


def selective_scan(
    u: Tensor,  # [k, b, L, d], one scan for each of the k directions
    delta: Tensor,  # [k, b, L, d]
    A: Tensor,  # [k, d, N]
    B: Tensor,  # [k, b, L, N]
    C: Tensor,  # [k, b, L, N]
    D: Tensor | None = None,  # [k, d]
    z: Tensor | None = None,  # [b, L, d]
    delta_bias: Tensor | None = None,  # [k, d]
    *,
    reverse: Sequence[bool] = (False, True),
    scale: float = 1.0,
) -> Tensor:
    """out_t = scale * silu(z_t) * sum_k y_{k,t}  [b, L, d], with, for direction k,

        dt_t = softplus(delta_t + delta_bias),  h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t,  y_t = C_t h_t + D u_t

    and time running down where ``reverse[k]``. bf16, fp16 or fp32 in and out, fp32 inside; in bf16 the states kept
    for backward (every 8th) are bf16. Deterministic. Raises ValueError for a shape or dtype that no kernel takes.
    """
    k, _, length, d = u.shape
    check(u.dtype, A.shape[-1], length)
    if len(reverse) != k:
        raise ValueError(f"reverse has {len(reverse)} entries for {k} directions; give one for each")
    if k > 2 or (k == 2 and tuple(reverse) != (False, True)):
        one = [slice(i, i + 1) for i in range(k)]
        parts = [
            selective_scan(
                u[i], delta[i], A[i], B[i], C[i], None if D is None else D[i], z,
                None if delta_bias is None else delta_bias[i], reverse=[back], scale=scale,
            )
            for i, back in zip(one, reverse, strict=True)
        ]  # fmt: skip
        return torch.stack(parts).sum(0)
    A = A.float()
    D = A.new_zeros(k, d) if D is None else D.float()
    delta_bias = A.new_zeros(k, d) if delta_bias is None else delta_bias.float()
    delta = delta.to(u.dtype)
    z = None if z is None else z.to(u.dtype)
    pad = -d % 16
    if pad:
        u, delta, D, delta_bias = (torch.nn.functional.pad(v, (0, pad)) for v in (u, delta, D, delta_bias))
        A = torch.nn.functional.pad(A, (0, 0, 0, pad))
        z = None if z is None else torch.nn.functional.pad(z, (0, pad))
    tensors = (u, delta, A, B, C, D, z, delta_bias)
    save = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors)
    out: Tensor = _scan(*tensors, list(reverse), scale, save)[0]
    return out[..., :d] if pad else out
