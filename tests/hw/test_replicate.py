"""Verilog is no longer than it need be: expressions once, no aliases, numbers that are zero in one digit."""

from __future__ import annotations

import re

from amaranth.hdl import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from typebar.hw.replicate import Shared, convert


class _Sums(wiring.Component):
    """A sum that is described three times, once under another name, and a wide register."""

    def __init__(self) -> None:
        super().__init__({"a": In(8), "b": In(8), "c": Out(9), "d": Out(9), "kept": Out(64)})

    def elaborate(self, platform: object) -> Module:
        m, alias, kept = Module(), Signal(9), Signal(64)
        m.d.comb += [alias.eq(self.a + self.b), self.c.eq(alias), self.d.eq((self.a + self.b) ^ 1)]
        m.d.sync += kept.eq(kept ^ (self.a + self.b))
        m.d.comb += self.kept.eq(kept)
        return m


class _Pair(wiring.Component):
    """Two replicas, one behind the other."""

    def __init__(self) -> None:
        super().__init__({"a": In(8), "b": In(8), "c": Out(9)})

    def elaborate(self, platform: object) -> Module:
        m, shared = Module(), Shared("sums", _Sums())
        m.submodules.first, m.submodules.second = first, second = shared.replica(), shared.replica()
        m.d.comb += [first.a.eq(self.a), first.b.eq(self.b), second.a.eq(first.c), second.b.eq(self.b)]
        m.d.comb += self.c.eq(second.d)
        return m


def test_an_expression_is_written_once_and_an_alias_not_at_all() -> None:
    text = convert(_Sums(), "sums")["sums"]
    assert text.count(" + ") == 1
    assert "alias" not in text
    assert "64'h0;" in text and "h00" not in text
    for port in ("a", "b", "c", "d"):
        assert len(re.findall(rf"^  (?:input|output|wire|reg) (?:\[\d+:0\] )?{port};$", text, re.MULTILINE)) == 1


def test_ports_of_replicas_are_no_wires_of_their_own() -> None:
    modules = convert(_Pair(), "pair")
    assert set(modules) == {"pair", "sums"}
    cells = re.findall(r"^  sums \w+ \(\n(.*?)\);$", modules["pair"], re.MULTILINE | re.DOTALL)
    assert len(cells) == 2 and ".b(b)" in cells[0] and ".b(b)" in cells[1]
    wires = re.findall(r"^  wire (?:\[\d+:0\] )?(\S+)", modules["pair"], re.MULTILINE)
    assert not [name for name in wires if name.startswith(("a", "b", "\\a", "\\b"))]
