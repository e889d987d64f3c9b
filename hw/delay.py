"""Values that travel beside a pipeline."""

from __future__ import annotations

from typing import Any

from amaranth.hdl import Module, Signal


def delayed(m: Module, value: Any, cycles: int, name: str, *, reset: bool = False, keep: bool = False) -> Any:
    """`value`, `cycles` cycles later; without a reset (unless wanted) it is a shift register that a LUT holds.

    With `keep` it stays registers, of which a device has more to spare than LUTs.
    """
    for cycle in range(cycles):
        attrs = {"keep": 1} if keep else {}
        later = Signal(value.shape(), name=f"{name}_{cycle + 1}", reset_less=not reset, attrs=attrs)
        m.d.sync += later.eq(value)
        value = later
    return value
