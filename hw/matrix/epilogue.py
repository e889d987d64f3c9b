"""The matrix unit's epilogue: what happens to a dot product between its accumulator and the register file.

A row of W = `vector.lanes` sums a cycle; each result is multiplied by a scale, gets a bias added, is masked, goes
through a unary function, in this order and each step as it is asked for, and is written. Every step rounds as the
vector unit's operation does (docs/isa.md, "matmul"). There is no handshake: a write is presented `latency` cycles
after its sums, whatever its steps.

Contract: `matrix.epilogue_latency` covers this unit, the accumulators' read-out before it and the register file's
write behind it. The maxima of an instruction's vectors, one for each, are written together in the cycle after its last
results, so the matrix unit leaves one cycle without results after each instruction (its first step waits for at least
one row of operands).
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from amaranth.hdl import Array, Const, Module, Mux, Signal, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from typebar.hw.arith.add import CUTS as ADD_CUTS
from typebar.hw.arith.add import Adder
from typebar.hw.arith.compare import CUTS as COMPARE_CUTS
from typebar.hw.arith.compare import Comparator
from typebar.hw.arith.multiply import CUTS as MULTIPLY_CUTS
from typebar.hw.arith.multiply import Multiplier
from typebar.hw.arith.unary import CUTS as UNARY_CUTS
from typebar.hw.arith.unary import FUNCTION_BITS, UnaryEvaluator
from typebar.hw.delay import delayed
from typebar.hw.ports import file_rows, write_port
from typebar.hw.replicate import Shared
from typebar.isa.instructions import Activation
from typebar.isa.machine import Machine, MachineError

ACTIVATION_BITS = max(Activation).bit_length()
ONE, MINUS_ZERO = 0x3F800000, 0x80000000
"""Factor and addend that leave every sum as it is: a sum is a normal number, a zero, an infinity or the one NaN."""
MASKED = 0xFF7FFFFF
"""What a masked result becomes: the most negative finite float32."""
MINUS_INFINITY = 0xFF800000
_PAIR = 2
"""Lanes that share a unary function's coefficient ROM."""


def _levels(machine: Machine) -> int:
    return (machine.vector.lanes - 1).bit_length()


def least_latency(machine: Machine) -> int:
    """The least `latency` of an `Epilogue`: a cycle for each step, two for the function, one a level of the maxima."""
    return 5 + _levels(machine)


