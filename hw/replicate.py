"""Components that are emitted once as a Verilog module and instantiated many times.

Amaranth writes a component out again for every copy. A `Shared` component is written once; its replicas are cells.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from amaranth.back import verilog
from amaranth.hdl import ClockSignal, Instance, ResetSignal, Shape
from amaranth.lib import wiring

_met: list[list[Shared]] = []
"""Shared components instantiated so far in each conversion under way, innermost last."""


class Shared:
    """A component, and the name of the Verilog module that stands for it."""

    def __init__(self, name: str, component: wiring.Component) -> None:
        """`component` is for description alone: it goes into no design itself."""
        self.name = name
        self.component = component
        self.parts: list[Shared] = []
        """What the module instantiates in turn; known with its text."""

    @cached_property
    def verilog(self) -> str:
        """The module's text, to be put once beside that of whatever instantiates it."""
        text, self.parts = _convert(self.component, self.name)
        return text

    def replica(self) -> Replica:
        """One more copy."""
        return Replica(self)


class Replica(wiring.Component):
    """A copy of a shared component: the same ports, each a plain signal, without the fields of its layout."""

    def __init__(self, shared: Shared) -> None:
        """A copy of `shared`, whose own component stays as it is."""
        self._shared = shared
        members = shared.component.signature.members
        super().__init__({name: member.flow(Shape.cast(member.shape)) for name, member in members.items()})

    def elaborate(self, platform: object) -> Any:
        """One cell, in whatever module holds the copy."""
        ports = {
            f"{'i' if member.flow is wiring.In else 'o'}_{name}": getattr(self, name)
            for name, member in self.signature.members.items()
        }
        text = self._shared.verilog
        if _met:
            _met[-1].append(self._shared)
        for name, signal in (("clk", ClockSignal()), ("rst", ResetSignal())):
            if f"input {name};" in text:
                ports[f"i_{name}"] = signal
        return Instance(self._shared.name, **ports)


def _convert(component: wiring.Component, name: str) -> tuple[str, list[Shared]]:
    """Verilog of a component as module `name`, and the shared components in it."""
    _met.append([])
    try:
        text: str = verilog.convert(component, name=name, emit_src=False, strip_internal_attrs=True)
    finally:
        met = _met.pop()
    return text, list({id(shared): shared for shared in met}.values())


def convert(component: wiring.Component, name: str) -> dict[str, str]:
    """Verilog of a component and of every shared module below it, by name, `name` first.

    Raises:
        ValueError: two different shared components have one name.
    """
    text, parts = _convert(component, name)
    modules = {name: text}
    while parts:
        shared = parts.pop()
        if modules.setdefault(shared.name, shared.verilog) != shared.verilog:
            raise ValueError(f"two different shared modules are called {shared.name}")
        parts += shared.parts
    return modules
