"""Programs: encoding to words and back, assembling text and back.

Text is one instruction a line, `name field=value ...`; fields left out are zero. Operands are written `r5`, `-3`,
`r5+12` or `r5-12`; branch targets are labels (`name:` on a line of its own) or plain indices; `;` starts a comment.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from typebar.isa.errors import TypebarError
from typebar.isa.instructions import (
    BY_NAME,
    BY_OPCODE,
    IMMEDIATE_BITS,
    MAX_OPERANDS,
    OPCODE_BITS,
    REGISTER_BITS,
    SCALAR_REGISTERS,
    WORD_BYTES,
    Field,
    Instruction,
    Kind,
)


class ProgramError(TypebarError):
    """Text or words that are no program; the message names the line or index, the field, the value and the limit."""


@dataclass(frozen=True)
class Operand:
    """`R[register] + immediate`."""

    register: int = 0
    immediate: int = 0

    def __str__(self) -> str:
        if self.register == 0:
            return str(self.immediate)
        return f"r{self.register}" + (f"{self.immediate:+d}" if self.immediate else "")


Value = int | Operand
"""A field's value: an Operand, or an integer (register number, enumeration, flag, bits of a float32, target)."""


@dataclass(frozen=True)
class Op:
    """One instruction with its field values; fields not given are zero."""

    kind: Instruction
    values: Mapping[str, Value]

    def __post_init__(self) -> None:
        known = {item.name: item for item in self.kind.fields}
        for name, value in self.values.items():
            if name not in known:
                raise ProgramError(f"{self.kind.name} has no field {name!r}: it has {', '.join(known) or 'none'}")
            _check(self.kind, known[name], value)

    def get(self, name: str) -> Value:
        """A field's value, zero if it was left out."""
        if name in self.values:
            return self.values[name]
        item = next(f for f in self.kind.fields if f.name == name)
        return Operand() if item.kind is Kind.OPERAND else 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Op) and encode_op(self) == encode_op(other)

    def __hash__(self) -> int:
        return hash(encode_op(self))


@dataclass
class Program:
    """A sequence of instructions; `labels` and `comments` (by instruction index) are for people only."""

    ops: list[Op]
    labels: dict[str, int] = field(default_factory=dict)
    comments: dict[int, str] = field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and self.ops == other.ops

    def __len__(self) -> int:
        return len(self.ops)


def _check(kind: Instruction, item: Field, value: Value) -> None:
    if item.kind is Kind.OPERAND:
        if not isinstance(value, Operand):
            raise ProgramError(f"{kind.name}: {item.name} must be an operand, not {value!r}")
        low, high = -(1 << IMMEDIATE_BITS - 1), (1 << IMMEDIATE_BITS - 1) - 1
        if not 0 <= value.register < SCALAR_REGISTERS:
            raise ProgramError(
                f"{kind.name}: {item.name} names r{value.register}: registers are r0 to r{SCALAR_REGISTERS - 1}"
            )
        if not low <= value.immediate <= high:
            raise ProgramError(
                f"{kind.name}: {item.name} = {value.immediate} is outside {low} to {high}: load it with sli"
            )
        return
    if isinstance(value, Operand):
        raise ProgramError(f"{kind.name}: {item.name} must be a plain value, not {value}")
    if item.kind is Kind.ENUM:
        assert item.values is not None
        if value not in set(item.values):
            raise ProgramError(
                f"{kind.name}: {item.name} = {value} is none of {', '.join(v.name.lower() for v in item.values)}"
            )
    elif item.kind is Kind.INT32:
        if not -(2**31) <= value < 2**31:
            raise ProgramError(f"{kind.name}: {item.name} = {value} is outside -2147483648 to 2147483647")
    elif not 0 <= value < 1 << item.width:
        raise ProgramError(f"{kind.name}: {item.name} = {value} is outside 0 to {(1 << item.width) - 1}")


# Words --------------------------------------------------------------------------------------------------
def encode_op(op: Op) -> bytes:
    """The instruction's 64 bytes."""
    word = op.kind.opcode
    for place in op.kind.layout():
        value = op.get(place.field.name)
        if isinstance(value, Operand):
            bits = value.register | (value.immediate & (1 << IMMEDIATE_BITS) - 1) << REGISTER_BITS
        else:
            bits = value & (1 << place.field.width) - 1
        word |= bits << place.offset
    return word.to_bytes(WORD_BYTES, "little")


