"""The order in which a block of a prompt's tokens goes through its operations, group by group.

Every layer is a chain from vector unit to matrix unit to ring, so one group alone leaves the matrix unit waiting. Two
groups go half a layer apart: while one is in its attention, with short products and long waits, the other has the long
products of its FFN. In a loop over layers the second group so finishes a layer in the next turn (*late* parts), and
the last one after the loop. Units take instructions in order, so the order is that in which parts would start if each
group had the device to itself; the durations that say so are rough, and results do not depend on them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from xdsl.ir import Operation

from typebar.compiler import device_ir as dev
from typebar.compiler import ir
from typebar.compiler.device_source import AttendOp
from typebar.compiler.rows import Layout, ranked, shared

LAG = 1
"""Operations by which the second group is behind the first outside of loops."""
_GATHER_LATENCY, _PRODUCT_LATENCY, _HEAD_CYCLES, _NORM_PASSES = 250, 100, 500, 7
"""Rough cycles that a gather and a product take at least, and attention for a head; passes of a norm over a row."""


@dataclass(frozen=True)
class Part:
    """An operation for one group of tokens; a `late` one is for the layer before the one that the loop is at.

    In a loop it takes the cycles from `start` to `end` of a turn, roughly.
    """

    op: Operation
    group: int
    late: bool = False
    start: int = field(default=0, compare=False)
    end: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Turns:
    """A loop over layers: the parts of a turn, those that finish the last layer after it, and a turn's rough cycles."""

    loop: ir.RepeatOp
    turn: tuple[Part, ...]
    rest: tuple[Part, ...]
    cycles: int = 0


def schedule(ops: Sequence[Operation], layout: Layout) -> list[Part | Turns]:
    """The order of a block's operations. What all tokens share comes once, for group 0."""
    order: list[Part | Turns] = []
    straight: list[Operation] = []
    for op in ops:
        if not isinstance(op, ir.RepeatOp):
            straight.append(op)
            continue
        order += _straight(straight, layout.tokens.groups)
        straight = []
        order.append(_turns(op, layout))
    return order + _straight(straight, layout.tokens.groups)


def _straight(ops: Iterable[Operation], groups: int) -> list[Part]:
    """No loops: the second group lags `LAG` operations behind."""
    order: list[Part] = []
    waiting: deque[Operation] = deque()
    for op in ops:
        order.append(Part(op, 0))
        if groups > 1 and _grouped(op):
            waiting.append(op)
        if len(waiting) > LAG:
            order.append(Part(waiting.popleft(), 1))
    return order + [Part(op, 1) for op in waiting]


def _turns(loop: ir.RepeatOp, layout: Layout) -> Turns:
    """Half a layer between the groups, if the loop hands values on in place; else as without a loop."""
    ops = list(loop.body.block.ops)[:-1]
    chain = [op for op in ops if _grouped(op)]
    if layout.tokens.groups == 1 or len(chain) < 2 or not all(in_place(loop)):
        return Turns(loop, tuple(_straight(ops, layout.tokens.groups)), ())
    found = _steady(chain, layout)
    if found is None:
        return Turns(loop, tuple(_straight(ops, layout.tokens.groups)), ())
    order, cycles = found
    late = [part.op for part in order if part.late]
    for op in ops:
        if not _grouped(op):
            # Loaded while the first group is before its first user, once the second is past its last one.
            users = [user for user in chain if user in _users(op)]
            first = chain.index(users[0]) if users else 0
            at = order.index(Part(chain[max(0, first - 1)], 0))
            after = [order.index(Part(user, 1, True)) + 1 for user in users if user in late]
            at = max(at, *after, 0)
            if at > order.index(Part(chain[first], 0)):
                return Turns(loop, tuple(_straight(ops, layout.tokens.groups)), ())
            order.insert(at, Part(op, 0, False, order[at].start, order[at].start))
    return Turns(loop, tuple(order), tuple(part for part in order if part.late), cycles)


_TURNS = 16
"""Turns in which the order of two groups that share a device is taken to settle."""


