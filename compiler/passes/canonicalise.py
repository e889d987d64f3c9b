"""canonicalise: drop what does nothing, merge what is equal, erase what is unused."""

from __future__ import annotations

from collections.abc import Iterable

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Attribute, Block, Operation, SSAValue
from xdsl.passes import ModulePass
from xdsl.rewriter import Rewriter
from xdsl.traits import is_side_effect_free

from typebar.compiler import ir
from typebar.compiler.aten import arguments, base_name, keywords, words

_COPIES = words("alias clone contiguous detach lift_fresh_copy")
_SAME_IF_TYPE_IS = words(
    "expand expand_as flatten narrow reshape slice squeeze to type_as unflatten unsqueeze view _to_copy _unsafe_view"
)


class Canonicalise(ModulePass):
    """Remove copies, dropout at inference, views and casts to the same type; then merge equal operations."""

    name = "canonicalise"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        """Rewrite every graph in place."""
        for graph in op.body.block.ops:
            if isinstance(graph, ir.GraphOp):
                for inner in list(graph.body.block.ops):
                    if isinstance(inner, ir.AtenOp) and (source := _identity_of(inner)) is not None:
                        inner.outs[0].replace_all_uses_with(source)
                        Rewriter.erase_op(inner)
                merge_equal(graph.body.block)
                erase_unused(graph.body.block)


def _identity_of(op: ir.AtenOp) -> SSAValue | None:
    """The operand that the operation merely hands on, if that is all it does."""
    if not op.inputs or len(op.outs) != 1:
        return None
    source, name = op.inputs[0], base_name(op)
    if not op.target.data.startswith("aten."):
        return None
    if name in _COPIES and source.type == op.outs[0].type:
        return source
    if name in ("mul", "div") and len(op.inputs) == 1 and arguments(op)[1:] == [1] and source.type == op.outs[0].type:
        return source
    if name == "dropout":
        return source if not _dropping(op) else None
    # A view, or a slice of the full length, whose type is its operand's keeps every element where it is: the sizes are
    # equal one by one, provided that no size is an expression other than the number of tokens.
    if name in _SAME_IF_TYPE_IS and source.type == op.outs[0].type and op.symbolic is None:
        owner = source.owner
        return source if not (isinstance(owner, ir.AtenOp) and owner.symbolic is not None) else None
    return None


def _dropping(op: ir.AtenOp) -> bool:
    args = dict(zip(("input", "p", "train"), arguments(op), strict=False)) | keywords(op)
    return bool(args.get("train")) and args.get("p") != 0.0


def merge_equal(block: Block) -> None:
    """Let equal side-effect-free operations on equal operands be one."""
    seen: dict[tuple[object, ...], Operation] = {}
    for op in list(block.ops):
        if not is_side_effect_free(op) or op.regions:
            continue
        key = (op.name, *map(id, op.operands), *_sorted(op.properties), *(r.type for r in op.results))
        first = seen.setdefault(key, op)
        if first is not op:
            for old, new in zip(op.results, first.results, strict=True):
                old.replace_all_uses_with(new)
            Rewriter.erase_op(op)


def _sorted(properties: dict[str, Attribute]) -> Iterable[tuple[str, Attribute]]:
    return sorted(properties.items(), key=lambda item: item[0])


def erase_unused(block: Block) -> None:
    """Erase side-effect-free operations without uses, last first."""
    for op in reversed(list(block.ops)):
        if is_side_effect_free(op) and not any(r.uses for r in op.results):
            Rewriter.erase_op(op)
