"""The `tbd` dialect: one device's share of a step, from partitioning to registers.

`tbd.program` computes one token on every device at once (SPMD): the same operations, each on its own shard. A value
is a float32 vector in the register file, `tensor<Wxf32>` with W words; an operation's `size` says how many of
them mean something. Values are either the same on every device or this device's share of a split axis; only
`tbd.gather` turns the second into the first.

A split axis goes to the devices in contiguous runs of units (attention heads, or granules of the register
alignment), `per_device` each, the last run short and filled with zeros: see `Segment`.
"""

from __future__ import annotations

from collections.abc import Sequence

from xdsl.context import Context
from xdsl.dialects.builtin import (
    ArrayAttr,
    Builtin,
    DictionaryAttr,
    FloatAttr,
    IndexType,
    IntegerAttr,
    StringAttr,
    SymbolRefAttr,
    TensorType,
    UnitAttr,
)
from xdsl.ir import Dialect, Region, SSAValue
from xdsl.irdl import (
    AttrSizedOperandSegments,
    ParsePropInAttrDict,
    irdl_op_definition,
    operand_def,
    opt_operand_def,
    opt_prop_def,
    prop_def,
    region_def,
    traits_def,
)
from xdsl.traits import IsTerminator, Pure
from xdsl.utils.exceptions import VerifyException

from typebar.compiler.device_attention import AttentionOp, RotaryOp, RotaryRowOp, ScoreBiasOp
from typebar.compiler.device_base import DeviceOp, Sized, Valued, require_indices
from typebar.compiler.device_source import SOURCE_OPS
from typebar.compiler.ir import ACTIVATIONS, TB, number, real, symbol, vector, width
from typebar.compiler.segments import Segment

__all__ = [
    "TBD",
    "ActivationOp",
    "AddOp",
    "AttentionOp",
    "BiasOp",
    "CopyOp",
    "GatherOp",
    "HeadOp",
    "LastOp",
    "LayerNormOp",
    "LookupOp",
    "MatrixOp",
    "MulOp",
    "ParamOp",
    "ProgramOp",
    "RmsNormOp",
    "RotaryOp",
    "RotaryRowOp",
    "ScaleOp",
    "ScoreBiasOp",
    "Segment",
    "SumOp",
    "context",
]


def _optional(name: str) -> str:
    """An operand that may be missing, in the format of an operation with several such."""
    return f"(`{name}` ${name}^ `:` type(${name}))?"


def _segments(attribute: ArrayAttr) -> list[Segment]:
    return [Segment.parse(item) for item in attribute.data if isinstance(item, DictionaryAttr)]


@irdl_op_definition
class ProgramOp(DeviceOp):
    """One token on each of `devices` devices; block arguments (token, position); ends with `tbd.head`.

    `allocate` sets `step`: places in the register file start at multiples of so many words. A prompt goes through in
    blocks of `groups` times `rows` tokens, with places of their own (`rows_step`), if these are set; `rows_last` is
    where rows that the devices have dealt among them come together at the prompt's end.
    """

    name = "tbd.program"
    vocab = prop_def(IntegerAttr)
    context = prop_def(IntegerAttr)
    devices = prop_def(IntegerAttr)
    align = prop_def(IntegerAttr)
    step = opt_prop_def(IntegerAttr)
    rows = opt_prop_def(IntegerAttr)
    groups = opt_prop_def(IntegerAttr)
    rows_step = opt_prop_def(IntegerAttr)
    rows_last = opt_prop_def(IntegerAttr)
    body = region_def("single_block")
    assembly_format = "attr-dict-with-keyword $body"

    def __init__(self, vocab: int, context: int, devices: int, align: int, body: Region) -> None:
        """Make the operation from plain values."""
        properties = {
            "vocab": number(vocab),
            "context": number(context),
            "devices": number(devices),
            "align": number(align),
        }
        super().__init__(properties=properties, regions=[body])

    def verify_(self) -> None:
        """Two index arguments and a `tbd.head` at the end."""
        require_indices(self.body.block, self.name)
        if not isinstance(self.body.block.last_op, HeadOp):
            raise VerifyException("the last operation of tbd.program must be tbd.head")


