"""make-incremental: from a stateless graph over T tokens to the computation of one token.

The proof: every value's sequence axis is tracked, and every operation allowed here treats the tokens one by one, but
for attention with a classified mask and rows looked up by position. Views and transpositions that keep each token's
elements in order vanish, because a step's values are flat.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from xdsl.context import Context
from xdsl.dialects.builtin import DYNAMIC_INDEX, IndexType, ModuleOp, TensorType
from xdsl.ir import Block, BlockArgument, Operation, Region, SSAValue
from xdsl.passes import ModulePass
from xdsl.rewriter import Rewriter

from typebar.compiler import ir
from typebar.compiler.aten import arguments, base_name, keywords, words
from typebar.compiler.passes.recognise import computed_values
from typebar.compiler.problems import LoweringError, Problem, keep_name, node_name

_VIEWS = words("view reshape _unsafe_view unsqueeze squeeze flatten unflatten expand contiguous")
_PERMUTATIONS = words("permute transpose t")
_PIECES = words("split split_with_sizes chunk slice narrow select unbind")
_KNOWN_OPERATIONS = "embeddings, linear layers, norms, activations, add, mul, slices and scaled_dot_product_attention"
_REWRITE = f"write it with {_KNOWN_OPERATIONS}"


class MakeIncremental(ModulePass):
    """Turn every `tb.graph` into a `tb.step`."""

    name = "make-incremental"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        """Replace in place; raises LoweringError naming every operation that cannot be computed token by token."""
        problems = make_incremental(op)
        if problems:
            raise LoweringError(problems)


def make_incremental(module: ModuleOp) -> list[Problem]:
    """Replace every graph by its step, unless some operation forbids it; returns all of these."""
    problems: list[Problem] = []
    for graph in list(module.body.block.ops):
        if isinstance(graph, ir.GraphOp):
            maker = _StepMaker(graph)
            step = maker.run()
            problems += maker.problems
            if step is not None:
                module.body.block.insert_op_before(step, graph)
                Rewriter.erase_op(graph)
    return problems


class _Refused(Exception):
    """Why an operation cannot be computed token by token, and what to do."""

    def __init__(self, reason: str, remedy: str = _REWRITE) -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy


def _shape(value: SSAValue) -> tuple[int, ...]:
    if not isinstance(value.type, TensorType):
        raise _Refused(f"{value.type} is no tensor")
    return value.type.get_shape()


def _sequence_axis(value: SSAValue) -> int:
    """The axis of the tokens: the only one without a fixed size."""
    shape = _shape(value)
    if shape.count(DYNAMIC_INDEX) != 1:
        raise _Refused(
            f"a value of shape {_text(shape)} has no single axis of tokens", "keep one axis for the tokens throughout"
        )
    return shape.index(DYNAMIC_INDEX)


def _text(shape: Sequence[int]) -> str:
    return "[" + ", ".join("T" if s == DYNAMIC_INDEX else str(s) for s in shape) + "]"


def _per_token(value: SSAValue) -> int:
    """How many elements of the value belong to one token."""
    axis = _sequence_axis(value)
    shape = _shape(value)
    return math.prod(shape[:axis] + shape[axis + 1 :])


def _require_flat(value: SSAValue) -> None:
    """The last axis must be all that belongs to a token."""
    if _shape(value)[-1] != _per_token(value):
        raise _Refused(f"it works on part of each token's values, of shape {_text(_shape(value))}")


@dataclass
class _StepMaker:
    """Builds the step of one graph; `problems` gathers what stands in the way."""

    graph: ir.GraphOp
    problems: list[Problem] = field(default_factory=list)
    block: Block = field(default_factory=lambda: Block(arg_types=[IndexType(), IndexType()]))
    made: dict[SSAValue, SSAValue] = field(default_factory=dict)
    failed: set[SSAValue] = field(default_factory=set)

    def run(self) -> ir.StepOp | None:
        token, position = self.block.args
        token.name_hint, position.name_hint = "token", "position"
        source = self.graph.body.block
        computed = computed_values(source)
        self.made[source.args[0]] = token
        for op in source.ops:
            if isinstance(op, ir.PositionsOp):
                self.made[op.out] = position
            elif isinstance(op, ir.ReturnOp):
                self._finish(op)
            elif any(r in computed for r in op.results) or _views_tokens(op, self.made):
                self._translate(op)
        if self.problems:
            return None
        logits = self.block.last_op
        assert isinstance(logits, ir.ReturnOp)
        vocab = ir.width(logits.values[0])
        return ir.StepOp(vocab, self.graph.context.value.data, Region([self.block]))

    def _finish(self, op: ir.ReturnOp) -> None:
        results = list(op.values)
        if len(results) == 1 and results[0] in self.failed:
            return
        try:
            if len(results) != 1 or results[0] not in self.made:
                raise _Refused("the graph must return logits, and nothing else", "return logits [1, T, V]")
            if len(_shape(results[0])) != 3 or _sequence_axis(results[0]) != 1:
                raise _Refused(f"the result has shape {_text(_shape(results[0]))}", "return logits [1, T, V]")
        except _Refused as refusal:
            self.problems.append(Problem("the result", refusal.reason, refusal.remedy))
            return
        self.block.add_op(ir.ReturnOp(self.made[results[0]]))

    def _translate(self, op: Operation) -> None:
        """Give every result its value in the step; a result of a refused operation is not refused again later."""
        try:
            rule = self._rule(op)
            if any(v in self.failed for v in op.operands):
                self.failed.update(op.results)
                return
            self._check_symbolic(op)
            values = rule(op)
        except _Refused as refusal:
            self.problems.append(Problem(node_name(op), refusal.reason, refusal.remedy))
            self.failed.update(op.results)
            return
        for result, value in zip(op.results, values, strict=True):
            self.made[result] = value

    def _check_symbolic(self, op: Operation) -> None:
        if isinstance(op, ir.AtenOp) and op.symbolic is not None:
            raise _Refused(f"it changes the number of tokens: {op.symbolic.data}", "keep the axis of tokens as it is")

    def _rule(self, op: Operation) -> Callable[[Operation], list[SSAValue]]:
        if isinstance(op, ir.AtenOp):
            name = base_name(op)
            if name in _VIEWS:
                return self._view
            if name in _PERMUTATIONS:
                return self._permute
            if name in _PIECES:
                return self._pieces
            raise _Refused(_reason_unknown(op))
        if isinstance(op, ir.EmbeddingOp):
            return self._embedding
        if isinstance(op, ir.AttentionOp):
            return self._attention
        return self._by_token

    def _step_value(self, value: SSAValue) -> SSAValue:
        if value not in self.made:
            raise _Refused("it uses a value that is neither computed from tokens nor a parameter")
        return self.made[value]

    def _add(self, op: Operation, old: Operation) -> list[SSAValue]:
        keep_name(op, old)
        self.block.add_op(op)
        return list(op.results)

    def _by_token(self, op: Operation) -> list[SSAValue]:
        """The operations on the last axis or element by element: rebuild them on flat vectors."""
        axes = {_sequence_axis(v) - len(_shape(v)) for v in (*op.operands, *op.results)}
        if len(axes) != 1:
            raise _Refused("its operands have their tokens on different axes", "align the axes of tokens")
        if not isinstance(op, ir.AddOp | ir.MulOp | ir.ScaleOp | ir.ActivationOp):
            _require_flat(op.operands[0])
        operands = [self._step_value(v) for v in op.operands]
        types = [ir.vector(_per_token(r)) for r in op.results]
        new = op.create(operands=operands, result_types=types, properties=dict(op.properties))
        return self._add(new, op)

    def _embedding(self, op: Operation) -> list[SSAValue]:
        assert isinstance(op, ir.EmbeddingOp)
        index = self._step_value(op.index)
        if not isinstance(index, BlockArgument):
            raise _Refused("its index is computed, not a token or a position")
        if _sequence_axis(op.out) - len(_shape(op.out)) + 1 != _sequence_axis(op.index) - len(_shape(op.index)):
            raise _Refused("its index has no single axis of tokens")
        _require_flat(op.out)
        weight = ir.text(op.weight)
        new = ir.EmbeddingOp(index, weight, ir.vector(ir.width(op.out)), op.offset.value.data)
        return self._add(new, op)

    def _attention(self, op: Operation) -> list[SSAValue]:
        assert isinstance(op, ir.AttentionOp)
        if op.allowed is not None or op.mask is None:
            raise _Refused("its mask is not classified", "run classify-masks before make-incremental")
        if op.mask.data == "none":
            raise _Refused("each position attends to later ones", "use a causal mask")
        if any(len(_shape(v)) != 4 or _sequence_axis(v) != 2 for v in (op.q, op.k, op.v)):
            raise _Refused("q, k and v must be [1, heads, T, head_dim]")
        operands = [self._step_value(v) for v in (op.q, op.k, op.v)]
        properties = dict(op.properties)
        new = ir.AttentionOp.create(
            operands=operands, result_types=[ir.vector(_per_token(op.out))], properties=properties
        )
        return self._add(new, op)

    def _view(self, op: Operation) -> list[SSAValue]:
        """A view is nothing in a step if as many elements lie before, and behind, the axis of tokens as did."""
        source, out = op.operands[0], op.results[0]
        counts = []
        for value in (source, out):
            axis, shape = _sequence_axis(value), _shape(value)
            counts.append((math.prod(shape[:axis]), math.prod(shape[axis + 1 :])))
        if counts[0] != counts[1]:
            raise _Refused(
                f"viewing {_text(_shape(source))} as {_text(_shape(out))} mixes tokens",
                "transpose the axis of tokens to its place first",
            )
        return [self._step_value(source)]

    def _permute(self, op: Operation) -> list[SSAValue]:
        """A permutation is nothing in a step if it keeps the order of all axes but the tokens' and those of one."""
        assert isinstance(op, ir.AtenOp)
        source = op.inputs[0]
        shape, axis = _shape(source), _sequence_axis(source)
        order = [a for a in _order(op, len(shape)) if a != axis and shape[a] != 1]
        if order != sorted(order):
            raise _Refused(
                f"it reorders each token's values, of shape {_text(shape)}", "store the weights in the order needed"
            )
        _sequence_axis(op.outs[0])
        return [self._step_value(source)]

    def _pieces(self, op: Operation) -> list[SSAValue]:
        """A piece along the first of a token's axes that is longer than one is a slice of its flat vector."""
        assert isinstance(op, ir.AtenOp)
        source = op.inputs[0]
        shape, tokens = _shape(source), _sequence_axis(source)
        axis, ranges = _ranges(op, shape)
        if axis == tokens:
            raise _Refused("it takes some of the positions", "compute every position; return logits for all of them")
        before = [s for i, s in enumerate(shape[:axis]) if i != tokens]
        if math.prod(before) != 1:
            raise _Refused(f"it takes parts that are apart in each token's values, of shape {_text(shape)}")
        stride = math.prod(s for i, s in enumerate(shape) if i > axis and i != tokens)
        x = self._step_value(source)
        values: list[SSAValue] = []
        for (start, size), result in zip(ranges, op.results, strict=True):
            if size * stride != _per_token(result):
                raise _Refused("its pieces have unexpected sizes")
            values += self._add(ir.SliceOp(x, start * stride, size * stride), op)
        return values


