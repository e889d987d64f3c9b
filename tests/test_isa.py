"""The instruction set's properties: words and text round-trip, every word decodes or does not, errors in one line."""

import re
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from typebar.isa.errors import TypebarError
from typebar.isa.instructions import (
    BY_NAME,
    BY_OPCODE,
    INSTRUCTIONS,
    OPERAND_BASE,
    WORD_BITS,
    WORD_BYTES,
    Field,
    Instruction,
    Kind,
)
from typebar.isa.machine import Machine, MachineError, shipped_machines
from typebar.isa.program import (
    Op,
    Operand,
    Program,
    ProgramError,
    assemble,
    decode,
    decode_op,
    disassemble,
    encode,
    encode_op,
    float_bits,
    op,
    tables,
)

# Strategies ---------------------------------------------------------------------------------------------
INT20 = st.one_of(st.integers(-(2**19), 2**19 - 1), st.sampled_from([-(2**19), 2**19 - 1, -1, 0]))
INT32 = st.one_of(st.integers(-(2**31), 2**31 - 1), st.sampled_from([-(2**31), 2**31 - 1]))
BITS32 = st.one_of(
    st.integers(0, 2**32 - 1),
    st.floats(width=32).map(float_bits),
    st.sampled_from([0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0x80000000, 1, 0x00800000]),
)


def field_values(item: Field, targets: int) -> st.SearchStrategy[int | Operand]:
    """Any legal value of a field."""
    if item.kind is Kind.OPERAND:
        return st.builds(Operand, st.integers(0, 31), INT20)
    if item.kind is Kind.ENUM:
        assert item.values is not None
        return st.sampled_from([int(value) for value in item.values])
    if item.kind is Kind.INT32:
        return INT32
    if item.kind is Kind.FLOAT32:
        return BITS32
    if item.kind is Kind.TARGET:
        return st.one_of(st.integers(0, targets), st.integers(0, 2**20 - 1))
    return st.integers(0, (1 << item.width) - 1)


@st.composite
def ops(draw: st.DrawFn, targets: int = 20) -> Op:
    """Any legal instruction, some fields left out."""
    kind = draw(st.sampled_from(INSTRUCTIONS))
    given_fields = [item for item in kind.fields if draw(st.booleans())]
    return Op(kind, {item.name: draw(field_values(item, targets)) for item in given_fields})


