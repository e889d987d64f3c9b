"""Cycles of the RTL's counters beside the timing simulator's, for compiled programs and random streams.

Programs generate with the shipped draft model (--model for another) on machine tiny; streams are those of the
hardware tests. Each runs without stalls and with seeded ones. Exit status 1 if any cycles differ.

    python benchmarks/rtl_cycles.py [--devices 1,2,4] [--streams 20] [--stalls 2026] [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from typebar.compiler.emit.head import DESCRIPTOR_WORDS
from typebar.host import api
from typebar.host.driver import DeviceEngine
from typebar.host.facts import image_facts
from typebar.host.rtl import RtlDevice
from typebar.isa.image import Image
from typebar.isa.instructions import Region
from typebar.isa.machine import LINE_BYTES, Machine
from typebar.sim.timing import run_timing
from typebar.tests.hw.stream_tools import io_words
from typebar.tests.hw.streams import REGION_BYTES, random_stream

TINY = Machine.load("tiny")
_WORD = 4


def row(program: str, devices: int, seed: int, rtl: list[int], simulated: list[int]) -> dict[str, Any]:
    worst = max(abs(mine - theirs) for mine, theirs in zip(rtl, simulated, strict=True))
    return {
        "program": program,
        "devices": devices,
        "stall_seed": seed,
        "rtl_cycles": max(rtl),
        "simulated_cycles": max(simulated),
        "error": worst,
    }


def compiled(model: str, devices: int, seed: int, prompt: int, new: int) -> dict[str, Any]:
    """A whole generation: `prompt` tokens in, `new` tokens out, on a ring of kernels."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.safetensors"
        api.compile(model, path, machine=TINY, devices=devices)
        with Image.open(path) as image:
            facts, program = image_facts(image), image.program
            device = RtlDevice(TINY, devices, stall_seed=seed)
            engine = DeviceEngine(image, device, "rtl")
            engine.greedy(list(range(1, prompt + 1)), new, None, lambda _: None)
            cycles = [device.total(rank, "cycles") for rank in range(devices)]
            device.native.close()
    words = np.zeros((devices, facts.io.bytes // _WORD), np.int32)
    for name, value in {"count": prompt, "new": new, "eos": -1}.items():
        words[:, facts.io.descriptor_line * LINE_BYTES // _WORD + DESCRIPTOR_WORDS[name]] = value
    timed = run_timing(program, TINY, devices, words, entry=facts.entry, stall_seed=seed)
    return row(f"{model}, {prompt} + {new} tokens", devices, seed, cycles, timed.device_cycles)


def streams(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Random streams, a row for each size of ring."""
    by_devices: dict[int, tuple[list[int], list[int], int]] = {}
    rings: dict[int, RtlDevice] = {}
    for number in range(count):
        stream = random_stream(number, TINY)
        if stream.devices not in rings:
            device = rings[stream.devices] = RtlDevice(TINY, stream.devices, stall_seed=seed)
            for rank in range(stream.devices):
                for region, size in REGION_BYTES.items():
                    device.allocate(rank, region, size)
        device = rings[stream.devices]
        for rank, memory in enumerate(stream.memories()):
            for region, data in memory.regions.items():
                device.write(rank, Region(region), 0, data)
        device.load(stream.program)
        device.launch(0)
        device.wait()
        timed = run_timing(stream.program, TINY, stream.devices, io_words(stream), stall_seed=seed)
        rtl, simulated, number_of = by_devices.setdefault(stream.devices, ([], [], 0))
        rtl += [device.total(rank, "cycles") for rank in range(stream.devices)]
        simulated += list(timed.device_cycles)
        by_devices[stream.devices] = rtl, simulated, number_of + 1
    for devices, (rtl, simulated, number_of) in sorted(by_devices.items()):
        worst = row(f"{number_of} random streams", devices, seed, rtl, simulated)
        yield worst | {"rtl_cycles": sum(rtl), "simulated_cycles": sum(simulated)}
        rings[devices].native.close()


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    seeds = [0] if args.stalls == 0 else [0, args.stalls]
    for seed in seeds:
        for devices in [int(item) for item in args.devices.split(",")]:
            yield compiled(args.model, devices, seed, args.prompt_tokens, args.new_tokens)
        yield from streams(args.streams, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="folio-draft")
    parser.add_argument("--devices", default="1,2,4", help="sizes of ring, between commas")
    parser.add_argument("--prompt-tokens", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=4)
    parser.add_argument("--streams", type=int, default=20, help="random streams")
    parser.add_argument("--stalls", type=int, default=2026, help="seed of the second round's stalls; 0 for none")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = list(rows(args))
    if args.json:
        print(json.dumps(found))
    else:
        table = Table("program", "devices", "stalls", "RTL cycles", "simulated", "error", title="RTL and simulator")
        for item in found:
            figures = [item["devices"], item["stall_seed"] or "-", item["rtl_cycles"], item["simulated_cycles"]]
            shown = [f"{value:,}" if isinstance(value, int) and value > 9999 else str(value) for value in figures]
            table.add_row(item["program"], *shown, str(item["error"]))
        Console().print(table)
    sys.exit(any(item["error"] for item in found))


if __name__ == "__main__":
    main()
