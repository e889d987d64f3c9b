"""classify-masks: run mask and position sub-graphs on concrete positions, and read off what they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from xdsl.context import Context
from xdsl.dialects.builtin import DYNAMIC_INDEX, ModuleOp, StringAttr, TensorType
from xdsl.ir import SSAValue
from xdsl.passes import ModulePass
from xdsl.rewriter import Rewriter

from typebar.compiler import ir
from typebar.compiler.aten import (
    Evaluator,
    NotEvaluable,
    arguments,
    base_name,
    depends_on_tokens,
    named,
    parameter,
    shape_of,
)
from typebar.compiler.passes.attention import MASKED
from typebar.compiler.passes.canonicalise import erase_unused, merge_equal
from typebar.compiler.passes.tensors import Tensors
from typebar.compiler.problems import LoweringError, Problem, keep_name, node_name

LONGEST = 8192
"""The greatest context whose masks are checked pair by pair: a square of this many int64 differences is 512 MiB."""


class ClassifyMasks(ModulePass):
    """Give every attention its mask's kind and every position look-up its offset, or refuse."""

    name = "classify-masks"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        """Rewrite in place; raises LoweringError naming every mask and position that is no known kind."""
        problems = classify(op, Tensors())
        if problems:
            raise LoweringError(problems)


def classify(module: ModuleOp, tensors: Tensors) -> list[Problem]:
    """Classify in place and return what could not be; `tensors` give the values of what masks are made from."""
    problems: list[Problem] = []
    for graph in module.body.block.ops:
        if isinstance(graph, ir.GraphOp):
            problems += _Classifier(graph, tensors).run()
    return problems


@dataclass(frozen=True)
class _Kind:
    """A mask's kind, or why it is none."""

    name: str = ""
    window: int | None = None
    problem: tuple[str, str] | None = None


