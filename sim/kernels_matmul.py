"""The matrix unit's dot products over packed weights, fast.

A chunk's vector elements are aligned once, its weights once for all vectors but those with zeros that hide its largest
weight: both to integers, held as float64, in which their products and sums are exact.
"""

from __future__ import annotations

import math

import numpy as np

from typebar.isa.numerics.dot import SUM_FRACTION_BITS, VECTOR_BITS, WEIGHT_BITS, WEIGHT_STEP
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
from typebar.sim.kernels_simd import GROUP, align_groups, as_operand, decode_groups, dot_of_groups, largest_of_groups

PATCH_COLUMN = 1
PATCH_LANE = 2


@compiled
def convert_vectors(x, k, lanes, padded, aligned, present, units, gaps, nans):  # type: ignore[no-untyped-def]
    """Align the operands of the first k values of each row of x [m, k], chunk by chunk.

    `aligned` and `present` are one-dimensional, m rows of chunks of `lanes` lanes stored `padded` wide; they start as
    zeros. A value becomes an integer of at most 24 bits, and `present` -1 where its operand is not zero. The others are
    [m, chunks]: 2^Ex times the unit of a chunk sum over 2^Ew, whether a chunk has zeros, and whether it holds a NaN.
    Returns flags.
    """
    flags = 0
    operands = np.empty(lanes, np.float32)
    for r in range(x.shape[0]):
        row = x[r]
        for c in range(units.shape[1]):
            count = min(lanes, k - c * lanes)
            at = (r * units.shape[1] + c) * padded
            top = 0
            for i in range(count):
                value = as_operand(row[c * lanes + i])
                if f32_bits(value) & MAGNITUDE == EXPONENT:
                    value = bits_f32((f32_bits(value) & SIGN) | OPERAND_MAX_BITS)
                    flags = FLAG_OPERAND_OVERFLOW
                if value != value:
                    nans[r, c] = True
                operands[i] = value
                top = max(top, (f32_bits(value) & EXPONENT) >> 23)
            scale = math.ldexp(1.0, VECTOR_BITS - 1 - (top - 127))
            for i in range(count):
                if operands[i] == 0:
                    gaps[r, c] = True
                else:
                    present[at + i] = -1
                    if not nans[r, c]:
                        aligned[at + i] = np.trunc(np.float64(operands[i]) * scale)
            units[r, c] = math.ldexp(1.0, top - 127 - SUM_FRACTION_BITS)
    return flags


@compiled
def _decode_rest(raw, at, first, count, padded, values):  # type: ignore[no-untyped-def]
    """Operands of the elements first..count-1 of a chunk that starts at index `at`, and zeros up to `padded`."""
    for i in range(first, padded):
        values[i] = as_operand(raw[at + i]) if i < count else np.float32(0)


@compiled
def _clamp(values):  # type: ignore[no-untyped-def]
    """Make infinities the largest operand; returns flags and whether there is a NaN."""
    flags, nan = 0, False
    for i in range(values.size):
        magnitude = f32_bits(values[i]) & MAGNITUDE
        if magnitude == EXPONENT:
            values[i] = bits_f32((f32_bits(values[i]) & SIGN) | OPERAND_MAX_BITS)
            flags = FLAG_OPERAND_OVERFLOW
        nan = nan or magnitude > EXPONENT
    return flags, nan


@compiled
def _weight_scale(power):  # type: ignore[no-untyped-def]
    """What makes weights integers of at most 17 bits; `power` is the exponent field to which they are aligned."""
    return bits_f32(np.int32((127 + WEIGHT_BITS - 1 - (power - 127)) << 23))


@compiled
def _aligned_to(power):  # type: ignore[no-untyped-def]
    """The exponent field to which weights are aligned, by that of the largest: that of a multiple of `WEIGHT_STEP`."""
    return power | (WEIGHT_STEP - 1)


@compiled
def _lowest(power, least):  # type: ignore[no-untyped-def]
    """The bit pattern of the least weight that is not too small beside others; exponent fields are at least `least`."""
    far = power - 4 * WEIGHT_STEP
    return np.int32(0 if least > far else (far + 1) << 23)


@compiled
def matmul_columns(  # type: ignore[no-untyped-def]
    stored, aligned, present, units, gaps, nans, k, lanes, padded, width, columns, last_width,
    patch_kind, patch_at, patch, first, last, least, out,
):  # fmt: skip
    """Add the products of vectors and columns first..last-1 of a packed matrix to out [m, n].

    `stored` holds the matrix's raw elements from its first on; `columns` of them, in blocks of `width`, the last
    block stored at `last_width`. `patch` holds raw elements: k for a column, n for a lane. The vectors come as
    `convert_vectors` leaves them. `least` is the exponent field that an element has at least. Returns flags.

    The loops stand in one function because passing arrays on costs reference counts, more than a chunk takes.
    """
    flags = 0
    rows, chunks = units.shape
    values, everything = np.empty(padded, np.float32), np.full(padded, -1, np.int32)
    shared, own = np.empty(padded, np.float64), np.empty(padded, np.float64)
    groups = padded // GROUP
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
                largest = largest_of_groups(values, everything, 0, groups)
                has_nan = False
                if largest >= EXPONENT:
                    raised, has_nan = _clamp(values)
                    flags |= raised
                    largest = np.int32(OPERAND_MAX_BITS)
                power = _aligned_to(max(largest >> 23, least))
                if not has_nan:
                    align_groups(values, everything, 0, groups, _weight_scale(power), _lowest(power, least), shared)
                for r in range(rows):
                    x_at = (r * chunks + c) * padded
                    if has_nan or nans[r, c]:
                        out[r, column] = bits_f32(NAN_BITS)
                        continue
                    total = 0.0
                    top = power
                    if gaps[r, c]:
                        part = largest_of_groups(values, present, x_at, groups)
                        top = _aligned_to(max(part >> 23, least)) if part != 0 else power
                    if top == power:
                        total = dot_of_groups(shared, aligned, x_at, groups)
                    else:
                        scale, lowest = _weight_scale(top), _lowest(top, least)
                        align_groups(values, present, x_at, groups, scale, lowest, own)
                        total = dot_of_groups(own, aligned, x_at, groups)
                    # Powers of two scale it exactly, so it is rounded once, or becomes infinity. `top` may be 255.
                    scaled = total * np.float64(bits_f32(np.int32((top - 1) << 23))) * (2 * units[r, c])
                    out[r, column] = f32_add(out[r, column], np.float32(scaled))
    return flags


@compiled
def start_accumulators(acc, out):  # type: ignore[no-untyped-def]
    """Copy start values, canonical, to out (both [m, n])."""
    for r in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[r, j] = canonical(acc[r, j])
