"""Attention, fused as scaled_dot_product_attention or written out as matmul, mask, softmax, matmul."""

from __future__ import annotations

import math
from dataclasses import dataclass

from xdsl.dialects.builtin import DYNAMIC_INDEX, IntegerType, TensorType
from xdsl.ir import Block, Operation, SSAValue
from xdsl.rewriter import Rewriter

from typebar.compiler import ir
from typebar.compiler.aten import arguments, base_name, keywords, named, shape_of
from typebar.compiler.passes.canonicalise import erase_unused
from typebar.compiler.problems import keep_name

MASKED = -1e9
"""A score to which this or less is added does not count: exp(score - 1e9) is 0 in float32 for every score below 1e8."""

_MATMULS = ("matmul", "bmm")


def fused_attention(op: ir.AtenOp) -> Operation | None:
    """`tb.attention` for aten.scaled_dot_product_attention, or None if its shapes or options have no counterpart."""
    args = named(op, "q", "k", "v", "mask", "dropout", "causal")
    q, k, v, mask = args["q"], args["k"], args["v"], args.get("mask")
    if not (isinstance(q, SSAValue) and isinstance(k, SSAValue) and isinstance(v, SSAValue)) or args.get("dropout"):
        return None
    kind = "causal" if args.get("causal") else "none"
    allowed = mask if isinstance(mask, SSAValue) else None
    scale = args.get("scale")
    return _attention(q, k, v, scale if isinstance(scale, int | float) else None, kind, allowed)


def _attention(
    q: SSAValue, k: SSAValue, v: SSAValue, scale: float | None, kind: str, allowed: SSAValue | None
) -> Operation | None:
    """Attention on q, k and v, [1, heads, T, head_dim]; `kind` counts where there is no `allowed`."""
    k, v = _before_repeating_heads(k), _before_repeating_heads(v)
    shapes = [shape_of(x) for x in (q, k, v)]
    if any(len(s) != 4 or s[0] != 1 or s[2] != DYNAMIC_INDEX or s[3] != shapes[0][3] for s in shapes):
        return None
    heads, kv_heads, size = shapes[0][1], shapes[1][1], shapes[0][3]
    if shapes[1] != shapes[2] or min(heads, kv_heads, size) <= 0 or heads % kv_heads:
        return None
    factor = scale if scale is not None else 1 / math.sqrt(size)
    mask = kind if allowed is None else None
    return ir.AttentionOp(q, k, v, heads, kv_heads, size, factor, mask=mask, allowed=allowed)


def _before_repeating_heads(value: SSAValue) -> SSAValue:
    """K or V before its heads were copied for their groups of query heads: reshape(expand(unsqueeze(x, 2)))."""
    inner, shapes = value, [shape_of(value)]
    for names in (("reshape", "view", "_unsafe_view"), ("expand",), ("unsqueeze",)):
        op = inner.owner
        if not isinstance(op, ir.AtenOp) or base_name(op) not in names:
            return value
        inner = op.inputs[0]
        shapes.append(shape_of(inner))
    joined, copied, _, source = shapes
    grouped = len(source) == 4 and len(copied) == 5 and copied[:2] == source[:2] and copied[3:] == source[2:]
    return inner if grouped and joined == (source[0], copied[1] * copied[2], *source[2:]) else value


@dataclass
class _Scores:
    """What was read off the chain from the softmax back to q k^T."""

    q: SSAValue
    k: SSAValue
    scale: float
    mask: SSAValue | None
    inverted: bool


def recognise_attention(block: Block, computed: set[SSAValue]) -> None:
    """Replace softmax(scale * q k^T, masked) v by `tb.attention`; `computed` are the model's float values."""
    found = False
    for op in list(block.ops):
        if not isinstance(op, ir.AtenOp) or base_name(op) not in _MATMULS or len(op.inputs) != 2:
            continue
        softmax, v = op.inputs[0].owner, op.inputs[1]
        if not isinstance(softmax, ir.AtenOp) or base_name(softmax) not in ("softmax", "_softmax"):
            continue
        rank = len(shape_of(op.inputs[0]))
        scores = _scores(softmax.inputs[0], computed) if arguments(softmax)[1] in (-1, rank - 1) else None
        new = _written_out(scores, v, softmax) if scores is not None else None
        if new is None:
            continue
        keep_name(new, op)
        block.insert_op_before(new, op)
        op.outs[0].replace_all_uses_with(new.results[0])
        Rewriter.erase_op(op)
        computed.add(new.results[0])
        found = True
    if found:
        erase_unused(block)


