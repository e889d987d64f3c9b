"""The store walker: cuts a store into pieces, one a cycle, and keeps the time that the contract gives it.

A piece is what one cycle can move: up to a register row of adjacent elements (and no more than a line), or one element
of a strided store. Pieces run ahead of the contract's clock as far as the packer takes them (`room`); the clock is a
debt of cycles (docs/timing.md: every outer row costs its pieces or its lines, whichever is more) and, in HBM, of write
slots. The store is over when all its pieces have left and nothing is owed.

Cycles: `begin` in the cycle of the transfer; the first piece in the next one, which stands for the contract's first.
"""

from __future__ import annotations

from typing import Any

from amaranth.hdl import Const, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from typebar.hw.arith.convert import FORMAT_BITS
from typebar.hw.memory.fetch import hbm_row_bits
from typebar.hw.ports import CAUSE_BITS, completed_shape, file_rows
from typebar.isa.instructions import FORMAT_BYTES, TARGET_BITS, Format
from typebar.isa.machine import LINE_BYTES, Machine
from typebar.isa.timing import Cause

LINE_BITS = LINE_BYTES.bit_length() - 1


def log2(number: int) -> int:
    """The exponent of a power of two."""
    return number.bit_length() - 1


def ddr_address_bits(machine: Machine) -> int:
    """Width of a byte address in DDR."""
    return (machine.ddr.capacity_bytes - 1).bit_length()


def byte_bits(machine: Machine) -> int:
    """Width of a byte address in either memory; HBM's bytes count through the rows."""
    return max(ddr_address_bits(machine), hbm_row_bits(machine) + log2(machine.row_bytes))


def line_bits(machine: Machine) -> int:
    """Width of a line's number in either memory."""
    return byte_bits(machine) - LINE_BITS


def line_cycles(machine: Machine) -> int:
    """Cycles in which a line moves to or from DDR."""
    return LINE_BYTES // machine.ddr.bytes_per_cycle


