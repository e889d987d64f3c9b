"""Credits on a ring's links: nothing is lost, nothing changes while it waits, and a free link costs no cycle."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import pytest
from amaranth.sim import Simulator

from typebar.hw.link import CREDIT_BIT, ROW_BIT, CreditMerger

ROW_BITS = 16


def run(seed: int, taken: float, cycles: int = 600) -> tuple[list[Any], list[Any], int, int, int]:
    """Rows given and received, credits given and received, and beats that waited; `taken` is how ready the link is."""
    dut, rng = CreditMerger(ROW_BITS), random.Random(seed)
    given: list[tuple[int, int, int]] = []
    received: list[tuple[int, int, int]] = []
    counts = {"in": 0, "out": 0, "waited": 0}

    async def bench(ctx: Any) -> None:
        rows: deque[tuple[int, int, int]] = deque()
        held: tuple[int, int, int] | None = None
        for cycle in range(cycles):
            if rng.random() < 0.4 and cycle < cycles - 200:
                rows.append((rng.getrandbits(ROW_BITS), rng.getrandbits(CREDIT_BIT), rng.getrandbits(1)))
            credit = rng.random() < 0.4 and cycle < cycles - 200
            ready = rng.random() < taken or cycle >= cycles - 100
            ctx.set(dut.rows.valid, bool(rows))
            if rows:
                for name, value in zip(("data", "user", "last"), rows[0], strict=True):
                    ctx.set(getattr(dut.rows.payload, name), value)
            ctx.set(dut.credit, credit)
            ctx.set(dut.out.ready, ready)
            counts["in"] += credit
            valid, item = ctx.get(dut.out.valid), dut.out.payload
            beat = ctx.get(item.data), ctx.get(item.user), ctx.get(item.last)
            assert held is None or (valid and beat == held), "a waiting beat changed"
            held = beat if valid and not ready else None
            counts["waited"] += held is not None
            if ready and (rows or credit):
                assert valid, "a free link was left empty"
            if valid and ready:
                counts["out"] += beat[1] >> CREDIT_BIT & 1
                if beat[1] >> ROW_BIT:
                    received.append((beat[0], beat[1] & (1 << CREDIT_BIT) - 1, beat[2]))
            taken_row = bool(rows) and ctx.get(dut.rows.ready)
            assert taken_row == bool(valid and ready and beat[1] >> ROW_BIT)
            if taken_row:
                given.append(rows.popleft())
            await ctx.tick()
        assert not rows

    simulator = Simulator(dut)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()
    return given, received, counts["in"], counts["out"], counts["waited"]


@pytest.mark.parametrize("taken", [1.0, 0.9, 0.6])
def test_rows_and_credits_all_arrive(taken: float) -> None:
    for seed in range(3):
        given, received, credits_in, credits_out, waited = run(seed, taken)
        assert received == given and len(given) > 50
        assert credits_out == credits_in > 50
        assert (waited > 0) == (taken < 1)
