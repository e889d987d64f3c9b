"""Attention of one token, head by head, over blocks of positions.

K and V of this token come from registers (rounded as memory rounds them) and are stored after they were used, so
no fetch ever waits for them. One block is plain softmax; several keep a running maximum and sum (Milakov and
Gimelshein 2018), with the same bits for a single block.
"""

from __future__ import annotations

from typebar.compiler import device_ir as dev
from typebar.compiler.emit.builder import R, reg
from typebar.compiler.emit.vectors import Emission
from typebar.compiler.scratch import heads_together
from typebar.isa.instructions import FORMAT_BYTES, Function, Patch, Region, Scale, Source
from typebar.isa.layout import packed_layout
from typebar.isa.machine import LINE_BYTES
from typebar.isa.program import Operand, float_bits

_WORD, _IMMEDIATE = int(Source.WORD), int(Source.IMMEDIATE)
_KV = int(Region.KV)


def emit_attention(e: Emission, op: dev.AttentionOp) -> None:
    """All local heads: a loop over groups of heads, the heads that no whole group takes, and K and V to the cache."""
    build, cache = e.build, e.memory.caches[op]
    heads, pad = int(op.heads.value.data), int(op.pad.value.data)
    group = heads_together(op, e.limits)
    _cache_offsets(e, op)
    scale = e.scratch(op)["scale"]
    build.add("vmov", b_from=_IMMEDIATE, imm=float_bits(op.scale.value.data), dst=scale, n=1)
    if pad > int(op.head_dim.value.data):
        build.note("words between heads meet zero weights, but must be numbers")
        build.add("vmov", b_from=_IMMEDIATE, dst=op.address, n=heads * pad)
    build.constant(R.OFFSET, 0)
    start = build.line(cache.line, e.base(Region.KV))
    build.add("sadd", rd=int(R.K_LINE), a=start, b=0)
    whole, rest = divmod(heads, group)
    if whole > 1:
        loop = build.fresh("heads")
        build.label(loop)
        _emit_group(e, op, group)
        build.increase(R.OFFSET, group * pad)
        build.increase(R.K_LINE, group * cache.head_stride)
        build.branch("blt", loop, reg(R.OFFSET), build.any_size(whole * group * pad, R.T0))
    else:
        _emit_group(e, op, group)
        if rest:
            build.increase(R.OFFSET, group * pad)
            build.increase(R.K_LINE, group * cache.head_stride)
    if rest:
        _emit_group(e, op, rest)


def _emit_group(e: Emission, op: dev.AttentionOp, count: int) -> None:
    """`count` heads from register OFFSET and line K_LINE on."""
    if e.limits.context <= e.machine.attention_block:
        _single_block(e, op, count)
    else:
        _blocks(e, op)
    for head in range(count):
        _store_k(e, op, head)
        _store_v(e, op, head)


def _lines(e: Emission, op: dev.AttentionOp, head: int) -> tuple[Operand, Operand]:
    """Lines of K and of V of a head of the current group."""
    cache = e.memory.caches[op]
    k = head * cache.head_stride
    return e.build.line(k, R.K_LINE, R.T1), e.build.line(k + cache.v_offset, R.K_LINE, R.T2)


def _parts(e: Emission, op: dev.AttentionOp) -> tuple[int, int, int]:
    """Word addresses of head 0's q, k and v."""
    start, step = e.address(op.qkv), int(op.heads.value.data) * int(op.pad.value.data)
    return start, start + step, start + 2 * step


def _cache_offsets(e: Emission, op: dev.AttentionOp) -> None:
    """Byte offsets of this position in a head's K and V."""
    build, matrix = e.build, e.machine.matrix
    element, size = FORMAT_BYTES[e.format], int(op.head_dim.value.data)
    block = e.machine.column_block
    k_block_bytes = packed_layout(size, block, e.machine, element, True).bytes
    v_chunk_bytes = packed_layout(matrix.lanes, size, e.machine, element).bytes
    for register, step, whole, part in (
        (R.K_BYTE, block, k_block_bytes, matrix.lanes * element),
        (R.V_BYTE, matrix.lanes, v_chunk_bytes, element),
    ):
        build.add("sshr", rd=int(register), a=reg(R.POSITION), b=step.bit_length() - 1)
        build.add("smul", rd=int(register), a=reg(register), b=build.any_size(whole, R.T0))
        build.add("sand", rd=int(R.T1), a=reg(R.POSITION), b=step - 1)
        build.add("smul", rd=int(R.T1), a=reg(R.T1), b=part)
        build.add("sadd", rd=int(register), a=reg(register), b=reg(R.T1))


