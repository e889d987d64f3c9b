"""What one DSP slice of an UltraScale+ device does: multiply, add, and keep for some cycles."""

from __future__ import annotations

from typing import Any

from amaranth.hdl import Cat, Const, Module, Shape, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from typebar.hw.delay import delayed

SLICE = "dsp_slice"
"""How the names of the Verilog modules begin: `hw.synthesis` counts each as one slice."""
PARTS, PART_BITS = 4, 12
_A_BITS, _B_BITS, _C_BITS = 27, 18, 48
"""Signed widths of a slice's operands and of its adder (UG579)."""
_OPERAND_REGISTERS, _PRODUCT_REGISTERS, _SUM_REGISTERS = 2, 1, 1
_BEFORE = _OPERAND_REGISTERS + _PRODUCT_REGISTERS


class MultiplyAdd(wiring.Component):
    """p = (a * b >> `drop`) + c, rounded down: a and b come `before` cycles before c, and p `behind` cycles after it.

    Nothing is added to the bits dropped, so they never carry.
    """

    def __init__(self, a: Any, b: Any, c: Any, p: Any, *, drop: int, before: int, behind: int) -> None:
        """A slice for operands of these shapes; `c` is None for a multiplier. At most 3 registers before, 1 behind."""
        self._drop, self._before, self._behind = drop, before, behind
        assert before <= _BEFORE and behind <= _SUM_REGISTERS
        for shape, bits in ((a, _A_BITS), (b, _B_BITS), (p, _C_BITS - drop)):
            shape = Shape.cast(shape)
            assert shape.width + (not shape.signed) <= bits
        self._adds = c is not None
        super().__init__({"a": In(a), "b": In(b), **({"c": In(c)} if self._adds else {}), "p": Out(p)})

    def elaborate(self, platform: object) -> Module:
        """Registers, product, register, sum, register."""
        m = Module()
        early = min(self._before, _OPERAND_REGISTERS)
        total = delayed(m, self.a, early, "a") * delayed(m, self.b, early, "b")
        total = delayed(m, total, self._before - early, "product")
        if self._adds:
            total = total + Cat(Const(0, self._drop), self.c).as_signed()
        result = Signal(self.p.shape(), name="result", attrs={"use_dsp": "yes"})
        m.d.comb += [result.eq(total >> self._drop), self.p.eq(delayed(m, result, self._behind, "sum"))]
        return m


class FourSums(wiring.Component):
    """Four sums of up to 12 bits, or differences, modulo 2^bits, in one slice: its adder can be cut in four.

    `p` comes in the cycle of a; b comes `before` cycles earlier. The registers around it may become the slice's.
    """

    def __init__(self, bits: int, subtract: bool, before: int = 0) -> None:
        """Sums, or differences; at most 2 registers for b."""
        assert bits <= PART_BITS and before <= _OPERAND_REGISTERS
        self._bits, self._subtract, self._before = bits, subtract, before
        parts = data.ArrayLayout(bits, PARTS)
        super().__init__({"a": In(parts), "b": In(parts), "p": Out(parts)})

    def elaborate(self, platform: object) -> Module:
        """One adder for each part."""
        m = Module()
        for a, b, p in zip(self.a, self.b, self.p, strict=True):
            b = delayed(m, b, self._before, "b")
            result = Signal(self._bits, name="result", attrs={"use_dsp": "simd"})
            m.d.comb += [result.eq(a - b if self._subtract else a + b), p.eq(result)]
        return m


def sums(
    m: Module, name: str, a: list[Any], b: list[Any], *, bits: int, subtract: bool = False, before: int = 0
) -> list[Any]:
    """a + b, or a - b, of each pair, modulo 2^bits, four to a slice, b coming `before` cycles before a.

    Registers that a slice does not have are put around it.
    """
    results: list[Any] = []
    early = min(before, _OPERAND_REGISTERS)
    b = [delayed(m, value, before - early, f"{name}_b{index}") for index, value in enumerate(b)]
    for first in range(0, len(a), PARTS):
        unit = FourSums(bits, subtract, early)
        m.submodules[f"{SLICE}_{name}{first}"] = unit
        some = range(first, min(first + PARTS, len(a)))
        for part, index in enumerate(some):
            m.d.comb += [unit.a[part].eq(a[index]), unit.b[part].eq(b[index])]
        results += [unit.p[part] for part in range(len(some))]
    return results


def multiply_add(
    m: Module, name: str, a: Any, b: Any, c: Any, p: Any, *, drop: int = 0, before: int = 0, behind: int = 0
) -> Any:
    """A slice's result, of shape `p`, in module `m`; registers that it does not have are put around it."""
    # The bits dropped of a registered product would be registers without effect.
    inner = min(before, _OPERAND_REGISTERS if drop else _BEFORE)
    last = min(behind, _SUM_REGISTERS)
    shapes = (a.shape(), b.shape(), None if c is None else c.shape())
    unit = MultiplyAdd(*shapes, p, drop=drop, before=inner, behind=last)
    m.submodules[f"{SLICE}_{name}"] = unit
    m.d.comb += [
        unit.a.eq(delayed(m, a, before - inner, f"{name}_a")),
        unit.b.eq(delayed(m, b, before - inner, f"{name}_b")),
    ]
    if c is not None:
        m.d.comb += unit.c.eq(c)
    return delayed(m, unit.p, behind - last, f"{name}_p")
