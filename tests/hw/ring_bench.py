"""Ring units, their register files and the links between them in one native model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from amaranth.back import verilog
from amaranth.hdl import (
    Array,
    Cat,
    ClockSignal,
    Const,
    Instance,
    Module,
    Mux,
    ResetSignal,
    Shape,
    Signal,
    Value,
    unsigned,
)
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from typebar.hw.ports import activity_layout, completed_shape, file_rows, link_layout
from typebar.hw.ring import RingUnit, link_cycles
from typebar.isa.instructions import TARGET_BITS
from typebar.isa.machine import Machine
from typebar.isa.timing import LINK_CCW, LINK_CW, Cause, stall
from typebar.tests.hw.native import NativeModel, U32Array

MOST = 5
"""Devices in the bench; a run uses the first `devices` of them."""
UNIT = "ring_unit"
STALLED_BLOCKS = 256
"""Blocks of a link whose stalls the bench knows; their numbers wrap around."""


class RingBench(wiring.Component):
    """`MOST` devices; of each, inputs and outputs by name with its number at the end. All outputs are a cycle late."""

    def __init__(self, machine: Machine, seed: int) -> None:
        self.machine, self.seed, self.unit = machine, seed, RingUnit(machine)
        rows, row_bits = file_rows(machine), 32 * machine.vector.lanes
        members: dict[str, Any] = {
            "devices": In(4), "stalls": In(1), "jitter": In(2 * MOST),
            "load": In(MOST), "load_row": In(range(rows)), "load_data": In(row_bits), "dump_row": In(range(rows)),
        }  # fmt: skip
        self.each_in = {"start": 1, "n": 32, "dst": 32, "a": 32, "pc": TARGET_BITS, "ticket": completed_shape(machine)}
        self.each_out = {
            "ready": 1, "completed": completed_shape(machine), "activity": Shape.cast(activity_layout()).width,
            "writes": 2, "waiting": 1, "mismatch": 1, "mismatch_pc": TARGET_BITS, "dump": row_bits,
        }  # fmt: skip
        for device in range(MOST):
            members |= {f"{name}_{device}": In(width) for name, width in self.each_in.items()}
            members |= {f"{name}_{device}": Out(width) for name, width in self.each_out.items()}
        super().__init__(members)

    def elaborate(self, platform: object) -> Module:
        self._m = m = Module()
        signature = self.unit.signature
        self._units = [signature.create(path=(f"unit_{device}",)) for device in range(MOST)]
        links: dict[tuple[int, str], tuple[Value, Value]] = {}
        for device, unit in enumerate(self._units):
            m.submodules[f"unit_{device}"] = self._cell(unit)
            self._device(device, unit)
            for port, name in ((LINK_CW, "cw"), (LINK_CCW, "ccw")):
                links[device, name] = self._leaves(device, port, name, unit)
        for device, unit in enumerate(self._units):
            before, after = (device - 1) % MOST, (device + 1) % MOST
            last = self.devices == device + 1
            self._arrives(unit, "cw", *self._choose(device == 0, links, "cw", before))
            self._arrives(
                unit, "ccw", *[Mux(last, x, y) for x, y in zip(links[0, "ccw"], links[after, "ccw"], strict=True)]
            )
            # Credits: of the clockwise link out from the unit after, of the other from the unit before.
            clockwise = Mux(last, self._units[0].cw_in_credit, self._units[after].cw_in_credit)
            credits_ = [other.ccw_in_credit for other in self._units]
            other = Array(credits_)[self.devices - 1] if device == 0 else credits_[before]
            m.d.comb += [
                unit.cw_out_credit.eq(self._delayed(clockwise)),
                unit.ccw_out_credit.eq(self._delayed(other)),
            ]
        return m

    def _cell(self, unit: Any) -> Instance:
        """The unit's module, written out once, with the ports of an interface."""
        ports = {
            f"{'i' if member.flow is In else 'o'}_{'__'.join(map(str, path))}": Value.cast(value)
            for path, member, value in unit.signature.flatten(unit)
        }
        return Instance(UNIT, i_clk=ClockSignal(), i_rst=ResetSignal(), **ports)

    def _choose(self, first: bool, links: Any, name: str, before: int) -> tuple[Value, Value]:
        """The link from the device before; of the first, that is the ring's last."""
        if not first:
            valid, beat = links[before, name]
            return valid, beat
        valids, beats = (Array(links[device, name][part] for device in range(MOST)) for part in (0, 1))
        return valids[self.devices - 1], beats[self.devices - 1]

    def _device(self, device: int, unit: Any) -> None:
        """Instruction, register file (as hw/ports.py has its latencies) and outputs."""
        m = self._m
        m.submodules[f"file_{device}"] = memory = Memory(
            shape=unit.read.data.shape(), depth=file_rows(self.machine), init=[]
        )
        read, dump, load = memory.read_port(), memory.read_port(), memory.write_port()
        payload = unit.issued.payload
        fields = {name: getattr(self, f"{name}_{device}") for name in self.each_in}
        m.d.comb += [
            unit.rank.eq(device), unit.devices.eq(self.devices), unit.waited.eq(int(Cause.FETCH)),
            unit.issued.valid.eq(fields["start"]),
            *(payload["values"][index].eq(fields[name]) for index, name in enumerate(("dst", "a", "n"))),
            payload.pc.eq(fields["pc"]), payload.ticket.eq(fields["ticket"]),
            read.addr.eq(unit.read.address), dump.addr.eq(self.dump_row),
            load.en.eq(self.load[device]), load.addr.eq(self.load_row), load.data.eq(self.load_data),
        ]  # fmt: skip
        m.d.sync += unit.read.data.eq(read.data)
        # One row in a cycle, as a segment takes it: with two the second is lost.
        write, first, second = memory.write_port(granularity=1), unit.ring_cw, unit.ring_ccw
        for field in ("address", "mask", "data"):
            target = {"address": write.addr, "mask": write.en, "data": write.data}[field]
            m.d.sync += target.eq(Mux(first.mask.any(), getattr(first, field), getattr(second, field)))
        outputs = {
            "ready": unit.issued.ready, "completed": unit.completed, "activity": unit.activity,
            "writes": Cat(unit.ring_cw.mask.any(), unit.ring_ccw.mask.any()), "waiting": unit.waiting,
            "mismatch": unit.mismatch, "mismatch_pc": unit.mismatch_pc,
        }  # fmt: skip
        m.d.sync += [getattr(self, f"{name}_{device}").eq(value) for name, value in outputs.items()]
        m.d.comb += getattr(self, f"dump_{device}").eq(dump.data)

    def _leaves(self, device: int, port: int, name: str, unit: Any) -> tuple[Value, Value]:
        """The sender's side of a link: stalls before a block's first row; what it accepts."""
        m = self._m
        link = getattr(unit, f"{name}_out")
        table = [stall(self.seed, device, port, index) for index in range(STALLED_BLOCKS)]
        block, held, inside = Signal(8), Signal(5), Signal()
        stalls = Array(Const(value, 5) for value in table)[block]
        accepted = link.valid & link.ready
        stalled = self.stalls & ~inside & (held != stalls)
        m.d.comb += link.ready.eq(~stalled & ~self.jitter[2 * device + (port == LINK_CCW)])
        with m.If(link.valid & stalled):
            m.d.sync += held.eq(held + 1)
        with m.If(accepted):
            m.d.sync += [held.eq(0), inside.eq(~link.payload.last), block.eq(block + link.payload.last)]
        return accepted, link.payload.as_value()

    def _arrives(self, unit: Any, name: str, valid: Value, beat: Value) -> None:
        link = getattr(unit, f"{name}_in")
        width = Shape.cast(link_layout(self.machine)).width
        line = self._delayed(Cat(beat, valid))
        self._m.d.comb += [link.payload.eq(line[:width]), link.valid.eq(line[width])]

    def _delayed(self, value: Value) -> Value:
        """A value `link_cycles` later, through a memory that is read before it is written."""
        m, cycles, width = self._m, link_cycles(self.machine), len(value)
        if cycles == 1:
            register = Signal(width)
            m.d.sync += register.eq(value)
            return register
        m.submodules += (line := Memory(shape=unsigned(width), depth=cycles - 1, init=[]))
        write, read, place = line.write_port(), line.read_port(), Signal(range(max(2, cycles - 1)))
        m.d.sync += place.eq(Mux(place == cycles - 2, 0, place + 1))
        m.d.comb += [write.en.eq(1), write.addr.eq(place), write.data.eq(value), read.addr.eq(place)]
        return read.data


class Ring:
    """The built bench: runs cycles of inputs by name, [cycles] or [cycles, words]; unnamed ones are zero."""

    def __init__(self, machine: Machine, folder: Path, seed: int = 1) -> None:
        self.machine = machine
        bench = RingBench(machine, seed)
        text = verilog.convert(bench, name="bench", emit_src=False)
        text += verilog.convert(bench.unit, name=UNIT, emit_src=False)
        sides: tuple[dict[str, int], dict[str, int]] = {"rst": 1}, {}
        for name, member in bench.signature.members.items():
            sides[member.flow is not In][name] = Shape.cast(member.shape).width
        self._model = NativeModel(text, *sides, folder)

    def run(self, cycles: int, given: dict[str, U32Array]) -> dict[str, U32Array]:
        """Outputs by name, uint32 [cycles] or [cycles, words]."""
        inputs = {name: np.zeros((1, (width + 31) // 32), np.uint32) for name, width in self._model.inputs.items()}
        raw = self._model.run(inputs | given, cycles)
        return {name: value[:, 0] if value.shape[1] == 1 else value for name, value in raw.items()}
