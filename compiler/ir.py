"""The `tb` dialect: one decoder graph, first as imported, then token by token.

A module holds one of two forms, and the passes of the front half lead from the first to the second.

`tb.graph` is the stateless graph over T tokens, as an exporter wrote it: `tb.aten` for operations not yet
recognised, `tb.parameter` for weights as values, and the recognised operations below on tensors that carry
batch and sequence axes, such as `tensor<1x?xDxf32>`; `?` is the number of tokens.

`tb.step` computes one token. Every value is the flat, row-major float32 vector of that token,
`tensor<Dxf32>`; weights are named by symbols; each `tb.attention` owns a K/V cache of the positions before
this one. Equal layers stand once, in `tb.repeat`, where `{}` in a symbol is the layer's number.
"""

from __future__ import annotations

from collections.abc import Sequence

from xdsl.context import Context
from xdsl.dialects.builtin import (
    DYNAMIC_INDEX,
    ArrayAttr,
    Builtin,
    DictionaryAttr,
    Float32Type,
    FloatAttr,
    IndexType,
    IntegerAttr,
    StringAttr,
    SymbolRefAttr,
    TensorType,
    f32,
    i64,
)
from xdsl.ir import Attribute, Block, Dialect, Region, SSAValue
from xdsl.irdl import (
    IRDLOperation,
    ParsePropInAttrDict,
    irdl_op_definition,
    operand_def,
    opt_operand_def,
    opt_prop_def,
    prop_def,
    region_def,
    result_def,
    traits_def,
    var_operand_def,
    var_result_def,
)
from xdsl.traits import IsTerminator, Pure
from xdsl.utils.exceptions import VerifyException

ACTIVATIONS = ("gelu_tanh", "gelu_erf", "relu", "silu", "tanh", "sigmoid")
"""The kinds `tb.activation` may have; gelu_tanh is GELU's tanh form, gelu_erf the exact one."""

LAYOUTS = ("in_out", "out_in")
"""How a linear weight lies in its source: [inputs, outputs] or [outputs, inputs]."""

MASKS = ("causal", "window", "none")
"""Which positions j a position i attends to: j <= i; i - window < j <= i; every j (never in a step)."""

LAYER = "{}"
"""Stands for the layer's number in a symbol inside `tb.repeat`."""

_FORMAT = "`(` operands `)` attr-dict `:` functional-type(operands, results)"
_REGION_FORMAT = "`(` operands `)` attr-dict-with-keyword $body `:` functional-type(operands, results)"


def width(value: SSAValue) -> int:
    """The size of a value's last axis, in elements; in a step, the length of the vector."""
    if not isinstance(value.type, TensorType) or not value.type.get_num_dims():
        raise VerifyException(f"expected a tensor with at least one axis, not {value.type}")
    return value.type.get_shape()[-1]


def vector(size: int) -> TensorType[Float32Type]:
    """The type of one token's float32 vector of `size` elements."""
    return TensorType(f32, [size])


def symbol(name: str) -> SymbolRefAttr:
    """A reference to the source parameter `name`."""
    return SymbolRefAttr(name)


def text(reference: SymbolRefAttr) -> str:
    """The name that a reference names."""
    name: str = reference.string_value()  # type: ignore[no-untyped-call]
    return name


def operand_reference(index: int) -> StringAttr:
    """How the arguments of `tb.aten` name operand `index`."""
    return StringAttr(f"%{index}")


def number(value: int) -> IntegerAttr:
    """An integer attribute."""
    return IntegerAttr(value, i64)


def real(value: float) -> FloatAttr:
    """A float32 attribute."""
    return FloatAttr(value, f32)


def _require(condition: bool, rule: str) -> None:
    if not condition:
        raise VerifyException(rule)


def _require_float_vectors(*values: SSAValue) -> None:
    for value in values:
        _require(
            isinstance(value.type, TensorType) and value.type.element_type == f32,
            f"expected a float32 tensor, not {value.type}",
        )
        _require(width(value) != DYNAMIC_INDEX, f"the last axis of {value.type} must have a fixed size")


class _Op(IRDLOperation):
    """What all operations share: properties are written in the attribute dictionary."""

    irdl_options = (ParsePropInAttrDict(),)


