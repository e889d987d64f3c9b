"""The command about the hardware; it loads Amaranth only when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from typebar.host.cli_output import note, print_json, print_table, write_file
from typebar.host.cli_tools import Json
from typebar.isa.errors import TypebarError

if TYPE_CHECKING:
    from typebar.hw.report import Report
    from typebar.isa.machine import Machine


def rtl(
    machine: Annotated[str, typer.Option("--machine", "-m", help="A shipped machine, or a .toml file.")] = "u280",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write Verilog and what Vitis needs into this folder.")
    ] = None,
    report: Annotated[bool, typer.Option("--report", help="Print what the kernel takes of an Alveo U280.")] = False,
    as_json: Json = False,
) -> None:
    """Write a machine's kernel for Vitis, or tell what it takes of an FPGA by unit (Yosys; minutes for a large one)."""
    if report == (output is not None):
        raise TypebarError("give either -o FOLDER, for the kernel, or --report, for what it takes of an FPGA")
    from typebar.isa.machine import Machine

    found = Machine.load(machine)
    if output is not None:
        _write(found, output, as_json)
        return
    note(f"synthesising {found.name}, unit by unit")
    from typebar.hw.report import report as synthesised

    result = synthesised(found)
    if as_json:
        print_json(_mapping(result))
    else:
        _table(result)


def _write(machine: Machine, folder: Path, as_json: bool) -> None:
    """The kernel's files."""
    from typebar.hw.vitis import kernel_files

    note(f"writing the kernel of {machine.name}")
    files = {name: text.encode() for name, text in kernel_files(machine).items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TypebarError(f"folder {str(folder)!r} cannot be made: {error.strerror or error}") from None
    for name, data in files.items():
        write_file(folder / name, data)
    if as_json:
        print_json({"machine": machine.name, "folder": str(folder), "bytes": {k: len(v) for k, v in files.items()}})
    else:
        rows = [(name, f"{len(data):,}") for name, data in files.items()]
        print_table(f"Kernel of {machine.name} in {folder}, not run here", ("file", "bytes"), rows, numbers=(1,))


def _table(result: Report) -> None:
    """Units, their sum, shell, device, DFX."""
    from typebar.hw.report import DFX_SHARE, LIMIT, SHELL, U280
    from typebar.hw.synthesis import KINDS

    def row(name: str, numbers: dict[str, float]) -> tuple[object, ...]:
        return name, *(f"{numbers[kind]:,.1f}".removesuffix(".0") for kind in KINDS)

    def share(name: str, numbers: dict[str, float]) -> tuple[object, ...]:
        return name, *(f"{100 * numbers[kind]:.1f} %" for kind in KINDS)

    rows = [row(name, numbers) for name, numbers in result.rows().items()]
    rows += [
        row("kernel", result.kernel()),
        row("shell (UG1120)", SHELL),
        row("Alveo U280", U280),
        share("kernel and shell, of a U280", result.shares()),
        share("DFX with shell (MICRO 2022), of a U280", DFX_SHARE),
        share("limit", dict.fromkeys(KINDS, LIMIT)),
    ]
    title = f"{result.machine}: Yosys synth_xilinx -family xcup, each unit alone, nothing placed; memories by shape"
    print_table(title, ("unit", *KINDS), rows, numbers=range(1, len(KINDS) + 1))


def _mapping(result: Report) -> dict[str, Any]:
    """All numbers, down to modules."""
    from typebar.hw.report import DFX_SHARE, LIMIT, SHELL, U280

    modules = {
        unit: [{"module": item.name, "instances": item.instances, **item.resources} for item in found]
        for unit, found in result.units.items()
    }
    return {
        "machine": result.machine,
        "units": result.rows(),
        "kernel": result.kernel(),
        "shell": SHELL,
        "device": U280,
        "shares": result.shares(),
        "dfx_shares": DFX_SHARE,
        "limit": LIMIT,
        "modules": modules,
    }
