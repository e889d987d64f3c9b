"""The aligned dot product: one chunk of `lanes` products, added as `numerics.chunk_sum` adds them.

`AlignedVector` is there once for a row of dot units, `DotUnit` once for each. Both are cut at the same places, and
`Lags` tells when what goes from one to the other, or comes from the weights' tile, must be there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from amaranth.hdl import Cat, Const, Module, Mux, Shape, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from typebar.hw.arith.convert import OPERAND, STEP, WEIGHT, WEIGHT_VALUE_BITS
from typebar.hw.arith.dsp import SUM_BITS, multiply_add
from typebar.hw.arith.float32 import BIAS, leading_zeros, named, round_pack
from typebar.hw.arith.pipeline import Pipeline, depths
from typebar.hw.delay import delayed
from typebar.isa.errors import TypebarError
from typebar.isa.instructions import Format
from typebar.isa.numerics.dot import SUM_FRACTION_BITS, VECTOR_BITS, WEIGHT_BITS, sum_bits
from typebar.isa.numerics.formats import LEAST_EXPONENT

SIGNIFICAND_BITS = len(Signal(OPERAND).significand)
_DIGITS = 3
"""Digits of two bits that a step has. The largest is found digit by digit, one before each place."""
_STEP = (BIAS + LEAST_EXPONENT[Format.INT8]) >> 2
"""The step of all weights of int8."""
_OWN_BITS, _OWN_AT = 8, 8
"""An int8, and its place among an aligned weight's bits."""
_SLICED = 1 << (SUM_BITS - sum_bits(1))
"""Lanes whose sum a slice's adder holds."""
_FINISH = 4
"""Places behind the sum: magnitude, count of zeros, normalised, rounded."""


@dataclass(frozen=True)
class Lags:
    """Registers at the places of a dot unit, in their order, and the cycles at which values meet."""

    search: list[int]
    """While the largest exponents are searched for."""
    below: int
    select: int
    operand: int
    """A slice's first registers."""
    sums: list[int]
    """By level of the tree of slices, the first being the deepest; the last of several trees' sum."""

    @staticmethod
    def of(lanes: int, latency: int) -> Lags:
        """Those of a dot unit of `lanes` lanes that takes `latency` cycles."""
        places = depths(cuts(lanes), latency)
        below, select, operand, *sums = places[_DIGITS:-_FINISH]
        return Lags(places[:_DIGITS], below, select, operand, sums)

    def digit(self, index: int) -> int:
        """When a digit of the weights' steps is wanted, 0 being the highest."""
        return sum(self.search[:index])

    @property
    def signs(self) -> int:
        """When signs meet, and steps are compared with the largest."""
        return sum(self.search) + self.below

    @property
    def values(self) -> int:
        """When magnitudes meet: the vector's are aligned, the weights' about to be."""
        return self.signs + self.select

    @property
    def sum(self) -> int:
        """When the exact sum is there."""
        return self.values + self.operand + sum(self.sums)


def cuts(lanes: int) -> int:
    """Places where a dot unit of `lanes` lanes may be cut."""
    return _DIGITS + 3 + min(lanes, _SLICED).bit_length() + (lanes > _SLICED) + _FINISH


