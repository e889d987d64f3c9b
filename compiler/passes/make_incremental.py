"""make-incremental: from a stateless graph over T tokens to the computation of one token.

The proof: every value's sequence axis is tracked, and every operation allowed here treats the tokens one by one, but
for attention with a classified mask and rows looked up by position. Operations that only move elements leave nothing
behind: a value is a form, which says where each of its elements comes from, until an operation needs a vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from xdsl.context import Context
from xdsl.dialects.builtin import IndexType, IntegerAttr, ModuleOp, TensorType
from xdsl.ir import Block, BlockArgument, Operation, Region, SSAValue
from xdsl.passes import ModulePass
from xdsl.rewriter import Rewriter

from typebar.compiler import ir
from typebar.compiler.aten import MOVES, SOURCE, base_name, depends_on_tokens, keywords, sizes_noted
from typebar.compiler.passes.canonicalise import erase_unused
from typebar.compiler.passes.forms import (
    Form,
    Refused,
    identity,
    join,
    sequence_axis,
    shape_text,
    tensor_shape,
    token_shape,
    trace,
)
from typebar.compiler.passes.recognise import computed_values
from typebar.compiler.passes.step_values import StepValues
from typebar.compiler.passes.tensors import Tensors
from typebar.compiler.problems import LoweringError, Problem, node_name


class MakeIncremental(ModulePass):
    """Turn every `tb.graph` into a `tb.step`, or an encoder's into a `tb.encoder`."""

    name = "make-incremental"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        """Replace in place; raises LoweringError naming every operation that cannot be computed token by token."""
        problems = make_incremental(op, Tensors())
        if problems:
            raise LoweringError(problems)


def make_incremental(module: ModuleOp, tensors: Tensors) -> list[Problem]:
    """Replace every graph by its step, unless some operation forbids it; returns all of these."""
    problems: list[Problem] = []
    for graph in list(module.body.block.ops):
        if isinstance(graph, ir.GraphOp):
            maker = _StepMaker(graph, tensors)
            step = maker.run()
            problems += maker.problems
            if step is not None:
                module.body.block.insert_op_before(step, graph)
                Rewriter.erase_op(graph)
    return problems


def _per_token(value: SSAValue) -> int:
    """How many elements of the value belong to one token."""
    return math.prod(token_shape(value))


def _axis_from_end(value: SSAValue) -> int:
    """The axis of the tokens, -1 for the last one."""
    return sequence_axis(value) - len(tensor_shape(value))


def _require_flat(value: SSAValue) -> None:
    """The last axis must be all that belongs to a token."""
    if tensor_shape(value)[-1] != _per_token(value):
        raise Refused(f"it works on part of each token's values, of shape {shape_text(tensor_shape(value))}")


def _require_whole(value: SSAValue) -> None:
    """A norm must be over all that belongs to a token, as no vector instruction sums parts of a vector apart."""
    shape = tensor_shape(value)
    if shape[-1] != _per_token(value):
        raise Refused(
            f"it is a norm over parts of each token's values, of shape {shape_text(shape)}, as of each head's"
            " queries or keys (QK-norm), which is not supported yet",
            "run the model in torch, outside Typebar, or take one whose norms are over whole tokens",
        )


