"""`pytest --record`: keep what the family tests find, for docs/models.md (`typebar.models.support`)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from typebar.models.support import COLUMNS, Cell, Table, load, save

Claim = Callable[[str, str, str, str], None]
"""Called as claim(family, frontend, column, detail); the claim stands if the test passes."""

_CLAIM = "claim"
"""Claims travel in the tests' reports as properties of this name: from the workers, too, when there are several."""


class Recorder:
    """Keeps the claims of the reports that come by, and writes them down at the end."""

    def __init__(self) -> None:
        self.claims: Table = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            for name, value in report.user_properties:
                if name == _CLAIM:
                    family, frontend, column, detail = value  # type: ignore[misc]
                    self.claims.setdefault((family, frontend), {})[column] = Cell(report.passed, detail)

    def pytest_sessionfinish(self) -> None:
        if self.claims:
            table = load()
            for key, cells in self.claims.items():
                table.setdefault(key, {}).update(cells)
            save(table)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="write the family tests' outcomes to docs/models.json")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record") and not hasattr(config, "workerinput"):  # a worker of pytest-xdist has that
        config.pluginmanager.register(Recorder())


@pytest.fixture
def claim(record_property: Callable[[str, object], None]) -> Claim:
    """Make the claims at the start of a test, and again with details at its end: the last one of a cell counts."""

    def add(family: str, frontend: str, column: str, detail: str = "") -> None:
        assert column in COLUMNS, f"docs/models.md has no column {column!r}"
        record_property(_CLAIM, (family, frontend, column, detail))

    return add