labels = st.from_regex(r"[A-Za-z_.][A-Za-z0-9_.]{0,6}", fullmatch=True)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Any legal program, with labels and comments."""
    listed = draw(st.lists(ops(), max_size=12))
    places = st.integers(0, len(listed))
    named = draw(st.dictionaries(labels, places, max_size=4))
    notes = st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1, max_size=9)
    notes = notes.filter(lambda note: note.strip() == note)
    comments = draw(st.dictionaries(st.integers(0, max(len(listed) - 1, 0)), notes, max_size=3))
    return Program(listed, named, comments if listed else {})


# Declarations -------------------------------------------------------------------------------------------
def test_opcodes_and_names_are_unique() -> None:
    assert len(BY_OPCODE) == len(BY_NAME) == len(INSTRUCTIONS)
    assert all(0 < item.opcode < 256 for item in INSTRUCTIONS)  # 0, an erased word, traps


@pytest.mark.parametrize("kind", INSTRUCTIONS, ids=lambda kind: kind.name)
def test_fields_do_not_overlap_and_fit(kind: Instruction) -> None:
    taken = (1 << 8) - 1
    for place in kind.layout():
        mask = ((1 << place.field.width) - 1) << place.offset
        assert not taken & mask, place.field.name
        taken |= mask
        if place.field.kind is Kind.OPERAND:
            assert place.offset >= OPERAND_BASE
        if place.field.kind is Kind.ENUM:
            assert place.field.values is not None
            assert max(place.field.values) < 1 << place.field.width, place.field.name
    assert taken < 1 << WORD_BITS
    names = [item.name for item in kind.fields]
    assert len(names) == len(set(names))


# Round trips --------------------------------------------------------------------------------------------
@given(programs())
@settings(deadline=None, max_examples=150)
def test_text_round_trips(program: Program) -> None:
    text = disassemble(program)
    again = assemble(text)
    assert again == program
    assert disassemble(again) == text
    assert {name: again.labels[name] for name in program.labels} == program.labels
    assert again.comments == program.comments


@given(programs())
@settings(deadline=None, max_examples=100)
def test_words_round_trip(program: Program) -> None:
    words = encode(program)
    assert words.size == WORD_BYTES * len(program)
    assert decode(words) == program
    assert decode(words.tobytes()) == program
    assert np.array_equal(encode(decode(words)), words)


@given(ops())
@settings(deadline=None, max_examples=100)
def test_tables_hold_every_field(one: Op) -> None:
    table = tables(Program([one]))
    assert table.opcode[0] == one.kind.opcode
    for slot, item in enumerate(one.kind.modifiers):
        assert table.modifiers[0, slot] == one.get(item.name)
    for slot, item in enumerate(one.kind.operands):
        assert Operand(int(table.register[0, slot]), int(table.immediate[0, slot])) == one.get(item.name)


def accept(word: bytes) -> bool:
    """A word decodes to an instruction that encodes to the same word, or to nothing."""
    decoded = decode_op(word)
    if decoded is None:
        with pytest.raises(ProgramError, match="word 0 is no instruction"):
            decode(word)
        return False
    assert encode_op(decoded) == word
    assert assemble(disassemble(Program([decoded]))) == Program([decoded])
    return True


@given(st.binary(min_size=WORD_BYTES, max_size=WORD_BYTES), st.sampled_from([0, *BY_OPCODE]))
@settings(deadline=None, max_examples=200)
def test_any_word_decodes_or_does_not(word: bytes, opcode: int) -> None:
    accept(word)
    accept(bytes([opcode]) + word[1:])


@given(ops(), st.integers(0, WORD_BITS - 1))
@settings(deadline=None, max_examples=200)
def test_a_flipped_bit_decodes_or_does_not(one: Op, bit: int) -> None:
    word = int.from_bytes(encode_op(one), "little") ^ (1 << bit)
    accept(word.to_bytes(WORD_BYTES, "little"))


@pytest.mark.parametrize("kind", INSTRUCTIONS, ids=lambda kind: kind.name)
def test_exactly_the_declared_bits_are_accepted(kind: Instruction) -> None:
    used = 0
    for place in kind.layout():
        used |= ((1 << place.field.width) - 1) << place.offset
    for bit in range(8, WORD_BITS):
        word = (kind.opcode | 1 << bit).to_bytes(WORD_BYTES, "little")
        if not used >> bit & 1:
            assert not accept(word), f"bit {bit}"
        elif not any(
            place.field.kind is Kind.ENUM and place.offset <= bit < place.offset + place.field.width
            for place in kind.layout()
        ):
            assert accept(word), f"bit {bit}"


def test_a_known_encoding() -> None:
    word = encode_op(op("vadd", dst=Operand(3, -8), a=16, b_from=2, imm=float_bits(1.5), n=1))
    value = int.from_bytes(word, "little")
    assert value & 0xFF == 0x30
    assert value >> 8 & 3 == 2
    assert value >> 10 & 0xFFFFFFFF == 0x3FC00000
    assert value >> 62 & 31 == 3
    assert value >> 67 & 0xFFFFF == 0xFFFF8
    assert value >> (62 + 25 + 5) & 0xFFFFF == 16
    assert value >> (62 + 3 * 25) == 1 << 5


# Text ---------------------------------------------------------------------------------------------------
def test_text_forms() -> None:
    program = assemble(
        """
        start:              ; a label
            sli rd=r4 value=-2147483648   ; the least
            vmov dst=r4-12 b_from=immediate imm=0x7f800001 n=r9
            vmov b_from=immediate imm=-1e-45 n=+3
            blt to=end a=r1+3
            beq to=1
        end:
        """
    )
    assert program.labels == {"start": 0, "end": 5}
    assert program.comments == {0: "the least"}
    assert program.ops[0] == op("sli", rd=4, value=-(2**31))
    assert program.ops[1] == op("vmov", dst=Operand(4, -12), b_from=2, imm=0x7F800001, n=Operand(9))
    assert program.ops[2] == op("vmov", b_from=2, imm=0x80000001, n=3)
    assert program.ops[3] == op("blt", to=5, a=Operand(1, 3))
    assert program.ops[4] == op("beq", to=1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("halt\nvada dst=1", "line 2: unknown instruction 'vada': docs/isa.md lists them"),
        ("vadd dest=1", "line 1: vadd has no field 'dest=1': write field=value with b_from, imm, dst, a, b, n"),
        ("halt now", "line 1: halt has no field 'now': write field=value with no fields"),
        ("sadd rd=r1 rd=r2", "line 1: sadd gives rd twice"),
        ("vadd n=524288", "line 1: vadd: n = 524288 is outside -524288 to 524287: load it with sli"),
        ("vadd n=r5-524289", "line 1: vadd: n = -524289 is outside -524288 to 524287: load it with sli"),
        ("vadd n=r32", "line 1: vadd: n names r32: registers are r0 to r31"),
        ("vadd n=x5", "line 1: vadd: n = 'x5' is no operand"),
        ("sadd rd=5", "line 1: sadd: rd = '5' is no register"),
        ("sadd rd=r32", "line 1: sadd: rd = 32 is outside 0 to 31"),
        ("sli rd=r1 value=2147483648", "line 1: sli: value = 2147483648 is outside -2147483648 to 2147483647"),
        ("sli rd=r1 value=ten", "line 1: sli: value = 'ten' is no int32"),
        ("vmov imm=one", "line 1: vmov: imm = 'one' is no float32"),
        ("vmov b_from=file", "line 1: vmov: b_from = file is none of vector, word, immediate"),
        ("load format=fp64", "line 1: load: format = fp64 is none of fp16, bf16, int8, fp32"),
        ("load region=hbm", "line 1: load: region = hbm is none of weights, kv, params, local, io"),
        ("matmul full=2", "line 1: matmul: full = 2 is outside 0 to 1"),
        ("beq to=nowhere", "line 1: beq: label 'nowhere' is not defined"),
        ("beq to=1048576", "line 1: beq: to = 1048576 is outside 0 to 1048575"),
        ("a:\na:", "line 2: label 'a' is defined twice"),
        ("3x:", "line 1: '3x' is no label: use letters, digits, '_' and '.'"),
    ],
)
def test_assembler_errors(text: str, message: str) -> None:
    with pytest.raises(ProgramError) as caught:
        assemble(text)
    assert str(caught.value) == message


@given(st.text(max_size=60))
@settings(deadline=None, max_examples=100)
def test_any_text_assembles_or_is_an_error_in_one_line(text: str) -> None:
    try:
        program = assemble(text)
    except ProgramError as error:
        assert "\n" not in str(error)
    else:
        assert assemble(disassemble(program)) == program


@given(
    st.sampled_from([item.name for item in INSTRUCTIONS]),
    st.lists(
        st.tuples(
            st.sampled_from(["rd", "a", "b", "n", "to", "imm", "value", "dst", "format", "full", "b_from"]),
            st.sampled_from(
                [
                    "",
                    "r1",
                    "r0-0",
                    "r99",
                    "1e400",
                    "nan",
                    "inf",
                    "0x1",
                    "0xfffffffff",
                    "-",
                    "²",
                    "a",
                    "r1+",
                    "--1",
                    "fp16",
                ]
            ),
        ),
        max_size=3,
    ),
)
@settings(deadline=None, max_examples=200)
def test_any_fields_assemble_or_are_an_error_in_one_line(name: str, fields: list[tuple[str, str]]) -> None:
    text = " ".join([name, *(f"{key}={value}" for key, value in fields)])
    try:
        program = assemble(text)
    except ProgramError as error:
        assert "\n" not in str(error)
    else:
        assert assemble(disassemble(program)) == program


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: op("vadd", dest=3), "vadd has no field 'dest': it has b_from, imm, dst, a, b, n"),
        (lambda: op("sadd", rd=Operand(1)), "sadd: rd must be a plain value, not r1"),
        (lambda: Op(BY_NAME["vadd"], {"n": 3}), "vadd: n must be an operand, not 3"),
        (lambda: op("vadd", b_from=3), "vadd: b_from = 3 is none of vector, word, immediate"),
        (lambda: op("vadd", imm=-1), "vadd: imm = -1 is outside 0 to 4294967295"),
        (lambda: decode(bytes(63)), "a program is a multiple of 64 bytes, not 63: it is truncated"),
        (lambda: decode(bytes(64)), "word 0 is no instruction (opcode 0x00): the program is corrupt"),
        (
            lambda: decode(encode_op(op("halt")) + b"\xff" * 64),
            "word 1 is no instruction (opcode 0xff): the program is corrupt",
        ),
    ],
)
def test_builder_and_decoder_errors(build, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ProgramError, match=f"^{re.escape(message)}$"):
        build()


@given(BITS32)
def test_float_fields_keep_their_bits(bits: int) -> None:
    program = Program([op("vmov", b_from=2, imm=bits)])
    assert assemble(disassemble(program)) == program


def test_float_bits() -> None:
    assert float_bits(-0.0) == 0x80000000
    assert float_bits(0.1) == struct.unpack("<I", struct.pack("<f", 0.1))[0]


# Machines -----------------------------------------------------------------------------------------------
def test_shipped_machines_load_and_round_trip() -> None:
    assert {"tiny", "u280", "u280-dfx"} <= set(shipped_machines())
    for name in shipped_machines():
        machine = Machine.load(name)
        assert machine.name == name
        assert Machine.from_mapping(machine.to_mapping()) == machine


def test_hashes_split_the_parameters() -> None:
    tiny = Machine.load("tiny")
    slower = tiny.override({"hbm.latency": "40", "clock_mhz": "100", "control.run_ahead": "false"})
    assert slower.contract_hash() == tiny.contract_hash()
    assert slower.timing_hash() != tiny.timing_hash()
    other = tiny.override({"matrix.lanes": "16"})
    assert other.contract_hash() != tiny.contract_hash()
    assert other.timing_hash() == tiny.timing_hash()


TOML = (Path(__file__).parent.parent / "isa" / "machines" / "tiny.toml").read_text()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("lanes = 8\ncolumns", "lanes = 12\ncolumns", "machine parameter matrix.lanes = 12 must be a power of two"),
        ("clock_mhz = 200", "clock_mhz = 0", "machine parameter clock_mhz = 0 is outside 1 to 2000"),
        ("clock_mhz = 200", "clock_mhz = 1.5", "machine parameter clock_mhz must be an integer, not 1.5"),
        ("clock_mhz = 200", "clock_mhz = true", "machine parameter clock_mhz must be an integer, not True"),
        ("clock_mhz = 200", "", "machine parameter clock_mhz is missing: add it"),
        (
            "clock_mhz = 200",
            "clock_mhz = 200\nspeed = 1",
            "unknown machine parameter speed: remove it or correct its name",
        ),
        ("run_ahead = true", "run_ahead = 1", "machine parameter control.run_ahead must be bool, not 1"),
        ('name = "tiny"', "name = 3", "machine parameter name must be str, not 3"),
        ("[host]", "[guest]", "unknown machine parameter guest: remove it or correct its name"),
        (
            "attention_block = 64",
            "attention_block = 72",
            "attention_block = 72 must be a multiple of the column block 64",
        ),
        (
            "words = 16384",
            "words = 16400",
            "vector.words = 16400 must be a multiple of vector.align x vector.segments = 128",
        ),
        (
            "fifo_bytes = 8192",
            "fifo_bytes = 8224",
            "hbm.fifo_bytes = 8224 must be whole rows of 64 bytes and hold one step of the matrix unit, 128 bytes",
        ),
        (
            "fifo_port_bytes = 128",
            "fifo_port_bytes = 32",
            "matrix.fifo_port_bytes = 32 must feed one 16-bit tile, 64 bytes",
        ),
        (
            "fifo_bytes = 8192",
            "fifo_bytes = 8256",
            "hbm.fifo_bytes = 8256 must be a multiple of matrix.fifo_port_bytes = 128",
        ),
        (
            "align = 8",
            "align = 4",
            "matrix.vectors = 8 must not exceed vector.align = 4",
        ),
        (
            "lanes = 8\nlatency",
            "lanes = 16\nlatency",
            "vector.align = 8 must be a multiple of vector.lanes = 16: a vector starts on a row of the register file",
        ),
        (
            "lanes = 8\nlatency",
            "lanes = 1\nlatency",
            "machine parameter vector.lanes = 1 is outside 2 to 256",
        ),
        (
            "bytes_per_cycle = 32",
            "bytes_per_cycle = 128",
            "machine parameter ddr.bytes_per_cycle = 128 is outside 4 to 64",
        ),
        (
            "bytes_per_cycle = 32",
            "bytes_per_cycle = 48",
            "machine parameter ddr.bytes_per_cycle = 48 must be a power of two",
        ),
        (
            "channel_bytes = 32",
            "channel_bytes = 8",
            "hbm.channels x hbm.channel_bytes = 16 must be at least one line of 64 bytes",
        ),
        ("clock_mhz = 200", "clock_mhz =", "is not TOML"),
    ],
)
def test_machine_file_errors(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert TOML.count(old) == 1
    path = tmp_path / "machine.toml"
    path.write_text(TOML.replace(old, new))
    with pytest.raises(MachineError) as caught:
        Machine.load(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: Machine.load("u250"),
            "unknown machine 'u250': choose one of tiny, u280, u280-dfx, or give a .toml file",
        ),
        (lambda: Machine.load("none.toml"), "machine file 'none.toml' does not exist"),
        (lambda: Machine.load("tiny").override({"lanes": "8"}), "unknown machine parameter 'lanes'"),
        (lambda: Machine.load("tiny").override({"name": "x"}), "unknown machine parameter 'name'"),
        (
            lambda: Machine.load("tiny").override({"matrix.lanes": "many"}),
            "machine parameter matrix.lanes must be an integer, not 'many'",
        ),
        (
            lambda: Machine.load("tiny").override({"control.run_ahead": "1"}),
            "machine parameter control.run_ahead must be true or false, not '1'",
        ),
        (
            lambda: Machine.load("tiny").override({"vector.words": "-1"}),
            "machine parameter vector.words = -1 is outside 256 to 524287",
        ),
        (lambda: Machine.from_mapping({"matrix": 3}), "machine parameter name is missing"),
        (
            lambda: Machine.from_mapping({**Machine.load("tiny").to_mapping(), "hbm": 3}),
            "hbm must be a table of parameters, not 3",
        ),
    ],
)
def test_machine_errors(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(TypebarError) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
