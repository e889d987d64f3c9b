"""The hardware itself as a device: the RTL, compiled to native code, driven over its bus and memories like a card.

Everything goes the way it does on a card: settings, program and start through the control block (`isa.registers`),
images and prompts into the memories, results out of them. Only time is another: tens of thousands of cycles a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from typebar.host.device import Bytes, Device, DeviceError, Poll, check_span
from typebar.hw.native.build import WAVES, check_tools, library
from typebar.hw.native.model import BusError, Latencies, NativeRing, ProtocolError
from typebar.isa.errors import TypebarError
from typebar.isa.instructions import HBM_REGIONS, TRAP_TEXT, WORD_BYTES, WRITABLE_REGIONS, Region, Trap
from typebar.isa.machine import LINE_BYTES, Machine
from typebar.isa.program import Program, encode
from typebar.isa.registers import (
    HARDWARE_VERSION,
    IDENTITY,
    SOFT_RESET,
    START,
    Address,
    Status,
    counter_address,
    isa_hash,
    pointer_address,
    region_address,
    register_address,
    total_address,
)
from typebar.isa.timing import STALL_SEEDS, UNIT_NAMES, Cause, timing_parameters
from typebar.isa.watchdog import watchdog_cycles

Progress = Callable[[int, float], None]
"""Called while a program runs, as progress(cycles of this device so far, cycles a second)."""
CHUNK = 4096
"""Cycles between two looks at the status registers: some tens of milliseconds."""
MOST_MULTIPLIERS = 256
"""The size of a matrix unit, lanes x columns x rows, up to which a simulation of its source is of use."""
_WORD_BITS, _WORD = 32, 0xFFFFFFFF
_UNIT_TRAPS = (Trap.TIMEOUT, Trap.BUS)


def check_machine(machine: Machine) -> None:
    """Refuse a machine whose model would take hours to build, and minutes for a token.

    Raises:
        TypebarError: its matrix unit has more than MOST_MULTIPLIERS.
    """
    size = machine.matrix.lanes * machine.matrix.columns * machine.matrix.rows
    if size > MOST_MULTIPLIERS:
        raise TypebarError(
            f"the rtl device simulates machines of at most {MOST_MULTIPLIERS} multipliers, and {machine.name} has"
            f" {size}: compile for --machine tiny, or run the image with --device sim"
        )


def latencies(machine: Machine) -> Latencies:
    """Cycles of memories and links around the kernel with which it meets the timing contract exactly.

    Raises:
        MachineError: the machine is faster than the hardware's pipelines.
    """
    from typebar.hw.memory.fetch import ARRIVAL_CYCLES, REQUEST_CYCLES
    from typebar.hw.memory.unit import read_limit, write_limit
    from typebar.hw.ring import link_cycles

    return Latencies(
        hbm_read=machine.hbm.latency - REQUEST_CYCLES - ARRIVAL_CYCLES,
        hbm_write=write_limit(machine.hbm.latency),
        ddr_read=read_limit(machine),
        ddr_write=write_limit(machine.ddr.latency),
        link=link_cycles(machine),
    )


class RtlDevice(Device):
    """A ring of kernels in one simulation.

    `native` is that simulation, for tests that break its ports. Counters are those of the last launch.
    """

    def __init__(
        self,
        machine: Machine,
        ranks: int,
        *,
        wave: Path | None = None,
        stall_seed: int = 0,
        progress: Progress | None = None,
    ) -> None:
        """Build the model, which takes a minute if the cache has none, and take the kernels out of reset.

        `wave` is a file for every signal of the whole run, .fst or .vcd. With `stall_seed` memories and links are late
        now and then, as `typebar.isa.timing.stall` says.

        Raises:
            TypebarError: a tool is absent, or an argument breaks a rule.
            DeviceError: the kernels do not answer, or are not of this version.
        """
        check_machine(machine)
        check_tools()
        if not 0 <= stall_seed < STALL_SEEDS:
            raise TypebarError(f"stall_seed = {stall_seed} is outside 0 to {STALL_SEEDS - 1}")
        suffix = None if wave is None else wave.suffix.lower()
        if suffix is not None and suffix not in WAVES:
            raise TypebarError(f"a waveform is a file ending in {' or '.join(WAVES)}, not {str(wave)!r}")
        self.name, self.ranks = f"RTL of {ranks} x {machine.name}", ranks
        self._machine, self._seed, self._progress = machine, stall_seed, progress
        built = library(machine, suffix)
        self.native = NativeRing(built, machine, ranks, latencies(machine))
        if wave is not None:
            self.native.trace(wave)
        self._memory = [_Memory(self.native, machine, rank) for rank in range(ranks)]
        self._length, self._running = 0, False
        self.native.reset()
        self._identify()
        self._settings()

    # Device ---------------------------------------------------------------------------------------------
    def load(self, program: Program) -> None:
        """Write the program through the control block's window, an instruction at a time."""
        if len(program.ops) * WORD_BYTES > self._machine.control.program_bytes:
            raise TypebarError(f"the program of {len(program.ops)} instructions exceeds the program memory")
        self._write(Address.PROGRAM_INDEX, 0)
        for word in encode(program).reshape(-1).view("<u4").reshape(-1, 16):
            for place, part in enumerate(word):
                self._write(Address.PROGRAM + 4 * place, int(part))
        self._length = len(program.ops)
        self._write(Address.LENGTH, self._length)

    def allocate(self, rank: int, region: Region, size: int, contents: Bytes | None = None) -> None:
        """Give a region a place in HBM or DDR and tell the kernel; copies `contents`."""
        check_span(rank, self.ranks, region, 0, size, size)
        if contents is not None and (contents.size != size or region in WRITABLE_REGIONS):
            raise TypebarError(f"region {region.name} of {size} bytes cannot be bound to {contents.size} fixed bytes")
        memory = self._memory[rank]
        base = memory.place(region, size)
        memory.put(region, 0, contents if contents is not None else np.zeros(size, np.uint8))
        self._write(region_address(region), base, rank, words=2)
        self._write(region_address(region, size=True), size, rank, words=2)

    def write(self, rank: int, region: Region, offset: int, data: Bytes) -> None:
        """Copy bytes into a region."""
        check_span(rank, self.ranks, region, offset, data.size, self._size(rank, region))
        self._memory[rank].put(region, offset, data)

    def read(self, rank: int, region: Region, offset: int, size: int) -> Bytes:
        """Copy bytes out of a region."""
        check_span(rank, self.ranks, region, offset, size, self._size(rank, region))
        return self._memory[rank].get(region, offset, size)

    def register(self, rank: int, index: int) -> int:
        """Value of a control register; registers that are not defined read as 0."""
        check_span(rank, self.ranks, Region.IO, 0, 0, 0)
        address = register_address(index)
        return 0 if address is None else self._read(rank, address)

    def launch(self, entry: int) -> None:
        """Start every rank in the same cycle."""
        if self._running:
            raise TypebarError(f"{self.name} is already running: wait for it, or reset it")
        if not self._length:
            raise TypebarError(f"{self.name} has no program: load one first")
        self._write(Address.ENTRY, entry)
        self.native.start_run(self._seed)
        self._write(Address.CONTROL, START)
        self._running = True

    def wait(self, poll: Poll | None = None) -> None:
        """Simulate until every rank has halted; `poll` is called every CHUNK cycles.

        The watchdogs of the kernels bound the time that a hang takes.
        """
        if not self._running:
            raise TypebarError(f"{self.name} is not running: launch a program first")
        began, first = time.monotonic(), self.native.cycle
        while True:
            self._run(CHUNK)
            status = [self._read(rank, Address.STATUS) for rank in range(self.ranks)]
            if poll is not None:
                poll()
            if self._progress is not None:
                seconds = max(time.monotonic() - began, 1e-9)
                self._progress(self.native.cycle, (self.native.cycle - first) / seconds)
            if Status.ERROR in status:
                raise self._stopped(status.index(Status.ERROR))
            if Status.RUNNING not in status:
                self._running = False
                if Status.IDLE in status:
                    raise DeviceError(f"device {status.index(Status.IDLE)} was lost: it did not start")
                return

    def reset(self) -> None:
        """Back to idle; memory, program and settings stay. Answers still owed by memories and links are dropped."""
        self.native.clear()
        self._write(Address.CONTROL, SOFT_RESET)
        self.native.clear()
        self._running = False

    # Counters -------------------------------------------------------------------------------------------
    def total(self, rank: int, name: str) -> int:
        """A total of the last launch, by its name in `isa.registers.TOTAL_NAMES`."""
        return self._read(rank, total_address(name), words=2)

    def counter(self, rank: int, unit: str, cause: Cause) -> int:
        """Cycles of a unit (of `isa.timing.UNIT_NAMES`) by a cause in the last launch."""
        return self._read(rank, counter_address(unit, cause), words=2)

    # The bus --------------------------------------------------------------------------------------------
    def _identify(self) -> None:
        """Refuse kernels of another version or machine, as a driver of a card must."""
        for rank in range(self.ranks):
            found = self._read(rank, Address.ID), self._read(rank, Address.VERSION)
            if found != (IDENTITY, HARDWARE_VERSION):
                raise DeviceError(
                    f"device {rank} has identity {found[0]:#x} and version {found[1]}, not {IDENTITY:#x} and"
                    f" {HARDWARE_VERSION}: it is no kernel that this driver knows"
                )
            for address, wanted, what in (
                (Address.ISA_HASH, isa_hash(), "instruction set"),
                (Address.CONTRACT_HASH, self._machine.contract_hash(), "machine"),
            ):
                expected = int.from_bytes(bytes.fromhex(wanted)[:8], "big")
                mine = self._read(rank, address, words=2)
                if mine != expected:
                    raise DeviceError(f"device {rank} has another {what}: its hash is {mine:016x}, not {expected:016x}")

    def _settings(self) -> None:
        channels = self._machine.hbm.channels
        self._write(Address.DEVICES, self.ranks)
        self._write(Address.WATCHDOG, watchdog_cycles(timing_parameters(self._machine), self.ranks))
        for rank in range(self.ranks):
            self._write(Address.RANK, rank, rank)
            for channel in range(channels + 1):
                address = pointer_address(None if channel == channels else channel)
                self._write(address, self.native.pointer(rank, channel), rank, words=2)

    def _write(self, address: int, value: int, rank: int | None = None, words: int = 1) -> None:
        try:
            for place in range(words):
                self.native.write(address + 4 * place, value >> _WORD_BITS * place & _WORD, rank)
        except (BusError, ProtocolError) as error:
            raise self._lost(rank, error) from error

    def _read(self, rank: int, address: int, words: int = 1) -> int:
        try:
            values = [self.native.read(address + 4 * place, rank) for place in range(words)]
        except (BusError, ProtocolError) as error:
            raise self._lost(rank, error) from error
        return sum(value << _WORD_BITS * place for place, value in enumerate(values))

    def _run(self, cycles: int) -> None:
        try:
            self.native.run(cycles)
        except ProtocolError as error:
            raise self._lost(None, error) from error

    def _lost(self, rank: int | None, error: TypebarError) -> DeviceError:
        self._running = False
        return DeviceError(f"{self.name if rank is None else f'device {rank}'} was lost: {error}")

    def _stopped(self, rank: int) -> DeviceError:
        """What a rank's control block says of its end."""
        self._running = False
        code, pc = self._read(rank, Address.TRAP), self._read(rank, Address.PC)
        trap = Trap(code) if code in set(Trap) else Trap.NONE
        detail = ""
        if trap in _UNIT_TRAPS:
            unit = self._read(rank, Address.UNIT)
            detail = f" in the {UNIT_NAMES[unit] if unit < len(UNIT_NAMES) else unit} unit"
        elif trap is Trap.SOFTWARE:
            value = self._read(rank, Address.TRAP_CODE)
            detail = f" with code {value - (value >> _WORD_BITS - 1 << _WORD_BITS)}"
        what = TRAP_TEXT.get(trap, f"an error code that is not known, {code}")
        return DeviceError(f"trapped: device {rank} stopped at instruction {pc} with {trap.name}{detail}: {what}")

    def _size(self, rank: int, region: Region) -> int:
        check_span(rank, self.ranks, region, 0, 0, 0)
        return self._memory[rank].size(region)


