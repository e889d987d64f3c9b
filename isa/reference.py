"""Writes docs/isa.md, the instruction-set reference, from the definitions in this package.

    python -m typebar.isa.reference            write it
    python -m typebar.isa.reference --check    fail if it is not current

Everything that a definition can say comes from the definition: fields, encodings, pseudocode, traps, limits and
the docstrings that state a contract. Only the connecting prose is written here.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from enum import IntEnum
from pathlib import Path
from typing import get_type_hints

from typebar.isa import checks, image_plan, image_writer, layout, program
from typebar.isa.checks import Checker
from typebar.isa.image import FORMAT_VERSION
from typebar.isa.instructions import (
    COUNT_REGISTER,
    DEVICE_REGISTER,
    FORMAT_BYTES,
    HBM_REGIONS,
    IMMEDIATE_BITS,
    INSTRUCTIONS,
    ISA_VERSION,
    MAX_OPERANDS,
    MODIFIER_BASE,
    OPCODE_BITS,
    OPERAND_BASE,
    OPERAND_BITS,
    REGISTER_BITS,
    SCALAR_REGISTERS,
    TARGET_BITS,
    TRAP_TEXT,
    WORD_BITS,
    WORD_BYTES,
    WRITABLE_REGIONS,
    Field,
    Format,
    Instruction,
    Kind,
    Region,
    Trap,
    Unit,
)
from typebar.isa.machine import LINE_BYTES, Machine
from typebar.isa.numerics import NUMERICS_VERSION, NumericFlag, formats, vector
from typebar.isa.program import Operand, encode_op, op
from typebar.isa.registers import Address, Register, Status

TARGET = Path(__file__).resolve().parent.parent / "docs" / "isa.md"
COMMAND = "python -m typebar.isa.reference"

KIND_TEXT = {
    Kind.REGISTER: ("a scalar register", "`r5`"),
    Kind.OPERAND: ("a scalar register plus a signed immediate", "`r5`, `-3`, `r5+12`"),
    Kind.ENUM: ("one of the named values; any other number is illegal", "`fp16`"),
    Kind.FLAG: ("0 or 1", "`1`"),
    Kind.INT32: ("a signed 32-bit integer", "`-7`"),
    Kind.FLOAT32: ("the bits of a float32", "`0.125`, `0x7fc00000`"),
    Kind.TARGET: ("an instruction index", "`loop`, `12`"),
}
REGION_USE = {
    Region.WEIGHTS: "packed matrices of this device",
    Region.KV: "K and V caches",
    Region.PARAMS: "embeddings and norms, the same on every device",
    Region.LOCAL: "this device's biases",
    Region.IO: "shared with the host: tokens, descriptors, results",
}
FLAG_TEXT = {
    NumericFlag.OPERAND_OVERFLOW: "a value too large for a matrix operand became the largest finite one",
    NumericFlag.STORE_SATURATED: "a store's value was outside its format and saturated",
    NumericFlag.ARGMAX_NAN: "vargmax met a NaN",
}


def generate() -> str:
    """The whole of docs/isa.md."""
    parts = [
        _introduction(), _model(), _word(), _kinds(), _enumerations(), _regions(), _summary(), *_instructions(),
        _checks(), _traps(), _control(), _packed(), _images(), _numbers(), _assembly(), _machine(),
    ]  # fmt: skip
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the reference, or with `--check` compare; returns the exit status, 1 if it is not current."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Write docs/isa.md from the definitions.")
    parser.add_argument("--check", action="store_true", help="fail if the file is not current")
    parser.add_argument("--output", type=Path, default=TARGET, help="the file (default: docs/isa.md)")
    options = parser.parse_args(arguments)
    path: Path = options.output
    text = generate()
    if not options.check:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return 0
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        print(f"{path.name} is not current: run {COMMAND}", file=sys.stderr)
        return 1
    return 0


# Building blocks -----------------------------------------------------------------------------------------
def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _document(subject: object) -> str:
    text = inspect.getdoc(subject)
    if not text:
        raise AssertionError(f"{subject} has no docstring")
    return text


def _body(module: object) -> str:
    """A module's docstring without its title paragraph."""
    return _document(module).split("\n\n", 1)[1]


def _bits(offset: int, width: int) -> str:
    return str(offset) if width == 1 else f"{offset}-{offset + width - 1}"


def _enums() -> list[type[IntEnum]]:
    """Enumerations that fields take values from, each once, in order of first use."""
    used = (item.values for kind in INSTRUCTIONS for item in kind.fields if item.values is not None)
    return list(dict.fromkeys(used))


# Sections ------------------------------------------------------------------------------------------------
def _introduction() -> str:
    return f"""
# Instruction set reference

<!-- Generated from isa/ by `{COMMAND}`. Change the definitions, not this file. -->

This page is generated from the definitions that the assembler, the simulators and the hardware's decoder use.
ISA version {ISA_VERSION}, numerics version {NUMERICS_VERSION}, image format version {FORMAT_VERSION}.
An image names all three, and a device runs it only if they are its own."""


