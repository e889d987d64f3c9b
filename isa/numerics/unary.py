"""Unary functions as the hardware computes them: integers, one coefficient ROM, one evaluator.

A function is worked out in four steps, all in integers:

1. **Reduce.** The argument m 2^(e-23), with 24-bit m, gives a ROM address and a signed 18-bit offset t.
   exp: |x| log2(e) as m times a 34-bit constant, shifted to 24 fraction bits, rounded half up, and given x's
   sign; its integer part is the result's exponent, the next 6 bits the segment, the rest the offset.
   recip, rsqrt: segment and offset are the mantissa's fraction bits (and, for rsqrt, the exponent's lowest bit).
   The reciprocal of a power of two is not looked up but exact.
   All others: a = |x| in fixed point, rounded half up, segment and offset by position.
2. **Evaluate** a cubic by Horner's rule, three steps of 27 x 18 bits: s <- c + ((s t + 2^16) >> 17).
3. **Combine.** With H the curve, as a 33-bit fraction where it is subtracted: sigmoid(-a) = H, sigmoid(a) = 1 - H,
   GELU and SiLU = x times such a factor, tanh(a) = a H(a) below 4 and 1 - 2 sigmoid(-2a) above.
   sigmoid(-a) is exp(-a) from 18 on.
4. **Round** the integer result to float32, once, nearest even; below 2^-126 it is a zero of its sign.

| quantity | bits |
|---|---|
| ROM word c0, c1, c2, c3, k | 29 unsigned, 27, 25, 21 signed, 6 unsigned |
| t | 18 signed |
| Horner sums | 27 signed, the last 30 unsigned |
| exp: m log2(e) | 24 x 34 -> 58 |
| factor times m | 33 x 24 -> 57 |

From a = 8 on GELU is x or -0; tanh is 1 from 9 on.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from typebar.isa.errors import TypebarError
from typebar.isa.instructions import Function
from typebar.isa.numerics.formats import (
    CANONICAL_NAN,
    EXPONENT,
    MAGNITUDE,
    SIGN,
    F32Array,
    bits_of,
    canonical,
    from_bits,
    is_nan,
)
from typebar.isa.numerics.unary_rom import FRACTION_BITS, OFFSET_BITS, REGIONS, Curve, unpack_word
from typebar.isa.numerics.unary_table import ROM_HEX
from typebar.isa.numerics.vector import maximum

I64Array = NDArray[np.int64]

ROM: I64Array = np.array([unpack_word(int(word, 16)) for word in ROM_HEX.split()], np.int64)
"""The ROM's fields (c0, c1, c2, c3, k) by word: int64 [1024, 5]."""
LOG2_E = 12392656037
"""log2(e) times 2^33, to nearest."""
LOG2_E_FRACTION_BITS = 33
ONE_BITS = 32
"""Fraction bits of a factor that was subtracted from 1."""
SIGMOID_LIMIT = 18
TANH_SPLIT = 4
TANH_LIMIT = 9
GELU_LIMIT = 8
EXP_MAX_EXPONENT = 7
"""exp's argument has its exponent limited to this: 2^7 overflows or underflows already."""

Parts = tuple[I64Array, I64Array]
"""A non-negative integer and a power of two: value = integer * 2^power."""


def _shift_right_rounded(value: I64Array, shift: I64Array) -> I64Array:
    """value * 2^-shift rounded half up, for shifts of either sign (below 62 to the right)."""
    right = np.clip(shift, 0, 61)
    half = np.where(right > 0, np.int64(1) << np.maximum(right - 1, 0), 0)
    return ((value + half) >> right) << np.clip(-shift, 0, 61)


def _evaluate(curve: Curve, segment: I64Array, t: I64Array) -> Parts:
    """The curve's value in a segment at offset t, -2^17 <= t < 2^17."""
    c0, c1, c2, c3, k = ROM[REGIONS[curve].base + segment].T
    half = 1 << (OFFSET_BITS - 2)
    s = c2 + ((c3 * t + half) >> (OFFSET_BITS - 1))
    s = c1 + ((s * t + half) >> (OFFSET_BITS - 1))
    return c0 + ((s * t + half) >> (OFFSET_BITS - 1)), -FRACTION_BITS - k


