"""The planner against the simulator: shapes x devices x phases, every plan worth simulating, the model's error.

    python benchmarks/planner.py [--shapes gpt2,...] [--devices 1,2,...] [--set KEY=VALUE]... [--json FILE]

For each point: the simulated cycles of a pass under the plan chosen and under the best plan found, the distance between
them, and the largest error of the analytical model over the plans simulated. Plans simulated are those that the planner
considers, each within `NEAR` of its best by the model, and columns: one that the model puts further behind could be the
simulator's best only if the model erred by more than that, and the errors printed say how far it errs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from typebar.compiler.driver import build
from typebar.compiler.frontend import FrontendModel, load_model
from typebar.compiler.plan import COLUMNS
from typebar.compiler.planner import PHASES, propose
from typebar.host.planning import pass_cycles
from typebar.isa.instructions import Format
from typebar.isa.machine import Machine

SHAPES = ("gpt2", "dfx-345m", "gpt2-large", "gpt2-xl", "dfx-1.5b", "tinyllama-1.1b")
DEVICES = (1, 2, 3, 4, 6, 8)
NEAR = 1.25


def point(model: FrontendModel, machine: Machine, devices: int, phase: str) -> dict[str, Any]:
    """What the model and the simulator say of each plan on one ring."""
    proposals = propose(model, machine, devices, Format.FP16, phase)
    best = proposals[0].cycles
    plans = []
    for item in proposals:
        if item.cycles <= NEAR * best or item.plan == COLUMNS:
            cycles = pass_cycles(build(model, machine, devices, Format.FP16, item.plan), phase)
            error = item.cycles / cycles - 1
            plans.append({"plan": str(item.plan), "model": item.cycles, "simulator": cycles, "error": error})
    chosen, fastest = plans[0], min(plans, key=lambda item: item["simulator"])
    columns = next(item for item in plans if item["plan"] == str(COLUMNS))
    return {
        "shape": model.name,
        "devices": devices,
        "phase": phase,
        "chosen": chosen["plan"],
        "best": fastest["plan"],
        "cycles": chosen["simulator"],
        "behind_best": chosen["simulator"] / fastest["simulator"] - 1,
        "before_columns": columns["simulator"] / chosen["simulator"] - 1,
        "model_error": max((item["error"] for item in plans), key=abs),
        "plans": plans,
    }


def main() -> None:
    """Print a line for each point, and the largest distance and error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--devices", default=",".join(map(str, DEVICES)))
    parser.add_argument("--machine", default="u280")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    machine = Machine.load(given.machine).override(dict(item.split("=", 1) for item in given.set))
    print(f"{'shape':15} {'devices':>7} {'phase':8} {'cycles':>9} {'behind':>7} {'gain':>6} {'error':>6}  plan chosen")
    points = []
    for shape in given.shapes.split(","):
        model = load_model(shape)
        for devices in map(int, given.devices.split(",")):
            for phase in PHASES:
                made = point(model, machine, devices, phase)
                points.append(made)
                print(
                    f"{shape:15} {devices:7} {phase:8} {made['cycles']:9.0f} {made['behind_best']:7.1%} "
                    f"{made['before_columns']:6.1%} {made['model_error']:+6.1%}  {made['chosen']}",
                    flush=True,
                )
    behind, error = (max(abs(item[name]) for item in points) for name in ("behind_best", "model_error"))
    simulated = sum(len(item["plans"]) for item in points)
    print(f"{len(points)} points, {simulated} plans simulated")
    print(f"chosen plans are at most {behind:.1%} behind the best simulated; the model errs by at most {error:.1%}")
    if given.json is not None:
        given.json.write_text(json.dumps({"behind_best": behind, "model_error": error, "points": points}, indent=1))


if __name__ == "__main__":
    main()
