"""Attention of one token, some heads at a time, over blocks of positions.

K and V of this token come from registers (rounded as memory rounds them) and are stored after they were used, so
no fetch ever waits for them. One block is plain softmax; several keep a running maximum and sum (Milakov and
Gimelshein 2018), with the same bits for a single block.

Query heads that share a K/V head are rows of one matrix instruction. A window skips whole blocks of positions before
it, and in the first one it sees all that can be skipped; sums still go over the block as a whole, zeros where it was
skipped, so bits are those of a mask over all positions.

Attention over a source text finds all K and V in their cache, this position's among them: `tbd.attend` needs no patch
and stores nothing, for `tbd.cache` did.
"""

from __future__ import annotations

from typebar.compiler import device_ir as dev
from typebar.compiler.device_source import AttendOp
from typebar.compiler.emit.attention_blocks import Blocks, emit_blocks
from typebar.compiler.emit.builder import R, reg
from typebar.compiler.emit.vectors import Emission
from typebar.compiler.memory import CachePlace
from typebar.compiler.scratch import Rows, overlapping, positions_of, rows_of
from typebar.isa.errors import TypebarError
from typebar.isa.instructions import FORMAT_BYTES, Format, Function, Patch, Region, Scale, Source
from typebar.isa.layout import packed_layout
from typebar.isa.machine import LINE_BYTES
from typebar.isa.program import Operand, Value, float_bits

_WORD, _IMMEDIATE = int(Source.WORD), int(Source.IMMEDIATE)
_KV = int(Region.KV)


class _Shape:
    """What is the same for all heads: sizes in words, and how heads are taken."""

    def __init__(self, e: Emission, op: dev.AttentionOp | AttendOp) -> None:
        self.size, self.depth, self.pad = (int(a.value.data) for a in (op.head_dim, op.depth, op.pad))
        self.heads, self.kv_heads, self.group = int(op.heads.value.data), int(op.kv_heads.value.data), op.group
        self.taken: Rows = rows_of(op, e.limits)
        context = positions_of(op, e.limits)
        self.stored = isinstance(op, AttendOp)
        self.length = reg(R.SOURCE if self.stored else R.LENGTH)
        self.format = e.memory.caches[op].format
        self.blocks = context > e.machine.attention_block
        self.stride = e.machine.attention_block if self.blocks else e.limits.round(context)
        window = None if isinstance(op, AttendOp) or op.window is None else int(op.window.value.data)
        self.window = None if window is None or window >= context else window
        self.q = e.address(op.q) + int(op.q_at.value.data)
        self.k = self.v = 0
        if not isinstance(op, AttendOp):
            self.k, self.v = e.address(op.k) + int(op.k_at.value.data), e.address(op.v) + int(op.v_at.value.data)
        self.out, self.bias = op.address, None if op.bias is None else e.address(op.bias)
        self.bias_row = 0 if op.planes is None or op.planes.value.data == 1 else e.limits.round(context)
        if self.bias is not None and self.blocks and e.machine.attention_block % e.limits.align:
            raise TypebarError(
                f"attention_block = {e.machine.attention_block} is no multiple of vector.align = {e.limits.align}: "
                "score biases over several blocks need one"
            )

    def patch(self, kind: Patch, head: int, at: Operand) -> dict[str, Operand | int]:
        """How a matrix instruction gets this position's K or V, which are not in the cache yet."""
        if self.stored:
            return {}
        start = self.k if kind is Patch.COLUMN else self.v
        return {"patch": int(kind), "patch_src": reg(R.OFFSET, start + head * self.pad), "patch_at": at}


