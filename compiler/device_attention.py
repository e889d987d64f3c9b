"""The `tbd` dialect's operations that look at positions: attention, rotary positions, and the rows of tables they read.

In registers a query, key or value head takes `pad` words. `depth` of a query's or key's words take part in a score;
those that hold no element are zeros in both.
"""

from __future__ import annotations

from xdsl.dialects.builtin import FloatAttr, IndexType, IntegerAttr, StringAttr, SymbolRefAttr, TensorType, UnitAttr
from xdsl.ir import SSAValue
from xdsl.irdl import irdl_op_definition, operand_def, opt_operand_def, opt_prop_def, prop_def, traits_def
from xdsl.traits import Pure
from xdsl.utils.exceptions import VerifyException

from typebar.compiler.device_base import FORMAT, Valued
from typebar.compiler.ir_attention import BIASES
from typebar.compiler.ir_values import number, real, symbol, vector, width


@irdl_op_definition
class AttentionOp(Valued):
    """Attention of this device's heads over the cache and this token: causal, or over the last `window` positions.

    q holds `heads` queries from word `q_at` on, k and v `kv_heads` heads from `k_at` and `v_at`; query head h reads
    K/V head h // (heads / kv_heads). `bias` is added to the scores: `planes` rows of a word for each position, one for
    each head or one for all. K and V are stored as `kv_format`, int8, or as tables are.
    """

    name = "tbd.attention"
    q = operand_def(TensorType)
    k = operand_def(TensorType)
    v = operand_def(TensorType)
    bias = opt_operand_def(TensorType)
    q_at = prop_def(IntegerAttr)
    k_at = prop_def(IntegerAttr)
    v_at = prop_def(IntegerAttr)
    heads = prop_def(IntegerAttr)
    kv_heads = prop_def(IntegerAttr)
    head_dim = prop_def(IntegerAttr)
    depth = prop_def(IntegerAttr)
    pad = prop_def(IntegerAttr)
    scale = prop_def(FloatAttr)
    kv_words = prop_def(IntegerAttr)
    window = opt_prop_def(IntegerAttr)
    planes = opt_prop_def(IntegerAttr)
    kv_format = opt_prop_def(StringAttr)
    traits = traits_def(Pure())
    assembly_format = FORMAT

    def __init__(
        self,
        places: tuple[tuple[SSAValue, int], tuple[SSAValue, int], tuple[SSAValue, int]],
        heads: int,
        kv_heads: int,
        head_dim: int,
        depth: int,
        pad: int,
        scale: float,
        kv_words: int,
        window: int | None = None,
        bias: tuple[SSAValue, int] | None = None,
        kv_format: str | None = None,
    ) -> None:
        """Make the operation from plain values; `places` says where q, k and v begin, `bias` has its planes.

        `kv_words` is the number of elements that all devices together add to their caches.
        """
        numbers = {
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "depth": depth,
            "pad": pad,
            "kv_words": kv_words,
        }
        numbers |= {name: at for name, (_, at) in zip(("q_at", "k_at", "v_at"), places, strict=True)}
        properties = {name: number(value) for name, value in numbers.items()}
        properties["window"] = None if window is None else number(window)  # type: ignore[assignment]
        properties["planes"] = None if bias is None else number(bias[1])  # type: ignore[assignment]
        properties["kv_format"] = None if kv_format is None else StringAttr(kv_format)  # type: ignore[assignment]
        super().__init__(
            operands=[*(value for value, _ in places), None if bias is None else bias[0]],
            result_types=[vector(heads * pad)],
            properties=properties | {"scale": real(scale)},
        )

    @property
    def group(self) -> int:
        """Query heads of each K/V head."""
        return int(self.heads.value.data) // int(self.kv_heads.value.data)

    def verify_(self) -> None:
        """Heads divide, and lie inside their operands."""
        heads, kv_heads, size, depth, pad = (
            int(a.value.data) for a in (self.heads, self.kv_heads, self.head_dim, self.depth, self.pad)
        )
        if heads <= 0 or kv_heads <= 0 or heads % kv_heads or not 0 < size <= depth <= pad:
            raise VerifyException(f"tbd.attention: {heads} heads on {kv_heads} of {size} ({depth}) in {pad} words")
        for value, at, count in (
            (self.q, self.q_at, heads),
            (self.k, self.k_at, kv_heads),
            (self.v, self.v_at, kv_heads),
        ):
            if at.value.data + count * pad > width(value):
                raise VerifyException(f"tbd.attention: {value.type} does not hold {count} heads of {pad}")
        planes = 0 if self.planes is None else self.planes.value.data
        if (self.bias is None) != (planes == 0) or planes not in (0, 1, heads):
            raise VerifyException(f"tbd.attention: {planes} rows of score biases for {heads} heads")


