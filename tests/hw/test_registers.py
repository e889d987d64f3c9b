# amaranth: UnusedElaboratable=no
"""The register file against arrays: random traffic on all ports at once, within the rules and against the one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from amaranth.back import verilog
from numpy.typing import NDArray

from typebar.hw.ports import READ_CYCLES, WRITE_CYCLES, file_rows
from typebar.hw.registers import READERS, WRITERS, RegisterFile
from typebar.isa.machine import Machine
from typebar.tests.hw.flat import Flat, shared_text
from typebar.tests.hw.native import NativeModel

U32Array = NDArray[np.uint32]

MACHINES = {
    "tiny": {},
    # Rows in a segment are no power of two.
    "odd": {"vector.words": "3072", "vector.segments": "8", "vector.lanes": "4", "vector.align": "8"},
    "wide": {
        "vector.words": "4096", "vector.segments": "8", "vector.lanes": "32", "vector.align": "32",
        "vector.ultra_copies": "2",
    },
}  # fmt: skip
CYCLES = 6000


def model(machine: Machine, folder: Path) -> NativeModel:
    """The register file with every port at the top; reset is never asserted."""
    design = RegisterFile(machine)
    flat = Flat(design)
    text = shared_text(design.shared) + verilog.convert(flat, name="bench", emit_src=False)
    return NativeModel(text, {"rst": 1, **flat.inputs}, flat.outputs, folder)


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=() if name == "tiny" else pytest.mark.long) for name in MACHINES]
)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Machine, NativeModel]:
    machine = Machine.load("tiny").override(MACHINES[request.param])
    return machine, model(machine, tmp_path_factory.mktemp("registers"))


def addresses(rng: np.random.Generator, rows: int) -> int:
    """Rows near the ends of segments, a few that come up again and again, and any."""
    return int(
        rng.choice([rng.integers(rows), rng.integers(8), rows - 1 - rng.integers(8), rows // 2 - rng.integers(3)])
    )


def traffic(machine: Machine, cycles: int, seed: int) -> dict[str, U32Array]:
    """Writes on all ports, never two to a segment in a cycle; reads on all ports, mostly of rows just written."""
    rng = np.random.default_rng(seed)
    rows, lanes = file_rows(machine), machine.vector.lanes
    segment_rows = rows // machine.vector.segments
    signals: dict[str, U32Array] = {"rst": np.zeros((1, 1), np.uint32)}
    for name in WRITERS:
        signals[f"write_{name}_address"] = np.zeros((cycles, 1), np.uint32)
        signals[f"write_{name}_mask"] = np.zeros((cycles, 1), np.uint32)
        signals[f"write_{name}_data"] = rng.integers(0, 1 << 32, (cycles, lanes), dtype=np.uint32)
    for name in READERS:
        signals[f"read_{name}_address"] = np.zeros((cycles, 1), np.uint32)
    recent: list[int] = [0]
    for cycle in range(cycles):
        taken = set()
        for name in WRITERS:
            row = addresses(rng, rows)
            signals[f"write_{name}_address"][cycle] = row
            if rng.random() < 0.7 and row // segment_rows not in taken:
                signals[f"write_{name}_mask"][cycle] = rng.integers(1 << lanes)
                taken.add(row // segment_rows)
                recent = [row, *recent[:20]]
        for name in READERS:
            row = int(rng.choice(recent)) if rng.random() < 0.7 else addresses(rng, rows)
            signals[f"read_{name}_address"][cycle] = row
    return signals


def test_every_port_sees_every_write(built: tuple[Machine, NativeModel]) -> None:
    machine, native = built
    rows, lanes = file_rows(machine), machine.vector.lanes
    signals = traffic(machine, CYCLES, 1)
    got = native.run(signals, CYCLES)
    contents = np.zeros((rows, lanes), np.uint32)
    written = np.full(rows, -WRITE_CYCLES)
    pending: list[list[tuple[int, int, U32Array]]] = [[] for _ in range(CYCLES + WRITE_CYCLES)]
    checked = fresh = 0
    for cycle in range(CYCLES - READ_CYCLES):
        for row, mask, words in pending[cycle]:
            chosen = (mask >> np.arange(lanes) & 1).astype(bool)
            contents[row, chosen] = words[chosen]
        for name in WRITERS:
            row, mask = int(signals[f"write_{name}_address"][cycle, 0]), int(signals[f"write_{name}_mask"][cycle, 0])
            if mask:
                pending[cycle + WRITE_CYCLES].append((row, mask, signals[f"write_{name}_data"][cycle]))
                written[row] = cycle
        for name in READERS:
            row = int(signals[f"read_{name}_address"][cycle, 0])
            age = cycle - written[row]
            if age < WRITE_CYCLES:
                continue  # the old row or the new one
            # Outputs are sampled at the end of a cycle, after its edge.
            assert np.array_equal(got[f"read_{name}_data"][cycle + READ_CYCLES - 1], contents[row]), (name, cycle)
            checked += 1
            fresh += age == WRITE_CYCLES
    assert checked > CYCLES and fresh > CYCLES // 10
    assert not got["conflict"].any()


def test_two_writes_to_a_segment_are_reported(built: tuple[Machine, NativeModel]) -> None:
    machine, native = built
    signals = traffic(machine, 20, 2)
    segment_rows = file_rows(machine) // machine.vector.segments
    for name in WRITERS:
        signals[f"write_{name}_mask"][:] = 0
    for cycle, (first, second, same) in {5: (0, 1, True), 9: (2, 5, True), 13: (3, 4, False)}.items():
        for port, offset in ((first, 1), (second, segment_rows - 1 if same else segment_rows)):
            signals[f"write_{WRITERS[port]}_address"][cycle] = segment_rows * 3 + offset
            signals[f"write_{WRITERS[port]}_mask"][cycle] = 1
    assert np.flatnonzero(native.run(signals, 20)["conflict"][:, 0]).tolist() == [5, 9]