def piece_words(machine: Machine, number: Format) -> int:
    """Most adjacent elements of a format in a piece: a register row, or a line if that holds less."""
    return min(machine.vector.lanes, LINE_BYTES // FORMAT_BYTES[number])


def by_format(number: Value, values: dict[Format, Any]) -> Any:
    """The value for a format at run time."""
    if len({value.value if isinstance(value, Const) else id(value) for value in values.values()}) == 1:
        return next(iter(values.values()))
    result = values[Format.FP32]
    for item in (Format.FP16, Format.BF16, Format.INT8):
        result = Mux(number == int(item), values[item], result)
    return result


def rotate_right(m: Module, value: Any, places: Value, name: str, unit: int = 1) -> Any:
    """A value turned by `places` times `unit` bits, in stages; it is a power of two of them long."""
    for bit in range(len(places)):
        turned = Signal(len(value), name=f"{name}_{bit}")
        m.d.comb += turned.eq(Mux(places[bit], value.rotate_right(unit << bit), value))
        value = turned
    return value


def store_layout(machine: Machine) -> data.StructLayout:
    """A store as the walker takes it: `address` of its first byte, `word` of its first register; counts and strides.

    `scalar`: the 32 bits of `value` go to memory instead of registers; counts are 1, the format float32.
    """
    words, address = machine.vector.words, byte_bits(machine)
    return data.StructLayout(
        {
            "format": unsigned(FORMAT_BITS),
            "hbm": 1,
            "scalar": 1,
            "value": unsigned(32),
            "address": unsigned(address),
            "word": range(words),
            "outer": range(words + 1),
            "inner": range(words + 1),
            "outer_bytes": unsigned(address),
            "inner_bytes": unsigned(32),
            "ticket": unsigned(completed_shape(machine)),
            "pc": unsigned(TARGET_BITS),
        }
    )


def piece_layout(machine: Machine) -> data.StructLayout:
    """A piece: `count` elements for `line` from byte `offset` on (the next line takes what does not fit).

    They begin at word `first` of a register row; if they `straddle`, that is the row before the one that this piece
    reads, the last that the piece before it read.
    """
    lanes = machine.vector.lanes
    return data.StructLayout(
        {
            "format": unsigned(FORMAT_BITS),
            "hbm": 1,
            "scalar": 1,
            "value": unsigned(32),
            "line": unsigned(line_bits(machine)),
            "offset": unsigned(LINE_BITS),
            "first": range(lanes),
            "count": range(lanes + 1),
            "straddle": 1,
            "last": 1,
            "ticket": unsigned(completed_shape(machine)),
            "pc": unsigned(TARGET_BITS),
        }
    )


class StoreWalker(wiring.Component):
    """Walks one store after another.

    `begin` takes `store`; `busy` from the next cycle to `finish`, the last one of its occupancy (its `end` by the
    contract is that same cycle), in which the next may begin. `valid` with `piece`, and `row`, the register row that it
    reads; not without `room`. `new_rows`, `new_lines`: rows of HBM and lines of DDR that are touched now for the first
    time in an outer row. `slot`: the contract's cycle that this one stands for was a write slot. `cause` of the cycle,
    while busy.
    """

    def __init__(self, machine: Machine) -> None:
        """Take a machine."""
        self.machine = machine
        super().__init__(
            {
                "begin": In(1),
                "store": In(store_layout(machine)),
                "busy": Out(1),
                "finish": Out(1),
                "cause": Out(CAUSE_BITS),
                "slot": In(1),
                "room": In(1),
                "valid": Out(1),
                "piece": Out(piece_layout(machine)),
                "row": Out(range(file_rows(machine))),
                "new_rows": Out(2),
                "new_lines": Out(2),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """Loop counters, then the clock."""
        self._m = m = Module()
        self._held = held = Signal(store_layout(self.machine))
        self._active = active = Signal()
        store = self.store
        with m.If(self.begin):
            m.d.sync += [held.eq(store), self.busy.eq(1), active.eq((store.outer != 0) & (store.inner != 0))]
        with m.Else():
            with m.If(self.finish):
                m.d.sync += self.busy.eq(0)
            with m.If(self.valid & self.piece.last):
                m.d.sync += active.eq(0)
        m.d.comb += self.valid.eq(active & self.room)
        self._loops()
        lines, rows = self._blocks()
        self._clock(lines, rows)
        return m

    def _loops(self) -> None:
        """The piece at hand; `_row_ends` if it is its outer row's last, `_row_begins` if its first."""
        m, held, piece, store = self._m, self._held, self.piece, self.store
        words = self.machine.vector.words
        lanes = self.machine.vector.lanes
        sizes = {item: Const(log2(FORMAT_BYTES[item]), 2) for item in Format}
        most = {item: Const(piece_words(self.machine, item), range(lanes + 1)) for item in Format}
        most_bytes = {item: Const(most[item].value * FORMAT_BYTES[item], LINE_BITS + 1) for item in Format}
        address, row_address = Signal.like(held.address), Signal.like(held.address)
        word, outer, inner = Signal(range(words)), Signal(range(words + 1)), Signal(range(words + 1))
        self._adjacent = adjacent = Signal()
        limit, self._size = Signal(range(lanes + 1)), Signal(2)
        self._row_ends, self._row_begins = row_ends, row_begins = Signal(), Signal()
        step = Mux(adjacent, by_format(held.format, most_bytes), held.inner_bytes)
        next_row = Signal.like(held.address)
        last_word = Signal(range(words))
        m.d.comb += [
            self._size.eq(by_format(held.format, sizes)),
            limit.eq(Mux(adjacent, by_format(held.format, most), 1)),
            row_ends.eq(inner <= limit),
            next_row.eq(row_address + held.outer_bytes),
            last_word.eq(word + piece.count - 1),
            self.row.eq(last_word >> log2(lanes)),
            piece.format.eq(held.format),
            piece.hbm.eq(held.hbm),
            piece.scalar.eq(held.scalar),
            piece.value.eq(held.value),
            piece.line.eq(address >> LINE_BITS),
            piece.offset.eq(address[:LINE_BITS]),
            piece.first.eq(word),
            piece.count.eq(Mux(row_ends, inner, limit)),
            piece.straddle.eq(piece.first + piece.count > lanes),
            piece.last.eq(row_ends & (outer == 1)),
            piece.ticket.eq(held.ticket),
            piece.pc.eq(held.pc),
        ]
        with m.If(self.begin):
            m.d.sync += [
                address.eq(store.address),
                row_address.eq(store.address),
                word.eq(store.word),
                outer.eq(store.outer),
                inner.eq(store.inner),
                adjacent.eq(store.inner_bytes == (1 << by_format(store.format, sizes))),
                row_begins.eq(1),
            ]
        with m.Elif(self.valid):
            m.d.sync += [word.eq(word + piece.count), row_begins.eq(row_ends)]
            with m.If(row_ends):
                m.d.sync += [address.eq(next_row), row_address.eq(next_row), inner.eq(held.inner), outer.eq(outer - 1)]
            with m.Else():
                m.d.sync += [address.eq(address + step), inner.eq(inner - piece.count)]

    def _blocks(self) -> tuple[Value, Value]:
        """Lines of this outer row up to the piece at hand, and memory rows that it is the first of the row to touch.

        Adjacent pieces follow one another and strides are not negative, so a block is new if it is not the last one.
        """
        m, piece, begins = self._m, self.piece, self._row_begins
        inside = log2(self.machine.row_bytes) - LINE_BITS
        reach, crosses, following = Signal(LINE_BITS + 1), Signal(), Signal.like(piece.line)
        before, last = Signal.like(piece.line), Signal.like(piece.line)
        counted, lines = Signal(range(self.machine.vector.words + 2)), Signal(range(self.machine.vector.words + 2))
        row_crosses, rows = crosses & piece.line[:inside].all() if inside else crosses, Signal(2)
        fresh = Signal(2)
        m.d.comb += [
            fresh.eq((begins | (piece.line != before)) + crosses),
            self.new_rows.eq(Mux(self.valid & self._held.hbm, rows, 0)),
            self.new_lines.eq(Mux(self.valid & ~self._held.hbm, fresh, 0)),
            reach.eq(piece.offset + (piece.count << self._size)[: LINE_BITS + 1] - 1),
            crosses.eq(reach[LINE_BITS]),
            following.eq(piece.line + 1),
            last.eq(Mux(crosses, following, piece.line)),
            lines.eq(Mux(begins, 0, counted) + fresh),
            rows.eq((begins | (piece.line[inside:] != before[inside:])) + row_crosses),
        ]
        with m.If(self.valid):
            m.d.sync += [before.eq(last), counted.eq(lines)]
        return lines, Mux(self.valid, rows, 0)

    def _clock(self, lines: Value, rows: Value) -> None:
        """Cycles and write slots still owed, and so the last cycle.

        Both sums stop at their least value: a walk that the memory holds up cannot earn without end.
        """
        m, held, store = self._m, self._held, self.store
        cycles = line_cycles(self.machine)
        words, lanes = self.machine.vector.words, self.machine.vector.lanes
        bits = (words * (cycles + 1) * 2).bit_length() + 1
        debt, slots = Signal(signed(bits)), Signal(signed(words.bit_length() + 2))
        pieces, moved = Signal(range(words + 1)), Signal(range(words * cycles + 2 * cycles))
        pays, walked, settled, served = Signal(), Signal(), Signal(), Signal()
        owed, due = Signal(signed(bits + 1)), Signal(signed(len(slots) + 1))
        m.d.comb += [
            pieces.eq(Mux(self._adjacent, (held.inner + (lanes - 1)) >> log2(lanes), held.inner)),
            moved.eq(Mux(held.hbm, lines, lines << log2(cycles))),
            pays.eq(self.valid & self._row_ends),
            owed.eq(debt + Mux(pays, Mux(moved > pieces, moved, pieces), 0)),
            settled.eq(Mux(pays, (debt + moved <= 1) & (debt + pieces <= 1), debt <= 1)),
            due.eq(slots + rows - self.slot),
            served.eq(~held.hbm | (due <= 0)),
            walked.eq(~self._active | (self.valid & self.piece.last)),
            self.finish.eq(self.busy & walked & settled & served),
        ]
        for total, following in ((debt, owed - 1), (slots, due)):
            least = -(1 << (len(total) - 1))
            with m.If(self.begin):
                m.d.sync += total.eq(0)
            with m.Else():
                m.d.sync += total.eq(Mux(following < least, least, following))
        self._account(rows, (store.outer == 0) | (store.inner == 0))

    def _account(self, rows: Value, nothing: Value) -> None:
        """In HBM a row is a cycle of transfer, and a store of nothing one; in DDR every cycle is."""
        m, uncounted, empty = self._m, Signal(range(self.machine.vector.words + 2)), Signal()
        found = Signal(range(self.machine.vector.words + 4))
        moves = ~self._held.hbm | (found != 0) | empty
        m.d.comb += [
            found.eq(uncounted + rows),
            self.cause.eq(Mux(moves, int(Cause.TRANSFER), int(Cause.WRITE_SLOT))),
        ]
        with m.If(self.begin):
            m.d.sync += [uncounted.eq(0), empty.eq(nothing)]
        with m.Else():
            m.d.sync += uncounted.eq(Mux(found != 0, found - 1, 0))