def _look_up(curve: Curve, position: I64Array) -> Parts:
    """The curve's value at a position counted in units of 2^-18 segments."""
    offset = (position & (1 << OFFSET_BITS) - 1) - (1 << (OFFSET_BITS - 1))
    return _evaluate(curve, position >> OFFSET_BITS, offset)


def _at(curve: Curve, limit: float, m: I64Array, e: I64Array) -> Parts:
    """The curve at a = m 2^(e-23), which callers discard from the limit on (it is held just below)."""
    bits = REGIONS[curve].index_bits + OFFSET_BITS
    position = _shift_right_rounded(m, 23 - bits - np.minimum(e, EXP_MAX_EXPONENT))
    return _look_up(curve, np.minimum(position, int(limit * (1 << bits)) - 1))


def _exp(negative: NDArray[np.bool_], m: I64Array, e: I64Array) -> Parts:
    fraction_bits = REGIONS[Curve.EXP2].index_bits + OFFSET_BITS
    e = np.minimum(e, EXP_MAX_EXPONENT)
    y = _shift_right_rounded(m * LOG2_E, 23 + LOG2_E_FRACTION_BITS - fraction_bits - e)
    y = np.where(negative, -y, y)
    p, power = _look_up(Curve.EXP2, y & ((1 << fraction_bits) - 1))
    return p, power + 1 + (y >> fraction_bits)


def _recip(_negative: NDArray[np.bool_], m: I64Array, e: I64Array) -> Parts:
    p, power = _look_up(Curve.RECIP, m & 0x7FFFFF)
    one = m == 1 << 23
    p = np.where(one, 1 << FRACTION_BITS, p)  # powers of two are exact
    return np.where((e > 126) | ((e == 126) & ~one), 0, p), power - e


def _rsqrt(_negative: NDArray[np.bool_], m: I64Array, e: I64Array) -> Parts:
    odd = e & 1
    p, power = _look_up(Curve.RSQRT, odd << 23 | m & 0x7FFFFF)
    return p, power - ((e - odd) >> 1)


def _complement(p: I64Array, power: I64Array) -> Parts:
    """1 - p 2^power, which must lie in 0 .. 1."""
    return (1 << ONE_BITS) - _fraction(p, power), np.full_like(p, -ONE_BITS)


def _fraction(p: I64Array, power: I64Array) -> I64Array:
    """p 2^power truncated to 32 fraction bits, power <= -29."""
    return (p << (ONE_BITS - FRACTION_BITS)) >> np.minimum(-FRACTION_BITS - power, 61)


def _select(condition: NDArray[np.bool_], a: Parts, b: Parts) -> Parts:
    return np.where(condition, a[0], b[0]), np.where(condition, a[1], b[1])


def _below(m: I64Array, e: I64Array, limit: int) -> NDArray[np.bool_]:
    """m 2^(e-23) < limit."""
    return np.asarray((e < 5) & (_shift_right_rounded(m, -np.clip(e, -38, 5)) < limit << 23))


def _times(parts: Parts, m: I64Array, e: I64Array) -> Parts:
    return parts[0] * m, parts[1] + e - 23


def _sigmoid(negative: NDArray[np.bool_], m: I64Array, e: I64Array) -> Parts:
    table = _at(Curve.SIGMOID, SIGMOID_LIMIT, m, e)
    tail = _exp(np.ones_like(negative), m, e)
    lower = _select(_below(m, e, SIGMOID_LIMIT), table, tail)
    return _select(negative, lower, _complement(*lower))


def _silu(negative: NDArray[np.bool_], m: I64Array, e: I64Array) -> Parts:
    p, power = _times(_sigmoid(negative, m, e), m, e)
    return np.where(negative & (e >= EXP_MAX_EXPONENT), 0, p), power


