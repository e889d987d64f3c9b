"""Attention of a group of a prompt's tokens, over the same blocks of positions as for one token.

K and V of all the group's tokens go to the cache first, so that its tokens find one another's there. Then the tokens,
and the query heads that share a K/V head, are rows of one matrix instruction; its mask ends one position later for each
token. Masked scores become weights of exactly zero, which change no sum: the bits are those of one token at a time.

Biases of each token's own are added by the vector unit, for those of a matrix instruction are the same in all rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from xdsl.ir import SSAValue

from typebar.compiler import device_ir as dev
from typebar.compiler.device_source import AttendOp
from typebar.compiler.emit.attention import cache_offsets, skipped_lines, start_heads, store_k, store_v
from typebar.compiler.emit.builder import R, reg
from typebar.compiler.emit.rows import RowsEmission
from typebar.compiler.rows import per_token_bias
from typebar.compiler.tables import MASKED_SCORE
from typebar.isa.errors import TypebarError
from typebar.isa.instructions import FORMAT_BYTES, Function, Region, Scale, Source
from typebar.isa.layout import packed_layout
from typebar.isa.machine import LINE_BYTES
from typebar.isa.program import Operand, float_bits

_WORD, _IMMEDIATE = int(Source.WORD), int(Source.IMMEDIATE)
_KV = int(Region.KV)


class _Shape:
    """What is the same for all heads; sizes and strides in words."""

    def __init__(self, e: RowsEmission, op: dev.AttentionOp | AttendOp) -> None:
        self.op, self.cache, self.scratch = op, e.memory.caches[op], e.scratch(op)
        self.size, self.depth, self.pad = (int(a.value.data) for a in (op.head_dim, op.depth, op.pad))
        self.kv_heads, self.sharing, self.heads = int(op.kv_heads.value.data), op.group, e.layout.heads(op)
        context, self.block = e.layout.context(op), e.machine.attention_block
        self.blocks, self.stored = context > self.block, isinstance(op, AttendOp)
        self.length = reg(R.SOURCE if self.stored else R.LENGTH)
        self.stride, self.together = e.layout.score_stride(op), e.layout.alternating(op)
        window = None if isinstance(op, AttendOp) or op.window is None else int(op.window.value.data)
        self.window = None if window is None or window >= context else window
        self.q, self.q_row = e.address(op.q) + int(op.q_at.value.data), e.layout.stride(op.q)
        self.out, self.out_row = e.address(op.out), e.layout.stride(op.out)
        self.bias, self.own = op.bias, per_token_bias(op)
        self.plane = 0 if op.planes is None or op.planes.value.data == 1 else e.limits.round(context)
        if op.bias is not None and self.blocks and self.block % e.limits.align:
            raise TypebarError(
                f"attention_block = {self.block} is no multiple of vector.align = {e.limits.align}: "
                "score biases over several blocks need one"
            )

    def at(self, base: int, head: int, first: int) -> Operand:
        """Address in the first row of query head `first` of the group's K/V head `head`."""
        return reg(R.OFFSET, base + (head * self.sharing + first) * self.pad)

    def query_heads(self, first: int) -> int:
        """Query heads from `first` on that one instruction takes."""
        return min(self.heads, self.sharing - first)


def emit_attention(e: RowsEmission, op: dev.AttentionOp | AttendOp) -> None:
    """K and V to the cache, then all heads: a loop over some K/V heads at a time, and those that are left."""
    build, shape = e.build, _Shape(e, op)
    if isinstance(op, dev.AttentionOp):
        _store(e, op, shape)
    build.add("vmov", b_from=_IMMEDIATE, imm=float_bits(op.scale.value.data), dst=shape.scratch["scale"], n=1)
    if shape.pad > shape.size or shape.blocks:
        build.add("vmov", b_from=_IMMEDIATE, dst=shape.out, n=e.times_rows(shape.out_row))
    if not shape.blocks and not shape.stored:
        _see(e, shape)
    start_heads(e, shape.cache)
    build.constant(R.OFFSET, 0)
    if shape.plane:
        build.constant(R.BIAS, 0)
    whole, rest = divmod(shape.kv_heads, shape.together)
    step = shape.together * shape.sharing

    def advance() -> None:
        build.increase(R.OFFSET, step * shape.pad)
        build.increase(R.BIAS, step * shape.plane)
        build.increase(R.K_LINE, shape.together * shape.cache.head_stride)

    loop = build.fresh("heads")
    build.label(loop)
    _heads(e, shape, shape.together)
    if whole > 1 or rest:
        advance()
    if whole > 1:
        build.branch("blt", loop, reg(R.OFFSET), build.any_size(whole * step * shape.pad, R.T0))
    if rest:
        _heads(e, shape, rest)


