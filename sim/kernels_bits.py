"""Scalar building blocks of the fast kernels: bit patterns, float32 rules, memory formats.

All of it compiles into the kernels and agrees with `typebar.isa.numerics` bit for bit. Subnormal numbers are
handled on bit patterns, so the processor's flush modes have no say.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

JIT: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy", "boundscheck": False}
"""Options of every kernel. No `fastmath`: it would change results."""

SIGN = np.int32(-0x80000000)
MAGNITUDE = np.int32(0x7FFFFFFF)
EXPONENT = np.int32(0x7F800000)
NAN_BITS = np.int32(0x7FC00000)
OPERAND_MAX_BITS = np.int32(0x7F7FE000)
OPERAND_MIN_BITS = np.int32((127 - 50) << 23)
MIN_NORMAL = 2.0**-126
FLAG_OPERAND_OVERFLOW = 1
FLAG_STORE_SATURATED = 2
FLAG_ARGMAX_NAN = 4

_features = llvmlite.binding.get_host_cpu_features()
_HALF_IN_HARDWARE = bool(_features.get("f16c", False)) or "sse2" not in _features


@intrinsic
def f32_bits(_context: Any, x: Any) -> Any:
    """The bit pattern of a float32 as an int32."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), generate


@intrinsic
def bits_f32(_context: Any, x: Any) -> Any:
    """The float32 of an int32 bit pattern."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def truncate_i32(_context: Any, x: Any) -> Any:
    """A float32 within int32's range, rounded towards zero."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.fptosi(args[0], ir.IntType(32))

    return types.int32(types.float32), generate


@intrinsic
def add_i32(_context: Any, x: Any, y: Any) -> Any:
    """int32 addition that stays int32 (Numba widens `+` to int64, which halves vector width)."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.add(args[0], args[1])

    return types.int32(types.int32, types.int32), generate


@intrinsic
def half_f32(_context: Any, raw: Any) -> Any:
    """The float32 of fp16 bits (uint16): exact, subnormals, infinities and NaN included."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        word = ir.IntType(32)
        if _HALF_IN_HARDWARE:
            return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())
        bits = builder.zext(args[0], word)
        magnitude = builder.and_(bits, word(0x7FFF))
        # An integer-to-float conversion is exact for subnormals and needs no subnormal arithmetic.
        small = builder.fmul(builder.sitofp(magnitude, ir.FloatType()), ir.FloatType()(2.0**-24))
        normal = builder.add(builder.shl(magnitude, word(13)), word(112 << 23))
        special = builder.or_(builder.shl(magnitude, word(13)), word(0x7F800000))
        result = builder.select(
            builder.icmp_unsigned("<", magnitude, word(0x0400)), builder.bitcast(small, word), normal
        )
        result = builder.select(builder.icmp_unsigned(">=", magnitude, word(0x7C00)), special, result)
        sign = builder.shl(builder.and_(bits, word(0x8000)), word(16))
        return builder.bitcast(builder.or_(result, sign), ir.FloatType())

    return types.float32(types.uint16), generate


@njit(**JIT)
def flush(x):  # type: ignore[no-untyped-def]
    """Zero of x's sign if its exponent field is 0, else x."""
    bits = f32_bits(x)
    return bits_f32(bits & SIGN) if bits & EXPONENT == 0 else x


@njit(**JIT)
def canonical(x):  # type: ignore[no-untyped-def]
    """x flushed, and any NaN the one NaN."""
    return bits_f32(NAN_BITS) if x != x else flush(x)


@njit(**JIT)
def f32_add(a, b):  # type: ignore[no-untyped-def]
    """a + b by the vector unit's rules (a sum below 2^-126 is exact, so flushing it after the fact is right)."""
    return canonical(flush(a) + flush(b))


@njit(**JIT)
def f32_sub(a, b):  # type: ignore[no-untyped-def]
    """a - b by the vector unit's rules."""
    return canonical(flush(a) - flush(b))


@njit(**JIT)
def f32_mul(a, b):  # type: ignore[no-untyped-def]
    """a * b by the vector unit's rules: the float64 product is exact, so tininess is seen before rounding."""
    exact = np.float64(flush(a)) * np.float64(flush(b))
    rounded = np.float32(exact)
    if abs(exact) < MIN_NORMAL:
        rounded = bits_f32((f32_bits(a) ^ f32_bits(b)) & SIGN)
    return bits_f32(NAN_BITS) if rounded != rounded else rounded


@njit(**JIT)
def f32_order(x):  # type: ignore[no-untyped-def]
    """An int32 that orders canonical values like the maximum: -inf < ... < -0 < +0 < ... < +inf < NaN."""
    bits = f32_bits(x)
    return np.int32(bits ^ MAGNITUDE) if bits < 0 else bits


@njit(**JIT)
def f32_max(a, b):  # type: ignore[no-untyped-def]
    """The larger of a and b by the vector unit's rules."""
    a, b = canonical(a), canonical(b)
    return a if f32_order(a) >= f32_order(b) else b


@njit(**JIT)
def operand(x):  # type: ignore[no-untyped-def]
    """x rounded to 11 significant bits, below 2^-50 zero; too large: infinity; NaN: the one NaN."""
    bits = f32_bits(x)
    magnitude = bits & MAGNITUDE
    rounded = (magnitude + np.int32(0xFFF) + ((magnitude >> np.int32(13)) & np.int32(1))) & np.int32(-0x2000)
    result = np.int32(rounded | (bits & SIGN))
    if rounded < OPERAND_MIN_BITS:
        result = np.int32(0)
    return bits_f32(NAN_BITS if magnitude > EXPONENT else result)


def as_operand(raw):  # type: ignore[no-untyped-def]
    """Operand of a raw memory element, by its type: uint16 FP16, int16 BF16, int8 INT8, float32 FP32.

    Infinity, or a float32 that rounds to it, is left as infinity for the caller to clamp.
    """
    raise NotImplementedError("runs in compiled code only")


@overload(as_operand)
def _as_operand(raw):  # type: ignore[no-untyped-def]
    if raw == types.uint16:
        return lambda raw: half_f32(raw)
    if raw == types.int8:
        return lambda raw: np.float32(raw)
    if raw == types.int16:

        def bf16(raw):  # type: ignore[no-untyped-def]
            bits = np.int32(raw) << np.int32(16)
            return bits_f32(np.int32(0) if bits & MAGNITUDE < OPERAND_MIN_BITS else np.int32(bits))

        return bf16
    return lambda raw: operand(raw)
