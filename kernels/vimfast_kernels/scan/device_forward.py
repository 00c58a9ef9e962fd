"""The forward kernel of the bidirectional selective scan, in Gluon."""

# Device functions are written in Triton's and Gluon's own dialects, which know neither annotations beyond
# constexpr nor starred tuples; an `if` on a constexpr needs its `else`.
# ruff: noqa: RUF005
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,var-annotated"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from vimfast_kernels.device import (
    LN2,
    LOG2E,
    axis,
    block_barrier,
    copy_async,
    silu,
    softplus_in_ln2,
    view_shared,
)
from vimfast_kernels.scan.device_steps import hold_weights, load_factors, time_steps


@gluon.jit
def _times(first, UNROLL: gl.constexpr, start, forth, length):
    """The times of steps first, first + 1 ..; steps past the end repeat the last, whose rows exist."""
    times = ()
    for u in gl.static_range(UNROLL):
        times = times + (start + forth * gl.minimum(first + u, length - 1),)
    return times


@gluon.jit
def _rows(base, times, stride, channel, mask, UNROLL: gl.constexpr):
    rows = ()
    for u in gl.static_range(UNROLL):
        rows = rows + (gl.load(base + (times[u] * stride + channel), mask=mask),)
    return rows


@gluon.jit
def _slots(buffer, first, UNROLL: gl.constexpr, LAYOUT: gl.constexpr):
    rows = ()
    for u in gl.static_range(UNROLL):
        rows = rows + (buffer.index(first + u).load(LAYOUT),)
    return rows


@gluon.jit
def _two_chunks(ELEM: gl.constexpr, CHUNK: gl.constexpr, DIRS: gl.constexpr, BD: gl.constexpr):
    """Shared memory for the rows of a chunk and of the next one, by step and by chunk."""
    ROW: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[2, 1, 0])
    steps = gl.allocate_shared_memory(ELEM, [2 * CHUNK, DIRS, BD], ROW)
    return steps, view_shared(steps, ELEM, [2, CHUNK, DIRS, BD], FLAT)


@gluon.jit
def _left_before(c, length, CHUNK: gl.constexpr):
    """Whether the other direction had left its share of all of chunk c before this one began with chunk c - 1."""
    return 2 * c * CHUNK >= length + CHUNK


@gluon.jit
def _copy_chunk(
    buffers, bases, strides, c, row, start, forth, length, mask,
    DIRS: gl.constexpr, CHUNK: gl.constexpr, RANK: gl.constexpr, GATE: gl.constexpr,
):  # fmt: skip
    """x, delta unless it is projected here and, past the middle, z and the other direction's share, of one chunk."""
    half = c % 2
    time = start + forth * gl.minimum(c * CHUNK + row, length - 1)
    copy_async(buffers[0].index(half), bases[0] + time * strides[0], mask=mask)
    if not RANK:
        copy_async(buffers[1].index(half), bases[1] + time * strides[1], mask=mask)
    if GATE and (DIRS == 1 or 2 * (c + 1) * CHUNK > length):
        copy_async(buffers[2].index(half), bases[2] + time * strides[2], mask=mask)
    if DIRS == 2 and _left_before(c, length, CHUNK):
        copy_async(buffers[3].index(half), bases[3] + time * strides[3], mask=mask)
    async_copy.commit_group()


