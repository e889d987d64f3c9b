"""The matrix unit between a register file and a FIFO in C++, cycle by cycle, in one shared library with Verilator's.

The register file and the FIFO are as late as their contracts allow. Row r of the FIFO can be used when it is given,
not before the row before it, and not before the place it takes has been free for as long as HBM takes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from typebar.hw.matrix.geometry import Geometry
from typebar.hw.ports import file_rows
from typebar.isa.machine import Machine
from typebar.tests.hw.verilate import native_library

U32Array = NDArray[np.uint32]
CAUSES = 32

LOOP = """
#include "Vtop.h"
#include "verilated.h"
#include <algorithm>
#include <cstring>
#include <vector>
double sc_time_stamp() { return 0; }
typedef unsigned u32;
extern "C" long run(long limit, int n, const u32 *payloads, const long *issue, const long *wait, const u32 *tickets,
                    long rows, const u32 *row_data, const long *given, u32 *words, long *start, long *done,
                    long *usable, long *freed_at, u32 *flags, long *causes) {
    VerilatedContext context;
    Vtop top(&context, "bench");
    const int latency = 2;
    std::vector<u32> fifo((size_t)FIFO_ROWS * ROW_WORDS, 0xFFFFFFFFu);
    struct Write { u32 address, mask, data[W]; } writes[latency] = {};
    u32 read[latency][W] = {};
    std::vector<std::vector<u32>> popped(latency, std::vector<u32>(PORT_ROWS * ROW_WORDS));
    long issued = 0, ended = 0, arrived = 0, freed = 0, idle = 0, last_usable = -1;
    top.rst = 1; top.clk = 0; top.eval(); top.clk = 1; top.eval(); top.rst = 0;
    for (long c = 0; c < limit; c++) {
        for (; arrived < rows && given[arrived] <= c; arrived++) {
            if (arrived >= freed + FIFO_ROWS || last_usable >= c) break;
            if (arrived >= FIFO_ROWS && freed_at[arrived - FIFO_ROWS] + 1 + HBM_LATENCY > c) break;
            std::memcpy(&fifo[(arrived % FIFO_ROWS) * ROW_WORDS], row_data + arrived * ROW_WORDS, 4 * ROW_WORDS);
            usable[arrived] = last_usable = c;
        }
        int at = c % latency;
        bool valid = issued < n && issue[issued] <= c && wait[issued] <= ended;
        top.clk = 0;
        top.arrived = arrived & 0xFFFF;
        top.waited = issued % 8 + 9;
        top.issued_valid = valid;
        std::memcpy(&top.issued_payload, payloads + (size_t)PAYLOAD_WORDS * std::min<long>(issued, n - 1),
                    4 * PAYLOAD_WORDS);
        std::memcpy(&top.read_data, read[at], sizeof read[at]);
        std::memcpy(&top.fifo_data, popped[at].data(), 4 * popped[at].size());
        top.eval();
        for (; ended < issued && top.completed == tickets[ended]; ended++) done[ended] = c;
        valid = issued < n && issue[issued] <= c && wait[issued] <= ended;
        top.issued_valid = valid;
        top.eval();
        // A write is seen by addresses presented two cycles later.
        Write &old = writes[at];
        for (int i = 0; i < W; i++)
            if (old.mask >> i & 1) words[old.address * W + i] = old.data[i];
        std::memcpy(read[at], words + top.read_address % FILE_ROWS * W, sizeof read[at]);
        old.address = top.write_address;
        old.mask = top.write_mask;
        std::memcpy(old.data, &top.write_data, sizeof old.data);
        for (int i = 0; i < PORT_ROWS; i++)
            std::memcpy(&popped[at][i * ROW_WORDS], &fifo[(top.fifo_place + i) % FIFO_ROWS * ROW_WORDS],
                        4 * ROW_WORDS);
        for (u32 i = 0; i < top.freed; i++) freed_at[freed++] = c + 1;
        const u32 activity = top.activity, cause = activity >> 1 & 31, waited = activity >> 6 & 31;
        if (top.begins || activity & 1) { causes[waited] += idle; idle = 0; }
        if (activity & 1) causes[cause]++; else idle++;
        if (top.overflow & 1) flags[top.overflow >> 1] |= 1;
        if (top.saturated & 1) flags[top.saturated >> 1] |= 2;
        if (valid && top.issued_ready) start[issued++] = c;
        top.clk = 1;
        top.eval();
        if (ended == n && c > done[n - 1] + 50) return c;
    }
    return -1;
}
"""


@dataclass
class Outcome:
    """What a run did: start and done of each instruction; for each row when it could be used and its place was free;
    flags (bits of `NumericFlag`) by instruction index; cycles by cause, those before the first start included."""

    start: NDArray[np.int64]
    done: NDArray[np.int64]
    usable: NDArray[np.int64]
    freed: NDArray[np.int64]
    flags: U32Array
    causes: NDArray[np.int64]
    words: U32Array


class MatrixModel:
    """The unit of a machine, as the Verilog module `bench` (a `Flat` around it), ready to run."""

    def __init__(self, machine: Machine, verilog: str, payload_bits: int, folder: Path) -> None:
        g = Geometry.of(machine)
        self.machine, self._payload_words = machine, (payload_bits + 31) // 32
        constants: Mapping[str, int] = {
            "W": g.words,
            "FILE_ROWS": file_rows(machine),
            "FIFO_ROWS": machine.fifo_rows,
            "ROW_WORDS": g.row_bytes // 4,
            "PORT_ROWS": g.port_rows,
            "PAYLOAD_WORDS": self._payload_words,
            "HBM_LATENCY": machine.hbm.latency,
        }
        (folder / "bench.v").write_text(verilog)
        (folder / "loop.cpp").write_text("".join(f"#define {k} {v}\n" for k, v in constants.items()) + LOOP)
        self._library = native_library(folder, "loop.cpp")
        self._library.run.restype = ctypes.c_long

    def run(
        self,
        payloads: list[int],
        tickets: list[int],
        issue: NDArray[np.int64],
        wait: NDArray[np.int64],
        rows: NDArray[np.uint8],
        given: NDArray[np.int64],
        words: U32Array,
        limit: int = 2_000_000,
    ) -> Outcome:
        """Run instructions: each is offered from cycle `issue` on, when `wait` instructions are done.

        `rows` [n, row bytes] arrive in order, each not before `given`; `words` are the register file's.
        """
        count = len(payloads)
        packed = np.frombuffer(b"".join(p.to_bytes(4 * self._payload_words, "little") for p in payloads), np.uint32)
        out = Outcome(
            np.full(count, -1, np.int64), np.full(count, -1, np.int64), np.full(len(rows) + 1, -1, np.int64),
            np.full(len(rows) + 1, -1, np.int64), np.zeros(count, np.uint32), np.zeros(CAUSES, np.int64), words.copy(),
        )  # fmt: skip
        arrays = [packed, issue, wait, np.array(tickets, np.uint32), np.ascontiguousarray(rows), given]
        arrays += [out.words, out.start, out.done, out.usable, out.freed, out.flags, out.causes]
        pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in arrays]
        cycles = self._library.run(
            ctypes.c_long(limit), ctypes.c_int(count), *pointers[:4], ctypes.c_long(len(rows)), *pointers[4:]
        )
        assert cycles >= 0, f"hung: started {out.start}, done {out.done}"
        return out
