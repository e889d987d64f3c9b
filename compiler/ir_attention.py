"""The operations of the `tb` dialect that look at positions: attention, cross-attention, rotary positions."""

from __future__ import annotations

from xdsl.dialects.builtin import FloatAttr, IndexType, IntegerAttr, StringAttr, SymbolRefAttr, TensorType
from xdsl.ir import Attribute, SSAValue
from xdsl.irdl import irdl_op_definition, operand_def, opt_operand_def, opt_prop_def, prop_def, result_def, traits_def
from xdsl.traits import Pure

from typebar.compiler.ir_values import FORMAT, TbOp, number, outer, real, require, require_float_vectors, symbol, width

MASKS = ("causal", "window", "none")
"""Which positions j a position i attends to: j <= i; i - window < j <= i; every j (in a step never, in an encoder every
position of the source text)."""

BIASES = ("relative", "column", "table")
"""What is added to the score of positions i and j, a float32 parameter: relative, [planes, context] by i - j in a step
and [planes, 2 * context - 1] by j - i + context - 1 in an encoder; column, [planes, context] by j; table, [planes,
context, context] by i and j. There is one plane for each head, or one for all. A value of MASKED or less masks."""

PAIRINGS = ("half", "interleaved")
"""Which elements of a head rotary positions turn together: i and i + rotary_dim / 2, or 2 i and 2 i + 1."""


def _heads(heads: int, kv_heads: int, head_dim: int, scale: float) -> dict[str, Attribute | None]:
    """The properties that every attention has."""
    numbers = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    return {**{name: number(value) for name, value in numbers.items()}, "scale": real(scale)}


class _Attention(TbOp):
    q = operand_def(TensorType)
    k = operand_def(TensorType)
    v = operand_def(TensorType)
    out = result_def(TensorType)
    heads = prop_def(IntegerAttr)
    kv_heads = prop_def(IntegerAttr)
    head_dim = prop_def(IntegerAttr)
    scale = prop_def(FloatAttr)
    traits = traits_def(Pure())
    assembly_format = FORMAT

    def verify_(self) -> None:
        """Head counts divide and vectors have their sizes."""
        require_float_vectors(self.q, self.k, self.v, self.out)
        heads, kv_heads, size = (a.value.data for a in (self.heads, self.kv_heads, self.head_dim))
        require(
            heads > 0 and kv_heads > 0 and size > 0 and heads % kv_heads == 0,
            f"{self.name}: kv_heads = {kv_heads} must divide heads = {heads}",
        )
        require(self.q.type == self.out.type, f"{self.name}: the result must have the type of q")
        require(self.k.type == self.v.type, f"{self.name}: k and v must have one type")
        for value, count in ((self.q, heads), (self.k, kv_heads)):
            shape = (*outer(value), width(value))
            require(
                shape == (count * size,) or (len(shape) == 4 and (shape[1], shape[3]) == (count, size)),
                f"{self.name}: {value.type} does not hold {count} heads of {size}",
            )


