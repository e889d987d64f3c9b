"""docs/models.md: which model families run, brought in how, on what; written from what the tests recorded.

    python -m typebar.models.support [--check]

`pytest --record` writes the outcomes of the family tests to docs/models.json (tests/conftest.py), and this turns them
into the table. --check only compares, for `make test`.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from typebar.isa.errors import TypebarError

DOCS = Path(__file__).parent.parent / "docs"
RECORD, PAGE = DOCS / "models.json", DOCS / "models.md"
COLUMNS = ("functional", "timing", "rtl")
"""What runs a model: the functional simulator against torch, the timing simulator, the RTL against the functional."""

_HEAD = """<!-- Written by `make docs` from docs/models.json, which `make record` writes: do not edit. -->

# Which models run

Small models with random weights, built from their transformers configurations or as plain torch modules, compiled and
compared with torch: prefill and 32 decode steps. **Functional** is the functional simulator: greedy tokens equal
torch's, logits stay within the error that the operand format explains, and the bits are equal on every number of
devices tried. **Timing** is the timing simulator on the same image. **RTL** is the hardware's source on machine `tiny`,
equal to the functional simulator in every bit. A dash means that no test covers it; `no` means that the test fails.
"""

_REST = """
Installed models with trained weights: `benchmarks/real_models.py` measures them.

## What is not supported

- Mixtures of experts, and encoders alone, such as BERT: `typebar check MODEL` says so in one line.
- Batches of several sequences, speculative decoding.
- Attention whose mask's values show no known kind runs from a table in memory, which grows with the square of the
  context.
- Contexts above 8,192 tokens where attention adds a bias, or where its mask is no elementwise formula of rows and
  columns; contexts above 131,072 with any mask that is a value in the graph. `--context N` names a shorter one.
- Models that compute on data-dependent shapes or with control flow; `typebar check MODEL` names every operation.
- Activations quantised in the graph: dynamically quantised ONNX models keep their int8 weights and scales, and their
  activations are not rounded to int8.
- Dropout, training, and any type other than float32, float16 and bfloat16 for a checkpoint's weights, apart from int8.
"""


@dataclass(frozen=True)
class Cell:
    """The outcome of one test: what it said of it, or that it failed."""

    passed: bool
    detail: str

    def __str__(self) -> str:
        """As the table has it."""
        return (self.detail or "yes") if self.passed else "no"


Table = dict[tuple[str, str], dict[str, Cell]]
"""Cells by (family, frontend) and column, in the order in which they were first recorded."""


def load(path: Path = RECORD) -> Table:
    """What is recorded; empty if nothing is.

    Raises:
        TypebarError: the file is not such a record.
    """
    if not path.exists():
        return {}
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return {
            (row["family"], row["frontend"]): {c: Cell(**row[c]) for c in COLUMNS if row.get(c) is not None}
            for row in rows
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TypebarError(f"{str(path)!r} is no record of tests ({error}): run pytest --record again") from None


def save(table: Table, path: Path = RECORD) -> None:
    """Write a record."""
    rows = []
    for (family, frontend), cells in table.items():
        columns = {name: {"passed": c.passed, "detail": c.detail} for name, c in cells.items()}
        rows.append({"family": family, "frontend": frontend, **columns})
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def page(table: Table) -> str:
    """The page's text."""
    lines = [_line(("family", "frontend", "functional", "timing", "RTL")), "|---" * 5 + "|"]
    lines += [_row(family, frontend, cells) for (family, frontend), cells in table.items()]
    return "\n".join([_HEAD, *lines, _REST.rstrip(), ""])


def _row(family: str, frontend: str, cells: Mapping[str, Cell]) -> str:
    return _line((family, frontend, *(str(cells[name]) if name in cells else "-" for name in COLUMNS)))


def _line(items: Sequence[str]) -> str:
    return f"| {' | '.join(item.replace('|', chr(92) + '|') for item in items)} |"


def main() -> None:
    """Command line: write the page, or check that it is current."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="only compare; status 1 if the page is out of date")
    text = page(load())
    if not parser.parse_args().check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        sys.exit("docs/models.md is out of date: run make docs")


if __name__ == "__main__":
    main()
