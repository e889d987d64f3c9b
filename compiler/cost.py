"""What a token or a prompt costs: the analytical model that plans are chosen by.

After Pope et al., "Efficiently Scaling Transformer Inference" (MLSys 2023), a pass takes the longer of its memory's
time and its computing's, and communication between devices comes on top. On this machine they overlap in a known way:
the fetch engine runs ahead of everything, as far as the FIFO and the issue queues reach, and what does not overlap is
the chain of instructions that wait for one another. So the model follows one device through the compiled program with a
clock for each unit, and every instruction costs what the contract's own formulas say (`typebar.isa.timing`):

- what is closed: a matmul is one step, however many rows it streams (`matmul_steps`, `matmul_rows`); memory slots are a
  rate; devices are equal, so that a gather takes `gather_cycles`;
- layers that take the same time are not followed one by one: when two in a row took the same, the rest are added up.

What an instruction touches, how long it takes and who waits for whom is the contract's, so that new instructions and
other latencies need no change here. Left out are write slots that hit, stalls, and devices with a short last share.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from typebar.compiler.cost_units import Units
from typebar.compiler.driver import Compiled
from typebar.compiler.emit.head import DESCRIPTOR_WORDS
from typebar.isa.errors import TypebarError
from typebar.isa.instructions import BY_NAME, COUNT_REGISTER, SCALAR_REGISTERS, Region, Unit
from typebar.isa.machine import LINE_BYTES
from typebar.isa.program import tables
from typebar.isa.timing import OP, SLOAD, SSTORE, timing_parameters

SOURCE_TOKENS = 64
"""Tokens of the source text, for models with an encoder; it is encoded already."""
_IO = int(Region.IO)
_KINDS = {kind.opcode: (len(kind.operands), int(kind.unit)) for kind in BY_NAME.values()}
_SAME = 0.002
"""Layers whose times differ by less than this share are alike."""


@dataclass(frozen=True)
class Cost:
    """Cycles of a run, and what its parts would take each for itself: the terms of the model.

    `hbm`: rows fetched, a row each fetch slot. `compute`: steps of the matrix unit. `vector`: cycles that the vector
    unit is occupied. `ring`: gathers. `cycles` is at least each of them.
    """

    cycles: float
    hbm: float
    compute: float
    vector: float
    ring: float

    def __sub__(self, other: Cost) -> Cost:
        """Term by term: what a longer run has more than a shorter."""
        return Cost(*(getattr(self, item.name) - getattr(other, item.name) for item in fields(Cost)))


class CostModel:
    """The cost of runs of one compiled program."""

    def __init__(self, made: Compiled) -> None:
        """Take a program as `compiler.driver.build` makes it."""
        self.made, self.p = made, timing_parameters(made.machine)
        decoded = tables(made.program)
        self.code = [
            (opcode, *_KINDS[opcode], modifiers, registers, immediates)
            for opcode, modifiers, registers, immediates in zip(
                decoded.opcode.tolist(), decoded.modifiers.tolist(), decoded.register.tolist(),
                decoded.immediate.tolist(), strict=True,
            )
        ]  # fmt: skip
        self.layers = {at for name, at in made.program.labels.items() if name.startswith("layer_")}

    def prompt(self, tokens: int, start: int = 0) -> Cost:
        """The time to the first token after a prompt of `tokens` tokens, from position `start` on.

        Raises:
            TypebarError: the tokens are less than one, or beyond the context.
        """
        return self._run(tokens, start, 1)[0]

    def token(self, position: int) -> Cost:
        """One generated token, which follows `position` others: the second of a run of two.

        Raises:
            TypebarError: the position is less than one, or beyond the context.
        """
        first, whole = self._run(1, position - 1, 2)
        return whole - first

    def _run(self, tokens: int, start: int, new: int) -> tuple[Cost, Cost]:
        """Costs up to the first new token, and of all."""
        context = int(self.made.model.config["context"])
        if tokens < 1 or start < 0 or start + tokens + new > context:
            raise TypebarError(
                f"{tokens} tokens from position {start} on and {new} new ones are outside the context of {context}"
            )
        given = {"start": start, "count": tokens, "new": new, "eos": -1, "source": SOURCE_TOKENS}
        first = self.made.memory.io.descriptor_line * LINE_BYTES
        walk = _Walk(self, {first + 4 * DESCRIPTOR_WORDS[name]: value for name, value in given.items()})
        walk.token_bytes = self.made.memory.io.tokens_line * LINE_BYTES + 4 * (start + tokens)
        walk.run(self.made.program.labels["main"])
        assert walk.first is not None
        return walk.first, walk.units.cost()


@dataclass
class _Pass:
    """A loop over layers, at the end of a layer: scalar registers, and the time and terms so far."""

    registers: list[int]
    cost: Cost
    fetch: float
    rows: int


class _Walk:
    """One run of a program on one device: its scalar core, and the clocks of its units."""

    def __init__(self, model: CostModel, io: dict[int, int]) -> None:
        self.code, self.layers, self.io = model.code, model.layers, io
        self.units = Units(model.p, model.made.devices)
        self.registers = [0] * SCALAR_REGISTERS
        self.registers[COUNT_REGISTER] = model.made.devices
        self.token_bytes = 0
        self.first: Cost | None = None
        self.passes: list[_Pass] = []

    def run(self, entry: int) -> None:
        """All from `entry` to the halt."""
        pc, registers, units = entry, self.registers, self.units
        while pc >= 0:
            opcode, count, unit, modifiers, sources, immediates = self.code[pc]
            values = [registers[sources[i]] + immediates[i] for i in range(count)]
            if unit == Unit.SCALAR:
                pc = self.scalar(opcode, modifiers, values, pc)
                registers[0] = 0
                continue
            done = units.issue(opcode, unit, modifiers, values)
            if opcode == SLOAD:
                units.time = max(units.time, done)
                if modifiers[1]:
                    registers[modifiers[1]] = self.io.get(self.byte(modifiers, values), 0)
            elif opcode == SSTORE and self.first is None and self.byte(modifiers, values) == self.token_bytes:
                self.first = units.cost(done)
            pc += 1

    @staticmethod
    def byte(modifiers: list[int], values: list[int]) -> int:
        """Where in IO a scalar load or store reaches; -1 in another region."""
        return values[0] * LINE_BYTES + values[1] if modifiers[0] == _IO else -1

    def scalar(self, opcode: int, modifiers: list[int], values: list[int], pc: int) -> int:
        """Execute an instruction of the scalar core; where the program goes on, or -1."""
        units, registers = self.units, self.registers
        units.time += 1
        if opcode in (OP["halt"], OP["fence"]):
            units.fence()
            return -1 if opcode == OP["halt"] else pc + 1
        if opcode == OP["vread"]:
            units.read(values[0])
            registers[modifiers[0]] = 0
        elif opcode == OP["sli"]:
            registers[modifiers[0]] = modifiers[1]
        elif OP["beq"] <= opcode <= OP["bge"]:
            return self.branch(opcode, modifiers[0], values, pc)
        else:
            registers[modifiers[0]] = _arithmetic(opcode, values[0], values[1])
        return pc + 1

    def branch(self, opcode: int, target: int, values: list[int], pc: int) -> int:
        a, b = values
        taken = {OP["beq"]: a == b, OP["bne"]: a != b, OP["blt"]: a < b, OP["bge"]: a >= b}[opcode]
        if target in self.layers and target <= pc and (not taken or self.skipped(b - a)):
            self.passes = []
            return pc + 1
        if taken:
            self.units.time += self.units.p.branch_cycles - 1
            return target
        return pc + 1

    def skipped(self, left: int) -> bool:
        """Go past the `left` layers still to come, if the last two took the same; layers count by one."""
        units = self.units
        self.passes.append(_Pass(list(self.registers), units.cost(), units.fetch, units.rows))
        if len(self.passes) < 3:
            return False
        oldest, older, last = self.passes[-3:]
        layer, before = last.cost - older.cost, older.cost - oldest.cost
        steady = abs(layer.cycles - before.cycles) <= _SAME * layer.cycles
        if not steady or abs(last.fetch - older.fetch - layer.cycles) > _SAME * layer.cycles:
            return False
        units.skip(layer, left, last.rows - older.rows)
        for i, (now, then) in enumerate(zip(last.registers, older.registers, strict=True)):
            self.registers[i] += (now - then) * left
        return True


def _arithmetic(opcode: int, a: int, b: int) -> int:
    """Result of a two-operand scalar instruction; a comparison of results that nobody knows is false."""
    if opcode == OP["sadd"]:
        return a + b
    if opcode == OP["ssub"]:
        return a - b
    if opcode == OP["smul"]:
        return a * b
    if opcode == OP["smin"]:
        return min(a, b)
    if opcode == OP["smax"]:
        return max(a, b)
    if opcode == OP["sand"]:
        return a & b
    if opcode == OP["sshl"]:
        return a << (b & 31)
    return a >> (b & 31) if opcode == OP["sshr"] else 0
