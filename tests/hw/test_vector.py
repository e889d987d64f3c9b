# amaranth: UnusedElaboratable=no
"""The vector unit with its register file: random instructions, bits against the functional simulator, cycles against
the timing contract's formulas."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from amaranth.back import verilog
from amaranth.hdl import Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from numpy.typing import NDArray

from typebar.hw.control.core import issued_layout
from typebar.hw.control.decoder import slot
from typebar.hw.control.tickets import Domain, ticket_bits
from typebar.hw.ports import CAUSE_BITS, READ_CYCLES, activity_layout, file_rows, flag_layout, read_port, write_port
from typebar.hw.registers import RegisterFile
from typebar.hw.vector.unit import LEAST, VectorUnit
from typebar.isa.instructions import BY_NAME, Activation, Factor, Function, Kind, Operation, Reduction, Source
from typebar.isa.machine import Machine, MachineError
from typebar.isa.numerics import NumericFlag
from typebar.isa.program import Op, Operand, Program, op
from typebar.isa.timing import (
    LATE,
    MAX_ACCESSES,
    READ,
    VSUM,
    Cause,
    element_latency,
    row_levels,
    row_written,
    takes_squares,
    timing_parameters,
    vector_accesses,
    vector_count,
    vector_latency,
    vector_occupancy,
    vector_reduces,
    vector_rows,
)
from typebar.sim.functional import DeviceMemory, FunctionalSimulator
from typebar.sim.timing import run_timing
from typebar.tests.hw.flat import Flat, shared_text
from typebar.tests.hw.native import NativeModel

U32Array = NDArray[np.uint32]

MACHINES = {
    "tiny": {},
    "least": {
        **{f"vector.{key}": str(least) for key, least in LEAST.items()},
        "vector.add_latency": "1",
        "vector.lanes": "2",
        "vector.words": "3072",
        "vector.segments": "8",
    },
    "uneven": {"vector.latency": "11", "vector.unary_latency": "5", "vector.reduce_latency": "4", "vector.lanes": "4"},
    "wide": {"vector.lanes": "32", "vector.align": "32"},
}
INSTRUCTIONS = 500
RUNS = 8
TAIL = 200
"""Cycles after the last start in which everything ends."""
CORNERS = np.array(
    [0, 0x80000000, 1, 0x80000001, 0x7FFFFF, 0x800000, 0x80800000, 0x3F800000, 0xBF800000, 0x7F7FFFFF, 0xFF7FFFFF,
     0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00001, 0x7F800001],
    np.uint32,
)  # fmt: skip


class Bench(wiring.Component):
    """The unit on the register file, whose `memory` and `scalar` ports load and read it back."""

    def __init__(self, machine: Machine) -> None:
        self._unit, self._file = VectorUnit(machine), RegisterFile(machine)
        self.shared = (*self._unit.shared, *self._file.shared)
        super().__init__(
            {
                "valid": In(1),
                "payload": In(issued_layout(machine, Domain.VECTOR)),
                "waited": In(CAUSE_BITS),
                "load": In(write_port(machine)),
                "dump": In(read_port(machine)),
                "started": Out(1),
                "completed": Out(ticket_bits(machine)),
                "argmax_nan": Out(flag_layout()),
                "activity": Out(activity_layout()),
                "conflict": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.unit, m.submodules.file = unit, file = self._unit, self._file
        for ours, theirs in (
            (unit.read_a, file.read_vector_a),
            (unit.read_b, file.read_vector_b),
            (unit.write, file.write_vector),
            (unit.write_reduce, file.write_reduce),
            (wiring.flipped(self.load), file.write_memory),
            (wiring.flipped(self.dump), file.read_ring),
        ):
            wiring.connect(m, ours, theirs)
        m.d.comb += [
            unit.issued.valid.eq(self.valid),
            unit.issued.payload.eq(self.payload),
            unit.waited.eq(self.waited),
            self.completed.eq(unit.completed),
            self.argmax_nan.eq(unit.argmax_nan),
            self.activity.eq(unit.activity),
            self.conflict.eq(file.conflict),
        ]
        m.d.sync += self.started.eq(unit.issued.valid & unit.issued.ready)
        return m


# Programs -------------------------------------------------------------------------------------------------
def contents(machine: Machine, rng: np.random.Generator) -> U32Array:
    """Registers, each stretch of another kind: any bits, moderate values, corner cases, few values with many ties."""
    words = machine.vector.words
    bits = rng.integers(0, 1 << 32, words, dtype=np.uint32)
    moderate = bits & 0x807FFFFF | rng.integers(118, 136, words).astype(np.uint32) << 23
    few = rng.choice(np.array([0, 0x80000000, 0x80000003, 0x3F800000, 0xBF800000], np.uint32), words)
    kinds = [bits, moderate, moderate, few, rng.choice(CORNERS, words), few, np.full(words, 0x80000000, np.uint32)]
    kind = np.repeat(rng.integers(0, len(kinds), words // 64), 64)
    return np.choose(kind, kinds).astype(np.uint32)


def random_op(machine: Machine, rng: np.random.Generator, name: str) -> Op:
    """One instruction that passes the checks: results in place or apart."""
    words, align, lanes = machine.vector.words, machine.vector.align, machine.vector.lanes
    largest = int(rng.choice([2, lanes, 3 * lanes, 20 * lanes, words // 5], p=[0.25, 0.3, 0.3, 0.13, 0.02]))
    n = int(rng.integers(0, largest + 1))

    def base(count: int) -> int:
        """Often near the bottom, so that instructions depend on one another."""
        top = words - max(count, 1)
        where = int(rng.integers(0, min(top, 600) + 1 if rng.random() < 0.6 else top + 1))
        return where if count == 1 else where // align * align

    kind = BY_NAME[name]
    values: dict[str, Any] = {}
    for item in kind.fields:
        if item.kind is Kind.ENUM:
            assert item.values is not None
            values[item.name] = int(rng.choice(list(item.values)))
        elif item.kind is Kind.FLAG:
            values[item.name] = int(rng.integers(0, 2))
    source = values.get("b_from", Source.VECTOR)
    if "imm" in {item.name for item in kind.fields}:
        values["imm"] = int(rng.choice([rng.integers(0, 1 << 32), 0x3F000000, rng.choice(CORNERS)]))
    for operand in kind.operands:
        name_ = operand.name
        values[name_] = n if name_ == "n" else base(1 if name_ == "b" and source != Source.VECTOR else n)
    if name == "vchain":
        return random_chain(values, words, n, rng)
    if "base" in values:
        values["base"] = int(rng.integers(-100, 100_000))
    if kind.name == "vwrite":
        # More bits than an immediate holds come from a register; only its value reaches the unit.
        return op("vwrite", dst=int(rng.integers(0, words)), b=Operand(0, int(rng.integers(-(1 << 19), 1 << 19))))
    if kind.opcode >= VSUM:
        values["dst"] = int(rng.integers(0, words - 1))
        if kind.name == "vargmax":
            values["dst"] &= ~1
        return op(name, **values)
    vectors = [key for key in ("a", "b") if key in values and (key == "a" or source == Source.VECTOR)]
    in_place_or_apart(values, vectors, n)
    return op(name, **values)


def in_place_or_apart(values: dict[str, Any], vectors: list[str], n: int) -> None:
    """Move a result that overlaps one of these vectors onto the first, and the second with it if that overlaps now."""
    starts = [values[key] for key in vectors]
    if n and any(values["dst"] != start and abs(values["dst"] - start) < n for start in starts):
        values["dst"] = starts[0]
        if any(start != starts[0] and abs(start - starts[0]) < n for start in starts):
            values["b"] = values["a"]


def random_chain(values: dict[str, Any], words: int, n: int, rng: np.random.Generator) -> Op:
    """A chain; half of them have few steps, and words lie near the vectors now and then."""
    for key in ("operation", "scale_from", "function", "reduce"):
        if rng.random() < 0.4:
            values[key] = 0
    near = values["a"] + int(rng.integers(0, n + 1))
    for key in ("scale", "result"):
        values[key] = min(near, words - 1) if rng.random() < 0.3 else int(rng.integers(0, min(600, words)))
    if values["scale_from"] == Factor.VALUE:
        # The bits of a small number, as far as an immediate goes; registers hold any, which the unit does not see.
        values["scale"] = Operand(0, int(rng.choice([rng.integers(-(1 << 19), 1 << 19), 0, -1])))
    vectors = ["a", *(["b"] if values["operation"] != Operation.NONE and values["b_from"] == Source.VECTOR else [])]
    if values["write"]:
        in_place_or_apart(values, vectors, n)
    return op("vchain", **values)


def random_program(machine: Machine, rng: np.random.Generator, count: int) -> list[Op]:
    names = [name for name, kind in BY_NAME.items() if kind.unit.name == "VECTOR"]
    weights = np.array([12.0 if name == "vchain" else 2.0 if BY_NAME[name].opcode >= VSUM else 1.0 for name in names])
    program = [random_op(machine, rng, str(name)) for name in rng.choice(names, count, p=weights / weights.sum())]
    for place in rng.choice(count - 1, count // 20, replace=False):
        program[place : place + 2] = followed(machine, rng)
    return program


def followed(machine: Machine, rng: np.random.Generator) -> list[Op]:
    """An instruction about as long as it must be to be followed row by row, and one that may follow it."""
    lanes, function = machine.vector.lanes, bool(rng.integers(0, 2))
    latency = machine.vector.latency + function * machine.vector.unary_latency
    n = lanes * (latency + int(rng.integers(-1, 3))) + int(rng.integers(1, lanes))
    dst = int(rng.integers(0, 64)) // machine.vector.align * machine.vector.align
    steps = {
        "function": Activation.SILU if function else 0,
        "scale_from": int(rng.choice([Factor.NONE, Factor.WORD])),
        "reduce": int(rng.choice([Reduction.NONE, Reduction.SUMSQ])),
        "result": int(rng.choice([dst, machine.vector.words - 1])),
    }
    first = op(
        "vchain", operation=Operation.MUL, b_from=Source.IMMEDIATE, imm=0x3F000000, write=1,
        dst=dst, a=dst, n=n, scale=machine.vector.words - 2, **steps,
    )  # fmt: skip
    other = dst + n + machine.vector.align - 1
    other -= other % machine.vector.align
    word = dst + int(rng.integers(0, 2 * lanes))
    followers = (
        op("vunary", function=Function.SILU, dst=dst, a=dst, n=n),
        op("vadd", b_from=Source.VECTOR, dst=dst, a=dst, b=dst, n=n + lanes),
        op("vsub", b_from=Source.WORD, dst=other, a=dst, b=word, n=n),
        op("vmov", b_from=Source.WORD, dst=other, b=word, n=n),
        op("vsumsq", dst=word, a=dst, n=n),
        op("vchain", scale_from=Factor.WORD, scale=word, write=1, dst=dst, a=dst, n=n),
        op("vchain", reduce=Reduction.SUM, result=word, function=Activation.EXP, a=dst, n=n),
    )
    return [first, followers[int(rng.integers(0, len(followers)))]]


# The contract ---------------------------------------------------------------------------------------------
@dataclass
class Expected:
    """Cycles of each instruction, counted from the first that may start: offered, start, end, done; waits' causes."""

    offered: list[int] = field(default_factory=list)
    waited: list[int] = field(default_factory=list)
    start: list[int] = field(default_factory=list)
    done: list[int] = field(default_factory=list)
    causes: dict[int, int] = field(default_factory=dict)


