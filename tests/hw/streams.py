"""Random legal instruction streams, weighted to hazards, for whatever executes programs; knows no hardware.

A stream loads windows of the register file that straddle its hazard segments, fights over them with all units, and
stores them again, so that its final memory shows every register. Scalar loads and reads whose value a timing model
does not hold go into registers that no branch, address or count looks at.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from typebar.isa.checks import Checker
from typebar.isa.instructions import (
    COUNT_REGISTER,
    DEVICE_REGISTER,
    SCALAR_REGISTERS,
    Activation,
    Factor,
    Format,
    Function,
    Operation,
    Patch,
    Reduction,
    Region,
    Scale,
    Source,
    Trap,
    Unit,
)
from typebar.isa.machine import Machine
from typebar.isa.program import Op, Operand, Program, op
from typebar.isa.timing import MAX_ACCESSES, gather_accesses, matmul_accesses, memory_accesses, vector_accesses
from typebar.sim.functional import DeviceMemory

REGION_BYTES = {Region.WEIGHTS: 1 << 15, Region.KV: 1 << 15, Region.PARAMS: 8192, Region.LOCAL: 4096, Region.IO: 10240}
WINDOW, WINDOWS = 256, 6
"""Words of a window and their number."""
SCALAR_LINES, STORE_LINES, DUMP_LINE = 8, 40, 48
"""Lines of the IO region: scalars below the first (the upper half for values no branch may see), vector stores below
the second, the windows at the end from the last on."""
RECENT = 6
"""Older instructions, of those with a unit, against which hazards are counted."""
BASES, RANKED, COUNTS, COUNTER = (3, 4, 5, 6, 7), 8, (9, 10), 11
SCRATCH, SINKS = tuple(range(12, 18)), tuple(range(20, 26))
BINARY = ("vadd", "vsub", "vmul", "vmax")
REDUCE = ("vsum", "vsumsq", "vrmax", "vargmax")
WEIGHTS = {
    "vadd": 3, "vsub": 3, "vmul": 3, "vmax": 3, "vmov": 3, "vunary": 3, "vsum": 3, "vsumsq": 3, "vrmax": 3,
    "vchain": 9, "vargmax": 3, "vwrite": 3, "vread": 2, "load": 6, "store": 6, "sload": 1, "sstore": 1, "matmul": 16,
    "gather": 10, "scalar": 3, "fence": 0.3, "skip": 1.5, "cache": 2,
}  # fmt: skip
"""How often each kind of item comes up."""
Range = tuple[int, int, bool]
"""First word, words, whether written."""
Values = Sequence[int]
_SPECIAL = (0x7FC00000, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x80000000, 0x00000001, 0x33800000, 0x477FF000, 0x7F800001)


@dataclass(frozen=True)
class Stream:
    """A program for a ring of `devices`; `seed` also makes the memories."""

    seed: int
    devices: int
    ops: tuple[Op, ...]

    @property
    def program(self) -> Program:
        """The instructions as a program."""
        return Program(list(self.ops))

    def memories(self) -> list[DeviceMemory]:
        """Fresh contents of every device's regions: numbers of all formats, NaN, infinities, arbitrary bits."""
        place, pool = random.Random(self.seed), _pool()
        memories = []
        for _ in range(self.devices):
            starts = {region: 64 * place.randrange((len(pool) - size) // 64) for region, size in REGION_BYTES.items()}
            memories.append(DeviceMemory({r: pool[at : at + REGION_BYTES[r]].copy() for r, at in starts.items()}))
        return memories


@lru_cache(maxsize=1)
def _pool() -> NDArray[np.uint8]:
    """Bytes from which memories are cut, line by line in one of several styles, most of them ordinary numbers."""
    generator, lines = np.random.default_rng(0), 1 << 14
    numbers = generator.standard_normal((lines, 16)).astype(np.float32)
    shorts = generator.standard_normal((lines, 32)).astype(np.float16)
    styles = np.stack([
        numbers.view(np.uint8), shorts.view(np.uint8), numbers.view(np.uint8), shorts.view(np.uint8),
        (generator.integers(-100, 100, (lines, 64), np.int8)).view(np.uint8),
        np.repeat(numbers.view(np.uint16)[:, 1::2], 2, axis=1).view(np.uint8),
        generator.choice(np.array(_SPECIAL, np.uint32), (lines, 16)).view(np.uint8),
        generator.integers(0, 256, (lines, 64), np.uint8),
    ])  # fmt: skip
    chosen: NDArray[np.uint8] = styles[generator.integers(0, len(styles), lines), np.arange(lines)]
    return np.ascontiguousarray(chosen.reshape(-1))


def accesses(item: Op, values: Values, devices: int) -> list[Range]:
    """Words of the register file that an instruction touches, given its operand values."""
    out = np.zeros((MAX_ACCESSES, 3), np.int64)
    modifiers = [item.get(part.name) for part in item.kind.modifiers]
    name, unit = item.kind.name, item.kind.unit
    if name == "vread":
        return [(values[0], 1, False)]
    if unit is Unit.VECTOR:
        count = vector_accesses(item.kind.opcode, modifiers, values, out)
    elif unit is Unit.MEMORY:
        count = memory_accesses(item.kind.opcode, values, out)
    elif unit is Unit.MATRIX:
        # A matmul of no columns does nothing, whatever it names.
        count = matmul_accesses(modifiers, values, out) if values[3] > 0 else 0
    elif unit is Unit.RING:
        count = gather_accesses(values, devices, out)
    else:
        return []
    return [(int(first), int(words), bool(written)) for first, words, written in out[:count]]


def operand_values(item: Op, registers: Sequence[int]) -> list[int]:
    """An instruction's operand values, as it would issue with these scalar registers."""
    values = []
    for part in item.kind.operands:
        operand = item.get(part.name)
        assert isinstance(operand, Operand)
        values.append((registers[operand.register] + operand.immediate + 2**31) % 2**32 - 2**31)
    return values


def trap_of(checker: Checker, item: Op, values: Values, devices: int) -> Trap:
    """The trap of an instruction's operands."""
    name = item.kind.name
    modifiers = {part.name: int(item.get(part.name)) for part in item.kind.modifiers}  # type: ignore[arg-type]
    source = (modifiers.get("b_from") == Source.WORD, modifiers.get("b_from") == Source.IMMEDIATE)
    if name in BINARY:
        return checker.binary(*source, *values)
    if name == "vmov":
        return checker.move(*source, *values)
    if name in ("vwrite", "vread"):
        return checker.word(values[0])
    if name == "vunary":
        return checker.unary(*values)
    if name == "vchain":
        parts = ("b_from", "scale_from", "operation", "write", "reduce")
        return checker.chain(*(modifiers[part] for part in parts), values)
    if name in REDUCE:
        return checker.reduce(*values[:3], results=2 if name == "vargmax" else 1)
    if name == "load":
        return checker.load(modifiers["format"], modifiers["region"], *values)
    if name == "store":
        return checker.store(modifiers["format"], modifiers["region"], *values)
    if name in ("sload", "sstore"):
        return checker.scalar(modifiers["region"], *values[:2], write=name == "sstore")
    if name == "gather":
        return checker.gather(*values, devices)
    if name == "matmul":
        flags = ("format", "region", "full", "patch", "scaling", "add_bias", "row_max")
        return checker.matmul(*(modifiers[flag] for flag in flags), values)
    return Trap.NONE


@dataclass
class _Author:
    """Writes one stream. `worlds` are the scalar registers of each device, in a loop of each iteration too; those that
    no author can know stay 0."""

    seed: int
    machine: Machine
    devices: int
    random: random.Random = field(init=False)
    ops: list[Op] = field(default_factory=list)
    recent: list[tuple[Unit, list[Range]]] = field(default_factory=list)
    fixed: bool = False
    """No register that addresses lean on may change, and no gather come: in loops and behind branches."""

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.checker = Checker(self.machine, [REGION_BYTES[region] for region in Region])
        self.align = self.machine.vector.align
        self.windows = [self.machine.segment_words * (i + 1) - WINDOW // 2 for i in range(WINDOWS)]
        self.worlds = [[0] * SCALAR_REGISTERS for _ in range(self.devices)]
        for rank, world in enumerate(self.worlds):
            world[DEVICE_REGISTER], world[COUNT_REGISTER] = rank, self.devices
        self.before: list[Op] = []
        """Instructions that the one being written needs first."""
        self.used: set[int] = set()
        """Registers that its operands name."""

    # Operands ------------------------------------------------------------------------------------------
    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def inside(self, first: int, words: int) -> bool:
        """Whether a range lies in a window: what lies outside holds what an earlier program left."""
        return any(window <= first and first + words <= window + WINDOW for window in self.windows)

    def address(self, words: int, write: bool, aligned: bool = True) -> int:
        """A place in the windows; often one that makes a hazard with a recent instruction, as often as not none."""
        kinds = [(unit, r) for unit, ranges in self.recent for r in ranges if write or r[2]]
        place = self.windows[0]
        step = self.align if aligned else 1
        target: Range | None = None
        if kinds and self.chance(0.7):
            unit = self.random.choice(sorted({unit for unit, _ in kinds}))
            target = self.random.choice([r for other, r in kinds if other == unit])
        for _ in range(12):
            if target is None:
                place = self.random.choice(self.windows) + self.random.randrange(max(1, WINDOW - words + 1))
            else:
                place = target[0]
                if self.chance(0.5):
                    place += self.random.randint(1 - words, target[1] - 1)
            place = place // step * step
            meets = any(first < place + words and place < first + size for _, (first, size, _) in kinds)
            if self.inside(place, words) and (target is not None or not meets):
                return place
        return place

    def operand(self, value: int, vector: bool = False) -> Operand:
        """An operand of this value on the first device: immediate, register, or their sum."""
        choice = self.random.random()
        if choice < 0.4:
            return Operand(0, value)
        bases = (*BASES, RANKED) if vector else COUNTS
        register, world = self.random.choice(bases), self.worlds[0]
        if choice < 0.7:
            if not self.fixed and register != RANKED and register not in self.used:
                self.before.append(op("sli", rd=register, value=value))
                self.used.add(register)
                return Operand(register)
            equal = [number for number in bases if world[number] == value and number not in self.used]
            register = equal[0] if equal else register
        if any(item.get("rd") == register for item in self.before):
            return Operand(0, value)
        self.used.add(register)
        return Operand(register, value - world[register])

    def place(self, words: int, write: bool = False, aligned: bool = True) -> Operand:
        return self.operand(self.address(max(1, words), write, aligned), vector=True)

    def length(self, most: int = 120) -> int:
        n = self.random.choice([0, 1, 2, 7, 8, 9, 16, 24, 30, 64, 120, self.random.randint(1, 120)])
        return min(n, most)

    def scratch(self) -> Operand:
        return Operand(self.random.choice([0, 1, 2, *SCRATCH]), self.random.randint(-100, 100))

    def sink(self) -> Operand:
        return Operand(self.random.choice(SINKS), self.random.randint(-100, 100))

    # Items ---------------------------------------------------------------------------------------------
    def add(self, name: str, **values: int | Operand) -> bool:
        """Append an instruction, after what it needs; not if a device would trap on it or read what nobody wrote."""
        before, self.before, self.used = self.before, [], set()
        item = op(name, **values)
        worlds = [list(world) for world in self.worlds]
        for setting in before:
            for world in worlds:
                world[int(setting.get("rd"))] = int(setting.get("value"))  # type: ignore[arg-type]
        everywhere = [operand_values(item, world) for world in worlds]
        if any(trap_of(self.checker, item, values, self.devices) for values in everywhere):
            return False
        touched = [accesses(item, values, self.devices) for values in everywhere]
        if not all(written or self.inside(first, words) for ranges in touched for first, words, written in ranges):
            return False
        self.worlds, ranges = worlds, touched[0]
        self.ops += [*before, item]
        if item.kind.unit is not Unit.SCALAR:
            self.recent = [*self.recent, (item.kind.unit, ranges)][-RECENT:]
        return True

    def write_one(self, name: str) -> None:
        """An item of a kind, tried anew while its operands are illegal."""
        writers: dict[str, Callable[[], bool]] = {
            **dict.fromkeys((*BINARY, "vmov", "vunary", *REDUCE), lambda: self.vector(name)),
            "vchain": self.chain,
            "vwrite": lambda: self.add(
                "vwrite", dst=self.place(1, True, False), b=self.random.choice([self.scratch(), self.sink()])
            ),
            "vread": lambda: self.add(
                "vread", rd=self.random.choice([0, *SINKS]), a=self.place(1, aligned=False)
            ),
            "load": self.load, "store": self.store, "sload": self.sload, "sstore": self.sstore, "matmul": self.matmul,
            "gather": self.gather, "scalar": self.scalar, "fence": lambda: self.add("fence"), "cache": self.cache,
            "skip": self.skip,
        }  # fmt: skip
        for _ in range(8):
            if writers[name]():
                return

    def scalar(self) -> bool:
        name = self.random.choice(["sadd", "ssub", "smul", "smin", "smax", "sand", "sshl", "sshr", "sfgt"])
        if self.chance(0.3):
            return self.add(name, rd=self.random.choice(SINKS), a=self.sink(), b=self.scratch())
        if self.chance(0.2):
            return self.add("sli", rd=self.random.choice(SCRATCH), value=self.random.randint(-(2**31), 2**31 - 1))
        return self.add(name, rd=self.random.choice([0, *SCRATCH]), a=self.scratch(), b=self.scratch())

    def vector(self, name: str) -> bool:
        n = self.length()
        reduces = name in REDUCE
        values: dict[str, int | Operand] = {"n": self.operand(n)}
        results = (2 if name == "vargmax" else 1) if reduces else n
        dst = self.place(results, True, aligned=not reduces or name == "vargmax")
        same = not reduces and self.chance(0.25)
        if name == "vunary":
            values["function"] = self.random.choice(list(Function))
        if name in BINARY or name == "vmov":
            source = self.random.choice(list(Source))
            imm = self.random.choice([0x3F800000, 0xC0490FDB, *_SPECIAL, self.random.getrandbits(32)])
            values |= {"b_from": source, "imm": imm if source == Source.IMMEDIATE else 0}
            words = n if source == Source.VECTOR else 1
            values["b"] = dst if same and self.chance(0.5) else self.place(words, aligned=source == Source.VECTOR)
        if name != "vmov":
            values["a"] = dst if same else self.place(n)
        if name == "vargmax":
            values["base"] = self.random.choice([self.scratch(), self.sink()])
        return self.add(name, dst=dst, **values)

    def chain(self) -> bool:
        n, source, factor = self.length(), self.random.choice(list(Source)), self.random.choice(list(Factor))
        operation = self.random.choice([Operation.NONE, *Operation])
        reduction = self.random.choice([Reduction.NONE, *Reduction])
        dst, same, words = self.place(n, True), self.chance(0.3), n if source is Source.VECTOR else 1
        scale = self.place(1, aligned=False)
        if factor is Factor.VALUE:
            scale = Operand(self.random.choice(SCRATCH))
            imm = self.random.choice([0x3F000000, 0xBDCCCCCD, *_SPECIAL])
            self.before.append(op("sli", rd=scale.register, value=imm - (imm >> 31 << 32)))
        return self.add(
            "vchain", b_from=source, scale_from=factor, operation=operation, reduce=reduction, write=self.chance(0.7),
            imm=self.random.choice([0x3F800000, 0xC0490FDB, *_SPECIAL]) if source is Source.IMMEDIATE else 0,
            function=self.random.choice([0, 0, 0, *Activation]), dst=dst, a=dst if same else self.place(n),
            b=dst if same and self.chance(0.3) else self.place(words, aligned=source is Source.VECTOR),
            n=self.operand(n), scale=scale, result=self.place(1, True, aligned=False),
        )  # fmt: skip

    def load(self) -> bool:
        element, n = self.random.choice(list(Format)), self.length()
        region = self.random.choice([Region.PARAMS, Region.LOCAL, Region.IO])
        lines = STORE_LINES if region is Region.IO else 48
        byte = self.random.choice([0, 4 * self.random.randrange(16)])
        line = self.operand(self.random.randrange(SCALAR_LINES if region is Region.IO else 0, lines))
        dst = self.place(n, True)
        return self.add("load", format=element, region=region, dst=dst, line=line, byte=byte, n=self.operand(n))

    def store(self) -> bool:
        element = self.random.choice(list(Format))
        size = {Format.FP32: 4, Format.INT8: 1}.get(element, 2)
        kv = self.chance(0.6)
        outer, inner = self.random.choice([(1, 1), (1, 16), (2, 9), (5, 4), (3, 0), (1, self.length()), (16, 1)])
        stride = size * self.random.choice([1, 1, 2, 9, 33])
        across = self.random.choice([stride * inner, stride * inner + size, size, 64])
        return self.add(
            "store", format=element, region=Region.KV if kv else Region.IO, a=self.place(outer * inner),
            line=self.operand(self.random.randrange(64) if kv else self.random.randrange(SCALAR_LINES, STORE_LINES)),
            byte=4 * self.random.randrange(16), outer=self.operand(outer), inner=inner,
            outer_bytes=self.operand(across), inner_bytes=stride,
        ) if kv or (outer * across + inner * stride) < 8 * 64 else False  # fmt: skip

    def sload(self) -> bool:
        clean = self.chance(0.5)
        line = self.random.randrange(SCALAR_LINES // 2) + (0 if clean else SCALAR_LINES // 2)
        if not clean and self.chance(0.5):
            place = {"region": self.random.choice([Region.PARAMS, Region.LOCAL]), "line": line}
        else:
            place = {"region": Region.IO, "line": self.operand(line)}
        rd = self.random.choice([0, *(SCRATCH if clean else SINKS)])
        return self.add("sload", rd=rd, byte=4 * self.random.randrange(16), **place)

    def sstore(self) -> bool:
        clean = self.chance(0.5)
        line = self.random.randrange(SCALAR_LINES // 2) + (0 if clean else SCALAR_LINES // 2)
        value = self.scratch() if clean else self.sink()
        byte = 4 * self.random.randrange(16)
        return self.add("sstore", region=Region.IO, line=self.operand(line), byte=byte, value=value)

    def matmul(self, region: Region | None = None, line: int | None = None) -> bool:
        k, n = self.random.choice([1, 5, 8, 16, 33, 40]), self.random.choice([0, 1, 4, 9, 16, 30, 64, 72])
        outer, inner = self.random.choice([(1, 1), (1, 1), (1, 2), (2, 2), (3, 2), (1, 8), (0, 2), (2, 1)])
        up = [-(-words // self.align) * self.align + self.align * self.random.randrange(2) for words in (n, k)]
        dst_inner, src_inner = up[0], self.random.choice([0, up[1]])
        dst_outer, src_outer = dst_inner * max(inner, 1), self.random.choice([0, src_inner * inner])
        spread = (outer - 1) * dst_outer + (inner - 1) * dst_inner + n
        reach = (outer - 1) * src_outer + (inner - 1) * src_inner + k
        scaling, patch = self.random.choice(list(Scale)), self.random.choice(list(Patch))
        line = self.machine.row_lines * self.random.randrange(40) if line is None else line
        return self.add(
            "matmul", format=self.random.choice(list(Format)),
            region=self.random.choice([Region.WEIGHTS, Region.KV]) if region is None else region,
            full=self.random.randrange(2), accumulate=self.chance(0.4), patch=patch, scaling=scaling,
            add_bias=self.chance(0.4), masked=self.chance(0.3), row_max=self.chance(0.4),
            activation=self.random.choice([0, 0, *Activation]), mask_outer=self.random.randrange(2),
            mask_inner=self.random.randrange(2), dst=self.place(spread, True, n > 1), src=self.place(reach),
            k=k, n=self.operand(n), line=line, outer=outer, inner=inner, src_outer=src_outer, src_inner=src_inner,
            dst_outer=dst_outer, dst_inner=dst_inner, lo=self.random.choice([0, 0, 3]),
            hi=self.operand(self.random.choice([n, n // 2])), bias=self.place(n),
            scale=self.place(n if scaling == Scale.COLUMN else 1, aligned=scaling == Scale.COLUMN),
            maximum=self.place(outer * inner, True, outer * inner > 1),
            patch_src=self.place(k if patch == Patch.COLUMN else n),
            patch_at=self.random.choice([0, 1, 7, self.random.randrange(80)]),
        )  # fmt: skip

    def cache(self) -> bool:
        """A store to rows that a matmul near it fetches, before or after it."""
        line, first = self.machine.row_lines * self.random.randrange(8), self.chance(0.5)
        for turn in (first, not first):
            if turn:
                values = {"outer": 1, "inner": 8, "inner_bytes": self.random.choice([2, 32])}
                if not self.add("store", region=Region.KV, a=self.place(8), line=line, **values):
                    return False
            elif not self.matmul(Region.KV, line):
                return False
        return True

    def gather(self) -> bool:
        n = self.align * self.random.choice([0, 1, 1, 2, 3, WINDOW // self.align // (self.devices + 1)])
        register = self.random.choice([0, *COUNTS])
        count = Operand(register, n - self.worlds[0][register])
        return self.fixed or self.add("gather", dst=self.place(n * self.devices, True), a=self.place(n), n=count)

    def skip(self) -> bool:
        """A branch over a few items, taken or not."""
        if self.fixed:
            return True
        name = self.random.choice(["beq", "bne", "blt", "bge"])
        at, self.fixed = len(self.ops), True
        self.ops.append(op("fence"))
        for _ in range(self.random.randint(1, 2)):
            self.write_one(self.kind())
        a, b = self.scratch(), self.scratch()
        self.ops[at], self.fixed = op(name, to=len(self.ops), a=a, b=b), False
        return True

    def kind(self) -> str:
        return self.random.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]

    # The whole -----------------------------------------------------------------------------------------
    def loop(self, items: int) -> None:
        """A body run a few times, with one base that moves on."""
        times, moving = self.random.randint(2, 3), self.random.choice(BASES)
        step = self.align * self.random.choice([0, 1, 2, -1])
        self.ops.append(op("sli", rd=COUNTER, value=times))
        outside, top = self.worlds, len(self.ops)
        self.worlds = []
        for index in range(times):
            for world in outside:
                self.worlds.append([*world[:moving], world[moving] + index * step, *world[moving + 1 :]])
        self.fixed = True
        for _ in range(items):
            self.write_one(self.kind())
        self.fixed = False
        self.ops += [
            op("sadd", rd=moving, a=Operand(moving), b=step),
            op("sadd", rd=COUNTER, a=Operand(COUNTER), b=-1),
            op("bne", to=top, a=Operand(COUNTER), b=0),
        ]
        for world in outside:
            world[moving] += times * step
        self.worlds = outside

    def write(self, items: int) -> None:
        """Windows from memory, items, windows to memory."""
        for register in (*BASES, *COUNTS):
            wide = register in BASES
            value = self.random.choice(self.windows) + self.align * self.random.randrange(16) if wide else 8
            self.before.append(op("sli", rd=register, value=value))
        self.add("smul", rd=RANKED, a=Operand(DEVICE_REGISTER), b=self.align)
        for world in self.worlds:
            world[RANKED] = world[DEVICE_REGISTER] * self.align
        lines = WINDOW * 4 // 64
        for number, window in enumerate(self.windows):
            line = lines * number % (REGION_BYTES[Region.PARAMS] // 64)
            self.ops.append(op("load", format=Format.FP32, region=Region.PARAMS, dst=window, line=line, n=WINDOW))
        last = len(self.ops) + items
        while len(self.ops) < last:
            if not self.fixed and self.chance(0.02):
                self.loop(self.random.randint(3, 6))
            else:
                self.write_one(self.kind())
        for number, register in enumerate((*SCRATCH, *SINKS)):
            self.ops.append(
                op("sstore", region=Region.IO, line=DUMP_LINE - 1, byte=4 * number, value=Operand(register))
            )
        for number, window in enumerate(self.windows):
            self.ops.append(
                op(
                    "store", format=Format.FP32, region=Region.IO, a=window, line=DUMP_LINE + lines * number,
                    outer=1, inner=WINDOW, inner_bytes=4,
                )
            )  # fmt: skip
        self.ops.append(op("halt"))


def random_stream(seed: int, machine: Machine, items: int = 16, devices: int | None = None) -> Stream:
    """A legal stream of about `items` instructions between loading and storing the windows; the same for a seed.

    The ring has `devices` or, in most streams, one and at most four. Unfinished gathers are none: all devices take
    the same ones.
    """
    count = random.Random(~seed).choice([1, 1, 1, 1, 2, 2, 3, 4]) if devices is None else devices
    author = _Author(seed, machine, count)
    author.write(items)
    return Stream(seed, count, tuple(author.ops))


def without(stream: Stream, dropped: set[int]) -> Stream:
    """The stream without some instructions; a branch goes to what follows its old target."""
    places, kept = [], 0
    for index in range(len(stream.ops) + 1):
        places.append(kept)
        kept += index not in dropped
    ops = []
    for index, item in enumerate(stream.ops):
        if index in dropped:
            continue
        if "to" in item.values:
            item = Op(item.kind, {**item.values, "to": places[min(int(item.get("to")), len(stream.ops))]})  # type: ignore[arg-type]
        ops.append(item)
    return replace(stream, ops=tuple(ops))
