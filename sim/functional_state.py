"""What the functional simulator keeps for each device, and how a device stops with an error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from typebar.isa.checks import Checker
from typebar.isa.errors import TypebarError
from typebar.isa.instructions import (
    COUNT_REGISTER,
    DEVICE_REGISTER,
    SCALAR_REGISTERS,
    TRAP_TEXT,
    WRITABLE_REGIONS,
    Region,
    Trap,
)
from typebar.isa.machine import Machine

StoreHook = Callable[[int, int, int, int], None]
"""Called as hook(device, line, byte, value) when an `sstore` has written its word."""


class DeviceTrap(TypebarError):
    """A device stopped: `trap`, the instruction index `pc`, the rank `device` and, for SOFTWARE, its `code`."""

    def __init__(self, trap: Trap, pc: int, device: int, code: int | None = None) -> None:
        """Compose the one line from `TRAP_TEXT`."""
        self.trap, self.pc, self.device, self.code = trap, pc, device, code
        detail = "" if code is None else f" with code {code}"
        super().__init__(f"device {device} stopped at instruction {pc} with {trap.name}{detail}: {TRAP_TEXT[trap]}")


@dataclass
class DeviceMemory:
    """One device's regions, each a one-dimensional array of bytes; those left out are not bound.

    WEIGHTS, PARAMS and LOCAL are only read, so read-only memory maps serve. KV and IO must be writable.
    """

    regions: Mapping[Region, NDArray[np.uint8]] = field(default_factory=dict)

    def by_number(self) -> list[NDArray[np.uint8]]:
        """The regions' bytes by region number, empty where none is bound.

        Raises:
            TypebarError: an array that is not one-dimensional contiguous bytes, or a read-only KV or IO.
        """
        memory = [np.empty(0, np.uint8) for _ in Region]
        for region, data in self.regions.items():
            if data.dtype != np.uint8 or data.ndim != 1 or not data.flags.c_contiguous:
                raise TypebarError(
                    f"region {Region(region).name} must be a contiguous vector of uint8, not {data.dtype} {data.shape}"
                )
            if region in WRITABLE_REGIONS and not data.flags.writeable:
                raise TypebarError(f"region {Region(region).name} must be writable: copy the array first")
            # A plain view: indexing a memory map would build memory-map objects on every access.
            memory[region] = data.view(np.ndarray)
        return memory


class DeviceState:
    """Registers, memory and counters of one device while a program runs."""

    __slots__ = (
        "checker", "counts", "devices", "executed", "flags", "memory", "on_store", "pc", "pending", "rank",
        "registers", "resume", "started", "vector", "words",
    )  # fmt: skip

    def __init__(self, rank: int, devices: int, machine: Machine, memory: DeviceMemory) -> None:
        """Bind the memory; `reset` must follow before a run."""
        self.rank = rank
        self.devices = devices
        self.memory = memory.by_number()
        self.checker = Checker(machine, [data.size for data in self.memory])
        self.vector: NDArray[np.float32] = np.zeros(machine.vector.words, np.float32)
        self.words: NDArray[np.int32] = self.vector.view(np.int32)
        self.executed = 0
        self.reset(0, 0, None)

    def reset(self, entry: int, program_length: int, on_store: StoreHook | None) -> None:
        """The state at start: scalar registers zero but R1 (rank) and R2 (devices); vector registers stay."""
        self.registers = [0] * SCALAR_REGISTERS
        self.registers[DEVICE_REGISTER] = self.rank
        self.registers[COUNT_REGISTER] = self.devices
        self.pc = self.resume = entry
        self.started = self.executed
        self.pending: tuple[int, int, int] | None = None
        self.flags: dict[int, int] = {}
        self.counts = [0] * program_length
        self.on_store = on_store

    def stop(self, trap: Trap, code: int | None = None) -> DeviceTrap:
        """The exception for a trap of the current instruction."""
        return DeviceTrap(trap, self.pc, self.rank, code)

    def raise_flags(self, flags: int) -> None:
        """Keep the first instruction index of each numeric flag bit."""
        bit = 1
        while bit <= flags:
            if flags & bit:
                self.flags.setdefault(bit, self.pc)
            bit <<= 1


def strided(
    data: NDArray[Any], dtype: Any, start_bytes: int, shape: Sequence[int], strides: Sequence[int]
) -> NDArray[Any]:
    """A view of an array's buffer: `shape` elements of `dtype` from a byte offset, `strides` in bytes.

    The caller has checked that all of it lies inside.
    """
    return np.ndarray(tuple(shape), dtype, buffer=data.data, offset=start_bytes, strides=tuple(strides))
