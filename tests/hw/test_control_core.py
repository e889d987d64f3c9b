"""Builds the control core with Verilator and runs control_bench.py on it, machine by machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from amaranth.back import verilog

from typebar.hw.control.core import ControlCore
from typebar.isa.errors import TypebarError
from typebar.isa.machine import Machine
from typebar.tests.hw.cocotb_run import run_bench
from typebar.tests.hw.flat import shared_text

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
    text = verilog.convert(core, name="control_core", strip_internal_attrs=True) + shared_text(core.shared)
    environment = {
        "TYPEBAR_SEEDS": os.environ.get("TYPEBAR_SEEDS", f"0 {20 * SCALE}"),
        "TYPEBAR_STOPS": str(60 * SCALE),
    }
    results = run_bench("control_bench", "control_core", text, settings, environment, tmp_path, monkeypatch)
    assert results == (3, 0)


@pytest.mark.parametrize("setting", ["control.branch_cycles=2", "control.read_latency=3"])
def test_a_pipeline_that_cannot_keep_the_contract_is_refused(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ControlCore, "_MustUse__silence", True)
    key, value = setting.split("=")
    with pytest.raises(TypebarError, match=key):
        ControlCore(Machine.load("tiny").override({key: value}))
