"""The ring unit's time: how fast rows may go on a link, and how long a gather takes if all start it together."""

from __future__ import annotations

from math import gcd

from amaranth.hdl import Module, Mux, Signal, Value, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from typebar.hw.ports import file_rows
from typebar.isa.machine import MAX_DEVICES, Machine

HOP_BITS = (MAX_DEVICES // 2).bit_length()


def pace(machine: Machine) -> tuple[int, int]:
    """Cycles that a link takes for one row of the register file, as a fraction in lowest terms, 1 or more."""
    cycles, over = 32 * machine.vector.lanes * machine.clock_mhz, machine.ring.megabits_per_second
    common = gcd(cycles, over)
    return cycles // common, over // common


class Pacer(wiring.Component):
    """Spreads a block's rows over the cycles a link takes for them: row i is due in cycle ceil((i + 1) pace) - 1.

    So the last of R rows is due in cycle ceil(R pace) - 1, and the block takes `slice_cycles`. A block of no rows is
    one row, due at once. `begin` is the block's first cycle, with `rows` held until its last; a cycle with `hold` does
    not count, and `stop` gives the block up. `due`, `row` and `last` (of a due row) follow in the same cycle; `running`
    from `begin` to the last row.
    """

    def __init__(self, machine: Machine) -> None:
        """The pace of a machine's links."""
        self.cycles, self.over = pace(machine)
        self.count = range(file_rows(machine) + 1)
        super().__init__(
            {
                "begin": In(1),
                "hold": In(1),
                "stop": In(1),
                "rows": In(self.count),
                "due": Out(1),
                "row": Out(self.count),
                "last": Out(1),
                "running": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """`lead` is (cycles passed, this one included) x over - (rows, the next included) x cycles."""
        m = Module()
        kept, lead = Signal(signed(self.cycles.bit_length() + 2)), Signal(signed(self.cycles.bit_length() + 2))
        busy, kept_row = Signal(), Signal(self.count)
        first = Mux(self.rows == 0, 0, self.over - self.cycles)
        m.d.comb += [
            lead.eq(Mux(self.begin, first, kept)),
            self.row.eq(Mux(self.begin, 0, kept_row)),
            self.running.eq(self.begin | busy),
            self.due.eq(self.running & (lead >= 0)),
            self.last.eq(self.row + 1 >= self.rows),
        ]
        with m.If(self.running):
            with m.If(self.hold):
                m.d.sync += [busy.eq(1), kept.eq(lead), kept_row.eq(self.row)]
            with m.Else():
                m.d.sync += [
                    busy.eq(~(self.due & self.last)),
                    kept.eq(lead + self.over - Mux(self.due, self.cycles, 0)),
                    kept_row.eq(self.row + self.due),
                ]
        with m.If(self.stop):
            m.d.sync += busy.eq(0)
        return m


class GatherTimer(wiring.Component):
    """How long a gather takes if all devices start it together (`isa.timing.gather_cycles`), as cycles pass.

    `launch` in the gather's first cycle, of blocks that travel `hops` one way and `back` the other; `setup` is over
    `setup_latency` cycles later, `over` in the cycle before that in which such a gather is done, if it has any hops. A
    device that starts last is done sooner, and may launch the next gather before this one is over.

    What a neighbour sends is written when it has come, so rows that leave now are counted and written at once, but
    after the own ones, as seen `hop_latency` later.
    """

    def __init__(self, machine: Machine) -> None:
        """The latencies of a machine."""
        self.machine = machine
        super().__init__(
            {
                "launch": In(1),
                "hops": In(HOP_BITS),
                "back": In(HOP_BITS),
                "rows": In(range(file_rows(machine) + 1)),
                "setup": Out(1),
                "over": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """A block, `hops` times, each when the one before has left and its own first row has come; the writes."""
        m, ring = Module(), self.machine.ring
        m.submodules.pacer = pacer = Pacer(self.machine)
        wait, left, block = Signal(range(ring.setup_latency)), Signal(HOP_BITS), Signal()
        row_cycles = -(-pacer.cycles // pacer.over)
        gap = Signal(range(row_cycles + ring.hop_latency))
        m.d.comb += [
            pacer.rows.eq(self.rows),
            pacer.stop.eq(self.launch),
            pacer.begin.eq(self.setup & (gap == 0) & (left != 0) & ~block),
        ]
        with m.If(wait != 0):
            m.d.sync += wait.eq(wait - 1)
        with m.If(wait == 1):
            m.d.sync += self.setup.eq(1)
        with m.If(pacer.running):
            m.d.sync += block.eq(1)
        with m.If(pacer.due & pacer.last):
            m.d.sync += [block.eq(0), left.eq(left - 1)]
        with m.If(pacer.begin):
            m.d.sync += gap.eq(Mux(self.rows == 0, 1, row_cycles) + ring.hop_latency - 1)
        with m.Elif(gap != 0):
            m.d.sync += gap.eq(gap - 1)
        with m.If(self.launch):
            m.d.sync += [wait.eq(ring.setup_latency - 1), left.eq(self.hops), self.setup.eq(0), block.eq(0), gap.eq(0)]
        self._write(m, pacer, left, wait == 1)
        return m

    def _write(self, m: Module, pacer: Pacer, left: Signal, begins: Value) -> None:
        """Rows that have left, one or two at a time, until they are written, one a cycle; then the last one's hop."""
        hop = self.machine.ring.hop_latency
        own, waiting, travels = Signal.like(self.rows), Signal.like(self.rows), Signal(range(hop + 1))
        comes, here = Signal(2), Signal(len(waiting) + 1)
        alone = (left == 1) & (self.hops != self.back)
        m.d.comb += [
            comes.eq(Mux(pacer.due & (self.rows != 0), Mux(alone, 1, 2), 0)),
            here.eq(waiting + comes),
            self.over.eq(self.setup & (self.hops != 0) & (left == 0) & (waiting == 0) & (travels == 0)),
        ]
        m.d.sync += waiting.eq(here - ((here != 0) & (own == 0)))
        with m.If(begins):
            m.d.sync += own.eq(Mux(self.rows > hop, self.rows - hop, 0))
        with m.Elif(self.setup & (own != 0)):
            m.d.sync += own.eq(own - 1)
        with m.If(~self.setup | (left != 0) | (waiting != 0)):
            m.d.sync += travels.eq(hop)
        with m.Elif(travels != 0):
            m.d.sync += travels.eq(travels - 1)
        with m.If(self.launch):
            m.d.sync += [waiting.eq(0), travels.eq(hop)]