def emit_attention(e: Emission, op: dev.AttentionOp | AttendOp) -> None:
    """All local heads: a loop over groups of heads, the heads that no whole group takes, and K and V to the cache."""
    build, cache, shape = e.build, e.memory.caches[op], _Shape(e, op)
    if not shape.stored:
        cache_offsets(e, shape.depth, shape.size, cache.format)
    scale = e.scratch(op)["scale"]
    build.add("vmov", b_from=_IMMEDIATE, imm=float_bits(op.scale.value.data), dst=scale, n=1)
    if shape.pad > shape.size:
        build.note("words between heads are zeros, which take no part")
        build.add("vmov", b_from=_IMMEDIATE, dst=op.address, n=shape.heads * shape.pad)
    if shape.window is not None and not shape.blocks:
        _window(e, shape)
    steps = {R.OFFSET: shape.pad}
    if shape.group > 1:
        steps[R.GROUP] = shape.group * shape.pad
    if shape.bias_row:
        steps[R.BIAS] = shape.group * shape.bias_row
    for register in steps:
        build.constant(register, 0)
    start_heads(e, cache)
    together = shape.taken.keys
    whole, rest = divmod(shape.kv_heads, together)

    def advance() -> None:
        for register, words in steps.items():
            build.increase(register, together * words)
        build.increase(R.K_LINE, together * cache.head_stride)

    if whole > 1:
        loop = build.fresh("heads")
        build.label(loop)
        _emit_group(e, op, shape, together)
        advance()
        build.branch("blt", loop, reg(R.OFFSET), build.any_size(whole * together * shape.pad, R.T0))
    else:
        _emit_group(e, op, shape, together)
        if rest:
            advance()
    if rest:
        _emit_group(e, op, shape, rest)


def start_heads(e: Emission, cache: CachePlace) -> None:
    """K_LINE: the first head's K in this layer's cache."""
    start = e.build.line(cache.line, e.base(Region.KV) if cache.layer_stride else R.ZERO)
    e.build.add("sadd", rd=int(R.K_LINE), a=start, b=0)


def _emit_group(e: Emission, op: dev.AttentionOp | AttendOp, shape: _Shape, count: int) -> None:
    """`count` K/V heads from register OFFSET and line K_LINE on, with all their query heads."""
    for piece in range(shape.taken.pieces):
        if shape.blocks:
            _blocks(e, op, shape, piece)
        else:
            _single_block(e, op, shape, piece, count)
    for head in range(0 if shape.stored else count):
        k_line, v_line = _lines(e, op, head)
        store_k(e, shape.k + head * shape.pad, shape.depth, k_line, shape.format)
        k_line, v_line = _lines(e, op, head)
        store_v(e, shape.v + head * shape.pad, shape.size, v_line, shape.format)


def _lines(e: Emission, op: dev.AttentionOp | AttendOp, head: int) -> tuple[Operand, Operand]:
    """Lines of K and of V of a head of the current group."""
    cache = e.memory.caches[op]
    k = head * cache.head_stride
    return e.build.line(k, R.K_LINE, R.T1), e.build.line(k + cache.v_offset, R.K_LINE, R.T2)


def _query(shape: _Shape, base: int, head: int, row: int) -> Operand:
    """Address of a query head's vector: row `row` of the group's K/V head `head`."""
    register = R.GROUP if shape.group > 1 else R.OFFSET
    return reg(register, base + (head * shape.group + row) * shape.pad)


def cache_offsets(e: Emission, depth: int, size: int, fmt: Format, position: R = R.POSITION) -> None:
    """K_BYTE and V_BYTE: byte offsets of the position in a register in a head's K and V."""
    build, matrix = e.build, e.machine.matrix
    element = FORMAT_BYTES[fmt]
    block = e.machine.column_block
    for register, step, whole, part in (
        (R.K_BYTE, block, k_block(e, depth, fmt), matrix.lanes * element),
        (R.V_BYTE, matrix.lanes, v_chunk(e, size, fmt), element),
    ):
        build.add("sshr", rd=int(register), a=reg(position), b=step.bit_length() - 1)
        build.add("smul", rd=int(register), a=reg(register), b=build.any_size(whole, R.T0))
        build.add("sand", rd=int(R.T1), a=reg(position), b=step - 1)
        build.add("smul", rd=int(R.T1), a=reg(R.T1), b=part)
        build.add("sadd", rd=int(register), a=reg(register), b=reg(R.T1))


def k_block(e: Emission, depth: int, fmt: Format) -> int:
    """Bytes of a head's K from one column block of positions to the next."""
    return packed_layout(depth, e.machine.column_block, e.machine, FORMAT_BYTES[fmt], True).bytes


def v_chunk(e: Emission, size: int, fmt: Format) -> int:
    """Bytes of a head's V from one chunk of `lanes` positions to the next."""
    return packed_layout(e.machine.matrix.lanes, size, e.machine, FORMAT_BYTES[fmt]).bytes


