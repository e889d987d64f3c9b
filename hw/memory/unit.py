"""The memory unit: load, store, sload, sstore; vectors between register file and DDR, and stores to HBM.

Contract (docs/timing.md, "Memory unit"): a transfer on `memory` in cycle s is the instruction's start. Everything lags
by one cycle: what the contract has in cycle s shows in s + 1; `ready` is high in the lagging occupancy's last cycle and
never depends on the instruction offered. An instruction completes when the contract says so, or later, when its
register rows are written or its writes answered. Until then it holds no resource of the next one: loads and stores of
different instructions overlap, and what orders them where they touch the same bytes is the scoreboard.

A memory keeps the contract if it answers within `read_limit` cycles of AR, and `write_limit` of the later of AW and W.
Register reads of a store end with its occupancy, even if the memory makes that longer.
"""

from __future__ import annotations

from typing import Any

from amaranth.hdl import Const, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out

from typebar.hw.arith.convert import FORMAT_BITS
from typebar.hw.control.completion import CompletionLine
from typebar.hw.control.core import issued_layout
from typebar.hw.control.decoder import modifier, slot
from typebar.hw.control.tickets import Domain, owed, ticket_bits
from typebar.hw.memory.fetch import hbm_address_bits, hbm_row_bits
from typebar.hw.memory.load import WRITE_CYCLES_BEHIND, LoadEngine
from typebar.hw.memory.pack import PIECES, StorePacker
from typebar.hw.memory.store import LINE_BITS, StoreWalker, byte_bits, ddr_address_bits, line_cycles, log2
from typebar.hw.memory.write import LineWriter, oldest, unfinished_layout
from typebar.hw.ports import (
    CAUSE_BITS,
    activity_layout,
    axi_read,
    axi_write,
    completed_shape,
    flag_layout,
    read_port,
    write_port,
)
from typebar.hw.replicate import Shared
from typebar.isa.instructions import HBM_REGIONS, Format, Region
from typebar.isa.machine import LINE_BYTES, Machine, MachineError
from typebar.isa.timing import OP, Cause

READ_CYCLES_AROUND = 1 + WRITE_CYCLES_BEHIND
"""Cycles of a load that are not the memory's: the lag, and from R to the register file."""
WRITE_CYCLES_AROUND = 14
"""Cycles of a store that are not the memory's: the lag, from a piece to AW and W, up to three lines that one piece
closes, and from B to `completed`."""
STORES = 2 * PIECES
"""Stores that are not handed over to the ports: each has a piece or a line in the packer."""


def read_limit(machine: Machine) -> int:
    """Most cycles from AR's handshake to R, for the contract to be met to the cycle.

    A misaligned row has to wait for the line after its own.
    """
    return machine.ddr.latency - READ_CYCLES_AROUND - line_cycles(machine)


def write_limit(latency: int) -> int:
    """Most cycles from the handshakes of AW and W to B, for the contract to be met to the cycle; of either memory."""
    return latency - WRITE_CYCLES_AROUND


def base_bits(machine: Machine) -> int:
    """Width of a region's base: a row number in HBM, a byte address in DDR."""
    return max(hbm_row_bits(machine), ddr_address_bits(machine))


