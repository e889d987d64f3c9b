"""The matrix unit's dot products over packed weights, fast.

Products of two operands are exact in float32 (22 significant bits), so a chunk is two passes that vectorise: the
largest sum of exponents E, then the sum of w x 2^(23-E) truncated to int32. At most 64 lanes are added in int32:
each term is below 2^25. Chunks whose E leaves float32's range, or that hold an infinity or a NaN, take an exact
integer path.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from typebar.sim.kernels_bits import (
    EXPONENT,
    FLAG_OPERAND_OVERFLOW,
    JIT,
    MAGNITUDE,
    NAN_BITS,
    OPERAND_MAX_BITS,
    SIGN,
    add_i32,
    as_operand,
    bits_f32,
    canonical,
    f32_add,
    f32_bits,
    operand,
    truncate_i32,
)

TILE = 64
"""Lanes added in int32; a constant length makes the inner loops vectorise without remainders."""
MAX_FAST_EXPONENT = 125
"""Up to this E a product is below 2^127 and fits float32."""
PATCH_COLUMN = 1
PATCH_LANE = 2


@njit(**JIT)
def convert_vectors(x, k, operands, fields):  # type: ignore[no-untyped-def]
    """Operands of the first k values of each row of x, and 2^exponent of each (0 for zero); returns flags."""
    flags = 0
    for r in range(x.shape[0]):
        row, values, powers = x[r], operands[r], fields[r]
        for i in range(k):
            value = operand(row[i])
            if f32_bits(value) & MAGNITUDE == EXPONENT:
                value = bits_f32((f32_bits(value) & SIGN) | OPERAND_MAX_BITS)
                flags = FLAG_OPERAND_OVERFLOW
            values[i] = value
            powers[i] = bits_f32(f32_bits(value) & EXPONENT)
    return flags


@njit(**JIT)
def _decode(raw, count, values):  # type: ignore[no-untyped-def]
    """Operands of `count` raw elements."""
    whole = count - count % TILE
    for first in range(0, whole, TILE):
        source, target = raw[first : first + TILE], values[first : first + TILE]
        for i in range(TILE):
            target[i] = as_operand(source[i])
    for i in range(whole, count):
        values[i] = as_operand(raw[i])


@njit(**JIT)
def _exponent_bits(w, power):  # type: ignore[no-untyped-def]
    """Bits of 2^(exponent of w + exponent of x): 0 if either is zero; not finite: beyond any fast exponent."""
    field = f32_bits(w) & EXPONENT
    return EXPONENT if field == EXPONENT else f32_bits(bits_f32(field) * power)


@njit(**JIT)
def _products(w, x, powers, count, products):  # type: ignore[no-untyped-def]
    """Products of `count` lanes, and the largest of their `_exponent_bits`."""
    top = np.int32(0)
    whole = count - count % TILE
    for first in range(0, whole, TILE):
        last = first + TILE
        w_tile, x_tile, p_tile = w[first:last], x[first:last], powers[first:last]
        target = products[first:last]
        for i in range(TILE):
            target[i] = w_tile[i] * x_tile[i]
            bits = _exponent_bits(w_tile[i], p_tile[i])
            if bits > top:
                top = bits
    for i in range(whole, count):
        products[i] = w[i] * x[i]
        bits = _exponent_bits(w[i], powers[i])
        if bits > top:
            top = bits
    return top


@njit(**JIT)
def _aligned_sum(products, count, scale):  # type: ignore[no-untyped-def]
    """Exact sum of the products times `scale`, each truncated towards zero."""
    total = np.int64(0)
    whole = count - count % TILE
    for first in range(0, whole, TILE):
        tile = products[first : first + TILE]
        part = np.int32(0)
        for i in range(TILE):
            part = add_i32(part, truncate_i32(tile[i] * scale))
        total += part
    part = np.int32(0)
    for i in range(whole, count):
        part = add_i32(part, truncate_i32(products[i] * scale))
    return total + part


@njit(**JIT)
def _exact_sum(w, x, count):  # type: ignore[no-untyped-def]
    """A chunk's sum by integers, for any operands; returns (sum, flags)."""
    flags = 0
    top = np.int64(-1000)
    nan = False
    for i in range(count):
        w_bits, x_bits = np.int64(f32_bits(w[i]) & MAGNITUDE), np.int64(f32_bits(x[i]) & MAGNITUDE)
        if w_bits == EXPONENT:
            flags = FLAG_OPERAND_OVERFLOW
            w_bits = np.int64(OPERAND_MAX_BITS)
        nan = nan or w_bits > EXPONENT or x_bits > EXPONENT
        if w_bits != 0 and x_bits != 0:
            top = max(top, (w_bits >> 23) + (x_bits >> 23) - 254)
    if nan:
        return bits_f32(NAN_BITS), flags
    total = np.int64(0)
    for i in range(count):
        w_bits, x_bits = np.int64(f32_bits(w[i]) & MAGNITUDE), np.int64(f32_bits(x[i]) & MAGNITUDE)
        if w_bits == EXPONENT:
            w_bits = np.int64(OPERAND_MAX_BITS)
        if w_bits == 0 or x_bits == 0:
            continue
        product = ((w_bits & 0x7FFFFF | 0x800000) >> 13) * ((x_bits & 0x7FFFFF | 0x800000) >> 13) << 3
        product >>= min(np.int64(63), top - ((w_bits >> 23) + (x_bits >> 23) - 254))
        negative = (f32_bits(w[i]) ^ f32_bits(x[i])) < 0
        total += -product if negative else product
    # float64 holds the rounded sum's range, and scaling by a power of two is exact in it.
    return np.float32(np.float64(np.float32(total)) * 2.0 ** np.float64(top - 23)), flags