def _written_out(scores: _Scores, v: SSAValue, softmax: ir.AtenOp) -> Operation | None:
    mask = scores.mask
    new = _attention(scores.q, scores.k, v, scores.scale, "none", mask)
    if new is None or mask is None or not scores.inverted:
        return new
    block = softmax.parent
    assert block is not None
    inverse = ir.AtenOp("aten.logical_not.default", [mask], [ir.operand_reference(0)], {}, [mask.type])
    block.insert_op_before(inverse, softmax)
    return _attention(scores.q, scores.k, v, scores.scale, "none", inverse.outs[0])


def _scores(value: SSAValue, computed: set[SSAValue]) -> _Scores | None:
    """Follow the chain back from a softmax through one mask and any scalings."""
    scale, mask, inverted = 1.0, None, False
    while isinstance(op := value.owner, ir.AtenOp) and base_name(op) not in _MATMULS:
        step = _scaling(op)
        if step is not None:
            value, scale = op.inputs[0], scale * step
            continue
        masking = _masking(op, computed)
        # A mask inside a scaling would be scaled as well; two masks are one too many to name.
        if masking is None or mask is not None or scale != 1.0:
            return None
        value, mask, inverted = masking
    if not isinstance(op, ir.AtenOp) or len(op.inputs) != 2:
        return None
    q, transposed = op.inputs
    k = _transposed(transposed)
    return _Scores(q, k, scale, mask, inverted) if k is not None else None


def _scaling(op: ir.AtenOp) -> float | None:
    if op.target.data not in ("aten.mul.Tensor", "aten.div.Tensor") or len(op.inputs) != 1 or keywords(op):
        return None
    factor = arguments(op)[1]
    if not isinstance(factor, int | float) or factor <= 0:
        return None
    return factor if op.target.data == "aten.mul.Tensor" else 1 / factor


def _masking(op: ir.AtenOp, computed: set[SSAValue]) -> tuple[SSAValue, SSAValue, bool] | None:
    """(scores, mask, whether true means masked) of an operation that masks scores, if it is one."""
    name, args = base_name(op), arguments(op)
    if name == "add" and len(op.inputs) == 2 and not keywords(op):
        scores, mask = op.inputs if op.inputs[0] in computed else tuple(op.inputs)[::-1]
        return (scores, mask, False) if scores in computed and mask not in computed else None
    if name == "masked_fill":
        scored, condition, inverted, fill = args[0], args[1], True, _constant(args[2])
    elif name == "where" and len(args) == 3:
        scored, condition, inverted, fill = args[1], args[0], False, _constant(args[2])
    else:
        return None
    if not isinstance(scored, SSAValue) or not isinstance(condition, SSAValue) or condition in computed:
        return None
    type = condition.type
    boolean = isinstance(type, TensorType) and type.element_type == IntegerType(1)
    return (scored, condition, inverted) if boolean and fill is not None and fill <= MASKED else None


def _constant(value: object) -> float | None:
    """A number, or the number that a tensor is filled with."""
    if isinstance(value, SSAValue):
        op = value.owner
        place = {"full": 1, "scalar_tensor": 0}.get(base_name(op)) if isinstance(op, ir.AtenOp) else None
        filled = arguments(op)[place] if isinstance(op, ir.AtenOp) and place is not None else None
        return filled if isinstance(filled, int | float) else None
    return value if isinstance(value, int | float) else None


def _transposed(value: SSAValue) -> SSAValue | None:
    """What the value is the transpose of in its last two axes."""
    op = value.owner
    if not isinstance(op, ir.AtenOp) or base_name(op) not in ("transpose", "permute"):
        return None
    rank = len(shape_of(value))
    axes = arguments(op)[1:]
    if base_name(op) == "permute":
        order = axes[0]
        swapped = isinstance(order, list) and [a % rank for a in order] == [*range(rank - 2), rank - 1, rank - 2]
    else:
        swapped = {a % rank for a in axes if isinstance(a, int)} == {rank - 1, rank - 2}
    return op.inputs[0] if swapped else None
