"""The `tbd` dialect's operations for programs with an encoder: what runs once a request, before any token is decoded.

`tbd.source` goes over the positions of a source text. An attention there needs K and V of all positions, so the body is
cut, by the pass `phases`, into loops over positions: a `tbd.phase` each. Values that live from one phase to a later one
lie in memory, a float32 row for each position: `tbd.save` and `tbd.restore`. K and V lie in caches known by number:
`tbd.cache` fills one, position by position, and `tbd.attend` reads it whole, in a later phase or for a token decoded.
"""

from __future__ import annotations

from xdsl.dialects.builtin import FloatAttr, IntegerAttr, TensorType
from xdsl.ir import Operation, Region, SSAValue
from xdsl.irdl import (
    irdl_op_definition,
    operand_def,
    opt_operand_def,
    opt_prop_def,
    prop_def,
    region_def,
    traits_def,
)
from xdsl.traits import NoTerminator, Pure
from xdsl.utils.exceptions import VerifyException

from typebar.compiler.device_base import DeviceOp, Valued, require_indices
from typebar.compiler.ir_values import number, real, vector, width

_NO_RESULT = "`(` operands `)` attr-dict `:` type(operands)"

ENCODER_CACHES = 2
"""Caches that the encoder's attentions take in turns, the first ones: a phase may end one attention, position by
position, and fill the next one's cache, while later positions still read the first. Cross-attentions have others."""


def _numbers(op: Operation, *names: str) -> list[int]:
    return [int(op.properties[name].value.data) for name in names]  # type: ignore[attr-defined]


@irdl_op_definition
class SourceOp(DeviceOp):
    """A source text of up to `context` tokens on each of `devices` devices; block arguments (token, position).

    Before the pass `phases` its body computes one position; after it, it is a row of phases and of loops over layers
    that hold phases. `allocate` sets `step` as in `tbd.program`.
    """

    name = "tbd.source"
    vocab = prop_def(IntegerAttr)
    context = prop_def(IntegerAttr)
    devices = prop_def(IntegerAttr)
    align = prop_def(IntegerAttr)
    step = opt_prop_def(IntegerAttr)
    body = region_def("single_block")
    traits = traits_def(NoTerminator())
    assembly_format = "attr-dict-with-keyword $body"

    def __init__(self, vocab: int, context: int, devices: int, align: int, body: Region) -> None:
        """Make the operation from plain values."""
        values = {"vocab": vocab, "context": context, "devices": devices, "align": align}
        super().__init__(properties={name: number(value) for name, value in values.items()}, regions=[body])

    def verify_(self) -> None:
        """Two index arguments."""
        require_indices(self.body.block, self.name)


@irdl_op_definition
class PhaseOp(DeviceOp):
    """A loop over the positions of the source text; block arguments (token, position)."""

    name = "tbd.phase"
    body = region_def("single_block")
    traits = traits_def(NoTerminator())
    assembly_format = "attr-dict-with-keyword $body"

    def __init__(self, body: Region) -> None:
        """Make the operation from its body."""
        super().__init__(regions=[body])

    def verify_(self) -> None:
        """Two index arguments."""
        require_indices(self.body.block, self.name)


@irdl_op_definition
class SaveOp(DeviceOp):
    """Words `start` to `start + size` of x to the row of this position in row area `area`."""

    name = "tbd.save"
    x = operand_def(TensorType)
    area = prop_def(IntegerAttr)
    start = prop_def(IntegerAttr)
    size = prop_def(IntegerAttr)
    assembly_format = _NO_RESULT

    def __init__(self, x: SSAValue, area: int, start: int, size: int) -> None:
        """Make the operation from plain values."""
        values = {"area": area, "start": start, "size": size}
        super().__init__(operands=[x], properties={name: number(value) for name, value in values.items()})

    def verify_(self) -> None:
        """The words are x's."""
        start, size = _numbers(self, "start", "size")
        if start < 0 or size <= 0 or start + size > width(self.x):
            raise VerifyException(f"tbd.save: words {start} to {start + size} are not in {self.x.type}")


@irdl_op_definition
class RestoreOp(Valued):
    """The row of this position in row area `area`."""

    name = "tbd.restore"
    area = prop_def(IntegerAttr)
    assembly_format = "attr-dict `:` type($out)"

    def __init__(self, area: int, size: int) -> None:
        """Make the operation from plain values."""
        super().__init__(result_types=[vector(size)], properties={"area": number(area)})


