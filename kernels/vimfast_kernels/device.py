"""What Triton 3.6 and 3.9 name differently in Gluon, and the device arithmetic that the kernels share."""

# Device functions are written in Gluon's own dialect: no annotations beyond constexpr, and `if constexpr / else`.
# ruff: noqa: RET505
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

block_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

_PUBLIC_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def view_shared(memory, dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):
    """The same shared memory under another shape."""
    if _PUBLIC_REINTERPRET:
        return memory.reinterpret(dtype, shape, layout)
    else:
        return memory._reinterpret(dtype, shape, layout)


@gluon.jit
def rounded_product(a, b):
    """a b, which the compiler may not fuse with an addition: lanes that add each other's products then agree on every
    bit of the sum, and may all store it."""
    return gl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def sigmoid(v, PRECISE: gl.constexpr):
    """1 / (1 + exp(-v)): one special-function instruction when bf16's eight bits are all that is kept."""
    if PRECISE:
        return 1.0 / (1.0 + gl.exp2(-v * LOG2E))
    else:
        half = gl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [0.5 * v], dtype=gl.float32, is_pure=True, pack=1
        )
        return 0.5 + 0.5 * half


@gluon.jit
def softplus(v, PRECISE: gl.constexpr):
    """log(1 + exp(v)), torch's threshold of 20 included."""
    e = gl.exp2(gl.minimum(v, 20.0) * LOG2E)
    if PRECISE:
        # log1p(e) = 2 atanh(e / (2 + e)) for e <= 1, and v + log1p(1 / e) above; |series error| < 1e-8.
        r = gl.where(v > 0.0, 1.0 / e, e)
        s = r / (2.0 + r)
        s2 = s * s
        p = 0.0666666667 + s2 * 0.0588235294
        p = 0.0769230769 + s2 * p
        p = 0.0909090909 + s2 * p
        p = 0.1111111111 + s2 * p
        p = 0.1428571429 + s2 * p
        p = 0.2 + s2 * p
        p = 0.3333333333 + s2 * p
        log1p = 2.0 * s * (1.0 + s2 * p)
        small = gl.where(v > 0.0, v + log1p, log1p)
    else:
        # lg2.approx is exact to 2^-22 absolutely: too little next to 1, so a series takes over for small e.
        lg2 = gl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + e], dtype=gl.float32, is_pure=True, pack=1
        )
        small = gl.where(e < 0.01, e * (1.0 - e * (0.5 - e * 0.33333333)), lg2 * LN2)
    return gl.where(v > 20.0, v, small)


@gluon.jit
def softplus_in_ln2(w, PRECISE: gl.constexpr):
    """log2(1 + 2^w), softplus counted in units of ln 2: max(w, 0) + q P(q) with q = 2^-|w| and P the polynomial of
    least relative error on [0, 1], 9e-6 or, rounding included, 2e-7. Takes one special-function instruction."""
    q = gl.exp2(-gl.abs(w))
    if PRECISE:
        p = q * 0.00754922302 - 0.0425672345
        p = q * p + 0.1128565
        p = q * p - 0.197119251
        p = q * p + 0.275641561
        p = q * p - 0.358408511
        p = q * p + 0.480692953
        p = q * p - 0.721340179
        p = q * p + 1.44269502
    else:
        p = q * -0.0344358571 + 0.146032751
        p = q * p - 0.303036064
        p = q * p + 0.469173998
        p = q * p - 0.720426142
        p = q * p + 1.44268286
    return q * p + gl.maximum(w, 0.0)


@gluon.jit
def silu(v, PRECISE: gl.constexpr):
    """v / (1 + exp(-v)): one special-function instruction when bf16's eight bits are all that is kept, else two."""
    if PRECISE:
        return v * gl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + gl.exp2(-v * LOG2E)], dtype=gl.float32, is_pure=True, pack=1
        )
    else:
        half = 0.5 * v
        return half + half * gl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [half], dtype=gl.float32, is_pure=True, pack=1
        )


@gluon.jit
def one_minus_exp_neg(v, PRECISE: gl.constexpr):
    """1 - exp(-v) for v >= 0: softplus' derivative from its value."""
    far = 1.0 - gl.exp2(-v * LOG2E)
    if PRECISE:
        # Cancellation next to zero: a series there.
        near = v * (1.0 - v * (0.5 - v * (0.16666667 - v * (0.041666667 - v * 0.0083333333))))
        return gl.where(v < 0.06, near, far)
    else:
        return far


@gluon.jit
def axis(DIM: gl.constexpr, START, SIZE: gl.constexpr, LAYOUT: gl.constexpr):
    """START .. START + SIZE - 1 along one dimension of a 2-D or 3-D layout, the others of size 1."""
    if LAYOUT.rank == 2:
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
def time_of(step, direction, length):
    """Direction 1 walks from the last time to the first."""
    return gl.where(direction == 0, step, length - 1 - step)


@gluon.jit
def copy_rows(shared, base, step, direction, length, time_stride, mask):
    copy_async(shared, base + time_of(step, direction, length) * time_stride, mask=mask & (step < length))


@gluon.jit
def load_rows(base, step, direction, length, time_stride):
    return gl.load(base + time_of(step, direction, length) * time_stride, mask=step < length, other=0.0)
