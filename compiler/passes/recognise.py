"""recognise: give imported operations their meaning: norms, linear layers, embeddings, attention, arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import DYNAMIC_INDEX, Float32Type, ModuleOp, TensorType
from xdsl.ir import Block, Operation, SSAValue
from xdsl.passes import ModulePass
from xdsl.rewriter import Rewriter

from typebar.compiler import ir
from typebar.compiler.aten import arguments, base_name, depends_on_tokens, keywords, named, parameter, shape_of
from typebar.compiler.passes.activations import recognise_activations
from typebar.compiler.passes.attention import fused_attention, recognise_attention
from typebar.compiler.passes.canonicalise import erase_unused
from typebar.compiler.passes.norms import recognise_norms
from typebar.compiler.passes.tensors import Tensors
from typebar.compiler.problems import keep_name


class Recognise(ModulePass):
    """Replace every `tb.aten` whose meaning is known; the others stay, for later passes to use or to refuse."""

    name = "recognise"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        """Rewrite every graph in place."""
        recognise(op, Tensors())


def recognise(module: ModuleOp, tensors: Tensors) -> None:
    """Rewrite every graph in place; `tensors` gives constants their values and derived tensors their names."""
    for graph in module.body.block.ops:
        if isinstance(graph, ir.GraphOp):
            block = graph.body.block
            computed = computed_values(block)
            recognise_activations(block, computed)
            recognise_attention(block, computed, tensors)
            recognise_norms(block, computed)
            fold_constants(block, computed, tensors)
            scope = _Scope(computed, tensors)
            for inner in list(block.ops):
                if isinstance(inner, ir.AtenOp) and len(inner.outs) == 1 and inner.outs[0] in computed:
                    _rewrite(inner, scope)
            _fold_biases(block)
            _fold_norm_weights(block)
            if graph.encoder:
                _note_rows(block)
            erase_unused(block)


@dataclass(frozen=True)
class _Scope:
    """What rules know besides the operation: the model's float values, and its tensors."""

    computed: set[SSAValue]
    tensors: Tensors


def fold_constants(block: Block, computed: set[SSAValue], tensors: Tensors) -> None:
    """What is computed from parameters alone, and used by the model proper, becomes a parameter by a derived name.

    A matrix's transpose stays, for linear layers to read in its layout; so do single numbers.
    """
    folded: dict[SSAValue, SSAValue] = {}
    for op in list(block.ops):
        if not isinstance(op, ir.AtenOp) or not any(r in computed for r in op.results):
            continue
        for value in dict.fromkeys(op.operands):
            if value in computed or parameter(value) is not None or not tensors.constant(value):
                continue
            type = value.type
            assert isinstance(type, TensorType)
            if math.prod(type.get_shape()) == 1 or not isinstance(type.element_type, Float32Type) or _weight(value):
                continue
            if value not in folded:
                made = ir.ParameterOp(tensors.name(value), type)
                assert isinstance(value.owner, Operation)
                block.insert_op_after(made, value.owner)
                folded[value] = made.out
            op.operands = [folded[value] if v is value else v for v in op.operands]


def _note_rows(block: Block) -> None:
    """Remember how many rows the tables of token embeddings have, before the tables are gone."""
    rows = {ir.text(op.source): shape_of(op.out)[0] for op in block.ops if isinstance(op, ir.ParameterOp)}
    for op in block.ops:
        if isinstance(op, ir.EmbeddingOp) and ir.text(op.weight) in rows:
            op.attributes["rows"] = ir.number(rows[ir.text(op.weight)])


def computed_values(block: Block) -> set[SSAValue]:
    """The float32 values of the model proper: those that depend on the tokens, or on a row of a table.

    What is left are masks, positions and constants, which are classified by running them.
    """
    known: dict[SSAValue, bool] = {}
    for op in block.ops:
        if isinstance(op, ir.EmbeddingOp) or (isinstance(op, ir.AtenOp) and _takes_rows(op)):
            known.update((r, True) for r in op.results)
    return {
        r
        for op in block.ops
        for r in op.results
        if isinstance(r.type, TensorType)
        and isinstance(r.type.element_type, Float32Type)
        and depends_on_tokens(r, known)
    }


def _takes_rows(op: ir.AtenOp) -> bool:
    """Whether the operation takes rows of a table: by index, or as many from one place on as there are tokens.

    A table read by pairs of positions has two axes without a size: it is a bias of scores.
    """
    rows = shape_of(op.outs[0])
    if base_name(op) == "embedding":
        return rows.count(DYNAMIC_INDEX) == 1
    table = base_name(op) == "slice" and parameter(op.inputs[0]) is not None
    return table and len(rows) == 2 and rows[0] == DYNAMIC_INDEX


