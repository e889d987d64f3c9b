"""The vector register file: one memory block for each hazard segment, one copy of it for each reader.

A block has one write port. That is enough: unfinished instructions of one unit own the segments that they write (the
scoreboard lets no other unit write there), and of the vector unit's two ports a reduction's is used after all rows of
older instructions and before those of younger ones. Each read port has a full copy, so readers never wait either.
"""

from __future__ import annotations

from amaranth.hdl import Array, Cat, Const, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from typebar.hw.ports import file_rows, read_port, write_port
from typebar.hw.replicate import Shared
from typebar.isa.machine import Machine

READERS = ("vector_a", "vector_b", "matrix", "memory", "ring")
"""Read ports; the vector unit has two, and `vread` shares the ring unit's."""
WRITERS = ("vector", "reduce", "matrix", "memory", "ring_cw", "ring_ccw")
"""Write ports; `reduce` is the vector unit's second, for what reductions leave, and each ring direction has one."""


class RegisterMemory(wiring.Component):
    """One copy of one segment: `rows` rows of `lanes` words, written by words, read in the next cycle if `enable`."""

    def __init__(self, rows: int, lanes: int) -> None:
        """A memory of `rows` rows."""
        self.rows, self.row = rows, data.ArrayLayout(unsigned(32), lanes)
        address = range(max(2, rows))
        super().__init__(
            {
                "write_address": In(address),
                "write_mask": In(lanes),
                "write_data": In(self.row),
                "enable": In(1),
                "read_address": In(address),
                "read_data": Out(self.row),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """A simple dual-port memory. Contents are those that the device was configured with until written."""
        m = Module()
        m.submodules.memory = memory = Memory(shape=self.row, depth=self.rows, init=[])
        write, read = memory.write_port(granularity=1), memory.read_port()
        m.d.comb += [
            write.addr.eq(self.write_address),
            write.data.eq(self.write_data),
            write.en.eq(self.write_mask),
            read.en.eq(self.enable),
            read.addr.eq(self.read_address),
            self.read_data.eq(read.data),
        ]
        return m


class RegisterBlock(wiring.Component):
    """One segment: a register that takes the row of whichever port writes here, and a copy for each reader.

    `write_hit` and `read_hit` say which ports name this segment in this cycle. A row written in one cycle is there for
    a read address two cycles later. `conflict`: two ports wrote in the cycle before, which must never be.
    """

    def __init__(self, memory: Shared) -> None:
        """A block of copies of `memory`, a `RegisterMemory`."""
        self._memory = memory
        part = memory.component
        assert isinstance(part, RegisterMemory)
        self._row = part.row
        address = unsigned((max(2, part.rows) - 1).bit_length())
        readers, writers = len(READERS), len(WRITERS)
        super().__init__(
            {
                "write_hit": In(writers),
                "write_address": In(data.ArrayLayout(address, writers)),
                "write_mask": In(data.ArrayLayout(unsigned(part.row.length), writers)),
                "write_data": In(data.ArrayLayout(part.row, writers)),
                "read_hit": In(readers),
                "read_address": In(data.ArrayLayout(address, readers)),
                "read_data": Out(data.ArrayLayout(part.row, readers)),
                "conflict": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """Steering, a register, memories."""
        m = Module()
        hit = self.write_hit
        address = Signal(self.write_address[0].shape(), reset_less=True)
        mask = Signal(self._row.length)
        row = Signal(self._row, reset_less=True)
        m.d.sync += [mask.eq(0), self.conflict.eq((hit & (hit - 1)).any())]
        for port in range(len(WRITERS)):
            with m.If(hit[port]):
                m.d.sync += [
                    address.eq(self.write_address[port]),
                    mask.eq(self.write_mask[port]),
                    row.eq(self.write_data[port]),
                ]
        for port, name in enumerate(READERS):
            m.submodules[name] = copy = self._memory.replica()
            m.d.comb += [
                copy.write_address.eq(address),
                copy.write_mask.eq(mask),
                copy.write_data.eq(row),
                copy.enable.eq(self.read_hit[port]),
                copy.read_address.eq(self.read_address[port]),
                self.read_data[port].eq(copy.read_data),
            ]
        return m


class RegisterFile(wiring.Component):
    """The register file of a machine; its contents survive launches and resets.

    Members `read_*` (for each of `READERS`) and `write_*` (for each of `WRITERS`) have the signatures of
    `hw.ports.read_port` and `write_port`, seen from here. A row's data leave READ_CYCLES after its address came: the
    memory's own register, then that of the choice among segments. A write is there for an address that comes
    WRITE_CYCLES later; reads in between give the old or the new row. No handshake: all ports work in every cycle.

    `conflict`: two ports wrote to one segment in the cycle before. It cannot rise behind the scoreboard; the data of
    one of them are lost. `shared` are the modules whose text goes beside this one's.
    """

    def __init__(self, machine: Machine) -> None:
        """Take a machine; any valid one will do."""
        vector = machine.vector
        self.segments = vector.segments
        self.rows = file_rows(machine) // vector.segments
        memory = Shared("register_memory", RegisterMemory(self.rows, vector.lanes))
        self._block = Shared("register_block", RegisterBlock(memory))
        self.shared = (memory, self._block)
        super().__init__(
            {
                **{f"read_{name}": In(read_port(machine)) for name in READERS},
                **{f"write_{name}": In(write_port(machine)) for name in WRITERS},
                "conflict": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """Addresses taken apart once for each port, then blocks side by side."""
        m = Module()
        reads = [getattr(self, f"read_{name}") for name in READERS]
        writes = [getattr(self, f"write_{name}") for name in WRITERS]
        read_places = [self._place(m, port.address, f"read_{name}") for port, name in zip(reads, READERS, strict=True)]
        write_places = [
            self._place(m, port.address, f"write_{name}") for port, name in zip(writes, WRITERS, strict=True)
        ]
        blocks = []
        for index in range(self.segments):
            m.submodules[f"block{index}"] = block = self._block.replica()
            blocks.append(block)
            m.d.comb += [
                block.write_hit.eq(
                    Cat(
                        (segment == index) & port.mask.any()
                        for (segment, _), port in zip(write_places, writes, strict=True)
                    )
                ),
                block.write_address.eq(Cat(offset for _, offset in write_places)),
                block.write_mask.eq(Cat(port.mask for port in writes)),
                block.write_data.eq(Cat(port.data for port in writes)),
                block.read_hit.eq(Cat(segment == index for segment, _ in read_places)),
                block.read_address.eq(Cat(offset for _, offset in read_places)),
            ]
        row_bits = len(reads[0].data.as_value())
        for number, (port, (segment, _)) in enumerate(zip(reads, read_places, strict=True)):
            chosen = Signal.like(segment, name=f"chosen_{READERS[number]}", reset_less=True)
            row = Signal(row_bits, name=f"row_{READERS[number]}", reset_less=True)
            outputs = Array(block.read_data[number * row_bits : (number + 1) * row_bits] for block in blocks)
            m.d.sync += [chosen.eq(segment), row.eq(outputs[chosen])]
            m.d.comb += port.data.eq(row)
        m.d.comb += self.conflict.eq(Cat(block.conflict for block in blocks).any())
        return m

    def _place(self, m: Module, row: Value, name: str) -> tuple[Value, Value]:
        """Segment of a row, and its row there; slices where a segment has a power of two of rows."""
        bits = (max(2, self.rows) - 1).bit_length()
        if self.rows == 1 << bits:
            return row[bits:], row[:bits]
        segment = Signal(range(self.segments), name=f"segment_{name}")
        offset = Signal(bits, name=f"offset_{name}")
        starts = [index * self.rows for index in range(self.segments)]
        choice: Value = Const(0, len(segment))
        for index in range(1, self.segments):
            choice = Mux(row >= starts[index], index, choice)
        m.d.comb += [segment.eq(choice), offset.eq(row - Array(starts)[segment])]
        return segment, offset
