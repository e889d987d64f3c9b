"""Unary functions element by element, in integers, from the ROM: `typebar.isa.numerics.unary` made fast."""

from __future__ import annotations

import numpy as np

from typebar.isa.instructions import Function
from typebar.isa.numerics.unary import (
    EXP_MAX_EXPONENT,
    GELU_LIMIT,
    LOG2_E,
    LOG2_E_FRACTION_BITS,
    ONE_BITS,
    ROM,
    SIGMOID_LIMIT,
    TANH_LIMIT,
    TANH_SPLIT,
)
from typebar.isa.numerics.unary_rom import FRACTION_BITS, OFFSET_BITS, REGIONS, Curve
from typebar.sim.kernels_bits import EXPONENT, NAN_BITS, bits_f32, canonical, f32_bits, f32_max
from typebar.sim.kernels_jit import compiled

_HALF = 1 << (OFFSET_BITS - 2)
_EXP2, _EXP2_BITS = REGIONS[Curve.EXP2].base, REGIONS[Curve.EXP2].index_bits + OFFSET_BITS
_RECIP, _RSQRT = REGIONS[Curve.RECIP].base, REGIONS[Curve.RSQRT].base
_SIGMOID, _SIGMOID_BITS = REGIONS[Curve.SIGMOID].base, REGIONS[Curve.SIGMOID].index_bits + OFFSET_BITS
_TANH, _TANH_BITS = REGIONS[Curve.TANH].base, REGIONS[Curve.TANH].index_bits + OFFSET_BITS
_GELU_ERF, _GELU_TANH = REGIONS[Curve.GELU_ERF].base, REGIONS[Curve.GELU_TANH].base
_GELU_BITS = REGIONS[Curve.GELU_ERF].index_bits + OFFSET_BITS
EXP, RECIP, RSQRT = int(Function.EXP), int(Function.RECIP), int(Function.RSQRT)
TANH, SIGMOID, SILU = int(Function.TANH), int(Function.SIGMOID), int(Function.SILU)
GELU_ERF, GELU_TANH, RELU = int(Function.GELU_ERF), int(Function.GELU_TANH), int(Function.RELU)


@compiled
def _shift(value, right):  # type: ignore[no-untyped-def]
    """value * 2^-right, rounded half up."""
    if right <= 0:
        return value << -right
    return (value + (np.int64(1) << (min(right, 61) - 1))) >> min(right, 61)


@compiled
def _curve(base, position):  # type: ignore[no-untyped-def]
    """(p, power) of a curve at a position in units of 2^-18 segments."""
    word = ROM[base + (position >> OFFSET_BITS)]
    t = (position & ((1 << OFFSET_BITS) - 1)) - (1 << (OFFSET_BITS - 1))
    s = word[2] + ((word[3] * t + _HALF) >> (OFFSET_BITS - 1))
    s = word[1] + ((s * t + _HALF) >> (OFFSET_BITS - 1))
    return word[0] + ((s * t + _HALF) >> (OFFSET_BITS - 1)), -FRACTION_BITS - word[4]


@compiled
def _at(base, bits, m, e):  # type: ignore[no-untyped-def]
    """(p, power) of a curve at m 2^(e-23), which lies below the curve's limit."""
    return _curve(base, _shift(m, 23 - bits - e))


@compiled
def _exp(negative, m, e):  # type: ignore[no-untyped-def]
    y = _shift(m * LOG2_E, 23 + LOG2_E_FRACTION_BITS - _EXP2_BITS - min(e, EXP_MAX_EXPONENT))
    if negative:
        y = -y
    p, power = _curve(_EXP2, y & ((1 << _EXP2_BITS) - 1))
    return p, power + 1 + (y >> _EXP2_BITS)


@compiled
def _complement(p, power):  # type: ignore[no-untyped-def]
    """1 - p 2^power."""
    shift = min(-FRACTION_BITS - power, 61)
    return (np.int64(1) << ONE_BITS) - ((p << (ONE_BITS - FRACTION_BITS)) >> shift), np.int64(-ONE_BITS)


@compiled
def _sigmoid(negative, m, e, a):  # type: ignore[no-untyped-def]
    p, power = _at(_SIGMOID, _SIGMOID_BITS, m, e) if a < SIGMOID_LIMIT else _exp(True, m, e)
    return (p, power) if negative else _complement(p, power)


