"""docs/isa.md is generated, current, and complete."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from typebar.isa import reference
from typebar.isa.instructions import INSTRUCTIONS, Instruction, Kind, Trap
from typebar.isa.machine import Machine
from typebar.isa.program import assemble, encode_op
from typebar.isa.reference import generate, main

TEXT = generate()


def test_the_reference_is_current() -> None:
    assert main(["--check"]) == 0, f"docs/isa.md is not current: run {reference.COMMAND}"


def test_check_fails_on_a_missing_or_stale_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "docs" / "isa.md"
    assert main(["--check", "--output", str(path)]) == 1
    assert main(["--output", str(path)]) == 0 and path.read_text() == TEXT
    assert main(["--check", "--output", str(path)]) == 0
    path.write_text(TEXT + " ")
    assert main(["--check", "--output", str(path)]) == 1
    assert "isa.md is not current: run python -m typebar.isa.reference" in capsys.readouterr().err


@pytest.mark.parametrize("kind", INSTRUCTIONS, ids=lambda kind: kind.name)
def test_every_instruction_has_its_fields_semantics_and_traps(kind: Instruction) -> None:
    section = re.search(rf"^### {kind.name}\n(.*?)(?=^##)", TEXT, re.M | re.S)
    assert section is not None
    body = section[1]
    rows = re.findall(r"^\| `(\w+)` \| (\d+)(?:-(\d+))? \| (\d+) \|", body, re.M)
    assert [row[0] for row in rows] == [place.field.name for place in kind.layout()]
    for _, low, high, width in rows:
        assert int(high or low) - int(low) + 1 == int(width)
    assert kind.semantics in body and kind.summary in body
    assert f"Opcode 0x{kind.opcode:02x}" in body
    listed = re.search(r"^Traps: (.*)\.$", body, re.M)
    assert listed is not None
    assert set(listed[1].split(", ")) == ({trap.name for trap in kind.traps} or {"none"})


def test_field_tables_describe_the_encoding() -> None:
    """Setting the bits that the tables name gives the word that the encoder gives."""
    body = re.search(r"^### sadd\n(.*?)(?=^##)", TEXT, re.M | re.S)
    assert body is not None
    low = {name: int(bit) for name, bit in re.findall(r"^\| `(\w+)` \| (\d+)-", body[1], re.M)}
    word = 0x11 | 5 << low["rd"] | (6 | (2**20 - 2) << 5) << low["a"] | 1 << 5 << low["b"]
    encoded = encode_op(assemble("sadd rd=r5 a=r6-2 b=1").ops[0])
    assert word == int.from_bytes(encoded, "little") and f"`0x{word:x}`" in TEXT


def test_traps_parameters_and_kinds_are_all_listed() -> None:
    for trap in Trap:
        assert trap is Trap.NONE or f"| {trap.value} | {trap.name} |" in TEXT
    for section, value in Machine.load("tiny").to_mapping().items():
        for key in value if isinstance(value, dict) else ():
            assert f"| `{section}.{key}` |" in TEXT
    assert "| `clock_mhz` |" in TEXT
    for kind in Kind:
        assert f"| {kind.value} |" in TEXT


def test_the_assembly_example_assembles() -> None:
    example = re.search(r"## Assembly text.*?```\n(.*?)```", TEXT, re.S)
    assert example is not None and len(assemble(example[1])) == 6


def test_links_lead_somewhere() -> None:
    titles = re.findall(r"^#+ (.*)$", TEXT, re.M)
    anchors = {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([^)]*)\)", TEXT)) <= anchors
