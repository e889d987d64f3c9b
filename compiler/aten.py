"""Imported torch operations: their arguments as attributes, and a small interpreter that runs them on concrete values.

The interpreter serves to classify: a mask, a position sub-graph or a chain of element-wise operations is run, and
what it computes is compared with what is known, so the many ways to write one thing need no patterns.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from xdsl.dialects.builtin import (
    DYNAMIC_INDEX,
    ArrayAttr,
    BFloat16Type,
    Float16Type,
    Float32Type,
    Float64Type,
    FloatAttr,
    IntegerAttr,
    IntegerType,
    Signedness,
    StringAttr,
    TensorType,
    UnitAttr,
    f64,
    i64,
)
from xdsl.ir import Attribute, BlockArgument, Operation, OpResult, SSAValue

from typebar.compiler import ir

Lookup = Callable[[str], np.ndarray]
"""Gives a source parameter's or buffer's values by its name; raises TypebarError if there are none."""

Define = Callable[[str, Sequence[int], Callable[[], np.ndarray]], None]
"""Lets a name stand for a tensor derived from the model's: its shape, and a function that computes it when needed."""


def words(text: str) -> frozenset[str]:
    """The words of a text, as a set."""
    return frozenset(text.split())


DTYPES: Mapping[torch.dtype, Attribute] = {
    torch.bool: IntegerType(1),
    torch.int8: IntegerType(8, Signedness.SIGNED),
    torch.uint8: IntegerType(8),
    torch.int32: IntegerType(32),
    torch.int64: IntegerType(64),
    torch.float16: Float16Type(),
    torch.bfloat16: BFloat16Type(),
    torch.float32: Float32Type(),
    torch.float64: Float64Type(),
}
"""The element types that a graph may hold."""

SIZE_OPERATORS: Mapping[str, Callable[..., object]] = {
    f"sym.{f.__name__}": f
    for f in (operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg)
}
"""Operators on symbolic sizes, by the target that `tb.aten` gives them."""

SHAPE_ONLY = words("full_like ones_like zeros_like empty_like new_ones new_zeros new_full new_empty")
"""Operations that look at their first operand's shape and type, never at its values."""

MOVES = words(
    """cat chunk concat contiguous expand expand_as flatten index_select movedim narrow numpy_T permute repeat
    repeat_interleave reshape select slice split split_with_sizes squeeze stack swapaxes t tile transpose unbind
    unflatten unsqueeze view view_as _unsafe_view"""
)
"""Operations whose results hold elements of their operands, each perhaps more than once, and nothing else."""

_EVALUATED = (
    SHAPE_ONLY
    | MOVES
    | words(
        """abs add alias all amax amin and any arange bitwise_and bitwise_not bitwise_or clamp clamp_max clamp_min
        clone cos cumsum detach diff div embedding eq erf exp fill flip floor floor_divide full gather ge gelu
        gt hardtanh index index_put le lift_fresh_copy log log2 logical_and logical_not logical_or lt masked_fill max
        maximum mean min minimum mul ne neg ones or outer pow reciprocal relu remainder round rsqrt rsub scalar_tensor
        sigmoid sign silu sin softplus sqrt square sub sum tanh to _to_copy tril triu type_as var where zeros __and__
        __or__ __xor__"""
    )
)


_Known = TypeVar("_Known")

_NOTE = re.compile(r"axis (\d+) is (.+)")
SOURCE = "S"
"""How notes on sizes write the number of the source text's positions."""


class NotEvaluable(Exception):
    """A sub-graph cannot be run on concrete positions; the message says which operation is in the way."""


def base_name(op: ir.AtenOp) -> str:
    """The operation's name without namespace and overload: `view` for aten.view.default."""
    parts = op.target.data.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def arguments(op: ir.AtenOp) -> list[object]:
    """The call's arguments; operands as SSA values, dtypes as torch.dtype, lists as lists."""
    return [_decode(a, op) for a in op.args]


def keywords(op: ir.AtenOp) -> dict[str, object]:
    """The call's keyword arguments, decoded like `arguments`."""
    return {k: _decode(a, op) for k, a in op.kwargs.data.items()} if op.kwargs is not None else {}


def aten_op(target: str, args: Sequence[object], type: Attribute | None = None) -> ir.AtenOp:
    """A new `tb.aten` of one result; its type is worked out if it is left out, which needs operands of fixed sizes."""
    inputs: list[SSAValue] = []
    encoded = [_encode(a, inputs) for a in args]
    if type is None:
        types = {attribute: dtype for dtype, attribute in DTYPES.items()}
        concrete = [
            torch.empty(shape_of(a), dtype=types[a.type.element_type], device="meta")
            if isinstance(a, SSAValue) and isinstance(a.type, TensorType)
            else a
            for a in args
        ]
        _, name, overload = target.split(".")
        made = getattr(getattr(torch.ops.aten, name), overload)(*concrete)
        type = TensorType(DTYPES[made.dtype], list(made.shape))
    return ir.AtenOp(target, inputs, encoded, {}, [type])


