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


def require_float_vectors(*values: SSAValue) -> None:
    """Raise VerifyException unless the values are float32 tensors whose last axis has a fixed size."""
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
        require_float_vectors(self.out)
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
        require_float_vectors(self.lhs, self.rhs, self.out)
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
        require_float_vectors(self.x, self.out)
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
    weight = opt_prop_def(SymbolRefAttr)
    bias = opt_prop_def(SymbolRefAttr)
    eps = prop_def(FloatAttr)

    def __init__(self, x: SSAValue, weight: str | None, bias: str | None, eps: float) -> None:
        """Make the operation from plain values."""
        properties = {
            "weight": symbol(weight) if weight is not None else None,
            "bias": symbol(bias) if bias is not None else None,
            "eps": real(eps),
        }
        super().__init__(operands=[x], result_types=[x.type], properties=properties)


@irdl_op_definition
class RmsNormOp(_Unary):
    """x / sqrt(mean(x * x) + eps) * weight over the last axis."""

    name = "tb.rms_norm"
    weight = opt_prop_def(SymbolRefAttr)
    eps = prop_def(FloatAttr)

    def __init__(self, x: SSAValue, weight: str | None, eps: float) -> None:
        """Make the operation from plain values."""
        properties = {"weight": symbol(weight) if weight is not None else None, "eps": real(eps)}
        super().__init__(operands=[x], result_types=[x.type], properties=properties)


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
    """x times `weight`, plus `bias`; the weight is [in, out] for layout in_out and [out, in] for out_in.

    With `scale` the weight is int8 and stays so in memory: each product is multiplied by the float32 scale of its
    column, [out], before the bias is added.
    """

    name = "tb.linear"
    x = operand_def(TensorType)
    out = result_def(TensorType)
    weight = prop_def(SymbolRefAttr)
    bias = opt_prop_def(SymbolRefAttr)
    scale = opt_prop_def(SymbolRefAttr)
    layout = prop_def(StringAttr)
    traits = traits_def(Pure())
    assembly_format = FORMAT

    def __init__(
        self, x: SSAValue, weight: str, bias: str | None, layout: str, type: Attribute, scale: str | None = None
    ) -> None:
        """Make the operation from plain values."""
        properties = {
            "weight": symbol(weight),
            "bias": symbol(bias) if bias is not None else None,
            "scale": symbol(scale) if scale is not None else None,
            "layout": StringAttr(layout),
        }
        super().__init__(operands=[x], result_types=[type], properties=properties)

    def verify_(self) -> None:
        """A known layout; operand and result differ in the last axis only."""
        require_float_vectors(self.x, self.out)
        require(self.layout.data in LAYOUTS, f"tb.linear: layout must be one of {', '.join(LAYOUTS)}")
        require(
            outer(self.x) == outer(self.out),
            "tb.linear: operand and result may differ in the last axis only",
        )


def outer(value: SSAValue) -> tuple[int, ...]:
    """The sizes of all axes but the last."""
    assert isinstance(value.type, TensorType)
    return value.type.get_shape()[:-1]


@irdl_op_definition
class SliceOp(TbOp):
    """`size` elements of the last axis from `start` on: a run, or runs of `run` elements at every `stride`.

    Element i of the result is element start + i // run * stride + i % run; without `run` that is start + i.
    """

    name = "tb.slice"
    x = operand_def(TensorType)
    out = result_def(TensorType)
    start = prop_def(IntegerAttr)
    size = prop_def(IntegerAttr)
    run = opt_prop_def(IntegerAttr)
    stride = opt_prop_def(IntegerAttr)
    traits = traits_def(Pure())
    assembly_format = FORMAT

    def __init__(self, x: SSAValue, start: int, size: int, run: int | None = None, stride: int | None = None) -> None:
        """Make the operation from plain values."""
        if not isinstance(x.type, TensorType):
            raise VerifyException(f"tb.slice: expected a tensor, not {x.type}")
        shape = [*x.type.get_shape()[:-1], size]
        super().__init__(
            operands=[x],
            result_types=[TensorType(x.type.element_type, shape)],
            properties={
                "start": number(start),
                "size": number(size),
                "run": None if run is None else number(run),
                "stride": None if stride is None else number(stride),
            },
        )

    @property
    def runs(self) -> tuple[int, int]:
        """(run, stride); one run of the whole size where the properties are absent."""
        if self.run is None or self.stride is None:
            return self.size.value.data, self.size.value.data
        return self.run.value.data, self.stride.value.data

    def verify_(self) -> None:
        """The slice lies inside the operand."""
        require_float_vectors(self.x, self.out)
        require((self.run is None) == (self.stride is None), "tb.slice: `run` goes with `stride`, and only with it")
        start, size = self.start.value.data, self.size.value.data
        require(start >= 0 and size > 0, f"tb.slice: start = {start} and size = {size} are no slice")
        run, stride = self.runs
        require(0 < run <= stride and size % run == 0, f"tb.slice: runs of {run} every {stride} do not make {size}")
        end = start + (size // run - 1) * stride + run
        require(end <= width(self.x), f"tb.slice: {start} to {end} is outside 0 to {width(self.x)}")
        require(
            width(self.out) == size and outer(self.x) == outer(self.out),
            "tb.slice: the result must be the operand's type with a last axis of `size`",
        )