class _Classifier:
    def __init__(self, graph: ir.GraphOp, tensors: Tensors) -> None:
        self.graph, self.tensors = graph, tensors
        self.context = graph.context.value.data
        lengths = {1, 2, 3, self.context // 2, self.context}
        self.lengths = sorted(n for n in lengths if 0 < n <= self.context)
        self.evaluators = {n: Evaluator(n, tensors.lookup) for n in self.lengths}
        self.masks: dict[SSAValue, _Kind] = {}
        self.known: dict[SSAValue, bool] = {}
        self.problems: list[Problem] = []

    def run(self) -> list[Problem]:
        block = self.graph.body.block
        for op in list(block.ops):
            if isinstance(op, ir.AttentionOp) and op.allowed is not None:
                self._attention(op)
            elif isinstance(op, ir.AtenOp) and base_name(op) in ("embedding", "slice"):
                self._position_rows(op)
        merge_equal(block)
        erase_unused(block)
        return self.problems

    def _attention(self, op: ir.AttentionOp) -> None:
        assert op.allowed is not None
        if op.allowed not in self.masks:
            self.masks[op.allowed] = self._mask(op.allowed)
        kind = self.masks[op.allowed]
        if kind.problem is not None:
            self.problems.append(Problem(node_name(op), *kind.problem))
            return
        op.properties["mask"] = StringAttr(kind.name)
        if kind.window is not None:
            op.properties["window"] = ir.number(kind.window)
        op.operands = [op.q, op.k, op.v]

    def _mask(self, value: SSAValue) -> _Kind:
        """The one kind that the mask has at every length tried; the last is the whole context."""
        if self.context > LONGEST:
            rule = f"its mask cannot be checked on all pairs of {self.context} positions"
            return _Kind(problem=(rule, f"declare a context of at most {LONGEST}"))
        kind = _Kind()
        for length in reversed(self.lengths):
            try:
                mask = self.evaluators[length](value)
            except NotEvaluable as error:
                return _Kind(problem=(f"its mask cannot be worked out: {error}", "build it from positions alone"))
            assert isinstance(mask, torch.Tensor)
            if kind.name:  # a kind found at the full length must hold at every other
                if not _is_kind(mask, kind, length):
                    rule = f"its mask changes kind with the length: not {kind.name} at {length} tokens"
                    return _Kind(problem=(rule, "let the mask of two positions depend on these alone"))
                continue
            kind = _read_off(mask, length)
            if kind.problem is not None:
                return kind
        return kind

    def _position_rows(self, op: ir.AtenOp) -> None:
        """A row of a table for each position becomes `tb.embedding` of `tb.positions`."""
        name, rows = parameter(op.inputs[0]), shape_of(op.inputs[0])
        type = op.outs[0].type
        if name is None or len(rows) != 2 or not isinstance(type, TensorType) or DYNAMIC_INDEX not in type.get_shape():
            return
        if base_name(op) == "slice":
            offset = self._start(op)
        else:
            index = arguments(op)[1]
            if not isinstance(index, SSAValue) or depends_on_tokens(index, self.known):
                return
            offset = self._offset(op, index)
        if offset is None:
            return
        if offset + self.context > rows[0]:
            rule = f"table {name} has {rows[0]} rows, {self.context} positions from {offset} need more"
            self.problems.append(Problem(node_name(op), rule, f"declare a context of {rows[0] - offset}"))
            return
        self._replace(op, name, type, offset)

    def _start(self, op: ir.AtenOp) -> int | None:
        """The first row of a slice of a table that holds one row for each token, whatever their number."""
        args = named(op, "table", "axis", "start", "end", "step")
        start = args.get("start") or 0
        if args.get("axis", 0) not in (0, -2) or not isinstance(start, int) or start < 0 or args.get("step", 1) != 1:
            return None
        for length in self.lengths:
            table = torch.empty(shape_of(op.inputs[0]))
            try:
                rows = Evaluator(length, given={op.inputs[0]: table})(op.outs[0])
            except NotEvaluable:
                return None
            if not isinstance(rows, torch.Tensor) or len(rows) != length:
                return None
        return start

    def _offset(self, op: ir.AtenOp, index: SSAValue) -> int | None:
        """What is added to the positions 0, 1, ... to make `index`, or None after noting the problem."""
        reason, offset = "", 0
        for length, evaluator in self.evaluators.items():
            try:
                rows = evaluator(index)
            except NotEvaluable as error:
                reason = f"its positions cannot be worked out: {error}"
                break
            assert isinstance(rows, torch.Tensor)
            flat = rows.reshape(-1)
            offset = int(flat[0]) if length == self.lengths[0] else offset
            if offset < 0 or not torch.equal(flat, torch.arange(length) + offset):
                reason = f"its rows are not consecutive positions at {length} tokens"
                break
        if not reason:
            return offset
        remedy = "look positions up as arange(T) plus a constant"
        self.problems.append(Problem(node_name(op), reason, remedy))
        return None

    def _replace(self, op: ir.AtenOp, name: str, type: TensorType, offset: int) -> None:
        block = self.graph.body.block
        positions = ir.PositionsOp()
        new = ir.EmbeddingOp(positions.out, name, type, offset)
        keep_name(new, op)
        block.insert_ops_before([positions, new], op)
        op.outs[0].replace_all_uses_with(new.out)
        Rewriter.erase_op(op)


def _allowed(mask: torch.Tensor, length: int) -> torch.Tensor | None:
    """The mask as booleans [length, length], equal for all heads; None if it is none of that."""
    if mask.ndim < 2 or mask.shape[-2:] != (length, length):
        return None
    planes = mask.reshape(-1, length, length)
    if any(not torch.equal(planes[0], plane) for plane in planes[1:]):
        return None
    plane = planes[0]
    if plane.dtype == torch.bool:
        return plane
    allowed = plane == 0
    return allowed if bool((allowed | (plane <= MASKED)).all()) else None


def _expected(kind: str, window: int | None, length: int) -> torch.Tensor:
    full = torch.ones(length, length, dtype=torch.bool)
    if kind == "none":
        return full
    lower = full.tril()
    return lower if window is None else lower.triu(1 - window)


def _is_kind(mask: torch.Tensor, kind: _Kind, length: int) -> bool:
    allowed = _allowed(mask, length)
    return allowed is not None and torch.equal(allowed, _expected(kind.name, kind.window, length))


def _read_off(mask: torch.Tensor, length: int) -> _Kind:
    """The kind of a mask over all pairs of positions; a window as wide as the context is a causal mask."""
    allowed = _allowed(mask, length)
    if allowed is None:
        rule = f"its mask of shape {list(mask.shape)} differs by head or adds a bias to scores"
        return _Kind(problem=(rule, "use one causal or windowed mask of zero and -inf, or booleans, for all heads"))
    for kind, window in (("causal", None), ("window", int(allowed[-1].sum())), ("none", None)):
        if window != 0 and torch.equal(allowed, _expected(kind, window, length)):
            return _Kind(kind, window)
    row, column = (int(n) for n in (allowed != _expected("causal", None, length)).nonzero()[0])
    does = "attends" if allowed[row, column] else "does not attend"
    rule = f"its mask is neither causal nor a sliding window: position {row} {does} to {column}"
    return _Kind(problem=(rule, "use a causal mask or a sliding window"))
