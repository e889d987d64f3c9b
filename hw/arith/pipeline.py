"""Cutting a datapath into pipeline stages without the datapath knowing how many there are."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from amaranth.hdl import Module, Signal

from typebar.isa.errors import TypebarError


def depths(cuts: int, latency: int) -> list[int]:
    """Registers at each of `cuts` places: `latency` in all, as even as may be, at least one at the last.

    Raises:
        TypebarError: latency below 1.
    """
    if latency < 1:
        raise TypebarError(f"a pipeline needs a latency of at least 1 cycle, not {latency}: raise it")
    return [(i + 1) * latency // cuts - i * latency // cuts for i in range(cuts)]


def pick(values: SimpleNamespace, names: Iterable[str]) -> dict[str, Any]:
    """Some of the values that came out of a cut, to go into the next."""
    return {name: getattr(values, name) for name in names}


class Pipeline:
    """Registers at the places where a datapath may be cut, the last place being its output.

    Where there are more places than registers, some have none; where there are fewer, some have several, for a
    synthesiser to move.
    """

    def __init__(self, m: Module, *, cuts: int, latency: int) -> None:
        """A pipeline of `latency` >= 1 cycles in module `m`."""
        self._m = m
        self._depths = depths(cuts, latency)
        self._next = 0

    def cut(self, **live: Any) -> SimpleNamespace:
        """Registers everything that lives across the next place: values or lists of values, by name.

        Returns them under the same names. Everything used later must pass here; that is what keeps it in step.
        """
        depth = self._depths[self._next]
        self._next += 1
        result = SimpleNamespace()
        for name, value in live.items():
            if isinstance(value, list):
                registered = [self._delay(item, f"{name}{i}_{self._next}", depth) for i, item in enumerate(value)]
                setattr(result, name, registered)
            else:
                setattr(result, name, self._delay(value, f"{name}_{self._next}", depth))
        return result

    def ahead(self, places: int) -> list[int]:
        """Registers at each of the next places, for what goes round them and keeps its own."""
        return self._depths[self._next : self._next + places]

    @property
    def complete(self) -> bool:
        """True once every place has been passed."""
        return self._next == len(self._depths)

    def _delay(self, value: Any, name: str, depth: int) -> Any:
        shape = value.shape()
        result = Signal(shape, name=name, reset_less=True)
        if depth == 0:
            self._m.d.comb += result.eq(value)
            return result
        self._m.d.sync += result.eq(value)
        for stage in range(1, depth):
            later = Signal(shape, name=f"{name}_{stage}", reset_less=True)
            self._m.d.sync += later.eq(result)
            result = later
        return result
