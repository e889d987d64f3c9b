"""Runs every .mlir file beside this one: the passes its first line names, on its first module.

After `// -----` comes the module expected, or a line `// error:` with a part of the message expected.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from typebar.compiler.pipeline import parse, run_passes
from typebar.isa.errors import TypebarError

HERE = Path(__file__).parent
CASES = sorted(path for path in HERE.glob("*.mlir") if path.name != "gpt2_step.mlir")


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_passes_give_what_the_file_expects(path: Path) -> None:
    given, expected = path.read_text().split("// -----\n")
    passes = [name.strip() for name in given.splitlines()[0].removeprefix("// passes:").split(",")]
    if expected.startswith("// error: "):
        with pytest.raises(TypebarError) as caught:
            run_passes(given, passes)
        assert expected.strip().removeprefix("// error: ") in str(caught.value)
        assert "\n" not in str(caught.value)
        return
    result = parse(run_passes(given, passes))
    assert result.is_structurally_equivalent(parse(expected)), f"the passes gave\n{result}"


def test_there_are_files_of_both_kinds() -> None:
    rejections = [path for path in CASES if "// error: " in path.read_text()]
    assert len(rejections) >= 20
    assert len(CASES) - len(rejections) >= 10


def test_an_unknown_pass_is_named_with_those_that_exist() -> None:
    with pytest.raises(TypebarError, match="no pass 'recognize'; the passes are canonicalise, recognise"):
        run_passes((HERE / "gpt2_step.mlir").read_text(), ["recognize"])


def test_text_round_trips() -> None:
    text = (HERE / "gpt2_step.mlir").read_text()
    assert parse(run_passes(text, [])).is_structurally_equivalent(parse(text))
