"""Arithmetic units side by side in one native model, and copies in which any one register bit can be inverted."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from amaranth.back import verilog
from amaranth.hdl import Shape
from amaranth.lib.wiring import In
from numpy.typing import NDArray

from typebar.isa.numerics import Format, bits_of
from typebar.isa.numerics.formats import LEAST_EXPONENT
from typebar.tests.hw.native import NativeModel

U32Array = NDArray[np.uint32]

FEW = 400
"""Inputs on which every planted error is tried first."""

_MODULE = re.compile(r"^module .*?^endmodule$", re.MULTILINE | re.DOTALL)
_REGISTER = re.compile(r"^  always @\(posedge clk\)\n    (?P<target>\S+) *<= (?P<value>.+);$", re.MULTILINE)
_WIDTH = re.compile(r"^  reg (?:\[(?P<high>\d+):0\] )?(?P<name>\S+) *(?:=|;)", re.MULTILINE)


def operand_bits(values: NDArray[np.float32], fmt: Format = Format.FP32) -> U32Array:
    """The hardware's 21 bits of operands that lie in memory as `fmt`: significand, exponent, nonzero, sign."""
    bits = bits_of(values)
    field, significand = bits >> 23 & 255, bits >> 13 & 1023 | 1024
    exponent = np.maximum(field, 127 + LEAST_EXPONENT[fmt])
    significand = significand >> np.minimum(exponent - field, 31)
    return np.where(field == 0, 0, significand | exponent << 11 | 1 << 19 | bits >> 31 << 20).astype(np.uint32)


def weight_bits(values: NDArray[np.float32], fmt: Format = Format.FP32) -> U32Array:
    """The hardware's 22 bits of weights that lie in memory as `fmt`: value, step, nonzero, sign."""
    bits = operand_bits(values, fmt)
    value = (bits & 0x7FF) << (bits >> 11 & 3)
    return (value | (bits >> 13 & 63) << 14 | bits >> 19 << 20).astype(np.uint32)


def plant(text: str, first: int) -> tuple[str, list[str]]:
    """Verilog in which `bench.plant == first + i` inverts the i-th register bit, and the bits' names."""
    widths: dict[str, int] = {}
    sites: list[str] = []

    def enter(module: re.Match[str]) -> str:
        widths.clear()
        widths.update({match["name"]: int(match["high"] or 0) + 1 for match in _WIDTH.finditer(module[0])})
        return _REGISTER.sub(edit, module[0])

    def edit(match: re.Match[str]) -> str:
        target, width = match["target"], widths[match["target"]]
        # Numbers below or above the register's shift the one out.
        error = f"({width}'d1 << (bench.plant - 16'd{first + len(sites)}))"
        sites.extend(f"{target}[{bit}]" for bit in range(width))
        return f"  always @(posedge clk)\n    {target} <= ({match['value']}) ^ {error};"

    return _MODULE.sub(enter, text), sites


class Bench:
    """Units by name; ports of the same name get the same inputs. `planted` names units that can be broken.

    Attributes:
        sites: for each planted unit, its breakable register bits by number.
    """

    def __init__(self, units: Mapping[str, Any], folder: Path, planted: tuple[str, ...] = ()) -> None:
        self.units = dict(units)
        self.sites: dict[str, dict[int, str]] = {}
        inputs: dict[str, int] = {"plant": 16}
        outputs: dict[str, int] = {}
        texts, cells, number = [], [], 1
        for name, unit in self.units.items():
            text = verilog.convert(unit, name=name, emit_src=False)
            if name in planted:
                text, bits = plant(text, number)
                self.sites[name] = dict(enumerate(bits, number))
                number += len(bits)
            texts.append(text)
            pins = [".clk(clk)"]
            for port, member in unit.signature.members.items():
                width = Shape.cast(member.shape).width
                if member.flow is In:
                    assert inputs.setdefault(port, width) == width
                    pins.append(f".{port}({port})")
                else:
                    outputs[f"{name}_{port}"] = width
                    pins.append(f".{port}({name}_{port})")
            cells.append(f"  {name} u_{name} ({', '.join(pins)});")
        ports = ["input clk"]
        ports += [
            f"{side} [{w - 1}:0] {p}"
            for side, all_ in (("input", inputs), ("output", outputs))
            for p, w in all_.items()
        ]
        top = f"module bench({', '.join(ports)});\n" + "\n".join(cells) + "\nendmodule\n"
        self._model = NativeModel("\n".join([top, *texts]), inputs, outputs, folder)

    def run(self, planted: int = 0, /, **inputs: U32Array) -> dict[str, dict[str, U32Array]]:
        """Outputs by unit and port, in step with the inputs ([n] or [n, words]; ports left out are 0)."""
        n = max(map(len, inputs.values()))
        cycles = n + max(unit.latency for unit in self.units.values())
        given = {name: np.zeros((1, 1), np.uint32) for name in self._model.inputs} | inputs
        given["plant"] = np.full(cycles, planted, np.uint32)
        for name, width in self._model.inputs.items():
            if name not in inputs and name != "plant":
                given[name] = np.zeros((1, (width + 31) // 32), np.uint32)
        raw = self._model.run(given, cycles)
        results: dict[str, dict[str, U32Array]] = {}
        for name, unit in self.units.items():
            # Read after the edge that ends a cycle: a latency of 1 shows in the same row.
            rows = slice(unit.latency - 1, unit.latency - 1 + n)
            results[name] = {}
            for port, member in unit.signature.members.items():
                if member.flow is not In:
                    values = raw[f"{name}_{port}"][rows]
                    results[name][port] = values[:, 0] if values.shape[1] == 1 else values
        return results


def survivors(bench: Bench, name: str, **inputs: U32Array) -> list[str]:
    """Register bits of a planted unit whose inversion changes nothing at any output.

    All are tried on a few inputs, and those that hide from them on all.
    """
    left = bench.sites[name]
    for count in (FEW, max(map(len, inputs.values()))):
        some = {port: values[:count] for port, values in inputs.items()}
        truth = bench.run(**some)[name]

        def hidden(number: int, some: dict[str, U32Array] = some, truth: dict[str, U32Array] = truth) -> bool:
            broken = bench.run(number, **some)[name]
            return all(np.array_equal(broken[port], values) for port, values in truth.items())

        left = {number: bit for number, bit in left.items() if hidden(number)}
    return list(left.values())