@irdl_op_definition
class GraphOp(_Op):
    """The stateless graph: one block whose argument is the token ids, tensor<1x?xi64>; returns the logits.

    `context` is the largest number of tokens the model declares.
    """

    name = "tb.graph"
    context = prop_def(IntegerAttr)
    body = region_def("single_block")
    assembly_format = "attr-dict-with-keyword $body"

    def __init__(self, context: int, body: Region) -> None:
        """Make the operation from plain values."""
        super().__init__(properties={"context": number(context)}, regions=[body])

    def verify_(self) -> None:
        """One argument of integers, a positive context and a `tb.return` at the end."""
        _require(self.context.value.data > 0, "tb.graph: context must be positive")
        _require(len(self.body.block.args) == 1, "tb.graph takes one argument, the token ids")
        _require_return(self.body.block)


@irdl_op_definition
class StepOp(_Op):
    """One token's computation: block arguments (token: index, position: index), returns the logits.

    `context` is the number of positions the caches must hold; `vocab` the number of tokens.
    """

    name = "tb.step"
    vocab = prop_def(IntegerAttr)
    context = prop_def(IntegerAttr)
    body = region_def("single_block")
    assembly_format = "attr-dict-with-keyword $body"

    def __init__(self, vocab: int, context: int, body: Region) -> None:
        """Make the operation from plain values."""
        super().__init__(properties={"vocab": number(vocab), "context": number(context)}, regions=[body])

    def verify_(self) -> None:
        """Two index arguments and one result of `vocab` logits."""
        block = self.body.block
        _require(
            len(block.args) == 2 and all(isinstance(a.type, IndexType) for a in block.args),
            "tb.step takes two index arguments, token and position",
        )
        _require(self.context.value.data > 0, "tb.step: context must be positive")
        values = _require_return(block).values
        _require(
            len(values) == 1 and values[0].type == vector(self.vocab.value.data),
            f"tb.step returns one vector of vocab = {self.vocab.value.data} logits",
        )


@irdl_op_definition
class ReturnOp(_Op):
    """Ends a graph or a step with its logits."""

    name = "tb.return"
    values = var_operand_def(TensorType)
    traits = traits_def(IsTerminator())
    assembly_format = "`(` $values `)` attr-dict `:` type($values)"

    def __init__(self, *values: SSAValue) -> None:
        """Make the operation from plain values."""
        super().__init__(operands=[values])


@irdl_op_definition
class YieldOp(_Op):
    """Ends the body of `tb.repeat`: the values that the next layer, or the code after the loop, receives."""

    name = "tb.yield"
    values = var_operand_def(TensorType)
    traits = traits_def(IsTerminator())
    assembly_format = "`(` $values `)` attr-dict `:` type($values)"

    def __init__(self, *values: SSAValue) -> None:
        """Make the operation from plain values."""
        super().__init__(operands=[values])


def _require_return(block: Block) -> ReturnOp:
    last = block.last_op
    if not isinstance(last, ReturnOp):
        raise VerifyException("the last operation must be tb.return")
    return last


@irdl_op_definition
class RepeatOp(_Op):
    """`count` equal layers in a row; layer l of 0..count-1 reads the symbols with `{}` replaced by start + l.

    Operands are the first layer's block arguments; each layer's yielded values are the next one's arguments,
    and the last layer's are the results. Every layer has its own K/V caches.
    """

    name = "tb.repeat"
    inits = var_operand_def(TensorType)
    outs = var_result_def(TensorType)
    count = prop_def(IntegerAttr)
    start = prop_def(IntegerAttr)
    body = region_def("single_block")
    assembly_format = _REGION_FORMAT

    def __init__(self, inits: Sequence[SSAValue], count: int, start: int, body: Region) -> None:
        """Make the operation from plain values."""
        super().__init__(
            operands=[inits],
            result_types=[[value.type for value in inits]],
            properties={"count": number(count), "start": number(start)},
            regions=[body],
        )

    def verify_(self) -> None:
        """Operands, block arguments, yielded values and results agree in number and type."""
        _require(self.count.value.data > 0, "tb.repeat: count must be positive")
        _require(self.start.value.data >= 0, "tb.repeat: start must not be negative")
        last = self.body.block.last_op
        if not isinstance(last, YieldOp):
            raise VerifyException("tb.repeat: the last operation must be tb.yield")
        types = [value.type for value in self.inits]
        for what, values in (
            ("block arguments", self.body.block.args),
            ("yielded values", last.values),
            ("results", self.outs),
        ):
            _require(
                [value.type for value in values] == types,
                f"tb.repeat: {what} must have the operands' types",
            )


