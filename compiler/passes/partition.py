"""partition: one token's graph becomes one device's share of it.

Attention goes by heads, every other linear operation by columns, each in contiguous blocks; every product takes a
vector that all devices hold whole, so no addition is ever split and the bits do not depend on the number of devices.
A `tbd.gather` stands where a shared-out value is needed whole. This is the split that DFX uses (section 4: head-wise
attention, column-wise products, all-gather without arithmetic). On one device nothing needs one; with `alone` it is
there all the same, for a machine that synchronises however many devices it has (`control.barriers`). A matrix named in
`replicate` is whole on every device instead, and its result needs no gather; nor does attention if q, k and v are so.

A matrix named in `by_rows` is the one exception: a device multiplies its own share of the input by the rows that meet
it, partial sums are gathered, and added in the order of ranks. Every device has the same bits, but the order of
additions depends on the number of devices.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import IndexType, ModuleOp
from xdsl.ir import Block, BlockArgument, Operation, Region, SSAValue
from xdsl.passes import ModulePass
from xdsl.rewriter import Rewriter

from typebar.compiler import device_ir as dev
from typebar.compiler import ir
from typebar.compiler.passes.partition_attention import (
    Columns,
    columns_of,
    feeds_attention,
    part_of,
    segment_of,
    self_attention,
)
from typebar.compiler.passes.partition_source import MemorySide, cross_attention
from typebar.compiler.problems import LoweringError, Problem, keep_name, node_name
from typebar.isa.errors import TypebarError


@dataclass(frozen=True)
class _Share:
    """A value during partitioning: its share on a device, and how the whole lies in units of `unit` in `pad` words."""

    value: SSAValue
    size: int
    unit: int
    pad: int
    split: bool

    @property
    def k(self) -> int:
        """Words that the whole value takes, padding between units included."""
        return self.size if self.unit == self.pad else -(-self.size // self.unit) * self.pad


@dataclass(frozen=True)
class PartitionPass(ModulePass):
    """Split a `tb.step` over `devices`.

    `align` is the register alignment in words; `alone`: gather on one device too; `replicate`: weights that every
    device holds whole, and `by_rows`: those of which it holds the rows for its share of the input, by the names that
    the step has for them. `shape` gives the shapes of parameters; without it score biases are taken to have a plane for
    each head.
    """

    name = "partition"
    devices: int = 1
    align: int = 16
    alone: bool = False
    replicate: tuple[str, ...] = ()
    by_rows: tuple[str, ...] = ()
    shape: Callable[[str], tuple[int, ...]] | None = None

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        """Replace every `tb.step` by a `tbd.program`, and an encoder before it by a `tbd.source`.

        Raises:
            LoweringError: naming every operation that this machine has no form for.
            TypebarError: `replicate` or `by_rows` names what is no matrix of the step, or one that has no such form.
        """
        encoder = next((item for item in op.body.block.ops if isinstance(item, ir.EncoderOp)), None)
        for step in [item for item in op.body.block.ops if isinstance(item, ir.StepOp)]:
            block = Block(arg_types=[IndexType(), IndexType()])
            worker = self._worker()
            problems: list[Problem] = []
            if encoder is not None:
                worker.memory = MemorySide(step, encoder)
                first = self._worker()
                source = worker.memory.source(first)
                problems += first.problems
            worker.step(step, block)
            problems += worker.problems
            if problems:
                raise LoweringError(problems)
            self._check_named([worker] if encoder is None else [worker, first])
            if encoder is not None:
                Rewriter.replace_op(encoder, source, [])
            vocab, context = step.vocab.value.data, step.context.value.data
            made = dev.ProgramOp(vocab, context, self.devices, self.align, Region(block))
            Rewriter.replace_op(step, made, [])

    def _worker(self) -> _Partitioner:
        return _Partitioner(self.devices, self.align, self.alone, self.shape, self.replicate, self.by_rows)

    def _check_named(self, workers: Sequence[_Partitioner]) -> None:
        """All matrices that are to be whole or to go by rows are there and have such a form."""
        linears = {name: free for worker in workers for name, free in worker.linears.items()}
        whole = [name for name, free in linears.items() if free]
        rows = [name for worker in workers for name in worker.shared_out]
        for option, names, known in (("replicate", self.replicate, whole), ("by_rows", self.by_rows, rows)):
            can, only = ("replicated", "split") if option == "replicate" else ("split by rows", "split by columns")
            for name in names:
                if name in known:
                    continue
                why = f"can only be {only}" if name in linears else "is no matrix of this step"
                raise TypebarError(
                    f"{option} names {name!r}, which {why}: what can be {can} is {', '.join(known) or 'none'}"
                )


class _Partitioner:
    def __init__(
        self,
        devices: int,
        align: int,
        alone: bool = False,
        shape: Callable[[str], tuple[int, ...]] | None = None,
        replicate: Sequence[str] = (),
        by_rows: Sequence[str] = (),
    ) -> None:
        self.devices = devices
        self.replicate, self.by_rows = frozenset(replicate), frozenset(by_rows)
        self.linears: dict[str, bool] = {}
        self.shared_out: dict[str, None] = {}
        self.align = align
        self.gathers = devices > 1 or alone
        self.shape = shape
        self.context = 0
        self.loop: ir.RepeatOp | None = None
        self.outside: Block | None = None
        self.made: dict[tuple[object, ...], SSAValue] = {}
        self.shares: dict[SSAValue, _Share] = {}
        self.whole: dict[SSAValue, _Share] = {}
        self.indices: dict[SSAValue, SSAValue] = {}
        self.problems: list[Problem] = []
        self.block = Block()
        self.memory: MemorySide | None = None
        self.encodes, self.attentions = False, 0

    # Structure ------------------------------------------------------------------------------------------
    def step(self, step: ir.StepOp, block: Block) -> None:
        self.block = block
        for old, new in zip(step.body.block.args[:2], block.args, strict=True):
            self.indices[old] = new
        self.context = step.context.value.data
        last = step.body.block.last_op
        assert isinstance(last, ir.ReturnOp)
        final, chain, steps = last.values[0].owner, set[Operation](), list[float | str]()
        while isinstance(final, ir.ScaleOp | ir.ActivationOp):
            chain.add(final)
            steps.insert(0, final.value.value.data if isinstance(final, ir.ScaleOp) else final.kind.data)
            final = final.x.owner
        for op in step.body.block.ops:
            if op is not final and op is not last and op not in chain:
                self.visit(op)
        if not isinstance(final, ir.LinearOp):
            self.refuse(last, "the logits do not come from a linear operation, with scales and activations after it",
                        "end the model with such a head")  # fmt: skip
            return
        if self.problems:
            return
        source = self.replicated(final.x)
        self.linears[ir.text(final.weight)] = False
        segment = self.segment(final, 0, ir.width(final.out), self.align, self.align)
        self.add(dev.HeadOp(source.value, segment, source.k, source.unit, source.pad, steps), final)

    def visit(self, op: Operation) -> None:
        if self.memory is not None and op in self.memory.operations:
            return
        if isinstance(op, ir.SliceOp | ir.LinearOp | ir.RotaryOp | ir.ScaleOp) and self.comes_later(op):
            return
        if self.problems and not all(self.known(value) for value in op.operands):
            return
        handler = getattr(self, f"on_{op.name.removeprefix('tb.')}", None)
        if handler is None:
            self.refuse(op, f"{op.name} has no form on this machine", "express it with supported operations")
        else:
            handler(op)

    def comes_later(self, op: ir.SliceOp | ir.LinearOp | ir.RotaryOp | ir.ScaleOp) -> bool:
        """Whether an operation is computed where its result is used: by attention, or slice by slice."""
        users = [use.operation for use in op.out.uses]
        if isinstance(op, ir.LinearOp) and users and all(isinstance(user, ir.SliceOp) for user in users):
            return True
        return feeds_attention(op.out) and part_of(op.out) is not None

    def known(self, value: SSAValue) -> bool:
        """Whether a value has a form already, or gets one where it is used."""
        owner = value.owner
        if value in self.shares or value in self.indices or isinstance(owner, ir.ParameterOp):
            return True
        later = isinstance(owner, ir.SliceOp | ir.LinearOp | ir.RotaryOp | ir.ScaleOp) and self.comes_later(owner)
        return later and isinstance(owner, Operation) and all(self.known(operand) for operand in owner.operands)

    def refuse(self, op: Operation, reason: str, remedy: str) -> None:
        self.problems.append(Problem(node_name(op), reason, remedy))

    def add(self, new: Operation, old: Operation) -> SSAValue | None:
        keep_name(new, old)
        self.block.add_op(new)
        for result, source in zip(new.results, old.results, strict=False):
            result.name_hint = source.name_hint
        return new.results[0] if new.results else None

    def keep(self, new: Operation, old: Operation, share: tuple[int, int, int, bool]) -> None:
        value = self.add(new, old)
        assert value is not None
        self.shares[old.results[0]] = _Share(value, *share)

    def share(self, value: SSAValue) -> _Share:
        """What is known of a value; a parameter is loaded whole."""
        owner = value.owner
        if isinstance(owner, ir.ParameterOp):
            size = ir.width(value)
            return _Share(self.param(ir.text(owner.source), size), size, 1, 1, False)
        return self.shares[value]

    def once(self, key: tuple[object, ...], names: Sequence[str], make: Callable[[], Operation]) -> SSAValue:
        """The result of an operation that is the same in all layers, made before the loop unless it has templates."""
        inside = any("{" in name for name in names)
        if key not in self.made or inside:
            block = self.block if inside or self.outside is None else self.outside
            made = make()
            block.add_op(made)
            made.results[0].name_hint = _hint(names[0])
            self.made[key] = made.results[0]
        return self.made[key]

    @property
    def position(self) -> SSAValue:
        """The position of the token."""
        return list(self.indices.values())[1]

    def planes(self, name: str, heads: int) -> int:
        """Planes of a table of score biases; raises TypebarError unless there is one, or one for each head."""
        if self.shape is None:
            return heads
        layer = 0 if self.loop is None else self.loop.start.value.data
        shape = self.shape(ir.layer_name(name, layer, 0))
        if shape[0] not in (1, heads):
            raise TypebarError(
                f"the score bias {name!r} has {shape[0]} planes: it needs 1 or {heads}, one for each head"
            )
        return shape[0]

    def rounded(self, words: int) -> int:
        """Words rounded up to the register alignment."""
        return -(-words // self.align) * self.align

    def replicated(self, value: SSAValue) -> _Share:
        """The whole value on every device, gathered once."""
        share = self.share(value)
        if not share.split or not self.gathers:
            return share
        if value not in self.whole:
            gather = dev.GatherOp(share.value, self.devices)
            home = share.value.owner.parent_block() if isinstance(share.value.owner, Operation) else self.block
            assert home is not None
            home.add_op(gather)
            gather.out.name_hint = f"{share.value.name_hint or 'x'}_all"
            self.whole[value] = _Share(gather.out, share.size, share.unit, share.pad, False)
        return self.whole[value]

    def dense(self, value: SSAValue, op: Operation) -> _Share:
        """The whole value without padding between its units."""
        share = self.replicated(value)
        if share.unit != share.pad:
            self.refuse(op, f"its operand has heads of {share.unit} padded to {share.pad} words",
                        "put a linear operation between attention and it")  # fmt: skip
        return share

    def exact(self, value: SSAValue, op: Operation) -> SSAValue:
        """The whole value in exactly its own words: gathered products may be longer."""
        share = self.dense(value, op)
        if ir.width(share.value) == share.size:
            return share.value
        made = dev.CopyOp(share.value, 0, share.size)
        self.block.add_op(made)
        return made.out

    def carried(self, value: SSAValue, index: int, op: Operation) -> SSAValue:
        """What a layer hands on at `index`: another place's argument is copied first, for its place may be taken."""
        found = self.exact(value, op)
        if not isinstance(found, BlockArgument) or found.index == index:
            return found
        made = dev.CopyOp(found, 0, ir.width(found))
        self.block.add_op(made)
        return made.out

    def whole_here(self, *linears: ir.LinearOp) -> bool:
        """Whether every device holds all of some matrices, which may be."""
        names = [ir.text(op.weight) for op in linears]
        for name in names:
            self.linears.setdefault(name, True)
        return all(name in self.replicate for name in names)

    def segment(self, op: ir.LinearOp, start: int, size: int, unit: int, pad: int, whole: bool = False) -> dev.Segment:
        return segment_of(self, Columns(op, start, size, size, size), unit, pad, whole=whole)

    # Operations -----------------------------------------------------------------------------------------
    def on_embedding(self, op: ir.EmbeddingOp) -> None:
        size = ir.width(op.out)
        made = dev.LookupOp(self.indices[op.index], ir.text(op.weight), op.offset.value.data, size)
        self.keep(made, op, (size, 1, 1, False))

    def on_add(self, op: ir.AddOp) -> None:
        self.binary(op, dev.AddOp)

    def on_mul(self, op: ir.MulOp) -> None:
        self.binary(op, dev.MulOp)

    def binary(self, op: ir.AddOp | ir.MulOp, kind: type[dev.AddOp] | type[dev.MulOp]) -> None:
        lhs, rhs = op.lhs, op.rhs
        if isinstance(lhs.owner, ir.ParameterOp):
            lhs, rhs = rhs, lhs
        left = self.share(lhs)
        right = self.local_parameter(rhs, left) if left.split else None
        right = right or self.share(rhs)
        same = (left.unit, left.pad, ir.width(left.value)) == (right.unit, right.pad, ir.width(right.value))
        if left.split and right.split and same:
            words = ir.width(left.value)
            self.keep(kind(left.value, right.value, words), op, (left.size, left.unit, left.pad, True))
            return
        left, right = self.dense(lhs, op), self.dense(rhs, op)
        self.keep(kind(left.value, right.value, left.size), op, (left.size, 1, 1, False))

    def local_parameter(self, value: SSAValue, like: _Share) -> _Share | None:
        """This device's share of a parameter that meets a split value; None for any other value."""
        if not isinstance(value.owner, ir.ParameterOp):
            return None
        name, words = ir.text(value.owner.source), ir.width(like.value)
        unit, pad = (self.align, self.align) if like.unit == like.pad else (like.unit, like.pad)
        made = dev.BiasOp([dev.Segment(name, "in_out", name, 0, like.size, unit, pad, words // pad)])
        self.block.add_op(made)
        return _Share(made.out, like.size, like.unit, like.pad, True)

    def on_parameter(self, op: ir.ParameterOp) -> None:
        """Loaded where it is used: whole, or a device's share of it."""

    def on_scale(self, op: ir.ScaleOp) -> None:
        share = self.share(op.x)
        words = ir.width(share.value)
        made = dev.ScaleOp(share.value, op.value.value.data, words)
        self.keep(made, op, (share.size, share.unit, share.pad, share.split))

    def on_activation(self, op: ir.ActivationOp) -> None:
        share = self.share(op.x)
        words = ir.width(share.value)
        made = dev.ActivationOp(share.value, op.kind.data, words)
        self.keep(made, op, (share.size, share.unit, share.pad, share.split))

    def param(self, name: str, size: int) -> SSAValue:
        made = dev.ParamOp(name, size)
        self.block.add_op(made)
        made.out.name_hint = _hint(name)
        return made.out

    def on_layer_norm(self, op: ir.LayerNormOp) -> None:
        source = self.dense(op.x, op)
        weight = None if op.weight is None else self.param(ir.text(op.weight), source.size)
        bias = None if op.bias is None else self.param(ir.text(op.bias), source.size)
        made = dev.LayerNormOp(source.value, weight, bias, op.eps.value.data, source.size)
        self.keep(made, op, (source.size, 1, 1, False))

    def on_rms_norm(self, op: ir.RmsNormOp) -> None:
        source = self.dense(op.x, op)
        weight = None if op.weight is None else self.param(ir.text(op.weight), source.size)
        self.keep(dev.RmsNormOp(source.value, weight, op.eps.value.data, source.size), op, (source.size, 1, 1, False))

    def product(self, x: SSAValue, segments: list[dev.Segment], op: Operation) -> SSAValue:
        """The matrix operation and, apart, the addition of its biases."""
        source = self.replicated(x)
        scale = None
        if any(item.scale is not None for item in segments):
            scales = dev.BiasOp(segments, scales=True)
            self.block.add_op(scales)
            scale = scales.out
        matrix = dev.MatrixOp(source.value, segments, source.k, source.unit, source.pad, scale)
        value = self.add(matrix, op)
        assert value is not None
        return self.biased(value, segments, op) if any(item.bias is not None for item in segments) else value

    def biased(self, value: SSAValue, segments: list[dev.Segment], op: Operation) -> SSAValue:
        """A product plus its biases."""
        bias = dev.BiasOp(segments)
        self.block.add_op(bias)
        bias.out.name_hint = f"{value.name_hint or 'linear'}_bias"
        added = self.add(dev.AddOp(value, bias.out, ir.width(value)), op)
        assert added is not None
        return added

    def rows_product(self, op: ir.LinearOp, source: _Share) -> SSAValue:
        """This device's share of the input times the rows that meet it, and the sum of all devices' products."""
        segment = self.segment(op, 0, ir.width(op.out), self.align, self.align, whole=True)
        scale = None
        if segment.scale is not None:
            scales = dev.BiasOp([segment], scales=True)
            self.block.add_op(scales)
            scale = scales.out
        k = ir.width(source.value)
        matrix = dev.MatrixOp(source.value, [segment], k, source.unit, source.pad, scale, by_rows=True)
        partial = self.add(matrix, op)
        assert partial is not None
        gather = dev.GatherOp(partial, self.devices)
        self.block.add_op(gather)
        gather.out.name_hint = f"{partial.name_hint or 'linear'}_parts"
        value = self.add(dev.SumOp(gather.out, self.devices), op)
        assert value is not None
        return value if segment.bias is None else self.biased(value, [segment], op)

    def on_linear(self, op: ir.LinearOp) -> None:
        size = ir.width(op.out)
        whole, source = self.whole_here(op), self.share(op.x)
        if source.split and not whole:
            self.shared_out[ir.text(op.weight)] = None
            if ir.text(op.weight) in self.by_rows and self.devices > 1:
                self.shares[op.out] = _Share(self.rows_product(op, source), size, 1, 1, False)
                return
        segment = self.segment(op, 0, size, self.align, self.align, whole)
        value = self.product(op.x, [segment], op)
        self.shares[op.out] = _Share(value, size, 1, 1, not whole)

    def on_slice(self, op: ir.SliceOp) -> None:
        """Of a product, a product of the columns; of anything else, a copy."""
        columns = columns_of(op.out)
        if columns is not None:
            whole = self.whole_here(columns.linear)
            segment = segment_of(self, columns, self.align, self.align, whole=whole)
            value = self.product(columns.linear.x, [segment], op)
            self.shares[op.out] = _Share(value, columns.size, 1, 1, not whole)
            return
        start, size, run = op.start.value.data, op.size.value.data, op.runs[0]
        if run != size or start % self.align:
            self.refuse(op, f"it takes runs of {run} from {start} on of a value that is no product, and registers are"
                        f" read from multiples of {self.align} on", "slice a linear operation's result")  # fmt: skip
            return
        self.keep(dev.CopyOp(self.dense(op.x, op).value, start, size), op, (size, 1, 1, False))

    def on_rotary(self, op: ir.RotaryOp) -> None:
        self.refuse(op, "it turns a value that is no product, or not for attention alone",
                    "turn the results of the linear operations that make q and k")  # fmt: skip

    def on_cross_attention(self, op: ir.CrossAttentionOp) -> None:
        assert self.memory is not None
        cross_attention(self, op, self.memory.caches[op], self.memory.context)

    def on_attention(self, op: ir.AttentionOp) -> None:
        self_attention(self, op)

    def on_repeat(self, op: ir.RepeatOp) -> None:
        inits = [self.exact(value, op) for value in op.inits]
        outer, self.block = self.block, Block(arg_types=[value.type for value in op.inits])
        self.outside, self.loop = outer, op
        for old, new in zip(op.body.block.args, self.block.args, strict=True):
            new.name_hint = old.name_hint
            self.shares[old] = _Share(new, ir.width(old), 1, 1, False)
        last = op.body.block.last_op
        assert isinstance(last, ir.YieldOp)
        for item in op.body.block.ops:
            if item is not last:
                self.visit(item)
        inner = self.block
        if not self.problems:
            inner.add_op(ir.YieldOp(*(self.carried(value, index, op) for index, value in enumerate(last.values))))
        self.block, self.outside, self.loop = outer, None, None
        if self.problems:
            return
        made = ir.RepeatOp(inits, op.count.value.data, op.start.value.data, Region(inner))
        outer.add_op(made)
        for outer_value, result in zip(op.outs, made.outs, strict=True):
            result.name_hint = outer_value.name_hint
            self.shares[outer_value] = _Share(result, ir.width(outer_value), 1, 1, False)


def _hint(symbol: str) -> str:
    """A name in text for the value of a parameter: without the layer, in the characters that names may have."""
    return re.sub(r"[^A-Za-z0-9_$]+", "_", re.sub(r"\.\{[^}]*\}", "", symbol)).strip("_")
