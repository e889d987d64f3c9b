"""Two lanes of the vector unit: factor, operation and function one behind the other, as `vchain` has them.

Every instruction goes the same way and leaves out what it has not: the product by the factor, then sum, product,
maximum or what passes, then, only for instructions with a function, the function. The result leaves for the register
file and, padded where a vector ends, for the reduction tree.
"""

from __future__ import annotations

from dataclasses import dataclass
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
LEAST_DEPTH = 3
"""A cycle for the factor, one to choose whether it counts, one for the operation."""
LEAST_FUNCTION = 2
"""Cycles that the unary functions take at least."""


class Choice(IntEnum):
    """Which of the operations' results is taken; MOVED is what passes unchanged."""

    SUM = 0
    PRODUCT = 1
    MAXIMUM = 2
    MOVED = 3


@dataclass(frozen=True)
class LaneTiming:
    """Cycles of a lane's steps: `factor`, then one to choose, `operation`, one to choose, `function`; and `square`."""

    factor: int
    operation: int
    function: int
    square: int

    @staticmethod
    def of(depth: int, function: int, square: int) -> LaneTiming:
        """Divide `depth` >= LEAST_DEPTH cycles, up to the choice of the operation's result, among factor and operation.

        `function` >= LEAST_FUNCTION, `square` >= 1.
        """
        factor = (depth - 1) // 2
        return LaneTiming(factor, depth - 1 - factor, function, square)

    @property
    def operands(self) -> int:
        """When the second operand is used, the first being there in cycle 0."""
        return self.factor + 1

    @property
    def chosen(self) -> int:
        """When the operation's result is chosen."""
        return self.operands + self.operation

    @property
    def result(self) -> int:
        """When a result without a function leaves, and one with a function begins with it."""
        return self.chosen + 1


class LanePair(wiring.Component):
    """Two lanes; x and y come in cycle 0 of their row, and everything else in its own cycle.

    Cycle 0: `factor`. `timing.factor`: `scaled`, whether it counts. `timing.operands`: `subtract`, and `take_y`: y
    passes unchanged, else x. `timing.chosen`: `choice`. `timing.result`: `function`.
    `result` follows in cycle `timing.result` or, if `late` is set then, `timing.function` cycles later. With it, or for
    the `square` of a result `timing.square` cycles later, come `keep` (the lanes that hold an element), `padding_sign`
    and `infinite` (what the others hold: zeros of a sign, or -infinity), and `ordered`: NaN counts as -infinity.
    `leaf` and `nan` follow a cycle later. `leaf` is canonical (zeros for subnormals, one NaN): what a reduction's tree
    starts from. `nan`: NaN did count.
    """

    def __init__(self, timing: LaneTiming) -> None:
        """Lanes of this timing."""
        self.timing = timing
        super().__init__(
            {
                "x": In(32 * LANES),
                "y": In(32 * LANES),
                "factor": In(32),
                "scaled": In(1),
                "subtract": In(1),
                "take_y": In(1),
                "choice": In(Choice),
                "function": In(FUNCTION_BITS),
                "late": In(1),
                "square": In(1),
                "keep": In(LANES),
                "padding_sign": In(LANES),
                "infinite": In(1),
                "ordered": In(1),
                "result": Out(32 * LANES),
                "leaf": Out(32 * LANES),
                "nan": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """The shared unit, then lane by lane."""
        m = Module()
        m.submodules.unary = unary = UnaryEvaluator(self.timing.function, LANES)
        m.d.comb += unary.select.eq(self.function)
        nans: list[Value] = []
        for lane in range(LANES):
            bits = slice(32 * lane, 32 * lane + 32)
            scaled = self._scale(m, lane, self.x[bits])
            early = self._operate(m, lane, scaled, delayed(m, self.y[bits], self.timing.operands, f"y{lane}"))
            m.d.comb += [unary.x[lane].eq(early), self.result[bits].eq(Mux(self.late, unary.result[lane], early))]
            m.d.comb += self.leaf[bits].eq(self._leaf(m, lane, self.result[bits], nans))
        m.d.sync += self.nan.eq(reduce(or_, nans) & self.ordered)
        return m

    def _scale(self, m: Module, lane: int, x: Value) -> Value:
        """x times the factor, or x."""
        cycles = self.timing.factor
        m.submodules[f"factor{lane}"] = multiplier = Multiplier(cycles)
        m.d.comb += [multiplier.a.eq(x), multiplier.b.eq(self.factor)]
        scaled = Signal(32, name=f"scaled{lane}", reset_less=True)
        m.d.sync += scaled.eq(Mux(self.scaled, multiplier.result, delayed(m, x, cycles, f"x{lane}")))
        return scaled

    def _operate(self, m: Module, lane: int, x: Value, y: Value) -> Value:
        """The operation's result, registered."""
        cycles = self.timing.operation
        m.submodules[f"adder{lane}"] = adder = Adder(cycles)
        m.submodules[f"multiplier{lane}"] = multiplier = Multiplier(cycles)
        m.submodules[f"comparator{lane}"] = comparator = Comparator(cycles)
        for unit in (adder, multiplier, comparator):
            m.d.comb += [unit.a.eq(x), unit.b.eq(y)]
        m.d.comb += adder.subtract.eq(self.subtract)
        passing = delayed(m, Mux(self.take_y, y, x), cycles, f"passing{lane}")
        found = {
            Choice.SUM: adder.result,
            Choice.PRODUCT: multiplier.result,
            Choice.MAXIMUM: comparator.maximum,
            Choice.MOVED: passing,
        }
        result = Signal(32, name=f"operated{lane}", reset_less=True)
        m.d.sync += result.eq(Array(found[choice] for choice in Choice)[self.choice])
        return result

    def _leaf(self, m: Module, lane: int, result: Value, nans: list[Value]) -> Value:
        """What the tree starts from: the result or its square, canonical; else padding."""
        m.submodules[f"square{lane}"] = square = Multiplier(self.timing.square)
        m.d.comb += [square.a.eq(result), square.b.eq(result)]
        parts = Parts(m, result, f"result{lane}")
        leaf = Signal(32, name=f"leaf{lane}", reset_less=True)
        with m.If(~self.keep[lane]):
            m.d.sync += leaf.eq(Cat(Const(0, 23), self.infinite.replicate(8), self.padding_sign[lane]))
        with m.Elif(self.square):
            m.d.sync += leaf.eq(square.result)
        with m.Elif(parts.nan):
            m.d.sync += leaf.eq(Mux(self.ordered, MINUS_INFINITY, CANONICAL_NAN))
        with m.Else():
            m.d.sync += leaf.eq(Cat(Mux(parts.zero, 0, result[:31]), result[31]))
        nans.append(self.keep[lane] & parts.nan)
        return leaf