@irdl_op_definition
class ScoreBiasOp(Valued):
    """This token's rows of a table of score biases, one for each local head or one for all: `context` words each.

    Word j of a row is the bias of position j; only those that attention sees are loaded. `kind` is `tb.attention`'s
    in a step, or with `both` in an encoder, where positions after this one count too; `planes` of `heads` rows are this
    device's, the ones from rank * planes on.
    """

    name = "tbd.score_bias"
    position = operand_def(IndexType)
    table = prop_def(SymbolRefAttr)
    kind = prop_def(StringAttr)
    heads = prop_def(IntegerAttr)
    planes = prop_def(IntegerAttr)
    context = prop_def(IntegerAttr)
    row = prop_def(IntegerAttr)
    both = opt_prop_def(UnitAttr)

    def __init__(
        self,
        position: SSAValue,
        table: str,
        kind: str,
        heads: int,
        planes: int,
        context: int,
        row: int,
        both: bool = False,
    ) -> None:
        """Make the operation from plain values; `row` is the words from one row to the next."""
        numbers = {"heads": heads, "planes": planes, "context": context, "row": row}
        properties = {name: number(value) for name, value in numbers.items()}
        super().__init__(
            operands=[position],
            result_types=[vector(planes * row)],
            properties=properties
            | {"table": symbol(table), "kind": StringAttr(kind), "both": UnitAttr() if both else None},
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """The table's axes after that of the planes."""
        context, kind = int(self.context.value.data), self.kind.data
        if kind == "relative" and self.both is not None:
            return (2 * context - 1,)
        return (context, context) if kind == "table" else (context,)

    def verify_(self) -> None:
        """A known kind; one plane for all heads, or this device's share of one for each."""
        if self.kind.data not in BIASES:
            raise VerifyException(f"tbd.score_bias: kind must be one of {', '.join(BIASES)}")


@irdl_op_definition
class RotaryRowOp(Valued):
    """What rotary positions multiply a head by at this token's position: `pad` words of factors, `pad` of crossed ones.

    The factors are the cosines in both halves and ones after them; the crossed factors minus the sines in the first
    half, the sines in the second. Words between hold zeros, or ones.
    """

    name = "tbd.rotary_row"
    position = operand_def(IndexType)
    cos = prop_def(SymbolRefAttr)
    sin = prop_def(SymbolRefAttr)
    turned = prop_def(IntegerAttr)
    half = prop_def(IntegerAttr)
    pad = prop_def(IntegerAttr)

    def __init__(self, position: SSAValue, cos: str, sin: str, turned: int, half: int, pad: int) -> None:
        """Make the operation from plain values."""
        numbers = {name: number(value) for name, value in {"turned": turned, "half": half, "pad": pad}.items()}
        super().__init__(
            operands=[position],
            result_types=[vector(2 * pad)],
            properties=numbers | {"cos": symbol(cos), "sin": symbol(sin)},
        )


@irdl_op_definition
class RotaryOp(Valued):
    """The first `heads` heads of x, `pad` words each, turned: x * factors + (x with halves exchanged) * crossed.

    `half` words make a half; those from 2 * half on stay.
    """

    name = "tbd.rotary"
    x = operand_def(TensorType)
    row = operand_def(TensorType)
    heads = prop_def(IntegerAttr)
    half = prop_def(IntegerAttr)
    pad = prop_def(IntegerAttr)

    def __init__(self, x: SSAValue, row: SSAValue, heads: int, half: int, pad: int) -> None:
        """Make the operation from plain values."""
        numbers = {name: number(value) for name, value in {"heads": heads, "half": half, "pad": pad}.items()}
        super().__init__(operands=[x, row], result_types=[vector(heads * pad)], properties=numbers)

    def verify_(self) -> None:
        """The heads lie inside x."""
        heads, half, pad = (int(a.value.data) for a in (self.heads, self.half, self.pad))
        if heads * pad > width(self.x) or 2 * half > pad or width(self.row) != 2 * pad:
            raise VerifyException(f"tbd.rotary: {self.x.type} and {self.row.type} do not fit {heads} heads of {pad}")
