"""Which matrices a ring of devices should hold whole: an analytical model proposes, a simulator may dispose.

Every matrix goes by columns (attention by heads) or is whole on every device; neither splits an addition, so that no
choice changes a bit. Copies cost the time to stream them and save a gather, so they pay for small matrices on many
devices. All combinations are tried that can be better than columns alone: a pass never takes less than the time of its
rows from HBM (`Cost.hbm`), and what a copy adds to that is known beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

from xdsl.dialects.builtin import ModuleOp

from typebar.compiler import device_ir as dev
from typebar.compiler import ir
from typebar.compiler.cost import CostModel, rows_of_product
from typebar.compiler.driver import Compiled, allocated, as_stored, build
from typebar.compiler.frontend import FrontendModel
from typebar.compiler.memory import plan_memory, program_of
from typebar.compiler.plan import COLUMNS, Plan
from typebar.isa import timing
from typebar.isa.errors import TypebarError
from typebar.isa.instructions import FORMAT_BYTES, Format
from typebar.isa.machine import Machine

DECODE, PREFILL = "decode", "prefill"
PHASES = (DECODE, PREFILL)
POSITION = 128
"""The position for which plans are compared, or the last one of a shorter model."""
SIMULATED = 3
"""Plans that a simulator is asked about, best first."""
MOST = 6
"""Matrices of a step of which all combinations are tried; of more, only single ones and all together."""


@dataclass(frozen=True)
class Proposal:
    """A plan and the cycles that the analytical model gives a pass under it."""

    plan: Plan
    cycles: float


Simulate = Callable[[Compiled], float]
"""Cycles of a pass of a compiled program, measured in a simulator."""


def choose(
    model: FrontendModel,
    machine: Machine,
    devices: int,
    fmt: Format,
    phase: str = DECODE,
    simulate: Simulate | None = None,
) -> Plan:
    """The plan with which a pass is fastest, by the analytical model or, among its best, by `simulate`.

    A machine that synchronises all devices (`control.barriers`) has columns alone, for that is the machine it models.

    Raises:
        TypebarError: the model cannot be compiled for this ring at all.
    """
    if devices == 1 or machine.control.barriers:
        return COLUMNS
    proposals = propose(model, machine, devices, fmt, phase)[:SIMULATED]
    if simulate is None or len(proposals) == 1:
        return proposals[0].plan
    return min(proposals, key=lambda item: simulate(build(model, machine, devices, fmt, item.plan))).plan


def propose(
    model: FrontendModel, machine: Machine, devices: int, fmt: Format, phase: str = DECODE, prune: bool = True
) -> list[Proposal]:
    """Plans by the cycles of a pass, fewest first; columns alone is always among them.

    A pass of `decode` generates a token; one of `prefill` takes in a token of the prompt. Without `prune`, also plans
    that cannot be better than columns.

    Raises:
        TypebarError: the phase is unknown, or the model cannot be compiled for this ring at all.
    """
    if phase not in PHASES:
        raise TypebarError(f"there is no phase {phase!r}: choose {' or '.join(PHASES)}")
    model, fmt = as_stored(model, fmt)
    module = allocated(model, machine, devices)
    plan_memory(module, machine, model.weights, fmt)
    cost = _pass(CostModel(module, machine, fmt), phase)
    found = [Proposal(COLUMNS, cost[0])]
    if devices == 1:
        return found
    added = copies(module, machine, fmt)
    for names in _combinations(list(added)):
        if prune and cost[1] + sum(added[name] for name in names) >= cost[0]:
            continue
        plan = Plan(tuple(weight for name in names for weight in name))
        try:
            module = allocated(model, machine, devices, plan)
            plan_memory(module, machine, model.weights, fmt)
        except TypebarError:  # there is no such form, or no room: columns have both
            continue
        found.append(Proposal(plan, _pass(CostModel(module, machine, fmt), phase)[0]))
    return sorted(found, key=lambda item: item.cycles)


def _pass(model: CostModel, phase: str) -> tuple[float, float]:
    """Cycles of a pass, and those of its rows from HBM alone."""
    position = min(POSITION, int(model.program.context.value.data) - 2)
    cost = model.token(position) if phase == DECODE else model.prompt(2, position - 1) - model.prompt(1, position)
    return cost.cycles, cost.hbm


def _combinations(names: Sequence[tuple[str, ...]]) -> list[tuple[tuple[str, ...], ...]]:
    sizes = range(1, len(names) + 1) if len(names) <= MOST else (1, len(names))
    return [chosen for size in sizes for chosen in combinations(names, size)]


def copies(module: ModuleOp, machine: Machine, fmt: Format) -> dict[tuple[str, ...], float]:
    """The products of a program by columns, by their weights, and the cycles of HBM that whole copies would add."""
    p, program = timing.timing_parameters(machine), program_of(module)
    found: dict[tuple[str, ...], float] = {}
    for op in program.walk():
        if not isinstance(op, dev.MatrixOp):
            continue
        size, k = 1 if op.int8 else FORMAT_BYTES[fmt], int(op.k.value.data)
        whole = sum(-(-piece.size // piece.unit) * piece.pad for piece in op.pieces)
        parent = op.parent_op()
        layers = parent.count.value.data if isinstance(parent, ir.RepeatOp) else 1
        rows = rows_of_product(p, k, max(whole, op.words), size) - rows_of_product(p, k, op.words, size)
        name = tuple(dict.fromkeys(piece.weight for piece in op.pieces))
        found[name] = found.get(name, 0.0) + layers * rows * p.write_period / (p.write_period - 1)
    return found
