"""The matrix unit's vectors, dot units and accumulators: from operands to the epilogue's rows of sums.

Stages from contract time are `Geometry`'s: a pass reads its vectors in `vector_lag`, meets the tile a cycle later, and
its chunk sums meet the accumulators in `sum_lag` + 1. Sums are stored in `drain_lag`, when a row of results may be
read; in `result_lag` it is the epilogue's.

What is loaded is written as late as it may be: one stage before the same contract cycle would use it. Nobody then
needs more than two copies, by the chunk's or the column block's parity, for the next load of a copy comes at least
two cycles after its last use, by the contract.
"""

from __future__ import annotations

from typing import Any

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from typebar.hw import delay
from typebar.hw.arith.add import Adder
from typebar.hw.arith.convert import OPERAND, WEIGHT, OperandFromFloat32
from typebar.hw.arith.dot import AlignedVector, DotUnit, Lags, LateWeights
from typebar.hw.matrix.buffer import GroupBuffer
from typebar.hw.matrix.geometry import (
    RAW_LAG,
    ROW_LAG,
    TILE_LAG,
    Geometry,
    Load,
    delayed,
    drain_layout,
    load_layout,
    log2,
    pass_layout,
)
from typebar.hw.ports import flag_layout
from typebar.hw.replicate import Shared
from typebar.isa.instructions import Scale
from typebar.isa.machine import Machine

_CONVERSION = 2


