"""Random streams on the hardware's model: memory, registers and cycles are the simulators'; every trap is raised.

Streams store all registers they touch, scalar ones too, so that comparing memories compares everything. A stream that
fails is shrunk before it is shown.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from typebar.host import rtl
from typebar.host.device import DeviceError
from typebar.host.rtl import RtlDevice
from typebar.isa.instructions import Region, Trap
from typebar.isa.machine import Machine
from typebar.isa.program import Program, disassemble, op
from typebar.isa.registers import TOTAL_NAMES, Address, Status
from typebar.isa.timing import UNIT_NAMES, Cause
from typebar.sim.timing import run_timing
from typebar.tests.hw.stream_tools import Coverage, Illegal, execute, illegal_programs, io_words, shrink
from typebar.tests.hw.streams import REGION_BYTES, Stream, random_stream

TINY = Machine.load("tiny")
WIDE = TINY.override({"vector.lanes": "32", "vector.align": "32", "vector.ultra_copies": "1"})
STREAMS = int(os.environ.get("TYPEBAR_STREAMS", "1000"))
STREAMS_AT_ONCE = 250
LONG_INSTRUCTIONS = 100_000
STALL_SEED = 20_26
Rings = Callable[..., RtlDevice]
"""The ring of so many devices with stalls of this seed, 0 for none, of a machine, `tiny` unless it is named."""


@pytest.fixture(scope="module")
def rings() -> Iterator[Rings]:
    """Rings by size, each made once; status is looked at often, because streams are short."""
    made: dict[tuple[int, int, Machine], RtlDevice] = {}
    patch = pytest.MonkeyPatch()
    patch.setattr(rtl, "CHUNK", 256)

    def ring(devices: int, seed: int, machine: Machine = TINY) -> RtlDevice:
        if (devices, seed, machine) not in made:
            device = made[devices, seed, machine] = RtlDevice(machine, devices, stall_seed=seed)
            for rank in range(devices):
                for region, size in REGION_BYTES.items():
                    device.allocate(rank, region, size)
        return made[devices, seed, machine]

    yield ring
    patch.undo()
    for device in made.values():
        device.native.close()


def difference(stream: Stream, device: RtlDevice, seed: int = 0, machine: Machine = TINY) -> str:
    """What the hardware does with a stream that the simulators do not; nothing if all is the same."""
    simulator, _, _ = execute(stream, machine)
    timed = run_timing(stream.program, machine, stream.devices, io_words(stream), stall_seed=seed)
    for rank, memory in enumerate(stream.memories()):
        for region, data in memory.regions.items():
            device.write(rank, region, 0, data)
    device.load(stream.program)
    device.launch(0)
    try:
        device.wait()
    except DeviceError as error:
        device.reset()
        return str(error)
    for rank, state in enumerate(simulator.states):
        for region in (Region.IO, Region.KV):
            mine, theirs = device.read(rank, region, 0, REGION_BYTES[region]), state.memory[region]
            if (mine != theirs).any():
                at = int((mine != theirs).argmax())
                return f"device {rank}: byte {at} of {region.name} is {mine[at]}, not {theirs[at]}"
    for rank in range(stream.devices):
        cycles, expected = device.total(rank, "cycles"), timed.device_cycles[rank]
        if cycles != expected:
            return f"device {rank}: {cycles} cycles, not {expected}"
    return ""


def counters_differ(stream: Stream, device: RtlDevice, seed: int) -> str:
    """Counters of the stream that ran last which are not the timing simulator's."""
    timed = run_timing(stream.program, TINY, stream.devices, io_words(stream), stall_seed=seed)
    for rank in range(stream.devices):
        for name in TOTAL_NAMES[1:]:
            if (mine := device.total(rank, name)) != (theirs := getattr(timed.counters[rank], name)):
                return f"device {rank}: {name} is {mine}, not {theirs}"
        for unit in UNIT_NAMES:
            for cause in Cause:
                theirs = timed.causes[rank][unit].get(cause.name.lower(), 0)
                if cause is Cause.DRAIN:
                    # The simulator lets all devices drain until the last has halted.
                    theirs -= timed.total_cycles - timed.device_cycles[rank]
                if (mine := device.counter(rank, unit, cause)) != theirs:
                    return f"device {rank}: {unit} {cause.name.lower()} {mine} cycles, not {theirs}"
    return ""


