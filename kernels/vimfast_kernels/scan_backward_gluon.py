"""The backward kernels of the bidirectional selective scan: the adjoint in Gluon, the sums over programs in Triton."""

# Device functions are written in Triton's and Gluon's own dialects, which know neither annotations beyond
# constexpr nor starred tuples; an `if` on a constexpr needs its `else`.
# ruff: noqa: RET505, RUF005, SIM108
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,var-annotated"
from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from vimfast_kernels._gluon import (
    LN2,
    LOG2E,
    axis,
    block_barrier,
    copy_rows,
    load_rows,
    one_minus_exp_neg,
    sigmoid,
    softplus,
    time_of,
    view_shared,
)


@gluon.jit
def _copy_chunk(copies, bases, strides, c, step, direction, length, gate_steps, mask, GATE: gl.constexpr):
    """x, dt, dout, z and, where this direction makes dz, y of one chunk; x is needed to the chunk's very end, so it
    has two buffers."""
    copy_rows(copies[0].index(c % 2), bases[0], step, direction, length, strides[0], mask)
    for i in gl.static_range(1, 4 if GATE else 3):
        copy_rows(copies[i], bases[i], step, direction, length, strides[i], mask)
    if GATE:
        copy_rows(copies[4], bases[4], step, direction, length, strides[4], mask & (step < gate_steps))
    async_copy.commit_group()


