"""Forms: what a graph's value is in a step, element by element, before an operation needs it as a vector.

A form says of each of a token's elements which element of a step's vector it is, by running the operations that only
move elements on numbered ones. Rotary positions need more: an element may be a sum of two signed elements, each perhaps
times a number that depends on the position alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from xdsl.dialects.builtin import DYNAMIC_INDEX, TensorType
from xdsl.ir import SSAValue

from typebar.compiler import ir
from typebar.compiler.aten import Evaluator, NotEvaluable, base_name, words

_KNOWN_OPERATIONS = "embeddings, linear layers, norms, activations, add, mul, slices and scaled_dot_product_attention"
_REWRITE = f"write it with {_KNOWN_OPERATIONS}"
_VIEWS = words("view reshape _unsafe_view unsqueeze squeeze flatten unflatten expand contiguous")
_LENGTHS = (2, 5)
NONE = -1
"""The number of an element or a column that is absent."""


class Refused(Exception):
    """Why an operation cannot be computed token by token, and what to do; `node` if another one is to blame."""

    def __init__(self, reason: str, remedy: str = _REWRITE, node: str | None = None) -> None:
        """Say why, and what to do."""
        super().__init__(reason)
        self.reason, self.remedy, self.node = reason, remedy, node


def tensor_shape(value: SSAValue) -> tuple[int, ...]:
    """The value's sizes, DYNAMIC_INDEX for the number of tokens; raises Refused for what is no tensor."""
    if not isinstance(value.type, TensorType):
        raise Refused(f"{value.type} is no tensor")
    return value.type.get_shape()


def sequence_axis(value: SSAValue) -> int:
    """The axis of the tokens: the only one without a fixed size; raises Refused if there are none or several."""
    shape = tensor_shape(value)
    if shape.count(DYNAMIC_INDEX) != 1:
        raise Refused(
            f"a value of shape {shape_text(shape)} has no single axis of tokens",
            "keep one axis for the tokens throughout",
        )
    return shape.index(DYNAMIC_INDEX)


def shape_text(shape: Sequence[int]) -> str:
    """A shape as messages write it, T for the number of tokens."""
    return "[" + ", ".join("T" if s == DYNAMIC_INDEX else str(s) for s in shape) + "]"


def token_shape(value: SSAValue) -> tuple[int, ...]:
    """The sizes of what belongs to one token: all axes but the tokens'."""
    axis, shape = sequence_axis(value), tensor_shape(value)
    return shape[:axis] + shape[axis + 1 :]


@dataclass(frozen=True)
class Form:
    """Each element of a token as a sum of terms: sign * base[element] * column.

    The arrays are [terms, *sizes of one token]. A term that is absent has element -1; `column` numbers a factor by
    position, -1 for none. `base` is a vector of the step, or its token or position. `moved` names the operation that
    last changed the elements' order.
    """

    base: SSAValue
    element: np.ndarray
    sign: np.ndarray
    column: np.ndarray
    moved: str | None = None

    @property
    def plain(self) -> bool:
        """Whether every element is one of the base's, or all are one's negatives."""
        return len(self.element) == 1 and bool((self.column == NONE).all()) and len(np.unique(self.sign)) == 1

    def take(self, places: np.ndarray, moved: str | None = None) -> Form:
        """The form whose elements are those at `places` of this one, both counted in row-major order."""
        kept = (a.reshape(len(a), -1)[:, places.reshape(-1)] for a in (self.element, self.sign, self.column))
        element, sign, column = (a.reshape(len(a), *places.shape) for a in kept)
        return Form(self.base, element, sign, column, moved or self.moved)

    def negative(self) -> Form:
        """The form of -x."""
        return replace(self, sign=-self.sign)

    def times(self, column: np.ndarray, sign: np.ndarray) -> Form:
        """The form of x times positional factors, given as columns and signs of one token's sizes."""
        if (self.column != NONE).any():
            raise Refused("it multiplies by two factors that depend on the position", "multiply them first")
        columns = np.where(self.element == NONE, NONE, np.broadcast_to(column, self.element.shape))
        return replace(self, column=columns, sign=self.sign * sign)

    def plus(self, other: Form) -> Form:
        """The form of the sum of two forms of one base."""
        if self.base is not other.base:
            raise Refused("it adds products with positional factors of values computed apart")
        terms = [
            np.concatenate([a, b])
            for a, b in ((self.element, other.element), (self.sign, other.sign), (self.column, other.column))
        ]
        order = np.argsort(terms[0] == NONE, axis=0, kind="stable")  # present terms first
        element, sign, column = (np.take_along_axis(a, order, axis=0) for a in terms)
        if len(element) > 2 and (element[2:] != NONE).any():
            raise Refused("it sums more than two elements for each", "turn pairs of elements only")
        used = 2 if (element[1] != NONE).any() else 1
        return Form(self.base, element[:used], sign[:used], column[:used], other.moved or self.moved)


