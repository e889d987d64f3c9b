"""Attention, fused as scaled_dot_product_attention or written out as matmul, mask, softmax, matmul."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from xdsl.dialects.builtin import DYNAMIC_INDEX, Float32Type, IntegerType, TensorType
from xdsl.ir import Block, Operation, SSAValue
from xdsl.rewriter import Rewriter

from typebar.compiler import ir
from typebar.compiler.aten import arguments, aten_op, base_name, keywords, named, shape_of, words
from typebar.compiler.passes.canonicalise import erase_unused
from typebar.compiler.passes.tensors import Tensors
from typebar.compiler.problems import keep_name

MASKED = -1e9
"""A score to which this or less is added does not count: exp(score - 1e9) is 0 in float32 for every score below 1e8."""

_MATMULS = ("matmul", "bmm")
_VIEWS = words("view reshape _unsafe_view unsqueeze squeeze flatten unflatten")
_ADDED, _ALLOWED, _DENIED = "added", "allowed", "denied"


def fused_attention(op: ir.AtenOp) -> Operation | None:
    """`tb.attention` for aten.scaled_dot_product_attention, or None if its shapes or options have no counterpart."""
    args = named(op, "q", "k", "v", "mask", "dropout", "causal")
    q, k, v, mask = args["q"], args["k"], args["v"], args.get("mask")
    if not (isinstance(q, SSAValue) and isinstance(k, SSAValue) and isinstance(v, SSAValue)) or args.get("dropout"):
        return None
    kind = "causal" if args.get("causal") else "none"
    allowed = mask if isinstance(mask, SSAValue) else None
    if allowed is not None and kind == "causal":
        return None
    scale = args.get("scale")
    return _attention(q, k, v, scale if isinstance(scale, int | float) else None, kind, allowed)


def _attention(
    q: SSAValue, k: SSAValue, v: SSAValue, scale: float | None, kind: str, allowed: SSAValue | None
) -> Operation | None:
    """Attention on q, k and v, [1, heads, T, head_dim]; `kind` counts where there is no `allowed`."""
    shapes = [shape_of(x) for x in (q, k, v)]
    if any(len(s) != 4 or s[0] != 1 or s[2] != DYNAMIC_INDEX or s[3] != shapes[0][3] for s in shapes):
        return None
    heads, kv_heads, size = shapes[0][1], shapes[1][1], shapes[0][3]
    if shapes[1] != shapes[2] or min(heads, kv_heads, size) <= 0 or heads % kv_heads:
        return None
    factor = scale if scale is not None else 1 / math.sqrt(size)
    mask = kind if allowed is None else None
    return ir.AttentionOp(q, k, v, heads, kv_heads, size, factor, mask=mask, allowed=allowed)


@dataclass(frozen=True)
class _Mask:
    """Something added to scores, times a factor, or a choice of scores that count."""

    value: SSAValue
    kind: str
    factor: float


@dataclass
class _Scores:
    """What was read off the chain from the softmax back to q k^T: k is still transposed."""

    q: SSAValue
    k: SSAValue
    scale: float
    masks: list[_Mask] = field(default_factory=list)


def recognise_attention(block: Block, computed: set[SSAValue], tensors: Tensors) -> None:
    """Replace softmax(scale * q k^T, masked) v by `tb.attention`; `computed` are the model's float values."""
    found = False
    for op in list(block.ops):
        if not isinstance(op, ir.AtenOp) or base_name(op) not in _MATMULS or len(op.inputs) != 2:
            continue
        softmax = _behind_views(op.inputs[0]).owner
        if not isinstance(softmax, ir.AtenOp) or base_name(softmax) not in ("softmax", "_softmax"):
            continue
        rank = len(shape_of(softmax.outs[0]))
        if arguments(softmax)[1] not in (-1, rank - 1):
            continue
        scores = _Reader(computed, tensors).scores(softmax.inputs[0])
        if scores is not None and _replace(op, scores, block, computed):
            found = True
    if found:
        erase_unused(block)


def _behind_views(value: SSAValue) -> SSAValue:
    """What a value of scores or weights is before axes of one element and those of heads were joined or split."""
    while isinstance(op := value.owner, ir.AtenOp) and base_name(op) in _VIEWS:
        before, after = shape_of(op.inputs[0]), shape_of(value)
        if before[-2:] != after[-2:] or _longer(before[:-2]) != _longer(after[:-2]):
            break
        value = op.inputs[0]
    return value


def _longer(shape: tuple[int, ...]) -> list[int]:
    return [s for s in shape if s != 1]


