"""The tree of a reduction: sums, or maxima with their places, of adjacent pairs, level by level.

The first levels join the lanes of a row, as a tree in space. The others join rows as they come, each level with one
adder and one comparison: it keeps an element until its right neighbour is there, or takes the neutral one where the
vector has ended. Every level takes the same time, so the last row decides when the result comes.
"""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Any

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from typebar.hw.arith.add import Adder
from typebar.hw.arith.float32 import named
from typebar.hw.arith.pipeline import Pipeline
from typebar.hw.delay import delayed
from typebar.hw.replicate import Shared
from typebar.hw.vector.lanes import MINUS_INFINITY


class LaterGreater(wiring.Component):
    """The larger of two canonical float32, and its place: that of a is `a_place`, below all of b's.

    With `ordered` -0 equals +0 and the lower place wins a tie, as `numerics.argmax` (whose NaN are -infinity by now);
    without it +0 is above -0 and NaN above all, as `numerics.maximum`. Places have `bits` bits, the result one more.
    `latency` >= 1 cycles.
    """

    def __init__(self, latency: int, bits: int) -> None:
        """Take the cycles, and the width of a place."""
        self.latency, self.bits = latency, bits
        super().__init__(
            {
                "ordered": In(1),
                "a": In(32),
                "b": In(32),
                "a_place": In(bits),
                "b_place": In(bits),
                "value": Out(32),
                "place": Out(bits + 1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """Compare as integers in the order of the floats; choose."""
        m = Module()
        pipe = Pipeline(m, cuts=2, latency=self.latency)
        # ... < -0 < +0 < ... < +infinity < the one NaN.
        orders = [Cat(x[:31] ^ x[31].replicate(31), ~x[31]) for x in (self.a, self.b)]
        zeros = ~self.a[:31].any() & ~self.b[:31].any()
        later = named(m, (orders[1] > orders[0]) & ~(self.ordered & zeros), "later")
        s = pipe.cut(later=later, a=self.a, b=self.b, a_place=self.a_place, b_place=self.b_place)
        place = Cat(Mux(s.later, s.b_place, s.a_place), s.later)
        s = pipe.cut(value=Mux(s.later, s.b, s.a), place=place)
        m.d.comb += [self.value.eq(s.value), self.place.eq(s.place)]
        return m


def element_layout(bits: int) -> data.StructLayout:
    """What two elements are joined to: their sum, their maximum and its place in `bits` bits."""
    return data.StructLayout({"sum": unsigned(32), "maximum": unsigned(32), "place": unsigned(bits)})


class ReductionTree(wiring.Component):
    """Reduces rows of `lanes` leaves that come one a cycle (`valid`), the first and the last of a vector marked.

    `found`, `element`: the result, `latency` * (log2 lanes + ceil(log2 of the rows)) cycles after the last row. Vectors
    may follow one another at once, but one of fewer levels only after the result of those before it, lest two results
    leave together. `ordered` goes with each row.

    Leaves are canonical. Where a vector ends inside a row, the other lanes hold what the reduction is extended with.
    """

    def __init__(self, latency: int, lanes: int, rows: int) -> None:
        """A tree for vectors of up to `rows` rows, `latency` >= 1 cycles a level."""
        self.latency, self.lanes = latency, lanes
        self.lane_levels = lanes.bit_length() - 1
        self.row_levels = (rows - 1).bit_length()
        self._adder = Shared("reduction_adder", Adder(latency))
        self.shared = (self._adder,)
        super().__init__(
            {
                "valid": In(1),
                "first": In(1),
                "last": In(1),
                "ordered": In(1),
                "leaves": In(data.ArrayLayout(unsigned(32), lanes)),
                "found": Out(1),
                "element": Out(element_layout(self.lane_levels + self.row_levels)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """Lanes, then rows; the result leaves at the level where it is alone."""
        m = Module()
        self._m = m
        level, ordered = [], [self.ordered]
        for lane in range(self.lanes):
            leaf = Signal(element_layout(0), name=f"leaf{lane}")
            m.d.comb += [leaf.sum.eq(self.leaves[lane]), leaf.maximum.eq(self.leaves[lane])]
            level.append(leaf)
        for depth in range(self.lane_levels + self.row_levels):
            ordered.append(delayed(m, ordered[-1], self.latency, f"ordered{depth}"))
        self._ordered = ordered
        for depth in range(self.lane_levels):
            level = [
                self._join(depth, left, right, f"lanes{depth}_{pair}")
                for pair, (left, right) in enumerate(zip(level[::2], level[1::2], strict=True))
            ]
        cycles = self.lane_levels * self.latency
        valid = delayed(m, self.valid, cycles, "valid", reset=True)
        first, last = (delayed(m, getattr(self, name), cycles, name) for name in ("first", "last"))
        element, exits = level[0], []
        for depth in range(self.row_levels):
            alone = named(m, valid & first & last, f"alone{depth}")
            exits.append((alone, element))
            valid, first, last, element = self._rows(depth, valid & ~alone, first, last, element)
        exits.append((valid, element))
        m.d.comb += self.found.eq(reduce(or_, (alone for alone, _ in exits)))
        for name in ("sum", "maximum", "place"):
            gated = (Mux(alone, item[name], 0) for alone, item in exits)
            m.d.comb += self.element[name].eq(reduce(or_, gated))
        return m

    def _join(self, depth: int, left: Any, right: Any, name: str) -> Any:
        """One pair; places below have `depth` bits."""
        m = self._m
        m.submodules[f"{name}_adder"] = adder = self._adder.replica()
        m.submodules[f"{name}_greater"] = greater = LaterGreater(self.latency, depth)
        joined = Signal(element_layout(depth + 1), name=name)
        m.d.comb += [
            adder.a.eq(left.sum),
            adder.b.eq(right.sum),
            greater.ordered.eq(self._ordered[depth]),
            greater.a.eq(left.maximum),
            greater.b.eq(right.maximum),
            greater.a_place.eq(left.place),
            greater.b_place.eq(right.place),
            joined.sum.eq(adder.result),
            joined.maximum.eq(greater.value),
            joined.place.eq(greater.place),
        ]
        return joined

    def _rows(self, depth: int, valid: Value, first: Value, last: Value, item: Any) -> tuple[Value, Value, Value, Any]:
        """A level that joins what comes in pairs; what is joined, `latency` later."""
        m, name = self._m, f"rows{depth}"
        bits = self.lane_levels + depth
        holds, held_first = Signal(name=f"{name}_holds"), Signal(name=f"{name}_held_first", reset_less=True)
        held = Signal(element_layout(bits), name=f"{name}_held", reset_less=True)
        joins = named(m, valid & (holds | last), f"{name}_joins")
        m.d.sync += holds.eq(Mux(valid, ~holds & ~last, holds))
        with m.If(valid & ~holds):
            m.d.sync += [held.eq(item), held_first.eq(first)]
        left, right = (Signal(element_layout(bits), name=f"{name}_{side}") for side in ("left", "right"))
        with m.If(holds):
            m.d.comb += [left.eq(held), right.eq(item)]
        with m.Else():
            m.d.comb += [left.eq(item), right.maximum.eq(Const(MINUS_INFINITY, 32))]
        joined = self._join(bits, left, right, name)
        later = [
            delayed(m, value, self.latency, f"{name}_{which}", reset=which == "valid")
            for which, value in (("valid", joins), ("first", holds & held_first), ("last", last))
        ]
        return later[0], later[1], later[2], joined
