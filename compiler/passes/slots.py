"""Slots: stretches of words in the register file that values share, by liveness, and where they lie."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from xdsl.ir import Block, Operation, OpResult, SSAValue

from typebar.compiler import device_ir as dev
from typebar.compiler import ir
from typebar.compiler.device_source import PhaseOp
from typebar.compiler.schedule import in_place

Words = Callable[[SSAValue], int]
"""Words of a value."""
Scratch = Callable[[Operation], Mapping[str, int]]
"""Offsets of an operation's scratch vectors, by name, and their `total`."""
Span = tuple[int, int]
"""First and last place in an order of operations."""

_LOADS = dev.ParamOp | dev.BiasOp


@dataclass
class Slot:
    """Words that are live from `start` to `end`, shared by `values`, or the scratch space of `owner`.

    In a loop whose turns overlap they are live in other `spans` too, and used in the cycles `times` of a turn, roughly.
    """

    words: int
    start: int
    end: int
    values: list[SSAValue] = field(default_factory=list)
    owner: Operation | None = None
    at: int = 0
    spans: list[Span] = field(default_factory=list)
    times: list[Span] = field(default_factory=list)


SlotGroups = list[list[Slot]]
"""Slots that lie in a row."""


def collect(ops: Iterable[Operation], words: Words, scratch: Scratch, ahead: bool = True) -> list[Slot]:
    """The slots of some operations in order, the first ones of a program's block.

    With `ahead` what a loop's turn loads first keeps apart from all that the turn before does last.
    """
    order: dict[Operation, Span] = {}
    ops = list(ops)
    _number(ops, order, 0)
    slots: dict[SSAValue, Slot] = {}
    result: list[Slot] = []

    def slot(value: SSAValue, start: int) -> Slot:
        end = order[value.owner][1] if isinstance(value.owner, Operation) else start
        slots[value] = Slot(words(value), start, end, [value])
        result.append(slots[value])
        return slots[value]

    def use(value: SSAValue, at: int) -> None:
        if value in slots:
            slots[value].end = max(slots[value].end, at)

    def visit(ops: Iterable[Operation]) -> None:
        for op in ops:
            first, last = order[op]
            if isinstance(op, ir.RepeatOp):
                _loop_slots(op, order, slots, slot)
                visit(op.body.block.ops)
            elif isinstance(op, PhaseOp):
                visit(op.body.block.ops)
            for value in op.operands:
                # A product that follows is not to wait for the vector unit to have read what it writes over.
                use(value, _seen_from(value, op, order) + isinstance(op, dev.LastOp))
            if not isinstance(op, ir.RepeatOp):
                for value in op.results:
                    addend = op.addend if isinstance(op, dev.MatrixOp) else None
                    if addend is not None:
                        slots[value] = slots[addend]
                        slots[value].values.append(value)
                    elif value not in slots:
                        slot(value, first)
            total = scratch(op)["total"]
            if total:
                result.append(Slot(total, first, last, owner=op))

    visit(ops)
    for loop in order:
        if ahead and isinstance(loop, ir.RepeatOp):
            _load_ahead(loop, order, slots)
    return result


def _load_ahead(loop: ir.RepeatOp, order: dict[Operation, Span], slots: dict[SSAValue, Slot]) -> None:
    """Keep what a turn loads before its first product apart from all that the turn before does from its last one on."""
    ops = list(loop.body.block.ops)
    products = [at for at, op in enumerate(ops) if isinstance(op, dev.MatrixOp)]
    for op in ops[: products[0]] if products else ():
        if isinstance(op, _LOADS):
            slots[op.results[0]].spans.append((order[ops[products[-1]]][0], order[loop][1]))


def _number(ops: Iterable[Operation], order: dict[Operation, Span], count: int) -> int:
    """Number operations in program order; a loop spans its body."""
    for op in ops:
        first = count = count + 1
        if isinstance(op, ir.RepeatOp | PhaseOp):
            count = _number(op.body.block.ops, order, count) + 1
        order[op] = (first, count)
    return count


def _seen_from(value: SSAValue, op: Operation, order: dict[Operation, Span]) -> int:
    """Where a use counts: a value from outside a loop is live to the loop's end."""
    home = value.owner if isinstance(value.owner, Block) else value.owner.parent_block()
    user: Operation = op
    while user.parent_block() is not home:
        parent = user.parent_op()
        assert parent is not None
        user = parent
    return order[op][0] if user is op and isinstance(op, ir.RepeatOp) else order[user][1]