def stages(machine: Machine, latency: int) -> tuple[int, int, int, list[int]]:
    """Cycles of multiplication, addition, function, and each level of the row maximum; one more ends the latter.

    Cycles beyond the least go to all in proportion to the registers they have places for, then to the function's.
    """
    levels = _levels(machine)
    least = [1, 1, 2] + [1] * levels
    room = [MULTIPLY_CUTS - 1, ADD_CUTS - 1, UNARY_CUTS - 1] + [COMPARE_CUTS - 1] * levels
    spare = latency - least_latency(machine)
    shared = min(spare, sum(room))
    edges = [shared * total // sum(room) for total in (0, *accumulate(room))]
    given = [low + after - before for low, before, after in zip(least, edges, edges[1:], strict=False)]
    return given[0], given[1], given[2] + spare - shared, given[3:]


class Epilogue(wiring.Component):
    """Scale, bias, mask, activation, row maximum and the write; `latency` cycles, one row of sums a cycle.

    With `valid`: `sums`, and `scale` and `bias` if used (a scale of one word comes repeated); `present` tells the
    words that are columns of the product, `keep` those inside the mask's range (all, if there is no mask);
    `address` and `mask` are the write's. `vector` numbers the row's vector in the instruction; `first_of_vector` goes
    with its first sums and `last_of_instruction` with the last of all, when `row_max` writes the maxima of the
    vectors seen from word `maximum` on: anywhere for one vector, from a row's first word for several.

    `shared` are the Verilog modules that it instantiates. `sums` are canonical, as an addition gives them.
    """

    def __init__(self, machine: Machine, latency: int) -> None:
        """An epilogue whose writes come `latency` cycles after the sums, its maxima one more after the last.

        Raises:
            MachineError: latency below `least_latency(machine)`, or maxima that do not fit a row.
        """
        least, lanes, vectors = least_latency(machine), machine.vector.lanes, machine.matrix.vectors
        if latency < least:
            raise MachineError(
                f"matrix.epilogue_latency = {machine.matrix.epilogue_latency} leaves the epilogue {latency} cycles:"
                f" it needs {least}, so raise it by {least - latency}"
            )
        if vectors > lanes:
            raise MachineError(
                f"matrix.vectors = {vectors} exceeds a register row of vector.lanes = {lanes} words: lower it"
            )
        self.latency, self._machine = latency, machine
        multiply, add, function, tree = self._stages = stages(machine, latency)
        self._multiplier = Shared(f"multiplier_{multiply}", Multiplier(multiply))
        self._adder = Shared(f"adder_{add}", Adder(add))
        self._function = Shared(f"unary_{function}", UnaryEvaluator(function, _PAIR))
        self._comparators = {cycles: Shared(f"comparator_{cycles}", Comparator(cycles)) for cycles in {1, *tree}}
        self.shared = (self._multiplier, self._adder, self._function, *self._comparators.values())
        row = data.ArrayLayout(unsigned(32), lanes)
        super().__init__(
            {
                "valid": In(1),
                "sums": In(row),
                "scale": In(row),
                "bias": In(row),
                "present": In(lanes),
                "keep": In(lanes),
                "address": In(range(file_rows(machine))),
                "mask": In(lanes),
                "use_scale": In(1),
                "use_bias": In(1),
                "activation": In(ACTIVATION_BITS),
                "row_max": In(1),
                "vector": In(range(vectors)),
                "first_of_vector": In(1),
                "last_of_instruction": In(1),
                "maximum": In(range(machine.vector.words)),
                "write": Out(write_port(machine)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """The steps one after another, what later ones need travelling beside them."""
        m = Module()
        lanes, (multiply, add, _, _) = self._machine.vector.lanes, self._stages
        sums = [self.sums[lane] for lane in range(lanes)]
        factors = [Mux(self.use_scale, self.scale[lane], ONE) for lane in range(lanes)]
        scaled = self._apply(m, "multiplier", self._multiplier, sums, factors)
        addends = [Mux(self.use_bias, self.bias[lane], MINUS_ZERO) for lane in range(lanes)]
        added = [delayed(m, addend, multiply, f"addend{lane}") for lane, addend in enumerate(addends)]
        sums = self._apply(m, "adder", self._adder, scaled, added)
        keep = delayed(m, self.keep, multiply + add, "keep")
        values = []
        for lane in range(lanes):
            value = Signal(32, name=f"value{lane}")
            m.d.comb += value.eq(Mux(keep[lane], sums[lane], MASKED))
            values.append(value)
        results = self._activate(m, values, delayed(m, self.activation, multiply + add, "activation"))
        self._write(m, results, self._maxima(m, results))
        return m

    def _apply(self, m: Module, name: str, unit: Shared, a: list[Any], b: list[Any]) -> list[Any]:
        """A unit with inputs a and b for each lane; its results."""
        results = []
        for lane, (left, right) in enumerate(zip(a, b, strict=True)):
            m.submodules[f"{name}{lane}"] = copy = unit.replica()
            m.d.comb += [copy.a.eq(left), copy.b.eq(right)]
            if name == "adder":
                m.d.comb += copy.subtract.eq(0)
            results.append(copy.result)
        return results

    def _activate(self, m: Module, values: list[Any], activation: Any) -> list[Any]:
        """The activation's function of the values, or the values."""
        (_, _, cycles, _), results = self._stages, []
        select = Signal(FUNCTION_BITS)
        m.d.comb += select.eq(activation - 1)  # Activation numbers NONE 0, and then each Function
        plain = delayed(m, activation == Activation.NONE, cycles, "plain")
        for lane in range(0, len(values), _PAIR):
            m.submodules[f"function{lane}"] = copy = self._function.replica()
            m.d.comb += copy.select.eq(select)
            for index, value in enumerate(values[lane : lane + _PAIR]):
                word = slice(32 * index, 32 * (index + 1))
                m.d.comb += copy.x[word].eq(value)
                past = delayed(m, value, cycles, f"past{lane + index}")
                result = Signal(32, name=f"result{lane + index}")
                m.d.comb += result.eq(Mux(plain, past, copy.result[word]))
                results.append(result)
        return results

    def _maxima(self, m: Module, results: list[Any]) -> list[Any]:
        """The running maximum of each vector, two cycles after the last results left the tree."""
        tree, vectors = self._stages[3], self._machine.matrix.vectors
        time = sum(self._stages[:3])
        present = delayed(m, self.present, time, "present")
        level: list[Any] = [Mux(present[lane], result, MINUS_INFINITY) for lane, result in enumerate(results)]
        for number, cycles in enumerate(tree):
            pairs = zip(level[::2], level[1::2], strict=True)
            level = [self._larger(m, f"larger{number}_{i}", cycles, *pair) for i, pair in enumerate(pairs)]
            time += cycles
        # The maximum so far is read a cycle before its vector's results come, so it may still be on its way here.
        early, now = (delayed(m, self.vector, time + offset, f"vector{offset}") for offset in (-1, 0))
        first, valid = (
            delayed(m, signal, time, name)
            for signal, name in ((self.first_of_vector, "first"), (self.valid, "running"))
        )
        before, written = Signal.like(now), Signal()
        kept = Signal(data.ArrayLayout(32, vectors))
        read, running = Signal(32), Signal(32)
        old = Mux(first, MINUS_INFINITY, Mux(written & (before == now), running, read))
        m.d.comb += running.eq(self._larger(m, "running", 1, level[0], old))
        words = Array(kept[index] for index in range(vectors))
        m.d.sync += [
            before.eq(now),
            written.eq(valid),
            read.eq(Mux(written & (before == early), running, words[early])),
        ]
        with m.If(written):
            for index in range(vectors):
                with m.If(before == index):
                    m.d.sync += kept[index].eq(running)
        return [kept[index] for index in range(vectors)]

    def _larger(self, m: Module, name: str, cycles: int, a: Any, b: Any) -> Any:
        """The larger of two values, `cycles` later."""
        m.submodules[name] = copy = self._comparators[cycles].replica()
        m.d.comb += [copy.a.eq(a), copy.b.eq(b)]
        return copy.maximum

    def _write(self, m: Module, results: list[Any], maxima: list[Any]) -> None:
        """The results as they get through, or the maxima of the instruction that ended a cycle before."""
        latency, lanes = self.latency, self._machine.vector.lanes
        valid = delayed(m, self.valid, latency, "valid", reset=True)
        vector = delayed(m, self.vector, latency, "vector_written")
        end = delayed(m, self.valid & self.last_of_instruction & self.row_max, latency + 1, "end", reset=True)
        over = delayed(m, self.valid & self.last_of_instruction, latency + 1, "over", reset=True)
        seen, one = Signal(len(maxima)), Signal()
        with m.If(over):
            m.d.sync += seen.eq(0)
        with m.Elif(valid):
            m.d.sync += seen.eq(seen | (Const(1, len(maxima)) << vector)[: len(maxima)])
        m.d.comb += one.eq(seen == 1)
        maximum = delayed(m, self.maximum, latency + 1, "maximum")
        place = (lanes - 1).bit_length()
        mask = Signal(lanes)
        m.d.comb += mask.eq(Mux(one, Const(1, lanes) << maximum[:place], seen))
        address = delayed(m, self.address, latency, "address")
        m.d.comb += self.write.address.eq(Mux(end, maximum[place:], address))
        m.d.comb += self.write.mask.eq(
            Mux(end, mask, Mux(valid, delayed(m, self.mask, latency, "mask"), 0)),
        )
        for lane, result in enumerate(results):
            late = delayed(m, result, latency - sum(self._stages[:3]), f"late{lane}")
            kept = Mux(one, maxima[0], maxima[lane]) if lane < len(maxima) else maxima[0]
            m.d.comb += self.write.data[lane].eq(Mux(end, kept, late))
