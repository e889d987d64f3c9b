"""Machine parameters x models x device counts: what each combination takes of the chip, how fast it is, which to keep.

Definitions:

- ms_per_token: decoding, as `typebar.host.report` defines it, of a generation simulated on the compiled program.
- shares: what a device's kernel takes of an Alveo U280, shell included, by the area model (`typebar.hw.area`).
- fits: no share is above `limit`.
- area: the share of the resource chosen (`largest`: of whichever has the largest), times the devices; in chips.
- front: of a model's points, those that no other beats: none is at least as fast in at most the area, and better in
  one of the two. Points that do not fit take no part, unless all are to.

A program depends on the machine's contract parameters alone, so machines that differ in timing share its compilation.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

from typebar.host.explore_run import Executor, run_all
from typebar.host.report import Subject, compiled_subject, measure, model_of
from typebar.isa.errors import TypebarError
from typebar.isa.machine import Machine, MachineError

AREAS = ("LUT", "FF", "DSP", "BRAM", "URAM", "largest")
MOST_POINTS = 10_000
"""Combinations in one exploration at most."""


@dataclass(frozen=True)
class Figures:
    """What the simulator says; each as `typebar.host.report` defines it."""

    ms_per_token: float
    limit_ms_per_token: float
    first_token_ms: float
    hbm_utilization: float


@dataclass(frozen=True)
class Point:
    """One machine, model and number of devices; `varied` are the parameters varied, by their dotted names."""

    varied: dict[str, Any]
    shape: str
    devices: int
    figures: Figures
    shares: dict[str, float]
    area: float
    fits: bool
    front: bool = False

    @property
    def ms_per_token(self) -> float:
        """Time of a token, the front's second cost."""
        return self.figures.ms_per_token


@dataclass(frozen=True)
class Refusal:
    """A combination that cannot be, and why; `shape` and `devices` are None if the machine alone is to blame."""

    varied: dict[str, Any]
    reason: str
    shape: str | None = None
    devices: int | None = None


@dataclass(frozen=True)
class Exploration:
    """What was explored; `points` and `refused` in the order of the grid, models outermost."""

    machine: str
    weights: str
    prompt_tokens: int
    new_tokens: int
    limit: float
    area: str
    executor: str
    points: list[Point]
    refused: list[Refusal]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data, each point's figures beside its other values."""
        data = asdict(self)
        return data | {"points": [point | point.pop("figures") for point in data["points"]]}

    def fronts(self) -> dict[str, list[Point]]:
        """Each model's front, by area."""
        fronts: dict[str, list[Point]] = {point.shape: [] for point in self.points}
        for point in sorted(self.points, key=lambda point: point.area):
            if point.front:
                fronts[point.shape].append(point)
        return fronts


@dataclass(frozen=True)
class Job:
    """A model on machines that share the program compiled for one; `machines` by their place in the grid."""

    shape: str
    devices: int
    weights: str
    prompt_tokens: int
    new_tokens: int
    compiled: Machine
    machines: tuple[tuple[int, Machine], ...]


@dataclass(frozen=True)
class Timing:
    """What a job found for one machine: figures in ms, or why there are none."""

    shape: str
    devices: int
    machine: int
    figures: Figures | None
    refused: str | None