@irdl_op_definition
class AttentionOp(_Attention):
    """softmax(scale * q·k + bias) · v over the positions the mask allows, head by head.

    In a step q is [heads, head_dim], k and v are [kv_heads, head_dim] of this token, flat; query head h reads
    K/V head h // (heads / kv_heads); k and v join the cache of this operation before the product. In an encoder
    every position attends to all positions of the source text that the mask allows, earlier and later ones. With
    kv_format = int8, which only a step has, k and v are rounded to the nearest integers, -128 to 127, before they join
    the cache. In a graph q, k and v are [1, heads, T, head_dim], and `allowed` may hold the mask as a value until it is
    classified.
    """

    name = "tb.attention"
    q = operand_def(TensorType)  # again, so that they stand before `allowed`
    k = operand_def(TensorType)
    v = operand_def(TensorType)
    allowed = opt_operand_def(TensorType)
    mask = opt_prop_def(StringAttr)
    window = opt_prop_def(IntegerAttr)
    bias = opt_prop_def(SymbolRefAttr)
    bias_kind = opt_prop_def(StringAttr)
    kv_format = opt_prop_def(StringAttr)

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
        bias: str | None = None,
        bias_kind: str | None = None,
    ) -> None:
        """Make the operation from plain values."""
        super().__init__(
            operands=[q, k, v, allowed],
            result_types=[q.type],
            properties=_heads(heads, kv_heads, head_dim, scale)
            | {
                "mask": StringAttr(mask) if mask is not None else None,
                "window": number(window) if window is not None else None,
                "bias": symbol(bias) if bias is not None else None,
                "bias_kind": StringAttr(bias_kind) if bias_kind is not None else None,
            },
        )

    def verify_(self) -> None:
        """Head counts divide, vectors have their sizes; the mask is a value or a known kind, and so is the bias."""
        super().verify_()
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
        require((self.bias is None) == (self.bias_kind is None), "tb.attention: `bias` goes with `bias_kind`")
        require(
            self.kv_format is None or self.kv_format.data == "int8", "tb.attention: kv_format must be int8 or absent"
        )
        known = ", ".join(BIASES)
        require(self.bias_kind is None or self.bias_kind.data in BIASES, f"tb.attention: bias_kind must be of {known}")


@irdl_op_definition
class CrossAttentionOp(_Attention):
    """softmax(scale * q·k) · v over all positions of the source text, head by head; only in steps with a memory.

    q is computed from this token; k and v from the memory, the encoder's output at each position of the source text:
    they are worked out once a request, not once a token.
    """

    name = "tb.cross_attention"

    def __init__(
        self, q: SSAValue, k: SSAValue, v: SSAValue, heads: int, kv_heads: int, head_dim: int, scale: float
    ) -> None:
        """Make the operation from plain values."""
        super().__init__(
            operands=[q, k, v],
            result_types=[q.type],
            properties=_heads(heads, kv_heads, head_dim, scale),
        )


@irdl_op_definition
class RotaryOp(TbOp):
    """Rotary positions: in each of `heads` heads, pairs (a, b) of the first `rotary_dim` elements are turned.

    a' = a * cos - b * sin and b' = b * cos + a * sin, each product and sum rounded; `cos` and `sin` name float32
    tables [context, rotary_dim / 2], read at the row of the position. Elements beyond `rotary_dim` stay. (Su et al.
    2021, RoFormer, section 3.4.)
    """

    name = "tb.rotary"
    x = operand_def(TensorType)
    position = operand_def(IndexType)
    out = result_def(TensorType)
    heads = prop_def(IntegerAttr)
    head_dim = prop_def(IntegerAttr)
    rotary_dim = prop_def(IntegerAttr)
    pairing = prop_def(StringAttr)
    cos = prop_def(SymbolRefAttr)
    sin = prop_def(SymbolRefAttr)
    traits = traits_def(Pure())
    assembly_format = FORMAT

    def __init__(
        self,
        x: SSAValue,
        position: SSAValue,
        heads: int,
        head_dim: int,
        rotary_dim: int,
        pairing: str,
        cos: str,
        sin: str,
    ) -> None:
        """Make the operation from plain values."""
        super().__init__(
            operands=[x, position],
            result_types=[x.type],
            properties={
                "heads": number(heads),
                "head_dim": number(head_dim),
                "rotary_dim": number(rotary_dim),
                "pairing": StringAttr(pairing),
                "cos": symbol(cos),
                "sin": symbol(sin),
            },
        )

    def verify_(self) -> None:
        """Heads fill the vector; rotary_dim is even and inside a head; the pairing is known."""
        require_float_vectors(self.x, self.out)
        require(self.x.type == self.out.type, "tb.rotary: the result must have the operand's type")
        heads, size, turned = (a.value.data for a in (self.heads, self.head_dim, self.rotary_dim))
        require(heads * size == width(self.x), f"tb.rotary: {self.x.type} does not hold {heads} heads of {size}")
        require(0 < turned <= size and turned % 2 == 0, f"tb.rotary: rotary_dim = {turned} must be even and fit {size}")
        require(self.pairing.data in PAIRINGS, f"tb.rotary: pairing must be one of {', '.join(PAIRINGS)}")
