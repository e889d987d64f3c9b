"""What runs once a request: phases over the positions of the source text, rows saved between them, caches filled."""

from __future__ import annotations

from collections.abc import Callable

from xdsl.ir import Operation

from typebar.compiler.device_source import CacheOp, PhaseOp, RestoreOp, SaveOp
from typebar.compiler.emit.attention import cache_offsets, start_heads, store_k, store_v
from typebar.compiler.emit.builder import R, reg
from typebar.compiler.emit.vectors import Emission
from typebar.isa.instructions import Format, Region
from typebar.isa.program import Operand

_IO = int(Region.IO)


def emit_phase(e: Emission, op: PhaseOp, emit: Callable[[Operation], None]) -> None:
    """A loop over the positions of the source text, `emit` for each operation; LENGTH is that of the whole text."""
    build, block = e.build, op.body.block
    build.constant(R.POSITION, 0)
    build.add("sadd", rd=int(R.LENGTH), a=reg(R.SOURCE), b=0)
    label = build.fresh("position")
    build.label(label)
    if block.args[0].uses:
        build.add("sshl", rd=int(R.T1), a=reg(R.POSITION), b=2)
        build.add("sload", region=_IO, rd=int(R.TOKEN), line=e.memory.io.source_line, byte=reg(R.T1))
    for item in block.ops:
        emit(item)
    build.increase(R.POSITION, 1)
    build.branch("blt", label, reg(R.POSITION), reg(R.SOURCE))


def _row(e: Emission, area: int) -> Operand:
    """The line of this position's row."""
    place, build = e.memory.areas[area], e.build
    build.add("smul", rd=int(R.T1), a=reg(R.POSITION), b=build.any_size(place.stride, R.T0))
    build.increase(R.T1, place.line)
    return reg(R.T1)


def emit_save(e: Emission, op: SaveOp) -> None:
    """Words to this position's row."""
    words, start = int(op.size.value.data), int(op.start.value.data)
    e.build.add(
        "store", format=int(Format.FP32), region=_IO, a=e.address(op.x) + start, line=_row(e, int(op.area.value.data)),
        outer=1, inner=words, inner_bytes=4,
    )  # fmt: skip


def emit_restore(e: Emission, op: RestoreOp) -> None:
    """This position's row to registers."""
    words = op.out.type.get_shape()[0]
    line = _row(e, int(op.area.value.data))
    e.build.add("load", format=int(Format.FP32), region=_IO, dst=op.address, line=line, n=words)


def emit_cache(e: Emission, op: CacheOp) -> None:
    """This position's K and V of all local heads to their cache."""
    build, cache = e.build, e.memory.caches[op]
    heads, size, depth, pad = (int(a.value.data) for a in (op.heads, op.head_dim, op.depth, op.pad))
    k, v = e.address(op.k) + int(op.k_at.value.data), e.address(op.v) + int(op.v_at.value.data)
    cache_offsets(e, depth, size, cache.format)
    build.constant(R.OFFSET, 0)
    start_heads(e, cache)
    loop = build.fresh("heads")
    if heads > 1:
        build.label(loop)
    store_k(e, k, depth, reg(R.K_LINE), cache.format)
    store_v(e, v, size, build.line(cache.v_offset, R.K_LINE, R.T2), cache.format)
    if heads > 1:
        build.increase(R.OFFSET, pad)
        build.increase(R.K_LINE, cache.head_stride)
        build.branch("blt", loop, reg(R.OFFSET), build.any_size(heads * pad, R.T0))
