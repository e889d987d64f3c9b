# amaranth: UnusedElaboratable=no
"""The matrix unit's epilogue alone: random instructions, every write against the golden numerics, to the cycle."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from amaranth.back import verilog
from numpy.typing import NDArray

from typebar.hw.matrix.epilogue import MASKED, Epilogue, least_latency, stages
from typebar.hw.ports import file_rows
from typebar.isa.instructions import Activation, Function
from typebar.isa.machine import Machine, MachineError
from typebar.isa.numerics import add, bits_of, canonical, from_bits, mul, reduce_max, unary
from typebar.tests.hw.native import NativeModel

U32Array = NDArray[np.uint32]
TINY = Machine.load("tiny")
CONTROLS = ("valid", "use_scale", "use_bias", "row_max", "first_of_vector", "last_of_instruction")


def machine(lanes: int, vectors: int) -> Machine:
    """A tiny machine with another width and number of vectors."""
    return replace(
        TINY,
        vector=replace(TINY.vector, lanes=lanes, align=max(lanes, TINY.vector.align)),
        matrix=replace(TINY.matrix, vectors=vectors),
    )


@dataclass
class Write:
    """A masked row write."""

    cycle: int
    address: int
    mask: int
    words: U32Array


@dataclass
class Stimulus:
    """Inputs by cycle, and what must be written."""

    cycles: list[dict[str, int | U32Array]]
    writes: list[Write]


def values(rng: np.random.Generator, n: int) -> U32Array:
    """Floats of every kind, often of a size that functions bend."""
    bits = rng.integers(0, 1 << 32, n, dtype=np.uint32)
    near = rng.integers(110, 140, n).astype(np.uint32) << 23
    bits = np.where(rng.random(n) < 0.7, bits & 0x807FFFFF | near, bits)
    special = rng.choice(np.array([0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, MASKED], np.uint32), n)
    return np.where(rng.random(n) < 0.06, special, bits).astype(np.uint32)


def canonical_bits(bits: U32Array) -> U32Array:
    """As an addition leaves them."""
    return bits_of(canonical(from_bits(bits)))


def instruction(rng: np.random.Generator, target: Machine, latency: int, stimulus: Stimulus) -> None:
    """One product: vectors x row-wide groups of columns in one of two orders, with idle cycles between."""
    lanes, rows = target.vector.lanes, file_rows(target)
    vectors = 1 if rng.random() < 0.3 else int(rng.integers(1, target.matrix.vectors + 1))
    groups, tail = int(rng.integers(1, 5)), int(rng.integers(1, lanes + 1))
    steps = {name: int(rng.integers(0, 2)) for name in ("use_scale", "use_bias", "row_max")}
    activation = int(rng.choice(list(Activation)))
    maximum = int(rng.integers(0, rows)) * lanes + (int(rng.integers(0, lanes)) if vectors == 1 else 0)
    order = [(v, g) for g in range(groups) for v in range(vectors)]
    if rng.random() < 0.5:
        order.sort()
    results: list[list[U32Array]] = [[] for _ in range(vectors)]
    for vector, group in order:
        while rng.random() < 0.2:
            stimulus.cycles.append(noise(rng, target) | {"valid": 0})
        count = tail if group == groups - 1 else lanes
        present = (1 << count) - 1
        keep = int(rng.integers(0, 1 << lanes)) if rng.random() < 0.5 else (1 << lanes) - 1
        sums, scale, bias = canonical_bits(values(rng, lanes)), values(rng, lanes), values(rng, lanes)
        address = int(rng.integers(0, rows))
        mask = present if rng.random() < 0.9 else int(rng.integers(0, 1 << lanes))
        results[vector].append(golden(sums, scale, bias, keep, steps, activation))
        stimulus.writes.append(Write(len(stimulus.cycles) + latency, address, mask, results[vector][-1]))
        results[vector][-1] = results[vector][-1][:count]
        beat: dict[str, int | U32Array] = {"sums": sums, "scale": scale, "bias": bias, "present": present, **steps}
        beat |= {"keep": keep, "address": address, "mask": mask, "activation": activation, "vector": vector}
        beat |= {"valid": 1, "first_of_vector": int(len(results[vector]) == 1), "maximum": maximum}
        stimulus.cycles.append(beat | {"last_of_instruction": int((vector, group) == order[-1])})
    if steps["row_max"]:
        words = np.zeros(lanes, np.uint32)
        maxima = [int(bits_of(reduce_max(from_bits(np.concatenate(row))))) for row in results]
        first = maximum % lanes
        words[first : first + vectors] = maxima
        write = Write(len(stimulus.cycles) + latency, maximum // lanes, ((1 << vectors) - 1) << first, words)
        stimulus.writes.append(write)
    stimulus.cycles.append(noise(rng, target) | {"valid": 0})


def noise(rng: np.random.Generator, target: Machine) -> dict[str, int | U32Array]:
    """Inputs of a cycle without sums: anything."""
    lanes = target.vector.lanes
    beat: dict[str, int | U32Array] = {name: values(rng, lanes) for name in ("sums", "scale", "bias")}
    beat |= {name: int(rng.integers(0, 2)) for name in CONTROLS}
    beat |= {name: int(rng.integers(0, 1 << lanes)) for name in ("present", "keep", "mask")}
    return beat | {"address": int(rng.integers(0, file_rows(target))), "vector": 0}


def golden(sums: U32Array, scale: U32Array, bias: U32Array, keep: int, steps: dict[str, int], act: int) -> U32Array:
    """The results of a row, step by step."""
    result = sums
    if steps["use_scale"]:
        result = bits_of(mul(from_bits(result), from_bits(scale)))
    if steps["use_bias"]:
        result = bits_of(add(from_bits(result), from_bits(bias)))
    kept = np.array([keep >> lane & 1 for lane in range(len(sums))], bool)
    result = np.where(kept, result, np.uint32(MASKED))
    return bits_of(unary(Function(act - 1), from_bits(result))) if act else result


def run(unit: Epilogue, stimulus: Stimulus, folder: Path, text: str | None = None) -> list[Write]:
    """The writes that the unit makes."""
    target = unit._machine
    lanes = target.vector.lanes
    text = text or verilog.convert(unit, name="bench", emit_src=False)
    # Verilator would give names with two underscores others in C++.
    whole = "\n".join([text.replace("write__", "write_"), *(item.verilog for item in unit.shared)])
    inputs = {"rst": 1, **dict.fromkeys(("sums", "scale", "bias"), 32 * lanes), **dict.fromkeys(CONTROLS, 1)}
    inputs |= dict.fromkeys(("present", "keep", "mask"), lanes)
    inputs |= {"address": (file_rows(target) - 1).bit_length(), "activation": 4}
    inputs["vector"] = (target.matrix.vectors - 1).bit_length()
    inputs["maximum"] = (target.vector.words - 1).bit_length()
    inputs = {name: width for name, width in inputs.items() if width}
    outputs = {"write_address": inputs["address"], "write_mask": lanes, "write_data": 32 * lanes}
    model = NativeModel(whole, inputs, outputs, folder)
    given = {}
    for name, width in inputs.items():
        rows = np.zeros((len(stimulus.cycles), -(-width // 32)), np.uint32)
        for cycle, beat in enumerate(stimulus.cycles):
            rows[cycle] = beat.get(name, 0)
        given[name] = rows
    # Outputs are read after the edge that ends a cycle: those of cycle c are in row c - 1.
    raw = model.run(given, len(stimulus.cycles) + unit.latency + 3)
    return [
        Write(cycle + 1, int(raw["write_address"][cycle, 0]), int(mask), raw["write_data"][cycle])
        for cycle, mask in enumerate(raw["write_mask"][:, 0])
        if mask
    ]


def differ(mine: list[Write], theirs: list[Write], lanes: int) -> str:
    """The first difference, or nothing."""
    theirs = [write for write in theirs if write.mask]
    for index, (left, right) in enumerate(zip(mine, theirs, strict=False)):
        lane = np.array([right.mask >> i & 1 for i in range(lanes)], bool)
        same = (left.cycle, left.address, left.mask) == (right.cycle, right.address, right.mask)
        if not same or not np.array_equal(left.words[lane], right.words[lane]):
            return f"write {index}: {left}, expected {right}"
    return "" if len(mine) == len(theirs) else f"{len(mine)} writes, expected {len(theirs)}"


def stimuli(target: Machine, latency: int, seed: int, instructions: int) -> Stimulus:
    """Random instructions, one idle cycle or more after each."""
    rng, stimulus = np.random.default_rng(seed), Stimulus([], [])
    for _ in range(instructions):
        instruction(rng, target, latency, stimulus)
    return stimulus


@pytest.mark.parametrize(("lanes", "vectors", "extra"), [(8, 7, 12), pytest.param(2, 1, 0, marks=pytest.mark.long)])
def test_every_write_is_golden(lanes: int, vectors: int, extra: int, tmp_path: Path) -> None:
    target = machine(lanes, vectors)
    unit = Epilogue(target, least_latency(target) + extra)
    stimulus = stimuli(target, unit.latency, lanes, 200)
    assert differ(run(unit, stimulus, tmp_path), stimulus.writes, lanes) == ""


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("subtract(1'h0)", "subtract(1'h1)"), ("32'd4286578688", "32'd0")],
)
def test_a_broken_unit_is_seen(right: str, wrong: str, tmp_path: Path) -> None:
    target = machine(2, 2)
    unit = Epilogue(target, least_latency(target))
    stimulus = stimuli(target, unit.latency, 5, 100)
    text = verilog.convert(unit, name="bench", emit_src=False)
    assert right in text
    assert differ(run(unit, stimulus, tmp_path, text.replace(right, wrong)), stimulus.writes, 2)


def test_stages_fill_the_latency() -> None:
    for lanes in (2, 8, 16, 64):
        target = machine(lanes, 2)
        least = least_latency(target)
        for latency in range(least, least + 80):
            multiply, add_, function, tree = stages(target, latency)
            assert multiply + add_ + function + sum(tree) + 1 == latency
            assert min(multiply, add_, *tree) >= 1 and function >= 2


def test_refusals_name_the_parameter() -> None:
    target = machine(8, 8)
    with pytest.raises(MachineError, match=r"matrix\.epilogue_latency = \d+ leaves the epilogue 7 cycles: it needs 8"):
        Epilogue(target, 7)
    with pytest.raises(MachineError, match=r"matrix\.vectors = 16 exceeds"):
        Epilogue(machine(8, 16), 20)
