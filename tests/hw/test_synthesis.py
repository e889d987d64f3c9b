"""Resource counts: memories by shape worked out by hand, replicas multiplied, totals and shares of the report."""

from __future__ import annotations

import json
from typing import Any

import pytest
from amaranth.hdl import Module as Design
from amaranth.hdl import signed
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from typer.testing import CliRunner

from typebar.host.cli import app
from typebar.hw import report as reports
from typebar.hw.arith.dsp import multiply_add
from typebar.hw.replicate import Shared
from typebar.hw.synthesis import KINDS, Module, memory_cells, synthesise, total


@pytest.mark.parametrize(
    ("shape", "cells"),
    [
        # 72 x 512 is one block RAM; a word of 32 bits with an enable takes 36 of them.
        ({"width": 72, "depth": 512, "reads": 1, "clocked": True}, {"BRAM": 1}),
        ({"width": 36, "depth": 512, "reads": 1, "clocked": True}, {"BRAM": 0.5}),
        ({"width": 512, "depth": 512, "reads": 2, "clocked": True, "word": 32}, {"BRAM": 16}),
        ({"width": 1, "depth": 16384, "reads": 1, "clocked": True}, {"BRAM": 0.5}),
        ({"width": 512, "depth": 768, "reads": 1, "clocked": True, "style": "ultra"}, {"URAM": 8}),
        ({"width": 72, "depth": 4097, "reads": 1, "clocked": True, "style": "ultra"}, {"URAM": 2}),
        ({"width": 108, "depth": 1024, "reads": 2, "clocked": True, "rom": True}, {"BRAM": 3}),
        # Eight LUTs: 14 bits of 32 words, or 7 bits of 64.
        ({"width": 14, "depth": 32, "reads": 3, "clocked": False}, {"LUT": 24, "FF": 0}),
        ({"width": 8, "depth": 64, "reads": 1, "clocked": True}, {"LUT": 16, "FF": 8}),
        ({"width": 7, "depth": 256, "reads": 1, "clocked": False}, {"LUT": 32, "FF": 0}),
        ({"width": 7, "depth": 256, "reads": 1, "clocked": True, "style": "distributed"}, {"LUT": 32, "FF": 7}),
    ],
)
def test_memories_are_counted_from_their_shapes(shape: dict[str, Any], cells: dict[str, float]) -> None:
    assert memory_cells(**shape) == cells


class _Part(wiring.Component):
    """A register of 8 bits and a memory of 16 words of 512, written in halves."""

    def __init__(self) -> None:
        super().__init__({"a": In(16), "at": In(9), "enable": In(2), "b": Out(8), "c": Out(16)})

    def elaborate(self, platform: object) -> Design:
        m = Design()
        m.submodules.memory = memory = Memory(shape=16, depth=512, init=[])
        write, read = memory.write_port(granularity=8), memory.read_port()
        m.d.comb += [write.addr.eq(self.at), write.data.eq(self.a), write.en.eq(self.enable)]
        m.d.comb += [read.addr.eq(self.at), self.c.eq(read.data)]
        m.d.sync += self.b.eq(self.a[:8] ^ self.a[8:])
        return m


class _Whole(wiring.Component):
    """Three replicas, and a register of their sum's bits."""

    def __init__(self) -> None:
        super().__init__({"a": In(16), "at": In(9), "enable": In(2), "b": Out(24), "c": Out(16)})

    def elaborate(self, platform: object) -> Design:
        m, shared = Design(), Shared("part", _Part())
        last: Any = self.a
        for index in range(3):
            m.submodules[f"part_{index}"] = part = shared.replica()
            m.d.comb += [part.a.eq(last), part.at.eq(self.at), part.enable.eq(self.enable)]
            m.d.comb += self.b[8 * index : 8 * index + 8].eq(part.b)
            last = part.c
        m.d.sync += self.c.eq(last)
        return m


def test_replicas_are_synthesised_once_and_multiplied() -> None:
    modules = {item.name: item for item in synthesise(_Whole())}
    assert {name: item.instances for name, item in modules.items()} == {"synthesised": 1, "part": 3}
    assert modules["part"].resources == {"LUT": 8, "FF": 8, "DSP": 0, "BRAM": 0.5, "URAM": 0}
    assert total(modules.values()) == {"LUT": 24, "FF": 24 + 16, "DSP": 0, "BRAM": 1.5, "URAM": 0}


class _Slices(wiring.Component):
    """Two products of either sign, added to one another and to a number, registers and all."""

    def __init__(self) -> None:
        super().__init__({"a": In(24), "b": In(17), "signs": In(2), "c": In(signed(40)), "d": Out(signed(43))})

    def elaborate(self, platform: object) -> Design:
        m = Design()
        one, two = ({"negative": self.signs[side], "off": self.b[side]} for side in range(2))
        below = multiply_add(m, "one", self.a, self.b, signed(42), c=self.c, before=1, behind=1, **one)
        total = multiply_add(m, "two", self.a, self.b, signed(43), pcin=below, before=2, behind=1, **two)
        m.d.comb += self.d.eq(total)
        return m


def test_a_slice_counts_as_one_with_its_adder_and_registers() -> None:
    """But one of the second's mode, which has one register in a slice, is outside."""
    assert total(synthesise(_Slices())) == {"LUT": 0, "FF": 2, "DSP": 2, "BRAM": 0, "URAM": 0}


def _report(*_: object) -> reports.Report:
    parts = [Module("a", 10, dict(zip(KINDS, (100.0, 200.0, 3.0, 0.5, 1.0), strict=True)))]
    return reports.Report("some", {"matrix": parts, "ring": parts}, {"LUT": 7})


def test_the_report_adds_units_and_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _report()
    assert found.kernel() == {"LUT": 2007, "FF": 4000, "DSP": 60, "BRAM": 10, "URAM": 20}
    assert found.shares()["BRAM"] == pytest.approx((10 + reports.SHELL["BRAM"]) / 2016)
    monkeypatch.setattr(reports, "report", _report)
    shown = CliRunner().invoke(app, ["rtl", "--report", "--machine", "tiny", "--json"])
    assert shown.exit_code == 0
    values = json.loads(shown.stdout)
    assert values["kernel"] == found.kernel() and values["units"]["ports"]["LUT"] == 7
    assert values["modules"]["ring"][0]["instances"] == 10
    table = CliRunner().invoke(app, ["rtl", "--report", "--machine", "tiny"])
    assert table.exit_code == 0 and "2,007" in table.stdout and "39.9 %" in table.stdout
