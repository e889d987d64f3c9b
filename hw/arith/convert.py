"""Conversions between float32 registers, memory formats and the matrix unit's operands."""

from __future__ import annotations

from typing import Any

from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from typebar.hw.arith.float32 import BIAS, Parts, leading_zeros, named, shift_right_sticky
from typebar.hw.arith.pipeline import Pipeline
from typebar.isa.instructions import Format
from typebar.isa.numerics.formats import (
    CANONICAL_NAN,
    EXPONENT,
    OPERAND_DROPPED_BITS,
    OPERAND_MAX_BITS,
    OPERAND_MIN_EXPONENT,
)

CUTS = 2
FORMAT_BITS = max(Format).bit_length()
FP16_BIAS = 15
FP16_NAN, FP16_INFINITY, BF16_NAN, BF16_INFINITY = 0x7E00, 0x7C00, 0x7FC0, 0x7F80


OPERAND = data.StructLayout({"fraction": 23 - OPERAND_DROPPED_BITS, "exponent": 8, "sign": 1})
"""The matrix unit's operand: a float32 without its lowest 13 fraction bits, zero being all zeros. Exponent field 0 is
zero; 255 does not occur, a NaN being told by a bit beside the operands."""
_OPERAND_PORTS = {"present": In(1), "operand": Out(OPERAND), "overflow": Out(1), "nan": Out(1)}


def _small(m: Module, raw: Any, fmt: Any) -> tuple[Any, Any, Any]:
    """An fp16 (exponent field below 31) or int8 element: sign, float32 exponent field, 11-bit significand, normalised.

    The exponent field of a zero is meaningless; its significand is 0.
    """
    is_int8 = named(m, fmt == Format.INT8, "is_int8")
    sign = Mux(is_int8, raw[7], raw[15])
    magnitude = Signal(8)
    m.d.comb += magnitude.eq((raw[:8] ^ raw[7].replicate(8)) + raw[7])
    field = raw[10:15]
    normal = named(m, field.any(), "normal")
    significand = named(m, Mux(is_int8, Cat(Const(0, 3), magnitude), Cat(raw[:10], normal)), "significand")
    zeros = leading_zeros(m, significand, "element")
    # An int8's highest bit, bit 10 here, counts 2^7; a subnormal counts like exponent field 1.
    top = Mux(is_int8, BIAS + 7, (BIAS - FP16_BIAS) + Cat(field[0] | ~normal, field[1:]))
    return sign, (top - zeros)[:8], named(m, (significand << zeros)[:11], "normalised")


class OperandFromFloat32(wiring.Component):
    """A register value as operand, as `numerics.to_operand`; an absent lane is zero, whatever it holds.

    `overflow` is this element's `OPERAND_OVERFLOW`; for a NaN, `nan` is set and the operand means nothing.
    `latency` >= 1 cycles, one element a cycle.
    """

    def __init__(self, latency: int) -> None:
        """A converter of `latency` >= 1 cycles."""
        self.latency = latency
        super().__init__({"x": In(32), **_OPERAND_PORTS})

    def elaborate(self, platform: object) -> Module:
        """Round, then limit: two places to cut."""
        m = Module()
        pipe = Pipeline(m, cuts=CUTS, latency=self.latency)
        rounded, nan = _round_operand(self.x)
        s = pipe.cut(rounded=rounded, sign=self.x[31], nan=nan & self.present, present=self.present)
        bits, overflow = _limit_operand(m, s.rounded, s.sign)
        s = pipe.cut(bits=Mux(s.present, bits, 0), overflow=overflow & s.present & ~s.nan, nan=s.nan)
        m.d.comb += [self.operand.eq(s.bits), self.overflow.eq(s.overflow), self.nan.eq(s.nan)]
        assert pipe.complete
        return m


def _round_operand(x: Any) -> tuple[Any, Any]:
    """Magnitude rounded to 11 significant bits (19 bits, with the carry), and whether x is NaN."""
    guard, sticky = x[OPERAND_DROPPED_BITS - 1], x[: OPERAND_DROPPED_BITS - 1].any()
    kept = x[OPERAND_DROPPED_BITS:31]
    return kept + (guard & (sticky | kept[0])), x[23:31].all() & x[:23].any()


