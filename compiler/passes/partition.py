"""partition: one token's graph becomes one device's share of it.

Attention goes by heads, every other linear operation by columns, each in contiguous blocks; every product takes a
vector that all devices hold whole, so no addition is ever split and the bits do not depend on the number of devices.
A `tbd.gather` stands where a shared-out value is needed whole. This is the split that DFX uses (section 4: head-wise
attention, column-wise products, all-gather without arithmetic).
"""

from __future__ import annotations

from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import IndexType, ModuleOp
from xdsl.ir import Block, Operation, Region, SSAValue
from xdsl.passes import ModulePass
from xdsl.rewriter import Rewriter

from typebar.compiler import device_ir as dev
from typebar.compiler import ir
from typebar.compiler.problems import LoweringError, Problem, keep_name, node_name


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
    """Split a `tb.step` over `devices`; `align` is the register alignment in words."""

    name = "partition"
    devices: int = 1
    align: int = 16

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        """Replace every `tb.step` by a `tbd.program`.

        Raises:
            LoweringError: naming every operation that this machine has no form for.
        """
        for step in [item for item in op.body.block.ops if isinstance(item, ir.StepOp)]:
            block = Block(arg_types=[IndexType(), IndexType()])
            worker = _Partitioner(self.devices, self.align)
            worker.step(step, block)
            if worker.problems:
                raise LoweringError(worker.problems)
            vocab, context = step.vocab.value.data, step.context.value.data
            made = dev.ProgramOp(vocab, context, self.devices, self.align, Region(block))
            Rewriter.replace_op(step, made, [])


