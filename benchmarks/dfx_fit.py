"""What DFX (Hong et al., MICRO 2022) published, what `u280-dfx` takes for the same, and the fit of its constants.

A pass is one token through the whole model, language-model head included. The paper's times are `in + out` equal
passes: a token of the prompt costs what a generated one does. So a setting is timed as a generation of in + out tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from typebar.compiler import driver
from typebar.compiler.driver import Compiled
from typebar.compiler.emit.head import DESCRIPTOR_WORDS
from typebar.compiler.frontend import load_model
from typebar.isa.instructions import Format, Unit
from typebar.isa.machine import LINE_BYTES, Machine
from typebar.isa.program import Program
from typebar.sim.timing import TimingResult, run_timing

Config = tuple[str, int]
"""A shape and a number of devices."""

THROUGHPUT: dict[Config, float] = {
    ("dfx-345m", 1): 93.10,
    ("dfx-345m", 2): 146.25,
    ("dfx-345m", 4): 207.56,
    ("dfx-1.5b", 4): 72.68,
}
"""Tokens generated a second, 64 in and 64 out (section 6)."""
SHARES = {"attention and FFN": 0.726, "synchronisation": 0.173, "remainder": 0.101}
"""Where the time of a 1.5B pass on four FPGAs goes (section 6)."""
BREAKDOWN: Config = ("dfx-1.5b", 4)
LATENCY: dict[Config, dict[tuple[int, int], float]] = {
    ("dfx-1.5b", 4): {
        (32, 1): 227, (32, 16): 330, (32, 256): 1981,
        (64, 1): 447, (64, 16): 550, (64, 256): 2201,
        (128, 1): 887, (128, 16): 991, (128, 256): 2642,
    },
    ("dfx-345m", 1): {(32, 32): 350.0, (64, 64): 694.7, (128, 128): 1384.0},
}  # fmt: skip
"""Milliseconds for (tokens in, tokens out): 1.5B as IANUS (ASPLOS 2024, figure 9) copies them, 345M as StreamTensor
(2025) does. StreamTensor's 256:256 is outside DFX's input range and left out."""
FIRST_TOKEN = {(32, 32): 177.2, (64, 64): 349.1, (128, 128): 692.8}
"""Milliseconds to the first token, 345M on one FPGA (StreamTensor)."""
DECODE_RATE = 185.19
"""Tokens a second while generating, 345M on one FPGA (StreamTensor)."""

CONSTANTS = ("hbm.rows_per_write_slot", "ring.setup_latency", "hbm.latency")
"""The fitted constants. HBM delivers n rows in n + 1 cycles; a synchronisation costs `setup_latency` before its first
word; first weights come `latency` after their request, which no run-ahead hides after a synchronisation."""
ROWS_TRIED = (1, 2, 3, 6, 13)
"""Values of the first constant that the fit tries: 50, 67, 75, 86 and 93 % of the peak."""
SHARE = "synchronisation share"
Target = Config | str
FITTED: tuple[Target, ...] = (("dfx-345m", 1), ("dfx-1.5b", 4), SHARE)
"""What the machine file's constants are fitted to. 345M on two and four devices is held out."""
TARGETS: tuple[Target, ...] = (*THROUGHPUT, SHARE)
_MIDDLE = 63
"""First position of the two passes that stand for the 128 of 64:64: both attend to 64.5 tokens on average."""
_SECANT = (200, 200)
_START = (1000, 1000)
_STEPS = 3


def published_pass_ms(config: Config) -> float:
    """Milliseconds a pass, from the throughput: 64 tokens in the time of 128 passes."""
    return 64 / (128 * THROUGHPUT[config]) * 1e3


@cache
def compiled(shape: str, devices: int) -> Compiled:
    """The program; no fitted constant changes it."""
    return driver.build(load_model(shape), Machine.load("u280-dfx"), devices, Format.FP16)


def with_constants(values: Sequence[int]) -> Machine:
    """`u280-dfx` with other values of the fitted constants."""
    return Machine.load("u280-dfx").override({k: str(v) for k, v in zip(CONSTANTS, values, strict=True)})


def shipped_constants() -> tuple[int, ...]:
    """The fitted constants of the machine file."""
    return tuple(Machine.load("u280-dfx").parameters()[name] for name in CONSTANTS)


