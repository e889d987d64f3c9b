"""The control block as the host sees it: registers to read, and what they hold."""

from __future__ import annotations

from enum import IntEnum


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