def _heads(e: RowsEmission, shape: _Shape, count: int) -> None:
    """`count` K/V heads from register OFFSET and line K_LINE on, with all their query heads."""
    for first in range(0, shape.sharing, shape.heads):
        if shape.blocks:
            _blocks(e, shape, first)
        else:
            _single_block(e, shape, first, count)


def _store(e: RowsEmission, op: dev.AttentionOp, shape: _Shape) -> None:
    """K and V of the group's tokens to their cache, head by head, so that the first head's scores need not wait."""
    build = e.build
    k, v = e.address(op.k) + int(op.k_at.value.data), e.address(op.v) + int(op.v_at.value.data)
    token, head = build.fresh("token"), build.fresh("head")
    start_heads(e, shape.cache)
    build.constant(R.BLOCK_LENGTH, 0)
    build.label(head)
    for register in (R.OFFSET, R.GROUP):
        build.add("smul", rd=int(register), a=reg(R.BLOCK_LENGTH), b=shape.pad)
    build.constant(R.BLOCK, 0)
    build.label(token)
    build.add("sadd", rd=int(R.CHUNK), a=reg(R.POSITION), b=reg(R.BLOCK))
    cache_offsets(e, shape.depth, shape.size, shape.cache.format, R.CHUNK)
    store_k(e, k, shape.depth, reg(R.K_LINE), shape.cache.format)
    store_v(e, v, shape.size, build.line(shape.cache.v_offset, R.K_LINE, R.T2), shape.cache.format, R.GROUP)
    build.increase(R.OFFSET, e.layout.stride(op.k))
    build.increase(R.GROUP, e.layout.stride(op.v))
    build.increase(R.BLOCK, 1)
    build.branch("blt", token, reg(R.BLOCK), reg(e.held))
    if shape.kv_heads > 1:
        build.increase(R.K_LINE, shape.cache.head_stride)
        build.increase(R.BLOCK_LENGTH, 1)
        build.branch("blt", head, reg(R.BLOCK_LENGTH), shape.kv_heads)


# What a block's tokens see ----------------------------------------------------------------------------------
def _see(e: RowsEmission, shape: _Shape) -> None:
    """BLOCK_LENGTH: positions of the block from BLOCK on that the last token sees; HIGH: where the first one's end.

    With a window, SKIP positions at the block's start are left out, HIGH and BLOCK_LENGTH count from there, and the
    first token's window begins at LOW. Without blocks, CHUNK and V_LINE become the lines skipped.
    """
    build = e.build
    build.add("sadd", rd=int(R.HIGH), a=reg(R.POSITION), b=1)
    build.add("sadd", rd=int(R.BLOCK_LENGTH), a=shape.length, b=0)
    if shape.blocks:
        build.add("ssub", rd=int(R.HIGH), a=reg(R.HIGH), b=reg(R.BLOCK))
        build.add("ssub", rd=int(R.BLOCK_LENGTH), a=shape.length, b=reg(R.BLOCK))
        build.add("smin", rd=int(R.BLOCK_LENGTH), a=reg(R.BLOCK_LENGTH), b=shape.block)
    if shape.window is None:
        return
    step = max(e.machine.column_block, e.machine.matrix.lanes, e.limits.align)
    build.add("sadd", rd=int(R.LOW), a=reg(R.HIGH), b=build.any_size(-shape.window, R.T0))
    build.add("smax", rd=int(R.SKIP), a=reg(R.LOW), b=0)
    build.add("sand", rd=int(R.SKIP), a=reg(R.SKIP), b=-step)
    for register in (R.LOW, R.HIGH, R.BLOCK_LENGTH):
        build.add("ssub", rd=int(register), a=reg(register), b=reg(R.SKIP))
    if not shape.blocks:
        skipped_lines(e, shape.depth, shape.size, shape.cache.format, R.CHUNK, R.V_LINE)


def _seen(shape: _Shape, address: int) -> Operand:
    """The word of a row of scores where those that are computed begin."""
    return reg(R.SKIP, address) if shape.window is not None else Operand(0, address)


def _length(shape: _Shape) -> Operand:
    """Positions of the block that are computed."""
    return shape.length if shape.stored and not shape.blocks else reg(R.BLOCK_LENGTH)


