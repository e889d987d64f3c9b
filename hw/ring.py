"""The ring unit: an all-gather over two links, clockwise to rank + 1 and anticlockwise to rank - 1.

Each direction has a `Sender`, which puts this device's own block and then those received on its link, and a `Receiver`,
which keeps what comes from the other neighbour until it lies in the register file and has been sent on, which begins
when a block's first row is there. Rows carry their gather's number and length. A row is sent only if the receiver has
a place for it (credits), and the receiver can hold everything that a neighbour may send before this device starts, so
that at fixed latency no sender ever waits.

A segment of the register file takes one row a cycle: the own block's first, which have `setup_latency` cycles and one
each from the start on, then those of both directions in turn, as they come.

Latency: a row that is due in cycle y is on the link in y + 1; a block whose first row the link delivers in cycle c is
sent on from c + 3 on, and by the contract the row has come then. The link between two units therefore takes
`hop_latency - PIPELINE_CYCLES` cycles, credits too.
"""

from __future__ import annotations

from amaranth.hdl import Module, Mux, Signal, Value
from amaranth.lib import stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from typebar.hw.arbiter import TurnArbiter
from typebar.hw.control.checks import DEVICE_BITS
from typebar.hw.control.core import issued_layout
from typebar.hw.control.decoder import slot
from typebar.hw.control.tickets import Domain
from typebar.hw.ports import (
    CAUSE_BITS,
    READ_CYCLES,
    activity_layout,
    completed_shape,
    deep,
    file_rows,
    link_layout,
    read_port,
    write_port,
)
from typebar.hw.ring_time import HOP_BITS, GatherTimer, Pacer, pace
from typebar.isa.instructions import TARGET_BITS
from typebar.isa.machine import MAX_DEVICES, Machine, MachineError
from typebar.isa.timing import Cause

PIPELINE_CYCLES = 3
"""Of a hop's latency, the cycles that the two units spend; the rest is the link's."""
LEAST_SETUP_CYCLES = READ_CYCLES + 2
"""From an instruction's start to its first row in a sender's memory."""
CREDIT_CYCLES = 8
"""More than the units add to two hops between a row's sending and the return of its place."""
LEAST_PLACES = MAX_DEVICES
"""Rows that a receiver holds even on the smallest register file: a gather of nothing still sends a row a block."""


def link_cycles(machine: Machine) -> int:
    """Latency of the link between two units, from the transfer out of one to the transfer into the next."""
    return machine.ring.hop_latency - PIPELINE_CYCLES


