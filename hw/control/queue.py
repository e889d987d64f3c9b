"""The in-order queue in front of a unit: an instruction leaves when it is the oldest and owes nothing.

Timing (docs/timing.md): what is pushed in cycle t can start in t + 1 at the earliest. A full queue takes an
instruction in the cycle in which its head starts, since issue waits for the *start* `queue_depth` places earlier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from amaranth.hdl import Array, Cat, Module, Mux, ShapeLike, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from typebar.hw.control.tickets import Domain, owed, waits_layout
from typebar.hw.ports import CAUSE_BITS
from typebar.hw.replicate import Shared
from typebar.isa.timing import Cause

_BLAMED = {
    Domain.MATRIX: Cause.MATRIX,
    Domain.VECTOR: Cause.VECTOR,
    Domain.MEMORY: Cause.MEMORY,
    Domain.RING: Cause.RING,
    Domain.FETCH: Cause.FETCH,
}
"""What an instruction waits for while it waits for a ticket of a domain."""


class Waits(wiring.Component):
    """The tickets that each of `depth` places waits for.

    `waits` enter at `tail` with `push`. `ready`: the place at `head` owes nothing; `waited` is the cause of its wait.
    `stored` is the state, for proofs.
    """

    def __init__(
        self, depth: int, bits: int, domains: Sequence[Domain], blamed: Mapping[Domain, Cause] = _BLAMED
    ) -> None:
        """As for `TicketQueue`."""
        self.depth, self.domains, self.blamed = depth, tuple(domains), blamed
        self.stored = Signal(data.ArrayLayout(waits_layout(bits, domains), depth))
        super().__init__(
            {
                "push": In(1),
                "head": In(range(depth)),
                "tail": In(range(depth)),
                "waits": In(waits_layout(bits, domains)),
                "completed": In(data.ArrayLayout(bits, len(Domain))),
                "ready": Out(1),
                "waited": Out(CAUSE_BITS),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """Tickets lie in registers, because each is compared in every cycle."""
        m = Module()
        waiting = Signal(self.depth)
        waited = Array(Signal(CAUSE_BITS, name=f"waited_{place}") for place in range(self.depth))
        for place in range(self.depth):
            owes: list[Value] = []
            for domain in self.domains:
                wait = self.stored[place][domain.name.lower()]
                still = Signal(name=f"owes_{place}_{domain.name.lower()}")
                m.d.comb += still.eq(wait.valid & owed(wait.ticket, self.completed[domain]))
                owes.append(still)
                m.d.sync += wait.valid.eq(still)
            # In the last cycle of its wait an entry owes just those that are done last.
            for domain, still in reversed(list(zip(self.domains, owes, strict=True))):
                with m.If(still):
                    m.d.sync += waited[place].eq(int(self.blamed[domain]))
            with m.If(self.push & (self.tail == place)):
                m.d.sync += [self.stored[place].eq(self.waits), waited[place].eq(int(Cause.ISSUE))]
            m.d.comb += waiting[place].eq(Cat(owes).any())
        m.d.comb += [self.ready.eq(~waiting.bit_select(self.head, 1)), self.waited.eq(waited[self.head])]
        return m


class TicketQueue(wiring.Component):
    """A queue of `depth` payloads, each with the tickets it waits for.

    `i` takes a payload (`i.ready` looks at `o.ready` when the queue is full), `waits` is sampled with it. `o.valid`
    rises when the head's tickets are all done; payloads leave in order. `completed` is the last ticket done of each
    domain; a head may leave in the first cycle in which `completed` covers it. `waited` (valid with `o`) is the cause
    of the head's wait: the domain whose ticket was done last, the first of them in `Domain` if there are several, ISSUE
    if the head owed nothing in the cycle after its push. `memory`, `head`, `tail` and `stored` are the state, for
    proofs, unless the module of the waits is a shared one.
    """

    def __init__(
        self,
        shape: ShapeLike,
        depth: int,
        bits: int,
        domains: Sequence[Domain] = tuple(Domain),
        blamed: Mapping[Domain, Cause] = _BLAMED,
        shared: Shared | None = None,
    ) -> None:
        """A queue of `depth` >= 1 places for `shape`, waiting on tickets of `bits` bits of `domains`.

        `blamed` names the cause of a wait for each domain. `shared` is the module of the `Waits` of queues that are
        the same but for `shape`.
        """
        self.shape, self.depth = shape, depth
        self._waits: Any = shared.replica() if shared else Waits(depth, bits, domains, blamed)
        self.stored = None if shared else self._waits.stored
        self.memory = Memory(shape=shape, depth=depth, init=[])
        self.head, self.tail = Signal(range(depth)), Signal(range(depth))
        super().__init__(
            {
                "i": In(stream.Signature(shape)),
                "waits": In(waits_layout(bits, domains)),
                "completed": In(data.ArrayLayout(bits, len(Domain))),
                "o": Out(stream.Signature(shape)),
                "waited": Out(CAUSE_BITS),
                "level": Out(range(depth + 1)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """A circular buffer."""
        m = Module()
        m.submodules.memory = memory = self.memory
        m.submodules.waits = waits = self._waits
        write, read = memory.write_port(), memory.read_port(domain="comb")
        head, tail = self.head, self.tail
        pop, push = Signal(), Signal()

        def after(place: Signal) -> object:
            return Mux(place == self.depth - 1, 0, place + 1)

        m.d.comb += [
            pop.eq(self.o.valid & self.o.ready),
            push.eq(self.i.valid & self.i.ready),
            waits.push.eq(push),
            waits.head.eq(head),
            waits.tail.eq(tail),
            waits.waits.eq(self.waits),
            waits.completed.eq(self.completed),
            read.addr.eq(head),
            self.o.payload.eq(read.data),
            self.waited.eq(waits.waited),
            self.o.valid.eq((self.level != 0) & waits.ready),
            self.i.ready.eq((self.level != self.depth) | pop),
            write.addr.eq(tail),
            write.data.eq(self.i.payload),
            write.en.eq(push),
        ]
        with m.If(pop):
            m.d.sync += head.eq(after(head))
        with m.If(push):
            m.d.sync += tail.eq(after(tail))
        m.d.sync += self.level.eq(self.level + push - pop)
        return m
