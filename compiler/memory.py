"""Where a program's data lies in memory: packed matrices, parameters, caches, and what the host shares.

Equal layers lie one after another at a constant stride, so a loop reaches layer l by adding l strides.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from numpy.typing import NDArray
from xdsl.dialects.builtin import ModuleOp, SymbolRefAttr
from xdsl.ir import Block, Operation

from typebar.compiler import device_ir as dev
from typebar.compiler import ir, tables
from typebar.compiler.device_source import ENCODER_CACHES, AttendOp, CacheOp, PhaseOp, RestoreOp, SaveOp, SourceOp
from typebar.compiler.rows import split_tail
from typebar.isa.errors import TypebarError
from typebar.isa.image_plan import PAGE_BYTES, AddressMap, TensorPlan, plan_regions
from typebar.isa.instructions import FORMAT_BYTES, Format, Region
from typebar.isa.layout import packed_bytes
from typebar.isa.machine import LINE_BYTES, Machine

Layer = tuple[int, int]
"""A loop's first layer by number, and how many layers further: what `ir.layer_name` takes."""


class Weights(Protocol):
    """The source parameters: shapes known at once, values loaded one at a time."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter."""

    def load(self, name: str) -> NDArray[Any]:
        """Values of a parameter."""


@dataclass(frozen=True)
class Place:
    """Line of an operation's data in its region for the first layer, and lines from one layer to the next."""

    region: Region
    line: int
    stride: int


@dataclass(frozen=True)
class CachePlace:
    """K and V of one attention operation, in `format`: line of head 0 of the first layer; all strides in lines.

    Each head has its K (positions are columns, stored at full column blocks) and then its V (positions are rows). The
    layers of an encoder share caches, so that their layer stride is 0.
    """

    line: int
    layer_stride: int
    head_stride: int
    v_offset: int
    format: Format


@dataclass(frozen=True)
class IoMap:
    """The IO region: descriptor words, token ids by position, one step's logits (float32), the source's token ids.

    Rows that a program with an encoder saves for each source position come after them.
    """

    descriptor_line: int
    tokens_line: int
    logits_line: int
    logits_per_device: int
    bytes: int
    source_line: int = 0


@dataclass(frozen=True)
class RowArea:
    """Rows of a value saved for each source position: the first one's line in IO, and lines from row to row."""

    line: int
    stride: int


@dataclass
class MemoryPlan:
    """Everything the loader, the packer and the emitter must agree on."""

    plans: list[TensorPlan]
    places: dict[Hashable, Place]
    caches: dict[Operation, CachePlace]
    addresses: AddressMap
    kv_bytes: int
    io: IoMap
    accounting: dict[str, int] = field(default_factory=dict)
    """Unpadded bytes of the weights that a token's pass reads, and among them of the logits' matrix (passes inside the
    prompt skip it) and of all matrices after the last attention (blocks of a prompt's tokens skip them), all devices'
    packed bytes, K/V bytes that a position adds, and multiply-accumulates of a pass. `prompt_rows` tokens of a prompt
    share a reading of the weights, in blocks of `prompt_groups` times as many: 1 and 1 if they go one by one.
    With an encoder, `source_` ones for a source position's pass, and the K/V bytes that it adds for cross-attention."""
    areas: dict[int, RowArea] = field(default_factory=dict)


def program_of(module: ModuleOp) -> dev.ProgramOp:
    """The one `tbd.program` of a module.

    Raises:
        TypebarError: there is none, or more than one.
    """
    found = [op for op in module.body.block.ops if isinstance(op, dev.ProgramOp)]
    if len(found) != 1:
        raise TypebarError(f"expected one tbd.program, found {len(found)}: run partition, fuse and allocate first")
    return found[0]


def source_of(module: ModuleOp) -> SourceOp | None:
    """The `tbd.source` of a module with an encoder."""
    return next((op for op in module.body.block.ops if isinstance(op, SourceOp)), None)