class _Reader:
    """Follows scores back from a softmax through masks and scalings."""

    def __init__(self, computed: set[SSAValue], tensors: Tensors) -> None:
        self.computed, self.tensors = computed, tensors

    def scores(self, value: SSAValue) -> _Scores | None:
        factor, masks = 1.0, list[_Mask]()
        while True:
            value = _behind_views(value)
            op = value.owner
            if not isinstance(op, ir.AtenOp):
                return None
            name = base_name(op)
            if name in _MATMULS:
                return _Scores(op.inputs[0], op.inputs[1], factor, masks) if len(op.inputs) == 2 else None
            if name == "baddbmm":
                return self._biased_product(op, factor, masks)
            step = self._scaling(op)
            if step is not None:
                source, number = step
                value, factor = source, factor * number
                continue
            if (below := self._clamped(op)) is not None:
                value = below
                continue
            masking = self._masking(op, factor)
            if masking is None:
                return None
            value, mask = masking
            masks.append(mask)

    def _biased_product(self, op: ir.AtenOp, factor: float, masks: list[_Mask]) -> _Scores | None:
        args = named(op, "bias", "q", "k", "beta", "alpha")
        bias, q, k = args["bias"], args["q"], args["k"]
        beta, alpha = (self.tensors.scalar(args.get(name, 1.0)) for name in ("beta", "alpha"))
        if not all(isinstance(v, SSAValue) for v in (bias, q, k)) or beta is None or alpha is None or alpha <= 0:
            return None
        assert isinstance(q, SSAValue) and isinstance(k, SSAValue) and isinstance(bias, SSAValue)
        if beta:
            if bias in self.computed:
                return None
            masks.append(_Mask(bias, _ADDED, factor * beta))
        return _Scores(q, k, factor * alpha, masks)

    def _scaling(self, op: ir.AtenOp) -> tuple[SSAValue, float] | None:
        """Scores before a positive factor, and the factor."""
        name = base_name(op)
        if name not in ("mul", "div") or keywords(op):
            return None
        x, number = arguments(op)[:2]
        if name == "mul" and (not isinstance(x, SSAValue) or x not in self.computed):
            x, number = number, x
        value = self.tensors.scalar(number)
        if not isinstance(x, SSAValue) or x not in self.computed or value is None or value <= 0:
            return None
        return x, value if name == "mul" else 1 / value

    def _clamped(self, op: ir.AtenOp) -> SSAValue | None:
        """Scores before a lower limit that no score that counts reaches."""
        if base_name(op) not in ("maximum", "max", "clamp", "clamp_min") or len(arguments(op)) != 2 or keywords(op):
            return None
        x, limit = arguments(op)
        value = self.tensors.scalar(limit)
        return x if isinstance(x, SSAValue) and value is not None and value <= MASKED else None

    def _masking(self, op: ir.AtenOp, factor: float) -> tuple[SSAValue, _Mask] | None:
        """The scores that an operation masks, and the mask, if it is one."""
        name, args = base_name(op), arguments(op)
        if name == "add" and len(op.inputs) == 2 and not keywords(op):
            scores, mask = op.inputs if op.inputs[0] in self.computed else tuple(op.inputs)[::-1]
            known = scores in self.computed and mask not in self.computed
            return (scores, _Mask(mask, _ADDED, factor)) if known else None
        if name == "masked_fill":
            scored, condition, kind, fill = args[0], args[1], _DENIED, args[2]
        elif name == "where" and len(args) == 3:
            scored, condition, kind, fill = args[1], args[0], _ALLOWED, args[2]
            if not isinstance(scored, SSAValue) or scored not in self.computed:
                scored, kind, fill = args[2], _DENIED, args[1]
        else:
            return None
        value = self._filling(fill)
        if not isinstance(scored, SSAValue) or not isinstance(condition, SSAValue) or condition in self.computed:
            return None
        type = condition.type
        boolean = isinstance(type, TensorType) and type.element_type == IntegerType(1)
        masked = value is not None and value * factor <= MASKED
        return (scored, _Mask(condition, kind, factor)) if boolean and masked else None

    def _filling(self, value: object) -> float | None:
        """A number, or the number that a tensor is filled with."""
        op = value.owner if isinstance(value, SSAValue) else None
        place = (
            {"full": 1, "scalar_tensor": 0, "full_like": 1}.get(base_name(op)) if isinstance(op, ir.AtenOp) else None
        )
        if isinstance(op, ir.AtenOp) and place is not None:
            value = arguments(op)[place]
        return self.tensors.scalar(value)


