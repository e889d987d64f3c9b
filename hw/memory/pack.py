"""The store packer: register rows in, lines with byte enables out.

A piece's row comes READ_CYCLES after the piece. Its words are converted, packed, kept in a short queue, turned to their
place in the line and gathered in an open line, which leaves when an element of another line comes or the store ends.
Every byte position follows from one turn: a row, packed, is a ring of bytes whose length divides a line's, so that
words need not be sorted before. Later elements overwrite earlier ones.

Latency: a line shows on `lines` 7 cycles after the piece that closes it, unless others are before it. One line leaves
in a cycle, and one piece can close three, if it is a store's last and finds another line open. No more lines leave in
an outer row than the contract has cycles for it, so few wait, and pieces never do unless the memory is slow.
"""

from __future__ import annotations

from typing import Any

from amaranth.hdl import Array, Cat, Const, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out

from typebar.hw.arith.convert import MemoryFromFloat32
from typebar.hw.delay import delayed
from typebar.hw.memory.store import LINE_BITS, by_format, line_bits, log2, piece_layout, piece_words, rotate_right
from typebar.hw.ports import READ_CYCLES, completed_shape, flag_layout
from typebar.hw.replicate import Shared
from typebar.isa.instructions import FORMAT_BYTES, Format
from typebar.isa.machine import LINE_BYTES, Machine

CONVERT_CYCLES = 2
PIECES = 16
"""Pieces that may be on their way or wait in the queue: those in flight, and what a burst of lines leaves waiting."""
LINE_QUEUE = 4


def line_layout(machine: Machine) -> data.StructLayout:
    """A line to be written: the bytes of `data` whose bit in `strobe` is set; `last` of the instruction's lines."""
    return data.StructLayout(
        {
            "hbm": 1,
            "line": unsigned(line_bits(machine)),
            "last": 1,
            "ticket": unsigned(completed_shape(machine)),
            "strobe": unsigned(LINE_BYTES),
            "data": unsigned(8 * LINE_BYTES),
        }
    )


def _target_layout(machine: Machine) -> data.StructLayout:
    """Where a packed piece goes."""
    return data.StructLayout(
        {
            "hbm": 1,
            "line": unsigned(line_bits(machine)),
            "offset": unsigned(LINE_BITS),
            "turn": unsigned(LINE_BITS),
            "bytes": unsigned(LINE_BITS + 1),
            "last": 1,
            "ticket": unsigned(completed_shape(machine)),
        }
    )


