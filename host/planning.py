"""How a command or a call says which plan to compile with, and what a simulator makes of plans."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typebar.isa.errors import TypebarError
from typebar.isa.machine import Machine

if TYPE_CHECKING:
    from typebar.compiler.driver import Compiled
    from typebar.compiler.frontend import FrontendModel
    from typebar.compiler.plan import Plan
    from typebar.isa.instructions import Format

MODEL, SIMULATE, COLUMNS = "model", "simulate", "columns"
PLANS = (MODEL, SIMULATE, COLUMNS)
"""A plan by the analytical model; by the timing simulator, among the model's best; or columns and heads alone."""


def plan_for(model: FrontendModel, machine: Machine, devices: int, fmt: Format, how: str = COLUMNS) -> Plan:
    """The plan for a lowered model on a ring, chosen for decoding.

    Raises:
        TypebarError: `how` is none of `PLANS`, or the model cannot be compiled for this ring.
    """
    from typebar.compiler import plan, planner

    check_plan(how)
    if how == COLUMNS:
        return plan.COLUMNS
    return planner.choose(model, machine, devices, fmt, simulate=pass_cycles if how == SIMULATE else None)


def check_plan(how: str) -> None:
    """Refuse, before anything long is done, a way to choose plans that there is not.

    Raises:
        TypebarError: `how` is none of `PLANS`.
    """
    if how not in PLANS:
        raise TypebarError(f"plan cannot be {how!r}: choose {', '.join(PLANS[:-1])} or {PLANS[-1]}")


def pass_cycles(made: Compiled, phase: str = "decode") -> float:
    """Cycles of a pass in the timing simulator, at the position for which the analytical model compares plans.

    A pass of `decode` generates a token; one of `prefill` takes in a token of the prompt.

    Raises:
        TypebarError: the program stops with a trap.
    """
    from typebar.compiler.planner import DECODE, POSITION
    from typebar.host.report import measure, subject_from

    subject = subject_from(made)
    start = min(POSITION, subject.context - 2) - 1
    if phase == DECODE:
        return float(measure(subject, 1, 2, start)[0].decode["cycles"])
    longer, shorter = measure(subject, 2, 1, start - 1)[0], measure(subject, 1, 1, start)[0]
    return float(longer.prefill["cycles"] - shorter.prefill["cycles"])
