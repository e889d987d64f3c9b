"""partition, attention's side: queries, keys and values go to the devices by heads.

Query heads go in contiguous blocks of a size that maps each device's block onto whole K/V heads; a K/V head whose
queries lie on several devices is on each of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from xdsl.ir import Operation, SSAValue

from typebar.compiler import device_ir as dev
from typebar.compiler import ir
from typebar.compiler.device_source import ENCODER_CACHES, AttendOp, CacheOp
from typebar.compiler.segments import Segment

if TYPE_CHECKING:
    from typebar.compiler.passes.partition import _Partitioner as Partitioner


@dataclass(frozen=True)
class Columns:
    """Columns of a linear operation: element i is column start + i // run * stride + i % run."""

    linear: ir.LinearOp
    start: int
    size: int
    run: int
    stride: int

    def slice(self, op: ir.SliceOp) -> Columns | None:
        """These columns' slice; None if it has no form of this kind."""
        start, size, (run, stride) = op.start.value.data, op.size.value.data, op.runs
        if self.run == self.size:
            return Columns(self.linear, self.start + start, size, run, stride)
        whole, inside = divmod(start, self.run)
        first = self.start + whole * self.stride + inside
        if run == size and inside + size <= self.run:
            return Columns(self.linear, first, size, size, size)
        if run == size and inside == 0 and size % self.run == 0:
            return Columns(self.linear, first, size, self.run, self.stride)
        if stride % self.run == 0 and inside + run <= self.run:
            return Columns(self.linear, first, size, run, stride // self.run * self.stride)
        return None


@dataclass(frozen=True)
class Part:
    """Where one of attention's operands comes from: columns of a product, turned by `rotary`, times `factor`."""

    columns: Columns
    rotary: ir.RotaryOp | None = None
    factor: float = 1.0


def columns_of(value: SSAValue) -> Columns | None:
    """The columns of a linear operation that a value is, straight or through slices; None if it is something else."""
    owner = value.owner
    if isinstance(owner, ir.LinearOp):
        size = ir.width(value)
        return Columns(owner, 0, size, size, size)
    if isinstance(owner, ir.SliceOp):
        inner = columns_of(owner.x)
        return None if inner is None else inner.slice(owner)
    return None


def part_of(value: SSAValue) -> Part | None:
    """A value as one of attention's operands; None if it has no such form."""
    owner = value.owner
    if isinstance(owner, ir.RotaryOp):
        part = part_of(owner.x)
        return None if part is None or part.rotary is not None else replace(part, rotary=owner)
    if isinstance(owner, ir.ScaleOp):
        part = part_of(owner.x)
        return None if part is None else replace(part, factor=part.factor * owner.value.value.data)
    columns = columns_of(value)
    return None if columns is None else Part(columns)


def feeds_attention(value: SSAValue) -> bool:
    """Whether a value reaches attention's operands, through slices, rotary positions or scales, and nothing else."""
    users = [use.operation for use in value.uses]
    return bool(users) and all(
        isinstance(user, ir.AttentionOp | ir.CrossAttentionOp)
        or (isinstance(user, ir.SliceOp | ir.RotaryOp | ir.ScaleOp) and feeds_attention(user.results[0]))
        for user in users
    )


@dataclass(frozen=True)
class Heads:
    """How attention heads go to devices: query and K/V heads on each, and devices that share a K/V head."""

    queries: int
    keys: int
    share: int

    @staticmethod
    def of(heads: int, kv_heads: int, devices: int) -> Heads:
        """The smallest blocks of query heads that read whole K/V heads of their device, or one and the same."""
        group = heads // kv_heads
        for queries in range(-(-heads // devices), heads + 1):
            if queries % group == 0:
                return Heads(queries, queries // group, 1)
            if kv_heads == 1:
                return Heads(queries, 1, devices)
            if group % queries == 0:
                return Heads(queries, 1, group // queries)
        raise AssertionError("all heads on one device always fit")


def segment_of(
    worker: Partitioner, columns: Columns, unit: int, pad: int, per_device: int | None = None, whole: bool = False
) -> Segment:
    """A segment of units in rank order, `per_device` if given, or `whole` on every device."""
    if per_device is None:
        units = -(-columns.size // unit)
        per_device = units if whole else -(-units // worker.devices)
    linear, runs = columns.linear, columns.run < columns.size
    bias, scale = (None if name is None else ir.text(name) for name in (linear.bias, linear.scale))
    run, stride = (columns.run, columns.stride) if runs else (0, 0)
    return Segment(
        ir.text(linear.weight), linear.layout.data, bias, columns.start, columns.size, unit, pad, per_device,
        run, stride, share=worker.devices if whole else 1, scale=scale,
    )  # fmt: skip


def products(worker: Partitioner, parts: list[tuple[Columns, Segment]], op: Operation) -> list[tuple[SSAValue, int]]:
    """This device's share of each part, and the word where it starts; parts of one operand are made by one product."""
    keys = [(columns.linear.x, segment.scale is None) for columns, segment in parts]
    made: dict[tuple[SSAValue, bool], tuple[SSAValue, int]] = {}
    for key in dict.fromkeys(keys):
        segments = [segment for (_, segment), other in zip(parts, keys, strict=True) if other == key]
        made[key] = worker.product(key[0], segments, op), 0
    places = []
    for (_, segment), key in zip(parts, keys, strict=True):
        value, start = made[key]
        places.append((value, start))
        made[key] = value, start + segment.words
    return places


def self_attention(worker: Partitioner, op: ir.AttentionOp) -> None:
    """Attention over this operation's own cache: causal or windowed, or to every position in an encoder."""
    kinds = ("none",) if worker.encodes else ("causal", "window")
    if op.mask is None or op.mask.data not in kinds:
        kind = "unclassified" if op.mask is None else op.mask.data
        only = "attention to every position has a form in an encoder" if worker.encodes else (
            "causal and windowed attention have a form in a step"
        )  # fmt: skip
        worker.refuse(op, f"the mask is {kind}", f"only {only}")
        return
    found = [part_of(value) for value in (op.q, op.k, op.v)]
    parts = [part for part in found if part is not None]
    if len(parts) < 3:
        worker.refuse(op, "q, k or v is not a linear operation's result, a slice of one, or one turned by its position",
                      "only such attention has a form on this machine yet")  # fmt: skip
        return
    turned = _rotary(worker, op, parts)
    if worker.problems:
        return
    heads, kv_heads, size = (a.value.data for a in (op.heads, op.kv_heads, op.head_dim))
    linears = [part.columns.linear for part in parts]
    whole = worker.whole_here(*linears)
    if not whole and any(worker.whole_here(linear) for linear in linears):
        worker.refuse(op, "only some of the matrices of q, k and v are replicated", "replicate all of them or none")
    if whole and op.bias is not None:
        worker.refuse(op, "it has score biases, which go by heads", "leave its matrices out of replicate")
    if worker.problems:
        return
    split = Heads.of(heads, kv_heads, 1 if whole else worker.devices)
    shares = (worker.devices,) * 3 if whole else (1, split.share, split.share)
    half, depth = 0, size
    if turned is not None:
        half = worker.rounded(turned.rotary_dim.value.data // 2)
        depth = 2 * half + size - turned.rotary_dim.value.data
    pad = worker.rounded(depth)
    segments = [
        replace(segment_of(worker, part.columns, size, pad, count), share=share)
        for part, count, share in zip(parts, (split.queries, split.keys, split.keys), shares, strict=True)
    ]
    if turned is not None:
        layout = {"turned": turned.rotary_dim.value.data, "half": half}
        layout["interleaved"] = int(turned.pairing.data == "interleaved")
        segments[:2] = [replace(segment, **layout) for segment in segments[:2]]  # type: ignore[arg-type]
    places = products(worker, [(part.columns, s) for part, s in zip(parts, segments, strict=True)], op)
    if turned is not None:
        places = _turn(worker, op, turned, split, (half, pad), places)
    kv_words = sum(
        len(segment.columns(rank)[0]) for segment in segments[1:] for rank in range(1 if whole else worker.devices)
    )
    window = None if op.window is None else op.window.value.data
    scale, bias = op.scale.value.data * parts[0].factor * parts[1].factor, _score_bias(worker, op, split)
    made: dev.AttentionOp | AttendOp
    if worker.encodes:
        cache, worker.attentions = worker.attentions % ENCODER_CACHES, worker.attentions + 1
        worker.add(CacheOp((places[1], places[2]), cache, split.keys, size, depth, pad, kv_words), op)
        (q, at), numbers = places[0], (split.queries, split.keys, size, depth, pad)
        made = AttendOp(q, at, cache, *numbers, scale, worker.context, bias)
    else:
        made = dev.AttentionOp(
            (places[0], places[1], places[2]),
            split.queries,
            split.keys,
            size,
            depth,
            pad,
            scale,
            kv_words,
            window,
            bias,
            None if op.kv_format is None else op.kv_format.data,
        )
    worker.keep(made, op, (heads * size, size, pad, not whole))
    if parts[2].factor != 1.0:
        scaled = dev.ScaleOp(made.out, parts[2].factor, ir.width(made.out))
        worker.keep(scaled, op, (heads * size, size, pad, not whole))


def _rotary(worker: Partitioner, op: ir.AttentionOp, parts: list[Part]) -> ir.RotaryOp | None:
    """The rotary positions of q and k, which must be alike."""
    q, k, v = (part.rotary for part in parts)
    names = ("rotary_dim", "pairing", "cos", "sin")
    if v is not None or (q is None) != (k is None):
        worker.refuse(op, "rotary positions turn only one of q and k, or v", "turn both q and k, and not v")
    elif q is not None and k is not None and any(q.properties[n] != k.properties[n] for n in names):
        worker.refuse(op, "q and k are turned in different ways", "turn both by one table")
    return q


def _turn(
    worker: Partitioner,
    op: ir.AttentionOp,
    turned: ir.RotaryOp,
    split: Heads,
    words: tuple[int, int],
    places: list[tuple[SSAValue, int]],
) -> list[tuple[SSAValue, int]]:
    """q and k, turned: by one operation where one product holds both."""
    half, pad = words
    names = [ir.text(turned.cos), ir.text(turned.sin)]
    key = ("rotary", *names, half, pad)
    position = worker.indices[turned.position]
    row = worker.once(
        key, names, lambda: dev.RotaryRowOp(position, names[0], names[1], turned.rotary_dim.value.data, half, pad)
    )
    (q, _), (k, k_at), v = places
    if q is k:
        both = worker.add(dev.RotaryOp(q, row, split.queries + split.keys, half, pad), op)
        assert both is not None
        return [(both, 0), (both, k_at), v]
    turned_q = worker.add(dev.RotaryOp(q, row, split.queries, half, pad), op)
    turned_k = worker.add(dev.RotaryOp(k, row, split.keys, half, pad), op)
    assert turned_q is not None and turned_k is not None
    return [(turned_q, 0), (turned_k, 0), v]


def _score_bias(worker: Partitioner, op: ir.AttentionOp, split: Heads) -> tuple[SSAValue, int] | None:
    """This token's rows of the score biases, and how many."""
    if op.bias is None or op.bias_kind is None:
        return None
    name, kind, heads = ir.text(op.bias), op.bias_kind.data, op.heads.value.data
    planes = split.queries if worker.planes(name, heads) == heads and heads > 1 else 1
    total = heads if worker.planes(name, heads) == heads else 1
    row = worker.rounded(worker.context)
    made = worker.once(
        ("score bias", name, kind, planes),
        [name],
        lambda: dev.ScoreBiasOp(worker.position, name, kind, total, planes, worker.context, row, worker.encodes),
    )
    return made, planes
