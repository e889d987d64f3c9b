"""Shape of the unary functions' coefficient ROM: which curves it holds, and how a word is laid out.

1024 words of 108 bits: three 36-bit block RAMs, whose two ports serve two lanes. A word is one segment of one
curve, a cubic in u, the offset from the segment's middle in half segments, -1 <= u < 1:

    curve = 2^(-29-k) (c0 + c1 u + c2 u^2 + c3 u^3)

| curve | tabulated over | segments a unit |
|---|---|---|
| `EXP2` | 2^f / 2, f in [0, 1) | 64 |
| `RECIP` | 1 / (1 + z), z in [0, 1): the mantissa's fraction | 32 |
| `RSQRT` | (1 + z)^-1/2, z in [0, 1), then (2 z)^-1/2, z in [1, 2): even, then odd exponents | 32 |
| `SIGMOID` | 1 / (1 + e^a), a in [0, 18) | 16 |
| `TANH` | tanh(a) / a, a in [0, 4) | 16 |
| `GELU_ERF` | Phi(-a) = erfc(a / sqrt 2) / 2, a in [0, 8) | 32 |
| `GELU_TANH` | 1 / (1 + e^(2 sqrt(2/pi) (a + 0.044715 a^3))), a in [0, 8) | 32 |
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

ROM_WORDS = 1024
WORD_BITS = 108
OFFSET_BITS = 18
"""Bits of the offset within a segment: a signed factor as wide as a DSP slice's narrow port."""
SUM_BITS = 27
"""Bits of Horner's signed partial sums: a DSP slice's wide port."""
FRACTION_BITS = 29
"""A curve's value is the polynomial times 2^-(this + k)."""


class Curve(IntEnum):
    """The tabulated curves."""

    EXP2 = 0
    RECIP = 1
    RSQRT = 2
    SIGMOID = 3
    TANH = 4
    GELU_ERF = 5
    GELU_TANH = 6


@dataclass(frozen=True)
class Region:
    """Words [base, base + segments) of the ROM; 2^index_bits segments make one unit of the argument."""

    base: int
    segments: int
    index_bits: int


REGIONS: dict[Curve, Region] = {
    Curve.EXP2: Region(0, 64, 6),
    Curve.RECIP: Region(64, 32, 5),
    Curve.RSQRT: Region(96, 64, 5),
    Curve.SIGMOID: Region(160, 288, 4),
    Curve.TANH: Region(448, 64, 4),
    Curve.GELU_ERF: Region(512, 256, 5),
    Curve.GELU_TANH: Region(768, 256, 5),
}


@dataclass(frozen=True)
class Field:
    """A field of a word, from its lowest bit on; signed fields are two's complement."""

    name: str
    low: int
    bits: int
    signed: bool

    def fits(self, value: int) -> bool:
        """True if the field can hold the value."""
        low, high = (-(1 << self.bits - 1), 1 << self.bits - 1) if self.signed else (0, 1 << self.bits)
        return low <= value < high


FIELDS = (
    Field("c0", 0, 29, False),
    Field("c1", 29, 27, True),
    Field("c2", 56, 25, True),
    Field("c3", 81, 21, True),
    Field("k", 102, 6, False),
)


def pack_word(values: tuple[int, ...]) -> int:
    """One ROM word of the field values (c0, c1, c2, c3, k), which must fit their fields."""
    if not all(field.fits(value) for field, value in zip(FIELDS, values, strict=True)):
        raise ValueError(f"coefficients {values} do not fit the fields of a ROM word")
    return sum((value & (1 << field.bits) - 1) << field.low for field, value in zip(FIELDS, values, strict=True))


def unpack_word(word: int) -> tuple[int, ...]:
    """Field values (c0, c1, c2, c3, k) of a ROM word."""
    values = []
    for field in FIELDS:
        value = word >> field.low & (1 << field.bits) - 1
        sign = 1 << field.bits - 1 if field.signed else 0
        values.append((value ^ sign) - sign)
    return tuple(values)
