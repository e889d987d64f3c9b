"""Which older vector instruction a younger one waits for, by the timing simulator's rules."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from amaranth.sim import Simulator

from typebar.hw.control.scoreboard import Scoreboard
from typebar.hw.control.tickets import Domain
from typebar.isa.instructions import BY_NAME
from typebar.isa.machine import Machine
from typebar.isa.timing import row_levels, row_written, timing_parameters

MACHINE = Machine.load("tiny").override({"vector.words": "2048", "vector.segments": "8"})
LANES, SEGMENT = MACHINE.vector.lanes, MACHINE.segment_words
Words = tuple[int, int]
"""First word, and how many."""
NONE = (0, 0)


@dataclass(frozen=True)
class Item:
    """An instruction as the scoreboard sees it: its ranges, and what is said of it beside them."""

    dst: Words = NONE
    a: Words = NONE
    b: Words = NONE
    maximum: Words = NONE
    reduces: bool = False
    dst_reduced: bool = False
    squares: bool = False
    functional: bool = False
    unit: Domain = Domain.VECTOR


def put(ctx: Any, dut: Scoreboard, item: Item) -> None:
    """Show the scoreboard an instruction."""
    for name in ("dst", "a", "b", "maximum"):
        first, words = getattr(item, name)
        ctx.set(dut.ranges[name], {"valid": words > 0, "first": first, "last": max(first + words - 1, 0)})
    for name in ("reduces", "dst_reduced", "squares", "functional", "unit"):
        ctx.set(getattr(dut, name), int(getattr(item, name)))


def waits(pairs: Sequence[tuple[Item, Item]]) -> list[bool]:
    """For each pair whether the second waits for the first, all older ones being done; none does once that is done."""
    dut, found = Scoreboard(MACHINE), []

    async def bench(ctx: Any) -> None:
        for ticket, (first, second) in enumerate(pairs, 1):
            ticket %= 1 << dut.bits
            put(ctx, dut, first)
            ctx.set(dut.ticket, ticket)
            ctx.set(dut.issue, 1)
            for unit in (Domain.MATRIX, Domain.VECTOR, Domain.MEMORY, Domain.RING):
                ctx.set(dut.completed[unit], ticket - 1 & (1 << dut.bits) - 1)
            await ctx.tick()
            ctx.set(dut.issue, 0)
            put(ctx, dut, second)
            wait = dut.waits[first.unit.name.lower()]
            found.append(bool(ctx.get(wait.valid)) and ctx.get(wait.ticket) == ticket)
            ctx.set(dut.completed[first.unit], ticket)
            assert not ctx.get(wait.valid)
            await ctx.tick()

    simulator = Simulator(dut)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()
    return found


def check(cases: Sequence[tuple[Item, Item, bool]]) -> None:
    expected = [case[2] for case in cases]
    assert any(expected) and not all(expected)
    wrong = [case for case, found in zip(cases, waits([case[:2] for case in cases]), strict=True) if found != case[2]]
    assert not wrong, f"{len(wrong)} of {len(cases)}, the first {wrong[0]}"


def test_reductions_end_in_order() -> None:
    """One of fewer levels over rows, or without the squares of the one before, waits: its result would be first."""
    kinds = list(itertools.product((1, 2, 3, 4, 5, 8, 9, 40), (False, True)))
    cases = []
    for (rows, squares), (following, second_squares) in itertools.product(kinds, kinds):
        first = Item(a=(0, rows * LANES), maximum=(2 * SEGMENT, 1), reduces=True, squares=squares)
        second = Item(a=(0, following * LANES), maximum=(3 * SEGMENT, 1), reduces=True, squares=second_squares)
        overtakes = row_levels(following) < row_levels(rows) or (squares and not second_squares)
        cases.append((first, second, overtakes))
    cases.append((first, Item(dst=(SEGMENT, 8), a=(0, 8)), False))
    check(cases)


@pytest.mark.parametrize("function", [False, True], ids=["plain", "function"])
def test_a_long_result_is_read_behind(function: bool) -> None:
    """Row by row from its first row on, by the own unit, if its first row is written when the writer has left."""
    opcode = BY_NAME["vunary" if function else "vadd"].opcode
    timing, modifiers = timing_parameters(MACHINE), np.zeros(8, np.int64)
    longest = timing.vector_latency + timing.unary_latency + 2
    assert longest * LANES < SEGMENT
    cases = []
    for rows in range(1, longest + 1):
        written = (LANES, rows * LANES)
        first = Item(dst=written, a=(SEGMENT, 8), functional=function)
        follows = row_written(timing, opcode, modifiers, [LANES], rows) >= 0
        elsewhere = (2 * LANES, LANES)
        cases += [
            (first, Item(dst=(2 * SEGMENT, 8), a=written), not follows),
            (first, Item(dst=(2 * SEGMENT, 8), b=written), not follows),
            (first, Item(dst=(2 * SEGMENT, 8), a=written, b=elsewhere), True),
            (first, Item(a=written, unit=Domain.MEMORY), True),
            (Item(dst=written, functional=function, unit=Domain.MEMORY), Item(a=written), True),
        ]
    check(cases)


def test_late_results() -> None:
    """What a reduction writes is there after its elements: reading and overwriting wait, except another reduction."""
    long, word, source = (0, SEGMENT // 2), (SEGMENT - 8, 1), (SEGMENT, SEGMENT // 2)
    both = Item(dst=long, a=source, maximum=word, reduces=True)
    second = Item(dst=(2 * SEGMENT, 8), a=source, maximum=word, reduces=True)
    alone = Item(dst=word, a=source, reduces=True, dst_reduced=True)
    elements = Item(dst=long, a=source)
    check(
        [
            *((late, Item(dst=(2 * SEGMENT, 8), a=long), True) for late in (both, second, alone)),
            *((late, Item(dst=long, a=(SEGMENT, 8)), True) for late in (both, second, alone)),
            *((late, Item(dst=long, unit=Domain.MEMORY), True) for late in (both, second, alone)),
            *((late, other, False) for late in (both, second, alone) for other in (second, alone)),
            (elements, Item(dst=(2 * SEGMENT, 8), a=long), False),
            (elements, elements, False),
            (elements, alone, False),
            (Item(a=word, unit=Domain.MEMORY), alone, True),
            (Item(dst=word, unit=Domain.MEMORY), alone, True),
        ]
    )
