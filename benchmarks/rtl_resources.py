"""Resources of the hardware's small units: Yosys `synth_xilinx -family xcup`, out of context (`hw.synthesis`).

python benchmarks/rtl_resources.py [--json] [UNIT ...]

`typebar rtl --report` does the same for the units of a whole machine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from typebar.hw.arith.add import Adder
from typebar.hw.arith.compare import Comparator
from typebar.hw.arith.convert import (
    Float32FromMemory,
    MemoryFromFloat32,
    OperandFromFloat32,
    OperandFromMemory,
    OperandFromShort,
)
from typebar.hw.arith.dot import AlignedVector, DotUnit
from typebar.hw.arith.multiply import Multiplier
from typebar.hw.synthesis import KINDS, synthesise, total

UNITS: Mapping[str, Callable[[], Any]] = {
    "adder": lambda: Adder(6),
    "multiplier": lambda: Multiplier(6),
    "comparator": lambda: Comparator(4),
    "operand-from-float32": lambda: OperandFromFloat32(2),
    "operand-from-short": lambda: OperandFromShort(2),
    "operand-from-memory": lambda: OperandFromMemory(2),
    "load": lambda: Float32FromMemory(2),
    "store": lambda: MemoryFromFloat32(2),
    "dot-8": lambda: DotUnit(8, 14),
    "dot-64": lambda: DotUnit(64, 17),
    "dot-64-own": lambda: DotUnit(64, 17, own=True),
    "aligned-vector-64": lambda: AlignedVector(64, 17),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("units", nargs="*", metavar="UNIT", help=f"among {', '.join(UNITS)}; all by default")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    unknown = [name for name in args.units if name not in UNITS]
    if unknown:
        parser.error(f"no unit {unknown[0]!r}: choose among {', '.join(UNITS)}")
    figures = {name: total(synthesise(UNITS[name]())) for name in args.units or UNITS}
    if args.json:
        print(json.dumps(figures))
        return
    table = Table("unit", *KINDS, title="Resources on UltraScale+")
    for name, row in figures.items():
        table.add_row(name, *(f"{row[kind]:,.1f}".removesuffix(".0") for kind in KINDS))
    Console().print(table)


if __name__ == "__main__":
    main()
