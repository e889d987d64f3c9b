"""Scalar building blocks of the fast kernels: bit patterns, float32 rules, memory formats.

All of it compiles into the kernels and agrees with `typebar.isa.numerics` bit for bit. Subnormal numbers are
handled on bit patterns, so the processor's flush modes have no say.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from typebar.sim.kernels_jit import compiled

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


@intrinsic  # type: ignore[untyped-decorator]
def f32_bits(_context: Any, x: Any) -> Any:
    """The bit pattern of a float32 as an int32."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), generate


@intrinsic  # type: ignore[untyped-decorator]
def bits_f32(_context: Any, x: Any) -> Any:
    """The float32 of an int32 bit pattern."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), generate


@compiled
def flush(x):  # type: ignore[no-untyped-def]
    """Zero of x's sign if its exponent field is 0, else x."""
    bits = f32_bits(x)
    return bits_f32(bits & SIGN) if bits & EXPONENT == 0 else x


@compiled
def canonical(x):  # type: ignore[no-untyped-def]
    """x flushed, and any NaN the one NaN."""
    return bits_f32(NAN_BITS) if x != x else flush(x)


@compiled
def f32_add(a, b):  # type: ignore[no-untyped-def]
    """a + b by the vector unit's rules (a sum below 2^-126 is exact, so flushing it after the fact is right)."""
    return canonical(flush(a) + flush(b))


@compiled
def f32_sub(a, b):  # type: ignore[no-untyped-def]
    """a - b by the vector unit's rules."""
    return canonical(flush(a) - flush(b))


@compiled
def f32_mul(a, b):  # type: ignore[no-untyped-def]
    """a * b by the vector unit's rules: the float64 product is exact, so tininess is seen before rounding."""
    exact = np.float64(flush(a)) * np.float64(flush(b))
    rounded = np.float32(exact)
    if abs(exact) < MIN_NORMAL:
        rounded = bits_f32((f32_bits(a) ^ f32_bits(b)) & SIGN)
    return bits_f32(NAN_BITS) if rounded != rounded else rounded


@compiled
def f32_order(x):  # type: ignore[no-untyped-def]
    """An int32 that orders canonical values like the maximum: -inf < ... < -0 < +0 < ... < +inf < NaN."""
    bits = f32_bits(x)
    return np.int32(bits ^ MAGNITUDE) if bits < 0 else bits


@compiled
def f32_max(a, b):  # type: ignore[no-untyped-def]
    """The larger of a and b by the vector unit's rules."""
    a, b = canonical(a), canonical(b)
    return a if f32_order(a) >= f32_order(b) else b