@njit(**JIT)
def _chunk_sum(w, x, powers, has_nan, count, products):  # type: ignore[no-untyped-def]
    """One chunk's sum over `count` present lanes; returns (sum, flags)."""
    top = _products(w, x, powers, count, products)
    exponent = (top >> np.int32(23)) - 127
    if has_nan or exponent > MAX_FAST_EXPONENT:
        return _exact_sum(w, x, count)
    if top == 0:
        return np.float32(0), 0
    scale = bits_f32(np.int32(150 - exponent) << np.int32(23))
    total = _aligned_sum(products, count, scale)
    # A sum fits 24 bits after one rounding; then a power of two scales it exactly, or to infinity.
    return np.float32(total) * bits_f32(np.int32(exponent + 104) << np.int32(23)), 0


@njit(**JIT)
def _find_nan(x, k, lanes):  # type: ignore[no-untyped-def]
    """For each row and chunk of operands, whether it holds a NaN: bool [m, chunks]."""
    found = np.zeros((x.shape[0], (k + lanes - 1) // lanes), np.bool_)
    for r in range(x.shape[0]):
        for i in range(k):
            if x[r, i] != x[r, i]:
                found[r, i // lanes] = True
    return found


@njit(**JIT)
def matmul_columns(  # type: ignore[no-untyped-def]
    stored, x, powers, k, lanes, width, columns, last_width, patch_kind, patch_at, patch, first, last, out
):
    """Add the products of operand rows x [m, k] and columns first..last-1 of a packed matrix to out [m, n].

    `stored` holds the matrix's raw elements from its first on; `columns` of them, in blocks of `width`, the last
    block stored at `last_width`. `patch` holds raw elements: k for a column, n for a lane. Returns flags.
    """
    flags = 0
    chunks = (k + lanes - 1) // lanes
    has_nan = _find_nan(x, k, lanes)
    values, products = np.empty(lanes, np.float32), np.empty(lanes, np.float32)
    for block in range(first // width, (last + width - 1) // width):
        start = block * width
        block_width = width if start + width < columns else last_width
        for c in range(chunks):
            k0 = c * lanes
            count = min(lanes, k - k0)
            base = start * chunks * lanes + c * block_width * lanes
            for column in range(max(first, start), min(last, start + width)):
                at = base + (column - start) * lanes
                if patch_kind == PATCH_COLUMN and column == patch_at:
                    _decode(patch[k0 : k0 + count], count, values)
                else:
                    _decode(stored[at : at + count], count, values)
                if patch_kind == PATCH_LANE and k0 <= patch_at < k0 + count:
                    values[patch_at - k0] = as_operand(patch[column])
                for r in range(x.shape[0]):
                    row, row_powers = x[r, k0 : k0 + count], powers[r, k0 : k0 + count]
                    total, raised = _chunk_sum(values, row, row_powers, has_nan[r, c], count, products)
                    flags |= raised
                    out[r, column] = f32_add(out[r, column], total)
    return flags


@njit(**JIT)
def start_accumulators(acc, out):  # type: ignore[no-untyped-def]
    """Copy start values, canonical, to out (both [m, n])."""
    for r in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[r, j] = canonical(acc[r, j])
