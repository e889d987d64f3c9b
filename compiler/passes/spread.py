"""Where the values of two groups of a prompt's tokens lie, so that neither waits for the other's words.

Hazards are seen by segment, so words of one segment hold up each other's instructions although they are different
ones, and words that take another's place wait for it to be read. Within a group neither costs anything, for a layer is
a chain. So a slot goes where the fewest slots of other groups are in use in its segments at about the same time; what
is shared is loaded ahead of the chain, and so keeps apart from everything.
"""

from __future__ import annotations

from collections.abc import Sequence

from typebar.compiler.passes.slots import Slot, Span, meet, spans_of
from typebar.compiler.rows import Layout

SHARED = -1
"""The group of what all tokens share."""


def spread(
    slots: Sequence[Sequence[Slot]], fixed: Sequence[Slot], layout: Layout, segment: int, turn: int, near: int
) -> bool:
    """Set `at` of all groups' slots, `slots[g + 1]` those of group g; whether they fit the registers.

    `fixed` slots lie where they are already, `segment` is the size of a hazard segment in words, and `turn` the cycles
    of a turn of the loop. Slots of different groups should be `near` cycles apart to share a segment.
    """
    placed: list[tuple[int, Slot]] = [(SHARED, slot) for slot in fixed]
    waiting = [(group - 1, slot) for group, some in enumerate(slots) for slot in some]
    for group, slot in sorted(waiting, key=lambda item: -item[1].words):
        step = layout.step(slot.words)
        rivals = [other for _, other in placed if meet([slot], spans_of([other]))]
        costs = [
            (other, _wait(slot, other, turn, near)) for owner, other in placed if owner != group or owner == SHARED
        ]
        costs = [(other, cost) for other, cost in costs if cost > 0]
        ends = {-(-(other.at + other.words) // step) * step for _, other in placed}
        best: tuple[int, int] | None = None
        for at in sorted({*ends, *range(0, layout.limits.words, max(step, segment))}):
            if at + slot.words > layout.limits.words:
                continue
            if any(at < rival.at + rival.words and rival.at < at + slot.words for rival in rivals):
                continue
            first, last = at // segment, (at + slot.words - 1) // segment
            cost = sum(
                wait
                for other, wait in costs
                if other.at // segment <= last and first <= (other.at + other.words - 1) // segment
            )
            if best is None or (cost, at) < best:
                best = (cost, at)
        if best is None:
            return False
        slot.at = best[1]
        placed.append((group, slot))
    return True


def _wait(a: Slot, b: Slot, turn: int, near: int) -> int:
    """Cycles by which uses of two slots overlap or are nearer than `near`, in the same turn of the loop or the next."""
    shifts = (-turn, 0, turn)
    return max(
        (
            min(x[1] - y[0], y[1] - x[0], near) + near
            for shift in shifts
            for x in a.times
            for y in _moved(b.times, shift)
        ),
        default=0,
    )


def _moved(times: Sequence[Span], shift: int) -> list[Span]:
    return [(start + shift, end + shift) for start, end in times]