def plan_memory(module: ModuleOp, machine: Machine, weights: Weights, fmt: Format) -> MemoryPlan:
    """Lay out every tensor that a program reads, its caches and its IO region.

    Raises:
        TypebarError: the head dimension exceeds a column block, or the data does not fit the machine.
    """
    program = program_of(module)
    planner = _Planner(machine, weights, fmt, int(program.devices.value.data), int(program.context.value.data))
    planner.tail.update(split_tail(program)[1])
    source = source_of(module)
    if source is not None:
        planner.source(source)
    planner.walk(program.body.block, [None])
    return planner.finish(program, source)


class _Planner:
    def __init__(self, machine: Machine, weights: Weights, fmt: Format, devices: int, context: int) -> None:
        self.machine, self.weights, self.fmt = machine, weights, fmt
        self.devices, self.context = devices, context
        self.positions = context
        self.element = FORMAT_BYTES[fmt]
        self.plans: list[TensorPlan] = []
        self.names: set[str] = set()
        self.asked: dict[Hashable, str] = {}
        self.first: dict[Hashable, tuple[Region, str, str | None]] = {}
        self.shared: dict[str, str] = {}
        self.caches: dict[Operation, CachePlace] = {}
        self.kv_lines = 0
        self.source_context = 0
        self.rows: dict[int, int] = {}
        self.accounting = dict.fromkeys(
            (
                "weight_bytes",
                "head_bytes",
                "tail_bytes",
                "packed_weight_bytes",
                "kv_bytes_per_position",
                "macs_per_token",
            ),
            0,
        )
        self.tail: set[Operation] = set()

    # Walking --------------------------------------------------------------------------------------------
    def walk(self, block: Block, layers: Sequence[Layer | None]) -> None:
        """Plan a block's tensors, once for each layer; None stands for code outside loops."""
        for layer in layers:
            for op in block.ops:
                if isinstance(op, ir.RepeatOp):
                    self.plan_shared(op)
                    start = op.start.value.data
                    self.walk(op.body.block, [(start, number) for number in range(op.count.value.data)])
                elif isinstance(op, PhaseOp):
                    for inner in op.body.block.ops:
                        self.plan(inner, layer)
                else:
                    self.plan(op, layer)
        self.plan_caches(block, len(layers))

    def plan_shared(self, loop: ir.RepeatOp) -> None:
        """Plan what all layers of a loop read before them, so that what is each layer's own lies at even distances."""
        counted = dict(self.accounting)
        for op in loop.body.walk():
            if not _layered(op):
                self.plan(op, (loop.start.value.data, 0))
        self.accounting = counted | {"packed_weight_bytes": self.accounting["packed_weight_bytes"]}

    def source(self, source: SourceOp) -> None:
        """Plan what runs once a request: its tensors, the encoder's cache, and rows for each source position."""
        self.source_context = int(source.context.value.data)
        self.positions = self.source_context
        self.walk(source.body.block, [None])
        self.positions = self.context
        for name in ("weight_bytes", "macs_per_token"):
            self.accounting[f"source_{name}"] = self.accounting[name]
            self.accounting[name] = 0
        for cache in range(ENCODER_CACHES):
            self.plan_encoder_cache(source, cache)
        for op in source.walk():
            if isinstance(op, SaveOp | RestoreOp):
                words = op.size.value.data if isinstance(op, SaveOp) else ir.width(op.out)
                area = int(op.area.value.data)
                self.rows[area] = max(self.rows.get(area, 0), words)

    def plan_encoder_cache(self, source: SourceOp, cache: int) -> None:
        """A cache that several of the encoder's attentions use, as large as the largest needs."""
        lines = 0
        for op in source.walk():
            if isinstance(op, CacheOp | AttendOp) and op.cache.value.data == cache:
                k, v = self.cache_lines(op, self.source_context)
                self.caches[op] = CachePlace(self.kv_lines, 0, k + v, k, self.kv_format(op))
                lines = max(lines, _kv_heads(op) * (k + v))
        self.kv_lines += lines

    def plan(self, op: Operation, layer: Layer | None) -> None:
        meta: dict[str, Any]
        if isinstance(op, dev.MatrixOp | dev.HeadOp):
            self.plan_matrix(op, layer)
        elif isinstance(op, dev.BiasOp):
            pieces = [_resolved(item, layer) for item in op.pieces]
            self.plan_bias(op, pieces, op.scales is not None)
        elif isinstance(op, dev.ParamOp):
            name = _layer_name(ir.text(op.symbol_), layer)
            self.add(op, name, Region.PARAMS, ir.width(op.out) * 4, {"kind": "vector", "symbol": name})
        elif isinstance(op, dev.LookupOp):
            name = _layer_name(ir.text(op.table), layer)
            rows, width = self.weights.shape(name)
            meta = {"kind": "table", "symbol": name, "rows": rows, "width": width, "row_bytes": self.row_bytes(width)}
            self.add(op, name, Region.PARAMS, rows * self.row_bytes(width), meta)
        elif isinstance(op, dev.RotaryRowOp):
            cos, sin = (_layer_name(ir.text(item), layer) for item in (op.cos, op.sin))
            meta = tables.rotary_meta(op, cos, sin, self.weights.shape(cos), self.positions)
            name = f"{cos}+{sin}:{meta['half']}:{meta['pad']}"
            self.add(op, name, Region.PARAMS, meta["rows"] * meta["row_bytes"], meta)
        elif isinstance(op, dev.ScoreBiasOp):
            name = _layer_name(ir.text(op.table), layer)
            meta = tables.planes_meta(op, name, self.weights.shape(name))
            region = Region.PARAMS if meta["heads"] == 1 else Region.LOCAL
            self.add(op, name, region, meta["planes"] * meta["plane_bytes"], meta)

    def plan_bias(self, key: Hashable, pieces: Sequence[dev.Segment], scales: bool) -> None:
        """Biases or scales of a product's columns."""
        symbols = [item.scale if scales else item.bias for item in pieces]
        name = "+".join(dict.fromkeys(own or item.weight for own, item in zip(symbols, pieces, strict=True)))
        meta: dict[str, Any] = {"kind": "scale" if scales else "bias", "segments": [asdict(item) for item in pieces]}
        self.add(key, name, Region.LOCAL, sum(item.words for item in pieces) * 4, meta)

    def row_bytes(self, width: int) -> int:
        """Bytes of a table's row: whole lines, so that a row's address is a line."""
        return -(-width * self.element // LINE_BYTES) * LINE_BYTES

    def plan_matrix(self, op: dev.MatrixOp | dev.HeadOp, layer: Layer | None) -> None:
        pieces = [_resolved(item, layer) for item in op.pieces]
        k, unit, pad = (int(a.value.data) for a in (op.k, op.row_unit, op.row_pad))
        words = op.words
        element = 1 if op.int8 else self.element
        bytes_ = packed_bytes(k, words, self.machine, element)
        by_rows = isinstance(op, dev.MatrixOp) and op.by_rows is not None
        part = None if isinstance(op, dev.HeadOp) else op.first_row
        rows = (k if unit == pad else k // pad * unit) * (self.devices if by_rows else 1)
        first = self.weights.shape(pieces[0].weight)
        source_rows = first[0] if pieces[0].layout == "in_out" else first[1]
        if part is not None:
            source_rows = min(rows, source_rows - part.value.data)
        meta = {
            "kind": "matrix",
            "k": k,
            "words": words,
            "row_unit": unit,
            "row_pad": pad,
            "rows": min(rows, source_rows),
            "segments": [asdict(item) for item in pieces],
        }
        if op.int8:
            meta["format"] = "int8"
        if by_rows:
            meta["by_rows"] = True
        if part is not None:
            meta["first_row"] = part.value.data
        name = "+".join(dict.fromkeys(item.weight for item in pieces)).replace(".weight", "")
        self.add(op, name, Region.WEIGHTS, bytes_, meta)
        useful = source_rows * sum(item.size for item in pieces)
        self.accounting["weight_bytes"] += useful * element
        if op in self.tail:
            self.accounting["tail_bytes"] += useful * element
        if isinstance(op, dev.HeadOp):
            self.accounting["head_bytes"] = useful * element
            for scales, own in ((False, pieces[0].bias), (True, pieces[0].scale)):
                if own is not None:
                    self.plan_bias((op, "scale" if scales else "bias"), pieces, scales)
        self.accounting["macs_per_token"] += useful

    def add(self, op: Hashable, name: str, region: Region, bytes_: int, meta: dict[str, Any]) -> None:
        """Plan one tensor on every device that has its own; a parameter used twice is stored once."""
        if self.asked.get(op) == name:
            return
        self.asked.setdefault(op, name)
        shared_key = f"{region.name}:{name}" if region is Region.PARAMS or meta["kind"] == "planes" else None
        if shared_key is not None and shared_key in self.shared:
            name = self.shared[shared_key]
        else:
            while name in self.names:
                name += "'"
            self.names.add(name)
            if shared_key is not None:
                self.shared[shared_key] = name
            devices: Sequence[int | None] = [None] if region is Region.PARAMS else range(self.devices)
            self.plans.extend(TensorPlan(name, region, device, bytes_, meta) for device in devices)
            if meta["kind"] == "matrix":
                self.accounting["packed_weight_bytes"] += bytes_ * self.devices
        if op not in self.first:
            self.first[op] = (region, name, None)
        elif self.first[op][2] is None:
            self.first[op] = (region, self.first[op][1], name)

    def plan_caches(self, block: Block, layers: int) -> None:
        attentions = [op for op in block.ops if isinstance(op, dev.AttentionOp | AttendOp)]
        sizes = [
            self.cache_lines(op, self.source_context if isinstance(op, AttendOp) else self.context) for op in attentions
        ]
        stride = sum(_kv_heads(op) * (k + v) for op, (k, v) in zip(attentions, sizes, strict=True))
        line = self.kv_lines
        for op, (k, v) in zip(attentions, sizes, strict=True):
            self.caches[op] = CachePlace(line, stride, k + v, k, self.kv_format(op))
            line += _kv_heads(op) * (k + v)
        self.kv_lines += stride * layers

    def kv_format(self, op: Operation) -> Format:
        """The format of an operation's K and V."""
        named = op.kv_format if isinstance(op, dev.AttentionOp) else None
        return self.fmt if named is None else Format[named.data.upper()]

    def cache_lines(self, op: dev.AttentionOp | AttendOp | CacheOp, context: int) -> tuple[int, int]:
        """Lines of a head's K and V for `context` positions."""
        size, depth = int(op.head_dim.value.data), int(op.depth.value.data)
        if size > self.machine.column_block:
            raise TypebarError(
                f"attention heads of {size} exceed a column block of {self.machine.column_block}: "
                "use a machine with more matrix.interleave x matrix.columns"
            )
        block = self.machine.attention_block
        if context <= block:
            block = math.lcm(self.machine.column_block, self.machine.matrix.lanes)
        positions = -(-context // block) * block
        element = FORMAT_BYTES[self.kv_format(op)]
        k = packed_bytes(depth, positions, self.machine, element, full=True)
        v = packed_bytes(positions, size, self.machine, element)
        return tuple(-(-n // PAGE_BYTES) * PAGE_BYTES // LINE_BYTES for n in (k, v))  # type: ignore[return-value]

    # Result ---------------------------------------------------------------------------------------------
    def finish(self, program: dev.ProgramOp, source: SourceOp | None) -> MemoryPlan:
        addresses = plan_regions(self.plans, self.machine, self.devices)
        places: dict[Hashable, Place] = {}
        for op, (region, name, second) in self.first.items():
            line = addresses.lines[name]
            stride = 0 if second is None else addresses.lines[second] - line
            places[op] = Place(region, line, stride)
        head = program.body.block.last_op
        assert isinstance(head, dev.HeadOp)
        io, areas = _io_map(self.context, head.words, self.source_context, self.rows)
        kv_bytes = self.kv_lines * LINE_BYTES
        self.accounting["kv_bytes_per_position"] = self.kv_useful(program, dev.AttentionOp)
        if source is not None:
            self.share_caches(source, program)
            for name, cross in (("source_kv_bytes_per_position", False), ("cross_kv_bytes_per_position", True)):
                self.accounting[name] = self.kv_useful(source, CacheOp, cross)
        self._check_fit(addresses, kv_bytes, io)
        return MemoryPlan(self.plans, places, self.caches, addresses, kv_bytes, io, self.accounting, areas)

    def share_caches(self, source: SourceOp, program: dev.ProgramOp) -> None:
        """What fills a cross-attention's cache finds it where the step reads it."""
        known = {int(op.cache.value.data): self.caches[op] for op in program.walk() if isinstance(op, AttendOp)}
        for op in source.walk():
            if isinstance(op, CacheOp) and op not in self.caches:
                self.caches[op] = known[int(op.cache.value.data)]

    def kv_useful(
        self, whole: Operation, kind: type[dev.AttentionOp] | type[CacheOp], cross: bool | None = None
    ) -> int:
        """Unpadded K and V bytes that one position adds, over all devices and layers."""
        total = 0
        for op in whole.walk():
            if not isinstance(op, kind):
                continue
            if isinstance(op, CacheOp) and (op.cache.value.data >= ENCODER_CACHES) is not cross:
                continue
            parent = op.parent_op()
            parent = parent.parent_op() if isinstance(parent, PhaseOp) else parent
            layers = parent.count.value.data if isinstance(parent, ir.RepeatOp) else 1
            total += layers * FORMAT_BYTES[self.kv_format(op)] * int(op.kv_words.value.data)
        return total

    def _check_fit(self, addresses: AddressMap, kv_bytes: int, io: IoMap) -> None:
        hbm = addresses.totals[Region.WEIGHTS] + kv_bytes
        ddr = addresses.totals[Region.PARAMS] + addresses.totals[Region.LOCAL] + io.bytes
        for need, have, what in (
            (hbm, self.machine.hbm.capacity_bytes, "HBM (hbm.capacity_bytes)"),
            (ddr, self.machine.ddr.capacity_bytes, "DDR (ddr.capacity_bytes)"),
        ):
            if need > have:
                raise TypebarError(
                    f"the model needs {need} bytes of {what} on each of {self.devices} devices and machine "
                    f"{self.machine.name} has {have}: use more devices or a larger machine"
                )


def _layered(op: Operation) -> bool:
    """Whether an operation reads a tensor of its own in each layer."""
    if isinstance(op, dev.MatrixOp | dev.HeadOp):
        names = [item.weight for item in op.pieces]
    elif isinstance(op, dev.BiasOp):
        names = [(item.bias if op.scales is None else item.scale) or item.weight for item in op.pieces]
    else:
        names = [ir.text(item) for item in op.properties.values() if isinstance(item, SymbolRefAttr)]
    return any("{" in name for name in names)


def _kv_heads(op: dev.AttentionOp | AttendOp | CacheOp) -> int:
    return int((op.heads if isinstance(op, CacheOp) else op.kv_heads).value.data)


def _io_map(
    context: int, logits: int, source_context: int, rows: Mapping[int, int]
) -> tuple[IoMap, dict[int, RowArea]]:
    """The IO region, and where each area of rows lies, `rows[area]` words a row."""
    tokens_line = 1
    logits_line = tokens_line + _lines(context + 1)
    source_line = logits_line + _lines(logits)
    lines, areas = source_line + _lines(source_context), {}
    for area, words in sorted(rows.items()):
        areas[area] = RowArea(lines, _lines(words))
        lines += source_context * _lines(words)
    return IoMap(0, tokens_line, logits_line, logits, lines * LINE_BYTES, source_line), areas


def _lines(words: int) -> int:
    return -(-words * 4 // LINE_BYTES)


def _layer_name(name: str, layer: Layer | None) -> str:
    return name if layer is None else ir.layer_name(name, *layer)


def _resolved(item: dev.Segment, layer: Layer | None) -> dev.Segment:
    return item.renamed(lambda name: _layer_name(name, layer))


def strides(block: Block, places: Mapping[Hashable, Place]) -> dict[Region, int]:
    """Lines from one layer to the next in each region that a loop's body reads; what has no stride is no layer's own.

    Raises:
        TypebarError: two tensors of one region advance differently, which a single loop cannot follow.
    """
    found: dict[Region, int] = {}
    for op in (inner for item in block.ops for inner in item.walk()):
        place = places.get(op)
        if place is None or not place.stride:
            continue
        if found.setdefault(place.region, place.stride) != place.stride:
            raise TypebarError(
                f"layers of a loop lie {place.stride} and {found[place.region]} lines apart in {place.region.name}: "
                "run reroll with smaller loops"
            )
    return found
