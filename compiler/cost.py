"""What a token or a prompt costs: the analytical model that plans are chosen by.

After Pope et al., "Efficiently Scaling Transformer Inference" (MLSys 2023), a pass takes the longer of its memory's
time and its computing's, and communication between devices comes on top. On this machine they overlap in a known way:
the fetch engine runs ahead of everything, as far as the FIFO and the issue queues reach, and what does not overlap is
the chain of instructions that wait for one another. So the model follows the first device and the last through the
compiled program with a clock for each unit, and every instruction costs what the contract's own formulas say
(`typebar.isa.timing`):

- what is closed: a matmul is one step, however many rows it streams (`matmul_steps`, `matmul_rows`); memory slots are a
  rate;
- devices meet at gathers, each of which starts when it can (`gather_done`). Those between the first and the last are
  taken to be as the first: the last has fewer tokens of a block, or other work (`tbd.last`), the others are alike;
- layers that take the same time are not followed one by one: when two in a row took the same, the rest are added up.

What an instruction touches, how long it takes and who waits for whom is the contract's, so that new instructions and
other latencies need no change here. Left out are write slots that hit, and stalls.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from typebar.compiler.cost_units import Units, meet
from typebar.compiler.driver import Compiled
from typebar.compiler.emit.head import DESCRIPTOR_WORDS
from typebar.isa.errors import TypebarError
from typebar.isa.instructions import BY_NAME, COUNT_REGISTER, DEVICE_REGISTER, SCALAR_REGISTERS, Region, Unit
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
        io = {first + 4 * DESCRIPTOR_WORDS[name]: value for name, value in given.items()}
        token = self.made.memory.io.tokens_line * LINE_BYTES + 4 * (start + tokens)
        walks = [_Walk(self, rank, io, token) for rank in sorted({0, self.made.devices - 1})]
        for stops in zip(*(walk.run(self.made.program.labels["main"]) for walk in walks), strict=True):
            gathered, amount = stops[0]
            if gathered:
                meet([walk.units for walk in walks], amount)
            elif all(walk.steady() for walk in walks):
                layer = walks[0].layer()
                for walk in walks:
                    walk.skip(layer, amount)
        assert walks[0].first is not None
        return walks[0].first, walks[0].units.cost()


@dataclass
class _Pass:
    """A loop over layers, at the end of a layer: scalar registers, and the time and terms so far."""

    registers: list[int]
    cost: Cost
    fetch: float
    rows: int


class _Walk:
    """One run of a program on the device `rank`: its scalar core, and the clocks of its units.

    `io` has the words that the host wrote, by byte, and `token` is the byte of the first new one.
    """

    def __init__(self, model: CostModel, rank: int, io: dict[int, int], token: int) -> None:
        self.code, self.layers, self.io, self.token = model.code, model.layers, io, token
        self.units = Units(model.p, model.made.devices)
        self.registers = [0] * SCALAR_REGISTERS
        self.registers[COUNT_REGISTER], self.registers[DEVICE_REGISTER] = model.made.devices, rank
        self.first: Cost | None = None
        self.passes: list[_Pass] = []

    def run(self, entry: int) -> Iterator[tuple[bool, int]]:
        """All from `entry` to the halt, but for what devices do together, where the caller goes on.

        That is a gather, true and its words, which waits for `Units.gathered`; and the end of a layer that is not the
        last, false and the layers still to come, which may be skipped.
        """
        pc, units = entry, self.units
        while pc >= 0:
            opcode, _, unit, modifiers, _, _ = self.code[pc]
            values = self.values(pc)
            if unit == Unit.SCALAR:
                if OP["beq"] <= opcode <= OP["bge"] and modifiers[0] in self.layers and modifiers[0] <= pc:
                    if _taken(opcode, values):
                        self.passes.append(_Pass(list(self.registers), units.cost(), units.fetch, units.rows))
                        yield False, values[1] - values[0]
                        values = self.values(pc)
                    if not _taken(opcode, values):
                        self.passes = []
                pc = self.scalar(opcode, modifiers, values, pc)
                self.registers[0] = 0
                continue
            done = units.issue(opcode, unit, modifiers, values)
            if unit == Unit.RING:
                yield True, values[2]
            elif opcode == SLOAD:
                units.time = max(units.time, done)
                if modifiers[1]:
                    self.registers[modifiers[1]] = self.io.get(self.byte(modifiers, values), 0)
            elif opcode == SSTORE and self.first is None and self.byte(modifiers, values) == self.token:
                self.first = units.cost(done)
            pc += 1

    def values(self, pc: int) -> list[int]:
        """The operands of an instruction."""
        _, count, _, _, sources, immediates = self.code[pc]
        return [self.registers[sources[i]] + immediates[i] for i in range(count)]

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
            if _taken(opcode, values):
                units.time += units.p.branch_cycles - 1
                return modifiers[0]
        else:
            registers[modifiers[0]] = _arithmetic(opcode, values[0], values[1])
        return pc + 1

    def layer(self) -> Cost:
        """What the last layer cost."""
        return self.passes[-1].cost - self.passes[-2].cost

    def steady(self) -> bool:
        """Whether the last two layers took the same."""
        if len(self.passes) < 3:
            return False
        oldest, older, last = self.passes[-3:]
        layer, before = last.cost - older.cost, older.cost - oldest.cost
        if abs(layer.cycles - before.cycles) > _SAME * layer.cycles:
            return False
        return abs(last.fetch - older.fetch - layer.cycles) <= _SAME * layer.cycles

    def skip(self, layer: Cost, left: int) -> None:
        """Go past the `left` layers still to come, each of which costs the same; layers count by one."""
        older, last = self.passes[-2:]
        self.units.skip(layer, left, last.rows - older.rows)
        for i, (now, then) in enumerate(zip(last.registers, older.registers, strict=True)):
            self.registers[i] += (now - then) * left


def _taken(opcode: int, values: list[int]) -> bool:
    """Whether a branch is."""
    a, b = values
    if opcode in (OP["beq"], OP["bne"]):
        return (a == b) == (opcode == OP["beq"])
    return (a < b) == (opcode == OP["blt"])


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
