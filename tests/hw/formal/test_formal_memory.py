"""Proofs of the memory unit's AXI masters, on a small machine: handshakes, and answers that are all expected.

The slaves take and answer whenever they like; what feeds a master keeps its own rules, which are assumed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from amaranth.hdl import Assert, Assume, Module, Mux, ResetSignal, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In

from typebar.hw.memory.load import LoadEngine
from typebar.hw.memory.write import LineWriter, WriteTracker, answers
from typebar.isa.machine import LINE_BYTES, Machine
from typebar.tests.hw.formal.prove import Opened, run_sby

MACHINE = Machine.load("tiny").override({"hbm.latency": "4", "ddr.latency": "4"})
"""Short latencies: trackers of few places."""
BITS = 5
"""Counters of beats modulo 32; a tracker has eight places."""


def _kept(m: Module, valid: Value, ready: Value, payload: Value, name: str) -> None:
    """Claim of a stream's source: what it offers stays until it is taken."""
    waits, before = Signal(name=f"{name}_waits"), Signal.like(payload, name=f"{name}_before")
    m.d.sync += [waits.eq(valid & ~ready), before.eq(payload)]
    m.d.comb += Assert(~waits | (valid & (payload == before)))


class _Trackers:
    """Stands for the shared tracker: its copies, in view, in the order of the ports."""

    def __init__(self, number: int) -> None:
        self.copies = [Opened(WriteTracker(MACHINE)) for _ in range(number)]
        self._unused = list(self.copies)

    def replica(self) -> Opened:
        return self._unused.pop(0)


class WriterHarness(wiring.Component):
    """The line writer between a packer, which keeps a line until it is taken, and its ports."""

    def __init__(self, plant: bool = False) -> None:
        writer, self.plant = LineWriter(MACHINE), plant
        self.ports = [writer.ddr, *writer.hbm]
        self.trackers = _Trackers(len(self.ports))
        writer.tracker = self.trackers
        self.dut = Opened(writer)
        super().__init__(
            {
                "valid": In(1),
                "line": In(Value.cast(writer.lines.payload).shape()),
                "address_ready": In(len(self.ports)),
                "data_ready": In(len(self.ports)),
                "answer": In(len(self.ports)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.dut = dut = self.dut
        self.waits = waits = Signal()
        before = Signal.like(self.line)
        # Its first two registers: the beats of the line whose address, or data, a port has taken.
        sent_address, sent_data = list(dut.registers.values())[:2]
        line = dut.lines.payload
        m.d.sync += [waits.eq(self.valid & ~dut.lines.ready), before.eq(self.line)]
        m.d.comb += [
            Assume(~ResetSignal()),
            Assume(~waits | (self.valid & ((self.line == before) if not self.plant else 1))),
            dut.lines.valid.eq(self.valid),
            Value.cast(line).eq(self.line),
            Assert(waits | ((sent_address | sent_data) == 0)),
        ]
        beats = len(sent_address)
        bytes_ = LINE_BYTES // beats
        for index, port in enumerate(self.ports):
            beat = (index - 1) % beats if index else 0
            chosen = line.hbm & line.strobe[beat * bytes_ : (beat + 1) * bytes_].any() if index else ~line.hbm
            self._port(m, index, port, chosen, sent_address[beat], sent_data[beat])
        return m

    def _port(self, m: Module, index: int, port: Any, chosen: Value, has_address: Value, has_data: Value) -> None:
        """AW and W are kept until taken; there is one of each for a line; every answer has a place in the tracker."""
        most, level = answers(MACHINE), self.trackers.copies[index].registers["queue.level"]
        addresses, words, answered = (Signal(BITS, name=f"{name}_{index}") for name in ("aw", "w", "b"))
        moved = self.dut.lines.valid & self.dut.lines.ready & chosen
        lines = Signal(BITS, name=f"lines_{index}")
        open_ = Mux(_apart(words, answered) < _apart(addresses, answered), words, addresses)
        m.d.comb += [
            port.aw.ready.eq(self.address_ready[index]),
            port.w.ready.eq(self.data_ready[index]),
            # An answer comes when a beat's address and data have both been taken.
            port.b.valid.eq(self.answer[index] & (open_ != answered)),
            Assert(level == _apart(lines, answered)),
            Assert(level <= most),
            Assert(_apart(addresses, lines) == (has_address & chosen & self.waits)),
            Assert(_apart(words, lines) == (has_data & chosen & self.waits)),
        ]
        m.d.sync += [
            addresses.eq(addresses + (port.aw.valid & port.aw.ready)),
            words.eq(words + (port.w.valid & port.w.ready)),
            answered.eq(answered + (port.b.valid & port.b.ready)),
            lines.eq(lines + moved),
        ]
        _kept(m, port.aw.valid, port.aw.ready, Value.cast(port.aw.payload), f"address_{index}")
        _kept(m, port.w.valid, port.w.ready, Value.cast(port.w.payload), f"data_{index}")


def _apart(later: Value, earlier: Value) -> Value:
    """How far one counter is ahead of another."""
    return (later - earlier)[:BITS]


def test_writes_obey_the_handshake_rules_for_ever(tmp_path: Path) -> None:
    assert run_sby(WriterHarness(), tmp_path, "prove", 3, timeout=200) == "PASS"


def test_a_line_that_changes_is_told_apart(tmp_path: Path) -> None:
    assert run_sby(WriterHarness(plant=True), tmp_path, "bmc", 4, timeout=200) == "FAIL"


class LoadHarness(wiring.Component):
    """The load engine, begun whenever it may be, on a port that takes and answers at will."""

    def __init__(self, plant: bool = False) -> None:
        self.dut, self.plant = LoadEngine(MACHINE), plant
        super().__init__(
            {
                "begin": In(1),
                "load": In(Value.cast(self.dut.load).shape()),
                "ready": In(1),
                "answer": In(1),
                "data": In(Value.cast(self.dut.ddr.r.payload).shape()),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.dut = dut = self.dut
        ar, free = dut.ddr.ar, ~dut.busy | dut.finish
        m.d.comb += [
            Assume(~ResetSignal()),
            dut.begin.eq(self.begin & dut.room & (free if not self.plant else 1)),
            Value.cast(dut.load).eq(self.load),
            ar.ready.eq(self.ready),
            dut.ddr.r.valid.eq(self.answer),
            Value.cast(dut.ddr.r.payload).eq(self.data),
            Assert(~ar.valid | dut.busy),
        ]
        _kept(m, ar.valid, ar.ready, Value.cast(ar.payload), "address")
        return m


def test_load_requests_obey_the_handshake_rules_for_ever(tmp_path: Path) -> None:
    harness = LoadHarness()
    assert run_sby(harness, tmp_path, "prove", 4, timeout=200, shared=[harness.dut.decoder]) == "PASS"


def test_a_load_begun_too_early_is_told_apart(tmp_path: Path) -> None:
    harness = LoadHarness(plant=True)
    assert run_sby(harness, tmp_path, "bmc", 6, shared=[harness.dut.decoder]) == "FAIL"
