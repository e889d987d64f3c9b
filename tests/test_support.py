"""docs/models.md says what the tests recorded, and `pytest --record` records what they found."""

from __future__ import annotations

from pathlib import Path

import pytest

from typebar.isa.errors import TypebarError
from typebar.models.support import Cell, load, page, save

pytest_plugins = ["pytester"]

CONFTEST = Path(__file__).parent / "conftest.py"
TESTS = """
def test_passes(claim):
    claim("GPT-2", "torch", "functional", "")
    claim("GPT-2", "torch", "functional", "0.9 of the bound")

def test_fails(claim):
    claim("GPT-2", "torch", "timing", "")
    assert False

def test_claims_nothing(claim):
    pass
"""


def test_a_record_comes_back_and_makes_a_table(tmp_path: Path) -> None:
    table = {("A|B", "ONNX"): {"functional": Cell(True, "0.5"), "rtl": Cell(False, "x")}, ("C", "torch"): {}}
    save(table, tmp_path / "record.json")
    assert load(tmp_path / "record.json") == table
    assert "| A\\|B | ONNX | 0.5 | - | no |\n| C | torch | - | - | - |" in page(table)
    assert load(tmp_path / "absent.json") == {}
    (tmp_path / "bad.json").write_text('[{"family": 1}]')
    with pytest.raises(TypebarError, match="is no record"):
        load(tmp_path / "bad.json")


@pytest.mark.parametrize("workers", [[], ["-p", "xdist.plugin", "-n", "2"]], ids=["one process", "workers"])
def test_outcomes_are_recorded(workers: list[str], pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    record = pytester.path / "record.json"
    pytester.makepyfile(TESTS)
    text = CONFTEST.read_text().replace("load()", f"load(Path({str(record)!r}))")
    text = text.replace("save(table)", f"save(table, Path({str(record)!r}))")
    pytester.makeconftest(text.replace("import pytest", "from pathlib import Path\nimport pytest", 1))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    options = ["-p", "no:cacheprovider", *workers]
    pytester.runpytest_subprocess(*options)
    assert not record.exists()
    pytester.runpytest_subprocess("--record", *options).assert_outcomes(passed=2, failed=1)
    cells = {"functional": Cell(True, "0.9 of the bound"), "timing": Cell(False, "")}
    assert load(record) == {("GPT-2", "torch"): cells}