@gluon.jit(do_not_specialize=["length"])
def scan_forward(
    x_ptr, dt_ptr, w_ptr, b_ptr, c_ptr, z_ptr, a_ptr, skip_ptr, bias_ptr, out_ptr, y_ptr, state_ptr,
    length, scale,
    x_dir, x_batch, x_time, dt_dir, dt_batch, dt_time, b_dir, b_batch, b_time, c_dir, c_batch, c_time,
    z_batch, z_time, out_batch, out_time, y_batch, y_time,
    D: gl.constexpr, N: gl.constexpr, DIRS: gl.constexpr, BD: gl.constexpr, LANES: gl.constexpr, CHUNK: gl.constexpr,
    UNROLL: gl.constexpr, RANK: gl.constexpr, FLIP: gl.constexpr, GATE: gl.constexpr, SAVE: gl.constexpr,
    PRECISE: gl.constexpr,
):  # fmt: skip
    # dt has a column for each channel where RANK is 0; else RANK columns, to be multiplied with w [DIRS, D, RANK].
    # Warp w walks direction w: step s is time s for direction 0 and time L - 1 - s for direction 1. LANES threads
    # share the states of a channel, and repeat what is done once a channel.
    STATE: gl.constexpr = gl.BlockedLayout(
        [1, BD * LANES // 32, N // LANES], [1, 32 // LANES, LANES], [DIRS, 1, 1], [2, 1, 0]
    )
    CHANNEL: gl.constexpr = gl.SliceLayout(2, STATE)
    BC_ROW: gl.constexpr = gl.SliceLayout(1, STATE)
    BC_TILE: gl.constexpr = gl.BlockedLayout([1, 1, 4], [128 // N, 1, N // 4], [1, DIRS, 1], [2, 1, 0])
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[DIRS, 1, 1], instr_shape=[1, 16, 8])
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, ACC, 2)
    ROW: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[2, 1, 0])
    ELEM: gl.constexpr = x_ptr.dtype.element_ty
    KEEP_Y: gl.constexpr = SAVE and GATE
    VEC: gl.constexpr = 128 // ELEM.primitive_bitwidth
    COPY: gl.constexpr = gl.BlockedLayout([1, 1, VEC], [32 * VEC // BD, 1, BD // VEC], [1, DIRS, 1], [2, 1, 0])

    batch = gl.program_id(1)
    first = gl.program_id(0) * BD
    batch64 = batch.to(gl.int64)

    # Indices: (direction, channel, state), (direction, channel), and for B and C (step, direction, state)
    direction = axis(0, 0, DIRS, STATE)
    channel3 = axis(1, first, BD, STATE)
    state_off = channel3 * N + axis(2, 0, N, STATE)
    dr = gl.expand_dims(gl.arange(0, DIRS, gl.SliceLayout(1, CHANNEL)), 1)
    channel = gl.expand_dims(first + gl.arange(0, BD, gl.SliceLayout(0, CHANNEL)), 0)
    # What is read for channels that are not there stays in their lanes and is never stored.
    inside = True if D % BD == 0 else channel < D
    inside3 = True if D % BD == 0 else channel3 < D
    bc_row = axis(0, 0, CHUNK, BC_TILE)
    bc_dir = axis(1, 0, DIRS, BC_TILE)
    bc_n = axis(2, 0, N, BC_TILE)
    copy_row = axis(0, 0, CHUNK, COPY)
    copy_dir = axis(1, 0, DIRS, COPY)
    copy_ch = axis(2, first, BD, COPY)
    copy_mask = copy_ch < D

    a = gl.load(a_ptr + (direction * (D * N) + state_off), mask=inside3)
    skip = gl.load(skip_ptr + (dr * D + channel), mask=inside)

    walk = dr + FLIP  # 1 where time runs down
    forth = 1 - 2 * walk
    start = walk * (length - 1)
    bc_forth = 1 - 2 * (bc_dir + FLIP)
    bc_start = (bc_dir + FLIP) * (length - 1)
    copy_forth = 1 - 2 * (copy_dir + FLIP)
    copy_start = (copy_dir + FLIP) * (length - 1)
    x_copy = x_ptr + batch64 * x_batch + copy_dir.to(gl.int64) * x_dir + copy_ch
    dt_copy = x_copy if RANK else dt_ptr + batch64 * dt_batch + copy_dir.to(gl.int64) * dt_dir + copy_ch
    z_copy = z_ptr + batch64 * z_batch + copy_ch
    y_copy = y_ptr + batch64 * y_batch + copy_ch
    b_base = b_ptr + batch64 * b_batch + bc_dir.to(gl.int64) * b_dir
    c_base = c_ptr + batch64 * c_batch + bc_dir.to(gl.int64) * c_dir
    out_base = out_ptr + batch64 * out_batch
    y_base = y_ptr + batch64 * y_batch
    chunks = gl.cdiv(length, CHUNK)
    line = (direction * gl.num_programs(1) + batch).to(gl.int64)  # which sequence of the stack
    state_at = state_ptr + line * chunks * (D * N)

    s_b = gl.allocate_shared_memory(gl.float32, [CHUNK, DIRS, N], ROW)
    s_c = gl.allocate_shared_memory(gl.float32, [CHUNK, DIRS, N], ROW)
    s_b3 = view_shared(s_b, gl.float32, [CHUNK, DIRS, N], FLAT)
    s_c3 = view_shared(s_c, gl.float32, [CHUNK, DIRS, N], FLAT)

    s_x, s_x4 = _two_chunks(ELEM, CHUNK, DIRS, BD)
    s_delta, s_delta4 = (s_x, s_x4) if RANK else _two_chunks(ELEM, CHUNK, DIRS, BD)
    s_z, s_z4 = _two_chunks(ELEM, CHUNK, DIRS, BD) if GATE else (s_x, s_x4)
    s_y, s_y4 = _two_chunks(ELEM, CHUNK, DIRS, BD) if DIRS == 2 else (s_x, s_x4)
    buffers = (s_x4, s_delta4, s_z4, s_y4)
    bases = (x_copy, dt_copy, z_copy, y_copy)
    strides = (x_time, dt_time, z_time, y_time)

    if RANK:
        weights = hold_weights(w_ptr, first, D, RANK, DIRS, BD, D, 0)
        step_ch = axis(1, first, BD, ACC)
        bias = gl.load(bias_ptr + (axis(0, 0, DIRS, ACC) * D + step_ch), mask=step_ch < D, other=0.0) * LOG2E
        low_dir = axis(0, 0, DIRS, RIGHT)
        low_row = axis(2, 0, CHUNK, RIGHT)
        low_forth = 1 - 2 * (low_dir + FLIP)
        low_start = (low_dir + FLIP) * (length - 1)
        low_base = dt_ptr + gl.multiple_of(batch64 * dt_batch + low_dir.to(gl.int64) * dt_dir, [8, 8, 8])
        low_time = low_start + low_forth * gl.minimum(low_row, length - 1)
        low = load_factors(low_base, low_time, dt_time, RANK, DIRS, RIGHT)
        s_dt = gl.allocate_shared_memory(gl.float32, [CHUNK, DIRS, BD], ROW)
        s_dt3 = view_shared(s_dt, gl.float32, [CHUNK, DIRS, BD], FLAT)
        block_barrier()
    else:
        bias = gl.load(bias_ptr + (dr * D + channel), mask=inside) * LOG2E

    # Always on their way while the chunk before is worked on: B, C and the factors of the time steps to registers, all
    # else to shared memory. A load to a register would wait for others, since few can be told apart.
    bc_time = bc_start + bc_forth * gl.minimum(bc_row, length - 1)
    b_next = gl.load(b_base + (bc_time * b_time + bc_n))
    c_next = gl.load(c_base + (bc_time * c_time + bc_n))
    _copy_chunk(
        buffers, bases, strides, 0, copy_row, copy_start, copy_forth, length, copy_mask, DIRS, CHUNK, RANK, GATE
    )
    h = gl.zeros([DIRS, BD, N], gl.float32, STATE)
    for c in range(chunks):
        if RANK:
            dts = gl.permute(time_steps(weights, low, bias, DIRS, BD, CHUNK, ACC, PRECISE), (2, 0, 1))
        async_copy.wait_group(0)
        block_barrier()
        if c + 1 < chunks:
            _copy_chunk(
                buffers, bases, strides, c + 1, copy_row, copy_start, copy_forth, length, copy_mask,
                DIRS, CHUNK, RANK, GATE,
            )  # fmt: skip
        if RANK:
            s_dt3.store(dts)
        # Step sizes are counted in units of ln 2, which spares the exponents a product; B makes up for it.
        s_b3.store(b_next.to(gl.float32) * LN2)
        s_c3.store(c_next.to(gl.float32))
        block_barrier()
        bc_time = bc_start + bc_forth * gl.minimum((c + 1) * CHUNK + bc_row, length - 1)
        b_next = gl.load(b_base + (bc_time * b_time + bc_n))
        c_next = gl.load(c_base + (bc_time * c_time + bc_n))
        if RANK:
            low_time = low_start + low_forth * gl.minimum((c + 1) * CHUNK + low_row, length - 1)
            low = load_factors(low_base, low_time, dt_time, RANK, DIRS, RIGHT)
        if SAVE:
            gl.store(state_at + (c * (D * N) + state_off), h.to(state_ptr.dtype.element_ty), mask=inside3)

        for u0 in range(0, CHUNK, UNROLL):
            # Whichever direction reaches a time first leaves its share in y; the other one adds, gates and writes.
            # With both at step s + u, the other has been there UNROLL steps ago or more for u >= met + UNROLL, and
            # is still to come there for u < met; where both pass in the same UNROLL steps, direction 1 adds.
            step = c * CHUNK + u0
            slot = c % 2 * CHUNK + u0
            met = length - UNROLL - 2 * step if DIRS == 2 else 0
            now = _times(step, UNROLL, start, forth, length)

            ys = ()
            for u in gl.static_range(UNROLL):
                x = s_x.index(slot + u).load(CHANNEL).to(gl.float32)
                if RANK:
                    dt = s_dt.index(u0 + u).load(CHANNEL)
                else:
                    delta = s_delta.index(slot + u).load(CHANNEL).to(gl.float32)
                    dt = softplus_in_ln2(delta * LOG2E + bias, PRECISE)
                decay = gl.exp2(gl.expand_dims(dt, 2) * a)
                b = gl.expand_dims(s_b.index(u0 + u).load(BC_ROW), 1)
                h = decay * h + b * gl.expand_dims(dt * x, 2)
                y = gl.sum(h * gl.expand_dims(s_c.index(u0 + u).load(BC_ROW), 1), 2)
                ys = ys + (y + skip * x,)

            if DIRS == 2 and met >= UNROLL:
                for u in gl.static_range(UNROLL):
                    gl.store(y_base + (now[u] * y_time + channel), ys[u].to(ELEM), mask=inside)
            else:
                first_met = 0
                z = _slots(s_z, slot, UNROLL, CHANNEL) if GATE else ()
                if DIRS == 2:
                    first_met = met + UNROLL * (1 - dr)
                    share = _slots(s_y, slot, UNROLL, CHANNEL)
                    if not _left_before(c, length, CHUNK):
                        for u in gl.static_range(UNROLL):
                            gl.store(
                                y_base + (now[u] * y_time + channel), ys[u].to(ELEM), mask=(u < first_met) & inside
                            )
                        block_barrier()
                        share = _rows(y_base, now, y_time, channel, inside, UNROLL)
                for u in gl.static_range(UNROLL):
                    mask = (u >= first_met) & (step + u < length) & inside
                    y = ys[u]
                    if DIRS == 2:
                        y += share[u].to(gl.float32)
                    if KEEP_Y:
                        gl.store(y_base + (now[u] * y_time + channel), y.to(ELEM), mask=mask)
                    if GATE:
                        y *= silu(z[u].to(gl.float32), PRECISE)
                    gl.store(out_base + (now[u] * out_time + channel), (y * scale).to(ELEM), mask=mask)