def fields_of(item: Op) -> tuple[list[int], list[int]]:
    """Modifiers and operand values in declared order."""
    modifiers, values = [], []
    for entry in item.kind.fields:
        value = item.get(entry.name)
        if isinstance(value, Operand):
            values.append(value.immediate)
        else:
            modifiers.append(int(value))
    return modifiers, values


def expect(machine: Machine, program: list[Op], rng: np.random.Generator, alone: bool = False) -> Expected:
    """docs/timing.md for a vector unit, unless `alone` with random issue times and random hazards of other units."""
    p, result = timing_parameters(machine), Expected()
    segment_done = [0] * machine.vector.segments
    ranges = np.zeros((MAX_ACCESSES, 3), np.int64)
    free = done = reduced = levels = squares = exits = 0
    reductions: set[int] = set()
    rows: dict[int, int] = {}
    issue = -1
    for item in program:
        modifiers, values = fields_of(item)
        opcode = item.kind.opcode
        issue += 1 if alone or rng.random() < 0.8 else int(rng.integers(1, 40))
        waits = {Cause.VECTOR: 0}
        touched: list[tuple[int, bool]] = []
        found = ranges[: vector_accesses(opcode, modifiers, values, ranges)].tolist()
        for first, words, written in found:
            segments = range(first // machine.segment_words, (first + words - 1) // machine.segment_words + 1)
            touched += [(segment, written == LATE) for segment in segments if written != READ]
            if written == READ:
                row = first // machine.vector.lanes
                others = [segment_done[segment] for segment in segments if rows.get(segment) != row]
                waits[Cause.VECTOR] = max(waits[Cause.VECTOR], *others, 0)
            elif written != LATE:
                late = [segment_done[segment] for segment in segments if segment in reductions]
                waits[Cause.VECTOR] = max(waits[Cause.VECTOR], *late, 0)
        rows_of, reduces = vector_rows(p, vector_count(opcode, values)), vector_reduces(opcode, modifiers)
        occupancy, element = vector_occupancy(opcode, modifiers, rows_of), element_latency(p, opcode, modifiers)
        mine, squared = row_levels(rows_of), takes_squares(opcode, modifiers)
        if reduces and (mine < levels or squared < squares):
            waits[Cause.VECTOR] = max(waits[Cause.VECTOR], reduced)
        if not alone and rng.random() < 0.2:
            other = Cause(rng.choice([Cause.MATRIX, Cause.MEMORY, Cause.RING]))
            # Now and then as long as one of the unit's own rules.
            waits[other] = int(rng.choice([issue + rng.integers(0, 30), reduced, exits - element]))
        # What the core has it wait for; then the unit's own rule, that results leave in order.
        ready = max(waits.values())
        cause = min(cause for cause, time in waits.items() if time == ready)
        offered = max(issue + 1, ready)
        result.offered.append(max(offered, result.start[-1] + 1 if result.start else 0))
        result.waited.append(int(cause if ready > issue + 1 else Cause.ISSUE))
        waits[Cause.VECTOR] = max(waits[Cause.VECTOR], exits - element)
        ready = max(waits.values())
        cause = min(cause for cause, time in waits.items() if time == ready)
        start = max(issue + 1, ready, free)
        idle = int(cause if ready > issue + 1 else Cause.ISSUE)
        for key, cycles in ((idle, start - free), (int(Cause.COMPUTE), occupancy)):
            if cycles:
                result.causes[key] = result.causes.get(key, 0) + cycles
        free = start + occupancy
        exits = free + element
        done = max(done, free + vector_latency(p, opcode, modifiers, rows_of))
        if reduces:
            reduced, levels, squares = done, mine, squared
        for segment, late in touched:
            segment_done[segment] = done
            (reductions.add if late else reductions.discard)(segment)
            rows[segment] = -1 if late else row_written(p, opcode, modifiers, values, rows_of)
        result.start.append(start)
        result.done.append(done)
    return result


def split(value: int, words: int) -> list[int]:
    return [value >> 32 * i & 0xFFFFFFFF for i in range(words)]


def payload(machine: Machine, item: Op, index: int) -> list[int]:
    layout = issued_layout(machine, Domain.VECTOR)
    offset, packed = 0, 0
    for entry in item.kind.modifiers:
        packed |= int(item.get(entry.name)) << offset  # type: ignore[arg-type]
        offset += entry.width
    values = [0] * layout["values"].shape.length
    for entry in item.kind.operands:
        operand = item.get(entry.name)
        assert isinstance(operand, Operand)
        values[slot(item.kind.name, entry.name)] = operand.immediate
    word = layout.const(
        {
            "opcode": item.kind.opcode,
            "modifiers": packed,
            "values": values,
            "pc": index,
            "ticket": (index + 1) % (1 << ticket_bits(machine)),
        }
    )
    return split(word.as_value().value, (layout.size + 31) // 32)


# Running --------------------------------------------------------------------------------------------------
@dataclass
class Built:
    """A machine and its bench."""

    machine: Machine
    native: NativeModel


def build(machine: Machine, folder: Path) -> NativeModel:
    bench = Bench(machine)
    flat = Flat(bench)
    text = shared_text(bench.shared) + verilog.convert(flat, name="bench", emit_src=False)
    return NativeModel(text, {"rst": 1, **flat.inputs}, flat.outputs, folder)


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=() if name == "tiny" else pytest.mark.long) for name in MACHINES]
)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    machine = Machine.load("tiny").override(MACHINES[request.param])
    return Built(machine, build(machine, tmp_path_factory.mktemp("vector")))


