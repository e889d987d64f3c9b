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
from typebar.hw.arith.dsp import multiply_add, sums
from typebar.hw.arith.float32 import BIAS, leading_zeros, named, round_pack
from typebar.hw.arith.pipeline import Pipeline
from typebar.hw.delay import delayed
from typebar.isa.errors import TypebarError
from typebar.isa.numerics.dot import ALIGNED_FRACTION_BITS

PRODUCT_BITS = 22
PRODUCT_FRACTION_BITS = 20
EXPONENT_BITS = 10
"""Bits of a product's exponent: the sum of two fields, and whether the product is not zero above it."""
ALIGNED_BITS = PRODUCT_BITS + ALIGNED_FRACTION_BITS - PRODUCT_FRACTION_BITS
_FINE_BITS = 3
_FINE = 1 << _FINE_BITS
"""Products are shifted by multiples of this in look-up tables, and by the rest in a multiplier."""
_CHAIN = 5
"""Slices that add one after the other. Three have registers enough to wait for one another; two more need some."""
_LEVELS = 3
"""Levels of the tree of adders between two cuts."""


def cuts(lanes: int) -> int:
    """Places where a dot unit of `lanes` lanes may be cut."""
    return 1 + _rounds(lanes) + 2 + _CHAIN + _sums(lanes) + 2


def _rounds(lanes: int) -> int:
    """Places in the tree that finds the largest exponent: two levels between two of them."""
    return (_levels(lanes) + 1) // 2


