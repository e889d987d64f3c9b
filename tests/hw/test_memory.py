"""The memory unit against the functional simulator (bytes and words) and the timing contract (cycles)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from typebar.hw.memory.unit import MemoryUnit
from typebar.isa.checks import Checker
from typebar.isa.errors import TypebarError
from typebar.isa.instructions import FORMAT_BYTES, Format, Region, Trap
from typebar.isa.machine import LINE_BYTES, Machine
from typebar.isa.program import Op, Program, op
from typebar.isa.timing import (
    DDR_REQUEST,
    Cause,
    blocks_touched,
    hbm_store_end,
    load_occupancy,
    stall,
    store_cycles,
    timing_parameters,
)
from typebar.sim.functional import DeviceMemory, FunctionalSimulator
from typebar.tests.hw.memory_bench import MemoryBench, Outcome

SMALL = {"vector.words": "2048", "vector.segments": "8"}
MACHINES = {
    "tiny": {},
    "wide": {
        "vector.lanes": "32",
        "vector.align": "32",
        "ddr.bytes_per_cycle": "64",
        "hbm.channel_bytes": "128",
        "hbm.channels": "4",
        "hbm.rows_per_write_slot": "2",
        "hbm.latency": "15",
    },
    "narrow": {
        "vector.lanes": "2",
        "ddr.bytes_per_cycle": "8",
        "ddr.latency": "17",
        "hbm.channel_bytes": "8",
        "hbm.channels": "16",
    },
}
KV_BASE_ROW, DDR_BASES = 3, {Region.PARAMS: 0x2000, Region.LOCAL: 0x5000, Region.IO: 0x8000}
DDR_BYTES, REGION_BYTES = 0x10000, 0x2000


def _machine(name: str) -> Machine:
    return Machine.load("tiny").override({**SMALL, **MACHINES[name]})


@cache
def _bench(name: str, folder: Path) -> MemoryBench:
    return MemoryBench(_machine(name), folder)


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], MemoryBench]:
    folders = {name: tmp_path_factory.mktemp(name) for name in MACHINES}
    return lambda name: _bench(name, folders[name])


EACH = [pytest.param(name, marks=pytest.mark.long) if name != "tiny" else name for name in MACHINES]


# Programs ---------------------------------------------------------------------------------------------------
class Programs:
    """Random memory instructions that do not trap."""

    def __init__(self, machine: Machine, seed: int) -> None:
        self.machine, self.random = machine, np.random.default_rng(seed)
        self.checker = Checker(machine, [0, REGION_BYTES, REGION_BYTES, REGION_BYTES, REGION_BYTES])

    def _count(self, most: int) -> int:
        kind = self.random.integers(4)
        if kind == 0:
            return int(self.random.integers(0, 4))
        return int(self.random.integers(1, most if kind == 1 else 1 + 3 * self.machine.vector.lanes))

    def _word(self, n: int) -> int:
        words, align = self.machine.vector.words, self.machine.vector.align
        word = int(self.random.integers(0, max(1, words - n + 1)))
        return word if n == 1 else word // align * align

    def _place(self, size: int) -> tuple[int, int]:
        """Line and byte: the byte may be any number, also below zero."""
        address = int(self.random.integers(0, REGION_BYTES // size)) * size
        line = int(self.random.integers(0, REGION_BYTES // LINE_BYTES))
        return line, address - line * LINE_BYTES

    def _load(self) -> tuple[Op, Trap]:
        element, region = Format(self.random.integers(4)), int(self.random.integers(Region.PARAMS, Region.IO + 1))
        n = self._count(300)
        fields = {"dst": self._word(n), **dict(zip(("line", "byte"), self._place(FORMAT_BYTES[element]), strict=True))}
        trap = self.checker.load(element, region, fields["dst"], fields["line"], fields["byte"], n)
        return op("load", format=element, region=region, n=n, **fields), trap

    def _store(self) -> tuple[Op, Trap]:
        element, region = Format(self.random.integers(4)), int(self.random.choice([Region.KV, Region.IO]))
        size, row = FORMAT_BYTES[element], self.machine.row_bytes
        outer, inner = self._count(12), self._count(40)
        if self.random.integers(2):
            outer, inner = int(self.random.integers(1, 4)), self._count(200)
        strides = [0, size, size, 2 * size, 3 * size, 12, 60, 64, 68, 128, row - 4, row, row + 4]
        inner_bytes = size if self.random.integers(2) else int(self.random.choice(strides))
        outer_bytes = int(self.random.choice([*strides, inner * size, inner * size + size, 5 * row]))
        values = (self._word(outer * inner), *self._place(size), outer, inner, outer_bytes, inner_bytes)
        trap = self.checker.store(element, region, *values)
        names = ("a", "line", "byte", "outer", "inner", "outer_bytes", "inner_bytes")
        return op("store", format=element, region=region, **dict(zip(names, values, strict=True))), trap

    def _scalar(self) -> tuple[Op, Trap]:
        line, byte = self._place(4)
        if self.random.integers(2):
            region = int(self.random.integers(Region.PARAMS, Region.IO + 1))
            return op("sload", rd=5, region=region, line=line, byte=byte), self.checker.scalar(
                region, line, byte, write=False
            )
        value = int(self.random.integers(-(2**19), 2**19))
        trap = self.checker.scalar(Region.IO, line, byte, write=True)
        return op("sstore", region=Region.IO, line=line, byte=byte, value=value), trap

    def draw(self, n: int) -> list[Op]:
        """`n` instructions."""
        ops: list[Op] = []
        while len(ops) < n:
            kind = self.random.integers(10)
            item, trap = self._load() if kind < 4 else self._store() if kind < 8 else self._scalar()
            if trap is Trap.NONE:
                ops.append(item)
        return ops


@dataclass
class Case:
    """A program with what it starts from, and the cycles at which the unit is offered its instructions."""

    machine: Machine
    ops: list[Op]
    seed: int
    gap: int = 3
    waits: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        random = np.random.default_rng(self.seed)
        words = self.machine.vector.words
        # Words of all kinds, and many that the short formats can hold.
        self.registers = random.integers(0, 2**32, words, np.uint32)
        near = random.normal(0, 1, words) * 10.0 ** random.integers(-6, 6, words)
        self.registers[::2] = near.astype(np.float32).view(np.uint32)[::2]
        self.ddr = random.integers(0, 256, DDR_BYTES, np.uint8)
        rows = KV_BASE_ROW + REGION_BYTES // self.machine.row_bytes + 2
        self.hbm = random.integers(0, 256, (self.machine.hbm.channels, rows * self.machine.hbm.channel_bytes), np.uint8)
        self.gaps = random.integers(0, self.gap + 1, len(self.ops)).astype(np.int32)
        self.waited = random.integers(0, len(Cause), len(self.ops)).astype(np.uint32)
        self.waits = self._hazards()

    def _hazards(self) -> list[int]:
        """Instructions that must be done before each: what the scoreboard would wait for."""
        writers, stored, after_load = np.zeros(self.machine.vector.words, np.int64), 0, 0
        waits = []
        for index, item in enumerate(self.ops):
            value = _Values(item)
            wait, name = after_load, item.kind.name
            after_load = 0
            if name == "store" and value.outer * value.inner:
                wait = max(wait, int(writers[value.a : value.a + value.outer * value.inner].max()))
            if name in ("load", "sload") and value.region == Region.IO:
                wait = max(wait, stored)
            if name == "load":
                writers[value.dst : value.dst + value.n] = index + 1
            elif name == "sload":
                after_load = index + 1
            elif value.region == Region.IO:
                stored = index + 1
            waits.append(wait)
        return waits

    def kv(self) -> NDArray[np.uint8]:
        """The K/V region's bytes, in order: a view into a copy, channel by channel within each row."""
        rows = self.hbm.reshape(self.machine.hbm.channels, -1, self.machine.hbm.channel_bytes).transpose(1, 0, 2)
        start = KV_BASE_ROW * self.machine.row_bytes
        return rows.reshape(-1)[start : start + REGION_BYTES].copy()

    def region(self, region: Region) -> NDArray[np.uint8]:
        """A DDR region's bytes: a view."""
        return self.ddr[DDR_BASES[region] : DDR_BASES[region] + REGION_BYTES]

    def run(
        self, bench: MemoryBench, stalled: int = 0, disorder: int = 0, bad: tuple[int, int, int] = (-1,) * 3
    ) -> Outcome:
        """Run it on the hardware; its memories change. `stalled`: seed of the contract's stalls."""
        bases = [0, KV_BASE_ROW, *(DDR_BASES[region] for region in (Region.PARAMS, Region.LOCAL, Region.IO))]
        lines = sum(_lines(item) for item in self.ops if item.kind.name in ("load", "sload"))
        stalls = np.array([stall(stalled, 0, DDR_REQUEST, line) for line in range(lines + 1)], np.int32)
        waits = np.array(self.waits, np.int32)
        return bench.run(
            self.ops, self.gaps, waits, self.waited, bases, self.registers, self.ddr, self.hbm, stalls, disorder, bad
        )


