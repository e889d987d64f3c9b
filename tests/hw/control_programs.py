"""Random programs for the control core: hazards across all units, loops, branches, scalar loads and reads.

Words 0 .. HAZARD_WORDS - 1 are fought over by all units; the scalar core waits for them but keeps nothing. Those from
VALUE_BASE on are written by `vwrite` and `vmov` alone, so that a bench without arithmetic knows what `vread` returns.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from typebar.isa.checks import Checker
from typebar.isa.instructions import Instruction, Region, Trap, Unit
from typebar.isa.machine import Machine
from typebar.isa.program import Op, Operand, Program, op

HAZARD_WORDS = 1024
VALUE_BASE, VALUE_WORDS = 1536, 64
SCALAR_LINES = 4
"""Lines of the IO region that scalar loads and stores use; vector stores use those above."""
REGION_BYTES = {Region.WEIGHTS: 1 << 16, Region.KV: 1 << 16, Region.PARAMS: 4096, Region.LOCAL: 4096, Region.IO: 16384}
MOST_DEVICES = 2
_BASES, _COUNTER, _SCRATCH, _SINKS = range(3, 8), 10, range(12, 18), range(20, 26)
_VECTOR = ("vadd", "vsub", "vmul", "vmax", "vmov", "vunary", "vchain", "vsum", "vsumsq", "vrmax", "vargmax")


def expected_trap(
    checker: Checker, kind: Instruction, modifiers: dict[str, int], operands: dict[str, int], devices: int
) -> Trap:
    """What `Checker` says of an instruction's modifiers and operand values, by name."""
    v, name = operands, kind.name
    if name == "vread":
        return checker.word(v["a"])
    if name == "vwrite":
        return checker.word(v["dst"])
    if kind.unit is Unit.VECTOR:
        if name == "vunary":
            return checker.unary(v["dst"], v["a"], v["n"])
        if name == "vchain":
            parts = ("b_from", "scale_from", "operation", "write", "reduce")
            return checker.chain(*(modifiers[part] for part in parts), list(v.values()))
        if "b_from" not in modifiers:
            return checker.reduce(v["dst"], v["a"], v["n"], 2 if name == "vargmax" else 1)
        one, immediate = modifiers["b_from"] == 1, modifiers["b_from"] == 2
        if name == "vmov":
            return checker.move(one, immediate, v["dst"], v["b"], v["n"])
        return checker.binary(one, immediate, v["dst"], v["a"], v["b"], v["n"])
    if name == "load":
        return checker.load(modifiers["format"], modifiers["region"], v["dst"], v["line"], v["byte"], v["n"])
    if name == "store":
        return checker.store(modifiers["format"], modifiers["region"], *operands.values())
    if name in ("sload", "sstore"):
        return checker.scalar(modifiers["region"], v["line"], v["byte"], name == "sstore")
    if name == "gather":
        return checker.gather(v["dst"], v["a"], v["n"], devices)
    fields = ("format", "region", "full", "patch", "scaling", "add_bias", "row_max")
    return checker.matmul(*(modifiers[field] for field in fields), list(operands.values()))


