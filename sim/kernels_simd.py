"""The matrix kernel's inner loops as explicit vector instructions.

Written in LLVM's own vector types, because whether a loop vectorises by itself depends on its surroundings and
costs a factor of five to ten. LLVM lowers groups of 16 to whatever the processor has. Every loop works on whole
groups; callers pad with zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding  # type: ignore[import-untyped]
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

GROUP = 16
"""Lanes of one vector."""
PREFETCH = 1024
"""Elements that decoding asks memory for in advance: half as much time again goes by without."""
_WORD, _FLOAT = ir.IntType(32), ir.FloatType()
_EXPONENT = 0x7F800000
_MAGNITUDE = 0x7FFFFFFF
_OPERAND_MIN = (127 - 50) << 23
_NAN = 0x7FC00000

_features = llvmlite.binding.get_host_cpu_features()
_HALF_IN_HARDWARE = bool(_features.get("f16c", False)) or "sse2" not in _features
"""LLVM converts fp16 in a library call, which a jitted module lacks, where the processor has no instruction."""


def _like(value: Any, element: Any) -> Any:
    """The type with `element` in the shape of `value`: itself, or a vector of as many."""
    shape = value.type
    return ir.VectorType(element, shape.count) if isinstance(shape, ir.VectorType) else element


def _constant(kind: Any, value: Any) -> Any:
    """A constant of a scalar type, or repeated in a vector."""
    if isinstance(kind, ir.VectorType):
        return ir.Constant(kind, [ir.Constant(kind.element, value)] * kind.count)
    return ir.Constant(kind, value)


class _Bits:
    """Shorthand for operations between an int32 value (scalar or vector) and constants."""

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder, self.value = builder, value

    def __call__(self, operation: str, constant: int) -> _Bits:
        other = _constant(self.value.type, constant)
        return _Bits(self.builder, getattr(self.builder, operation)(self.value, other))

    def test(self, comparison: str, constant: int) -> Any:
        return self.builder.icmp_unsigned(comparison, self.value, _constant(self.value.type, constant))

    def join(self, operation: str, other: _Bits) -> _Bits:
        return _Bits(self.builder, getattr(self.builder, operation)(self.value, other.value))

    def replace(self, condition: Any, other: _Bits | int) -> _Bits:
        if isinstance(other, int):
            other = _Bits(self.builder, _constant(self.value.type, other))
        return _Bits(self.builder, self.builder.select(condition, other.value, self.value))


def _half(builder: Any, raw: Any) -> Any:
    """fp16 bits to float32: exact, subnormals, infinities and NaN included."""
    if _HALF_IN_HARDWARE:
        half = builder.bitcast(raw, _like(raw, ir.HalfType()))
        return builder.fpext(half, _like(raw, _FLOAT))
    bits = _Bits(builder, builder.zext(raw, _like(raw, _WORD)))
    magnitude = bits("and_", 0x7FFF)
    kind = _like(raw, _FLOAT)
    # Subnormals convert from integers, which needs no subnormal arithmetic.
    small = builder.fmul(builder.uitofp(magnitude.value, kind), _constant(kind, 2.0**-24))
    shifted = magnitude("shl", 13)
    result = shifted("add", 112 << 23)
    result = result.replace(magnitude.test("<", 0x0400), _Bits(builder, builder.bitcast(small, _like(raw, _WORD))))
    result = result.replace(magnitude.test(">=", 0x7C00), shifted("or_", _EXPONENT))
    return builder.bitcast(result.join("or_", bits("and_", 0x8000)("shl", 16)).value, kind)


def _bf16(builder: Any, raw: Any) -> Any:
    bits = _Bits(builder, builder.zext(raw, _like(raw, _WORD)))("shl", 16)
    bits = bits.replace(bits("and_", _MAGNITUDE).test("<", _OPERAND_MIN), 0)
    return builder.bitcast(bits.value, _like(raw, _FLOAT))


def _fp32(builder: Any, raw: Any) -> Any:
    bits = _Bits(builder, builder.bitcast(raw, _like(raw, _WORD)))
    magnitude = bits("and_", _MAGNITUDE)
    last = magnitude("lshr", 13)("and_", 1)
    rounded = magnitude("add", 0xFFF).join("add", last)("and_", 0xFFFFE000)
    result = rounded.join("or_", bits("and_", 0x80000000)).replace(rounded.test("<", _OPERAND_MIN), 0)
    result = result.replace(magnitude.test(">", _EXPONENT), _NAN)
    return builder.bitcast(result.value, _like(raw, _FLOAT))


def _int8(builder: Any, raw: Any) -> Any:
    return builder.sitofp(raw, _like(raw, _FLOAT))


_OPERANDS: dict[Any, Callable[[Any, Any], Any]] = {
    types.uint16: _half,
    types.int16: _bf16,
    types.int8: _int8,
    types.float32: _fp32,
}
"""How each memory format becomes operands, by the element type that stands for it."""


@intrinsic  # type: ignore[untyped-decorator]
def as_operand(_context: Any, raw: Any) -> Any:
    """Operand of a raw element, by its type: uint16 FP16, int16 BF16, int8 INT8, float32 FP32 or a register.

    Infinity, and a float32 that rounds to it, stays infinity for the caller to clamp; NaN stays a NaN.
    """
    emit = _OPERANDS[raw]

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return emit(builder, args[0])

    return types.float32(raw), generate


class _Vectors:
    """Groups of 16 elements of arrays, from an element index on."""

    def __init__(self, context: Any, builder: Any, signature: Any, args: Any) -> None:
        self.context, self.builder, self.signature, self.args = context, builder, signature, args

    def pointer(self, array: int, index: Any) -> Any:
        """Pointer to the vector that starts at element `index` of the array in argument `array`."""
        kind = self.signature.args[array]
        data = self.context.make_array(kind)(self.context, self.builder, self.args[array]).data
        element = self.context.get_data_type(kind.dtype)
        return self.builder.bitcast(self.builder.gep(data, [index]), ir.VectorType(element, GROUP).as_pointer())

    def load(self, array: int, index: Any) -> Any:
        """The vector at an element index, which need not be aligned to more than the element."""
        size = self.context.get_abi_sizeof(self.context.get_data_type(self.signature.args[array].dtype))
        return self.builder.load(self.pointer(array, index), align=size)

    def store(self, value: Any, array: int, index: Any) -> None:
        """Write a float32 vector at an element index."""
        self.builder.store(value, self.pointer(array, index), align=4)

    def prefetch(self, array: int, index: Any) -> None:
        """Ask for the cache line of an element index, which may lie beyond the array."""
        address = self.builder.bitcast(self.pointer(array, index), ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [address.type, _WORD, _WORD, _WORD])
        function = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.prefetch.p0")
        read, keep, data = _WORD(0), _WORD(3), _WORD(1)
        self.builder.call(function, [address, read, keep, data])

    def indices(self, groups: Any) -> Any:
        """A loop over the groups; yields each one's first element index."""
        return cgutils.for_range_slice(
            self.builder,
            ir.Constant(groups.type, 0),
            self.builder.mul(groups, ir.Constant(groups.type, GROUP)),
            ir.Constant(groups.type, GROUP),
        )

    def repeated(self, value: Any) -> Any:
        """Pointer to a vector of one value."""
        vector = ir.Constant(ir.VectorType(value.type, GROUP), ir.Undefined)
        for lane in range(GROUP):
            vector = self.builder.insert_element(vector, value, _WORD(lane))
        return cgutils.alloca_once_value(self.builder, vector)

    def reduce(self, name: str, vector: Any) -> Any:
        """LLVM's horizontal reduction `name` of an integer vector."""
        kind = vector.type
        suffix = f"v{kind.count}i{kind.element.width}"
        function = cgutils.get_or_insert_function(
            self.builder.module, ir.FunctionType(kind.element, [kind]), f"llvm.vector.reduce.{name}.{suffix}"
        )
        return self.builder.call(function, [vector])


