"""The matrix unit's dot product: operands aligned to one exponent each a chunk, truncated; products and sum exact.

One chunk holds at most `lanes` products. Its sum is worked out so that a lane is one multiplier and one adder:

1. A NaN in any present lane makes the sum the canonical NaN.
2. A lane takes part if its element of the vector is not zero. If none does the sum is +0.
3. Ex is the largest exponent of the vector's elements, Ew the largest of the column's weights that are not zero, both
   of lanes that take part. Ex is the same for all columns. The exponent of a weight is at least its memory format's
   `LEAST_EXPONENT`: fp16's subnormals have the exponent of its smallest normals, and all of int8 has that of 128, for
   memory's significands are not normalised.
   Ew is then rounded up to a multiple of `WEIGHT_STEP`, so that hardware shifts weights by whole steps.
4. The vector's magnitudes are truncated to multiples of 2^(Ex-23), `VECTOR_BITS` bits, the weights' to multiples of
   2^(Ew-16), `WEIGHT_BITS` bits; of weights below 2^(Ew-15) nothing is kept. The products, with their signs, are
   added exactly.
5. An exact zero is +0; any other sum is rounded once to float32, nearest even; 2^128 and above is infinity.

Chunk sums are multiples of 2^-120 and so never subnormal: operands are at least 2^-50 and have 11 significant bits,
and what is truncated ends higher. Chunks accumulate in ascending order by IEEE float32 addition, from +0 or from a
given accumulator.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from typebar.isa.errors import TypebarError
from typebar.isa.instructions import Format
from typebar.isa.numerics.formats import (
    CANONICAL_NAN,
    EXPONENT,
    LEAST_EXPONENT,
    F32Array,
    NumericFlag,
    bits_of,
    from_bits,
    is_nan,
    to_operand,
)
from typebar.isa.numerics.vector import add

SIGNIFICAND_BITS = 11
"""Bits of an operand's significand, the leading one among them."""
VECTOR_BITS = 24
"""Bits of an aligned vector element's magnitude."""
WEIGHT_BITS = 17
"""Bits of an aligned weight's magnitude: with a sign, the narrow side of a DSP slice's 27 x 18-bit multiplier."""
WEIGHT_STEP = 4
"""Ew is a multiple of this."""
SUM_FRACTION_BITS = VECTOR_BITS - 1 + WEIGHT_BITS - 1
"""A chunk's exact sum counts units of 2^(Ex + Ew - this)."""


def sum_bits(lanes: int) -> int:
    """Bits of the exact sum of a chunk of `lanes` products, sign included: 48, a DSP slice's adder, for 64 lanes.

    Magnitudes of operands do not depend on `lanes`, only the sum's width does: 128 lanes need 49 bits.
    """
    return VECTOR_BITS + WEIGHT_BITS + (lanes - 1).bit_length() + 1


def _split(operand: F32Array, least: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Signed 11-bit significands, and exponents of at least `least`; NaN is not split.

    operand = significand * 2^(exponent - 10), exactly: an element of the format with this least exponent has no bits
    below its last place.
    """
    bits = bits_of(operand).astype(np.int64)
    field = (bits & EXPONENT) >> 23
    exponent = np.maximum(field - 127, least)
    significand = np.where(field == 0, 0, (bits & 0x7FFFFF | 0x800000) >> 13 >> np.minimum(exponent - field + 127, 63))
    return np.where(bits >> 31 == 1, -significand, significand), exponent


def _align(
    significand: NDArray[np.int64], exponent: NDArray[np.int64], counts: NDArray[np.bool_], bits: int, step: int = 1
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Signed magnitudes of `bits` bits below the largest exponent of those that count, and that exponent (0: none).

    It is rounded up to a multiple of `step`; with one, what lies four or more below is 0. The lanes are axis 1.
    Elements that do not count are 0.
    """
    top = np.where(counts, exponent, np.iinfo(np.int64).min).max(axis=1, keepdims=True)
    top = np.where(counts.any(axis=1, keepdims=True), -(-top // step) * step, 0)
    below = np.clip(top - exponent, 0, 63)
    near = counts & (below < (bits if step == 1 else 4 * step))
    magnitude = np.where(near, np.abs(significand) << (bits - SIGNIFICAND_BITS) >> below, 0)
    return np.sign(significand) * magnitude, top


def chunk_sum(weights: F32Array, x: F32Array, fmt: Format = Format.FP32) -> F32Array:
    """Sums of one chunk: `weights` [k, n] and `x` [m, k] hold operands, k <= lanes; returns float32 [m, n].

    `fmt` is the memory format of the weights. All k lanes are present; the caller leaves absent lanes out.
    """
    w_significand, w_exponent = _split(weights, LEAST_EXPONENT[fmt])
    x_significand, x_exponent = _split(x, LEAST_EXPONENT[Format.FP32])
    takes_part = x_significand != 0
    x_aligned, x_top = _align(x_significand, x_exponent, takes_part, VECTOR_BITS)
    counts = takes_part[:, :, None] & (w_significand != 0)
    w_aligned, w_top = _align(w_significand[None], w_exponent[None], counts, WEIGHT_BITS, WEIGHT_STEP)
    total = (x_aligned[:, :, None] * w_aligned).sum(axis=1)
    with np.errstate(over="ignore"):
        value = np.ldexp(total.astype(np.float32), x_top + w_top[:, 0] - SUM_FRACTION_BITS)
    nan = np.logical_or.outer(is_nan(x).any(axis=1), is_nan(weights).any(axis=0))
    return from_bits(np.where(nan, CANONICAL_NAN, bits_of(value)))


def dot(
    weights: F32Array, x: F32Array, lanes: int, acc: F32Array | None = None, *, fmt: Format
) -> tuple[F32Array, NumericFlag]:
    """Product of vectors and a matrix as the matrix unit computes it.

    `weights` is float32 [k, n], decoded from the memory format `fmt`, `x` float32 [m, k] (register values; both are
    converted to operands), `acc` float32 [m, n] to start from instead of +0. Returns float32 [m, n] and the flags of
    both conversions.
    Raises `TypebarError` if the shapes disagree or `lanes` is not positive.
    """
    if weights.ndim != 2 or x.ndim != 2 or weights.shape[0] != x.shape[1] or lanes < 1:
        raise TypebarError(
            f"dot needs weights [k, n], x [m, k] and lanes >= 1, not {weights.shape}, {x.shape} and {lanes}"
        )
    w_operand, w_flags = to_operand(weights)
    x_operand, x_flags = to_operand(x)
    total = np.zeros((x.shape[0], weights.shape[1]), np.float32) if acc is None else acc
    for first in range(0, x.shape[1], lanes):
        chunk = slice(first, first + lanes)
        total = add(total, chunk_sum(w_operand[chunk], x_operand[:, chunk], fmt))
    return total, w_flags | x_flags
