"""The load engine: requests the lines of a load, and turns them into register rows.

Requests go out one every `line_cycles`, the first in the cycle after the transfer, which stands for the contract's
first; each cycle in which the port does not take one adds to the occupancy. Lines go alternately into two small banks,
so that a row, which begins in one line and may end in the next, is taken from both at once, one row a cycle, whatever
its alignment: the two lines are a ring of 128 bytes. With more than 16 lanes, rows are written in pieces of a line.

A row is written WRITE_CYCLES_BEHIND cycles after R brought the line in which it ends.
"""

from __future__ import annotations

from typing import Any

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out

from typebar.hw.arith.convert import FORMAT_BITS, Float32FromMemory
from typebar.hw.delay import delayed
from typebar.hw.memory.store import (
    LINE_BITS,
    by_format,
    byte_bits,
    ddr_address_bits,
    line_bits,
    line_cycles,
    log2,
    piece_words,
)
from typebar.hw.memory.write import unfinished_layout
from typebar.hw.ports import axi_read, completed_shape, write_port
from typebar.hw.replicate import Shared
from typebar.isa.instructions import FORMAT_BYTES, Format
from typebar.isa.machine import LINE_BYTES, Machine

CONVERT_CYCLES = 2
WRITE_CYCLES_BEHIND = 2 + CONVERT_CYCLES
"""From R's handshake to the register file's write port."""
BANK_LINES = 4


def load_layout(machine: Machine) -> data.StructLayout:
    """A load as the engine takes it: `n` elements from byte `address` on to the registers from `word` on.

    `scalar`: one float32's bits, to the scalar port.
    """
    words = machine.vector.words
    return data.StructLayout(
        {
            "format": unsigned(FORMAT_BITS),
            "scalar": 1,
            "address": unsigned(byte_bits(machine)),
            "word": range(words),
            "n": range(words + 1),
            "ticket": unsigned(completed_shape(machine)),
        }
    )