def places(machine: Machine) -> int:
    """Rows that a receiver holds, so that a sender with its rows due never waits for a place at fixed latency.

    Before its own start a device receives half the register file at most: devices // 2 blocks from one side, and
    devices + 1 lie in the file. Otherwise a place is taken for the time that a row and its credit travel, and for a
    block's more if the row waits to be sent on (from four devices: a fifth of the file at most) or for the port.
    """
    cycles, over = pace(machine)
    travelling = -(-(2 * machine.ring.hop_latency + CREDIT_CYCLES) * over // cycles)
    least = max(LEAST_PLACES, file_rows(machine) // 2, file_rows(machine) // 4 + travelling)
    return 1 << (least - 1).bit_length()


class Sender(wiring.Component):
    """Sends `hops` blocks in one direction: this device's own, then each received one when it is whole.

    `launch` starts a gather of `rows` rows, `words` words and number `sequence`, all held until `done`; the own block
    may begin once `go` is set, its rows having been written through `own_*`. `begun`: a received block may be sent on;
    `take` when it begins, `advance` for each of its rows, which `forward` holds in the cycle after, `come` whether the
    next one is there. `forwarded`: none is left to send on. `done` from the cycle after the last block on. `credit`:
    the receiver has emptied one place.

    A cycle in which the link is not ready, or a row that is due has no place or has not come, does not count as a
    block's.
    """

    def __init__(self, machine: Machine) -> None:
        """A sender of a machine."""
        self.machine = machine
        self.own_rows = max(2, min(machine.ring.buffer_words, machine.vector.words) // machine.vector.lanes)
        layout = link_layout(machine)
        self.free = Signal(range(places(machine) + 1), init=places(machine))
        super().__init__(
            {
                "launch": In(1),
                "go": In(1),
                "hops": In(HOP_BITS),
                "rows": In(range(file_rows(machine) + 1)),
                "words": In(layout["words"].shape),
                "sequence": In(layout["sequence"].shape),
                "own_enable": In(1),
                "own_row": In(range(self.own_rows)),
                "own_data": In(layout["row"].shape),
                "begun": In(1),
                "come": In(1),
                "take": Out(1),
                "advance": Out(1),
                "forward": In(layout["row"].shape),
                "forwarded": Out(1),
                "done": Out(1),
                "moves": Out(1),
                "credit": In(1),
                "link": Out(stream.Signature(layout)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """A pacer addresses the memory whose output is the link's."""
        m = Module()
        m.submodules.pacer = pacer = Pacer(self.machine)
        m.submodules.own = own = Memory(
            shape=self.own_data.shape(), depth=self.own_rows, init=[], attrs=deep(self.own_rows)
        )
        write, read = own.write_port(), own.read_port()
        left, is_own, from_own = Signal(HOP_BITS), Signal(), Signal()
        block, frozen, sends = Signal(), Signal(), Signal()
        starved = pacer.due & ((self.free == 0) | (~is_own & ~self.come))
        valid, last = Signal(), Signal()
        m.d.comb += [
            write.en.eq(self.own_enable),
            write.addr.eq(self.own_row),
            write.data.eq(self.own_data),
            frozen.eq(valid & ~self.link.ready),
            pacer.rows.eq(self.rows),
            pacer.begin.eq((left != 0) & ~block & ~frozen & Mux(is_own, self.go, self.begun)),
            pacer.hold.eq(frozen | starved),
            sends.eq(pacer.due & ~pacer.hold),
            self.take.eq(pacer.begin & ~is_own),
            self.advance.eq(sends & ~is_own),
            read.addr.eq(pacer.row),
            read.en.eq(sends & is_own),
            self.forwarded.eq((left == 0) | (is_own & (self.hops <= 1))),
            self.done.eq((left == 0) & ~frozen),
            self.moves.eq(pacer.running & ~pacer.hold),
            self.link.valid.eq(valid),
            self.link.payload.row.eq(Mux(from_own, read.data, self.forward)),
            self.link.payload.sequence.eq(self.sequence),
            self.link.payload.words.eq(self.words),
            self.link.payload.last.eq(last),
        ]
        with m.If(self.launch):
            m.d.sync += [left.eq(self.hops), is_own.eq(1)]
        with m.Elif(sends & pacer.last):
            m.d.sync += [left.eq(left - 1), is_own.eq(0)]
        with m.If(pacer.running):
            m.d.sync += block.eq(~(sends & pacer.last))
        with m.If(~frozen):
            m.d.sync += [valid.eq(sends), last.eq(pacer.last), from_own.eq(is_own)]
        m.d.sync += self.free.eq(self.free + self.credit - sends)
        return m


class Receiver(wiring.Component):
    """Keeps the rows of one direction; writes them to the register file and offers them for sending on.

    `arm` starts to write a gather's `hops` blocks of `rows` rows: the first block to `first_row`, that of device
    `first_source`, the next `rows` further down (clockwise) or up, but to `wrap_row`, that of `wrap_source`, at the
    ring's end. `wants` to write a row; if `granted`, it is written in the cycle after. `drained` once the last is
    being written. `wrong`: the row at the port has another number or length than `sequence` and `words`.

    `begun`: the first row of a block is there that the sender has not taken; `take`, `come`, `advance`, `forward`,
    `forwarded` as in `Sender`. `finish` ends the gather. `credit` for each row whose place is free again.
    """

    def __init__(self, machine: Machine, clockwise: bool) -> None:
        """A receiver of a machine; `clockwise` is the direction of travel."""
        self.machine, self.clockwise = machine, clockwise
        layout, rows = link_layout(machine), file_rows(machine)
        self.address = range(places(machine))
        super().__init__(
            {
                "link": In(stream.Signature(layout)),
                "credit": Out(1),
                "arm": In(1),
                "finish": In(1),
                "hops": In(HOP_BITS),
                "rows": In(range(rows + 1)),
                "words": In(layout["words"].shape),
                "sequence": In(layout["sequence"].shape),
                "first_row": In(range(rows)),
                "first_source": In(DEVICE_BITS),
                "wrap_row": In(range(rows)),
                "wrap_source": In(DEVICE_BITS),
                "last_source": In(DEVICE_BITS),
                "granted": In(1),
                "wants": Out(1),
                "write": Out(write_port(machine)),
                "drained": Out(1),
                "wrong": Out(1),
                "moves": Out(1),
                "begun": Out(1),
                "come": Out(1),
                "take": In(1),
                "advance": In(1),
                "forward": Out(layout["row"].shape),
                "forwarded": In(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """Four pointers chase one another: written, drained, sent on, and given back to the neighbour."""
        m = Module()
        m.submodules.buffer = buffer = Memory(
            shape=link_layout(self.machine), depth=len(self.address), init=[], attrs=deep(len(self.address))
        )
        written, drained, sent, returned = (
            Signal(len(self.address).bit_length(), name=name) for name in ("written", "drained_to", "sent", "returned")
        )
        write, read, forward = buffer.write_port(), buffer.read_port(), buffer.read_port()
        m.d.comb += [
            self.link.ready.eq(1),
            write.en.eq(self.link.valid),
            write.addr.eq(written),
            write.data.eq(self.link.payload),
            read.addr.eq(drained),
            forward.addr.eq(sent),
            forward.en.eq(self.advance),
            self.forward.eq(forward.data.row),
            self.come.eq(written != sent),
            # What is sent on no further leaves with `drained`; `sent` catches up at the gather's end.
            self.credit.eq((returned != drained) & ((returned != sent) | self.forwarded)),
        ]
        drains = self._drain(m, written != drained, read)
        m.d.sync += [
            written.eq(written + self.link.valid),
            drained.eq(drained + drains),
            returned.eq(returned + self.credit),
            sent.eq(Mux(self.finish, drained, sent + self.advance)),
        ]
        self._count_blocks(m)
        return m

    def _drain(self, m: Module, some: Value, read: wiring.PureInterface) -> Value:
        """Row by row into the register file; true in a cycle that reads the buffer."""
        left, row = Signal(HOP_BITS), Signal.like(self.rows)
        source, target = Signal(DEVICE_BITS), Signal.like(self.first_row)
        drains, valid, address = Signal(), Signal(), Signal.like(self.first_row)
        following = target - self.rows if self.clockwise else target + self.rows
        m.d.comb += [
            self.wants.eq(some & (left != 0)),
            drains.eq(self.wants & self.granted),
            read.en.eq(drains),
            self.write.address.eq(address),
            self.write.mask.eq(Mux(valid & (self.rows != 0) & ~self.wrong, (1 << self.machine.vector.lanes) - 1, 0)),
            self.write.data.eq(read.data.row),
            self.wrong.eq(valid & ((read.data.sequence != self.sequence) | (read.data.words != self.words))),
            self.drained.eq(left == 0),
            self.moves.eq(drains),
        ]
        m.d.sync += [valid.eq(drains), address.eq(target + row)]
        with m.If(self.arm):
            m.d.sync += [left.eq(self.hops), row.eq(0), source.eq(self.first_source), target.eq(self.first_row)]
        with m.Elif(drains):
            m.d.sync += row.eq(row + 1)
            with m.If(row + 1 >= self.rows):
                m.d.sync += [left.eq(left - 1), row.eq(0)]
                with m.If(source == self.last_source):
                    m.d.sync += [source.eq(self.wrap_source), target.eq(self.wrap_row)]
                with m.Else():
                    m.d.sync += [source.eq(source - 1 if self.clockwise else source + 1), target.eq(following)]
        return drains

    def _count_blocks(self, m: Module) -> None:
        """Blocks begun and not taken; a gather's last is not sent on, so its end takes it."""
        inside, first, arrived, count = Signal(), Signal(), Signal(), Signal(range(2 * MAX_DEVICES))
        with m.If(self.link.valid):
            m.d.sync += inside.eq(~self.link.payload.last)
        m.d.sync += [
            first.eq(self.link.valid & ~inside),
            arrived.eq(first),
            count.eq(count + arrived - (self.take | (self.finish & (self.hops != 0)))),
        ]
        m.d.comb += self.begun.eq(count != 0)


class RingUnit(wiring.Component):
    """The ring unit of a machine, as device `rank` of `devices` (both held from before the first gather on).

    `issued`: a transfer is a gather's start; `ready` exactly when the unit is free. `completed` is the ticket of the
    last gather done (docs/timing.md, "Ring"). The own block is read through `read` and written through `ring_ccw`,
    received ones through the port of their direction, all after the start and before `done`, one row in a cycle.

    Links: `cw_out` to rank + 1, `cw_in` from rank - 1, `ccw_out` to rank - 1, `ccw_in` from rank + 1. `*_out_credit`
    is set for a cycle for every place that the receiver of `*_out` has emptied; `*_in_credit` is that receiver's side.
    The incoming links are always ready.

    `mismatch` with `mismatch_pc`: a neighbour's row is another gather's, or the same one's with another length; the
    unit then stays busy until reset. `waiting`: nothing moves until a neighbour or a link does.
    """

    def __init__(self, machine: Machine) -> None:
        """Take a machine.

        Raises:
            MachineError: a latency is shorter than the unit's pipeline, or a link faster than a row a cycle.
        """
        ring = machine.ring
        for key, least in (("setup_latency", LEAST_SETUP_CYCLES), ("hop_latency", PIPELINE_CYCLES + 1)):
            if getattr(ring, key) < least:
                raise MachineError(
                    f"{machine.name}: ring.{key} = {getattr(ring, key)} is faster than the hardware's pipeline:"
                    f" set it to {least} or more"
                )
        most = 32 * machine.vector.lanes * machine.clock_mhz
        if ring.megabits_per_second > most:
            raise MachineError(
                f"{machine.name}: ring.megabits_per_second = {ring.megabits_per_second} is faster than one row of the"
                f" register file a cycle: set it to {most} or less"
            )
        self.machine = machine
        link = stream.Signature(link_layout(machine))
        super().__init__(
            {
                "issued": In(stream.Signature(issued_layout(machine, Domain.RING))),
                "waited": In(CAUSE_BITS),
                "rank": In(DEVICE_BITS),
                "devices": In(DEVICE_BITS),
                "completed": Out(completed_shape(machine)),
                "read": Out(read_port(machine)),
                "ring_cw": Out(write_port(machine)),
                "ring_ccw": Out(write_port(machine)),
                "cw_out": Out(link),
                "cw_out_credit": In(1),
                "cw_in": In(link),
                "cw_in_credit": Out(1),
                "ccw_out": Out(link),
                "ccw_out_credit": In(1),
                "ccw_in": In(link),
                "ccw_in_credit": Out(1),
                "mismatch": Out(1),
                "mismatch_pc": Out(TARGET_BITS),
                "waiting": Out(1),
                "activity": Out(activity_layout()),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """The instruction in progress, its timers, and the two directions."""
        self._m = m = Module()
        rows = file_rows(self.machine)
        self._busy, self._start, self._finish, self._armed = Signal(), Signal(), Signal(), Signal()
        self._words = Signal(link_layout(self.machine)["words"].shape)
        self._rows, self._dst = Signal(range(rows + 1)), Signal(range(rows))
        self._own, self._top = (Signal(range(rows + 1), name=n) for n in ("own", "top"))
        self._sequence, self._hops = Signal(8), (Signal(HOP_BITS), Signal(HOP_BITS))
        m.submodules.timer = self._timer = timer = GatherTimer(self.machine)
        m.d.comb += [
            self._hops[0].eq(self.devices >> 1),
            self._hops[1].eq((self.devices - 1) >> 1),
            timer.launch.eq(self._start),
            timer.hops.eq(self._hops[0]),
            timer.back.eq(self._hops[1]),
            timer.rows.eq(self._rows),
        ]
        self._instruction()
        own = self._read_own()
        m.submodules.arbiter = arbiter = TurnArbiter()
        m.d.comb += arbiter.urgent.eq(self._own_follows)
        for index, name in enumerate(("cw", "ccw")):
            m.submodules[f"{name}_sender"] = sender = Sender(self.machine)
            m.submodules[f"{name}_receiver"] = receiver = Receiver(self.machine, clockwise=index == 0)
            self._direction(index, name, sender, receiver)
            self._feed(index, sender, receiver, own)
            m.d.comb += [
                # The rows of empty blocks are not written.
                arbiter.requests[index].eq(receiver.wants & self._open & (self._rows != 0)),
                receiver.granted.eq(arbiter.grants[index] | (self._rows == 0)),
            ]
        return m

    # The instruction -----------------------------------------------------------------------------------
    def _instruction(self) -> None:
        """Registers of the gather in progress; when it is done; what the counters and the watchdog see."""
        m, shift = self._m, self.machine.vector.lanes.bit_length() - 1
        values = self.issued.payload["values"]
        pc, ticket = Signal(TARGET_BITS), Signal.like(self.completed)
        stage, port_time = Signal(2), Signal(range(file_rows(self.machine) + self.machine.ring.setup_latency + 1))
        over, written, skew = Signal(), Signal(), Signal()
        self._wrong, self._idle = Signal(2), Signal(6)
        m.d.comb += [
            self.issued.ready.eq(~self._busy),
            self._start.eq(self.issued.valid & self.issued.ready),
            over.eq(self._armed & (port_time == 0)),
            self._finish.eq(self._busy & written & self._idle[:2].all() & ~self._wrong.any() & ~self.mismatch),
            self.waiting.eq(self._busy & over & ~self._finish & self._idle[4:].all()),
            self.mismatch_pc.eq(pc),
            self.activity.active.eq(self._start | self._busy),
            self.activity.cause.eq(Mux(skew, Cause.SKEW, Cause.TRANSFER)),
            self.activity.waited.eq(self.waited),
        ]
        with m.If(self._start):
            m.d.sync += [
                self._words.eq(values[slot("gather", "n")]),
                self._rows.eq(values[slot("gather", "n")] >> shift),
                self._dst.eq(values[slot("gather", "dst")] >> shift),
            ]
            m.d.sync += [self._busy.eq(1), pc.eq(self.issued.payload.pc), ticket.eq(self.issued.payload.ticket)]
        m.d.sync += [
            stage.eq((stage << 1) | self._start),
            self._own.eq(self._dst + self.rank * self._rows),
            self._top.eq(self._dst + (self.devices - 1) * self._rows),
            written.eq(over & self._idle[2:4].all() & ~self._finish),
        ]
        with m.If(stage[1]):
            # The own rows enter the register file first, one a cycle from the setup's end.
            m.d.sync += [self._armed.eq(1), port_time.eq(self._rows + (self.machine.ring.setup_latency - 4))]
        with m.Elif(port_time != 0):
            m.d.sync += port_time.eq(port_time - 1)
        with m.If(self._busy & self._timer.over):
            m.d.sync += skew.eq(1)
        with m.If(self._busy & self._wrong.any()):
            m.d.sync += self.mismatch.eq(1)
        with m.If(self._finish):
            m.d.sync += [self._busy.eq(0), self._armed.eq(0), skew.eq(0)]
            m.d.sync += [self.completed.eq(ticket), self._sequence.eq(self._sequence + 1)]
        self._arm, self._open = stage[1], over

    def _read_own(self) -> tuple[Signal, Signal]:
        """Read the own block, a row a cycle from the start on; when a row is on `read.data`, and which."""
        m, shift = self._m, self.machine.vector.lanes.bit_length() - 1
        row = Signal.like(self._rows)
        base = Signal(range(file_rows(self.machine)))
        reads: Value = self._busy & (row != self._rows)
        valid, number = [reads], [row]
        for cycle in range(READ_CYCLES):
            valid.append(Signal(name=f"own_valid_{cycle + 1}"))
            number.append(Signal.like(row, name=f"own_row_{cycle + 1}"))
            m.d.sync += [valid[-1].eq(valid[-2]), number[-1].eq(number[-2])]
        m.d.comb += self.read.address.eq(base + row)
        with m.If(self._start):
            m.d.sync += [row.eq(0), base.eq(self.issued.payload["values"][slot("gather", "a")] >> shift)]
        with m.Elif(reads):
            m.d.sync += row.eq(row + 1)
        self._own_follows = valid[-2]
        return valid[-1], number[-1]

    # The directions ------------------------------------------------------------------------------------
    def _direction(self, index: int, name: str, sender: Sender, receiver: Receiver) -> None:
        """Join a sender and a receiver to the links, to one another and to the instruction."""
        m, clockwise = self._m, index == 0
        wiring.connect(m, sender.link, wiring.flipped(getattr(self, f"{name}_out")))
        wiring.connect(m, receiver.link, wiring.flipped(getattr(self, f"{name}_in")))
        last = self.devices - 1
        at_end = self.rank == (0 if clockwise else last)
        step = self._own - self._rows if clockwise else self._own + self._rows
        wrap_row, wrap_source = (self._top, last) if clockwise else (self._dst, 0)
        following = self.rank - 1 if clockwise else self.rank + 1
        for part in (sender, receiver):
            m.d.comb += [
                part.hops.eq(self._hops[index]),
                part.rows.eq(self._rows),
                part.words.eq(self._words),
                part.sequence.eq(self._sequence),
            ]
        m.d.comb += [
            sender.launch.eq(self._start),
            sender.go.eq(self._timer.setup),
            sender.credit.eq(getattr(self, f"{name}_out_credit")),
            getattr(self, f"{name}_in_credit").eq(receiver.credit),
            sender.begun.eq(receiver.begun),
            sender.come.eq(receiver.come),
            sender.forward.eq(receiver.forward),
            receiver.take.eq(sender.take),
            receiver.advance.eq(sender.advance),
            receiver.forwarded.eq(sender.forwarded),
            receiver.arm.eq(self._arm),
            receiver.finish.eq(self._finish),
            receiver.first_row.eq(Mux(at_end, wrap_row, step)),
            receiver.first_source.eq(Mux(at_end, wrap_source, following)),
            receiver.wrap_row.eq(wrap_row),
            receiver.wrap_source.eq(wrap_source),
            receiver.last_source.eq(0 if clockwise else last),
            self._wrong[index].eq(receiver.wrong),
            self._idle[index].eq(sender.done),
            self._idle[index + 2].eq(receiver.drained),
            self._idle[index + 4].eq(~(sender.moves | receiver.moves)),
        ]

    def _feed(self, index: int, sender: Sender, receiver: Receiver, own: tuple[Signal, Signal]) -> None:
        """Give a sender the own block, and a receiver its write port."""
        m, (valid, number) = self._m, own
        port = (self.ring_cw, self.ring_ccw)[index]
        m.d.comb += [
            sender.own_enable.eq(valid),
            sender.own_row.eq(number),
            sender.own_data.eq(self.read.data),
            port.address.eq(receiver.write.address),
            port.mask.eq(receiver.write.mask),
            port.data.eq(receiver.write.data),
        ]
        if port is self.ring_ccw:
            with m.If(valid):
                m.d.comb += [
                    port.address.eq(self._own + number),
                    port.mask.eq((1 << self.machine.vector.lanes) - 1),
                    port.data.eq(self.read.data),
                ]
