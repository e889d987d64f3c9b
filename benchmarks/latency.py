"""u280's decode and prefill times beside what its memory allows, the project's targets and DFX's figures.

Timing simulator on compiled programs, shapes without weights; 64 tokens in, 64 out, as DFX reports (section 6). `limit`
is the time of a token's bytes at the memory's peak, `bytes` at what the machine declares (its fetch slots alone). With
split `exact` bits are equal on any number of devices; `fastest` may add partial sums in the order of the devices.

    python benchmarks/latency.py [--new-tokens N] [--json]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

import typebar
from typebar.isa.machine import Machine

PROMPT = 64


@dataclass(frozen=True)
class Case:
    """A shape on a ring; `target` and `dfx` in ms a token, `hop` in cycles of link latency."""

    shape: str
    devices: int
    weights: str = "fp16"
    hop: int = 100
    split: str = "exact"
    target: float | None = None
    dfx: float | None = None


CASES = (
    Case("dfx-1.5b", 4, target=1.92, dfx=6.879),
    Case("dfx-345m", 1, target=1.90, dfx=5.371),
    Case("dfx-345m", 4, target=0.52, dfx=2.409),
    Case("gpt2-xl", 4),
    Case("gpt2-xl", 4, split="fastest"),
    Case("dfx-1.5b", 4, hop=200),
    Case("dfx-1.5b", 4, hop=400, target=1.98),
    Case("dfx-1.5b", 4, hop=400, split="fastest", target=1.98),
    Case("dfx-1.5b", 4, weights="int8", target=1.05),
    Case("dfx-1.5b", 4, weights="int8", split="fastest", target=1.05),
)


@dataclass(frozen=True)
class Figures:
    """Milliseconds of a token, of its bytes, and of the prompt to its first token; new tokens a second over both."""

    case: Case
    ms_per_token: float
    limit_ms: float
    bytes_ms: float
    first_token_ms: float
    tokens_per_s: float


def measure(case: Case, new: int) -> Figures:
    machine = Machine.load("u280").override({"ring.hop_latency": str(case.hop)})
    run = typebar.simulate(
        case.shape, machine=machine, devices=case.devices, weights=case.weights, split=case.split,
        prompt_tokens=PROMPT, new_tokens=new,
    )  # fmt: skip
    slots = machine.hbm.rows_per_write_slot
    token, limit = run.decode["ms_per_token"], run.decode["limit_ms_per_token"]
    return Figures(case, token, limit, limit * (slots + 1) / slots, run.prefill["ms"], 1000 * new / run.total_ms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results = []
    for case in CASES:
        results.append(measure(case, args.new_tokens))
        if not args.json:
            Console(stderr=True).print(f"{case.shape} x {case.devices} {case.weights} {case.split} done", style="dim")
    if args.json:
        print(json.dumps([asdict(result) for result in results]))
        return
    table = Table(title=f"u280, {PROMPT} tokens in, {args.new_tokens} out")
    for name in ("shape", "devices", "weights", "split", "hop", "ms/token", "target", "DFX", "limit", "over it"):
        table.add_column(name, justify="left" if name in ("shape", "weights", "split") else "right")
    for name in ("bytes", "over them", "first token", "tokens/s"):
        table.add_column(name, justify="right")
    for r in results:
        c = r.case
        table.add_row(
            c.shape, str(c.devices), c.weights, c.split, f"{c.hop / 200:g} us", f"{r.ms_per_token:.4f}",
            "" if c.target is None else f"{c.target:.2f}", "" if c.dfx is None else f"{c.dfx:.3f}",
            f"{r.limit_ms:.4f}", f"{100 * (r.ms_per_token / r.limit_ms - 1):+.1f} %",
            f"{r.bytes_ms:.4f}", f"{100 * (r.ms_per_token / r.bytes_ms - 1):+.1f} %",
            f"{r.first_token_ms:.1f} ms", f"{r.tokens_per_s:.1f}",
        )  # fmt: skip
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
