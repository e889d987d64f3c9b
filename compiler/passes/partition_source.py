"""partition, the encoder's side: a source text's computation, and K and V of every cross-attention, on one device.

What a step computes from the memory alone leaves the step: it stands at the end of `tbd.source`, in loops over the same
layers, and fills a cache for each cross-attention. The step keeps the queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from xdsl.dialects.builtin import IndexType
from xdsl.ir import Block, Operation, Region, SSAValue

from typebar.compiler import device_ir as dev
from typebar.compiler import ir
from typebar.compiler.device_source import ENCODER_CACHES, AttendOp, CacheOp, SourceOp
from typebar.compiler.passes.partition_attention import Heads, Part, part_of, products, segment_of
from typebar.compiler.segments import Segment

if TYPE_CHECKING:
    from typebar.compiler.passes.partition import _Partitioner as Partitioner


class MemorySide:
    """What of a step depends on the memory alone, and the caches of its cross-attentions.

    `operations` are those that leave the step; `caches` numbers cross-attentions; `context` is the largest number of
    source positions.
    """

    def __init__(self, step: ir.StepOp, encoder: ir.EncoderOp) -> None:
        """Look through a step; loop arguments that never change become what they are, in place."""
        for op in list(step.walk()):
            if isinstance(op, ir.RepeatOp):
                _forward_constants(op)
        self.step, self.encoder = step, encoder
        self.context = encoder.context.value.data
        found = [op for op in step.walk() if isinstance(op, ir.CrossAttentionOp)]
        self.caches: dict[Operation, int] = {op: ENCODER_CACHES + index for index, op in enumerate(found)}
        self.operations: set[Operation] = set()
        self._values: set[SSAValue] = set(step.body.block.args[2:])
        self._collect(step.body.block)

    def _collect(self, block: Block) -> None:
        for op in block.ops:
            if isinstance(op, ir.RepeatOp):
                self._collect(op.body.block)
                continue
            free = [value for value in op.operands if not isinstance(value.owner, ir.ParameterOp)]
            if op.results and free and all(value in self._values for value in free):
                self.operations.add(op)
                self._values.update(op.results)

    def source(self, worker: Partitioner) -> SourceOp:
        """The encoder and the filling of the caches; `worker` notes what has no form."""
        block = Block(arg_types=[IndexType(), IndexType()])
        worker.block, worker.context, worker.encodes = block, self.context, True
        worker.indices.update(zip(self.encoder.body.block.args, block.args, strict=True))
        end = self.encoder.body.block.last_op
        assert isinstance(end, ir.ReturnOp)
        for op in self.encoder.body.block.ops:
            if op is not end:
                worker.visit(op)
        if not worker.problems:
            worker.shares[self.step.body.block.args[2]] = worker.dense(end.values[0], end)
            self._fill(self.step.body.block, worker)
        vocab = self.encoder.vocab.value.data
        return SourceOp(vocab, self.context, worker.devices, worker.align, Region(block))

    def _fill(self, block: Block, worker: Partitioner) -> None:
        """Everything of a step's block that depends on the memory alone, and K and V of its cross-attentions."""
        for op in block.ops:
            if isinstance(op, ir.RepeatOp):
                if any(isinstance(item, ir.CrossAttentionOp) for item in op.walk()):
                    outer, worker.block = worker.block, Block()
                    self._fill(op.body.block, worker)
                    inner, worker.block = worker.block, outer
                    inner.add_op(ir.YieldOp())
                    outer.add_op(ir.RepeatOp([], op.count.value.data, op.start.value.data, Region(inner)))
            elif isinstance(op, ir.CrossAttentionOp):
                fill(worker, op, self.caches[op])
            elif op in self.operations or isinstance(op, ir.ParameterOp):
                worker.visit(op)


