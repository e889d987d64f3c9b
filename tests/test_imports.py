"""The sub-packages import one another in one direction only, and nothing that pyproject.toml does not declare."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED: dict[str, set[str]] = {
    "isa": set(),
    "compiler": {"isa"},
    "sim": {"isa"},
    "hw": {"isa"},
    "models": {"isa"},
    "host": {"isa", "compiler", "sim", "hw", "models"},
    "": {"isa", "compiler", "sim", "hw", "models", "host"},
}
OUTSIDE = ("tests", "benchmarks", "examples")
"""Folders of scripts and tests: any part of the package, and the development tools too."""


def sources(folder: str) -> list[Path]:
    found = ROOT.glob("*.py") if not folder else (ROOT / folder).rglob("*.py")
    return sorted(path for path in found if "__pycache__" not in path.parts)


def imports(tree: ast.AST, package: tuple[str, ...]) -> Iterator[str]:
    """Dotted names that a module imports, relative ones resolved against its package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def used(path: Path) -> set[str]:
    package = ("typebar", *path.relative_to(ROOT).parent.parts)
    return set(imports(ast.parse(path.read_text(encoding="utf-8"), str(path)), package))


def siblings(names: set[str]) -> set[str]:
    parts = (name.split(".") for name in names)
    return {part[1] for part in parts if part[0] == "typebar" and len(part) > 1 and part[1] in ALLOWED}


def declared(*, development: bool) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = list(project["dependencies"])
    if development:
        texts += [item for items in project["optional-dependencies"].values() for item in items]
    matches = (re.match(r"[A-Za-z0-9_.-]+", text) for text in texts)
    names = {match[0].lower().replace("-", "_") for match in matches if match}
    return names | {"google"} if "protobuf" in names else names


@pytest.mark.parametrize("folder", [name for name in ALLOWED if not name or (ROOT / name).is_dir()])
def test_only_allowed_siblings(folder: str) -> None:
    for path in sources(folder):
        forbidden = siblings(used(path)) - ALLOWED[folder] - {folder}
        assert not forbidden, f"{path.relative_to(ROOT)} imports typebar.{', typebar.'.join(sorted(forbidden))}"


@pytest.mark.parametrize("folder", [*(name for name in ALLOWED if not name or (ROOT / name).is_dir()), *OUTSIDE])
def test_only_declared_packages(folder: str) -> None:
    known = declared(development=folder in OUTSIDE or folder == "hw") | set(sys.stdlib_module_names) | {"typebar"}
    if folder == "compiler":
        known |= {"gguf"}  # of the extra `models`: missing, it makes one line that says so
    if folder == "host":
        known |= {"ray"}  # of the extra `explore`: missing, processes do its work, and a line says so
    if folder in OUTSIDE:
        known |= {"cocotb_tools", "pyside6"}  # come with cocotb and PySide6-WebEngine
        known |= {path.stem for path in (ROOT / folder).glob("*.py")}
    for path in sources(folder):
        for name in used(path):
            top = name.split(".")[0]
            assert top.lower() in known, f"{path.relative_to(ROOT)} imports undeclared {top}"


def test_a_forbidden_import_is_seen() -> None:
    """The checks above can fail: they see plain, from-, nested and relative imports."""
    text = "import typebar.sim.kernels\ndef f():\n    from ..host import api\n    from typebar import compiler\n"
    names = set(imports(ast.parse(text), ("typebar", "isa")))
    assert siblings(names) == {"sim", "host", "compiler"}


def test_every_folder_has_sources() -> None:
    for folder in ("isa", "compiler", "sim", "host", "models"):
        assert sources(folder), f"{folder} has no sources"


def test_every_package_is_installed() -> None:
    """A wheel holds exactly the folders that are packages."""
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {"isa", "compiler", "sim", "hw", "host", "models"}
    found = {path.parent.relative_to(ROOT) for top in folders for path in (ROOT / top).rglob("__init__.py")}
    assert listed == {"typebar", *(".".join(("typebar", *path.parts)) for path in found)}