class AlignedVector(wiring.Component):
    """A vector's chunk for a row of dot units: its largest exponent, and magnitudes aligned to that.

    `signs` come in `Lags.signs`, `magnitudes` (0 of a zero) and `exponent` in `Lags.values`. Absent lanes must come as
    zeros.
    """

    def __init__(self, lanes: int, latency: int) -> None:
        """For dot units of this `latency`."""
        self.lanes, self.latency = lanes, latency
        super().__init__(
            {
                "x": In(data.ArrayLayout(OPERAND, lanes)),
                "signs": Out(lanes),
                "magnitudes": Out(data.ArrayLayout(VECTOR_BITS, lanes)),
                "exponent": Out(len(Signal(OPERAND).exponent)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """Find the largest exponent, compare, shift."""
        m = Module()
        pipe, lags = Pipeline(m, cuts=cuts(self.lanes), latency=self.latency), Lags.of(self.lanes, self.latency)
        tops, levels = [Cat(x.exponent, x.nonzero) for x in self.x], (self.lanes - 1).bit_length()
        for place in range(_DIGITS):
            for _ in range(levels * place // _DIGITS, levels * (place + 1) // _DIGITS):
                tops = _reduce(m, tops, _larger)
            tops = pipe.cut(tops=tops if place < _DIGITS - 1 else [tops[0][:-1]]).tops
        top = tops[0]
        significands, amounts, signs = [], [], []
        for lane in range(self.lanes):
            x = data.View(OPERAND, delayed(m, self.x[lane].as_value(), sum(lags.search), f"x{lane}"))
            below = named(m, (top - x.exponent)[: len(top)], f"below{lane}")
            # From as many places on as there are bits nothing remains.
            far = below[5:].any() | below[3:5].all() | ~x.nonzero
            assert VECTOR_BITS == 24
            amounts.append(below[:5] | far.replicate(5))
            significands.append(x.significand)
            signs.append(x.sign)
        s = pipe.cut(significands=significands, amounts=amounts, signs=Cat(signs), top=top)
        m.d.comb += self.signs.eq(s.signs)
        shifted = [
            (Cat(Const(0, VECTOR_BITS - SIGNIFICAND_BITS), significand) >> amount)[:VECTOR_BITS]
            for significand, amount in zip(s.significands, s.amounts, strict=True)
        ]
        s = pipe.cut(shifted=shifted, top=s.top)
        m.d.comb += [self.magnitudes.eq(Cat(s.shifted)), self.exponent.eq(s.top)]
        return m


class DotUnit(wiring.Component):
    """sum = the chunk sum of `lanes` weights and a vector's elements, float32; `latency` >= 1 cycles, one a cycle.

    Of the weights' steps (`WEIGHT`) `nonzero` comes in the first cycle, a digit of all lanes in each `Lags.digit`, and
    all of it again, `steps`, in `Lags.signs`, with both signs; `values`, `magnitudes` and `exponent` come in
    `Lags.values`. `present` tells in the first cycle which of the vector's elements are not zero, `nan` of a NaN in
    any present lane of either.

    With `own`, a unit may take weights of its own, `own_values`, which are int8, in `Lags.values`, if `folded` in
    `Lags.signs`; the others must be int8, too, for their low bits are then nothing.

    A step is four exponents, and weights are shifted by whole steps here: one look-up table a bit. What lies four or
    more below the largest is left out, by the slice's pre-adder, which gives the sign as well.
    """

    def __init__(self, lanes: int, latency: int, own: bool = False) -> None:
        """A unit of `lanes` lanes.

        Raises:
            TypebarError: fewer than two lanes.
        """
        if lanes < 2:
            raise TypebarError(f"a dot unit needs at least 2 lanes, not {lanes}: raise matrix.lanes")
        self.lanes, self.latency, self.own = lanes, latency, own
        owned = {"folded": In(1), "own_values": In(data.ArrayLayout(signed(_OWN_BITS), lanes))} if own else {}
        super().__init__(
            {
                "nonzero": In(lanes),
                **{f"digits{index}": In(data.ArrayLayout(2, lanes)) for index in range(_DIGITS)},
                "steps": In(data.ArrayLayout(STEP, lanes)),
                "weight_signs": In(lanes),
                "values": In(data.ArrayLayout(WEIGHT_VALUE_BITS, lanes)),
                **owned,
                "present": In(lanes),
                "vector_signs": In(lanes),
                "magnitudes": In(data.ArrayLayout(VECTOR_BITS, lanes)),
                "exponent": In(len(Signal(OPERAND).exponent)),
                "nan": In(1),
                "sum": Out(32),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """Find the largest step, compare, shift, multiply and add, normalise, round."""
        m = Module()
        pipe = Pipeline(m, cuts=cuts(self.lanes), latency=self.latency)
        self._lags = lags = Lags.of(self.lanes, self.latency)
        top, largest = self._search(m, pipe)
        s = pipe.cut(top=top, largest=largest, before=named(m, (top[2:] - 1)[: len(top) - 2], "before"))
        amounts, off = self._amounts(m, s.top, s.before, s.largest)
        negative, top = self.weight_signs ^ self.vector_signs, s.top
        owned = {}
        if self.own:
            folded = owned["folded"] = self.folded
            negative = Mux(folded, self.vector_signs, negative)
            off, amounts = off & ~folded.replicate(self.lanes), [item & ~folded.replicate(2) for item in amounts]
            top = Mux(folded, _STEP, top)[: len(top)]
        s = pipe.cut(negative=negative, off=off, amounts=amounts, top=top, **owned)
        aligned = [self._aligned(m, lane, s) for lane in range(self.lanes)]
        total = self._sum(m, aligned, s.negative, s.off)
        # The sum counts units of 2 to this, less a constant.
        scale = named(m, Cat(Const(3, 2), s.top) + self.exponent, "scale")
        for _ in range(1 + len(lags.sums)):
            scale = pipe.cut(scale=scale).scale
        m.d.comb += self.sum.eq(_float32(m, pipe, total, scale, delayed(m, self.nan, lags.sum, "nan")))
        assert pipe.complete
        return m

    def _search(self, m: Module, pipe: Pipeline) -> tuple[Any, Any]:
        """The largest step of those lanes that take part, and which have it, but for its last digit.

        Digit by digit, the highest first: the largest of those that have the largest ones before.
        """
        left = named(m, self.nonzero & self.present, "left0")
        found: list[Signal] = []
        for index in range(_DIGITS):
            digits = getattr(self, f"digits{index}")
            low, high = (Cat(digits[lane][bit] for lane in range(self.lanes)) for bit in range(2))
            any_high, any_both, any_low = (left & high).any(), (left & high & low).any(), (left & low).any()
            digit = named(m, Cat(Mux(any_high, any_both, any_low), any_high), f"digit{index}")
            if index < _DIGITS - 1:
                same = Cat(digits[lane] == digit for lane in range(self.lanes))
                left = named(m, left & same, f"left{index + 1}")
            s = pipe.cut(left=left, found=[*found, digit])
            left, found = s.left, s.found
        return Cat(reversed(found)), left

    def _amounts(self, m: Module, top: Any, before: Any, largest: Any) -> tuple[list[Any], Any]:
        """How many steps each weight lies below the largest, and which are left out.

        `before` is the number before the largest step's higher digits, `largest` are the weights that have the latter.
        """
        amounts, near = [], []
        for lane in range(self.lanes):
            step = self.steps[lane]
            amounts.append(named(m, (top[:2] - step.exponent[:2])[:2], f"amount{lane}"))
            close = step.nonzero & (step.exponent[2:] == before) & (step.exponent[:2] > top[:2])
            near.append(largest[lane] | close)
        return amounts, ~Cat(near)

    def _aligned(self, m: Module, lane: int, s: Any) -> Any:
        """A weight shifted by whole steps, or the unit's own."""
        value = Cat(Const(0, WEIGHT_BITS - WEIGHT_VALUE_BITS), self.values[lane])
        shifted = Signal(WEIGHT_BITS, name="shifted")
        with m.Switch(s.amounts[lane]):
            for steps in range(4):
                with m.Case(steps):
                    m.d.comb += shifted.eq(value >> (4 * steps))
        if not self.own:
            return shifted
        own = self.own_values[lane]
        extended = Cat(own, own[-1].replicate(WEIGHT_BITS + 1 - _OWN_AT - _OWN_BITS))
        high = Mux(s.folded, extended, Cat(shifted[_OWN_AT:], Const(0, 1)))
        return named(m, Cat(shifted[:_OWN_AT], high).as_signed(), "weight")

    def _sum(self, m: Module, weights: list[Any], negative: Any, off: list[Any]) -> Any:
        """The exact sum, in `Lags.sum`: slices in binary trees, each adding two of the level below.

        The first of these is the slice beside it. A slice's operands wait, most in its own registers, for the sums.
        """
        lags = self._lags

        def tree(first: int, count: int, node: int, level: int) -> tuple[Any, int]:
            """The sum of a heap's node, at a level counted from below, and how many lanes it has."""
            parts: list[tuple[Any, int]] = [
                tree(first, count, child, level - 1) for child in (2 * node, 2 * node + 1) if child <= count
            ]
            lane, lanes = first + node - 1, 1 + sum(number for _, number in parts)
            total = multiply_add(
                m,
                f"sum{lane}",
                self.magnitudes[lane],
                weights[lane],
                signed(sum_bits(lanes)),
                negative=negative[lane],
                off=off[lane],
                pcin=parts[0][0] if parts else None,
                c=parts[1][0] if len(parts) > 1 else None,
                before=lags.operand + sum(lags.sums[:level]),
                behind=lags.sums[level],
            )
            return total, lanes

        levels = min(self.lanes, _SLICED).bit_length()
        totals = [
            tree(first, min(self.lanes - first, _SLICED), 1, levels - 1)[0] for first in range(0, self.lanes, _SLICED)
        ]
        if len(totals) == 1:
            return totals[0]
        joined = Signal(signed(sum_bits(self.lanes)), name="joined")
        m.d.comb += joined.eq(sum(totals[1:], totals[0]))
        return delayed(m, joined, lags.sums[levels], "joined")


class DotProduct(wiring.Component):
    """sum = the chunk sum of `lanes` operand pairs, float32: one `AlignedVector` and one `DotUnit`, `latency` cycles.

    Absent lanes must come as zeros, and `nan` tells of a NaN in a present one: both belong to the conversion of
    operands, which many dot units share.
    """

    def __init__(self, lanes: int, latency: int) -> None:
        """For `lanes` >= 2 lanes.

        Raises:
            TypebarError: fewer than two lanes.
        """
        self.lanes, self.latency = lanes, latency
        self._unit, self._vector = DotUnit(lanes, latency), AlignedVector(lanes, latency)
        w, x = data.ArrayLayout(WEIGHT, lanes), data.ArrayLayout(OPERAND, lanes)
        super().__init__({"w": In(w), "x": In(x), "nan": In(1), "sum": Out(32)})

    def elaborate(self, platform: object) -> Module:
        """The parts, and weights that wait."""
        m, lags, lanes = Module(), Lags.of(self.lanes, self.latency), range(self.lanes)
        m.submodules.unit, m.submodules.vector = unit, vector = self._unit, self._vector
        weights = [self.w[lane] for lane in lanes]
        m.d.comb += [getattr(unit, port).eq(value) for port, value in late_weights(m, weights, lags).items()]
        m.d.comb += [
            vector.x.eq(self.x),
            unit.present.eq(Cat(self.x[lane].nonzero for lane in lanes)),
            unit.vector_signs.eq(vector.signs),
            unit.magnitudes.eq(vector.magnitudes),
            unit.exponent.eq(vector.exponent),
            unit.nan.eq(self.nan),
            self.sum.eq(unit.sum),
        ]
        return m


def _float32(m: Module, pipe: Pipeline, total: Any, scale: Any, nan: Any) -> Any:
    """A sum in units of 2^(scale - 2 BIAS - SUM_FRACTION_BITS), as float32."""
    width = len(total) - 1
    sign = total[-1]
    magnitude = named(m, ((total ^ sign.replicate(len(total))) + sign)[:width], "magnitude")
    s = pipe.cut(magnitude=magnitude, sign=sign, scale=scale, nan=nan)
    zeros = named(m, leading_zeros(m, s.magnitude, "sum"), "zeros")
    s = pipe.cut(zeros=zeros, magnitude=s.magnitude, sign=s.sign, scale=s.scale, nan=s.nan)
    exponent = Signal(signed(11), name="sum_exponent")
    m.d.comb += exponent.eq(s.scale + (width - 1 - SUM_FRACTION_BITS - BIAS) - s.zeros)
    normal = named(m, (s.magnitude << s.zeros)[:width], "normal")
    s = pipe.cut(normal=normal, exponent=exponent, sign=s.sign, nan=s.nan)
    bits = round_pack(
        m,
        sign=s.sign,
        exponent=s.exponent.as_signed(),
        significand=s.normal[width - 24 :],
        guard=s.normal[width - 25],
        sticky=s.normal[: width - 25].any(),
        infinite=Const(0, 1),
        nan=s.nan,
    )
    return pipe.cut(bits=bits).bits


class LateWeights(wiring.Component):
    """`late_weights` of `lanes` weights as a component: dot units of a column of weights share one.

    `weights` are those of the first cycle; all else goes to the ports of the same names of a `DotUnit`.
    """

    def __init__(self, lanes: int, latency: int) -> None:
        """For dot units of this `latency`."""
        self.lanes, self.latency = lanes, latency
        ports = DotUnit(lanes, latency).signature.members
        names = ("nonzero", "steps", "weight_signs", "values", *(f"digits{index}" for index in range(_DIGITS)))
        super().__init__(
            {"weights": In(WEIGHT.size * lanes), **{name: Out(Shape.cast(ports[name].shape)) for name in names}}
        )
        self.names = names

    def elaborate(self, platform: object) -> Module:
        """Registers."""
        m = Module()
        weights = data.View(data.ArrayLayout(WEIGHT, self.lanes), self.weights)
        late = late_weights(m, [weights[lane] for lane in range(self.lanes)], Lags.of(self.lanes, self.latency))
        m.d.comb += [getattr(self, name).eq(late[name]) for name in self.names]
        return m


def late_weights(m: Module, weights: list[Any], lags: Lags) -> dict[str, Any]:
    """Ports of dot units by name: weights (`WEIGHT`) of the first cycle, their fields as late as units want them."""
    steps = [Cat(weight.step.as_value() for weight in weights)]
    for _ in range(lags.signs):
        steps.append(delayed(m, steps[-1], 1, "steps", keep=True))
    signs, values = Cat(weight.sign for weight in weights), Cat(weight.value for weight in weights)
    ports = {
        "nonzero": Cat(weight.step.nonzero for weight in weights),
        "steps": steps[-1],
        "weight_signs": delayed(m, signs, lags.signs, "weight_signs", keep=True),
        "values": delayed(m, values, lags.values, "values", keep=True),
    }
    for index in range(_DIGITS):
        late, at = steps[lags.digit(index)], 2 * (_DIGITS - 1 - index)
        ports[f"digits{index}"] = Cat(
            late[first + at : first + at + 2] for first in range(0, STEP.size * len(weights), STEP.size)
        )
    return ports


def _reduce(m: Module, values: list[Any], join: Callable[[Module, Any, Any], Any]) -> list[Any]:
    """One level of a tree of adjacent pairs; an odd one passes."""
    pairs = [join(m, a, b) for a, b in zip(values[0::2], values[1::2], strict=False)]
    return pairs + values[len(values) & ~1 :]


def _larger(m: Module, a: Any, b: Any) -> Any:
    return named(m, Mux(a < b, b, a), "larger")
