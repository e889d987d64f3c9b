"""The instruction decoder and the operand checks, against `decode_op` and `Checker`, vector by vector."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from amaranth.back import verilog
from amaranth.hdl import Module, Shape
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from typebar.hw.control.checks import RANGES, OperandChecker
from typebar.hw.control.decoder import DECODED, Decoder
from typebar.isa.checks import Checker
from typebar.isa.instructions import (
    BY_NAME,
    INSTRUCTIONS,
    MAX_OPERANDS,
    MODIFIER_BASE,
    OPERAND_BASE,
    Instruction,
    Kind,
    Region,
    Trap,
    Unit,
)
from typebar.isa.machine import Machine
from typebar.isa.program import decode_op
from typebar.isa.timing import (
    MAX_ACCESSES,
    READ,
    gather_accesses,
    matmul_accesses,
    matrix_last_row,
    memory_accesses,
    timing_parameters,
    vector_accesses,
)
from typebar.tests.hw.control_programs import expected_trap
from typebar.tests.hw.native import NativeModel

SCALE = int(os.environ.get("TYPEBAR_CONTROL_SCALE", "1"))
OVERLAPPING = ("vadd", "vmov", "vunary", "vchain", "gather", "matmul")
REGION_BYTES = [40000, 24576, 6400, 0, 8192]
MACHINES = {
    "small": {"vector.words": "2048", "vector.segments": "16", "ring.buffer_words": "1024"},
    "wide": {"vector.words": "4096", "vector.segments": "8", "matrix.lanes": "16", "hbm.channels": "4"},
}


class Registered(wiring.Component):
    """A combinational component with registered outputs: what the native loop can clock."""

    def __init__(self, inner: wiring.Component) -> None:
        self.inner = inner
        super().__init__(
            {
                name: In(member.shape) if member.flow == In else Out(member.shape)
                for name, member in inner.signature.members.items()
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.inner = self.inner
        for name, member in self.signature.members.items():
            if member.flow == In:
                m.d.comb += getattr(self.inner, name).eq(getattr(self, name))
            else:
                m.d.sync += getattr(self, name).eq(getattr(self.inner, name))
        return m


class Native:
    """Runs a combinational component on rows of inputs, given and returned as integers by port."""

    def __init__(self, component: wiring.Component, folder: Path) -> None:
        members = component.signature.members
        width = {name: Shape.cast(member.shape).width for name, member in members.items()}
        self.inputs = {name: width[name] for name, member in members.items() if member.flow == In}
        self.outputs = {name: width[name] for name, member in members.items() if member.flow == Out}
        text = verilog.convert(Registered(component), name="bench", strip_internal_attrs=True)
        ports = {"rst": 1, **self.inputs}
        self.model = NativeModel(text, ports, self.outputs, folder)

    def run(self, rows: dict[str, list[int]]) -> dict[str, list[int]]:
        count = len(next(iter(rows.values())))
        packed = {name: _pack(rows[name], width) for name, width in self.inputs.items()}
        packed["rst"] = np.zeros((count, 1), np.uint32)
        out = self.model.run(packed, count)
        return {name: [_join(row) for row in out[name]] for name in self.outputs}


def _pack(values: list[int], width: int) -> Any:
    words = (width + 31) // 32
    raw = b"".join((value & (1 << width) - 1).to_bytes(4 * words, "little") for value in values)
    return np.frombuffer(raw, np.uint32).reshape(len(values), words)


def _join(row: Any) -> int:
    return int.from_bytes(np.ascontiguousarray(row, np.uint32).tobytes(), "little")


def random_word(random_: random.Random) -> int:
    """A word that is legal, nearly legal, or noise."""
    kind = random_.choice(INSTRUCTIONS)
    word = kind.opcode
    for place in kind.layout():
        bits = random_.getrandbits(place.field.width)
        if place.field.kind is Kind.ENUM and random_.random() < 0.9:
            assert place.field.values is not None
            bits = int(random_.choice(list(place.field.values)))
        word |= bits << place.offset
    choice = random_.random()
    if choice < 0.3:
        word ^= 1 << random_.randrange(512)
    elif choice < 0.4:
        word = word & ~0xFF | random_.randrange(256)
    elif choice < 0.45:
        word = random_.getrandbits(512)
    return word


def decoded_fields(kind: Instruction, word: int) -> tuple[int, int, int]:
    """Opcode, unit, modifier bits as the ISA's tables say."""
    return kind.opcode, int(kind.unit), word >> MODIFIER_BASE & (1 << OPERAND_BASE - MODIFIER_BASE) - 1