def _rewrite(op: ir.AtenOp, scope: _Scope) -> None:
    rule = _RULES.get(op.target.data)
    shape = shape_of(op.outs[0])
    if not shape or shape[-1] == DYNAMIC_INDEX:  # no vector for each token, whatever it is
        return
    new = rule(op, scope) if rule is not None else None
    if new is None:
        return
    keep_name(new, op)
    new.results[0].name_hint = op.outs[0].name_hint
    block = op.parent
    assert block is not None
    block.insert_op_before(new, op)
    op.outs[0].replace_all_uses_with(new.results[0])
    scope.computed.add(new.results[0])
    Rewriter.erase_op(op)


def _layer_norm(op: ir.AtenOp, scope: _Scope) -> Operation | None:
    args = named(op, "x", "sizes", "weight", "bias", "eps", "cudnn")
    x, weight, bias, eps = args["x"], parameter(args.get("weight")), args.get("bias"), args.get("eps", 1e-5)
    if not isinstance(x, SSAValue) or args["sizes"] != [shape_of(x)[-1]]:
        return None
    if args.get("weight") is not None and weight is None:
        return None
    if (bias is not None and parameter(bias) is None) or not isinstance(eps, float):
        return None
    return ir.LayerNormOp(x, weight, parameter(bias), eps)


def _weight(value: object) -> tuple[str, bool] | None:
    """A two-dimensional parameter's name and whether the value is its transpose."""
    if not isinstance(value, SSAValue) or len(shape_of(value)) != 2:
        return None
    if (name := parameter(value)) is not None:
        return name, False
    owner = value.owner
    transposing = ("aten.t.default", "aten.transpose.int", "aten.permute.default", "aten.numpy_T.default")
    if isinstance(owner, ir.AtenOp) and owner.target.data in transposing:
        name = parameter(owner.inputs[0])
        if name is not None and shape_of(owner.inputs[0]) == shape_of(value)[::-1]:
            axes = arguments(owner)[1:]
            moved = not axes or axes in ([0, 1], [1, 0], [-1, -2], [-2, -1], [[1, 0]])
            return (name, True) if moved else None
    return None


def _linear_op(op: ir.AtenOp, x: object, weight: object, bias: object, stored_out_in: bool) -> Operation | None:
    found = _weight(weight)
    if found is None or not isinstance(x, SSAValue) or (bias is not None and parameter(bias) is None):
        return None
    name, transposed = found
    return ir.LinearOp(x, name, parameter(bias), ir.LAYOUTS[stored_out_in != transposed], op.outs[0].type)


def _linear(op: ir.AtenOp, scope: _Scope) -> Operation | None:
    args = named(op, "x", "weight", "bias")
    return _linear_op(op, args["x"], args["weight"], args.get("bias"), True)


def _matmul(op: ir.AtenOp, scope: _Scope) -> Operation | None:
    x, weight = arguments(op)
    return _linear_op(op, x, weight, None, False)


def _addmm(op: ir.AtenOp, scope: _Scope) -> Operation | None:
    bias, x, weight = arguments(op)
    return _linear_op(op, x, weight, bias, False) if not keywords(op) else None


def _int8_linear(op: ir.AtenOp, scope: _Scope) -> Operation | None:
    """x times an int8 weight [in, out] and a scale for each column, as the ONNX frontend writes it."""
    x, weight, scale = arguments(op)
    name, scales = parameter(weight), parameter(scale)
    if not isinstance(x, SSAValue) or name is None or scales is None:
        return None
    return ir.LinearOp(x, name, None, ir.LAYOUTS[0], op.outs[0].type, scales)


def _embedding(op: ir.AtenOp, scope: _Scope) -> Operation | None:
    table, index = arguments(op)[:2]
    name = parameter(table)
    if name is None or not isinstance(index, SSAValue) or not depends_on_tokens(index, {}):
        return None
    return ir.EmbeddingOp(index, name, op.outs[0].type)


_Rule = Callable[[ir.AtenOp, _Scope], Operation | None]


def _binary(make: Callable[[SSAValue, SSAValue, TensorType], Operation]) -> _Rule:
    def rule(op: ir.AtenOp, scope: _Scope) -> Operation | None:
        lhs, rhs = arguments(op)[:2]
        if keywords(op) or not isinstance(lhs, SSAValue) or not isinstance(rhs, SSAValue):
            return None
        if lhs not in scope.computed or rhs not in scope.computed or not _vectors(lhs, rhs):
            return None
        type = op.outs[0].type
        assert isinstance(type, TensorType)
        return make(lhs, rhs, type)

    return rule


def _vectors(*values: SSAValue) -> bool:
    """Whether the values have one shape, leading axes of size one apart, so that nothing is broadcast over tokens."""
    shapes = []
    for value in values:
        shape = shape_of(value)
        if not isinstance(value.type, TensorType) or not isinstance(value.type.element_type, Float32Type):
            return False
        while shape and shape[0] == 1:
            shape = shape[1:]
        shapes.append(shape)
    return all(s == shapes[0] and DYNAMIC_INDEX in s for s in shapes)


