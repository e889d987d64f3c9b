"""A ring of kernels that runs: the built library's functions with Python's types, memory as numpy arrays."""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from typebar.isa.errors import TypebarError
from typebar.isa.machine import Machine

Bytes = NDArray[np.uint8]
BUS_CYCLES = 1000
"""Cycles in which the control block answers a transfer, or never will."""
NEVER = (1 << 64) - 1
LINKS = -1
"""The place of the links among the ports that can fail; memories are numbered, HBM's channels and then the DDR."""
READS = CLOCKWISE = 0
WRITES = ANTICLOCKWISE = 1


class BusError(TypebarError):
    """The control block does not answer, or answers with an error."""


class ProtocolError(TypebarError):
    """A kernel broke a rule of AXI that the memories count on: a defect of the hardware."""


@dataclass(frozen=True)
class Latencies:
    """Cycles of the outside world at fixed latency.

    From a read's request (AR taken) to its data, from a write's second half (AW or W) to its response, and on a link
    from a beat sent to the same beat received.
    """

    hbm_read: int
    hbm_write: int
    ddr_read: int
    ddr_write: int
    link: int


class NativeRing:
    """`devices` kernels of a machine with their memories, in one simulation with one clock; also a context manager.

    `memory(rank, channel)` are a memory's bytes themselves, at `pointer(rank, channel)` for the kernel; channels are
    HBM's, and the last is the DDR.
    """

    def __init__(self, library: Path, machine: Machine, devices: int, latencies: Latencies) -> None:
        """Memories start as zeros, kernels in reset.

        Raises:
            TypebarError: the memories do not fit this computer.
        """
        self._functions = _functions(str(library))
        self.machine, self.devices = machine, devices
        channels = machine.hbm.channels
        self.sizes = [machine.hbm.capacity_bytes // channels] * channels + [machine.ddr.capacity_bytes]
        sizes = (ctypes.c_uint64 * 2)(self.sizes[0], self.sizes[-1])
        cycles = [latencies.hbm_read, latencies.hbm_write, latencies.ddr_read, latencies.ddr_write, latencies.link]
        if min(cycles) < 1:
            raise TypebarError(f"the native model's memories and links take at least 1 cycle, not {min(cycles)}")
        period = 1_000_000 // machine.clock_mhz
        self._handle = self._functions.sim_open(devices, sizes, (ctypes.c_uint64 * 5)(*cycles), period)
        if not self._handle:
            total = devices * sum(self.sizes)
            raise TypebarError(f"{total} bytes of memory for {devices} x {machine.name} cannot be had on this computer")
        self._finalizer = weakref.finalize(self, self._functions.sim_close, self._handle)

    def close(self) -> None:
        """End the waveform and free everything: neither this nor arrays of `memory` may be used any more."""
        self._finalizer()

    def __enter__(self) -> NativeRing:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Free everything."""
        self.close()

    @property
    def cycle(self) -> int:
        """Cycles simulated so far."""
        return int(self._functions.sim_cycle(self._handle))

    def memory(self, rank: int, channel: int) -> Bytes:
        """A memory's bytes, which kernels and caller share."""
        address = self._functions.sim_memory(self._handle, rank, channel)
        array: Any = (ctypes.c_uint8 * self.sizes[channel]).from_address(address)
        array.owner = self  # lives as long as the array does
        found: Bytes = np.frombuffer(array, np.uint8)
        return found

    def pointer(self, rank: int, channel: int) -> int:
        """The byte address of a memory's first byte on the kernel's port."""
        return int(self._functions.sim_pointer(self._handle, rank, channel))

    def run(self, cycles: int) -> None:
        """Let time pass.

        Raises:
            ProtocolError: a kernel broke a rule.
        """
        self._functions.sim_run(self._handle, cycles)
        self._check()

    def reset(self) -> None:
        """The board's reset, of every kernel and of what its memories and links still owed it."""
        self._functions.sim_reset(self._handle)

    def clear(self) -> None:
        """Drop what memories and links still owe the kernels."""
        self._functions.sim_clear(self._handle)

    def start_run(self, seed: int = 0) -> None:
        """Count stalls and faults from here; `seed` as in `typebar.isa.timing.stall`, 0 for no stalls."""
        self._functions.sim_start_run(self._handle, seed)

    def write(self, address: int, value: int, rank: int | None = None) -> None:
        """Write a register of a kernel, or of all in the same cycle.

        Raises:
            BusError: no answer, or an error.
        """
        first, end = (0, self.devices) if rank is None else (rank, rank + 1)
        status = self._functions.sim_write(self._handle, first, end, address, value & 0xFFFFFFFF, BUS_CYCLES)
        self._answer(status, "write", address)

    def read(self, address: int, rank: int) -> int:
        """Read a register of a kernel.

        Raises:
            BusError: no answer, or an error.
        """
        value = ctypes.c_uint32()
        status = self._functions.sim_read(self._handle, rank, address, ctypes.byref(value), BUS_CYCLES)
        self._answer(status, "read", address)
        return value.value

    def trace(self, path: Path) -> None:
        """Dump every signal into a waveform from now on; the library must have been built for it.

        Raises:
            TypebarError: the file cannot be written.
        """
        if not self._functions.sim_trace(self._handle, str(path).encode()):
            raise TypebarError(f"the waveform {str(path)!r} cannot be written: name a file in a folder that exists")

    def fault(self, rank: int, port: int, side: int, withheld: int = NEVER, error: int = NEVER) -> None:
        """Break a port: `port` a memory's number with side READS or WRITES, or LINKS with a direction.

        From event number `withheld` of the run on nothing is answered, or no block taken; a memory's event number
        `error` is answered with an error. The defaults mend it.
        """
        self._functions.sim_fault(self._handle, rank, port, side, withheld, error)

    def _answer(self, status: int, what: str, address: int) -> None:
        self._check()
        if status < 0:
            raise BusError(f"no answer to a {what} of register {address:#x} within {BUS_CYCLES} cycles")
        if status:
            raise BusError(f"a {what} of register {address:#x} was answered with error {status}")

    def _check(self) -> None:
        text = self._functions.sim_error(self._handle)
        if text:
            raise ProtocolError(text.decode())


@lru_cache(maxsize=16)
def _functions(library: str) -> Any:
    """A library's functions with their types; loaded once in a process."""
    loaded = ctypes.CDLL(library)
    handle, u64, u32, number = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_int
    u64s, u32s = ctypes.POINTER(u64), ctypes.POINTER(u32)
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "sim_open": (handle, [number, u64s, u64s, u64]),
        "sim_close": (None, [handle]),
        "sim_cycle": (u64, [handle]),
        "sim_error": (ctypes.c_char_p, [handle]),
        "sim_reset": (None, [handle]),
        "sim_clear": (None, [handle]),
        "sim_start_run": (None, [handle, u32]),
        "sim_run": (number, [handle, u64]),
        "sim_trace": (number, [handle, ctypes.c_char_p]),
        "sim_memory": (handle, [handle, number, number]),
        "sim_pointer": (u64, [handle, number, number]),
        "sim_write": (number, [handle, number, number, u32, u32, u64]),
        "sim_read": (number, [handle, number, u32, u32s, u64]),
        "sim_fault": (None, [handle, number, number, number, u64, u64]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded
