"""The fetch engine: asks HBM for the rows of packed matrices, ahead of their use, and keeps them in a FIFO.

Contract (docs/timing.md, "Matrix unit and fetch engine"): a transfer on `fetch` in cycle s is the fetch start. Row r is
requested at f(r), the first fetch slot at or after max(f(r-1) + 1, s, free(r - fifo_rows) + 1), later by as many cycles
as a channel keeps it waiting; it can be used from f(r) + `hbm.latency` on.

The hardware presents row r on all channels in cycle f(r) + REQUEST_CYCLES, so f(r) is the cycle before the last channel
took it. A row whose last channel's R is taken in cycle c counts in `arrived` from c + ARRIVAL_CYCLES on: a memory keeps
the contract if it answers `hbm.latency` - REQUEST_CYCLES - ARRIVAL_CYCLES cycles after its AR is taken.
Every request has its place in the FIFO, so R is always ready, and channels may run apart.
"""

from __future__ import annotations

from typing import Any

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from typebar.hw.control.core import issued_layout
from typebar.hw.control.decoder import modifier, slot
from typebar.hw.control.tickets import Domain
from typebar.hw.ports import CAUSE_BITS, activity_layout, axi_read, completed_shape, deep
from typebar.hw.replicate import Shared
from typebar.isa.checks import MAX_DOT_LENGTH
from typebar.isa.instructions import FORMAT_BYTES, HBM_REGIONS, TARGET_BITS, Format
from typebar.isa.machine import Machine, MachineError
from typebar.isa.timing import Cause

REQUEST_CYCLES = 1
"""From a row's request, by the contract, to the cycle in which it shows on the AR channels."""
ARRIVAL_CYCLES = 2
"""From the handshake of a row's last R to the first cycle in which `arrived` counts it."""
LEAST_LATENCY = REQUEST_CYCLES + 1 + ARRIVAL_CYCLES
"""The least `hbm.latency` with which the contract can be kept: the memory answers a cycle after it was asked."""
FIFO_READ_CYCLES = 2
"""From the cycle in which a `place` is presented to the one in which its rows are there."""
ARRIVED_BITS = 16
_SIZES = tuple(sorted(set(FORMAT_BYTES.values())))


