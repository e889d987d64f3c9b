"""How the matrices of a model go to a ring of devices: an analytical model proposes, a simulator may dispose.

Every matrix goes by columns (attention by heads), is whole on every device or, if its input is shared out, goes by
rows. Neither of the first two splits an addition, so that among them no choice changes a bit; rows do. A copy costs the
time to stream it and saves a gather, so it pays for small matrices on many devices. Rows save the gather of the input,
and cost the additions of all devices' partial sums: they pay where a hop is slow. All combinations are tried that can
be better than columns alone: a pass never takes less than the time of its rows from HBM (`Cost.hbm`), and what a copy
adds to that is known beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

from typebar.compiler import device_ir as dev
from typebar.compiler import ir
from typebar.compiler.cost import Cost, CostModel
from typebar.compiler.cost_units import matmul_rows
from typebar.compiler.driver import Compiled, allocated, as_stored, build
from typebar.compiler.frontend import FrontendModel
from typebar.compiler.memory import program_of
from typebar.compiler.plan import COLUMNS, DECODE, EXACT, FASTEST, PHASES, SPLITS, Plan
from typebar.isa import timing
from typebar.isa.errors import TypebarError
from typebar.isa.instructions import FORMAT_BYTES, Format
from typebar.isa.machine import Machine

POSITION, PROMPT = 128, 64
"""Plans are compared by a generated token at `POSITION`, or by the time to the first after `PROMPT` tokens.

Shorter models: as many as they have place for.
"""
SIMULATED = 3
"""Plans that a simulator is asked about, best first."""
_ALIKE = 1.001
"""Plans at most so much slower than the fastest are taken to be as fast."""
MOST = 300
"""Combinations to try at most; of more, only those that treat one matrix otherwise, or all that can be alike."""


@dataclass(frozen=True)
class Proposal:
    """A plan and the cycles that the analytical model gives the phase under it."""

    plan: Plan
    cycles: float


Simulate = Callable[[Compiled, str], float]
"""Cycles of a phase of a compiled program, measured in a simulator."""


def choose(
    model: FrontendModel,
    machine: Machine,
    devices: int,
    fmt: Format,
    phase: str = DECODE,
    split: str = EXACT,
    simulate: Simulate | None = None,
) -> Plan:
    """The plan with which a phase is fastest, by the analytical model or, among its best, by `simulate`.

    A machine that synchronises all devices (`control.barriers`) has columns alone, for that is the machine it models.

    Raises:
        TypebarError: the phase or the split is unknown, or the model cannot be compiled for this ring at all.
    """
    _check(phase, split)
    if devices == 1 or machine.control.barriers:
        return COLUMNS
    proposals = propose(model, machine, devices, fmt, phase, split)[:SIMULATED]
    if simulate is None or len(proposals) == 1:
        return proposals[0].plan
    return min(proposals, key=lambda item: simulate(build(model, machine, devices, fmt, item.plan), phase)).plan


def propose(
    model: FrontendModel,
    machine: Machine,
    devices: int,
    fmt: Format,
    phase: str = DECODE,
    split: str = EXACT,
    prune: bool = True,
) -> list[Proposal]:
    """Plans by the cycles of a phase, fewest first; columns alone is always among them.

    Of the fastest that differ by less than a thousandth, plans without rows come first, then those with fewer copies.

    Without `prune`, also plans that cannot be better than columns.

    Raises:
        TypebarError: the phase or the split is unknown, or the model cannot be compiled for this ring at all.
    """
    _check(phase, split)
    cost = _cost(build(model, machine, devices, fmt), phase)
    found = [Proposal(COLUMNS, cost.cycles)]
    if devices == 1:
        return found
    readings = 1 if phase == DECODE else -(-PROMPT // machine.matrix.vectors)
    for plan, added in _plans(matrices(model, machine, devices, fmt), split):
        if prune and cost.hbm + readings * added >= cost.cycles:
            continue
        try:
            made = build(model, machine, devices, fmt, plan)
        except TypebarError:  # there is no such form, or no room: columns have both
            continue
        found.append(Proposal(plan, _cost(made, phase).cycles))
    alike = _ALIKE * min(item.cycles for item in found)
    return sorted(
        found, key=lambda item: (max(item.cycles, alike), len(item.plan.rows), len(item.plan.replicate), item.cycles)
    )


def _check(phase: str, split: str) -> None:
    for what, value, known in (("phase", phase, PHASES), ("split", split, SPLITS)):
        if value not in known:
            raise TypebarError(f"there is no {what} {value!r}: choose {' or '.join(known)}")


def _cost(made: Compiled, phase: str) -> Cost:
    """What the phase costs by the analytical model."""
    model, (position, prompt) = CostModel(made), lengths(int(made.model.config["context"]))
    return model.token(position) if phase == DECODE else model.prompt(prompt)


def lengths(context: int) -> tuple[int, int]:
    """The position of the token, and the tokens of the prompt, for which plans of a model are compared."""
    return min(POSITION, context - 2), min(PROMPT, context - 2)


@dataclass(frozen=True)
class Matrix:
    """Weights that one product reads, by name; cycles of HBM that whole copies in all layers add.

    `shared_out`: whether its input comes from a gather, so that it can go by rows.
    """

    names: tuple[str, ...]
    added: float
    shared_out: bool


def matrices(model: FrontendModel, machine: Machine, devices: int, fmt: Format) -> list[Matrix]:
    """The products of a model's step but for the logits.

    Raises:
        TypebarError: the model cannot be lowered for this ring.
    """
    model, stored = as_stored(model, fmt)
    p = timing.timing_parameters(machine)
    found: dict[tuple[str, ...], Matrix] = {}
    for op in program_of(allocated(model, machine, devices)).walk():
        if not isinstance(op, dev.MatrixOp):
            continue
        size, k = 1 if op.int8 else FORMAT_BYTES[stored], int(op.k.value.data)
        whole = sum(-(-piece.size // piece.unit) * piece.pad for piece in op.pieces)
        parent = op.parent_op()
        layers = parent.count.value.data if isinstance(parent, ir.RepeatOp) else 1
        rows = matmul_rows(p, k, max(whole, op.words), size) - matmul_rows(p, k, op.words, size)
        names = tuple(dict.fromkeys(piece.weight for piece in op.pieces))
        before = found[names].added if names in found else 0.0
        added = before + layers * rows * p.write_period / (p.write_period - 1)
        found[names] = Matrix(names, added, isinstance(op.x.owner, dev.GatherOp))
    return list(found.values())


def _plans(matrices: list[Matrix], split: str) -> Iterator[tuple[Plan, float]]:
    """Plans other than columns alone, and the cycles of HBM that they add."""
    ways = [("columns", "replicate", *(["rows"] if split == FASTEST and m.shared_out else [])) for m in matrices]
    total = 1
    for way in ways:
        total *= len(way)
    alike = [tuple(name if name in way else "columns" for way in ways) for name in ("replicate", "rows")]
    alone = [
        tuple(name if i == at else "columns" for i in range(len(ways))) for at, way in enumerate(ways) for name in way
    ]
    for choice in product(*ways) if total <= MOST else dict.fromkeys(alike + alone):
        if set(choice) != {"columns"}:
            chosen = list(zip(matrices, choice, strict=True))
            named = {w: tuple(n for m, how in chosen if how == w for n in m.names) for w in ("replicate", "rows")}
            yield Plan(**named), sum(m.added for m, how in chosen if how == "replicate")