_VECTOR = types.Array(types.float32, 1, "C")


@intrinsic  # type: ignore[untyped-decorator]
def decode_groups(_context: Any, raw: Any, at: Any, groups: Any, values: Any) -> Any:
    """values[0 : 16 groups] = operands of the raw elements from index `at` on."""
    emit = _OPERANDS[raw.dtype]

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vectors = _Vectors(context, builder, signature, args)
        with vectors.indices(args[2]) as (index, _):
            start = builder.add(args[1], index)
            vectors.prefetch(0, builder.add(start, ir.Constant(start.type, PREFETCH)))
            vectors.store(emit(builder, vectors.load(0, start)), 3, index)
        return context.get_dummy_value()

    return types.void(raw, types.intp, types.intp, values), generate


@intrinsic  # type: ignore[untyped-decorator]
def multiply_groups(_context: Any, w: Any, x: Any, powers: Any, at: Any, groups: Any, products: Any, least: Any) -> Any:
    """products = w * x[at :], and the largest bit pattern of 2^(exponent of w + exponent of x), as an int32.

    `powers` holds 2^exponent of x, 0 for zero. `least` is the bit pattern of 2^exponent that a w has at least. A zero
    product counts 0. A w that is not finite counts infinity.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vectors = _Vectors(context, builder, signature, args)
        word = ir.VectorType(_WORD, GROUP)
        top = cgutils.alloca_once_value(builder, _constant(word, 0))
        lowest = vectors.repeated(args[6])
        with vectors.indices(args[4]) as (index, _):
            from_x = builder.add(args[3], index)
            value = vectors.load(0, index)
            vectors.store(builder.fmul(value, vectors.load(1, from_x)), 5, index)
            field = _Bits(builder, builder.bitcast(value, word))("and_", _EXPONENT)
            low = builder.icmp_signed("<", field.value, builder.load(lowest))
            raised = field.replace(low, _Bits(builder, builder.load(lowest))).replace(field.test("==", 0), 0)
            power = builder.fmul(builder.bitcast(raised.value, value.type), vectors.load(2, from_x))
            scaled = _Bits(builder, builder.bitcast(power, word)).replace(field.test("==", _EXPONENT), field)
            so_far = builder.load(top)
            larger = builder.icmp_signed(">", scaled.value, so_far)
            builder.store(builder.select(larger, scaled.value, so_far), top)
        return vectors.reduce("smax", builder.load(top))

    return types.int32(w, x, powers, types.intp, types.intp, products, types.int32), generate


@intrinsic  # type: ignore[untyped-decorator]
def sum_groups(_context: Any, products: Any, groups: Any, scale: Any) -> Any:
    """Exact int64 sum of products * scale, each truncated towards zero; at most 8 groups, terms below 2^28."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vectors = _Vectors(context, builder, signature, args)
        word, wide = ir.VectorType(_WORD, GROUP), ir.VectorType(ir.IntType(64), GROUP)
        factor = vectors.repeated(args[2])
        total = cgutils.alloca_once_value(builder, _constant(word, 0))
        with vectors.indices(args[1]) as (index, _):
            scaled = builder.fmul(vectors.load(0, index), builder.load(factor))
            builder.store(builder.add(builder.load(total), builder.fptosi(scaled, word)), total)
        return vectors.reduce("add", builder.sext(builder.load(total), wide))

    return types.int64(products, types.intp, types.float32), generate
