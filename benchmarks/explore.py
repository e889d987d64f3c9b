"""The search behind u280's parameters: its front of token time against area, fp16, 64 tokens of context.

python benchmarks/explore.py [--quick] [-o FRONT.svg] [--json]

`typebar explore` on the choices that docs/decisions.md argues: columns and rows of dot units, the port that feeds them,
words of a register row, depth of the queues; on one device and on four. --quick: the 345M model on four devices alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from typebar.host.cli_explore import print_exploration
from typebar.host.cli_output import progress
from typebar.host.explore import explore
from typebar.host.explore_plot import draw

LIMIT = 0.9
"""Share of each resource of the chip that a machine may take; `u280` takes 87 % of the UltraRAM."""
VARY = {
    "matrix.columns": [16, 32],
    "matrix.rows": [1, 2],
    "matrix.fifo_port_bytes": [2048, 4096],
    "vector.lanes": [16, 32],
    "control.queue_depth": [32, 64],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one model, one ring")
    parser.add_argument("-o", "--output", type=Path, metavar="FRONT.svg", help="draw it")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    shapes = ["dfx-345m"] if args.quick else ["dfx-345m", "dfx-1.5b"]
    with progress("exploring", args.json) as show:
        found = explore("u280", VARY, shapes, [4] if args.quick else [1, 4], limit=LIMIT, progress=show)
    if args.output is not None:
        args.output.write_text(draw(found))
    if args.json:
        print(json.dumps(found.to_json()))
    else:
        print_exploration(found)


if __name__ == "__main__":
    main()
