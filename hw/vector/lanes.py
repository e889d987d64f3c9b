"""Two lanes of the vector unit: every elementwise operation side by side, with one latency."""

from __future__ import annotations

from enum import IntEnum
from functools import reduce
from operator import or_

from amaranth.hdl import Array, Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from typebar.hw.arith.add import Adder
from typebar.hw.arith.compare import Comparator
from typebar.hw.arith.float32 import Parts
from typebar.hw.arith.multiply import Multiplier
from typebar.hw.arith.unary import FUNCTION_BITS, UnaryEvaluator
from typebar.hw.delay import delayed
from typebar.isa.numerics.formats import CANONICAL_NAN

LANES = 2
"""Lanes of a pair: they share the unary functions' ROM, whose memory has two ports."""
MINUS_INFINITY = 0xFF800000


class Choice(IntEnum):
    """Which of the units' results a lane returns; MOVED is the product or what passes unchanged."""

    SUM = 0
    MOVED = 1
    MAXIMUM = 2
    UNARY = 3


class LanePair(wiring.Component):
    """Two lanes. With x and y in cycle 0, `leaf` and `nan` come in cycle `latency`, `result` one later.

    With x and y: `subtract`, `function`, and `take_y`: y passes unchanged, else x.
    In cycle `latency - 1`: `product`: the product, not what passes; and, for reductions, `keep` (the lanes that hold
    an element), `padding_sign` and `infinite` (what the other lanes hold: zeros of a sign, or -infinity), and
    `ordered`: NaN counts as -infinity. In cycle `latency`: `choice`.

    `leaf` is canonical (zeros for subnormals, one NaN): what a reduction's tree starts from. `nan`: NaN did count.
    """

    def __init__(self, latency: int) -> None:
        """Lanes of `latency` >= 2 cycles."""
        self.latency = latency
        super().__init__(
            {
                "x": In(32 * LANES),
                "y": In(32 * LANES),
                "subtract": In(1),
                "function": In(FUNCTION_BITS),
                "take_y": In(1),
                "product": In(1),
                "keep": In(LANES),
                "padding_sign": In(LANES),
                "infinite": In(1),
                "ordered": In(1),
                "choice": In(Choice),
                "leaf": Out(32 * LANES),
                "nan": Out(1),
                "result": Out(32 * LANES),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """The shared unit, then lane by lane."""
        m = Module()
        m.submodules.unary = unary = UnaryEvaluator(self.latency, LANES)
        m.d.comb += [unary.select.eq(self.function), unary.x.eq(self.x)]
        nans: list[Value] = []
        for lane in range(LANES):
            bits = slice(32 * lane, 32 * lane + 32)
            x, y = self.x[bits], self.y[bits]
            m.submodules[f"adder{lane}"] = adder = Adder(self.latency)
            m.submodules[f"comparator{lane}"] = comparator = Comparator(self.latency)
            m.d.comb += [adder.subtract.eq(self.subtract)]
            m.d.comb += [port.eq(value) for unit in (adder, comparator) for port, value in ((unit.a, x), (unit.b, y))]
            moved = self._move(m, lane, x, y, nans)
            results = Array([adder.result, moved, comparator.maximum, unary.result[lane]])
            m.d.sync += self.result[bits].eq(results[self.choice])
        m.d.sync += self.nan.eq(reduce(or_, nans) & self.ordered)
        return m

    def _move(self, m: Module, lane: int, x: Value, y: Value, nans: list[Value]) -> Value:
        """Product or what passes; the leaf. The product comes a cycle early, for the leaf's last step."""
        early = self.latency - 1
        m.submodules[f"multiplier{lane}"] = multiplier = Multiplier(early)
        passing = Signal(32, name=f"passing{lane}")
        m.d.comb += [multiplier.a.eq(x), multiplier.b.eq(y), passing.eq(Mux(self.take_y, y, x))]
        parts = Parts(m, passing, f"passing{lane}")
        zero, nan = Signal(name=f"zero{lane}"), Signal(name=f"nan{lane}")
        m.d.comb += [zero.eq(parts.zero), nan.eq(parts.nan)]
        passing = delayed(m, passing, early, f"passing{lane}")
        zero, nan = (delayed(m, flag, early, f"{name}{lane}") for name, flag in (("zero", zero), ("nan", nan)))
        moved = Signal(32, name=f"moved{lane}", reset_less=True)
        leaf = Signal(32, name=f"leaf{lane}", reset_less=True)
        m.d.sync += moved.eq(Mux(self.product, multiplier.result, passing))
        padding = Cat(Const(0, 23), self.infinite.replicate(8), self.padding_sign[lane])
        with m.If(~self.keep[lane]):
            m.d.sync += leaf.eq(padding)
        with m.Elif(self.product):
            m.d.sync += leaf.eq(multiplier.result)
        with m.Elif(nan):
            m.d.sync += leaf.eq(Mux(self.ordered, MINUS_INFINITY, CANONICAL_NAN))
        with m.Else():
            m.d.sync += leaf.eq(Cat(Mux(zero, 0, passing[:31]), passing[31]))
        m.d.comb += self.leaf[32 * lane : 32 * lane + 32].eq(leaf)
        nans.append(self.keep[lane] & nan)
        return moved