@irdl_op_definition
class LookupOp(Valued):
    """Row `index + offset` of an embedding table, the same table on every device."""

    name = "tbd.lookup"
    index = operand_def(IndexType)
    table = prop_def(SymbolRefAttr)
    offset = prop_def(IntegerAttr)

    def __init__(self, index: SSAValue, table: str, offset: int, size: int) -> None:
        """Make the operation from plain values."""
        properties = {"table": symbol(table), "offset": number(offset)}
        super().__init__(operands=[index], result_types=[vector(size)], properties=properties)


@irdl_op_definition
class ParamOp(Valued):
    """A parameter vector that every device holds whole, loaded from memory."""

    name = "tbd.param"
    symbol_ = prop_def(SymbolRefAttr, prop_name="symbol")

    assembly_format = "attr-dict `:` type($out)"

    def __init__(self, name: str, size: int) -> None:
        """Make the operation from plain values."""
        super().__init__(result_types=[vector(size)], properties={"symbol": symbol(name)})


@irdl_op_definition
class BiasOp(Valued):
    """This device's share of the biases of some segments, or with `scales` of their scales, loaded from memory."""

    name = "tbd.bias"
    segments = prop_def(ArrayAttr[DictionaryAttr])
    scales = opt_prop_def(UnitAttr)

    assembly_format = "attr-dict `:` type($out)"

    def __init__(self, segments: Sequence[Segment], scales: bool = False) -> None:
        """Make the operation from plain values."""
        words = sum(item.words for item in segments)
        properties = {
            "segments": ArrayAttr([item.attribute() for item in segments]),
            "scales": UnitAttr() if scales else None,
        }
        super().__init__(result_types=[vector(words)], properties=properties)

    @property
    def pieces(self) -> list[Segment]:
        """The segments, parsed."""
        return _segments(self.segments)


class _Product(DeviceOp):
    """x (the same on every device) times this device's columns of some weights.

    `k` words of x take part. Source row i of the weights meets word (i // row_unit) * row_pad + i % row_unit of x.
    """

    x = operand_def(TensorType)
    segments = prop_def(ArrayAttr[DictionaryAttr])
    k = prop_def(IntegerAttr)
    row_unit = prop_def(IntegerAttr)
    row_pad = prop_def(IntegerAttr)

    @property
    def pieces(self) -> list[Segment]:
        """The segments, parsed."""
        return _segments(self.segments)

    @property
    def int8(self) -> bool:
        """Whether the weights are int8, with a scale for each column."""
        return self.pieces[0].scale is not None

    @property
    def words(self) -> int:
        """Columns on one device, with padding."""
        return sum(item.words for item in self.pieces)

    def verify_(self) -> None:
        """k fits x, the segments parse."""
        k, unit, pad = (int(a.value.data) for a in (self.k, self.row_unit, self.row_pad))
        if not 0 < k <= width(self.x) or not 0 < unit <= pad:
            raise VerifyException(f"{self.name}: k = {k} (rows in units of {unit} in {pad}) does not fit {self.x.type}")
        if len({item.scale is None for item in self.pieces}) != 1:
            raise VerifyException(f"{self.name}: weights are all int8 or none")


def _product(segments: Sequence[Segment], k: int, row_unit: int, row_pad: int) -> dict[str, object]:
    return {
        "segments": ArrayAttr([item.attribute() for item in segments]),
        "k": number(k),
        "row_unit": number(row_unit),
        "row_pad": number(row_pad),
    }


