"""Measure the points that the area model (`hw.area`) is fitted to, and print how well it fits them.

python benchmarks/area_points.py [--again UNIT ...] [--only UNIT ...] [--print] [-o FILE]

Synthesises each unit at the machines of `POINTS` (Yosys, `hw.synthesis`; hours of CPU for all, most of it the matrix
unit's), writes `hw/area_points.json` after each, and leaves out what the file has, but for the units given as --again:
those whose hardware has changed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from typebar.hw import area
from typebar.hw.synthesis import synthesise, total
from typebar.isa.machine import Machine

_ROWS = "matrix.rows=1 vector.words=131072 vector.align=16 vector.lanes=16 vector.ultra_copies=0"
_U280 = f"u280 matrix.columns=32 matrix.fifo_port_bytes=4096 matrix.dot_latency=25 hbm.fifo_bytes=16777216 {_ROWS}"
_WIDE_ROWS = "vector.words=262144 vector.align=32 vector.lanes=32 vector.ultra_copies=1"
_NARROW = "tiny vector.lanes=2 matrix.vectors=2 matrix.rows="
POINTS: dict[str, list[str]] = {
    "tiny": ["fetch", "ring", "memory", "counters", "ledger", "control block", "registers", "vector", "control"],
    _U280: ["fetch", "ring", "counters", "ledger", "control block", "memory", "vector", "registers", "control"],
    "tiny vector.lanes=4": ["vector", "registers", "ring", "memory"],
    "tiny control.queue_depth=32": ["control", "ledger"],
    "tiny vector.segments=8": ["registers", "control"],
    "tiny hbm.channels=4 matrix.fifo_port_bytes=256": ["fetch", "memory", "counters", "control block"],
    "tiny hbm.channels=4 matrix.fifo_port_bytes=512 hbm.fifo_bytes=16384": ["fetch"],
    f"{_NARROW}1": ["matrix"],
    "tiny matrix.rows=1": ["matrix"],
    f"{_NARROW}2 matrix.fifo_port_bytes=64": ["matrix"],
    f"{_NARROW}1 matrix.lanes=32 matrix.fifo_port_bytes=512": ["matrix"],
    f"{_NARROW}1 matrix.columns=16 matrix.interleave=4 matrix.fifo_port_bytes=512": ["matrix"],
    f"{_NARROW}2": ["matrix"],
    f"{_U280} {_WIDE_ROWS}": ["ring", "memory", "registers", "vector"],
    f"u280 matrix.columns=16 matrix.fifo_port_bytes=2048 matrix.dot_latency=25 hbm.fifo_bytes=8388608 {_ROWS}": [
        "fetch", "ring", "matrix",
    ],
    "u280": ["matrix"],
}  # fmt: skip
"""Machines by their settings, and the units measured there; the quick ones first."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--again", nargs="*", default=[], metavar="UNIT", help="measure these units anew")
    parser.add_argument("--only", nargs="*", default=[], metavar="UNIT", help="measure no others")
    parser.add_argument("--print", action="store_true", help="only print the fit")
    parser.add_argument("-o", "--output", type=Path, default=area.POINTS_FILE, metavar="FILE")
    args = parser.parse_args()
    unknown = [name for name in (*args.again, *args.only) if name not in area.UNITS]
    if unknown:
        parser.error(f"no unit {unknown[0]!r}: choose among {', '.join(area.UNITS)}")
    if not args.print:
        measure(args.output, args.again, args.only)
    show(area.load_points(args.output))


def measure(path: Path, again: list[str], only: list[str]) -> None:
    """Synthesise what is missing in the file."""
    from typebar.hw.report import UNITS

    points = [point for point in area.load_points(path) if point.unit not in again] if path.exists() else []
    for unit, machine in wanted():
        key = area.parameters(machine)
        known = any(point.unit == unit and area.parameters(point.machine()) == key for point in points)
        if known or (only and unit not in only):
            continue
        resources = total(synthesise(UNITS[unit](machine)))
        points.append(area.Point(unit, key, resources))
        rows = [{"unit": p.unit, "parameters": p.parameters, "resources": p.resources} for p in points]
        path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
        print(unit, {kind: number for kind, number in resources.items() if number}, flush=True)


def wanted() -> Iterator[tuple[str, Machine]]:
    """Units and the machines to measure them at."""
    for text, units in POINTS.items():
        name, *settings = text.split()
        machine = Machine.load(name).override(dict(item.split("=", 1) for item in settings))
        for unit in units:
            yield unit, machine


def show(points: list[area.Point]) -> None:
    """Measured, fitted and left out, point by point."""
    table = Table("unit", "machine", "", "measured", "fitted", "error", "left out", title="Area model")
    for row in area.residuals(points):
        if row.measured:
            table.add_row(
                row.unit, row.label, row.kind, f"{row.measured:,.1f}", f"{row.fitted:,.1f}", f"{row.error:+.1%}",
                "" if row.left_out is None else f"{row.left_out:+.1%}",
            )  # fmt: skip
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