def _forward_constants(loop: ir.RepeatOp) -> None:
    """Arguments that every layer hands on as they are, such as the memory, leave the loop."""
    body, end = loop.body.block, loop.body.block.last_op
    assert isinstance(end, ir.YieldOp)
    kept = [i for i, argument in enumerate(body.args) if end.values[i] is not argument]
    if len(kept) == len(body.args):
        return
    for i, argument in reversed(list(enumerate(body.args))):
        if i not in kept:
            end.operands = [value for j, value in enumerate(end.operands) if j != i]
            argument.replace_all_uses_with(loop.inits[i])
            body.erase_arg(argument)
    inits, outs = [loop.inits[i] for i in kept], list(loop.outs)
    region = loop.body
    loop.detach_region(region)
    made = ir.RepeatOp(inits, loop.count.value.data, loop.start.value.data, region)
    made.attributes.update(loop.attributes)
    block = loop.parent_block()
    assert block is not None
    block.insert_op_before(made, loop)
    for i, out in enumerate(outs):
        out.replace_all_uses_with(made.outs[kept.index(i)] if i in kept else loop.inits[i])
    for new, i in zip(made.outs, kept, strict=True):
        new.name_hint = outs[i].name_hint
    loop.detach()  # type: ignore[no-untyped-call]
    loop.erase()


def _parts(worker: Partitioner, op: ir.CrossAttentionOp, values: Sequence[SSAValue]) -> list[Part]:
    """The operands as columns of products; none, and a problem noted, if one has no such form."""
    found = [part_of(value) for value in values]
    parts = [part for part in found if part is not None and part.rotary is None]
    worker.linears.update((ir.text(part.columns.linear.weight), False) for part in parts)
    if len(parts) < len(found):
        worker.refuse(op, "q, k or v is not a linear operation's result, or a slice of one",
                      "only such cross-attention has a form on this machine yet")  # fmt: skip
        return []
    return parts


def fill(worker: Partitioner, op: ir.CrossAttentionOp, cache: int) -> None:
    """K and V of a cross-attention, to its cache."""
    parts = _parts(worker, op, (op.k, op.v))
    if not parts:
        return
    heads, kv_heads, size = (a.value.data for a in (op.heads, op.kv_heads, op.head_dim))
    split, pad = Heads.of(heads, kv_heads, worker.devices), worker.rounded(size)
    segments = [replace(segment_of(worker, part.columns, size, pad, split.keys), share=split.share) for part in parts]
    k, v = products(worker, [(part.columns, item) for part, item in zip(parts, segments, strict=True)], op)
    worker.add(CacheOp((k, v), cache, split.keys, size, size, pad, kv_words(worker, segments)), op)


def cross_attention(worker: Partitioner, op: ir.CrossAttentionOp, cache: int, context: int) -> None:
    """The queries of a cross-attention against its cache, which holds k and v without their factors."""
    parts = _parts(worker, op, (op.q, op.k, op.v))
    if not parts:
        return
    heads, kv_heads, size = (a.value.data for a in (op.heads, op.kv_heads, op.head_dim))
    split, pad = Heads.of(heads, kv_heads, worker.devices), worker.rounded(size)
    segment = segment_of(worker, parts[0].columns, size, pad, split.queries)
    ((q, at),) = products(worker, [(parts[0].columns, segment)], op)
    scale = op.scale.value.data * parts[0].factor * parts[1].factor
    made = AttendOp(q, at, cache, split.queries, split.keys, size, size, pad, scale, context)
    worker.keep(made, op, (heads * size, size, pad, True))
    if parts[2].factor != 1.0:
        scaled = dev.ScaleOp(made.out, parts[2].factor, ir.width(made.out))
        worker.keep(scaled, op, (heads * size, size, pad, True))


def kv_words(worker: Partitioner, segments: Sequence[Segment]) -> int:
    """Elements that all devices together add to their caches for a position."""
    return sum(len(segment.columns(rank)[0]) for segment in segments for rank in range(worker.devices))
