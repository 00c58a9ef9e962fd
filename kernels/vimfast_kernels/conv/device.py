"""The kernels of the convolution, in Triton."""

# Device functions are written in Triton's own dialect: no annotations beyond constexpr, no starred tuples.
# ruff: noqa: RET505, RUF005
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,var-annotated"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sigmoid(v):
    """1 / (1 + exp(-v)) as a squared reciprocal root: two special-function instructions and no division."""
    root = tl.math.rsqrt(1.0 + tl.exp(-v))
    return root * root


@triton.jit
def _silu(v, PRECISE: tl.constexpr):
    """v / (1 + exp(-v)): one special-function instruction when bf16's eight bits are all that is kept, else two."""
    if PRECISE:
        return v * _sigmoid(v)
    else:
        half = 0.5 * v
        return half + half * tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [half], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _inside(time, length, mask):
    """The mask where 0 <= time < length, as a vector: Triton's interpreter takes no scalar in a mask."""
    times = tl.where(mask, time, -1)
    return (times >= 0) & (times < length)


@triton.jit
def _load_row(base, time, length, stride, mask):
    return tl.load(base + time * stride, mask=_inside(time, length, mask), other=0.0).to(tl.float32)


@triton.jit
def _load_taps(
    weight_ptr, d, mask, K: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, CHANNEL: tl.constexpr,
    TAP: tl.constexpr,
):  # fmt: skip
    """All taps [direction][tap], each a row of channels; CHANNEL and TAP are their strides."""
    taps = ()
    for k in tl.static_range(K):
        row = ()
        for j in tl.static_range(WIDTH):
            at = weight_ptr + k * D * WIDTH + d * CHANNEL + j * TAP
            row = row + (tl.load(at, mask=mask, other=0.0).to(tl.float32),)
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
def conv_forward(
    x_ptr, weight_ptr, bias_ptr, out_ptr, length, x_batch, x_time, out_dir,
    D: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, BACK: tl.constexpr, BIAS: tl.constexpr,
    STEPS: tl.constexpr, CHANNELS: tl.constexpr, CHANNEL: tl.constexpr, TAP: tl.constexpr, PRECISE: tl.constexpr,
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
    taps = _load_taps(weight_ptr, d, mask, K, WIDTH, D, CHANNEL, TAP)
    for k in tl.static_range(K):
        bias = tl.zeros((CHANNELS,), tl.float32)
        if BIAS:
            bias = tl.load(bias_ptr + k * D + d, mask=mask, other=0.0).to(tl.float32)
        out = out_ptr + k * out_dir + (batch * length + start) * D + d
        for i in tl.static_range(STEPS):
            v = _preactivation(rows, i + HALO, taps[k], bias, WIDTH, (BACK >> k) & 1)
            v = _silu(v, PRECISE)
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
    OWN: tl.constexpr = HALO if BACK else 0  # where the block's own times are in `pre`
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
def conv_backward(
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
    taps = _load_taps(weight_ptr, d, mask, K, WIDTH, D, WIDTH, 1)
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
