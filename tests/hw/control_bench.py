"""The control core in cocotb, with units that only keep time; runs inside the simulator, see test_control_core.py.

The stub units start what the core hands them, stay occupied and complete as `typebar.isa.timing` says. What depends
on rows and steps (matmul, fetch) or on other devices (gather) they take from the timing simulator's run of the same
program. Starts, commits and values are then compared with the simulators'.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from typing import Any

import cocotb
import numpy as np
from amaranth.lib import data
from cocotb.triggers import Timer

from typebar.hw.control.core import issued_layout
from typebar.hw.control.tickets import Domain, ticket_bits
from typebar.hw.ports import CAUSE_BITS
from typebar.isa.instructions import BY_OPCODE, SCALAR_REGISTERS, Region, Trap
from typebar.isa.machine import Machine
from typebar.isa.program import Operand, Program, decode_op, encode, op
from typebar.isa.timing import (
    FETCH_UNIT,
    LOAD,
    SLOAD,
    SSTORE,
    STORE,
    UNIT_NAMES,
    VMOV,
    VWRITE,
    Cause,
    blocks_touched,
    element_bytes,
    element_latency,
    fetch_slot,
    hbm_store_end,
    load_occupancy,
    matmul_latency,
    store_cycles,
    timing_parameters,
    vector_count,
    vector_latency,
    vector_occupancy,
    vector_rows,
)
from typebar.sim.functional import DeviceMemory, DeviceTrap, FunctionalSimulator
from typebar.sim.timing import run_timing
from typebar.tests.hw.control_programs import REGION_BYTES, random_program

MACHINE = Machine.load("tiny").override(dict(item.split("=") for item in os.environ["TYPEBAR_MACHINE"].split()))
P = timing_parameters(MACHINE)
WAITS = ("issue", "store", "fetch", "matrix", "vector", "memory", "ring")
"""Causes of a unit's idle cycles before a start."""
LIMIT = 200_000
"""Cycles after which a run is taken for hung."""
LAYOUTS = {domain: issued_layout(MACHINE, domain) for domain in Domain}


def _modifiers(kind: Any, bits: int) -> dict[str, int]:
    values, offset = {}, 0
    for item in kind.modifiers:
        values[item.name] = bits >> offset & (1 << item.width) - 1
        offset += item.width
    return values


@dataclass
class Start:
    """A unit's instruction as the core handed it over; cycles count from the first commit."""

    domain: Domain
    cycle: int
    pc: int
    name: str
    modifiers: dict[str, int]
    values: list[int]
    ticket: int
    waited: int
    """Cause of the unit's idle cycles before it, and their number."""
    idle: int