def _mul(op: ir.AtenOp, scope: _Scope) -> Operation | None:
    x, factor = arguments(op)[:2]
    if not isinstance(x, SSAValue) or x not in scope.computed:
        x, factor = factor, x
    value = scope.tensors.scalar(factor)
    if isinstance(x, SSAValue) and value is not None and x.type == op.outs[0].type:
        return ir.ScaleOp(x, value)
    return _binary(ir.MulOp)(op, scope)


def _div(op: ir.AtenOp, scope: _Scope) -> Operation | None:
    x, divisor = arguments(op)[:2]
    value = scope.tensors.scalar(divisor)
    if keywords(op) or not isinstance(x, SSAValue) or not value or x.type != op.outs[0].type:
        return None
    return ir.ScaleOp(x, 1 / value)


def _neg(op: ir.AtenOp, scope: _Scope) -> Operation | None:
    return ir.ScaleOp(op.inputs[0], -1.0)


def _activation(op: ir.AtenOp, scope: _Scope) -> Operation | None:
    """What is left of the activations: those whose operand is itself an element-wise function."""
    kind = base_name(op)
    if kind == "gelu":
        kind = "gelu_tanh" if keywords(op).get("approximate") == "tanh" else "gelu_erf"
    return ir.ActivationOp(op.inputs[0], kind)


def _fused_rms_norm(op: ir.AtenOp, scope: _Scope) -> Operation | None:
    args = named(op, "x", "sizes", "weight", "eps")
    x, weight, eps = args["x"], parameter(args.get("weight")), args.get("eps")
    if not isinstance(x, SSAValue) or args["sizes"] != [shape_of(x)[-1]]:
        return None
    if args.get("weight") is not None and weight is None:
        return None
    return ir.RmsNormOp(x, weight, eps if isinstance(eps, float) else 2.0**-23)  # torch's default: float32's eps


def _sdpa(op: ir.AtenOp, scope: _Scope) -> Operation | None:
    return fused_attention(op)


_RULES: dict[str, _Rule] = {
    "aten.layer_norm.default": _layer_norm,
    "aten.rms_norm.default": _fused_rms_norm,
    "aten.linear.default": _linear,
    "typebar.int8_linear.default": _int8_linear,
    "aten.matmul.default": _matmul,
    "aten.mm.default": _matmul,
    "aten.addmm.default": _addmm,
    "aten.embedding.default": _embedding,
    "aten.add.Tensor": _binary(ir.AddOp),
    "aten.mul.Tensor": _mul,
    "aten.div.Tensor": _div,
    "aten.neg.default": _neg,
    **dict.fromkeys((f"aten.{name}.default" for name in ("gelu", "relu", "sigmoid", "silu", "tanh")), _activation),
    "aten.scaled_dot_product_attention.default": _sdpa,
}


def _fold_biases(block: Block) -> None:
    """A parameter added to a linear layer without a bias, for which there is no other use, becomes its bias."""
    for op in list(block.ops):
        if not isinstance(op, ir.AtenOp) or op.target.data != "aten.add.Tensor" or len(op.inputs) != 2:
            continue
        for x, added in (tuple(op.inputs), tuple(op.inputs)[::-1]):
            linear, name = x.owner, parameter(added)
            if not isinstance(linear, ir.LinearOp) or linear.bias is not None or name is None:
                continue
            if not x.has_one_use() or shape_of(added) != shape_of(x)[-1:] or keywords(op):
                continue
            linear.properties["bias"] = ir.symbol(name)
            op.outs[0].replace_all_uses_with(x)
            Rewriter.erase_op(op)
            break


def _fold_norm_weights(block: Block) -> None:
    """A parameter that multiplies a norm without a weight becomes its weight; one added after that, its bias."""
    for op in list(block.ops):
        name = base_name(op) if isinstance(op, ir.AtenOp) else ""
        if name not in ("mul", "add") or len(op.operands) != 2 or keywords(op):  # type: ignore[arg-type]
            continue
        for x, factor in (tuple(op.operands), tuple(op.operands)[::-1]):
            norm, source = x.owner, parameter(factor)
            if not isinstance(norm, ir.RmsNormOp | ir.LayerNormOp) or source is None or not x.has_one_use():
                continue
            place = "weight" if name == "mul" else "bias"
            fits = name == "mul" or (isinstance(norm, ir.LayerNormOp) and norm.weight is not None)
            taken = norm.properties.get(place) is not None or norm.properties.get("bias") is not None
            if not fits or taken or shape_of(factor) != shape_of(x)[-1:] or op.results[0].type != x.type:
                continue
            norm.properties[place] = ir.symbol(source)
            op.results[0].replace_all_uses_with(x)
            Rewriter.erase_op(op)
            break
