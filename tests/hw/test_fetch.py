"""Builds the fetch engine with Verilator and runs fetch_bench.py on it, machine by machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from amaranth.back import verilog

from typebar.hw.memory.fetch import LEAST_LATENCY, FetchEngine
from typebar.isa.errors import TypebarError
from typebar.isa.machine import Machine
from typebar.tests.hw.cocotb_run import run_bench

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
    text = verilog.convert(engine, name="fetch_engine", strip_internal_attrs=True) + engine.lane.verilog
    environment = {"TYPEBAR_FETCH_SCALE": str(SCALE)}
    results = run_bench("fetch_bench", "fetch_engine", text, MACHINES[name], environment, tmp_path, monkeypatch)
    assert results == (2, 0)


def test_a_memory_faster_than_the_pipeline_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FetchEngine, "_MustUse__silence", True)
    with pytest.raises(TypebarError, match=r"hbm\.latency"):
        FetchEngine(Machine.load("tiny").override({"hbm.latency": str(LEAST_LATENCY - 1)}))