def port_rows(machine: Machine) -> int:
    """Rows that the FIFO's read port gives in a cycle."""
    return max(1, machine.matrix.fifo_port_bytes // machine.row_bytes)


def most_freed(machine: Machine) -> int:
    """Most rows that one step of the matrix unit can free."""
    tile = machine.matrix.columns * machine.matrix.lanes
    return max(max(1, machine.fold(1, size) * tile * size // machine.row_bytes) for size in _SIZES)


def hbm_row_bits(machine: Machine) -> int:
    """Width of a row's number in HBM."""
    return max(1, (machine.hbm.capacity_bytes // machine.row_bytes - 1).bit_length())


def hbm_address_bits(machine: Machine) -> int:
    """Width of a byte address on one HBM channel."""
    return hbm_row_bits(machine) + machine.hbm.channel_bytes.bit_length() - 1


class FetchLane(wiring.Component):
    """One HBM channel's share: its AR handshake, and its part of every row in the FIFO.

    `ask` presents AR from the next cycle on; `taken` if none waits, or it is taken in this cycle. `present` if the
    channel has delivered more rows than `advance` has counted (`ahead` of them). Rows lie in `banks` by their number
    modulo the number of banks; `address` has each bank's, `first` is the bank of the first row of `data`,
    FIFO_READ_CYCLES later. `error` in the cycle after a bad response. `memories`, `bank`, `place`, `valid` and `word`
    are the state, for proofs.
    """

    def __init__(self, rows: int, banks: int, bits: int) -> None:
        """A FIFO of `rows`, a multiple of `banks` (a power of two), of `bits` of this channel."""
        self.rows, self.banks, self.bits, self.depth = rows, banks, bits, rows // banks
        self.memories = [Memory(shape=bits, depth=self.depth, init=[], attrs=deep(self.depth)) for _ in range(banks)]
        self.ahead = Signal(range(rows + 1))
        self.bank, self.place = Signal(range(max(2, banks))), Signal(range(max(2, self.depth)))
        self.valid, self.word = Signal(), Signal(bits)
        super().__init__(
            {
                "ask": In(1),
                "taken": Out(1),
                "ar_valid": Out(1),
                "ar_ready": In(1),
                "r_valid": In(1),
                "r_data": In(bits),
                "r_resp": In(2),
                "error": Out(1),
                "present": Out(1),
                "advance": In(1),
                "address": In(len(self.place) * banks),
                "first": In(range(max(2, banks))),
                "data": Out(bits * banks),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """R goes through a register into the bank whose turn it is."""
        m = Module()
        bank, place = self.bank, self.place
        m.d.comb += [self.taken.eq(~self.ar_valid | self.ar_ready), self.present.eq(self.ahead != 0)]
        m.d.sync += [
            self.ar_valid.eq(self.ask | ~self.taken),
            self.ahead.eq(self.ahead + self.r_valid - self.advance),
            self.valid.eq(self.r_valid),
            self.word.eq(self.r_data),
            self.error.eq(self.r_valid & (self.r_resp != 0)),
        ]
        with m.If(self.valid):
            m.d.sync += bank.eq(Mux(bank == self.banks - 1, 0, bank + 1))
            with m.If(bank == self.banks - 1):
                m.d.sync += place.eq(Mux(place == self.depth - 1, 0, place + 1))
        read, first = [], Signal.like(self.first)
        for index, memory in enumerate(self.memories):
            m.submodules[f"bank_{index}"] = memory
            write, port = memory.write_port(), memory.read_port()
            m.d.comb += [
                write.addr.eq(place),
                write.data.eq(self.word),
                write.en.eq(self.valid & (bank == index)),
                port.addr.eq(self.address.word_select(index, len(place))),
            ]
            read.append(port.data)
        m.d.sync += first.eq(self.first)
        turned = Cat(read)
        for bit in range(self.banks.bit_length() - 1):
            turned = Mux(first[bit], turned.rotate_right(self.bits << bit), turned)
        m.d.sync += self.data.eq(turned)
        return m


def _cursor_layout(machine: Machine) -> data.StructLayout:
    """Where in a matrix the next row lies; all counts are of what follows it.

    `row` in memory; `burst` rows of its chunk, `chunk` chunks of its column block, `block` column blocks. `chunks` and
    `last` are one less than the chunks of a block and the rows of a chunk of the last block; `full` is one less than
    the rows of a chunk of the others, `gap` the rows that the last block leaves out between chunks.
    """
    lanes, block = machine.matrix.lanes, machine.column_block
    burst = range(block * lanes * max(_SIZES) // machine.row_bytes)
    return data.StructLayout(
        {
            "row": unsigned(hbm_row_bits(machine)),
            "burst": burst,
            "chunk": range(MAX_DOT_LENGTH // lanes),
            "block": range(max(2, -(-machine.vector.words // block))),
            "chunks": range(MAX_DOT_LENGTH // lanes),
            "last": burst,
            "full": burst,
            "gap": burst,
            "region": range(len(HBM_REGIONS)),
            "ticket": unsigned(completed_shape(machine)),
        }
    )


class FetchEngine(wiring.Component):
    """Requests the rows of matmul after matmul, in memory order, and holds them for the matrix unit.

    `fetch`: the stream of fetch halves, `ready` from the cycle after the last request on; `waited` is the cause of the
    wait before it. `completed`: the last ticket whose rows are all requested. `write_slot`: no request in this cycle.
    `bases`: first row of each HBM region. `arrived`: rows that can be used, counted through the run modulo
    2^ARRIVED_BITS. `freed`: rows consumed, in the last cycle of the step that consumed them. `place`: the number,
    modulo `fifo_rows`, of the first of the `port_rows` rows that `data` gives FIFO_READ_CYCLES later; the place after
    the last is 0. `fetched`: a row of this region has been requested in this cycle. `pc`: of the latest fetch half.
    `error`: a channel answered with an error. `places` and `freed_before` are the credits, for proofs.
    """

    def __init__(self, machine: Machine) -> None:
        """Take a machine.

        Raises:
            MachineError: HBM must answer faster than the engine can ask and hand on.
        """
        if machine.hbm.latency < LEAST_LATENCY:
            raise MachineError(
                f"{machine.name}: hbm.latency = {machine.hbm.latency} is faster than the hardware's pipeline:"
                f" set it to {LEAST_LATENCY} or more"
            )
        self.machine = machine
        hbm, rows = machine.hbm, machine.fifo_rows
        self.lane = Shared("fetch_lane", FetchLane(rows, port_rows(machine), 8 * hbm.channel_bytes))
        self.places = Signal(range(rows + 1), init=rows)
        self.freed_before = Signal(range(most_freed(machine) + 1))
        channel = axi_read(hbm_address_bits(machine), hbm.channel_bytes)
        super().__init__(
            {
                "fetch": In(stream.Signature(issued_layout(machine, Domain.FETCH))),
                "waited": In(CAUSE_BITS),
                "completed": Out(completed_shape(machine)),
                "write_slot": In(1),
                "bases": In(data.ArrayLayout(unsigned(hbm_row_bits(machine)), len(HBM_REGIONS))),
                "hbm": Out(channel).array(hbm.channels),
                "arrived": Out(ARRIVED_BITS),
                "freed": In(range(most_freed(machine) + 1)),
                "place": In(range(rows)),
                "data": Out(data.ArrayLayout(unsigned(8 * machine.row_bytes), port_rows(machine))),
                "fetched": Out(len(HBM_REGIONS)),
                "activity": Out(activity_layout()),
                "pc": Out(TARGET_BITS),
                "error": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """The cursor, the credits, and a lane for each channel."""
        self._m = m = Module()
        self._lanes = [self.new_lane() for _ in range(self.machine.hbm.channels)]
        for index, lane in enumerate(self._lanes):
            m.submodules[f"lane_{index}"] = lane
        self._asked, taken = Signal(), Signal()
        m.d.comb += taken.eq(Cat(lane.taken for lane in self._lanes).all())
        self._requests(taken)
        self._channels()
        self._read()
        return m

    def new_lane(self) -> Any:
        """One channel's lane: a cell of the shared module (proofs take the component itself)."""
        return self.lane.replica()

    # Requests ------------------------------------------------------------------------------------------
    def _requests(self, taken: Value) -> None:
        """The row to ask for, whether to ask in this cycle, and what that means for the instruction.

        An instruction's first row can be asked for in the cycle of its transfer.
        """
        m = self._m
        layout = _cursor_layout(self.machine)
        running, kept = Signal(), Signal(layout)
        cursor, following = Signal(layout), Signal(layout)
        wanted, room, last = Signal(), self._credit(), Signal()
        m.d.comb += [
            self.fetch.ready.eq(~running & taken),
            wanted.eq(running | (self.fetch.valid & taken)),
            cursor.eq(Mux(running, kept, self._start(layout))),
            last.eq((cursor.burst == 0) & (cursor.chunk == 0) & (cursor.block == 0)),
            self._asked.eq(wanted & taken & room & ~self.write_slot),
            self.fetched.eq(Cat(self._asked & (cursor.region == region) for region in range(len(HBM_REGIONS)))),
        ]
        self._advance(cursor, following)
        with m.If(self._asked):
            m.d.sync += [kept.eq(following), running.eq(~last)]
        with m.Elif(wanted):
            m.d.sync += [kept.eq(cursor), running.eq(1)]
        with m.If(self.fetch.valid & self.fetch.ready):
            m.d.sync += self.pc.eq(self.fetch.payload.pc)
        shift = self.machine.hbm.channel_bytes.bit_length() - 1
        address = Signal(hbm_address_bits(self.machine))
        with m.If(self._asked):
            m.d.sync += address.eq(cursor.row << shift)
        for port in self.hbm:
            m.d.comb += port.ar.payload.addr.eq(address)
        self._finish(cursor, last, taken)
        self._account(wanted, room, taken)

    def _start(self, layout: data.StructLayout) -> Value:
        """The cursor at the first row of the instruction offered.

        Column blocks and chunks of a whole block are powers of two; of the last block's columns only used rows are
        fetched, and they follow one another unless it is stored at full width.
        """
        m, machine, p = self._m, self.machine, self.fetch.payload
        lanes, block, row = machine.matrix.lanes, machine.column_block, machine.row_bytes

        def operand(name: str) -> Value:
            return Value.cast(p["values"][slot("matmul", name)])

        def bits(number: int) -> int:
            return number.bit_length() - 1

        start = Signal(layout, name="start")
        chunk, blocks = Signal.like(start.chunk, name="chunk"), Signal.like(start.block, name="block")
        last, full = Signal.like(start.last, name="last"), Signal.like(start.full, name="full")
        region = modifier(p.modifiers, "matmul", "region")[: len(start.region)]
        n, k = Signal(len(blocks) + bits(block), name="n"), Signal(range(MAX_DOT_LENGTH), name="k")
        used = n[: bits(block)]
        m.d.comb += [
            n.eq(operand("n") - 1),
            k.eq(operand("k") - 1),
            chunk.eq(k >> bits(lanes)),
            blocks.eq(n >> bits(block)),
            start.row.eq(Mux(region, self.bases[1], self.bases[0]) + (operand("line") >> bits(machine.row_lines))),
            start.burst.eq(Mux(blocks == 0, last, full)),
            start.chunk.eq(chunk),
            start.block.eq(blocks),
            start.chunks.eq(chunk),
            start.last.eq(last),
            start.full.eq(full),
            start.gap.eq(Mux(modifier(p.modifiers, "matmul", "full"), full - last, 0)),
            start.region.eq(region),
            start.ticket.eq(p.ticket),
        ]
        with m.Switch(modifier(p.modifiers, "matmul", "format")):
            for number in Format:
                column = lanes * FORMAT_BYTES[number]
                with m.Case(int(number)):
                    m.d.comb += full.eq(block * column // row - 1)
                    if column >= row:
                        m.d.comb += last.eq(Cat(Const(column // row - 1, bits(column // row)), used))
                    else:
                        m.d.comb += last.eq(used >> bits(row // column))
        return start

    def _advance(self, cursor: data.View[Any], following: data.View[Any]) -> None:
        """`following` is the cursor after one more row."""
        m = self._m
        end_of_burst, end_of_block = cursor.burst == 0, cursor.chunk == 0
        block = Signal.like(cursor.block)
        m.d.comb += [
            block.eq(cursor.block - end_of_block),
            following.eq(cursor),
            following.row.eq(cursor.row + 1 + Mux(end_of_burst & (cursor.block == 0), cursor.gap, 0)),
            following.burst.eq(cursor.burst - 1),
        ]
        with m.If(end_of_burst):
            m.d.comb += [
                following.burst.eq(Mux(block == 0, cursor.last, cursor.full)),
                following.chunk.eq(Mux(end_of_block, cursor.chunks, cursor.chunk - 1)),
                following.block.eq(block),
            ]

    def _credit(self) -> Value:
        """Whether a place is free: a row freed in cycle c counts from c + 2 on."""
        freed = self.freed_before
        self._m.d.sync += [freed.eq(self.freed), self.places.eq(self.places + freed - self._asked)]
        return self.places != 0

    def _finish(self, cursor: data.View[Any], last: Value, taken: Value) -> None:
        """An instruction's ticket, as soon as all channels have its last row's request."""
        m = self._m
        ending, ticket, done = Signal(), Signal.like(self.completed), Signal.like(self.completed)
        m.d.comb += self.completed.eq(Mux(ending & taken, ticket, done))
        m.d.sync += done.eq(self.completed)
        with m.If(self._asked):
            m.d.sync += [ending.eq(last), ticket.eq(cursor.ticket)]
        with m.Elif(taken):
            m.d.sync += ending.eq(0)

    def _account(self, wanted: Value, room: Value, taken: Value) -> None:
        """What this cycle is spent on; while a channel keeps a request waiting, on transfer."""
        m = self._m
        m.d.comb += [
            self.activity.waited.eq(self.waited),
            self.activity.active.eq(wanted | ~taken),
            self.activity.cause.eq(int(Cause.TRANSFER)),
        ]
        with m.If(taken & ~room):
            m.d.comb += self.activity.cause.eq(int(Cause.FIFO_FULL))
        with m.Elif(taken & self.write_slot):
            m.d.comb += self.activity.cause.eq(int(Cause.WRITE_SLOT))

    # Channels ------------------------------------------------------------------------------------------
    def _channels(self) -> None:
        """AXI to lanes; a row has arrived when every lane has its part."""
        m, lanes = self._m, self._lanes
        advance = Signal()
        m.d.comb += advance.eq(Cat(lane.present for lane in lanes).all())
        m.d.sync += [
            self.arrived.eq(self.arrived + advance),
            self.error.eq(Cat(lane.error for lane in lanes).any()),
        ]
        for port, lane in zip(self.hbm, lanes, strict=True):
            m.d.comb += [
                lane.ask.eq(self._asked),
                lane.advance.eq(advance),
                lane.ar_ready.eq(port.ar.ready),
                port.ar.valid.eq(lane.ar_valid),
                lane.r_valid.eq(port.r.valid),
                lane.r_data.eq(port.r.payload.data),
                lane.r_resp.eq(port.r.payload.resp),
                port.r.ready.eq(1),
            ]

    def _read(self) -> None:
        """Each bank's address for the rows from `place` on, and the rows put together from the lanes."""
        m, banks = self._m, port_rows(self.machine)
        depth, shift = self.machine.fifo_rows // banks, banks.bit_length() - 1
        number = range(max(2, depth))
        place, beyond, first = Signal(number), Signal(number), self.place[:shift]
        after = [Signal(number, name=f"address_{bank}") for bank in range(banks)]
        m.d.comb += [
            place.eq(self.place >> shift),
            beyond.eq(Mux(place == depth - 1, 0, place + 1)),
        ]
        for bank, address in enumerate(after):
            m.d.comb += address.eq(Mux(first > bank, beyond, place))
        part = 8 * self.machine.hbm.channel_bytes
        for lane in self._lanes:
            m.d.comb += [lane.address.eq(Cat(after)), lane.first.eq(first)]
        for index in range(banks):
            m.d.comb += self.data[index].eq(Cat(lane.data[index * part : (index + 1) * part] for lane in self._lanes))