class MemoryUnit(wiring.Component):
    """The memory unit of a machine.

    `memory`: the instruction stream, `waited` the cause of its wait. `completed`: the ticket of the last instruction
    done. `bases`: by number of `Region`, the first row (HBM) or first byte (DDR, a multiple of a line). `write_slot`:
    this cycle is one. `read`, `write`: ports of the register file. `scalar_valid`, `scalar_data`: a scalar load's word,
    in the cycle before its `completed`. `ddr_read`, `ddr_write`, `hbm_write`: AXI, single beats. `saturated`: the
    numeric flag. `error`: a memory answered with an error some cycles ago; the instruction completes nevertheless.
    `rows_moved` and `lines_moved`, for the counters: HBM rows written, and DDR lines read or written.

    Attributes:
        shared: modules whose Verilog goes beside the unit's.
    """

    def __init__(self, machine: Machine) -> None:
        """Take a machine.

        Raises:
            MachineError: a memory's latency leaves no time for the unit's pipeline.
        """
        least = READ_CYCLES_AROUND + line_cycles(machine) + 1, WRITE_CYCLES_AROUND + 1
        for key, value, limit in (
            ("ddr.latency", machine.ddr.latency, max(least)),
            ("hbm.latency", machine.hbm.latency, least[1]),
        ):
            if value < limit:
                raise MachineError(
                    f"{machine.name}: {key} = {value} is faster than the hardware's pipeline: set it to {limit} or more"
                )
        self.machine, self.bits = machine, ticket_bits(machine)
        self.walker, self.packer = StoreWalker(machine), StorePacker(machine)
        self.writer, self.loader = LineWriter(machine), LoadEngine(machine)
        self.shared: tuple[Shared, ...] = (self.packer.encoder, self.loader.decoder, self.writer.tracker)
        hbm = machine.hbm
        super().__init__(
            {
                "memory": In(stream.Signature(issued_layout(machine, Domain.MEMORY))),
                "waited": In(CAUSE_BITS),
                "completed": Out(completed_shape(machine)),
                "bases": In(data.ArrayLayout(unsigned(base_bits(machine)), len(Region))),
                "write_slot": In(1),
                "read": Out(read_port(machine)),
                "write": Out(write_port(machine)),
                "scalar_valid": Out(1),
                "scalar_data": Out(32),
                "ddr_read": Out(axi_read(ddr_address_bits(machine), LINE_BYTES)),
                "ddr_write": Out(axi_write(ddr_address_bits(machine), LINE_BYTES)),
                "hbm_write": Out(axi_write(hbm_address_bits(machine), hbm.channel_bytes)).array(hbm.channels),
                "saturated": Out(flag_layout()),
                "activity": Out(activity_layout()),
                "error": Out(1),
                "rows_moved": Out(2),
                "lines_moved": Out(2),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """The engines, what they are given, and when an instruction is done."""
        self._m = m = Module()
        walker, packer, writer, loader = self.walker, self.packer, self.writer, self.loader
        m.submodules.walker, m.submodules.packer = walker, packer
        m.submodules.writer, m.submodules.loader = writer, loader
        wiring.connect(m, wiring.flipped(self.ddr_read), loader.ddr)
        wiring.connect(m, wiring.flipped(self.write), loader.write)
        wiring.connect(m, wiring.flipped(self.ddr_write), writer.ddr)
        for outer, inner in zip(self.hbm_write, writer.hbm, strict=True):
            wiring.connect(m, wiring.flipped(outer), inner)
        wiring.connect(m, packer.lines, writer.lines)
        slot_before = Signal()
        m.d.sync += [slot_before.eq(self.write_slot), self.error.eq(writer.error | loader.error)]
        m.d.comb += [
            walker.slot.eq(slot_before),
            walker.room.eq(packer.room),
            packer.valid.eq(walker.valid),
            packer.piece.eq(walker.piece),
            packer.row.eq(self.read.data),
            self.read.address.eq(walker.row),
            self.saturated.eq(packer.saturated),
            self.rows_moved.eq(walker.new_rows),
            self.lines_moved.eq(walker.new_lines + (loader.ddr.ar.valid & loader.ddr.ar.ready)),
            self.scalar_data.eq(loader.scalar_data),
        ]
        self._start()
        self._complete()
        return m

    def _operand(self, instruction: str, name: str) -> Any:
        return self.memory.payload["values"][slot(instruction, name)]

    def _start(self) -> None:
        """The instruction offered, as one or the other engine takes it."""
        m, machine, p = self._m, self.machine, self.memory.payload
        store, load = self.walker.store, self.loader.load
        address, element = Signal(byte_bits(machine)), Signal(FORMAT_BITS)
        region, line, byte = Signal(range(len(Region))), Signal(32), Signal(32)
        loads, scalar, hbm = Signal(), Signal(), Signal()
        m.d.comb += scalar.eq((p.opcode == OP["sload"]) | (p.opcode == OP["sstore"]))
        with m.Switch(p.opcode):
            for name in ("load", "store", "sload", "sstore"):
                with m.Case(OP[name]):
                    m.d.comb += [
                        loads.eq("load" in name),
                        region.eq(modifier(p.modifiers, name, "region")),
                        line.eq(self._operand(name, "line")),
                        byte.eq(self._operand(name, "byte")),
                        element.eq(int(Format.FP32)),
                    ]
                    if name in ("load", "store"):
                        m.d.comb += element.eq(modifier(p.modifiers, name, "format"))
        base = self.bases[region]
        m.d.comb += [
            hbm.eq(region <= max(HBM_REGIONS)),
            address.eq(
                Mux(hbm, base << log2(machine.row_bytes), base) + (line.as_signed() << LINE_BITS) + byte.as_signed()
            ),
            store.format.eq(element),
            store.hbm.eq(hbm),
            store.scalar.eq(scalar),
            store.value.eq(self._operand("sstore", "value")),
            store.address.eq(address),
            store.word.eq(self._operand("store", "a")),
            store.outer.eq(Mux(scalar, 1, self._operand("store", "outer"))),
            store.inner.eq(Mux(scalar, 1, self._operand("store", "inner"))),
            store.outer_bytes.eq(self._operand("store", "outer_bytes")),
            store.inner_bytes.eq(Mux(scalar, 4, self._operand("store", "inner_bytes"))),
            store.ticket.eq(p.ticket),
            store.pc.eq(p.pc),
            load.format.eq(element),
            load.scalar.eq(scalar),
            load.address.eq(address),
            load.word.eq(self._operand("load", "dst")),
            load.n.eq(Mux(scalar, 1, self._operand("load", "n"))),
            load.ticket.eq(p.ticket),
        ]
        self._begin(loads, scalar, hbm)

    def _begin(self, loads: Value, scalar: Value, hbm: Value) -> None:
        """Transfers, and what the counters are told of the unit."""
        m, walker, loader, p = self._m, self.walker, self.loader, self.memory.payload
        m.submodules.stores = self._stores = stores = SyncFIFO(width=self.bits, depth=STORES)
        self._starts, self._loads = starts, loads = Signal(), loads
        self._finish, self._ticket, self._hbm = Signal(), Signal(self.bits), Signal()
        busy, waited, store = Signal(), Signal(CAUSE_BITS), walker.store
        m.d.comb += [
            busy.eq(walker.busy | loader.busy),
            self._finish.eq(walker.finish | loader.finish),
            self.memory.ready.eq((~busy | self._finish) & loader.room & stores.w_rdy),
            starts.eq(self.memory.valid & self.memory.ready),
            walker.begin.eq(starts & ~loads),
            loader.begin.eq(starts & loads),
            stores.w_en.eq(walker.begin & (store.outer != 0) & (store.inner != 0)),
            stores.w_data.eq(p.ticket),
            stores.r_en.eq(self.writer.written),
            self.activity.active.eq(busy),
            self.activity.cause.eq(Mux(walker.busy, walker.cause, int(Cause.TRANSFER))),
            self.activity.waited.eq(waited),
        ]
        with m.If(starts):
            m.d.sync += [self._ticket.eq(p.ticket), self._hbm.eq(~loads & hbm), waited.eq(self.waited)]
        self._sload = starts & loads & scalar

    def _complete(self) -> None:
        """`completed` is the contract's, unless an older instruction has rows or answers to come."""
        m, machine, loader = self._m, self.machine, self.loader
        ddr, hbm = machine.ddr.latency, machine.hbm.latency
        # One cycle before `done`: `completed` is a register.
        m.submodules.line = line = CompletionLine(self.bits, max(ddr, hbm) - 2)
        first = Signal(unfinished_layout(self.bits))
        waiting, following = Signal(unfinished_layout(self.bits)), Signal(self.bits)
        m.d.comb += [
            first.valid.eq(self._stores.r_rdy),
            first.ticket.eq(self._stores.r_data),
            line.enter.eq(self._finish),
            line.ticket.eq(self._ticket),
            line.latency.eq(Mux(self._hbm, Const(hbm - 2), Const(ddr - 2))),
        ]
        reads = [loader.unfinished[index] for index in range(len(loader.unfinished))]
        last = oldest(m, [*reads, first, self.writer.unfinished], "unfinished")
        held = last.valid & ~owed(last.ticket, line.completed)
        m.d.comb += [
            following.eq(Mux(held, last.ticket - 1, line.completed)),
            self.scalar_valid.eq(waiting.valid & (following == waiting.ticket)),
        ]
        m.d.sync += self.completed.eq(following)
        with m.If(self._sload):
            m.d.sync += [waiting.valid.eq(1), waiting.ticket.eq(self.memory.payload.ticket)]
        with m.Elif(self.scalar_valid):
            m.d.sync += waiting.valid.eq(0)