def _model() -> str:
    return f"""
## Programming model

1 to 64 devices on a ring run the same program, each on its own part of the model. A device has

- **pc**, an instruction index;
- **R[0 .. {SCALAR_REGISTERS - 1}]**, scalar registers of 32 bits. R0 is always zero. At start R{DEVICE_REGISTER} holds
  the device's rank and R{COUNT_REGISTER} the number of devices; all others are zero;
- **V[0 .. vector.words - 1]**, vector registers: words of 32 bits, nearly always float32, addressed by word. A vector
  is a range of words. Their contents at start are not defined;
- **memory**, in {len(Region)} regions with bounds (see [Regions](#regions));
- sticky **numeric flags**, each with the pc that first raised it, and a **status**: running, done, or an error code
  with a pc.

The host loads program memory, binds the regions, and starts the device at an entry point of the image.

**Sequential semantics.** A program means what it means when instructions run one after another, each reading all of
its inputs before it writes. Units overlap and fetch ahead; interlocks keep that invisible, and programs never
synchronise for correctness. `fence` exists for memory that the host watches. Timing is in `docs/timing.md`."""


def _word() -> str:
    example = op("sadd", rd=5, a=Operand(6, -2), b=1)
    word = int.from_bytes(encode_op(example), "little")
    low = OPERAND_BASE + len(example.kind.operands) * OPERAND_BITS
    return f"""
## Instruction word

An instruction is {WORD_BITS} bits, {WORD_BYTES} bytes, little endian: bit 0 is the lowest bit of the first byte.

{
        _table(
            ("bits", "content"),
            [
                (f"0-{OPCODE_BITS - 1}", "opcode"),
                (
                    f"{MODIFIER_BASE}-{OPERAND_BASE - 1}",
                    "modifiers: all fields that are no operands, packed in declared order",
                ),
                (
                    f"{OPERAND_BASE}-{WORD_BITS - 1}",
                    f"up to {MAX_OPERANDS} operands of {OPERAND_BITS} bits; operand i starts at"
                    f" bit {OPERAND_BASE} + {OPERAND_BITS} i",
                ),
            ],
        )
    }

An **operand** has a register number in its {REGISTER_BITS} low bits and a signed immediate in the
{IMMEDIATE_BITS} bits above. Its value is `(R[register] + immediate) mod 2^32`, read as signed, when the instruction
issues. With register 0 it is a plain constant from {-(1 << IMMEDIATE_BITS - 1)} to {(1 << IMMEDIATE_BITS - 1) - 1}.

Every bit that an instruction does not use is zero. A word with an unknown opcode, an undefined value of an
enumeration, or another bit set traps ILLEGAL when it issues; every other word is an instruction.

Example: `sadd rd=r5 a=r6-2 b=1` has the bits {low - 1}-0 = `0x{word:x}`, all others zero."""


def _kinds() -> str:
    rows = [
        (kind.value, "as given" if kind is Kind.ENUM else Field("", kind, "").width, *KIND_TEXT[kind]) for kind in Kind
    ]
    return f"""
## Field kinds

{_table(("kind", "bits", "holds", "in assembly text"), rows)}

Branch targets have {TARGET_BITS} bits, so a program has fewer than {1 << TARGET_BITS} instructions."""


def _enumerations() -> str:
    parts = ["## Enumerations"]
    for values in _enums():
        summary = _document(values).split("\n\n")[0].replace("\n", " ")
        names = ", ".join(f"{item.value} `{item.name.lower()}`" for item in values)
        parts.append(f"**{values.__name__}**. {summary}\n{names}.")
    sizes = ", ".join(f"{item.name.lower()} {FORMAT_BYTES[item]}" for item in Format)
    parts.append(f"Bytes of an element in memory: {sizes}.")
    return "\n\n".join(parts)


def _regions() -> str:
    rows = [
        (
            region.value, f"`{region.name.lower()}`", "HBM" if region in HBM_REGIONS else "DDR",
            "yes" if region in WRITABLE_REGIONS else "no", REGION_USE[region],
        )
        for region in Region
    ]  # fmt: skip
    return f"""
## Regions

Memory addresses are relative to a region: lines of {LINE_BYTES} bytes, plus bytes where an instruction has a `byte`
operand. The loader binds each region to a place and a length in the device's memories; a region that is not bound has
length 0.

{_table(("number", "region", "memory", "programs may write", "holds"), rows)}"""


def _summary() -> str:
    rows = [
        (f"0x{kind.opcode:02x}", f"[`{kind.name}`](#{kind.name})", kind.unit.name.lower(), kind.summary)
        for kind in INSTRUCTIONS
    ]
    return f"## Instructions\n\n{_table(('opcode', 'name', 'unit', 'meaning'), rows)}"


