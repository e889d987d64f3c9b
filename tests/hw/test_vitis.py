"""The kernel for Vitis: its Verilog passes lint, its description names its ports, and u280's is in bounds."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

from typebar.host import cli
from typebar.hw.vitis import KERNEL, WAIVERS, kernel_files
from typebar.isa.errors import TypebarError
from typebar.isa.machine import Machine
from typebar.isa.registers import pointer_address
from typebar.tests.hw.verilate import run_verilator

MOST_BYTES, MOST_SECONDS = 5_000_000, 60
STYLE = {"ASCRANGE", "CASEINCOMPLETE", "CMPCONST", "DECLFILENAME", "PROCASSINIT", "UNSIGNED", "UNUSEDSIGNAL"}
STYLE |= {"VARHIDDEN", "WIDTHEXPAND", "WIDTHTRUNC"}


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Verilator's lint, as the folder's README has it."""
    return run_verilator(["--lint-only", "-Wall", "--top-module", KERNEL, "waivers.vlt", f"{KERNEL}.v"], folder)


def ports(text: str) -> set[str]:
    """Ports of the kernel's module."""
    header = re.search(rf"^module {KERNEL} ?\((.*?)\);", text, re.MULTILINE | re.DOTALL)
    assert header is not None
    return {name.strip() for name in header[1].split(",")}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kernel")
    assert cli.main(["rtl", "--machine", "tiny", "-o", str(folder)]) == 0
    return folder


def test_the_verilog_passes_lint(tiny: Path) -> None:
    assert set(WAIVERS) == STYLE
    done = lint(tiny)
    assert done.returncode == 0, done.stderr[:2000]


def test_lint_sees_what_is_no_style(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "waivers.vlt").write_text((tiny / "waivers.vlt").read_text())
    for body, passes in (("assign b = a;", True), ("wire c; assign b = c;", False)):
        (tmp_path / f"{KERNEL}.v").write_text(f"module {KERNEL}(input a, output b); {body} endmodule\n")
        assert (lint(tmp_path).returncode == 0) == passes


def test_description_scripts_and_verilog_have_the_same_ports(tiny: Path) -> None:
    found, machine = ports((tiny / f"{KERNEL}.v").read_text()), Machine.load("tiny")
    kernel = ElementTree.parse(tiny / "kernel.xml").getroot().find("kernel")
    assert kernel is not None and kernel.get("name") == KERNEL
    described = {str(item.get("name")): item for item in kernel.iter("port")}
    prefixes = {name.rsplit("_", 1)[0] for name in found if not name.startswith("ap_")}
    assert {"ap_clk", "ap_rst_n"} <= found and prefixes == set(described)
    script, link = (tiny / "package_kernel.tcl").read_text(), (tiny / "link.cfg").read_text()
    for name in described:
        assert f"-busif {name} -clock ap_clk" in script
    for argument in kernel.iter("arg"):
        name, port = str(argument.get("name")), str(argument.get("port"))
        assert port in described
        if argument.get("addressQualifier") == "1":
            channel = int(name[3:]) if name.startswith("hbm") else None
            assert int(str(argument.get("offset")), 0) == pointer_address(channel)
            bank = "DDR[0]" if channel is None else f"HBM[{channel}]"
            assert f"sp={KERNEL}_1.{name}:{bank}\n" in link
            width = 512 if channel is None else 8 * machine.hbm.channel_bytes
            assert described[port].get("dataWidth") == str(width)
        else:
            assert link.count(f"{KERNEL}_1.{name}") == 1


def test_bad_requests_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["rtl", "--machine", "tiny"]) == 2
    assert "give either -o FOLDER, for the kernel, or --report" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    wide = {"hbm.channels": "64", "hbm.fifo_bytes": str(1 << 20), "hbm.channel_bytes": "8"}
    with pytest.raises(TypebarError, match="has 64 HBM channels and an Alveo U280 32"):
        kernel_files(Machine.load("tiny").override(wide))


@pytest.mark.long
def test_the_large_machine_is_written_in_bounds(tmp_path: Path) -> None:
    began = sum(os.times()[:4])  # of this process and its children, as other work may share the cores
    assert cli.main(["rtl", "--machine", "u280", "-o", str(tmp_path)]) == 0
    seconds, size = sum(os.times()[:4]) - began, sum(file.stat().st_size for file in tmp_path.iterdir())
    print(f"u280: {size} bytes in {seconds:.1f} s of CPU time")
    done = lint(tmp_path)
    assert done.returncode == 0, done.stderr[:2000]
    assert size <= MOST_BYTES and seconds <= MOST_SECONDS