@irdl_op_definition
class MatrixOp(_Product, Valued):
    """One matrix instruction: product, then the scales of int8 weights, the bias and the activation if given.

    With `by_rows`, x is this device's share of a split axis, k words of it, and the weights have the rows that meet it:
    the product is one of as many addends as there are devices. With `first_row` it takes k rows of the weights from
    that one on; it goes on from the sums in `addend`, in whose place its result lies, and only the last such has an
    epilogue.
    """

    name = "tbd.matrix"
    irdl_options = (AttrSizedOperandSegments(as_property=True), ParsePropInAttrDict())  # type: ignore[assignment]
    x = operand_def(TensorType)
    scale = opt_operand_def(TensorType)
    bias = opt_operand_def(TensorType)
    addend = opt_operand_def(TensorType)
    activation = opt_prop_def(StringAttr)
    by_rows = opt_prop_def(UnitAttr)
    first_row = opt_prop_def(IntegerAttr)
    traits = traits_def(Pure())
    assembly_format = (
        f"`(` $x `:` type($x) {_optional('scale')} {_optional('bias')} {_optional('addend')} `)`"
        " attr-dict `->` type($out)"
    )

    def __init__(
        self,
        x: SSAValue,
        segments: Sequence[Segment],
        k: int,
        row_unit: int,
        row_pad: int,
        scale: SSAValue | None = None,
        bias: SSAValue | None = None,
        activation: str | None = None,
        by_rows: bool = False,
        first_row: int | None = None,
        addend: SSAValue | None = None,
    ) -> None:
        """Make the operation from plain values."""
        properties = _product(segments, k, row_unit, row_pad)
        properties["first_row"] = None if first_row is None else number(first_row)
        properties["activation"] = None if activation is None else StringAttr(activation)
        properties["by_rows"] = UnitAttr() if by_rows else None
        words = sum(item.words for item in segments)
        super().__init__(operands=[x, scale, bias, addend], result_types=[vector(words)], properties=properties)  # type: ignore[arg-type]

    def verify_(self) -> None:
        """The product's rules; scale, bias, addend and result have the segments' width."""
        super().verify_()
        vectors = (self.out, self.scale, self.bias, self.addend)
        if any(value is not None and width(value) != self.words for value in vectors):
            raise VerifyException(f"tbd.matrix: result, scale, bias and addend must have {self.words} words")
        if self.addend is not None and self.first_row is None:
            raise VerifyException("tbd.matrix: what goes on from an addend needs the first_row of its weights")
        if (self.scale is not None) != self.int8 and (self.scale is not None or self.first_row is None):
            raise VerifyException("tbd.matrix: int8 weights, and only they, need scales")


@irdl_op_definition
class HeadOp(_Product):
    """The last product: logits over the vocabulary, their argmax over all devices, and the end of the token.

    `steps` follow the product and its bias: a number multiplies, a name is an activation.
    """

    name = "tbd.head"
    x = operand_def(TensorType)
    scratch = opt_prop_def(IntegerAttr)
    chunk = opt_prop_def(IntegerAttr)
    steps = opt_prop_def(ArrayAttr)
    traits = traits_def(IsTerminator())
    assembly_format = "`(` $x `)` attr-dict `:` type($x)"

    def __init__(
        self, x: SSAValue, segment: Segment, k: int, row_unit: int, row_pad: int, steps: Sequence[float | str] = ()
    ) -> None:
        """Make the operation from plain values."""
        properties = _product([segment], k, row_unit, row_pad)
        if steps:
            properties["steps"] = ArrayAttr([StringAttr(s) if isinstance(s, str) else real(s) for s in steps])
        super().__init__(operands=[x], properties=properties)  # type: ignore[arg-type]


@irdl_op_definition
class GatherOp(Valued):
    """All devices' shares in rank order: the same value on every device."""

    name = "tbd.gather"
    x = operand_def(TensorType)

    def __init__(self, x: SSAValue, devices: int) -> None:
        """Make the operation from plain values."""
        super().__init__(operands=[x], result_types=[vector(width(x) * devices)])