def _instructions() -> Iterator[str]:
    for unit in Unit:
        yield f"## {unit.name.capitalize()} instructions"
        yield from (_instruction(kind) for kind in INSTRUCTIONS if kind.unit is unit)


def _instruction(kind: Instruction) -> str:
    rows = []
    for place in kind.layout():
        item = place.field
        shown = f"enum {item.values.__name__}" if item.values is not None else item.kind.value
        rows.append((f"`{item.name}`", _bits(place.offset, item.width), item.width, shown, item.note))
    traps = ", ".join(dict.fromkeys(trap.name for trap in kind.traps)) or "none"
    parts = [
        f"### {kind.name}",
        f"Opcode 0x{kind.opcode:02x}, {kind.unit.name.lower()} unit: {kind.summary}.",
        _table(("field", "bits", "width", "kind", "meaning"), rows) if rows else "No fields.",
        f"```\n{kind.semantics}\n```",
        f"Traps: {traps}.",
    ]
    return "\n\n".join(parts)


def _checks() -> str:
    general = _body(checks).replace("Rules of every method below:", "Rules for every instruction:")
    methods = [item for name, item in vars(Checker).items() if inspect.isfunction(item) and not name.startswith("_")]
    rules = "\n".join(
        textwrap.indent(" ".join(_document(method).split()), "  ").replace("  ", "- ", 1) for method in methods
    )
    return f"## Operand checks\n\n{general}\n\nRules for each instruction, in order:\n\n{rules}"


def _traps() -> str:
    rows = [(trap.value, trap.name, TRAP_TEXT[trap]) for trap in Trap if trap in TRAP_TEXT]
    return f"""
## Traps

On a trap, older instructions finish and younger ones never start; the control block holds the code and the
instruction's index. Every instruction can also trap ILLEGAL and PROGRAM_END.

{_table(("code", "name", "cause"), rows)}"""


def _control() -> str:
    registers = _table(("index", "name"), [(item.value, item.name) for item in Register])
    addresses = _table(("address", "name"), [(f"{item.value:#05x}", item.name) for item in Address])
    states = _table(("value", "STATUS"), [(item.value, item.name) for item in Status])
    return f"""
## Control block

{_document(Register)}

{registers}

{states}

### On the bus

{_document(Address)}

{addresses}"""


def _packed() -> str:
    return f"## Packed matrices\n\n{_body(layout)}"


def _images() -> str:
    structure = _body(image_writer)
    return f"""
## Images

A program and everything it needs come in one safetensors file.

{structure}

{_body(image_plan)}"""


def _numbers() -> str:
    flags = [(int(flag), flag.name, text) for flag, text in FLAG_TEXT.items()]
    return f"""
## Numbers

`docs/numerics.md` has the arithmetic to the bit. In the pseudocode:

- `add`, `sub`, `mul`, `max`, and `+` and `*` on vector registers, are float32 to nearest even;
- `round_to(format, x)` is what a store does, and `float32(...)` what a load does;
- `operand(x)` converts to the matrix unit's operand: 1 sign, 8 exponent and 10 fraction bits;
- `dot(x, m)` is the aligned dot product of one chunk, m with the exponents of its format; absent lanes take no part;
- `tree_sum` adds adjacent pairs of the vector, extended with +0 to a power of two, level by level;
- `function` is one of enumeration Function, and `activation` none or one of them.

Vector registers:

{_body(vector)}

Memory formats:

{_body(formats).split(chr(10) * 2, 1)[1]}

Numeric flags are sticky and do not stop a program:

{_table(("bit", "flag", "raised when"), flags)}"""


def _assembly() -> str:
    text = _body(program)
    return f"""
## Assembly text

{text}

```
    sli rd=r3 value=4
loop:
    vmul b_from=word dst=64 a=r4+128 b=7 n=64    ; scale one row
    sadd rd=r4 a=r4 b=64
    ssub rd=r3 a=r3 b=1
    bne to=loop a=r3
    halt
```"""


def _machine() -> str:
    rows: list[tuple[object, ...]] = []
    hints = get_type_hints(Machine)
    for outer in fields(Machine):
        section = hints[outer.name]
        leaves = fields(section) if is_dataclass(section) else (outer,)
        prefix = f"{outer.name}." if is_dataclass(section) else ""
        for leaf in leaves:
            data = leaf.metadata
            if not data:
                continue
            span = f"{data['low']} to {data['high']}" if "low" in data else "true, false"
            span += ", a power of two" if data.get("power") else ""
            rows.append((f"`{prefix}{leaf.name}`", data["note"], span, "contract" if data["contract"] else "timing"))
    return f"""
## Machine parameters

A machine file (`isa/machines/*.toml`) gives `name`, `description` and these. An image depends on the **contract**
parameters, which must match where it runs; the **timing** parameters only move time.

{_table(("parameter", "meaning", "range", "class"), rows)}"""


if __name__ == "__main__":
    sys.exit(main())
