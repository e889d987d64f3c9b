"""Figures that the first issue asks for, by the commands in benchmarks/ that print them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.long, pytest.mark.alone]


def figures(script: str) -> dict[str, Any]:
    command = [sys.executable, f"benchmarks/{script}", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_functional_simulator_keeps_a_quarter_of_torchs_speed() -> None:
    assert figures("functional_speed.py")["speed_ratio"] >= 0.25


def test_simulating_gpt2_xl_is_quick_and_small() -> None:
    report = figures("simulate_xl.py")
    assert report["command_s"] <= 60
    assert report["peak_memory_mb"] <= 4096
    assert report["device_cycles_per_s"] >= 20e6
    assert report["program_bytes"] <= 64 * 1024


def test_dfx_is_reproduced_within_five_minutes() -> None:
    report = figures("dfx.py")
    assert report["cpu_s"] <= 300
    assert len(report["figures"]) == 30 and len(report["leave_one_out"]) == 5
    held_out = [row for row in report["figures"] if row["status"] == "held out"]
    assert len(held_out) == 4 and all(abs(row["error"]) <= 5 for row in held_out)


def test_the_planner_chooses_what_the_simulator_finds_best() -> None:
    report = figures("planner.py")
    assert len(report["points"]) == 6 * 6 * 2 * 2
    assert report["behind_best"] <= 0.03
    assert report["model_error"] <= 0.1
