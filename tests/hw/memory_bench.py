"""The memory unit alone, compiled: instructions from a list, a register file, DDR and HBM in C++ (memory_bench.cpp).

The register file is as slow as it may be: a write is invisible for as long as WRITE_CYCLES allows. Memories answer
after a fixed time and hold a write back until they answer it; with a seed every channel hesitates at random as well.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from amaranth.back import verilog
from amaranth.hdl import Cat, Module, Shape
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from numpy.typing import NDArray

from typebar.hw.control.core import issued_layout
from typebar.hw.control.decoder import slot
from typebar.hw.control.tickets import Domain
from typebar.hw.memory.unit import MemoryUnit, read_limit, write_limit
from typebar.isa.instructions import MODIFIER_BASE, OPERAND_BASE, Kind, Region
from typebar.isa.machine import Machine
from typebar.isa.program import Op, encode_op
from typebar.tests.hw.flat import shared_text
from typebar.tests.hw.verilate import native_library

SOURCE = Path(__file__).with_name("memory_bench.cpp")
_CHANNEL = (
    ("aw", "valid", Out), ("aw", "ready", In), ("aw", "addr", Out), ("w", "valid", Out), ("w", "ready", In),
    ("w", "data", Out), ("w", "strb", Out), ("b", "valid", In), ("b", "ready", Out), ("b", "resp", In),
)  # fmt: skip


class Flat(wiring.Component):
    """The unit with plain ports, those of all HBM channels side by side."""

    def __init__(self, machine: Machine) -> None:
        self.unit = unit = MemoryUnit(machine)
        read = unit.ddr_read
        self._plain: dict[str, tuple[Any, Any]] = {
            "payload": (In, unit.memory.payload), "valid": (In, unit.memory.valid), "ready": (Out, unit.memory.ready),
            "waited": (In, unit.waited), "completed": (Out, unit.completed), "bases": (In, unit.bases),
            "write_slot": (In, unit.write_slot), "read_address": (Out, unit.read.address),
            "read_data": (In, unit.read.data), "write_address": (Out, unit.write.address),
            "write_mask": (Out, unit.write.mask), "write_data": (Out, unit.write.data),
            "scalar_valid": (Out, unit.scalar_valid), "scalar_data": (Out, unit.scalar_data),
            "saturated": (Out, unit.saturated.raised), "saturated_pc": (Out, unit.saturated.pc),
            "active": (Out, unit.activity.active), "cause": (Out, unit.activity.cause),
            "blamed": (Out, unit.activity.waited), "error": (Out, unit.error),
            "ar_valid": (Out, read.ar.valid), "ar_ready": (In, read.ar.ready), "ar_addr": (Out, read.ar.payload.addr),
            "r_valid": (In, read.r.valid), "r_ready": (Out, read.r.ready), "r_data": (In, read.r.payload.data),
            "r_resp": (In, read.r.payload.resp),
        }  # fmt: skip
        for name, ports in (("ddr", [unit.ddr_write]), ("hbm", list(unit.hbm_write))):
            for channel, field, flow in _CHANNEL:
                values = []
                for port in ports:
                    side = getattr(port, channel)
                    values.append(getattr(side if field in ("valid", "ready") else side.payload, field))
                self._plain[f"{name}_{channel}_{field}"] = (flow, Cat(values))
        super().__init__({name: flow(len(Cat(value))) for name, (flow, value) in self._plain.items()})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.unit = self.unit
        for name, (flow, value) in self._plain.items():
            port = getattr(self, name)
            m.d.comb += Cat(value).eq(port) if flow is In else port.eq(Cat(value))
        return m


class _Settings(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in (
        "read_latency", "ddr_latency", "hbm_latency", "period", "seed", "bad_read", "bad_ddr", "bad_hbm")]  # fmt: skip
    _fields_ += [("limit", ctypes.c_int64)]


@dataclass
class Outcome:
    """What a run did. Cycles by instruction; `scalars` [n, 2] cycle and word; `causes` cycles by `Cause`; `blamed` the
    cause told for the idle time before an instruction, -1 if there was none; `saturated` the first index, or -1."""

    cycles: int
    starts: NDArray[np.int64]
    dones: NDArray[np.int64]
    scalars: NDArray[np.int64]
    causes: NDArray[np.int64]
    blamed: NDArray[np.int64]
    saturated: int
    errors: int


class MemoryBench:
    """A machine's memory unit, compiled in `folder`."""

    def __init__(self, machine: Machine, folder: Path) -> None:
        self.machine = machine
        flat = Flat(machine)
        self.layout = issued_layout(machine, Domain.MEMORY)
        self.base_bits = Shape.cast(flat.unit.bases.shape()).width // len(Region)
        texts = [verilog.convert(flat, name="bench", emit_src=False), shared_text(flat.unit.shared)]
        (folder / "bench.v").write_text("\n".join(texts))
        hbm, words = machine.hbm, (len(flat.unit.memory.payload.as_value()) + 31) // 32
        defines = {
            "LANES": machine.vector.lanes,
            "CHANNELS": hbm.channels,
            "CHANNEL_BYTES": hbm.channel_bytes,
            "TICKET_BITS": len(flat.unit.completed),
            "PAYLOAD_WORDS": words,
            "BASES_WORDS": (len(flat.bases) + 31) // 32,
            "DDR_BITS": len(flat.ar_addr),
            "HBM_BITS": len(flat.hbm_aw_addr) // hbm.channels,
        }
        self.payload_words = words
        self._library = self._build(flat, defines, folder)

    @staticmethod
    def _build(flat: Flat, defines: dict[str, int], folder: Path) -> Any:
        copies: dict[str, list[str]] = {"drive": [], "sample": []}
        at = {"IN": 0, "OUT": 0}
        for name, member in flat.signature.members.items():
            width = Shape.cast(member.shape).width
            side, function = ("IN", "drive") if member.flow is In else ("OUT", "sample")
            size = 1 if width <= 8 else 2 if width <= 16 else 4 if width <= 32 else 8 if width <= 64 else None
            size = size or (width + 31) // 32 * 4
            ends = (f"&top.{name}", f"words + {at[side]}")
            target, source = ends if side == "IN" else reversed(ends)
            copies[function].append(f"    std::memcpy({target}, {source}, {size});")
            defines[f"{side}_{name}"] = at[side]
            at[side] += (width + 31) // 32
        defines |= {f"{side}_WORDS": count for side, count in at.items()}
        text = '#include "Vtop.h"\n#include "verilated.h"\n#include <cstring>\n'
        text += "".join(f"#define {name} {value}\n" for name, value in defines.items())
        text += "static void drive(Vtop &top, const unsigned *words) {\n" + "\n".join(copies["drive"]) + "\n}\n"
        text += "static void sample(Vtop &top, unsigned *words) {\n" + "\n".join(copies["sample"]) + "\n}\n"
        (folder / "bench.cpp").write_text(text + SOURCE.read_text())
        return native_library(folder, "bench.cpp", quick_build=True)

    def payload(self, op: Op, index: int) -> NDArray[np.uint32]:
        """An instruction, its operands all immediate, as the control core hands it over."""
        word = int.from_bytes(encode_op(op), "little")
        values = [0] * self.layout["values"].shape.length
        for item in op.kind.fields:
            if item.kind is Kind.OPERAND:
                values[slot(op.kind.name, item.name)] = op.get(item.name).immediate  # type: ignore[union-attr]
        fields = {
            "opcode": op.kind.opcode,
            "modifiers": (word & (1 << OPERAND_BASE) - 1) >> MODIFIER_BASE,
            "values": sum((value & 0xFFFFFFFF) << 32 * place for place, value in enumerate(values)),
            "pc": index,
            "ticket": (index + 1) % (1 << self.layout["ticket"].shape.width),
        }
        bits = sum(value << self.layout[name].offset for name, value in fields.items())
        return np.frombuffer(bits.to_bytes(4 * self.payload_words, "little"), np.uint32)

    def run(
        self,
        ops: Sequence[Op],
        gaps: NDArray[np.int32],
        waits: NDArray[np.int32],
        waited: NDArray[np.uint32],
        bases: Sequence[int],
        registers: NDArray[np.uint32],
        ddr: NDArray[np.uint8],
        hbm: NDArray[np.uint8],
        stalls: NDArray[np.int32] | None = None,
        seed: int = 0,
        bad: tuple[int, int, int] = (-1, -1, -1),
    ) -> Outcome:
        """Run instructions; `registers`, `ddr` and `hbm` [channels, bytes] change in place.

        An instruction is offered `gaps` cycles after the start before it or later, once `waits` instructions are done.
        `stalls`: cycles that each requested line waits for. `seed`: disorder, unless 0. `bad`: numbers of the R of DDR,
        the B of DDR and the B of HBM channel 0 that are errors.
        """
        n = len(ops)
        payloads = np.stack([self.payload(item, index) for index, item in enumerate(ops)])
        packed = sum(base << self.base_bits * place for place, base in enumerate(bases))
        words = np.frombuffer(packed.to_bytes(8 * len(bases), "little"), np.uint32)
        machine = self.machine
        settings = _Settings(
            read_limit(machine), write_limit(machine.ddr.latency), write_limit(machine.hbm.latency),
            machine.hbm.rows_per_write_slot + 1, seed, *bad, 2_000_000,
        )  # fmt: skip
        starts, dones, blamed = (np.full(n, -1, np.int64) for _ in range(3))
        scalars, causes, events = np.full((n, 2), -1, np.int64), np.zeros(32, np.int64), np.array([-1, 0])

        def pointer(array: NDArray[Any] | None) -> Any:
            return None if array is None else array.ctypes.data_as(ctypes.c_void_p)

        self._library.run.restype = ctypes.c_int64
        cycles = self._library.run(
            ctypes.byref(settings), ctypes.c_int64(n), pointer(payloads), pointer(gaps), pointer(waits),
            pointer(waited), pointer(words), pointer(stalls), pointer(registers), pointer(ddr), pointer(hbm),
            ctypes.c_int64(hbm.shape[1]), pointer(starts), pointer(dones), pointer(scalars), pointer(causes),
            pointer(blamed), pointer(events),
        )  # fmt: skip
        return Outcome(cycles, starts, dones, scalars, causes, blamed, int(events[0]), int(events[1]))