def run(
    built: Built, program: list[Op], initial: U32Array, expected: Expected
) -> tuple[dict[str, U32Array], U32Array, int]:
    """Load, run, read back: outputs by cycle, the registers' words, and the cycle in which time 0 was."""
    machine, native = built.machine, built.native
    rows, lanes = file_rows(machine), machine.vector.lanes
    origin = rows + 4
    dump = origin + max(expected.done, default=0) + 1
    cycles = max(dump + rows, origin + expected.start[-1] + TAIL) + READ_CYCLES
    signals = {name: np.zeros((cycles, (width + 31) // 32), np.uint32) for name, width in native.inputs.items()}
    signals["load_address"][:rows, 0] = signals["dump_address"][dump : dump + rows, 0] = np.arange(rows)
    signals["load_mask"][:rows, 0] = (1 << lanes) - 1
    signals["load_data"][:rows] = initial.reshape(rows, lanes)
    for index, item in enumerate(program):
        held = slice(origin + expected.offered[index], origin + expected.start[index] + 1)
        signals["valid"][held] = 1
        signals["payload"][held] = payload(machine, item, index)
        signals["waited"][held] = expected.waited[index]
    outputs = native.run(signals, cycles)
    words = outputs["dump_data"][dump + READ_CYCLES - 1 : dump + READ_CYCLES - 1 + rows].reshape(-1)
    return outputs, words, origin


def charged(activity: U32Array, machine: Machine) -> dict[int, int]:
    """What counters make of a unit's activity, until it is last active."""
    causes: dict[int, int] = {}
    idle = 0
    for value in activity.tolist():
        active, cause, waited = value & 1, value >> 1 & (1 << CAUSE_BITS) - 1, value >> 1 + CAUSE_BITS
        if not active:
            idle += 1
            continue
        if idle:
            causes[waited] = causes.get(waited, 0) + idle
        causes[cause] = causes.get(cause, 0) + 1
        idle = 0
    return causes


def check(built: Built, seed: int, count: int) -> None:
    machine, rng = built.machine, np.random.default_rng(seed)
    program, initial = random_program(machine, rng, count), contents(machine, rng)
    simulator = FunctionalSimulator(Program([*program, op("halt")]), machine, 1, [DeviceMemory()])
    simulator.vector_registers(0).view(np.uint32)[:] = initial
    flags = simulator.run().flags
    expected = expect(machine, program, rng)
    outputs, words, origin = run(built, program, initial, expected)
    # Outputs are read at the end of their cycle, after its edge: registers show what they hold in the next.
    starts = (np.flatnonzero(outputs["started"][:, 0]) - origin).tolist()
    wrong = next((i for i, pair in enumerate(zip(starts, expected.start, strict=False)) if pair[0] != pair[1]), None)
    assert starts == expected.start, f"instruction {wrong}"
    tickets = np.zeros(len(outputs["completed"]), np.int64)
    for index, done in enumerate(expected.done):
        tickets[origin + done - 1 :] = (index + 1) % (1 << ticket_bits(machine))
    late = np.flatnonzero(outputs["completed"][:, 0] != tickets)
    assert not len(late), f"completed is {outputs['completed'][late[0], 0]}, not {tickets[late[0]]}"
    bits = simulator.vector_registers(0).view(np.uint32)
    differ = np.flatnonzero(words != bits)
    assert not len(differ), [(int(at), hex(words[at]), hex(bits[at])) for at in differ[:5]]
    assert charged(outputs["activity"][origin:, 0], machine) == expected.causes
    raised = outputs["argmax_nan"][:, 0]
    pcs = sorted({int(value) >> 1 for value in raised if value & 1})
    event = flags.get(NumericFlag.ARGMAX_NAN)
    assert pcs[:1] == ([event.pc] if event else [])
    assert all(program[pc].kind.name == "vargmax" for pc in pcs)
    assert not outputs["conflict"].any()


def test_the_rules_are_those_of_the_timing_simulator() -> None:
    machine, rng = Machine.load("tiny"), np.random.default_rng(3)
    program = random_program(machine, rng, 2 * INSTRUCTIONS)
    timed = run_timing(Program([*program, op("halt")]), machine, 1, np.zeros((1, 1), np.int32), trace=True)
    assert timed.trace is not None
    assert timed.trace.start.tolist() == expect(machine, program, rng, alone=True).start


@pytest.mark.parametrize("seed", range(RUNS))
def test_random_instructions(built: Built, seed: int) -> None:
    check(built, seed, INSTRUCTIONS)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(RUNS, RUNS + 100))
def test_more_random_instructions(built: Built, seed: int) -> None:
    check(built, seed, INSTRUCTIONS)


@pytest.mark.parametrize("key", LEAST)
def test_a_latency_below_the_pipeline_is_refused(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setattr(VectorUnit, "_MustUse__silence", True)
    machine = Machine.load("tiny").override({f"vector.{key}": str(LEAST[key] - 1)})
    with pytest.raises(MachineError, match=rf"vector\.{key} = {LEAST[key] - 1}"):
        VectorUnit(machine)