@irdl_op_definition
class SumOp(Valued):
    """The sum of the parts of equal width that lie side by side in x, added in order from the first on."""

    name = "tbd.sum"
    x = operand_def(TensorType)

    def __init__(self, x: SSAValue, parts: int) -> None:
        """Make the operation from plain values."""
        super().__init__(operands=[x], result_types=[vector(width(x) // parts)])

    @property
    def parts(self) -> int:
        """How many are added."""
        return width(self.x) // width(self.out)

    def verify_(self) -> None:
        """There are whole parts."""
        if width(self.x) % width(self.out):
            raise VerifyException(f"tbd.sum: {self.x.type} has no whole parts of {width(self.out)} words")


@irdl_op_definition
class LayerNormOp(Sized):
    """(x - mean) / sqrt(variance + eps) * weight + bias over `size` elements."""

    name = "tbd.layer_norm"
    irdl_options = (AttrSizedOperandSegments(as_property=True), ParsePropInAttrDict())  # type: ignore[assignment]
    x = operand_def(TensorType)
    weight = opt_operand_def(TensorType)
    bias = opt_operand_def(TensorType)
    eps = prop_def(FloatAttr)
    assembly_format = f"`(` $x `:` type($x) {_optional('weight')} {_optional('bias')} `)` attr-dict `->` type($out)"

    def __init__(self, x: SSAValue, weight: SSAValue | None, bias: SSAValue | None, eps: float, size: int) -> None:
        """Make the operation from plain values."""
        properties = {"eps": real(eps), "size": number(size)}
        super().__init__(operands=[x, weight, bias], result_types=[vector(size)], properties=properties)


@irdl_op_definition
class RmsNormOp(Sized):
    """x / sqrt(mean(x * x) + eps) * weight over `size` elements."""

    name = "tbd.rms_norm"
    x = operand_def(TensorType)
    weight = opt_operand_def(TensorType)
    eps = prop_def(FloatAttr)

    def __init__(self, x: SSAValue, weight: SSAValue | None, eps: float, size: int) -> None:
        """Make the operation from plain values."""
        properties = {"eps": real(eps), "size": number(size)}
        super().__init__(operands=[x, weight], result_types=[vector(size)], properties=properties)


class _Pair(Sized):
    lhs = operand_def(TensorType)
    rhs = operand_def(TensorType)

    def __init__(self, lhs: SSAValue, rhs: SSAValue, size: int) -> None:
        """Make the operation from plain values."""
        super().__init__(operands=[lhs, rhs], result_types=[vector(size)], properties={"size": number(size)})


@irdl_op_definition
class AddOp(_Pair):
    """lhs + rhs."""

    name = "tbd.add"


@irdl_op_definition
class MulOp(_Pair):
    """lhs * rhs."""

    name = "tbd.mul"


@irdl_op_definition
class LastOp(Sized):
    """On the last device x, plus the bias if there is one; zeros on all others.

    As the bias of a product by rows it is the last device's addend to the sum of all.
    """

    name = "tbd.last"
    x = operand_def(TensorType)
    bias = opt_operand_def(TensorType)

    def __init__(self, x: SSAValue, bias: SSAValue | None, size: int) -> None:
        """Make the operation from plain values."""
        super().__init__(operands=[x, bias], result_types=[vector(size)], properties={"size": number(size)})


@irdl_op_definition
class ScaleOp(Sized):
    """x * value."""

    name = "tbd.scale"
    x = operand_def(TensorType)
    value = prop_def(FloatAttr)

    def __init__(self, x: SSAValue, value: float, size: int) -> None:
        """Make the operation from plain values."""
        properties = {"value": real(value), "size": number(size)}
        super().__init__(operands=[x], result_types=[vector(size)], properties=properties)


@irdl_op_definition
class CopyOp(Sized):
    """The `size` words of x from word `start` on."""

    name = "tbd.copy"
    x = operand_def(TensorType)
    start = prop_def(IntegerAttr)

    def __init__(self, x: SSAValue, start: int, size: int) -> None:
        """Make the operation from plain values."""
        properties = {"start": number(start), "size": number(size)}
        super().__init__(operands=[x], result_types=[vector(size)], properties=properties)

    def verify_(self) -> None:
        """The words lie inside x."""
        if not 0 <= self.start.value.data <= width(self.x) - self.count:
            raise VerifyException(f"tbd.copy: {self.count} words from {self.start.value.data} leave {self.x.type}")


@irdl_op_definition
class ActivationOp(Sized):
    """A unary function of each element."""

    name = "tbd.activation"
    x = operand_def(TensorType)
    kind = prop_def(StringAttr)

    def __init__(self, x: SSAValue, kind: str, size: int) -> None:
        """Make the operation from plain values."""
        properties = {"kind": StringAttr(kind), "size": number(size)}
        super().__init__(operands=[x], result_types=[vector(size)], properties=properties)

    def verify_(self) -> None:
        """A known kind."""
        if self.kind.data not in ACTIVATIONS:
            raise VerifyException(f"tbd.activation: kind must be one of {', '.join(ACTIVATIONS)}")


TBD = Dialect(
    "tbd",
    [
        ActivationOp,
        AddOp,
        AttentionOp,
        BiasOp,
        CopyOp,
        GatherOp,
        HeadOp,
        LastOp,
        LayerNormOp,
        LookupOp,
        MatrixOp,
        MulOp,
        ParamOp,
        ProgramOp,
        RmsNormOp,
        RotaryOp,
        RotaryRowOp,
        ScaleOp,
        ScoreBiasOp,
        SumOp,
        *SOURCE_OPS,
    ],
    [],
)


def context() -> Context:
    """A parsing context that knows the builtin, `tb` and `tbd` dialects."""
    made = Context()
    for dialect in (Builtin, TB, TBD):
        made.load_dialect(dialect)
    return made
