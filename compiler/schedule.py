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
from dataclasses import dataclass
from itertools import accumulate

from xdsl.ir import Operation

from typebar.compiler import device_ir as dev
from typebar.compiler import ir
from typebar.compiler.device_source import AttendOp
from typebar.compiler.rows import Layout, shared

LAG = 1
"""Operations by which the second group is behind the first outside of loops."""
_GATHER_LATENCY, _PRODUCT_LATENCY, _NORM_PASSES = 250, 100, 7
"""Rough cycles that a gather or a product takes at least, and passes over a row that a norm makes."""


@dataclass(frozen=True)
class Part:
    """An operation for one group of tokens; a `late` one is for the layer before the one that the loop is at."""

    op: Operation
    group: int
    late: bool = False


@dataclass(frozen=True)
class Turns:
    """A loop over layers: the parts of a turn, and those that finish the last layer after it."""

    loop: ir.RepeatOp
    turn: tuple[Part, ...]
    rest: tuple[Part, ...]


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
    starts = dict(zip(chain, accumulate((_cycles(op, layout) for op in chain), initial=0), strict=False))
    total = starts[chain[-1]] + _cycles(chain[-1], layout)
    cut = next((op for op in chain if 2 * starts[op] >= total), chain[-1])
    late = set(chain[chain.index(cut) :])
    times = {Part(op, 0): float(starts[op]) for op in chain}
    times |= {Part(op, 1, op in late): float((starts[op] - starts[cut]) % total) for op in chain}
    for op in ops:
        if not _grouped(op):
            # Loaded while the first group is before its first user, once the second is past its last one.
            users = [user for user in chain if user in _users(op)]
            after = max((times[Part(user, 1, True)] for user in users if user in late), default=-1.0)
            first = chain.index(users[0]) if users else 0
            times[Part(op, 0)] = max(starts[chain[max(0, first - 1)]] - 0.5, after + 0.5)
            if times[Part(op, 0)] > starts[chain[first]]:
                return Turns(loop, tuple(_straight(ops, layout.tokens.groups)), ())
    turn = tuple(sorted(times, key=lambda part: times[part]))
    return Turns(loop, turn, tuple(part for part in turn if part.late))


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


def _cycles(op: Operation, layout: Layout) -> int:
    """Roughly what an operation takes alone, in cycles."""
    limits, rows = layout.limits, layout.tokens.rows
    width = ir.width(op.results[0])

    def gather(words: int, times: int) -> int:
        return times * max(limits.devices * words // limits.lanes, _GATHER_LATENCY)

    if isinstance(op, dev.MatrixOp):
        return rows * int(op.k.value.data) * width // limits.macs + _PRODUCT_LATENCY
    if isinstance(op, dev.GatherOp):
        return gather(width // limits.devices, rows)
    if isinstance(op, dev.LayerNormOp | dev.RmsNormOp):
        own = layout.own_rows
        return _NORM_PASSES * own * width // limits.lanes + (gather(own * width, 1) if own < rows else 0)
    if isinstance(op, dev.AttentionOp | AttendOp):
        heads = int(op.kv_heads.value.data)
        return heads * (rows * int(op.head_dim.value.data) + 2 * _PRODUCT_LATENCY)
    return rows * width // limits.lanes
