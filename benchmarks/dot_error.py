"""Error of dot products with operands aligned to one exponent a chunk, beside products aligned one by one (version 2).

python benchmarks/dot_error.py [--json]

Root mean square, in units of the root mean square of the exact results: of the matrix unit's own arithmetic (sums of
exact products of operands are the reference), also with weights aligned by single exponents instead of steps of four,
and of rounding the vectors to operands and the weights to their format alone, for comparison. Outliers are one channel
in 64, the same in weights and vectors.
"""

from __future__ import annotations

import argparse
import importlib
import json
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from typebar.isa.numerics import Format, add, decode, dot, encode, to_operand
from typebar.isa.numerics.formats import LEAST_EXPONENT, F32Array

LANES, LENGTH, COLUMNS, VECTORS = 64, 1536, 64, 16


class Case(NamedTuple):
    """Normal weights of a format, vectors of deviation 1, and how many times larger either is in outlier channels."""

    fmt: Format
    deviation: float
    weight_outlier: float = 1
    vector_outlier: float = 1

    def __str__(self) -> str:
        outliers = f", outliers x{self.weight_outlier:g}" if self.weight_outlier != 1 else ""
        vectors = f"outliers x{self.vector_outlier:g}" if self.vector_outlier != 1 else "normal"
        return f"{self.fmt.name.lower()} {self.deviation:g}{outliers}; {vectors}"


CASES = [
    *(Case(Format.FP16, deviation, 1, vectors) for deviation in (0.02, 1e-4, 1e-5) for vectors in (1, 100)),
    *(Case(Format.INT8, deviation, 1, vectors) for deviation in (32, 1) for vectors in (1, 100, 1e4)),
    *(
        Case(fmt, 0.02, weights, vectors)
        for fmt in (Format.FP16, Format.BF16)
        for weights, vectors in (
            (1, 1e4),
            (10, 1),
            (100, 1),
            (1000, 1),
            (100, 100),
            (10, 0.1),
            (100, 0.01),
            (1000, 0.001),
        )
    ),
]


def products_aligned(weights: F32Array, x: F32Array, fmt: Format) -> F32Array:
    """Version 2: each exact product is truncated to a multiple of 2^(E-23), E its chunk's largest sum of exponents."""
    total = np.zeros((x.shape[0], weights.shape[1]), np.float32)
    for first in range(0, x.shape[1], LANES):
        w, part = weights[first : first + LANES].astype(np.float64), x[:, first : first + LANES].astype(np.float64)
        product = part[:, :, None] * w
        w_exponent = np.maximum(np.frexp(w)[1] - 1, LEAST_EXPONENT[fmt])
        exponent = np.where(product != 0, (np.frexp(part)[1] - 1)[:, :, None] + w_exponent, -999)
        unit = np.ldexp(1.0, exponent.max(axis=1, keepdims=True) - 23)
        total = add(total, (np.trunc(product / unit) * unit).sum(axis=1).astype(np.float32))
    return total


def errors(case: Case) -> dict[str, float]:
    """Relative errors of one kind of weights and vectors."""
    rng = np.random.default_rng(1)
    unrounded = rng.standard_normal((LENGTH, COLUMNS)) * case.deviation
    x = rng.standard_normal((VECTORS, LENGTH)).astype(np.float32)
    outlier = rng.random(LENGTH) < 1 / 64
    unrounded[outlier] *= case.weight_outlier
    x[:, outlier] *= np.float32(case.vector_outlier)
    weights = decode(encode(unrounded.astype(np.float32), case.fmt)[0], case.fmt)
    operands = to_operand(x)[0]
    exact = operands.astype(np.float64) @ weights.astype(np.float64)

    def relative(result: NDArray[Any], reference: NDArray[np.float64]) -> float:
        return float(np.sqrt(np.mean((result - reference) ** 2) / np.mean(reference**2)))

    with mock.patch.object(importlib.import_module(dot.__module__), "WEIGHT_STEP", 1):
        single = dot(weights, x, LANES, fmt=case.fmt)[0]
    return {
        "operands aligned": relative(dot(weights, x, LANES, fmt=case.fmt)[0], exact),
        "by single exponents": relative(single, exact),
        "products aligned": relative(products_aligned(weights, operands, case.fmt), exact),
        "rounding x": relative(exact, x.astype(np.float64) @ weights.astype(np.float64)),
        "rounding weights": relative(operands.astype(np.float64) @ unrounded, exact),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = {str(case): errors(case) for case in CASES}
    if args.json:
        print(json.dumps(rows))
        return
    table = Table("weights; vectors", *next(iter(rows.values())), title="Relative error, root mean square")
    for name, row in rows.items():
        table.add_row(name, *(f"{value:.2e}" for value in row.values()))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