def _replace(op: ir.AtenOp, scores: _Scores, block: Block, computed: set[SSAValue]) -> bool:
    """Put `tb.attention` in the place of the product of weights and v; False if the shapes have no counterpart."""
    q, v = scores.q, op.inputs[1]
    new: list[Operation] = []
    k = _transposed(scores.k)
    if k is None:
        rank, shape = len(shape_of(scores.k)), shape_of(scores.k)
        if rank < 2:
            return False
        turned = _typed(scores.k, (*shape[:-2], shape[-1], shape[-2]))
        k = _put(new, aten_op("aten.transpose.int", [scores.k, -2, -1], turned))
    leads = [shape_of(x)[:-2] for x in (q, k, v)]
    if len(leads[0]) != 2 or leads[0][0] != 1 or len(leads[1]) != 2 or leads[1] != leads[2]:
        lead = _broadcast(*leads)
        if lead is None:
            return False
        q, k, v = (_as_heads(new, x, lead) for x in (q, k, v))
    for value in (q, k, v):
        computed.add(value)
    allowed = _combined(new, scores.masks) if scores.masks else None
    made = _attention(q, k, v, scores.scale, "none", allowed)
    if made is None:
        for unused in reversed(new):
            unused.erase()
        return False
    keep_name(made, op)
    new.append(made)
    computed.add(made.results[0])
    result: SSAValue = made.results[0]
    if result.type != op.outs[0].type:
        sizes = [-1 if s == DYNAMIC_INDEX else s for s in shape_of(op.outs[0])]
        result = _put(new, aten_op("aten.reshape.default", [made.results[0], sizes], op.outs[0].type))
        computed.add(result)
    block.insert_ops_before(new, op)
    op.outs[0].replace_all_uses_with(result)
    Rewriter.erase_op(op)
    return True


def _put(new: list[Operation], op: ir.AtenOp) -> SSAValue:
    new.append(op)
    return op.outs[0]


def _typed(value: SSAValue, shape: tuple[int, ...]) -> TensorType[Float32Type]:
    assert isinstance(value.type, TensorType)
    return TensorType(value.type.element_type, shape)


def _broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...] | None:
    rank = max(len(s) for s in shapes)
    padded = [(1,) * (rank - len(s)) + s for s in shapes]
    sizes = [set(column) - {1} for column in zip(*padded, strict=True)]
    if any(len(s) > 1 or DYNAMIC_INDEX in s for s in sizes):
        return None
    return tuple(s.pop() if s else 1 for s in sizes)


def _as_heads(new: list[Operation], value: SSAValue, lead: tuple[int, ...]) -> SSAValue:
    """A value [*lead or less, T, d] as [1, heads, T, d], with as many copies as the product makes of it."""
    shape = shape_of(value)
    if shape[:-2] != lead:
        whole = _typed(value, (*lead, *shape[-2:]))
        value = _put(new, aten_op("aten.expand.default", [value, [*lead, -1, -1]], whole))
    heads = math.prod(lead)
    if lead == (1, heads):
        return value
    type = _typed(value, (1, heads, *shape[-2:]))
    return _put(new, aten_op("aten.reshape.default", [value, [1, heads, -1, shape[-1]]], type))


def _combined(new: list[Operation], masks: list[_Mask]) -> SSAValue:
    """One mask for all: a choice as it is, or the sum of what is added, -inf for scores that do not count."""
    if len(masks) == 1 and masks[0].kind == _ALLOWED:
        return masks[0].value
    if len(masks) == 1 and masks[0].kind == _DENIED:
        value = masks[0].value
        return _put(new, aten_op("aten.logical_not.default", [value], value.type))
    total: SSAValue | None = None
    for mask in masks:
        value = mask.value
        if mask.kind != _ADDED:
            numbers = [0.0, -math.inf] if mask.kind == _ALLOWED else [-math.inf, 0.0]
            type = TensorType(Float32Type(), shape_of(value))
            value = _put(new, aten_op("aten.where.Scalar", [value, *numbers], type))
        elif mask.factor != 1:
            value = _put(new, aten_op("aten.mul.Tensor", [value, mask.factor], value.type))
        if total is None:
            total = value
            continue
        rank = max(len(shape_of(total)), len(shape_of(value)))
        padded = [(1,) * (rank - len(shape_of(v))) + shape_of(v) for v in (total, value)]
        shape = [b if a == 1 else a for a, b in zip(*padded, strict=True)]
        total = _put(new, aten_op("aten.add.Tensor", [total, value], TensorType(Float32Type(), shape)))
    assert total is not None
    return total


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
