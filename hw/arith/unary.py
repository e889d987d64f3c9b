"""The unary functions: one table-driven integer datapath, `numerics.unary` step by step.

Every function is made to be the same chain: one product by a constant reduces the argument, one shift and one
rounding place it, one ROM word and three products give the curve, one shift and subtraction give its complement, one
product multiplies by the argument, one rounding ends it. What differs are a dozen control bits, decoded at the start:

| | constant | shifted right by | factor | times |
|---|---|---|---|---|
| exp | log2(e) 2^33 | 32 - min(e, 7) | curve | 1 |
| recip, rsqrt | 2^32 | 32 | curve | 1 |
| sigmoid below 18 | 2^31 | 32 - e | curve or complement | 1 (SiLU: x) |
| sigmoid from 18 on | as exp | as exp | curve or complement | 1 (SiLU: x) |
| GELUs | 2^32 | 32 - e | curve or complement | x |
| tanh below 4 | 2^31 | 32 - e | curve | x |
| tanh from 4 on | 2^32: twice the argument | 32 - e | complement of twice the curve | 1 |
| ReLU | - | - | 0 or its complement | x |
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from typebar.hw.arith.float32 import BIAS, Parts, leading_zeros, named, round_pack
from typebar.hw.arith.pipeline import Pipeline, pick
from typebar.isa.errors import TypebarError
from typebar.isa.instructions import Function
from typebar.isa.numerics.unary import (
    EXP_MAX_EXPONENT,
    GELU_LIMIT,
    LOG2_E,
    ONE_BITS,
    SIGMOID_LIMIT,
    TANH_LIMIT,
    TANH_SPLIT,
)
from typebar.isa.numerics.unary_rom import (
    FIELDS,
    FRACTION_BITS,
    OFFSET_BITS,
    REGIONS,
    ROM_WORDS,
    SUM_BITS,
    WORD_BITS,
    Curve,
)
from typebar.isa.numerics.unary_table import ROM_HEX

CUTS = 10
_FLAGGED = [curve for curve in Curve if curve is not Curve.SIGMOID]
FUNCTION_BITS = max(Function).bit_length()
LEADING_BITS = 16
"""The highest one of a nonzero curve value times a significand lies among this many bits: curve values are at least
2^(32 - 16 - 1), which a test of the ROM keeps true."""
_CONSTANT_BITS = 34
_DROPPED_BITS = 24
"""Low bits of the argument's product that no shift ever leaves in the result, nor its rounding bit."""
_FRACTION_END = OFFSET_BITS + REGIONS[Curve.RSQRT].index_bits
_KEPT_BITS = 24 + _CONSTANT_BITS - _DROPPED_BITS
_PRODUCT_BITS = ONE_BITS + 1 + 24


def _limit(value: int) -> int:
    """The float32 bits of a small whole number, without the lowest 20, which are zeros."""
    exponent = value.bit_length() - 1
    return (BIAS + exponent) << 3 | (value << 3 >> exponent) & 7


class UnaryEvaluator(wiring.Component):
    """result = a unary function of x, for `lanes` values that share a coefficient ROM of as many ports.

    `select` is a number of `isa.Function`; results of others mean nothing. `latency` >= 2 cycles (one is the
    ROM's), one set of values a cycle. A block RAM has two ports: two lanes share three.
    """

    def __init__(self, latency: int, lanes: int = 2) -> None:
        """A unit for `lanes` values.

        Raises:
            TypebarError: latency below 2.
        """
        if latency < 2:
            raise TypebarError(f"the unary unit needs a latency of at least 2 cycles, not {latency}: raise it")
        self.latency, self.lanes = latency, lanes
        values = data.ArrayLayout(32, lanes)
        super().__init__({"select": In(FUNCTION_BITS), "x": In(values), "result": Out(values)})

    def elaborate(self, platform: object) -> Module:
        """One ROM, and a lane's datapath for each of its ports."""
        m = Module()
        words = [int(word, 16) for word in ROM_HEX.split()]
        m.submodules.rom = rom = Memory(shape=WORD_BITS, depth=ROM_WORDS, init=words)
        for i in range(self.lanes):
            port = rom.read_port()
            lane = UnaryLane(self.latency)
            m.submodules[f"lane{i}"] = lane
            m.d.comb += [
                lane.select.eq(self.select),
                lane.x.eq(self.x[i]),
                port.en.eq(1),
                port.addr.eq(lane.address),
                lane.word.eq(port.data),
                self.result[i].eq(lane.result),
            ]
        return m