def _sums(lanes: int) -> int:
    """Places in the tree that adds what the chains give."""
    return -(-_levels(-(-lanes // _CHAIN)) // _LEVELS)


def _levels(lanes: int) -> int:
    return (lanes - 1).bit_length()


class DotProduct(wiring.Component):
    """sum = the chunk sum of `lanes` operand pairs, float32; `latency` >= 1 cycles, one chunk a cycle.

    Absent lanes must come as zeros, and `nan` tells of a NaN in a present one: both belong to the conversion of
    operands, which many dot units share.

    A product's exponent is the sum of two exponent fields, at most 510, and 512 more if the product is not zero, which
    the sum of the operands' bits for that tells. One that is has at least 512 + 2 x 77, so a zero product never has the
    largest exponent beside others, and is then shifted out, whatever its significands hold.

    Magnitudes are truncated before they get their sign: a negative one is inverted, which shifting and truncating
    does not change, and the missing ones are added to the sum.
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
        rounds = _rounds(self.lanes)
        first, *ahead = pipe.ahead(1 + rounds + 1)
        lanes = self._lanes(m, first)
        products = self._products(m, [first, *ahead], lanes)
        s = pipe.cut(signs=lanes.signs, nan=self.nan)
        tops = lanes.exponents
        for _ in range(rounds):
            for _ in range(2):
                tops = _reduce(m, tops, _larger)
            s = pipe.cut(tops=tops, signs=s.signs, nan=s.nan)
            tops = s.tops
        before = sum(ahead[:rounds])
        distances = sums(
            m, "distances", tops * self.lanes, lanes.exponents, bits=EXPONENT_BITS, subtract=True, before=before
        )
        shifts = [self._shift(m, distance, i) for i, distance in enumerate(distances)]
        coarse, fine = [shift[0] for shift in shifts], [shift[1] for shift in shifts]
        s = pipe.cut(coarse=coarse, fine=fine, top=tops[0], signs=s.signs, nan=s.nan)
        terms = [self._coarse(m, *item) for item in zip(products, s.coarse, s.signs, strict=True)]
        s = pipe.cut(terms=terms, fine=s.fine, signs=s.signs, top=s.top, nan=s.nan)
        m.d.comb += self.sum.eq(_float32(m, pipe, *self._add(m, pipe, *self._chains(m, pipe, s))))
        assert pipe.complete
        return m

    def _lanes(self, m: Module, behind: int) -> Any:
        """Significands and the product's sign; `behind` cycles later the product's exponent."""
        lanes: dict[str, list[Any]] = {"w": [], "x": [], "signs": []}
        parts: dict[str, list[Any]] = {"w": [], "x": []}
        for i in range(self.lanes):
            for side, operand in (("w", self.w[i]), ("x", self.x[i])):
                parts[side].append(Cat(operand.exponent, Const(0, 1), operand.nonzero))
                lanes[side].append(operand.significand)
            lanes["signs"].append(self.w[i].sign ^ self.x[i].sign)
        exponents = [
            delayed(m, Cat(exponent[:9], exponent[10]), behind, f"exponent{i}")
            for i, exponent in enumerate(sums(m, "exponents", parts["w"], parts["x"], bits=EXPONENT_BITS + 1))
        ]
        return SimpleNamespace(**lanes, exponents=exponents)

    @staticmethod
    def _products(m: Module, registers: list[int], s: Any) -> list[Any]:
        """Products of the significands, as late as so many registers."""
        cycles = sum(registers)
        behind = min(cycles, 1)
        return [
            multiply_add(m, f"product{i}", w, x, None, PRODUCT_BITS, before=cycles - behind, behind=behind)
            for i, (w, x) in enumerate(zip(s.w, s.x, strict=True))
        ]

    @staticmethod
    def _shift(m: Module, below: Any, lane: int) -> tuple[Any, Any]:
        """How far to shift a product to the right: multiples of 8, and one of 8 bits for the rest, that of 7 lowest.

        From 25 places on nothing remains: 31 stands for all distances beyond.
        """
        far = named(m, below[5:].any(), f"far{lane}")
        rest = below[:_FINE_BITS] | far.replicate(_FINE_BITS)
        fine = Cat(rest == _FINE - 1 - bit for bit in range(_FINE))
        return below[_FINE_BITS:5] | far.replicate(5 - _FINE_BITS), fine

    @staticmethod
    def _coarse(m: Module, product: Any, count: Any, sign: Any) -> Any:
        """A product shifted by multiples of 8 and then inverted if negative: one look-up table a bit."""
        value, shifted = Cat(Const(0, ALIGNED_BITS - PRODUCT_BITS), product), Signal(ALIGNED_BITS, name="shifted")
        with m.Switch(count):
            for case in range(1 << len(count)):
                with m.Case(case):
                    m.d.comb += shifted.eq(value >> (_FINE * case))
        return named(m, Cat(shifted ^ sign.replicate(ALIGNED_BITS), sign).as_signed(), "term")

    def _chains(self, m: Module, pipe: Pipeline, s: Any) -> tuple[list[Any], Any, Any]:
        """Sums of a chain of slices each, every slice shifting its term by the rest and adding it.

        The first adds it to the number of the chain's negative terms, each of which lacks a one.
        """
        ahead, results = pipe.ahead(_CHAIN), []
        for first in range(0, self.lanes, _CHAIN):
            chain = range(first, min(first + _CHAIN, self.lanes))
            start = _CHAIN - len(chain)
            ones = named(m, sum((s.signs[lane] for lane in chain[1:]), s.signs[first]), f"ones{first}")
            total = delayed(m, Cat(ones, Const(0, 1)).as_signed(), sum(ahead[:start]), f"ones{first}")
            for place, lane in enumerate(chain, start):
                total = multiply_add(
                    m,
                    f"sum{lane}",
                    s.terms[lane],
                    s.fine[lane],
                    total,
                    signed(_sum_bits(lane - first + 1 + (place < _CHAIN - 1))),
                    drop=_FINE - 1,
                    before=sum(ahead[:place]),
                    behind=ahead[place],
                )
            results.append(total)
        top, nan = s.top, s.nan
        for _ in range(_CHAIN):
            s = pipe.cut(top=top, nan=nan)
            top, nan = s.top, s.nan
        return results, top, nan

    def _add(self, m: Module, pipe: Pipeline, terms: list[Any], top: Any, nan: Any) -> tuple[Any, Any, Any]:
        """The exact sum, with E and NaN kept in step."""
        for _ in range(_sums(self.lanes)):
            for _ in range(_LEVELS):
                terms = _reduce(m, terms, partial(_sum, _sum_bits(self.lanes)))
            s = pipe.cut(terms=terms, top=top, nan=nan)
            terms, top, nan = s.terms, s.top, s.nan
        return terms[0], top, nan


def _sum_bits(terms: int) -> int:
    """Bits of a sum of so many aligned terms."""
    return ALIGNED_BITS + 1 + _levels(terms)


def _float32(m: Module, pipe: Pipeline, total: Any, top: Any, nan: Any) -> Any:
    """A sum in units of 2^(E - 23), as float32: magnitude and count, then normalise and round."""
    width = max(len(total) - 1, ALIGNED_BITS + 1)
    magnitude = Signal(width)
    sign = total[-1]
    m.d.comb += magnitude.eq((total ^ sign.replicate(len(total))) + sign)
    s = pipe.cut(zeros=leading_zeros(m, magnitude, "sum"), magnitude=magnitude, sign=sign, top=top, nan=nan)
    # E is top - 512 - 2 * 127, or there is no product; bit p of the sum counts 2^(E - 23 + p).
    none = ~s.top[-1]
    exponent = Signal(signed(11))
    m.d.comb += exponent.eq(s.top[:-1] + (width - 1 - ALIGNED_FRACTION_BITS - BIAS) - s.zeros)
    normal = named(m, (s.magnitude << s.zeros)[:width], "normal")
    bits = round_pack(
        m,
        sign=s.sign & normal[-1] & ~none,
        exponent=Mux(none, 0, exponent),
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
    return named(m, Mux(a < b, b, a), "larger")


def _sum(bits: int, m: Module, a: Any, b: Any) -> Any:
    """a + b, signed, in at most `bits` bits."""
    result = Signal(signed(min(max(len(a), len(b)) + 1, bits)), name="partial")
    m.d.comb += result.eq(a + b)
    return result
