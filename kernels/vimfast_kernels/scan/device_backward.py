"""The backward kernels of the bidirectional selective scan: the adjoint in Gluon, the sums over programs in Triton."""

# Device functions are written in Triton's and Gluon's own dialects, which know neither annotations beyond
# constexpr nor starred tuples; an `if` on a constexpr needs its `else`.
# ruff: noqa: RET505, RUF005
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc,var-annotated"
from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from vimfast_kernels.device import (
    LN2,
    LOG2E,
    axis,
    block_barrier,
    copy_async,
    copy_rows,
    load_rows,
    one_minus_exp_neg,
    rounded_product,
    sigmoid,
    softplus_in_ln2,
    time_of,
    view_shared,
)
from vimfast_kernels.scan.device_steps import hold_weights, time_steps


@gluon.jit
def _copy_chunk(
    copies, bases, strides, c, rows, direction, length, gate_steps, mask, low_k,
    CHUNK: gl.constexpr, RANK: gl.constexpr, GATE: gl.constexpr,
):  # fmt: skip
    """x, dout, dt or its factors, z and, where this direction makes dz, y of one chunk; x is needed to the chunk's very
    end, so it has two buffers."""
    step = c * CHUNK + rows[0]
    copy_rows(copies[0].index(c % 2), bases[0], step, direction, length, strides[0], mask)
    copy_rows(copies[1], bases[1], step, direction, length, strides[1], mask)
    if RANK:
        time = time_of(gl.minimum(c * CHUNK + rows[1], length - 1), direction, length)
        factors = bases[2] + gl.multiple_of(time * strides[2], [8, 8, 8])
        for i in gl.static_range(len(copies[2])):
            copy_async(copies[2][i], factors + 16 * i, mask=low_k < RANK - 16 * i)
    else:
        copy_rows(copies[2], bases[2], step, direction, length, strides[2], mask)
    if GATE:
        copy_rows(copies[3], bases[3], step, direction, length, strides[3], mask)
        copy_rows(copies[4], bases[4], step, direction, length, strides[4], mask & (step < gate_steps))
    async_copy.commit_group()


@gluon.jit
def _split(v):
    """v as a sum of two: what a tf32 product reads of v, and what it cuts off."""
    high = (v.to(gl.int32, bitcast=True) & -8192).to(gl.float32, bitcast=True)
    return high, v - high


