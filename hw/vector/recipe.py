"""What each vector instruction asks of the unit, as steps of a chain."""

from __future__ import annotations

from amaranth.hdl import Module, Signal, Value, signed, unsigned
from amaranth.lib import data

from typebar.hw.arith.unary import FUNCTION_BITS
from typebar.hw.control.decoder import modifier, slot
from typebar.hw.vector.lanes import Choice
from typebar.isa.instructions import BY_NAME, Factor, Instruction, Operation, Reduction, Source, Unit
from typebar.isa.timing import VSUM

INSTRUCTIONS = [item for item in BY_NAME.values() if item.unit is Unit.VECTOR]
_OPERATIONS = {
    "vadd": Operation.ADD,
    "vsub": Operation.SUB,
    "vmul": Operation.MUL,
    "vmax": Operation.MAX,
    "vsumsq": Operation.MUL,
}
"""The operation of instructions other than a chain; vsumsq multiplies its vector by itself."""
_SUMS = ("vsum", "vsumsq")
_OPERANDS = ("dst", "a", "b", "n", "base", "imm", "scale", "result")
RECIPE = data.StructLayout(
    {
        "scale_from": Factor,
        "b_from": Source,
        "choice": Choice,
        "subtract": 1,
        "take_y": 1,
        "functional": 1,
        "function": unsigned(FUNCTION_BITS),
        "writes": 1,
        "reduces": 1,
        "sums": 1,
        "squares": 1,
        "ordered": 1,
        **{name: signed(32) for name in _OPERANDS},
    }
)
"""Steps and operand values. `functional`: it has a `function`. `sums`: the reduction adds, else it takes the maximum;
`ordered`: that of vargmax."""


def recipe(m: Module, opcode: Value, modifiers: Value, values: Value) -> Signal:
    """The recipe of an instruction in the same cycle; what it does not name is 0."""
    found = Signal(RECIPE, name="recipe")
    operation = Signal(Operation, name="operation")
    with m.Switch(opcode):
        for kind in INSTRUCTIONS:
            with m.Case(kind.opcode):
                for operand in kind.operands:
                    if operand.name in _OPERANDS:
                        m.d.comb += found[operand.name].eq(values[slot(kind.name, operand.name)])
                for other in kind.modifiers:
                    if other.name in ("imm", "b_from", "scale_from"):
                        m.d.comb += found[other.name].eq(modifier(modifiers, kind.name, other.name))
                if kind.name == "vchain":
                    _chain(m, found, operation, modifiers)
                else:
                    _simple(m, found, operation, modifiers, kind)
    choices = {Operation.ADD: Choice.SUM, Operation.SUB: Choice.SUM, Operation.MUL: Choice.PRODUCT}
    choices |= {Operation.MAX: Choice.MAXIMUM, Operation.NONE: Choice.MOVED}
    with m.Switch(operation):
        for number, choice in choices.items():
            with m.Case(number):
                m.d.comb += found.choice.eq(choice)
    m.d.comb += found.subtract.eq(operation == Operation.SUB)
    return found


def _chain(m: Module, found: Signal, operation: Signal, modifiers: Value) -> None:
    """A chain's own fields."""
    function, reduction = (modifier(modifiers, "vchain", name) for name in ("function", "reduce"))
    m.d.comb += [
        operation.eq(modifier(modifiers, "vchain", "operation")),
        # Numbers of `Activation`: none, or a function's plus one.
        found.functional.eq(function != 0),
        found.function.eq(function - 1),
        found.writes.eq(modifier(modifiers, "vchain", "write")),
        found.reduces.eq(reduction != Reduction.NONE),
        found.sums.eq(reduction.matches(Reduction.SUM, Reduction.SUMSQ)),
        found.squares.eq(reduction == Reduction.SUMSQ),
    ]


def _simple(m: Module, found: Signal, operation: Signal, modifiers: Value, kind: Instruction) -> None:
    """An instruction that is a chain of one step, and perhaps a reduction."""
    name, reduces = kind.name, kind.opcode >= VSUM
    m.d.comb += [
        operation.eq(_OPERATIONS.get(name, Operation.NONE)),
        found.take_y.eq(name in ("vmov", "vwrite")),
        found.writes.eq(not reduces),
        found.reduces.eq(reduces),
        found.sums.eq(name in _SUMS),
        found.ordered.eq(name == "vargmax"),
    ]
    if reduces:
        m.d.comb += found.result.eq(found.dst)
    if name == "vsumsq":
        m.d.comb += found.b.eq(found.a)
    if name == "vunary":
        m.d.comb += [found.functional.eq(1), found.function.eq(modifier(modifiers, name, "function"))]
    if name == "vwrite":
        m.d.comb += [found.imm.eq(found.b), found.b_from.eq(Source.IMMEDIATE), found.n.eq(1)]