def _loop_slots(
    loop: ir.RepeatOp,
    order: dict[Operation, Span],
    slots: dict[SSAValue, Slot],
    slot: Callable[[SSAValue, int], Slot],
) -> None:
    """One slot for a loop's argument and result, and for its first and yielded values where they can share it."""
    body = loop.body.block
    terminator = body.last_op
    assert isinstance(terminator, ir.YieldOp)
    carried = zip(loop.inits, body.args, loop.outs, terminator.values, in_place(loop), strict=True)
    for init, arg, out, end, fits in carried:
        only_here = len(list(init.uses)) == 1
        if init in slots and only_here and isinstance(init.owner, Operation):
            shared = slots[init]
        else:
            shared = slot(out, order[loop][0])
        shared.end = max(shared.end, order[loop][1])
        for value in (arg, out):
            shared.values.append(value)
            slots[value] = shared
        if fits and end not in slots:
            shared.values.append(end)
            slots[end] = shared


def apart(slots: list[Slot]) -> SlotGroups:
    """Every slot in hazard segments of its own."""
    return [[item] for item in slots]


def by_user(slots: list[Slot]) -> SlotGroups:
    """What is loaded for one operation, such as scales and biases of a product, together: it frees them at once."""
    return _grouped(slots, lambda value: next(iter(value.uses)).operation)


def all_loads(slots: list[Slot]) -> SlotGroups:
    """All that is loaded together, so that what is computed keeps segments of its own."""
    return _grouped(slots, lambda value: None)


def _grouped(slots: list[Slot], key: Callable[[SSAValue], Hashable]) -> SlotGroups:
    groups: dict[Hashable, list[Slot]] = {}
    for item in slots:
        loaded = bool(item.values) and all(isinstance(value.owner, _LOADS) and value.uses for value in item.values)
        groups.setdefault(key(item.values[0]) if loaded else (id(item),), []).append(item)
    return list(groups.values())


WAYS = (apart, by_user, all_loads)
"""Ways to share hazard segments, best first."""


def place(groups: SlotGroups, step_of: Callable[[int], int], fixed: Sequence[Slot] = ()) -> int:
    """First fit, largest first, a group's slots in a row; the words used in all.

    Every group starts at a multiple of what `step_of` says for its size; `fixed` slots lie where they are already.
    """
    placed: list[tuple[Slot, ...]] = [(item,) for item in fixed]
    used = 0
    for group in sorted(groups, key=lambda g: -_words(g)):
        spans, at = spans_of(group), 0
        step = step_of(_words(group))
        rivals = [p for p in placed if meet(p, spans)]
        for rival in sorted(rivals, key=lambda g: g[0].at):
            if at + _words(group) <= rival[0].at:
                break
            at = max(at, -(-(rival[0].at + _words(rival)) // step) * step)
        for item in group:
            item.at = at
            at += item.words
        placed.append(tuple(group))
        used = max(used, at)
    return used


def spans_of(group: Sequence[Slot]) -> list[Span]:
    """When some slots in a row are live: from the first's start to the last's end, and in a slot's other spans."""
    hull = (min(s.start for s in group), max(s.end for s in group))
    return [hull, *(span for item in group for span in item.spans)]


def meet(group: Sequence[Slot], spans: Sequence[Span]) -> bool:
    """Whether slots in a row are live in any of these spans."""
    return any(a <= end and start <= b for a, b in spans_of(group) for start, end in spans)


def _words(group: Sequence[Slot]) -> int:
    return sum(item.words for item in group)


def record(slots: list[Slot], prefix: str) -> None:
    """Set `at` and `scratch`, with the prefix before their names, on what has the slots."""
    for item in slots:
        if item.owner is not None:
            item.owner.properties[f"{prefix}scratch"] = ir.number(item.at)
        for value in item.values:
            if isinstance(value.owner, Operation):
                if not isinstance(value.owner, ir.RepeatOp):
                    value.owner.properties[f"{prefix}at"] = ir.number(item.at)
                else:
                    assert isinstance(value, OpResult)
                    value.owner.attributes[f"{prefix}at{value.index}"] = ir.number(item.at)