def _gelu(curve: Curve) -> Callable[[NDArray[np.bool_], I64Array, I64Array], Parts]:
    def gelu(negative: NDArray[np.bool_], m: I64Array, e: I64Array) -> Parts:
        p, power = _at(curve, GELU_LIMIT, m, e)
        p = np.where(_below(m, e, GELU_LIMIT), p, 0)
        return _times(_select(negative, (p, power), _complement(p, power)), m, e)

    return gelu


def _tanh(_negative: NDArray[np.bool_], m: I64Array, e: I64Array) -> Parts:
    small = _times(_at(Curve.TANH, TANH_SPLIT, m, e), m, e)
    p, power = _at(Curve.SIGMOID, SIGMOID_LIMIT, m, e + 1)
    p = np.where(_below(m, e, TANH_LIMIT), p, 0)
    return _select(_below(m, e, TANH_SPLIT), small, _complement(2 * p, power))


_CORES: dict[Function, Callable[[NDArray[np.bool_], I64Array, I64Array], Parts]] = {
    Function.EXP: _exp,
    Function.RECIP: _recip,
    Function.RSQRT: _rsqrt,
    Function.TANH: _tanh,
    Function.SIGMOID: _sigmoid,
    Function.GELU_ERF: _gelu(Curve.GELU_ERF),
    Function.GELU_TANH: _gelu(Curve.GELU_TANH),
    Function.SILU: _silu,
}
_POSITIVE = (Function.EXP, Function.SIGMOID, Function.RSQRT)


def _round(p: I64Array, power: I64Array) -> I64Array:
    """float32 bits of p 2^power, 0 <= p < 2^62: nearest even, below 2^-126 zero, above the largest infinity."""
    length = np.zeros_like(p)
    for step in (32, 16, 8, 4, 2, 1):
        length += np.where(p >> (length + step) > 0, step, 0)
    exponent = length + power  # of the leading one
    drop = np.maximum(length - 23, 0)
    last = (p >> drop) & 1
    half = np.where(drop > 0, np.int64(1) << np.maximum(drop - 1, 0), 0)
    significand = (p + np.where(drop > 0, half - 1 + last, 0)) >> drop << np.maximum(23 - length, 0)
    # Rounding up to 2^24 carries into the exponent field by itself.
    bits = (np.clip(exponent, -126, 128) + 126 << 23) + significand
    return np.where((p == 0) | (exponent < -126), 0, np.minimum(bits, EXPONENT))


def unary(function: Function, x: F32Array) -> F32Array:
    """Apply a unary function to float32 values of any shape, bit for bit as the machine does.

    NaN gives the canonical NaN. exp(-inf) = +0; recip(+-0) = +-inf; rsqrt(+-0) = +inf; rsqrt of a negative value
    is NaN. ReLU is the maximum of x and +0. Raises `TypebarError` for an unknown function.
    """
    if function is Function.RELU:
        return maximum(x, np.zeros_like(x))
    if function not in _CORES:
        raise TypebarError(f"unary function must be one of {[f.name for f in Function]}, not {function!r}")
    x = canonical(x)
    bits = bits_of(x).astype(np.int64)
    sign = bits & SIGN
    exponent = ((bits & EXPONENT) >> 23) - 127
    zero, infinite = (bits & MAGNITUDE) == 0, (bits & MAGNITUDE) == EXPONENT
    result = _round(*_CORES[function](sign != 0, bits & 0x7FFFFF | 0x800000, exponent))
    if function is Function.RECIP:
        result = np.where(zero, EXPONENT, result)
    elif function is Function.RSQRT:
        result = np.where(zero, EXPONENT, np.where(infinite, 0, result))
        result = np.where((sign != 0) & ~zero, CANONICAL_NAN, result)
    elif function in (Function.GELU_ERF, Function.GELU_TANH, Function.SILU):
        result = np.where(infinite, np.where(sign != 0, 0, EXPONENT), result)
    if function not in _POSITIVE:
        result = result | sign
    return from_bits(np.where(is_nan(x), CANONICAL_NAN, result))
