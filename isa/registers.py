"""The control block: registers as the host reads them through a device, and their byte addresses on the card's bus.

The bus is AXI-Lite, 32 bits wide; only whole words are written. Values of 64 bits lie at an address and the one 4 bytes
on, low word first. Addresses that are not named here read as 0; writes to them and to what can only be read do nothing.
"""

from __future__ import annotations

import hashlib
import json
from enum import IntEnum

from typebar.isa.instructions import INSTRUCTIONS, ISA_VERSION, WORD_BYTES, Kind, Region
from typebar.isa.timing import COUNTERS, UNIT_NAMES, Cause


class Status(IntEnum):
    """Values of register STATUS."""

    IDLE = 0
    RUNNING = 1
    DONE = 2
    ERROR = 3


class Register(IntEnum):
    """Registers that a rank's control block lets the host read.

    TRAP holds an `isa.instructions.Trap` and PC the index of the instruction that trapped; FLAGS the
    `isa.numerics.NumericFlag` bits that the last launch raised, FLAG_PC + i the first instruction that raised bit i.
    """

    STATUS = 0
    TRAP = 1
    PC = 2
    INSTRUCTIONS = 3
    FLAGS = 4
    FLAG_PC = 8


NUMERIC_FLAGS = 3
"""Bits of FLAGS, each with the index of the first instruction that raised it."""
IDENTITY = 0x54595042
"""What ID holds: "TYPB"."""
HARDWARE_VERSION = 1
"""Version of this register map."""
ADDRESS_BITS = 12
"""Width of the bus's byte addresses: the block takes 4 KiB."""
START, SOFT_RESET = 1, 2
"""Bits written to CONTROL: start a run (while none is running); return everything but settings and program to reset."""


class Address(IntEnum):
    """Byte addresses in the control block; `rw` below are settings, to be written while no program runs.

    ID, VERSION, the first 64 bits of `isa_hash` and of `Machine.contract_hash`, and CAPABILITIES (HBM channels in bits
    0 to 7, whether fetches run ahead in bit 8) and PROGRAM_WORDS (instructions that program memory holds) say what the
    hardware is. CONTROL (write only) takes START (1) and SOFT_RESET (2). STATUS is a `Status`; TRAP, PC, TRAP_CODE (of
    `trap`) and UNIT (of TIMEOUT and BUS; a place in `typebar.isa.timing.UNIT_NAMES`) say what went wrong; FLAGS and
    FLAG_PC are those of `Register`. After TIMEOUT, BUS or RING_MISMATCH only SOFT_RESET makes the device start again.
    RANK, DEVICES, ENTRY and LENGTH (instructions of the program) are rw. WATCHDOG (rw) is the number of cycles without
    progress that end a run with TIMEOUT, 0 for none; `typebar.isa.watchdog` works one out, and it holds after reset.
    PROGRAM_INDEX (rw) chooses the instruction in the window at PROGRAM, whose 16 words can only be written, and
    advances when the last is.

    REGIONS has for each region, 16 bytes apart, its base (rw, 64 bits: a memory row in HBM, a byte address, a multiple
    of 64, in DDR) and its size (rw, 64 bits, bytes; 0 if not bound). DDR_POINTER and, 8 bytes apart, HBM_POINTERS (rw,
    64 bits) are the byte addresses that the platform gave the memories of the DDR and each HBM channel.

    COUNTERS has for each unit of UNIT_NAMES, 256 bytes apart, the cycles of each `Cause`, 8 bytes apart; TOTALS the
    run's cycles and then `TOTAL_NAMES`, 8 bytes apart. All are exact once the program has stopped.
    """

    ID = 0x000
    VERSION = 0x004
    ISA_HASH = 0x008
    CONTRACT_HASH = 0x010
    CAPABILITIES = 0x018
    PROGRAM_WORDS = 0x01C
    CONTROL = 0x020
    STATUS = 0x024
    TRAP = 0x028
    PC = 0x02C
    TRAP_CODE = 0x030
    UNIT = 0x034
    FLAGS = 0x038
    FLAG_PC = 0x03C
    RANK = 0x050
    DEVICES = 0x054
    ENTRY = 0x058
    LENGTH = 0x05C
    WATCHDOG = 0x060
    PROGRAM_INDEX = 0x064
    REGIONS = 0x080
    DDR_POINTER = 0x0E0
    PROGRAM = 0x100
    HBM_POINTERS = 0x200
    COUNTERS = 0x800
    TOTALS = 0xE00


TOTAL_NAMES = ("cycles", *COUNTERS)
"""Totals of a run, in the order in which they lie at TOTALS; what each counts is in docs/timing.md, "Accounting"."""
_UNIT_BYTES, _VALUE_BYTES, _REGION_BYTES = 256, 8, 16


def region_address(region: Region, size: bool = False) -> int:
    """Address of a region's base, or of its size."""
    return Address.REGIONS + _REGION_BYTES * int(region) + (_VALUE_BYTES if size else 0)


def pointer_address(channel: int | None) -> int:
    """Address of the pointer to an HBM channel's memory, or, without a channel, to that of the DDR."""
    return int(Address.DDR_POINTER) if channel is None else Address.HBM_POINTERS + _VALUE_BYTES * channel


def counter_address(unit: str, cause: Cause) -> int:
    """Address of the counter of a unit (of UNIT_NAMES) and a cause."""
    return Address.COUNTERS + _UNIT_BYTES * UNIT_NAMES.index(unit) + _VALUE_BYTES * int(cause)


def total_address(name: str) -> int:
    """Address of one of TOTAL_NAMES."""
    return Address.TOTALS + _VALUE_BYTES * TOTAL_NAMES.index(name)


def register_address(index: int) -> int | None:
    """Where a `Register`, or FLAG_PC + i, lies on the bus; None if there is no such register."""
    if Register.FLAG_PC <= index < Register.FLAG_PC + NUMERIC_FLAGS:
        return Address.FLAG_PC + 4 * (index - Register.FLAG_PC)
    places = {
        Register.STATUS: Address.STATUS,
        Register.TRAP: Address.TRAP,
        Register.PC: Address.PC,
        Register.INSTRUCTIONS: total_address("instructions"),
        Register.FLAGS: Address.FLAGS,
    }
    return int(places[Register(index)]) if index in places else None


def isa_hash() -> str:
    """SHA-256 over version and encoding of every instruction: what decoder and program must agree on."""
    kinds = [
        [
            item.name,
            item.opcode,
            item.unit.name,
            [
                [
                    place.field.name,
                    place.field.kind.name,
                    place.offset,
                    place.field.width,
                    sorted(int(value) for value in place.field.values or ()) if place.field.kind is Kind.ENUM else [],
                ]
                for place in item.layout()
            ],
        ]
        for item in INSTRUCTIONS
    ]
    return hashlib.sha256(json.dumps([ISA_VERSION, WORD_BYTES, kinds]).encode()).hexdigest()


assert max(Cause) < _UNIT_BYTES // _VALUE_BYTES and len(UNIT_NAMES) * _UNIT_BYTES <= Address.TOTALS - Address.COUNTERS
assert region_address(Region.IO, size=True) < Address.DDR_POINTER