def generate(
    machine: Machine, config: Config, passes: int, start: int = 0, trace: bool = False
) -> tuple[NDArray[np.int64], TimingResult]:
    """Generate `passes` tokens from one token at position `start`: the cycle in which each is there, and the run."""
    made = compiled(*config)
    io = made.memory.io
    words = np.zeros((config[1], io.bytes // 4), np.int32)
    for name, value in {"start": start, "count": 1, "new": passes, "eos": -1}.items():
        words[:, io.descriptor_line * LINE_BYTES // 4 + DESCRIPTOR_WORDS[name]] = value
    result = run_timing(made.program, machine, config[1], words, trace=trace)
    first = io.tokens_line * LINE_BYTES // 4 + start + 1
    cycles = {(s.line * LINE_BYTES + s.byte) // 4 - first: s.cycle for s in result.stores if s.device == 0}
    return np.array([cycles[i] for i in range(passes)]), result


def kinds(program: Program) -> NDArray[np.int64]:
    """For each instruction, which of SHARES its time belongs to, by the comment that begins its operation.

    Attention and FFN are the matrix operations and what lies between them in attention; normalisations, residual
    additions, embeddings and the head are the remainder.
    """
    found, current = [], 2
    for index, op in enumerate(program.ops):
        comment = program.comments.get(index, "")
        if comment.startswith(("matrix", "attention", "activation")):
            current = 0
        elif comment.startswith(("layer_norm", "add", "lookup", "param", "bias", "logits", "inside")):
            current = 2
        found.append(1 if op.kind.name == "gather" else current)
    return np.array(found)


def shares(program: Program, result: TimingResult, begin: int, end: int) -> tuple[float, ...]:
    """Shares of device 0's cycles from `begin` to `end`: each belongs to the last instruction that has started."""
    trace = result.trace
    assert trace is not None
    units = (int(Unit.MATRIX), int(Unit.VECTOR), int(Unit.RING))
    chosen = np.flatnonzero((trace.device == 0) & np.isin(trace.unit, units))
    chosen = chosen[np.argsort(trace.start[chosen], kind="stable")]
    edges = np.clip(np.append(trace.start[chosen], end), begin, end)
    cycles = np.bincount(kinds(program)[trace.pc[chosen]], np.diff(edges), len(SHARES))
    return tuple(float(share) for share in cycles / cycles.sum())


@cache
def measure(config: Config, values: tuple[int, ...]) -> tuple[float, tuple[float, ...]]:
    """Milliseconds of a pass in the middle of 64:64, and its shares."""
    machine = with_constants(values)
    cycles, result = generate(machine, config, 3, _MIDDLE - 1, trace=True)
    begin, end = int(cycles[0]), int(cycles[2])
    return (end - begin) / 2 / (machine.clock_mhz * 1e3), shares(compiled(*config).program, result, begin, end)


def error(target: Target, values: tuple[int, ...]) -> float:
    """Ours against the paper's: relative for a pass's time, in absolute terms for the share of synchronisation."""
    if isinstance(target, str):
        return measure(BREAKDOWN, values)[1][1] - SHARES["synchronisation"]
    return measure(target, values)[0] / published_pass_ms(target) - 1


@dataclass(frozen=True)
class Fit:
    """Values of CONSTANTS, and the sum of squared errors over what they were fitted to."""

    values: tuple[int, ...]
    squares: float


def fit(targets: Sequence[Target]) -> Fit:
    """The constants with the least sum of squared errors, a per cent of time weighing as much as a point of share.

    Times are all but linear in the two latencies, so for each bandwidth a few secant steps from a fixed start suffice.
    """
    return min((_fit_latencies(rows, targets) for rows in ROWS_TRIED), key=lambda found: found.squares)


def _fit_latencies(rows: int, targets: Sequence[Target]) -> Fit:
    def errors(latencies: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.array([error(target, (rows, *map(int, latencies))) for target in targets])

    at = np.array(_START, float)
    base = errors(at)
    slopes = np.stack([(errors(at + step) - base) / step.sum() for step in np.diag(_SECANT).astype(float)], axis=1)
    tried = [(float(base @ base), tuple(map(int, at)))]
    for _ in range(_STEPS):
        at = np.clip(np.round(at - np.linalg.lstsq(slopes, base, rcond=None)[0]), 8, 4096)
        base = errors(at)
        tried.append((float(base @ base), tuple(map(int, at))))
    squares, best = min(tried)
    return Fit((rows, *best), squares)


def leave_one_out() -> list[dict[str, Any]]:
    """For every target: the constants fitted to the other four, and its own error under them."""
    found = []
    for target in TARGETS:
        values = fit([other for other in TARGETS if other != target]).values
        constants = dict(zip(CONSTANTS, values, strict=True))
        found.append({"left_out": name_of(target), "error": error(target, values), **constants})
    return found


def name_of(target: Target) -> str:
    """A target in words."""
    return target if isinstance(target, str) else f"{target[0]} x {target[1]}"
