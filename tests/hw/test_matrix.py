# amaranth: UnusedElaboratable=no
"""The matrix unit: random instructions, bits against the functional simulator, cycles against the timing contract."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from amaranth.back import verilog
from numpy.typing import NDArray

from typebar.hw.control.core import issued_layout
from typebar.hw.control.decoder import slot
from typebar.hw.control.tickets import Domain, ticket_bits
from typebar.hw.matrix.unit import MatrixUnit
from typebar.isa.errors import TypebarError
from typebar.isa.instructions import BY_NAME, FORMAT_BYTES, Format, Kind, Patch, Region, Scale
from typebar.isa.layout import packed_layout
from typebar.isa.machine import Machine
from typebar.isa.numerics import NumericFlag
from typebar.isa.program import Op, Operand, Program, op
from typebar.isa.timing import (
    MAX_ACCESSES,
    Cause,
    burst_rows,
    chunk_load,
    fold,
    last_hold,
    matmul_accesses,
    matmul_latency,
    rows_consumed,
    rows_needed,
    step_cycles,
    timing_parameters,
)
from typebar.sim.functional import DeviceMemory, FunctionalSimulator
from typebar.tests.hw.flat import Flat, shared_text
from typebar.tests.hw.matrix_bench import CAUSES, MatrixModel, Outcome

U32Array = NDArray[np.uint32]
U8Array = NDArray[np.uint8]

MACHINES: dict[str, dict[str, str]] = {
    "tiny": {},
    # Like the large one: no fold, column groups wider than a register row, float32 tiles wider than the port, and
    # the least latencies.
    "unfolded": {
        "matrix.rows": "1",
        "matrix.columns": "8",
        "matrix.interleave": "4",
        "matrix.vectors": "4",
        "vector.lanes": "4",
        "matrix.dot_latency": "11",
        "matrix.accumulate_latency": "2",
        "matrix.epilogue_latency": "10",
    },
    # FIFO rows of several steps, wider than the port; float32 tiles wider still; only int8 folds, as on u280.
    "wide-row": {"hbm.channels": "8", "matrix.fifo_port_bytes": "64", "matrix.vectors": "5"},
    # A register row of two chunks and of half a column block.
    "wide-words": {
        "matrix.lanes": "16",
        "matrix.interleave": "16",
        "matrix.rows": "1",
        "matrix.fifo_port_bytes": "128",
        "vector.lanes": "32",
        "vector.align": "32",
        "vector.words": "32768",
    },
    # Several chunks and several column groups in a register row, three kinds of fold.
    "short-chunk": {
        "matrix.lanes": "4",
        "matrix.rows": "4",
        "matrix.vectors": "16",
        "matrix.fifo_port_bytes": "64",
        "matrix.accumulate_latency": "7",
        "vector.lanes": "16",
        "vector.align": "16",
        "hbm.channels": "8",
    },
}
MATMUL = BY_NAME["matmul"]
REGION_BYTES = 1 << 20
WAITED = 9
"""The bench names causes from this number on for the waits before an instruction, by its index modulo 8."""
SPECIAL = np.array([0, 1 << 31, 0x7FC00000, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 1, 0x477FF000], np.uint32)


def values(rng: np.random.Generator, n: int, odd: float) -> U32Array:
    """Register words: numbers around 1, some of them of any size or special."""
    bits = rng.integers(0, 1 << 32, n, dtype=np.uint32)
    near = bits & 0x807FFFFF | rng.integers(118, 134, n).astype(np.uint32) << 23
    strange = np.where(rng.random(n) < 0.5, bits, rng.choice(SPECIAL, n))
    return np.where(rng.random(n) < odd, strange, near).astype(np.uint32)


def elements(rng: np.random.Generator, element: Format, count: int, odd: float) -> U8Array:
    """Raw elements in memory, some special."""
    if element is Format.INT8:
        return rng.integers(0, 256, count, dtype=np.uint8)
    words = values(rng, count, odd)
    if element is Format.FP32:
        return words.view(np.uint8)
    if element is Format.BF16:
        return (words >> 16).astype(np.uint16).view(np.uint8)
    with np.errstate(all="ignore"):
        return words.view(np.float32).astype(np.float16).view(np.uint8)


@dataclass
class Stream:
    """Instructions with all that they see."""

    ops: list[Op] = field(default_factory=list)
    fields: list[dict[str, int]] = field(default_factory=list)
    memory: U8Array = field(default_factory=lambda: np.zeros(REGION_BYTES, np.uint8))


def random_matmul(machine: Machine, rng: np.random.Generator, plain: bool) -> dict[str, int]:
    """Fields of one matmul that passes the checks; `plain` without any modifier, for one vector."""
    matrix, align, words = machine.matrix, machine.vector.align, machine.vector.words
    while True:
        f: dict[str, int] = {item.name: 0 for item in MATMUL.fields}
        f["k"] = int(rng.choice([1, rng.integers(1, 3 * matrix.lanes), rng.integers(1, 12 * matrix.lanes)]))
        f["n"] = int(rng.choice([1, rng.integers(1, 3 * matrix.columns), rng.integers(1, 3 * machine.column_block)]))
        f["outer"] = f["inner"] = 1
        f["format"] = int(rng.integers(0, len(Format)))
        f["region"] = int(Region.WEIGHTS)
        if plain:
            f["format"] = int(Format.FP16)
        else:
            modifiers(rng, f, matrix.vectors)
        if place(rng, f, align, words):
            return f


def modifiers(rng: np.random.Generator, f: dict[str, int], vectors: int) -> None:
    """Everything that an instruction may ask for."""
    if rng.random() < 0.6:
        f["outer"] = int(rng.integers(1, vectors + 1))
        f["inner"] = int(rng.integers(1, vectors // f["outer"] + 1))
    if rng.random() < 0.05:
        f[str(rng.choice(["n", "outer", "inner"]))] = 0
    for name in ("full", "accumulate", "add_bias", "masked", "row_max", "mask_outer", "mask_inner"):
        f[name] = int(rng.random() < 0.4)
    f["patch"] = int(rng.choice(list(Patch), p=[0.4, 0.3, 0.3]))
    f["scaling"] = int(rng.choice(list(Scale)))
    f["activation"] = int(rng.integers(0, 10)) if rng.random() < 0.4 else 0
    f["lo"] = int(rng.integers(-f["n"] - 9, f["n"] + 2)) if rng.random() < 0.7 else int(rng.integers(-(1 << 19), 0))
    f["hi"] = int(rng.integers(-3, f["n"] + 9)) if rng.random() < 0.7 else int(rng.integers(0, 1 << 19))
    limit = f["n"] if f["patch"] == Patch.COLUMN else f["k"]
    f["patch_at"] = int(rng.integers(0, limit + 3)) if rng.random() < 0.9 else int(rng.integers(0, 1 << 19))


def place(rng: np.random.Generator, f: dict[str, int], align: int, words: int) -> bool:
    """Give every operand words of its own; false if there are not enough."""
    counts = f["outer"], f["inner"]

    def rows(length: int, prefix: str) -> int:
        stride = -(-max(length, 1) // align) * align
        gaps = [int(rng.integers(0, 3)) * align for _ in counts]
        first, second = ("inner", "outer") if rng.random() < 0.5 else ("outer", "inner")
        f[f"{prefix}_{first}"] = stride + gaps[0]
        span = max(f[first] - 1, 0) * (stride + gaps[0]) + stride
        f[f"{prefix}_{second}"] = -(-span // align) * align + gaps[1]
        return span + max(f[second] - 1, 0) * f[f"{prefix}_{second}"]

    total = f["outer"] * f["inner"]
    needs = {
        "src": (rows(f["k"], "src"), f["k"]),
        "dst": (rows(f["n"], "dst"), f["n"]),
        "scale": (f["n"] if f["scaling"] == Scale.COLUMN else 1,) * 2,
        "bias": (f["n"], f["n"]),
        "maximum": (total, total),
        "patch_src": (f["k"] if f["patch"] == Patch.COLUMN else f["n"],) * 2,
    }
    at = 0
    for name in rng.permutation(list(needs)):
        size, words_each = needs[str(name)]
        f[str(name)] = at + (int(rng.integers(0, align)) if words_each <= 1 else 0)
        at += -(-max(size, 1) // align) * align + int(rng.integers(0, 2)) * align
    if at > words:
        return False
    moved = int(rng.integers(0, (words - at) // align + 1)) * align
    for name in needs:
        f[name] += moved
    return True


def dependences(stream: Stream) -> NDArray[np.int64]:
    """For each instruction how many, from the first on, must be done before it starts: it touches their results."""
    accesses, wait = [], np.zeros(len(stream.fields), np.int64)
    for index, f in enumerate(stream.fields):
        ranges = np.zeros((MAX_ACCESSES, 3), np.int64)
        modifier_values = [f[item.name] for item in MATMUL.modifiers]
        count = matmul_accesses(modifier_values, [f[item.name] for item in MATMUL.operands], ranges)
        touched = ranges[:count]
        for older, written in enumerate(accesses):
            for first, words, _ in touched:
                if any(first < at + n and at < first + words for at, n, write in written if write):
                    wait[index] = older + 1
        accesses.append(touched)
    return wait


def build(machine: Machine, rng: np.random.Generator, count: int, *, plain: bool = False, odd: float = 0.02) -> Stream:
    """A stream of random instructions on a memory of their matrices."""
    stream, line = Stream(), 0
    for _ in range(count):
        f = random_matmul(machine, rng, plain)
        element = Format(f["format"])
        layout = packed_layout(f["k"], f["n"], machine, FORMAT_BYTES[element], bool(f["full"]))
        size = -(-max(layout.bytes, 1) // machine.row_bytes) * machine.row_bytes
        if 64 * line + size > REGION_BYTES:
            line = 0
            # Later matrices overwrite none: the stream ends here.
            break
        f["line"] = line
        stream.memory[64 * line : 64 * line + size] = elements(rng, element, size // FORMAT_BYTES[element], odd)
        line += size // 64
        stream.fields.append(f)
        operands = {item.name for item in MATMUL.operands}
        stream.ops.append(op("matmul", **{k: Operand(0, v) if k in operands else v for k, v in f.items()}))
    return stream


def bursts(machine: Machine, f: dict[str, int]) -> list[tuple[int, int]]:
    """First row and number of rows of each burst, in order."""
    p, size = timing_parameters(machine), FORMAT_BYTES[Format(f["format"])]
    layout = packed_layout(f["k"], f["n"], machine, size, bool(f["full"]))
    result = []
    for block in range(layout.blocks if f["outer"] * f["inner"] else 0):
        columns = min(machine.column_block, f["n"] - block * machine.column_block)
        for chunk in range(layout.chunks):
            start = 64 * f["line"] + block * layout.block_bytes + chunk * int(layout.chunk_bytes(block))
            result.append((start // machine.row_bytes, burst_rows(p, columns, size)))
    return result


def payload(machine: Machine, f: dict[str, int], index: int) -> tuple[int, int]:
    """The word that the control core hands over, and its ticket."""
    bits, offset = 0, 0
    for item in MATMUL.modifiers:
        bits |= f[item.name] << offset
        offset += item.width
    ticket = (index + 1) % (1 << ticket_bits(machine))
    slots = [0] * (max(slot("matmul", item.name) for item in MATMUL.operands) + 1)
    for item in MATMUL.fields:
        if item.kind is Kind.OPERAND:
            slots[slot("matmul", item.name)] = f[item.name]
    layout = issued_layout(machine, Domain.MATRIX)
    given: dict[str, Any] = {
        "opcode": MATMUL.opcode, "modifiers": bits, "values": slots, "pc": index, "ticket": ticket,
    }  # fmt: skip
    for name in layout.members:
        given.setdefault(name, 0)
    return layout.const(given).as_value().value, ticket


def expected_times(
    machine: Machine, stream: Stream, outcome: Outcome, issue: NDArray[np.int64], wait: NDArray[np.int64]
) -> tuple[list[int], list[int], list[int], NDArray[np.int64]]:
    """Start and done by the contract's recurrence, when each row's place is free, and cycles by cause."""
    p = timing_parameters(machine)
    causes = np.zeros(CAUSES, np.int64)
    starts, dones, freed, row, free = [], [], [], 0, 0
    for index, f in enumerate(stream.fields):
        start = end = max([free, int(issue[index]), *dones[: int(wait[index])]])
        causes[WAITED + index % 8] += start - free
        k, n, vectors, size = f["k"], f["n"], f["outer"] * f["inner"], FORMAT_BYTES[Format(f["format"])]
        modifier_values = [f[item.name] for item in MATMUL.modifiers]
        if n == 0 or vectors == 0:
            end = start + 1
            causes[Cause.COMPUTE] += 1
        else:
            step_columns, chunk_begin = fold(p, vectors, size) * p.columns, start
            for first in range(0, n, p.column_block):
                columns = min(p.column_block, n - first)
                begins: dict[int, int] = {}
                chunks = -(-k // p.lanes)
                for chunk in range(chunks):
                    last = chunk == chunks - 1
                    load = chunk_load(p, modifier_values, vectors, columns, chunk, chunks)
                    hold = last_hold(p, vectors, size) if last else step_cycles(p, vectors, size)
                    for step in range(-(-columns // step_columns)):
                        usable = int(outcome.usable[row + rows_needed(p, columns, step_columns, step, size) - 1])
                        summed = begins.get(step, -(1 << 40)) + p.accumulate_latency
                        loaded = chunk_begin + load if step == 0 else -1
                        begin = max(end, usable, summed, loaded)
                        cause = Cause.OPERANDS
                        if begin == usable:
                            cause = Cause.WEIGHTS
                        elif begin == summed:
                            cause = Cause.ACCUMULATE
                        causes[cause] += begin - end
                        causes[Cause.COMPUTE] += hold
                        if step == 0:
                            chunk_begin = begin
                        begins[step] = begin
                        end = begin + hold
                        done_rows = rows_consumed(p, columns, step_columns, step, size)
                        freed += [end] * (row + done_rows - len(freed))
                    row += burst_rows(p, columns, size)
        starts.append(start)
        dones.append(end + matmul_latency(p))
        free = end
    return starts, dones, freed, causes


def check(model: MatrixModel, rng: np.random.Generator, stream: Stream, *, odd: float, hurry: bool) -> None:
    """Run a stream on both and compare everything."""
    machine, count = model.machine, len(stream.ops)
    words = values(rng, machine.vector.words, odd)
    memory = stream.memory.reshape(-1, machine.row_bytes)
    order = [first + i for f in stream.fields for first, rows in bursts(machine, f) for i in range(rows)]
    gaps = np.zeros(len(order), np.int64) if hurry else rng.choice([0, 0, 0, 1, 3, 40], len(order))
    given = np.cumsum(gaps) + int(rng.integers(0, 80))
    issue = np.cumsum(rng.integers(0, 2 if hurry else 120, count))
    payloads, tickets = zip(*(payload(machine, f, i) for i, f in enumerate(stream.fields)), strict=True)
    wait = dependences(stream)
    outcome = model.run(list(payloads), list(tickets), issue, wait, memory[order], given, words)

    simulator = FunctionalSimulator(
        Program([*stream.ops, op("halt")]), machine, 1, [DeviceMemory({Region.WEIGHTS: stream.memory})]
    )
    simulator.vector_registers(0).view(np.uint32)[:] = words
    result = simulator.run()
    starts, dones, freed, causes = expected_times(machine, stream, outcome, issue, wait)
    assert outcome.start.tolist() == starts
    assert outcome.done.tolist() == dones
    assert outcome.freed[: len(freed)].tolist() == freed and len(freed) == len(order)
    assert np.array_equal(outcome.causes, causes), (outcome.causes, causes)
    differ = np.flatnonzero(outcome.words != simulator.vector_registers(0).view(np.uint32))
    assert differ.size == 0, describe(stream, outcome, simulator.vector_registers(0).view(np.uint32), differ)
    raised = {flag: event.pc for flag, event in result.flags.items()}
    ours = {flag: np.flatnonzero(outcome.flags & int(flag)) for flag in NumericFlag}
    assert {flag: int(pcs[0]) for flag, pcs in ours.items() if pcs.size} == raised


def describe(stream: Stream, outcome: Outcome, expected: U32Array, differ: NDArray[np.int64]) -> str:
    """The first words that differ, and the instructions."""
    lines = [f"{differ.size} words differ"]
    lines += [f"word {at}: {outcome.words[at]:08x}, expected {expected[at]:08x}" for at in differ[:12]]
    return "\n".join([*lines, *(str({k: v for k, v in f.items() if v}) for f in stream.fields)])


@pytest.fixture(
    scope="module",
    params=["tiny", *(pytest.param(name, marks=pytest.mark.long) for name in MACHINES if name != "tiny")],
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MatrixModel:
    machine = Machine.load("tiny").override(MACHINES[request.param])
    return build_model(machine, tmp_path_factory.mktemp(request.param))


def build_model(machine: Machine, folder: Path) -> MatrixModel:
    """The unit in a shared library."""
    unit = MatrixUnit(machine)
    flat = Flat(unit)
    text = verilog.convert(flat, name="bench", emit_src=False, strip_internal_attrs=True)
    bits = flat.inputs["issued_payload"]
    return MatrixModel(machine, "\n".join([text, shared_text(unit.shared)]), bits, folder)


def test_plain(model: MatrixModel) -> None:
    """One vector, half precision, no modifier."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        check(model, rng, build(model.machine, rng, 3, plain=True, odd=0), odd=0, hurry=bool(seed % 2))


@pytest.mark.parametrize("seeds", [range(200), pytest.param(range(200, 3000), marks=pytest.mark.long)])
def test_random_instructions(model: MatrixModel, seeds: range) -> None:
    """Streams of a few instructions, back to back where they are independent; every other one with rows on time."""
    for seed in seeds:
        rng = np.random.default_rng(seed)
        odd = float(rng.choice([0, 0, 0.001, 0.03]))
        stream = build(model.machine, rng, int(rng.integers(1, 9)), odd=odd)
        check(model, rng, stream, odd=odd, hurry=bool(seed % 2))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"matrix.dot_latency": "10"}, "matrix.dot_latency"),
        ({"matrix.accumulate_latency": "1"}, "matrix.accumulate_latency"),
        ({"matrix.epilogue_latency": "9"}, "matrix.epilogue_latency"),
        ({"hbm.latency": "3"}, "hbm.latency"),
        ({"vector.lanes": "128", "vector.align": "128"}, "vector.lanes"),
    ],
)
def test_a_machine_that_cannot_be_built_is_refused(settings: dict[str, str], named: str) -> None:
    with pytest.raises(TypebarError, match=named):
        MatrixUnit(Machine.load("tiny").override(settings))