@irdl_op_definition
class CacheOp(DeviceOp):
    """This position's K and V of `heads` heads, `pad` words each, to cache `cache`.

    K starts at word `k_at` of k, `depth` words of a head used; V at word `v_at` of v, `head_dim` words of a head used.
    `kv_words` is the number of elements that all devices together add.
    """

    name = "tbd.cache"
    k = operand_def(TensorType)
    v = operand_def(TensorType)
    cache = prop_def(IntegerAttr)
    heads = prop_def(IntegerAttr)
    head_dim = prop_def(IntegerAttr)
    depth = prop_def(IntegerAttr)
    pad = prop_def(IntegerAttr)
    k_at = prop_def(IntegerAttr)
    v_at = prop_def(IntegerAttr)
    kv_words = prop_def(IntegerAttr)
    assembly_format = _NO_RESULT

    def __init__(
        self,
        places: tuple[tuple[SSAValue, int], tuple[SSAValue, int]],
        cache: int,
        heads: int,
        head_dim: int,
        depth: int,
        pad: int,
        kv_words: int,
    ) -> None:
        """Make the operation from plain values; `places` says where k and v begin."""
        (k, k_at), (v, v_at) = places
        values = {"cache": cache, "heads": heads, "head_dim": head_dim, "depth": depth, "pad": pad}
        values |= {"k_at": k_at, "v_at": v_at, "kv_words": kv_words}
        super().__init__(operands=[k, v], properties={name: number(value) for name, value in values.items()})

    def verify_(self) -> None:
        """k and v hold the heads."""
        heads, size, depth, pad, k_at, v_at = _numbers(self, "heads", "head_dim", "depth", "pad", "k_at", "v_at")
        fits = k_at + heads * pad <= width(self.k) and v_at + heads * pad <= width(self.v)
        if not 0 < size <= depth <= pad or heads <= 0 or not fits or min(k_at, v_at) < 0:
            raise VerifyException(f"tbd.cache: {self.k.type} and {self.v.type} do not hold {heads} heads of {pad}")


@irdl_op_definition
class AttendOp(Valued):
    """softmax(scale * q·k + bias) · v over all source positions in cache `cache`, which is complete by now.

    q holds `heads` queries of `pad` words from word `q_at` on, `depth` of which take part; query head h reads K/V head
    h // (heads / kv_heads). The cache holds `context` positions. `bias` holds rows to add to the scores: `planes`, one
    for each head or one for all.
    """

    name = "tbd.attend"
    q = operand_def(TensorType)
    bias = opt_operand_def(TensorType)
    cache = prop_def(IntegerAttr)
    heads = prop_def(IntegerAttr)
    kv_heads = prop_def(IntegerAttr)
    head_dim = prop_def(IntegerAttr)
    depth = prop_def(IntegerAttr)
    pad = prop_def(IntegerAttr)
    q_at = prop_def(IntegerAttr)
    scale = prop_def(FloatAttr)
    context = prop_def(IntegerAttr)
    planes = opt_prop_def(IntegerAttr)
    traits = traits_def(Pure())

    def __init__(
        self,
        q: SSAValue,
        q_at: int,
        cache: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        depth: int,
        pad: int,
        scale: float,
        context: int,
        bias: tuple[SSAValue, int] | None = None,
    ) -> None:
        """Make the operation from plain values; `bias` has its planes."""
        values = {"cache": cache, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "depth": depth}
        values |= {"pad": pad, "q_at": q_at, "context": context}
        properties = {name: number(value) for name, value in values.items()} | {"scale": real(scale)}
        properties["planes"] = None if bias is None else number(bias[1])  # type: ignore[assignment]
        operands = [q, None if bias is None else bias[0]]
        super().__init__(operands=operands, result_types=[vector(heads * pad)], properties=properties)

    @property
    def group(self) -> int:
        """Query heads of each K/V head."""
        heads, kv_heads = _numbers(self, "heads", "kv_heads")
        return heads // kv_heads

    def verify_(self) -> None:
        """q holds the heads, and there are as many rows of biases as `planes`."""
        heads, kv_heads, size, depth, pad, at, context = _numbers(
            self, "heads", "kv_heads", "head_dim", "depth", "pad", "q_at", "context"
        )
        if heads <= 0 or kv_heads <= 0 or heads % kv_heads or not 0 < size <= depth <= pad or context <= 0:
            raise VerifyException(f"tbd.attend: {heads} heads on {kv_heads} of {size} ({depth}) in {pad} words")
        if at < 0 or at + heads * pad > width(self.q) or width(self.out) != heads * pad:
            raise VerifyException(f"tbd.attend: {self.q.type} does not hold {heads} heads of {pad}")
        planes = 0 if self.planes is None else self.planes.value.data
        if (self.bias is None) != (planes == 0) or planes not in (0, 1, heads):
            raise VerifyException(f"tbd.attend: {planes} rows of score biases for {heads} heads")


SOURCE_OPS: list[type[Operation]] = [AttendOp, CacheOp, PhaseOp, RestoreOp, SaveOp, SourceOp]
"""Operations to add to the `tbd` dialect."""
