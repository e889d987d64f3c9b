"""Watching instructions of the functional simulator."""

from __future__ import annotations

import pytest

from typebar.isa.errors import TypebarError
from typebar.isa.machine import Machine
from typebar.isa.program import assemble
from typebar.sim.functional import DeviceMemory, FunctionalSimulator

LOOP = """
    vmov b_from=immediate imm=1.0 dst=0 n=1
again:
    vadd dst=0 a=0 b=0 n=1
    sadd rd=r3 a=r3 b=1
    blt to=again a=r3 b=4
    gather dst=8 a=0 n=8
    halt
"""


def simulator(devices: int = 2) -> FunctionalSimulator:
    machine = Machine.load("tiny")
    return FunctionalSimulator(assemble(LOOP), machine, devices, [DeviceMemory() for _ in range(devices)])


def test_a_hook_sees_the_registers_after_each_execution() -> None:
    ring = simulator()
    seen: list[tuple[int, int, float]] = []
    ring.watch([1], lambda device, pc: seen.append((device, pc, float(ring.vector_registers(device)[0]))))
    watched = ring.run()
    assert [item for item in seen if item[0] == 0] == [(0, 1, value) for value in (2.0, 4.0, 8.0, 16.0)]
    assert len(seen) == 8
    ring.watch([], None)
    assert ring.run().instructions == watched.instructions
    assert len(seen) == 8


@pytest.mark.parametrize("pc", [-1, 4, 6])
def test_only_instructions_of_one_device_can_be_watched(pc: int) -> None:
    with pytest.raises(TypebarError, match=f"instruction {pc} cannot be watched"):
        simulator().watch([pc], lambda device, pc: None)
