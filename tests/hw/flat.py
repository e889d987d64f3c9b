"""Designs as the test loops want them: plain ports without `__` in their names, and copies that share their code."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from amaranth.hdl import Module, Shape
from amaranth.lib import wiring
from amaranth.lib.wiring import In

from typebar.hw.replicate import Shared

_HEADER = re.compile(r"^module [^;]*\);$", re.MULTILINE)


class Flat(wiring.Component):
    """The ports of `inner`, each called by its path joined with `_`; `widths` gives those of inputs and outputs."""

    def __init__(self, inner: Any) -> None:
        """Wrap `inner`, which goes into this design."""
        self._inner = inner
        self._members = {"_".join(map(str, path)): member for path, member, _ in inner.signature.flatten(inner)}
        self.inputs: dict[str, int] = {}
        self.outputs: dict[str, int] = {}
        for name, member in self._members.items():
            side = self.inputs if member.flow is In else self.outputs
            side[name] = Shape.cast(member.shape).width
        super().__init__({name: member.flow(Shape.cast(member.shape)) for name, member in self._members.items()})

    def elaborate(self, platform: object) -> Module:
        """Wires."""
        m = Module()
        m.submodules.inner = self._inner
        for path, member, value in self._inner.signature.flatten(self._inner):
            port = getattr(self, "_".join(map(str, path)))
            plain = value.as_value() if hasattr(value, "as_value") else value
            m.d.comb += plain.eq(port) if member.flow is In else port.eq(plain)
        return m


def shared_text(shared: Iterable[Shared]) -> str:
    """The modules' Verilog for Verilator, which is to compile each once instead of once for every copy."""
    return "\n".join(_HEADER.sub(r"\g<0> /*verilator no_inline_module*/", item.verilog) for item in shared)
