"""The planner against the simulator: shapes x devices x phases x splits, plans worth simulating, the model's error.

    python benchmarks/planner.py [--shapes gpt2,...] [--devices 1,2,...] [--set KEY=VALUE]... [--json]

For each point, with `--split exact` and `fastest`: the simulated cycles of a token, or to the first token, under the
plan chosen by the analytical model; how far that is behind the best plan simulated; how much faster than columns alone;
and the largest error of the model over the plans simulated.

Simulated are columns alone and all plans that the planner costs within `NEAR` of its best of the split. All shapes here
have less than `planner.MOST` combinations, so that each is costed, but for those that cannot be compiled and those
whose rows from HBM alone take as long as the model gives columns alone. So a plan that is not simulated could be the
simulator's best only if the model put it too high by more than `NEAR`, or columns too low by more than they are behind
the best; the errors printed say how far it errs where both have spoken.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from itertools import product
from typing import Any

from typebar.compiler.driver import build
from typebar.compiler.frontend import FrontendModel, load_model
from typebar.compiler.plan import COLUMNS, EXACT, FASTEST, PHASES, SPLITS
from typebar.compiler.planner import Proposal, propose
from typebar.host.planning import pass_cycles
from typebar.isa.instructions import Format
from typebar.isa.machine import Machine

SHAPES = ("gpt2", "dfx-345m", "gpt2-large", "gpt2-xl", "dfx-1.5b", "tinyllama-1.1b")
DEVICES = (1, 2, 3, 4, 6, 8)
NEAR = 1.1


def point(model: FrontendModel, machine: Machine, devices: int, phase: str) -> list[dict[str, Any]]:
    """What the model and the simulator say of each plan on one ring: for `exact` and `fastest`."""
    proposals = propose(model, machine, devices, Format.FP16, phase, FASTEST)
    bests = {split: next(item for item in proposals if item.plan.exact or split == FASTEST) for split in SPLITS}
    plans = []
    for item in proposals:
        if item.cycles <= NEAR * bests[EXACT if item.plan.exact else FASTEST].cycles or item.plan == COLUMNS:
            cycles = pass_cycles(build(model, machine, devices, Format.FP16, item.plan), phase)
            plans.append((item, cycles))
    columns = next(cycles for item, cycles in plans if item.plan == COLUMNS)
    return [
        _point(bests[split], [made for made in plans if made[0].plan.exact or split == FASTEST], columns)
        | {"shape": model.name, "devices": devices, "phase": phase, "split": split}
        for split in SPLITS
    ]


def _point(best: Proposal, plans: list[tuple[Proposal, float]], columns: float) -> dict[str, Any]:
    """The figures of one split."""
    chosen = next(cycles for item, cycles in plans if item.plan == best.plan)
    fastest, least = min(plans, key=lambda made: made[1])
    rows = [{"plan": str(item.plan), "model": item.cycles, "simulator": cycles} for item, cycles in plans]
    return {
        "chosen": str(best.plan),
        "best": str(fastest.plan),
        "cycles": chosen,
        "behind_best": chosen / least - 1,
        "before_columns": columns / chosen - 1,
        "model_error": max((item.cycles / cycles - 1 for item, cycles in plans), key=abs),
        "plans": rows,
    }


def _short(plan: str) -> str:
    """A plan's text without what all names of a model share."""
    return plan.replace("transformer.h.{}.", "").replace("model.layers.{}.", "").replace(".weight", "")


def main() -> None:
    """Print a line for each point, and the largest distance and error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--devices", default=",".join(map(str, DEVICES)))
    parser.add_argument("--machine", default="u280")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", action="store_true", help="print all of it as JSON, and the table on standard error")
    given = parser.parse_args()
    machine = Machine.load(given.machine).override(dict(item.split("=", 1) for item in given.set))
    table = partial(print, file=sys.stderr if given.json else sys.stdout, flush=True)
    table(
        f"{'shape':15} {'ring':>4} {'phase':8} {'split':8} {'cycles':>9} {'behind':>7} {'gain':>6} {'error':>6}  plan"
    )
    points = []
    for shape in given.shapes.split(","):
        model = load_model(shape)
        for devices, phase in product(map(int, given.devices.split(",")), PHASES):
            for made in point(model, machine, devices, phase):
                points.append(made)
                table(
                    f"{shape:15} {devices:4} {phase:8} {made['split']:8} {made['cycles']:9.0f} "
                    f"{made['behind_best']:7.1%} {made['before_columns']:6.1%} {made['model_error']:+6.1%}  "
                    f"{_short(made['chosen'])}"
                )
    behind, error = (max(abs(item[name]) for item in points) for name in ("behind_best", "model_error"))
    simulated = sum(len(item["plans"]) for item in points if item["split"] == FASTEST)
    table(f"{len(points)} points, {simulated} plans simulated")
    table(f"chosen plans are at most {behind:.1%} behind the best simulated; the model errs by at most {error:.2%}")
    if given.json:
        print(json.dumps({"behind_best": behind, "model_error": error, "points": points}, indent=1))


if __name__ == "__main__":
    main()
