"""Exponentials of vectors, exact to two units in the last place of fp32."""

from __future__ import annotations

import math

from vimfast_kernels.llvm.language import Code, Value

LOG2E = math.log2(math.e)
_LN2 = 355 / 512, math.log(2) - 355 / 512  # the first times a small integer is exact
_ROUND = 1.5 * 2**23  # a number added to it is rounded to an integer, and that is then in the sum's last bits

# Polynomials of least relative error: 2^f for |f| <= 1/2 (1e-7, less near 0, since errors of slow decay add up),
# e^f for |f| <= ln(2) / 2 (3e-9), and (q - log(1 + q)) / q^2 for 0 <= q <= 1 (3e-8 of the logarithm).
_EXP2 = (1.0, 0.693147182, 0.240222827, 0.0555055849, 0.00966969132, 0.00133006054)
_EXP = (1.0, 1.0, 0.49999994, 0.166665196, 0.0416683927, 0.00836878084, 0.00138144672)
_LOG = (0.499996483, -0.33321324, 0.248571634, -0.191536561, 0.137538031, -0.0792045444, 0.0300657991, -0.00536482595)


def polynomial(x: Value, coefficients: tuple[float, ...]) -> Value:
    *rest, highest = coefficients
    value = x.code.splat(highest)
    for coefficient in reversed(rest):
        value = value * x + coefficient
    return value


def exp2_of_negative(code: Code, x: Value) -> Value:
    """2^x for x <= 0, at least 2^-125. The scan's: a shorter polynomial, since most of its time goes there."""
    x = code.where(x < -125.0, code.splat(-125.0), x)  # in this order a NaN stays one
    shifted = x + _ROUND
    return _scaled(code, polynomial(x - (shifted - _ROUND), _EXP2), shifted)


def exp2(code: Code, x: Value) -> Value:
    """2^x, at least 2^-125; infinity from 128 on."""
    return exp2_of_negative(code, code.where(x > 128.0, code.splat(128.0), x))


def exp(code: Code, x: Value) -> Value:
    """e^x, at least e^-87 and at most e^88.7."""
    x = code.where(x < -87.0, code.splat(-87.0), x)
    x = code.where(x > 88.7, code.splat(88.7), x)
    shifted = x * LOG2E + _ROUND
    twos = shifted - _ROUND
    return _scaled(code, polynomial(x - twos * _LN2[0] - twos * _LN2[1], _EXP), shifted)


def _scaled(code: Code, x: Value, shifted: Value) -> Value:
    """x 2^n, where shifted = _ROUND + n."""
    return code.floats(code.bits(x) + (code.bits(shifted) << 23))


def silu(code: Code, x: Value) -> Value:
    """x / (1 + exp(-x))."""
    return x / (exp(code, 0.0 - x) + 1.0)


def softplus(code: Code, x: Value) -> Value:
    """log(1 + exp(x)) = max(x, 0) + log(1 + q) with q = exp(-|x|)."""
    q = exp(code, code.where(x > 0.0, 0.0 - x, x))
    return code.where(x < 0.0, code.splat(0.0), x) + (q - q * q * polynomial(q, _LOG))