class _Memory:
    """A rank's memories: where regions lie, and their bytes.

    A region in HBM takes whole rows, of which each channel holds its part; one in DDR starts on a line.
    """

    def __init__(self, native: NativeRing, machine: Machine, rank: int) -> None:
        channels = machine.hbm.channels
        self._machine, self._rank = machine, rank
        self._channels = [native.memory(rank, channel) for channel in range(channels)]
        self._ddr = native.memory(rank, channels)
        self._places: dict[Region, tuple[int, int]] = {}
        """First row or byte, and size in bytes."""
        self._room: dict[Region, int] = {}
        """Rows or bytes that a region has, from its first on."""
        self._end = {True: 0, False: 0}
        """The first row (HBM) or byte (DDR) that no region has."""

    def place(self, region: Region, size: int) -> int:
        """A place for a region, its old one if that is large enough; the region's base for the control block."""
        in_hbm = region in HBM_REGIONS
        unit = self._machine.row_bytes if in_hbm else LINE_BYTES
        needed = -(-size // unit) * (1 if in_hbm else LINE_BYTES)
        base = self._places[region][0] if region in self._places else self._end[in_hbm]
        if needed > self._room.get(region, -1):
            memory = self._machine.hbm.capacity_bytes if in_hbm else self._machine.ddr.capacity_bytes
            base, capacity = self._end[in_hbm], memory // unit * (1 if in_hbm else LINE_BYTES)
            if base + needed > capacity:
                raise TypebarError(
                    f"region {region.name} of {size} bytes does not fit the {'HBM' if in_hbm else 'DDR'} of"
                    f" {self._machine.name}, {memory} bytes, beside what is there"
                )
            self._end[in_hbm] = base + needed
            self._room[region] = needed
        self._places[region] = base, size
        return base

    def size(self, region: Region) -> int:
        """Bytes of a region.

        Raises:
            TypebarError: it is not bound.
        """
        if region not in self._places:
            raise TypebarError(f"region {region.name} of device {self._rank} is not bound: allocate it first")
        return self._places[region][1]

    def put(self, region: Region, offset: int, data: Bytes) -> None:
        """Copy bytes into a region."""
        base, _ = self._places[region]
        if region not in HBM_REGIONS:
            self._ddr[base + offset : base + offset + data.size] = data
            return
        row = self._machine.row_bytes
        first, end = offset // row, -(-(offset + data.size) // row)
        rows = np.empty((end - first) * row, np.uint8)
        if data.size < rows.size:
            rows[:] = self.get(region, first * row, rows.size)
        rows[offset - first * row :][: data.size] = data
        for channel, part in zip(self._channels, self._by_channel(rows), strict=True):
            width = self._machine.hbm.channel_bytes
            channel[(base + first) * width : (base + end) * width].reshape(-1, width)[:] = part

    def get(self, region: Region, offset: int, size: int) -> Bytes:
        """Copy bytes out of a region; from HBM any whole rows, even beyond its end."""
        base, _ = self._places[region]
        if region not in HBM_REGIONS:
            return self._ddr[base + offset : base + offset + size].copy()
        row, width = self._machine.row_bytes, self._machine.hbm.channel_bytes
        first, end = offset // row, -(-(offset + size) // row)
        rows = np.empty((end - first) * row, np.uint8)
        for channel, part in zip(self._channels, self._by_channel(rows), strict=True):
            part[:] = channel[(base + first) * width : (base + end) * width].reshape(-1, width)
        return rows[offset - first * row :][:size]

    def _by_channel(self, rows: Bytes) -> Bytes:
        """Views [channels, rows, channel_bytes] of whole rows."""
        shaped = rows.reshape(-1, self._machine.hbm.channels, self._machine.hbm.channel_bytes)
        return shaped.transpose(1, 0, 2)