def identity(base: SSAValue, shape: tuple[int, ...]) -> Form:
    """A value that is the step's vector itself."""
    element = np.arange(int(np.prod(shape, dtype=np.int64))).reshape(1, *shape)
    return Form(base, element, np.ones_like(element), np.full_like(element, NONE))


def join(forms: Sequence[Form]) -> Form:
    """The elements of several forms of one base in a row, as a flat form."""
    bases = {f.base for f in forms}
    if len(bases) > 1:
        raise Refused("it joins values that are computed apart", "compute them as one, by one linear layer")
    terms = max(len(f.element) for f in forms)

    def flat(array: np.ndarray, fill: int) -> np.ndarray:
        rows = array.reshape(len(array), -1)
        return np.concatenate([rows, np.full((terms - len(rows), rows.shape[1]), fill)])

    return Form(
        forms[0].base,
        np.concatenate([flat(f.element, NONE) for f in forms], axis=1),
        np.concatenate([flat(f.sign, 1) for f in forms], axis=1),
        np.concatenate([flat(f.column, NONE) for f in forms], axis=1),
        next((f.moved for f in forms if f.moved), None),
    )


def trace(op: ir.AtenOp, sources: Sequence[SSAValue]) -> list[np.ndarray]:
    """Where each result's elements of one token come from, as places in the sources' elements laid in a row.

    Runs the operation for two numbers of tokens; raises Refused if tokens are mixed or some are left out.
    """
    first, second = (_run(op, sources, tokens) for tokens in _LENGTHS)
    for a, b in zip(first, second, strict=True):
        if a.shape != b.shape or not np.array_equal(a, b):
            raise Refused("it moves elements by the number of tokens")
    return first


def _run(op: ir.AtenOp, sources: Sequence[SSAValue], tokens: int) -> list[np.ndarray]:
    sizes = [int(np.prod(token_shape(v), dtype=np.int64)) for v in sources]
    total, begin = sum(sizes), 0
    given: dict[SSAValue, object] = {}
    for value, size in zip(sources, sizes, strict=True):
        numbers = torch.arange(tokens)[:, None] * total + torch.arange(begin, begin + size)
        shaped = numbers.reshape(tokens, *token_shape(value))
        given[value] = shaped.movedim(0, sequence_axis(value))
        begin += size
    for result in op.outs:
        if DYNAMIC_INDEX not in tensor_shape(result):
            raise Refused("it takes some of the positions", "compute every position; return logits for all of them")
    evaluator = Evaluator(tokens, given=given, source=tokens)
    places = []
    for result in op.outs:
        axis = sequence_axis(result)
        try:
            moved = evaluator(result)
        except NotEvaluable as error:
            raise Refused(f"{op.target.data} cannot be followed: {error}") from error
        assert isinstance(moved, torch.Tensor)
        if moved.shape[axis] != tokens:
            raise Refused("it takes some of the positions", "compute every position; return logits for all of them")
        rows = moved.movedim(axis, 0).numpy()
        expected = np.arange(tokens).reshape(-1, *[1] * (rows.ndim - 1))
        if (rows // total != expected).any() or (rows % total != rows[:1] % total).any():
            raise Refused(_mixing(op), "transpose the axis of tokens to its place first")
        places.append(rows[0] % total)
    return places


def _mixing(op: ir.AtenOp) -> str:
    if base_name(op) in _VIEWS:
        before, after = (shape_text(tensor_shape(v)) for v in (op.inputs[0], op.outs[0]))
        return f"viewing {before} as {after} mixes tokens"
    return "it mixes tokens"
