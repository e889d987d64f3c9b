"""How a command or a call says which plan to compile with, and what a simulator makes of plans."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from typebar.compiler.plan import DECODE, EXACT, FASTEST, PHASES, SPLITS, Plan
from typebar.isa.errors import TypebarError
from typebar.isa.machine import Machine

if TYPE_CHECKING:
    from typebar.compiler.driver import Compiled
    from typebar.compiler.frontend import FrontendModel
    from typebar.isa.instructions import Format

MODEL, SIMULATE, COLUMNS = "model", "simulate", "columns"
PLANS = (MODEL, SIMULATE, COLUMNS)
"""A plan by the analytical model; by the timing simulator, among the model's best; or columns and heads alone."""


@dataclass(frozen=True)
class Planning:
    """What a caller asks of the planner: None leaves it to the rest.

    `how` is one of `PLANS`: columns, unless a `split` or a `phase` is asked for; then the model. `split`: exact, the
    default, or fastest. `phase`: decode, the default, or prefill.
    """

    how: str | None = None
    split: str | None = None
    phase: str | None = None

    def __post_init__(self) -> None:
        """Refuse, before anything long is done, what there is not.

        Raises:
            TypebarError: an unknown way, split or phase, or one of these where columns leave no choice.
        """
        for name, value, known in (
            ("plan", self.how, PLANS),
            ("split", self.split, SPLITS),
            ("phase", self.phase, PHASES),
        ):
            if value is not None and value not in known:
                raise TypebarError(f"{name} cannot be {value!r}: choose {', '.join(known[:-1])} or {known[-1]}")
        if self.how == COLUMNS and (self.split == FASTEST or self.phase is not None):
            asked = f"split = {FASTEST!r}" if self.split == FASTEST else f"phase = {self.phase!r}"
            raise TypebarError(f"plan = {COLUMNS!r} leaves {asked} no choice: ask for plan {MODEL!r} or {SIMULATE!r}")

    def plan(self, model: FrontendModel, machine: Machine, devices: int, fmt: Format) -> Plan:
        """The plan for a lowered model on a ring.

        Raises:
            TypebarError: the model cannot be compiled for this ring.
        """
        from typebar.compiler import plan, planner

        if self.how == COLUMNS or self == Planning():
            return plan.COLUMNS
        simulate = pass_cycles if self.how == SIMULATE else None
        return planner.choose(
            model, machine, devices, fmt, self.phase or DECODE, self.split or EXACT, simulate=simulate
        )


def pass_cycles(made: Compiled, phase: str = DECODE) -> float:
    """Cycles of a phase in the timing simulator, where the analytical model compares plans.

    For `decode` those of a token at `compiler.planner.POSITION`, for `prefill` those to the first token of a prompt.

    Raises:
        TypebarError: the program stops with a trap.
    """
    from typebar.compiler.planner import lengths
    from typebar.host.report import measure, subject_from

    subject = subject_from(made)
    position, prompt = lengths(subject.context)
    if phase == DECODE:
        return float(measure(subject, 1, 2, position - 1)[0].decode["cycles"])
    return float(measure(subject, prompt, 1)[0].prefill["cycles"])
