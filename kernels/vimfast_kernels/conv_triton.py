"""Causal depthwise convolution and SiLU for every direction of a sequence, in Triton."""

# Device functions are written in Triton's own dialect: no annotations beyond constexpr, no starred tuples.
# ruff: noqa: RUF005
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,var-annotated"
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vimfast_kernels.tuning import tuning_of


@triton.jit
def _sigmoid(v):
    """1 / (1 + exp(-v)) as a squared reciprocal root: two special-function instructions and no division."""
    root = tl.math.rsqrt(1.0 + tl.exp(-v))
    return root * root


@triton.jit
def _inside(time, length, mask):
    """The mask where 0 <= time < length, as a vector: Triton's interpreter takes no scalar in a mask."""
    times = tl.where(mask, time, -1)
    return (times >= 0) & (times < length)


@triton.jit
def _load_row(base, time, length, stride, mask):
    return tl.load(base + time * stride, mask=_inside(time, length, mask), other=0.0).to(tl.float32)


@triton.jit
def _load_taps(weight_ptr, d, mask, K: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """All taps [direction][tap], each a row of channels."""
    taps = ()
    for k in tl.static_range(K):
        row = ()
        for j in tl.static_range(WIDTH):
            row = row + (tl.load(weight_ptr + (k * D + d) * WIDTH + j, mask=mask, other=0.0).to(tl.float32),)
        taps = taps + (row,)
    return taps


@triton.jit
def _preactivation(rows, at: tl.constexpr, taps, bias, WIDTH: tl.constexpr, BACK: tl.constexpr):
    """The convolution at rows[at]: tap WIDTH - 1 sits on it, the others before it (after it where BACK)."""
    v = bias
    for j in tl.static_range(WIDTH):
        v += taps[j] * rows[at + (WIDTH - 1 - j if BACK else j - WIDTH + 1)]
    return v


@triton.jit(do_not_specialize=["length"])
def _conv_forward(
    x_ptr, weight_ptr, bias_ptr, out_ptr, length, x_batch, x_time, out_dir,
    D: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, BACK: tl.constexpr, BIAS: tl.constexpr,
    STEPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    HALO: tl.constexpr = WIDTH - 1
    start = tl.program_id(0) * STEPS
    batch = tl.program_id(1).to(tl.int64)
    d = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    mask = d < D
    base = x_ptr + batch * x_batch + d
    rows = ()
    for i in tl.static_range(STEPS + 2 * HALO):
        rows = rows + (_load_row(base, start + i - HALO, length, x_time, mask),)
    taps = _load_taps(weight_ptr, d, mask, K, WIDTH, D)
    for k in tl.static_range(K):
        bias = tl.zeros((CHANNELS,), tl.float32)
        if BIAS:
            bias = tl.load(bias_ptr + k * D + d, mask=mask, other=0.0).to(tl.float32)
        out = out_ptr + k * out_dir + (batch * length + start) * D + d
        for i in tl.static_range(STEPS):
            v = _preactivation(rows, i + HALO, taps[k], bias, WIDTH, (BACK >> k) & 1)
            v *= _sigmoid(v)
            tl.store(out + i * D, v.to(out_ptr.dtype.element_ty), mask=_inside(start + i, length, mask))


@triton.jit
def _gradients(
    rows, at: tl.constexpr, count: tl.constexpr, taps, bias, dout, time, length, stride, mask,
    WIDTH: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Gradients before the activation at `count` times from `time` on, which are rows[at], rows[at + 1], ..."""
    out = ()
    for i in tl.static_range(count):
        v = _preactivation(rows, at + i, taps, bias, WIDTH, BACK)
        s = _sigmoid(v)
        out = out + (_load_row(dout, time + i, length, stride, mask) * (s * (1.0 + v * (1.0 - s))),)
    return out


@triton.jit
def _add_direction(rows, pre, dx, sums, taps, WIDTH: tl.constexpr, BACK: tl.constexpr, STEPS: tl.constexpr):
    """(dx [STEPS], sums [WIDTH + 1]) with one direction's share added. rows start WIDTH - 1 before the block; so do
    the gradients `pre` where BACK, else they end WIDTH - 1 after it."""
    HALO: tl.constexpr = WIDTH - 1
    OWN: tl.constexpr = HALO if BACK else 0  # where the block's own times stand in `pre`
    new_dx = ()
    for i in tl.static_range(STEPS):
        total = dx[i]
        for j in tl.static_range(WIDTH):
            total += taps[j] * pre[i + (j if BACK else HALO - j)]
        new_dx = new_dx + (total,)
    new_sums = ()
    for j in tl.static_range(WIDTH):
        total = sums[j]
        for i in tl.static_range(STEPS):
            total += pre[i + OWN] * rows[i + HALO + (HALO - j if BACK else j - HALO)]
        new_sums = new_sums + (total,)
    total = sums[WIDTH]
    for i in tl.static_range(STEPS):
        total += pre[i + OWN]
    return new_dx, new_sums + (total,)


@triton.jit(do_not_specialize=["length", "segment"])
def _conv_backward(
    x_ptr, weight_ptr, bias_ptr, dout_ptr, dx_ptr, partial_ptr, length, segment,
    x_batch, x_time, dout_dir, dout_batch, dout_time, dx_batch, dx_time,
    D: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, BACK: tl.constexpr, BIAS: tl.constexpr,
    STEPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    # One program walks `segment` times of one sequence for CHANNELS channels, keeps their weights' gradients, and
    # hands the rows that two blocks of STEPS times share from one to the next in registers.
    HALO: tl.constexpr = WIDTH - 1
    batch = tl.program_id(1).to(tl.int64)
    d = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    mask = d < D
    taps = _load_taps(weight_ptr, d, mask, K, WIDTH, D)
    zero = tl.zeros((CHANNELS,), tl.float32)
    x_base = x_ptr + batch * x_batch + d
    dout_base = dout_ptr + batch * dout_batch + d
    begin = tl.program_id(0) * segment
    window = ()
    for i in tl.static_range(2 * HALO):
        window = window + (_load_row(x_base, begin + i - HALO, length, x_time, mask),)
    zeros = ()
    for _ in tl.static_range(WIDTH + 1):
        zeros = zeros + (zero,)
    biases = ()
    sums = ()
    shared = ()
    for k in tl.static_range(K):
        if BIAS:
            biases = biases + (tl.load(bias_ptr + k * D + d, mask=mask, other=0.0).to(tl.float32),)
        else:
            biases = biases + (zero,)
        sums = sums + (zeros,)
        shared = shared + (
            _gradients(
                window, 0 if (BACK >> k) & 1 else HALO, HALO, taps[k], biases[k], dout_base + k * dout_dir,
                begin - HALO * ((BACK >> k) & 1), length, dout_time, mask, WIDTH, (BACK >> k) & 1,
            ),
        )  # fmt: skip
    for start in range(begin, tl.minimum(begin + segment, length), STEPS):
        rows = window
        for i in tl.static_range(STEPS):
            rows = rows + (_load_row(x_base, start + HALO + i, length, x_time, mask),)
        dx = ()
        for _ in tl.static_range(STEPS):
            dx = dx + (zero,)
        new_sums = ()
        new_shared = ()
        for k in tl.static_range(K):
            pre = shared[k] + _gradients(
                rows, HALO if (BACK >> k) & 1 else 2 * HALO, STEPS, taps[k], biases[k], dout_base + k * dout_dir,
                start + HALO - HALO * ((BACK >> k) & 1), length, dout_time, mask, WIDTH, (BACK >> k) & 1,
            )  # fmt: skip
            dx, own = _add_direction(rows, pre, dx, sums[k], taps[k], WIDTH, (BACK >> k) & 1, STEPS)
            new_sums = new_sums + (own,)
            last = ()
            for i in tl.static_range(HALO):
                last = last + (pre[STEPS + i],)
            new_shared = new_shared + (last,)
        sums = new_sums
        shared = new_shared
        window = ()
        for i in tl.static_range(2 * HALO):
            window = window + (rows[STEPS + i],)
        for i in tl.static_range(STEPS):
            at = dx_ptr + batch * dx_batch + (start + i) * dx_time + d
            tl.store(at, dx[i].to(dx_ptr.dtype.element_ty), mask=_inside(start + i, length, mask))
    at = partial_ptr + (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * (K * (WIDTH + 1) * D) + d
    for k in tl.static_range(K):
        for j in tl.static_range(WIDTH + 1):
            tl.store(at + (k * (WIDTH + 1) + j) * D, sums[k][j], mask=mask)


@triton.jit(do_not_specialize=["count"])
def _sum_rows(in_ptr, out_ptr, count, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out [WIDTH] = sum over the rows of in [count, WIDTH]."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < count)[:, None] & (column < WIDTH)[None, :]
        total += tl.load(in_ptr + row[:, None] * WIDTH + column[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + column, tl.sum(total, 0), mask=column < WIDTH)


def sum_rows(partial: Tensor) -> Tensor:
    """Sum over the first dimension in fp32, in a fixed order."""
    count, width = partial.shape[0], partial[0].numel()
    out = partial.new_empty(partial.shape[1:])
    columns = 16
    _sum_rows[(triton.cdiv(width, columns),)](partial, out, count, WIDTH=width, ROWS=256, COLUMNS=columns, num_warps=8)
    return out


def _meta(
    d: int, weight: Tensor, bias: Tensor | None, reverse: Sequence[bool], steps: int, channels: int
) -> dict[str, object]:
    back = sum(1 << k for k, flag in enumerate(reverse) if flag)
    return {
        "D": d, "K": weight.shape[0], "WIDTH": weight.shape[2], "BACK": back, "BIAS": bias is not None,
        "STEPS": steps, "CHANNELS": channels, "num_warps": 1, "enable_fp_fusion": True,
    }  # fmt: skip


def launch_forward(
    x: Tensor,  # [b, L, d]
    weight: Tensor,  # [k, d, w] contiguous
    bias: Tensor | None,  # [k, d] contiguous
    reverse: Sequence[bool],
) -> Tensor:  # [k, b, L, d]
    b, length, d = x.shape
    out = x.new_empty(weight.shape[0], b, length, d)
    channels, steps, _, _ = tuning_of(x.device).conv
    grid = (triton.cdiv(length, steps), b, triton.cdiv(d, channels))
    _conv_forward[grid](
        x, weight, x if bias is None else bias, out, length, x.stride(0), x.stride(1), out.stride(0),
        **_meta(d, weight, bias, reverse, steps, channels),
    )  # fmt: skip
    return out


def launch_backward(
    dout: Tensor,  # [k, b, L, d]
    x: Tensor,  # [b, L, d]
    weight: Tensor,
    bias: Tensor | None,
    reverse: Sequence[bool],
    dx: Tensor,  # [b, L, d], written
) -> Tensor:
    """The weights' gradients [rows, k, w + 1, d], fp32, to be summed over the rows: each tap's, and the bias's."""
    b, length, d = x.shape
    k, _, width = weight.shape
    channels, _, steps, most = tuning_of(x.device).conv
    segments = min(triton.cdiv(length, 4 * steps), most)
    segment = triton.cdiv(triton.cdiv(length, segments), steps) * steps
    partial = x.new_empty(b * segments, k, width + 1, d, dtype=torch.float32)
    _conv_backward[(segments, b, triton.cdiv(d, channels))](
        x, weight, x if bias is None else bias, dout, dx, partial, length, segment,
        x.stride(0), x.stride(1), *dout.stride()[:3], dx.stride(0), dx.stride(1),
        **_meta(d, weight, bias, reverse, steps, channels),
    )  # fmt: skip
    return partial


@torch.library.custom_op("vimfast::causal_conv_silu_triton", mutates_args=())
def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: Sequence[bool]) -> Tensor:
    return launch_forward(_rows(x), weight.contiguous(), None if bias is None else bias.contiguous(), reverse)


@_conv.register_fake
def _(x, weight, bias, reverse):
    return x.new_empty(weight.shape[0], *x.shape)


@torch.library.custom_op("vimfast::causal_conv_silu_triton_backward", mutates_args=())
def _conv_grad(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, reverse: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape)
    contiguous_bias = None if bias is None else bias.contiguous()
    partial = launch_backward(_rows(dout), _rows(x), weight.contiguous(), contiguous_bias, reverse, dx)
    *taps, dbias = sum_rows(partial).to(weight.dtype).unbind(1)
    return dx, torch.stack(taps, -1), dbias.clone()


@_conv_grad.register_fake
def _(dout, x, weight, bias, reverse):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[:2])


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _setup_context(ctx, inputs, output):
    *tensors, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dout):
    x, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = _conv_grad(dout, x, weight, bias, ctx.reverse)
    return dx, dweight, None if bias is None else dbias, None


_conv.register_autograd(_backward, setup_context=_setup_context)


def causal_conv_silu(
    x: Tensor,  # [b, L, d]
    weight: Tensor,  # [k, d, w], one filter for each of the k directions
    bias: Tensor | None = None,  # [k, d]
    *,
    reverse: Sequence[bool] = (False, True),
) -> Tensor:
    """out_{k,t} = silu(bias_k + sum_j weight_{k,j} x_{t-(w-1)+j})  [k, b, L, d]; times t+(w-1)-j where reverse[k].

    bf16, fp16 or fp32 in and out, fp32 inside. x may be a view with any batch and time strides. Deterministic.
    """
    if len(reverse) != weight.shape[0]:
        raise ValueError(f"reverse has {len(reverse)} entries for {weight.shape[0]} directions; give one for each")
    if weight.shape[1] != x.shape[2]:
        raise ValueError(f"weight is for {weight.shape[1]} channels, x has {x.shape[2]}; they must agree")
    return _conv(x, weight, bias, list(reverse))
