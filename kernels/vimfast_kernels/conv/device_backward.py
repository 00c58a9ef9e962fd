"""The convolution's backward kernel for gradients that are a sum with a product, made on the tensor cores, in Gluon.

The taps' arithmetic is that of `device.py`: functions of Gluon and of Triton cannot call each other.
"""

# Device functions are written in Gluon's own dialect, which knows no annotations beyond constexpr, nor starred tuples.
# ruff: noqa: RET505, RUF005
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,var-annotated"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from vimfast_kernels.device import LOG2E, axis, block_barrier, copy_async, view_shared

STEPS = gl.constexpr(8)  # that are worked on at a time; the layouts below are made for 8
SEQUENCES = gl.constexpr(4)  # sequences a program walks side by side: the threads that share a row of a product
HELD_RANK = gl.constexpr(48)  # weights of up to so many rows are held in registers
AT_ONCE = gl.constexpr(4)  # parts of 16 columns of the factors that lie in one array, as many as a power of two


@gluon.jit
def _tanh(v, PRECISE: gl.constexpr):
    """tanh(v), by the special function where bf16's eight bits are all that is kept."""
    if PRECISE:
        return 2.0 * gl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + gl.exp2(-2.0 * LOG2E * v)],
            dtype=gl.float32, is_pure=True, pack=1,
        ) - 1.0  # fmt: skip
    else:
        return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [v], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _load_products(weight_ptr, first, D: gl.constexpr, RANK: gl.constexpr, CHANNELS: gl.constexpr, ACC: gl.constexpr):
    """The weights [RANK, D] at weight_ptr of CHANNELS channels from `first` on, in parts of 16 rows: as left-hand sides
    [CHANNELS, 16] in registers, or where these are too many in shared memory [16, CHANNELS], to be transposed.

    Of each 16 channels the first 8 are the even ones and the others the odd ones, so a thread's two results of a time
    are neighbours.
    """
    IN_REGISTERS: gl.constexpr = RANK <= HELD_RANK
    TILE: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [CHANNELS // 16, 1], [1, 0])
    ROWS: gl.constexpr = gl.SwizzledSharedLayout(8, 1, CHANNELS // 8, order=[1, 0])
    LAYOUT: gl.constexpr = gl.DotOperandLayout(0, ACC, 2) if IN_REGISTERS else TILE
    m = axis(0 if IN_REGISTERS else 1, 0, CHANNELS, LAYOUT)
    channel = first + m // 16 * 16 + m % 8 * 2 + m // 8 % 2
    parts = ()
    for i in gl.static_range((RANK + 15) // 16):
        k = axis(1 if IN_REGISTERS else 0, 16 * i, 16, LAYOUT)
        part = gl.load(weight_ptr + (k * D + channel), mask=k < RANK, other=0.0)
        if not IN_REGISTERS:
            part = gl.allocate_shared_memory(weight_ptr.dtype.element_ty, [16, CHANNELS], ROWS, part)
        parts = parts + (part,)
    return parts


@gluon.jit
def _slots(buffer, first, count: gl.constexpr, ROW: gl.constexpr, PAIR: gl.constexpr):
    """Rows `first` and on of a buffer as fp32, each [SEQUENCES, channels]. bf16 is there as pairs in an int32."""
    rows = ()
    for i in gl.static_range(count):
        if buffer.dtype == gl.int32:
            pair = buffer.index(first + i).load(PAIR)
            low = (pair << 16).to(gl.float32, bitcast=True)
            high = (pair & -65536).to(gl.float32, bitcast=True)
            v = gl.reshape(gl.join(low, high), [SEQUENCES, 2 * pair.shape[1]])
            rows = rows + (gl.convert_layout(v, ROW, assert_trivial=True),)
        else:
            rows = rows + (buffer.index(first + i).load(ROW).to(gl.float32),)
    return rows


@gluon.jit
def _add_product(
    rows, weights, factors, ROW: gl.constexpr, ACC: gl.constexpr, CHANNELS: gl.constexpr, RANK: gl.constexpr
):
    """rows + weights factors: a thread's results are of its own channels, sequence and times, so nothing moves."""
    v = gl.join(
        gl.join(gl.join(rows[0], rows[1]), gl.join(rows[2], rows[3])),
        gl.join(gl.join(rows[4], rows[5]), gl.join(rows[6], rows[7])),
    )
    # (sequence, 16 channels, pair, one of it, time % 2, time / 2 % 2, time / 4) to a row for each channel and a column
    # for each (time / 2, sequence, time % 2)
    v = gl.permute(gl.reshape(v, [SEQUENCES, CHANNELS // 16, 8, 2, 2, 2, 2]), (1, 3, 2, 6, 5, 0, 4))
    acc = gl.convert_layout(gl.reshape(v, [CHANNELS, SEQUENCES * STEPS]), ACC, assert_trivial=True)
    for i in gl.static_range(len(weights)):
        left = weights[i]
        if RANK > HELD_RANK:
            left = left.permute((1, 0)).load(gl.DotOperandLayout(0, ACC, 2))
        acc = mma_v2(left, factors[i], acc)
    v = gl.permute(gl.reshape(acc, [CHANNELS // 16, 2, 8, 2, 2, SEQUENCES, 2]), (5, 0, 2, 1, 6, 4, 3))
    v = gl.reshape(v, [SEQUENCES, CHANNELS, 2, 2, 2])
    low, high = gl.split(v)
    low0, low1 = gl.split(low)
    high0, high1 = gl.split(high)
    r0, r1 = gl.split(low0)
    r2, r3 = gl.split(low1)
    r4, r5 = gl.split(high0)
    r6, r7 = gl.split(high1)
    out = ()
    for r in gl.static_range(STEPS):
        out = out + (gl.convert_layout((r0, r1, r2, r3, r4, r5, r6, r7)[r], ROW, assert_trivial=True),)
    return out


@gluon.jit
def _gradients(
    rows, at: gl.constexpr, count: gl.constexpr, taps, bias, dout, first: gl.constexpr,
    WIDTH: gl.constexpr, BACK: gl.constexpr, PRECISE: gl.constexpr,
):  # fmt: skip
    """Twice the gradients before the activation at rows[at], rows[at + 1], ... for dout[first], ...; taps and bias are
    halved. With h half of the value before the activation and t = tanh(h), 2 silu' = 1 + t + h (1 - t^2)."""
    out = ()
    for i in gl.static_range(count):
        h = bias
        for j in gl.static_range(WIDTH):
            h += taps[j] * rows[at + i + (WIDTH - 1 - j if BACK else j - WIDTH + 1)]
        t = _tanh(h, PRECISE)
        slope = h * (1.0 - t * t) + t
        out = out + (dout[first + i] * slope + dout[first + i],)
    return out


@gluon.jit
def _add_direction(rows, pre, dx, sums, taps, WIDTH: gl.constexpr, BACK: gl.constexpr):
    """(dx [STEPS], sums [WIDTH + 1]) with one direction's share added. rows start WIDTH - 1 before the block; so do
    the gradients `pre` where BACK, else they end WIDTH - 1 after it."""
    HALO: gl.constexpr = WIDTH - 1
    OWN: gl.constexpr = HALO if BACK else 0  # where the block's own times are in `pre`
    new_dx = ()
    for i in gl.static_range(STEPS):
        total = dx[i]
        for j in gl.static_range(WIDTH):
            total += taps[j] * pre[i + (j if BACK else HALO - j)]
        new_dx = new_dx + (total,)
    new_sums = ()
    for j in gl.static_range(WIDTH):
        total = sums[j]
        for i in gl.static_range(STEPS):
            total += pre[i + OWN] * rows[i + HALO + (HALO - j if BACK else j - HALO)]
        new_sums = new_sums + (total,)
    total = sums[WIDTH]
    for i in gl.static_range(STEPS):
        total += pre[i + OWN]
    return new_dx, new_sums + (total,)


@gluon.jit
def _take(rows, first: gl.constexpr, count: gl.constexpr):
    out = ()
    for i in gl.static_range(count):
        out = out + (rows[first + i],)
    return out


@gluon.jit
def _copy_block(
    buffers, stage, bases, times, ends, start, X_TIME: gl.constexpr, DOUT_TIME: gl.constexpr,
    FACTOR_TIME: gl.constexpr, FIRST: gl.constexpr,
):  # fmt: skip
    """Starts copying what the block of times from `start` on needs besides what the block before it leaves; zeros for
    times that are not there."""
    strides = (X_TIME, DOUT_TIME, FACTOR_TIME, FACTOR_TIME)
    for i in gl.static_range(len(buffers)):
        time = start + times[i]
        mask = (time >= 0) & (time < ends[i]) if FIRST else time < ends[i]
        copy_async(buffers[i].index(stage), bases[i] + time * strides[i], mask=mask)


@gluon.jit
def _later(k, K: gl.constexpr, BACK: gl.constexpr, HALO: gl.constexpr):
    """How much later than a block the last gradients are that it needs of direction k."""
    later = k * 0
    for i in gl.static_range(K):
        later = gl.where(k == i, 0 if (BACK >> i) & 1 else HALO, later)
    return later


@gluon.jit
def _factor_array(
    factor_ptr, i: gl.constexpr, batch, sequences, length, factor_dir, factor_batch,
    K: gl.constexpr, BACK: gl.constexpr, HALO: gl.constexpr, RANK: gl.constexpr, STAGES: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """Shared memory for the i-th AT_ONCE parts of the factors' columns, [stage, direction and part, (time / 2,
    sequence, time % 2), 16], and for `_copy_block` its view, addresses, times and ends."""
    PARTS: gl.constexpr = (RANK + 15) // 16 - AT_ONCE * i
    SLOTS: gl.constexpr = 1 if PARTS == 1 else 2 if PARTS == 2 else AT_ONCE
    COLUMNS: gl.constexpr = SEQUENCES * STEPS
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1, 8], [SLOTS, 16 // SLOTS, 2], [1, WARPS, 1], [2, 0, 1])
    # The rows of a product's eight factors, 16 bytes each, lie in different banks.
    ROWS: gl.constexpr = gl.SwizzledSharedLayout(8, 4, 2, order=[1, 0])
    BLOCK: gl.constexpr = gl.SwizzledSharedLayout(8, 4, 2, order=[2, 1, 0])
    ELEM: gl.constexpr = factor_ptr.dtype.element_ty
    array = gl.allocate_shared_memory(ELEM, [STAGES * K * SLOTS, COLUMNS, 16], ROWS)
    column = axis(1, 0, COLUMNS, LAYOUT)
    sequence = batch + column // 2 % SEQUENCES
    part = axis(0, 0, K * SLOTS, LAYOUT)
    direction = part // SLOTS
    row = sequence.to(gl.int64) * factor_batch + direction.to(gl.int64) * factor_dir
    rank = (AT_ONCE * i + part % SLOTS) * 16 + axis(2, 0, 16, LAYOUT)
    base = factor_ptr + gl.multiple_of(row, [8, 8, 8]) + rank
    time = column // (2 * SEQUENCES) * 2 + column % 2 + _later(direction, K, BACK, HALO)
    end = gl.where((sequence < sequences) & (rank < RANK), length, 0)
    return array, view_shared(array, ELEM, [STAGES, K * SLOTS, COLUMNS, 16], BLOCK), base, time, end


@gluon.jit
def _load_factors(
    array, i: gl.constexpr, stage, k: gl.constexpr, ACC: gl.constexpr, RANK: gl.constexpr, K: gl.constexpr
):
    """Of direction k, from the i-th array: right-hand sides [16, times and sequences]."""
    PARTS: gl.constexpr = (RANK + 15) // 16 - AT_ONCE * i
    SLOTS: gl.constexpr = 1 if PARTS == 1 else 2 if PARTS == 2 else AT_ONCE
    factors = ()
    for j in gl.static_range(min(PARTS, SLOTS)):
        part = array.index((stage * K + k) * SLOTS + j).permute((1, 0))
        factors = factors + (part.load(gl.DotOperandLayout(1, ACC, 2)),)
    return factors


@gluon.jit
def _dout(
    s_dout, s_factors, weights, stage, k: gl.constexpr, ROW: gl.constexpr, PAIR: gl.constexpr, ACC: gl.constexpr,
    RANK: gl.constexpr, K: gl.constexpr, CHANNELS: gl.constexpr,
):  # fmt: skip
    """The gradients of direction k at a block's times."""
    rows = _slots(s_dout, (stage * K + k) * STEPS, STEPS, ROW, PAIR)
    if RANK:
        factors = ()
        for i in gl.static_range(len(s_factors)):
            factors = factors + _load_factors(s_factors[i], i, stage, k, ACC, RANK, K)
        rows = _add_product(rows, weights, factors, ROW, ACC, CHANNELS, RANK)
    return rows


@gluon.jit(do_not_specialize=["sequences", "length", "segment"])
def conv_backward_of_sum(
    x_ptr, taps_ptr, bias_ptr, dout_ptr, factor_ptr, product_ptr, dx_ptr, partial_ptr, sequences, length, segment,
    x_batch, dout_dir, dout_batch, factor_dir, factor_batch, dx_batch,
    X_TIME: gl.constexpr, DOUT_TIME: gl.constexpr, FACTOR_TIME: gl.constexpr, DX_TIME: gl.constexpr,
    D: gl.constexpr, K: gl.constexpr, WIDTH: gl.constexpr, BACK: gl.constexpr, BIAS: gl.constexpr,
    RANK: gl.constexpr, CHANNELS: gl.constexpr, STAGES: gl.constexpr, PRECISE: gl.constexpr,
):  # fmt: skip
    # As the kernel in Triton, for the gradient dout + factor product, with product [K, RANK, D]. A program walks
    # `segment` times of 4 sequences for CHANNELS channels; a thread has two channels of one sequence, a warp 16.
    HALO: gl.constexpr = WIDTH - 1
    WARPS: gl.constexpr = CHANNELS // 16
    ELEM: gl.constexpr = x_ptr.dtype.element_ty
    ROW: gl.constexpr = gl.BlockedLayout([1, 2], [4, 8], [1, WARPS], [0, 1])
    PAIR: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [1, WARPS], [0, 1])
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, 8])
    COPY: gl.constexpr = gl.BlockedLayout([1, 1, 8], [64 // CHANNELS, 4, CHANNELS // 8], [WARPS, 1, 1], [2, 1, 0])
    # No two of the four rows that a warp reads at once, 32 bytes each, lie in the same banks.
    ROWS: gl.constexpr = gl.SwizzledSharedLayout(16, 64 // CHANNELS, CHANNELS // 16, order=[1, 0])
    BLOCK: gl.constexpr = gl.SwizzledSharedLayout(16, 64 // CHANNELS, CHANNELS // 16, order=[2, 1, 0])
    PAIRS: gl.constexpr = gl.SwizzledSharedLayout(8, 64 // CHANNELS, CHANNELS // 16, order=[1, 0])

    first = gl.program_id(2) * CHANNELS
    batch = gl.program_id(1) * SEQUENCES
    begin = gl.program_id(0) * segment
    own_sequence = axis(0, batch, SEQUENCES, ROW)
    channel = axis(1, first, CHANNELS, ROW)

    s_x = gl.allocate_shared_memory(ELEM, [STAGES * STEPS, SEQUENCES, CHANNELS], ROWS)
    s_dout = gl.allocate_shared_memory(ELEM, [STAGES * K * STEPS, SEQUENCES, CHANNELS], ROWS)
    x_blocks = view_shared(s_x, ELEM, [STAGES, STEPS, SEQUENCES, CHANNELS], BLOCK)
    dout_blocks = view_shared(s_dout, ELEM, [STAGES, K * STEPS, SEQUENCES, CHANNELS], BLOCK)
    if ELEM.is_bf16():
        s_x = view_shared(s_x, gl.int32, [STAGES * STEPS, SEQUENCES, CHANNELS // 2], PAIRS)
        s_dout = view_shared(s_dout, gl.int32, [STAGES * K * STEPS, SEQUENCES, CHANNELS // 2], PAIRS)
    copy_batch = axis(1, batch, SEQUENCES, COPY)
    copy_channel = axis(2, first, CHANNELS, COPY)
    step = axis(0, 0, STEPS, COPY)
    row = axis(0, 0, K * STEPS, COPY)
    copy_end = gl.where(copy_batch < sequences, length, 0)
    buffers = (x_blocks, dout_blocks)
    bases = (
        x_ptr + copy_batch.to(gl.int64) * x_batch + copy_channel,
        dout_ptr + copy_batch.to(gl.int64) * dout_batch + (row // STEPS).to(gl.int64) * dout_dir + copy_channel,
    )
    times = (step + HALO, row % STEPS + _later(row // STEPS, K, BACK, HALO))
    ends = (copy_end, copy_end)
    s_factors = ()
    for i in gl.static_range((RANK + 16 * AT_ONCE - 1) // (16 * AT_ONCE)):
        array, blocks, base, time, end = _factor_array(
            factor_ptr, i, batch, sequences, length, factor_dir, factor_batch, K, BACK, HALO, RANK, STAGES, WARPS
        )
        s_factors = s_factors + (array,)
        buffers = buffers + (blocks,)
        bases = bases + (base,)
        times = times + (time,)
        ends = ends + (end,)
    # Block -1 only leaves what block 0 shares with it. The next STAGES - 1 blocks are always on their way.
    for c in gl.static_range(STAGES):
        start = begin + (c - 1) * STEPS
        _copy_block(buffers, c, bases, times, ends, start, X_TIME, DOUT_TIME, FACTOR_TIME, c == 0)
        async_copy.commit_group()
    zero = gl.zeros([SEQUENCES, CHANNELS], gl.float32, ROW)
    zeros = ()
    for _ in gl.static_range(WIDTH + 1):
        zeros = zeros + (zero,)
    products = ()
    taps = ()
    biases = ()
    sums = ()
    for k in gl.static_range(K):
        row = ()
        for j in gl.static_range(WIDTH):
            row = row + (0.5 * gl.load(taps_ptr + ((k * D + channel) * WIDTH + j)).to(gl.float32),)
        taps = taps + (row,)
        bias = zero
        if BIAS:
            bias += 0.5 * gl.load(bias_ptr + (k * D + channel)).to(gl.float32)
        biases = biases + (bias,)
        sums = sums + (zeros,)
        weights = ()
        if RANK:
            weights = _load_products(product_ptr + k * RANK * D, first, D, RANK, CHANNELS, ACC)
        products = products + (weights,)

    async_copy.wait_group(STAGES - 1)
    block_barrier()
    window = _slots(s_x, STEPS - 2 * HALO, 2 * HALO, ROW, PAIR)
    shared = ()
    for k in gl.static_range(K):
        dout = _dout(s_dout, s_factors, products[k], 0, k, ROW, PAIR, ACC, RANK, K, CHANNELS)
        shared = shared + (
            _gradients(
                window, 0 if (BACK >> k) & 1 else HALO, HALO, taps[k], biases[k], dout, STEPS - HALO,
                WIDTH, (BACK >> k) & 1, PRECISE,
            ),
        )  # fmt: skip

    dx_base = dx_ptr + own_sequence.to(gl.int64) * dx_batch + channel
    own_there = own_sequence < sequences
    end = gl.where(own_there, length, 0)
    blocks = gl.cdiv(gl.minimum(segment, length - begin), STEPS)
    stage = 0
    for c in range(blocks):
        async_copy.wait_group(STAGES - 2)
        block_barrier()
        start = begin + c * STEPS
        if c + STAGES - 1 < blocks:
            later = start + (STAGES - 1) * STEPS
            _copy_block(buffers, stage, bases, times, ends, later, X_TIME, DOUT_TIME, FACTOR_TIME, False)
        async_copy.commit_group()
        stage = gl.where(stage == STAGES - 1, 0, stage + 1)
        rows = window + _slots(s_x, stage * STEPS, STEPS, ROW, PAIR)
        dx = ()
        for _ in gl.static_range(STEPS):
            dx = dx + (zero,)
        new_sums = ()
        new_shared = ()
        for k in gl.static_range(K):
            dout = _dout(s_dout, s_factors, products[k], stage, k, ROW, PAIR, ACC, RANK, K, CHANNELS)
            pre = shared[k] + _gradients(
                rows, HALO if (BACK >> k) & 1 else 2 * HALO, STEPS, taps[k], biases[k], dout, 0,
                WIDTH, (BACK >> k) & 1, PRECISE,
            )  # fmt: skip
            dx, own = _add_direction(rows, pre, dx, sums[k], taps[k], WIDTH, (BACK >> k) & 1)
            new_sums = new_sums + (own,)
            new_shared = new_shared + (_take(pre, STEPS, HALO),)
        sums = new_sums
        shared = new_shared
        window = _take(rows, STEPS, 2 * HALO)
        dx_block = dx_base + start * DX_TIME
        for i in gl.static_range(STEPS):
            gl.store(dx_block + i * DX_TIME, dx[i].to(ELEM), mask=start + i < end)

    at = partial_ptr + (own_sequence * gl.num_programs(0) + gl.program_id(0)) * (K * (WIDTH + 1) * D) + channel
    for k in gl.static_range(K):
        for j in gl.static_range(WIDTH + 1):
            gl.store(at + (k * (WIDTH + 1) + j) * D, 0.5 * sums[k][j], mask=own_there)
