"""Proofs of the fetch engine, on a small machine: its FIFO is a naive one, its AXI masters obey the rules.

The engine's inputs are free but for three things: R answers what was asked, the consumer frees rows that have arrived,
and, in both, no reset.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from amaranth.hdl import Array, Assert, Assume, Cat, Module, Mux, ResetSignal, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In

from typebar.hw.memory.fetch import FetchEngine, FetchLane, most_freed, port_rows
from typebar.isa.machine import Machine
from typebar.tests.hw.formal.prove import run_sby


class LaneHarness(wiring.Component):
    """A lane beside one array of rows and a counter: row r at r modulo `rows`, read whole and delayed."""

    def __init__(self, rows: int, banks: int, plant: bool = False) -> None:
        self.rows, self.banks, self.plant = rows, banks, plant
        self.dut = FetchLane(rows, banks, 1)
        super().__init__(
            {"valid": In(1), "word": In(1), "advance": In(1), "ask": In(1), "ready": In(1), "place": In(range(rows))}
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        dut, rows, banks = self.dut, self.rows, self.banks
        looks = [memory.read_port(domain="comb") for memory in dut.memories for _ in range(dut.depth)]
        m.submodules.dut = dut
        ahead, naive = Signal(range(rows + 1)), [Signal(name=f"row_{row}") for row in range(rows)]
        valid, word, at = Signal(), Signal(), Signal(range(rows))
        m.d.comb += [
            Assume(~ResetSignal()),
            Assume(self.place < rows),
            Assume(~self.advance | (ahead != 0)),
            Assume(~self.valid | (ahead != rows)),
            dut.r_valid.eq(self.valid),
            dut.r_data.eq(self.word),
            dut.advance.eq(self.advance),
            dut.ask.eq(self.ask),
            dut.ar_ready.eq(self.ready),
            dut.first.eq(self.place % banks if not self.plant else 0),
            Assert(dut.present == (ahead != 0)),
        ]
        for bank in range(banks):
            wraps = (self.place // banks + (self.place % banks > bank)) % dut.depth
            m.d.comb += dut.address.word_select(bank, len(dut.place)).eq(wraps)
        m.d.sync += [ahead.eq(ahead + self.valid - self.advance), valid.eq(self.valid), word.eq(self.word)]
        with m.If(valid):
            m.d.sync += at.eq(Mux(at == rows - 1, 0, at + 1))
            m.d.sync += Array(naive)[at].eq(word)
        m.d.comb += [
            Assert(at < rows),
            Assert(dut.bank == at % banks),
            Assert(dut.place == at // banks),
            Assert(Cat(dut.valid, dut.word, dut.ahead) == Cat(valid, word, ahead)),
        ]
        self._data(m, naive)
        for index, port in enumerate(looks):
            bank, place = divmod(index, dut.depth)
            m.d.comb += [port.addr.eq(place), Assert(port.data == naive[place * banks + bank])]
        return m

    def _data(self, m: Module, naive: list[Signal]) -> None:
        """What was read, two cycles later; the cycles since reset are counted up to that."""
        rows, since, place = self.rows, Signal(range(3)), Signal(range(self.rows))
        m.d.sync += [since.eq(Mux(since == 2, 2, since + 1)), place.eq(self.place)]
        for index in range(self.banks):
            read, later = Signal(name=f"read_{index}"), Signal(name=f"later_{index}")
            m.d.sync += [read.eq(Array(naive)[(self.place + index) % rows]), later.eq(read)]
            m.d.comb += Assert((since < 2) | (self.dut.data[index] == later))


@pytest.mark.parametrize(("rows", "banks"), [(3, 1), (4, 2), (6, 2), (8, 4)])
def test_the_fifo_is_an_array_of_rows(tmp_path: Path, rows: int, banks: int) -> None:
    assert run_sby(LaneHarness(rows, banks), tmp_path, "prove", 4) == "PASS"


def test_rows_in_the_banks_order_are_told_apart(tmp_path: Path) -> None:
    assert run_sby(LaneHarness(4, 2, plant=True), tmp_path, "bmc", 8) == "FAIL"


COUNT_BITS = 4
"""Counters of rows modulo 16; at most eight are between any two."""


class _Engine(FetchEngine):
    """The engine with its lanes in view."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        parameters = machine.fifo_rows, port_rows(machine), 8 * machine.hbm.channel_bytes
        self.lanes = [self.lane.component, *(FetchLane(*parameters) for _ in range(machine.hbm.channels - 1))]
        self._unused = list(self.lanes)

    def new_lane(self) -> FetchLane:
        return self._unused.pop(0)


