"""Values that travel beside a pipeline."""

from __future__ import annotations

from typing import Any

from amaranth.hdl import Cat, Module, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out


def delayed(m: Module, value: Any, cycles: int, name: str, *, reset: bool = False, keep: bool = False) -> Any:
    """`value`, `cycles` cycles later; without a reset (unless wanted) it is a shift register that a LUT holds.

    With `keep` it stays registers, of which a device has more to spare than LUTs.
    """
    if not cycles:
        return value
    shape, bits, attrs = value.shape(), Value.cast(value), {"keep": 1} if keep else {}
    late = Signal(shape, name=f"{name}_{cycles}")
    if keep:
        for cycle in range(cycles):
            later = Signal(len(bits), name=f"{name}_{cycle + 1}", reset_less=not reset, attrs=attrs)
            m.d.sync += later.eq(bits)
            bits = later
        m.d.comb += Value.cast(late).eq(bits)
    else:
        # One signal for all cycles makes the shortest Verilog.
        line = Signal(len(bits) * cycles, name=name, reset_less=not reset)
        m.d.sync += line.eq(Cat(bits, line))
        m.d.comb += Value.cast(late).eq(line[-len(bits) :])
    return late


class Kept(wiring.Component):
    """`late` is `value`, `cycles` cycles later, in registers: `delayed` with `keep`, to be written once for many."""

    def __init__(self, bits: int, cycles: int) -> None:
        """For values of so many bits."""
        self._cycles = cycles
        super().__init__({"value": In(bits), "late": Out(bits)})

    def elaborate(self, platform: object) -> Module:
        """Registers."""
        m = Module()
        m.d.comb += self.late.eq(delayed(m, self.value, self._cycles, "value", keep=True))
        return m