def decode_op(data: bytes) -> Op | None:
    """The instruction that 64 bytes encode, or None if they encode none (the device traps ILLEGAL)."""
    word = int.from_bytes(data, "little")
    kind = BY_OPCODE.get(word & (1 << OPCODE_BITS) - 1)
    if kind is None:
        return None
    rest = word >> OPCODE_BITS << OPCODE_BITS
    values: dict[str, Value] = {}
    for place in kind.layout():
        mask = (1 << place.field.width) - 1
        bits = word >> place.offset & mask
        rest &= ~(mask << place.offset)
        item = place.field
        if item.kind is Kind.OPERAND:
            immediate = bits >> REGISTER_BITS
            immediate -= (immediate >> IMMEDIATE_BITS - 1) << IMMEDIATE_BITS
            values[item.name] = Operand(bits & (1 << REGISTER_BITS) - 1, immediate)
        elif item.kind is Kind.ENUM:
            assert item.values is not None
            if bits not in set(item.values):
                return None
            values[item.name] = bits
        elif item.kind is Kind.INT32:
            values[item.name] = bits - (bits >> 31 << 32)
        else:
            values[item.name] = bits
    return None if rest else Op(kind, values)


def encode(program: Program) -> NDArray[np.uint8]:
    """The whole program as bytes, 64 an instruction."""
    return np.frombuffer(b"".join(encode_op(op) for op in program.ops), np.uint8)


def decode(data: bytes | NDArray[np.uint8]) -> Program:
    """The program that bytes encode.

    Raises:
        ProgramError: not a whole number of words, or a word that is no instruction.
    """
    raw = bytes(data)
    if len(raw) % WORD_BYTES:
        raise ProgramError(f"a program is a multiple of {WORD_BYTES} bytes, not {len(raw)}: it is truncated")
    ops = []
    for index in range(0, len(raw), WORD_BYTES):
        op = decode_op(raw[index : index + WORD_BYTES])
        if op is None:
            raise ProgramError(
                f"word {index // WORD_BYTES} is no instruction (opcode 0x{raw[index]:02x}): the program is corrupt"
            )
        ops.append(op)
    return Program(ops)


# Tables -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class DecodedTables:
    """A program as arrays for compiled interpreters: `opcode` [P]; `modifiers` int64 [P, M] in declared order
    (float32 as bits, zero-extended); `register`, `immediate` int64 [P, MAX_OPERANDS] in slot order."""

    opcode: NDArray[np.int64]
    modifiers: NDArray[np.int64]
    register: NDArray[np.int64]
    immediate: NDArray[np.int64]


def tables(program: Program) -> DecodedTables:
    """Decode a program once into arrays."""
    most = max(len(kind.modifiers) for kind in BY_NAME.values())
    count = len(program.ops)
    opcode = np.zeros(count, np.int64)
    modifiers = np.zeros((count, most), np.int64)
    register = np.zeros((count, MAX_OPERANDS), np.int64)
    immediate = np.zeros((count, MAX_OPERANDS), np.int64)
    for index, op in enumerate(program.ops):
        opcode[index] = op.kind.opcode
        for slot, item in enumerate(op.kind.modifiers):
            number = op.get(item.name)
            assert isinstance(number, int)
            modifiers[index, slot] = number
        for slot, item in enumerate(op.kind.operands):
            value = op.get(item.name)
            assert isinstance(value, Operand)
            register[index, slot], immediate[index, slot] = value.register, value.immediate
    return DecodedTables(opcode, modifiers, register, immediate)


