"""What passes know of the model's tensors: values of constants, and names for tensors derived from parameters."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from xdsl.dialects.builtin import DYNAMIC_INDEX, TensorType
from xdsl.ir import OpResult, SSAValue

from typebar.compiler import ir
from typebar.compiler.aten import (
    Define,
    Evaluator,
    Lookup,
    NotEvaluable,
    arguments,
    base_name,
    keywords,
    parameter,
    shape_of,
)

_LONGEST_NAME = 160


class Tensors:
    """Values and names of tensors; without `lookup` there are no values, without `define` names stand for nothing.

    A derived tensor's name is the expression that makes it, so that it numbers its layer as its sources do; a table
    worked out by a pass is named after its contents' first use, so that equal tables are one.
    """

    def __init__(self, lookup: Lookup | None = None, define: Define | None = None) -> None:
        """Remember where values come from and where definitions go."""
        self.lookup = lookup
        self._define = define
        self._tables: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._count: dict[str, int] = {}
        self._constant: dict[SSAValue, bool] = {}
        self._scalars: dict[SSAValue, float | None] = {}

    def constant(self, value: object) -> bool:
        """Whether a value is worked out from parameters and numbers alone, whatever the tokens and their number."""
        if not isinstance(value, SSAValue):
            return False
        stack = [value]
        while stack:
            top = stack[-1]
            if top in self._constant:
                stack.pop()
                continue
            if not isinstance(top, OpResult) or not isinstance(top.op, ir.ParameterOp | ir.AtenOp):
                self._constant[top] = False
                continue
            waiting = [v for v in top.op.operands if v not in self._constant]
            stack.extend(waiting)
            if not waiting:
                fixed = isinstance(top.type, TensorType) and DYNAMIC_INDEX not in top.type.get_shape()
                self._constant[top] = fixed and all(self._constant[v] for v in top.op.operands)
        return self._constant[value]

    def scalar(self, value: object) -> float | None:
        """The number that a constant of one element has; None if it is no such constant or has no value at hand."""
        if isinstance(value, bool | int | float):
            return float(value)
        if not isinstance(value, SSAValue) or not self.constant(value) or np.prod(shape_of(value), dtype=int) != 1:
            return None
        if value not in self._scalars:
            try:
                found = Evaluator(1, self.lookup)(value)
            except NotEvaluable:
                found = None
            self._scalars[value] = float(found) if isinstance(found, torch.Tensor) else None
        return self._scalars[value]

    def name(self, value: SSAValue) -> str:
        """The name of a constant: its parameter's, or that of a derived tensor, which is defined."""
        known = parameter(value)
        if known is not None:
            return known
        copied = _copy(value)
        lookup = self.lookup

        def make() -> np.ndarray:
            made = Evaluator(1, lookup)(copied)
            assert isinstance(made, torch.Tensor)
            values: np.ndarray = made.float().numpy()
            return values

        name = _expression(value)
        self._defined(name, shape_of(value), make)
        return name

    def table(self, stem: str, values: np.ndarray) -> str:
        """The name of a table of float32 values: `stem` with a number unless the stem's first; equal ones are one."""
        values = np.ascontiguousarray(values, dtype=np.float32)
        key = (stem, values.shape, hashlib.sha256(values.tobytes()).digest())
        if key not in self._tables:
            number = self._count.get(stem, 0)
            self._count[stem] = number + 1
            self._tables[key] = f"{stem}.{number}" if number else stem
            self._defined(self._tables[key], values.shape, lambda: values)
        return self._tables[key]

    def _defined(self, name: str, shape: Sequence[int], make: Callable[[], np.ndarray]) -> None:
        if self._define is not None:
            self._define(name, shape, make)


def _copy(value: SSAValue) -> SSAValue:
    """The operations that make a constant, apart from the graph, which passes erase."""
    assert isinstance(value, OpResult)
    order, seen, stack = [], set(), [(value.op, False)]
    while stack:
        op, ready = stack.pop()
        if ready:
            order.append(op)
        elif op not in seen:
            seen.add(op)
            stack.append((op, True))
            stack.extend((v.op, False) for v in op.operands if isinstance(v, OpResult))
    mapping: dict[SSAValue, SSAValue] = {}
    for op in order:
        op.clone(mapping)
    return mapping[value]


def _expression(value: SSAValue) -> str:
    """How a constant is made, in words; if these are many, its sources and a digest of how they are put together."""
    text = _written(value, lambda name: name)
    if len(text) <= _LONGEST_NAME:
        return text
    sources: dict[str, str] = {}
    how = _written(value, lambda name: sources.setdefault(name, f"%{len(sources)}"))
    digest = hashlib.sha256(how.encode()).hexdigest()[:16].translate(str.maketrans("0123456789", "ghijklmnop"))
    return f"{digest}({','.join(sources)})"


def _written(value: SSAValue, spell: Callable[[str], str]) -> str:
    name = parameter(value)
    if name is not None:
        return spell(name)
    assert isinstance(value, OpResult) and isinstance(value.op, ir.AtenOp)

    def word(argument: object) -> str:
        if isinstance(argument, SSAValue):
            return _written(argument, spell)
        if isinstance(argument, list):
            return "[" + ",".join(map(word, argument)) + "]"
        return str(argument)

    op = value.op
    words = [word(a) for a in arguments(op)] + [f"{k}={word(v)}" for k, v in keywords(op).items()]
    which = f"[{value.index}]" if len(op.outs) > 1 else ""
    return f"{base_name(op)}({','.join(words)}){which}"
