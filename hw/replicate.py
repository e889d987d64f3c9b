"""Components that are emitted once as a Verilog module and instantiated many times.

Amaranth writes a component out again for every copy. A `Shared` component is written once; its replicas are cells.
"""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any

from amaranth.back import rtlil, verilog
from amaranth.hdl import ClockSignal, Fragment, Instance, ResetSignal, Shape, Value
from amaranth.hdl._ast import SignalDict
from amaranth.hdl._ir import PortDirection, build_netlist
from amaranth.hdl._nir import ModuleNetFlow
from amaranth.lib import wiring

_met: list[list[Shared]] = []
"""Shared components instantiated so far in each conversion under way, innermost last."""
_PATH = "__"
"""Between the parts of a port's path in its name."""
_ZEROS = re.compile(r"'h0+\b")
"""A number that is zero, in as many digits as it has."""


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
    """A copy of a shared component: the same ports and streams, all of plain signals without the fields of a layout."""

    def __init__(self, shared: Shared) -> None:
        """A copy of `shared`, whose own component stays as it is."""
        self._shared = shared
        super().__init__(_plain(shared.component.signature))

    def elaborate(self, platform: object) -> Any:
        """One cell, in whatever module holds the copy."""
        ports = {
            f"{'i' if member.flow is wiring.In else 'o'}_{_PATH.join(map(str, path))}": value
            for path, member, value in self.signature.flatten(self)
        }
        text = self._shared.verilog
        if _met:
            _met[-1].append(self._shared)
        header = re.search(rf"^module \\?{re.escape(self._shared.name)} ?\((.*?)\);", text, re.MULTILINE | re.DOTALL)
        assert header is not None
        taken = [name.strip() for name in header[1].split(",")]
        for name, signal in (("clk", ClockSignal()), ("rst", ResetSignal())):
            if name in taken:
                ports[f"i_{name}"] = signal
        return Instance(self._shared.name, **ports)


def _plain(signature: Any) -> dict[str, wiring.Member]:
    """Members of a signature and of those in it, as plain bits."""
    return {
        name: member.flow(Shape.cast(member.shape))
        if member.is_port
        else wiring.Out(wiring.Signature(_plain(member.signature)))
        for name, member in signature.members.items()
    }


class _ModuleEmitter(rtlil.ModuleEmitter):
    """Amaranth's, without what only makes the text longer: a wire for each alias, and memories' zeros, word by word.

    An alias is a signal that no cell drives as a whole: a copy of another, or of others' parts. Whatever reads one
    reads what drives its bits.
    """

    def assign_value_names(self) -> None:
        """An output's own name comes before that of a signal that it is the same as."""
        for name, (value, flow) in self.module.ports.items():
            if flow == ModuleNetFlow.Output:
                self.value_names.setdefault(value, name)
        super().assign_value_names()

    def emit_signal_wires(self) -> None:
        """Nothing but what they are to have: a wire is made when it is driven."""
        self._signed = set()
        for signal, name in self.module.signal_names.items():
            value = self.netlist.signals[signal]
            self.value_attrs.setdefault(value, {}).update(signal.attrs)
            if signal.shape().signed:
                self._signed.add(name)

    def emit_driven_wire(self, value: Any) -> Any:
        """The wire of the first signal or port that has a value, made if it is a signal."""
        name = self.value_names.get(value)
        if name is not None and name not in self.sigport_wires:
            wire = self.builder.wire(
                len(value), signed=name in self._signed, name=name, attrs=self.value_attrs.get(value, {})
            )
            self.sigport_wires[name] = (wire, value)
        return super().emit_driven_wire(value)

    def emit_signal_fields(self) -> None:
        """Nothing: fields are aliases."""

    def emit_memory(self, cell_idx: int, cell: Any) -> None:
        """Contents, unless all are zero, as memories are anyway."""
        if any(cell.init):
            super().emit_memory(cell_idx, cell)


def _rtlil(component: wiring.Component, name: str) -> str:
    """A component as Yosys reads it, as `amaranth.back.rtlil.convert` makes it but for `_ModuleEmitter`."""
    ports = {
        _PATH.join(map(str, path)): (
            Value.cast(value),
            PortDirection.Input if member.flow is wiring.In else PortDirection.Output,
        )
        for path, member, value in component.signature.flatten(component)
    }
    netlist = build_netlist(Fragment.get(component, None), ports=ports, name=name)
    empty, builder = rtlil.EmptyModuleChecker(netlist), rtlil.Design(emit_src=False)
    names = SignalDict()
    for index, module in enumerate(netlist.modules):
        if not empty.is_empty(index):
            part = builder.module(".".join(module.name), src_loc=None)
            if index == 0:
                part.attribute("top", 1)
            _ModuleEmitter(part, netlist, module, names, empty_checker=empty).emit()
    return str(builder)


def _convert(component: wiring.Component, name: str) -> tuple[str, list[Shared]]:
    """Verilog of a component as module `name`, and the shared components in it."""
    _met.append([])
    try:
        text: str = verilog._convert_rtlil_text(_rtlil(component, name), strip_internal_attrs=True)
    finally:
        met = _met.pop()
    return _ZEROS.sub("'h0", text), list({id(shared): shared for shared in met}.values())


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
