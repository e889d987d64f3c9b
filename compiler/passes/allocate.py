"""allocate: give every value, and every operation's scratch space, a place in the register file by liveness.

Places start at a hazard segment where everything fits that way, so that unrelated values never wait for one
another. Where segments are too few, what is loaded for one operation shares them, then all that is loaded, and at last
places start at the register alignment. A loop's yielded value takes its argument's place where the argument is
dead by then, so the loop needs no copy.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Block, Operation, OpResult, SSAValue
from xdsl.passes import ModulePass

from typebar.compiler import device_ir as dev
from typebar.compiler import ir
from typebar.compiler.device_source import PhaseOp, SourceOp
from typebar.compiler.scratch import Limits, scratch_of
from typebar.isa.errors import TypebarError

_LOADS = dev.ParamOp | dev.BiasOp
_Groups = list[list["_Slot"]]


class AllocationError(TypebarError):
    """The register file is too small for the program."""


@dataclass(frozen=True)
class AllocatePass(ModulePass):
    """Allocate registers of `words` words in hazard segments of `segment` words."""

    name = "allocate"
    words: int = 131072
    segment: int = 2048
    attention_block: int = 1024
    column_block: int = 512
    vectors: int = 16

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        """Set `at` and `scratch` everywhere, the head's `chunk` and the program's `step`.

        Raises:
            AllocationError: nothing fits, even with the smallest chunk of logits and the tightest packing.
        """
        for program in op.body.block.ops:
            if isinstance(program, dev.ProgramOp | SourceOp):
                self._program(program)

    def _program(self, program: dev.ProgramOp | SourceOp) -> None:
        align, context, devices = (int(a.value.data) for a in (program.align, program.context, program.devices))
        head = program.body.block.last_op
        lowest = 0
        for chunk in _chunks(head.words, self.column_block) if isinstance(head, dev.HeadOp) else (0,):
            for step, groups in (*((self.segment, made) for made in _WAYS), (align, _apart)):
                limits = Limits(
                    self.words, align, step, self.attention_block, self.column_block, context, devices, self.vectors
                )
                slots = _collect(program, limits, chunk)
                lowest = _place(groups(slots), step)
                if lowest <= self.words:
                    _record(slots)
                    if isinstance(head, dev.HeadOp):
                        head.chunk = ir.number(chunk)
                    program.step = ir.number(step)
                    return
        raise AllocationError(
            f"the program needs {lowest} words of registers and the machine has {self.words}: "
            "use a machine with a larger register file (vector.words) or more devices"
        )


def _chunks(words: int, column_block: int) -> list[int]:
    """Numbers of logits to try at a time: all, then whole column blocks, halving."""
    sizes = [words]
    blocks = -(-words // column_block)
    while blocks > 1:
        blocks = -(-blocks // 2)
        sizes.append(min(words, blocks * column_block))
    return sizes


@dataclass
class _Slot:
    """Words that are live from `start` to `end`, shared by `values`, or the scratch space of `owner`."""

    words: int
    start: int
    end: int
    values: list[SSAValue] = field(default_factory=list)
    owner: Operation | None = None
    at: int = 0


def _collect(program: dev.ProgramOp | SourceOp, limits: Limits, chunk: int) -> list[_Slot]:
    order: dict[Operation, tuple[int, int]] = {}
    _number(program.body.block, order, 0)
    slots: dict[SSAValue, _Slot] = {}
    result: list[_Slot] = []

    def slot(value: SSAValue, start: int) -> _Slot:
        slots[value] = _Slot(limits.round(ir.width(value)), start, start, [value])
        result.append(slots[value])
        return slots[value]

    def use(value: SSAValue, at: int) -> None:
        if value in slots:
            slots[value].end = max(slots[value].end, at)

    def visit(block: Block) -> None:
        for op in block.ops:
            first, last = order[op]
            if isinstance(op, ir.RepeatOp):
                _loop_slots(op, order, slots, slot)
                visit(op.body.block)
            elif isinstance(op, PhaseOp):
                visit(op.body.block)
            for value in op.operands:
                use(value, _seen_from(value, op, order))
            if not isinstance(op, ir.RepeatOp):
                for value in op.results:
                    if value not in slots:
                        slot(value, first)
            words = scratch_of(op, limits, chunk)["total"]
            if words:
                result.append(_Slot(words, first, last, owner=op))

    visit(program.body.block)
    return result


def _number(block: Block, order: dict[Operation, tuple[int, int]], count: int) -> int:
    """Number operations in program order; a loop spans its body."""
    for op in block.ops:
        first = count = count + 1
        if isinstance(op, ir.RepeatOp | PhaseOp):
            count = _number(op.body.block, order, count) + 1
        order[op] = (first, count)
    return count


def _seen_from(value: SSAValue, op: Operation, order: dict[Operation, tuple[int, int]]) -> int:
    """Where a use counts: a value from outside a loop is live to the loop's end."""
    home = value.owner if isinstance(value.owner, Block) else value.owner.parent_block()
    user: Operation = op
    while user.parent_block() is not home:
        parent = user.parent_op()
        assert parent is not None
        user = parent
    return order[user][1] if user is not op else order[op][0]


