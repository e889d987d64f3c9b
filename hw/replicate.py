"""Components that are emitted once as a Verilog module and instantiated many times.

Amaranth writes a component out again for every copy. A `Shared` component is written once; its replicas are cells.
The text is Amaranth's, less aliases and expressions that are there already.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from amaranth.back import rtlil, verilog
from amaranth.hdl import ClockSignal, Fragment, Instance, ResetSignal, Shape, Value
from amaranth.hdl import _ir as ir
from amaranth.hdl._ast import SignalDict
from amaranth.hdl._nir import ModuleNetFlow, Netlist
from amaranth.lib import wiring

_met: list[list[Shared]] = []
"""Shared components instantiated so far in each conversion under way, innermost last."""
_ZEROS = re.compile(r"'h0+\b")
"""A number that is zero, in as many digits as it has."""

_PORT = re.compile(r"^(  (?:input|output) (.*;)\n)  wire \2\n", re.MULTILINE)
"""A port, and once more that it is a wire."""


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
        header = re.search(rf"^module \\?{re.escape(self._shared.name)} ?\((.*?)\);", text, re.MULTILINE | re.DOTALL)
        assert header is not None
        taken = [name.strip() for name in header[1].split(",")]
        for name, signal in (("clk", ClockSignal()), ("rst", ResetSignal())):
            if name in taken:
                ports[f"i_{name}"] = signal
        return Instance(self._shared.name, **ports)


class _NetlistEmitter(ir.NetlistEmitter):
    """Amaranth's, but an expression that a module has in several places is there once, as its conditions are."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        """As Amaranth's."""
        super().__init__(*arguments, **settings)
        self._known: dict[Any, Any] = {}

    def emit_operator(self, module_idx: int, operator: str, *inputs: Any, src_loc: Any) -> Any:
        """The result of an operator, new if the module has none of the same inputs."""
        key = module_idx, operator, inputs
        if key not in self._known:
            self._known[key] = super().emit_operator(module_idx, operator, *inputs, src_loc=src_loc)
        return self._known[key]


def _netlist(component: wiring.Component, ports: dict[str, Any], name: str) -> Netlist:
    """What `amaranth.hdl._ir.build_netlist` makes of a component, but for `_NetlistEmitter`."""
    design = Fragment.get(component, None).prepare(ports=ports, hierarchy=(name,))
    netlist = Netlist()
    _NetlistEmitter(netlist, design, all_undef_to_ff=False).emit_fragment(design.fragment, None)
    netlist.check_comb_cycles()
    netlist.resolve_all_nets()
    ir._compute_net_flows(netlist)
    ir._compute_ports(netlist)
    ir._compute_ionet_dirs(netlist)
    ir._compute_io_ports(netlist, design.ports)
    return netlist


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


@contextmanager
def _uncollected() -> Iterator[None]:
    """No search for garbage meanwhile: a netlist is millions of objects, none of them garbage until its end."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _rtlil(component: wiring.Component, name: str) -> str:
    """A component as Yosys reads it, as `amaranth.back.rtlil.convert` makes it but for `_ModuleEmitter`."""
    ports = {
        "__".join(map(str, path)): (
            Value.cast(value),
            ir.PortDirection.Input if member.flow is wiring.In else ir.PortDirection.Output,
        )
        for path, member, value in component.signature.flatten(component)
    }
    netlist = _netlist(component, ports, name)
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
        with _uncollected():
            netlist = _rtlil(component, name)
        text: str = verilog._convert_rtlil_text(netlist, strip_internal_attrs=True)
    finally:
        met = _met.pop()
    return _PORT.sub(r"\1", _ZEROS.sub("'h0", text)), list({id(shared): shared for shared in met}.values())


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
