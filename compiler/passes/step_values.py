"""The vectors of a step under construction: forms become slices, rotations and rows of tables when they are needed."""

from __future__ import annotations

import numpy as np
import torch
from xdsl.ir import Block, BlockArgument, Operation, SSAValue

from typebar.compiler import ir
from typebar.compiler.aten import Evaluator, NotEvaluable, aten_op, shape_of
from typebar.compiler.passes.forms import Form, Refused, sequence_axis, shape_text, tensor_shape, token_shape
from typebar.compiler.passes.rotary import Columns, rotation
from typebar.compiler.passes.tensors import Tensors
from typebar.compiler.problems import keep_name


class StepValues:
    """Appends operations to a step's block; `origin` is the graph's operation they stand for."""

    def __init__(self, block: Block, context: int, tensors: Tensors) -> None:
        """Append to `block`; positions run to `context`."""
        self.block, self.context, self.tensors = block, context, tensors
        self.origin: Operation | None = None
        self._columns = Columns()
        self._vectors: dict[object, SSAValue] = {}
        self._evaluator = Evaluator(context, tensors.lookup)
        self._evaluated: dict[SSAValue, np.ndarray] = {}
        self._factors: dict[SSAValue, tuple[np.ndarray, np.ndarray]] = {}

    def add(self, op: Operation) -> SSAValue:
        """Append an operation; returns its one result."""
        if self.origin is not None:
            keep_name(op, self.origin)
        self.block.add_op(op)
        return op.results[0]

    def vector(self, form: Form) -> SSAValue:
        """The form as a vector, its elements in row-major order; raises Refused if no operation makes it."""
        arrays = (form.element, form.sign, form.column)
        key = (form.base, form.element.shape[-1:], *(a.tobytes() for a in arrays))
        if key not in self._vectors:
            if isinstance(form.base, BlockArgument) and form.base in self.block.args[:2]:
                raise Refused("it computes with token ids or positions themselves", "look them up in a table")
            self._vectors[key] = self._plain(form) if form.plain else self._positional(form)
        return self._vectors[key]

    def _plain(self, form: Form) -> SSAValue:
        x = self._slice(form.base, form.element.reshape(-1), form)
        return x if form.sign.reshape(-1)[0] > 0 else self.add(ir.ScaleOp(x, -1.0))

    def _slice(self, base: SSAValue, element: np.ndarray, form: Form) -> SSAValue:
        size, start = len(element), int(element[0])
        if size == ir.width(base) and (element == np.arange(size)).all():
            return base
        breaks = np.flatnonzero(np.diff(element) != 1)
        if not len(breaks):
            return self.add(ir.SliceOp(base, start, size))
        run = int(breaks[0]) + 1
        stride = int(element[run]) - start
        places = np.arange(size)
        if size % run or stride < run or (element != start + places // run * stride + places % run).any():
            shape = shape_text(form.element.shape[1:])
            raise Refused(
                f"it reorders each token's values, of shape {shape}",
                "store the weights in the order needed",
                form.moved,
            )
        return self.add(ir.SliceOp(base, start, size, run, stride))

    def _positional(self, form: Form) -> SSAValue:
        """Elements times factors by position: a rotation, or one factor for each element."""
        if len(form.element) == 1:
            row = self._columns.table(form.column.reshape(-1), form.sign.reshape(-1))
            x = self._slice(form.base, form.element.reshape(-1), form)
            return self.add(ir.MulOp(x, self._row(row)))
        size = form.element.shape[-1]
        whole = form.take(np.arange(form.element[0].size).reshape(-1, size))
        turn = rotation(whole)
        names = [
            self.tensors.table(f"rotary:{what}", self._columns.table(*columns))
            for what, columns in (("cos", turn.cos), ("sin", turn.sin))
        ]
        x = self.vector(turn.own)
        heads = whole.element.shape[1]
        return self.add(ir.RotaryOp(x, self.block.args[1], heads, size, turn.rotary_dim, turn.pairing, *names))

    def _row(self, table: np.ndarray) -> SSAValue:
        name = self.tensors.table("positions", table)
        return self.add(ir.EmbeddingOp(self.block.args[1], name, ir.vector(table.shape[1])))

    def constant(self, value: SSAValue, result: SSAValue, operation: str) -> SSAValue:
        """A constant, repeated as the result's shape needs it, as the operand of an addition or a multiplication.

        For `operation` sub it is its negative, for div its reciprocal.
        """
        size = token_shape(result)
        axis, rank = sequence_axis(result), len(tensor_shape(result))
        given = shape_of(value)
        aligned = (1,) * (rank - len(given)) + given
        if len(aligned) != rank or aligned[axis] != 1:
            raise Refused("it adds or multiplies by numbers that differ by position", "look them up by position")
        change = {"sub": "aten.neg.default", "div": "aten.reciprocal.default"}.get(operation)
        operand = value if change is None else aten_op(change, [value]).outs[0]
        if np.prod(given, dtype=int) != np.prod(size, dtype=int):
            flat = [s for i, s in enumerate(aligned) if i != axis]
            operand = aten_op("aten.reshape.default", [operand, flat]).outs[0]
            operand = aten_op("aten.expand.default", [operand, list(size)]).outs[0]
        vector = ir.vector(int(np.prod(size, dtype=int)))
        if shape_of(operand) != vector.get_shape():
            operand = aten_op("aten.reshape.default", [operand, [-1]]).outs[0]
        return self.add(ir.ParameterOp(self.tensors.name(operand), vector))

    def columns_of(self, value: SSAValue, result: SSAValue) -> tuple[np.ndarray, np.ndarray]:
        """A value by position as columns and signs of one token's sizes of `result`."""
        if value not in self._factors:
            self._factors[value] = self._columns.add(self._by_position(value))
        columns, signs = (_spread(a, value, result) for a in self._factors[value])
        return columns, signs

    def row_of(self, value: SSAValue, result: SSAValue) -> SSAValue:
        """A value by position as a row of a table, repeated as `result`'s shape needs it."""
        rows = self._by_position(value)
        places = _spread(np.arange(rows[0].size).reshape(rows.shape[1:]), value, result)
        return self._row(rows.reshape(len(rows), -1)[:, places.reshape(-1)])

    def _by_position(self, value: SSAValue) -> np.ndarray:
        """The value at every position up to the context: [context, *sizes of one token]."""
        if value not in self._evaluated:
            try:
                made = self._evaluator(value)
            except NotEvaluable as error:
                raise Refused(f"its numbers by position cannot be worked out: {error}") from error
            assert isinstance(made, torch.Tensor)
            rows = made.movedim(sequence_axis(value), 0)
            if len(rows) != self.context or not rows.is_floating_point():
                raise Refused("its numbers by position are not one for each position")
            self._check_prefix(value, rows)
            self._evaluated[value] = rows.float().numpy()
        return self._evaluated[value]

    def _check_prefix(self, value: SSAValue, rows: torch.Tensor) -> None:
        """The numbers of a position must not depend on how many tokens there are."""
        for tokens in {1, 2, 3, self.context // 2} & set(range(1, self.context)):
            made = Evaluator(tokens, self.tensors.lookup)(value)
            assert isinstance(made, torch.Tensor)
            if not torch.equal(made.movedim(sequence_axis(value), 0), rows[:tokens]):
                raise Refused(
                    f"its numbers by position are others at {tokens} tokens than at {self.context}",
                    "let them depend on the position alone",
                )


def _spread(array: np.ndarray, value: SSAValue, result: SSAValue) -> np.ndarray:
    """An array over one token's sizes of `value`, broadcast to those of `result`."""
    axis, shape = sequence_axis(value), tensor_shape(value)
    wanted, target = sequence_axis(result), token_shape(result)
    if axis - len(shape) != wanted - len(tensor_shape(result)):
        raise Refused("its operands have their tokens on different axes", "align the axes of tokens")
    aligned = np.expand_dims(array, axis)
    whole = (*target[:wanted], 1, *target[wanted:])
    try:
        return np.broadcast_to(aligned, whole).squeeze(wanted)
    except ValueError as error:
        raise Refused(f"its shape {shape_text(shape)} does not fit {shape_text(tensor_shape(result))}") from error