def _encode(argument: object, inputs: list[SSAValue]) -> Attribute:
    match argument:
        case SSAValue():
            if argument not in inputs:
                inputs.append(argument)
            return ir.operand_reference(inputs.index(argument))
        case list():
            return ArrayAttr([_encode(a, inputs) for a in argument])
        case bool():
            return IntegerAttr.from_bool(argument)
        case int():
            return IntegerAttr(argument, i64)
        case float():
            return FloatAttr(argument, f64)
    return StringAttr(str(argument))


def named(op: ir.AtenOp, *names: str) -> dict[str, object]:
    """All arguments by name: positional ones by `names`, in order."""
    return dict(zip(names, arguments(op), strict=False)) | keywords(op)


def parameter(value: object) -> str | None:
    """The name of the parameter that a value is, if it is one."""
    if isinstance(value, SSAValue) and isinstance(value.owner, ir.ParameterOp):
        return ir.text(value.owner.source)
    return None


def shape_of(value: SSAValue) -> tuple[int, ...]:
    """The value's sizes, DYNAMIC_INDEX for the number of tokens; empty for what is no tensor."""
    return value.type.get_shape() if isinstance(value.type, TensorType) else ()


def sizes_noted(value: SSAValue) -> dict[int, str]:
    """Which axes of a value have a size that is an expression other than the number of tokens."""
    if not isinstance(value, OpResult) or not isinstance(value.op, ir.AtenOp) or value.op.symbolic is None:
        return {}
    parts = value.op.symbolic.data.split("; ") if len(value.op.outs) > 1 else [value.op.symbolic.data]
    part = parts[value.index] if len(parts) == len(value.op.outs) else value.op.symbolic.data
    found = (_NOTE.fullmatch(note) for note in part.split(", "))
    return {int(m[1]): m[2] for m in found if m is not None}


def _is_size(op: Operation) -> bool:
    """Whether an operation takes a size of its operand."""
    return isinstance(op, ir.AtenOp) and op.target.data == "aten.sym_size.int"


def _operands_read(value: OpResult) -> Sequence[SSAValue]:
    """The operands whose elements an operation reads, rather than their sizes alone."""
    op = value.op
    if _is_size(op):
        return []
    return op.operands[1:] if isinstance(op, ir.AtenOp) and base_name(op) in SHAPE_ONLY else op.operands


def _follow(
    value: SSAValue,
    known: dict[SSAValue, _Known],
    inputs: Callable[[OpResult], Sequence[SSAValue]],
    rule: Callable[[SSAValue, Sequence[_Known]], _Known],
) -> _Known:
    """What `rule` makes of a value and of what it makes of its inputs, operands before results; `known` is the memory.

    A value that is no operation's result has no inputs.
    """
    stack = [value]
    while stack:
        top = stack[-1]
        if top in known:
            stack.pop()
            continue
        needed = inputs(top) if isinstance(top, OpResult) else ()
        waiting = [v for v in needed if v not in known]
        stack.extend(waiting)
        if not waiting:
            known[top] = rule(top, [known[v] for v in needed])
    return known[value]


def from_source(value: SSAValue, known: dict[SSAValue, bool | None]) -> bool | None:
    """Whether a value is computed from the memory, and nothing of the tokens; None if from neither."""

    def inputs(result: OpResult) -> Sequence[SSAValue]:
        return [] if _is_size(result.op) else result.op.operands

    def rule(top: SSAValue, read: Sequence[bool | None]) -> bool | None:
        if not isinstance(top, OpResult):
            return isinstance(top, BlockArgument) and top.index > 0
        told = [item for item in read if item is not None]
        return all(told) if told else None

    return _follow(value, known, inputs, rule)


def _decode(attribute: Attribute, op: ir.AtenOp) -> object:
    match attribute:
        case UnitAttr():
            return None
        case FloatAttr():
            return attribute.value.data
        case IntegerAttr(type=IntegerType(width=width)) if width.data == 1:
            return bool(attribute.value.data)
        case IntegerAttr():
            return attribute.value.data
        case ArrayAttr():
            return [_decode(item, op) for item in attribute]
        case StringAttr(data=text) if text.startswith("%"):
            return op.inputs[int(text[1:])]
        case StringAttr(data=text) if text.startswith("torch."):
            dtype = getattr(torch, text.removeprefix("torch."), None)
            if isinstance(dtype, torch.dtype):
                return dtype
        case StringAttr(data=text):
            return text
    raise NotEvaluable(f"{op.target.data} has an argument {attribute} of unknown meaning")


def depends_on_tokens(value: SSAValue, known: dict[SSAValue, bool]) -> bool:
    """Whether the value depends on which tokens were given, and not merely on how many; `known` is the memory."""
    return _follow(value, known, _operands_read, lambda top, read: not isinstance(top, OpResult) or any(read))


