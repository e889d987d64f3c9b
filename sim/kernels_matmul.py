"""The matrix unit's dot products over packed weights, fast.

Products of two operands are exact in float32 (22 significant bits), so a chunk is two passes of vector
instructions: the largest sum of exponents E, then the sum of w x 2^(23-E), each term truncated to an integer below
2^25. Chunks whose E leaves float32's range, or that hold an infinity or a NaN, take an exact integer path.
"""

from __future__ import annotations

import numpy as np

from typebar.sim.kernels_bits import (
    EXPONENT,
    FLAG_OPERAND_OVERFLOW,
    MAGNITUDE,
    NAN_BITS,
    OPERAND_MAX_BITS,
    SIGN,
    bits_f32,
    canonical,
    f32_add,
    f32_bits,
)
from typebar.sim.kernels_jit import compiled
from typebar.sim.kernels_simd import GROUP, as_operand, decode_groups, multiply_groups, sum_groups

MAX_FAST_EXPONENT = 125
"""Up to this E a product is below 2^127 and fits float32."""
PATCH_COLUMN = 1
PATCH_LANE = 2


@compiled
def convert_vectors(x, k, lanes, padded, operands, powers, has_nan):  # type: ignore[no-untyped-def]
    """Operands of the first k values of each row of x [m, k], and 2^exponent of each (0 for zero).

    Both results are one-dimensional, m rows of chunks of `lanes` lanes stored `padded` wide; they start as zeros.
    `has_nan` [m, chunks] tells which chunks hold a NaN. Returns flags.
    """
    flags = 0
    chunks = has_nan.shape[1]
    for r in range(x.shape[0]):
        row = x[r]
        for i in range(k):
            at = (r * chunks + i // lanes) * padded + i % lanes
            value = as_operand(row[i])
            if f32_bits(value) & MAGNITUDE == EXPONENT:
                value = bits_f32((f32_bits(value) & SIGN) | OPERAND_MAX_BITS)
                flags = FLAG_OPERAND_OVERFLOW
            if value != value:
                has_nan[r, i // lanes] = True
            operands[at] = value
            powers[at] = bits_f32(f32_bits(value) & EXPONENT)
    return flags


@compiled
def _decode_rest(raw, at, first, count, padded, values):  # type: ignore[no-untyped-def]
    """Operands of the elements first..count-1 of a chunk that starts at index `at`, and zeros up to `padded`."""
    for i in range(first, padded):
        values[i] = as_operand(raw[at + i]) if i < count else np.float32(0)


@compiled
def _exact_sum(w, x, at, count, least):  # type: ignore[no-untyped-def]
    """A chunk's sum by integers, for any operands, the exponent of w being at least `least`; returns (sum, flags)."""
    flags = 0
    top = np.int64(-1000)
    nan = False
    for i in range(count):
        w_bits, x_bits = np.int64(f32_bits(w[i]) & MAGNITUDE), np.int64(f32_bits(x[at + i]) & MAGNITUDE)
        if w_bits == EXPONENT:
            flags = FLAG_OPERAND_OVERFLOW
            w_bits = np.int64(OPERAND_MAX_BITS)
        if w_bits > EXPONENT or x_bits > EXPONENT:
            nan = True
        if w_bits != 0 and x_bits != 0:
            top = max(top, max(w_bits >> 23, least) + (x_bits >> 23) - 254)
    if nan:
        return bits_f32(NAN_BITS), flags
    total = np.int64(0)
    for i in range(count):
        w_bits, x_bits = np.int64(f32_bits(w[i]) & MAGNITUDE), np.int64(f32_bits(x[at + i]) & MAGNITUDE)
        if w_bits == EXPONENT:
            w_bits = np.int64(OPERAND_MAX_BITS)
        if w_bits == 0 or x_bits == 0:
            continue
        product = ((w_bits & 0x7FFFFF | 0x800000) >> 13) * ((x_bits & 0x7FFFFF | 0x800000) >> 13) << 3
        product >>= min(np.int64(63), top - ((w_bits >> 23) + (x_bits >> 23) - 254))
        negative = (f32_bits(w[i]) ^ f32_bits(x[at + i])) < 0
        total += -product if negative else product
    # float64 holds the rounded sum's range, and scaling by a power of two is exact in it.
    return np.float32(np.float64(np.float32(total)) * 2.0 ** np.float64(top - 23)), flags


@compiled
def matmul_columns(  # type: ignore[no-untyped-def]
    stored, operands, powers, has_nan, k, lanes, padded, width, columns, last_width,
    patch_kind, patch_at, patch, first, last, least, out,
):  # fmt: skip
    """Add the products of vectors and columns first..last-1 of a packed matrix to out [m, n].

    `stored` holds the matrix's raw elements from its first on; `columns` of them, in blocks of `width`, the last
    block stored at `last_width`. `patch` holds raw elements: k for a column, n for a lane. The vectors come as
    `convert_vectors` leaves them. `least` is the exponent field that an element has at least. Returns flags.

    The loops stand in one function because passing arrays on costs reference counts, more than a chunk takes.
    """
    flags = 0
    rows, chunks = has_nan.shape
    values, products = np.empty(padded, np.float32), np.empty(padded, np.float32)
    groups = padded // GROUP
    lowest = np.int32(least << 23)
    for block in range(first // width, (last + width - 1) // width):
        start = block * width
        block_width = width if start + width < columns else last_width
        for c in range(chunks):
            k0 = c * lanes
            count = min(lanes, k - k0)
            whole = count // GROUP
            base = start * chunks * lanes + c * block_width * lanes
            for column in range(max(first, start), min(last, start + width)):
                at = base + (column - start) * lanes
                if patch_kind == PATCH_COLUMN and column == patch_at:
                    _decode_rest(patch, k0, 0, count, padded, values)
                else:
                    decode_groups(stored, at, whole, values)
                    if whole < groups:
                        _decode_rest(stored, at, whole * GROUP, count, padded, values)
                if patch_kind == PATCH_LANE and k0 <= patch_at < k0 + count:
                    values[patch_at - k0] = as_operand(patch[column])
                for r in range(rows):
                    x_at = (r * chunks + c) * padded
                    top = multiply_groups(values, operands, powers, x_at, groups, products, lowest)
                    exponent = (top >> 23) - 127
                    if has_nan[r, c] or exponent > MAX_FAST_EXPONENT:
                        total, raised = _exact_sum(values, operands, x_at, count, np.int64(least))
                        flags |= raised
                    elif top == 0:
                        total = np.float32(0)
                    else:
                        units = sum_groups(products, groups, bits_f32((150 - exponent) << 23))
                        # Rounded once to 24 bits; then a power of two scales it exactly, or to infinity.
                        total = np.float32(units) * bits_f32((exponent + 104) << 23)
                    out[r, column] = f32_add(out[r, column], total)
    return flags


@compiled
def start_accumulators(acc, out):  # type: ignore[no-untyped-def]
    """Copy start values, canonical, to out (both [m, n])."""
    for r in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[r, j] = canonical(acc[r, j])