@gluon.jit
def _sum_lanes(v, CPT: gl.constexpr, N_LANES: gl.constexpr, VEC: gl.constexpr, WARPS: gl.constexpr):
    """Sums of v [BD, 16] over the channels of lanes 4i .. 4i + 3  [16 states, 8 WARPS].

    Tensor core products with a 0/1 matrix: each lane's values stay where they are, the reshapes rename registers.
    High and low parts are summed apart, since two short chains of products run side by side.
    """
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, WARPS], instr_shape=[16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC, 1)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, ACC, 1)
    K: gl.constexpr = 64 // N_LANES
    if CPT == 2:
        v = gl.sum(gl.reshape(v, [32 // N_LANES * WARPS, 2, 16]), 1)
    v = gl.reshape(v, [WARPS, 8, 4 // N_LANES, 16 // N_LANES // VEC, N_LANES, VEC])
    v = gl.reshape(gl.permute(v, (3, 5, 2, 4, 0, 1)), [K, 8 * WARPS])
    v = gl.convert_layout(v, RIGHT, assert_trivial=True)
    m = gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(1, LEFT)), 1)
    k = gl.expand_dims(gl.arange(0, K, gl.SliceLayout(0, LEFT)), 0)
    pick = gl.where(m == k % N_LANES * (16 // N_LANES) + k // 4, 1.0, 0.0)
    zero = gl.zeros([16, 8 * WARPS], gl.float32, ACC)
    high, low = _split(v)
    low = mma_v2(pick, low, zero, input_precision="tf32")
    return low + mma_v2(pick, high, zero, input_precision="tf32")


@gluon.jit
def _sum_warps(steps, N_LANES: gl.constexpr, VEC: gl.constexpr, WARPS: gl.constexpr):
    """Sums over each warp of what `_sum_lanes` gave for four steps  [WARPS, 4, 16 states].

    Of the eight sums that are left, the even and the odd ones are added by another product of this kind, in rows
    0 .. 7 and 8 .. 15; a step has two columns, for states 0 .. 7 and 8 .. 15.
    """
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC, 1)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, ACC, 1)
    v = gl.join(gl.join(steps[0], steps[1]), gl.join(steps[2], steps[3]))
    # (state / 8, state % 8, warp, lane / 8, lane / 4 % 2, step % 2, step / 2)
    v = gl.permute(gl.reshape(v, [2, 8, WARPS, 4, 2, 2, 2]), (2, 4, 1, 6, 5, 0, 3))
    v = gl.convert_layout(gl.reshape(v, [16 * WARPS, 32]), LEFT, assert_trivial=True)
    k = gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(1, RIGHT)), 1)
    column = gl.expand_dims(gl.arange(0, 8, gl.SliceLayout(0, RIGHT)), 0)
    pick = gl.where(column == k // 4, 1.0, 0.0)
    zero = gl.zeros([16 * WARPS, 8], gl.float32, ACC)
    high, low = _split(v)
    acc = mma_v2(low, pick, zero, input_precision="tf32")
    acc += mma_v2(high, pick, zero, input_precision="tf32")
    acc = gl.sum(gl.reshape(acc, [WARPS, 2, 8, 4, 2]), 1)
    acc = gl.reshape(gl.permute(acc, (0, 2, 3, 1)), [WARPS, 4, N_LANES, 16 // N_LANES // VEC, VEC])
    return gl.reshape(gl.permute(acc, (0, 1, 3, 2, 4)), [WARPS, 4, 16])


@gluon.jit
def _columns(v, CPT: gl.constexpr, ACC: gl.constexpr, SPLIT: gl.constexpr):
    """v [4 steps, WARPS, channels] as bf16 right-hand sides  [WARPS, channels, 8 = (step, high or low part)].

    v is the sum of both parts; channels are in the history's order.
    """
    WARPS: gl.constexpr = v.shape[1]
    WIDTH: gl.constexpr = v.shape[2]
    v = gl.expand_dims(v, 1)
    high = (v.to(gl.int32, bitcast=True) & -65536).to(gl.float32, bitcast=True)
    part = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, SPLIT))))
    part = gl.expand_dims(gl.expand_dims(gl.expand_dims(part, 0), 2), 3)
    v = gl.where(part == 0, high, v - high).to(gl.bfloat16)
    v = gl.permute(gl.reshape(v, [4, 2, WARPS, WIDTH // CPT, CPT]), (2, 4, 3, 0, 1))
    return gl.convert_layout(gl.reshape(v, [WARPS, WIDTH, 8]), gl.DotOperandLayout(1, ACC, 2), assert_trivial=True)


@gluon.jit
def _sum_history(
    s_h, columns, first: gl.constexpr, UNROLL: gl.constexpr, ACC: gl.constexpr, ROWS: gl.constexpr, N: gl.constexpr
):
    """Sums over each warp's channels of slots first .. first + 3 of the history times v of four steps, which `_columns`
    gave  [WARPS, 4 steps, N].

    Every slot meets the columns of all four steps: a product has eight in any case, and they are loaded but once.
    """
    WARPS: gl.constexpr = columns.shape[0]
    WIDTH: gl.constexpr = columns.shape[1]
    step = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, ACC))) // 2
    step = gl.expand_dims(gl.expand_dims(step, 0), 1)
    zero = gl.zeros([WARPS, N, 8], gl.float32, ACC)
    sums = zero
    for i in gl.static_range(4):  # no chain: the tensor cores have four products to work on
        slot = s_h[(first + i) % UNROLL].index((first + i) // UNROLL)
        slot = view_shared(slot, gl.bfloat16, [WARPS, WIDTH, N], ROWS).permute((0, 2, 1))
        product = mma_v2(slot.load(gl.DotOperandLayout(0, ACC, 2)), columns, zero)
        sums = gl.where(step == i, product, sums)
    return gl.permute(gl.sum(gl.reshape(sums, [WARPS, N, 4, 2]), 3), (0, 2, 1))


@gluon.jit
def _states(held, STATE: gl.constexpr, BD: gl.constexpr, N: gl.constexpr):
    """fp32 states [BD, N] of a thread's rows as they lie in memory; bf16 ones are there as pairs in an int32."""
    if held.dtype == gl.int32:
        low = (held << 16).to(gl.float32, bitcast=True)
        high = (held & -65536).to(gl.float32, bitcast=True)
        held = gl.join(low, high)
    return gl.convert_layout(gl.reshape(held, [BD, N]), STATE, assert_trivial=True)


@gluon.jit
def _by_channel(v, WARPS: gl.constexpr, LANE_ROWS: gl.constexpr, CPT: gl.constexpr, N: gl.constexpr):
    """States in the history's order: a warp's threads' first channels before their second ones."""
    return gl.permute(gl.reshape(v, [WARPS, LANE_ROWS, CPT, N]), (0, 2, 1, 3))


@gluon.jit
def _own(v, BD: gl.constexpr, WARPS: gl.constexpr, TWO_LANES: gl.constexpr):
    """Where two lanes hold the same two channels, each lane keeps one of them."""
    if TWO_LANES:
        LANES: gl.constexpr = gl.BlockedLayout([1, 1], [16, 2], [WARPS, 1], [1, 0])
        PAIR: gl.constexpr = gl.SliceLayout(1, LANES)
        first, second = gl.split(gl.reshape(v, [BD // 2, 2]))
        first = gl.expand_dims(gl.convert_layout(first, PAIR, assert_trivial=True), 1)
        second = gl.expand_dims(gl.convert_layout(second, PAIR, assert_trivial=True), 1)
        lane = gl.expand_dims(gl.arange(0, 2, gl.SliceLayout(0, LANES)), 0)
        OWN: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
        return gl.convert_layout(gl.reshape(gl.where(lane == 0, first, second), [BD]), OWN, assert_trivial=True)
    else:
        return v


@gluon.jit
def _to_half(v):
    """(fp16 w, fp32 powers of two s [rows]) of fp32 v [rows, columns], with v = s w: a row's largest magnitude lies
    between 2^14 and 2^15 in w.

    s is normal, and so is 1 / s: below 2^-112, w is smaller. What is 2^29 times smaller than its row's largest loses
    bits. NaN and infinities, as bits the largest of all, stay what they are.
    """
    largest = gl.max(v.to(gl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    exponent = gl.minimum(gl.maximum(largest & 0x7F800000, 15 << 23), 254 << 23) - (14 << 23)
    inverse = ((254 << 23) - exponent).to(gl.float32, bitcast=True)
    return (v * gl.expand_dims(inverse, 1)).to(gl.float16), exponent.to(gl.float32, bitcast=True)


@gluon.jit(do_not_specialize=["length"])
def scan_backward(
    x_ptr, dt_ptr, w_ptr, b_ptr, c_ptr, z_ptr, a_ptr, skip_ptr, bias_ptr, y_ptr, state_ptr, dout_ptr,
    dx_ptr, ddt_ptr, dz_ptr, out_ptr, dbc_ptr, dscale_ptr, dparam_ptr,
    length, scale,
    x_dir, x_batch, x_time, dt_dir, dt_batch, dt_time, b_dir, b_batch, b_time, c_dir, c_batch, c_time,
    z_batch, z_time, dout_batch, dout_time, dz_batch, dz_time, out_batch, out_time,
    D: gl.constexpr, N: gl.constexpr, DIRS: gl.constexpr, BD: gl.constexpr, CHUNK: gl.constexpr,
    UNROLL: gl.constexpr, PRODUCTS: gl.constexpr, RANK: gl.constexpr, FLIP: gl.constexpr, GATE: gl.constexpr,
    OUT: gl.constexpr, PRECISE: gl.constexpr, PER_THREAD: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    # dt and w are as in forward.
    KEEP: gl.constexpr = state_ptr.dtype.element_ty
    ELEM: gl.constexpr = x_ptr.dtype.element_ty
    WIDTH: gl.constexpr = BD // WARPS  # channels a warp
    N_LANES: gl.constexpr = N // PER_THREAD
    CPT: gl.constexpr = WIDTH * N_LANES // 32
    TWO_LANES: gl.constexpr = N_LANES == 2 and CPT == 2
    SVEC: gl.constexpr = min(128 // KEEP.primitive_bitwidth, PER_THREAD)  # 16 bytes of states
    STATE: gl.constexpr = gl.BlockedLayout([CPT, SVEC], [32 // N_LANES, N_LANES], [WARPS, 1], [1, 0])
    CHANNEL: gl.constexpr = gl.SliceLayout(1, STATE)
    OWN: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0]) if TWO_LANES else CHANNEL
    BC_ROW: gl.constexpr = gl.SliceLayout(0, STATE)
    TILE: gl.constexpr = gl.BlockedLayout([1, 4], [128 // WIDTH, WIDTH // 4], [1, WARPS], [1, 0])
    VEC: gl.constexpr = 128 // ELEM.primitive_bitwidth
    COPY: gl.constexpr = gl.BlockedLayout([1, VEC], [32 * VEC // WIDTH, WIDTH // VEC], [1, WARPS], [1, 0])
    BC_VEC: gl.constexpr = 4 // WARPS
    BC_TILE: gl.constexpr = gl.BlockedLayout([1, BC_VEC], [32 * BC_VEC // N, N // BC_VEC], [WARPS, 1], [1, 0])
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
    PAIRS: gl.constexpr = 32 // KEEP.primitive_bitwidth
    # Sums over channels by tensor cores; as PRODUCTS with the history itself where it is bf16
    TENSOR_CORES: gl.constexpr = N == 16
    gl.static_assert(not PRODUCTS or (TENSOR_CORES and PAIRS == 2))
    # History of states, a thread's first channels before its second ones; stirred so that neither threads, 16 bytes at
    # a time, nor the tensor cores' loads, 8 channels at a time, meet a bank twice.
    HELD_TYPE: gl.constexpr = gl.int32 if PAIRS == 2 else KEEP
    LANE_ROWS: gl.constexpr = 32 // N_LANES
    HELD_HISTORY: gl.constexpr = gl.BlockedLayout(
        [1, 1, 1, SVEC // PAIRS], [1, 1, LANE_ROWS, N_LANES], [WARPS, 1, 1, 1], [3, 2, 1, 0]
    )
    ROW_BYTES: gl.constexpr = N * KEEP.primitive_bitwidth // 8
    SAME_BANKS: gl.constexpr = 1 if PRODUCTS else N_LANES
    PHASES: gl.constexpr = min(8, ROW_BYTES // 16) // SAME_BANKS
    ROWS_A_PHASE: gl.constexpr = max(1, 128 // ROW_BYTES)
    HISTORY: gl.constexpr = gl.SwizzledSharedLayout(SVEC * SAME_BANKS, ROWS_A_PHASE, PHASES, order=[3, 2, 1, 0])
    HISTORY_WORDS: gl.constexpr = gl.SwizzledSharedLayout(
        SVEC * SAME_BANKS // PAIRS, ROWS_A_PHASE, PHASES, order=[3, 2, 1, 0]
    )
    WORDS: gl.constexpr = [WARPS, CPT, LANE_ROWS, N // PAIRS]
    # A slot is written after it is read, with a barrier between: one for so many steps. What they need of other rows is
    # read before it too, or the first of them would wait for shared memory.
    AHEAD: gl.constexpr = min(2, UNROLL) if PRODUCTS else 1
    # Slots at one step % UNROLL, and a last one: of the state after the chunk, which the products for dC also take, and
    # then of that before the next chunk, on its way while the sweep goes back.
    SLOTS: gl.constexpr = [CHUNK // UNROLL + 1, CHUNK // UNROLL]
    HISTORY_ROWS: gl.constexpr = gl.SwizzledSharedLayout(SVEC, ROWS_A_PHASE, PHASES, order=[2, 1, 0])
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8])
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, ACC, 2)
    SPLIT: gl.constexpr = gl.BlockedLayout([1, 1, 1, 2 * CPT], [4, 2, 1, 4], [1, 1, WARPS, 1], [3, 1, 0, 2])
    STEPS: gl.constexpr = gl.SliceLayout(1, SPLIT)
    GROUP: gl.constexpr = 4 if TENSOR_CORES else 1  # steps whose sums over channels are made together
    gl.static_assert(PRODUCTS or UNROLL % GROUP == 0)  # else sums would be lost
    SUM: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[2, 1, 0])
    SUM_ALL: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[4, 3, 2, 1, 0])
    GROUPS: gl.constexpr = CHUNK // GROUP
    BY_WARP: gl.constexpr = [GROUPS, GROUP, WARPS, WIDTH]
    BY_WARP_X: gl.constexpr = [2 * GROUPS, GROUP, WARPS, WIDTH]
    # dB's sums, then dC's; a warp takes whole groups of steps, a thread four states.
    SUM_TILE: gl.constexpr = gl.BlockedLayout(
        [1, 1, WARPS, 1, 4], [2, 64 // N // GROUP, 1, GROUP, N // 4], [1, WARPS, 1, 1, 1], [4, 0, 3, 1, 2]
    )
    SUM_ROWS: gl.constexpr = gl.BlockedLayout([1, 4], [64 // N, N // 2], [WARPS, 1], [1, 0])
    # The factors of the time steps, 16 columns at a time; no two of the eight rows read at once lie in the same banks.
    LOW: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 16, 2], [WARPS, 1, 1], [2, 1, 0])
    LOW_ROWS: gl.constexpr = gl.SwizzledSharedLayout(8, 4, 2, order=[2, 1, 0])

    batch = gl.program_id(1)
    dr = gl.program_id(2)
    walk = dr + FLIP
    first = gl.program_id(0) * BD
    batch64 = batch.to(gl.int64)
    dr64 = dr.to(gl.int64)
    line = dr64 * gl.num_programs(1) + batch64  # which sequence of the stack

    # Indices in the layouts: (channel, state) and (step, channel or state)
    channel = axis(0, first, BD, STATE)
    state_off = channel * N + axis(1, 0, N, STATE)
    state_mask = channel < D
    a = gl.load(a_ptr + dr * (D * N) + state_off, mask=state_mask, other=0.0) * LOG2E
    tile_row = axis(0, 0, CHUNK, TILE)
    tile_ch = axis(1, first, BD, TILE)
    tile_mask = tile_ch < D
    own_ch = first + gl.arange(0, BD, OWN)
    own_mask = own_ch < D
    skip = gl.load(skip_ptr + dr * D + own_ch, mask=own_mask, other=0.0)
    low_row = axis(1, 0, CHUNK, LOW)
    low_k = axis(2, 0, 16, LOW)
    if RANK:
        weights = hold_weights(w_ptr + dr * (D * RANK), first, D, RANK, WARPS, WIDTH, WIDTH, WIDTH)
        low_base = dt_ptr + gl.multiple_of(dr64 * dt_dir + batch64 * dt_batch, 8) + low_k
        s_low = ()
        for _ in gl.static_range((RANK + 15) // 16):
            s_low = s_low + (gl.allocate_shared_memory(ELEM, [1, CHUNK, 16], LOW_ROWS),)
        own_row = axis(2, 0, CHUNK, ACC)
        bias_ch = first + axis(0, 0, WARPS, ACC) * WIDTH + axis(1, 0, WIDTH, ACC)
    else:
        bias_ch = tile_ch
    bias = gl.load(bias_ptr + dr * D + bias_ch, mask=bias_ch < D, other=0.0) * LOG2E
    copy_row = axis(0, 0, CHUNK, COPY)
    copy_ch = axis(1, first, BD, COPY)
    copy_mask = copy_ch < D
    bc_row = axis(0, 0, CHUNK, BC_TILE)
    bc_n = axis(1, 0, N, BC_TILE)

    # Kept states in the history's order, in words
    CHANNELS: gl.constexpr = gl.SliceLayout(3, HELD_HISTORY)
    kept_ch = axis(0, 0, WARPS, CHANNELS) * WIDTH + axis(2, 0, LANE_ROWS, CHANNELS) * CPT + axis(1, 0, CPT, CHANNELS)
    kept_ch = gl.expand_dims(kept_ch, 3)
    kept_mask = first + kept_ch < D
    word = gl.expand_dims(axis(2, 0, N // PAIRS, gl.SliceLayout(0, HELD_HISTORY)), 0)
    kept_at = kept_ch * (N // PAIRS) + word
    KEPT_CHUNK: gl.constexpr = D * N // PAIRS

    x_base = x_ptr + dr64 * x_dir + batch64 * x_batch + copy_ch
    dt_base = low_base if RANK else dt_ptr + dr64 * dt_dir + batch64 * dt_batch + copy_ch
    b_base = b_ptr + dr64 * b_dir + batch64 * b_batch + bc_n
    c_base = c_ptr + dr64 * c_dir + batch64 * c_batch + bc_n
    z_base = z_ptr + batch64 * z_batch + copy_ch
    y_base = y_ptr + batch64 * length * D + copy_ch
    dout_base = dout_ptr + batch64 * dout_batch + copy_ch
    dx_base = dx_ptr + line * length * D + own_ch
    ddt_base = ddt_ptr + line * length * D + own_ch
    dz_base = dz_ptr + batch64 * dz_batch + tile_ch
    out_base = out_ptr + batch64 * out_batch + tile_ch
    # Partial sums of dB and dC, one row for each block of channels
    SCALED: gl.constexpr = dbc_ptr.dtype.element_ty == gl.float16
    sums_at = (gl.program_id(0) * DIRS * gl.num_programs(1) + line) * length
    chunks = gl.cdiv(length, CHUNK)
    state_at = state_ptr + (line * chunks * D + first) * N
    # The gate's gradient needs the sum of both directions, which forward kept: each direction does its half.
    gate_steps = length if DIRS == 1 else (length + 1 - dr) // 2

    s_x = gl.allocate_shared_memory(ELEM, [2 * CHUNK, BD], LINE)
    s_x3 = view_shared(s_x, ELEM, [2, CHUNK, BD], FLAT)
    if not RANK:
        s_dt = gl.allocate_shared_memory(ELEM, [CHUNK, BD], FLAT)
    s_z = gl.allocate_shared_memory(ELEM, [CHUNK, BD], FLAT)
    s_dout = gl.allocate_shared_memory(ELEM, [CHUNK, BD], FLAT)
    s_yin = gl.allocate_shared_memory(ELEM, [CHUNK, BD], FLAT)
    s_b = gl.allocate_shared_memory(gl.float32, [CHUNK, N], LINE)
    s_c = gl.allocate_shared_memory(gl.float32, [CHUNK, N], LINE)
    s_delta = gl.allocate_shared_memory(gl.float32, [CHUNK, BD], LINE)
    s_dy = gl.allocate_shared_memory(gl.float32, [CHUNK, BD], LINE)
    # States before each step; apart by step % UNROLL, since a store to one allocation waits for the one before.
    s_h = ()
    for i in gl.static_range(UNROLL):
        s_h = s_h + (gl.allocate_shared_memory(KEEP, [SLOTS[min(i, 1)], WARPS, CPT, LANE_ROWS, N], HISTORY),)
    s_kept = view_shared(s_h[0].index(CHUNK // UNROLL), HELD_TYPE, WORDS, HISTORY_WORDS)
    s_sums = gl.allocate_shared_memory(gl.float32, [2 * GROUPS, WARPS, GROUP, N], SUM)
    s_b2 = view_shared(s_b, gl.float32, [CHUNK, N], FLAT)
    s_c2 = view_shared(s_c, gl.float32, [CHUNK, N], FLAT)
    s_delta2 = view_shared(s_delta, gl.float32, [CHUNK, BD], FLAT)
    s_dy2 = view_shared(s_dy, gl.float32, [CHUNK, BD], FLAT)

    kept_base = (state_at.to(gl.pointer_type(gl.int32), bitcast=True) if PAIRS == 2 else state_at) + kept_at
    copies = (s_x3, s_dout, s_low if RANK else s_dt, s_z, s_yin)
    bases = (x_base, dout_base, dt_base, z_base, y_base)
    strides = (x_time, dout_time, dt_time, z_time, D)
    rows = (copy_row, low_row)
    c = chunks - 1
    copy_async(s_kept, kept_base + c * KEPT_CHUNK, mask=kept_mask)
    _copy_chunk(copies, bases, strides, c, rows, walk, length, gate_steps, copy_mask, low_k, CHUNK, RANK, GATE)
    b_next = load_rows(b_base, c * CHUNK + bc_row, walk, length, b_time)
    c_next = load_rows(c_base, c * CHUNK + bc_row, walk, length, c_time)
    g = gl.zeros([BD, N], gl.float32, STATE)
    da = gl.zeros([BD, N], gl.float32, STATE)
    dskip = gl.zeros([BD], gl.float32, OWN)
    dbias = gl.zeros([BD], gl.float32, OWN)
    for back in range(chunks):
        c = chunks - 1 - back
        async_copy.wait_group(0)
        block_barrier()

        # Elementwise before the scan: the gate, and step sizes, whose factors were loaded last
        step = c * CHUNK + tile_row
        time = time_of(step, walk, length)
        dout = s_dout.load(TILE).to(gl.float32) * scale
        if GATE:
            z = s_z.load(TILE).to(gl.float32)
            sig = sigmoid(z, PRECISE)
            silu = z * sig
            s_dy2.store(dout * silu)
            if c * CHUNK < gate_steps:
                y = s_yin.load(TILE).to(gl.float32)
                dz = dout * y * (sig + silu * (1.0 - sig))
                mask = tile_mask & (step < gate_steps)
                gl.store(dz_base + time * dz_time, dz.to(ELEM), mask=mask)
                if OUT:
                    gl.store(out_base + time * out_time, (y * silu * scale).to(ELEM), mask=mask)
        else:
            s_dy2.store(dout)
        if RANK:
            low = ()
            for i in gl.static_range((RANK + 15) // 16):
                factors = s_low[i].permute((0, 2, 1)).load(RIGHT)
                low = low + (factors.broadcast_to(WARPS, 16, CHUNK),)
            dt = LN2 * time_steps(weights, low, bias, WARPS, WIDTH, CHUNK, ACC, PRECISE)
            dt = gl.where(c * CHUNK + own_row < length, dt, 0.0)
            view_shared(s_delta, gl.float32, [CHUNK, WARPS, WIDTH], SUM).store(gl.permute(dt, (2, 0, 1)))
        else:
            dt = s_dt.load(TILE).to(gl.float32)
            s_delta2.store(gl.where(step < length, LN2 * softplus_in_ln2(dt * LOG2E + bias, PRECISE), 0.0))
        s_b2.store(b_next.to(gl.float32))
        s_c2.store(c_next.to(gl.float32))
        kept = s_kept.load(HELD_HISTORY)
        view_shared(s_h[0].index(0), HELD_TYPE, WORDS, HISTORY_WORDS).store(kept)
        h = _states(gl.permute(kept, (0, 2, 1, 3)), STATE, BD, N)
        block_barrier()

        # The states of the chunk again, from its checkpoint, and dC. A step's rows are read during the step before if
        # there are PRODUCTS; in fp32 registers are short.
        following = (
            s_delta.index(0).load(CHANNEL), s_x.index(c % 2 * CHUNK).load(CHANNEL), s_b.index(0).load(BC_ROW),
        )  # fmt: skip
        for u0 in gl.static_range(CHUNK // UNROLL):
            sums = ()
            for u1 in gl.static_range(UNROLL):
                u = u0 * UNROLL + u1
                v = min(u + 1, CHUNK - 1) if PRODUCTS else u
                present = following
                following = (
                    s_delta.index(v).load(CHANNEL), s_x.index(c % 2 * CHUNK + v).load(CHANNEL),
                    s_b.index(v).load(BC_ROW),
                )  # fmt: skip
                delta, x_row, bb = present if PRODUCTS else following
                dtx = delta * x_row.to(gl.float32)
                h = gl.exp2(gl.expand_dims(delta, 1) * a) * h + gl.expand_dims(bb, 0) * gl.expand_dims(dtx, 1)
                if u1 < UNROLL - 1:
                    s_h[u1 + 1].index(u0).store(_by_channel(h.to(KEEP), WARPS, LANE_ROWS, CPT, N))
                if not PRODUCTS:
                    grad_c = rounded_product(h, gl.expand_dims(s_dy.index(u).load(CHANNEL), 1))
                    if TENSOR_CORES:
                        sums = sums + (_sum_lanes(grad_c, CPT, N_LANES, SVEC, WARPS),)
                        if u1 % GROUP == GROUP - 1:
                            s_sums.index(GROUPS + u // GROUP).store(_sum_warps(sums, N_LANES, SVEC, WARPS))
                            sums = ()
                    else:
                        s_sums.index(GROUPS + u).store(gl.reshape(gl.sum(grad_c, 0), [1, 1, N]))
            if PRODUCTS or u0 < CHUNK // UNROLL - 1:
                s_h[0].index(u0 + 1).store(_by_channel(h.to(KEEP), WARPS, LANE_ROWS, CPT, N))
        block_barrier()
        if PRODUCTS:
            for i in gl.static_range(GROUPS):
                left = view_shared(s_dy, gl.float32, BY_WARP, SUM).index(i).load(STEPS)
                columns = _columns(left, CPT, ACC, SPLIT)
                s_sums.index(GROUPS + i).store(_sum_history(s_h, columns, i * GROUP + 1, UNROLL, ACC, HISTORY_ROWS, N))

        if c > 0:  # the next chunk is on its way while the sweep goes back
            copy_async(s_kept, kept_base + (c - 1) * KEPT_CHUNK, mask=kept_mask)
            _copy_chunk(
                copies, bases, strides, c - 1, rows, walk, length, gate_steps, copy_mask, low_k, CHUNK, RANK, GATE
            )
            b_next = load_rows(b_base, (c - 1) * CHUNK + bc_row, walk, length, b_time)
            c_next = load_rows(c_base, (c - 1) * CHUNK + bc_row, walk, length, c_time)

        # The adjoint, backwards in steps: g is the gradient of the state before the step, from later steps. Where dB is
        # a product, the gradient of the state after the step takes the place of the state before it.
        for u0 in range(CHUNK // UNROLL):
            sums = ()
            rows_of = ()
            block = CHUNK // UNROLL - 1 - u0
            for u1 in gl.static_range(UNROLL):
                if u1 % AHEAD == 0:
                    rows_of = ()
                    for i in gl.static_range(AHEAD):
                        u = block * UNROLL + (UNROLL - 1 - u1 - i)
                        words = view_shared(s_h[UNROLL - 1 - u1 - i].index(block), HELD_TYPE, WORDS, HISTORY_WORDS)
                        rows_of = rows_of + ((
                            words.load(HELD_HISTORY), s_delta.index(u).load(CHANNEL), s_dy.index(u).load(CHANNEL),
                            s_x.index(c % 2 * CHUNK + u).load(CHANNEL), s_b.index(u).load(BC_ROW),
                            s_c.index(u).load(BC_ROW),
                        ),)  # fmt: skip
                held, delta, dy, x, bb, cc = rows_of[u1 % AHEAD]
                u = block * UNROLL + (UNROLL - 1 - u1)
                s = c * CHUNK + u
                t = time_of(s, walk, length)
                x = x.to(gl.float32)
                gh = g + gl.expand_dims(dy, 1) * gl.expand_dims(cc, 0)
                gb = gl.sum(gh * gl.expand_dims(bb, 0), 1)
                if PRODUCTS:
                    s_h[UNROLL - 1 - u1].index(block).store(_by_channel(gh.to(KEEP), WARPS, LANE_ROWS, CPT, N))
                else:
                    grad_b = rounded_product(gh, gl.expand_dims(delta * x, 1))
                    if TENSOR_CORES:
                        sums = (_sum_lanes(grad_b, CPT, N_LANES, SVEC, WARPS),) + sums
                        if u1 % GROUP == GROUP - 1:
                            s_sums.index(u // GROUP).store(_sum_warps(sums, N_LANES, SVEC, WARPS))
                            sums = ()
                    else:
                        s_sums.index(u).store(gl.reshape(gl.sum(grad_b, 0), [1, 1, N]))
                g = gl.exp2(gl.expand_dims(delta, 1) * a) * gh
                gu = g * _states(gl.permute(held, (0, 2, 1, 3)), STATE, BD, N)
                da += gl.expand_dims(delta, 1) * gu
                gb = _own(gb, BD, WARPS, TWO_LANES)
                ga = _own(gl.sum(a * gu, 1), BD, WARPS, TWO_LANES)
                delta1 = _own(delta, BD, WARPS, TWO_LANES)
                dy1 = _own(dy, BD, WARPS, TWO_LANES)
                x1 = _own(x, BD, WARPS, TWO_LANES)
                ddt = (x1 * gb + ga * LN2) * one_minus_exp_neg(delta1, PRECISE)
                dbias += ddt
                dskip += dy1 * x1
                mask = own_mask & (s < length)
                gl.store(dx_base + t * D, (delta1 * gb + dy1 * skip).to(ELEM), mask=mask)
                gl.store(ddt_base + t * D, ddt.to(ELEM), mask=mask)
        if PRODUCTS:
            for i in gl.static_range(GROUPS):
                left = view_shared(s_delta, gl.float32, BY_WARP, SUM).index(i).load(STEPS)
                right = view_shared(s_x, ELEM, BY_WARP_X, SUM).index(c % 2 * GROUPS + i).load(STEPS)
                columns = _columns(left * right.to(gl.float32), CPT, ACC, SPLIT)
                s_sums.index(i).store(_sum_history(s_h, columns, i * GROUP, UNROLL, ACC, HISTORY_ROWS, N))
        block_barrier()

        # dB and dC of the chunk
        of_warps = view_shared(s_sums, gl.float32, [2, GROUPS, WARPS, GROUP, N], SUM_ALL).load(SUM_TILE)
        sums = gl.reshape(gl.permute(gl.sum(of_warps, 2), (1, 2, 0, 3)), [CHUNK, 2 * N])
        sums = gl.convert_layout(sums, SUM_ROWS, assert_trivial=True)
        if SCALED:
            sums, scales = _to_half(sums)
            step = c * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(1, SUM_ROWS))
            gl.store(dscale_ptr + sums_at + time_of(step, walk, length), scales, mask=step < length)
        step = c * CHUNK + axis(0, 0, CHUNK, SUM_ROWS)
        at = (sums_at + time_of(step, walk, length)) * (2 * N) + axis(1, 0, 2 * N, SUM_ROWS)
        gl.store(dbc_ptr + at, sums, mask=step < length)

    param_at = dparam_ptr + line * (D * (N + 2))
    gl.store(param_at + state_off, da, mask=state_mask)
    gl.store(param_at + D * N + own_ch, dskip, mask=own_mask)
    gl.store(param_at + D * (N + 1) + own_ch, dbias, mask=own_mask)


@triton.jit
def load_partials(sums_ptr, scales_ptr, row, rows, COLUMNS: tl.constexpr, PARTIALS: tl.constexpr):
    """Some rows [R], zeros beyond the last, of each of the PARTIALS arrays [rows, COLUMNS] that blocks of channels
    left: so many [R, COLUMNS], and where they are scaled as many scales [R] after them."""
    row = row.to(tl.int64)
    inside = row < rows
    column = tl.arange(0, COLUMNS)[None, :]
    sums, scales = (), ()
    for i in tl.static_range(PARTIALS):
        at = i * rows.to(tl.int64) + row
        sums = sums + (tl.load(sums_ptr + at[:, None] * COLUMNS + column, mask=inside[:, None], other=0.0),)
        if scales_ptr is not None:  # as [R, 1] each thread would load it once for each of its columns
            scales = scales + (tl.load(scales_ptr + at, mask=inside, other=0.0),)
    return sums + scales


@triton.jit
def add_partials(loaded, PARTIALS: tl.constexpr):
    """Their sum, fp32 [R, COLUMNS], in the order of the blocks."""
    total = None
    for i in tl.static_range(PARTIALS):
        share = loaded[i].to(tl.float32)
        if len(loaded) > PARTIALS:
            share *= loaded[PARTIALS + i][:, None]
        total = share if i == 0 else total + share
    return total


@triton.jit
def _sum_blocks(
    program, dbc_ptr, dscale_ptr, db_ptr, dc_ptr, rows, db_row, dc_row,
    N: tl.constexpr, PARTIALS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dB and dC of ROWS times: sums over the blocks of channels."""
    row = program * ROWS + tl.arange(0, ROWS)
    total = add_partials(load_partials(dbc_ptr, dscale_ptr, row, rows, 2 * N, PARTIALS), PARTIALS)
    row = row.to(tl.int64)[:, None]
    n = tl.arange(0, 2 * N)[None, :]
    inside = row < rows
    tl.store(db_ptr + row * db_row + n, total.to(db_ptr.dtype.element_ty), mask=inside & (n < N))
    tl.store(dc_ptr + row * dc_row + n - N, total.to(dc_ptr.dtype.element_ty), mask=inside & (n >= N))


@triton.jit
def _sum_batch(
    program, dparam_ptr, da_ptr, dskip_ptr, dbias_ptr, batches,
    D: tl.constexpr, N: tl.constexpr, COLUMNS: tl.constexpr, BATCHES: tl.constexpr,
):  # fmt: skip
    """dA, dD and the bias' gradient of COLUMNS entries: sums over the batch."""
    WIDTH: tl.constexpr = D * (N + 2)
    BLOCKS: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    direction = program // BLOCKS
    column = program % BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((BATCHES, COLUMNS), tl.float32)
    for start in range(0, batches, BATCHES):
        batch = start + tl.arange(0, BATCHES)
        at = (direction * batches + batch).to(tl.int64)[:, None] * WIDTH + column[None, :]
        mask = (batch < batches)[:, None] & (column < WIDTH)[None, :]
        total += tl.load(dparam_ptr + at, mask=mask, other=0.0)
    total = tl.sum(total, 0)
    tl.store(da_ptr + direction * D * N + column, total, mask=column < D * N)
    skip = column - D * N
    tl.store(dskip_ptr + direction * D + skip, total, mask=(skip >= 0) & (skip < D))
    bias = skip - D
    tl.store(dbias_ptr + direction * D + bias, total, mask=(bias >= 0) & (bias < D))


@triton.jit(do_not_specialize=["rows", "batches", "batch_programs"])
def sum_partials(
    dbc_ptr, dscale_ptr, db_ptr, dc_ptr, dparam_ptr, da_ptr, dskip_ptr, dbias_ptr, rows, batches, batch_programs,
    db_row, dc_row,
    D: tl.constexpr, N: tl.constexpr, PARTIALS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BATCHES: tl.constexpr,
):  # fmt: skip
    """What the programs of the backward pass left, in one launch; the long sums, over the batch, come first."""
    program = tl.program_id(0)
    if program >= batch_programs:
        block = program - batch_programs
        _sum_blocks(block, dbc_ptr, dscale_ptr, db_ptr, dc_ptr, rows, db_row, dc_row, N, PARTIALS, ROWS)
    elif D > 0:
        _sum_batch(program, dparam_ptr, da_ptr, dskip_ptr, dbias_ptr, batches, D, N, COLUMNS, BATCHES)
