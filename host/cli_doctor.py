"""`typebar doctor`: what is installed, which device `auto` would take and why, and what is missing."""

from __future__ import annotations

import os
import platform
import re
import shutil
from importlib import metadata
from typing import Annotated, Any

import typer

from typebar.host.cli_errors import FAILED
from typebar.host.cli_output import print_facts, print_json, print_table
from typebar.host.cli_tools import Json

_TOOLS = {
    "g++": "compiling simulations of the hardware",
    "make": "make demo, make test",
    "perl": "compiling simulations of the hardware",
    "verilator": "simulating the hardware's source",
}
_REQUIREMENT = re.compile(r"([A-Za-z0-9_.-]+)(?:\[[^]]*\])?\s*(?:(==|>=)\s*([0-9][0-9A-Za-z.]*))?")


def doctor(
    as_json: Json = False,
    devices: Annotated[bool, typer.Option(help="Also look for devices (imports torch).")] = True,
) -> None:
    """Check this machine: packages, tools, devices, memory and disk."""
    packages = [_package(text) for text in metadata.requires("typebar") or []]
    problems = [f"package {p['name']} {p['wanted']}: {p['problem']}" for p in packages if p["problem"]]
    report: dict[str, Any] = {
        "typebar": metadata.version("typebar"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "memory_free_bytes": _free_memory(),
        "disk_free_bytes": shutil.disk_usage(os.curdir).free,
        "packages": packages,
        "tools": [
            {"name": name, "path": shutil.which(name), "needed_for": purpose} for name, purpose in _TOOLS.items()
        ],
        "auto": None,
        "devices": [],
    }
    if devices:
        report |= _devices(problems)
    report |= {"problems": problems, "ok": not problems}
    if as_json:
        print_json(report)
    else:
        _print(report)
    if problems:
        raise typer.Exit(FAILED)


def _package(text: str) -> dict[str, Any]:
    """A declared requirement and what is installed of it."""
    match = _REQUIREMENT.match(text)
    assert match is not None
    name, relation, wanted = match.groups()
    try:
        installed: str | None = metadata.version(name)
    except metadata.PackageNotFoundError:
        installed = None
    optional = "extra ==" in text
    problem = None
    if installed is None:
        problem = None if optional else "not installed"
    elif relation is not None and not _satisfies(installed, relation, wanted):
        problem = f"{installed} is installed"
    shown = f"{relation or ''}{wanted or ''}"
    return {"name": name, "wanted": shown, "installed": installed, "optional": optional, "problem": problem}


def _satisfies(installed: str, relation: str, wanted: str) -> bool:
    """Whether a version meets == or >=, by its numbers; local suffixes such as +cpu do not count."""
    have, need = _numbers(installed), _numbers(wanted)
    return have == need if relation == "==" else have >= need


def _numbers(version: str) -> tuple[int, ...]:
    numbers = [int(part) for part in re.findall(r"\d+", version.partition("+")[0])]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _free_memory() -> int | None:
    """Bytes that a new process could use, where the system tells."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = re.search(r"MemAvailable:\s+(\d+) kB", file.read())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _devices(problems: list[str]) -> dict[str, Any]:
    """The devices in the order in which `auto` tries them."""
    try:
        from typebar.host.select import survey

        found = survey()
    except ImportError as error:
        problems.append(f"devices cannot be looked for: {error}")
        return {}
    taken = next((item.name for item in found if item.available), None)
    listed = [{"name": item.name, "available": item.available, "reason": item.reason} for item in found]
    return {"auto": taken, "devices": listed}


def _print(report: dict[str, Any]) -> None:
    memory = report["memory_free_bytes"]
    rows = [
        ("typebar", report["typebar"]),
        ("Python", report["python"]),
        ("platform", report["platform"]),
        ("processors", report["cpus"]),
        ("free memory", "unknown" if memory is None else f"{memory / 2**30:.1f} GiB"),
        ("free disk", f"{report['disk_free_bytes'] / 2**30:.1f} GiB"),
    ]
    print_facts("System", rows)
    packages = [
        (p["name"], p["wanted"], p["installed"] or "-", p["problem"] or ("optional" if p["optional"] else "ok"))
        for p in report["packages"]
    ]
    print_table("Packages", ("name", "wanted", "installed", ""), packages)
    tools = [(t["name"], t["path"] or "not found", t["needed_for"]) for t in report["tools"]]
    print_table("Tools", ("name", "where", "needed for"), tools)
    if report["devices"]:
        listed = [(d["name"], "yes" if d["available"] else "no", d["reason"]) for d in report["devices"]]
        print_table(f"Devices: auto takes {report['auto'] or 'none'}", ("name", "works", "why"), listed)
    for problem in report["problems"]:
        print(f"problem: {problem}")
    print("ready" if report["ok"] else "not ready")
