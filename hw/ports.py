"""Signatures that the units share: ports of the register file, AXI channels, what a unit tells the counters.

All are seen from the unit: `Out` leaves it.
"""

from __future__ import annotations

from amaranth.hdl import unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from typebar.hw.control.tickets import ticket_bits
from typebar.isa.instructions import TARGET_BITS
from typebar.isa.machine import Machine
from typebar.isa.timing import Cause

READ_CYCLES = 2
"""Register file: from the cycle in which an address is presented to the one in which its data are there."""
WRITE_CYCLES = 2
"""Register file: from the cycle in which a write is presented to the first whose read address sees it."""
CAUSE_BITS = max(Cause).bit_length()
_BLOCK_RAM_DEPTH = 512
"""Words that a block RAM holds at its full width."""


def deep(depth: int) -> dict[str, str]:
    """Attributes of a wide memory of `depth` words with one write port: UltraRAM if block RAM would be stacked."""
    return {"ram_style": "ultra"} if depth > _BLOCK_RAM_DEPTH else {}


def file_rows(machine: Machine) -> int:
    """Rows of the register file; a row is `vector.lanes` words, and vectors start on one."""
    return machine.vector.words // machine.vector.lanes


def read_port(machine: Machine) -> wiring.Signature:
    """One row a cycle, any address: `data` belongs to the `address` of READ_CYCLES before."""
    row = data.ArrayLayout(unsigned(32), machine.vector.lanes)
    return wiring.Signature({"address": Out(range(file_rows(machine))), "data": In(row)})


def write_port(machine: Machine) -> wiring.Signature:
    """One row a cycle: the words of `data` whose bit in `mask` is set."""
    row = data.ArrayLayout(unsigned(32), machine.vector.lanes)
    return wiring.Signature(
        {"address": Out(range(file_rows(machine))), "mask": Out(machine.vector.lanes), "data": Out(row)}
    )


def activity_layout() -> data.StructLayout:
    """What a unit does in a cycle, for the performance counters (docs/timing.md, "Accounting").

    `active`: the cycle belongs to `cause`. If it is the first active one after idle cycles, those belong to `waited`.
    """
    return data.StructLayout({"active": 1, "cause": unsigned(CAUSE_BITS), "waited": unsigned(CAUSE_BITS)})


def flag_layout() -> data.StructLayout:
    """A numeric flag raised in this cycle by the instruction at `pc`."""
    return data.StructLayout({"raised": 1, "pc": unsigned(TARGET_BITS)})


def completed_shape(machine: Machine) -> int:
    """Width of the ticket that a unit publishes as its last one done."""
    return ticket_bits(machine)


def axi_read(address_bits: int, data_bytes: int) -> wiring.Signature:
    """AR and R of an AXI4 master that asks for single beats; whoever wraps it ties length, size and burst."""
    return wiring.Signature(
        {
            "ar": Out(stream.Signature(data.StructLayout({"addr": unsigned(address_bits)}))),
            "r": In(stream.Signature(data.StructLayout({"data": unsigned(8 * data_bytes), "resp": unsigned(2)}))),
        }
    )


def axi_write(address_bits: int, data_bytes: int) -> wiring.Signature:
    """AW, W and B of an AXI4 master that writes single beats; AW and W may be taken in either order."""
    return wiring.Signature(
        {
            "aw": Out(stream.Signature(data.StructLayout({"addr": unsigned(address_bits)}))),
            "w": Out(stream.Signature(data.StructLayout({"data": unsigned(8 * data_bytes), "strb": data_bytes}))),
            "b": In(stream.Signature(data.StructLayout({"resp": unsigned(2)}))),
        }
    )


def link_layout(machine: Machine) -> data.StructLayout:
    """A beat on a ring link: one register row of a block, with the gather's number and length in words."""
    return data.StructLayout(
        {
            "row": data.ArrayLayout(unsigned(32), machine.vector.lanes),
            "sequence": unsigned(8),
            "words": unsigned(machine.ring.buffer_words.bit_length()),
            "last": 1,
        }
    )