# Windows ------------------------------------------------------------------------------------------------
def _window(e: Emission, shape: _Shape) -> None:
    """SKIP: positions of the block from BLOCK on that are left out; LOW: those masked after them; lengths after SKIP.

    Without blocks, CHUNK and V_LINE become the lines to skip in K and in V.
    """
    build = e.build
    assert shape.window is not None
    step = max(e.machine.column_block, e.machine.matrix.lanes, e.limits.align)
    build.add("sadd", rd=int(R.T1), a=reg(R.POSITION), b=build.any_size(1 - shape.window, R.T0))
    if shape.blocks:
        build.add("ssub", rd=int(R.T1), a=reg(R.T1), b=reg(R.BLOCK))
    build.add("smax", rd=int(R.T1), a=reg(R.T1), b=0)
    build.add("sand", rd=int(R.LOW), a=reg(R.T1), b=step - 1)
    build.add("ssub", rd=int(R.SKIP), a=reg(R.T1), b=reg(R.LOW))
    build.add("ssub", rd=int(R.PATCH), a=reg(R.POSITION), b=reg(R.SKIP))
    if shape.blocks:
        build.add("ssub", rd=int(R.PATCH), a=reg(R.PATCH), b=reg(R.BLOCK))
        build.add("ssub", rd=int(R.T0), a=e.machine.attention_block, b=reg(R.SKIP))
        build.add("smin", rd=int(R.BLOCK_LENGTH), a=reg(R.PATCH, 1), b=reg(R.T0))
    else:
        build.add("sadd", rd=int(R.BLOCK_LENGTH), a=reg(R.PATCH), b=1)
        skipped_lines(e, shape.depth, shape.size, shape.format, R.CHUNK, R.V_LINE)


