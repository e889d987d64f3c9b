"""Where a program's data lies in memory: packed matrices, parameters, caches, and what the host shares.

Equal layers lie one after another at a constant stride, so a loop reaches layer l by adding l strides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from numpy.typing import NDArray
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Block, Operation

from typebar.compiler import device_ir as dev
from typebar.compiler import ir
from typebar.isa.errors import TypebarError
from typebar.isa.image_plan import PAGE_BYTES, AddressMap, TensorPlan, plan_regions
from typebar.isa.instructions import FORMAT_BYTES, Format, Region
from typebar.isa.layout import packed_bytes
from typebar.isa.machine import LINE_BYTES, Machine


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
    """K and V of one attention operation: line of head 0 of the first layer; all strides in lines.

    Each head has its K (positions are columns, stored at full column blocks) and then its V (positions are rows).
    """

    line: int
    layer_stride: int
    head_stride: int
    v_offset: int


@dataclass(frozen=True)
class IoMap:
    """The IO region: descriptor words, token ids by position, one step's logits (float32)."""

    descriptor_line: int
    tokens_line: int
    logits_line: int
    logits_per_device: int
    bytes: int


@dataclass
class MemoryPlan:
    """Everything the loader, the packer and the emitter must agree on."""

    plans: list[TensorPlan]
    places: dict[Operation, Place]
    caches: dict[Operation, CachePlace]
    addresses: AddressMap
    kv_bytes: int
    io: IoMap
    accounting: dict[str, int] = field(default_factory=dict)
    """Unpadded bytes of the weights that a token's pass reads and of the logits' matrix among them (passes inside the
    prompt skip it), all devices' packed bytes, K/V bytes that a position adds, and multiply-accumulates of a pass."""


def program_of(module: ModuleOp) -> dev.ProgramOp:
    """The one `tbd.program` of a module.

    Raises:
        TypebarError: there is none, or more than one.
    """
    found = [op for op in module.body.block.ops if isinstance(op, dev.ProgramOp)]
    if len(found) != 1:
        raise TypebarError(f"expected one tbd.program, found {len(found)}: run partition, fuse and allocate first")
    return found[0]


def plan_memory(module: ModuleOp, machine: Machine, weights: Weights, fmt: Format) -> MemoryPlan:
    """Lay out every tensor that a program reads, its caches and its IO region.

    Raises:
        TypebarError: the head dimension exceeds a column block, or the data does not fit the machine.
    """
    program = program_of(module)
    planner = _Planner(machine, weights, fmt, int(program.devices.value.data), int(program.context.value.data))
    planner.walk(program.body.block, [None])
    return planner.finish(program)