class StorePacker(wiring.Component):
    """Packs the pieces of a `StoreWalker` into lines.

    `valid` with `piece`, only while `room`; `row` is the register row READ_CYCLES later. `lines` is the stream of
    lines. `saturated`: an element of the instruction was limited.
    """

    def __init__(self, machine: Machine) -> None:
        """Take a machine; `encoder` is the conversion's module."""
        self.machine = machine
        self.encoder = Shared("memory_encoder", MemoryFromFloat32(CONVERT_CYCLES))
        super().__init__(
            {
                "room": Out(1),
                "valid": In(1),
                "piece": In(piece_layout(machine)),
                "row": In(data.ArrayLayout(unsigned(32), machine.vector.lanes)),
                "lines": Out(stream.Signature(line_layout(machine))),
                "saturated": Out(flag_layout()),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """Stage by stage."""
        self._m = m = Module()
        lanes = self.machine.vector.lanes
        self._bytes = min(LINE_BYTES, 4 * lanes)
        words, target, ready, raised, pc = self._convert()
        packed = data.StructLayout({"target": target.shape(), "words": unsigned(8 * self._bytes)})
        m.submodules.queue = queue = SyncFIFO(width=packed.size, depth=PIECES)
        entry = packed(queue.r_data)
        m.d.comb += [queue.w_data.eq(Cat(target.as_value(), words)), queue.w_en.eq(ready)]
        m.d.sync += [self.saturated.raised.eq(raised), self.saturated.pc.eq(pc)]
        taken = queue.r_rdy & queue.r_en
        outstanding = Signal(range(PIECES + 1))
        m.d.sync += outstanding.eq(outstanding + self.valid - taken)
        m.d.comb += self.room.eq(outstanding != PIECES)
        self._assemble(*self._turn(entry, queue))
        return m

    # Registers to bytes --------------------------------------------------------------------------------
    def _convert(self) -> tuple[Value, Any, Value, Value, Value]:
        """Packed elements and their target; whether there are any, and whether one was limited, and whose."""
        m = self._m
        arrived = delayed(m, self.valid, READ_CYCLES, "arrived", reset=True)
        valid = delayed(m, arrived, CONVERT_CYCLES, "valid", reset=True)
        piece = delayed(m, self.piece, READ_CYCLES, "piece")
        raws, limited = [], []
        words = self._select(piece, arrived)
        for index, word in enumerate(words):
            m.submodules[f"encoder_{index}"] = encoder = self.encoder.replica()
            m.d.comb += [encoder.x.eq(word), encoder.format.eq(piece.format)]
            raws.append(encoder.raw)
            limited.append(encoder.saturated)
        target, used = self._target(piece, len(words))
        used = delayed(m, used, CONVERT_CYCLES, "used")
        chosen = delayed(m, piece.format, CONVERT_CYCLES, "format")
        pc = delayed(m, piece.pc, CONVERT_CYCLES, "pc")
        packed = {}
        for item in Format:
            size, count = FORMAT_BYTES[item], piece_words(self.machine, item)
            ring = Cat(raw[: 8 * size] for raw in raws[:count])
            packed[item] = Cat([ring] * (self._bytes // (size * count)))
        raised = valid & (Cat(limited) & used).any()
        return by_format(chosen, packed), delayed(m, target, CONVERT_CYCLES, "target"), valid, raised, pc

    def _select(self, piece: Any, arrived: Value) -> list[Value]:
        """The words of the piece, word i of a register row in place i modulo the words of a piece."""
        m, lanes = self._m, self.machine.vector.lanes
        before = Signal.like(self.row, reset_less=True)
        with m.If(arrived):
            m.d.sync += before.eq(self.row)
        row = [Mux(piece.straddle & (piece.first <= index), before[index], self.row[index]) for index in range(lanes)]
        places = min(lanes, LINE_BYTES)
        words = []
        for place in range(places):
            sources = {}
            for item in Format:
                count = piece_words(self.machine, item)
                residue, bits = place % count, log2(count)
                if count == lanes:
                    sources[item] = row[residue]
                else:
                    fold = (piece.first[bits:] + (piece.first[:bits] > residue))[: log2(lanes // count)]
                    sources[item] = Array(row[residue::count])[fold]
            word = Signal(32, name=f"word_{place}")
            m.d.comb += word.eq(Mux(piece.scalar, piece.value, by_format(piece.format, sources)))
            words.append(word)
        return words

    def _target(self, piece: Any, places: int) -> tuple[Any, Value]:
        """The packed piece's target, and which places hold elements of it."""
        m = self._m
        target, used = Signal(_target_layout(self.machine)), Signal(places)
        sizes = {item: Const(log2(FORMAT_BYTES[item]), 2) for item in Format}
        size, ones = by_format(piece.format, sizes), Signal(places)
        first = Mux(piece.scalar, 0, piece.first)
        masks = {}
        for item in Format:
            count = piece_words(self.machine, item)
            masks[item] = rotate_right(m, ones[:count], (-first)[: log2(count)], f"mask_{item.name.lower()}")
        m.d.comb += [
            ones.eq((Const(1, places + 1) << piece.count) - 1),
            used.eq(by_format(piece.format, masks)),
            target.hbm.eq(piece.hbm),
            target.line.eq(piece.line),
            target.offset.eq(piece.offset),
            target.turn.eq((first << size) - piece.offset),
            target.bytes.eq(piece.count << size),
            target.last.eq(piece.last),
            target.ticket.eq(piece.ticket),
        ]
        return target, used

    # Bytes to lines ------------------------------------------------------------------------------------
    def _turn(self, entry: Any, queue: SyncFIFO) -> tuple[Signal, Signal, Any, Value, Value]:
        """A register behind the queue: valid, consumed, target, bytes in place, enables of both lines."""
        m = self._m
        held, consumed = Signal(), Signal()
        target, turned = Signal(_target_layout(self.machine)), Signal(8 * LINE_BYTES)
        strobes = Signal(2 * LINE_BYTES)
        ring = rotate_right(m, Cat([entry.words] * (LINE_BYTES // self._bytes)), entry.target.turn, "ring", 8)
        ones = ((Const(1, LINE_BYTES + 1) << entry.target.bytes) - 1)[:LINE_BYTES]
        m.d.comb += queue.r_en.eq(~held | consumed)
        with m.If(queue.r_en):
            m.d.sync += [
                held.eq(queue.r_rdy),
                target.eq(entry.target),
                turned.eq(ring),
                strobes.eq(ones << entry.target.offset),
            ]
        return held, consumed, target, turned, strobes

    def _assemble(self, valid: Signal, consumed: Signal, target: Any, turned: Value, strobes: Value) -> None:
        """The open line. It leaves when a piece of another line comes; a piece's first line leaves with it if the piece
        goes on in a second, which opens then, or is its store's last. `closing`: the open line ends its store.
        """
        m, layout = self._m, line_layout(self.machine)
        open_line, line = Signal(layout), Signal(layout)
        is_open, closing, joins, second, ends = Signal(), Signal(), Signal(), Signal(), Signal()
        leaves = [Signal(name="open_leaves"), Signal(name="line_leaves")]
        low, high = strobes[:LINE_BYTES], strobes[LINE_BYTES:]
        same = ~closing & (open_line.hbm == target.hbm) & (open_line.line == target.line)
        closed = Signal(layout)
        room = self._queue([(leaves[0], closed), (leaves[1], line)])
        m.d.comb += [
            second.eq(high.any()),
            ends.eq(target.last & ~second),
            joins.eq(is_open & same),
            leaves[0].eq(room & is_open & (closing | (valid & ~same))),
            leaves[1].eq(room & valid & (second | target.last)),
            consumed.eq(room),
            closed.eq(open_line),
            closed.last.eq(closing),
            line.hbm.eq(target.hbm),
            line.line.eq(target.line),
            line.ticket.eq(target.ticket),
            line.last.eq(ends),
            line.strobe.eq(Mux(joins, open_line.strobe, 0) | low),
        ]
        for byte in range(LINE_BYTES):
            bits = slice(8 * byte, 8 * byte + 8)
            m.d.comb += line.data[bits].eq(Mux(low[byte], turned[bits], open_line.data[bits]))
        with m.If(room & valid):
            m.d.sync += [open_line.eq(line), is_open.eq(~ends), closing.eq(target.last & second)]
            with m.If(second):
                m.d.sync += [
                    open_line.line.eq(target.line + 1),
                    open_line.strobe.eq(high),
                    open_line.data.eq(turned),
                ]
        with m.Elif(leaves[0]):
            m.d.sync += [is_open.eq(0), closing.eq(0)]

    def _queue(self, pushes: list[tuple[Signal, Any]]) -> Value:
        """Lines wait in two banks that take turns, so that two enter at once; true if there is room for two."""
        m, layout = self._m, line_layout(self.machine)
        entering, leaving = Signal(), Signal()
        (first, first_line), (second, second_line) = pushes
        banks = []
        for index in range(2):
            m.submodules[f"lines_{index}"] = bank = SyncFIFO(width=layout.size, depth=LINE_QUEUE)
            banks.append(bank)
            turn = Signal(name=f"turn_{index}")
            m.d.comb += [
                turn.eq(entering == index),
                bank.w_en.eq(Mux(turn, first | second, first & second)),
                bank.w_data.eq(Mux(turn & first, first_line.as_value(), second_line.as_value())),
                bank.r_en.eq(self.lines.ready & (leaving == index)),
            ]
        m.d.comb += [
            self.lines.valid.eq(Mux(leaving, banks[1].r_rdy, banks[0].r_rdy)),
            self.lines.payload.eq(Mux(leaving, banks[1].r_data, banks[0].r_data)),
        ]
        m.d.sync += entering.eq(entering ^ first ^ second)
        with m.If(self.lines.valid & self.lines.ready):
            m.d.sync += leaving.eq(~leaving)
        return banks[0].w_rdy & banks[1].w_rdy
