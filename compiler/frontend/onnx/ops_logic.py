"""ONNX operators that compare, combine conditions and choose."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from typebar.compiler.frontend.onnx.calls import Call, Result, rule
from typebar.compiler.frontend.onnx.ops_math import (
    Number,
    elementwise,
    is_uniform,
    number_beside,
    on_both,
    rank_of,
    shape_of,
)
from typebar.compiler.frontend.onnx.values import (
    Filled,
    Sizes,
    Value,
    as_items,
    broadcast,
    same_shape,
    sizes,
    uniform,
)

_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "Equal": operator.eq,
    "Greater": operator.gt,
    "GreaterOrEqual": operator.ge,
    "Less": operator.lt,
    "LessOrEqual": operator.le,
}


@rule(*_COMPARISONS)
def compare(call: Call) -> Result:
    """A comparison, element by element."""
    function = _COMPARISONS[call.node.op_type]
    return elementwise(call, function, function)


@rule("And", "Or", "Xor")
def logical(call: Call) -> Result:
    """A logical operation; with a uniform operand it may be the other one."""
    kind = call.node.op_type
    a, b = call.required(0), call.required(1)
    if kind != "Xor":
        for value, other in ((a, b), (b, a)):
            if is_uniform(value, other, kind == "And"):
                return other
    numbers = {"And": lambda x, y: x and y, "Or": lambda x, y: x or y, "Xor": operator.ne}[kind]
    tensors = {"And": torch.logical_and, "Or": torch.logical_or, "Xor": torch.logical_xor}[kind]
    return elementwise(call, numbers, on_both(tensors))


@rule("Where")
def where(call: Call) -> Result:
    """Elements of one value or of another."""
    condition, yes, no = (call.required(i) for i in range(3))
    if (choice := _where_sizes(condition, yes, no)) is not None:
        return choice
    if (of_nan := _without_nan(call)) is not None:
        return of_nan
    decided = uniform(condition)
    if decided is not None:
        taken, index = (yes, 1) if decided.value else (no, 2)
        shape = broadcast(broadcast(decided.shape, shape_of(yes)), shape_of(no))
        same_value = uniform(taken)
        if same_value is not None:
            return Filled(shape, same_value.value, same_value.dtype)
        return taken if same_shape(shape_of(taken), shape) else call.tensor(index).expand(shape)
    rank = max(rank_of(v) for v in (condition, yes, no))
    chosen = call.tensor(0)
    a, b = (_branch(call, i, rank, condition) for i in (1, 2))
    for shape in [v.shape for v in (chosen, a, b) if isinstance(v, torch.Tensor)]:
        chosen = call.reader.trimmed(chosen, shape)
        a, b = (call.reader.trimmed(v, shape) if isinstance(v, torch.Tensor) else v for v in (a, b))
    return torch.where(chosen, a, b)


def _branch(call: Call, index: int, rank: int, condition: Value) -> torch.Tensor | Number:
    number = number_beside(call.required(index), condition)
    return call.operand(index, rank) if number is None else number


def _where_sizes(condition: Value, yes: Value, no: Value) -> Value:
    """A choice between sizes by a condition known now, as exporters write Expand's target."""
    if not isinstance(condition, np.ndarray) or not any(isinstance(v, Sizes) for v in (yes, no)):
        return None
    known = as_items(condition)
    found = [as_items(v if not isinstance(v, Filled) or not v.shape else _listed(v)) for v in (yes, no)]
    if known is None or found[0] is None or found[1] is None:
        return None
    (a, a_scalar), (b, b_scalar) = found[0], found[1]
    count = max(len(known[0]), len(a), len(b))
    columns = [v * count if len(v) == 1 else v for v in (known[0], a, b)]
    if any(len(c) != count for c in columns):
        return None
    chosen = [x if c else y for c, x, y in zip(*columns, strict=True)]
    return sizes(chosen, known[1] and a_scalar and b_scalar)


def _listed(value: Filled) -> np.ndarray | None:
    if len(value.shape) == 1 and isinstance(value.shape[0], int) and value.shape[0] < 64:
        return np.full(value.shape[0], value.value)
    return None


def _without_nan(call: Call) -> Value:
    """x for where(isnan(x), 0, x): exporters write it after a softmax for rows that a mask hides altogether.

    A causal or bidirectional mask hides no row, and one that does is refused when it is classified.
    """
    maker, softmax = call.maker(0), call.maker(2)
    zero = uniform(call.required(1))
    if maker is None or maker.node.op_type != "IsNaN" or zero is None or zero.value != 0:
        return None
    if softmax is None or softmax.node.op_type != "Softmax" or maker.required(0) is not call.required(2):
        return None
    return call.required(2)
