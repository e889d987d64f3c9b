"""The matrix unit's sequencer: when each step begins, in contract time, and what it makes the datapath do.

Contract (docs/timing.md, "Matrix unit and fetch engine"): a step begins when the one before has ended, its rows can be
used, its column groups' sums of the chunk before are there and, if it is a chunk's first, the chunk's operands are
loaded. It holds the unit for its passes, and for the results that leave, a row a cycle, if its sums are complete.
"""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from typebar.hw.matrix.geometry import (
    Geometry,
    below,
    drain_layout,
    freed_bits,
    job_layout,
    log2,
    minimum,
    pass_layout,
    read_layout,
    step_groups,
)
from typebar.hw.memory.fetch import ARRIVED_BITS
from typebar.hw.ports import CAUSE_BITS, file_rows
from typebar.isa.instructions import FORMAT_BYTES, Format, Patch
from typebar.isa.machine import Machine
from typebar.isa.timing import Cause

_STEPS = ("scaling", "add_bias", "activation", "row_max", "maximum")
"""What the epilogue does: fields of the instruction that go with its results."""


class Steps(wiring.Component):
    """Steps of one instruction after another.

    `start` comes with the instruction `incoming`, which is `job` from the next cycle on; `loaded` allows a chunk's
    first step, and `advance` tells that it begins. `active` while there are steps; `computing` in their cycles, and
    `waited` is why the first of them did not come earlier. `finish` in the last cycle of the instruction. `arrived`
    counts rows that can be used, `freed` those that a step has consumed, in its last cycle.

    `read`, `compute` and `drain` are what the datapath does with the contract's cycle: all in the cycle itself but
    for `drain`, which comes one cycle later.
    """

    def __init__(self, machine: Machine) -> None:
        """A sequencer for a machine's matrix unit."""
        self._machine, self._g = machine, Geometry.of(machine)
        job = job_layout(machine)
        super().__init__(
            {
                "start": In(1),
                "incoming": In(job),
                "job": In(job),
                "loaded": In(1),
                "arrived": In(ARRIVED_BITS),
                "active": Out(1),
                "advance": Out(1),
                "computing": Out(1),
                "waited": Out(CAUSE_BITS),
                "finish": Out(1),
                "freed": Out(freed_bits(machine)),
                "read": Out(read_layout(self._g)),
                "compute": Out(pass_layout(self._g)),
                "drain": Out(drain_layout(self._g)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """Where the unit is in the matrix; when a step begins and ends; what it does."""
        self._m = m = Module()
        g, job = self._g, self.job
        self._folded, self._shift = step_groups(m, g, job)
        self._k_left, self._n_left = Signal.like(job.k), Signal.like(job.n)
        self._column, self._step = Signal(range(g.block)), Signal(range(g.interleave))
        self._first, self._chunk, self._block = Signal(), Signal(), Signal()
        self._index = Signal(range(g.vectors * max(1, g.groups * g.columns // g.words) + 2))
        self._begin, self._end = Signal(), Signal()
        self._columns = minimum(m, self._n_left, g.block, "columns")
        self._left = Signal(range(g.block + 1))
        self._step_columns = Signal(range(g.groups * g.columns + 1))
        self._last_step, self._last_chunk, self._last_block = Signal(), Signal(), Signal()
        m.d.comb += [
            self._left.eq(self._columns - self._column),
            self._step_columns.eq(g.columns << self._shift),
            self._last_step.eq(self._left <= self._step_columns),
            self._last_chunk.eq(self._k_left <= g.lanes),
            self._last_block.eq(self._n_left <= g.block),
            self.finish.eq(self._end & self._last_step & self._last_chunk & self._last_block),
        ]
        self._rows()
        self._time()
        self._advance()
        self._reads()
        self._passes()
        self._drains()
        return m

    # Rows ----------------------------------------------------------------------------------------------
    def _rows(self) -> None:
        """Rows that the step at hand needs and frees; its place in the FIFO."""
        m, g, machine = self._m, self._g, self._machine
        self._number = Signal(ARRIVED_BITS)
        self._place, self._offset = Signal(range(machine.fifo_rows)), Signal(range(g.places))
        used = Signal.like(self._step_columns)
        need, consumed, after = Signal.like(self.freed), Signal.like(self.freed), Signal(range(2 * g.places))
        m.d.comb += used.eq(Mux(self._last_step, self._left, self._step_columns))
        whole = Signal.like(self.freed)
        with m.Switch(self.job.format):
            for element in Format:
                size = FORMAT_BYTES[element]
                with m.Case(element):
                    column = g.lanes * size
                    if column >= g.row_bytes:
                        m.d.comb += need.eq(used << log2(column // g.row_bytes))
                    else:
                        m.d.comb += need.eq((used + (g.row_bytes // column - 1)) >> log2(g.row_bytes // column))
                    # A step of less than a row frees it with its last part.
                    m.d.comb += after.eq(self._offset + (size << self._shift))
                    for fold in sorted({1, g.fold(element)}):
                        rows = fold * g.tile * size // g.row_bytes
                        with m.If(self._folded if fold > 1 else Const(1, 1)):
                            m.d.comb += whole.eq(after >= g.places if rows == 0 else rows)
        m.d.comb += consumed.eq(Mux(self._last_step, need, whole))
        place = Signal(range(machine.fifo_rows + (1 << len(self.freed))))
        m.d.comb += place.eq(self._place + consumed)
        self._need = need
        with m.If(self._end):
            m.d.comb += self.freed.eq(consumed)
            m.d.sync += [
                self._number.eq(self._number + consumed),
                self._place.eq(Mux(place >= machine.fifo_rows, place - machine.fifo_rows, place)),
                self._offset.eq(Mux(self._last_step, 0, after)),
            ]

    def _time(self) -> None:
        """Begin and end of a step, and the cause of what lies between."""
        m = self._m
        remaining, before, needed = Signal(len(self._index)), Signal(ARRIVED_BITS), Signal(ARRIVED_BITS)
        m.d.sync += before.eq(self.arrived)
        m.d.comb += needed.eq(self._number + self._need)
        there, was_there = ((count - needed)[:ARRIVED_BITS][-1] == 0 for count in (self.arrived, before))
        summed, just_summed = self._sums()
        loaded = (self._step != 0) | self.loaded
        idle, hold = remaining == 0, self._hold()
        m.d.comb += [
            self._begin.eq(self.active & idle & there & summed & loaded),
            self.advance.eq(self._begin & (self._step == 0)),
            self.computing.eq(self._begin | ~idle),
            self._end.eq(Mux(idle, self._begin & (hold == 1), remaining == 1)),
            self.waited.eq(Mux(~was_there, Cause.WEIGHTS, Mux(just_summed, Cause.ACCUMULATE, Cause.OPERANDS))),
        ]
        with m.If(self._begin):
            m.d.sync += remaining.eq(hold - 1)
        with m.Elif(~idle):
            m.d.sync += remaining.eq(remaining - 1)
        with m.If(self._end):
            m.d.sync += self._index.eq(0)
        with m.Elif(self.computing):
            m.d.sync += self._index.eq(self._index + 1)

    def _sums(self) -> tuple[Value, Value]:
        """Whether the sums of the same step of the chunk before are there, and are from this cycle on.

        They are `accumulate_latency` cycles after that step's begin: begins are remembered for as long.
        """
        m, ages = self._m, range(self._machine.matrix.accumulate_latency)
        valid = [Signal(name=f"begun_{age}") for age in ages]
        steps = [Signal.like(self._step, name=f"begun_step_{age}") for age in ages]
        m.d.sync += [valid[0].eq(self._begin), steps[0].eq(self._step)]
        for age in ages[1:]:
            m.d.sync += [valid[age].eq(valid[age - 1]), steps[age].eq(steps[age - 1])]
        same = [~self._first & flag & (step == self._step) for flag, step in zip(valid, steps, strict=True)]
        return ~Cat(same[:-1]).any(), same[-1]

    def _hold(self) -> Value:
        """Cycles of the step at hand; sets its passes, and `_parts`, the register rows of its results."""
        m, g, job = self._m, self._g, self.job
        parts = max(1, g.groups * g.columns // g.words)
        self._passes_now, self._parts = Signal(range(g.passes + 1)), Signal(range(parts + 1))
        parts_shift, rows, hold = Signal(range(log2(parts) + 1)), Signal.like(self._index), Signal.like(self._index)
        for power in range(1, log2(parts) + 1):
            with m.If(self._step_columns >= g.words << power):
                m.d.comb += parts_shift.eq(power)
        least, usual = Signal(range(3)), Signal.like(self._index)
        m.d.comb += [
            self._passes_now.eq((job.vectors + (g.rows - 1)) >> log2(g.rows)),
            self._parts.eq(1 << parts_shift),
            least.eq(Mux(job.format == Format.FP32, 1 + g.two, 1)),
            usual.eq(Mux(self._passes_now > least, self._passes_now, least)),
            rows.eq(job.vectors << parts_shift),
            hold.eq(Mux(self._last_chunk & (rows > usual), rows, usual)),
        ]
        return hold

    # Place in the matrix -------------------------------------------------------------------------------
    def _advance(self) -> None:
        """From one step to the next, chunk by chunk, column block by column block."""
        m, g, job = self._m, self._g, self.job
        # Where the patch lies, from the chunk's first lane and the block's first column; negative once passed.
        self._lane_at, self._column_at = Signal(signed(33)), Signal(signed(33))
        self._block_column = Signal.like(job.n)
        self._base = Signal(range(file_rows(self._machine)))
        with m.If(self._end):
            with m.If(~self._last_step):
                m.d.sync += [self._column.eq(self._column + self._step_columns), self._step.eq(self._step + 1)]
            with m.Else():
                m.d.sync += [self._column.eq(0), self._step.eq(0), self._chunk.eq(~self._chunk)]
                with m.If(self._last_chunk):
                    m.d.sync += [
                        self._first.eq(1),
                        self._k_left.eq(job.k),
                        self._n_left.eq(self._n_left - g.block),
                        self._block.eq(~self._block),
                        self._lane_at.eq(job.patch_at),
                        self._column_at.eq(self._column_at - g.block),
                        self._block_column.eq(self._block_column + g.block),
                        self._base.eq(self._base + g.block_rows),
                    ]
                with m.Else():
                    m.d.sync += [
                        self._first.eq(0),
                        self._k_left.eq(self._k_left - g.lanes),
                        self._lane_at.eq(self._lane_at - g.lanes),
                    ]
        with m.If(self.start):
            new = self.incoming
            m.d.sync += [
                self.active.eq(1),
                self._column.eq(0),
                self._step.eq(0),
                self._chunk.eq(0),
                self._block.eq(0),
                self._first.eq(1),
                self._k_left.eq(new.k),
                self._n_left.eq(new.n),
                self._lane_at.eq(new.patch_at),
                self._column_at.eq(new.patch_at),
                self._block_column.eq(0),
                self._base.eq(new.dst.row),
            ]
        with m.Elif(self.finish):
            m.d.sync += self.active.eq(0)

    # What the datapath does ----------------------------------------------------------------------------
    def _reads(self) -> None:
        """The FIFO's rows: in a step's first cycle, of a float32 tile twice the port's width in the first two."""
        m, g, job, read = self._m, self._g, self.job, self.read
        wide = (job.format == Format.FP32) if g.two else Const(0, 1)
        first = self.computing & (self._index == 0)
        second = self.computing & (self._index == 1) & wide
        place, offset = self._place, self._offset
        if g.two:
            half = g.columns // 2
            ports = g.port_bytes // g.row_bytes
            if ports:
                later = Signal(range(2 * self._machine.fifo_rows))
                m.d.comb += later.eq(self._place + ports)
                wrapped = Mux(later >= self._machine.fifo_rows, later - self._machine.fifo_rows, later)
                place = Mux(second, wrapped, self._place)
            else:
                offset = Mux(second, self._offset + g.port_bytes // g.tile, self._offset)
            skipped, limit = Mux(second, half, 0), Mux(wide, half, self._step_columns)
        else:
            skipped, limit = Const(0, 1), self._step_columns
        left = Signal.like(self._left)
        m.d.comb += left.eq(Mux(self._left > skipped, self._left - skipped, 0))
        column_at = Signal(signed(34))
        m.d.comb += column_at.eq(self._column_at - self._column - skipped)
        m.d.comb += [
            read.valid.eq(first | second),
            read.second.eq(second),
            read.last.eq(second | ~wide),
            read.place.eq(place),
            read.offset.eq(offset),
            read.format.eq(job.format),
            read.folded.eq(self._folded),
            read.columns.eq(Mux(left > limit, limit, left)),
            read.lanes.eq(minimum(m, self._k_left, g.lanes, "lanes_present")),
            read.group.eq(self._step << self._shift),
            read.patch_column.eq((job.patch == Patch.COLUMN) & (column_at >= 0) & (column_at < g.groups * g.columns)),
            read.patch_lane.eq((job.patch == Patch.LANE) & (self._lane_at >= 0) & (self._lane_at < g.lanes)),
            read.column_at.eq(column_at),
            read.lane_at.eq(self._lane_at),
            read.chunk.eq(self._chunk),
            read.block.eq(self._block),
            read.pc.eq(job.pc),
        ]

    def _passes(self) -> None:
        """The dot units' work, from a step's first cycle on."""
        compute = self.compute
        self._m.d.comb += [
            compute.valid.eq(self.computing & (self._index < self._passes_now)),
            compute.number.eq(self._index),
            compute.step.eq(self._step),
            compute.group.eq(self._step << self._shift),
            compute.folded.eq(self._folded),
            compute.first.eq(self._first),
            compute.accumulate.eq(self.job.accumulate),
            compute.chunk.eq(self._chunk),
            compute.block.eq(self._block),
        ]

    def _drains(self) -> None:
        """The results of a step of a block's last chunk: vector by vector, row by row."""
        m, g, job = self._m, self._g, self.job
        part, vector, drained = Signal.like(self._parts), Signal(range(g.vectors)), Signal()
        outer, inner = Signal.like(job.outer), Signal.like(job.inner)
        outer_at, vector_at = Signal.like(self._base), Signal.like(self._base)
        valid, part_end, last = Signal(), Signal(), Signal()
        next_outer, row = Signal.like(outer_at), Signal.like(self.drain.row)
        m.d.comb += [
            valid.eq(self.computing & self._last_chunk & ~drained),
            part_end.eq(part == self._parts - 1),
            last.eq(part_end & (vector == job.vectors - 1)),
            next_outer.eq(outer_at + job.dst_outer),
            row.eq((self._column >> log2(g.words)) + part),
        ]
        with m.If(valid):
            m.d.sync += [part.eq(Mux(part_end, 0, part + 1)), drained.eq(last)]
            with m.If(part_end):
                m.d.sync += vector.eq(vector + 1)
                with m.If(inner == job.inner - 1):
                    m.d.sync += [inner.eq(0), outer.eq(outer + 1), outer_at.eq(next_outer), vector_at.eq(next_outer)]
                with m.Else():
                    m.d.sync += [inner.eq(inner + 1), vector_at.eq(vector_at + job.dst_inner)]
        with m.If(self._end):
            m.d.sync += [value.eq(0) for value in (part, vector, drained, outer, inner, outer_at, vector_at)]
        drain = Signal(self.drain.shape())
        m.d.sync += [
            drain.valid.eq(valid),
            drain.vector.eq(vector),
            drain.step.eq(self._step),
            drain.group.eq(self._step << self._shift),
            drain.row.eq(row),
            drain.part.eq(part),
            drain.folded.eq(self._folded),
            drain.single.eq(job.n == 1),
            drain.block.eq(self._block),
            drain.first.eq((self._block_column == 0) & (self._column == 0) & (part == 0)),
            drain.last.eq(last & self._last_step & self._last_block),
            drain.address.eq(self._base + vector_at + row),
        ]
        m.d.sync += [drain[name].eq(job[name]) for name in _STEPS]
        present = self._present(row)
        m.d.comb += [
            self.drain.eq(drain),
            self.drain.mask.eq(Mux(drain.single, present[0] << job.dst.word, present)),
            self.drain.keep.eq(self._kept(row, outer, inner)),
        ]

    def _present(self, row: Value) -> Value:
        """Words of a register row that are columns of the step, a cycle later."""
        m, g = self._m, self._g
        low, high = Signal(range(g.words + 1)), Signal(range(g.words + 1))
        place, narrow = self._column[: log2(g.words)], self._step_columns < g.words
        ahead, end = Signal(signed(len(self._columns) + 2)), Signal(range(2 * g.words))
        m.d.comb += [
            ahead.eq(self._columns - (row << log2(g.words))),
            end.eq(Mux(narrow, place + self._step_columns, g.words)),
        ]
        inside = _words_below(m, ahead, g, "inside")
        m.d.sync += [low.eq(Mux(narrow, place, 0)), high.eq(Mux(inside < end, inside, end))]
        return below(high, g.words) & ~below(low, g.words)

    def _kept(self, row: Value, outer: Value, inner: Value) -> Value:
        """Words of a register row inside the mask's range, a cycle later: `job` is the instruction's for as long."""
        m, g, job = self._m, self._g, self.job
        first_word, shift = Signal(signed(34)), Signal(range(2 * g.vectors + 1))
        m.d.comb += shift.eq(Mux(job.mask_outer, outer, 0) + Mux(job.mask_inner, inner, 0))
        m.d.sync += first_word.eq(self._block_column + (row << log2(g.words)) - shift)
        lo, hi = Signal(signed(35)), Signal(signed(35))
        m.d.comb += [lo.eq(job.lo - first_word), hi.eq(job.hi - first_word)]
        keep = below(_words_below(m, hi, g, "hi"), g.words) & ~below(_words_below(m, lo, g, "lo"), g.words)
        everywhere = Const((1 << g.words) - 1, g.words)
        return Mux(job.masked, Mux(job.n == 1, keep[0].replicate(g.words), keep), everywhere)


def _words_below(m: Module, distance: Value, g: Geometry, name: str) -> Value:
    """How many of a row's words lie below a distance from its first."""
    count = Signal(range(g.words + 1), name=f"{name}_words")
    m.d.comb += count.eq(Mux(distance < 0, 0, Mux(distance > g.words, g.words, distance)))
    return count
