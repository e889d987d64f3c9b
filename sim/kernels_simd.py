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
_WORD, _FLOAT, _DOUBLE = ir.IntType(32), ir.FloatType(), ir.DoubleType()
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

    def words(self, array: int, index: Any) -> Any:
        """The bit patterns of a vector of float32 at an element index."""
        return self.builder.bitcast(self.load(array, index), ir.VectorType(_WORD, GROUP))

    def store(self, value: Any, array: int, index: Any) -> None:
        """Write a vector at an element index."""
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

    def sum(self, vector: Any) -> Any:
        """The sum of a vector of float64, halves by halves."""
        count = vector.type.count
        while count > 1:
            count //= 2
            low, high = (
                self.builder.shuffle_vector(
                    vector, vector, ir.Constant(ir.VectorType(_WORD, count), list(range(first, first + count)))
                )
                for first in (0, count)
            )
            vector = self.builder.fadd(low, high)
        return self.builder.extract_element(vector, _WORD(0))


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
def largest_of_groups(_context: Any, values: Any, present: Any, at: Any, groups: Any) -> Any:
    """The largest magnitude, as a bit pattern, of values[0 : 16 groups] where present[at :] is -1 (else it is 0)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vectors = _Vectors(context, builder, signature, args)
        top = cgutils.alloca_once_value(builder, _constant(ir.VectorType(_WORD, GROUP), 0))
        with vectors.indices(args[3]) as (index, _):
            value = builder.and_(vectors.words(0, index), vectors.load(1, builder.add(args[2], index)))
            magnitude = _Bits(builder, value)("and_", _MAGNITUDE).value
            so_far = builder.load(top)
            builder.store(builder.select(builder.icmp_signed(">", magnitude, so_far), magnitude, so_far), top)
        return vectors.reduce("smax", builder.load(top))

    return types.int32(values, present, types.intp, types.intp), generate


@intrinsic  # type: ignore[untyped-decorator]
def align_groups(
    _context: Any, values: Any, present: Any, at: Any, groups: Any, scale: Any, lowest: Any, aligned: Any
) -> Any:
    """aligned[0 : 16 groups] = values * scale, each truncated towards zero, where present[at :] is -1, and 0 where 0.

    Values whose magnitudes' bit patterns are below `lowest` become 0, too. Magnitudes must come out below 2^31.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vectors = _Vectors(context, builder, signature, args)
        factor, lowest = vectors.repeated(args[4]), vectors.repeated(args[5])
        with vectors.indices(args[3]) as (index, _):
            word = builder.and_(vectors.words(0, index), vectors.load(1, builder.add(args[2], index)))
            kept = builder.icmp_signed(">=", _Bits(builder, word)("and_", _MAGNITUDE).value, builder.load(lowest))
            word = builder.select(kept, word, _constant(word.type, 0))
            value = builder.bitcast(word, ir.VectorType(_FLOAT, GROUP))
            whole = builder.fptosi(builder.fmul(value, builder.load(factor)), word.type)
            vectors.store(builder.sitofp(whole, ir.VectorType(_DOUBLE, GROUP)), 6, index)
        return context.get_dummy_value()

    return types.void(values, present, types.intp, types.intp, types.float32, types.int32, aligned), generate


@intrinsic  # type: ignore[untyped-decorator]
def dot_of_groups(_context: Any, w: Any, x: Any, at: Any, groups: Any) -> Any:
    """Sum of w[0 : 16 groups] * x[at :], float64: exact for integers whose sums of magnitudes stay below 2^53."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vectors = _Vectors(context, builder, signature, args)
        total = cgutils.alloca_once_value(builder, _constant(ir.VectorType(_DOUBLE, GROUP), 0.0))
        with vectors.indices(args[3]) as (index, _):
            other = vectors.load(1, builder.add(args[2], index))
            # Fused or not, an exact product is the same.
            product = builder.fmul(vectors.load(0, index), other, flags=("contract",))
            builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
        return vectors.sum(builder.load(total))

    return types.float64(w, x, types.intp, types.intp), generate
