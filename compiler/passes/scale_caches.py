"""scale-caches: K and V of a step's attentions are stored as int8, their scales folded into the matrices around them.

A channel of a K/V head has scales k and v: K / k and V / v are what is stored. Since q K = (q k) (K / k), and the
output's channel is v times that of V / v, the columns that make K and V are divided by scales, those that make the
queries are multiplied by K's, and the rows of the matrix behind attention by V's. Channels that a rotary position
turns together share a scale; query heads that share a K/V head take its scales. Where no matrix stands behind
attention, or one of int8 weights, its output is multiplied by a parameter instead.

The pass only renames: what the names stand for is in `compiler.caches`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp, StringAttr
from xdsl.ir import Operation, SSAValue
from xdsl.passes import ModulePass
from xdsl.rewriter import Rewriter

from typebar.compiler import ir
from typebar.compiler.ir_values import vector
from typebar.compiler.passes.partition_attention import Part, part_of
from typebar.compiler.problems import keep_name, node_name
from typebar.isa.errors import TypebarError

Indices = NDArray[np.int64]
_REMEDY = "compile without int8 K and V"


@dataclass(frozen=True)
class Folded:
    """A tensor made of `source` by multiplying element i of its axis `axis` by factor `codes[i]`; names are templates.

    Without a source it is the factors themselves, one for each code.
    """

    name: str
    source: str | None
    axis: int
    codes: Indices


@dataclass(frozen=True)
class ScaledCache:
    """One attention's tensors, in each of the loop's `layers` (a layer's arguments of `ir.layer_name`).

    Factors of a layer are [1, k_factor / k, v_factor / v, k, v] with the scales k and v of all `channels`,
    one K/V head after the other. `shared`: a tensor is the same in all layers, so that they must share scales.
    """

    channels: int
    k_factor: float
    v_factor: float
    layers: tuple[tuple[int, int], ...]
    shared: bool
    tensors: tuple[Folded, ...]


@dataclass(frozen=True)
class ScaleCachesPass(ModulePass):
    """Let every `tb.attention` of a step store int8, and name the tensors that have the scales in them."""

    name = "scale-caches"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        """Mark the attentions and rename what is multiplied, in place; raises TypebarError where that cannot be."""
        scale_caches(op)


def attentions(module: ModuleOp) -> list[ir.AttentionOp]:
    """The attentions whose caches are to have scales, in order; their places in it are their numbers."""
    return [op for op in module.walk() if isinstance(op, ir.AttentionOp) and op.kv_format is None]


def scale_caches(module: ModuleOp) -> list[ScaledCache]:
    """Rename, in place; returns what the new names stand for, by the attentions' numbers.

    Raises:
        TypebarError: the model has an encoder, or K, V or queries are not columns of products that are theirs alone.
    """
    if any(isinstance(op, ir.EncoderOp) for op in module.body.block.ops):
        raise TypebarError(f"int8 K and V are for decoders, and this model has an encoder: {_REMEDY}")
    return [_Fold(op, number).folded() for number, op in enumerate(attentions(module))]


def shared_channels(op: ir.AttentionOp) -> Indices:
    """For each channel of K the first of those that share its scale: the two that a rotary position turns."""
    size, kv_heads = op.head_dim.value.data, op.kv_heads.value.data
    first = np.arange(size)
    part = part_of(op.k)
    if part is not None and part.rotary is not None:
        turned = part.rotary.rotary_dim.value.data
        if part.rotary.pairing.data == "half":
            first[turned // 2 : turned] = first[: turned // 2]
        else:
            first[1:turned:2] = first[:turned:2]
    return np.asarray((np.arange(kv_heads)[:, None] * size + first).reshape(-1), np.int64)


class _Fold:
    """One attention's renaming. Codes: 0 is one, channel c of K 1 + c, and so on in the order of `ScaledCache`."""

    def __init__(self, op: ir.AttentionOp, number: int) -> None:
        self.op, self.number = op, number
        self.size, self.kv_heads = op.head_dim.value.data, op.kv_heads.value.data
        self.channels, self.group = self.kv_heads * self.size, op.heads.value.data // self.kv_heads
        loop = op.parent_op()
        self.count, self.start = 1, 0
        if isinstance(loop, ir.RepeatOp):
            self.count, self.start = loop.count.value.data, loop.start.value.data
        self.in_loop = isinstance(loop, ir.RepeatOp)
        self.tensors: list[Folded] = []

    def folded(self) -> ScaledCache:
        """Rename everything."""
        op, n = self.op, self.channels
        own = np.arange(n)
        shared = shared_channels(op)
        q, k, v = (self.part(value, what) for value, what in ((op.q, "queries"), (op.k, "K"), (op.v, "V")))
        for value, part in ((op.k, k), (op.v, v)):
            if part.factor != 1.0:
                self.drop_scales(value)
        columns: dict[ir.LinearOp, Indices] = {}
        for part, codes in (
            (q, 1 + 2 * n + self.spread(shared)),
            (k, 1 + shared),
            (v, 1 + n + own),
        ):
            self.claim(columns, part, codes)
        for linear, codes in columns.items():
            self.check_readers(linear, codes)
        for linear, codes in columns.items():
            self.fold_columns(linear, codes)
        self.fold_output(1 + 3 * n + self.spread(own))
        op.properties["kv_format"] = StringAttr("int8")
        templates = [item.source for item in self.tensors if item.source is not None]
        return ScaledCache(
            n,
            k.factor,
            v.factor,
            tuple((self.start, layer) for layer in range(self.count)) if self.in_loop else ((0, 0),),
            self.in_loop and any("{" not in template for template in templates),
            tuple(self.tensors),
        )

    def spread(self, channels: Indices) -> Indices:
        """What each channel of K/V heads has, for the channels of all query heads."""
        return np.repeat(channels.reshape(self.kv_heads, 1, self.size), self.group, 1).reshape(-1)

    def refuse(self, reason: str) -> TypebarError:
        return TypebarError(f"int8 K and V of {node_name(self.op)}: {reason}: {_REMEDY}")

    def part(self, value: SSAValue, what: str) -> Part:
        found = part_of(value)
        if found is None:
            raise self.refuse(f"its {what} are not columns of a product, straight or turned by their position")
        return found

    def drop_scales(self, value: SSAValue) -> None:
        """Take constant factors between the product and K or V away: the folded columns have them."""
        owner = value.owner
        while isinstance(owner, ir.SliceOp | ir.RotaryOp | ir.ScaleOp):
            inner = owner.x
            if isinstance(owner, ir.ScaleOp):
                readers = [(use.operation, use.index) for use, _ in _readers(owner.out, np.zeros(ir.width(inner), int))]
                if any(user is not self.op or index == 0 for user, index in readers):
                    raise self.refuse(f"{node_name(owner)} multiplies more than K and V by {owner.value.value.data:g}")
                owner.out.replace_all_uses_with(inner)
                Rewriter.erase_op(owner)
            owner = inner.owner

    def claim(self, columns: dict[ir.LinearOp, Indices], part: Part, codes: Indices) -> None:
        """Note the codes of an operand's columns."""
        own = part.columns
        known = columns.setdefault(own.linear, np.zeros(ir.width(own.linear.out), np.int64))
        index = np.arange(own.size)
        places = own.start + index // own.run * own.stride + index % own.run
        if known[places].any():
            raise self.refuse("queries, K and V share columns of a product")
        known[places] = codes

    def check_readers(self, linear: ir.LinearOp, codes: Indices) -> None:
        """Columns that change may be nobody else's."""
        for use, columns in _readers(linear.out, np.arange(len(codes))):
            if use.operation is not self.op and codes[columns].any():
                raise self.refuse(f"{node_name(use.operation)} reads its queries, K or V too")

    def fold_columns(self, linear: ir.LinearOp, codes: Indices) -> None:
        """The columns of a product; those of int8 weights by their scales."""
        axis = 1 if linear.layout.data == "in_out" else 0
        if linear.scale is not None:
            self.rename(linear, "scale", 0, codes)
        else:
            self.rename(linear, "weight", axis, codes)
        if linear.bias is not None:
            self.rename(linear, "bias", 0, codes)

    def fold_output(self, codes: Indices) -> None:
        """The rows of all matrices behind attention; else its output is multiplied."""
        users = [use.operation for use in self.op.out.uses]
        if all(isinstance(user, ir.LinearOp) and user.scale is None for user in users):
            for user in users:
                assert isinstance(user, ir.LinearOp)
                self.rename(user, "weight", 0 if user.layout.data == "in_out" else 1, codes)
            return
        name = f"kv{self.number}.{{}}.output" if self.in_loop else f"kv{self.number}.output"
        block, uses = self.op.parent_block(), list(self.op.out.uses)
        assert block is not None
        factors = ir.ParameterOp(name, vector(len(codes)))
        product = ir.MulOp(self.op.out, factors.out)
        keep_name(product, self.op)
        block.insert_ops_after([factors, product], self.op)
        for use in uses:
            use.operation.operands[use.index] = product.out
        self.tensors.append(Folded(name, None, 0, codes))

    def rename(self, linear: ir.LinearOp, kind: str, axis: int, codes: Indices) -> None:
        reference = linear.properties[kind]
        source = ir.text(reference)  # type: ignore[arg-type]
        name = f"{source}.kv{self.number}"
        linear.properties[kind] = ir.symbol(name)
        self.tensors.append(Folded(name, source, axis, codes))


def _readers(value: SSAValue, columns: Indices) -> Iterator[tuple[_Use, Indices]]:
    """What reads a value, behind slices, rotary positions and factors, and which of `columns` it reads."""
    for use in value.uses:
        user = use.operation
        if isinstance(user, ir.SliceOp):
            index = np.arange(user.size.value.data)
            run, stride = user.runs
            yield from _readers(user.out, columns[user.start.value.data + index // run * stride + index % run])
        elif isinstance(user, ir.RotaryOp | ir.ScaleOp):
            yield from _readers(user.out, columns)
        else:
            yield _Use(user, use.index), columns


@dataclass(frozen=True)
class _Use:
    operation: Operation
    index: int