@dataclass
class _StepMaker:
    """Builds the step of one graph; `problems` gathers what stands in the way."""

    graph: ir.GraphOp
    tensors: Tensors
    problems: list[Problem] = field(default_factory=list)
    forms: dict[SSAValue, Form] = field(default_factory=dict)
    failed: set[SSAValue] = field(default_factory=set)
    tokens: dict[SSAValue, bool] = field(default_factory=dict)
    from_memory: dict[SSAValue, bool] = field(default_factory=dict)
    rows: int = 0

    def run(self) -> ir.StepOp | ir.EncoderOp | None:
        source = self.graph.body.block
        memory = [ir.vector(_per_token(a)) for a in source.args[1:]]
        self.block = Block(arg_types=[IndexType(), IndexType(), *memory])
        for argument, hint in zip(self.block.args, ("token", "position", "memory"), strict=False):
            argument.name_hint = hint
        self.values = StepValues(self.block, self.graph.context.value.data, self.tensors)
        computed = computed_values(source)
        for given, argument in zip(source.args, (self.block.args[0], *self.block.args[2:]), strict=True):
            self.forms[given] = identity(argument, token_shape(given))
        self.from_memory.update((v, number > 0) for number, v in enumerate(source.args))
        for op in source.ops:
            self._note_source(op)
            if isinstance(op, ir.PositionsOp):
                self.forms[op.out] = identity(self.block.args[1], ())
            elif isinstance(op, ir.ReturnOp):
                self._finish(op)
            elif any(r in computed for r in op.results) or self._moves_numbers(op):
                self._translate(op)
        if self.problems:
            return None
        erase_unused(self.block)
        last = self.block.last_op
        assert isinstance(last, ir.ReturnOp)
        context = self.graph.context.value.data
        if self.graph.encoder:
            return ir.EncoderOp(self.rows, context, Region([self.block]))
        return ir.StepOp(ir.width(last.values[0]), context, Region([self.block]))

    def _note_source(self, op: Operation) -> None:
        """A result is the source text's if a memory and nothing of the tokens goes into it."""
        read = [self.from_memory[v] for v in op.operands if v in self.from_memory]
        if read:
            self.from_memory.update((r, all(read)) for r in op.results)

    def _moves_numbers(self, op: Operation) -> bool:
        """Whether the operation re-shapes token ids or positions."""
        return isinstance(op, ir.AtenOp) and base_name(op) in MOVES and any(v in self.forms for v in op.operands[:1])

    def _finish(self, op: ir.ReturnOp) -> None:
        results = list(op.values)
        if len(results) == 1 and results[0] in self.failed:
            return
        what = "the memory [1, T, D]" if self.graph.encoder else "logits [1, T, V]"
        try:
            if len(results) != 1 or results[0] not in self.forms:
                raise Refused(f"the graph must return {what.split(' [')[0]}, and nothing else", f"return {what}")
            if len(tensor_shape(results[0])) != 3 or sequence_axis(results[0]) != 1:
                raise Refused(f"the result has shape {shape_text(tensor_shape(results[0]))}", f"return {what}")
            returned = self._value(results[0])
        except Refused as refusal:
            self._refuse("the result", refusal)
            return
        self.block.add_op(ir.ReturnOp(returned))

    def _refuse(self, node: str, refusal: Refused) -> None:
        problem = Problem(refusal.node or node, refusal.reason, refusal.remedy)
        if problem not in self.problems:
            self.problems.append(problem)

    def _translate(self, op: Operation) -> None:
        """Give every result its form in the step; a result of a refused operation is not refused again later."""
        try:
            rule = self._rule(op)
            if any(v in self.failed for v in op.operands):
                self.failed.update(op.results)
                return
            self._check_symbolic(op)
            self.values.origin = op
            forms = rule(op)
        except Refused as refusal:
            self._refuse(node_name(op), refusal)
            self.failed.update(op.results)
            return
        self.forms.update(zip(op.results, forms, strict=True))

    def _check_symbolic(self, op: Operation) -> None:
        if isinstance(op, ir.AtenOp) and any(n != SOURCE for r in op.outs for n in sizes_noted(r).values()):
            assert op.symbolic is not None
            raise Refused(f"it changes the number of tokens: {op.symbolic.data}", "keep the axis of tokens as it is")

    def _rule(self, op: Operation) -> Callable[[Operation], list[Form]]:
        if isinstance(op, ir.AtenOp):
            name = base_name(op)
            if name in MOVES:
                return self._move
            if name in ("add", "sub", "mul", "div") and op.target.data.endswith(".Tensor"):
                return self._arithmetic
            raise Refused(_reason_unknown(op))
        rules: dict[type[Operation], Callable[[Operation], list[Form]]] = {
            ir.EmbeddingOp: self._embedding,
            ir.AttentionOp: self._attention,
            ir.AddOp: self._arithmetic,
            ir.MulOp: self._arithmetic,
            ir.ScaleOp: self._unary,
            ir.ActivationOp: self._unary,
        }
        return rules.get(type(op), self._by_token)

    def _form(self, value: SSAValue) -> Form:
        if value not in self.forms:
            raise Refused("it uses a value that is neither computed from tokens nor a parameter")
        return self.forms[value]

    def _value(self, value: SSAValue) -> SSAValue:
        return self.values.vector(self._form(value))

    def _made(self, op: Operation, like: SSAValue) -> list[Form]:
        """The form of a new operation's one result, which is all of a token of `like`."""
        return [identity(self.values.add(op), token_shape(like))]

    def _move(self, op: Operation) -> list[Form]:
        assert isinstance(op, ir.AtenOp)
        moving = [v for v in dict.fromkeys(op.inputs) if v in self.forms]
        if any(v not in self.forms and isinstance(v.type, TensorType) for v in op.inputs):
            raise Refused(f"{op.target.data} joins computed values and others")
        source = join([self.forms[v] for v in moving])
        forms = []
        for places, result in zip(trace(op, moving), op.outs, strict=True):
            flat = places.reshape(-1)
            moved = bool((flat[1:] <= flat[:-1]).any())
            assert places.shape == token_shape(result)
            forms.append(source.take(places, node_name(op) if moved else None))
        return forms

    def _by_token(self, op: Operation) -> list[Form]:
        """The operations on the last axis: rebuild them on flat vectors."""
        self._check_axes(op)
        if isinstance(op, ir.RmsNormOp | ir.LayerNormOp):
            _require_whole(op.operands[0])
        _require_flat(op.operands[0])
        operands = [self._value(v) for v in op.operands]
        types = [ir.vector(_per_token(r)) for r in op.results]
        return self._made(
            op.create(operands=operands, result_types=types, properties=dict(op.properties)), op.results[0]
        )

    def _check_axes(self, op: Operation) -> None:
        axes = {_axis_from_end(v) for v in (*op.operands, *op.results)}
        if len(axes) != 1:
            raise Refused("its operands have their tokens on different axes", "align the axes of tokens")
        if len({self.from_memory.get(v, False) for v in op.operands}) != 1:
            raise Refused("it mixes positions of the source text with the text's", "attend to the source text instead")

    def _unary(self, op: Operation) -> list[Form]:
        """An element-wise function; of elements in an order that is no slice's, the function of the whole base."""
        form = self._form(op.operands[0])
        if isinstance(op, ir.ScaleOp) and op.value.value.data == -1.0:
            return [form.negative()]
        try:
            x, places = self.values.vector(form), None
        except Refused:
            if not form.plain or isinstance(form.base, BlockArgument) or (form.sign != 1).any():
                raise
            x, places = form.base, form.element[0]
        new = op.create(operands=[x], result_types=[x.type], properties=dict(op.properties))
        if places is None:
            return self._made(new, op.results[0])
        whole = identity(self.values.add(new), (ir.width(x),))
        return [whole.take(places, form.moved)]

    def _arithmetic(self, op: Operation) -> list[Form]:
        """add, sub, mul and div of computed values, factors by position, and constants, by which is which."""
        name = {ir.AddOp: "add", ir.MulOp: "mul"}.get(type(op)) or base_name(op)  # type: ignore[arg-type]
        result = op.results[0]
        if len(op.operands) != 2 or _has_options(op):
            raise Refused(_reason_unknown(op))
        lhs, rhs = op.operands
        if name in ("add", "mul") and not self._of_tokens(lhs):
            lhs, rhs = rhs, lhs
        if not self._of_tokens(lhs) or name == "div":
            if self._of_tokens(lhs) and name == "div" and self.tensors.constant(rhs):
                return self._with_constant(name, self._form(lhs), lhs, rhs, result)
            if name in ("add", "mul") and lhs in self.forms and rhs in self.forms:  # tables by position, both
                return self._two(name, op, lhs, rhs)
            raise Refused(_reason_unknown(op))
        if self.tensors.constant(rhs):
            return self._with_constant(name, self._form(lhs), lhs, rhs, result)
        if not self._of_tokens(rhs):
            return self._with_positions(name, op, lhs, rhs)
        return self._two(name, op, lhs, rhs)

    def _of_tokens(self, value: SSAValue) -> bool:
        return depends_on_tokens(value, self.tokens)

    def _with_constant(self, name: str, form: Form, lhs: SSAValue, rhs: SSAValue, result: SSAValue) -> list[Form]:
        if token_shape(lhs) != token_shape(result):
            raise Refused(f"it spreads each token's values, of shape {shape_text(tensor_shape(lhs))}")
        operand = self.values.constant(rhs, result, name)
        x = self.values.vector(form)
        made = ir.AddOp(x, operand) if name in ("add", "sub") else ir.MulOp(x, operand)
        return self._made(made, result)

    def _with_positions(self, name: str, op: Operation, lhs: SSAValue, rhs: SSAValue) -> list[Form]:
        """A factor, or a summand, that depends on the position alone."""
        if self.from_memory.get(lhs, False):
            raise Refused("it looks at positions of the source text", "do so in the encoder")
        if sequence_axis(lhs) - len(tensor_shape(lhs)) != sequence_axis(op.results[0]) - len(
            tensor_shape(op.results[0])
        ):
            raise Refused("its operands have their tokens on different axes", "align the axes of tokens")
        if token_shape(lhs) != token_shape(op.results[0]):
            raise Refused(f"it spreads each token's values, of shape {shape_text(tensor_shape(lhs))}")
        form = self._form(lhs)
        if name == "mul":
            return [form.times(*self.values.columns_of(rhs, op.results[0]))]
        if name != "add":
            raise Refused("it subtracts what depends on the position", "add it instead")
        row = self._value(rhs) if self._plain_rows(rhs, lhs) else self.values.row_of(rhs, op.results[0])
        return self._made(ir.AddOp(self.values.vector(form), row), op.results[0])

    def _plain_rows(self, value: SSAValue, like: SSAValue) -> bool:
        return value in self.forms and token_shape(value)[-1:] == (_per_token(like),) == (_per_token(value),)

    def _two(self, name: str, op: Operation, lhs: SSAValue, rhs: SSAValue) -> list[Form]:
        """Two computed values of one shape."""
        result = op.results[0]
        self._check_axes(op)
        if math.prod(token_shape(lhs)) != _per_token(result) or math.prod(token_shape(rhs)) != _per_token(result):
            raise Refused("its operands differ in shape: one would be repeated", "give both one shape")
        a, b = self._form(lhs), self._form(rhs)
        shape = token_shape(result)
        a, b = (f.take(_all(f).reshape(shape)) for f in (a, b))
        if name == "sub":
            b, name = b.negative(), "add"
        if name == "add" and not (a.plain and b.plain):
            return [a.plus(b)]
        make = ir.AddOp if name == "add" else ir.MulOp
        try:
            x, y = self.values.vector(a), self.values.vector(b)
        except Refused:
            same = (
                a.plain and b.plain and (a.element == b.element).all() and (a.sign == 1).all() and (b.sign == 1).all()
            )
            if not same or a.base.type != b.base.type or isinstance(a.base, BlockArgument):
                raise
            whole = identity(self.values.add(make(a.base, b.base)), (ir.width(a.base),))
            return [whole.take(a.element[0], a.moved)]
        return self._made(make(x, y), result)

    def _embedding(self, op: Operation) -> list[Form]:
        assert isinstance(op, ir.EmbeddingOp)
        form = self._form(op.index)
        if not isinstance(form.base, BlockArgument):
            raise Refused("its index is computed, not a token or a position")
        if sequence_axis(op.out) - len(tensor_shape(op.out)) + 1 != sequence_axis(op.index) - len(
            tensor_shape(op.index)
        ):
            raise Refused("its index has no single axis of tokens")
        _require_flat(op.out)
        if form.base is self.block.args[0]:
            self.rows = max(self.rows, self._table_rows(op))
        new = ir.EmbeddingOp(form.base, ir.text(op.weight), ir.vector(ir.width(op.out)), op.offset.value.data)
        return self._made(new, op.out)

    def _table_rows(self, op: ir.EmbeddingOp) -> int:
        """The number of tokens that an encoder knows; a decoder's is that of its logits."""
        if not self.graph.encoder:
            return 0
        rows = op.attributes.get("rows")
        if not isinstance(rows, IntegerAttr):
            raise Refused("the number of its table's rows is not known", "note it as `rows`")
        return rows.value.data

    def _attention(self, op: Operation) -> list[Form]:
        assert isinstance(op, ir.AttentionOp)
        if op.allowed is not None or op.mask is None:
            raise Refused("its mask is not classified", "run classify-masks before make-incremental")
        if any(len(tensor_shape(v)) != 4 or sequence_axis(v) != 2 for v in (op.q, op.k, op.v)):
            raise Refused("q, k and v must be [1, heads, T, head_dim]")
        sources = [self.from_memory.get(v, False) for v in (op.q, op.k, op.v)]
        crossing = sources == [False, True, True]
        if not crossing and any(sources):
            raise Refused(
                "q, k and v are of the text and the source text", "let q be of the text, k and v of the source"
            )
        kind = op.mask.data
        if crossing and (kind != "none" or op.bias is not None):
            raise Refused("it looks at the source text through a mask", "let every token see all of the source text")
        if kind == "none" and not crossing and not self.graph.encoder:
            raise Refused("each position attends to later ones", "use a causal mask")
        size = op.head_dim.value.data
        q, k, v = (self._heads(x, size) for x in (op.q, op.k, op.v))
        group = _repeated(k, v)
        k, v = k.take(_all(k)[::group]), v.take(_all(v)[::group])
        operands = [self.values.vector(form) for form in (q, k, v)]
        properties = dict(op.properties)
        properties["kv_heads"] = ir.number(op.kv_heads.value.data // group)
        if crossing:
            del properties["mask"]
        kind_of = ir.CrossAttentionOp if crossing else ir.AttentionOp
        new = kind_of.create(operands=operands, result_types=[operands[0].type], properties=properties)
        return self._made(new, op.out)

    def _heads(self, value: SSAValue, size: int) -> Form:
        form = self._form(value)
        return form.take(_all(form).reshape(-1, size))


def _all(form: Form) -> np.ndarray:
    """The places of all elements, in their order and shape."""
    shape = form.element.shape[1:]
    return np.arange(math.prod(shape)).reshape(shape)


def _repeated(k: Form, v: Form) -> int:
    """How many query heads in a row read copies of one K/V head: the most for which K and V agree."""
    heads = k.element.shape[1]
    for group in range(heads, 1, -1):
        if heads % group:
            continue
        first = np.arange(heads) // group * group
        if all((a == a[:, first]).all() for form in (k, v) for a in (form.element, form.sign, form.column)):
            return group
    return 1


def _has_options(op: Operation) -> bool:
    return isinstance(op, ir.AtenOp) and bool(keywords(op))


def _reason_unknown(op: Operation) -> str:
    if not isinstance(op, ir.AtenOp):
        return f"{op.name} has operands that it cannot combine"
    target = op.target.data
    if target == "aten.scaled_dot_product_attention.default":
        return "this attention has dropout, or q, k and v that are not [1, heads, T, head_dim] with matching heads"
    if target == "aten.embedding.default":
        return "its table is no parameter, or its rows are neither tokens nor positions"
    return f"{target} has no counterpart on the machine in this place"
