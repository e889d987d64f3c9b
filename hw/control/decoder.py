"""Instruction decoder: one 512-bit word to opcode, unit, modifiers and operand slots, derived from the ISA's tables.

The illegal flag is raised exactly where `typebar.isa.program.decode_op` returns None: unknown opcode, an undefined
value of an enumeration, or a bit set that the instruction does not use.
"""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Signal, Value, signed, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from typebar.isa.instructions import (
    BY_NAME,
    IMMEDIATE_BITS,
    INSTRUCTIONS,
    MAX_OPERANDS,
    MODIFIER_BASE,
    OPCODE_BITS,
    OPERAND_BASE,
    OPERAND_BITS,
    REGISTER_BITS,
    WORD_BITS,
    Instruction,
    Kind,
    Unit,
)

MODIFIER_BITS = OPERAND_BASE - MODIFIER_BASE
UNIT_BITS = max(Unit).bit_length()

DECODED = data.StructLayout(
    {
        "opcode": unsigned(OPCODE_BITS),
        "unit": unsigned(UNIT_BITS),
        "modifiers": unsigned(MODIFIER_BITS),
        "register": data.ArrayLayout(unsigned(REGISTER_BITS), MAX_OPERANDS),
        "immediate": data.ArrayLayout(signed(IMMEDIATE_BITS), MAX_OPERANDS),
        "illegal": unsigned(1),
    }
)
"""What the decoder makes of a word; `unit` is a number of `Unit`, meaningless (0) if `illegal`."""


def modifier(modifiers: Value, instruction: str, field: str) -> Value:
    """The bits of a modifier field of the named instruction."""
    for place in BY_NAME[instruction].layout():
        if place.field.name == field and place.field.kind is not Kind.OPERAND:
            low = place.offset - MODIFIER_BASE
            return modifiers[low : low + place.field.width]
    raise KeyError(f"{instruction} has no modifier {field}")


def slot(instruction: str, field: str) -> int:
    """The operand slot of a field of the named instruction."""
    return [item.name for item in BY_NAME[instruction].operands].index(field)


class Decoder(wiring.Component):
    """Combinational: `decoded` follows `word` in the same cycle."""

    def __init__(self) -> None:
        """A decoder of whole words."""
        super().__init__({"word": In(WORD_BITS), "decoded": Out(DECODED)})

    def elaborate(self, platform: object) -> Module:
        """One comparison of the opcode for each instruction, and one check of all it leaves unused."""
        m = Module()
        word, decoded = self.word, self.decoded
        opcode = word[:OPCODE_BITS]
        modifiers = word[MODIFIER_BASE:OPERAND_BASE]
        slots = [
            word[base : base + OPERAND_BITS]
            for base in range(OPERAND_BASE, OPERAND_BASE + MAX_OPERANDS * OPERAND_BITS, OPERAND_BITS)
        ]
        empty = Signal(MAX_OPERANDS + 1)
        m.d.comb += [
            decoded.opcode.eq(opcode),
            decoded.modifiers.eq(modifiers),
            decoded.illegal.eq(1),
            # Bit s: slots s and above are all zero.
            empty.eq(Cat(word[OPERAND_BASE + s * OPERAND_BITS :] == 0 for s in range(MAX_OPERANDS + 1))),
        ]
        for index, bits in enumerate(slots):
            m.d.comb += decoded.register[index].eq(bits[:REGISTER_BITS])
            m.d.comb += decoded.immediate[index].eq(bits[REGISTER_BITS:].as_signed())
        with m.Switch(opcode):
            for kind in INSTRUCTIONS:
                with m.Case(kind.opcode):
                    legal = empty[len(kind.operands)] & _modifiers_legal(kind, modifiers)
                    m.d.comb += decoded.illegal.eq(~legal)
                    with m.If(legal):
                        m.d.comb += decoded.unit.eq(int(kind.unit))
        return m


def _modifiers_legal(kind: Instruction, modifiers: Value) -> Value:
    """Whether the modifier bits hold defined values, and zeros where the instruction has no field."""
    used = 0
    legal: Value = Const(1, 1)
    for place in kind.layout():
        if place.field.kind is Kind.OPERAND:
            continue
        low = place.offset - MODIFIER_BASE
        used |= ((1 << place.field.width) - 1) << low
        if place.field.kind is Kind.ENUM:
            assert place.field.values is not None
            values = sorted(int(value) for value in place.field.values)
            if len(values) < 1 << place.field.width:
                legal = legal & modifiers[low : low + place.field.width].matches(*values)
    return legal & ((modifiers & Const(~used & ((1 << MODIFIER_BITS) - 1), MODIFIER_BITS)) == 0)
