"""phases: a source text's computation becomes loops over its positions, cut where attention needs all of them.

The body of `tbd.source`, and of each loop over layers in it, is cut before every `tbd.attend` and around every loop.
Each piece becomes a `tbd.phase`. A value used in another piece than its own is saved, a row for each position, and
restored there; parameters are loaded again instead, with `hoist` once, before the loop over positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from xdsl.context import Context
from xdsl.dialects.builtin import IndexType, ModuleOp
from xdsl.ir import Block, Operation, Region, SSAValue
from xdsl.passes import ModulePass
from xdsl.rewriter import Rewriter

from typebar.compiler import device_ir as dev
from typebar.compiler import ir
from typebar.compiler.device_source import AttendOp, PhaseOp, RestoreOp, SaveOp, SourceOp

_Key = tuple[SSAValue, int, int]
"""Words of a value: the value, its first word and how many."""
_Constant = dev.ParamOp | dev.BiasOp
_Load = _Constant | dev.ScoreBiasOp | dev.RotaryRowOp
"""What is loaded again in every piece that needs it."""


@dataclass(frozen=True)
class PhasesPass(ModulePass):
    """Cut every `tbd.source` into phases; a module without one stays as it is."""

    name = "phases"
    hoist: bool = True

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        """Rewrite in place; never fails."""
        for source in [item for item in op.body.block.ops if isinstance(item, SourceOp)]:
            _Cutter(source, self.hoist).cut()


@dataclass(eq=False)
class _Piece:
    """Operations that run position by position in one go; `after` are copies into rows at its end: (value, area)."""

    ops: list[Operation]
    after: list[tuple[SSAValue, int]] = field(default_factory=list)


class _Cutter:
    def __init__(self, source: SourceOp, hoist: bool) -> None:
        self.source, self.hoist = source, hoist
        self.arguments = list(source.body.block.args)
        self.pieces: dict[Block, list[_Piece | ir.RepeatOp]] = {}
        self.home: dict[Operation, _Piece] = {}
        self.areas: dict[_Key, int] = {}
        self.count = 0

    def cut(self) -> None:
        """All of it: split, find what is to be saved, and build the phases."""
        self.split(self.source.body.block)
        for block in list(self.pieces):
            for item in self.pieces[block]:
                if isinstance(item, _Piece):
                    for key in self.needs(item):
                        self.area(key)
        body = Block(self.build(self.source.body.block), arg_types=[IndexType(), IndexType()])
        vocab, context, devices, align = (
            int(a.value.data) for a in (self.source.vocab, self.source.context, self.source.devices, self.source.align)
        )
        Rewriter.replace_op(self.source, SourceOp(vocab, context, devices, align, Region(body)), [])

    # Splitting ------------------------------------------------------------------------------------------
    def split(self, block: Block) -> None:
        """Cut a block into pieces and loops; loops get areas for what they carry."""
        items: list[_Piece | ir.RepeatOp] = [_Piece([])]
        self.pieces[block] = items
        for op in block.ops:
            if isinstance(op, _Load):
                continue
            if isinstance(op, ir.RepeatOp):
                self.enter(op, items)
                items += [op, _Piece([])]
            elif isinstance(op, ir.YieldOp):
                self.leave(op, items)
            else:
                if isinstance(op, AttendOp):
                    items.append(_Piece([]))
                last = items[-1]
                assert isinstance(last, _Piece)
                last.ops.append(op)
                self.home[op] = last
        self.pieces[block] = [item for item in items if isinstance(item, ir.RepeatOp) or item.ops or item.after]

    def enter(self, loop: ir.RepeatOp, items: list[_Piece | ir.RepeatOp]) -> None:
        """The piece before a loop saves its first values where the body looks for them."""
        before = items[-1]
        assert isinstance(before, _Piece)
        for init, argument, out in zip(loop.inits, loop.body.block.args, loop.outs, strict=True):
            key = _whole(init)
            if key in self.areas and _uses(init) == 1:
                area = self.areas[key]
            else:
                area = self.fresh()
                maker = init.owner
                piece = before if isinstance(maker, Block) else self.home.get(maker, before)
                piece.after.append((init, area))
            for value in (argument, out):
                self.areas[_whole(value)] = area
        self.split(loop.body.block)

    def leave(self, end: ir.YieldOp, items: list[_Piece | ir.RepeatOp]) -> None:
        """The last piece of a body saves what the next layer starts from."""
        loop, last = end.parent_op(), items[-1]
        assert isinstance(loop, ir.RepeatOp) and isinstance(last, _Piece)
        for value, argument in zip(end.values, loop.body.block.args, strict=True):
            if value is not argument:
                last.after.append((value, self.areas[_whole(argument)]))

    def fresh(self) -> int:
        self.count += 1
        return self.count - 1

    def area(self, key: _Key) -> int:
        if key not in self.areas:
            self.areas[key] = self.fresh()
        return self.areas[key]

    def needs(self, piece: _Piece) -> list[_Key]:
        """What a piece reads of other pieces' values; rows of its own are no use to it."""
        keys = []
        for op in piece.ops:
            for value in op.operands:
                if not isinstance(value.type, IndexType) and self.foreign(value, piece):
                    keys.append(_key(op, value))
        keys += [_whole(value) for value, _ in piece.after if self.foreign(value, piece)]
        return list(dict.fromkeys(keys))

    def foreign(self, value: SSAValue, piece: _Piece) -> bool:
        owner = value.owner
        if isinstance(owner, Block | ir.RepeatOp):
            return True
        return not isinstance(owner, _Load) and self.home[owner] is not piece

    # Building -------------------------------------------------------------------------------------------
    def build(self, block: Block) -> list[Operation]:
        """Phases and loops of phases for a block; the block itself stays as it is."""
        made: list[Operation] = []
        for item in self.pieces[block]:
            if isinstance(item, _Piece):
                made += self.phase(item)
            else:
                body = Block([*self.build(item.body.block), ir.YieldOp()])
                loop = ir.RepeatOp([], item.count.value.data, item.start.value.data, Region(body))
                loop.attributes.update(item.attributes)
                made.append(loop)
        return made

    def phase(self, piece: _Piece) -> list[Operation]:
        """A phase, and the loads that stand before it."""
        block = Block(arg_types=[IndexType(), IndexType()])
        known: dict[SSAValue, SSAValue] = dict(zip(self.arguments, block.args, strict=True))
        parts: dict[_Key, SSAValue] = {}
        before: list[Operation] = []
        for key in self.needs(piece):
            restore = RestoreOp(self.areas[key], key[2])
            restore.out.name_hint = key[0].name_hint
            block.add_op(restore)
            parts[key] = restore.out
            if key == _whole(key[0]):
                known[key[0]] = restore.out
        used = [value for op in piece.ops for value in op.operands] + [value for value, _ in piece.after]
        if self.hoist:
            for value in used:
                if isinstance(value.owner, _Constant):
                    self.load(value, known, before.append)
        for value, area in piece.after:
            if self.foreign(value, piece) or isinstance(value.owner, _Load):
                self.load(value, known, block.add_op)
                block.add_op(SaveOp(known[value], area, 0, ir.width(value)))
        for op in piece.ops:
            for value in op.operands:
                self.load(value, known, block.add_op)
            block.add_op(self.copy(op, known, parts))
            for result in op.results:
                for save in self.saves(result, known[result], piece):
                    block.add_op(save)
        return [*before, PhaseOp(Region(block))]

    def load(self, value: SSAValue, known: dict[SSAValue, SSAValue], place: Callable[[Operation], None]) -> None:
        """A parameter's value at hand, loaded if it is not yet."""
        if isinstance(value.owner, _Load) and value not in known:
            made = value.owner.clone(known)
            made.results[0].name_hint = value.name_hint
            known[value] = made.results[0]
            place(made)

    def copy(self, op: Operation, known: dict[SSAValue, SSAValue], parts: dict[_Key, SSAValue]) -> Operation:
        own = {op.q: parts[_key(op, op.q)]} if isinstance(op, AttendOp) else {}
        made = op.clone(known | own)
        if isinstance(made, AttendOp):
            made.properties["q_at"] = ir.number(0)
        for old, new in zip(op.results, made.results, strict=True):
            known[old] = new
            new.name_hint = old.name_hint
        return made

    def saves(self, old: SSAValue, new: SSAValue, piece: _Piece) -> list[SaveOp]:
        """What other pieces and layers need of a value made in `piece`."""
        keys = [(key, area) for key, area in self.areas.items() if key[0] is old]
        made = [SaveOp(new, area, key[1], key[2]) for key, area in keys]
        return made + [SaveOp(new, area, 0, ir.width(old)) for value, area in piece.after if value is old]


def _whole(value: SSAValue) -> _Key:
    return value, 0, ir.width(value)


def _key(op: Operation, value: SSAValue) -> _Key:
    """The words of an operand that an operation reads."""
    if isinstance(op, AttendOp) and value is op.q:
        return value, int(op.q_at.value.data), ir.width(op.out)
    return _whole(value)


def _uses(value: SSAValue) -> int:
    return len(list(value.uses))