class Compute(wiring.Component):
    """Dot units and accumulators.

    `compute` comes in contract time, `drain` a cycle later; `load`, `row` and `chunk` in ROW_LAG, as for `Weights`;
    `tile`, `own` and `nan` as that gives them. `result` and its rows come in `Geometry.result_lag`.

    `shared` are the Verilog modules that it instantiates.
    """

    def __init__(self, machine: Machine) -> None:
        """`rows` x `columns` dot units, with an adder and accumulators for each."""
        self._machine, g = machine, Geometry.of(machine)
        self._g = g
        self._dots = [
            Shared(f"{name}_{g.lanes}_{g.dot}", DotUnit(g.lanes, g.dot, own))
            for name, own in (("dot", False), ("own_dot", True))
        ]
        self._aligned = Shared(f"aligned_vector_{g.lanes}_{g.dot}", AlignedVector(g.lanes, g.dot))
        self._adder = Shared(f"adder_{g.add}", Adder(g.add))
        self._operand = Shared(f"operand_from_float32_{_CONVERSION}", OperandFromFloat32(_CONVERSION))
        self._late = Shared(f"late_weights_{g.lanes}_{g.dot}", LateWeights(g.lanes, g.dot))
        own_lag = TILE_LAG + g.two - RAW_LAG + Lags.of(g.lanes, g.dot).values
        self._own = Shared(f"own_weights_{8 * g.lanes}_{own_lag}", delay.Kept(8 * g.lanes, own_lag))
        self.shared = (*self._dots, self._late, self._own, self._aligned, self._adder, self._operand)
        row = data.ArrayLayout(32, g.words)
        super().__init__(
            {
                "compute": In(pass_layout(g)),
                "drain": In(drain_layout(g)),
                "load": In(load_layout(g)),
                "row": In(row),
                "chunk": In(data.ArrayLayout(32, min(g.lanes, g.words))),
                "tile": In(WEIGHT.size * g.whole_groups * g.tile),
                "own": In(8 * (g.groups - g.whole_groups) * g.tile),
                "nan": In(g.whole_groups * g.columns),
                "result": Out(drain_layout(g)),
                "sums": Out(row),
                "scale": Out(row),
                "bias": Out(row),
                "overflow": Out(flag_layout()),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """Vectors, chunk sums, sums, results."""
        self._m = m = Module()
        g = self._g
        compute = delayed(m, self.compute, g.vector_lag, "vector_pass")
        vectors = self._vectors(compute)
        sums = self._sums(vectors, compute)
        compute = delayed(m, compute, g.sum_lag - g.vector_lag, "sum_pass")
        drain = delayed(m, self.drain, g.drain_lag - 1, "drain")
        stored = self._accumulate(compute, sums, drain)
        self._results(drain, stored)
        return m

    # Vectors -------------------------------------------------------------------------------------------
    def _vectors(self, compute: Any) -> list[tuple[Value, Value]]:
        """For each row of dot units the operands of its vector's chunk, and whether one is NaN."""
        m, g = self._m, self._g
        width = min(g.lanes, g.words)
        wait = g.vector_lag - 1 - _CONVERSION - ROW_LAG
        load, chunk = delayed(m, self.load, wait, "vector_load"), delayed(m, self.chunk, wait, "vector_words")
        first = Signal(range(max(g.lanes, g.block)))
        m.d.comb += first.eq(load.row << log2(g.words))
        operands, nans, overflows = [], [], []
        for index in range(width):
            m.submodules[f"operand{index}"] = unit = self._operand.replica()
            present = (first + index < load.present) & (load.kind == Load.VECTOR) & load.valid
            m.d.comb += [unit.x.eq(chunk[index]), unit.present.eq(present)]
            operands.append(unit.operand)
            nans.append(unit.nan)
            overflows.append(unit.overflow)
        load = delayed(m, load, _CONVERSION, "vector_store")
        m.d.sync += [self.overflow.raised.eq(Cat(overflows).any()), self.overflow.pc.eq(load.pc)]
        item = Cat(*operands, Cat(nans).any())
        vectors = []
        count = 1 << (g.passes - 1).bit_length()
        for row in range(g.rows):
            memory = Memory(shape=len(item) * g.slices, depth=2 * count, init=[])
            m.submodules[f"vectors{row}"] = memory
            write, read = memory.write_port(granularity=len(item)), memory.read_port()
            here = load.valid & (load.kind == Load.VECTOR) & self._holds(load, row)
            number = Signal(range(g.passes), name=f"pass{row}")
            m.d.comb += [
                number.eq(load.vector >> log2(g.rows)),
                write.addr.eq(Cat(number, load.chunk)),
                write.data.eq(item.replicate(g.slices)),
                write.en.eq(Mux(here, 1 << load.row[: log2(g.slices)], 0)),
                read.addr.eq(Cat(compute.number, compute.chunk)),
            ]
            slices = [read.data[i * len(item) : (i + 1) * len(item)] for i in range(g.slices)]
            operands_read = Cat(piece[: width * OPERAND.size] for piece in slices)
            vectors.append((operands_read, Cat(piece[-1] for piece in slices).any()))
        return vectors

    def _holds(self, load: Any, row: int) -> Value:
        """Whether a row of dot units works on the load's vector; all do on a single one."""
        return load.single | (load.vector[: log2(self._g.rows)] == row)

    # Sums ----------------------------------------------------------------------------------------------
    def _sums(self, vectors: list[tuple[Value, Value]], compute: Any) -> list[Value]:
        """Chunk sums, row of units by row."""
        m, g, sums = self._m, self._g, []
        lags, folded = Lags.of(g.lanes, g.dot), delayed(m, compute.folded, 1, "tile_folded")
        late_folded = delayed(m, folded, lags.signs, "late_folded")
        tile = self._late_tile()
        own = self._late_own()
        for row, (operands, nan) in enumerate(vectors):
            m.submodules[f"vector{row}"] = vector = self._aligned.replica()
            m.d.comb += vector.x.eq(operands)
            present = Signal(g.lanes, name=f"present{row}")
            m.d.comb += present.eq(Cat(x.nonzero for x in data.View(data.ArrayLayout(OPERAND, g.lanes), operands)))
            has_own, group = g.whole_groups <= row < g.groups, row if row < g.whole_groups else 0
            for column in range(g.columns):
                source = group * g.columns + column
                m.submodules[f"dot{row}_{column}"] = unit = self._dots[has_own].replica()
                late = tile[source]
                m.d.comb += [getattr(unit, port).eq(getattr(late, port)) for port in self._late.component.names]
                m.d.comb += [
                    unit.present.eq(present),
                    unit.vector_signs.eq(vector.signs),
                    unit.magnitudes.eq(vector.magnitudes),
                    unit.exponent.eq(vector.exponent),
                    unit.nan.eq(nan | (self.nan[source] & ~folded if has_own else self.nan[source])),
                ]
                if has_own:
                    late_own = own[(row - g.whole_groups) * g.columns + column]
                    m.d.comb += [unit.own_values.eq(late_own), unit.folded.eq(late_folded)]
                sums.append(unit.sum)
        return sums

    def _late_tile(self) -> list[Any]:
        """Ports of dot units by column of the tile: rows of units share what delays their weights."""
        g, units, width = self._g, [], WEIGHT.size * self._g.lanes
        for column in range(g.columns * g.whole_groups):
            self._m.submodules[f"late_weights{column}"] = unit = self._late.replica()
            self._m.d.comb += unit.weights.eq(self.tile[width * column : width * (column + 1)])
            units.append(unit)
        return units

    def _late_own(self) -> list[Value]:
        """Weights of the groups that only int8 has, by column, when dot units take them."""
        g, values, width = self._g, [], 8 * self._g.lanes
        for column in range((g.groups - g.whole_groups) * g.columns):
            self._m.submodules[f"own_weights{column}"] = unit = self._own.replica()
            self._m.d.comb += unit.value.eq(self.own[width * column : width * (column + 1)])
            values.append(unit.late)
        return values

    def _starting_sums(self, compute: Any) -> Value:
        """What the accumulators start from, in the cycle after `compute`."""
        m, g = self._m, self._g
        wait = g.sum_lag - 1 - ROW_LAG
        self._late_load = load = delayed(m, self.load, wait, "sum_load")
        self._late_row = row = delayed(m, self.row, wait, "sum_row")
        words = []
        for unit_row in range(g.rows):
            m.submodules[f"starting_sums{unit_row}"] = buffer = GroupBuffer(g, g.passes)
            start = Signal(32 * g.columns, name=f"start{unit_row}")
            m.d.comb += [
                buffer.write.eq(load.valid & (load.kind == Load.ACCUMULATE) & self._holds(load, unit_row)),
                buffer.write_block.eq(load.block),
                buffer.write_vector.eq(load.vector >> log2(g.rows)),
                buffer.write_row.eq(load.row),
                buffer.words.eq(row),
                buffer.block.eq(compute.block),
                buffer.vector.eq(compute.number),
                buffer.group.eq(compute.group + Mux(compute.folded, unit_row, 0)),
            ]
            m.d.sync += start.eq(Mux(compute.accumulate, buffer.columns, 0))
            words.append(start)
        return Cat(words)

    def _accumulate(self, compute: Any, sums: list[Value], drain: Any) -> Value:
        """Add chunk sums to what is stored, or to what they start from; the stored sums that `drain` wants."""
        m, g = self._m, self._g
        bits = (g.passes - 1).bit_length()
        memory = Memory(shape=32 * len(sums), depth=g.interleave << bits, init=[])
        m.submodules.accumulators = memory
        write = memory.write_port()
        feed, read = (memory.read_port(transparent_for=(write,)) for _ in range(2))
        start = self._starting_sums(compute)
        m.d.comb += feed.addr.eq(Cat(compute.number, compute.step))
        compute = delayed(m, compute, 1, "add_pass")
        before = Signal(32 * len(sums))
        m.d.comb += before.eq(Mux(compute.first, start, feed.data))
        results = []
        for index, chunk_sum in enumerate(sums):
            m.submodules[f"adder{index}"] = unit = self._adder.replica()
            m.d.comb += [unit.a.eq(before[32 * index : 32 * (index + 1)]), unit.b.eq(chunk_sum), unit.subtract.eq(0)]
            results.append(unit.result)
        compute = delayed(m, compute, g.add, "stored_pass")
        number = Signal(range(g.passes))
        m.d.comb += [
            write.addr.eq(Cat(compute.number, compute.step)),
            write.data.eq(Cat(results)),
            write.en.eq(compute.valid),
            number.eq(drain.vector >> log2(g.rows)),
            read.addr.eq(Cat(number, drain.step)),
        ]
        return read.data

    # Results -------------------------------------------------------------------------------------------
    def _results(self, drain: Any, stored: Value) -> None:
        """A row of sums in the places of their words, with its scales and biases."""
        m, g = self._m, self._g
        wait = g.drain_lag - g.sum_lag
        load = delayed(m, self._late_load, wait, "result_load")
        row = delayed(m, self._late_row, wait, "result_row")
        word = Signal(32)
        with m.If(load.valid & (load.kind == Load.SCALE_WORD)):
            m.d.sync += word.eq(row[0])
        word_read = Signal(32)
        m.d.sync += word_read.eq(word)
        columns = {}
        for name, kind in (("scale", Load.SCALE), ("bias", Load.BIAS)):
            memory = Memory(shape=32 * g.words, depth=2 * g.block_rows, init=[])
            m.submodules[name] = memory
            write, read = memory.write_port(), memory.read_port()
            bits = log2(g.block_rows)
            m.d.comb += [
                write.addr.eq(Cat(load.row[:bits], load.block)),
                write.data.eq(row.as_value()),
                write.en.eq(load.valid & (load.kind == kind)),
                read.addr.eq(Cat(drain.row[:bits], drain.block)),
            ]
            columns[name] = read.data
        drain = delayed(m, drain, 1, "drain_data")
        sums = self._placed(drain, stored)
        scale = Mux(drain.scaling == Scale.WORD, word_read.replicate(g.words), columns["scale"])
        for port, value in ((self.sums, sums), (self.scale, scale), (self.bias, columns["bias"])):
            # The one result of a matrix of one column goes to whatever word is its own.
            m.d.sync += port.as_value().eq(Mux(drain.single, value[:32].replicate(g.words), value))
        m.d.comb += self.result.eq(delayed(m, drain, 1, "result"))

    def _placed(self, drain: Any, stored: Value) -> Value:
        """The words of a register row, from the units that hold their columns."""
        m, g = self._m, self._g
        width, rows = min(g.columns, g.words), log2(g.rows)
        unit_row = drain.vector[:rows]
        words = []
        for position in range(g.words // width):
            index = Signal(range(max(2, g.rows * g.columns // width)), name=f"unit{position}")
            if g.columns >= g.words:
                parts = g.columns // g.words
                m.d.comb += index.eq(drain.part + Mux(drain.folded, 0, unit_row * parts))
            else:
                group = (drain.row << log2(g.words // width)) + position - drain.group
                m.d.comb += index.eq(Mux(drain.folded, group[: max(1, rows)], unit_row))
            words.append(stored.word_select(index, 32 * width))
        return Cat(words)


def row_words(m: Module, g: Geometry, row: Any, load: Any) -> tuple[Any, Any]:
    """A register row in a register, its first word the one that the load names; and the words of its chunk.

    Only an operand of one word lies elsewhere than at a row's beginning, so the other words need not move.
    """
    word = Signal(32)
    words = Signal(data.ArrayLayout(32, g.words), name="row", reset_less=True)
    m.d.comb += word.eq(row.as_value().word_select(load.word, 32))
    m.d.sync += words.eq(Cat(word, *(row[index] for index in range(1, g.words))))
    width = min(g.lanes, g.words)
    chunk = Signal(data.ArrayLayout(32, width), name="chunk", reset_less=True)
    pieces = Cat(word, *(row[index] for index in range(1, g.words)))
    m.d.sync += chunk.eq(pieces.word_select(load.piece, 32 * width))
    return words, chunk
