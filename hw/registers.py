"""The vector register file: one memory block for each hazard segment, one copy of it for each reader.

A block has one write port. That is enough: unfinished instructions of one unit own the segments that they write (the
scoreboard lets no other unit write there), and of the vector unit's two ports a reduction's is used after all rows of
older instructions and before those of younger ones. Each read port has a full copy, so readers never wait either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import or_

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

_LUT_INPUTS = 6


def _choice(number: Value, options: Sequence[Value]) -> Value:
    """The option with a number: a tree of twos, which maps to fewer LUTs than the decoded number that `Array` makes."""
    if len(options) == 1:
        return options[0]
    half = 1 << (len(options) - 1).bit_length() - 1
    return Mux(number[half.bit_length() - 1], _choice(number, options[half:]), _choice(number, options[:half]))


def _number(hit: Value) -> Value:
    """The number of the one bit that is set; 0 if none is."""
    bits = range((len(hit) - 1).bit_length())
    return Cat(Cat(hit[port] for port in range(len(hit)) if port >> bit & 1).any() for bit in bits)


def _joined(parts: Sequence[Value]) -> Value:
    """The OR of all, in groups of as many as a LUT takes."""
    while len(parts) > 1:
        spare = max(0, len(parts) - _LUT_INPUTS)
        groups = -(-spare // (_LUT_INPUTS - 1))
        parts = [
            *(reduce(or_, parts[at * _LUT_INPUTS : (at + 1) * _LUT_INPUTS]) for at in range(max(1, groups))),
            *parts[max(1, groups) * _LUT_INPUTS :],
        ]
    return parts[0]


class RegisterMemory(wiring.Component):
    """One copy of one segment: `rows` rows of `lanes` words, written by words.

    A read row follows a cycle after `enable`, zeros after a cycle without.
    """

    def __init__(self, rows: int, lanes: int, attributes: Mapping[str, str]) -> None:
        """A memory of `rows` rows, with attributes for synthesis."""
        self.rows, self.row, self._attributes = rows, data.ArrayLayout(unsigned(32), lanes), dict(attributes)
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
        """A simple dual-port memory. Contents are those that the device was configured with until written.

        The zeros are the synchronous reset that the output latches of block RAM and UltraRAM have (UG573).
        """
        m = Module()
        m.submodules.memory = memory = Memory(shape=self.row, depth=self.rows, init=[], attrs=self._attributes)
        write, read = memory.write_port(granularity=1), memory.read_port(domain="comb")
        row = Signal(self.row, reset_less=True)
        m.d.comb += [
            write.addr.eq(self.write_address),
            write.data.eq(self.write_data),
            write.en.eq(self.write_mask),
            read.addr.eq(self.read_address),
            self.read_data.eq(row),
        ]
        with m.If(self.enable):
            m.d.sync += row.eq(read.data)
        with m.Else():
            m.d.sync += row.eq(0)
        return m


class RegisterBlock(wiring.Component):
    """One segment: a register that takes the row of whichever port writes here, and a copy for each reader.

    `write`: the port of number `writer` writes here in this cycle. A row written in one cycle is there for a read
    address two cycles later. `read_hit` says which ports read here; `read_data` is zero where it was not set.
    """

    def __init__(self, memories: Sequence[Shared]) -> None:
        """A block with a copy of the `RegisterMemory` of each reader."""
        self._memories = memories
        part = memories[0].component
        assert isinstance(part, RegisterMemory)
        self._row = part.row
        address = unsigned((max(2, part.rows) - 1).bit_length())
        readers, writers = len(READERS), len(WRITERS)
        super().__init__(
            {
                "write": In(1),
                "writer": In(range(writers)),
                "write_address": In(data.ArrayLayout(address, writers)),
                "write_mask": In(data.ArrayLayout(unsigned(part.row.length), writers)),
                "write_data": In(data.ArrayLayout(part.row, writers)),
                "read_hit": In(readers),
                "read_address": In(data.ArrayLayout(address, readers)),
                "read_data": Out(data.ArrayLayout(part.row, readers)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """Steering, a register, memories."""
        m = Module()
        address = Signal(self.write_address[0].shape(), reset_less=True)
        mask = Signal(self._row.length)
        row = Signal(self._row, reset_less=True)
        writers = range(len(WRITERS))
        m.d.sync += [
            address.eq(_choice(self.writer, [self.write_address[port] for port in writers])),
            mask.eq(Mux(self.write, _choice(self.writer, [self.write_mask[port] for port in writers]), 0)),
            row.eq(_choice(self.writer, [self.write_data[port].as_value() for port in writers])),
        ]
        for port, name in enumerate(READERS):
            m.submodules[name] = copy = self._memories[port].replica()
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
    memory's own register, then that of the segments' rows, joined by OR. A write is there for an address that comes
    WRITE_CYCLES later; reads in between give the old or the new row. No handshake: all ports work in every cycle.

    `conflict`: two ports wrote to one segment in the cycle before. It cannot rise behind the scoreboard; the data of
    one of them are lost. `shared` are the modules whose text goes beside this one's.
    """

    def __init__(self, machine: Machine) -> None:
        """Take a machine; any valid one will do."""
        vector = machine.vector
        self.segments = vector.segments
        self.rows = file_rows(machine) // vector.segments
        memories: list[Shared] = []
        for name, attributes, copies in (
            ("register_memory", {}, len(READERS) - vector.ultra_copies),
            ("register_ultra_memory", {"ram_style": "ultra"}, vector.ultra_copies),
        ):
            if copies:
                memories += [Shared(name, RegisterMemory(self.rows, vector.lanes, attributes))] * copies
        self._block = Shared("register_block", RegisterBlock(memories))
        self.shared = (*dict.fromkeys(memories), self._block)
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
        valid = [port.mask.any() for port in writes]
        conflict = Signal(self.segments)
        m.d.comb += self.conflict.eq(conflict.any())
        for index in range(self.segments):
            m.submodules[f"block{index}"] = block = self._block.replica()
            blocks.append(block)
            hit = Signal(len(WRITERS), name=f"hit{index}")
            m.d.sync += conflict[index].eq((hit & (hit - 1)).any())
            m.d.comb += [
                hit.eq(Cat((segment == index) & any_ for (segment, _), any_ in zip(write_places, valid, strict=True))),
                block.write.eq(hit.any()),
                block.writer.eq(_number(hit)),
                block.write_address.eq(Cat(offset for _, offset in write_places)),
                block.write_mask.eq(Cat(port.mask for port in writes)),
                block.write_data.eq(Cat(port.data for port in writes)),
                block.read_hit.eq(Cat(segment == index for segment, _ in read_places)),
                block.read_address.eq(Cat(offset for _, offset in read_places)),
            ]
        row_bits = len(reads[0].data.as_value())
        for number, port in enumerate(reads):
            row = Signal(row_bits, name=f"row_{READERS[number]}", reset_less=True)
            # All but the block that was addressed give zeros.
            outputs = [block.read_data[number * row_bits : (number + 1) * row_bits] for block in blocks]
            m.d.sync += row.eq(_joined(outputs))
            m.d.comb += port.data.eq(row)
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