# Scores and weights -----------------------------------------------------------------------------------------
def _scores(e: RowsEmission, shape: _Shape, head: int, first: int, slot: int, line: Operand) -> None:
    """Scores and their rows' maxima for some query heads of all tokens."""
    build, s, inner = e.build, shape.scratch, shape.query_heads(first)
    options: dict[str, Operand | int] = {}
    if not shape.stored:
        low: Operand | int = -e.most if shape.window is None else reg(R.LOW)
        options |= {"masked": 1, "mask_outer": 1, "lo": low, "hi": reg(R.HIGH)}
    if shape.bias is not None and not shape.own:
        options |= {"add_bias": 1, "bias": _bias(e, shape, shape.bias, 0, head, first)}
    if not shape.own:
        options |= {"row_max": 1, "maximum": s[f"maximum{slot}"]}
    build.add(
        "matmul", format=int(shape.cache.format), region=_KV, full=1, scaling=int(Scale.WORD), scale=s["scale"],
        dst=_seen(shape, s[f"scores{slot}"]), src=shape.at(shape.q, head, first), k=shape.depth, n=_length(shape),
        line=line, outer=reg(e.held), inner=inner, src_outer=shape.q_row, src_inner=shape.pad,
        dst_outer=inner * shape.stride, dst_inner=shape.stride, **options,
    )  # fmt: skip
    if shape.bias is not None and shape.own:
        for token in range(e.most):
            scores = _seen(shape, s[f"scores{slot}"] + token * shape.stride)
            bias = _bias(e, shape, shape.bias, token, head, first)
            build.add("vadd", dst=scores, a=scores, b=bias, n=_length(shape))
            build.add("vrmax", dst=s[f"maximum{slot}"] + token, a=scores, n=_length(shape))


def _bias(e: RowsEmission, shape: _Shape, bias: SSAValue, token: int, head: int, first: int) -> Operand:
    """Address of the biases of a query head for the positions that are computed."""
    address = e.row(bias, token) + (head * shape.sharing + first) * shape.plane
    used = ((R.BIAS, shape.plane), (R.SKIP, shape.window), (R.BLOCK, shape.blocks))
    parts = [register for register, wanted in used if wanted]
    for index, part in enumerate(parts[1:]):
        e.build.add("sadd", rd=int(R.T0), a=reg(R.T0 if index else parts[0]), b=reg(part))
    return reg(R.T0 if len(parts) > 1 else parts[0] if parts else R.ZERO, address)


def _weights(e: RowsEmission, shape: _Shape, rows: int, slots: Sequence[int]) -> None:
    """exp(score - maximum) in place of scores; their sums over the whole block, zeros where it was skipped.

    Heads take turns, for a row waits for the one before in the same hazard segment.
    """
    build, s, length = e.build, shape.scratch, _length(shape)
    scores = [(slot, row, s[f"scores{slot}"] + row * shape.stride) for row in range(rows) for slot in slots]
    total = length
    if shape.window is not None:
        for _, _, address in scores:
            build.add("vmov", b_from=_IMMEDIATE, dst=address, n=reg(R.SKIP))
        build.add("sadd", rd=int(R.T0), a=length, b=reg(R.SKIP))
        total = reg(R.T0)

    def subtract(item: tuple[int, int, int]) -> None:
        seen = _seen(shape, item[2])
        build.add("vsub", b_from=_WORD, dst=seen, a=seen, b=s[f"maximum{item[0]}"] + item[1], n=length)

    def exponential(item: tuple[int, int, int]) -> None:
        seen = _seen(shape, item[2])
        build.add("vunary", function=int(Function.EXP), dst=seen, a=seen, n=length)

    def add_up(item: tuple[int, int, int]) -> None:
        build.add("vsum", dst=s[f"sum{item[0]}"] + item[1], a=item[2], n=total)

    build.each(scores, subtract, exponential, add_up)


def _values(
    e: RowsEmission, shape: _Shape, inner: int, slot: int, dst: Operand | int, strides: tuple[int, int], line: Operand
) -> None:
    """Weights times V to rows `strides` apart: from token to token, from head to head."""
    e.build.add(
        "matmul", format=int(shape.cache.format), region=_KV, dst=dst, src=_seen(shape, shape.scratch[f"scores{slot}"]),
        k=_length(shape), n=shape.size, line=line, outer=reg(e.held), inner=inner, src_outer=inner * shape.stride,
        src_inner=shape.stride, dst_outer=strides[0], dst_inner=strides[1],
    )  # fmt: skip


def _rows(shape: _Shape, tokens: int, head: int, first: int) -> list[Operand]:
    """Addresses of the results of an instruction's rows."""
    heads = range(first, first + shape.query_heads(first))
    return [shape.at(shape.out + token * shape.out_row, head, query) for token in range(tokens) for query in heads]


