"""classify-masks: run mask and position sub-graphs on concrete positions, and read off what they are."""

from __future__ import annotations

import torch
from xdsl.context import Context
from xdsl.dialects.builtin import DYNAMIC_INDEX, Float32Type, ModuleOp, StringAttr, TensorType
from xdsl.ir import OpResult, SSAValue
from xdsl.passes import ModulePass
from xdsl.rewriter import Rewriter

from typebar.compiler import ir
from typebar.compiler.aten import (
    Evaluator,
    NotEvaluable,
    arguments,
    base_name,
    depends_on_tokens,
    from_source,
    named,
    parameter,
    shape_of,
)
from typebar.compiler.passes.attention import MASKED
from typebar.compiler.passes.canonicalise import erase_unused, merge_equal
from typebar.compiler.passes.mask_bands import classify_bands
from typebar.compiler.passes.masks import ScoreMask, Unclassified, added, classify_scores
from typebar.compiler.passes.tensors import Tensors
from typebar.compiler.problems import LoweringError, Problem, keep_name, node_name

LONGEST = 8192
"""The greatest context whose masks are held whole: a square of this many int64 differences is 512 MiB."""


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


class _Classifier:
    def __init__(self, graph: ir.GraphOp, tensors: Tensors) -> None:
        self.graph, self.tensors = graph, tensors
        self.context = graph.context.value.data
        lengths = {1, 2, 3, min(self.context // 2, LONGEST // 2), self.context}
        self.lengths = sorted(n for n in lengths if 0 < n <= self.context)
        self.evaluators = {n: Evaluator(n, tensors.lookup) for n in self.lengths}
        self.masks: dict[tuple[SSAValue, bool, int], ScoreMask | Unclassified] = {}
        self.sources: dict[SSAValue, bool | None] = {}
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
        crossing = bool(from_source(op.k, self.sources)) and not from_source(op.q, self.sources)
        key = (op.allowed, crossing, op.heads.value.data)
        if key not in self.masks:
            try:
                self.masks[key] = self._crossing(*key) if crossing else self._mask(*key)
            except Unclassified as refusal:
                self.masks[key] = refusal
        kind = self.masks[key]
        if isinstance(kind, Unclassified):
            self.problems.append(Problem(node_name(op), kind.reason, kind.remedy))
            return
        op.properties["mask"] = StringAttr(kind.mask)
        if kind.window is not None:
            op.properties["window"] = ir.number(kind.window)
        if kind.bias is not None and kind.bias_kind is not None:
            name = self.tensors.table(_stem(op.allowed, kind.bias_kind), kind.bias)
            op.properties["bias"], op.properties["bias_kind"] = ir.symbol(name), StringAttr(kind.bias_kind)
        op.operands = [op.q, op.k, op.v]

    def _mask(self, value: SSAValue, crossing: bool, heads: int) -> ScoreMask:
        """What the mask is over all pairs up to the context, once it is the same at every shorter length tried."""
        if self.context > LONGEST:
            return self._long_mask(value, heads)
        whole = self._planes(value, heads, self.context)
        kind = classify_scores(whole, self.graph.encoder)
        for length in reversed(self.lengths[:-1]):
            planes = self._planes(value, heads, length)
            part = whole[:, :length, :length]
            equal = planes.shape == part.shape and torch.equal(planes <= MASKED, part <= MASKED)
            if not equal or not torch.equal(planes.clamp(min=MASKED), part.clamp(min=MASKED)):
                raise _changes(kind.mask if kind.bias is None else "the same", length)
        return kind

    def _long_mask(self, value: SSAValue, heads: int) -> ScoreMask:
        """The same for a mask that is too large to be held: it must be a mask alone, without a bias."""
        kind = classify_bands(self.evaluators[self.context], value, LONGEST, self.graph.encoder)
        for length in self.lengths[:-1]:
            planes = self._planes(value, heads, length).clamp(min=MASKED)
            if not torch.equal(planes, added(kind, length).expand_as(planes)):
                raise _changes(kind.mask, length)
        return kind

    def _crossing(self, value: SSAValue, crossing: bool, heads: int) -> ScoreMask:
        """A mask between a text and its source must let everything be seen."""
        for length, source in ((1, 2), (3, 2), (self.lengths[-1], 5)):
            planes = self._planes(value, heads, length, source)
            if bool(planes.ne(0).any()):
                raise Unclassified(
                    "its mask hides positions of the source text, or adds a bias to them",
                    "let every token see all of the source text",
                )
        return ScoreMask("none")

    def _planes(self, value: SSAValue, heads: int, length: int, source: int | None = None) -> torch.Tensor:
        """What is added to scores, float32 [1 or heads, length, source]; -inf where a choice leaves scores out.

        Without a `source` the scores are between the text's own positions.
        """
        evaluator = self.evaluators.get(length) if source is None else None
        evaluator = evaluator or Evaluator(length, self.tensors.lookup, source=source)
        source = length if source is None else source
        if length * source > LONGEST**2:
            rule = f"its mask cannot be checked on all pairs of {length} positions"
            raise Unclassified(rule, f"declare a context of at most {LONGEST}")
        try:
            mask = evaluator(value)
        except NotEvaluable as error:
            reason = f"its mask cannot be worked out: {error}"
            raise Unclassified(reason, "build it from positions alone") from error
        assert isinstance(mask, torch.Tensor)
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape).masked_fill_(~mask, float("-inf"))
        planes = mask.float()
        try:
            planes = planes.expand(*planes.shape[:-2], length, source).reshape(-1, length, source)
        except RuntimeError:
            planes = planes.reshape(-1, 1, 1)
        if len(planes) not in (1, heads) or planes.shape[1:] != (length, source):
            raise Unclassified(
                f"its mask of shape {list(mask.shape)} is none of {length} by {source} positions for {heads} heads",
                "give every head, or all of them, a mask over all pairs of positions",
            )
        return planes

    def _position_rows(self, op: ir.AtenOp) -> None:
        """A row of a table for each position becomes `tb.embedding` of `tb.positions`."""
        name, rows = parameter(op.inputs[0]), shape_of(op.inputs[0])
        type = op.outs[0].type
        if name is None or len(rows) != 2 or not isinstance(type, TensorType):
            return
        if type.get_shape().count(DYNAMIC_INDEX) != 1:  # a table of pairs of positions is a bias of scores
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


def _changes(what: str, length: int) -> Unclassified:
    rule = f"its mask changes kind with the length: not {what} at {length} tokens"
    return Unclassified(rule, "let the mask of two positions depend on these alone")


def _stem(value: SSAValue, kind: str) -> str:
    """How a bias is named: after the parameter it is made from, if there is one, and its kind."""
    stack, seen = [value], set[SSAValue]()
    while stack:
        top = stack.pop()
        if top in seen or not isinstance(top, OpResult):
            continue
        seen.add(top)
        matrix = isinstance(top.type, TensorType) and top.type.get_num_dims() > 1
        if isinstance(top.op, ir.ParameterOp) and matrix and isinstance(top.op.out.type.element_type, Float32Type):
            return f"{ir.text(top.op.source)}:{kind}"
        stack.extend(top.op.operands)
    return f"bias:{kind}"
