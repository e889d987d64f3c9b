"""fuse: a product's bias and activation move into the matrix unit's epilogue; loads move to the start of their block.

Fusing never changes bits: each epilogue step equals the vector unit's operation. Where a product goes by rows, a bias
and a residual that the sum of the parts would meet are added by the last device to its part, in the epilogue, so that
two additions fewer wait for the ring. Hoisted loads overlap with the products before their use, at the price of
registers, which attention with chains needs for itself: with `late` what is used after it is loaded after it.
`hoist=false` leaves each load where it is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Block, Operation, SSAValue
from xdsl.passes import ModulePass
from xdsl.rewriter import Rewriter

from typebar.compiler import device_ir as dev
from typebar.compiler import ir
from typebar.compiler.device_source import AttendOp

LOADS = dev.ParamOp | dev.BiasOp | dev.RotaryRowOp | dev.ScoreBiasOp
"""Operations that only load."""


@dataclass(frozen=True)
class FusePass(ModulePass):
    """Fuse epilogues and, with `hoist`, hoist loads in every block of a `tbd.program`."""

    name = "fuse"
    hoist: bool = True
    late: bool = False

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        """Rewrite in place; never fails."""
        for item in list(op.walk()):
            if isinstance(item, dev.MatrixOp):
                _fuse_epilogue(item)
        for item in list(op.walk()):
            if isinstance(item, dev.AddOp) and item.parent is not None:
                _add_to_last(item)
        for item in list(op.walk()):
            if isinstance(item, dev.ProgramOp | ir.RepeatOp):
                _place_loads(item.body.block, self.hoist, self.late)


def _only_user(value: SSAValue) -> object:
    users = [use.operation for use in value.uses]
    return users[0] if len(users) == 1 else None


def _fuse_epilogue(matrix: dev.MatrixOp) -> None:
    user = _only_user(matrix.out)
    if isinstance(user, dev.AddOp) and matrix.bias is None and user.lhs is matrix.out:
        bias = user.rhs.owner
        if isinstance(bias, dev.BiasOp):
            _move_before(bias, matrix)
            matrix = _rebuilt(matrix, bias.out, None, user)
            user = _only_user(matrix.out)
    if isinstance(user, dev.ActivationOp):
        _rebuilt(matrix, matrix.bias, user.kind.data, user)


def _add_to_last(residual: dev.AddOp) -> None:
    """x + (sum + bias), or x + sum, becomes the sum alone: the last device's part has x and the bias in it."""
    for x, inner in ((residual.lhs, residual.rhs), (residual.rhs, residual.lhs)):
        biased: dev.AddOp | None = None
        bias: dev.BiasOp | None = None
        if isinstance(inner.owner, dev.AddOp) and isinstance(inner.owner.rhs.owner, dev.BiasOp):
            biased, bias, inner = inner.owner, inner.owner.rhs.owner, inner.owner.lhs
        total = inner.owner
        if not isinstance(total, dev.SumOp) or not isinstance(total.x.owner, dev.GatherOp):
            continue
        product = total.x.owner.x.owner
        if not isinstance(product, dev.MatrixOp) or ir.width(total.out) != residual.count:
            continue
        if _only_user(total.out) is not (biased or residual) or not _there_before(x, product):
            continue
        if biased is not None and _only_user(biased.out) is not residual:
            continue
        last = dev.LastOp(x, None if bias is None else bias.out, residual.count)
        block = product.parent_block()
        assert block is not None
        block.insert_op_before(last, _early(x, product))
        if bias is not None:
            _move_before(bias, last)
        residual.out.replace_all_uses_with(total.out)
        total.out.name_hint = residual.out.name_hint
        Rewriter.erase_op(residual)
        if biased is not None:
            Rewriter.erase_op(biased)
        _replaced(product, last.out, None)
        return


def _early(value: SSAValue, product: Operation) -> Operation:
    """Where a vector instruction delays none: before the product before, or before this one if that is too early."""
    op = product.prev_op
    while op is not None and not isinstance(op, dev.MatrixOp):
        op = op.prev_op
    return op if op is not None and _there_before(value, op) else product


def _there_before(value: SSAValue, op: Operation) -> bool:
    """Whether a value is there when an operation runs: from outside its block, or made earlier in it."""
    owner = value.owner
    return isinstance(owner, Block) or owner.parent_block() is not op.parent_block() or owner.is_before_in_block(op)


def _move_before(op: Operation, place: Operation) -> None:
    block = place.parent_block()
    assert block is not None
    op.detach()  # type: ignore[no-untyped-call]
    block.insert_op_before(op, place)


def _rebuilt(
    matrix: dev.MatrixOp, bias: SSAValue | None, activation: str | None, user: dev.AddOp | dev.ActivationOp
) -> dev.MatrixOp:
    """The product with a bias and an activation that takes its user's place."""
    made = _replaced(matrix, bias, activation)
    made.out.name_hint = user.out.name_hint or made.out.name_hint
    user.out.replace_all_uses_with(made.out)
    Rewriter.erase_op(user)
    return made


def _replaced(matrix: dev.MatrixOp, bias: SSAValue | None, activation: str | None) -> dev.MatrixOp:
    """The product with a bias and an activation, in its own place."""
    k, unit, pad = (int(a.value.data) for a in (matrix.k, matrix.row_unit, matrix.row_pad))
    made = dev.MatrixOp(matrix.x, matrix.pieces, k, unit, pad, matrix.scale, bias, activation, bool(matrix.by_rows))
    made.attributes.update(matrix.attributes)
    made.out.name_hint = matrix.out.name_hint
    Rewriter.replace_op(matrix, made)
    return made


def _place_loads(block: Block, hoist: bool, late: bool) -> None:
    loads = [op for op in block.ops if isinstance(op, LOADS)]
    order = {op: place for place, op in enumerate(block.ops)}
    attentions = [op for op in block.ops if isinstance(op, dev.AttentionOp | AttendOp)]
    for load in reversed(loads) if hoist else loads:
        users = [block.find_ancestor_op_in_block(use.operation) for use in load.out.uses]
        user = min((op for op in users if op is not None), key=lambda op: order[op], default=load)
        first: Operation | None = user
        if hoist:
            before = [op for op in attentions if late and order[op] < order[user]]
            first = before[-1].next_op if before else block.first_op
        assert first is not None
        if first is not load:
            _move_before(load, first)