def _loop_slots(
    loop: ir.RepeatOp,
    order: dict[Operation, tuple[int, int]],
    slots: dict[SSAValue, _Slot],
    slot: Callable[[SSAValue, int], _Slot],
) -> None:
    """One slot for a loop's argument and result, and for its first and yielded values where they can share it."""
    body = loop.body.block
    terminator = body.last_op
    assert isinstance(terminator, ir.YieldOp)
    for init, arg, out, end in zip(loop.inits, body.args, loop.outs, terminator.values, strict=True):
        only_here = len(list(init.uses)) == 1
        if init in slots and only_here and isinstance(init.owner, Operation):
            shared = slots[init]
        else:
            shared = slot(out, order[loop][0])
        shared.end = max(shared.end, order[loop][1])
        for value in (arg, out):
            shared.values.append(value)
            slots[value] = shared
        last_use = max((order[use.operation][0] for use in arg.uses if use.operation in order), default=0)
        maker = end.owner
        elementwise = isinstance(maker, dev.AddOp | dev.MulOp | dev.ScaleOp | dev.ActivationOp)
        made_here = isinstance(maker, Operation) and maker.parent_block() is body
        if made_here and end not in slots and last_use <= order[maker][0] - (0 if elementwise else 1):  # type: ignore[index]
            shared.values.append(end)
            slots[end] = shared


def _apart(slots: list[_Slot]) -> _Groups:
    """Every slot in hazard segments of its own."""
    return [[item] for item in slots]


def _by_user(slots: list[_Slot]) -> _Groups:
    """What is loaded for one operation, such as scales and biases of a product, together: it frees them at once."""
    return _grouped(slots, lambda value: next(iter(value.uses)).operation)


def _together(slots: list[_Slot]) -> _Groups:
    """All that is loaded together, so that what is computed keeps segments of its own."""
    return _grouped(slots, lambda value: None)


def _grouped(slots: list[_Slot], key: Callable[[SSAValue], Hashable]) -> _Groups:
    groups: dict[Hashable, list[_Slot]] = {}
    for item in slots:
        loaded = bool(item.values) and all(isinstance(value.owner, _LOADS) and value.uses for value in item.values)
        groups.setdefault(key(item.values[0]) if loaded else (id(item),), []).append(item)
    return list(groups.values())


_WAYS = (_apart, _by_user, _together)


def _place(groups: _Groups, step: int) -> int:
    """First fit, largest first, every group at a multiple of `step`, its slots in a row; the words used in all."""
    placed: list[tuple[_Slot, ...]] = []
    used = 0
    for group in sorted(groups, key=lambda g: -_words(g)):
        start, end, at = min(s.start for s in group), max(s.end for s in group), 0
        rivals = [p for p in placed if min(s.start for s in p) <= end and start <= max(s.end for s in p)]
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


def _words(group: Sequence[_Slot]) -> int:
    return sum(item.words for item in group)


def _record(slots: list[_Slot]) -> None:
    for item in slots:
        if item.owner is not None:
            item.owner.properties["scratch"] = ir.number(item.at)
        for value in item.values:
            if isinstance(value.owner, Operation):
                if not isinstance(value.owner, ir.RepeatOp):
                    value.owner.properties["at"] = ir.number(item.at)
                else:
                    assert isinstance(value, OpResult)
                    value.owner.attributes[f"at{value.index}"] = ir.number(item.at)