# One block --------------------------------------------------------------------------------------------------
def _single_block(e: RowsEmission, shape: _Shape, first: int, count: int) -> None:
    """Plain softmax; all scores come first, so that one head's product runs while the other's softmax does."""
    build, inner = e.build, shape.query_heads(first)
    rows = e.most * inner
    for head in range(count):
        line = build.line(head * shape.cache.head_stride, R.K_LINE, R.T1)
        if shape.window is not None:
            build.add("sadd", rd=int(R.T1), a=line, b=reg(R.CHUNK))
            line = reg(R.T1)
        _scores(e, shape, head, first, head, line)
    _weights(e, shape, rows, range(count))
    for head in range(count):
        sums = shape.scratch[f"sum{head}"]
        build.add("vunary", function=int(Function.RECIP), dst=sums, a=sums, n=rows)
        line = build.line(head * shape.cache.head_stride + shape.cache.v_offset, R.K_LINE, R.T2)
        if shape.window is not None:
            build.add("sadd", rd=int(R.T2), a=line, b=reg(R.V_LINE))
            line = reg(R.T2)
        _values(e, shape, inner, head, shape.at(shape.out, head, first), (shape.out_row, shape.pad), line)
    for head in range(count):
        for row, out in enumerate(_rows(shape, e.most, head, first)):
            build.add("vmul", b_from=_WORD, dst=out, a=out, b=shape.scratch[f"sum{head}"] + row, n=shape.size)


# Several blocks ---------------------------------------------------------------------------------------------
def _blocks(e: RowsEmission, shape: _Shape, first: int) -> None:
    """A running maximum, sum and result for each row. A row that a block shows nothing to keeps what it has."""
    build, s, element = e.build, shape.scratch, FORMAT_BYTES[shape.cache.format]
    rows = e.most * shape.query_heads(first)
    build.add("vmov", b_from=_IMMEDIATE, imm=float_bits(MASKED_SCORE), dst=s["running_maximum"], n=rows)
    build.add("vmov", b_from=_IMMEDIATE, dst=s["running_sum"], n=rows)
    build.constant(R.BLOCK, 0)
    build.add("sadd", rd=int(R.CHUNK), a=reg(R.K_LINE), b=0)
    build.add("sadd", rd=int(R.V_LINE), a=reg(R.K_LINE), b=build.any_size(shape.cache.v_offset, R.T0))

    def advance() -> None:
        k = packed_layout(shape.depth, shape.block, e.machine, element, True).bytes
        build.increase(R.CHUNK, k // LINE_BYTES)
        build.increase(R.V_LINE, packed_layout(shape.block, shape.size, e.machine, element).bytes // LINE_BYTES)
        build.increase(R.BLOCK, shape.block)

    if shape.window is not None:
        seek, found = build.fresh("seek"), build.fresh("found")
        build.add("sadd", rd=int(R.T1), a=reg(R.POSITION), b=build.any_size(1 - shape.window, R.T0))
        build.label(seek)
        build.branch("blt", found, reg(R.T1), reg(R.BLOCK, shape.block))
        advance()
        build.branch("beq", seek, 0, 0)
        build.label(found)
    loop = build.fresh("block")
    build.label(loop)
    _see(e, shape)
    _one_block(e, shape, first)
    advance()
    build.branch("blt", loop, reg(R.BLOCK), shape.length)
    build.add("vunary", function=int(Function.RECIP), dst=s["running_sum"], a=s["running_sum"], n=rows)
    for row, out in enumerate(_rows(shape, e.most, 0, first)):
        build.add("vmul", b_from=_WORD, dst=out, a=out, b=s["running_sum"] + row, n=shape.size)


def _one_block(e: RowsEmission, shape: _Shape, first: int) -> None:
    """A block's scores, and its share of the running maximum, sum and result."""
    build, s, inner = e.build, shape.scratch, shape.query_heads(first)
    rows = e.most * inner
    k_line, v_line = reg(R.CHUNK), reg(R.V_LINE)
    if shape.window is not None:
        skipped_lines(e, shape.depth, shape.size, shape.cache.format, R.T1, R.T2)
        build.add("sadd", rd=int(R.T1), a=reg(R.T1), b=k_line)
        build.add("sadd", rd=int(R.T2), a=reg(R.T2), b=v_line)
        k_line, v_line = reg(R.T1), reg(R.T2)
    maximum, running, correction = s["maximum0"], s["running_maximum"], s["correction"]
    _scores(e, shape, 0, first, 0, k_line)
    build.add("vmax", dst=maximum, a=maximum, b=running, n=rows)
    _weights(e, shape, rows, (0,))
    build.add("vsub", dst=correction, a=running, b=maximum, n=rows)
    build.add("vunary", function=int(Function.EXP), dst=correction, a=correction, n=rows)
    build.add("vmov", dst=running, b=maximum, n=rows)
    build.add("vmul", dst=s["running_sum"], a=s["running_sum"], b=correction, n=rows)
    build.add("vadd", dst=s["running_sum"], a=s["running_sum"], b=s["sum0"], n=rows)
    _values(e, shape, inner, 0, s["part"], (inner * shape.pad, shape.pad), v_line)
    for row, out in enumerate(_rows(shape, e.most, 0, first)):
        build.add("vmul", b_from=_WORD, dst=out, a=out, b=correction + row, n=shape.size)
        build.add("vadd", dst=out, a=out, b=s["part"] + row * shape.pad, n=shape.size)
