"""How the matrices of a step go to the devices, where it is not by columns or heads."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import Any

from typebar.isa.errors import TypebarError

EXACT, FASTEST = "exact", "fastest"
SPLITS = (EXACT, FASTEST)
"""Only splits that keep the order of all additions, so that bits are equal on any number of devices; or all splits."""
DECODE, PREFILL = "decode", "prefill"
PHASES = (DECODE, PREFILL)
"""What a plan is chosen for. An image has one: the devices' shards follow from it, and both phases read them."""


@dataclass(frozen=True)
class Plan:
    """Matrices by the names that a step has for their weights: `replicate`, which every device holds whole, and `rows`.

    Of a matrix that goes by rows a device has those whose inputs it holds. The devices' partial sums are gathered, and
    added in the order of ranks: the same bits on every device, but others than on another number of devices. All
    other matrices go by columns (attention's by heads), with an all-gather where a result is needed whole.
    """

    replicate: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether bits are those of any other number of devices."""
        return not self.rows

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {"replicate": list(self.replicate), "rows": list(self.rows)}

    @staticmethod
    def from_json(data: object) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            TypebarError: it is none.
        """
        lists = data if isinstance(data, dict) and data.keys() == {"replicate", "rows"} else {}
        names = [lists[key] for key in ("replicate", "rows") if key in lists]
        if not names or not all(isinstance(item, list) and all(isinstance(n, str) for n in item) for item in names):
            raise TypebarError(f"plan {reprlib.repr(data)} is no plan of matrices: compile again")
        return Plan(*(tuple(item) for item in names))

    def __str__(self) -> str:
        """The plan in a few words."""
        parts = {"by rows": self.rows, "replicated": self.replicate}
        return "; ".join(["columns", *(f"{how}: {', '.join(names)}" for how, names in parts.items() if names)])


COLUMNS = Plan()
"""The plan with nothing but columns and heads."""