@gluon.jit
def _sum_channels(v, CPT: gl.constexpr):
    """Sum of v [BD, 16] over its channels, in tf32: four tensor core products with a 0/1 matrix sum over four lanes
    and put each state into its column; the eight lanes left are summed by shuffles. The reshapes rename registers."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC, 1)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, ACC, 1)
    if CPT == 2:
        v = gl.sum(gl.reshape(v, [32, 2, 16]), 1)
    # (lane / 4, lane % 4, state / 8, state / 2 % 4, state % 2) -> rows (state / 8, lane / 4), the rest summed over
    left = gl.permute(gl.reshape(v, [8, 4, 2, 4, 2]), (2, 0, 3, 4, 1))
    left = gl.convert_layout(gl.reshape(left, [16, 32]), LEFT, assert_trivial=True)
    k = gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(1, RIGHT)), 1)
    state = gl.expand_dims(gl.arange(0, 8, gl.SliceLayout(0, RIGHT)), 0)
    pick = gl.where(k // 4 == state, 1.0, 0.0)
    acc = mma_v2(left, pick, gl.zeros([16, 8], gl.float32, ACC), input_precision="tf32")
    return gl.reshape(gl.sum(gl.reshape(acc, [2, 8, 8]), 1), [16])


@gluon.jit
def _load_states(shared, STATE: gl.constexpr, PAIR: gl.constexpr, BD: gl.constexpr, N: gl.constexpr):
    """fp32 states [BD, N]; bf16 ones come in pairs and take one instruction each."""
    if shared.dtype == gl.bfloat16:
        PAIRS: gl.constexpr = gl.SwizzledSharedLayout(4, 4, 2, order=[1, 0])
        pair = view_shared(shared, gl.int32, [BD, N // 2], PAIRS).load(PAIR)
        low = (pair << 16).to(gl.float32, bitcast=True)
        high = (pair & -65536).to(gl.float32, bitcast=True)
        return gl.convert_layout(gl.reshape(gl.join(low, high), [BD, N]), STATE, assert_trivial=True)
    else:
        return shared.load(STATE)


@gluon.jit(do_not_specialize=["length"])
def scan_backward(
    x_ptr, dt_ptr, b_ptr, c_ptr, z_ptr, a_ptr, skip_ptr, bias_ptr, y_ptr, state_ptr, dout_ptr,
    dx_ptr, ddt_ptr, dz_ptr, dbc_ptr, dparam_ptr,
    length, scale,
    x_dir, x_batch, x_time, dt_dir, dt_batch, dt_time, b_dir, b_batch, b_time, c_dir, c_batch, c_time,
    z_batch, z_time, dout_batch, dout_time, dz_batch, dz_time,
    D: gl.constexpr, N: gl.constexpr, DIRS: gl.constexpr, BD: gl.constexpr, CHUNK: gl.constexpr,
    UNROLL: gl.constexpr, FLIP: gl.constexpr, GATE: gl.constexpr, PRECISE: gl.constexpr,
):  # fmt: skip
    PER_THREAD: gl.constexpr = min(N, 32)
    N_LANES: gl.constexpr = N // PER_THREAD
    CPT: gl.constexpr = BD * N_LANES // 32
    STATE: gl.constexpr = gl.BlockedLayout([CPT, PER_THREAD], [32 // N_LANES, N_LANES], [1, 1], [1, 0])
    PAIR: gl.constexpr = gl.BlockedLayout([CPT, PER_THREAD // 2], [32 // N_LANES, N_LANES], [1, 1], [1, 0])
    CHANNEL: gl.constexpr = gl.SliceLayout(1, STATE)
    BC_ROW: gl.constexpr = gl.SliceLayout(0, STATE)
    TILE: gl.constexpr = gl.BlockedLayout([1, 4], [128 // BD, BD // 4], [1, 1], [1, 0])
    VEC: gl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    COPY: gl.constexpr = gl.BlockedLayout([1, VEC], [32 * VEC // BD, BD // VEC], [1, 1], [1, 0])
    BC_TILE: gl.constexpr = gl.BlockedLayout([1, 4], [128 // N, N // 4], [1, 1], [1, 0])
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
    HISTORY: gl.constexpr = gl.SwizzledSharedLayout(8, 4, 2, order=[1, 0])
    ELEM: gl.constexpr = x_ptr.dtype.element_ty
    KEEP: gl.constexpr = state_ptr.dtype.element_ty
    TENSOR_CORES: gl.constexpr = N == 16 and not PRECISE

    batch = gl.program_id(1)
    dr = gl.program_id(2)
    walk = dr + FLIP
    first = gl.program_id(0) * BD
    batch64 = batch.to(gl.int64)
    dr64 = dr.to(gl.int64)
    line = dr64 * gl.num_programs(1) + batch64  # which sequence of the stack

    # Indices in the four layouts: (channel, state) and (step, channel or state)
    channel = axis(0, first, BD, STATE)
    state_off = channel * N + axis(1, 0, N, STATE)
    state_mask = channel < D
    a = gl.load(a_ptr + dr * (D * N) + state_off, mask=state_mask, other=0.0) * LOG2E
    tile_row = axis(0, 0, CHUNK, TILE)
    tile_ch = axis(1, first, BD, TILE)
    tile_mask = tile_ch < D
    channel1 = first + gl.arange(0, BD, CHANNEL)
    channel_mask = channel1 < D
    skip = gl.load(skip_ptr + dr * D + channel1, mask=channel_mask, other=0.0)
    bias = gl.load(bias_ptr + dr * D + tile_ch, mask=tile_mask, other=0.0)
    copy_row = axis(0, 0, CHUNK, COPY)
    copy_ch = axis(1, first, BD, COPY)
    copy_mask = copy_ch < D
    bc_row = axis(0, 0, CHUNK, BC_TILE)
    bc_n = axis(1, 0, N, BC_TILE)

    x_base = x_ptr + dr64 * x_dir + batch64 * x_batch + copy_ch
    dt_base = dt_ptr + dr64 * dt_dir + batch64 * dt_batch + copy_ch
    b_base = b_ptr + dr64 * b_dir + batch64 * b_batch + bc_n
    c_base = c_ptr + dr64 * c_dir + batch64 * c_batch + bc_n
    z_base = z_ptr + batch64 * z_batch + copy_ch
    y_base = y_ptr + batch64 * length * D + copy_ch
    dout_base = dout_ptr + batch64 * dout_batch + copy_ch
    dx_base = dx_ptr + line * length * D + channel1
    ddt_base = ddt_ptr + line * length * D + channel1
    dz_base = dz_ptr + batch64 * dz_batch + tile_ch
    # Partial sums of dB and dC, one row for each block of channels
    dbc_base = dbc_ptr + (gl.program_id(0) * DIRS * gl.num_programs(1) + line) * length * (2 * N)
    chunks = gl.cdiv(length, CHUNK)
    state_at = state_ptr + line * chunks * (D * N) + state_off
    # The gate's gradient needs the sum of both directions, which forward kept: each direction does its half.
    gate_steps = length if DIRS == 1 else (length + 1 - dr) // 2

    s_x = gl.allocate_shared_memory(ELEM, [2 * CHUNK, BD], LINE)
    s_x3 = view_shared(s_x, ELEM, [2, CHUNK, BD], FLAT)
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
    for _ in gl.static_range(UNROLL):
        s_h = s_h + (gl.allocate_shared_memory(KEEP, [CHUNK // UNROLL, BD, N], HISTORY),)
    s_b2 = view_shared(s_b, gl.float32, [CHUNK, N], FLAT)
    s_c2 = view_shared(s_c, gl.float32, [CHUNK, N], FLAT)
    s_delta2 = view_shared(s_delta, gl.float32, [CHUNK, BD], FLAT)
    s_dy2 = view_shared(s_dy, gl.float32, [CHUNK, BD], FLAT)

    copies = (s_x3, s_dt, s_dout, s_z, s_yin)
    bases = (x_base, dt_base, dout_base, z_base, y_base)
    strides = (x_time, dt_time, dout_time, z_time, D)
    c = chunks - 1
    _copy_chunk(copies, bases, strides, c, c * CHUNK + copy_row, walk, length, gate_steps, copy_mask, GATE)
    b_next = load_rows(b_base, c * CHUNK + bc_row, walk, length, b_time)
    c_next = load_rows(c_base, c * CHUNK + bc_row, walk, length, c_time)
    kept = gl.load(state_at + c * (D * N), mask=state_mask, other=0.0)

    g = gl.zeros([BD, N], gl.float32, STATE)
    da = gl.zeros([BD, N], gl.float32, STATE)
    dskip = gl.zeros([BD], gl.float32, CHANNEL)
    dbias = gl.zeros([BD], gl.float32, CHANNEL)
    for back in range(chunks):
        c = chunks - 1 - back
        s_b2.store(b_next.to(gl.float32))
        s_c2.store(c_next.to(gl.float32))
        async_copy.wait_group(0)
        block_barrier()

        # Elementwise before the scan: step sizes and the gate
        step = c * CHUNK + tile_row
        ok = step < length
        time = time_of(step, walk, length)
        s_delta2.store(gl.where(ok, softplus(s_dt.load(TILE).to(gl.float32) + bias, PRECISE), 0.0))
        dout = s_dout.load(TILE).to(gl.float32) * scale
        if GATE:
            z = s_z.load(TILE).to(gl.float32)
            sig = sigmoid(z, PRECISE)
            s_dy2.store(dout * z * sig)
            if c * CHUNK < gate_steps:
                y = s_yin.load(TILE).to(gl.float32)
                dz = dout * y * sig * (1.0 + z * (1.0 - sig))
                gl.store(dz_base + time * dz_time, dz.to(ELEM), mask=tile_mask & (step < gate_steps))
        else:
            s_dy2.store(dout)
        h_kept = kept
        block_barrier()

        if c > 0:  # the next chunk is on its way while this one is worked on
            before = (c - 1) * CHUNK
            _copy_chunk(copies, bases, strides, c - 1, before + copy_row, walk, length, gate_steps, copy_mask, GATE)

        # The states of the chunk again, from its checkpoint; dC on the way
        h = h_kept.to(gl.float32)
        for u0 in range(CHUNK // UNROLL):
            for u1 in gl.static_range(UNROLL):
                u = u0 * UNROLL + u1
                s_h[u1].index(u0).store(h_kept)
                delta = s_delta.index(u).load(CHANNEL)
                dtx = delta * s_x.index(c % 2 * CHUNK + u).load(CHANNEL).to(gl.float32)
                bb = gl.expand_dims(s_b.index(u).load(BC_ROW), 0)
                h = gl.exp2(gl.expand_dims(delta, 1) * a) * h + bb * gl.expand_dims(dtx, 1)
                h_kept = h.to(KEEP)
                grad_c = h * gl.expand_dims(s_dy.index(u).load(CHANNEL), 1)
                s = c * CHUNK + u
                if TENSOR_CORES:
                    dc = _sum_channels(grad_c, CPT)
                else:
                    dc = gl.sum(grad_c, 0)
                gl.store(
                    dbc_base + time_of(s, walk, length) * (2 * N) + N + gl.arange(0, N, dc.type.layout),
                    dc,
                    mask=s < length,
                )
        block_barrier()
        if c > 0:
            b_next = load_rows(b_base, (c - 1) * CHUNK + bc_row, walk, length, b_time)
            c_next = load_rows(c_base, (c - 1) * CHUNK + bc_row, walk, length, c_time)
            kept = gl.load(state_at + (c - 1) * (D * N), mask=state_mask, other=0.0)

        # The adjoint, backwards in steps: g is the gradient of the state before the step, from later steps
        for u0 in range(CHUNK // UNROLL):
            for u1 in gl.static_range(UNROLL):
                u = CHUNK - 1 - u0 * UNROLL - u1
                s = c * CHUNK + u
                t = time_of(s, walk, length)
                delta = s_delta.index(u).load(CHANNEL)
                dy = s_dy.index(u).load(CHANNEL)
                x = s_x.index(c % 2 * CHUNK + u).load(CHANNEL).to(gl.float32)
                bb = gl.expand_dims(s_b.index(u).load(BC_ROW), 0)
                cc = gl.expand_dims(s_c.index(u).load(BC_ROW), 0)
                gh = g + gl.expand_dims(dy, 1) * cc
                gb = gl.sum(gh * bb, 1)
                grad_b = gh * gl.expand_dims(delta * x, 1)
                if TENSOR_CORES:
                    db = _sum_channels(grad_b, CPT)
                else:
                    db = gl.sum(grad_b, 0)
                gl.store(dbc_base + t * (2 * N) + gl.arange(0, N, db.type.layout), db, mask=s < length)
                g = gl.exp2(gl.expand_dims(delta, 1) * a) * gh
                history = s_h[UNROLL - 1 - u1].index(CHUNK // UNROLL - 1 - u0)
                gu = g * _load_states(history, STATE, PAIR, BD, N)
                da += gl.expand_dims(delta, 1) * gu
                ddt = (x * gb + gl.sum(a * gu, 1) * LN2) * one_minus_exp_neg(delta, PRECISE)
                dbias += ddt
                dskip += dy * x
                mask = channel_mask & (s < length)
                gl.store(dx_base + t * D, (delta * gb + dy * skip).to(ELEM), mask=mask)
                gl.store(ddt_base + t * D, ddt.to(ELEM), mask=mask)

    param_at = dparam_ptr + line * (D * (N + 2))
    gl.store(param_at + state_off, da, mask=state_mask)
    gl.store(param_at + D * N + channel1, dskip, mask=channel_mask)
    gl.store(param_at + D * (N + 1) + channel1, dbias, mask=channel_mask)


@triton.jit
def _sum_blocks(
    program, dbc_ptr, db_ptr, dc_ptr, length, batches, rows,
    db_dir, db_batch, db_time, dc_dir, dc_batch, dc_time,
    N: tl.constexpr, PARTIALS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dB and dC of ROWS times: sums over the blocks of channels."""
    row = program * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, 2 * N)[None, :]
    inside = (row < rows)[:, None]
    at = dbc_ptr + row.to(tl.int64)[:, None] * (2 * N) + n
    total = tl.zeros((ROWS, 2 * N), tl.float32)
    for i in tl.static_range(PARTIALS):
        total += tl.load(at + i * rows.to(tl.int64) * (2 * N), mask=inside & (n < 2 * N), other=0.0)
    line = row // length
    direction = (line // batches).to(tl.int64)
    batch = (line % batches).to(tl.int64)
    time = (row % length).to(tl.int64)
    db_off = direction * db_dir + batch * db_batch + time * db_time
    dc_off = direction * dc_dir + batch * dc_batch + time * dc_time
    tl.store(db_ptr + db_off[:, None] + n, total.to(db_ptr.dtype.element_ty), mask=inside & (n < N))
    tl.store(dc_ptr + dc_off[:, None] + n - N, total.to(dc_ptr.dtype.element_ty), mask=inside & (n >= N))


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


@triton.jit(do_not_specialize=["length", "batches", "directions"])
def sum_partials(
    dbc_ptr, dparam_ptr, db_ptr, dc_ptr, da_ptr, dskip_ptr, dbias_ptr,
    length, batches, directions,
    db_dir, db_batch, db_time, dc_dir, dc_batch, dc_time,
    D: tl.constexpr, N: tl.constexpr, PARTIALS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BATCHES: tl.constexpr,
):  # fmt: skip
    """What the programs of the backward pass left in parts, in one launch."""
    rows = directions * batches * length
    row_programs = tl.cdiv(rows, ROWS)
    program = tl.program_id(0)
    if program < row_programs:
        _sum_blocks(
            program, dbc_ptr, db_ptr, dc_ptr, length, batches, rows,
            db_dir, db_batch, db_time, dc_dir, dc_batch, dc_time, N, PARTIALS, ROWS,
        )  # fmt: skip
    else:
        _sum_batch(program - row_programs, dparam_ptr, da_ptr, dskip_ptr, dbias_ptr, batches, D, N, COLUMNS, BATCHES)
