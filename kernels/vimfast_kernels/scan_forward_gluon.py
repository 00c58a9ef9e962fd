"""The forward kernel of the bidirectional selective scan, in Gluon."""

# Device functions are written in Triton's and Gluon's own dialects, which know neither annotations beyond
# constexpr nor starred tuples; an `if` on a constexpr needs its `else`.
# ruff: noqa: SIM102
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,var-annotated"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from vimfast_kernels._gluon import (
    LOG2E,
    axis,
    block_barrier,
    copy_rows,
    load_rows,
    sigmoid,
    softplus,
    time_of,
    view_shared,
)


@gluon.jit(do_not_specialize=["length"])
def scan_forward(
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
    direction = axis(0, 0, DIRS, STATE)
    channel = axis(1, first, BD, STATE)
    state_off = channel * N + axis(2, 0, N, STATE)
    state_mask = channel < D
    a = gl.load(a_ptr + direction * (D * N) + state_off, mask=state_mask, other=0.0) * LOG2E
    tile_row = axis(0, 0, CHUNK, TILE)
    tile_dir = axis(1, 0, DIRS, TILE)
    tile_ch = axis(2, first, BD, TILE)
    tile_mask = tile_ch < D
    skip = gl.load(skip_ptr + tile_dir * D + tile_ch, mask=tile_mask, other=0.0)
    bias = gl.load(bias_ptr + tile_dir * D + tile_ch, mask=tile_mask, other=0.0)
    copy_row = axis(0, 0, CHUNK, COPY)
    copy_dir = axis(1, 0, DIRS, COPY)
    copy_ch = axis(2, first, BD, COPY)
    copy_mask = copy_ch < D
    bc_row = axis(0, 0, CHUNK, BC_TILE)
    bc_dir = axis(1, 0, DIRS, BC_TILE)
    bc_n = axis(2, 0, N, BC_TILE)

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
    copy_rows(s_x.index(0), x_base, copy_row, copy_dir + FLIP, length, x_time, copy_mask)
    copy_rows(s_dt.index(0), dt_base, copy_row, copy_dir + FLIP, length, dt_time, copy_mask)
    async_copy.commit_group()
    b_next = load_rows(b_base, bc_row, bc_dir + FLIP, length, b_time)
    c_next = load_rows(c_base, bc_row, bc_dir + FLIP, length, c_time)
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
        copy_rows(s_x.index((c + 1) % 2), x_base, ahead + copy_row, copy_dir + FLIP, length, x_time, copy_mask)
        copy_rows(s_dt.index((c + 1) % 2), dt_base, ahead + copy_row, copy_dir + FLIP, length, dt_time, copy_mask)
        async_copy.commit_group()
        b_next = load_rows(b_base, ahead + bc_row, bc_dir + FLIP, length, b_time)
        c_next = load_rows(c_base, ahead + bc_row, bc_dir + FLIP, length, c_time)

        # Whichever direction reaches a time first leaves its share in y; the other one adds, gates and writes.
        time = time_of(step, tile_dir + FLIP, length)
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
