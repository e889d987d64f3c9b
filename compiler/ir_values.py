"""The operations of the `tb` dialect that compute values, on a graph's tensors and on a step's flat vectors alike."""

from __future__ import annotations

from xdsl.dialects.builtin import (
    DYNAMIC_INDEX,
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
from xdsl.ir import Attribute, SSAValue
from xdsl.irdl import (
    IRDLOperation,
    ParsePropInAttrDict,
    irdl_op_definition,
    operand_def,
    opt_operand_def,
    opt_prop_def,
    prop_def,
    result_def,
    traits_def,
)
from xdsl.traits import Pure
from xdsl.utils.exceptions import VerifyException

ACTIVATIONS = ("gelu_tanh", "gelu_erf", "relu", "silu", "tanh", "sigmoid")
"""The kinds `tb.activation` may have; gelu_tanh is GELU's tanh form, gelu_erf the exact one."""

LAYOUTS = ("in_out", "out_in")
"""How a linear weight lies in its source: [inputs, outputs] or [outputs, inputs]."""

MASKS = ("causal", "window", "none")
"""Which positions j a position i attends to: j <= i; i - window < j <= i; every j (never in a step)."""

FORMAT = "`(` operands `)` attr-dict `:` functional-type(operands, results)"
"""How most operations are written."""


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


def require(condition: bool, rule: str) -> None:
    """Raise VerifyException with the rule unless the condition holds."""
    if not condition:
        raise VerifyException(rule)


def _require_float_vectors(*values: SSAValue) -> None:
    for value in values:
        require(
            isinstance(value.type, TensorType) and value.type.element_type == f32,
            f"expected a float32 tensor, not {value.type}",
        )
        require(width(value) != DYNAMIC_INDEX, f"the last axis of {value.type} must have a fixed size")


class TbOp(IRDLOperation):
    """What all operations share: properties are written in the attribute dictionary."""

    irdl_options = (ParsePropInAttrDict(),)


@irdl_op_definition
class EmbeddingOp(TbOp):
    """Row `index + offset` of the table `weight`, [rows, D]."""

    name = "tb.embedding"
    index = operand_def(IndexType | TensorType)
    out = result_def(TensorType)
    weight = prop_def(SymbolRefAttr)
    offset = prop_def(IntegerAttr)
    traits = traits_def(Pure())
    assembly_format = FORMAT

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
        require(self.offset.value.data >= 0, "tb.embedding: offset must not be negative")


def _shape(value: SSAValue) -> tuple[int, ...]:
    assert isinstance(value.type, TensorType)
    shape = value.type.get_shape()
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


class _Binary(TbOp):
    lhs = operand_def(TensorType)
    rhs = operand_def(TensorType)
    out = result_def(TensorType)
    traits = traits_def(Pure())
    assembly_format = FORMAT

    def __init__(self, lhs: SSAValue, rhs: SSAValue, type: Attribute | None = None) -> None:
        """Make the operation from plain values."""
        super().__init__(operands=[lhs, rhs], result_types=[type or lhs.type])

    def verify_(self) -> None:
        """Both operands and the result have one shape, leading axes of size one apart."""
        _require_float_vectors(self.lhs, self.rhs, self.out)
        require(
            _shape(self.lhs) == _shape(self.rhs) == _shape(self.out),
            f"{self.name}: operands and result must have one shape",
        )


@irdl_op_definition
class AddOp(_Binary):
    """lhs + rhs, element by element."""

    name = "tb.add"


@irdl_op_definition
class MulOp(_Binary):
    """lhs * rhs, element by element."""

    name = "tb.mul"


class _Unary(TbOp):
    x = operand_def(TensorType)
    out = result_def(TensorType)
    traits = traits_def(Pure())
    assembly_format = FORMAT

    def verify_(self) -> None:
        """The result has the operand's type."""
        _require_float_vectors(self.x, self.out)
        require(self.x.type == self.out.type, f"{self.name}: the result must have the operand's type")


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
        require(self.kind.data in ACTIVATIONS, f"tb.activation: kind must be one of {known}")


@irdl_op_definition
class LinearOp(TbOp):
    """x times `weight`, plus `bias`; the weight is [in, out] for layout in_out and [out, in] for out_in."""

    name = "tb.linear"
    x = operand_def(TensorType)
    out = result_def(TensorType)
    weight = prop_def(SymbolRefAttr)
    bias = opt_prop_def(SymbolRefAttr)
    layout = prop_def(StringAttr)
    traits = traits_def(Pure())
    assembly_format = FORMAT

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
        require(self.layout.data in LAYOUTS, f"tb.linear: layout must be one of {', '.join(LAYOUTS)}")
        require(
            _outer(self.x) == _outer(self.out),
            "tb.linear: operand and result may differ in the last axis only",
        )


def _outer(value: SSAValue) -> tuple[int, ...]:
    assert isinstance(value.type, TensorType)
    return value.type.get_shape()[:-1]


@irdl_op_definition
class SliceOp(TbOp):
    """Elements start to start + size of the last axis."""

    name = "tb.slice"
    x = operand_def(TensorType)
    out = result_def(TensorType)
    start = prop_def(IntegerAttr)
    size = prop_def(IntegerAttr)
    traits = traits_def(Pure())
    assembly_format = FORMAT

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
        require(
            start >= 0 and size > 0 and start + size <= width(self.x),
            f"tb.slice: {start} to {start + size} is outside 0 to {width(self.x)}",
        )
        require(
            width(self.out) == size and _outer(self.x) == _outer(self.out),
            "tb.slice: the result must be the operand's type with a last axis of `size`",
        )


@irdl_op_definition
class AttentionOp(TbOp):
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
    assembly_format = FORMAT

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
        require(
            heads > 0 and kv_heads > 0 and size > 0 and heads % kv_heads == 0,
            f"tb.attention: kv_heads = {kv_heads} must divide heads = {heads}",
        )
        require(self.q.type == self.out.type, "tb.attention: the result must have the type of q")
        require(self.k.type == self.v.type, "tb.attention: k and v must have one type")
        for value, count in ((self.q, heads), (self.k, kv_heads)):
            shape = (*_outer(value), width(value))
            require(
                shape == (count * size,) or (len(shape) == 4 and (shape[1], shape[3]) == (count, size)),
                f"tb.attention: {value.type} does not hold {count} heads of {size}",
            )
        require(
            (self.mask is None) == (self.allowed is not None),
            "tb.attention: the mask is either an operand or an attribute",
        )
        kind = self.mask.data if self.mask is not None else "causal"
        require(kind in MASKS, f"tb.attention: mask must be one of {', '.join(MASKS)}")
        require(
            (kind == "window") == (self.window is not None),
            "tb.attention: `window` goes with mask = window, and only with it",
        )
        require(self.window is None or self.window.value.data > 0, "tb.attention: window must be positive")