def test_every_word_decodes_as_the_tables_say(tmp_path: Path) -> None:
    random_ = random.Random(5)
    words = [random_word(random_) for _ in range(20_000 * SCALE)]
    words += [opcode for opcode in range(256)]
    words += [kind.opcode | 1 << bit for kind in INSTRUCTIONS for bit in range(8, 512)]
    out = Native(Decoder(), tmp_path).run({"word": words})["decoded"]
    illegal = 0
    for word, bits in zip(words, out, strict=True):
        view = data.Const(DECODED, bits)
        op = decode_op(word.to_bytes(64, "little"))
        assert bool(view["illegal"]) == (op is None), hex(word)
        illegal += op is None
        if op is None:
            continue
        assert (view["opcode"], view["unit"], view["modifiers"]) == decoded_fields(op.kind, word)
        for index, item in enumerate(op.kind.operands):
            value = op.get(item.name)
            assert (view["register"][index], view["immediate"][index]) == (value.register, value.immediate)
    print(f"{len(words)} words, {illegal} of them illegal")


# Operand checks -------------------------------------------------------------------------------------------
def operand_value(random_: random.Random, machine: Machine, name: str) -> int:
    """Mostly plausible, often at a limit, sometimes absurd."""
    words, align = machine.vector.words, machine.vector.align
    choice = random_.random()
    if choice < 0.03:
        return random_.choice([-1, -(2**31), 2**31 - 1, words, words + 1, random_.randint(-(2**31), 2**31 - 1)])
    if name in ("k", "n"):
        return random_.choice([0, 1, 2, 7, 8, 40, 130, random_.randint(0, words if name == "n" else 3000)])
    if name in ("outer", "inner"):
        return random_.choice([0, 1, 1, 2, 3, random_.randint(0, 5)])
    if name.endswith(("_outer", "_inner")):
        return align * random_.randint(0, 20) + (random_.random() < 0.02)
    if name == "line":
        return random_.choice([0, random_.randint(0, 700) * machine.row_lines, random_.randint(0, 130)])
    if name == "byte":
        return random_.choice([0, 0, 4, 2 * random_.randint(-20, 2000), random_.randint(-64, 64)])
    if name.endswith("_bytes"):
        return random_.choice([0, 1, 2, 4, 64, 4 * random_.randint(0, 200), 2**31 - 4])
    value = align * random_.randint(0, words // align)
    return value + (random_.random() < 0.05) * random_.randint(-9, 9)


def random_case(random_: random.Random, machine: Machine) -> tuple[Instruction, dict[str, int], dict[str, int]]:
    kind = random_.choice([item for item in INSTRUCTIONS if item.unit is not Unit.SCALAR or item.name == "vread"])
    if random_.random() < 0.35:
        kind = BY_NAME["matmul"]
    modifiers = {}
    for place in kind.layout():
        if place.field.kind is Kind.ENUM:
            assert place.field.values is not None
            legal = random_.random() < 0.85
            favourite = {"region": {"matmul": [0, 1], "store": [1, 4]}.get(kind.name, [2, 4])}.get(place.field.name)
            values = [int(value) for value in place.field.values]
            modifiers[place.field.name] = random_.choice(favourite if favourite and legal else values)
        elif place.field.kind is not Kind.OPERAND:
            modifiers[place.field.name] = random_.getrandbits(place.field.width)
    operands = {item.name: operand_value(random_, machine, item.name) for item in kind.operands}
    near = [name for name in ("a", "b", "src", "scale", "bias", "maximum", "patch_src") if name in operands]
    if "dst" in operands and near and random_.random() < 0.3:
        operands[random_.choice(near)] = operands["dst"] + machine.vector.align * random_.choice(
            [0, 0, -2, -1, 1, 2, 5]
        )
    return kind, modifiers, operands


def expected_words(
    kind: Instruction, modifiers: dict[str, int], operands: dict[str, int], devices: int
) -> tuple[set[int], set[int]]:
    """Words read and written, by the timing contract's accesses."""
    out = np.zeros((MAX_ACCESSES, 3), np.int64)
    values, bits = list(operands.values()), list(modifiers.values())
    if kind.name == "vread":
        return {values[0]}, set()
    if kind.unit is Unit.VECTOR:
        count = vector_accesses(kind.opcode, bits, values, out)
    elif kind.unit is Unit.MEMORY:
        count = memory_accesses(kind.opcode, values, out)
    elif kind.unit is Unit.RING:
        count = gather_accesses(values, devices, out)
    else:
        count = matmul_accesses(bits, values, out)
    sets: tuple[set[int], set[int]] = (set(), set())
    for first, words, written in out[:count]:
        sets[int(written != READ)].update(range(first, first + words))
    return sets


def expected_rows(machine: Machine, kind: Instruction, modifiers: dict[str, int], v: dict[str, int]) -> Any:
    """First and last row of the K/V region that a legal instruction touches, or None."""
    if modifiers.get("region") != Region.KV:
        return None
    if kind.name == "matmul" and v["n"] and v["outer"] * v["inner"]:
        p, size = timing_parameters(machine), (2, 2, 1, 4)[modifiers["format"]]
        last = matrix_last_row(p, v["line"], v["k"], v["n"], size, modifiers["full"])
        return v["line"] // machine.row_lines, last
    if kind.name == "store" and v["outer"] * v["inner"]:
        first = 64 * v["line"] + v["byte"]
        end = first + (v["outer"] - 1) * v["outer_bytes"] + (v["inner"] - 1) * v["inner_bytes"]
        size = (2, 2, 1, 4)[modifiers["format"]]
        return first // machine.row_bytes, (end + size - 1) // machine.row_bytes
    return None


@pytest.mark.parametrize("name", MACHINES)
def test_operand_checks_trap_as_the_rules_say(tmp_path: Path, name: str) -> None:
    machine = Machine.load("tiny").override(MACHINES[name])
    component, checker, random_ = OperandChecker(machine), Checker(machine, REGION_BYTES), random.Random(7)
    devices = 3
    cases = [random_case(random_, machine) for _ in range(20_000 * SCALE)]
    rows: dict[str, list[int]] = {port: [] for port in ("opcode", "modifiers", "values", "devices", "region_bytes")}
    length_bits = Shape.cast(component.region_bytes.shape().elem_shape).width
    for kind, modifiers, operands in cases:
        word = sum(
            modifiers[place.field.name] << place.offset - MODIFIER_BASE
            for place in kind.layout()
            if place.field.kind is not Kind.OPERAND
        )
        rows["opcode"].append(kind.opcode)
        rows["modifiers"].append(word)
        values = [*operands.values()] + [random_.getrandbits(32)] * (MAX_OPERANDS - len(operands))
        rows["values"].append(sum((value & 0xFFFFFFFF) << 32 * slot for slot, value in enumerate(values)))
        rows["devices"].append(devices)
        rows["region_bytes"].append(sum(size << length_bits * index for index, size in enumerate(REGION_BYTES)))
    out = Native(component, tmp_path).run(rows)
    seen: dict[str, int] = {}
    for index, (kind, modifiers, operands) in enumerate(cases):
        trap = expected_trap(checker, kind, modifiers, operands, devices)
        label = f"{kind.name} {modifiers} {operands}"
        assert Trap(out["trap"][index]) == Trap(int(trap)), label
        seen[f"{kind.name} {Trap(int(trap)).name}"] = seen.get(f"{kind.name} {Trap(int(trap)).name}", 0) + 1
        if trap:
            continue
        ranges, dst_read = data.Const(component.ranges.shape(), out["ranges"][index]), out["dst_read"][index]
        touched: tuple[set[int], set[int]] = (set(), set())
        for operand in RANGES:
            item = ranges[operand]
            if item["valid"]:
                words = range(item["first"], item["last"] + 1)
                written = operand in ("dst", "maximum")
                touched[written].update(words)
                if operand == "dst" and dst_read:
                    touched[0].update(words)
        assert touched == expected_words(kind, modifiers, operands, devices), label
        row, expected = (
            data.Const(component.rows.shape(), out["rows"][index]),
            expected_rows(machine, kind, modifiers, operands),
        )
        counted = bool(row["valid"]) and (kind.name == "matmul" or bool(out["hbm_store"][index]))
        assert counted == (expected is not None), label
        if expected is not None:
            assert (row["first"], row["last"]) == expected, label
    traps = {key.split()[1] for key in seen}
    assert traps >= {"NONE", "COUNT", "REGISTER_BOUNDS", "MISALIGNED", "REGION_ACCESS", "REGION_BOUNDS", "OVERLAP"}
    assert all(seen.get(f"{name} OVERLAP", 0) >= 5 * SCALE for name in OVERLAPPING)
    for kind in INSTRUCTIONS:
        if kind.unit is not Unit.SCALAR:
            assert seen.get(f"{kind.name} NONE", 0) > 20, f"{kind.name} hardly ever legal"
    print({key: seen[key] for key in sorted(seen)})