def _limit_operand(m: Module, rounded: Any, sign: Any) -> tuple[Any, Any]:
    """Operand bits of a rounded magnitude, and whether it overflowed."""
    largest = OPERAND_MAX_BITS >> OPERAND_DROPPED_BITS
    smallest = (BIAS + OPERAND_MIN_EXPONENT) << (23 - OPERAND_DROPPED_BITS)
    overflow = named(m, rounded > largest, "overflow")
    kept = Cat(Mux(overflow, largest, rounded)[:18], sign)
    return Mux(rounded < smallest, 0, kept), overflow


class OperandFromMemory(wiring.Component):
    """A memory element as operand, as `to_operand(decode(raw))`; an absent lane is zero, whatever it holds.

    `raw` holds the element in its lowest bits; the ports are otherwise those of `OperandFromFloat32`.
    """

    def __init__(self, latency: int) -> None:
        """A converter of `latency` >= 1 cycles."""
        self.latency = latency
        super().__init__({"raw": In(32), "format": In(FORMAT_BITS), **_OPERAND_PORTS})

    def elaborate(self, platform: object) -> Module:
        """fp16 and int8 are normalised and always fit; bf16 and float32 are rounded and limited."""
        m = Module()
        pipe = Pipeline(m, cuts=CUTS, latency=self.latency)
        wide_value = Mux(self.format == Format.BF16, Cat(Const(0, 16), self.raw[:16]), self.raw)
        wide_value = named(m, wide_value, "wide_value")
        rounded, wide_nan = _round_operand(wide_value)
        is_fp16 = named(m, self.format == Format.FP16, "is_fp16")
        is_small = named(m, is_fp16 | (self.format == Format.INT8), "is_small")
        sign, exponent, significand = _small(m, self.raw[:16], self.format)
        small_zero = ~significand[10]
        top = named(m, is_fp16 & self.raw[10:15].all(), "top")
        # An infinity takes the way of an overflowing float32.
        magnitude = Mux(is_small & ~top, Cat(significand[:10], Mux(small_zero, 0, exponent)), rounded)
        magnitude = Mux(top, EXPONENT >> OPERAND_DROPPED_BITS, magnitude)
        nan = Mux(is_small, top & self.raw[:10].any(), wide_nan)
        s = pipe.cut(
            magnitude=magnitude,
            sign=Mux(is_small, sign, wide_value[31]),
            nan=nan & self.present,
            present=self.present,
        )
        bits, overflow = _limit_operand(m, s.magnitude, s.sign)
        s = pipe.cut(bits=Mux(s.present, bits, 0), overflow=overflow & s.present & ~s.nan, nan=s.nan)
        m.d.comb += [self.operand.eq(s.bits), self.overflow.eq(s.overflow), self.nan.eq(s.nan)]
        assert pipe.complete
        return m


