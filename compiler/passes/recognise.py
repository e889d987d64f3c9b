"""recognise: give imported operations their meaning: norms, linear layers, embeddings, attention, arithmetic."""

from __future__ import annotations

from collections.abc import Callable

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
from typebar.compiler.problems import keep_name


class Recognise(ModulePass):
    """Replace every `tb.aten` whose meaning is known; the others stay, for later passes to use or to refuse."""

    name = "recognise"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        """Rewrite every graph in place."""
        for graph in op.body.block.ops:
            if isinstance(graph, ir.GraphOp):
                block = graph.body.block
                computed = computed_values(block)
                recognise_activations(block, computed)
                recognise_attention(block, computed)
                for inner in list(block.ops):
                    if isinstance(inner, ir.AtenOp) and len(inner.outs) == 1 and inner.outs[0] in computed:
                        _rewrite(inner)
                _fold_biases(block)
                erase_unused(block)


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
    """Whether the operation takes rows of a table: by index, or as many from one place on as there are tokens."""
    if base_name(op) == "embedding":
        return True
    rows = shape_of(op.outs[0])
    table = base_name(op) == "slice" and parameter(op.inputs[0]) is not None
    return table and len(rows) == 2 and rows[0] == DYNAMIC_INDEX


def _rewrite(op: ir.AtenOp) -> None:
    rule = _RULES.get(op.target.data)
    shape = shape_of(op.outs[0])
    if not shape or shape[-1] == DYNAMIC_INDEX:  # no vector for each token, whatever it is
        return
    new = rule(op) if rule is not None else None
    if new is None:
        return
    keep_name(new, op)
    new.results[0].name_hint = op.outs[0].name_hint
    block = op.parent
    assert block is not None
    block.insert_op_before(new, op)
    op.outs[0].replace_all_uses_with(new.results[0])
    Rewriter.erase_op(op)


def _layer_norm(op: ir.AtenOp) -> Operation | None:
    args = named(op, "x", "sizes", "weight", "bias", "eps", "cudnn")
    x, weight, bias, eps = args["x"], parameter(args.get("weight")), args.get("bias"), args.get("eps", 1e-5)
    if not isinstance(x, SSAValue) or args["sizes"] != [shape_of(x)[-1]] or weight is None:
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


def _linear(op: ir.AtenOp) -> Operation | None:
    args = named(op, "x", "weight", "bias")
    return _linear_op(op, args["x"], args["weight"], args.get("bias"), True)


def _matmul(op: ir.AtenOp) -> Operation | None:
    x, weight = arguments(op)
    return _linear_op(op, x, weight, None, False)


def _addmm(op: ir.AtenOp) -> Operation | None:
    bias, x, weight = arguments(op)
    return _linear_op(op, x, weight, bias, False) if not keywords(op) else None


def _embedding(op: ir.AtenOp) -> Operation | None:
    table, index = arguments(op)[:2]
    name = parameter(table)
    if name is None or not isinstance(index, SSAValue) or not depends_on_tokens(index, {}):
        return None
    return ir.EmbeddingOp(index, name, op.outs[0].type)


def _binary(make: Callable[[SSAValue, SSAValue, TensorType], Operation]) -> Callable[[ir.AtenOp], Operation | None]:
    def rule(op: ir.AtenOp) -> Operation | None:
        lhs, rhs = arguments(op)[:2]
        if keywords(op) or not isinstance(lhs, SSAValue) or not isinstance(rhs, SSAValue):
            return None
        if parameter(lhs) is not None or parameter(rhs) is not None or not _vectors(lhs, rhs):
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


def _mul(op: ir.AtenOp) -> Operation | None:
    if (norm := _rms_norm(op)) is not None:
        return norm
    x, factor = arguments(op)[:2]
    if isinstance(factor, SSAValue) and not isinstance(x, SSAValue):
        x, factor = factor, x
    if isinstance(x, SSAValue) and isinstance(factor, int | float):
        return ir.ScaleOp(x, factor)
    return _binary(ir.MulOp)(op)


def _div(op: ir.AtenOp) -> Operation | None:
    x, divisor = arguments(op)[:2]
    if keywords(op) or not isinstance(x, SSAValue) or not isinstance(divisor, int | float) or not divisor:
        return None
    return ir.ScaleOp(x, 1 / divisor)


def _neg(op: ir.AtenOp) -> Operation | None:
    return ir.ScaleOp(op.inputs[0], -1.0)


def _activation(op: ir.AtenOp) -> Operation | None:
    """What is left of the activations: those whose operand is itself an element-wise function."""
    kind = base_name(op)
    if kind == "gelu":
        kind = "gelu_tanh" if keywords(op).get("approximate") == "tanh" else "gelu_erf"
    return ir.ActivationOp(op.inputs[0], kind)


def _rms_norm(op: ir.AtenOp) -> Operation | None:
    """weight * (x * rsqrt(mean(x ** 2, -1) + eps)), the factors of either product in either order."""
    for weight, normed in (tuple(op.inputs), tuple(op.inputs)[::-1]) if len(op.inputs) == 2 else ():
        name, product = parameter(weight), normed.owner
        if name is None or not isinstance(product, ir.AtenOp) or product.target.data != "aten.mul.Tensor":
            continue
        for x, root in (tuple(product.inputs), tuple(product.inputs)[::-1]) if len(product.inputs) == 2 else ():
            eps = _eps_of_mean_square(root, x)
            if eps is not None and shape_of(weight) == shape_of(x)[-1:]:
                return ir.RmsNormOp(x, name, eps)
    return None


def _eps_of_mean_square(root: SSAValue, x: SSAValue) -> float | None:
    """eps, if `root` is rsqrt(mean(x ** 2 over the last axis) + eps)."""
    chain = []
    for target in ("aten.rsqrt.default", "aten.add.Tensor", "aten.mean.dim", "aten.pow.Tensor_Scalar"):
        op = root.owner
        if not isinstance(op, ir.AtenOp) or op.target.data != target:
            return None
        chain.append(op)
        root = op.inputs[0]
    eps, axes = arguments(chain[1])[1], arguments(chain[2])[1]
    if root is not x or arguments(chain[3])[1] != 2 or axes not in ([-1], [len(shape_of(x)) - 1]):
        return None
    return eps if isinstance(eps, float) else None


def _fused_rms_norm(op: ir.AtenOp) -> Operation | None:
    args = named(op, "x", "sizes", "weight", "eps")
    x, weight, eps = args["x"], parameter(args.get("weight")), args.get("eps")
    if not isinstance(x, SSAValue) or weight is None or args["sizes"] != [shape_of(x)[-1]]:
        return None
    return ir.RmsNormOp(x, weight, eps if isinstance(eps, float) else 2.0**-23)  # torch's default: float32's eps


_RULES: dict[str, Callable[[ir.AtenOp], Operation | None]] = {
    "aten.layer_norm.default": _layer_norm,
    "aten.rms_norm.default": _fused_rms_norm,
    "aten.linear.default": _linear,
    "aten.matmul.default": _matmul,
    "aten.mm.default": _matmul,
    "aten.addmm.default": _addmm,
    "aten.embedding.default": _embedding,
    "aten.add.Tensor": _binary(ir.AddOp),
    "aten.add_.Tensor": _binary(ir.AddOp),
    "aten.mul.Tensor": _mul,
    "aten.div.Tensor": _div,
    "aten.neg.default": _neg,
    **dict.fromkeys((f"aten.{name}.default" for name in ("gelu", "relu", "sigmoid", "silu", "tanh")), _activation),
    "aten.scaled_dot_product_attention.default": fused_attention,
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
