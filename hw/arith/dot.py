"""The aligned dot product: one chunk of `lanes` products, added as `numerics.chunk_sum` adds them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from typebar.hw.arith.convert import OPERAND
from typebar.hw.arith.float32 import BIAS, leading_zeros, named, round_pack
from typebar.hw.arith.pipeline import Pipeline
from typebar.isa.errors import TypebarError
from typebar.isa.numerics.dot import ALIGNED_FRACTION_BITS

PRODUCT_BITS = 22
PRODUCT_FRACTION_BITS = 20
EXPONENT_BITS = 10
ALIGNED_BITS = PRODUCT_BITS + ALIGNED_FRACTION_BITS - PRODUCT_FRACTION_BITS


def cuts(lanes: int) -> int:
    """Places where a dot unit of `lanes` lanes may be cut: two levels of a tree lie between two of them."""
    return 4 + 2 * ((_levels(lanes) + 1) // 2)


def _levels(lanes: int) -> int:
    return (lanes - 1).bit_length()


class DotProduct(wiring.Component):
    """sum = the chunk sum of `lanes` operand pairs, float32; `latency` >= 1 cycles, one chunk a cycle.

    Absent lanes must come as zeros, and `nan` tells of a NaN in a present one: both belong to the conversion of
    operands, which many dot units share.

    An operand's exponent field is 0 or at least 77, so its two highest bits tell whether it is not zero. That bit, put
    above the exponent, makes the sum of two exponents 10 bits: at least 666 where the product is not zero, at most
    510 where it is, so a zero product never has the largest exponent beside others.

    Magnitudes are truncated before they get their sign. A negative one enters the sum inverted, and the missing one
    is the carry into an adder of the tree: there is one adder less than lanes, so lane 0 is negated in full.
    """

    def __init__(self, lanes: int, latency: int) -> None:
        """A unit of `lanes` lanes.

        Raises:
            TypebarError: fewer than two lanes.
        """
        if lanes < 2:
            raise TypebarError(f"a dot unit needs at least 2 lanes, not {lanes}: raise matrix.lanes")
        self.lanes, self.latency = lanes, latency
        operands = data.ArrayLayout(OPERAND, lanes)
        super().__init__({"w": In(operands), "x": In(operands), "nan": In(1), "sum": Out(32)})

    def elaborate(self, platform: object) -> Module:
        """Multiply, find the largest exponent, align, add, normalise, round."""
        m = Module()
        pipe = Pipeline(m, cuts=cuts(self.lanes), latency=self.latency)
        s = SimpleNamespace(**self._lanes(m), nan=self.nan)
        rounds = (_levels(self.lanes) + 1) // 2
        tops, factors = list(s.exponents), {"w": s.w, "x": s.x}
        # Their highest bit is for comparing: distances that matter are below 512.
        s.exponents = [exponent[:-1] for exponent in s.exponents]
        for i in range(rounds):
            if i == rounds - 1:
                # So late that a multiplier's own registers, two before and two behind, keep it in step.
                factors = {"products": [w * x for w, x in zip(factors["w"], factors["x"], strict=True)]}
            tops = _reduce(m, _reduce(m, tops, _larger), _larger)
            if i == rounds - 1:
                tops = [tops[0][:-1]]
            s = pipe.cut(tops=tops, **factors, exponents=s.exponents, signs=s.signs, nan=s.nan)
            tops, factors = s.tops, {name: getattr(s, name) for name in factors}
        distances = [self._distance(m, tops[0], exponent, i) for i, exponent in enumerate(s.exponents)]
        s = pipe.cut(distances=distances, products=s.products, top=tops[0], signs=s.signs, nan=s.nan)
        terms, carries = self._align(m, s)
        s = pipe.cut(terms=terms, carries=carries, top=s.top, nan=s.nan)
        total = self._add(m, pipe, s)
        m.d.comb += self.sum.eq(_float32(m, pipe, *total))
        assert pipe.complete
        return m

    def _lanes(self, m: Module) -> dict[str, Any]:
        """Significands, the product's sign, and the sum of the exponent fields with the bit for nonzero above them."""
        lanes: dict[str, Any] = {"w": [], "x": [], "signs": [], "exponents": []}
        for i in range(self.lanes):
            w, x = self.w[i], self.x[i]
            present = [named(m, operand.exponent[6:8].any(), "present") for operand in (w, x)]
            exponent = Signal(EXPONENT_BITS, name=f"exponent{i}")
            m.d.comb += exponent.eq(Cat(w.exponent, present[0]) + Cat(x.exponent, present[1]))
            lanes["w"].append(Cat(w.fraction, present[0]))
            lanes["x"].append(Cat(x.fraction, present[1]))
            lanes["signs"].append(w.sign ^ x.sign)
            lanes["exponents"].append(exponent)
        return lanes

    @staticmethod
    def _distance(m: Module, top: Any, exponent: Any, lane: int) -> Any:
        """How far to shift a product: 5 bits, and one that says too far."""
        below = Signal(EXPONENT_BITS - 1, name=f"below{lane}")
        m.d.comb += below.eq(top - exponent)
        return Cat(below[:5], below[5:].any())

    def _align(self, m: Module, s: Any) -> tuple[list[Any], list[Any]]:
        """Signed terms in units of 2^(E - 23), all but the first still lacking a carry each."""
        terms = []
        for i, (product, distance, sign) in enumerate(zip(s.products, s.distances, s.signs, strict=True)):
            term = Signal(signed(ALIGNED_BITS + 1), name=f"term{i}")
            # Four-to-one, coarse first: one look-up table a bit. The last halving, zero and sign make another.
            value = Cat(Const(0, ALIGNED_BITS - PRODUCT_BITS), product)
            for low in (3, 1):
                value = self._shift(m, value, distance[low : low + 2], 1 << low, f"shifted{i}_{low}")
            value = Mux(distance[5], 0, Mux(distance[0], value >> 1, value))[:ALIGNED_BITS]
            inverted = Cat(value ^ sign.replicate(ALIGNED_BITS), sign)
            m.d.comb += term.eq(inverted + sign if i == 0 else inverted)
            terms.append(term)
        return terms, list(s.signs[1:])

    @staticmethod
    def _shift(m: Module, value: Any, count: Any, step: int, name: str) -> Any:
        """`value` >> (count * step), count of 2 bits."""
        result = Signal(ALIGNED_BITS, name=name)
        with m.Switch(count):
            for case in range(4):
                with m.Case(case):
                    m.d.comb += result.eq(value >> (case * step))
        return result

    def _add(self, m: Module, pipe: Pipeline, s: Any) -> tuple[Any, Any, Any]:
        """The exact sum, two levels of adders between two cuts, with E and NaN kept in step."""
        terms, carries = s.terms, s.carries
        top, nan = s.top, s.nan
        for _ in range((_levels(self.lanes) + 1) // 2):
            for _ in range(2):
                carries = list(carries)
                terms = _reduce(m, terms, partial(_sum, carries))
            s = pipe.cut(terms=terms, carries=carries, top=top, nan=nan)
            terms, carries, top, nan = s.terms, s.carries, s.top, s.nan
        assert not carries
        return terms[0], top, nan


def _float32(m: Module, pipe: Pipeline, total: Any, top: Any, nan: Any) -> Any:
    """A sum in units of 2^(E - 23), as float32: magnitude and count, then normalise and round."""
    width = max(len(total) - 1, ALIGNED_BITS + 1)
    magnitude = Signal(width)
    sign = total[-1]
    m.d.comb += magnitude.eq((total ^ sign.replicate(len(total))) + sign)
    s = pipe.cut(zeros=leading_zeros(m, magnitude, "sum"), magnitude=magnitude, sign=sign, top=top, nan=nan)
    # E is top - 2 * 127; bit p of the sum counts 2^(E - 23 + p).
    exponent = Signal(signed(11))
    m.d.comb += exponent.eq(s.top + (width - 1 - ALIGNED_FRACTION_BITS - BIAS) - s.zeros)
    normal = named(m, (s.magnitude << s.zeros)[:width], "normal")
    bits = round_pack(
        m,
        sign=s.sign & normal[-1],
        exponent=exponent,
        significand=normal[width - 24 :],
        guard=normal[width - 25],
        sticky=normal[: width - 25].any(),
        infinite=Const(0, 1),
        nan=s.nan,
    )
    return pipe.cut(bits=bits).bits


def _reduce(m: Module, values: list[Any], join: Callable[[Module, Any, Any], Any]) -> list[Any]:
    """One level of a tree of adjacent pairs; an odd one passes."""
    pairs = [join(m, a, b) for a, b in zip(values[0::2], values[1::2], strict=False)]
    return pairs + values[len(values) & ~1 :]


def _larger(m: Module, a: Any, b: Any) -> Any:
    result = Signal(EXPONENT_BITS, name="larger")
    m.d.comb += result.eq(Mux(a > b, a, b))
    return result


def _sum(carries: list[Any], m: Module, a: Any, b: Any) -> Any:
    """a + b + a carry, taken from the list, signed, in one carry chain."""
    carry = carries.pop()
    width = max(len(a), len(b)) + 1
    left, right = Signal(signed(width + 1), name="left"), Signal(signed(width + 1), name="right")
    result = Signal(signed(width), name="partial")
    m.d.comb += [
        left.eq(Cat(Const(1, 1), a).as_signed()),
        right.eq(Cat(carry, b).as_signed()),
        result.eq((left + right)[1:].as_signed()),
    ]
    return result
