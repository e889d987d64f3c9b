"""The functional simulator as a device."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from typebar.host.device import Bytes, Device, DeviceError, Poll, check_span
from typebar.isa.errors import TypebarError
from typebar.isa.instructions import WRITABLE_REGIONS, Region, Trap
from typebar.isa.machine import Machine
from typebar.isa.program import Program
from typebar.isa.registers import Register, Status
from typebar.sim.functional import DeviceMemory, DeviceTrap, FunctionalSimulator, WatchHook

Failure = Callable[[int, int], bool]
"""An injected failure, called as rule(rank, executed instructions): true means that the rank is lost from now on."""


class SimulatedDevice(Device):
    """A ring of simulated machines: exact values, no notion of time."""

    def __init__(
        self, machine: Machine, ranks: int, failure: Failure | None = None, threads: int | None = None
    ) -> None:
        """A ring with empty memories; `threads` bounds the matrix kernel's threads, `failure` injects a loss."""
        self.name = f"simulator of {ranks} x {machine.name}"
        self.ranks = ranks
        self._machine, self._threads, self._failure = machine, threads, failure
        self._memory: list[dict[Region, Bytes]] = [{} for _ in range(ranks)]
        self._program: Program | None = None
        self._simulator: FunctionalSimulator | None = None
        self._watched: list[int] = []
        self._hook: WatchHook | None = None
        self._entry: int | None = None
        self._status = Status.IDLE
        self._trap: DeviceTrap | None = None

    def watch(self, instructions: Iterable[int], hook: WatchHook | None) -> None:
        """Tell `hook`, as hook(rank, instruction), of executed instructions, from the next launch on; None ends it."""
        self._watched, self._hook, self._simulator = list(instructions), hook, None

    def vector_registers(self, rank: int) -> NDArray[np.float32]:
        """A rank's vector register file, float32 [words]: a live view, from the first launch on.

        Raises:
            TypebarError: nothing has been launched yet.
        """
        if self._simulator is None:
            raise TypebarError(f"{self.name} has no registers yet: launch a program first")
        return self._simulator.vector_registers(rank)

    def load(self, program: Program) -> None:
        """Keep the program; it is decoded at the next launch."""
        self._program, self._simulator = program, None

    def allocate(self, rank: int, region: Region, size: int, contents: Bytes | None = None) -> None:
        """Bind memory; `contents` is used as it is, so that a memory-mapped image is never copied."""
        check_span(rank, self.ranks, region, 0, size, size)
        if contents is not None and (contents.size != size or region in WRITABLE_REGIONS):
            raise TypebarError(f"region {region.name} of {size} bytes cannot be bound to {contents.size} fixed bytes")
        self._memory[rank][region] = np.zeros(size, np.uint8) if contents is None else contents
        self._simulator = None

    def write(self, rank: int, region: Region, offset: int, data: Bytes) -> None:
        """Copy bytes into a region; one bound to fixed contents cannot be written."""
        memory = self._bound(rank, region, offset, data.size)
        if not memory.flags.writeable:
            raise TypebarError(f"region {region.name} of device {rank} is bound to fixed contents: allocate it without")
        memory[offset : offset + data.size] = data

    def read(self, rank: int, region: Region, offset: int, size: int) -> Bytes:
        """Copy bytes out of a region."""
        return self._bound(rank, region, offset, size)[offset : offset + size].copy()

    def register(self, rank: int, index: int) -> int:
        """Value of a control register; registers that are not defined read as 0."""
        check_span(rank, self.ranks, Region.IO, 0, 0, 0)
        if index == Register.STATUS:
            return int(self._status)
        if index in (Register.TRAP, Register.PC) and self._trap is not None and self._trap.device == rank:
            return int(self._trap.trap) if index == Register.TRAP else self._trap.pc
        if self._simulator is None:
            return 0
        state = self._simulator.states[rank]
        if index == Register.INSTRUCTIONS:
            return state.executed
        if index == Register.FLAGS:
            return sum(state.flags)
        return state.flags.get(1 << index - Register.FLAG_PC, 0) if index >= Register.FLAG_PC else 0

    def launch(self, entry: int) -> None:
        """Note the entry point: the simulator runs inside `wait`."""
        if self._status is Status.RUNNING:
            raise TypebarError(f"{self.name} is already running: wait for it, or reset it")
        if self._program is None:
            raise TypebarError(f"{self.name} has no program: load one first")
        if self._simulator is None:
            memories = [DeviceMemory(dict(regions)) for regions in self._memory]
            self._simulator = FunctionalSimulator(self._program, self._machine, self.ranks, memories, self._threads)
            self._simulator.fail_after(self._failure)
            self._simulator.watch(self._watched, self._hook)
        self._entry, self._status, self._trap = entry, Status.RUNNING, None

    def wait(self, poll: Poll | None = None) -> None:
        """Run the program to its end; `poll` is called after every scalar store."""
        if self._simulator is None or self._status is not Status.RUNNING or self._entry is None:
            raise TypebarError(f"{self.name} is not running: launch a program first")
        hook = None if poll is None else lambda *_store: poll()
        try:
            self._simulator.run(self._entry, on_store=hook)
        except DeviceTrap as trap:
            self._trap, self._status = trap, Status.ERROR
            what = "was lost" if trap.trap is Trap.DEVICE_LOST else "trapped"
            raise DeviceError(f"{what}: {trap}") from trap
        self._status = Status.DONE

    def reset(self) -> None:
        """Back to idle; a lost rank stays lost."""
        self._status, self._trap = Status.IDLE, None

    def _bound(self, rank: int, region: Region, offset: int, size: int) -> Bytes:
        check_span(rank, self.ranks, region, 0, 0, 0)
        memory = self._memory[rank].get(region)
        if memory is None:
            raise TypebarError(f"region {region.name} of device {rank} is not bound: allocate it first")
        check_span(rank, self.ranks, region, offset, size, memory.size)
        return memory
