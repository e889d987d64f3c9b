"""The vector unit's float32 arithmetic: round to nearest even, subnormals flushed, one NaN.

Inputs with exponent field 0 count as zeros of their sign. A result whose exact magnitude, before rounding, is
below 2^-126 is a zero of its sign. Every NaN result is 0x7FC00000. Nothing is fused.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from typebar.isa.numerics.formats import (
    MIN_NORMAL,
    SIGN,
    F32Array,
    NumericFlag,
    bits_of,
    canonical,
    from_bits,
    is_nan,
)


def _flush_tiny(exact: NDArray[np.float64], rounded: F32Array) -> F32Array:
    """Replace results whose exact magnitude is below 2^-126 by zeros of their sign, and NaN by the one NaN."""
    tiny = np.abs(exact) < MIN_NORMAL
    return canonical(from_bits(np.where(tiny, bits_of(rounded) & SIGN, bits_of(rounded))))


def add(a: F32Array, b: F32Array) -> F32Array:
    """a + b, element by element (NumPy broadcasting)."""
    a, b = canonical(a), canonical(b)
    with np.errstate(all="ignore"):
        # A float64 sum is not always exact, but float32 sums below 2^-126 are exact in either.
        return _flush_tiny(a.astype(np.float64) + b, a + b)


def sub(a: F32Array, b: F32Array) -> F32Array:
    """a - b, element by element: the sum of a and b with b's sign inverted."""
    return add(a, from_bits(bits_of(b) ^ SIGN))


def mul(a: F32Array, b: F32Array) -> F32Array:
    """a * b, element by element."""
    a, b = canonical(a), canonical(b)
    with np.errstate(all="ignore"):
        exact = a.astype(np.float64) * b  # 48 significant bits: always exact
        return _flush_tiny(exact, exact.astype(np.float32))


def _order(x: F32Array) -> NDArray[np.int64]:
    """Integers ordered like the maximum: -inf < ... < -0 < +0 < ... < +inf < NaN."""
    bits = bits_of(canonical(x)).astype(np.int64)
    return np.where(bits & SIGN, SIGN - 1 - bits, bits)


def maximum(a: F32Array, b: F32Array) -> F32Array:
    """The larger of a and b, element by element: NaN wins, +0 is larger than -0."""
    return np.where(_order(a) >= _order(b), canonical(a), canonical(b))


def tree_sum(x: F32Array) -> F32Array:
    """Sum over the last axis: the balanced tree of adjacent pairs, extended with +0 to a power of two.

    The sum of an empty vector is +0, the sum of one element is that element.
    """
    length = x.shape[-1]
    padded = np.zeros((*x.shape[:-1], 1 << max(length - 1, 0).bit_length()), np.float32)
    padded[..., :length] = canonical(x)
    while padded.shape[-1] > 1:
        padded = add(padded[..., 0::2], padded[..., 1::2])
    return padded[..., 0]


def sum_squares(x: F32Array) -> F32Array:
    """Sum of squares over the last axis: each square rounded to float32, then the tree of `tree_sum`."""
    return tree_sum(mul(x, x))


def reduce_max(x: F32Array) -> F32Array:
    """Largest value over the last axis, ordered like `maximum`; -infinity for an empty vector."""
    if x.shape[-1] == 0:
        return np.full(x.shape[:-1], -np.inf, np.float32)
    order = _order(x)
    return np.take_along_axis(canonical(x), order.argmax(axis=-1)[..., None], axis=-1)[..., 0]


def running_max(start: F32Array, x: F32Array) -> F32Array:
    """`maximum` of a start value [...] and the largest value over the last axis of x [..., n]."""
    return maximum(start, reduce_max(x))


def argmax(x: F32Array) -> tuple[int, np.float32, NumericFlag]:
    """Index and value of the largest element of a vector [n].

    NaN counts as -infinity and raises `ARGMAX_NAN`; -0 equals +0; the lowest index wins ties.
    An empty vector gives index 0 and -infinity.
    """
    if x.size == 0:
        return 0, np.float32(-np.inf), NumericFlag.NONE
    nan = is_nan(x)
    values = np.where(nan, np.float32(-np.inf), canonical(x))
    index = int(np.argmax(values))
    return index, values[index], NumericFlag.ARGMAX_NAN if nan.any() else NumericFlag.NONE