@dataclass
class Units:
    """Occupancy, completion and the little data that the scalar core can see."""

    durations: dict[Domain, list[tuple[int, int]]]
    """Start and end of each matmul, fetch and gather by the timing simulator, in order."""
    free: dict[Domain, int] = field(default_factory=lambda: dict.fromkeys(Domain, -1))
    done: dict[Domain, list[tuple[int, int]]] = field(default_factory=lambda: {domain: [] for domain in Domain})
    latest: dict[Domain, int] = field(default_factory=lambda: dict.fromkeys(Domain, -1))
    starts: list[Start] = field(default_factory=list)
    writes: list[tuple[int, int, int]] = field(default_factory=list)
    words: dict[int, int] = field(default_factory=dict)
    io: dict[int, int] = field(default_factory=dict)
    loaded: dict[int, int] = field(default_factory=dict)
    """Cycle of a scalar load's response, and its value."""
    exits: int = 0
    """Cycle in which the next row of the vector unit may have its result: they leave in order."""
    offered: dict[Domain, int] = field(default_factory=dict)
    """Since when each domain's head has been offered."""

    def ready(self, domain: Domain, cycle: int, opcode: int, modifiers: dict[str, int]) -> bool:
        """Whether a unit takes the offered instruction in a cycle."""
        free = self.free[domain]
        if domain is Domain.VECTOR:
            free = max(free, self.exits - element_latency(P, opcode, list(modifiers.values())))
        return cycle >= free

    def begin(self, start: Start, opcode: int) -> None:
        """Work out an instruction's occupancy and completion."""
        cycle, values = start.cycle, start.values
        self.starts.append(start)
        if start.domain is Domain.VECTOR:
            rows, modifiers = vector_rows(P, vector_count(opcode, values)), list(start.modifiers.values())
            end = cycle + vector_occupancy(opcode, modifiers, rows)
            done = end + vector_latency(P, opcode, modifiers, rows)
            self._order(start, element_latency(P, opcode, modifiers), end)
            self._write(start, opcode, max(done, self.latest[Domain.VECTOR]))
        elif start.domain is Domain.MEMORY:
            end, done = self._memory(start, opcode)
        else:
            order = sum(item.domain is start.domain for item in self.starts) - 1
            first, last = self.durations[start.domain][order]
            if start.domain is Domain.FETCH:
                # The timing simulator records the first request, the first fetch slot from the start on.
                assert fetch_slot(P, cycle) == first, f"fetch of pc {start.pc} starts at {cycle}, not for {first}"
                end = done = last
            else:
                end = cycle + last - first
                done = end + (matmul_latency(P) if start.domain is Domain.MATRIX else 0)
        done = self.latest[start.domain] = max(done, self.latest[start.domain])
        self.free[start.domain] = end
        self.done[start.domain].append((done, start.ticket))
        if opcode == SLOAD:
            at = values[0] * 16 + (values[1] >> 2)
            self.loaded[done - 1] = self.io.get(at, 0)

    def _order(self, start: Start, latency: int, end: int) -> None:
        """Charge a wait for the order of results to the vector unit, if nothing that counts before it took as long."""
        offered, since = self.offered.pop(Domain.VECTOR), self.exits - latency
        if offered < since or (offered == since and start.waited in (Cause.MEMORY, Cause.RING)):
            start.waited = int(Cause.VECTOR)
        self.exits = end + latency

    def _write(self, start: Start, opcode: int, done: int) -> None:
        if opcode == VWRITE:
            self.writes.append((done, start.values[0], start.values[1]))
        elif opcode == VMOV and start.modifiers["b_from"] == 2:
            dst, _, n = start.values[:3]
            self.writes += [(done, dst + index, start.modifiers["imm"]) for index in range(n)]

    def _memory(self, start: Start, opcode: int) -> tuple[int, int]:
        values, cycle = start.values, start.cycle
        in_hbm = start.modifiers["region"] == Region.KV
        block, line_cycles = (P.row_bytes, 1) if in_hbm else (64, P.line_cycles)
        if opcode == LOAD:
            size = element_bytes(start.modifiers["format"])
            touched = blocks_touched(values[1] * 64 + values[2], values[3], size, size, block)
            occupancy = load_occupancy(P, touched, values[3])
        elif opcode == STORE:
            size = element_bytes(start.modifiers["format"])
            base, (outer, inner, outer_bytes, inner_bytes) = values[1] * 64 + values[2], values[3:7]
            touched = sum(blocks_touched(base + o * outer_bytes, inner, inner_bytes, size, block) for o in range(outer))
            cycles = store_cycles(P, base, outer, inner, outer_bytes, inner_bytes, size, line_cycles)
            occupancy = max(1, cycles)
        else:
            occupancy = P.line_cycles
            if opcode == SSTORE and start.modifiers["region"] == Region.IO:
                self.io[values[0] * 16 + (values[1] >> 2)] = values[2]
        if not in_hbm:
            return cycle + occupancy, cycle + occupancy + P.ddr_latency
        end = hbm_store_end(P, cycle, touched, cycles)
        return end, end + P.hbm_latency

    def completed(self, domain: Domain, cycle: int, before: int) -> int:
        """The last ticket done in a cycle."""
        queue, last = self.done[domain], before
        while queue and queue[0][0] <= cycle:
            last = queue.pop(0)[1]
        return last

    def word(self, address: int, cycle: int) -> int:
        """A vector word as read in a cycle."""
        for item in [item for item in self.writes if item[0] <= cycle]:
            self.words[item[1]] = item[2]
        self.writes = [item for item in self.writes if item[0] > cycle]
        return self.words.get(address, 0) & 0xFFFFFFFF