class _Values:
    """An instruction's fields as integers."""

    def __init__(self, item: Op) -> None:
        for each in item.kind.fields:
            value = item.get(each.name)
            setattr(self, each.name, value if isinstance(value, int) else value.immediate)

    def __getattr__(self, name: str) -> int:
        raise AttributeError(name)


def _lines(item: Op) -> int:
    """Lines of a load."""
    if item.kind.name == "sload":
        return 1
    value, size = _Values(item), FORMAT_BYTES[Format(item.get("format"))]
    return blocks_touched(value.line * LINE_BYTES + value.byte, value.n, size, size, LINE_BYTES)


def _functional(case: Case) -> tuple[dict[Region, NDArray[np.uint8]], NDArray[np.uint32], dict[int, int], int]:
    """The regions and registers that the program leaves, each sload's word, and the first instruction to saturate.

    It runs in pieces that end with an sload, since the simulator shows scalar registers only at a run's end.
    """
    regions = {item: case.region(item).copy() for item in DDR_BASES} | {Region.KV: case.kv()}
    registers, words, saturated, begin = case.registers.copy(), {}, -1, 0
    cuts = [index + 1 for index, item in enumerate(case.ops) if item.kind.name == "sload"]
    for end in sorted({*cuts, len(case.ops)}):
        program = Program([*case.ops[begin:end], op("halt")])
        simulator = FunctionalSimulator(program, case.machine, 1, [DeviceMemory(regions)])
        simulator.vector_registers(0).view(np.uint32)[:] = registers
        flags = simulator.run().flags
        if flags and saturated < 0:
            saturated = begin + min(event.pc for event in flags.values())
        registers = simulator.vector_registers(0).view(np.uint32).copy()
        if end in cuts:
            words[end - 1] = simulator.scalar_registers(0)[5] & 0xFFFFFFFF
        begin = end
    return regions, registers, words, saturated


