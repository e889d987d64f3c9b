"""Conversions between float32 registers, memory formats and the matrix unit's operands."""

from __future__ import annotations

from types import SimpleNamespace
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
    LEAST_EXPONENT,
    OPERAND_DROPPED_BITS,
    OPERAND_MAX_BITS,
    OPERAND_MIN_EXPONENT,
)

CUTS = 2
FORMAT_BITS = max(Format).bit_length()
FP16_BIAS = 15
INT8_AT = 3
"""The lowest bit of an int8 beside an fp16: its highest then counts as much more as its exponent field does."""
FP16_NAN, FP16_INFINITY, BF16_NAN, BF16_INFINITY = 0x7E00, 0x7C00, 0x7FC0, 0x7F80


SIGNIFICAND_BITS = 24 - OPERAND_DROPPED_BITS
OPERAND = data.StructLayout({"significand": SIGNIFICAND_BITS, "exponent": 8, "nonzero": 1, "sign": 1})
"""The matrix unit's operand: (-1)^sign significand 2^(exponent - 127 - 10), zero unless `nonzero`, whatever the other
fields hold. The exponent of another one is from 77 to 254. A NaN is told by a bit beside the operands."""
WEIGHT_VALUE_BITS = SIGNIFICAND_BITS + 3
STEP = data.StructLayout({"exponent": 6, "nonzero": 1})
WEIGHT = data.StructLayout({"value": WEIGHT_VALUE_BITS, "step": STEP, "sign": 1})
"""An operand from memory: its exponent's two low bits have shifted the significand, the others are the step."""
_FLAG_PORTS = {"overflow": Out(1), "nan": Out(1)}
_SMALLEST = BIAS + OPERAND_MIN_EXPONENT
_LARGEST = OPERAND_MAX_BITS >> 23
"""Exponent fields of the smallest operand and of the largest."""


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
        super().__init__({"x": In(32), "present": In(1), "operand": Out(OPERAND), **_FLAG_PORTS})

    def elaborate(self, platform: object) -> Module:
        """Round, then limit: two places to cut."""
        m = Module()
        pipe = Pipeline(m, cuts=CUTS, latency=self.latency)
        rounded, nan = _round_operand(self.x)
        s = pipe.cut(rounded=rounded, sign=self.x[31], nan=nan & self.present, present=self.present)
        overflow = named(m, s.rounded > OPERAND_MAX_BITS >> OPERAND_DROPPED_BITS, "too_large")
        fraction = s.rounded[: SIGNIFICAND_BITS - 1] | overflow.replicate(SIGNIFICAND_BITS - 1)
        s = pipe.cut(
            significand=Cat(fraction, Const(1, 1)),
            exponent=Mux(overflow, _LARGEST, s.rounded[SIGNIFICAND_BITS - 1 :])[:8],
            nonzero=s.present & (s.rounded >= _SMALLEST << (SIGNIFICAND_BITS - 1)),
            sign=s.sign,
            overflow=overflow & s.present & ~s.nan,
            nan=s.nan,
        )
        _connect(m, self, s)
        assert pipe.complete
        return m


def _round_operand(x: Any) -> tuple[Any, Any]:
    """Magnitude rounded to 11 significant bits (19 bits, with the carry), and whether x is NaN."""
    guard, sticky = x[OPERAND_DROPPED_BITS - 1], x[: OPERAND_DROPPED_BITS - 1].any()
    kept = x[OPERAND_DROPPED_BITS:31]
    return kept + (guard & (sticky | kept[0])), x[23:31].all() & x[:23].any()


def _connect(m: Module, unit: Any, s: Any) -> None:
    """A converter's outputs: an operand or a weight."""
    m.d.comb += [unit.overflow.eq(s.overflow), unit.nan.eq(s.nan)]
    if hasattr(unit, "operand"):
        m.d.comb += unit.operand.eq(Cat(s.significand, s.exponent, s.nonzero, s.sign))
    else:
        m.d.comb += unit.weight.eq(Cat(s.value, s.step, s.nonzero, s.sign))


def _stepped(m: Module, significand: Any, exponent: Any) -> dict[str, Any]:
    """A weight's value and step."""
    value = Signal(WEIGHT_VALUE_BITS, name="value")
    m.d.comb += value.eq(significand << exponent[:2])
    return {"value": value, "step": exponent[2:]}


def placed(byte: Any, short: Any, is_int8: Any) -> Any:
    """An element of 8 bits or of 16 as the converters to operands take it: an int8 begins at bit 3.

    There its highest bit is where an fp16 has its hidden one. The bits around it do not matter.
    """
    return Cat(short[:INT8_AT], Mux(is_int8, byte, short[INT8_AT : INT8_AT + 8]), short[INT8_AT + 8 :])