@irdl_op_definition
class AtenOp(_Op):
    """An imported torch operation: `target` is its name, such as aten.view.default.

    `args` and `kwargs` are the call's arguments in order: "%n" is operand n, other strings are dtypes
    ("torch.bool"), unit is None, arrays are lists. Results are the call's tensors; a symbolic size is an
    `index`. Operators on sizes have targets such as sym.add. `symbolic` says which result axis has a size
    that is an expression other than the number of tokens.
    """

    name = "tb.aten"
    inputs = var_operand_def()
    outs = var_result_def()
    target = prop_def(StringAttr)
    args = prop_def(ArrayAttr)
    kwargs = opt_prop_def(DictionaryAttr)
    symbolic = opt_prop_def(StringAttr)
    traits = traits_def(Pure())
    assembly_format = _FORMAT

    def __init__(
        self,
        target: str,
        inputs: Sequence[SSAValue],
        args: Sequence[Attribute],
        kwargs: dict[str, Attribute],
        types: Sequence[Attribute],
        symbolic: str | None = None,
    ) -> None:
        """Make the operation from plain values."""
        super().__init__(
            operands=[inputs],
            result_types=[types],
            properties={
                "target": StringAttr(target),
                "args": ArrayAttr(args),
                "kwargs": DictionaryAttr(kwargs) if kwargs else None,
                "symbolic": StringAttr(symbolic) if symbolic else None,
            },
        )

    def verify_(self) -> None:
        """Every operand is used by an argument, and every argument's operand exists."""
        used = set[int]()
        _operand_numbers(self.args, used)
        if self.kwargs is not None:
            _operand_numbers(self.kwargs, used)
        _require(
            used == set(range(len(self.inputs))),
            f"tb.aten {self.target.data}: arguments name operands {sorted(used)} of {len(self.inputs)}",
        )


def _operand_numbers(attribute: Attribute, found: set[int]) -> None:
    match attribute:
        case StringAttr(data=text) if text.startswith("%"):
            _require(text[1:].isdecimal(), f"tb.aten: {text!r} names no operand")
            found.add(int(text[1:]))
        case ArrayAttr():
            for item in attribute:
                _operand_numbers(item, found)
        case DictionaryAttr():
            for item in attribute.data.values():
                _operand_numbers(item, found)
        case _:
            pass


@irdl_op_definition
class ParameterOp(_Op):
    """A source parameter or buffer as a value; only in `tb.graph`."""

    name = "tb.parameter"
    out = result_def(TensorType)
    source = prop_def(SymbolRefAttr)
    traits = traits_def(Pure())
    assembly_format = "attr-dict `:` type($out)"

    def __init__(self, source: str, type: TensorType[Attribute]) -> None:
        """Make the operation from plain values."""
        super().__init__(result_types=[type], properties={"source": symbol(source)})


@irdl_op_definition
class PositionsOp(_Op):
    """The positions 0, 1, ..., T-1 of the tokens, tensor<?xi64>; only in `tb.graph`."""

    name = "tb.positions"
    out = result_def(TensorType)
    traits = traits_def(Pure())
    assembly_format = "attr-dict `:` type($out)"

    def __init__(self) -> None:
        """Make the operation from plain values."""
        super().__init__(result_types=[TensorType(i64, [DYNAMIC_INDEX])])


@irdl_op_definition
class EmbeddingOp(_Op):
    """Row `index + offset` of the table `weight`, [rows, D]."""

    name = "tb.embedding"
    index = operand_def(IndexType | TensorType)
    out = result_def(TensorType)
    weight = prop_def(SymbolRefAttr)
    offset = prop_def(IntegerAttr)
    traits = traits_def(Pure())
    assembly_format = _FORMAT

    def __init__(self, index: SSAValue, weight: str, type: Attribute, offset: int = 0) -> None:
        """Make the operation from plain values."""
        super().__init__(
            operands=[index],
            result_types=[type],
            properties={"weight": symbol(weight), "offset": number(offset)},
        )

    def verify_(self) -> None:
        """A float32 result and an offset that is not negative."""
        _require_float_vectors(self.out)
        _require(self.offset.value.data >= 0, "tb.embedding: offset must not be negative")


class _Binary(_Op):
    lhs = operand_def(TensorType)
    rhs = operand_def(TensorType)
    out = result_def(TensorType)
    traits = traits_def(Pure())
    assembly_format = _FORMAT

    def __init__(self, lhs: SSAValue, rhs: SSAValue, type: Attribute | None = None) -> None:
        """Make the operation from plain values."""
        super().__init__(operands=[lhs, rhs], result_types=[type or lhs.type])

    def verify_(self) -> None:
        """Both operands and the result have one type."""
        _require_float_vectors(self.lhs, self.rhs, self.out)
        _require(
            self.lhs.type == self.rhs.type == self.out.type,
            f"{self.name}: operands and result must have one type",
        )


@irdl_op_definition
class AddOp(_Binary):
    """lhs + rhs, element by element."""

    name = "tb.add"