def _check_values(case: Case, bench: MemoryBench, **settings: int) -> Outcome:
    """Run on hardware and functional simulator; demand the same registers, memories, words and flag."""
    regions, registers, words, saturated = _functional(case)
    ddr, hbm, edge = case.ddr.copy(), case.hbm.copy(), KV_BASE_ROW * case.machine.hbm.channel_bytes
    for region, start in DDR_BASES.items():
        ddr[start : start + REGION_BYTES] = regions[region]
    outcome = case.run(bench, **settings)
    assert (outcome.dones >= 0).all(), f"instruction {int(np.argmin(outcome.dones))} never completed"
    assert np.array_equal(case.registers, registers)
    assert np.array_equal(case.kv(), regions[Region.KV])
    assert np.array_equal(case.ddr, ddr)
    assert np.array_equal(case.hbm[:, :edge], hbm[:, :edge])
    assert {index: int(outcome.scalars[index, 1]) for index in words} == words
    assert outcome.saturated == saturated
    assert outcome.errors == 0
    return outcome


def _check_times(case: Case, outcome: Outcome, stalled: int = 0) -> None:
    """Demand the contract's start and completion of every instruction, and its accounts."""
    p = timing_parameters(case.machine)
    ends, dones, starts = [0], [0], [-1]
    causes = {Cause.TRANSFER: 0, Cause.WRITE_SLOT: 0}
    asked = 0
    for index, item in enumerate(case.ops):
        value, name = _Values(item), item.kind.name
        start = max(starts[-1] + 1 + case.gaps[index], ends[-1], dones[case.waits[index]])
        end, latency, moving = start, p.ddr_latency, 0
        if name in ("load", "sload"):
            lines = _lines(item)
            late = sum(stall(stalled, 0, DDR_REQUEST, line) for line in range(asked, asked + lines))
            asked += lines
            end += load_occupancy(p, lines, value.n if name == "load" else 0) + late
        elif name == "sstore":
            end += p.line_cycles
        else:
            size = FORMAT_BYTES[Format(value.format)]
            first = value.line * LINE_BYTES + value.byte
            walk = (value.outer, value.inner, value.outer_bytes, value.inner_bytes, size)
            if value.region == Region.KV:
                rows = sum(
                    blocks_touched(first + o * value.outer_bytes, value.inner, value.inner_bytes, size, p.row_bytes)
                    for o in range(value.outer)
                )
                end = hbm_store_end(p, start, rows, store_cycles(p, first, *walk, 1))
                latency, moving = p.hbm_latency, max(1, rows)
            else:
                end += max(1, store_cycles(p, first, *walk, p.line_cycles))
        moving = moving or end - start
        causes[Cause.TRANSFER] += moving
        causes[Cause.WRITE_SLOT] += end - start - moving
        idle = start > ends[-1]
        starts.append(start)
        ends.append(end)
        dones.append(max(dones[-1], end + latency))
        where = f"instruction {index}, {item}"
        assert outcome.starts[index] == start, where
        assert outcome.dones[index] == dones[-1], where
        assert name != "sload" or outcome.scalars[index, 0] == dones[-1] - 1, where
        assert outcome.blamed[index] == (int(case.waited[index]) if idle or index == 0 else -1), where
    assert {cause: int(outcome.causes[cause]) for cause in causes} == causes
    assert outcome.causes.sum() == sum(causes.values())


