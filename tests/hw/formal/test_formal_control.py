"""Proofs of the queue and the scoreboard, on small parameters (what they prove does not depend on the widths)."""

from __future__ import annotations

from pathlib import Path

import pytest
from amaranth.hdl import Assert, Assume, Cat, Const, Module, Mux, ResetSignal, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In

from typebar.hw.control.checks import rows_layout
from typebar.hw.control.queue import TicketQueue
from typebar.hw.control.scoreboard import RowTable, SegmentTable
from typebar.hw.control.tickets import Domain, owed, waits_layout
from typebar.isa.machine import Machine
from typebar.tests.hw.formal.prove import run_sby

UNITS = (Domain.MATRIX, Domain.VECTOR)


class QueueHarness(wiring.Component):
    """The queue beside a naive one: a shift register whose first entry is the oldest."""

    def __init__(self, depth: int, bits: int = 2, plant: bool = False) -> None:
        self.dut, self.depth, self.bits, self.plant = TicketQueue(3, depth, bits, UNITS), depth, bits, plant
        super().__init__(
            {
                "push": In(1),
                "payload": In(3),
                "waits": In(waits_layout(bits, UNITS)),
                "ready": In(1),
                "completed": In(data.ArrayLayout(bits, len(Domain))),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        dut, depth = self.dut, self.depth
        reads = [dut.memory.read_port(domain="comb") for _ in range(depth)]
        m.submodules.dut = dut
        m.d.comb += [
            dut.i.valid.eq(self.push),
            dut.i.payload.eq(self.payload),
            dut.waits.eq(self.waits),
            dut.o.ready.eq(self.ready),
            dut.completed.eq(self.completed),
        ]
        layout = data.StructLayout({"payload": 3, "waits": waits_layout(self.bits, UNITS)})
        entries = [Signal(layout, name=f"entry_{index}") for index in range(depth)]
        count = Signal(range(depth + 1))
        new = Signal(layout)
        m.d.comb += [new["payload"].eq(self.payload), new["waits"].eq(self.waits)]
        aged = []
        for index, entry in enumerate(entries):
            later = Signal(layout, name=f"aged_{index}")
            m.d.comb += later.eq(entry)
            for unit in UNITS:
                wait = entry["waits"][unit.name.lower()]
                still = wait.valid & owed(wait.ticket, self.completed[unit])
                m.d.comb += later["waits"][unit.name.lower()].valid.eq(still)
            aged.append(later)
        free = ~Cat(aged[0]["waits"][unit.name.lower()].valid for unit in UNITS).any()
        valid = (count != 0) & free
        pop = valid & self.ready
        ready = (count != depth) | (pop if not self.plant else 0)
        push = self.push & ready
        place = count - pop
        for index in range(depth):
            shifted = Mux(pop, aged[index + 1], aged[index]) if index + 1 < depth else aged[index]
            m.d.sync += entries[index].eq(Mux(push & (place == index), new, shifted))
        m.d.sync += count.eq(count + push - pop)
        m.d.comb += [
            Assume(~ResetSignal()),
            Assert(dut.o.valid == valid),
            Assert(dut.i.ready == ready),
            Assert(dut.level == count),
            Assert(~valid | (dut.o.payload == entries[0]["payload"])),
        ]
        self._invariants(m, entries, count, reads)
        return m

    def _invariants(self, m: Module, entries: list[Signal], count: Signal, reads: list[wiring.PureInterface]) -> None:
        """Where the queue keeps each entry: what induction needs."""
        dut, depth = self.dut, self.depth
        m.d.comb += [Assert(dut.head < depth), Assert(dut.tail < depth), Assert(count <= depth)]
        m.d.comb += Assert((dut.head + count) % depth == dut.tail)
        for index, (entry, read) in enumerate(zip(entries, reads, strict=True)):
            place = Signal(range(depth), name=f"place_{index}")
            stored = data.View(waits_layout(self.bits, UNITS), _pick(dut, place))
            m.d.comb += [place.eq((dut.head + index) % depth), read.addr.eq(place)]
            same = (read.data == entry["payload"]) & (stored.as_value() == entry["waits"].as_value())
            m.d.comb += Assert((count <= index) | same)


def _pick(dut: TicketQueue, place: Signal) -> Value:
    """The tickets at a place."""
    value: Value = Const(0, dut.stored.as_value().shape().width // dut.depth)
    for index in range(dut.depth):
        value = Mux(place == index, dut.stored[index].as_value(), value)
    return value


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_queue_is_a_naive_queue_for_ever(tmp_path: Path, depth: int) -> None:
    assert run_sby(QueueHarness(depth), tmp_path, "prove", 3) == "PASS"


def test_a_queue_without_the_full_case_is_told_apart(tmp_path: Path) -> None:
    assert run_sby(QueueHarness(2, plant=True), tmp_path, "bmc", 6) == "FAIL"


RUNNING, BITS = 1, 3
"""A unit runs one instruction at a time; with a queue of two, four tickets can be in use, half of those there are."""


class ScoreboardHarness(wiring.Component):
    """Segment table and a queue for each of two units; an environment issues, starts and completes at will.

    One instruction, a, is chosen freely. The claim: no younger instruction starts before a is done if the two touch a
    segment that one of them writes. If they are of one unit, only if a writes and the younger reads, or if a writes it
    late and the younger does not (not only): within a unit order is enough. Nor need it wait to read `behind` a result
    of its own unit that is not late.

    Induction needs to know why: the table leads from a segment to a, or to a queued instruction that conflicts with a
    as well and so cannot have started either; and whatever conflicts with a waits for one of these, or behind one.
    """

    def __init__(self, segments: int, places: int, plant: str = "") -> None:
        self.segments, self.places, self.plant = segments, places, plant
        touched = {"ticket": BITS} | dict.fromkeys(("reads", "writes", "late", "behind"), segments)
        # What the queues carry for the proof: the instruction, and whether it is younger than a.
        self.ghost = data.StructLayout({**touched, "after": 1})
        self.chosen = data.StructLayout({**touched, "known": 1, "unit": 1})
        self.table = SegmentTable(segments, BITS, UNITS)
        self.queues = [TicketQueue(self.ghost, places, BITS, UNITS) for _ in UNITS]
        self.ports = [[queue.memory.read_port(domain="comb") for _ in range(places)] for queue in self.queues]
        super().__init__(
            {
                "issue": In(1),
                "unit": In(1),
                "late": In(segments),
                "behind": In(segments),
                "reads": In(segments),
                "writes": In(segments),
                "choose": In(1),
                "ready": In(len(UNITS)),
                "finish": In(data.ArrayLayout(2, len(UNITS))),
            }
        )

    def elaborate(self, platform: object) -> Module:
        self._m = m = Module()
        self._issued = [Signal(BITS, name=f"issued_{unit}") for unit in range(2)]
        self._done = [Signal(BITS, name=f"done_{unit}") for unit in range(2)]
        self._before = [Signal(BITS, name=f"before_{unit}") for unit in range(2)]
        self._a, self._covered = Signal(self.chosen), Signal()
        table, room, issue = self.table, Signal(), Signal()
        m.submodules.table = table
        m.d.comb += [
            Assume(~ResetSignal()),
            issue.eq(self.issue & room),
            table.reads.eq(self.reads if self.plant != "reads" else 0),
            table.writes.eq(self.writes if self.plant != "late" else 0),
            table.unit.eq(self.unit),
            table.behind.eq(self.behind if self.plant != "behind" else self.reads),
            table.late.eq(self.late if self.plant != "late" else self.late | self.writes),
            table.issue.eq(issue),
        ]
        for unit in range(2):
            self._unit(unit, room, issue)
        self._choose(issue)
        self._entries_of = [self._entries(unit) for unit in range(2)]
        self._tickets()
        self._claim()
        return m

    def _unit(self, unit: int, room: Signal, issue: Signal) -> None:
        """A unit's queue, and the environment that starts and completes its instructions in order."""
        m, queue, table = self._m, self.queues[unit], self.table
        m.submodules[f"queue_{unit}"] = queue
        last, complete, active = self._issued[unit], self._done[unit], Signal(range(RUNNING + 1), name=f"active_{unit}")
        starts, here, finish = queue.o.valid & queue.o.ready, self.unit == unit, self.finish[unit]
        with m.If(here):
            m.d.comb += [room.eq(queue.i.ready), table.ticket.eq(last + 1)]
        payload = queue.i.payload
        m.d.comb += [
            queue.i.valid.eq(issue & here),
            payload.ticket.eq(last + 1),
            payload.reads.eq(self.reads),
            payload.writes.eq(self.writes),
            payload.late.eq(self.late),
            payload.behind.eq(self.behind),
            payload.after.eq(self._a.known),
            queue.waits.eq(table.waits),
            queue.o.ready.eq(self.ready[unit] & (active != RUNNING)),
            Assume(finish <= active),
            Assert(active <= RUNNING),
            Assert((last - complete)[:BITS] == queue.level + active),
            Assert((complete - self._before[unit])[:BITS] <= RUNNING),
            Assert((last - self._before[unit])[:BITS] <= self.places + 2 * RUNNING),
        ]
        m.d.sync += [
            last.eq(last + (issue & here)),
            complete.eq(complete + finish),
            self._before[unit].eq(complete),
            active.eq(active + starts - finish),
        ]
        for item in (table, *self.queues):
            m.d.comb += item.completed[unit].eq(complete if self.plant != "completed" else complete + 1)

    def _choose(self, issue: Signal) -> None:
        """a is any instruction; done once, done for ever."""
        m, a, known_done = self._m, self._a, Signal()
        with m.If(issue & self.choose & ~a.known):
            m.d.sync += [a.known.eq(1), a.unit.eq(self.unit), a.reads.eq(self.reads), a.writes.eq(self.writes)]
            m.d.sync += [a.ticket.eq(self.table.ticket), a.late.eq(self.late)]
        owes = owed(a.ticket, Mux(a.unit, self._done[1], self._done[0]))
        m.d.comb += self._covered.eq(~a.known | known_done | ~owes)
        m.d.sync += known_done.eq(a.known & self._covered)
        m.d.comb += Assert(~(a.known & ~known_done) | self._recent(a.unit, a.ticket))

    def _recent(self, unit: Value, ticket: Value) -> Value:
        """Issued, and not done in the cycle before the last."""
        issued, before = Mux(unit, self._issued[1], self._issued[0]), Mux(unit, self._before[1], self._before[0])
        return self._age(unit, ticket) < (issued - before)[:BITS]

    def _age(self, unit: Value, ticket: Value) -> Value:
        """Instructions of a unit issued after the one with a ticket."""
        return (Mux(unit, self._issued[1], self._issued[0]) - ticket)[:BITS]

    def _entries(self, unit: int) -> list[tuple[Value, data.View, data.View]]:
        """For each place from the head: whether taken, its ghost, its tickets."""
        m, queue, entries = self._m, self.queues[unit], []
        for index, port in enumerate(self.ports[unit]):
            place = Signal(range(self.places), name=f"place_{unit}_{index}")
            m.d.comb += [place.eq((queue.head + index) % self.places), port.addr.eq(place)]
            stored = data.View(waits_layout(BITS, UNITS), _pick(queue, place))
            entries.append((queue.level > index, data.View(self.ghost, port.data), stored))
        return entries

    def _conflict(self, unit: int, item: data.View) -> Value:
        """Whether an instruction is younger than a and must wait for it."""
        a = self._a
        other = a.unit != unit
        followed = item.behind & ~a.late & ~other.replicate(self.segments)
        after_write = ((a.writes | a.late) & item.reads & ~followed).any() | (a.late & item.writes).any()
        after_any = ((a.reads | a.writes | a.late) & (item.writes | item.late)).any() & other
        return item.after & (after_write | after_any)

    def _tickets(self) -> None:
        """All tickets anywhere are recent; queued instructions have consecutive ones; queues are well formed."""
        m = self._m
        for unit in range(2):
            queue = self.queues[unit]
            m.d.comb += [
                Assert((queue.head + queue.level) % self.places == queue.tail),
                Assert(queue.level <= self.places),
            ]
            for index, (taken, ghost, waits) in enumerate(self._entries_of[unit]):
                expected = (self._issued[unit] - (queue.level - 1 - index))[:BITS]
                m.d.comb += Assert(~taken | (ghost.ticket == expected))
                m.d.comb += Assert(~(taken & ghost.after) | self._a.known)
                # Younger than a: in a's own unit that shows in the tickets.
                mine = self._a.known & ~self._covered & (self._a.unit == unit)
                younger = self._age(Const(unit, 1), ghost.ticket) < self._age(self._a.unit, self._a.ticket)
                m.d.comb += Assert(~(taken & mine) | (ghost.after == younger))
                for other, domain in enumerate(UNITS):
                    wait = waits[domain.name.lower()]
                    m.d.comb += Assert(~(taken & wait.valid) | self._recent(Const(other, 1), wait.ticket))
        for segment in range(self.segments):
            writer = self.table.writers[segment]
            m.d.comb += Assert(~writer.valid | self._recent(writer.unit, writer.ticket))
            for unit in range(2):
                reader = self.table.readers[segment][unit]
                m.d.comb += Assert(~reader.valid | self._recent(Const(unit, 1), reader.ticket))

    def _leads(self, unit: int, ticket: Value) -> Value:
        """Whether that ticket's completion implies a's: it is a's or a later one of its unit, or one not before a
        queued instruction that must itself wait for a."""
        const = Const(unit, 1)
        found = (self._a.unit == unit) & (self._age(const, ticket) <= self._age(const, self._a.ticket))
        return found | self._behind(unit, ticket)

    def _behind(self, unit: int, ticket: Value) -> Value:
        """Whether that ticket is not before a queued instruction of its unit that must itself wait for a."""
        const, found = Const(unit, 1), Const(0, 1)
        for taken, ghost, _ in self._entries_of[unit]:
            not_before = self._age(const, ticket) <= self._age(const, ghost.ticket)
            found = found | (taken & self._conflict(unit, ghost) & not_before)
        return found

    def _claim(self) -> None:
        m, a = self._m, self._a
        live = ~self._covered
        for segment in range(self.segments):
            writer = self.table.writers[segment]
            leads = Mux(writer.unit, self._leads(1, writer.ticket), self._leads(0, writer.ticket))
            m.d.comb += Assert(~(live & (a.writes | a.late)[segment]) | (writer.valid & leads))
            # After a late a, a writer of its unit that is not late is queued, or behind one that is and waits for a.
            ordered = (writer.unit == a.unit) & ~writer.late
            behind = Mux(writer.unit, self._behind(1, writer.ticket), self._behind(0, writer.ticket))
            m.d.comb += Assert(~(live & a.late[segment] & ordered) | behind)
            for unit in range(2):
                reader = self.table.readers[segment][unit]
                recent = self._age(Const(unit, 1), reader.ticket) <= self._age(Const(unit, 1), a.ticket)
                m.d.comb += Assert(~(live & a.reads[segment] & (a.unit == unit)) | (reader.valid & recent))
        for unit in range(2):
            held: Value = Const(0, 1)
            for taken, ghost, waits in self._entries_of[unit]:
                why = [waits[item.name.lower()] for item in UNITS]
                waiting = Cat(wait.valid & self._leads(other, wait.ticket) for other, wait in enumerate(why)).any()
                m.d.comb += Assert(~(live & taken & self._conflict(unit, ghost)) | waiting | held)
                held = held | (taken & self._conflict(unit, ghost))
            queue = self.queues[unit]
            starts = queue.o.valid & queue.o.ready
            m.d.comb += Assert(~(starts & live & self._conflict(unit, queue.o.payload)))


@pytest.mark.parametrize(("segments", "places"), [(1, 1), (2, 1), pytest.param(1, 2, marks=pytest.mark.long)], ids=str)
def test_scoreboard_never_lets_a_hazard_through(tmp_path: Path, segments: int, places: int) -> None:
    assert run_sby(ScoreboardHarness(segments, places), tmp_path, "prove", 1) == "PASS"


@pytest.mark.parametrize("plant", ["reads", "completed", "late", "behind"])
def test_a_broken_scoreboard_is_caught(tmp_path: Path, plant: str) -> None:
    assert run_sby(ScoreboardHarness(1, 1, plant), tmp_path, "bmc", 9) == "FAIL"


class RowTableHarness(wiring.Component):
    """The row table, entered and completed at will; a is any range in it.

    The claims: until a is done, whoever overlaps it is told a ticket not older than a's; after that, a is forgotten.
    """

    PLACES, BITS = 3, 4

    def __init__(self, plant: bool = False) -> None:
        self.plant = plant
        machine = Machine.load("tiny")
        self.layout = rows_layout(machine)
        self.dut = RowTable(machine, Domain.MEMORY, self.PLACES, self.BITS)
        ports = {"issue": 1, "rows": self.layout, "query": self.layout, "choose": 1, "finish": 2}
        super().__init__({name: In(shape) for name, shape in ports.items()})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.dut = dut = self.dut
        issued, done, before = Signal(self.BITS), Signal(self.BITS), Signal(self.BITS)
        issue = self.issue & dut.ready & ((issued - before)[: self.BITS] < 6)
        entry = data.StructLayout({"known": 1, "rows": self.layout, "ticket": self.BITS, "place": range(self.PLACES)})
        a, was_done = Signal(entry), Signal()
        with m.If(issue & self.rows.valid & self.choose & ~a.known):
            m.d.sync += [a.known.eq(1), a.rows.eq(self.rows), a.ticket.eq(issued + 1), a.place.eq(dut.place)]
        covered = ~a.known | was_done | ~owed(a.ticket, done)
        m.d.comb += [
            Assume(~ResetSignal()),
            Assume(self.finish <= (issued - done)[: self.BITS]),
            dut.issue.eq(issue),
            dut.rows.eq(self.rows),
            dut.query.eq(self.query),
            dut.ticket.eq(issued + 1),
            dut.completed.eq(done),
        ]
        m.d.sync += [
            was_done.eq(a.known & covered),
            issued.eq(issued + issue),
            done.eq(done + self.finish),
            before.eq(done),
        ]

        def age(ticket: Value) -> Value:
            return (issued - ticket)[: self.BITS]

        limit = age(before)
        m.d.comb += [Assert(age(done) <= limit), Assert(limit <= 6), Assert(dut.place < self.PLACES)]
        for index in range(self.PLACES):
            item = dut.entries[index]
            m.d.comb += Assert(~item.valid | (age(item.ticket) < limit))
            held = item.valid & (item.rows.as_value() == a.rows.as_value()) & (item.ticket == a.ticket)
            m.d.comb += Assert(covered | (a.place != index) | held)
        m.d.comb += [Assert(covered | (age(a.ticket) < limit)), Assert(covered | (a.place < self.PLACES))]
        reach = (self.query.last >= a.rows.first) & (self.query.first <= a.rows.last) & self.query.valid
        if self.plant:
            reach = reach | self.query.valid
        told = dut.waits.memory.valid & (age(dut.waits.memory.ticket) <= age(a.ticket))
        m.d.comb += Assert(covered | ~reach | told)
        m.d.comb += Assert(~dut.waits.memory.valid | owed(dut.waits.memory.ticket, done))
        return m


def test_row_table_never_forgets_a_range(tmp_path: Path) -> None:
    assert run_sby(RowTableHarness(), tmp_path, "prove", 1) == "PASS"


def test_a_row_table_claim_too_strong_is_refuted(tmp_path: Path) -> None:
    assert run_sby(RowTableHarness(plant=True), tmp_path, "bmc", 4) == "FAIL"