@dataclass
class Run:
    """What the core did; cycles count from the first commit."""

    starts: list[Start]
    registers: list[int]
    commits: list[tuple[int, int]]
    causes: dict[str, int]
    """Cycles of the scalar core by cause."""
    halted: bool
    trap: int
    trap_pc: int
    trap_code: int


class Core:
    """Drives the core's ports, one clock cycle at a time."""

    def __init__(self, dut: Any) -> None:
        self.dut = dut
        self.last = dict.fromkeys(Domain, 0)
        self.names = {domain: domain.name.lower() for domain in Domain}
        self.driven: dict[str, int] = {}

    async def reset(self) -> None:
        """All inputs low for a few cycles of reset."""
        for name in ("start", "load_enable", "scalar_valid", "read_data", "scalar_data", "completed", "entry", "rank"):
            getattr(self.dut, name).value = 0
        for name in ("length", "devices", "region_bytes", "load_address", "load_word"):
            getattr(self.dut, name).value = 0
        for name in self.names.values():
            getattr(self.dut, f"{name}__ready").value = 0
        self.dut.rst.value = 1
        for _ in range(3):
            await self.edge()
        self.dut.rst.value = 0

    async def settle(self) -> None:
        """The first half of a cycle: inputs take effect."""
        self.dut.clk.value = 0
        await Timer(1, "step")

    async def edge(self) -> None:
        """The rest of a cycle."""
        await self.settle()
        await self.rise()

    async def rise(self) -> None:
        """The second half of a cycle, with the rising edge."""
        self.dut.clk.value = 1
        await Timer(1, "step")

    async def load(self, words: bytes) -> None:
        """Write a program and its length."""
        dut = self.dut
        for index in range(len(words) // 64):
            dut.load_enable.value, dut.load_address.value = 1, index
            dut.load_word.value = int.from_bytes(words[64 * index : 64 * index + 64], "little")
            await self.edge()
        dut.load_enable.value, dut.length.value = 0, len(words) // 64

    def drive(self, name: str, value: int) -> None:
        """Set an input, if it changes: writing is slow."""
        if self.driven.get(name) != value:
            self.driven[name] = value
            getattr(self.dut, name).value = value

    def _completed(self, units: Units, cycle: int) -> int:
        bits, packed = ticket_bits(MACHINE), 0
        for domain in Domain:
            self.last[domain] = units.completed(domain, cycle, self.last[domain])
            packed |= self.last[domain] << bits * domain
        return packed

    def _start(self, domain: Domain, cycle: int, idle: int) -> tuple[Start, int]:
        port = getattr(self.dut, f"{self.names[domain]}__payload")
        item = data.Const(LAYOUTS[domain], int(port.value))
        kind = BY_OPCODE[item["opcode"]]
        values = [item["values"][index] for index in range(len(kind.operands))]
        modifiers = _modifiers(kind, item["modifiers"])
        waited = int(self.dut.waited.value) >> CAUSE_BITS * domain & (1 << CAUSE_BITS) - 1
        return Start(domain, cycle, item["pc"], kind.name, modifiers, values, item["ticket"], waited, idle), kind.opcode

    async def _answer(self, units: Units, cycle: int) -> None:
        """Settle; then let each unit say whether it takes what is offered, and settle again."""
        await self.settle()
        for domain, name in self.names.items():
            valid, payload = bool(getattr(self.dut, f"{name}__valid").value), getattr(self.dut, f"{name}__payload")
            opcode, modifiers = 0, {}
            if valid:
                units.offered.setdefault(domain, cycle)
                item = data.Const(LAYOUTS[domain], int(payload.value))
                opcode = item["opcode"]
                modifiers = _modifiers(BY_OPCODE[opcode], item["modifiers"])
            self.drive(f"{name}__ready", int(units.ready(domain, cycle, opcode, modifiers)))
        await self.settle()

    async def run(self, words: bytes, units: Units, devices: int = 1, rank: int = 0, entry: int = 0) -> Run:
        """Load, start, and keep the units' time until the core has stopped and is idle."""
        dut, latency = self.dut, MACHINE.control.read_latency
        await self.load(words)
        lengths = data.ArrayLayout(len(dut.region_bytes) // len(Region), len(Region))
        packed = sum(REGION_BYTES[region] << lengths.elem_shape * region for region in Region)
        dut.region_bytes.value, dut.devices.value, dut.rank.value = packed, devices, rank
        dut.start.value, dut.entry.value = 1, entry
        await self.edge()
        dut.start.value = 0
        origin, now, reads, reading = -1, 0, {}, 0
        commits: list[tuple[int, int]] = []
        causes: dict[str, int] = {}
        registers = [0] * SCALAR_REGISTERS
        registers[1:3] = rank, devices
        while True:
            cycle = now - origin if origin >= 0 else -(1 << 20)
            if origin < 0:
                causes.clear()
            self.drive("completed", self._completed(units, cycle))
            # Neither value may matter in any other cycle.
            self.drive("read_data", reads.get(now, 0xDEADBEEF))
            self.drive("scalar_valid", int(cycle in units.loaded))
            self.drive("scalar_data", units.loaded.get(cycle, 0xDEADBEEF) & 0xFFFFFFFF)
            await self._answer(units, cycle)
            if int(dut.commit_valid.value):
                origin = now if origin < 0 else origin
                cycle = now - origin
                commits.append((cycle, int(dut.commit_pc.value)))
                if int(dut.commit_write.value):
                    value = int(dut.commit_value.value)
                    registers[int(dut.commit_register.value)] = value - (value >> 31 << 32)
            activity = int(dut.activity.value)
            if activity & 1:
                cause = Cause(activity >> 1 & (1 << CAUSE_BITS) - 1).name.lower()
                causes[cause] = causes.get(cause, 0) + 1
            enabled = int(dut.read_enable.value)
            if enabled and not reading:
                assert not units.done[Domain.RING], f"a read at cycle {cycle} through the port of a gather"
                reads[now + latency - 2] = units.word(int(dut.read_address.value), cycle)
            reading = enabled
            for domain, name in self.names.items():
                if int(getattr(dut, f"{name}__valid").value) and int(getattr(dut, f"{name}__ready").value):
                    units.begin(*self._start(domain, cycle, cycle - max(0, units.free[domain])))
            if now > 4 and int(dut.idle.value):
                break
            assert now < LIMIT, "the core hangs"
            await self.rise()
            now += 1
        await self.rise()
        codes = [int(port.value) for port in (dut.halted, dut.trap, dut.trap_pc, dut.trap_code)]
        return Run(units.starts, registers, commits, causes, bool(codes[0]), *codes[1:])


def memories(devices: int) -> list[DeviceMemory]:
    """Zeroed regions."""
    return [
        DeviceMemory({region: np.zeros(size, np.uint8) for region, size in REGION_BYTES.items()})
        for _ in range(devices)
    ]


def timed(program: Program, devices: int) -> tuple[Any, dict[Domain, list[tuple[int, int]]], dict[Domain, Any]]:
    """The timing simulator's result, durations by domain, and (pc, start) by domain of device 0."""
    result = run_timing(program, MACHINE, devices, np.zeros((devices, 4096), np.int32), trace=True)
    trace = result.trace
    assert trace is not None
    durations, starts = {}, {}
    for domain in Domain:
        unit = FETCH_UNIT if domain is Domain.FETCH else domain + 1
        mine = (trace.device == 0) & (trace.unit == unit)
        rows = list(zip(trace.pc[mine], trace.start[mine], trace.end[mine], strict=True))
        durations[domain] = [(int(start), int(end)) for _, start, end in rows]
        starts[domain] = [(int(pc), int(start)) for pc, start, _ in rows]
    return result, durations, starts


@cocotb.test()
async def random_programs_keep_the_simulators_time(dut: Any) -> None:
    """Starts of every unit, cycles, registers and stores of random programs equal the simulators'."""
    core = Core(dut)
    await core.reset()
    first, count = (int(item) for item in os.environ["TYPEBAR_SEEDS"].split())
    instructions = cycles = 0
    waits: dict[str, int] = {}
    for seed in range(first, first + count):
        program, devices = random_program(seed, MACHINE), 1 + seed % 2
        result, durations, starts = timed(program, devices)
        functional, stores = FunctionalSimulator(program, MACHINE, devices, memories(devices)), []
        functional.run(on_store=lambda *record, log=stores: log.append(record))
        run = await core.run(encode(program).tobytes(), Units(durations), devices)
        assert run.halted and not run.trap, f"seed {seed}: trap {Trap(run.trap).name} at {run.trap_pc}"
        for domain in Domain:
            mine = [(item.pc, item.cycle) for item in run.starts if item.domain is domain]
            if domain is Domain.FETCH:
                mine = [(pc, fetch_slot(P, cycle)) for pc, cycle in mine]
            assert mine == starts[domain], f"seed {seed}: {domain.name} starts {_first(mine, starts[domain])}"
            unit = UNIT_NAMES[FETCH_UNIT if domain is Domain.FETCH else domain + 1]
            expected = {cause: n for cause, n in result.causes[0][unit].items() if cause in WAITS}
            assert _waits(run.starts, domain) == expected, f"seed {seed}: waits of {unit}"
        drained = {"drain": max(result.device_cycles) - result.device_cycles[0]}
        expected = {cause: n for cause, n in (run.causes | drained).items() if n}
        assert expected == result.causes[0]["issue"], f"seed {seed}: causes of issue"
        assert run.commits[-1][0] + 1 == result.device_cycles[0], f"seed {seed}: cycles"
        assert len(run.commits) == result.counters[0].instructions, f"seed {seed}: instructions"
        assert run.registers == functional.scalar_registers(0), f"seed {seed}: registers"
        log = [(0, *item.values) for item in run.starts if item.name == "sstore"]
        assert log == [record for record in stores if record[0] == 0], f"seed {seed}: stores"
        instructions, cycles = instructions + len(run.commits), cycles + result.device_cycles[0]
        for unit, causes in result.causes[0].items():
            for cause in causes:
                waits[f"{unit}:{cause}"] = waits.get(f"{unit}:{cause}", 0) + 1
    dut._log.info(f"{count} programs, {instructions} instructions, {cycles} cycles")
    dut._log.info(f"programs that met a cause: {dict(sorted(waits.items()))}")
    if count >= 20:
        for cause in ("issue:queue", "issue:fence", "issue:branch", "issue:matrix", "memory:fetch", "fetch:store"):
            assert waits.get(cause), f"no program met {cause}: the test shows less than it claims"


def _waits(starts: list[Start], domain: Domain) -> dict[str, int]:
    """Idle cycles of a unit by cause."""
    found: dict[str, int] = {}
    for item in starts:
        if item.domain is domain and item.idle:
            cause = Cause(item.waited).name.lower()
            found[cause] = found.get(cause, 0) + item.idle
    return found


def _first(mine: list[Any], theirs: list[Any]) -> str:
    for index, (left, right) in enumerate(zip(mine, theirs, strict=False)):
        if left != right:
            return f"differ at {index}: {left}, expected {right}"
    return f"number {len(mine)}, expected {len(theirs)}"


@cocotb.test()
async def a_start_sets_the_registers_and_the_entry(dut: Any) -> None:
    """Registers start at zero but R1 (rank) and R2 (devices), whatever an earlier program left in them."""
    core = Core(dut)
    await core.reset()
    program = Program([
        op("sli", rd=1, value=50), op("sli", rd=9, value=60), op("halt"),
        op("sadd", rd=10, a=Operand(1, 4), b=Operand(2)), op("sadd", rd=11, a=Operand(9), b=Operand(0, 1)), op("halt"),
    ])  # fmt: skip
    expected = {0: {1: 50, 2: 5, 9: 60}, 3: {1: 3, 2: 5, 10: 12, 11: 1}}
    for entry in (0, 3, 0):
        run = await core.run(encode(program).tobytes(), Units({}), devices=5, rank=3, entry=entry)
        assert run.halted and [pc for _, pc in run.commits] == [entry, entry + 1, entry + 2]
        assert {number: value for number, value in enumerate(run.registers) if value} == expected[entry]


@cocotb.test()
async def every_stop_names_its_instruction(dut: Any) -> None:
    """Illegal words, bad operands, software traps and the program's end stop with code and index; nothing younger
    commits or starts."""
    core = Core(dut)
    await core.reset()
    random_ = random.Random(11)
    legal = [op("sli", rd=5, value=7), op("vwrite", dst=3, b=1), op("sadd", rd=6, a=1, b=2)]
    bad = encode(Program([
        op("trap", code=-77), op("vadd", n=1 << 15), op("vread", a=-1), op("vwrite", dst=MACHINE.vector.words),
        op("beq", to=900), op("load", region=1, n=8), op("load", region=4, n=1, line=400), op("store", region=3),
        op("sstore", region=4, byte=2), op("matmul", region=0, n=8, k=8, outer=1, inner=1, line=1 << 18),
        op("gather", n=12), op("vmov", b_from=1, b=0, dst=3, n=2), op("vadd", dst=8, n=12),
    ])).tobytes()  # fmt: skip
    words = [bad[at : at + 64] for at in range(0, len(bad), 64)]
    while len(words) < int(os.environ["TYPEBAR_STOPS"]):
        kind = random_.choice(list(BY_OPCODE.values()))
        word = kind.opcode | random_.getrandbits(512) << 8 if random_.random() < 0.5 else random_.getrandbits(512)
        word = word & (1 << 512) - 1 if random_.random() < 0.5 else kind.opcode | 1 << random_.randrange(8, 512)
        if decode_op(word.to_bytes(64, "little")) is None:
            words.append(word.to_bytes(64, "little"))
    seen = set()
    for number, word in enumerate(words):
        before = [random_.choice(legal) for _ in range(random_.randrange(5))]
        program = encode(Program([legal[0], *before])).tobytes() + word + encode(Program([legal[1]] * 3)).tobytes()
        simulator = FunctionalSimulator(program, MACHINE, 1, memories(1))
        try:
            simulator.run()
            raise AssertionError(f"word {number} does not trap")
        except DeviceTrap as stop:
            expected = (int(stop.trap), stop.pc, stop.code or 0)
        run = await core.run(program, Units({domain: [] for domain in Domain}))
        code = run.trap_code - (run.trap_code >> 31 << 32)
        assert not run.halted and (run.trap, run.trap_pc, code) == expected, f"word {number}: {run}"
        assert run.registers == simulator.scalar_registers(0), f"word {number}"
        executed = sum(simulator.states[0].counts)
        assert len(run.commits) == executed, f"word {number}"
        assert len(run.starts) == sum(item.kind.name == "vwrite" for item in _ops(program)[:executed]), f"word {number}"
        seen.add(Trap(run.trap).name)
    dut._log.info(f"{len(words)} stops: {sorted(seen)}")
    assert seen >= {
        "ILLEGAL",
        "SOFTWARE",
        "COUNT",
        "REGISTER_BOUNDS",
        "PROGRAM_END",
        "REGION_ACCESS",
        "REGION_BOUNDS",
        "OVERLAP",
    }


def _ops(program: bytes) -> list[Any]:
    return [decode_op(program[at : at + 64]) for at in range(0, len(program), 64)]
