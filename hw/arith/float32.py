"""Pieces that the float32 units share: taking values apart, counting zeros, rounding and putting together."""

from __future__ import annotations

from typing import Any

from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed

from typebar.isa.numerics.formats import CANONICAL_NAN, EXPONENT

BIAS = 127
MAX_EXPONENT = 255
"""The exponent field of infinity and NaN."""


def named(m: Module, value: Any, name: str) -> Any:
    """A signal of the value, so that an expression used in several places is written out once."""
    signal = Signal(value.shape(), name=name)
    m.d.comb += signal.eq(value)
    return signal


class Parts:
    """A float32 taken apart, exponent field 0 being zero: all combinational.

    Attributes: `sign`, `exponent` (field, 8 bits), `significand` (24 bits, 0 for zero), `zero`, `infinite`, `nan`.
    """

    def __init__(self, m: Module, bits: Any, name: str) -> None:
        """Take `bits` (32) apart in module `m`, signals being called after `name`."""
        self.sign = bits[31]
        self.exponent = bits[23:31]
        self.zero = Signal(name=f"{name}_zero")
        self.infinite = Signal(name=f"{name}_infinite")
        self.nan = Signal(name=f"{name}_nan")
        top, empty = self.exponent.all(), ~bits[:23].any()
        m.d.comb += [
            self.zero.eq(~self.exponent.any()),
            self.infinite.eq(top & empty),
            self.nan.eq(top & ~empty),
        ]
        self.significand = named(m, Mux(self.zero, 0, Cat(bits[:23], Const(1, 1))), f"{name}_significand")


def leading_zeros(m: Module, value: Any, name: str) -> Any:
    """Number of zeros above the highest one of `value`; all of them where there is none. Combinational."""
    width = 1 << max(len(value) - 1, 1).bit_length()
    # Ones below make the count of nothing equal to the width, and cost nothing.
    padded = named(m, Cat(Const(-1, width - len(value)), value) if width > len(value) else value, f"{name}_padded")
    none = Signal(name=f"{name}_none")
    count = Signal(range(width + 1), name=f"{name}_count")
    m.d.comb += [none.eq(~padded.any()), count.eq(Mux(none, width, _leading_zeros(m, padded, name)))]
    return count


def _leading_zeros(m: Module, value: Any, name: str) -> Any:
    """Leading zeros of a power-of-two wide value that has a one."""
    if len(value) == 1:
        return Const(0, 0)
    half = len(value) // 2
    low, high = value[:half], value[half:]
    empty = Signal(name=f"{name}_empty{len(value)}")
    rest = Signal(half, name=f"{name}_rest{half}")
    m.d.comb += [empty.eq(~high.any()), rest.eq(Mux(empty, low, high))]
    return Cat(_leading_zeros(m, rest, name), empty)


def shift_right_sticky(m: Module, value: Any, amount: Any, name: str) -> Any:
    """`value` >> `amount`, the lowest bit of the result being set if any one was shifted out. Combinational."""
    amount = named(m, amount, f"{name}_amount")
    for k in reversed(range(len(amount))):
        width = min(1 << k, len(value))
        shifted = Signal(len(value), name=f"{name}_{1 << k}")
        lost = value[:width].any()
        m.d.comb += shifted.eq(Mux(amount[k], value >> (1 << k) | lost, value))
        value = shifted
    return value


def round_pack(
    m: Module, *, sign: Any, exponent: Any, significand: Any, guard: Any, sticky: Any, infinite: Any, nan: Any
) -> Any:
    """float32 bits of (-1)^sign significand 2^(exponent - 127 - 23), rounded to nearest even. Combinational.

    `significand` has 24 bits, its highest being 0 only for the value zero; `exponent` is a signed field value. The
    exact magnitude below 2^-126 (an exponent below 1) is a zero of its sign; above the largest it is infinity.
    `infinite` and `nan` override the value.
    """
    field = Signal(signed(len(exponent) + 1), name="field")
    rounded = Signal(31, name="rounded")
    bits = Signal(32, name="bits")
    m.d.comb += [
        field.eq(exponent),
        # A carry out of the fraction raises the exponent by itself, up to infinity.
        rounded.eq(Cat(significand[:23], field[:8]) + (guard & (sticky | significand[0]))),
    ]
    with m.If(nan):
        m.d.comb += bits.eq(CANONICAL_NAN)
    with m.Elif(infinite | ((field >= MAX_EXPONENT) & significand[23])):
        m.d.comb += bits.eq(Cat(Const(EXPONENT, 31), sign))
    with m.Elif((field < 1) | ~significand[23]):
        m.d.comb += bits.eq(Cat(Const(0, 31), sign))
    with m.Else():
        m.d.comb += bits.eq(Cat(rounded, sign))
    return bits