def _views_tokens(op: Operation, made: dict[SSAValue, SSAValue]) -> bool:
    """Whether the operation re-shapes token ids."""
    views = isinstance(op, ir.AtenOp) and base_name(op) in _VIEWS
    return views and isinstance(made.get(op.operands[0]), BlockArgument)


def _reason_unknown(op: ir.AtenOp) -> str:
    target = op.target.data
    if target == "aten.scaled_dot_product_attention.default":
        return "this attention has dropout, or q, k and v that are not [1, heads, T, head_dim] with matching heads"
    if target == "aten.embedding.default":
        return "its table is no parameter, or its rows are neither tokens nor positions"
    return f"{target} has no counterpart on the machine in this place"


def _order(op: ir.AtenOp, rank: int) -> list[int]:
    order = list(range(rank))
    args = arguments(op)[1:]
    if base_name(op) == "permute":
        axes = args[0]
        assert isinstance(axes, list)
        return [a % rank for a in axes]
    first, second = args or (0, 1)
    assert isinstance(first, int) and isinstance(second, int)
    order[first], order[second] = order[second], order[first]
    return order


def _ranges(op: ir.AtenOp, shape: tuple[int, ...]) -> tuple[int, list[tuple[int, int]]]:
    """The axis that an operation cuts and (start, size) of each piece."""
    name, args, options = base_name(op), arguments(op)[1:], keywords(op)
    if options.keys() - {"dim", "start", "end"}:
        raise _Refused(f"{op.target.data} has options that are not known")
    if name in ("split", "split_with_sizes", "chunk"):
        axis = options.get("dim", args[1] if len(args) > 1 else 0)
    else:
        axis = options.get("dim", args[0] if args else 0)
    if not isinstance(axis, int):
        raise _Refused(f"{op.target.data} cuts an axis that is not fixed")
    axis %= len(shape)
    if shape[axis] == DYNAMIC_INDEX:
        return axis, []
    if name in ("split", "split_with_sizes", "chunk", "unbind"):
        sizes = [1 if name == "unbind" else _shape(r)[axis] for r in op.outs]
        return axis, [(sum(sizes[:i]), size) for i, size in enumerate(sizes)]
    start, size = args[1] if len(args) > 1 else options.get("start", 0), 1
    if name != "select":
        size = _shape(op.outs[0])[axis]
        step = args[3] if name == "slice" and len(args) > 3 else 1
        if step != 1:
            raise _Refused(f"{op.target.data} takes every {step}. element")
    start = 0 if start is None else start
    if not isinstance(start, int):
        raise _Refused(f"{op.target.data} starts at a place that is not fixed")
    return axis, [(start + shape[axis] if start < 0 else start, size)]
