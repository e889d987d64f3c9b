"""Error of dot products whose weights keep memory's significands, beside normalised ones (numerics version 1).

python benchmarks/dot_error.py [--json]

Root mean square, in units of the root mean square of the exact results: of the matrix unit's own arithmetic (sums of
exact products of operands are the reference), and of rounding the vectors to operands alone, for comparison.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from typebar.isa.numerics import Format, decode, dot, encode, to_operand

LANES, LENGTH, COLUMNS, VECTORS = 64, 1536, 64, 16
WEIGHTS = {
    "fp16, deviation 0.02": (Format.FP16, 0.02),
    "fp16, deviation 1e-4": (Format.FP16, 1e-4),
    "fp16, deviation 1e-5": (Format.FP16, 1e-5),
    "int8, deviation 32": (Format.INT8, 32.0),
    "int8, deviation 1": (Format.INT8, 1.0),
}
OUTLIERS = {"normal": 1.0, "one in 64 is 100 times larger": 100.0}


def errors(fmt: Format, deviation: float, outlier: float) -> dict[str, float]:
    """Relative errors of one kind of weights and vectors."""
    rng = np.random.default_rng(1)
    weights = decode(encode((rng.standard_normal((LENGTH, COLUMNS)) * deviation).astype(np.float32), fmt)[0], fmt)
    x = rng.standard_normal((VECTORS, LENGTH)).astype(np.float32)
    x[:, rng.random(LENGTH) < 1 / 64] *= np.float32(outlier)
    operands = to_operand(x)[0].astype(np.float64)
    exact = operands @ weights.astype(np.float64)

    def relative(result: NDArray[Any], reference: NDArray[np.float64]) -> float:
        return float(np.sqrt(np.mean((result - reference) ** 2) / np.mean(reference**2)))

    return {
        "as stored": relative(dot(weights, x, LANES, fmt=fmt)[0], exact),
        "normalised": relative(dot(weights, x, LANES, fmt=Format.FP32)[0], exact),
        "rounding x": relative(exact, x.astype(np.float64) @ weights.astype(np.float64)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = {f"{w}; x {o}": errors(*WEIGHTS[w], OUTLIERS[o]) for w in WEIGHTS for o in OUTLIERS}
    if args.json:
        print(json.dumps(rows))
        return
    table = Table("weights; vectors", "as stored", "normalised", "rounding x", title="Relative error, root mean square")
    for name, row in rows.items():
        table.add_row(name, *(f"{value:.2e}" for value in row.values()))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