def explore(
    machine: str | Machine,
    vary: Mapping[str, Sequence[str | int]],
    shapes: Sequence[str],
    devices: Sequence[int],
    weights: str = "fp16",
    prompt_tokens: int = 64,
    new_tokens: int = 4,
    limit: float | None = None,
    area: str = "LUT",
    everything: bool = False,
    executor: Executor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Exploration:
    """Time every machine of a grid on every model and ring, and mark what is worth keeping.

    Args:
        machine: where the grid starts: a shipped machine's name, a .toml file, or a machine.
        vary: values by a machine parameter's dotted name, such as {"matrix.columns": [16, 32]}; all combinations count.
        shapes: shapes, shipped models or checkpoint directories.
        devices: numbers of devices.
        weights: fp16 or bf16.
        prompt_tokens: tokens of the prompt.
        new_tokens: tokens to generate, at least 2: the first ends the prompt's time, the others are decoding.
        limit: share of each resource that a design may take; that of `typebar rtl --report` by default.
        area: the resource whose share is the area, or `largest`.
        everything: let points that do not fit take part in the front.
        executor: where to run; by default Ray's local cluster, or processes where Ray is not installed.
        progress: called with the points timed and their number.

    Raises:
        TypebarError: in one line, for anything the caller can mend; combinations that cannot be are not among these.
    """
    from typebar.compiler import driver
    from typebar.hw.report import LIMIT

    base = machine if isinstance(machine, Machine) else Machine.load(machine)
    limit, executor = LIMIT if limit is None else limit, executor or Executor()
    _check(base, vary, shapes, devices, new_tokens, limit, area)
    driver.weights_format(weights)
    for count in devices:
        driver.check_devices(count)
    grid, shares, refused = _machines(base, vary)
    jobs = _jobs(grid, shapes, devices, (weights, prompt_tokens, new_tokens), executor.workers)
    total = len(grid) * len(shapes) * len(devices)
    found: dict[tuple[str, int, int], Timing] = {}
    results, ran = run_all(executor, time_job, jobs)
    for timings in results:
        found |= {(item.shape, item.devices, item.machine): item for item in timings}
        if progress is not None:
            progress(len(found), total)
    points: list[Point] = []
    for shape, count, place in itertools.product(shapes, devices, grid):
        timing, varied = found[shape, count, place], _varied(grid[place], vary)
        if timing.figures is None:
            refused.append(Refusal(varied, timing.refused or "", shape, count))
            continue
        taken = shares[place]
        used = max(taken.values()) if area == "largest" else taken[area]
        fits = max(taken.values()) <= limit
        points.append(Point(varied, shape, count, timing.figures, taken, used * count, fits))
    marked = mark_fronts(points, everything)
    return Exploration(base.name, weights, prompt_tokens, new_tokens, limit, area, ran(), marked, refused)


def mark_fronts(points: Sequence[Point], everything: bool = False) -> list[Point]:
    """The points, those of each model's front marked."""
    marked = [False] * len(points)
    for shape in {point.shape for point in points}:
        places = [i for i, point in enumerate(points) if point.shape == shape and (point.fits or everything)]
        chosen = pareto([(points[i].area, points[i].ms_per_token) for i in places])
        for place, front in zip(places, chosen, strict=True):
            marked[place] = front
    return [replace(point, front=front) for point, front in zip(points, marked, strict=True)]


def pareto(costs: Sequence[tuple[float, float]]) -> list[bool]:
    """For each pair of costs whether no other is at most as high in both and lower in one; equal ones stay together."""
    chosen = [False] * len(costs)
    least, last = float("inf"), None
    for index in sorted(range(len(costs)), key=lambda index: costs[index]):
        if costs[index][1] < least or costs[index] == last:
            chosen[index], least, last = True, costs[index][1], costs[index]
    return chosen


def time_job(job: Job) -> list[Timing]:
    """Compile once, time every machine; what cannot be compiled or run is told, not raised."""
    timings = []
    for place, machine in job.machines:
        try:
            subject = replace(_subject(job.shape, job.compiled, job.devices, job.weights), machine=machine)
            report, _ = measure(subject, job.prompt_tokens, job.new_tokens)
        except TypebarError as error:
            timings.append(Timing(job.shape, job.devices, place, None, str(error)))
            continue
        decode = report.decode
        figures = Figures(
            decode["ms_per_token"], decode["limit_ms_per_token"], report.prefill["ms"], decode["hbm_utilization"]
        )
        timings.append(Timing(job.shape, job.devices, place, figures, None))
    return timings


@lru_cache(maxsize=1)
def _model(shape: str) -> Any:
    return model_of(shape)


@lru_cache(maxsize=1)
def _subject(shape: str, machine: Machine, devices: int, weights: str) -> Subject:
    from typebar.compiler import driver

    return compiled_subject(_model(shape), machine, devices, driver.weights_format(weights))


def _check(
    base: Machine,
    vary: Mapping[str, Sequence[str | int]],
    shapes: Sequence[str],
    devices: Sequence[int],
    new_tokens: int,
    limit: float,
    area: str,
) -> None:
    for name, values in (("shapes", shapes), ("devices", devices), *((f"vary {key}", vary[key]) for key in vary)):
        if isinstance(values, str) or not values:
            raise TypebarError(f"explore {name} must be a list with at least one value, not {values!r}")
        if len(set(map(str, values))) < len(values):
            raise TypebarError(f"explore {name} = {', '.join(map(str, values))} has a value twice: give it once")
    for key in vary:
        if key not in base.parameters() or key in ("name", "description"):
            raise TypebarError(f"unknown machine parameter {key!r}: `typebar machines --json` lists them all")
    if isinstance(new_tokens, bool) or not isinstance(new_tokens, int) or new_tokens < 2:
        raise TypebarError(f"new_tokens must be at least 2, not {new_tokens!r}: the first ends the prompt's time")
    if not 0 < limit <= 1:
        raise TypebarError(f"limit must be a share of the chip, above 0 and at most 1, not {limit!r}")
    if area not in AREAS:
        raise TypebarError(f"area cannot be {area!r}: choose one of {', '.join(AREAS)}")
    points = len(shapes) * len(devices)
    for values in vary.values():
        points *= len(values)
    if points > MOST_POINTS:
        raise TypebarError(f"{points:,} combinations are more than {MOST_POINTS:,}: give fewer values")


def _machines(
    base: Machine, vary: Mapping[str, Sequence[str | int]]
) -> tuple[dict[int, Machine], dict[int, dict[str, float]], list[Refusal]]:
    """The machines of the grid that can be built, by their place in it; their shares of a chip; and the others."""
    from typebar.hw import area

    grid: dict[int, Machine] = {}
    shares: dict[int, dict[str, float]] = {}
    refused: list[Refusal] = []
    for place, values in enumerate(itertools.product(*vary.values())):
        settings = {key: str(value) for key, value in zip(vary, values, strict=True)}
        try:
            machine = base.override(settings)
            shares[place] = area.estimate(machine).shares()
        except MachineError as error:
            refused.append(Refusal(dict(settings), str(error)))
            continue
        grid[place] = machine
    return grid, shares, refused


def _jobs(
    grid: Mapping[int, Machine],
    shapes: Sequence[str],
    devices: Sequence[int],
    generation: tuple[str, int, int],
    workers: int,
) -> list[Job]:
    """Machines with one program together, but no more than leaves every worker something to do."""
    groups: dict[str, list[tuple[int, Machine]]] = {}
    for place, machine in grid.items():
        groups.setdefault(machine.contract_hash(), []).append((place, machine))
    most = max(1, -(-len(grid) * len(shapes) * len(devices) // workers))
    return [
        Job(shape, count, *generation, group[0][1], tuple(group[first : first + most]))
        for shape, count, group in itertools.product(shapes, devices, groups.values())
        for first in range(0, len(group), most)
    ]


def _varied(machine: Machine, names: Iterable[str]) -> dict[str, Any]:
    parameters = machine.parameters()
    return {name: parameters[name] for name in names}
