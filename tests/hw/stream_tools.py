"""What random streams cover, how a failing one is shrunk, and programs that trap in every documented way."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from typebar.isa.checks import Checker
from typebar.isa.errors import TypebarError
from typebar.isa.instructions import (
    BY_NAME,
    IMMEDIATE_BITS,
    INSTRUCTIONS,
    Factor,
    Format,
    Kind,
    Patch,
    Reduction,
    Region,
    Scale,
    Source,
    Trap,
    Unit,
)
from typebar.isa.machine import Machine
from typebar.isa.program import Op, Operand, Program, Value, decode_op, encode, encode_op, op
from typebar.sim.functional import FunctionalSimulator, RunResult
from typebar.tests.hw.streams import (
    BINARY,
    RECENT,
    REDUCE,
    REGION_BYTES,
    Range,
    Stream,
    Values,
    accesses,
    operand_values,
    trap_of,
    without,
)

Executed = list[tuple[Op, list[int]]]
"""The instructions that a device executed, with their operand values."""
LIMIT = 20_000
"""Instructions after which a stream is taken for endless."""


def execute(
    stream: Stream, machine: Machine, registers: int | None = None
) -> tuple[FunctionalSimulator, RunResult, Executed]:
    """Run a stream on the functional simulator; what device 0 executed. `registers` is a seed of what they hold before.

    Raises:
        TypebarError: it traps, or does not end.
    """
    simulator = FunctionalSimulator(stream.program, machine, stream.devices, stream.memories(), seed=registers)
    executed: Executed = []

    def look(device: int, _: int) -> bool:
        state = simulator.states[device]
        if device == 0 and state.pc < len(stream.ops):
            executed.append((stream.ops[state.pc], operand_values(stream.ops[state.pc], state.registers)))
        return False

    simulator.fail_after(look)
    return simulator, simulator.run(max_instructions=LIMIT), executed


# Coverage -----------------------------------------------------------------------------------------------
HAZARDS = ("none", "RAW", "WAR", "WAW")
UNITS = (Unit.MATRIX, Unit.VECTOR, Unit.MEMORY, Unit.RING)
FORMS = ("immediate", "register", "register+immediate")
Cell = tuple[str, str, str, str]
"""Instruction, operand class, hazard, and the unit of the older instruction (none without a hazard)."""
_FORMATS = tuple(f"format {item.name.lower()}" for item in Format)
_SOURCES = tuple(f"b {item.name.lower()}" for item in Source)
_FEATURES = ("one vector", "several vectors", "accumulate", "scale word", "scale column", "bias", "patch column",
             "patch lane", "row max", "masked", "activation")  # fmt: skip
_STEPS = ("factor word", "factor value", "operation", "function", "write", "sum", "sumsq", "max")
_ADDRESSES = ("dst", "a", "b", "src", "line", "scale", "bias", "maximum", "patch_src", "result")


def classes(item: Op, values: Values) -> list[str]:
    """The operand classes that an instruction belongs to."""
    name, named = item.kind.name, dict(zip((part.name for part in item.kind.operands), values, strict=True))
    found = set()
    for part in item.kind.operands:
        operand = item.get(part.name)
        assert isinstance(operand, Operand)
        if part.name in _ADDRESSES and not (name == "vwrite" and part.name == "b"):
            found.add(FORMS[0] if operand.register == 0 else FORMS[2] if operand.immediate else FORMS[1])
    modifiers = {part.name: int(item.get(part.name)) for part in item.kind.modifiers}  # type: ignore[arg-type]
    count = named.get("n", named["outer"] * named["inner"] if "outer" in named else None)
    if name == "matmul" and named["outer"] * named["inner"] == 0:
        count = 0
    if count is not None:
        found.add("zero" if count == 0 else "ragged" if count % 8 else "whole")
    if "b_from" in modifiers:
        found.add(_SOURCES[modifiers["b_from"]])
    if "format" in modifiers:
        found.add(_FORMATS[modifiers["format"]])
    sources = [named.get("a")] if name in BINARY or name == "vunary" or modifiers.get("write") else []
    if modifiers.get("b_from") == Source.VECTOR and (
        name != "vchain" or (modifiers["write"] and modifiers["operation"])
    ):
        sources.append(named["b"])
    if count and named.get("dst") in sources:
        found.add("in place")
    if name == "matmul":
        several = named["outer"] * named["inner"] > 1
        flags = (not several, several, modifiers["accumulate"], modifiers["scaling"] == Scale.WORD,
                 modifiers["scaling"] == Scale.COLUMN, modifiers["add_bias"], modifiers["patch"] == Patch.COLUMN,
                 modifiers["patch"] == Patch.LANE, modifiers["row_max"], modifiers["masked"],
                 modifiers["activation"])  # fmt: skip
        found |= {feature for feature, flag in zip(_FEATURES, flags, strict=True) if flag}
    if name == "vchain":
        factor, reduction = modifiers["scale_from"], modifiers["reduce"]
        flags = (factor == Factor.WORD, factor == Factor.VALUE, modifiers["operation"], modifiers["function"],
                 modifiers["write"], reduction == Reduction.SUM, reduction == Reduction.SUMSQ,
                 reduction == Reduction.MAX)  # fmt: skip
        found |= {step for step, flag in zip(_STEPS, flags, strict=True) if flag}
    return sorted(found)


def possible_classes(name: str) -> list[str]:
    """The operand classes that some instruction of a name belongs to."""
    fields = {item.name for item in BY_NAME[name].fields}
    found = list(FORMS)
    if "n" in fields or "outer" in fields:
        found += ["whole", "zero"] + ([] if name == "gather" else ["ragged"])
    found += _SOURCES if "b_from" in fields else ()
    found += _FORMATS if "format" in fields else ()
    found += ["in place"] if name in (*BINARY, "vmov", "vunary", "vchain") else []
    return found + list({"matmul": _FEATURES, "vchain": _STEPS}.get(name, ()))


def possible_hazards(name: str, kind: str) -> list[str]:
    """The hazards that an instruction of a name and class can be the younger part of."""
    reads = name not in ("load", "vwrite", "sload", "sstore") and not (name == "vmov" and kind == "b immediate")
    writes = name not in ("store", "vread", "sload", "sstore")
    if kind == "zero":
        reads, writes = False, name in (*REDUCE, "vchain")
    return ["none", *(["RAW"] if reads else []), *(["WAR", "WAW"] if writes else [])]


def _hazards(mine: Sequence[Range], recent: Sequence[tuple[Unit, list[Range]]]) -> set[tuple[str, str]]:
    found = set()
    for unit, ranges in recent:
        for first, words, written in mine:
            for other, size, wrote in ranges:
                if first < other + size and other < first + words and (written or wrote):
                    found.add(("WAW" if written and wrote else "WAR" if written else "RAW", unit.name.lower()))
    return found or {("none", "-")}


@dataclass
class Coverage:
    """Cells of instruction x operand class x hazard x unit pair that executed streams have met, and how often."""

    cells: Counter[Cell] = field(default_factory=Counter)

    @staticmethod
    def possible() -> set[Cell]:
        """All cells that there are."""
        found: set[Cell] = set()
        for name, item in BY_NAME.items():
            if item.unit is Unit.SCALAR and name != "vread":
                continue
            for kind in possible_classes(name):
                for hazard in possible_hazards(name, kind):
                    units = ["-"] if hazard == "none" else [unit.name.lower() for unit in UNITS]
                    found |= {(name, kind, hazard, unit) for unit in units}
        return found

    def add(self, executed: Executed, devices: int) -> None:
        """Count what a device executed; a hazard is one with any of its RECENT older instructions of a unit."""
        recent: list[tuple[Unit, list[Range]]] = []
        for item, values in executed:
            name, ranges = item.kind.name, accesses(item, values, devices)
            if item.kind.unit is Unit.SCALAR and name != "vread":
                continue
            for hazard, unit in _hazards(ranges, recent):
                self.cells.update((name, kind, hazard, unit) for kind in classes(item, values))
            if name != "vread":
                recent = [*recent, (item.kind.unit, ranges)][-RECENT:]

    def coverage(self) -> float:
        """The share of all cells met."""
        possible = self.possible()
        return len(possible & self.cells.keys()) / len(possible)

    def table(self) -> str:
        """Cells met of those there are, by instruction and hazard; then by older and younger unit."""
        possible = self.possible()
        lines = [f"{'instruction':12}" + "".join(f"{hazard:>12}" for hazard in HAZARDS)]

        def entry(cells: set[Cell]) -> str:
            met = f"{len(cells & self.cells.keys())}/{len(cells)}"
            return f"{met if cells else '-':>12}"

        for name in sorted({cell[0] for cell in possible}):
            mine = [{cell for cell in possible if cell[0] == name and cell[2] == hazard} for hazard in HAZARDS]
            lines.append(f"{name:12}" + "".join(map(entry, mine)))
        lines += ["", f"{'units':20}" + "".join(f"{hazard:>12}" for hazard in HAZARDS[1:])]
        for older in (unit.name.lower() for unit in UNITS):
            for younger in Unit:
                names = {name for name, item in BY_NAME.items() if item.unit is younger}
                pair = {cell for cell in possible if cell[3] == older and cell[0] in names}
                mine = [{cell for cell in pair if cell[2] == hazard} for hazard in HAZARDS[1:]]
                lines.append(f"{older:>8} > {younger.name.lower():9}" + "".join(map(entry, mine)))
        met = len(possible & self.cells.keys())
        return "\n".join([*lines, "", f"{met} of {len(possible)} cells, {100 * self.coverage():.1f} %"])


# Shrinking ----------------------------------------------------------------------------------------------
def legal(stream: Stream, machine: Machine) -> bool:
    """Whether a stream ends without a trap, and its memories do not depend on what the registers held before."""
    try:
        states = [execute(stream, machine, registers)[0].states for registers in (None, 1)]
    except TypebarError:
        return False
    return all(
        np.array_equal(one, other)
        for left, right in zip(*states, strict=True)
        for one, other in zip(left.memory, right.memory, strict=True)
    )


def shrink(stream: Stream, machine: Machine, fails: Callable[[Stream], bool], tries: int = 2000) -> Stream:
    """A smaller legal stream that still fails: fewer devices, then instructions, then plainer fields.

    No single instruction of the result can go, if `tries` sufficed. `fails` is asked about legal streams only.
    """
    left = tries

    def holds(candidate: Stream) -> bool:
        nonlocal left
        left -= 1
        return left >= 0 and legal(candidate, machine) and fails(candidate)

    for devices in range(1, stream.devices):
        if holds(smaller := replace(stream, devices=devices)):
            stream = smaller
            break
    while left > 0:
        before = stream
        stream = _fewer(stream, holds)
        stream = _plainer(stream, machine, holds)
        if stream == before:
            break
    return stream


def _fewer(stream: Stream, holds: Callable[[Stream], bool]) -> Stream:
    """Drop ever smaller stretches of instructions; the last, which halts, stays."""
    size = max(1, len(stream.ops) // 2)
    while True:
        at, dropped = 0, False
        while at < len(stream.ops) - 1:
            smaller = without(stream, set(range(at, min(at + size, len(stream.ops) - 1))))
            if holds(smaller):
                stream, dropped = smaller, True
            else:
                at += size
        if size == 1 and not dropped:
            return stream
        size = max(1, size // 2)


def _plainer(stream: Stream, machine: Machine, holds: Callable[[Stream], bool]) -> Stream:
    """Make fields zero, or operands immediate, one by one."""
    for index, first in enumerate(stream.ops):
        for name, value in first.values.items():
            if value in (0, Operand()) or name == "to":
                continue
            choices: list[Value] = [0]
            if isinstance(value, Operand):
                choices = [Operand(), *([Operand(0, known)] if (known := _known(stream, machine, index, name)) else [])]
            for choice in choices:
                now, ops = stream.ops[index], list(stream.ops)
                ops[index] = Op(now.kind, {**now.values, name: choice})
                if choice != value and holds(smaller := replace(stream, ops=tuple(ops))):
                    stream = smaller
                    break
    return stream


def _known(stream: Stream, machine: Machine, index: int, name: str) -> int:
    """The value of an operand from a register when device 0 first executes it, 0 if it fits no immediate."""
    item = stream.ops[index]
    values = next((values for other, values in execute(stream, machine)[2] if other is item), None)
    if values is None:
        return 0
    value = values[[part.name for part in item.kind.operands].index(name)]
    return value if abs(value) < 1 << IMMEDIATE_BITS - 1 else 0


# Traps --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Illegal:
    """A program that stops instruction `pc` with `trap`, on the first device at which the functional simulator does;
    `aim` is the instruction, `code` that of a software trap. `hangs`: a device waits for one that never comes, which
    hardware can only tell by the time that it takes."""

    aim: str
    words: bytes
    devices: int
    trap: Trap
    pc: int
    code: int = 0
    hangs: bool = False


_LEGAL: dict[str, dict[str, int]] = {
    **{name: {"dst": 64, "a": 128, "b": 192, "n": 30} for name in BINARY},
    "vchain": {"dst": 64, "a": 128, "b": 192, "n": 30, "scale": 5, "result": 7},
    "vmov": {"dst": 64, "b": 192, "n": 30}, "vwrite": {"dst": 5}, "vread": {"rd": 3, "a": 5},
    "vunary": {"dst": 64, "a": 64, "n": 30}, **{name: {"dst": 64, "a": 128, "n": 30} for name in REDUCE},
    "load": {"region": Region.PARAMS, "dst": 64, "n": 30}, "sload": {"region": Region.IO, "rd": 3},
    "store": {"region": Region.IO, "a": 64, "outer": 1, "inner": 30, "inner_bytes": 2},
    "sstore": {"region": Region.IO}, "gather": {"dst": 64, "a": 512, "n": 16},
    "matmul": {"dst": 64, "src": 512, "k": 20, "n": 30, "outer": 1, "inner": 2, "src_inner": 24, "dst_inner": 32,
               "scale": 640, "bias": 704, "maximum": 768, "patch_src": 896},
}  # fmt: skip
_HARDWARE_ONLY = frozenset({Trap.RING_MISMATCH, Trap.PROGRAM_END, Trap.SOFTWARE})
"""Traps that depend on more than the operands of one instruction."""


def _operand_traps(name: str, machine: Machine, source: random.Random) -> Iterator[tuple[Op, Trap]]:
    """Two variations of an instruction for each trap of its operands."""
    kind, checker = BY_NAME[name], Checker(machine, [REGION_BYTES[region] for region in Region])
    words = machine.vector.words
    nasty = [-1, 0, 1, 2, 3, 4, 8, 60, 65, 72, words - 1, words, words - 8, words + 8, 1 << 16, 1 << 18, -(1 << 19),
             machine.ring.buffer_words, machine.ring.buffer_words + machine.vector.align, 9, 512]  # fmt: skip
    wanted = {trap: 2 for trap in kind.traps if trap not in _HARDWARE_ONLY}
    for _ in range(20_000):
        if not any(wanted.values()):
            return
        values: dict[str, Value] = dict(_LEGAL[name])
        for item in source.sample(kind.fields, min(len(kind.fields), source.choice([1, 1, 2, 3]))):
            if item.kind is Kind.OPERAND:
                values[item.name] = source.choice(nasty)
            elif item.kind is Kind.ENUM:
                assert item.values is not None
                values[item.name] = int(source.choice(list(item.values)))
            elif item.kind is Kind.FLAG:
                values[item.name] = 1
        built = op(name, **values)
        trap = trap_of(checker, built, operand_values(built, [0] * 32), 1)
        if wanted.get(trap, 0):
            wanted[trap] -= 1
            yield built, trap
    raise AssertionError(f"{name}: no operands trap with {[trap.name for trap, count in wanted.items() if count]}")


def _illegal_words(source: random.Random) -> Iterator[tuple[str, bytes]]:
    """Words that are no instruction: opcodes, enumeration values and bits that nothing defines."""
    for opcode in source.sample([code for code in range(256) if code not in {i.opcode for i in INSTRUCTIONS}], 8):
        yield "opcode", bytes([opcode]) + bytes(63)
    yield "ones", b"\xff" * 64
    for kind in INSTRUCTIONS:
        plain = int.from_bytes(encode_op(op(kind.name, **_LEGAL.get(kind.name, {}))), "little")
        places = kind.layout()
        used = set(range(8)).union(*(range(p.offset, p.offset + p.field.width) for p in places))
        spare = [bit for bit in range(512) if bit not in used]
        for bit in source.sample(spare, min(2, len(spare))) + spare[-1:]:
            yield f"{kind.name} bit {bit}", (plain | 1 << bit).to_bytes(64, "little")
        for place in places:
            if place.field.values is not None:
                undefined = set(range(1 << place.field.width)) - set(place.field.values)
                for number in sorted(undefined)[:1]:
                    cleared = plain & ~((1 << place.field.width) - 1 << place.offset)
                    word = (cleared | number << place.offset).to_bytes(64, "little")
                    yield f"{kind.name} {place.field.name} {number}", word


def illegal_programs(machine: Machine, seed: int = 0) -> Iterator[Illegal]:
    """Programs for every documented trap of every instruction, each after a few legal instructions and before some
    that must not run; the same for a seed."""
    source = random.Random(seed)
    filler = [op("sli", rd=5, value=7), op("vwrite", dst=3, b=1), op("sadd", rd=6, a=1, b=2), op("vwrite", dst=9, b=4)]

    def around(word: bytes) -> tuple[bytes, int]:
        before = [source.choice(filler) for _ in range(source.randrange(4))]
        return encode(Program(before)).tobytes() + word + encode(Program(filler)).tobytes(), len(before)

    for aim, word in _illegal_words(source):
        assert decode_op(word) is None
        words, at = around(word)
        yield Illegal(aim, words, 1, Trap.ILLEGAL, at)
    for name in _LEGAL:
        for item, trap in _operand_traps(name, machine, source):
            words, at = around(encode_op(item))
            yield Illegal(name, words, 1, trap, at)
    for code in (0, -77, 100_000):
        words, at = around(encode_op(op("trap", code=code)))
        yield Illegal("trap", words, 1, Trap.SOFTWARE, at, code)
    for name in ("beq", "bge"):
        words, _ = around(encode_op(op(name, to=900)))
        yield Illegal(name, words, 1, Trap.PROGRAM_END, 900)
    yield Illegal("end", encode(Program(filler)).tobytes(), 1, Trap.PROGRAM_END, len(filler))
    yield from _mismatches(machine)


def _mismatches(machine: Machine) -> Iterator[Illegal]:
    """Rings whose device 1 gathers another number of words, or halts instead."""
    align = machine.vector.align
    gather = op("gather", dst=64, a=512, n=align)
    other = [op("smul", rd=3, a=Operand(1), b=align), op("gather", dst=64, a=512, n=Operand(3, align)), op("halt")]
    fewer = [op("beq", to=2, a=Operand(1), b=1), gather, op("halt")]
    for devices in (2, 3):
        yield Illegal("gather", encode(Program(other)).tobytes(), devices, Trap.RING_MISMATCH, 1)
        yield Illegal("gather", encode(Program(fewer)).tobytes(), devices, Trap.RING_MISMATCH, 2, hangs=True)


def io_words(stream: Stream) -> np.ndarray:
    """Every device's IO region as the timing simulator takes it, int32 [devices, words]."""
    return np.stack([memory.regions[Region.IO].view(np.int32) for memory in stream.memories()])
