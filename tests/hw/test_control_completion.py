"""The completion line against the contract's recurrence, in Amaranth's own simulator."""

from __future__ import annotations

import random

import pytest
from amaranth.sim import Simulator

from typebar.hw.control.completion import CompletionLine

BITS = 6


@pytest.mark.parametrize(("longest", "busy"), [(0, 1.0), (1, 0.5), (7, 1.0), (7, 0.5), (40, 0.3)])
def test_done_is_the_contracts(longest: int, busy: float) -> None:
    random_ = random.Random(longest)
    dut = CompletionLine(BITS, longest)
    merged = 0

    async def bench(ctx: object) -> None:
        nonlocal merged
        done, ticket, pending, last = 0, 0, [], 0
        for cycle in range(2000):
            enters = random_.random() < busy
            latency = random_.choice([0, longest, random_.randint(0, longest)])
            ctx.set(dut.enter, enters)
            ctx.set(dut.latency, latency)
            if enters:
                ticket = (ticket + 1) % (1 << BITS)
                ctx.set(dut.ticket, ticket)
                end = cycle + 1
                merged += end + latency < done
                done = max(done, end + latency)
                pending.append((done, ticket))
            while pending and pending[0][0] <= cycle:
                last = pending.pop(0)[1]
            assert ctx.get(dut.completed) == last, f"cycle {cycle}"
            await ctx.tick()

    simulator = Simulator(dut)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()
    assert (merged > 0) == (longest > 1)