class EngineHarness(wiring.Component):
    """The engine between channels that take and answer whenever they like and a consumer that frees at will."""

    def __init__(self, machine: Machine, plant: bool = False) -> None:
        self.machine, self.plant = machine, plant
        self.dut = _Engine(machine)
        super().__init__(
            {
                "fetch_valid": In(1),
                "fetch_payload": In(Value.cast(self.dut.fetch.payload).shape()),
                "bases": In(Value.cast(self.dut.bases).shape()),
                "write_slot": In(1),
                "freed": In(range(most_freed(machine) + 1)),
                "ready": In(machine.hbm.channels),
                "answer": In(machine.hbm.channels),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        dut, rows = self.dut, self.machine.fifo_rows
        m.submodules.dut = dut
        asked, freed = Signal(COUNT_BITS), Signal(COUNT_BITS)
        m.d.sync += [asked.eq(asked + dut.fetched.any()), freed.eq(freed + self.freed)]
        arrived, outstanding = _apart(dut.arrived, freed), _apart(asked, freed)
        m.d.comb += [
            Assume(~ResetSignal()),
            Assume(self.freed <= arrived),
            dut.fetch.valid.eq(self.fetch_valid),
            Value.cast(dut.fetch.payload).eq(self.fetch_payload),
            Value.cast(dut.bases).eq(self.bases),
            dut.write_slot.eq(self.write_slot),
            dut.freed.eq(self.freed | self.plant),
            Assert(~dut.fetched.any() | ~self.write_slot),
            Assert(outstanding <= rows),
            # A place is free, or freed in the last cycle, or taken by a row that was asked for.
            Assert(dut.places + dut.freed_before + outstanding == rows),
        ]
        for index, port in enumerate(dut.hbm):
            self._channel(m, index, port, asked, freed)
        return m

    def _channel(self, m: Module, index: int, port: Any, asked: Signal, freed: Signal) -> None:
        """One channel's rules: VALID and the address stay until taken; no more is outstanding than the FIFO holds."""
        dut, lane, rows = self.dut, self.dut.lanes[index], self.machine.fifo_rows
        taken, answered = Signal(COUNT_BITS, name=f"taken_{index}"), Signal(COUNT_BITS, name=f"answered_{index}")
        waits, address = Signal(name=f"waits_{index}"), Signal.like(port.ar.payload.addr, name=f"address_{index}")
        answers = self.answer[index] & (answered != taken)
        m.d.comb += [
            port.ar.ready.eq(self.ready[index]),
            port.r.valid.eq(answers),
            Assert(port.r.ready),
            Assert(~waits | (port.ar.valid & (port.ar.payload.addr == address))),
            Assert(_apart(taken, freed) <= rows),
            # Rows asked for, taken, answered, arrived and freed are in this order, none further apart than the FIFO.
            Assert(_apart(asked, taken) == port.ar.valid),
            Assert(_apart(answered, dut.arrived) == lane.ahead),
            Assert(
                port.ar.valid + _apart(taken, answered) + lane.ahead + _apart(dut.arrived, freed)
                == _apart(asked, freed)
            ),
        ]
        m.d.sync += [
            taken.eq(taken + (port.ar.valid & port.ar.ready)),
            answered.eq(answered + answers),
            waits.eq(port.ar.valid & ~port.ar.ready),
            address.eq(port.ar.payload.addr),
        ]


def _apart(later: Value, earlier: Value) -> Value:
    """How far one counter is ahead of another."""
    return (later[:COUNT_BITS] - earlier)[:COUNT_BITS]


@pytest.mark.parametrize("rows", [4, 6])
def test_the_masters_obey_the_handshake_rules_and_their_credit(tmp_path: Path, rows: int) -> None:
    assert run_sby(EngineHarness(_machine(rows)), tmp_path, "prove", 3) == "PASS"


def test_a_row_freed_twice_is_told_apart(tmp_path: Path) -> None:
    assert run_sby(EngineHarness(_machine(4), plant=True), tmp_path, "bmc", 12) == "FAIL"


def _machine(rows: int) -> Machine:
    """Two channels, a FIFO of a few rows."""
    return Machine.load("tiny").override({"hbm.fifo_bytes": str(rows * Machine.load("tiny").row_bytes)})
