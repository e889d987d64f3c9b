"""The area model: what each unit of a machine takes of an UltraScale+ device, without synthesis.

A unit's memories are counted from their shapes (`hw.synthesis.memory_cells`), which is exact. The rest of its LUTs,
registers and DSP slices is a sum of the terms of `UNITS`, each with a coefficient of its own that is not negative; the
coefficients are those with the least squares of relative errors at the points that were synthesised
(`benchmarks/area_points.py` measures and prints them). Of latencies only the dot units' is in the terms, for registers.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from typebar.hw.arith.convert import OPERAND
from typebar.hw.control.tickets import ticket_bits
from typebar.hw.control_block import POINTER_BITS
from typebar.hw.matrix.geometry import Geometry
from typebar.hw.ports import deep, file_rows, link_layout
from typebar.hw.registers import READERS
from typebar.hw.report import SHELL, U280
from typebar.hw.ring import Sender, places
from typebar.hw.synthesis import KINDS, Resources, add, memory_cells
from typebar.isa.errors import TypebarError
from typebar.isa.instructions import WORD_BYTES
from typebar.isa.machine import Machine
from typebar.isa.numerics.unary_rom import ROM_WORDS, WORD_BITS

POINTS_FILE = Path(__file__).with_name("area_points.json")
_FITTED = ("LUT", "FF", "DSP")
_SECTIONS = ("attention_block", "matrix", "vector", "hbm", "ddr", "ring", "control")
Terms = dict[str, float]


@dataclass(frozen=True)
class Point:
    """A unit synthesised at a machine's `parameters`, and what it takes."""

    unit: str
    parameters: dict[str, int]
    resources: Resources

    def machine(self) -> Machine:
        """The machine; what the parameters leave open is `tiny`'s."""
        return Machine.load("tiny").override({key: str(value).lower() for key, value in self.parameters.items()})


@dataclass(frozen=True)
class Estimate:
    """What a machine's kernel takes, by unit."""

    units: Mapping[str, Resources]

    def kernel(self) -> Resources:
        """The sum of the units."""
        return add(self.units.values())

    def shares(self) -> Resources:
        """Shares of a U280, shell included."""
        kernel = self.kernel()
        return {kind: (kernel[kind] + SHELL[kind]) / U280[kind] for kind in KINDS}


@dataclass(frozen=True)
class Residual:
    """A resource of a point: measured, fitted to all points, relative errors; `left_out`: fitted without this point."""

    unit: str
    label: str
    kind: str
    measured: float
    fitted: float
    error: float
    left_out: float | None


# Units: memories by their shapes, terms of the rest ----------------------------------------------------
def _registers(machine: Machine) -> Resources:
    """A copy of every segment for each reader, words written by themselves."""
    vector, rows = machine.vector, file_rows(machine) // machine.vector.segments
    copies = {"": len(READERS) - vector.ultra_copies, "ultra": vector.ultra_copies}
    return add(
        _times(memory_cells(32 * vector.lanes, rows, 1, clocked=True, style=style, word=32), number * vector.segments)
        for style, number in copies.items()
    )


