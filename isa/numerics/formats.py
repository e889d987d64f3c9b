"""Number formats: float32 bit patterns, memory formats, and the matrix unit's operand format.

Everything here is defined on bits, never on what the processor does with subnormal numbers.

| format | bytes | stored as | store (round to nearest even, saturate, raise `STORE_SATURATED`) |
|---|---|---|---|
| `FP32` | 4 | uint32 | the register's bits, unchanged |
| `FP16` | 2 | uint16 | subnormals are exact; largest 65504 |
| `BF16` | 2 | uint16 | largest 2^127 (2 - 2^-7) |
| `INT8` | 1 | int8 | -128 to 127; NaN is stored as 0 and raises the flag |

A NaN read from or written to FP16 or BF16 becomes the canonical NaN of the format it goes to.
"""

from __future__ import annotations

from enum import IntFlag
from typing import Any

import numpy as np
from numpy.typing import NDArray

from typebar.isa.errors import TypebarError
from typebar.isa.instructions import Format

F32Array = NDArray[np.float32]
U32Array = NDArray[np.uint32]


_DTYPES: dict[Format, np.dtype[Any]] = {
    Format.FP16: np.dtype(np.uint16),
    Format.BF16: np.dtype(np.uint16),
    Format.INT8: np.dtype(np.int8),
    Format.FP32: np.dtype(np.uint32),
}


def raw_dtype(fmt: Format) -> np.dtype[Any]:
    """The NumPy type that holds one raw memory element of a format."""
    return _DTYPES[fmt]


class NumericFlag(IntFlag):
    """Sticky conditions that the host reports together with the program counter."""

    NONE = 0
    OPERAND_OVERFLOW = 1
    STORE_SATURATED = 2
    ARGMAX_NAN = 4


SIGN = 0x80000000
MAGNITUDE = 0x7FFFFFFF
EXPONENT = 0x7F800000
CANONICAL_NAN = 0x7FC00000
MIN_NORMAL = float(2.0**-126)
OPERAND_DROPPED_BITS = 13
"""Fraction bits of float32 that an operand does not keep: 23 - 10."""
OPERAND_MIN_EXPONENT = -50
"""Operands smaller than 2 to this, after rounding, are zero."""
OPERAND_MAX_BITS = 0x7F7FE000
"""The largest finite operand, (2 - 2^-10) 2^127, as float32 bits."""
LEAST_EXPONENT: dict[Format, int] = {
    Format.FP16: -14,
    Format.BF16: OPERAND_MIN_EXPONENT,
    Format.INT8: 7,
    Format.FP32: OPERAND_MIN_EXPONENT,
}
"""The exponent of an operand from memory is its own, but at least this: significands stay as they lie in memory."""


def bits_of(x: F32Array) -> U32Array:
    """Bit patterns of float32 values, shape kept."""
    return np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).reshape(np.shape(x))


def from_bits(bits: NDArray[Any]) -> F32Array:
    """float32 values of 32-bit patterns, shape kept."""
    return np.ascontiguousarray(bits, dtype=np.uint32).view(np.float32).reshape(np.shape(bits))


def is_nan(x: F32Array) -> NDArray[np.bool_]:
    """True where a value is a NaN."""
    return np.asarray((bits_of(x) & MAGNITUDE) > EXPONENT)


def canonical(x: F32Array) -> F32Array:
    """A vector-register input or result: exponent field 0 is a zero of its sign, any NaN is 0x7FC00000."""
    bits = bits_of(x)
    bits = np.where((bits & EXPONENT) == 0, bits & SIGN, bits)
    return from_bits(np.where((bits & MAGNITUDE) > EXPONENT, CANONICAL_NAN, bits))


def to_operand(x: F32Array) -> tuple[F32Array, NumericFlag]:
    """Convert float32 values to matrix-unit operands (1 sign, 8 exponent, 10 fraction bits).

    Rounds to nearest even to 11 significant bits; below 2^-50 after rounding becomes +0; overflow and
    infinity become the largest finite operand and raise `OPERAND_OVERFLOW`; NaN stays (canonical).
    Returns float32 values of the same shape that are exactly operands, and the flags.
    """
    bits = bits_of(x)
    magnitude = bits & MAGNITUDE
    nan = magnitude > EXPONENT
    even = (magnitude >> OPERAND_DROPPED_BITS) & 1
    half = (1 << (OPERAND_DROPPED_BITS - 1)) - 1
    rounded = (magnitude + half + even) >> OPERAND_DROPPED_BITS << OPERAND_DROPPED_BITS
    overflow = (rounded > OPERAND_MAX_BITS) & ~nan
    rounded = np.where(overflow, OPERAND_MAX_BITS, rounded)
    result = np.where(rounded < (127 + OPERAND_MIN_EXPONENT) << 23, 0, (bits & SIGN) | rounded)
    flags = NumericFlag.OPERAND_OVERFLOW if overflow.any() else NumericFlag.NONE
    return from_bits(np.where(nan, CANONICAL_NAN, result)), flags


def encode(x: F32Array, fmt: Format) -> tuple[NDArray[Any], NumericFlag]:
    """Round float32 register values to raw memory elements of `fmt`, as a store does.

    Returns an array of `raw_dtype(fmt)` in the shape of `x`, and `STORE_SATURATED` if any value was out of range.
    """
    if fmt is Format.FP32:
        return bits_of(x).copy(), NumericFlag.NONE
    value = canonical(x)
    nan = is_nan(value)
    if fmt is Format.FP16:
        largest = np.float32(65504)
        # 65520 lies half-way between 65504 and 65536 and would round up, to the even one.
        saturated = (np.abs(value) >= np.float32(65520)) & ~nan
        clipped = np.clip(value, -largest, largest)
        raw: NDArray[Any] = np.where(nan, 0x7E00, clipped.astype(np.float16).view(np.uint16))
    elif fmt is Format.BF16:
        bits = bits_of(value)
        magnitude = bits & MAGNITUDE
        rounded = (magnitude + 0x7FFF + ((magnitude >> 16) & 1)) >> 16
        saturated = (rounded > 0x7F7F) & ~nan
        rounded = np.where(saturated, 0x7F7F, rounded) | (bits & SIGN) >> 16
        raw = np.where(nan, 0x7FC0, rounded)
    elif fmt is Format.INT8:
        nearest = np.rint(np.where(nan, np.float32(0), value))
        saturated = nan | (nearest > 127) | (nearest < -128)
        raw = np.clip(nearest, -128, 127)
    else:
        raise TypebarError(f"memory format must be one of {[f.name for f in Format]}, not {fmt!r}")
    flags = NumericFlag.STORE_SATURATED if saturated.any() else NumericFlag.NONE
    return raw.astype(raw_dtype(fmt)), flags


def decode(raw: NDArray[Any], fmt: Format) -> F32Array:
    """float32 values of raw memory elements, as a load reads them (always exact; shape kept).

    Infinities stay infinities. Raises `TypebarError` if `raw` is not an array of `raw_dtype(fmt)`.
    """
    if raw.dtype != raw_dtype(fmt):
        raise TypebarError(f"raw {fmt.name} elements must have type {raw_dtype(fmt)}, not {raw.dtype}")
    if fmt is Format.FP32:
        return from_bits(raw)
    if fmt is Format.INT8:
        return raw.astype(np.float32)
    if fmt is Format.BF16:
        value = from_bits(raw.astype(np.uint32) << 16)
    else:
        value = np.ascontiguousarray(raw).view(np.float16).reshape(raw.shape).astype(np.float32)
    return from_bits(np.where(is_nan(value), CANONICAL_NAN, bits_of(value)))