class OperandFromMemory(wiring.Component):
    """A memory element as operand, its significand as it lies there; a float32's is rounded.

    `word` holds an int8 or fp16 in its lower half as `placed`, a bf16 in its upper half; the rest of it does not
    matter. All zeros are a zero. The ports are otherwise those of `OperandFromFloat32`.
    """

    def __init__(self, latency: int) -> None:
        """A converter of `latency` >= 1 cycles."""
        self.latency = latency
        super().__init__({"word": In(32), "format": In(FORMAT_BITS), "weight": Out(WEIGHT), **_FLAG_PORTS})

    def elaborate(self, platform: object) -> Module:
        """A bf16 is a float32 with nothing to round: round, then choose."""
        m = Module()
        pipe = Pipeline(m, cuts=CUTS, latency=self.latency)
        raw, is_wide, is_fp32 = self.word, self.format[0], named(m, self.format == Format.FP32, "is_fp32")
        assert Format.BF16 & 1 and Format.FP32 & 1 and not Format.FP16 & 1 and not Format.INT8 & 1
        guard, sticky = raw[OPERAND_DROPPED_BITS - 1] & is_fp32, raw[: OPERAND_DROPPED_BITS - 1].any()
        kept = named(m, Cat(raw[OPERAND_DROPPED_BITS:16] & is_fp32.replicate(INT8_AT), raw[16:31]), "kept")
        rounded = named(m, (kept + (guard & (sticky | kept[0])))[:18], "rounded")
        infinite = raw[23:31].all()
        # The largest operands round up to infinity.
        top = infinite | (kept[:10].all() & guard & raw[24:31].all())
        nan = infinite & (raw[16:23].any() | (raw[:16].any() & is_fp32))
        element = _element(m, raw[:16], self.format)
        s = pipe.cut(
            rounded=rounded,
            significand=element.significand,
            exponent=element.exponent,
            is_wide=is_wide,
            top=named(m, Mux(is_wide, top, element.top), "top"),
            nan=Mux(is_wide, nan, element.top & raw[:10].any()),
            nonzero=element.nonzero & ~is_wide,
            sign=Mux(is_wide, raw[31], element.sign),
        )
        exponent = named(m, s.rounded[SIGNIFICAND_BITS - 1 :], "rounded_exponent")
        significand = Cat(s.rounded[: SIGNIFICAND_BITS - 1], Const(1, 1))
        significand = named(m, Mux(s.top, -1, Mux(s.is_wide, significand, s.significand))[:SIGNIFICAND_BITS], "chosen")
        chosen = named(m, Mux(s.top, _LARGEST, Mux(s.is_wide, exponent, s.exponent))[:8], "chosen_exponent")
        s = pipe.cut(
            **_stepped(m, significand, chosen),
            nonzero=s.nonzero | (s.is_wide & (s.top | (exponent >= _SMALLEST))),
            sign=s.sign,
            overflow=s.top & ~s.nan,
            nan=s.nan,
        )
        _connect(m, self, s)
        assert pipe.complete
        return m


class OperandFromShort(wiring.Component):
    """`OperandFromMemory` for the formats of at most 16 bits: there is nothing to round.

    `element` is `placed`.
    """

    def __init__(self, latency: int) -> None:
        """A converter of `latency` >= 1 cycles; FP32 as format gives a meaningless operand."""
        self.latency = latency
        super().__init__({"element": In(16), "format": In(FORMAT_BITS), "weight": Out(WEIGHT), **_FLAG_PORTS})

    def elaborate(self, platform: object) -> Module:
        """Choose and limit, then shift by the exponent's low bits: two places to cut."""
        m = Module()
        pipe = Pipeline(m, cuts=CUTS, latency=self.latency)
        raw, is_bf16 = self.element, self.format[0]
        element = _element(m, raw, self.format)
        top = named(m, element.top & (~is_bf16 | raw[7:10].all()), "top")
        nan = top & (raw[:7].any() | (raw[7:10].any() & ~is_bf16))
        significand = Mux(is_bf16, Cat(Const(0, 3), raw[:7], Const(1, 1)), element.significand)
        s = pipe.cut(
            significand=Mux(top, -1, significand)[:SIGNIFICAND_BITS],
            exponent=Mux(top, _LARGEST, Mux(is_bf16, raw[7:15], element.exponent))[:8],
            nonzero=Mux(is_bf16, raw[7:15] >= _SMALLEST, element.nonzero),
            sign=element.sign,
            overflow=top & ~nan,
            nan=nan,
        )
        s = pipe.cut(
            **_stepped(m, s.significand, s.exponent), nonzero=s.nonzero, sign=s.sign, overflow=s.overflow, nan=s.nan
        )
        _connect(m, self, s)
        assert pipe.complete
        return m


def _element(m: Module, raw: Any, fmt: Any) -> SimpleNamespace:
    """A `placed` fp16 or int8: sign, significand, exponent field, whether it is not zero, `top` if infinite or NaN.

    Of other formats only `sign` and `top` mean something: the sign, and that five bits above the tenth are set.
    """
    is_int8 = fmt[1]
    assert Format.INT8 & 2 and not Format.FP16 & 2 and not Format.BF16 & 2
    negative = named(m, is_int8 & raw[10], "negative")
    normal = named(m, raw[10:15].any(), "normal")
    # The negation of an int8 inverts what is above its lowest one.
    bits = [raw[bit] ^ (negative & raw[INT8_AT:bit].any()) for bit in range(INT8_AT + 1, 10)]
    highest = Mux(is_int8, raw[10] & ~raw[INT8_AT:10].any(), normal)
    low = raw[:INT8_AT] & ~is_int8.replicate(INT8_AT)
    # Rebiased from fp16's 15; a subnormal counts like exponent field 1.
    exponent = Cat(raw[10] | ~normal, raw[11:14], ~raw[14].replicate(3), raw[14])
    around = raw[:INT8_AT].any() | raw[11:15].any()
    return SimpleNamespace(
        significand=named(m, Cat(low, raw[INT8_AT], *bits, highest), "element"),
        exponent=Mux(is_int8, BIAS + LEAST_EXPONENT[Format.INT8], exponent)[:8],
        nonzero=raw[INT8_AT:11].any() | (around & ~is_int8),
        top=~is_int8 & raw[10:15].all(),
        sign=Mux(is_int8, raw[10], raw[15]),
    )


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