def skipped_lines(e: Emission, depth: int, size: int, fmt: Format, k: R, v: R) -> None:
    """Lines of K and of V that SKIP positions take."""
    build = e.build
    for register, step, taken in (
        (k, e.machine.column_block, k_block(e, depth, fmt)),
        (v, e.machine.matrix.lanes, v_chunk(e, size, fmt)),
    ):
        build.add("sshr", rd=int(register), a=reg(R.SKIP), b=step.bit_length() - 1)
        build.add("smul", rd=int(register), a=reg(register), b=build.any_size(taken // LINE_BYTES, R.T0))


def _seen(shape: _Shape, address: int) -> Operand:
    """The word of a row of scores where those that are computed begin."""
    return reg(R.SKIP, address) if shape.window is not None else Operand(0, address)


def _clear(e: Emission, shape: _Shape, scores: int, rows: int) -> None:
    """Weights of skipped positions are zeros in sums."""
    if shape.window is not None:
        for row in range(rows):
            e.build.add("vmov", b_from=_IMMEDIATE, dst=scores + row * shape.stride, n=reg(R.SKIP))


def _score_options(e: Emission, shape: _Shape, head: int, row: int, rows: int) -> dict[str, Operand | int]:
    """What a score instruction has besides the product: rows, a window's mask, biases."""
    build = e.build
    options: dict[str, Operand | int] = {"inner": rows}
    if rows > 1:
        options |= {"src_inner": shape.pad, "dst_inner": shape.stride}
    if shape.window is not None:
        options |= {"masked": 1, "lo": reg(R.LOW), "hi": reg(R.BLOCK_LENGTH)}
    if shape.bias is not None:
        address = shape.bias + (head * shape.group + row) * shape.bias_row
        parts = [r for r, used in ((R.BIAS, shape.bias_row), (R.SKIP, shape.window), (R.BLOCK, shape.blocks)) if used]
        if len(parts) > 1:
            build.add("sadd", rd=int(R.T0), a=reg(parts[0]), b=reg(parts[1]))
            if len(parts) > 2:
                build.add("sadd", rd=int(R.T0), a=reg(R.T0), b=reg(parts[2]))
            parts = [R.T0]
        options |= {"add_bias": 1, "bias": reg(parts[0] if parts else R.ZERO, address)}
    return options


# One block ----------------------------------------------------------------------------------------------
def _single_block(e: Emission, op: dev.AttentionOp | AttendOp, shape: _Shape, piece: int, count: int) -> None:
    """Step by step for all heads of a group, so that one head's latency passes while the others compute."""
    build, s = e.build, e.scratch(op)
    windowed = shape.window is not None
    length, patch = (reg(R.BLOCK_LENGTH), reg(R.PATCH)) if windowed else (shape.length, reg(R.POSITION))
    first, rows, heads = piece * shape.taken.rows, shape.taken.of_piece(piece, shape.group), range(count)
    lines = [(head, row) for head in heads for row in range(rows)]
    # With chains, sums and quotients are apart from what products with V wait for; the bits are the same.
    apart = e.limits.chains
    in_product = rows == 1 and not apart

    def total(head: int) -> int:
        return s["sum"] + head * rows if apart else s[f"sum{head}"]

    def part(head: int, row: int) -> Operand:
        out = _query(shape, shape.out, head, first + row)
        return Operand(0, s["part"] + (head * rows + row) * shape.pad) if apart else out

    for head in heads:
        line, _ = _lines(e, op, head)
        if windowed:
            build.add("sadd", rd=int(R.T1), a=line, b=reg(R.CHUNK))
            line = reg(R.T1)
        build.add(
            "matmul", format=int(shape.format), region=_KV, full=1, scaling=int(Scale.WORD),
            row_max=1, dst=_seen(shape, s[f"scores{head}"]), src=_query(shape, shape.q, head, first), k=shape.depth,
            n=length, line=line, outer=1, scale=s["scale"], maximum=s[f"maximum{head}"],
            **shape.patch(Patch.COLUMN, head, patch), **_score_options(e, shape, head, first, rows),
        )  # fmt: skip
    for head in heads:
        _clear(e, shape, s[f"scores{head}"], rows)
    scores = [(_seen(shape, s[f"scores{h}"] + row * shape.stride), s[f"maximum{h}"] + row) for h, row in lines]
    sums = [(s[f"scores{h}"] + row * shape.stride, total(h) + row) for h, row in lines]
    _softmax(e, scores, length, sums, shape.length)
    for head in range(1 if apart else count):
        n = len(lines) if apart else rows
        build.add("vunary", function=int(Function.RECIP), dst=total(head), a=total(head), n=n)
    for head in heads:
        _, line = _lines(e, op, head)
        if windowed:
            build.add("sadd", rd=int(R.T2), a=line, b=reg(R.V_LINE))
            line = reg(R.T2)
        scaled: dict[str, int] = {"scaling": int(Scale.WORD), "scale": total(head)} if in_product else {}
        build.add(
            "matmul", format=int(shape.format), region=_KV, dst=part(head, 0),
            src=_seen(shape, s[f"scores{head}"]), k=length, n=shape.size, line=line, outer=1,
            **shape.patch(Patch.LANE, head, patch), **scaled,
            **_value_rows(shape, rows, shape.pad),
        )  # fmt: skip
    if not in_product:
        for head, row in lines:
            out = _query(shape, shape.out, head, first + row)
            build.add("vmul", b_from=_WORD, dst=out, a=part(head, row), b=total(head) + row, n=shape.size)


def _softmax(
    e: Emission, scores: list[tuple[Operand, int]], length: Operand, sums: list[tuple[int, int]], total: Operand
) -> None:
    """exp(score - maximum) in place of each row of scores, given with its maximum, then each row's sum.

    `sums` has a row's first word and its sum's; `total` words of it count, `length` are computed. Sums have a pass of
    their own: products with V need not wait for them.
    """
    build = e.build

    def subtract(row: tuple[Operand, int]) -> None:
        build.add("vsub", b_from=_WORD, dst=row[0], a=row[0], b=row[1], n=length)

    def exponential(row: tuple[Operand, int]) -> None:
        build.add("vunary", function=int(Function.EXP), dst=row[0], a=row[0], n=length)

    build.each(scores, subtract, exponential)
    for first, result in sums:
        build.add("vsum", dst=result, a=first, n=total)


def _value_rows(shape: _Shape, rows: int, pad: int) -> dict[str, int]:
    return {"inner": rows} | ({"src_inner": shape.stride, "dst_inner": pad} if rows > 1 else {})


# Several blocks -----------------------------------------------------------------------------------------
def _blocks(e: Emission, op: dev.AttentionOp | AttendOp, shape: _Shape, piece: int) -> None:
    build, s, block = e.build, e.scratch(op), e.machine.attention_block
    element = FORMAT_BYTES[shape.format]
    first, rows = piece * shape.taken.rows, shape.taken.of_piece(piece, shape.group)
    if overlapping(op):
        _overlapping(e, op, shape, first, rows)
        return
    build.add("vmov", b_from=_IMMEDIATE, imm=float_bits(float("-inf")), dst=s["running_maximum"], n=rows)
    build.add("vmov", b_from=_IMMEDIATE, dst=s["running_sum"], n=rows)
    build.add("vmov", b_from=_IMMEDIATE, dst=_query(shape, shape.out, 0, first), n=(rows - 1) * shape.pad + shape.size)
    build.constant(R.BLOCK, 0)
    build.add("sadd", rd=int(R.CHUNK), a=reg(R.K_LINE), b=0)
    build.add("sadd", rd=int(R.V_LINE), a=reg(R.K_LINE), b=build.any_size(e.memory.caches[op].v_offset, R.T0))

    def advance() -> None:
        build.increase(R.CHUNK, packed_layout(shape.depth, block, e.machine, element, True).bytes // LINE_BYTES)
        build.increase(R.V_LINE, packed_layout(block, shape.size, e.machine, element).bytes // LINE_BYTES)
        build.increase(R.BLOCK, block)

    if shape.window is not None:
        seek, found = build.fresh("seek"), build.fresh("found")
        build.note("blocks that lie before the window as a whole")
        build.add("sadd", rd=int(R.T1), a=reg(R.POSITION), b=build.any_size(1 - shape.window, R.T0))
        build.label(seek)
        build.branch("blt", found, reg(R.T1), reg(R.BLOCK, block))
        advance()
        build.branch("beq", seek, 0, 0)
        build.label(found)
    loop = build.fresh("block")
    build.label(loop)
    if shape.stored:
        build.add("ssub", rd=int(R.T0), a=shape.length, b=reg(R.BLOCK))
        build.add("smin", rd=int(R.BLOCK_LENGTH), a=reg(R.T0), b=block)
    elif shape.window is None:
        build.add("ssub", rd=int(R.PATCH), a=reg(R.POSITION), b=reg(R.BLOCK))
        build.add("smin", rd=int(R.BLOCK_LENGTH), a=reg(R.PATCH, 1), b=block)
    else:
        _window(e, shape)
    _one_block(e, op, shape, first, rows)
    advance()
    build.branch("blt", loop, reg(R.BLOCK), shape.length)
    build.add("vunary", function=int(Function.RECIP), dst=s["running_sum"], a=s["running_sum"], n=rows)
    for row in range(rows):
        out = _query(shape, shape.out, 0, first + row)
        build.add("vmul", b_from=_WORD, dst=out, a=out, b=s["running_sum"] + row, n=shape.size)


def _overlapping(e: Emission, op: dev.AttentionOp | AttendOp, shape: _Shape, first: int, rows: int) -> None:
    """The blocks of heads without a window or biases, one block's scores beside another's softmax."""
    build, block, element = e.build, e.machine.attention_block, FORMAT_BYTES[shape.format]
    build.add("sadd", rd=int(R.CHUNK), a=reg(R.K_LINE), b=0)
    build.add("sadd", rd=int(R.V_LINE), a=reg(R.K_LINE), b=build.any_size(e.memory.caches[op].v_offset, R.T0))
    column, lane = (shape.patch(kind, 0, Operand()) for kind in (Patch.COLUMN, Patch.LANE))
    both: dict[str, Value] = {"format": int(shape.format), "region": _KV, "outer": 1}
    scores = both | {"full": 1, "scaling": int(Scale.WORD), "row_max": 1, "k": shape.depth} | column
    scores |= {"src": _query(shape, shape.q, 0, first)} | _score_options(e, shape, 0, first, rows)
    values = both | {"n": shape.size} | lane | _value_rows(shape, rows, shape.pad)
    emit_blocks(
        e,
        e.scratch(op),
        Blocks(
            scores,
            values,
            [_query(shape, shape.out, 0, first + row) for row in range(rows)],
            shape.size,
            shape.stride,
            shape.pad,
            block,
            shape.length,
            packed_layout(shape.depth, block, e.machine, element, True).bytes // LINE_BYTES,
            packed_layout(block, shape.size, e.machine, element).bytes // LINE_BYTES,
        ),
    )


def _one_block(e: Emission, op: dev.AttentionOp | AttendOp, shape: _Shape, first: int, rows: int) -> None:
    """A block's scores, and its share of the running maximum, sum and result."""
    build, s = e.build, e.scratch(op)
    length = total = reg(R.BLOCK_LENGTH)
    k_line, v_line = reg(R.CHUNK), reg(R.V_LINE)
    if shape.window is not None:
        skipped_lines(e, shape.depth, shape.size, shape.format, R.T1, R.T2)
        build.add("sadd", rd=int(R.T1), a=reg(R.T1), b=k_line)
        build.add("sadd", rd=int(R.T2), a=reg(R.T2), b=v_line)
        k_line, v_line = reg(R.T1), reg(R.T2)
    maximum, running, correction = s["maximum"], s["running_maximum"], s["correction"]
    build.add(
        "matmul", format=int(shape.format), region=_KV, full=1, scaling=int(Scale.WORD), row_max=1,
        dst=_seen(shape, s["scores"]), src=_query(shape, shape.q, 0, first), k=shape.depth, n=length, line=k_line,
        outer=1, scale=s["scale"], maximum=maximum, **shape.patch(Patch.COLUMN, 0, reg(R.PATCH)),
        **_score_options(e, shape, 0, first, rows),
    )  # fmt: skip
    build.add("vmax", dst=maximum, a=maximum, b=running, n=rows)
    _clear(e, shape, s["scores"], rows)
    seen = [_seen(shape, s["scores"] + row * shape.stride) for row in range(rows)]
    if shape.window is not None:
        build.add("sadd", rd=int(R.T0), a=length, b=reg(R.SKIP))
        total = reg(R.T0)
    sums = [(s["scores"] + row * shape.stride, s["sum"] + row) for row in range(rows)]
    _softmax(e, [(scores, maximum + row) for row, scores in enumerate(seen)], length, sums, total)
    build.add("vsub", dst=correction, a=running, b=maximum, n=rows)
    build.add("vunary", function=int(Function.EXP), dst=correction, a=correction, n=rows)
    build.add("vmov", dst=running, b=maximum, n=rows)
    build.add("vmul", dst=s["running_sum"], a=s["running_sum"], b=correction, n=rows)
    build.add("vadd", dst=s["running_sum"], a=s["running_sum"], b=s["sum"], n=rows)
    build.add(
        "matmul", format=int(shape.format), region=_KV,
        dst=s["part"], src=seen[0], k=length, n=shape.size, line=v_line, outer=1,
        **shape.patch(Patch.LANE, 0, reg(R.PATCH)), **_value_rows(shape, rows, shape.pad),
    )  # fmt: skip
    for row in range(rows):
        out = _query(shape, shape.out, 0, first + row)
        build.add("vmul", b_from=_WORD, dst=out, a=out, b=correction + row, n=shape.size)
        build.add("vadd", dst=out, a=out, b=s["part"] + row * shape.pad, n=shape.size)


# The cache ----------------------------------------------------------------------------------------------
def store_k(e: Emission, k: int, depth: int, line: Operand, fmt: Format, offset: R = R.OFFSET) -> None:
    """A position's K of the head at word `k` + R[offset], to `line`: one column, `lanes` elements a chunk.

    Raises:
        TypebarError: the head's last, partial chunk starts between vectors' bases.
    """
    build, lanes, element = e.build, e.machine.matrix.lanes, FORMAT_BYTES[fmt]
    chunk_bytes = e.machine.column_block * lanes * element
    whole, rest = divmod(depth, lanes)
    if rest and whole * lanes % e.limits.align:
        raise TypebarError(
            f"a head of {depth} words ends {rest} words into a chunk of matrix.lanes = {lanes}, which is no multiple of"
            f" vector.align = {e.limits.align}: take a machine on which it is"
        )
    if whole:
        build.add("store", format=int(fmt), region=_KV, a=reg(offset, k), line=line, byte=reg(R.K_BYTE),
                  outer=whole, inner=lanes, outer_bytes=chunk_bytes, inner_bytes=element)  # fmt: skip
    if rest:
        build.add("store", format=int(fmt), region=_KV, a=reg(offset, k + whole * lanes), line=line,
                  byte=reg(R.K_BYTE, whole * chunk_bytes), outer=1, inner=rest, inner_bytes=element)  # fmt: skip


def store_v(e: Emission, v: int, size: int, line: Operand, fmt: Format, offset: R = R.OFFSET) -> None:
    """A position's V of the head at word `v` + R[offset], to `line`: one lane of every column."""
    stride = e.machine.matrix.lanes * FORMAT_BYTES[fmt]
    e.build.add("store", format=int(fmt), region=_KV, a=reg(offset, v), line=line, byte=reg(R.V_BYTE),
                outer=1, inner=size, inner_bytes=stride)  # fmt: skip
