"""Who takes the one row that a segment of the register file can be written with in a cycle."""

from __future__ import annotations

from amaranth.hdl import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out


class TurnArbiter(wiring.Component):
    """One place a cycle, for whoever is `urgent` and cannot wait, or else for one of two requesters.

    Combinational: `grants` answers `requests` in the same cycle, never two, none with `urgent`, and only who asks. If
    both ask, the turn decides, and passes to the one that lost. So of two cycles that are not urgent, one is theirs:
    who asks in both is granted in one of them, however many urgent cycles lie between.
    """

    def __init__(self) -> None:
        """An arbiter."""
        super().__init__({"urgent": In(1), "requests": In(2), "grants": Out(2)})

    def elaborate(self, platform: object) -> Module:
        """The turn is the index of the requester that wins if both ask."""
        m, turn = Module(), Signal()
        both = self.requests.all() & ~self.urgent
        m.d.comb += [
            self.grants[0].eq(self.requests[0] & ~self.urgent & ~(both & turn)),
            self.grants[1].eq(self.requests[1] & ~self.urgent & ~(both & ~turn)),
        ]
        m.d.sync += turn.eq(turn ^ both)
        return m
