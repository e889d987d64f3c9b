"""The scoreboard: which tickets an instruction must wait for, by register segment and by memory row.

Rules (docs/timing.md, "Start: hazards"). Registers: a read waits for the last writer of each segment it covers,
whatever its unit, except in the vector unit for one that it follows row by row; a write for that of another unit, or
for a reduction of its own if it is none, and for the last reader in each other unit. Memory: a matmul's fetch half
waits for older HBM stores to overlapping rows, an HBM store for the fetch halves of older matmuls with overlapping
rows, a load from DDR for the last store to its region. A reduction waits for the one before it if that has more levels
over rows, or takes squares first and this one does not.
`waits` and `fetch_waits` follow the operands in the same cycle; with `issue` the instruction's own tickets enter the
tables at the cycle's end. A table drops a ticket when it is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import or_

from amaranth.hdl import Cat, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from typebar.hw.control.checks import RANGES, REGION_BITS, VECTOR_READS, WRITTEN, range_layout, rows_layout
from typebar.hw.control.tickets import UNIT_DOMAINS, Domain, owed, ticket_bits, waits_layout, youngest
from typebar.isa.instructions import HBM_REGIONS, WRITABLE_REGIONS, Region
from typebar.isa.machine import Machine

FETCH_DOMAINS = (Domain.MEMORY,)
"""What a fetch half can wait for."""


def outstanding_stores(machine: Machine) -> int:
    """HBM stores that can have issued but not be done: those queued, and one for each write slot of a latency."""
    period = machine.hbm.rows_per_write_slot + 1
    return machine.control.queue_depth + max(machine.hbm.latency, machine.ddr.latency) // period + 3


class SegmentTable(wiring.Component):
    """Last writer, and last reader of each unit, by register segment.

    In: the segments read, written, and written `late` (one bit each; the unit may write what is not late of a younger
    instruction earlier), the issuing unit's domain (0 to 3), its ticket, `issue`, and the tickets `completed`.
    `behind`: segments that it may read before the last writer is done, if that is of its own unit and was not late.
    Out: `waits`, for each unit the youngest ticket to wait for. An instruction that issues in one cycle is seen by the
    next one's look-up. `writers` and `readers` are the state, for proofs.
    """

    def __init__(self, segments: int, bits: int, units: Sequence[Domain] = UNIT_DOMAINS) -> None:
        """Take the number of segments and the width of tickets."""
        self.segments, self.bits, self.units = segments, bits, tuple(units)
        reader = data.StructLayout({"valid": 1, "ticket": unsigned(bits)})
        writer = data.StructLayout({"valid": 1, "late": 1, "unit": range(max(len(units), 2)), "ticket": unsigned(bits)})
        self.writers = Signal(data.ArrayLayout(writer, segments))
        self.readers = Signal(data.ArrayLayout(data.ArrayLayout(reader, len(units)), segments))
        super().__init__(
            {
                "reads": In(segments),
                "writes": In(segments),
                "late": In(segments),
                "unit": In(range(max(len(units), 2))),
                "behind": In(segments),
                "ticket": In(bits),
                "issue": In(1),
                "completed": In(data.ArrayLayout(bits, len(Domain))),
                "waits": Out(waits_layout(bits, units)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """A tree of comparisons for each unit; each kept ticket is compared with `completed` in every cycle."""
        m = Module()
        candidates: dict[Domain, list[tuple[Value, Value]]] = {unit: [] for unit in self.units}
        for segment in range(self.segments):
            writer = self.writers[segment]
            own = writer.unit == self.unit
            follows = (
                (self.reads[segment] & ~(own & ~writer.late & self.behind[segment]))
                | (self.writes[segment] & ~(own & ~writer.late))
                | (self.late[segment] & ~own)
            )
            last = reduce(or_, (Mux(writer.unit == unit, self.completed[unit], 0) for unit in self.units))
            live = Signal(name=f"writer_live_{segment}")
            m.d.comb += live.eq(writer.valid & owed(writer.ticket, last[: self.bits]))
            m.d.sync += writer.valid.eq(live)
            with m.If(self.issue & (self.writes[segment] | self.late[segment])):
                m.d.sync += [writer.valid.eq(1), writer.unit.eq(self.unit), writer.ticket.eq(self.ticket)]
                m.d.sync += writer.late.eq(self.late[segment])
            for unit in self.units:
                candidates[unit].append((live & follows & (writer.unit == unit), writer.ticket))
                candidates[unit].append(self._reader(m, unit, segment))
        for unit in self.units:
            valid, ticket = youngest(m, candidates[unit], self.bits)
            name = unit.name.lower()
            m.d.comb += [self.waits[name].valid.eq(valid), self.waits[name].ticket.eq(ticket)]
        return m

    def _reader(self, m: Module, unit: Domain, segment: int) -> tuple[Value, Value]:
        """The last reader of a unit: a candidate for writers of the other units."""
        reader, live = self.readers[segment][unit], Signal(name=f"reader_live_{unit.name.lower()}_{segment}")
        m.d.comb += live.eq(reader.valid & owed(reader.ticket, self.completed[unit]))
        m.d.sync += reader.valid.eq(live)
        with m.If(self.issue & self.reads[segment] & (self.unit == unit)):
            m.d.sync += [reader.valid.eq(1), reader.ticket.eq(self.ticket)]
        return live & (self.writes[segment] | self.late[segment]) & (self.unit != unit), reader.ticket


class RowTable(wiring.Component):
    """Row ranges of instructions of one domain that are not done, in a circular buffer of `places`.

    `waits` holds the youngest ticket among those that overlap `rows`; with `issue` (and `rows.valid`) the range enters
    under `ticket`. `ready` is low when there is no place; places are enough that this does not happen. `entries` and
    `place`, the next to fill, are the state, for proofs.
    """

    def __init__(self, machine: Machine, domain: Domain, places: int, bits: int) -> None:
        """A table for a domain's ranges."""
        self.domain, self.places, self.bits, self._rows = domain, places, bits, rows_layout(machine)
        entry = data.StructLayout({"valid": 1, "rows": self._rows, "ticket": unsigned(bits)})
        self.entries, self.place = Signal(data.ArrayLayout(entry, places)), Signal(range(places))
        super().__init__(
            {
                "query": In(self._rows),
                "rows": In(self._rows),
                "ticket": In(bits),
                "issue": In(1),
                "completed": In(bits),
                "waits": Out(waits_layout(bits, (domain,))),
                "ready": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """Ranges are done in the order in which they entered, so the next place is always the oldest."""
        m = Module()
        candidates, ready = [], Signal()
        enter = self.issue & self.rows.valid
        for index in range(self.places):
            entry, live = self.entries[index], Signal(name=f"live_{index}")
            m.d.comb += live.eq(entry.valid & owed(entry.ticket, self.completed))
            m.d.sync += entry.valid.eq(live)
            with m.If(self.place == index):
                m.d.comb += ready.eq(~entry.valid)
                with m.If(enter):
                    m.d.sync += [entry.valid.eq(1), entry.rows.eq(self.rows), entry.ticket.eq(self.ticket)]
            overlap = (entry.rows.first <= self.query.last) & (entry.rows.last >= self.query.first)
            candidates.append((live & self.query.valid & overlap, entry.ticket))
        name = self.domain.name.lower()
        found, ticket = youngest(m, candidates, self.bits)
        m.d.comb += [self.waits[name].valid.eq(found), self.waits[name].ticket.eq(ticket)]
        m.d.comb += self.ready.eq(ready)
        with m.If(enter):
            m.d.sync += self.place.eq(Mux(self.place == self.places - 1, 0, self.place + 1))
        return m


class Scoreboard(wiring.Component):
    """The look-up of an issuing instruction in all tables.

    In: what `OperandChecker` says of it (`ranges`, `dst_read`, `rows`, `fetches`, `region`, `loads`, `hbm_store`),
    whether it `stores`, the `unit` (a `Domain`), its tickets, and `issue` in the cycle in which it issues. Of a vector
    instruction whether it `reduces`, to dst (`dst_reduced`) or to its second result, takes `squares` first, and has a
    function (`functional`). Out: `waits` for the unit's queue, `fetch_waits` for the fetch half's, and `ready`.
    """

    def __init__(self, machine: Machine) -> None:
        """Size the tables for a machine."""
        self.machine, self.bits = machine, ticket_bits(machine)
        super().__init__(
            {
                "ranges": In(data.StructLayout({name: range_layout(machine) for name in RANGES})),
                "dst_read": In(1),
                "rows": In(rows_layout(machine)),
                "fetches": In(1),
                "region": In(REGION_BITS),
                "loads": In(1),
                "hbm_store": In(1),
                "stores": In(1),
                "reduces": In(1),
                "dst_reduced": In(1),
                "squares": In(1),
                "functional": In(1),
                "unit": In(range(len(UNIT_DOMAINS))),
                "ticket": In(self.bits),
                "fetch_ticket": In(self.bits),
                "issue": In(1),
                "completed": In(data.ArrayLayout(self.bits, len(Domain))),
                "waits": Out(waits_layout(self.bits)),
                "fetch_waits": Out(waits_layout(self.bits, FETCH_DOMAINS)),
                "ready": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """Segment table, both row tables, and the last store of each DDR region that can be written."""
        m = Module()
        m.submodules.segments = segments = SegmentTable(self.machine.vector.segments, self.bits)
        stores_places, fetch_places = outstanding_stores(self.machine), self.machine.control.queue_depth + 1
        m.submodules.stores = stores = RowTable(self.machine, Domain.MEMORY, stores_places, self.bits)
        m.submodules.fetches = fetches = RowTable(self.machine, Domain.FETCH, fetch_places, self.bits)
        reads = [name for name in RANGES if name not in WRITTEN]
        masks = {name: self._segments(m, name) for name in RANGES}
        m.d.comb += [
            segments.reads.eq(reduce(or_, (masks[name] for name in reads)) | Mux(self.dst_read, masks["dst"], 0)),
            segments.writes.eq(Mux(self.dst_reduced, 0, masks["dst"]) | Mux(self.reduces, 0, masks["maximum"])),
            segments.late.eq(Mux(self.dst_reduced, masks["dst"], 0) | Mux(self.reduces, masks["maximum"], 0)),
            segments.unit.eq(self.unit),
            segments.behind.eq(self._behind(m, masks)),
            segments.ticket.eq(self.ticket),
            segments.issue.eq(self.issue),
            segments.completed.eq(self.completed),
            stores.issue.eq(self.issue & self.hbm_store),
            stores.ticket.eq(self.ticket),
            stores.completed.eq(self.completed[Domain.MEMORY]),
            fetches.issue.eq(self.issue & self.fetches),
            fetches.ticket.eq(self.fetch_ticket),
            fetches.completed.eq(self.completed[Domain.FETCH]),
            stores.rows.eq(self.rows),
            stores.query.eq(self.rows),
            fetches.rows.eq(self.rows),
            fetches.query.eq(self.rows),
            self.fetch_waits.eq(stores.waits),
            self.ready.eq((stores.ready | ~self.hbm_store) & (fetches.ready | ~self.fetches)),
        ]
        for domain in UNIT_DOMAINS:
            if domain not in (Domain.MEMORY, Domain.VECTOR):
                name = domain.name.lower()
                m.d.comb += self.waits[name].eq(segments.waits[name])
        # A store's awaited fetch, and a load's awaited store (younger than any writer of its registers or not).
        m.d.comb += self.waits["fetch"].valid.eq(self.hbm_store & fetches.waits["fetch"].valid)
        m.d.comb += self.waits["fetch"].ticket.eq(fetches.waits["fetch"].ticket)
        for name, other in (("memory", self._last_store(m)), ("vector", self._last_reduction(m))):
            own = segments.waits[name]
            valid, ticket = youngest(m, [(own.valid, own.ticket), other], self.bits)
            m.d.comb += [self.waits[name].valid.eq(valid), self.waits[name].ticket.eq(ticket)]
        return m

    def _segments(self, m: Module, name: str) -> Value:
        """One bit for each segment that a range covers."""
        count, item = self.machine.vector.segments, self.ranges[name]
        words = self.machine.segment_words
        mask = Signal(count, name=f"{name}_segments")
        for index in range(count):
            # The first word below the segment's end and the last not below its start.
            below = item.first < (index + 1) * words
            above = item.last >= index * words
            m.d.comb += mask[index].eq(item.valid & below & above)
        return mask

    def _behind(self, m: Module, masks: dict[str, Value]) -> Value:
        """Segments whose last writer a vector instruction's operands follow row by row, none starting elsewhere.

        That writer has more rows than its elements' latency has cycles, so that when it has left the unit its first
        row is written.
        """
        lanes, vector = self.machine.vector.lanes.bit_length() - 1, self.unit == Domain.VECTOR
        latency, function = self.machine.vector.latency, self.machine.vector.unary_latency
        first = {name: self.ranges[name].first[lanes:] for name in ("dst", *VECTOR_READS)}
        dst = self.ranges["dst"]
        rows = (dst.last - dst.first)[lanes:]
        behind = Signal(self.machine.vector.segments)
        for segment in range(self.machine.vector.segments):
            row = Signal.like(first["dst"], name=f"row_{segment}", reset_less=True)
            long = Signal(name=f"long_{segment}")
            with m.If(self.issue & masks["dst"][segment]):
                m.d.sync += row.eq(first["dst"])
                m.d.sync += long.eq(vector & (rows >= Mux(self.functional, latency + function, latency)))
            same = Cat(~masks[name][segment] | (first[name] == row) for name in VECTOR_READS)
            m.d.comb += behind[segment].eq(vector & long & same.all())
        return behind

    def _last_reduction(self, m: Module) -> tuple[Value, Value]:
        """The reduction that one of fewer levels over rows, or without its squares, waits for: the last one."""
        valid, last, live = Signal(name="reduced"), Signal(self.bits, name="reduced_ticket"), Signal()
        operand = self.ranges["a"]
        lanes = self.machine.vector.lanes.bit_length() - 1
        # The number of rows less one; a level for each of its bits.
        span = Mux(operand.valid, (operand.last - operand.first)[lanes:], 0)
        bits = len(span)
        highest, reached, squared = Signal(bits), Signal(bits), Signal()
        m.d.comb += [reached[bit].eq((span >> bit).any()) for bit in range(bits)]
        m.d.comb += live.eq(valid & owed(last, self.completed[Domain.VECTOR]))
        m.d.sync += valid.eq(live)
        with m.If(self.issue & self.reduces):
            m.d.sync += [valid.eq(1), last.eq(self.ticket), highest.eq(reached), squared.eq(self.squares)]
        return live & self.reduces & ((highest & ~reached).any() | (squared & ~self.squares)), last

    def _last_store(self, m: Module) -> tuple[Value, Value]:
        """The store that a load from DDR waits for."""
        completed, found, ticket = self.completed[Domain.MEMORY], Signal(), Signal(self.bits)
        for region in sorted(WRITABLE_REGIONS - HBM_REGIONS):
            here = self.region == int(region)
            name = Region(region).name.lower()
            valid, last, live = Signal(name=f"stored_{name}"), Signal(self.bits, name=f"stored_ticket_{name}"), Signal()
            m.d.comb += live.eq(valid & owed(last, completed))
            m.d.sync += valid.eq(live)
            with m.If(self.issue & self.stores & here):
                m.d.sync += [valid.eq(1), last.eq(self.ticket)]
            with m.If(self.loads & here):
                m.d.comb += [found.eq(live), ticket.eq(last)]
        return found, ticket