class _Partitioner:
    def __init__(self, devices: int, align: int) -> None:
        self.devices = devices
        self.align = align
        self.shares: dict[SSAValue, _Share] = {}
        self.whole: dict[SSAValue, _Share] = {}
        self.indices: dict[SSAValue, SSAValue] = {}
        self.problems: list[Problem] = []
        self.block = Block()

    # Structure ------------------------------------------------------------------------------------------
    def step(self, step: ir.StepOp, block: Block) -> None:
        self.block = block
        for old, new in zip(step.body.block.args, block.args, strict=True):
            self.indices[old] = new
        last = step.body.block.last_op
        assert isinstance(last, ir.ReturnOp)
        final = last.values[0].owner
        for op in step.body.block.ops:
            if op is not final and op is not last:
                self.visit(op)
        if not isinstance(final, ir.LinearOp) or final.bias is not None:
            self.refuse(last, "the logits do not come straight from a linear operation without bias",
                        "end the model with such a head")  # fmt: skip
            return
        if self.problems:
            return
        source = self.replicated(final.x)
        segment = self.segment(final, 0, ir.width(final.out), self.align, self.align)
        self.add(dev.HeadOp(source.value, segment, source.k, source.unit, source.pad), final)

    def visit(self, op: Operation) -> None:
        feeds_attention = op.results and any(_feeds_attention(result) for result in op.results)
        if isinstance(op, ir.SliceOp | ir.LinearOp) and feeds_attention:
            return
        if self.problems and any(v not in self.shares and v not in self.indices for v in op.operands):
            return
        handler = getattr(self, f"on_{op.name.removeprefix('tb.')}", None)
        if handler is None:
            self.refuse(op, f"{op.name} has no form on this machine", "express it with supported operations")
        else:
            handler(op)

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

    def replicated(self, value: SSAValue) -> _Share:
        """The whole value on every device, gathered once."""
        share = self.shares[value]
        if not share.split or self.devices == 1:
            return share
        if value not in self.whole:
            gather = dev.GatherOp(share.value, self.devices)
            self.block.add_op(gather)
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

    def segment(self, op: ir.LinearOp, start: int, size: int, unit: int, pad: int) -> dev.Segment:
        units = -(-size // unit)
        per_device = -(-units // self.devices)
        bias = None if op.bias is None else ir.text(op.bias)
        return dev.Segment(ir.text(op.weight), op.layout.data, bias, start, size, unit, pad, per_device)

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
        left, right = self.shares[op.lhs], self.shares[op.rhs]
        same = (left.split, left.unit, left.pad) == (right.split, right.unit, right.pad)
        if left.split and same:
            words = ir.width(left.value)
            self.keep(kind(left.value, right.value, words), op, (left.size, left.unit, left.pad, True))
            return
        left, right = self.dense(op.lhs, op), self.dense(op.rhs, op)
        self.keep(kind(left.value, right.value, left.size), op, (left.size, 1, 1, False))

    def on_scale(self, op: ir.ScaleOp) -> None:
        share = self.shares[op.x]
        words = ir.width(share.value)
        made = dev.ScaleOp(share.value, op.value.value.data, words)
        self.keep(made, op, (share.size, share.unit, share.pad, share.split))

    def on_activation(self, op: ir.ActivationOp) -> None:
        share = self.shares[op.x]
        words = ir.width(share.value)
        made = dev.ActivationOp(share.value, op.kind.data, words)
        self.keep(made, op, (share.size, share.unit, share.pad, share.split))

    def param(self, name: str, size: int) -> SSAValue:
        made = dev.ParamOp(name, size)
        self.block.add_op(made)
        made.out.name_hint = name.replace(".{}", "").replace(".", "_")
        return made.out

    def on_layer_norm(self, op: ir.LayerNormOp) -> None:
        source = self.dense(op.x, op)
        if op.weight is None:
            return self.refuse(op, "the norm has no weight", "give it one")
        weight = self.param(ir.text(op.weight), source.size)
        bias = None if op.bias is None else self.param(ir.text(op.bias), source.size)
        made = dev.LayerNormOp(source.value, weight, bias, op.eps.value.data, source.size)
        self.keep(made, op, (source.size, 1, 1, False))

    def on_rms_norm(self, op: ir.RmsNormOp) -> None:
        source = self.dense(op.x, op)
        if op.weight is None:
            return self.refuse(op, "the norm has no weight", "give it one")
        weight = self.param(ir.text(op.weight), source.size)
        self.keep(dev.RmsNormOp(source.value, weight, op.eps.value.data, source.size), op, (source.size, 1, 1, False))

    def product(self, x: SSAValue, segments: list[dev.Segment], op: Operation) -> SSAValue:
        """The matrix operation and, apart, the addition of its biases."""
        source = self.replicated(x)
        matrix = dev.MatrixOp(source.value, segments, source.k, source.unit, source.pad)
        value = self.add(matrix, op)
        assert value is not None
        if any(item.bias is not None for item in segments):
            bias = dev.BiasOp(segments)
            self.block.add_op(bias)
            bias.out.name_hint = f"{value.name_hint or 'linear'}_bias"
            added = self.add(dev.AddOp(value, bias.out, ir.width(value)), op)
            assert added is not None
            return added
        return value

    def on_linear(self, op: ir.LinearOp) -> None:
        size = ir.width(op.out)
        segment = self.segment(op, 0, size, self.align, self.align)
        value = self.product(op.x, [segment], op)
        self.shares[op.out] = _Share(value, size, 1, 1, True)

    def on_slice(self, op: ir.SliceOp) -> None:
        self.refuse(op, "a slice is only taken for attention's q, k and v", "split the weight instead")

    def on_attention(self, op: ir.AttentionOp) -> None:
        heads, kv_heads, head_dim = (a.value.data for a in (op.heads, op.kv_heads, op.head_dim))
        if op.mask is None or op.mask.data != "causal":
            kind = "unclassified" if op.mask is None else op.mask.data
            self.refuse(op, f"the mask is {kind}", "only causal attention has a form on this machine yet")
            return
        if kv_heads != heads:
            self.refuse(op, f"{heads} query heads share {kv_heads} key heads",
                        "only one key head per query head has a form on this machine yet")  # fmt: skip
            return
        pad = -(-head_dim // self.align) * self.align
        parts = [self.attention_part(value, head_dim, pad, op) for value in (op.q, op.k, op.v)]
        found = [part for part in parts if part is not None]
        if len(found) < 3:
            return
        if len({id(source) for source, _ in found}) > 1:
            self.refuse(op, "q, k and v come from different values", "only self-attention has a form here yet")
            return
        qkv = self.product(found[0][0], [segment for _, segment in found], op)
        local = found[0][1].per_device
        made = dev.AttentionOp(qkv, local, head_dim, pad, op.scale.value.data)
        self.keep(made, op, (heads * head_dim, head_dim, pad, True))

    def attention_part(
        self, value: SSAValue, head_dim: int, pad: int, op: Operation
    ) -> tuple[SSAValue, dev.Segment] | None:
        """The linear operation, and the columns of it, that make q, k or v."""
        start, size, owner = 0, ir.width(value), value.owner
        if isinstance(owner, ir.SliceOp):
            start, owner = owner.start.value.data, owner.x.owner
        if not isinstance(owner, ir.LinearOp):
            self.refuse(op, "q, k or v is not a linear operation's result, or a slice of one",
                        "only such attention has a form on this machine yet")  # fmt: skip
            return None
        return owner.x, self.segment(owner, start, size, head_dim, pad)

    def on_repeat(self, op: ir.RepeatOp) -> None:
        inits = [self.dense(value, op).value for value in op.inits]
        outer, self.block = self.block, Block(arg_types=[value.type for value in op.inits])
        for old, new in zip(op.body.block.args, self.block.args, strict=True):
            new.name_hint = old.name_hint
            self.shares[old] = _Share(new, ir.width(old), 1, 1, False)
        last = op.body.block.last_op
        assert isinstance(last, ir.YieldOp)
        for item in op.body.block.ops:
            if item is not last:
                self.visit(item)
        inner, self.block = self.block, outer
        if self.problems:
            return
        self.block = inner
        values = [self.yielded(value, op) for value in last.values]
        inner.add_op(ir.YieldOp(*values))
        self.block = outer
        made = ir.RepeatOp(inits, op.count.value.data, op.start.value.data, Region(inner))
        outer.add_op(made)
        for outer_value, result in zip(op.outs, made.outs, strict=True):
            result.name_hint = outer_value.name_hint
            self.shares[outer_value] = _Share(result, ir.width(outer_value), 1, 1, False)

    def yielded(self, value: SSAValue, op: Operation) -> SSAValue:
        share = self.dense(value, op)
        if ir.width(share.value) != share.size:
            self.refuse(op, "a layer ends in a product", "end it in an addition")
        return share.value


def _feeds_attention(value: SSAValue) -> bool:
    """Whether a value reaches an attention's q, k or v, straight or through one slice, and goes nowhere else."""
    users = [use.operation for use in value.uses]
    return bool(users) and all(
        isinstance(user, ir.AttentionOp) or (isinstance(user, ir.SliceOp) and _feeds_attention(user.out))
        for user in users
    )