# Text ---------------------------------------------------------------------------------------------------
def float_bits(value: float) -> int:
    """The bits of a float32, as FLOAT32 fields hold them."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def _float_text(bits: int) -> str:
    value = struct.unpack("<f", struct.pack("<I", bits))[0]
    text = repr(float(np.float32(value)))
    short = str(np.float32(value))
    if math.isfinite(value) and float_bits(float(short)) == bits:
        return short
    return text if math.isfinite(value) and float_bits(float(text)) == bits else f"0x{bits:08x}"


def _field_text(item: Field, value: Value, names: Mapping[int, str]) -> str:
    if isinstance(value, Operand):
        return str(value)
    if item.kind is Kind.REGISTER:
        return f"r{value}"
    if item.kind is Kind.ENUM:
        assert item.values is not None
        return item.values(value).name.lower()
    if item.kind is Kind.FLOAT32:
        return _float_text(value)
    if item.kind is Kind.TARGET:
        return names.get(value, str(value))
    return str(value)


def disassemble(program: Program) -> str:
    """Text that assembles to the same program."""
    names = {index: name for name, index in program.labels.items()}
    for op in program.ops:
        if any(f.kind is Kind.TARGET for f in op.kind.fields):
            target = int(op.get("to"))  # type: ignore[arg-type]
            if target <= len(program.ops):
                names.setdefault(target, f"L{target}")
    by_index: dict[int, list[str]] = {}
    for name, index in program.labels.items():
        by_index.setdefault(index, []).append(name)
    for index, name in names.items():
        if name not in by_index.get(index, []):
            by_index.setdefault(index, []).append(name)
    lines: list[str] = []
    for index, op in enumerate(program.ops):
        lines.extend(f"{name}:" for name in by_index.get(index, []))
        parts = [op.kind.name]
        for item in op.kind.fields:
            value = op.get(item.name)
            if item.kind is Kind.TARGET or value not in (0, Operand()):
                parts.append(f"{item.name}={_field_text(item, value, names)}")
        text = "    " + " ".join(parts)
        if index in program.comments:
            text += f"    ; {program.comments[index]}"
        lines.append(text)
    lines.extend(f"{name}:" for name in by_index.get(len(program.ops), []))
    return "\n".join(lines) + "\n"


_OPERAND = re.compile(r"(?:r(\d{1,3})(?:([+-]\d{1,9}))?|([+-]?\d{1,9}))")
_LABEL = re.compile(r"[A-Za-z_.][\w.]*")


def assemble(text: str) -> Program:
    """Parse assembly text.

    Raises:
        ProgramError: with the line number, what is wrong and what would be right.
    """
    rows: list[tuple[int, Instruction, list[str]]] = []
    labels: dict[str, int] = {}
    comments: dict[int, str] = {}
    for number, raw in enumerate(text.splitlines(), 1):
        code, _, comment = raw.partition(";")
        code = code.strip()
        if code.endswith(":"):
            name = code[:-1].strip()
            if not _LABEL.fullmatch(name):
                raise ProgramError(f"line {number}: {name!r} is no label: use letters, digits, '_' and '.'")
            if name in labels:
                raise ProgramError(f"line {number}: label {name!r} is defined twice")
            labels[name] = len(rows)
            continue
        if not code:
            continue
        if comment.strip():
            comments[len(rows)] = comment.strip()
        word, *fields = code.split()
        if word not in BY_NAME:
            raise ProgramError(f"line {number}: unknown instruction {word!r}: docs/isa.md lists them")
        rows.append((number, BY_NAME[word], fields))
    ops = [_parse_op(number, kind, fields, labels) for number, kind, fields in rows]
    return Program(ops, labels, comments)


def _parse_op(number: int, kind: Instruction, fields: Iterable[str], labels: Mapping[str, int]) -> Op:
    known = {item.name: item for item in kind.fields}
    values: dict[str, Value] = {}
    for part in fields:
        name, equals, value = part.partition("=")
        if not equals or name not in known:
            raise ProgramError(
                f"line {number}: {kind.name} has no field {part!r}: "
                f"write field=value with {', '.join(known) or 'no fields'}"
            )
        if name in values:
            raise ProgramError(f"line {number}: {kind.name} gives {name} twice")
        try:
            values[name] = _parse_value(kind, known[name], value, labels)
        except ValueError:
            raise ProgramError(
                f"line {number}: {kind.name}: {name} = {value!r} is no {known[name].kind.value}"
            ) from None
        except ProgramError as error:
            raise ProgramError(f"line {number}: {error}") from None
    try:
        return Op(kind, values)
    except ProgramError as error:
        raise ProgramError(f"line {number}: {error}") from None


def _parse_value(kind: Instruction, item: Field, text: str, labels: Mapping[str, int]) -> Value:
    if item.kind is Kind.OPERAND:
        match = _OPERAND.fullmatch(text)
        if not match:
            raise ValueError
        if match[1] is not None:
            return Operand(int(match[1]), int(match[2] or 0))
        return Operand(0, int(match[3]))
    if item.kind is Kind.REGISTER:
        if not re.fullmatch(r"r\d{1,3}", text):
            raise ValueError
        return int(text[1:])
    if item.kind is Kind.ENUM:
        assert item.values is not None
        names = {value.name.lower(): int(value) for value in item.values}
        if text not in names:
            raise ProgramError(f"{kind.name}: {item.name} = {text} is none of {', '.join(names)}")
        return names[text]
    if item.kind is Kind.FLOAT32:
        return int(text, 16) if text.startswith("0x") else float_bits(float(text))
    if item.kind is Kind.TARGET:
        if text in labels:
            return labels[text]
        if _LABEL.fullmatch(text):
            raise ProgramError(f"{kind.name}: label {text!r} is not defined")
    return int(text)


def op(name: str, **values: Value) -> Op:
    """Build one instruction, integers standing for immediate operands: `op("sadd", rd=5, a=Operand(5), b=1)`."""
    kind = BY_NAME[name]
    fields = {item.name: item for item in kind.fields}
    wrapped: dict[str, Value] = {}
    for key, value in values.items():
        is_operand = key in fields and fields[key].kind is Kind.OPERAND and not isinstance(value, Operand)
        wrapped[key] = Operand(0, int(value)) if is_operand else value  # type: ignore[arg-type]
    return Op(kind, wrapped)


__all__ = [
    "DecodedTables",
    "Op",
    "Operand",
    "Program",
    "ProgramError",
    "Value",
    "assemble",
    "decode",
    "decode_op",
    "disassemble",
    "encode",
    "encode_op",
    "float_bits",
    "op",
    "tables",
]