def _single_block(e: Emission, op: dev.AttentionOp, count: int) -> None:
    """Step by step for all heads of a group, so that one head's latency passes while the others compute."""
    build, s = e.build, e.scratch(op)
    q, k, v = _parts(e, op)
    size, pad = int(op.head_dim.value.data), int(op.pad.value.data)
    length, heads = reg(R.LENGTH), range(count)
    for head in heads:
        line, _ = _lines(e, op, head)
        build.add(
            "matmul", format=int(e.format), region=_KV, full=1, patch=int(Patch.COLUMN), scaling=int(Scale.WORD),
            row_max=1, dst=s[f"scores{head}"], src=reg(R.OFFSET, q + head * pad), k=size, n=length, line=line, outer=1,
            inner=1, scale=s["scale"], maximum=s[f"maximum{head}"], patch_src=reg(R.OFFSET, k + head * pad),
            patch_at=reg(R.POSITION),
        )  # fmt: skip
    for head in heads:
        scores = s[f"scores{head}"]
        build.add("vsub", b_from=_WORD, dst=scores, a=scores, b=s[f"maximum{head}"], n=length)
    for head in heads:
        build.add("vunary", function=int(Function.EXP), dst=s[f"scores{head}"], a=s[f"scores{head}"], n=length)
    for head in heads:
        build.add("vsum", dst=s[f"sum{head}"], a=s[f"scores{head}"], n=length)
    for head in heads:
        build.add("vunary", function=int(Function.RECIP), dst=s[f"sum{head}"], a=s[f"sum{head}"], n=1)
    for head in heads:
        _, line = _lines(e, op, head)
        build.add(
            "matmul", format=int(e.format), region=_KV, patch=int(Patch.LANE), scaling=int(Scale.WORD),
            dst=reg(R.OFFSET, op.address + head * pad), src=s[f"scores{head}"], k=length, n=size, line=line, outer=1,
            inner=1, scale=s[f"sum{head}"], patch_src=reg(R.OFFSET, v + head * pad), patch_at=reg(R.POSITION),
        )  # fmt: skip


