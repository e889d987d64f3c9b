"""When the values of a block of a prompt's tokens are live, group by group, in the order of `compiler.schedule`.

In a loop whose turns overlap, what the second group makes in one turn and reads late, in the next, is live from there
to the turn's end and from its start on, and after the last turn until it has been read there.
"""

from __future__ import annotations

from collections.abc import Sequence

from xdsl.ir import Block, Operation, SSAValue

from typebar.compiler import device_ir as dev
from typebar.compiler import ir
from typebar.compiler.passes.slots import Slot, Span
from typebar.compiler.rows import Layout, shared
from typebar.compiler.schedule import Part, Turns, in_place, schedule

_Group = tuple[Operation, int]


class Lifetimes:
    """`slots` of what is shared and of each group, `end`, a place after everything, and a turn's rough `cycles`."""

    def __init__(self, ops: Sequence[Operation], layout: Layout) -> None:
        """Number the parts of the operations' order and find the slots of all their values and scratch spaces."""
        self._layout = layout
        self._at: dict[_Group, int] = {}
        self._rest: dict[_Group, int] = {}
        self._late: set[_Group] = set()
        self._loops: dict[Operation, tuple[int, int, int]] = {}
        self._found: dict[tuple[SSAValue, int], Slot] = {}
        self._groups = range(layout.tokens.groups)
        self.slots: list[list[Slot]] = [[] for _ in range(layout.tokens.groups + 1)]
        self._parts: dict[_Group, Part] = {}
        self.cycles = 0
        self._number(ops)
        for op in ops:
            if isinstance(op, ir.RepeatOp):
                self._loop(op)
                for inner in list(op.body.block.ops)[:-1]:
                    self._operation(inner)
            else:
                self._operation(op)

    def keep(self, value: SSAValue) -> None:
        """Keep a value to the end."""
        for group in self._groups:
            self._found[value, group].end = self.end

    def _number(self, ops: Sequence[Operation]) -> None:
        """Places of all parts; a loop has one before its turn, one after it, and one after all."""
        count = 0
        for item in schedule(ops, self._layout):
            if not isinstance(item, Turns):
                count += 1
                self._at[item.op, item.group] = count
                continue
            first = count = count + 1
            for part in item.turn:
                count += 1
                self._at[part.op, part.group] = count
                self._parts[part.op, part.group] = part
                if part.late:
                    self._late.add((part.op, part.group))
            self.cycles = max(self.cycles, item.cycles)
            turned = count = count + 1
            for part in item.rest:
                count += 1
                self._rest[part.op, part.group] = count
            count += 1
            self._loops[item.loop] = (first, turned, count)
        self.end = count + 1

    def _operation(self, op: Operation) -> None:
        """Slots of an operation's result and scratch space."""
        for value in op.results:
            for group in (0,) if shared(value) else self._groups:
                addend = op.addend if isinstance(op, dev.MatrixOp) else None
                if addend is not None:
                    self._found[value, group] = self._found[addend, group]
                    self._found[value, group].values.append(value)
                elif (value, group) not in self._found:
                    self._add(value, group, self._at[op, group])
                self._extend(value, group)
        total = self._layout.scratch(op)["total"]
        for group in self._groups if total else ():
            here, slot = (op, group), Slot(total, self._at[op, group], self._at[op, group], owner=op)
            if here in self._rest:
                slot.spans.append((self._rest[here], self._rest[here]))
            self._access(slot, op, group)
            self.slots[1 + group].append(slot)

    def _add(self, value: SSAValue, group: int, start: int) -> Slot:
        slot = Slot(self._layout.words(value), start, start, [value])
        self._found[value, group] = slot
        self.slots[0 if shared(value) else 1 + group].append(slot)
        return slot

    def _access(self, slot: Slot, op: Operation, group: int) -> None:
        """Note that an operation reads or writes a slot."""
        if (op, group) in self._parts:
            part = self._parts[op, group]
            slot.times.append((part.start, part.end))

    def _extend(self, value: SSAValue, group: int) -> None:
        """Let a value's slot live until its last use."""
        slot = self._found[value, group]
        if isinstance(value.owner, Operation):
            self._access(slot, value.owner, group)
        for use in value.uses:
            for reader in self._groups if shared(value) else (group,):
                self._access(slot, use.operation, reader)
                for start, end in self._spans(value, group, use.operation, reader):
                    if start == slot.start:
                        slot.end = max(slot.end, end)
                    else:
                        slot.spans.append((start, end))

    def _spans(self, value: SSAValue, group: int, user: Operation, reader: int) -> list[Span]:
        """When a value is live for one use: by `user` in group `reader`."""
        home = value.owner if isinstance(value.owner, Block) else value.owner.parent_block()
        start, made, used = self._found[value, group].start, (value.owner, group), (user, reader)
        if isinstance(value.owner, dev.MatrixOp) and value.owner.addend is not None:
            start = self._at[value.owner, group]
        if user.parent_block() is not home:
            loop = user.parent_op()
            return [(start, self._loops[loop][2])] if loop in self._loops else []
        if isinstance(user, ir.RepeatOp):
            return [(start, self._loops[user][0])]
        if isinstance(user, ir.YieldOp):
            loop = user.parent_op()
            assert loop is not None
            return [(start, self._loops[loop][2])]
        if used not in self._at:
            return []
        if used not in self._late:
            return [(start, self._at[used])]
        if made in self._late:
            return [(start, self._at[used]), (self._rest[made], self._rest[used])]
        loop = user.parent_op()
        assert loop is not None
        return [(start, self._rest[used]), (self._loops[loop][0], self._at[used])]

    def _loop(self, loop: ir.RepeatOp) -> None:
        """One slot for a loop's argument and result, and for its first and yielded values where they can share it."""
        first, _, end = self._loops[loop]
        body = loop.body.block
        carried = zip(loop.inits, body.args, loop.outs, body.last_op.operands, in_place(loop), strict=True)  # type: ignore[union-attr]
        for init, arg, out, made, fits in carried:
            for group in self._groups:
                only_here = len(list(init.uses)) == 1 and isinstance(init.owner, Operation)
                slot = self._found.get((init, group)) if only_here else None
                if slot is None:
                    slot = self._add(out, group, first)
                    slot.values.append(arg)
                else:
                    slot.values += [arg, out]
                slot.end = max(slot.end, end)
                for value in (arg, out, *((made,) if fits else ())):
                    self._found[value, group] = slot
                if fits:
                    slot.values.append(made)
                for use in arg.uses:
                    self._access(slot, use.operation, group)
                self._extend(out, group)
