"""Generate the unary functions' coefficient ROM: `python -m typebar.isa.numerics.unary_generator` rewrites it.

Coefficients interpolate a curve at the four Chebyshev nodes of the segment, within a few per cent of the best
cubic, and are rounded to integers; k is the largest scale at which all of them fit their fields and Horner's
sums fit theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.polynomial import chebyshev
from numpy.typing import NDArray

from typebar.isa.numerics.unary_rom import FIELDS, FRACTION_BITS, REGIONS, ROM_WORDS, SUM_BITS, Curve, pack_word

CURVES: dict[Curve, Callable[[float], float]] = {
    Curve.EXP2: lambda f: 2**f / 2,
    Curve.RECIP: lambda z: 1 / (1 + z),
    Curve.RSQRT: lambda z: 1 / math.sqrt(1 + z if z < 1 else 2 * z),
    Curve.SIGMOID: lambda a: 1 / (1 + math.exp(a)),
    Curve.TANH: lambda a: math.tanh(a) / a,
    Curve.GELU_ERF: lambda a: math.erfc(a / math.sqrt(2)) / 2,
    Curve.GELU_TANH: lambda a: 1 / (1 + math.exp(2 * math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))),
}
"""The function each curve tabulates, of the argument given in `unary_rom`."""


def fit_segment(curve: Curve, segment: int) -> tuple[int, ...]:
    """Field values (c0, c1, c2, c3, k) of one segment of a curve."""
    width = 2.0 ** -REGIONS[curve].index_bits

    def sample(u: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.array([CURVES[curve]((segment + (1 + v) / 2) * width) for v in u.tolist()])

    nodes = chebyshev.chebpts1(4)
    power = chebyshev.cheb2poly(chebyshev.chebfit(nodes, sample(nodes), 3)).tolist()
    for k in reversed(range(1 << FIELDS[-1].bits)):
        values = (*(round(math.ldexp(c, FRACTION_BITS + k)) for c in power), k)
        # Horner's sums grow up to the sum of the coefficients' magnitudes; two are for rounding.
        sums_fit = sum(map(abs, values[1:4])) + 2 < 1 << (SUM_BITS - 1)
        if sums_fit and all(field.fits(value) for field, value in zip(FIELDS, values, strict=True)):
            return values
    raise ValueError(f"segment {segment} of {curve.name} does not fit a ROM word at any scale")


def generate() -> list[int]:
    """The ROM's words, in order."""
    rom = [0] * ROM_WORDS
    for curve, region in REGIONS.items():
        for segment in range(region.segments):
            rom[region.base + segment] = pack_word(fit_segment(curve, segment))
    return rom


def source_text(rom: list[int]) -> str:
    """The module that holds the ROM, three words a line."""
    lines = [" ".join(f"{word:027x}" for word in rom[i : i + 3]) for i in range(0, len(rom), 3)]
    return (
        '"""The unary functions\' coefficient ROM, words in hexadecimal; written by `unary_generator`."""\n\n'
        'ROM_HEX = """\n' + "\n".join(lines) + '\n"""\n'
    )


if __name__ == "__main__":
    Path(__file__).with_name("unary_table.py").write_text(source_text(generate()), encoding="utf-8")
