"""How the matrices of a step go to the devices, where it is not by columns or heads."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import Any

from typebar.isa.errors import TypebarError


@dataclass(frozen=True)
class Plan:
    """The matrices that every device holds whole, by the names that a step has for their weights.

    All others go by columns (attention's by heads), with an all-gather where a result is needed whole.
    """

    replicate: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {"replicate": list(self.replicate)}

    @staticmethod
    def from_json(data: object) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            TypebarError: it is none.
        """
        names = data.get("replicate") if isinstance(data, dict) and data.keys() == {"replicate"} else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypebarError(f"plan {reprlib.repr(data)} is no list of replicated matrices: compile again")
        return Plan(tuple(names))

    def __str__(self) -> str:
        """The plan in a few words."""
        return "columns" + (f"; replicated: {', '.join(self.replicate)}" if self.replicate else "")


COLUMNS = Plan()
"""The plan with nothing but columns and heads."""
