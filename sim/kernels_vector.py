"""The vector unit's operations on contiguous float32 arrays, and loads and stores, fast."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from typebar.isa.errors import TypebarError
from typebar.isa.instructions import FORMAT_BYTES, Format, Function
from typebar.isa.numerics import raw_dtype
from typebar.sim.kernels_bits import (
    EXPONENT,
    FLAG_ARGMAX_NAN,
    FLAG_STORE_SATURATED,
    MAGNITUDE,
    NAN_BITS,
    bits_f32,
    canonical,
    f32_add,
    f32_bits,
    f32_max,
    f32_mul,
    f32_sub,
    flush,
)
from typebar.sim.kernels_jit import compiled
from typebar.sim.kernels_simd import as_operand
from typebar.sim.kernels_unary import unary_kernel

F32Array = NDArray[np.float32]


@compiled
def _add(a, b, out):  # type: ignore[no-untyped-def]
    if b.size == 1:
        for i in range(out.size):
            out[i] = f32_add(a[i], b[0])
    else:
        for i in range(out.size):
            out[i] = f32_add(a[i], b[i])


@compiled
def _sub(a, b, out):  # type: ignore[no-untyped-def]
    if b.size == 1:
        for i in range(out.size):
            out[i] = f32_sub(a[i], b[0])
    else:
        for i in range(out.size):
            out[i] = f32_sub(a[i], b[i])


@compiled
def _mul(a, b, out):  # type: ignore[no-untyped-def]
    if b.size == 1:
        for i in range(out.size):
            out[i] = f32_mul(a[i], b[0])
    else:
        for i in range(out.size):
            out[i] = f32_mul(a[i], b[i])


@compiled
def _maximum(a, b, out):  # type: ignore[no-untyped-def]
    if b.size == 1:
        for i in range(out.size):
            out[i] = f32_max(a[i], b[0])
    else:
        for i in range(out.size):
            out[i] = f32_max(a[i], b[i])


def _binary(kernel: Any, a: F32Array, b: F32Array | np.float32 | float) -> F32Array:
    x, y = np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b, np.float32).reshape(-1)
    if y.size not in (1, x.size):
        raise TypebarError(f"second operand must have 1 or {x.size} elements, not {y.size}")
    out = np.empty(x.shape, np.float32)
    kernel(x.reshape(-1), y, out.reshape(-1))
    return out


def add(a: F32Array, b: F32Array | np.float32 | float) -> F32Array:
    """a + b, element by element; b has a's size, or is one value for all. `TypebarError` if it is neither."""
    return _binary(_add, a, b)


def sub(a: F32Array, b: F32Array | np.float32 | float) -> F32Array:
    """a - b, as `add`."""
    return _binary(_sub, a, b)


def mul(a: F32Array, b: F32Array | np.float32 | float) -> F32Array:
    """a * b, as `add`."""
    return _binary(_mul, a, b)


def maximum(a: F32Array, b: F32Array | np.float32 | float) -> F32Array:
    """The larger of a and b, as `add`: NaN wins, +0 is larger than -0."""
    return _binary(_maximum, a, b)