def _steady(chain: Sequence[Operation], layout: Layout) -> tuple[list[Part], int] | None:
    """The order of a turn once it has settled, and its cycles, if the second group goes through all operations in it.

    Units take what is there in order; the group that can start first goes first.
    """
    phases = {op: _phases(op, layout) for op in chain}
    free = dict.fromkeys(_Unit, 0)
    ready = [0, sum(cycles for op in chain for _, cycles in phases[op]) // 2]
    done = [0, 0]
    order: list[tuple[int, int]] = []
    times: dict[tuple[int, int], tuple[int, int]] = {}

    def begin(group: int) -> tuple[int, list[int]]:
        """When the group's next operation has the unit that it ends in, and when each of its phases ends."""
        time, start, ends = ready[group], 0, []
        for unit, cycles in phases[chain[done[group] % len(chain)]]:
            start = max(time, free[unit])
            time = start + cycles
            ends.append(time)
        return start, ends

    while done[0] < _TURNS * len(chain):
        # The second group is behind, for it sees the first one's K and V, and by a layer at the most.
        lag = done[0] - done[1]
        group = 0 if lag == 0 else 1 if lag == len(chain) else min((0, 1), key=lambda g: begin(g)[0])
        start, ends = begin(group)
        for (unit, _), end in zip(phases[chain[done[group] % len(chain)]], ends, strict=True):
            free[unit] = end
        order.append((group, done[group]))
        times[group, done[group]] = (start if len(ends) == 1 else ready[group], ends[-1])
        ready[group] = ends[-1]
        done[group] += 1
    return next((found for turn in range(_TURNS - 2, 1, -1) if (found := _cut(chain, order, times, turn))), None)


def _cut(
    chain: Sequence[Operation], order: list[tuple[int, int]], times: dict[tuple[int, int], tuple[int, int]], turn: int
) -> tuple[list[Part], int] | None:
    """The parts from the first group's layer `turn` to its next one, if the second does each operation once in them."""
    first, size = turn * len(chain), len(chain)
    here = order[order.index((0, first)) : order.index((0, first + size))]
    if len(here) != 2 * size or any(not first - size <= number < first + size for _, number in here):
        return None
    began = times[0, first][0]
    parts = []
    for group, number in here:
        start, end = (time - began for time in times[group, number])
        parts.append(Part(chain[number % size], group, number < first, start, end))
    return parts, times[0, first + size][0] - began


def in_place(loop: ir.RepeatOp) -> list[bool]:
    """For each value that a loop hands on, whether the yielded one can take its argument's place.

    It can if it is made in the loop when the argument is dead, or element by element in the argument's last use.
    """
    body = loop.body.block
    place = {op: number for number, item in enumerate(body.ops) for op in item.walk()}
    last = body.last_op
    assert isinstance(last, ir.YieldOp)
    found, taken = [], set()
    for arg, value in zip(body.args, last.values, strict=True):
        maker = value.owner
        if not isinstance(maker, Operation) or maker.parent_block() is not body or value in taken:
            found.append(False)
            continue
        taken.add(value)
        elementwise = isinstance(maker, dev.AddOp | dev.MulOp | dev.ScaleOp | dev.ActivationOp)
        used = max((place[use.operation] for use in arg.uses), default=-1)
        found.append(used <= place[maker] - (0 if elementwise else 1))
    return found


def _grouped(op: Operation) -> bool:
    """Whether an operation is computed for each group."""
    return bool(op.results) and not shared(op.results[0])


def _users(op: Operation) -> set[Operation]:
    return {use.operation for result in op.results for use in result.uses}


class _Unit(Enum):
    """What operations wait for one another in."""

    MATRIX = auto()
    VECTOR = auto()
    MEMORY = auto()
    RING = auto()


def _phases(op: Operation, layout: Layout) -> list[tuple[_Unit, int]]:
    """The units that an operation goes through, and roughly how many cycles alone."""
    limits, rows, value = layout.limits, layout.tokens.rows, op.results[0]
    width, own = ir.width(value), layout.rows_of(value)

    def gather(words: int, times: int) -> tuple[_Unit, int]:
        return _Unit.RING, times * max(limits.devices * words // limits.lanes, _GATHER_LATENCY)

    if isinstance(op, dev.MatrixOp):
        return [(_Unit.MATRIX, rows * int(op.k.value.data) * width // limits.macs + _PRODUCT_LATENCY)]
    if isinstance(op, dev.GatherOp):
        words = ir.width(op.x)
        return [gather(rows * words, 1) if ranked(value, layout) else gather(words, rows)]
    if isinstance(op, dev.LayerNormOp | dev.RmsNormOp):
        norm = (_Unit.VECTOR, _NORM_PASSES * layout.own_rows * width // limits.lanes)
        return [norm, gather(layout.own_rows * width, 1)] if layout.own_rows < own else [norm]
    if isinstance(op, dev.AttentionOp | AttendOp):
        heads, size = int(op.kv_heads.value.data), int(op.head_dim.value.data)
        product = (_Unit.MATRIX, heads * _HEAD_CYCLES)
        return [(_Unit.MEMORY, heads * rows * size), product] if isinstance(op, dev.AttentionOp) else [product]
    return [(_Unit.VECTOR, own * width // limits.lanes)]
