"""The reproduction of DFX: every published latency, throughput, scaling and breakdown figure beside `u280-dfx`'s.

All of ours come from the timing simulator on compiled programs, shapes only. The published figures, what a pass is and
the fit of the three constants are in dfx_fit.py; what they mean, and what contradicts itself, is in
docs/reproduction.md.
Exit status 1 if the fit does not give the constants of the machine file.

    python benchmarks/dfx.py [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from typebar import simulate
from typebar.benchmarks.dfx_fit import (
    BREAKDOWN,
    CONSTANTS,
    DECODE_RATE,
    FIRST_TOKEN,
    FITTED,
    LATENCY,
    SHARES,
    THROUGHPUT,
    Config,
    error,
    fit,
    generate,
    leave_one_out,
    measure,
    name_of,
    published_pass_ms,
    shipped_constants,
)
from typebar.isa.machine import Machine

ONE, TWO, FOUR = (("dfx-345m", devices) for devices in (1, 2, 4))


def row(figure: str, unit: str, paper: float, ours: float, status: str = "predicted") -> dict[str, Any]:
    """One published figure: the error in per cent, for shares in points.

    `status`: fitted, follows (from a pass's time that was fitted), held out, or predicted.
    """
    off = ours - paper if unit == "%" else (ours / paper - 1) * 100
    return {"figure": figure, "unit": unit, "paper": paper, "ours": ours, "error": off, "status": status}


def passes_ms(config: Config) -> NDArray[np.float64]:
    """Milliseconds after which each pass is over, for as many passes as the longest published setting takes."""
    machine = Machine.load("u280-dfx")
    longest = max([128, *(before + after for before, after in LATENCY.get(config, {}))])
    return generate(machine, config, longest)[0] / (machine.clock_mhz * 1e3)


def rates(times: dict[Config, NDArray[np.float64]]) -> dict[Config, float]:
    """Tokens a second at 64:64, 64 of them in the time of 128 passes."""
    return {config: 64e3 / float(times[config][127]) for config in THROUGHPUT}


def figures() -> Iterator[dict[str, Any]]:
    """Every published figure that the issue does not set aside."""
    times = {config: passes_ms(config) for config in THROUGHPUT}
    ours = rates(times)
    status = {config: "fitted" if config in FITTED else "held out" for config in THROUGHPUT}
    for config in THROUGHPUT:
        yield row(f"{name_of(config)}, a pass", "ms", published_pass_ms(config), 500 / ours[config], status[config])
    for config, rate in THROUGHPUT.items():
        yield row(f"{name_of(config)}, 64:64", "tokens/s", rate, ours[config], status[config])
    for few, many in ((ONE, TWO), (TWO, FOUR), (ONE, FOUR)):
        paper = THROUGHPUT[many] / THROUGHPUT[few]
        yield row(f"dfx-345m, {few[1]} to {many[1]} devices", "times", paper, ours[many] / ours[few])
    for config, table in LATENCY.items():
        for (before, after), paper in table.items():
            found = float(times[config][before + after - 1])
            yield row(f"{name_of(config)}, {before}:{after}", "ms", paper, found, "follows")
    for (before, after), paper in FIRST_TOKEN.items():
        found = float(times[ONE][before])
        yield row(f"{name_of(ONE)}, {before}:{after}, first token", "ms", paper, found, "follows")
    decode = 63e3 / float(times[ONE][127] - times[ONE][64])
    yield row(f"{name_of(ONE)}, decode", "tokens/s", DECODE_RATE, decode, "follows")
    split = measure(BREAKDOWN, shipped_constants())[1]
    for (name, paper), share in zip(SHARES.items(), split, strict=True):
        known = "fitted" if name == "synchronisation" else "predicted"
        yield row(f"{name_of(BREAKDOWN)}, {name}", "%", paper * 100, share * 100, known)


def our_own() -> Iterator[dict[str, Any]]:
    """64:64 as this project's programs run it: no head inside the prompt, and no pass after the last token."""
    for config, rate in THROUGHPUT.items():
        found = simulate(config[0], machine="u280-dfx", devices=config[1], prompt_tokens=64, new_tokens=64)
        yield row(f"{name_of(config)}, 64:64", "ms", 64e3 / rate, found.total_ms)


def report() -> dict[str, Any]:
    """All figures, the fit, and the errors of what was left out."""
    start, used = time.perf_counter(), time.process_time()
    found = fit(FITTED)
    return {
        "figures": list(figures()),
        "constants": dict(zip(CONSTANTS, shipped_constants(), strict=True)),
        "fit": dict(zip(CONSTANTS, found.values, strict=True)),
        "fit_errors": {name_of(target): error(target, found.values) for target in FITTED},
        "leave_one_out": leave_one_out(),
        "without_prompt_heads": list(our_own()),
        "wall_s": time.perf_counter() - start,
        "cpu_s": time.process_time() - used,
    }


def show(found: dict[str, Any]) -> None:
    """The report as tables."""
    console = Console(width=110)
    table = Table("figure", "unit", "paper", "ours", "error", "", title="DFX and u280-dfx")
    for item in found["figures"]:
        off = f"{item['error']:+.1f} " + ("points" if item["unit"] == "%" else "%")
        figures_ = (f"{item['paper']:.5g}", f"{item['ours']:.5g}", off)
        table.add_row(item["figure"], item["unit"], *figures_, item["status"])
    console.print(table)
    table = Table("left out", "error", *CONSTANTS, title="Leave one out")
    for item in found["leave_one_out"]:
        unit = "points" if "share" in item["left_out"] else "%"
        table.add_row(item["left_out"], f"{item['error'] * 100:+.1f} {unit}", *(str(item[name]) for name in CONSTANTS))
    table.add_row("nothing but x 2 and x 4", "", *(str(found["fit"][name]) for name in CONSTANTS))
    console.print(table)
    table = Table("setting", "paper, ms", "ours, ms", "error", title="As this project's programs run it")
    for item in found["without_prompt_heads"]:
        table.add_row(item["figure"], f"{item['paper']:.5g}", f"{item['ours']:.5g}", f"{item['error']:+.1f} %")
    console.print(table)
    console.print(f"{found['wall_s']:.0f} s, {found['cpu_s']:.0f} s of CPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    as_json = parser.parse_args().json
    found = report()
    if as_json:
        print(json.dumps(found))
    else:
        show(found)
    sys.exit(found["fit"] != found["constants"])


if __name__ == "__main__":
    main()
