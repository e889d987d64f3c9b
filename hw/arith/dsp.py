"""What one DSP slice of an UltraScale+ device does: multiply, add, and keep for some cycles."""

from __future__ import annotations

from typing import Any

from amaranth.hdl import Module, Mux, Shape, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from typebar.hw.delay import delayed

SLICE = "dsp_slice"
"""How the names of the Verilog modules begin: `hw.synthesis` counts each as one slice."""
SUM_BITS = 48
"""Width of a slice's adder, and of its ports for sums."""
_A_BITS, _B_BITS = 27, 18
"""Signed widths of the multiplier's operands (UG579)."""
_OPERAND_REGISTERS, _PRODUCT_REGISTERS, _SUM_REGISTERS = 2, 1, 1
_BEFORE = _OPERAND_REGISTERS + _PRODUCT_REGISTERS


class MultiplyAdd(wiring.Component):
    """p = +-(a * b), or 0 if `off`, plus the other sums: a and b come `before` cycles before these, p `behind` after.

    Sums are `pcin`, which only the slice beside it can give, and `c`, from anywhere. `negative` and `off` are bits of
    INMODE: the pre-adder works out 0 - a, or leaves a out. INMODE has one register, beside the last of a.
    """

    def __init__(self, a: Any, b: Any, p: Any, *, c: Any = None, pcin: Any = None, before: int, behind: int) -> None:
        """A slice for values of these shapes, sums being None if there are none.

        At most 3 registers before, of which `negative` and `off` pass those but the first of two; 1 behind.
        """
        self._before, self._behind = before, behind
        self._sums = {name: shape for name, shape in (("c", c), ("pcin", pcin)) if shape is not None}
        assert before <= _BEFORE and behind <= _SUM_REGISTERS
        # The pre-adder needs the sign bit of a to itself.
        limits = [(a, _A_BITS), (b, _B_BITS), (p, SUM_BITS), *((shape, SUM_BITS) for shape in self._sums.values())]
        for shape, bits in limits:
            shape = Shape.cast(shape)
            assert shape.width + (not shape.signed) <= bits
        sums = {name: In(shape) for name, shape in self._sums.items()}
        super().__init__({"a": In(a), "b": In(b), "negative": In(1), "off": In(1), **sums, "p": Out(p)})

    def elaborate(self, platform: object) -> Module:
        """Registers, sign, product, register, sum, register."""
        m = Module()
        early = min(self._before, _OPERAND_REGISTERS)
        a, b = delayed(m, self.a, early, "a"), delayed(m, self.b, early, "b")
        mode = min(early, 1)
        negative, off = delayed(m, self.negative, mode, "negative"), delayed(m, self.off, mode, "off")
        signed_a = Mux(off, 0, Mux(negative, -a, a))
        product = delayed(m, signed_a * b, self._before - early, "product")
        result = Signal(self.p.shape(), name="result", attrs={"use_dsp": "yes"})
        m.d.comb += [
            result.eq(sum((getattr(self, name) for name in self._sums), product)),
            self.p.eq(delayed(m, result, self._behind, "sum")),
        ]
        return m


def multiply_add(
    m: Module,
    name: str,
    a: Any,
    b: Any,
    p: Any,
    *,
    negative: Any,
    off: Any,
    c: Any = None,
    pcin: Any = None,
    before: int = 0,
    behind: int = 0,
) -> Any:
    """A slice's result, of shape `p`, in module `m`; registers that it does not have are put around it."""
    inner, last = min(before, _BEFORE), min(behind, _SUM_REGISTERS)
    shapes = {port: None if value is None else value.shape() for port, value in (("c", c), ("pcin", pcin))}
    unit = MultiplyAdd(a.shape(), b.shape(), p, **shapes, before=inner, behind=last)
    m.submodules[f"{SLICE}_{name}"] = unit
    outer = before - inner
    late = outer + max(0, min(inner, _OPERAND_REGISTERS) - 1)
    for port, value, cycles in (("a", a, outer), ("b", b, outer), ("negative", negative, late), ("off", off, late)):
        m.d.comb += getattr(unit, port).eq(delayed(m, value, cycles, f"{name}_{port}"))
    for port, value in (("c", c), ("pcin", pcin)):
        if value is not None:
            m.d.comb += getattr(unit, port).eq(value)
    return delayed(m, unit.p, behind - last, f"{name}_p")