class OperandFromShort(wiring.Component):
    """`OperandFromMemory` for the formats of at most 16 bits, of half its size: there is nothing to round."""

    def __init__(self, latency: int) -> None:
        """A converter of `latency` >= 1 cycles; FP32 as format gives a meaningless operand."""
        self.latency = latency
        super().__init__({"element": In(16), "format": In(FORMAT_BITS), **_OPERAND_PORTS})

    def elaborate(self, platform: object) -> Module:
        """One significand for all formats, normalised; a bf16 is normal or too small to matter."""
        m = Module()
        pipe = Pipeline(m, cuts=CUTS, latency=self.latency)
        raw = self.element
        is_int8 = named(m, self.format == Format.INT8, "is_int8")
        is_bf16 = named(m, self.format == Format.BF16, "is_bf16")
        magnitude = Signal(8)
        m.d.comb += magnitude.eq((raw[:8] ^ raw[7].replicate(8)) + raw[7])
        normal = raw[10:15].any()
        fp16, bf16 = Cat(raw[:10], normal), Cat(Const(0, 3), raw[:7], Const(1, 1))
        significand = Mux(is_int8, Cat(Const(0, 3), magnitude), Mux(is_bf16, bf16, fp16))
        significand = named(m, significand, "significand")
        fp16_exponent = (BIAS - FP16_BIAS) + Cat(raw[10] | ~normal, raw[11:15])
        exponent = Mux(is_int8, BIAS + 7, Mux(is_bf16, raw[7:15], fp16_exponent))
        top = named(m, ~is_int8 & raw[10:15].all() & (~is_bf16 | raw[7:10].all()), "top")
        nan = top & (raw[:7].any() | (~is_bf16 & raw[7:10].any()))
        s = pipe.cut(
            significand=significand,
            zeros=leading_zeros(m, significand, "element"),
            exponent=exponent[:8],
            sign=Mux(is_int8, raw[7], raw[15]),
            nothing=~self.present | (is_bf16 & (raw[7:15] < BIAS + OPERAND_MIN_EXPONENT)),
            overflow=top & ~nan & self.present,
            nan=nan & self.present,
        )
        fraction = (s.significand << s.zeros)[:11]
        zero = s.nothing | ~fraction[10]
        finite = Cat(fraction[:10], (s.exponent - s.zeros)[:8])
        bits = Cat(Mux(s.overflow, OPERAND_MAX_BITS >> OPERAND_DROPPED_BITS, finite)[:18], s.sign)
        s = pipe.cut(bits=Mux(zero, 0, bits), overflow=s.overflow, nan=s.nan)
        m.d.comb += [self.operand.eq(s.bits), self.overflow.eq(s.overflow), self.nan.eq(s.nan)]
        assert pipe.complete
        return m


class Float32FromMemory(wiring.Component):
    """A loaded element as float32, as `numerics.decode`: exact, NaN canonical except for float32, which is moved.

    `raw` holds the element in its lowest bits. `latency` >= 1 cycles, one element a cycle.
    """

    def __init__(self, latency: int) -> None:
        """A converter of `latency` >= 1 cycles."""
        self.latency = latency
        super().__init__({"raw": In(32), "format": In(FORMAT_BITS), "result": Out(32)})

    def elaborate(self, platform: object) -> Module:
        """Decode every format, choose: two places to cut."""
        m = Module()
        pipe = Pipeline(m, cuts=CUTS, latency=self.latency)
        sign, exponent, significand = _small(m, self.raw[:16], self.format)
        is_fp16, is_bf16 = self.format == Format.FP16, self.format == Format.BF16
        top = named(m, is_fp16 & self.raw[10:15].all(), "top")
        fp16_nan = top & self.raw[:10].any()
        bf16_nan = is_bf16 & self.raw[7:15].all() & self.raw[:7].any()
        s = pipe.cut(
            raw=self.raw,
            is_small=is_fp16 | (self.format == Format.INT8),
            is_bf16=is_bf16,
            top=top,
            nan=fp16_nan | bf16_nan,
            sign=sign,
            exponent=exponent,
            significand=significand,
        )
        magnitude = Cat(s.significand[:10], Mux(s.significand[10], s.exponent, 0))
        small = Cat(Const(0, 13), Mux(s.top, EXPONENT >> 13, magnitude)[:18], s.sign)
        wide = Mux(s.is_bf16, Cat(Const(0, 16), s.raw[:16]), s.raw)
        result = Mux(s.nan, Const(CANONICAL_NAN, 32), Mux(s.is_small, small, wide))
        m.d.comb += self.result.eq(pipe.cut(result=result).result)
        assert pipe.complete
        return m


