"""`pytest --record`: keep what the family tests find, for docs/models.md (`typebar.models.support`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from typebar.models.support import COLUMNS, Cell, load, save

Claim = Callable[[str, str, str, str], None]
"""Called as claim(family, frontend, column, detail); the claim stands if the test passes."""

_CLAIMS = pytest.StashKey[list[tuple[tuple[str, str], str, Cell]]]()
_PASSED = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="write the family tests' outcomes to docs/models.json")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_CLAIMS] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.when == "call":
        item.stash[_PASSED] = report.passed
    return report


@pytest.fixture
def claim(request: pytest.FixtureRequest) -> Iterator[Claim]:
    """Make the claims at the start of a test, and again with details at its end: the last one of a cell counts."""
    made: dict[tuple[tuple[str, str], str], Cell] = {}

    def add(family: str, frontend: str, column: str, detail: str = "") -> None:
        assert column in COLUMNS, f"docs/models.md has no column {column!r}"
        made[(family, frontend), column] = Cell(True, detail)

    yield add
    passed = request.node.stash.get(_PASSED, False)
    request.config.stash[_CLAIMS] += [(key, column, replace(c, passed=passed)) for (key, column), c in made.items()]


def pytest_sessionfinish(session: pytest.Session) -> None:
    claims = session.config.stash[_CLAIMS]
    if session.config.getoption("--record") and claims:
        table = load()
        for key, column, cell in claims:
            table.setdefault(key, {})[column] = cell
        save(table)