def _tables(machine: Machine) -> Resources:
    """The unary functions' tables, one for two words of a register row."""
    return _times(memory_cells(WORD_BITS, ROM_WORDS, 2, clocked=True, rom=True), -(-machine.vector.lanes // 2))


def _matrix(machine: Machine) -> Resources:
    """Vectors, accumulators, starting sums, scales and biases, patches (`hw.matrix`); the epilogue's tables."""
    matrix, vector = machine.matrix, machine.vector
    # Not Geometry.of: points stay points when pipelines grow.
    g = Geometry(
        machine, matrix.lanes, matrix.columns, matrix.rows, matrix.interleave, matrix.vectors,
        vector.lanes, matrix.fifo_port_bytes, machine.row_bytes,
    )  # fmt: skip
    passes = 1 << (g.passes - 1).bit_length()
    item = OPERAND.size * min(g.lanes, g.words) + 1
    wide = 32 * max(g.columns, g.words)
    depth = g.block // max(g.columns, g.words)
    return add(
        [
            _times(memory_cells(item * g.slices, 2 * passes, 1, clocked=True, word=item), g.rows),
            memory_cells(32 * g.columns * g.rows, g.interleave * passes, 2, clocked=True),
            _times(memory_cells(wide, 2 * passes * depth, 1, clocked=False), g.rows),
            _times(memory_cells(32 * g.words, 2 * g.block_rows, 1, clocked=True), 2),
            memory_cells(32 * g.lanes, 2, 1, clocked=False),
            _times(memory_cells(wide, 2 * depth, 1, clocked=False), g.groups),
            _tables(machine),
        ]
    )


def _ring(machine: Machine) -> Resources:
    """In each direction a device's own block, and the rows received, read to be kept and to be sent on."""
    rows, kept = Sender(machine).own_rows, places(machine)
    own = memory_cells(32 * machine.vector.lanes, rows, 1, clocked=True, style=_style(rows))
    received = memory_cells(link_layout(machine).size, kept, 2, clocked=True, style=_style(kept))
    return _times(add([own, received]), 2)


def _fifo(machine: Machine) -> Resources:
    """Each channel's banks, as many as rows leave in a cycle."""
    banks = max(1, machine.matrix.fifo_port_bytes // machine.row_bytes)
    depth = machine.fifo_rows // banks
    bank = memory_cells(8 * machine.hbm.channel_bytes, depth, 1, clocked=True, style=_style(depth))
    return _times(bank, banks * machine.hbm.channels)


def _program(machine: Machine) -> Resources:
    """The program memory."""
    depth = machine.control.program_bytes // WORD_BYTES
    return memory_cells(8 * WORD_BYTES, depth, 1, clocked=True, style=_style(depth))


def _none(machine: Machine) -> Resources:
    return {}


def _style(depth: int) -> str:
    return deep(depth).get("ram_style", "")


def _times(cells: Resources, number: int) -> Resources:
    return {kind: number * count for kind, count in cells.items()}


def _matrix_terms(machine: Machine) -> Terms:
    matrix = machine.matrix
    whole = max(machine.fold(1, size) for size in (2, 4))  # those of int8 alone have no converters
    bytes_alone = max(whole, machine.fold(1, 1)) - whole
    dots = matrix.columns * matrix.rows
    return {
        "unit": 1,
        "lane of a dot unit": dots * matrix.lanes,
        "dot unit": dots,
        "lane of a weight column": matrix.columns * whole * matrix.lanes,
        "lane of an int8 column": matrix.columns * bytes_alone * matrix.lanes,
        "lane of a vector": matrix.rows * matrix.lanes,
        "word of a register row": machine.vector.lanes,
        "stage of a lane of a dot unit": dots * matrix.lanes * matrix.dot_latency,
    }


def _fetch_terms(machine: Machine) -> Terms:
    banks = max(1, machine.matrix.fifo_port_bytes // machine.row_bytes)
    channels, bits = machine.hbm.channels, 8 * machine.hbm.channel_bytes
    return {
        "unit": 1,
        "channel's bit": channels * bits,
        "turned bit of a bank": channels * bits * banks * (banks.bit_length() - 1),
        "channel": channels,
    }


def _control_terms(machine: Machine) -> Terms:
    bits, depth = ticket_bits(machine), machine.control.queue_depth
    return {
        "unit": 1,
        "queued ticket's bit": depth * bits,
        "queued instruction, in 32": max(1, depth // 32) + (depth > 32),
        "segment's ticket's bit": machine.vector.segments * bits,
    }


def _registers_terms(machine: Machine) -> Terms:
    vector = machine.vector
    return {
        "unit": 1,
        "segment's word": vector.segments * vector.lanes,
        "word of a register row": vector.lanes,
        "segment": vector.segments,
    }


def _word_terms(machine: Machine) -> Terms:
    return {"unit": 1, "word of a register row": machine.vector.lanes}


def _memory_terms(machine: Machine) -> Terms:
    return {"unit": 1, "word of a register row": machine.vector.lanes, "byte of a row": machine.row_bytes}


def _ticket_terms(machine: Machine) -> Terms:
    return {"unit": 1, "ticket": 1 << ticket_bits(machine)}


def _channel_terms(machine: Machine) -> Terms:
    return {"unit": 1, "channel": machine.hbm.channels}


@dataclass(frozen=True)
class Unit:
    """How a unit's area follows from a machine."""

    memories: Callable[[Machine], Resources]
    terms: Callable[[Machine], Terms]
    fitted: tuple[str, ...] = _FITTED
    """Resources that the terms stand for: blocks of memory too, where `memories` does not count them."""


_WITH_BLOCKS = (*_FITTED, "BRAM", "URAM")
UNITS: Mapping[str, Unit] = {
    "matrix": Unit(_matrix, _matrix_terms),
    "control": Unit(_program, _control_terms),
    "registers": Unit(_registers, _registers_terms),
    "vector": Unit(_tables, _word_terms),
    "memory": Unit(_none, _memory_terms, _WITH_BLOCKS),
    "ring": Unit(_ring, _word_terms),
    "fetch": Unit(_fifo, _fetch_terms),
    "counters": Unit(_none, _channel_terms, _WITH_BLOCKS),
    "ledger": Unit(_none, _ticket_terms, _WITH_BLOCKS),
    "control block": Unit(_none, _channel_terms, _WITH_BLOCKS),
}
"""The units of `hw.report`."""


# Estimates and fits -----------------------------------------------------------------------------------
def estimate(machine: Machine) -> Estimate:
    """What the units of a machine take.

    Raises:
        MachineError: the machine cannot be built: a pipeline cannot keep up with it.
    """
    Geometry.of(machine)
    coefficients = _calibration()
    units = {name: _area(name, machine, coefficients[name]) for name in UNITS}
    masters = machine.hbm.channels + 1
    return Estimate(units | {"ports": add([{"LUT": 2 * masters * POINTER_BITS}])})


def parameters(machine: Machine) -> dict[str, int]:
    """The parameters that area may depend on, by dotted name."""
    return {key: value for key, value in machine.parameters().items() if key.split(".")[0] in _SECTIONS}


def load_points(path: Path = POINTS_FILE) -> list[Point]:
    """The points measured."""
    return [Point(**row) for row in json.loads(path.read_text(encoding="utf-8"))]


def residuals(points: Sequence[Point]) -> Iterator[Residual]:
    """Measured against fitted, for every unit, point and resource."""
    for name in UNITS:
        mine = [point for point in points if point.unit == name]
        fit = _fit(name, mine) if mine else {}
        for point in mine:
            others = [other for other in mine if other is not point]
            machine = point.machine()
            fitted = _area(name, machine, fit)
            without = _area(name, machine, _fit(name, others)) if others else None
            for kind in KINDS:
                measured = point.resources[kind]
                left_out = None if without is None else _relative(without[kind], measured)
                error = _relative(fitted[kind], measured)
                yield Residual(name, _label(machine), kind, measured, fitted[kind], error, left_out)


def _label(machine: Machine) -> str:
    matrix, vector = machine.matrix, machine.vector
    array = f"{matrix.lanes} x {matrix.columns} x {matrix.rows}, port {matrix.fifo_port_bytes}"
    return f"{array}, words {vector.lanes}, {vector.segments} segments, queues {machine.control.queue_depth}"


def _relative(value: float, measured: float) -> float:
    return 0.0 if value == measured else value / measured - 1 if measured else float("inf")


def _area(name: str, machine: Machine, coefficients: Mapping[str, Mapping[str, float]]) -> Resources:
    unit = UNITS[name]
    terms = unit.terms(machine)
    rest = {kind: sum(terms[term] * factor for term, factor in row.items()) for kind, row in coefficients.items()}
    return add([unit.memories(machine), rest])


@cache
def _calibration() -> dict[str, dict[str, dict[str, float]]]:
    points = load_points()
    return {name: _fit(name, [point for point in points if point.unit == name]) for name in UNITS}


def _fit(name: str, points: Sequence[Point]) -> dict[str, dict[str, float]]:
    """By resource and term the coefficients that explain a unit's points best."""
    if not points:
        raise TypebarError(f"the area model has no point of the unit {name!r}: run benchmarks/area_points.py")
    unit, machines = UNITS[name], [point.machine() for point in points]
    rows = [unit.terms(machine) for machine in machines]
    exact = [add([unit.memories(machine)]) for machine in machines]
    found = {}
    for kind in unit.fitted:
        whole = np.array([point.resources[kind] for point in points])
        rest = whole - [item[kind] for item in exact]
        names = list(rows[0])
        matrix = np.array([[row[term] for term in names] for row in rows], dtype=float)
        weights = 1 / np.maximum(whole, 1)
        solved = _non_negative(matrix * weights[:, None], rest * weights).tolist()
        found[kind] = dict(zip(names, solved, strict=True))
    return found


def _non_negative(matrix: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    """The x >= 0 with the least |matrix x - wanted|; of equals that with the fewest and first terms. Tries each set."""
    count = matrix.shape[1]
    best, least = np.zeros(count), float(wanted @ wanted)
    for size in range(1, min(matrix.shape) + 1):
        for chosen in itertools.combinations(range(count), size):
            part, *_ = np.linalg.lstsq(matrix[:, chosen], wanted)
            if part.min() < 0:
                continue
            error = wanted - matrix[:, chosen] @ part
            if float(error @ error) < least * (1 - 1e-9) - 1e-15:
                least, best = float(error @ error), np.zeros(count)
                best[list(chosen)] = part
    return best
