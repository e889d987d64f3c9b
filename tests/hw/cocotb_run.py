"""Runs a cocotb bench on a design in Verilator."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from cocotb_tools.runner import get_results, get_runner

from typebar.tests.hw.verilate import PCH_OFF, search_path


def run_bench(
    bench: str,
    top: str,
    verilog: str,
    settings: Mapping[str, str],
    environment: Mapping[str, str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[int, int]:
    """How many tests module `bench` of this folder has, and how many failed, on module `top` of the Verilog.

    The bench finds the machine's `settings`, as they override `tiny`, in the variable TYPEBAR_MACHINE of its
    environment, beside those given.
    """
    source, build = folder / f"{top}.v", folder / "build"
    source.write_text(verilog)
    monkeypatch.setenv("PATH", search_path())
    monkeypatch.setenv("MAKEFLAGS", f"-j2 -- {PCH_OFF} OPT_FAST=-O1 OPT_SLOW=-O0")
    runner = get_runner("verilator")
    runner.build(
        sources=[source],
        hdl_toplevel=top,
        build_dir=build,
        build_args=["-O1", "--no-timing", "-Wno-fatal", "-Wno-WIDTH", "-Wno-CASEINCOMPLETE", "-Wno-UNSIGNED"],
    )
    results = runner.test(
        test_module=f"typebar.tests.hw.{bench}",
        hdl_toplevel=top,
        build_dir=build,
        test_dir=folder,
        extra_env={
            "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH", ""), *sys.path])),
            "TYPEBAR_MACHINE": " ".join(f"{key}={value}" for key, value in settings.items()),
            **environment,
        },
    )
    return get_results(results)