class _Author:
    """Writes one program; registers 3 to 7 are vector bases, multiples of the alignment, at most 256."""

    def __init__(self, seed: int, machine: Machine) -> None:
        self.random = random.Random(seed)
        self.machine = machine
        self.checker = Checker(machine, [REGION_BYTES[region] for region in Region])
        self.bases: dict[int, int] = {}
        self.ops: list[Op] = []

    def add(self, name: str, **values: int | Operand) -> None:
        self.ops.append(op(name, **values))

    def overlap(self, made: Op) -> bool:
        """Whether the instruction's result overlaps an operand."""
        if made.kind.unit not in (Unit.VECTOR, Unit.MATRIX, Unit.RING):
            return False
        modifiers, operands = {}, {}
        for item in made.kind.fields:
            value = made.get(item.name)
            if isinstance(value, Operand):
                operands[item.name] = self.bases.get(value.register, 0) + value.immediate
            else:
                modifiers[item.name] = int(value)
        return expected_trap(self.checker, made.kind, modifiers, operands, MOST_DEVICES) is Trap.OVERLAP

    def apart(self, write: Callable[[], None], tries: int = 100) -> bool:
        """Write instructions again until none overlaps; none is left, and the result false, if that takes too long."""
        before = len(self.ops)
        for _ in range(tries):
            write()
            if not any(self.overlap(made) for made in self.ops[before:]):
                return True
            del self.ops[before:]
        return False

    def base(self) -> Operand:
        """A vector address below 640, sometimes through a register."""
        align = self.machine.vector.align
        if self.random.random() < 0.3:
            return Operand(self.random.choice(_BASES), align * self.random.randrange(48))
        return Operand(0, align * self.random.randrange(80))

    def length(self) -> int:
        return self.random.choice([0, 1, 2, 8, 9, 30, 64, self.random.randint(1, 200)])

    def scratch(self) -> Operand:
        return Operand(self.random.choice([0, 1, 2, *_SCRATCH]), self.random.randint(-100, 100))

    def sink(self) -> Operand:
        return Operand(self.random.choice(_SINKS), self.random.randint(-100, 100))

    def scalar(self) -> None:
        name = self.random.choice(["sadd", "ssub", "smul", "smin", "smax", "sand", "sshl", "sshr", "sfgt"])
        self.add(name, rd=self.random.choice([0, *_SCRATCH]), a=self.scratch(), b=self.scratch())
        if self.random.random() < 0.3:
            self.add("sli", rd=self.random.choice(_SCRATCH), value=self.random.randint(-(2**31), 2**31 - 1))

    def value(self) -> None:
        """Traffic between the scalar core and the words it may read."""
        at = VALUE_BASE + self.random.randrange(VALUE_WORDS)
        choice = self.random.random()
        if choice < 0.4:
            self.add("vwrite", dst=at, b=self.random.choice([self.scratch(), self.sink()]))
        elif choice < 0.5:
            base, n = VALUE_BASE + self.machine.vector.align * self.random.choice([0, 1, 2]), self.random.randint(1, 24)
            self.add("vmov", b_from=2, imm=self.random.getrandbits(32), dst=base, n=n)
        elif choice < 0.75:
            self.add("vread", rd=self.random.choice([0, *_SINKS]), a=at)
        elif choice < 0.85:
            self.add("vread", rd=0, a=self.random.randrange(HAZARD_WORDS))
        else:
            self.add("sadd", rd=self.random.choice(_SINKS), a=self.sink(), b=self.sink())

    def vector(self) -> None:
        name, n = self.random.choice(_VECTOR), self.length()
        values: dict[str, int | Operand] = {"dst": self.base(), "n": n}
        if name in ("vadd", "vsub", "vmul", "vmax", "vmov"):
            values |= {"b_from": self.random.randrange(3), "b": self.base()}
        if name == "vchain":
            values |= {"b_from": self.random.randrange(3), "b": self.base(), "scale_from": self.random.randrange(3)}
            values |= {"operation": self.random.randrange(5), "function": self.random.choice([0, 0, 5])}
            values |= {"write": self.random.randrange(2), "reduce": self.random.randrange(4)}
            values |= {"scale": self.base(), "result": self.base()}
        if name != "vmov":
            values["a"] = self.base()
        self.add(name, **values)

    def memory(self) -> None:
        size_log = {0: 1, 1: 1, 2: 0, 3: 2}
        choice, n, formats = self.random.random(), self.length(), self.random.randrange(4)
        if choice < 0.3:
            region = self.random.choice([Region.PARAMS, Region.LOCAL, Region.IO])
            line = self.random.randint(SCALAR_LINES, 20)
            self.add("load", format=formats, region=int(region), dst=self.base(), line=line, n=n)
        elif choice < 0.8:
            kv = self.random.random() < 0.7
            inner = self.random.choice([0, 1, 4, 16])
            outer = self.random.choice([0, 1, 2, 5])
            stride = self.random.choice([1, 4, 33]) << size_log[formats]
            region = Region.KV if kv else Region.IO
            line = self.random.randint(SCALAR_LINES, 80 if kv else 20)
            self.add(
                "store", format=formats, region=int(region), a=self.base(), line=line,
                byte=4 * self.random.randrange(9), outer=outer, inner=inner,
                outer_bytes=stride * inner, inner_bytes=stride,
            )  # fmt: skip
        elif choice < 0.9:
            at = {"line": self.random.randrange(SCALAR_LINES), "byte": 4 * self.random.randrange(16)}
            self.add("sload", region=int(Region.IO), rd=self.random.choice([0, *_SCRATCH]), **at)
        else:
            at = {"line": self.random.randrange(SCALAR_LINES), "byte": 4 * self.random.randrange(16)}
            self.add("sstore", region=int(Region.IO), value=self.scratch(), **at)

    def matmul(self) -> None:
        rows, align = self.random.choice([(1, 1), (1, 1), (1, 2), (3, 2), (0, 2)]), self.machine.vector.align
        k, n = self.random.choice([1, 8, 40, 100]), self.random.choice([0, 1, 9, 64, 90])
        values = {name: self.random.randrange(2) for name in ("full", "accumulate", "add_bias", "row_max")}
        values |= {"format": self.random.randrange(4), "region": int(self.random.choice([Region.KV, Region.WEIGHTS]))}
        values |= {name: self.random.randrange(3) for name in ("patch", "scaling")}
        values |= {"k": k, "n": n, "hi": n, "outer": rows[0], "inner": rows[1], "patch_at": self.random.randrange(9)}
        values["line"] = self.machine.row_lines * self.random.randrange(60)
        # Rows of n words lie apart; inner ones within an outer one's stride.
        step = align * (-(-max(n, 1) // align) + self.random.choice([0, 0, 2]))
        values |= {"dst_inner": step, "dst_outer": step * rows[1]}
        values |= {name: align * self.random.choice([1, 3, 13]) for name in ("src_inner", "src_outer")}

        def write() -> None:
            bases = {name: self.base() for name in ("dst", "src", "scale", "bias", "maximum", "patch_src")}
            self.add("matmul", **values, **bases)

        if self.apart(write) and self.random.random() < 0.3:
            self.add("vread", rd=0, a=self.ops[-1].get("dst"))

    def cache(self) -> None:
        """A store to rows that a matmul near it fetches, before or after it."""
        line, first = self.machine.row_lines * self.random.randrange(8), self.random.random() < 0.5
        for turn in (first, not first):
            if turn:
                self.add("store", region=int(Region.KV), a=self.base(), line=line, outer=1, inner=8, inner_bytes=2)
            else:
                inner = self.random.choice([1, 2])
                self.apart(lambda inner=inner: self.product(line, inner))

    def product(self, line: int, inner: int) -> None:
        values = {"k": 100, "n": 64, "line": line, "outer": 1, "inner": inner, "dst_inner": 64}
        self.add("matmul", region=int(Region.KV), dst=self.base(), src=self.base(), **values)

    def gather(self) -> None:
        self.add("gather", dst=self.base(), a=self.base(), n=self.machine.vector.align * self.random.randrange(20))

    def item(self) -> None:
        choice = self.random.random()
        limits: tuple[tuple[float, Callable[[], object]], ...] = (
            (0.2, self.scalar),
            (0.4, self.value),
            (0.65, lambda: self.apart(self.vector)),
            (0.8, self.memory),
            (0.92, self.matmul),
            (0.96, self.cache),
            (1.0, lambda: self.apart(self.gather)),
        )
        next(write for limit, write in limits if choice < limit)()
        if self.random.random() < 0.04:
            self.add("fence")
        if self.random.random() < 0.12:
            name = self.random.choice(["beq", "bne", "blt", "bge"])
            ahead = self.random.randint(1, 3)
            self.add(name, to=len(self.ops) + ahead, a=self.scratch(), b=self.scratch())
            for _ in range(ahead):
                self.add("sadd", rd=self.random.choice(_SCRATCH), a=self.scratch(), b=self.scratch())

    def write(self, items: int) -> Program:
        for register in (*_BASES, *_SCRATCH, *_SINKS):
            if register in _BASES:
                self.bases[register] = self.machine.vector.align * self.random.randrange(33)
                self.add("sli", rd=register, value=self.bases[register])
            else:
                self.add("sli", rd=register, value=self.random.randint(-200, 200))
        for _ in range(2):
            self.add("sli", rd=_COUNTER, value=self.random.randint(1, 3))
            top = len(self.ops)
            for _ in range(items // 2):
                self.item()
            self.add("sadd", rd=_COUNTER, a=Operand(_COUNTER), b=-1)
            self.add("bne", to=top, a=Operand(_COUNTER), b=0)
        self.add("halt")
        return Program(self.ops)


def random_program(seed: int, machine: Machine, items: int = 40) -> Program:
    """A legal program of two loops of about `items` / 2 instructions each; its first instruction is `sli`."""
    return _Author(seed, machine).write(items)
