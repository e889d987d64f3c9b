"""The random streams themselves, on the simulators: legal, repeatable, covering; shrunk and trapped as promised."""

from __future__ import annotations

import pytest

from typebar.isa.instructions import INSTRUCTIONS, Kind, Region, Trap
from typebar.isa.machine import Machine
from typebar.isa.program import encode, op
from typebar.sim.functional import DeviceTrap, FunctionalSimulator
from typebar.sim.timing import run_timing
from typebar.tests.hw.stream_tools import Coverage, execute, illegal_programs, io_words, legal, shrink
from typebar.tests.hw.streams import REGION_BYTES, Stream, random_stream

TINY = Machine.load("tiny")
STREAMS = 1000
HARDWARE_TRAPS = {Trap.NONE, Trap.DEVICE_LOST, Trap.TIMEOUT, Trap.BUS}
"""Those that no instruction causes."""


def test_streams_run_and_cover(capsys: pytest.CaptureFixture[str]) -> None:
    """All end without a trap, both simulators execute as many instructions, and hazards of all kinds come up."""
    coverage, causes, instructions, cycles, rings = Coverage(), set(), 0, 0, 0
    for seed in range(STREAMS):
        stream = random_stream(seed, TINY)
        _, result, executed = execute(stream, TINY)
        timed = run_timing(stream.program, TINY, stream.devices, io_words(stream))
        assert sum(item.instructions for item in timed.counters) == result.instructions, f"seed {seed}"
        coverage.add(executed, stream.devices)
        causes |= {(unit, cause) for device in timed.causes for unit, row in device.items() for cause in row}
        instructions, cycles, rings = (
            instructions + result.instructions,
            cycles + timed.total_cycles,
            rings + (stream.devices > 1),
        )
    with capsys.disabled():
        print(f"\n{STREAMS} streams, {rings} of them on rings: {instructions} instructions in {cycles} cycles")
        print(coverage.table())
    assert coverage.cells.keys() <= coverage.possible(), coverage.cells.keys() - coverage.possible()
    assert coverage.coverage() >= 0.9
    for unit in ("matrix", "vector", "memory", "ring"):
        for cause in ("matrix", "vector", "memory", "ring"):
            # The ring unit is free when its last result is there.
            assert (unit, cause) in causes or unit == cause == "ring", (
                f"no {unit} instruction waited for the {cause} unit"
            )
    assert {("fetch", "store"), ("memory", "fetch"), ("fetch", "fifo_full"), ("ring", "skew")} <= causes


def test_a_seed_is_a_stream() -> None:
    for seed in range(20):
        first, second = random_stream(seed, TINY), random_stream(seed, TINY)
        assert encode(first.program).tobytes() == encode(second.program).tobytes()
        assert first.devices == second.devices
        for left, right in zip(first.memories(), second.memories(), strict=True):
            assert all((left.regions[region] == right.regions[region]).all() for region in REGION_BYTES)
    assert encode(random_stream(1, TINY).program).tobytes() != encode(random_stream(2, TINY).program).tobytes()


def test_streams_lean_on_nothing_older() -> None:
    """What registers held before does not matter, or hardware that runs stream after stream would differ."""
    assert all(legal(random_stream(seed, TINY), TINY) for seed in range(100))
    assert not legal(Stream(0, 1, (op("store", region=Region.IO, outer=1, inner=1), op("halt"))), TINY)


def _names(stream: Stream) -> list[str]:
    return [item.kind.name for item in stream.ops]


def test_a_failing_stream_shrinks() -> None:
    """What remains still fails, is legal, and loses its point with any instruction less."""

    def fails(stream: Stream) -> bool:
        """A vunary of something that a matmul wrote at an address from a register."""
        written = [item for item in execute(stream, TINY)[2] if item[0].kind.name == "matmul" and item[1][3] > 0]
        return any(item[1][0] for item in written) and "vunary" in _names(stream)

    stream = next(item for item in (random_stream(seed, TINY) for seed in range(50)) if fails(item))
    small = shrink(stream, TINY, fails)
    assert legal(small, TINY) and fails(small)
    assert sorted(_names(small)) == ["halt", "matmul", "vunary"] and small.devices == 1
    assert len(shrink(stream, TINY, fails, tries=3).ops) > len(small.ops)


def test_a_shrunk_loop_ends() -> None:
    """Instructions whose loss would make a loop endless stay as long as the loop is needed."""

    def fails(stream: Stream) -> bool:
        executed = [item.kind.name for item, _ in execute(stream, TINY)[2]]
        return executed.count("bne") >= 2

    stream = next(item for item in (random_stream(seed, TINY, devices=1) for seed in range(200)) if fails(item))
    small = shrink(stream, TINY, fails)
    assert legal(small, TINY) and fails(small) and len(small.ops) <= 5


def test_every_trap_is_provoked_where_it_says() -> None:
    """Every trap documented for an instruction comes up, and the functional simulator stops as the case claims."""
    seen: set[tuple[str, Trap]] = set()
    for case in illegal_programs(TINY):
        memories = Stream(0, case.devices, ()).memories()
        with pytest.raises(DeviceTrap) as stop:
            FunctionalSimulator(case.words, TINY, case.devices, memories).run(max_instructions=1000)
        assert (stop.value.trap, stop.value.pc, stop.value.code or 0) == (case.trap, case.pc, case.code), case.aim
        seen.add((case.aim.split()[0], case.trap))
    documented = {(item.name, trap) for item in INSTRUCTIONS for trap in item.traps if trap is not Trap.PROGRAM_END}
    assert documented <= seen, documented - seen
    with_enums = {i.name for i in INSTRUCTIONS if any(f.kind is Kind.ENUM for f in i.fields)}
    assert {(name, Trap.ILLEGAL) for name in with_enums} <= seen
    assert {trap for _, trap in seen} == set(Trap) - HARDWARE_TRAPS
    assert all(size % 64 == 0 for size in REGION_BYTES.values()) and Region.IO in REGION_BYTES