class Evaluator:
    """Runs imported operations for a given number of tokens.

    `lookup` supplies parameters and buffers; `given` presets values. Raises NotEvaluable for what it may not or
    cannot run.
    """

    def __init__(
        self,
        tokens: int,
        lookup: Lookup | None = None,
        given: Mapping[SSAValue, object] | None = None,
        source: int | None = None,
    ) -> None:
        """Remember the numbers of tokens and of source positions, where constants come from and the preset values."""
        self.tokens = tokens
        self.source = source
        self._from_source: dict[SSAValue, bool | None] = {}
        self.lookup = lookup
        self._values: dict[SSAValue, object] = dict(given or {})

    def __call__(self, value: SSAValue) -> object:
        """The value: a tensor on the CPU, or an int for a size."""
        stack = [value]
        while stack:
            top = stack[-1]
            if top in self._values:
                stack.pop()
                continue
            if not isinstance(top, OpResult):
                raise NotEvaluable("it depends on the values of the tokens")
            waiting = [v for v in _operands_read(top) if v not in self._values]
            stack.extend(waiting)
            if not waiting:
                self._run(top)
        return self._values[value]

    def _run(self, value: OpResult) -> None:
        op = value.op
        if isinstance(op, ir.ParameterOp):
            name = ir.text(op.source)
            if self.lookup is None:
                raise NotEvaluable(f"it needs the values of {name}, which are not at hand")
            self._values[value] = torch.from_numpy(np.array(self.lookup(name)))
        elif isinstance(op, ir.PositionsOp):
            self._values[value] = torch.arange(self.tokens)
        elif isinstance(op, ir.AtenOp):
            made = self._call(op)
            results = made if isinstance(made, list | tuple) else [made]
            self._values.update(zip(op.outs, results, strict=True))
        elif isinstance(op, ir.EmbeddingOp | ir.AddOp | ir.MulOp | ir.ScaleOp):
            self._values[value] = self._recognised(op)
        else:
            raise NotEvaluable(f"{op.name} is not computed from positions alone")

    def _recognised(self, op: ir.EmbeddingOp | ir.AddOp | ir.MulOp | ir.ScaleOp) -> torch.Tensor:
        first, *others = (self._values[v] for v in op.operands)
        assert isinstance(first, torch.Tensor)
        if isinstance(op, ir.EmbeddingOp):
            name = ir.text(op.weight)
            if self.lookup is None:
                raise NotEvaluable(f"it needs the values of {name}, which are not at hand")
            return torch.from_numpy(np.array(self.lookup(name)))[first + op.offset.value.data]
        if isinstance(op, ir.ScaleOp):
            return first * op.value.value.data
        assert isinstance(others[0], torch.Tensor)
        return first + others[0] if isinstance(op, ir.AddOp) else first * others[0]

    def _call(self, op: ir.AtenOp) -> object:
        target, name = op.target.data, base_name(op)
        if _is_size(op):
            return self._size(op)
        args = [self._concrete(a) for a in arguments(op)]
        kwargs = {k: self._concrete(a) for k, a in keywords(op).items()}
        if target in SIZE_OPERATORS:
            return SIZE_OPERATORS[target](*args)
        if not target.startswith("aten.") or name not in _EVALUATED:
            raise NotEvaluable(f"{target} is not among the operations that are run on concrete positions")
        if name in SHAPE_ONLY:
            args[0] = self._blank(op.inputs[0])
        function = getattr(getattr(torch.ops.aten, name), target.split(".")[2])
        try:
            return function(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise NotEvaluable(f"{target} fails at {self.tokens} tokens: {str(error).splitlines()[0]}") from error

    def _size(self, op: ir.AtenOp) -> int:
        source, axis = op.inputs[0], arguments(op)[1]
        if not isinstance(source.type, TensorType) or not isinstance(axis, int):
            raise NotEvaluable("a size is taken of something that is no tensor")
        return self._length(source, axis % len(source.type.get_shape()))

    def _length(self, value: SSAValue, axis: int) -> int:
        size = shape_of(value)[axis]
        if size != DYNAMIC_INDEX:
            return size
        note = sizes_noted(value).get(axis)
        if note == SOURCE or (note is None and from_source(value, self._from_source)):
            if self.source is None:
                raise NotEvaluable("it depends on the length of the source text")
            return self.source
        if note is None:
            return self.tokens
        made = self(value)
        assert isinstance(made, torch.Tensor)
        return int(made.shape[axis])

    def _blank(self, value: SSAValue) -> torch.Tensor:
        if not isinstance(value.type, TensorType):
            raise NotEvaluable("a shape is taken of something that is no tensor")
        if any(note != SOURCE for note in sizes_noted(value).values()):
            raise NotEvaluable("a shape is taken of a tensor whose size is not the number of tokens")
        shape = [self._length(value, axis) for axis in range(value.type.get_num_dims())]
        dtypes = {attribute: dtype for dtype, attribute in DTYPES.items()}
        return torch.zeros(shape, dtype=dtypes[value.type.element_type])

    def _concrete(self, argument: object) -> object:
        if isinstance(argument, SSAValue):
            return self._values.get(argument)
        if isinstance(argument, list):
            return [self._concrete(a) for a in argument]
        return argument
