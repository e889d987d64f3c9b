"""The matrix unit's dot product: exact products, aligned to the largest exponent, truncated, added exactly.

One chunk holds at most `lanes` products. Its sum is worked out as tensor cores do it:

1. A NaN in any present lane makes the sum the canonical NaN.
2. Products that are zero take no part. If none remains the sum is +0.
3. E is the largest sum of the two operands' exponents. (Of the operands, not of the product: 1.5 x 1.5 has E = 0.)
   The exponent of a weight is at least its memory format's `LEAST_EXPONENT`: fp16's subnormals have the exponent of
   its smallest normals, and all of int8 has that of 128, for memory's significands are not normalised.
4. Each exact product's magnitude is truncated to a multiple of 2^(E-23) and given its sign; all are added exactly.
5. An exact zero is +0; any other sum is rounded once to float32, nearest even; 2^128 and above is infinity.

Chunk sums are multiples of 2^-123 and so never subnormal: operands are at least 2^-50. Chunks accumulate in
ascending order by IEEE float32 addition, from +0 or from a given accumulator.
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

ALIGNED_FRACTION_BITS = 23
"""Aligned products are multiples of 2^(E - this)."""


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


def chunk_sum(weights: F32Array, x: F32Array, fmt: Format = Format.FP32) -> F32Array:
    """Sums of one chunk: `weights` [k, n] and `x` [m, k] hold operands, k <= lanes; returns float32 [m, n].

    `fmt` is the memory format of the weights. All k lanes are present; the caller leaves absent lanes out.
    """
    w_significand, w_exponent = _split(weights, LEAST_EXPONENT[fmt])
    x_significand, x_exponent = _split(x, LEAST_EXPONENT[Format.FP32])
    product = x_significand[:, :, None] * w_significand[None]
    exponent = x_exponent[:, :, None] + w_exponent[None]
    takes_part = product != 0
    top = np.where(takes_part, exponent, np.iinfo(np.int64).min).max(axis=1)
    top = np.where(takes_part.any(axis=1), top, 0)
    # A product counts units of 2^(exponent - 20); shifted left by 3 it counts units of 2^(exponent - 23).
    below_top = np.clip(top[:, None, :] - exponent, 0, 63)
    aligned = np.sign(product) * ((np.abs(product) << 3) >> below_top)
    total = aligned.sum(axis=1)
    with np.errstate(over="ignore"):
        value = np.ldexp(total.astype(np.float32), top - ALIGNED_FRACTION_BITS)
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