class LoadEngine(wiring.Component):
    """Loads one after another.

    `begin` takes `load`, only if `room`; `busy` from the next cycle to `finish`, the last one of its occupancy. `write`
    is the register file's port, `scalar_data` the last scalar load's word from its instruction's completion on.
    `unfinished`: loads whose rows are not all on the write port yet, oldest first. `error`: a bad answer.
    """

    def __init__(self, machine: Machine) -> None:
        """Take a machine; `decoder` is the conversion's module."""
        self.machine = machine
        self.decoder = Shared("memory_decoder", Float32FromMemory(CONVERT_CYCLES))
        self.loads = 1 << (machine.ddr.latency + 8).bit_length()
        super().__init__(
            {
                "begin": In(1),
                "load": In(load_layout(machine)),
                "room": Out(1),
                "busy": Out(1),
                "finish": Out(1),
                "ddr": Out(axi_read(ddr_address_bits(machine), LINE_BYTES)),
                "write": Out(write_port(machine)),
                "scalar_data": Out(32),
                "unfinished": Out(data.ArrayLayout(unfinished_layout(completed_shape(machine)), CONVERT_CYCLES + 1)),
                "error": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """Requests, banks, rows."""
        self._m = m = Module()
        layout = load_layout(self.machine)
        m.submodules.loads = self._loads = loads = SyncFIFO(width=layout.size, depth=self.loads)
        m.d.comb += [
            loads.w_data.eq(self.load),
            loads.w_en.eq(self.begin & (self.load.n != 0)),
            self.room.eq(loads.w_rdy),
        ]
        self._request()
        self._rows()
        return m

    def _request(self) -> None:
        """Lines asked for, and the occupancy: lines at their pace, and a cycle for each register row."""
        m, load, machine = self._m, self.load, self.machine
        lanes, words, cycles = machine.vector.lanes, machine.vector.words, line_cycles(machine)
        sizes = {item: Const(log2(FORMAT_BYTES[item]), 2) for item in Format}
        lines, gap = Signal(range(words * 4 // LINE_BYTES + 2)), Signal(range(max(2, cycles)))
        rows, line = Signal(range(max(2, words // lanes + 1))), Signal(line_bits(machine))
        end = load.address[:LINE_BITS] + (load.n << by_format(load.format, sizes)) + (LINE_BYTES - 1)
        asks, taken, asked = Signal(), Signal(), Signal()
        m.d.comb += [
            asks.eq((lines != 0) & (gap == 0)),
            taken.eq(asks & self.ddr.ar.ready),
            self.ddr.ar.valid.eq(asks),
            self.ddr.ar.payload.addr.eq(line << LINE_BITS),
            asked.eq((lines == 0) & (gap <= 1)),
            self.finish.eq(self.busy & (rows <= 1) & (asked | (taken & (lines == 1) & (cycles == 1)))),
        ]
        with m.If(self.begin):
            m.d.sync += [
                self.busy.eq(1),
                lines.eq(Mux(load.n == 0, 0, end >> LINE_BITS)),
                rows.eq((load.n + (lanes - 1)) >> log2(lanes)),
                line.eq(load.address >> LINE_BITS),
                gap.eq(0),
            ]
        with m.Else():
            with m.If(self.finish):
                m.d.sync += self.busy.eq(0)
            with m.If((rows > 1) & (taken | ~asks)):
                m.d.sync += rows.eq(rows - 1)
            with m.If(taken):
                m.d.sync += [lines.eq(lines - 1), line.eq(line + 1), gap.eq(cycles - 1)]
            with m.Elif(gap != 0):
                m.d.sync += gap.eq(gap - 1)

    def _banks(self) -> tuple[list[SyncFIFO], Signal]:
        """Two queues of lines that take turns; the bank with the older line is `turn`."""
        m, r = self._m, self.ddr.r
        turn, filling = Signal(), Signal()
        banks = []
        for index in range(2):
            m.submodules[f"bank_{index}"] = bank = SyncFIFO(width=8 * LINE_BYTES, depth=BANK_LINES)
            banks.append(bank)
            m.d.comb += [bank.w_data.eq(r.payload.data), bank.w_en.eq(r.valid & (filling == index))]
        m.d.comb += r.ready.eq(Mux(filling, banks[1].w_rdy, banks[0].w_rdy))
        with m.If(r.valid & r.ready):
            m.d.sync += filling.eq(~filling)
        m.d.sync += self.error.eq(r.valid & r.ready & (r.payload.resp != 0))
        return banks, turn

    def _rows(self) -> None:
        """One piece of a row a cycle, as soon as its bytes are there.

        A piece drops the lines in which it is the last: its own, and with the load's last piece also the next one.
        """
        m, machine, loads = self._m, self.machine, self._loads
        lanes, words = machine.vector.lanes, machine.vector.words
        banks, turn = self._banks()
        load = load_layout(machine)(loads.r_data)
        begins, place = Signal(init=1), Signal(LINE_BITS)
        left, word = Signal(range(words + 1)), Signal(range(words))
        offset, count, here, rest = Signal(LINE_BITS), Signal(range(lanes + 1)), Signal.like(word), Signal.like(left)
        most, size = Signal(range(lanes + 1)), Signal(2)
        end, last, moves = Signal(LINE_BITS + 1), Signal(), Signal()
        drop, drop_next = Signal(), Signal()
        own, other = (Mux(turn, banks[1 - index].r_rdy, banks[index].r_rdy) for index in range(2))
        m.d.comb += [
            size.eq(by_format(load.format, {item: Const(log2(FORMAT_BYTES[item]), 2) for item in Format})),
            most.eq(by_format(load.format, {item: Const(piece_words(machine, item), 8) for item in Format})),
            offset.eq(Mux(begins, load.address[:LINE_BITS], place)),
            rest.eq(Mux(begins, load.n, left)),
            here.eq(Mux(begins, load.word, word)),
            last.eq(rest <= most),
            count.eq(Mux(last, rest, most)),
            end.eq(offset + (count << size)[: LINE_BITS + 1]),
            moves.eq(loads.r_rdy & own & (other | (end <= LINE_BYTES))),
            drop.eq(moves & (last | end[LINE_BITS])),
            drop_next.eq(moves & last & (end > LINE_BYTES)),
            banks[0].r_en.eq(Mux(turn, drop_next, drop)),
            banks[1].r_en.eq(Mux(turn, drop, drop_next)),
            loads.r_en.eq(moves & last),
        ]
        with m.If(moves):
            m.d.sync += [
                begins.eq(last),
                place.eq(end),
                left.eq(rest - most),
                word.eq(here + most),
                turn.eq(turn ^ drop ^ drop_next),
            ]
        ring = Cat(banks[0].r_data, banks[1].r_data)
        places = min(lanes, LINE_BYTES)
        lane = here[: log2(places)]
        # An element of a single-word load goes to its lane; rows otherwise begin at lane 0 of a piece.
        shift = Signal(LINE_BITS + 1)
        folded = by_format(load.format, {item: lane[: log2(piece_words(machine, item))] for item in Format})
        m.d.comb += shift.eq(Cat(offset, turn) - Mux(load.scalar, 0, folded << size))
        mask = ((Const(1, lanes + 1) << count) - 1)[:lanes] << here[: log2(lanes)]
        window, row = _window(m, ring, shift), here >> log2(lanes)
        self._write(moves & ~load.scalar, moves & last, load, window, mask[:lanes], row)

    def _write(self, valid: Value, ends: Value, load: Any, window: Value, mask: Value, row: Value) -> None:
        """Elements to words, and the write port; the loads that end on their way there."""
        m, machine = self._m, self.machine
        lanes = machine.vector.lanes
        bytes_, number = Signal(8 * LINE_BYTES, reset_less=True), Signal(FORMAT_BITS, reset_less=True)
        scalar = Signal()
        m.d.sync += [bytes_.eq(window), number.eq(load.format), scalar.eq(ends & load.scalar)]
        with m.If(scalar):
            m.d.sync += self.scalar_data.eq(bytes_[:32])
        results = []
        for place in range(min(lanes, LINE_BYTES)):
            m.submodules[f"decoder_{place}"] = decoder = self.decoder.replica()
            raws = {}
            for item in Format:
                bits, at = 8 * FORMAT_BYTES[item], place % piece_words(machine, item)
                raws[item] = bytes_[bits * at : bits * (at + 1)]
            m.d.comb += [decoder.raw.eq(by_format(number, raws)), decoder.format.eq(number)]
            results.append(decoder.result)
        m.d.comb += self.write.data.eq(Cat(results * (lanes // len(results))))
        behind = 1 + CONVERT_CYCLES
        m.d.comb += [
            self.write.mask.eq(delayed(m, Mux(valid, mask, 0), behind, "mask", reset=True)),
            self.write.address.eq(delayed(m, row, behind, "row_written")),
        ]
        m.d.comb += [self.unfinished[-1].valid.eq(self._loads.r_rdy), self.unfinished[-1].ticket.eq(load.ticket)]
        ending, ticket = ends, load.ticket
        for stage in range(CONVERT_CYCLES):
            entry = self.unfinished[CONVERT_CYCLES - 1 - stage]
            m.d.sync += [entry.valid.eq(ending), entry.ticket.eq(ticket)]
            ending, ticket = entry.valid, entry.ticket


def _window(m: Module, ring: Value, shift: Value) -> Value:
    """The line of bytes that begins `shift` bytes into a ring of two lines."""
    value: Value = Cat(ring, ring[: 8 * (LINE_BYTES - 1)])
    for bit in reversed(range(LINE_BITS + 1)):
        step = 1 << bit
        length = LINE_BYTES + step - 1
        turned = Signal(8 * length, name=f"window_{bit}")
        m.d.comb += turned.eq(Mux(shift[bit], value[8 * step : 8 * (step + length)], value[: 8 * length]))
        value = turned
    return value