def _blocks(e: Emission, op: dev.AttentionOp) -> None:
    build, s = e.build, e.scratch(op)
    size, element, block = int(op.head_dim.value.data), FORMAT_BYTES[e.format], e.machine.attention_block
    out = reg(R.OFFSET, op.address)
    build.add("vmov", b_from=_IMMEDIATE, imm=float_bits(float("-inf")), dst=s["running_maximum"], n=1)
    build.add("vmov", b_from=_IMMEDIATE, dst=s["running_sum"], n=1)
    build.add("vmov", b_from=_IMMEDIATE, dst=out, n=size)
    build.constant(R.BLOCK, 0)
    build.add("sadd", rd=int(R.CHUNK), a=reg(R.K_LINE), b=0)
    build.add("sadd", rd=int(R.V_LINE), a=reg(R.K_LINE), b=build.any_size(e.memory.caches[op].v_offset, R.T0))
    loop = build.fresh("block")
    build.label(loop)
    build.add("ssub", rd=int(R.PATCH), a=reg(R.POSITION), b=reg(R.BLOCK))
    build.add("smin", rd=int(R.BLOCK_LENGTH), a=reg(R.PATCH, 1), b=block)
    _one_block(e, op)
    build.increase(R.CHUNK, packed_layout(size, block, e.machine, element, True).bytes // LINE_BYTES)
    build.increase(R.V_LINE, packed_layout(block, size, e.machine, element).bytes // LINE_BYTES)
    build.increase(R.BLOCK, block)
    build.branch("blt", loop, reg(R.BLOCK), reg(R.LENGTH))
    build.add("vunary", function=int(Function.RECIP), dst=s["running_sum"], a=s["running_sum"], n=1)
    build.add("vmul", b_from=_WORD, dst=out, a=out, b=s["running_sum"], n=size)


def _one_block(e: Emission, op: dev.AttentionOp) -> None:
    build, s = e.build, e.scratch(op)
    q, k, v = _parts(e, op)
    size, length, out = int(op.head_dim.value.data), reg(R.BLOCK_LENGTH), reg(R.OFFSET, op.address)
    maximum, running, correction = s["maximum"], s["running_maximum"], s["correction"]
    build.add(
        "matmul", format=int(e.format), region=_KV, full=1, patch=int(Patch.COLUMN), scaling=int(Scale.WORD), row_max=1,
        dst=s["scores"], src=reg(R.OFFSET, q), k=size, n=length, line=reg(R.CHUNK), outer=1, inner=1,
        scale=s["scale"], maximum=maximum, patch_src=reg(R.OFFSET, k), patch_at=reg(R.PATCH),
    )  # fmt: skip
    build.add("vmax", dst=maximum, a=maximum, b=running, n=1)
    build.add("vsub", b_from=_WORD, dst=s["scores"], a=s["scores"], b=maximum, n=length)
    build.add("vunary", function=int(Function.EXP), dst=s["scores"], a=s["scores"], n=length)
    build.add("vsub", dst=correction, a=running, b=maximum, n=1)
    build.add("vunary", function=int(Function.EXP), dst=correction, a=correction, n=1)
    build.add("vmov", dst=running, b=maximum, n=1)
    build.add("vsum", dst=s["sum"], a=s["scores"], n=length)
    build.add("vmul", dst=s["running_sum"], a=s["running_sum"], b=correction, n=1)
    build.add("vadd", dst=s["running_sum"], a=s["running_sum"], b=s["sum"], n=1)
    build.add(
        "matmul", format=int(e.format), region=_KV, patch=int(Patch.LANE),
        dst=s["part"], src=s["scores"], k=length, n=size, line=reg(R.V_LINE), outer=1, inner=1,
        patch_src=reg(R.OFFSET, v), patch_at=reg(R.PATCH),
    )  # fmt: skip
    build.add("vmul", b_from=_WORD, dst=out, a=out, b=correction, n=size)
    build.add("vadd", dst=out, a=out, b=s["part"], n=size)


def _store_k(e: Emission, op: dev.AttentionOp, head: int) -> None:
    """This position's K of a head of the group: one column, `lanes` elements a chunk."""
    build, lanes, element = e.build, e.machine.matrix.lanes, FORMAT_BYTES[e.format]
    size = int(op.head_dim.value.data)
    k = _parts(e, op)[1] + head * int(op.pad.value.data)
    line, _ = _lines(e, op, head)
    chunk_bytes = e.machine.column_block * lanes * element
    whole, rest = divmod(size, lanes)
    if whole:
        build.add("store", format=int(e.format), region=_KV, a=reg(R.OFFSET, k), line=line, byte=reg(R.K_BYTE),
                  outer=whole, inner=lanes, outer_bytes=chunk_bytes, inner_bytes=element)  # fmt: skip
    if rest:
        build.add("store", format=int(e.format), region=_KV, a=reg(R.OFFSET, k + whole * lanes), line=line,
                  byte=reg(R.K_BYTE, whole * chunk_bytes), outer=1, inner=rest, inner_bytes=element)  # fmt: skip


def _store_v(e: Emission, op: dev.AttentionOp, head: int) -> None:
    """This position's V of a head of the group: one lane of every column."""
    v = _parts(e, op)[2] + head * int(op.pad.value.data)
    _, line = _lines(e, op, head)
    stride = e.machine.matrix.lanes * FORMAT_BYTES[e.format]
    e.build.add("store", format=int(e.format), region=_KV, a=reg(R.OFFSET, v), line=line, byte=reg(R.V_BYTE),
                outer=1, inner=int(op.head_dim.value.data), inner_bytes=stride)  # fmt: skip