@compiled
def _factor(function, negative, m, e, a):  # type: ignore[no-untyped-def]
    """The factor that GELU or SiLU multiplies x with."""
    if function == SILU:
        p, power = _sigmoid(negative, m, e, a)
        return (np.int64(0), power) if negative and e >= EXP_MAX_EXPONENT else (p, power)
    p, power = np.int64(0), np.int64(-FRACTION_BITS)
    if a < GELU_LIMIT:
        p, power = _at(_GELU_ERF if function == GELU_ERF else _GELU_TANH, _GELU_BITS, m, e)
    return (p, power) if negative else _complement(p, power)


@compiled
def _tanh(m, e, a):  # type: ignore[no-untyped-def]
    if a < TANH_SPLIT:
        p, power = _at(_TANH, _TANH_BITS, m, e)
        return p * m, power + e - 23
    p, power = np.int64(0), np.int64(-FRACTION_BITS)
    if a < TANH_LIMIT:
        p, power = _at(_SIGMOID, _SIGMOID_BITS, m, e + 1)
    return _complement(2 * p, power)


@compiled
def _round(p, power):  # type: ignore[no-untyped-def]
    """float32 bits of p 2^power, p >= 0."""
    if p == 0:
        return np.int64(0)
    length = np.int64(0)
    for step in (32, 16, 8, 4, 2, 1):
        if p >> (length + step) > 0:
            length += step
    exponent = length + power
    if exponent < -126:
        return np.int64(0)
    if length > 23:
        drop = length - 23
        p = (p + (np.int64(1) << (drop - 1)) - 1 + ((p >> drop) & 1)) >> drop
    else:
        p <<= 23 - length
    return min((min(exponent, 128) + 126 << 23) + p, np.int64(EXPONENT))


@compiled
def _finite(function, negative, m, e, a):  # type: ignore[no-untyped-def]
    """Magnitude bits of a function of +-m 2^(e-23), where no special case applies."""
    if function == EXP:
        p, power = _exp(negative, m, e)
    elif function == RECIP:
        p, power = _curve(_RECIP, m & 0x7FFFFF)
        power -= e
        if m == 1 << 23:
            p = np.int64(1 << FRACTION_BITS)
        if e > 126 or (e == 126 and m != 1 << 23):
            p = np.int64(0)
    elif function == RSQRT:
        odd = e & 1
        p, power = _curve(_RSQRT, odd << 23 | m & 0x7FFFFF)
        power -= (e - odd) >> 1
    elif function == TANH:
        p, power = _tanh(m, e, a)
    elif function == SIGMOID:
        p, power = _sigmoid(negative, m, e, a)
    else:
        p, power = _factor(function, negative, m, e, a)
        p, power = p * m, power + e - 23
    return _round(p, power)


@compiled
def f32_unary(function, x):  # type: ignore[no-untyped-def]
    """A unary function of one value; `function` is a `Function` number."""
    if function == RELU:
        return f32_max(x, np.float32(0))
    x = canonical(x)
    if x != x:
        return x
    bits = np.int64(f32_bits(x))
    negative = bits < 0
    sign = bits & 0x80000000
    magnitude = bits & 0x7FFFFFFF
    e = (magnitude >> 23) - 127
    m = magnitude & 0x7FFFFF | 0x800000
    infinite = magnitude == EXPONENT
    if function == RSQRT and (negative or infinite):
        result = np.int64(EXPONENT if magnitude == 0 else NAN_BITS if negative else 0)
    elif magnitude == 0 and function in (RECIP, RSQRT):
        result = np.int64(EXPONENT)
    elif infinite and function in (SILU, GELU_ERF, GELU_TANH):
        result = np.int64(0 if negative else EXPONENT)
    else:
        result = _finite(function, negative, m, e, bits_f32(magnitude))
    if function != EXP and function != SIGMOID and function != RSQRT:
        result |= sign
    return bits_f32(result)


@compiled
def unary_kernel(function, x, out):  # type: ignore[no-untyped-def]
    """out = function of x, both contiguous float32 [n]."""
    for i in range(x.size):
        out[i] = f32_unary(function, x[i])
