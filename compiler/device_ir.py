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
from dataclasses import dataclass

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
)
from xdsl.ir import Dialect, Region, SSAValue
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
)
from xdsl.traits import IsTerminator, Pure
from xdsl.utils.exceptions import VerifyException

from typebar.compiler.ir import ACTIVATIONS, LAYOUTS, TB, number, real, symbol, vector, width

_FORMAT = "`(` operands `)` attr-dict `:` functional-type(operands, results)"


@dataclass(frozen=True)
class Segment:
    """Columns `start` to `start + size` of a linear weight, as they are split over the devices.

    Units of `unit` columns take `pad` words each; device r holds units r * per_device and following, `per_device` of
    them, those beyond the last one being zeros.
    """

    weight: str
    layout: str
    bias: str | None
    start: int
    size: int
    unit: int
    pad: int
    per_device: int

    @property
    def units(self) -> int:
        """Units in all, on all devices."""
        return -(-self.size // self.unit)

    @property
    def words(self) -> int:
        """Words of this segment on one device."""
        return self.per_device * self.pad

    def columns(self, rank: int) -> list[tuple[int, int, int]]:
        """(word in the segment, source column, columns) of each unit that device `rank` holds."""
        runs = []
        for index in range(self.per_device):
            unit = rank * self.per_device + index
            first = unit * self.unit
            if first < self.size:
                runs.append((index * self.pad, self.start + first, min(self.unit, self.size - first)))
        return runs

    def attribute(self) -> DictionaryAttr:
        """The segment as an attribute."""
        values = {
            "weight": symbol(self.weight),
            "layout": StringAttr(self.layout),
            "start": number(self.start),
            "size": number(self.size),
            "unit": number(self.unit),
            "pad": number(self.pad),
            "per_device": number(self.per_device),
        }
        if self.bias is not None:
            values["bias"] = symbol(self.bias)
        return DictionaryAttr(values)

    @staticmethod
    def parse(data: DictionaryAttr) -> Segment:
        """The segment an attribute describes.

        Raises:
            VerifyException: a key is missing or of the wrong kind, or a number is out of range.
        """
        try:
            bias = data.data.get("bias")
            names = ("start", "size", "unit", "pad", "per_device")
            numbers = [int(data.data[name].value.data) for name in names]  # type: ignore[attr-defined]
            made = Segment(
                data.data["weight"].string_value(),  # type: ignore[attr-defined]
                data.data["layout"].data,  # type: ignore[attr-defined]
                None if bias is None else bias.string_value(),  # type: ignore[attr-defined]
                *numbers,
            )
        except (KeyError, AttributeError) as error:
            raise VerifyException(f"a segment needs weight, layout and {', '.join(names)}: {error}") from None
        fits = made.start >= 0 < made.size and 0 < made.unit <= made.pad and made.per_device > 0
        if made.layout not in LAYOUTS or not fits:
            raise VerifyException(f"a segment is out of range: {made}")
        return made


def _segments(attribute: ArrayAttr) -> list[Segment]:
    return [Segment.parse(item) for item in attribute.data if isinstance(item, DictionaryAttr)]


class _Op(IRDLOperation):
    """What all operations share: `at` and `scratch` are register-file addresses in words, set by `allocate`."""

    irdl_options = (ParsePropInAttrDict(),)


class _Valued(_Op):
    out = result_def(TensorType)
    at = opt_prop_def(IntegerAttr)
    scratch = opt_prop_def(IntegerAttr)
    traits = traits_def(Pure())
    assembly_format = _FORMAT

    @property
    def address(self) -> int:
        """The result's word address; only after `allocate`."""
        if self.at is None:
            raise VerifyException(f"{self.name} has no address: run the pass allocate first")
        return int(self.at.value.data)


@irdl_op_definition
class ProgramOp(_Op):
    """One token on each of `devices` devices; block arguments (token, position); ends with `tbd.head`.

    `allocate` sets `step`: places in the register file start at multiples of so many words.
    """

    name = "tbd.program"
    vocab = prop_def(IntegerAttr)
    context = prop_def(IntegerAttr)
    devices = prop_def(IntegerAttr)
    align = prop_def(IntegerAttr)
    step = opt_prop_def(IntegerAttr)
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
        block = self.body.block
        if len(block.args) != 2 or not all(isinstance(a.type, IndexType) for a in block.args):
            raise VerifyException("tbd.program takes two index arguments, token and position")
        if not isinstance(block.last_op, HeadOp):
            raise VerifyException("the last operation of tbd.program must be tbd.head")


@irdl_op_definition
class LookupOp(_Valued):
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
class ParamOp(_Valued):
    """A parameter vector that every device holds whole, loaded from memory."""

    name = "tbd.param"
    symbol_ = prop_def(SymbolRefAttr, prop_name="symbol")

    assembly_format = "attr-dict `:` type($out)"

    def __init__(self, name: str, size: int) -> None:
        """Make the operation from plain values."""
        super().__init__(result_types=[vector(size)], properties={"symbol": symbol(name)})


@irdl_op_definition
class BiasOp(_Valued):
    """This device's share of the biases of some segments, loaded from memory."""

    name = "tbd.bias"
    segments = prop_def(ArrayAttr[DictionaryAttr])

    assembly_format = "attr-dict `:` type($out)"

    def __init__(self, segments: Sequence[Segment]) -> None:
        """Make the operation from plain values."""
        words = sum(item.words for item in segments)
        properties = {"segments": ArrayAttr([item.attribute() for item in segments])}
        super().__init__(result_types=[vector(words)], properties=properties)

    @property
    def pieces(self) -> list[Segment]:
        """The segments, parsed."""
        return _segments(self.segments)


class _Product(_Op):
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
    def words(self) -> int:
        """Columns on one device, with padding."""
        return sum(item.words for item in self.pieces)

    def verify_(self) -> None:
        """k fits x, the segments parse."""
        k, unit, pad = (int(a.value.data) for a in (self.k, self.row_unit, self.row_pad))
        if not 0 < k <= width(self.x) or not 0 < unit <= pad:
            raise VerifyException(f"{self.name}: k = {k} (rows in units of {unit} in {pad}) does not fit {self.x.type}")
        _segments(self.segments)


def _product(segments: Sequence[Segment], k: int, row_unit: int, row_pad: int) -> dict[str, object]:
    return {
        "segments": ArrayAttr([item.attribute() for item in segments]),
        "k": number(k),
        "row_unit": number(row_unit),
        "row_pad": number(row_pad),
    }


@irdl_op_definition
class MatrixOp(_Product, _Valued):
    """One matrix instruction: product, then the bias and the activation if given."""

    name = "tbd.matrix"
    x = operand_def(TensorType)
    bias = opt_operand_def(TensorType)
    activation = opt_prop_def(StringAttr)
    traits = traits_def(Pure())
    assembly_format = _FORMAT

    def __init__(
        self,
        x: SSAValue,
        segments: Sequence[Segment],
        k: int,
        row_unit: int,
        row_pad: int,
        bias: SSAValue | None = None,
        activation: str | None = None,
    ) -> None:
        """Make the operation from plain values."""
        properties = _product(segments, k, row_unit, row_pad)
        properties["activation"] = None if activation is None else StringAttr(activation)
        words = sum(item.words for item in segments)
        super().__init__(operands=[x, bias], result_types=[vector(words)], properties=properties)  # type: ignore[arg-type]

    def verify_(self) -> None:
        """The product's rules; bias and result have the segments' width."""
        super().verify_()
        if width(self.out) != self.words or (self.bias is not None and width(self.bias) != self.words):
            raise VerifyException(f"tbd.matrix: result and bias must have {self.words} words")


@irdl_op_definition
class HeadOp(_Product):
    """The last product: logits over the vocabulary, their argmax over all devices, and the end of the token."""

    name = "tbd.head"
    x = operand_def(TensorType)
    scratch = opt_prop_def(IntegerAttr)
    chunk = opt_prop_def(IntegerAttr)
    traits = traits_def(IsTerminator())
    assembly_format = "`(` $x `)` attr-dict `:` type($x)"

    def __init__(self, x: SSAValue, segment: Segment, k: int, row_unit: int, row_pad: int) -> None:
        """Make the operation from plain values."""
        super().__init__(operands=[x], properties=_product([segment], k, row_unit, row_pad))  # type: ignore[arg-type]


@irdl_op_definition
class GatherOp(_Valued):
    """All devices' shares in rank order: the same value on every device."""

    name = "tbd.gather"
    x = operand_def(TensorType)

    def __init__(self, x: SSAValue, devices: int) -> None:
        """Make the operation from plain values."""
        super().__init__(operands=[x], result_types=[vector(width(x) * devices)])


class _Sized(_Valued):
    size = prop_def(IntegerAttr)

    @property
    def count(self) -> int:
        """Elements computed."""
        return int(self.size.value.data)


@irdl_op_definition
class LayerNormOp(_Sized):
    """(x - mean) / sqrt(variance + eps) * weight + bias over `size` elements."""

    name = "tbd.layer_norm"
    x = operand_def(TensorType)
    weight = operand_def(TensorType)
    bias = opt_operand_def(TensorType)
    eps = prop_def(FloatAttr)

    def __init__(self, x: SSAValue, weight: SSAValue, bias: SSAValue | None, eps: float, size: int) -> None:
        """Make the operation from plain values."""
        properties = {"eps": real(eps), "size": number(size)}
        super().__init__(operands=[x, weight, bias], result_types=[vector(size)], properties=properties)


@irdl_op_definition
class RmsNormOp(_Sized):
    """x / sqrt(mean(x * x) + eps) * weight over `size` elements."""

    name = "tbd.rms_norm"
    x = operand_def(TensorType)
    weight = operand_def(TensorType)
    eps = prop_def(FloatAttr)

    def __init__(self, x: SSAValue, weight: SSAValue, eps: float, size: int) -> None:
        """Make the operation from plain values."""
        properties = {"eps": real(eps), "size": number(size)}
        super().__init__(operands=[x, weight], result_types=[vector(size)], properties=properties)


class _Pair(_Sized):
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
class ScaleOp(_Sized):
    """x * value."""

    name = "tbd.scale"
    x = operand_def(TensorType)
    value = prop_def(FloatAttr)

    def __init__(self, x: SSAValue, value: float, size: int) -> None:
        """Make the operation from plain values."""
        properties = {"value": real(value), "size": number(size)}
        super().__init__(operands=[x], result_types=[vector(size)], properties=properties)


@irdl_op_definition
class ActivationOp(_Sized):
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


@irdl_op_definition
class AttentionOp(_Valued):
    """Causal attention of this device's heads over the cache and this token.

    `qkv` holds `heads` queries, then keys, then values, `pad` words each (`head_dim` of them used).
    """

    name = "tbd.attention"
    qkv = operand_def(TensorType)
    heads = prop_def(IntegerAttr)
    head_dim = prop_def(IntegerAttr)
    pad = prop_def(IntegerAttr)
    scale = prop_def(FloatAttr)

    def __init__(self, qkv: SSAValue, heads: int, head_dim: int, pad: int, scale: float) -> None:
        """Make the operation from plain values."""
        properties = {
            "heads": number(heads),
            "head_dim": number(head_dim),
            "pad": number(pad),
            "scale": real(scale),
        }
        super().__init__(operands=[qkv], result_types=[vector(heads * pad)], properties=properties)

    def verify_(self) -> None:
        """qkv holds three times the heads."""
        heads, size, pad = (int(a.value.data) for a in (self.heads, self.head_dim, self.pad))
        if not 0 < size <= pad or heads <= 0 or width(self.qkv) != 3 * heads * pad:
            raise VerifyException(f"tbd.attention: {self.qkv.type} does not hold q, k and v of {heads} heads of {pad}")


TBD = Dialect(
    "tbd",
    [
        ActivationOp,
        AddOp,
        AttentionOp,
        BiasOp,
        GatherOp,
        HeadOp,
        LayerNormOp,
        LookupOp,
        MatrixOp,
        MulOp,
        ParamOp,
        ProgramOp,
        RmsNormOp,
        ScaleOp,
    ],
    [],
)


def context() -> Context:
    """A parsing context that knows the builtin, `tb` and `tbd` dialects."""
    made = Context()
    for dialect in (Builtin, TB, TBD):
        made.load_dialect(dialect)
    return made