@compiled
def _tree_sum(x, square):  # type: ignore[no-untyped-def]
    n = x.size
    if n == 0:
        return np.float32(0)
    work = np.empty(n, np.float32)
    for i in range(n):
        work[i] = f32_mul(x[i], x[i]) if square else canonical(x[i])
    while n > 1:
        for i in range(n // 2):
            work[i] = f32_add(work[2 * i], work[2 * i + 1])
        if n % 2:
            # Adding the +0 that extends the vector still turns -0 into +0.
            work[n // 2] = f32_add(work[n - 1], np.float32(0))
        n = (n + 1) // 2
    return work[0]


@compiled
def _reduce_max(x):  # type: ignore[no-untyped-def]
    best = np.float32(-np.inf)
    for i in range(x.size):
        best = f32_max(best, x[i])
    return best


@compiled
def _argmax(x):  # type: ignore[no-untyped-def]
    best, index, flags = np.float32(-np.inf), 0, 0
    for i in range(x.size):
        value = flush(x[i])
        if value != value:
            flags = FLAG_ARGMAX_NAN
            value = np.float32(-np.inf)
        if value > best or i == 0:
            best, index = value, i
    return index, best, flags


def tree_sum(x: F32Array) -> np.float32:
    """Sum of a vector by the balanced tree of adjacent pairs; +0 if it is empty."""
    return np.float32(_tree_sum(x, False))


def sum_squares(x: F32Array) -> np.float32:
    """Sum of squares, each rounded, by the same tree."""
    return np.float32(_tree_sum(x, True))


def reduce_max(x: F32Array) -> np.float32:
    """Largest element of a vector, ordered like `maximum`; -infinity if it is empty."""
    return np.float32(_reduce_max(x))


def argmax(x: F32Array) -> tuple[int, np.float32, int]:
    """Lowest index of the largest element, that element, and flags; NaN counts as -infinity."""
    index, value, flags = _argmax(x)
    return int(index), np.float32(value), int(flags)


def unary(function: Function, x: F32Array) -> F32Array:
    """A unary function of every element (any shape). Raises `TypebarError` for an unknown function."""
    if function not in Function.__members__.values():
        raise TypebarError(f"unary function must be one of {[f.name for f in Function]}, not {function!r}")
    source = np.ascontiguousarray(x, np.float32)
    out = np.empty(source.shape, np.float32)
    unary_kernel(int(function), source.reshape(-1), out.reshape(-1))
    return out


@compiled
def _to_half(x):  # type: ignore[no-untyped-def]
    """fp16 bits of a float32 and whether it saturated."""
    bits = np.int64(f32_bits(x))
    magnitude = bits & 0x7FFFFFFF
    sign = (bits >> 16) & 0x8000
    if magnitude > EXPONENT:
        return 0x7E00, 0
    if magnitude >= 0x477FF000:  # 65520, half-way to 2^16
        return sign | 0x7BFF, FLAG_STORE_SATURATED
    if magnitude < 0x33000000:  # below 2^-25, which itself is half-way to the smallest and rounds to even
        return sign, 0
    if magnitude >= 0x38800000:  # 2^-14
        return sign | (magnitude - (112 << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13, 0
    drop = 126 - (magnitude >> 23)  # 14 to 24
    significand = magnitude & 0x7FFFFF | 0x800000
    half = 1 << (drop - 1)
    return sign | (significand + half - 1 + ((significand >> drop) & 1)) >> drop, 0


@compiled
def _encode_half(x, raw):  # type: ignore[no-untyped-def]
    flags = 0
    for i in range(x.size):
        raw[i], saturated = _to_half(flush(x[i]))
        flags |= saturated
    return flags


@compiled
def _encode_bf16(x, raw):  # type: ignore[no-untyped-def]
    flags = 0
    for i in range(x.size):
        bits = np.int64(f32_bits(flush(x[i])))
        magnitude = bits & 0x7FFFFFFF
        rounded = (magnitude + 0x7FFF + ((magnitude >> 16) & 1)) >> 16
        if magnitude > EXPONENT:
            raw[i] = 0x7FC0
        elif rounded > 0x7F7F:
            raw[i] = 0x7F7F | (bits >> 16) & 0x8000
            flags = FLAG_STORE_SATURATED
        else:
            raw[i] = rounded | (bits >> 16) & 0x8000
    return flags


@compiled
def _encode_int8(x, raw):  # type: ignore[no-untyped-def]
    flags = 0
    for i in range(x.size):
        value = flush(x[i])
        if value != value:
            raw[i] = 0
            flags = FLAG_STORE_SATURATED
            continue
        nearest = np.rint(value)
        clipped = min(max(nearest, np.float32(-128)), np.float32(127))
        if clipped != nearest:
            flags = FLAG_STORE_SATURATED
        raw[i] = np.int8(clipped)
    return flags


@compiled
def _decode_half(raw, out):  # type: ignore[no-untyped-def]
    for i in range(raw.size):
        value = as_operand(raw[i])
        out[i] = bits_f32(NAN_BITS) if value != value else value


@compiled
def _decode_bf16(raw, out):  # type: ignore[no-untyped-def]
    for i in range(raw.size):
        bits = np.int32(np.uint32(raw[i]) << np.uint32(16))
        out[i] = bits_f32(NAN_BITS if bits & MAGNITUDE > EXPONENT else bits)


_ENCODE: dict[Format, Any] = {Format.FP16: _encode_half, Format.BF16: _encode_bf16, Format.INT8: _encode_int8}


def encode(x: F32Array, fmt: Format) -> tuple[NDArray[Any], int]:
    """Raw elements (one dimension) of a vector rounded to a memory format, and flags, as a store does."""
    source = np.ascontiguousarray(x, np.float32).reshape(-1)
    if fmt is Format.FP32:
        return source.view(np.uint32).copy(), 0
    raw = np.empty(source.size, raw_dtype(fmt))
    return raw, int(_ENCODE[fmt](source, raw))


def decode(raw: NDArray[Any], fmt: Format) -> F32Array:
    """float32 values (one dimension) of raw elements, as a load reads them."""
    if fmt is Format.FP32:
        return np.ascontiguousarray(raw).view(np.float32).copy()
    if fmt is Format.INT8:
        return raw.astype(np.float32)
    out = np.empty(raw.size, np.float32)
    (_decode_half if fmt is Format.FP16 else _decode_bf16)(np.ascontiguousarray(raw), out)
    return out


def load(memory: NDArray[np.uint8], byte_offset: int, fmt: Format, n: int) -> F32Array:
    """n contiguous elements of memory as float32. Raises `TypebarError` outside `memory`."""
    end = byte_offset + n * FORMAT_BYTES[fmt]
    if byte_offset < 0 or end > memory.size:
        raise TypebarError(f"load of bytes {byte_offset} to {end} lies outside a region of {memory.size} bytes")
    raw = np.frombuffer(memory[byte_offset:end].tobytes(), raw_dtype(fmt))
    return decode(raw, fmt)


def store(
    memory: NDArray[np.uint8],
    byte_offset: int,
    fmt: Format,
    x: F32Array,
    inner: int,
    outer_bytes: int,
    inner_bytes: int,
) -> int:
    """Round x to a format and write element o * inner + i at byte_offset + o * outer_bytes + i * inner_bytes.

    x has a whole number of `inner` elements; later elements win where addresses overlap. Returns flags.
    Raises `TypebarError` if an element falls outside `memory`.
    """
    raw, flags = encode(x, fmt)
    if raw.size == 0:
        return flags
    outer, size = raw.size // inner, FORMAT_BYTES[fmt]
    starts = byte_offset + np.add.outer(np.arange(outer) * outer_bytes, np.arange(inner) * inner_bytes)
    if starts.min() < 0 or starts.max() + size > memory.size:
        raise TypebarError(
            f"store of bytes {starts.min()} to {starts.max() + size} lies outside a region of {memory.size} bytes"
        )
    memory[starts.reshape(-1, 1) + np.arange(size)] = raw.view(np.uint8).reshape(-1, size)
    return flags
