"""Generate the coefficient ROM of the unary functions: `python -m typebar.isa.numerics.unary_generator`.

The ROM is 1024 words of 108 bits, three 36-bit block RAMs; two lanes can share one through its two ports. A word
is one segment of one curve: a cubic in u, the offset from the segment's middle in half segments, -1 <= u < 1:

    curve = 2^(-29-k) (c0 + c1 u + c2 u^2 + c3 u^3)

Coefficients interpolate the curve at the four Chebyshev nodes of the segment (within a few per cent of the best
cubic) and are rounded to integers. k is the smallest scale at which every coefficient fits its field.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.polynomial import chebyshev

from typebar.isa.errors import TypebarError
from typebar.isa.numerics.unary_layout import CURVES, FIELDS, FRACTION_BITS, ROM_WORDS, WORD_BITS, Curve


@dataclass(frozen=True)
class _Source:
    """The function a curve tabulates, and the reduced argument at which its first segment starts."""

    function: Callable[[float], float]


def _gelu_tanh_tail(a: float) -> float:
    return 1 / (1 + math.exp(2 * math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))


_SOURCES: dict[Curve, Callable[[float], float]] = {
    Curve.EXP2: lambda f: 2**f / 2,
    Curve.RECIP: lambda m: 1 / (1 + m),
    Curve.RSQRT: lambda m: 1 / math.sqrt(1 + m if m < 1 else 2 * m),
    Curve.SIGMOID: lambda a: 1 / (1 + math.exp(a)),
    Curve.TANH: lambda a: math.tanh(a) / a,
    Curve.GELU_ERF: lambda a: math.erfc(a / math.sqrt(2)) / 2,
    Curve.GELU_TANH: _gelu_tanh_tail,
}


def _fit(curve: Curve, segment: int) -> tuple[int, ...]:
    """Field values (c0, c1, c2, c3, k) of one segment."""
    source = _SOURCES[curve]
    width = 2.0 ** -CURVES[curve].index_bits

    def at(u: np.ndarray) -> np.ndarray:
        return np.array([source((segment + 0.5 + v / 2) * width) for v in u.tolist()])

    power = chebyshev.cheb2poly(chebyshev.chebinterpolate(at, 3))
    for k in range(1 << FIELDS["k"].bits):
        values = [round(float(c) * 2.0 ** (FRACTION_BITS + k)) for c in power]
        following = [round(float(c) * 2.0 ** (FRACTION_BITS + k + 1)) for c in power]
        if not FIELDS_FIT(following):
            break
    return (*values, k)
