"""The matrix unit's operand loader: which register row is read in which cycle.

Contract (docs/timing.md, "Matrix unit"): the loads of a chunk take one cycle a row, from the cycle after the start, or
after the first step of the chunk before began. They are the chunk of each vector and of a column patch; with a column
block's first chunk come the block's lane patch, starting sums and scale word. Its column scales and bias come along
with all its chunks, as many rows with each as one vector has, the rest with the last. `ready` from the last load's
cycle on.
"""

from __future__ import annotations

from typing import Any

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from typebar.hw.matrix.geometry import Geometry, Load, job_layout, load_layout, log2, minimum
from typebar.hw.ports import file_rows
from typebar.isa.instructions import Patch, Scale
from typebar.isa.machine import Machine

_LATE = (Load.SCALE, Load.BIAS)
"""What only results need."""


class Loader(wiring.Component):
    """Register rows for one chunk after another.

    `start` comes with the instruction `incoming`, which is `job` from the next cycle on; `advance` when the first step
    of a chunk begins, so that the next chunk is loaded. `address` is presented to the register file in the cycle in
    which `load` tells what it is for.
    """

    def __init__(self, machine: Machine) -> None:
        """A loader for a machine's register file."""
        self._g = Geometry.of(machine)
        job = job_layout(machine)
        super().__init__(
            {
                "start": In(1),
                "incoming": In(job),
                "job": In(job),
                "advance": In(1),
                "address": Out(range(file_rows(machine))),
                "load": Out(load_layout(self._g)),
                "ready": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """Three nested loops: purposes of a chunk's loads, vectors, rows."""
        self._m = m = Module()
        g, job = self._g, self.job
        self._busy, self._kind = Signal(), Signal(Load)
        self._pending = Signal(len(Load))
        self._k_left, self._n_left = Signal.like(job.k), Signal.like(job.n)
        self._chunk, self._block_row = Signal.like(job.k), Signal.like(self.address)
        self._chunk_parity, self._block_parity = Signal(), Signal()
        # Late operands: those whose last row is to come, the first's next row, how many rows this chunk may load.
        self._late, self._late_row = Signal(len(Load)), Signal(range(max(g.slices, g.block_rows)))
        self._late_left, self._over = Signal(range(g.slices + 1)), Signal()
        self._columns = minimum(m, self._n_left, g.block, "columns")
        ended = self._walk()
        more = self._offered.any()
        with m.If(ended):
            m.d.sync += self._busy.eq(self._busy & more)
        m.d.comb += self.ready.eq(~self._busy | (ended & ~more))
        self._chunks()
        self._describe()
        return m

    def _walk(self) -> Value:
        """Vectors and rows of one purpose; true in its last load's cycle."""
        m, g, job, kind = self._m, self._g, self.job, self._kind
        self._row, self._vector = Signal(range(max(g.slices, g.block_rows))), Signal(range(g.vectors))
        inner, outer_at, vector_at = Signal.like(job.inner), Signal.like(self.address), Signal.like(self.address)
        self._inner, self._outer_at, self._vector_at = inner, outer_at, vector_at
        many, last_row = Signal(), Signal.like(self._row)
        sums = kind == Load.ACCUMULATE
        m.d.comb += many.eq(sums | (kind == Load.VECTOR))
        with m.If((kind == Load.VECTOR) | (kind == Load.PATCH_COLUMN)):
            m.d.comb += last_row.eq(g.slices - 1)
        with m.Elif(kind != Load.SCALE_WORD):
            m.d.comb += last_row.eq((self._columns - 1) >> log2(g.words))
        m.d.comb += self.address.eq(vector_at + self._row)
        row_end, ended, next_outer = Signal(), Signal(), Signal.like(self.address)
        self._account_late(last_row)
        m.d.comb += [
            row_end.eq((self._row == last_row) | self._spent),
            ended.eq(row_end & (~many | (self._vector == job.vectors - 1))),
            next_outer.eq(outer_at + Mux(sums, job.dst_outer, job.src_outer)),
        ]
        with m.If(self._busy):
            m.d.sync += self._row.eq(Mux(row_end, 0, self._row + 1))
            with m.If(row_end):
                m.d.sync += self._vector.eq(self._vector + 1)
                with m.If(inner == job.inner - 1):
                    m.d.sync += [inner.eq(0), outer_at.eq(next_outer), vector_at.eq(next_outer)]
                with m.Else():
                    step = Mux(sums, job.dst_inner, job.src_inner)
                    m.d.sync += [inner.eq(inner + 1), vector_at.eq(vector_at + step)]
            with m.If(ended):
                self._purpose()
        return ended

    def _account_late(self, last_row: Value) -> None:
        """Late operands: `_late_next` are those not loaded after this cycle; `_spent`: it was the chunk's last row.

        `_offered` are the purposes that may follow.
        """
        m, late = self._m, self._busy & Cat(self._kind == kind for kind in _LATE).any()
        self._late_next, self._spent, self._offered = Signal.like(self._late), Signal(), Signal.like(self._pending)
        mask = Const(sum(1 << kind for kind in _LATE), len(Load))
        over = late & (self._row == last_row)
        m.d.comb += [
            self._late_next.eq(self._late & ~Mux(over, 1 << self._kind, 0)),
            self._spent.eq(late & ~self._over & (self._late_left == 1)),
            self._offered.eq(self._pending & ~Mux(self._spent, mask, 0)),
        ]
        m.d.sync += self._late.eq(self._late_next)
        with m.If(late):
            m.d.sync += [self._late_row.eq(Mux(over, 0, self._row + 1)), self._late_left.eq(self._late_left - 1)]

    def _purpose(self) -> None:
        """Go to the next purpose of this chunk."""
        m, job = self._m, self.job
        chosen, base, rest = Signal(Load), Signal.like(self.address), Signal(len(Load))
        chunk_row, bases = self._chunk_row(self._chunk), {}
        bases[Load.PATCH_COLUMN] = job.patch_src.row + chunk_row
        bases[Load.SCALE_WORD] = job.scale.row
        for kind, place in (
            (Load.SCALE, job.scale),
            (Load.BIAS, job.bias),
            (Load.PATCH_LANE, job.patch_src),
            (Load.ACCUMULATE, job.dst),
        ):
            bases[kind] = place.row + self._block_row
        for kind in sorted(bases, reverse=True):
            with m.If(self._offered[kind]):
                m.d.comb += [chosen.eq(kind), base.eq(bases[kind])]
        m.d.comb += rest.eq(self._offered & (self._offered - 1)[: len(Load)])
        m.d.sync += [self._kind.eq(chosen), self._pending.eq(rest)]
        # Only the first late operand of a chunk goes on where the chunk before left off; what follows it begins.
        late, going = Cat(chosen == kind for kind in _LATE).any(), Cat(self._kind == kind for kind in _LATE).any()
        self._begin(base, Mux(late & ~going, self._late_row, 0))

    def _begin(self, base: Value, row: Value | int = 0) -> None:
        """Set the loops over vectors and rows to their beginning."""
        self._m.d.sync += [
            self._row.eq(row),
            self._vector.eq(0),
            self._inner.eq(0),
            self._outer_at.eq(base),
            self._vector_at.eq(base),
        ]

    def _chunk_row(self, chunk: Value) -> Value:
        g = self._g
        return chunk << log2(g.slices) if g.pieces == 1 else chunk >> log2(g.pieces)

    def _late_purposes(self, job: Any) -> Value:
        """The late operands of a block, a bit of each kind."""
        there = {Load.SCALE: job.scaling == Scale.COLUMN, Load.BIAS: job.add_bias}
        return Cat(there.get(kind, Const(0, 1)) for kind in Load)

    def _purposes(self, job: Any, first: Value, late: Value) -> Value:
        """Purposes of a chunk's loads besides its vectors; `late` are the late operands still to load."""
        bits: dict[Load, Value] = {
            Load.VECTOR: Const(0, 1),
            Load.PATCH_COLUMN: job.patch == Patch.COLUMN,
            Load.SCALE_WORD: first & (job.scaling == Scale.WORD),
            Load.SCALE: late[Load.SCALE],
            Load.BIAS: late[Load.BIAS],
            Load.PATCH_LANE: first & (job.patch == Patch.LANE),
            Load.ACCUMULATE: first & job.accumulate,
        }
        return Cat(bits[kind] for kind in Load)

    def _chunks(self) -> None:
        """From one chunk to the next, column block by column block."""
        m, g, job = self._m, self._g, self.job
        over, chunk = self._over, Signal.like(self._chunk)
        m.d.comb += [over.eq(self._k_left <= g.lanes), chunk.eq(Mux(over, 0, self._chunk + 1))]
        first, late = self._late_purposes(self.incoming), Signal(len(Load))
        m.d.comb += late.eq(Mux(over, self._late_purposes(job), self._late_next))
        with m.If(self.start | self.advance):
            m.d.sync += [self._late_left.eq(g.slices), self._late.eq(Mux(self.start, first, late))]
        with m.If(self.start | (self.advance & over)):
            m.d.sync += self._late_row.eq(0)
        with m.If(self.start):
            m.d.sync += [
                self._busy.eq(1),
                self._kind.eq(Load.VECTOR),
                self._pending.eq(self._purposes(self.incoming, Const(1, 1), first)),
                self._k_left.eq(self.incoming.k),
                self._n_left.eq(self.incoming.n),
                self._chunk.eq(0),
                self._block_row.eq(0),
                self._chunk_parity.eq(0),
                self._block_parity.eq(0),
            ]
            self._begin(self.incoming.src.row)
        with m.Elif(self.advance):
            m.d.sync += [
                self._busy.eq(~over | (self._n_left > g.block)),
                self._kind.eq(Load.VECTOR),
                self._pending.eq(self._purposes(job, over, late)),
                self._k_left.eq(Mux(over, job.k, self._k_left - g.lanes)),
                self._chunk.eq(chunk),
                self._chunk_parity.eq(~self._chunk_parity),
            ]
            with m.If(over):
                m.d.sync += [
                    self._n_left.eq(self._n_left - g.block),
                    self._block_row.eq(self._block_row + g.block_rows),
                    self._block_parity.eq(~self._block_parity),
                ]
            self._begin(job.src.row + self._chunk_row(chunk))

    def _describe(self) -> None:
        """What the row addressed in this cycle is for."""
        m, g, job, load, kind = self._m, self._g, self.job, self.load, self._kind
        places = {
            Load.VECTOR: job.src,
            Load.PATCH_COLUMN: job.patch_src,
            Load.SCALE_WORD: job.scale,
            Load.SCALE: job.scale,
            Load.BIAS: job.bias,
            Load.PATCH_LANE: job.patch_src,
            Load.ACCUMULATE: job.dst,
        }
        with m.Switch(kind):
            for item, place in places.items():
                with m.Case(item):
                    m.d.comb += load.word.eq(place.word)
        limit = Mux(kind == Load.PATCH_LANE, job.k, job.n)
        m.d.comb += [
            load.valid.eq(self._busy),
            load.kind.eq(kind),
            load.piece.eq(self._chunk),
            load.row.eq(self._row),
            load.vector.eq(self._vector),
            load.single.eq(job.vectors == 1),
            load.chunk.eq(self._chunk_parity),
            load.block.eq(self._block_parity),
            load.present.eq(
                Mux(kind == Load.PATCH_LANE, self._columns, minimum(m, self._k_left, g.lanes, "lanes_present"))
            ),
            load.patches.eq(job.patch_at < limit),
            load.format.eq(job.format),
            load.pc.eq(job.pc),
        ]