class MemoryFromFloat32(wiring.Component):
    """A register value as memory element, as `numerics.encode`: nearest even, saturating.

    `raw` holds the element in its lowest bits, zeros above; `saturated` is this element's `STORE_SATURATED`.
    `latency` >= 1 cycles, one element a cycle.
    """

    def __init__(self, latency: int) -> None:
        """A converter of `latency` >= 1 cycles."""
        self.latency = latency
        super().__init__({"x": In(32), "format": In(FORMAT_BITS), "raw": Out(32), "saturated": Out(1)})

    def elaborate(self, platform: object) -> Module:
        """Align the significand to the format's last place, then round and limit: two places to cut."""
        m = Module()
        pipe = Pipeline(m, cuts=CUTS, latency=self.latency)
        x = Parts(m, self.x, "x")
        is_fp16, is_int8 = self.format == Format.FP16, self.format == Format.INT8
        # The exponent field at which no shift is needed: fp16's smallest normal, int8's highest bit.
        level = Mux(is_int8, BIAS + 7, BIAS + 1 - FP16_BIAS)
        below = Signal(signed(9))
        m.d.comb += below.eq(level - x.exponent)
        # From 15 places on, all that remains is below half of the last one. Numbers above the level need no shift.
        amount = Mux(below[8] | ~(is_fp16 | is_int8), 0, Mux(below[4:8].any(), 15, below[:4]))
        aligned = shift_right_sticky(m, x.significand, amount, "aligned")
        s = pipe.cut(x=self.x, format=self.format, zero=x.zero, nan=x.nan, below=below, aligned=aligned)
        raw = Signal(32)
        saturated = Signal()
        with m.Switch(s.format):
            with m.Case(Format.FP16):
                self._fp16(m, s, raw, saturated)
            with m.Case(Format.BF16):
                self._bf16(m, s, raw, saturated)
            with m.Case(Format.INT8):
                self._int8(m, s, raw, saturated)
            with m.Default():
                m.d.comb += raw.eq(s.x)
        s = pipe.cut(raw=raw, saturated=saturated)
        m.d.comb += [self.raw.eq(s.raw), self.saturated.eq(s.saturated)]
        assert pipe.complete
        return m

    @staticmethod
    def _fp16(m: Module, s: Any, raw: Any, saturated: Any) -> None:
        kept, round_up = _round_up(s.aligned, 13)
        # The hidden bit of a normal number counts one into the exponent field.
        field = Mux(s.below[8], -s.below, 0)[:8]
        rounded = named(m, Cat(Const(0, 10), field) + kept + round_up, "fp16_rounded")
        limited = rounded >= FP16_INFINITY
        magnitude = Mux(s.nan, FP16_NAN, Mux(limited, FP16_INFINITY - 1, rounded))
        m.d.comb += [raw.eq(Cat(magnitude[:15], s.x[31] & ~s.nan)), saturated.eq(limited & ~s.nan)]

    @staticmethod
    def _bf16(m: Module, s: Any, raw: Any, saturated: Any) -> None:
        _, round_up = _round_up(s.x[:31], 16)
        rounded = named(m, Mux(s.zero, 0, s.x[16:31] + round_up), "bf16_rounded")
        limited = rounded >= BF16_INFINITY
        magnitude = Mux(s.nan, BF16_NAN, Mux(limited, BF16_INFINITY - 1, rounded))
        m.d.comb += [raw.eq(Cat(magnitude[:15], s.x[31] & ~s.nan)), saturated.eq(limited & ~s.nan)]

    @staticmethod
    def _int8(m: Module, s: Any, raw: Any, saturated: Any) -> None:
        kept, round_up = _round_up(s.aligned, 16)
        rounded = named(m, kept + round_up, "int8_rounded")
        largest = named(m, 127 + s.x[31], "largest")
        limited = named(m, s.below[8] | (rounded > largest), "limited")
        magnitude = Mux(limited, largest, rounded)[:8]
        value = (magnitude ^ s.x[31].replicate(8)) + s.x[31]
        m.d.comb += [raw.eq(Mux(s.nan, 0, value[:8])), saturated.eq(limited | s.nan)]


def _round_up(value: Any, dropped: int) -> tuple[Any, Any]:
    """The bits kept of a value, and whether nearest even adds one to them."""
    kept = value[dropped:]
    return kept, value[dropped - 1] & (value[: dropped - 1].any() | kept[0])
