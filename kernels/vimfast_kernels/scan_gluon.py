"""Bidirectional selective scan on NVIDIA GPUs in Gluon, forward and backward, without a compiler on the machine."""

# Device functions are written in Triton's and Gluon's own dialects, which know neither annotations beyond
# constexpr nor starred tuples; an `if` on a constexpr needs its `else`.
# ruff: noqa: RET505, RUF005, SIM102, SIM108
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,var-annotated"
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from vimfast_kernels._gluon import (
    LN2,
    LOG2E,
    block_barrier,
    copy_async,
    one_minus_exp_neg,
    sigmoid,
    softplus,
    view_shared,
)


@gluon.jit
def _axis(DIM: gl.constexpr, START, SIZE: gl.constexpr, LAYOUT: gl.constexpr):
    """START .. START + SIZE - 1 along one dimension of a 2-D or 3-D layout, the others of size 1."""
    if len(LAYOUT.order) == 2:
        v = START + gl.arange(0, SIZE, gl.SliceLayout(1 - DIM, LAYOUT))
        return gl.expand_dims(v, 1 - DIM)
    elif DIM == 0:
        v = START + gl.arange(0, SIZE, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
        return gl.expand_dims(gl.expand_dims(v, 1), 2)
    elif DIM == 1:
        v = START + gl.arange(0, SIZE, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
        return gl.expand_dims(gl.expand_dims(v, 0), 2)
    else:
        v = START + gl.arange(0, SIZE, gl.SliceLayout(0, gl.SliceLayout(0, LAYOUT)))
        return gl.expand_dims(gl.expand_dims(v, 0), 0)


@gluon.jit
def _time(step, direction, length):
    """Direction 1 walks from the last time to the first."""
    return gl.where(direction == 0, step, length - 1 - step)


@gluon.jit
def _copy_rows(shared, base, step, direction, length, time_stride, mask):
    copy_async(shared, base + _time(step, direction, length) * time_stride, mask=mask & (step < length))


@gluon.jit
def _load_rows(base, step, direction, length, time_stride):
    return gl.load(base + _time(step, direction, length) * time_stride, mask=step < length, other=0.0)


@gluon.jit(do_not_specialize=["length"])
def _scan_forward(
    x_ptr, dt_ptr, b_ptr, c_ptr, z_ptr, a_ptr, skip_ptr, bias_ptr, out_ptr, y_ptr, state_ptr,
    length, scale,
    x_dir, x_batch, x_time, dt_dir, dt_batch, dt_time, b_dir, b_batch, b_time, c_dir, c_batch, c_time,
    z_batch, z_time,
    D: gl.constexpr, N: gl.constexpr, DIRS: gl.constexpr, BD: gl.constexpr, CHUNK: gl.constexpr,
    UNROLL: gl.constexpr, FLIP: gl.constexpr, GATE: gl.constexpr, SAVE: gl.constexpr, PRECISE: gl.constexpr,
):  # fmt: skip
    # Warp w walks direction w: step s is time s for direction 0 and time L - 1 - s for direction 1.
    PER_THREAD: gl.constexpr = min(N, 32)
    N_LANES: gl.constexpr = N // PER_THREAD
    CPT: gl.constexpr = BD * N_LANES // 32  # channels a thread
    STATE: gl.constexpr = gl.BlockedLayout([1, CPT, PER_THREAD], [1, 32 // N_LANES, N_LANES], [DIRS, 1, 1], [2, 1, 0])
    CHANNEL: gl.constexpr = gl.SliceLayout(2, STATE)
    BC_ROW: gl.constexpr = gl.SliceLayout(1, STATE)
    # Elementwise work on a chunk: 4 neighbouring channels a thread.
    TILE: gl.constexpr = gl.BlockedLayout([1, 1, 4], [128 // BD, 1, BD // 4], [1, DIRS, 1], [2, 1, 0])
    VEC: gl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth  # 16 bytes
    COPY: gl.constexpr = gl.BlockedLayout([1, 1, VEC], [32 * VEC // BD, 1, BD // VEC], [1, DIRS, 1], [2, 1, 0])
    BC_TILE: gl.constexpr = gl.BlockedLayout([1, 1, 4], [128 // N, 1, N // 4], [1, DIRS, 1], [2, 1, 0])
    ROW: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[2, 1, 0])
    ELEM: gl.constexpr = x_ptr.dtype.element_ty

    batch = gl.program_id(1)
    first = gl.program_id(0) * BD
    batch64 = batch.to(gl.int64)

    # Indices in the four layouts: (direction, channel, state) and (step, direction, channel or state)
    direction = _axis(0, 0, DIRS, STATE)
    channel = _axis(1, first, BD, STATE)
    state_off = channel * N + _axis(2, 0, N, STATE)
    state_mask = channel < D
    a = gl.load(a_ptr + direction * (D * N) + state_off, mask=state_mask, other=0.0) * LOG2E
    tile_row = _axis(0, 0, CHUNK, TILE)
    tile_dir = _axis(1, 0, DIRS, TILE)
    tile_ch = _axis(2, first, BD, TILE)
    tile_mask = tile_ch < D
    skip = gl.load(skip_ptr + tile_dir * D + tile_ch, mask=tile_mask, other=0.0)
    bias = gl.load(bias_ptr + tile_dir * D + tile_ch, mask=tile_mask, other=0.0)
    copy_row = _axis(0, 0, CHUNK, COPY)
    copy_dir = _axis(1, 0, DIRS, COPY)
    copy_ch = _axis(2, first, BD, COPY)
    copy_mask = copy_ch < D
    bc_row = _axis(0, 0, CHUNK, BC_TILE)
    bc_dir = _axis(1, 0, DIRS, BC_TILE)
    bc_n = _axis(2, 0, N, BC_TILE)

    x_base = x_ptr + batch64 * x_batch + copy_dir.to(gl.int64) * x_dir + copy_ch
    dt_base = dt_ptr + batch64 * dt_batch + copy_dir.to(gl.int64) * dt_dir + copy_ch
    b_base = b_ptr + batch64 * b_batch + bc_dir.to(gl.int64) * b_dir + bc_n
    c_base = c_ptr + batch64 * c_batch + bc_dir.to(gl.int64) * c_dir + bc_n
    out_base = out_ptr + batch64 * length * D + tile_ch
    y_base = y_ptr + batch64 * length * D + tile_ch
    z_base = z_ptr + batch64 * z_batch + tile_ch

    s_x = gl.allocate_shared_memory(ELEM, [2, CHUNK, DIRS, BD], FLAT)
    s_dt = gl.allocate_shared_memory(ELEM, [2, CHUNK, DIRS, BD], FLAT)
    s_b = gl.allocate_shared_memory(gl.float32, [CHUNK, DIRS, N], ROW)
    s_c = gl.allocate_shared_memory(gl.float32, [CHUNK, DIRS, N], ROW)
    s_delta = gl.allocate_shared_memory(gl.float32, [CHUNK, DIRS, BD], ROW)
    s_dx = gl.allocate_shared_memory(gl.float32, [CHUNK, DIRS, BD], ROW)
    s_y = gl.allocate_shared_memory(gl.float32, [CHUNK, DIRS, BD], ROW)
    s_b3 = view_shared(s_b, gl.float32, [CHUNK, DIRS, N], FLAT)
    s_c3 = view_shared(s_c, gl.float32, [CHUNK, DIRS, N], FLAT)
    s_delta3 = view_shared(s_delta, gl.float32, [CHUNK, DIRS, BD], FLAT)
    s_dx3 = view_shared(s_dx, gl.float32, [CHUNK, DIRS, BD], FLAT)
    s_y3 = view_shared(s_y, gl.float32, [CHUNK, DIRS, BD], FLAT)

    chunks = gl.cdiv(length, CHUNK)
    line = (direction * gl.num_programs(1) + batch).to(gl.int64)  # which sequence of the stack
    state_at = state_ptr + line * chunks * (D * N) + state_off

    # One chunk is always on its way while the one before is worked on.
    _copy_rows(s_x.index(0), x_base, copy_row, copy_dir + FLIP, length, x_time, copy_mask)
    _copy_rows(s_dt.index(0), dt_base, copy_row, copy_dir + FLIP, length, dt_time, copy_mask)
    async_copy.commit_group()
    b_next = _load_rows(b_base, bc_row, bc_dir + FLIP, length, b_time)
    c_next = _load_rows(c_base, bc_row, bc_dir + FLIP, length, c_time)
    h = gl.zeros([DIRS, BD, N], gl.float32, STATE)
    for c in range(chunks):
        s_b3.store(b_next.to(gl.float32))
        s_c3.store(c_next.to(gl.float32))
        async_copy.wait_group(0)
        block_barrier()

        # Elementwise before the scan: step sizes
        step = c * CHUNK + tile_row
        ok = step < length
        delta = s_dt.index(c % 2).load(TILE).to(gl.float32) + bias
        delta = gl.where(ok, softplus(delta, PRECISE), 0.0)
        s_delta3.store(delta)
        s_dx3.store(delta * s_x.index(c % 2).load(TILE).to(gl.float32))

        ahead = (c + 1) * CHUNK
        _copy_rows(s_x.index((c + 1) % 2), x_base, ahead + copy_row, copy_dir + FLIP, length, x_time, copy_mask)
        _copy_rows(s_dt.index((c + 1) % 2), dt_base, ahead + copy_row, copy_dir + FLIP, length, dt_time, copy_mask)
        async_copy.commit_group()
        b_next = _load_rows(b_base, ahead + bc_row, bc_dir + FLIP, length, b_time)
        c_next = _load_rows(c_base, ahead + bc_row, bc_dir + FLIP, length, c_time)

        # Whichever direction reaches a time first leaves its share in y; the other one adds, gates and writes.
        time = _time(step, tile_dir + FLIP, length)
        mask = ok & tile_mask
        last = length - 1 - c * CHUNK  # the other direction's step at this chunk's first time
        closing = True if DIRS == 1 else last - (CHUNK - 1) < (c + 1) * CHUNK  # a row or more of this chunk closes
        other_chunk = (length - 1 - step) // CHUNK
        share = gl.zeros([CHUNK, DIRS, BD], ELEM, TILE)
        z = gl.zeros([CHUNK, DIRS, BD], ELEM, TILE)
        if closing:
            if DIRS == 2:
                share = gl.load(y_base + time * D, mask=mask & (other_chunk < c), other=0.0)
            if GATE:
                z_mask = mask & (other_chunk <= c) if DIRS == 2 else mask
                z = gl.load(z_base + time * z_time, mask=z_mask, other=0.0)
        if SAVE:
            gl.store(state_at + c * (D * N), h.to(state_ptr.dtype.element_ty), mask=state_mask)
        block_barrier()

        for u0 in range(0, CHUNK, UNROLL):
            for u1 in gl.static_range(UNROLL):
                u = u0 + u1
                decay = gl.exp2(gl.expand_dims(s_delta.index(u).load(CHANNEL), 2) * a)
                h = decay * h + gl.expand_dims(s_b.index(u).load(BC_ROW), 1) * gl.expand_dims(
                    s_dx.index(u).load(CHANNEL), 2
                )
                s_y.index(u).store(gl.sum(h * gl.expand_dims(s_c.index(u).load(BC_ROW), 1), 2))
        block_barrier()

        # Elementwise after the scan: skip, sum of the directions, gate
        y = s_y3.load(TILE) + skip * s_x.index(c % 2).load(TILE).to(gl.float32)
        if DIRS == 2:
            if last >= c * CHUNK:
                opens = mask & ((other_chunk > c) | ((other_chunk == c) & (tile_dir == 0)))
                gl.store(y_base + time * D, y.to(ELEM), mask=opens)
                if last // CHUNK <= c + 1:  # the directions may be meeting inside this very chunk
                    block_barrier()
                    share = gl.load(y_base + time * D, mask=mask & (other_chunk <= c), other=0.0)
        if closing:
            closes = mask
            if DIRS == 2:
                closes = mask & ((other_chunk < c) | ((other_chunk == c) & (tile_dir == 1)))
                y += share.to(gl.float32)
            if SAVE and GATE:
                gl.store(y_base + time * D, y.to(ELEM), mask=closes)
            if GATE:
                v = z.to(gl.float32)
                y *= v * sigmoid(v, PRECISE)
            gl.store(out_base + time * D, (y * scale).to(ELEM), mask=closes)
    async_copy.wait_group(0)


@gluon.jit
def _copy_chunk(copies, bases, strides, c, step, direction, length, gate_steps, mask, GATE: gl.constexpr):
    """x, dt, dout, z and, where this direction makes dz, y of one chunk; x is needed to the chunk's very end, so it
    has two buffers."""
    _copy_rows(copies[0].index(c % 2), bases[0], step, direction, length, strides[0], mask)
    for i in gl.static_range(1, 4 if GATE else 3):
        _copy_rows(copies[i], bases[i], step, direction, length, strides[i], mask)
    if GATE:
        _copy_rows(copies[4], bases[4], step, direction, length, strides[4], mask & (step < gate_steps))
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
def _scan_backward(
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
    channel = _axis(0, first, BD, STATE)
    state_off = channel * N + _axis(1, 0, N, STATE)
    state_mask = channel < D
    a = gl.load(a_ptr + dr * (D * N) + state_off, mask=state_mask, other=0.0) * LOG2E
    tile_row = _axis(0, 0, CHUNK, TILE)
    tile_ch = _axis(1, first, BD, TILE)
    tile_mask = tile_ch < D
    channel1 = first + gl.arange(0, BD, CHANNEL)
    channel_mask = channel1 < D
    skip = gl.load(skip_ptr + dr * D + channel1, mask=channel_mask, other=0.0)
    bias = gl.load(bias_ptr + dr * D + tile_ch, mask=tile_mask, other=0.0)
    copy_row = _axis(0, 0, CHUNK, COPY)
    copy_ch = _axis(1, first, BD, COPY)
    copy_mask = copy_ch < D
    bc_row = _axis(0, 0, CHUNK, BC_TILE)
    bc_n = _axis(1, 0, N, BC_TILE)

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
    b_next = _load_rows(b_base, c * CHUNK + bc_row, walk, length, b_time)
    c_next = _load_rows(c_base, c * CHUNK + bc_row, walk, length, c_time)
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
        time = _time(step, walk, length)
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
                    dbc_base + _time(s, walk, length) * (2 * N) + N + gl.arange(0, N, dc.type.layout),
                    dc,
                    mask=s < length,
                )
        block_barrier()
        if c > 0:
            b_next = _load_rows(b_base, (c - 1) * CHUNK + bc_row, walk, length, b_time)
            c_next = _load_rows(c_base, (c - 1) * CHUNK + bc_row, walk, length, c_time)
            kept = gl.load(state_at + (c - 1) * (D * N), mask=state_mask, other=0.0)

        # The adjoint, backwards in steps: g is the gradient of the state before the step, from later steps
        for u0 in range(CHUNK // UNROLL):
            for u1 in gl.static_range(UNROLL):
                u = CHUNK - 1 - u0 * UNROLL - u1
                s = c * CHUNK + u
                t = _time(s, walk, length)
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
def _sum_partials(
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


CHUNK = 8  # steps between saved states, and steps worked on at a time
BLOCK_CHANNELS = {8: 64, 16: 64, 32: 32, 64: 16}  # channels a warp, by state size: 32 states a thread
# 168 registers let 12 warps reside on a multiprocessor of an H200, which then does batch 128 in one wave. Newer
# Tritons no longer fuse multiply and add unless told to.
FORWARD = {"UNROLL": 4, "maxnreg": 168, "enable_fp_fusion": True}
BACKWARD = {"UNROLL": 2, "enable_fp_fusion": True}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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


def _meta(u: Tensor, N: int, reverse: Sequence[bool], gate: bool) -> dict[str, object]:
    return {
        "D": u.shape[-1], "N": N, "BD": BLOCK_CHANNELS[N], "CHUNK": CHUNK, "FLIP": int(reverse[0]), "GATE": gate,
        "PRECISE": u.dtype != torch.bfloat16,
    }  # fmt: skip


def check(dtype: torch.dtype, states: int, length: int) -> None:
    """A ValueError for what no kernel takes."""
    if dtype not in DTYPES:
        raise ValueError(f"u is {dtype}; this scan takes bfloat16, float16 or float32")
    if states not in BLOCK_CHANNELS:
        raise ValueError(f"state size {states} has no kernel; take one of {sorted(BLOCK_CHANNELS)}")
    if length == 0:
        raise ValueError("the sequence is empty; L must be at least 1")


def empty_saved(
    like: Tensor, k: int, b: int, length: int, d: int, n: int, save: bool, gate: bool
) -> tuple[Tensor, Tensor]:
    """(sum before the gate, states every CHUNK steps) for backward, empty where there is nothing to keep."""
    keep = torch.bfloat16 if like.dtype == torch.bfloat16 else torch.float32
    y = like.new_empty((b, length, d) if save and gate else (0,))
    return y, like.new_empty((k, b, (length + CHUNK - 1) // CHUNK, d, n) if save else (0,), dtype=keep)


def launch_forward(
    u: Tensor,  # [k, b, L, d]
    delta: Tensor,  # [k, b, L, d]
    A: Tensor,  # [k, d, N] fp32
    B: Tensor,  # [k, b, L, N]
    C: Tensor,  # [k, b, L, N]
    D: Tensor,  # [k, d] fp32
    z: Tensor | None,  # [b, L, d]
    delta_bias: Tensor,  # [k, d] fp32
    reverse: Sequence[bool],
    scale: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out [b, L, d], sum of directions before the gate [b, L, d], states every CHUNK steps [k, b, chunks, d, N]);
    the last two are empty unless ``save``. d is a multiple of 16 and rows are 16-byte aligned."""
    k, b, length, d = u.shape
    N = A.shape[-1]
    out = u.new_empty(b, length, d)
    y, states = empty_saved(u, k, b, length, d, N, save, z is not None)
    meta = _meta(u, N, reverse, z is not None)
    _scan_forward[(triton.cdiv(d, BLOCK_CHANNELS[N]), b)](
        u, delta, B, C, u if z is None else z, A, D, delta_bias, out, y if y.numel() else out, states,
        length, scale, *_strides(u), *_strides(delta), *_strides(B), *_strides(C),
        *((0, 0) if z is None else _strides(z)),
        DIRS=k, SAVE=save, num_warps=k, **FORWARD, **meta,
    )  # fmt: skip
    return out, y, states


def launch_backward(
    dout: Tensor,  # [b, L, d]
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    delta_bias: Tensor,
    y: Tensor,
    states: Tensor,
    reverse: Sequence[bool],
    scale: float,
    dB: Tensor,  # [k, b, L, N], written
    dC: Tensor,  # [k, b, L, N], written
    dz: Tensor | None,  # [b, L, d], written
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(du, ddelta [k, b, L, d], dA [k, d, N], dD, ddelta_bias [k, d]), the last three fp32."""
    k, b, length, d = u.shape
    N = A.shape[-1]
    blocks = triton.cdiv(d, BLOCK_CHANNELS[N])
    du, ddelta = u.new_empty(u.shape), u.new_empty(u.shape)
    partial_bc = A.new_empty(blocks, k, b, length, 2 * N)
    partial_params = A.new_empty(k, b, d * (N + 2))
    dA, dD, dbias = A.new_empty(A.shape), A.new_empty(k, d), A.new_empty(k, d)
    gate = z is not None
    _scan_backward[(blocks, b, k)](
        u, delta, B, C, z if gate else u, A, D, delta_bias, y, states, dout,
        du, ddelta, dz if gate else du, partial_bc, partial_params, length, scale,
        *_strides(u), *_strides(delta), *_strides(B), *_strides(C), *(_strides(z) if z is not None else (0, 0)),
        *_strides(dout), *(_strides(dz) if dz is not None else (0, 0)),
        DIRS=k, num_warps=1, **BACKWARD, **_meta(u, N, reverse, gate),
    )  # fmt: skip
    rows, columns = 64, 128
    grid = triton.cdiv(k * b * length, rows) + k * triton.cdiv(d * (N + 2), columns)
    _sum_partials[(grid,)](
        partial_bc, partial_params, dB, dC, dA, dD, dbias, length, b, k, *_strides(dB), *_strides(dC),
        D=d, N=N, PARTIALS=blocks, ROWS=rows, COLUMNS=columns, BATCHES=32,
    )  # fmt: skip
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
    return launch_forward(
        copyable(u), copyable(delta), A.contiguous(), _rows(B), _rows(C), D.contiguous(),
        None if z is None else copyable(z), delta_bias.contiguous(), reverse, scale, save,
    )  # fmt: skip


@_scan.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, reverse, scale, save):
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
    y: Tensor,
    states: Tensor,
    reverse: Sequence[bool],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (u, delta, A, B, C, D, z, delta_bias); z's is empty where there is no z."""
    dB, dC = B.new_empty(B.shape), C.new_empty(C.shape)
    dz = None if z is None else u.new_empty(z.shape)
    du, ddelta, dA, dD, dbias = launch_backward(
        copyable(dout), copyable(u), copyable(delta), A.contiguous(), _rows(B), _rows(C), D.contiguous(),
        None if z is None else copyable(z), delta_bias.contiguous(), y, states, reverse, scale, dB, dC, dz,
    )  # fmt: skip
    return du, ddelta, dA, dB, dC, dD, u.new_empty(0) if dz is None else dz, dbias


@_scan_grad.register_fake
def _(dout, u, delta, A, B, C, D, z, delta_bias, y, states, reverse, scale):
    dz = u.new_empty(0 if z is None else z.shape)
    return (
        u.new_empty(u.shape), u.new_empty(u.shape), A.new_empty(A.shape), B.new_empty(B.shape), C.new_empty(C.shape),
        A.new_empty(D.shape), dz, A.new_empty(delta_bias.shape),
    )  # fmt: skip


def _setup_context(ctx, inputs, output):
    *tensors, ctx.reverse, ctx.scale, _ = inputs
    _, y, states = output
    ctx.save_for_backward(*tensors, y, states)
    ctx.set_materialize_grads(False)  # else zeros are written for y and states


def _backward(ctx, dout, _dy, _dstates):
    if dout is None:
        return (None,) * 11
    *tensors, y, states = ctx.saved_tensors
    du, ddelta, dA, dB, dC, dD, dz, dbias = _scan_grad(dout, *tensors, y, states, ctx.reverse, ctx.scale)
    dz = None if tensors[6] is None else dz
    return du, ddelta, dA, dB, dC, dD, dz, dbias, None, None, None


_scan.register_autograd(_backward, setup_context=_setup_context)


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
    out, _, _ = _scan(*tensors, list(reverse), scale, save)
    return out[..., :d] if pad else out