# Tests ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", EACH)
def test_random_programs_keep_values_and_contract(name: str, bench: Callable[[str], MemoryBench]) -> None:
    unit = bench(name)
    for seed in range(12):
        case = Case(unit.machine, Programs(unit.machine, seed).draw(120), seed, gap=(0, 3, 40)[seed % 3])
        stalled = seed if seed % 2 else 0
        outcome = _check_values(case, unit, stalled=stalled)
        _check_times(case, outcome, stalled)


@pytest.mark.parametrize("name", EACH)
def test_values_survive_memories_that_hesitate(name: str, bench: Callable[[str], MemoryBench]) -> None:
    unit = bench(name)
    for seed in range(1, 7):
        case = Case(unit.machine, Programs(unit.machine, 100 + seed).draw(120), seed, gap=2)
        _check_values(case, unit, disorder=seed)


def test_stores_that_follow_one_another_keep_their_lines_apart(bench: Callable[[str], MemoryBench]) -> None:
    unit = bench("tiny")
    fields = {"format": Format.INT8, "region": Region.IO, "outer": 1, "inner_bytes": 1, "line": 20}
    # The first ends with a piece that goes on in a second line; the next begins in that line, a cycle later.
    ops = [op("store", a=0, byte=60, inner=72, **fields), op("store", a=80, byte=132, inner=72, **fields)]
    ops += [op("store", a=160, byte=204, inner=8, **fields), op("load", format=1, region=Region.IO, line=20, n=80)]
    case = Case(unit.machine, ops, 5, gap=0)
    _check_times(case, _check_values(case, unit))


def test_a_bad_answer_is_told_and_stops_nothing(bench: Callable[[str], MemoryBench]) -> None:
    unit = bench("tiny")
    fields = {"format": Format.FP32, "a": 0, "line": 2, "byte": 0, "outer": 1, "inner": 64, "inner_bytes": 4}
    ops = [
        op("store", region=Region.IO, **fields),
        op("store", region=Region.KV, **fields),
        op("load", format=Format.FP32, region=Region.IO, dst=128, line=2, byte=0, n=64),
        op("sload", rd=5, region=Region.IO, line=2, byte=4),
    ]
    for bad, errors in (((-1, -1, -1), 0), ((4, -1, -1), 1), ((3, 2, -1), 2), ((-1, -1, 0), 1)):
        case = Case(unit.machine, ops, 1)
        words = case.registers[:64].copy()
        outcome = case.run(unit, bad=bad)
        assert outcome.errors == errors
        assert np.array_equal(case.registers[128:192], words)
        assert outcome.scalars[3, 1] == words[1]
        _check_times(case, outcome)


@pytest.mark.parametrize("key", ["ddr.latency", "hbm.latency"])
def test_a_latency_that_the_pipeline_cannot_meet_is_refused(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryUnit, "_MustUse__silence", True)
    with pytest.raises(TypebarError, match=key):
        MemoryUnit(Machine.load("tiny").override({key: "14"}))