def check(stream: Stream, rings: Rings, seed: int, counters: bool) -> None:
    """Run a stream; if it fails, shrink it and say how to see it again."""
    device = rings(stream.devices, seed)
    found = difference(stream, device, seed)
    if found:
        small = shrink(stream, TINY, lambda other: bool(difference(other, rings(other.devices, seed), seed)), 400)
        again = difference(small, rings(small.devices, seed), seed)
        pytest.fail(
            f"stream {stream.seed} (stalls {seed}): {found}\n{small.devices} devices, memories of seed {small.seed}:"
            f" {again}\n{disassemble(small.program)}"
        )
    if counters:
        found = counters_differ(stream, device, seed)
        assert not found, f"stream {stream.seed} (stalls {seed}): {found}\n{disassemble(stream.program)}"


@pytest.mark.parametrize("first", range(0, STREAMS, STREAMS_AT_ONCE))
def test_random_streams(first: int, rings: Rings) -> None:
    coverage = Coverage()
    for seed in range(first, first + STREAMS_AT_ONCE):
        stream = random_stream(seed, TINY)
        check(stream, rings, STALL_SEED if seed % 4 == 3 else 0, counters=seed % 10 == 0)
        coverage.add(execute(stream, TINY)[2], stream.devices)
    assert coverage.coverage() > 0.75


@pytest.mark.long
def test_random_streams_on_rows_of_32_words(rings: Rings) -> None:
    device = rings(2, STALL_SEED, WIDE)
    for seed in range(2_000_000, 2_000_150):
        stream = random_stream(seed, WIDE, items=40, devices=2)
        found = difference(stream, device, STALL_SEED, WIDE)
        assert not found, f"stream {seed}: {found}\n{disassemble(stream.program)}"


@pytest.mark.long
@pytest.mark.parametrize("stall_seed", [0, STALL_SEED])
def test_many_random_instructions(stall_seed: int, rings: Rings, capsys: pytest.CaptureFixture[str]) -> None:
    coverage, instructions, seed = Coverage(), 0, 1_000_000
    while instructions < LONG_INSTRUCTIONS:
        stream = random_stream(seed, TINY, items=200)
        check(stream, rings, stall_seed, counters=True)
        _, result, executed = execute(stream, TINY)
        coverage.add(executed, stream.devices)
        instructions, seed = instructions + result.instructions, seed + 1
    with capsys.disabled():
        print(f"\n{seed - 1_000_000} streams, {instructions} instructions\n{coverage.table()}")
    assert coverage.coverage() >= 0.9


def stop(case: Illegal, device: RtlDevice) -> tuple[Trap, int, int]:
    """Trap, instruction and software trap's code with which the first stopped device of the ring stops."""
    device.load(Program([op("halt")]))
    device.native.write(Address.PROGRAM_INDEX, 0)
    for place, part in enumerate(np.frombuffer(case.words, "<u4")):
        device.native.write(Address.PROGRAM + 4 * (place % 16), int(part))
    device.native.write(Address.LENGTH, len(case.words) // 64)
    patience = device.native.read(Address.WATCHDOG, 0)
    device.native.write(Address.WATCHDOG, 10_000 if case.hangs else patience)
    device.launch(0)
    with pytest.raises(DeviceError, match="trapped"):
        device.wait()
    device.native.write(Address.WATCHDOG, patience)
    ranks = [rank for rank in range(case.devices) if device.native.read(Address.STATUS, rank) == Status.ERROR]
    codes = [device.native.read(address, ranks[0]) for address in (Address.TRAP, Address.PC, Address.TRAP_CODE)]
    device.reset()
    return Trap(codes[0]), codes[1], codes[2] - (codes[2] >> 31 << 32)


def test_every_trap_names_its_instruction(rings: Rings) -> None:
    """Every illegal word and operand stops the hardware as it stops the simulator, and a sound program runs after."""
    sound = random_stream(4, TINY, devices=1)
    for number, case in enumerate(illegal_programs(TINY)):
        found = stop(case, rings(case.devices, 0))
        expected = (case.trap, case.pc, case.code)
        if case.hangs:
            expected = (Trap.TIMEOUT, 1, 0)
        assert found[:2] == expected[:2], f"{case.aim}: {found}, not {expected}"
        assert found[2] == expected[2] or case.trap is not Trap.SOFTWARE, case.aim
        if number % 25 == 0:
            assert not difference(sound, rings(1, 0)), case.aim
