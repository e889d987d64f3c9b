"""Runs arrays of inputs through a Verilog module: Verilator's C++ and a loop, in one shared library.

For units whose test is millions of vectors and no protocol; whatever has a handshake is tested in cocotb.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from typebar.tests.hw.verilate import native_library

U32Array = NDArray[np.uint32]

LOOP = """
#include "Vtop.h"
#include "verilated.h"
#include <cstring>
double sc_time_stamp() {{ return 0; }}
// Inputs and outputs are packed into words of 32 bits, ports in order, n sets one after another.
extern "C" void run(long n, const unsigned *in, unsigned *out) {{
    VerilatedContext context;
    Vtop top(&context, "bench");
    for (long i = 0; i < n; i++) {{
        top.clk = 0;
{inputs}
        top.eval();
        top.clk = 1;
        top.eval();
{outputs}
    }}
}}
"""


def _words(width: int) -> int:
    return (width + 31) // 32


class NativeModel:
    """A Verilog module `bench` with ports `clk`, inputs and outputs, given by name and width in bits."""

    def __init__(self, verilog: str, inputs: Mapping[str, int], outputs: Mapping[str, int], folder: Path) -> None:
        self.inputs, self.outputs = dict(inputs), dict(outputs)
        (folder / "bench.v").write_text(verilog)
        copies: dict[str, str] = {}
        for name, ports in (("inputs", self.inputs), ("outputs", self.outputs)):
            lines, at = [], 0
            for port, width in ports.items():
                bytes_ = 1 if width <= 8 else 2 if width <= 16 else 4 * _words(width)
                sides = (f"&top.{port}", f"in + {at}") if name == "inputs" else (f"out + {at}", f"&top.{port}")
                lines.append(f"        std::memcpy({sides[0]}, {sides[1]}, {bytes_});")
                at += _words(width)
            lines.append(f"        {'in' if name == 'inputs' else 'out'} += {at};")
            copies[name] = "\n".join(lines)
        (folder / "loop.cpp").write_text(LOOP.format(**copies))
        self._library = native_library(folder, "loop.cpp")

    def run(self, inputs: Mapping[str, U32Array], cycles: int) -> dict[str, U32Array]:
        """Outputs by name, uint32 [cycles, words], read after each rising edge; an input row [n, words] a cycle.

        Inputs shorter than `cycles` are continued with zeros.
        """
        rows = []
        for name, width in self.inputs.items():
            words = np.zeros((cycles, _words(width)), np.uint32)
            given = inputs[name].reshape(len(inputs[name]), -1)
            words[: len(given)] = given
            rows.append(words)
        packed = np.ascontiguousarray(np.concatenate(rows, axis=1))
        out = np.zeros((cycles, sum(map(_words, self.outputs.values()))), np.uint32)
        self._library.run(
            ctypes.c_long(cycles), packed.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p)
        )
        edges = np.cumsum([_words(width) for width in self.outputs.values()])[:-1]
        return dict(zip(self.outputs, np.split(out, edges, axis=1), strict=True))
