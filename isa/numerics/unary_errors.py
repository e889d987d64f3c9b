"""Measured errors of the unary functions against extended-precision references.

Two sets of inputs: all finite fp16 numbers, and a dense sweep of float32: 4096 evenly spaced mantissas of every
exponent and sign, and a million steps of [-20, 20]. The references are worked out in NumPy's long double (64-bit
significands on x86-64; float64 elsewhere) without cancellation, good to far below 0.01 ULP of float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from typebar.isa.instructions import Function
from typebar.isa.numerics.formats import MIN_NORMAL, F32Array, from_bits
from typebar.isa.numerics.unary import unary

Wide = NDArray[Any]  # of long doubles
FLOOR = 2.0**-24
"""Results smaller than this count as this large in `UnaryError.relative`."""


@dataclass(frozen=True)
class UnaryError:
    """The largest errors of one function over one set of inputs, results below 2^-126 left out.

    `ulp` is in units of the last place of the exact result in float32, `at` the input where it occurs;
    `ulp_above_floor` the same where the result is at least 2^-24; `relative` is the largest of
    error / max(|result|, 2^-24); `absolute` the largest error.
    """

    function: Function
    inputs: str
    ulp: float
    at: float
    ulp_above_floor: float
    relative: float
    absolute: float


def _sigmoid(x: Wide) -> Wide:
    small = np.exp(-np.abs(x))
    sigmoid: Wide = np.where(x < 0, small, np.ones_like(x)) / (1 + small)
    return sigmoid


def _gelu_erf(x: Wide) -> Wide:
    scaled = np.asarray(-x / np.sqrt(np.longdouble(2)), np.float64)
    tail: Wide = np.array([math.erfc(value) for value in scaled.tolist()], np.longdouble)
    return x * tail / 2


def _gelu_tanh(x: Wide) -> Wide:
    pi = 4 * np.arctan(np.longdouble(1))
    return x * _sigmoid(2 * np.sqrt(2 / pi) * (x + np.longdouble("0.044715") * x**3))


REFERENCES: dict[Function, Callable[[Wide], Wide]] = {
    Function.EXP: np.exp,
    Function.RECIP: lambda x: 1 / x,
    Function.RSQRT: lambda x: 1 / np.sqrt(x),
    Function.TANH: np.tanh,
    Function.SIGMOID: _sigmoid,
    Function.GELU_ERF: _gelu_erf,
    Function.GELU_TANH: _gelu_tanh,
    Function.SILU: lambda x: x * _sigmoid(x),
}
"""The functions themselves, in long double."""


def fp16_inputs() -> F32Array:
    """All finite fp16 numbers, as float32."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    return halves[np.isfinite(halves)]


def sweep_inputs() -> F32Array:
    """The dense sweep of float32 described above."""
    mantissas = np.arange(0, 1 << 23, 1 << 11, dtype=np.uint32)
    exponents = np.arange(1, 255, dtype=np.uint32) << 23
    positive = from_bits(np.add.outer(exponents, mantissas).reshape(-1))
    fine = np.linspace(-20, 20, 1_000_001, dtype=np.float32)
    return np.concatenate([positive, -positive, fine[np.abs(fine) >= MIN_NORMAL]])


def measure(function: Function, x: F32Array, inputs: str) -> UnaryError:
    """Largest errors of a function over finite inputs; those without a finite result are left out."""
    if function is Function.RSQRT:
        x = x[x > 0]
    x = x[x != 0]
    with np.errstate(all="ignore"):
        exact: Any = REFERENCES[function](x.astype(np.longdouble))
        # Tanh, GELU and SILU of 2^-126 lie below 2^-126, but not visibly in long double.
        barely = MIN_NORMAL if function is Function.RECIP else MIN_NORMAL * (1 + 2.0**-20)
        kept = (np.abs(exact) >= barely) & (np.abs(exact) < 2.0**128 * (1 - 2.0**-25))
    x, exact = x[kept], exact[kept]
    error = np.abs(unary(function, x).astype(np.longdouble) - exact)
    _, exponent = np.frexp(exact)
    ulp = np.asarray(np.ldexp(error, 24 - exponent), np.float64)
    worst = int(ulp.argmax())
    size = np.abs(exact)
    return UnaryError(
        function,
        inputs,
        float(ulp[worst]),
        float(x[worst]),
        float(ulp[size >= FLOOR].max()),
        float((error / np.maximum(size, FLOOR)).max()),
        float(error.max()),
    )


def unary_error_report() -> list[UnaryError]:
    """The errors of every tabulated function over both sets of inputs (about ten seconds)."""
    sets = {"fp16": fp16_inputs(), "sweep": sweep_inputs()}
    return [measure(function, x, name) for function in REFERENCES for name, x in sets.items()]


def format_report(report: list[UnaryError]) -> str:
    """The report as a text table."""
    lines = [
        f"{'function':10} {'inputs':6} {'ULP':>11} {'at':>13} {'ULP, |y|>=2^-24':>16} {'relative':>9} {'absolute':>9}"
    ]
    lines += [
        f"{e.function.name:10} {e.inputs:6} {e.ulp:11.3f} {e.at:13.6g} {e.ulp_above_floor:16.3f} {e.relative:9.2e}"
        f" {e.absolute:9.2e}"
        for e in report
    ]
    return "\n".join(lines)
