"""The whole core: random programs on kernels, memories and links around them; every counter is the simulator's."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from typebar.host.rtl import RtlDevice
from typebar.isa.machine import Machine
from typebar.isa.registers import TOTAL_NAMES
from typebar.isa.timing import UNIT_NAMES, Cause
from typebar.sim.timing import TimingResult, run_timing
from typebar.tests.hw.control_programs import REGION_BYTES, random_program

TINY = Machine.load("tiny")
WIDE = TINY.override({"vector.lanes": "32", "vector.align": "32", "vector.ultra_copies": "1"})
"""Register rows of as many words as `u280`'s, of several chunks and half a column block."""


@pytest.fixture(
    scope="module",
    params=[
        *((TINY, *case) for case in [(1, 0), (2, 0), (1, 77), (2, 5)]),
        *(pytest.param((WIDE, *case), marks=pytest.mark.long) for case in [(1, 0), (2, 5)]),
    ],
    ids=lambda case: f"rows of {case[0].vector.lanes}, {case[1]}, {case[2]}",
)
def device(request: pytest.FixtureRequest) -> Iterator[tuple[Machine, RtlDevice, int]]:
    """A machine's kernels, and the seed of the stalls of what is around them."""
    machine, devices, seed = request.param
    found = RtlDevice(machine, devices, stall_seed=seed)
    yield machine, found, seed
    found.native.close()


def differences(device: RtlDevice, rank: int, timed: TimingResult) -> list[str]:
    """Counters of a rank that are not the simulator's. A device counts its own time, a run that of the last device."""
    found, rest = [], timed.total_cycles - timed.device_cycles[rank]
    for unit in UNIT_NAMES:
        for cause in Cause:
            expected = timed.causes[rank][unit].get(cause.name.lower(), 0) - (rest if cause is Cause.DRAIN else 0)
            counted = device.counter(rank, unit, cause)
            if counted != expected:
                found.append(f"{unit} {cause.name}: {counted}, not {expected}")
    for name in TOTAL_NAMES:
        expected = timed.device_cycles[rank] if name == "cycles" else getattr(timed.counters[rank], name)
        counted = device.total(rank, name)
        if counted != expected:
            found.append(f"{name}: {counted}, not {expected}")
    return found


def check(machine: Machine, device: RtlDevice, stall_seed: int, first: int, count: int) -> None:
    """Random programs' counters."""
    for seed in range(first, first + count):
        program = random_program(seed, machine)
        device.reset()
        device.load(program)
        for rank in range(device.ranks):
            for region, size in REGION_BYTES.items():
                device.allocate(rank, region, size)
        device.launch(0)
        device.wait()
        words = np.zeros((device.ranks, 4096), np.int32)
        timed = run_timing(program, machine, device.ranks, words, stall_seed=stall_seed)
        for rank in range(device.ranks):
            wrong = differences(device, rank, timed)
            assert not wrong, f"program {seed}, device {rank}: {'; '.join(wrong)}"


def test_every_counter_is_the_simulators(device: tuple[Machine, RtlDevice, int]) -> None:
    check(*device, first=0, count=6)


@pytest.mark.long
def test_every_counter_is_the_simulators_in_many_programs(device: tuple[Machine, RtlDevice, int]) -> None:
    check(*device, first=1000, count=150)
