"""Norms written out are known by what they compute: a chain is run on random vectors and compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn import functional
from xdsl.dialects.builtin import TensorType
from xdsl.ir import Block, Operation, OpResult, SSAValue

from typebar.compiler import ir
from typebar.compiler.aten import Evaluator, NotEvaluable, arguments, base_name, keywords, words
from typebar.compiler.passes.canonicalise import erase_unused
from typebar.compiler.problems import keep_name

_STATISTICS = words("mean sum var")
_CHAIN = _STATISTICS | words("add clamp clamp_min div mul pow reciprocal rsqrt rsub sqrt square sub")
_TOLERANCE = 1e-9  # in float64: the order of summation differs, and nothing else
_ROWS = 6

Norm = Callable[[torch.Tensor, float], torch.Tensor]


def _rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    return functional.rms_norm(x, x.shape[-1:], eps=eps)


def _layer(x: torch.Tensor, eps: float) -> torch.Tensor:
    return functional.layer_norm(x, x.shape[-1:], eps=eps)


def recognise_norms(block: Block, computed: set[SSAValue]) -> None:
    """Replace chains that compute a norm over the last axis, without weight and bias, by `tb.rms_norm` or
    `tb.layer_norm`; `computed` are the model's float values, and new results join it."""
    roots = _roots(block, computed)
    for op in reversed(list(block.ops)):
        if not isinstance(op, ir.AtenOp) or len(op.outs) != 1 or not op.outs[0].uses:
            continue
        out = op.outs[0]
        tried = (_norm(out, root) for root in roots.get(out, ()) if root.type == out.type)
        new = next((norm for norm in tried if norm is not None), None)
        if new is None:
            continue
        keep_name(new, op)
        block.insert_op_before(new, op)
        out.replace_all_uses_with(new.results[0])
        computed.add(new.results[0])
        erase_unused(block)


def _roots(block: Block, computed: set[SSAValue]) -> dict[SSAValue, list[SSAValue]]:
    """For every value of a chain with a sum over the last axis, the values that it is a function of, nearest first."""
    of: dict[SSAValue, dict[SSAValue, bool]] = {}  # value: whether a sum lies between
    for op in block.ops:
        if not isinstance(op, ir.AtenOp) or base_name(op) not in _CHAIN or len(op.outs) != 1:
            continue
        inputs = [v for v in op.inputs if v in computed]
        fixed = all(v in computed or _single(v) for v in op.inputs)
        if op.outs[0] not in computed or not fixed or (_sums(op) and not _over_last_axis(op)):
            continue
        known = [{v: False} | of.get(v, {}) for v in inputs]
        shared = [v for v in known[0] if all(v in k for k in known)] if known else []
        of[op.outs[0]] = {v: _sums(op) or any(k[v] for k in known) for v in shared}
    return {value: [v for v, summed in roots.items() if summed] for value, roots in of.items()}


def _single(value: SSAValue) -> bool:
    return isinstance(value.type, TensorType) and all(s == 1 for s in value.type.get_shape())


def _sums(op: ir.AtenOp) -> bool:
    return base_name(op) in _STATISTICS


def _over_last_axis(op: ir.AtenOp) -> bool:
    type = op.inputs[0].type
    assert isinstance(type, TensorType)
    args, options = arguments(op), keywords(op)
    axes = options.get("dim", args[1] if len(args) > 1 else None)
    kept = options.get("keepdim", args[2] if len(args) > 2 and base_name(op) != "var" else False)
    result = op.outs[0].type
    assert isinstance(result, TensorType)
    same_rank = result.get_num_dims() == type.get_num_dims()
    return axes in ([-1], [type.get_num_dims() - 1]) and (bool(kept) or same_rank)


def _chain(value: SSAValue, root: SSAValue) -> Iterator[Operation]:
    stack, seen = [value], set[SSAValue]()
    while stack:
        top = stack.pop()
        if top is root or top in seen or not isinstance(top, OpResult):
            continue
        seen.add(top)
        yield top.op
        stack.extend(top.op.operands)


def _norm(value: SSAValue, root: SSAValue) -> Operation | None:
    """The norm that the value is of the root; its eps is one of the numbers in the chain."""
    assert isinstance(root.type, TensorType)
    shape = root.type.get_shape()
    if shape[-1] <= 1:
        return None
    generator = torch.Generator().manual_seed(1)
    scale = torch.logspace(-3, 1, _ROWS, dtype=torch.float64)[:, None]
    x = (torch.randn(_ROWS, shape[-1], generator=generator, dtype=torch.float64) + 0.5) * scale
    try:
        made = Evaluator(_ROWS, given={root: x.reshape(*[1] * (len(shape) - 2), *x.shape)})(value)
    except NotEvaluable:
        return None
    if not isinstance(made, torch.Tensor) or made.numel() != x.numel():
        return None
    numbers = {float(a) for op in _chain(value, root) if isinstance(op, ir.AtenOp) for a in _numbers(op)}
    for eps in sorted(n for n in numbers if 0 <= n < 1):
        if _close(made.reshape(x.shape), _rms(x, eps)):
            return ir.RmsNormOp(root, None, eps)
        if _close(made.reshape(x.shape), _layer(x, eps)):
            return ir.LayerNormOp(root, None, None, eps)
    return None


def _numbers(op: ir.AtenOp) -> Iterator[int | float]:
    for argument in arguments(op)[1:]:
        if isinstance(argument, int | float) and not isinstance(argument, bool):
            yield argument


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(torch.allclose(a.double(), b, rtol=_TOLERANCE, atol=_TOLERANCE))