@irdl_op_definition
class MulOp(_Binary):
    """lhs * rhs, element by element."""

    name = "tb.mul"


class _Unary(_Op):
    x = operand_def(TensorType)
    out = result_def(TensorType)
    traits = traits_def(Pure())
    assembly_format = _FORMAT

    def verify_(self) -> None:
        """The result has the operand's type."""
        _require_float_vectors(self.x, self.out)
        _require(self.x.type == self.out.type, f"{self.name}: the result must have the operand's type")


@irdl_op_definition
class ScaleOp(_Unary):
    """x * value, for a constant `value`."""

    name = "tb.scale"
    value = prop_def(FloatAttr)

    def __init__(self, x: SSAValue, value: float) -> None:
        """Make the operation from plain values."""
        super().__init__(operands=[x], result_types=[x.type], properties={"value": real(value)})


@irdl_op_definition
class LayerNormOp(_Unary):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis (population variance)."""

    name = "tb.layer_norm"
    weight = prop_def(SymbolRefAttr)
    bias = opt_prop_def(SymbolRefAttr)
    eps = prop_def(FloatAttr)

    def __init__(self, x: SSAValue, weight: str, bias: str | None, eps: float) -> None:
        """Make the operation from plain values."""
        properties = {
            "weight": symbol(weight),
            "bias": symbol(bias) if bias is not None else None,
            "eps": real(eps),
        }
        super().__init__(operands=[x], result_types=[x.type], properties=properties)


@irdl_op_definition
class RmsNormOp(_Unary):
    """x / sqrt(mean(x * x) + eps) * weight over the last axis."""

    name = "tb.rms_norm"
    weight = prop_def(SymbolRefAttr)
    eps = prop_def(FloatAttr)

    def __init__(self, x: SSAValue, weight: str, eps: float) -> None:
        """Make the operation from plain values."""
        super().__init__(operands=[x], result_types=[x.type], properties={"weight": symbol(weight), "eps": real(eps)})


@irdl_op_definition
class ActivationOp(_Unary):
    """A function of each element; `kind` is one of ACTIVATIONS."""

    name = "tb.activation"
    kind = prop_def(StringAttr)

    def __init__(self, x: SSAValue, kind: str) -> None:
        """Make the operation from plain values."""
        super().__init__(operands=[x], result_types=[x.type], properties={"kind": StringAttr(kind)})

    def verify_(self) -> None:
        """A known kind, besides the rules of all unary operations."""
        super().verify_()
        known = ", ".join(ACTIVATIONS)
        _require(self.kind.data in ACTIVATIONS, f"tb.activation: kind must be one of {known}")


@irdl_op_definition
class LinearOp(_Op):
    """x times `weight`, plus `bias`; the weight is [in, out] for layout in_out and [out, in] for out_in."""

    name = "tb.linear"
    x = operand_def(TensorType)
    out = result_def(TensorType)
    weight = prop_def(SymbolRefAttr)
    bias = opt_prop_def(SymbolRefAttr)
    layout = prop_def(StringAttr)
    traits = traits_def(Pure())
    assembly_format = _FORMAT

    def __init__(self, x: SSAValue, weight: str, bias: str | None, layout: str, type: Attribute) -> None:
        """Make the operation from plain values."""
        properties = {
            "weight": symbol(weight),
            "bias": symbol(bias) if bias is not None else None,
            "layout": StringAttr(layout),
        }
        super().__init__(operands=[x], result_types=[type], properties=properties)

    def verify_(self) -> None:
        """A known layout; operand and result differ in the last axis only."""
        _require_float_vectors(self.x, self.out)
        _require(self.layout.data in LAYOUTS, f"tb.linear: layout must be one of {', '.join(LAYOUTS)}")
        _require(
            _outer(self.x) == _outer(self.out),
            "tb.linear: operand and result may differ in the last axis only",
        )


def _outer(value: SSAValue) -> tuple[int, ...]:
    assert isinstance(value.type, TensorType)
    return value.type.get_shape()[:-1]


@irdl_op_definition
class SliceOp(_Op):
    """Elements start to start + size of the last axis."""

    name = "tb.slice"
    x = operand_def(TensorType)
    out = result_def(TensorType)
    start = prop_def(IntegerAttr)
    size = prop_def(IntegerAttr)
    traits = traits_def(Pure())
    assembly_format = _FORMAT

    def __init__(self, x: SSAValue, start: int, size: int) -> None:
        """Make the operation from plain values."""
        if not isinstance(x.type, TensorType):
            raise VerifyException(f"tb.slice: expected a tensor, not {x.type}")
        shape = [*x.type.get_shape()[:-1], size]
        super().__init__(
            operands=[x],
            result_types=[TensorType(x.type.element_type, shape)],
            properties={"start": number(start), "size": number(size)},
        )

    def verify_(self) -> None:
        """The slice lies inside the operand."""
        _require_float_vectors(self.x, self.out)
        start, size = self.start.value.data, self.size.value.data
        _require(
            start >= 0 and size > 0 and start + size <= width(self.x),
            f"tb.slice: {start} to {start + size} is outside 0 to {width(self.x)}",
        )
        _require(
            width(self.out) == size and _outer(self.x) == _outer(self.out),
            "tb.slice: the result must be the operand's type with a last axis of `size`",
        )


@irdl_op_definition
class AttentionOp(_Op):
    """softmax(scale * q·k) · v over the positions the mask allows, head by head.

    In a step q is [heads, head_dim], k and v are [kv_heads, head_dim] of this token, flat; query head h reads
    K/V head h // (heads / kv_heads); k and v join the cache of this operation before the product. In a graph
    q, k and v are [1, heads, T, head_dim], and `allowed` may hold the mask as a value until it is classified.
    """

    name = "tb.attention"
    q = operand_def(TensorType)
    k = operand_def(TensorType)
    v = operand_def(TensorType)
    allowed = opt_operand_def(TensorType)
    out = result_def(TensorType)
    heads = prop_def(IntegerAttr)
    kv_heads = prop_def(IntegerAttr)
    head_dim = prop_def(IntegerAttr)
    scale = prop_def(FloatAttr)
    mask = opt_prop_def(StringAttr)
    window = opt_prop_def(IntegerAttr)
    traits = traits_def(Pure())
    assembly_format = _FORMAT

    def __init__(
        self,
        q: SSAValue,
        k: SSAValue,
        v: SSAValue,
        heads: int,
        kv_heads: int,
        head_dim: int,
        scale: float,
        mask: str | None = None,
        window: int | None = None,
        allowed: SSAValue | None = None,
    ) -> None:
        """Make the operation from plain values."""
        super().__init__(
            operands=[q, k, v, allowed],
            result_types=[q.type],
            properties={
                "heads": number(heads),
                "kv_heads": number(kv_heads),
                "head_dim": number(head_dim),
                "scale": real(scale),
                "mask": StringAttr(mask) if mask is not None else None,
                "window": number(window) if window is not None else None,
            },
        )

    def verify_(self) -> None:
        """Head counts divide, vectors have their sizes, and the mask is a value or a known kind."""
        _require_float_vectors(self.q, self.k, self.v, self.out)
        heads, kv_heads, size = (a.value.data for a in (self.heads, self.kv_heads, self.head_dim))
        _require(
            heads > 0 and kv_heads > 0 and size > 0 and heads % kv_heads == 0,
            f"tb.attention: kv_heads = {kv_heads} must divide heads = {heads}",
        )
        _require(self.q.type == self.out.type, "tb.attention: the result must have the type of q")
        _require(self.k.type == self.v.type, "tb.attention: k and v must have one type")
        for value, count in ((self.q, heads), (self.k, kv_heads)):
            shape = (*_outer(value), width(value))
            _require(
                shape == (count * size,) or (len(shape) == 4 and (shape[1], shape[3]) == (count, size)),
                f"tb.attention: {value.type} does not hold {count} heads of {size}",
            )
        _require(
            (self.mask is None) == (self.allowed is not None),
            "tb.attention: the mask is either an operand or an attribute",
        )
        kind = self.mask.data if self.mask is not None else "causal"
        _require(kind in MASKS, f"tb.attention: mask must be one of {', '.join(MASKS)}")
        _require(
            (kind == "window") == (self.window is not None),
            "tb.attention: `window` goes with mask = window, and only with it",
        )
        _require(self.window is None or self.window.value.data > 0, "tb.attention: window must be positive")


TB = Dialect(
    "tb",
    [
        ActivationOp,
        AddOp,
        AtenOp,
        AttentionOp,
        EmbeddingOp,
        GraphOp,
        LayerNormOp,
        LinearOp,
        MulOp,
        ParameterOp,
        PositionsOp,
        RepeatOp,
        ReturnOp,
        RmsNormOp,
        ScaleOp,
        SliceOp,
        StepOp,
        YieldOp,
    ],
    [],
)


def context() -> Context:
    """A parsing context that knows the builtin and `tb` dialects, and nothing else."""
    made = Context()
    made.load_dialect(Builtin)
    made.load_dialect(TB)
    return made
