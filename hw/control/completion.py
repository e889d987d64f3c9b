"""When a unit's instructions are done, in order: what publishes a unit's `completed` ticket.

Rule (docs/timing.md): `done = max(end of occupancy + latency, done of the unit's previous instruction)`.
"""

from __future__ import annotations

from amaranth.hdl import Module, Mux, Signal, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out


class CompletionLine(wiring.Component):
    """A delay line of tickets; `longest` is the greatest latency.

    `enter` in the last cycle of an instruction's occupancy, with its `ticket` and `latency` (0 to `longest`), at most
    one a cycle and in order. `completed` holds the last ticket done, from the first cycle in which a dependent
    instruction may start: `latency` + 1 cycles after `enter`, or with the instruction before if that takes longer.
    """

    def __init__(self, bits: int, longest: int) -> None:
        """Tickets of `bits` bits, latencies up to `longest` cycles."""
        self.bits, self.longest = bits, longest
        super().__init__(
            {
                "enter": In(1),
                "ticket": In(bits),
                "latency": In(range(longest + 1)),
                "completed": Out(bits),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """Tickets move one place a cycle towards `completed`; none overtakes, so only the newest's place is kept."""
        m = Module()
        entry = data.StructLayout({"valid": 1, "ticket": unsigned(self.bits)})
        line = Signal(data.ArrayLayout(entry, self.longest + 1))
        newest, place = Signal(range(self.longest + 1)), Signal(range(self.longest + 1))
        m.d.comb += place.eq(Mux(self.latency > newest, self.latency, newest))
        for index in range(self.longest + 1):
            here = self.enter & (place == index)
            valid, ticket = line[index].valid | here, Mux(here, self.ticket, line[index].ticket)
            if index:
                m.d.sync += [line[index - 1].valid.eq(valid), line[index - 1].ticket.eq(ticket)]
            else:
                with m.If(valid):
                    m.d.sync += self.completed.eq(ticket)
        remaining = Mux(self.enter, place, newest)
        m.d.sync += newest.eq(Mux(remaining == 0, 0, remaining - 1))
        return m