class UnaryLane(wiring.Component):
    """One lane of `UnaryEvaluator`; `word` is the ROM's word at `address`, one cycle later."""

    def __init__(self, latency: int) -> None:
        """A lane of `latency` >= 2 cycles."""
        self.latency = latency
        super().__init__(
            {
                "select": In(FUNCTION_BITS),
                "x": In(32),
                "address": Out(range(ROM_WORDS)),
                "word": In(WORD_BITS),
                "result": Out(32),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """Reduce, look up, evaluate, combine, round."""
        m = Module()
        pipe = Pipeline(m, cuts=CUTS, latency=self.latency - 1)
        now, late = self._decode(m)
        s = pipe.cut(**now, **late)
        position = self._reduce(m, pipe, s, list(late))
        p, scale, late = self._evaluate(m, pipe, position, list(late))
        m.d.comb += self.result.eq(self._combine(m, pipe, p, scale, late))
        assert pipe.complete
        return m

    def _decode(self, m: Module) -> tuple[dict[str, Any], dict[str, Any]]:
        """Control bits: those of the reduction, and those that travel on to the look-up and beyond."""
        x = Parts(m, self.x, "x")
        is_ = {f: Signal(name=f"is_{f.name.lower()}") for f in Function}
        m.d.comb += [flag.eq(self.select == f) for f, flag in is_.items()]
        below = {limit: self.x[20:31] < _limit(limit) for limit in (SIGMOID_LIMIT, TANH_LIMIT, GELU_LIMIT, TANH_SPLIT)}
        gelu = named(m, is_[Function.GELU_ERF] | is_[Function.GELU_TANH], "gelu")
        sigmoid = named(m, is_[Function.SIGMOID] | is_[Function.SILU], "sigmoid")
        recip, rsqrt = is_[Function.RECIP], is_[Function.RSQRT]
        exp, tanh_big = Signal(name="exp"), Signal(name="tanh_big")
        tanh_small = is_[Function.TANH] & ~tanh_big
        m.d.comb += [
            exp.eq(is_[Function.EXP] | (sigmoid & ~below[SIGMOID_LIMIT])),
            tanh_big.eq(is_[Function.TANH] & ~below[TANH_SPLIT]),
        ]
        one = named(m, ~self.x[:23].any(), "one")
        # Beyond 2^126 a reciprocal is below 2^-126; the other curves end, or the product is 0 whatever the curve.
        nothing = (
            (recip & ((x.exponent > BIAS + 126) | ((x.exponent == BIAS + 126) & ~one)))
            | (is_[Function.SILU] & x.sign & (x.exponent >= BIAS + EXP_MAX_EXPONENT))
            | (gelu & ~below[GELU_LIMIT])
            | (tanh_big & ~below[TANH_LIMIT])
            | is_[Function.RELU]
        )
        shift = Signal(6)
        top = BIAS + EXP_MAX_EXPONENT
        with m.If(recip | rsqrt):
            m.d.comb += shift.eq(EXP_MAX_EXPONENT)
        with m.Elif(x.exponent < top):
            m.d.comb += shift.eq(Mux(x.exponent < top - 63, 63, top - x.exponent))
        constant = Mux(exp, LOG2_E, Mux(gelu | recip | rsqrt | tanh_big, 1 << ONE_BITS, 1 << (ONE_BITS - 1)))
        curves = self._curve_flags(is_, exp, tanh_small, rsqrt)
        times = tanh_small | is_[Function.SILU] | gelu | is_[Function.RELU]
        positive = is_[Function.EXP] | is_[Function.SIGMOID] | rsqrt | is_[Function.RELU]
        now = {"constant": constant, "shift": shift, "negate": exp & (x.sign | ~is_[Function.EXP])}
        late = {
            "curves": curves,
            "significand": Cat(self.x[:23], Const(1, 1)),
            "exponent": x.exponent,
            "exact": recip & one,
            "nothing": nothing,
            "complement": ((gelu | sigmoid | is_[Function.RELU]) & ~x.sign) | tanh_big,
            "twice": tanh_big,
            "times": times,
            "recip": recip,
            "rsqrt": rsqrt,
            "exp": exp,
            "sign": x.sign & ~positive,
            "zero_result": rsqrt & x.infinite,
            "infinite": (recip | rsqrt) & x.zero,
            "nan": x.nan | (rsqrt & x.sign & ~x.zero),
        }
        return now, late

    @staticmethod
    def _curve_flags(is_: dict[Function, Any], exp: Any, tanh_small: Any, rsqrt: Any) -> Any:
        """One bit for each of `_FLAGGED`; SIGMOID is used when none of them is set."""
        flags = {
            Curve.EXP2: exp,
            Curve.RECIP: is_[Function.RECIP],
            Curve.RSQRT: rsqrt,
            Curve.TANH: tanh_small,
            Curve.GELU_ERF: is_[Function.GELU_ERF],
            Curve.GELU_TANH: is_[Function.GELU_TANH],
        }
        return Cat(*(flags[curve] for curve in _FLAGGED))

    def _reduce(self, m: Module, pipe: Pipeline, s: SimpleNamespace, late: list[str]) -> SimpleNamespace:
        """The argument in segments of 2^-18, two's complement: product, shift, rounding half up."""
        product = _product(m, s.significand, s.constant)[_DROPPED_BITS:]
        s = pipe.cut(product=product, shift=s.shift, negate=s.negate, **pick(s, late))
        s = pipe.cut(shifted=(s.product >> s.shift)[:_KEPT_BITS], negate=s.negate, **pick(s, late))
        position = Signal(signed(_KEPT_BITS + 1))
        whole = Cat(s.shifted[1:] ^ s.negate.replicate(_KEPT_BITS - 1), s.negate, s.negate).as_signed()
        m.d.comb += position.eq(whole + (s.shifted[0] ^ s.negate))
        return SimpleNamespace(position=position, **pick(s, late))

    def _evaluate(
        self, m: Module, pipe: Pipeline, s: SimpleNamespace, late: list[str]
    ) -> tuple[Any, Any, dict[str, Any]]:
        """The curve: ROM word, then Horner's rule. Returns p, -29 minus its power of two, and what lives on."""
        odd = ~s.exponent[0]
        segment = Mux(
            s.rsqrt, Cat(s.position[OFFSET_BITS:_FRACTION_END], odd), s.position[OFFSET_BITS : OFFSET_BITS + 9]
        )
        address = Signal(range(ROM_WORDS))
        m.d.comb += [
            address.eq(self._base(s.curves) + (segment & self._mask(s.curves))),
            self.address.eq(address),
        ]
        # What the scale of the ROM word is reduced by: the power of two that the reduction took out.
        power = Signal(signed(12))
        e = Signal(signed(9))
        m.d.comb += e.eq(s.exponent - BIAS)
        with m.If(s.exp):
            m.d.comb += power.eq((s.position >> (OFFSET_BITS + REGIONS[Curve.EXP2].index_bits)) + 1)
        with m.Elif(s.recip):
            m.d.comb += power.eq(-e)
        with m.Elif(s.rsqrt):
            m.d.comb += power.eq(-(e >> 1))
        offset = Cat(s.position[: OFFSET_BITS - 1], ~s.position[OFFSET_BITS - 1]).as_signed()
        late = [name for name in late if name not in ("curves", "recip", "rsqrt", "exp")]
        read = Pipeline(m, cuts=1, latency=1)  # the ROM's own register
        s = read.cut(offset=offset, power=power, **pick(s, late))
        fields = {f.name: self.word[f.low : f.low + f.bits] for f in FIELDS}
        c3, c2, c1 = (fields[name].as_signed() for name in ("c3", "c2", "c1"))
        scale = Signal(signed(12))
        m.d.comb += scale.eq(fields["k"] - s.power)
        live = pick(s, late) | {"scale": scale}
        s = pipe.cut(sum=_horner(m, c2, c3, s.offset, SUM_BITS), c1=c1, c0=fields["c0"], offset=s.offset, **live)
        live = pick(s, live)
        s = pipe.cut(sum=_horner(m, s.c1, s.sum, s.offset, SUM_BITS), c0=s.c0, offset=s.offset, **live)
        live = pick(s, live)
        p = _horner(m, Cat(s.c0, Const(0, 1)).as_signed(), s.sum, s.offset, FRACTION_BITS + 2)
        s = pipe.cut(p=p[: FRACTION_BITS + 1], **live)
        p = named(m, Mux(s.nothing, 0, Mux(s.exact, 1 << FRACTION_BITS, s.p)), "p")
        late = [name for name in live if name not in ("nothing", "exact", "scale")]
        return p, s.scale, pick(s, late)

    @staticmethod
    def _base(curves: Any) -> Any:
        base: Any = Const(REGIONS[Curve.SIGMOID].base, 10)
        for flag, curve in zip(curves, _FLAGGED, strict=True):
            base = Mux(flag, Const(REGIONS[curve].base, 10), base)
        return base

    @staticmethod
    def _mask(curves: Any) -> Any:
        """Bits of the position that number a curve's segments."""
        mask: Any = Const((1 << (REGIONS[Curve.SIGMOID].segments - 1).bit_length()) - 1, 9)
        for flag, curve in zip(curves, _FLAGGED, strict=True):
            mask = Mux(flag, Const(REGIONS[curve].segments - 1, 9), mask)
        return mask

    @staticmethod
    def _combine(m: Module, pipe: Pipeline, p: Any, scale: Any, late: dict[str, Any]) -> Any:
        """The factor as a 33-bit fraction, its product, the float32."""
        s = SimpleNamespace(**late)
        # One place more than the fraction has, so that twice the curve is a shift by one less.
        wide = Cat(Const(0, ONE_BITS + 1 - FRACTION_BITS), p)
        places = Signal(12)
        m.d.comb += places.eq(scale + 1 - s.twice)
        fraction = Mux(places[6:].any(), 0, wide >> places[:6])
        factor = Signal(ONE_BITS + 1)
        exponent = Signal(signed(13))
        ones = (1 << ONE_BITS) - fraction
        m.d.comb += [
            factor.eq(Mux(s.complement, ones[: ONE_BITS + 1], wide[1:])),
            exponent.eq(Mux(s.times, s.exponent + 1, BIAS + 1) - Mux(s.complement, 0, scale)),
        ]
        end = pick(s, ("sign", "zero_result", "infinite", "nan"))
        multiplicand = Mux(s.times, s.significand, 1 << 23)
        s = pipe.cut(factor=factor, multiplicand=multiplicand, exponent=exponent, **end)
        end = pick(s, end)
        s = pipe.cut(product=_product(m, s.multiplicand, s.factor)[:_PRODUCT_BITS], exponent=s.exponent, **end)
        end = pick(s, end)
        zeros = leading_zeros(m, s.product[-LEADING_BITS:], "product")
        normal = (s.product << zeros[: (LEADING_BITS - 1).bit_length()])[:_PRODUCT_BITS]
        exponent = Signal(signed(13))
        m.d.comb += exponent.eq(s.exponent - zeros)
        s = pipe.cut(normal=normal, exponent=exponent, **end)
        bits = round_pack(
            m,
            sign=s.sign,
            exponent=s.exponent,
            significand=Mux(s.zero_result, 0, s.normal[-24:]),
            guard=s.normal[-25],
            sticky=s.normal[:-25].any(),
            infinite=s.infinite,
            nan=s.nan,
        )
        return pipe.cut(bits=bits).bits


def _product(m: Module, narrow: Any, wide: Any) -> Any:
    """A product of 24 and up to 34 unsigned bits in two DSP slices, of 24 x 17 bits each."""
    half = OFFSET_BITS - 1
    low, high = named(m, narrow * wide[:half], "low_product"), narrow * wide[half:]
    return named(m, low + (high << half), "full_product")


def _horner(m: Module, addend: Any, factor: Any, offset: Any, width: int) -> Any:
    """addend + ((factor offset + 2^16) >> 17), as one multiplication and addition: what a DSP slice does."""
    result = Signal(signed(width), name="horner")
    places = OFFSET_BITS - 1
    aligned = Cat(Const(1 << (places - 1), places), addend).as_signed()
    m.d.comb += result.eq((factor * offset + aligned) >> places)
    return result