class _Planner:
    def __init__(self, machine: Machine, weights: Weights, fmt: Format, devices: int, context: int) -> None:
        self.machine, self.weights, self.fmt = machine, weights, fmt
        self.devices, self.context = devices, context
        self.element = FORMAT_BYTES[fmt]
        self.plans: list[TensorPlan] = []
        self.names: dict[str, Operation] = {}
        self.first: dict[Operation, tuple[Region, str, str | None]] = {}
        self.shared: dict[str, str] = {}
        self.caches: dict[Operation, CachePlace] = {}
        self.kv_lines = 0
        self.accounting = dict.fromkeys(
            ("weight_bytes", "head_bytes", "packed_weight_bytes", "kv_bytes_per_position", "macs_per_token"), 0
        )

    # Walking --------------------------------------------------------------------------------------------
    def walk(self, block: Block, layers: Sequence[int | None]) -> None:
        """Plan a block's tensors, once for each layer; None stands for code outside loops."""
        for layer in layers:
            for op in block.ops:
                if isinstance(op, ir.RepeatOp):
                    start = op.start.value.data
                    self.walk(op.body.block, range(start, start + op.count.value.data))
                else:
                    self.plan(op, layer)
        self.plan_caches(block, len(layers))

    def plan(self, op: Operation, layer: int | None) -> None:
        if isinstance(op, dev.MatrixOp | dev.HeadOp):
            self.plan_matrix(op, layer)
        elif isinstance(op, dev.BiasOp):
            pieces = [_resolved(item, layer) for item in op.pieces]
            meta: dict[str, Any] = {"kind": "bias", "segments": [asdict(item) for item in pieces]}
            words = sum(item.words for item in pieces)
            name = "+".join(dict.fromkeys(item.bias or item.weight for item in pieces))
            self.add(op, name, Region.LOCAL, words * 4, meta)
        elif isinstance(op, dev.ParamOp):
            name = _layer_name(ir.text(op.symbol_), layer)
            self.add(op, name, Region.PARAMS, ir.width(op.out) * 4, {"kind": "vector", "symbol": name})
        elif isinstance(op, dev.LookupOp):
            name = _layer_name(ir.text(op.table), layer)
            rows, width = self.weights.shape(name)
            meta = {"kind": "table", "symbol": name, "rows": rows, "width": width, "row_bytes": self.row_bytes(width)}
            self.add(op, name, Region.PARAMS, rows * self.row_bytes(width), meta)

    def row_bytes(self, width: int) -> int:
        """Bytes of a table's row: whole lines, so that a row's address is a line."""
        return -(-width * self.element // LINE_BYTES) * LINE_BYTES

    def plan_matrix(self, op: dev.MatrixOp | dev.HeadOp, layer: int | None) -> None:
        pieces = [_resolved(item, layer) for item in op.pieces]
        k, unit, pad = (int(a.value.data) for a in (op.k, op.row_unit, op.row_pad))
        words = op.words
        bytes_ = packed_bytes(k, words, self.machine, self.element)
        rows = k if unit == pad else k // pad * unit
        first = self.weights.shape(pieces[0].weight)
        source_rows = first[0] if pieces[0].layout == "in_out" else first[1]
        meta = {
            "kind": "matrix",
            "k": k,
            "words": words,
            "row_unit": unit,
            "row_pad": pad,
            "rows": min(rows, source_rows),
            "segments": [asdict(item) for item in pieces],
        }
        name = "+".join(dict.fromkeys(item.weight for item in pieces)).replace(".weight", "")
        self.add(op, name, Region.WEIGHTS, bytes_, meta)
        useful = source_rows * sum(item.size for item in pieces)
        self.accounting["weight_bytes"] += useful * self.element
        if isinstance(op, dev.HeadOp):
            self.accounting["head_bytes"] = useful * self.element
        self.accounting["packed_weight_bytes"] += bytes_ * self.devices
        self.accounting["macs_per_token"] += useful

    def add(self, op: Operation, name: str, region: Region, bytes_: int, meta: dict[str, Any]) -> None:
        """Plan one tensor on every device that has its own; a parameter used twice is stored once."""
        shared_key = f"{region.name}:{name}" if region is Region.PARAMS else None
        if shared_key is not None and shared_key in self.shared:
            name = self.shared[shared_key]
        else:
            while name in self.names:
                name += "'"
            self.names[name] = op
            if shared_key is not None:
                self.shared[shared_key] = name
            devices: Sequence[int | None] = [None] if region is Region.PARAMS else range(self.devices)
            self.plans.extend(TensorPlan(name, region, device, bytes_, meta) for device in devices)
        if op not in self.first:
            self.first[op] = (region, name, None)
        elif self.first[op][2] is None:
            self.first[op] = (region, self.first[op][1], name)

    def plan_caches(self, block: Block, layers: int) -> None:
        attentions = [op for op in block.ops if isinstance(op, dev.AttentionOp)]
        sizes = [self.cache_lines(op) for op in attentions]
        stride = sum(int(op.heads.value.data) * (k + v) for op, (k, v) in zip(attentions, sizes, strict=True))
        line = self.kv_lines
        for op, (k, v) in zip(attentions, sizes, strict=True):
            self.caches[op] = CachePlace(line, stride, k + v, k)
            line += int(op.heads.value.data) * (k + v)
        self.kv_lines += stride * layers

    def cache_lines(self, op: dev.AttentionOp) -> tuple[int, int]:
        size = int(op.head_dim.value.data)
        if size > self.machine.column_block:
            raise TypebarError(
                f"attention heads of {size} exceed a column block of {self.machine.column_block}: "
                "use a machine with more matrix.interleave x matrix.columns"
            )
        positions = -(-self.context // self.machine.attention_block) * self.machine.attention_block
        k = packed_bytes(size, positions, self.machine, self.element, full=True)
        v = packed_bytes(positions, size, self.machine, self.element)
        return tuple(-(-n // PAGE_BYTES) * PAGE_BYTES // LINE_BYTES for n in (k, v))  # type: ignore[return-value]

    # Result ---------------------------------------------------------------------------------------------
    def finish(self, program: dev.ProgramOp) -> MemoryPlan:
        addresses = plan_regions(self.plans, self.machine, self.devices)
        places = {}
        for op, (region, name, second) in self.first.items():
            line = addresses.lines[name]
            stride = 0 if second is None else addresses.lines[second] - line
            places[op] = Place(region, line, stride)
        head = program.body.block.last_op
        assert isinstance(head, dev.HeadOp)
        io = _io_map(self.context, head.words)
        kv_bytes = self.kv_lines * LINE_BYTES
        self.accounting["kv_bytes_per_position"] = self.kv_useful(program)
        self._check_fit(addresses, kv_bytes, io)
        return MemoryPlan(self.plans, places, self.caches, addresses, kv_bytes, io, self.accounting)

    def kv_useful(self, program: dev.ProgramOp) -> int:
        """Unpadded K and V bytes that one position adds, over all devices and layers."""
        total = 0
        for op in program.walk():
            if isinstance(op, dev.AttentionOp):
                matrix = op.qkv.owner
                assert isinstance(matrix, dev.MatrixOp)
                parent = op.parent_op()
                layers = parent.count.value.data if isinstance(parent, ir.RepeatOp) else 1
                total += layers * self.element * sum(item.size for item in matrix.pieces[1:])
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


def _io_map(context: int, logits: int) -> IoMap:
    tokens_line = 1
    logits_line = tokens_line + -(-(context + 1) * 4 // LINE_BYTES)
    lines = logits_line + -(-logits * 4 // LINE_BYTES)
    return IoMap(0, tokens_line, logits_line, logits, lines * LINE_BYTES)


def _layer_name(name: str, layer: int | None) -> str:
    return name if layer is None else name.replace(ir.LAYER, str(layer))


def _resolved(item: dev.Segment, layer: int | None) -> dev.Segment:
    values = asdict(item)
    values["weight"] = _layer_name(item.weight, layer)
    values["bias"] = None if item.bias is None else _layer_name(item.bias, layer)
    return dev.Segment(**values)


def strides(block: Block, places: Mapping[Operation, Place]) -> dict[Region, int]:
    """Lines from one layer to the next in each region that a loop's body reads.

    Raises:
        TypebarError: two tensors of one region advance differently, which a single loop cannot follow.
    """
    found: dict[Region, int] = {}
    for op in block.ops:
        place = places.get(op)
        if place is None:
            continue
        if found.setdefault(place.region, place.stride) != place.stride:
            raise TypebarError(
                f"layers of a loop lie {place.stride} and {found[place.region]} lines apart in {place.region.name}: "
                "run reroll with smaller loops"
            )
    return found
