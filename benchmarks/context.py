"""What context costs a token on u280: the time added over context 64, beside the least that it needs.

The token that makes a text C tokens long attends to C - 1 positions. Over context 64 it reads more K and V, multiplies
more and takes the softmax of more scores. Each unit has its least time for that, and the largest of them binds:

- HBM: K and V of the positions added, over the bandwidth that the machine declares (its fetch slots);
- matrix: their multiply-accumulates, q K and weights V of every query head, over rows x columns x lanes a cycle;
- vector: three operations for each score added (subtract the maximum, exponential, sum), over `vector.lanes` a cycle,
  or three times that where the vector unit chains them in a pass.

All are a device's; every device has as much. The goal is to be within 10 % of what binds; what misses it is marked.

    python benchmarks/context.py [--shape NAME] [--set KEY=VALUE ...] [--json]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

import typebar
from typebar.compiler.frontend import SHAPES
from typebar.isa.instructions import FORMAT_BYTES, Format
from typebar.isa.machine import Machine

DEVICES, BASE, GOAL = 4, 64, 1.10
CONTEXTS = {"dfx-1.5b": (128, 256, 512, 1024), "santacoder-32k": (1024, 2048, 4096, 8192, 16384, 32768)}
SOFTMAX_OPERATIONS = 3


@dataclass(frozen=True)
class Point:
    """Milliseconds that a token's context adds over 64 positions; `hbm`, `matrix` and `vector` are least times."""

    shape: str
    context: int
    ms_per_token: float
    added: float
    hbm: float
    matrix: float
    vector: float

    @property
    def binds(self) -> str:
        """The unit that needs longest."""
        return max(("hbm", "matrix", "vector"), key=lambda unit: float(getattr(self, unit)))

    @property
    def ratio(self) -> float:
        """Time added over the least."""
        return self.added / float(getattr(self, self.binds))


def token_ms(shape: str, machine: Machine, context: int) -> float:
    """Milliseconds of the token that makes a text `context` tokens long."""
    run = typebar.simulate(shape, machine=machine, devices=DEVICES, start=context - 3, prompt_tokens=1, new_tokens=2)
    return float(run.decode["ms_per_token"])


def least(shape: str, machine: Machine, positions: int) -> tuple[float, float, float]:
    """Milliseconds that HBM, matrix unit and vector unit of a device need for so many positions more."""
    facts = SHAPES[shape]
    heads = facts.heads // DEVICES
    kv_heads = max(1, facts.kv_heads // DEVICES)
    size = facts.width // facts.heads
    per_ms = 1000 * machine.clock_mhz
    slots = machine.hbm.rows_per_write_slot
    total = positions * facts.layers
    bytes_ms = (
        total * kv_heads * 2 * size * FORMAT_BYTES[Format.FP16] * (slots + 1) / slots / machine.row_bytes / per_ms
    )
    macs_ms = total * heads * 2 * size / machine.peak_macs / per_ms
    passes = 1 if machine.vector.chains else SOFTMAX_OPERATIONS
    return bytes_ms, macs_ms, total * heads * passes / machine.vector.lanes / per_ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(CONTEXTS), help="this one alone")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], dest="changes")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    machine = Machine.load("u280").override(dict(change.split("=", 1) for change in args.changes))
    points = []
    for shape in [args.shape] if args.shape else CONTEXTS:
        before = token_ms(shape, machine, BASE)
        for context in CONTEXTS[shape]:
            took = token_ms(shape, machine, context)
            points.append(Point(shape, context, took, took - before, *least(shape, machine, context - BASE)))
            if not args.json:
                Console(stderr=True).print(f"{shape} at {context} done", style="dim")
    if args.json:
        print(json.dumps([asdict(p) | {"binds": p.binds, "ratio": p.ratio, "held": p.ratio <= GOAL} for p in points]))
        return
    table = Table(title=f"u280 x {DEVICES}, fp16: time added by context over {BASE} positions, ms a token")
    for name in ("shape", "context", "ms/token", "added", "HBM", "matrix", "vector", "binds", "over it", "within 10 %"):
        table.add_column(name, justify="left" if name in ("shape", "binds", "within 10 %") else "right")
    for p in points:
        table.add_row(
            p.shape, f"{p.context:,}", f"{p.ms_per_token:.4f}", f"{p.added:.4f}", f"{p.hbm:.4f}", f"{p.matrix:.4f}",
            f"{p.vector:.4f}", p.binds, f"{100 * (p.ratio - 1):+.1f} %", "yes" if p.ratio <= GOAL else "MISSED",
        )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
