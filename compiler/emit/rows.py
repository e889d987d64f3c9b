"""Instructions for a group of a prompt's tokens: everything that is not a loop or an attention.

Addresses are those of the group's rows. Vectors of tokens that a partly filled group lacks hold anything: element by
element they are computed along with the others, but nothing reads them that raises a flag or leaves the registers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from xdsl.ir import BlockArgument, Operation, SSAValue

from typebar.compiler import device_ir as dev
from typebar.compiler import ir
from typebar.compiler.emit.builder import R, reg
from typebar.compiler.emit.vectors import Emission, add_line, begin_last, epilogue, immediate
from typebar.compiler.rows import Layout, place_of, ranked, scratch_at, shared
from typebar.isa.instructions import FORMAT_BYTES, Format, Function, Region, Source
from typebar.isa.machine import LINE_BYTES
from typebar.isa.program import Operand

_IMMEDIATE, _WORD = int(Source.IMMEDIATE), int(Source.WORD)


@dataclass
class RowsEmission(Emission):
    """What emits blocks: addresses are those of group `group`, which the emitting loop sets."""

    layout: Layout = field(kw_only=True)
    group: int = 0

    def address(self, value: SSAValue) -> int:
        """Word address of the group's first row of a value, or of a shared one."""
        return place_of(value, self.group)

    def row(self, value: SSAValue, row: int) -> int:
        """Word address of one of the group's rows."""
        return self.address(value) + (0 if shared(value) else row * self.layout.stride(value))

    def scratch(self, op: Operation, chunk: int = 0) -> dict[str, int]:
        """Word addresses of an operation's scratch vectors."""
        start = scratch_at(op, self.group)
        return {name: start + offset for name, offset in self.layout.scratch(op).items()}

    @property
    def most(self) -> int:
        """Tokens of a full group."""
        return self.layout.tokens.rows

    def dealt(self, value: SSAValue) -> bool:
        """Whether a device has only its own tokens' rows of a value."""
        return value in self.layout.dealt

    def own(self, value: SSAValue, register: R) -> R:
        """A register with the words before this device's own rows of a value, which are 0 where it has no others."""
        if self.dealt(value) or shared(value):
            return R.ZERO
        owner = value.owner
        gathered = self.ranked(value) and isinstance(owner, dev.GatherOp)
        row = ir.width(owner.x) if gathered else self.layout.stride(value)  # type: ignore[union-attr]
        self.build.add("smul", rd=int(register), a=reg(R.RANK), b=self.build.any_size(self.layout.own_rows * row, R.T0))
        return register

    @property
    def held(self) -> R:
        """The register with the group's number of tokens."""
        return R.ROWS_NEXT if self.group else R.ROWS

    def times_rows(self, words: int) -> Operand:
        """`words` for each token of the group, worked out in T0."""
        self.build.add("smul", rd=int(R.T0), a=reg(self.held), b=self.build.any_size(words, R.T0))
        return reg(R.T0)

    def ranked(self, value: SSAValue) -> bool:
        """Whether a value lies by device, then by row."""
        return ranked(value, self.layout)


# Tables ---------------------------------------------------------------------------------------------------
def _row_loop(e: RowsEmission, dealt: bool = False) -> tuple[str, str]:
    """Begin a loop over the group's tokens, or over this device's: T1 is the position, BLOCK the row.

    OFFSET is the words before the row, and GROUP the row after the last. Returns the labels of loop and end.
    """
    build, own = e.build, e.layout.own_rows
    label, none = build.fresh("row"), build.fresh("none")
    build.constant(R.OFFSET, 0)
    build.add("sadd", rd=int(R.GROUP), a=reg(e.held), b=0)
    build.add("smul", rd=int(R.BLOCK), a=reg(R.RANK), b=own if dealt else 0)
    if dealt:
        build.add("smin", rd=int(R.GROUP), a=reg(R.GROUP), b=reg(R.BLOCK, own))
        build.branch("bge", none, reg(R.BLOCK), reg(R.GROUP))
    build.label(label)
    build.add("sadd", rd=int(R.T1), a=reg(R.POSITION), b=reg(R.BLOCK))
    return label, none


def _end_row_loop(e: RowsEmission, labels: tuple[str, str], stride: int) -> None:
    e.build.increase(R.BLOCK, 1)
    e.build.increase(R.OFFSET, stride)
    e.build.branch("blt", labels[0], reg(R.BLOCK), reg(R.GROUP))
    e.build.label(labels[1])


def emit_lookup(e: RowsEmission, op: dev.LookupOp) -> None:
    """Each token's embedding row, by token or by position."""
    build, words, stride = e.build, ir.width(op.out), e.layout.stride(op.out)
    assert isinstance(op.index, BlockArgument)
    labels = _row_loop(e, e.dealt(op.out))
    if op.index.index == 0:
        build.add("sshl", rd=int(R.T1), a=reg(R.T1), b=2)
        build.add("sload", region=int(Region.IO), rd=int(R.T1), line=e.memory.io.tokens_line, byte=reg(R.T1))
    row_lines = -(-words * FORMAT_BYTES[e.format] // LINE_BYTES)
    build.add("smul", rd=int(R.T1), a=reg(R.T1, op.offset.value.data), b=row_lines)
    add_line(e, e.memory.places[op])
    dst = reg(R.OFFSET, e.address(op.out))
    build.add("load", format=int(e.format), region=int(Region.PARAMS), dst=dst, line=reg(R.T1), n=words)
    _end_row_loop(e, labels, stride)


def emit_rotary_row(e: RowsEmission, op: dev.RotaryRowOp) -> None:
    """Each position's rotary factors."""
    place, words, stride = e.memory.places[op], ir.width(op.out), e.layout.stride(op.out)
    labels = _row_loop(e)
    e.build.add("smul", rd=int(R.T1), a=reg(R.T1), b=-(-words * 4 // LINE_BYTES))
    add_line(e, place)
    dst = reg(R.OFFSET, e.address(op.out))
    e.build.add("load", format=int(Format.FP32), region=int(place.region), dst=dst, line=reg(R.T1), n=words)
    _end_row_loop(e, labels, stride)


def emit_score_bias(e: RowsEmission, op: dev.ScoreBiasOp) -> None:
    """The planes of each token's biases, as far as the last token of the group sees; zeros where it sees nothing.

    Biases by key position alone are the same for all tokens of the block, and loaded once.
    """
    build, place, stride = e.build, e.memory.places[op], e.layout.stride(op.out)
    context, kind = int(op.context.value.data), op.kind.data
    lines = [place.line + plane * -(-4 * _words(op) // LINE_BYTES) for plane in range(int(op.planes.value.data))]
    row = int(op.row.value.data)
    if kind == "column":
        build.add("sadd", rd=int(R.T2), a=reg(R.LENGTH), b=reg(R.ROWS_NEXT) if e.layout.tokens.groups > 1 else 0)
        for plane, line in enumerate(lines):
            build.add("load", format=int(Format.FP32), region=int(place.region), dst=e.address(op.out) + plane * row,
                      line=build.line(line, e.base_of(place)), n=reg(R.T2))  # fmt: skip
        return
    build.add("vmov", b_from=_IMMEDIATE, dst=e.address(op.out), n=e.times_rows(stride))
    labels = _row_loop(e)
    build.add("sadd", rd=int(R.CHUNK), a=reg(R.T1, 1), b=0)
    if kind == "relative":
        build.add("ssub", rd=int(R.T2), a=build.any_size(context - 1, R.T0), b=reg(R.T1))
        build.add("sshl", rd=int(R.T2), a=reg(R.T2), b=2)
    else:
        build.add("smul", rd=int(R.T2), a=reg(R.T1), b=build.any_size(4 * context, R.T0))
    for plane, line in enumerate(lines):
        build.add("load", format=int(Format.FP32), region=int(place.region), byte=reg(R.T2), n=reg(R.CHUNK),
                  dst=reg(R.OFFSET, e.address(op.out) + plane * row), line=build.line(line, e.base_of(place)),
                  )  # fmt: skip
    _end_row_loop(e, labels, stride)


def _words(op: dev.ScoreBiasOp) -> int:
    """Words of one plane."""
    total = 1
    for size in op.shape:
        total *= size
    return total


# Products and the ring ------------------------------------------------------------------------------------
def emit_matrix(e: RowsEmission, op: dev.MatrixOp) -> None:
    """One matrix instruction for all tokens of the group, and one that adds what each token has of its own."""
    place = e.memory.places[op]
    line = e.build.line(place.line, e.base_of(place))
    apart, options = 0 if shared(op.x) else e.layout.stride(op.x), epilogue(e, op)
    own = None if op.bias is None or shared(op.bias) else op.bias
    if own is not None:
        options = {name: value for name, value in options.items() if name not in ("add_bias", "bias")}
    e.build.add(
        "matmul", format=int(e.format_of(op)), region=int(Region.WEIGHTS), dst=e.address(op.out), src=e.address(op.x),
        k=int(op.k.value.data), n=op.words, line=line, outer=1, inner=reg(e.held), src_inner=apart,
        dst_inner=e.layout.stride(op.out), **options,
    )  # fmt: skip
    if own is not None:
        n = e.times_rows(e.layout.stride(op.out))
        e.build.add("vadd", dst=e.address(op.out), a=e.address(op.out), b=e.address(own), n=n)


def emit_last(e: RowsEmission, op: dev.LastOp) -> None:
    """All rows, at once where each has words of its own and no bias comes to them."""
    build, stride = e.build, e.layout.stride(op.out)
    done = begin_last(e, e.address(op.out), e.times_rows(stride))
    if op.bias is not None:
        for row in range(e.most):
            build.add("vadd", dst=e.row(op.out, row), a=e.row(op.x, row), b=e.address(op.bias), n=op.count)
    elif shared(op.x):
        for row in range(e.most):
            build.add("vmov", dst=e.row(op.out, row), b=e.row(op.x, row), n=op.count)
    else:
        build.add("vmov", dst=e.address(op.out), b=e.address(op.x), n=e.times_rows(stride))
    build.label(done)


def emit_gather(e: RowsEmission, op: dev.GatherOp) -> None:
    """One gather for all rows where its result may lie by device; else one for each row, which leaves rows whole."""
    build, words = e.build, ir.width(op.x)
    if e.ranked(op.out):
        gather(e, e.address(op.out), e.address(op.x), e.most * words)
        return
    done = build.fresh("gathered")
    for row in range(e.most):
        if row:
            build.branch("bge", done, row, reg(e.held))
        gather(e, e.row(op.out, row), e.row(op.x, row), words)
    build.label(done)


def gather(e: RowsEmission, dst: int, a: int, n: int) -> None:
    """One ring instruction, and the fence that `control.barriers` wants."""
    e.build.add("gather", dst=dst, a=a, n=n)
    if e.machine.control.barriers:
        e.build.add("fence")


# Vectors --------------------------------------------------------------------------------------------------
def emit_copy(e: RowsEmission, op: dev.CopyOp) -> None:
    """Words as they are."""
    start = int(op.start.value.data)
    for row in range(e.most):
        e.build.add("vmov", dst=e.row(op.out, row), b=e.row(op.x, row) + start, n=op.count)


def emit_rotary(e: RowsEmission, op: dev.RotaryOp) -> None:
    """Each head times the factors, plus its exchanged halves times the crossed factors; a loop over tokens."""
    build, x, row, y = e.build, e.address(op.x), e.address(op.row), e.address(op.out)
    heads, half, pad = (int(a.value.data) for a in (op.heads, op.half, op.pad))
    crossed = e.scratch(op)["crossed"]
    if pad > 2 * half:
        build.add("vmov", b_from=_IMMEDIATE, dst=crossed, n=heads * pad)
    steps = {R.OFFSET: e.layout.stride(op.x), R.GROUP: e.layout.stride(op.row), R.CHUNK: e.layout.stride(op.out)}
    for register in (R.BLOCK, *steps):
        build.constant(register, 0)
    label = build.fresh("row")
    build.label(label)
    for at in range(0, heads * pad, pad):
        build.add("vmul", dst=reg(R.CHUNK, y + at), a=reg(R.OFFSET, x + at), b=reg(R.GROUP, row), n=pad)
        build.add("vmul", dst=crossed + at, a=reg(R.OFFSET, x + at + half), b=reg(R.GROUP, row + pad), n=half)
        build.add("vmul", dst=crossed + at + half, a=reg(R.OFFSET, x + at), b=reg(R.GROUP, row + pad + half), n=half)
    build.add("vadd", dst=reg(R.CHUNK, y), a=reg(R.CHUNK, y), b=crossed, n=heads * pad)
    for register, words in steps.items():
        build.increase(register, words)
    build.increase(R.BLOCK, 1)
    build.branch("blt", label, reg(R.BLOCK), reg(e.held))


@dataclass(frozen=True)
class _Norm:
    """Where a norm's rows come from and go to: word addresses, and how many rows."""

    x: list[Operand]
    y: list[Operand]
    mean: int
    variance: int


def _begin_norm(e: RowsEmission, op: dev.LayerNormOp | dev.RmsNormOp) -> _Norm:
    """This device's rows to their own place, or to one from where they are gathered."""
    s, rows = e.scratch(op), range(e.layout.own_rows)
    base = e.own(op.x, R.OFFSET) if len(rows) < e.most else R.ZERO
    start = s["own"] if "own" in s else e.address(op.out)
    y = [Operand(0, start + row * e.layout.stride(op.out)) for row in rows]
    return _Norm([reg(base, e.row(op.x, row)) for row in rows], y, s.get("mean", 0), s["variance"])


def _end_norm(e: RowsEmission, op: dev.LayerNormOp | dev.RmsNormOp) -> None:
    """All devices' rows, in order, if anything wants them."""
    s = e.scratch(op)
    if "own" in s:
        gather(e, e.address(op.out), s["own"], e.layout.own_rows * e.layout.stride(op.out))


def emit_layer_norm(e: RowsEmission, op: dev.LayerNormOp) -> None:
    """Step by step for all rows, so that one row's latencies pass while others compute."""
    n, build, norm = op.count, e.build, _begin_norm(e, op)
    for row, x in enumerate(norm.x):
        build.add("vsum", dst=norm.mean + row, a=x, n=n)
    build.add("vmul", dst=norm.mean, a=norm.mean, n=len(norm.x), **immediate(1.0 / n))

    def center(row: int) -> None:
        build.add("vsub", b_from=_WORD, dst=norm.y[row], a=norm.x[row], b=norm.mean + row, n=n)

    def square(row: int) -> None:
        build.add("vsumsq", dst=norm.variance + row, a=norm.y[row], n=n)

    build.each(range(len(norm.x)), center, square)
    _scale_rows(e, op, norm, norm.y)
    if op.bias is not None:
        for y in norm.y:
            build.add("vadd", dst=y, a=y, b=e.address(op.bias), n=n)
    _end_norm(e, op)


def emit_rms_norm(e: RowsEmission, op: dev.RmsNormOp) -> None:
    """Mean square, scale: step by step for all rows."""
    norm = _begin_norm(e, op)
    for row, x in enumerate(norm.x):
        e.build.add("vsumsq", dst=norm.variance + row, a=x, n=op.count)
    _scale_rows(e, op, norm, norm.x)
    _end_norm(e, op)


def _scale_rows(e: RowsEmission, op: dev.LayerNormOp | dev.RmsNormOp, norm: _Norm, xs: list[Operand]) -> None:
    """Rows `xs` times 1 / sqrt(sum of squares / n + eps), times the weight, to the result."""
    build, n, variance, rows = e.build, op.count, norm.variance, len(xs)
    build.add("vmul", dst=variance, a=variance, n=rows, **immediate(1.0 / n))
    build.add("vadd", dst=variance, a=variance, n=rows, **immediate(op.eps.value.data))
    build.add("vunary", function=int(Function.RSQRT), dst=variance, a=variance, n=rows)

    def scale(row: int) -> None:
        build.add("vmul", b_from=_WORD, dst=norm.y[row], a=xs[row], b=variance + row, n=n)

    def weigh(row: int) -> None:
        if op.weight is not None:
            build.add("vmul", dst=norm.y[row], a=norm.y[row], b=e.address(op.weight), n=n)

    build.each(range(rows), scale, weigh)


def emit_pair(e: RowsEmission, op: dev.AddOp | dev.MulOp) -> None:
    """Addition or multiplication: all rows at once, row by row with a shared operand, piece by piece with a ranked one.

    Rows that lie densely in both operands and the result are one vector.
    """
    name = "vadd" if isinstance(op, dev.AddOp) else "vmul"
    values = (op.lhs, op.rhs)
    bases = _bases(e, op.out, *values)
    if any(e.ranked(value) for value in values):
        _pair_of_pieces(e, op, name, bases)
    elif any(shared(value) for value in values) or len({e.layout.stride(value) for value in (*values, op.out)}) > 1:
        for row in range(e.layout.rows_of(op.out)):
            a, b = (reg(base, e.row(value, row)) for base, value in zip(bases, values, strict=True))
            e.build.add(name, dst=e.row(op.out, row), a=a, b=b, n=op.count)
    else:
        a, b = (reg(base, e.address(value)) for base, value in zip(bases, values, strict=True))
        e.build.add(name, dst=e.address(op.out), a=a, b=b, n=_all_rows(e, op.out))


def _bases(e: RowsEmission, out: SSAValue, *values: SSAValue) -> list[R]:
    """For each operand, a register with the words before the rows that `out` has."""
    if not e.dealt(out):
        return [R.ZERO] * len(values)
    return [e.own(value, register) for value, register in zip(values, (R.OFFSET, R.GROUP), strict=False)]


def _all_rows(e: RowsEmission, out: SSAValue) -> Operand:
    """Words of all rows of a value that there are, or, where devices have their own rows only, can be."""
    stride = e.layout.stride(out)
    return Operand(0, e.layout.own_rows * stride) if e.dealt(out) else e.times_rows(stride)


def _pair_of_pieces(e: RowsEmission, op: dev.AddOp | dev.MulOp, name: str, bases: list[R]) -> None:
    """Ranked operands lie by device: a row's words are at as many places as there are devices."""
    values = (op.lhs, op.rhs)
    gathered = [value.owner for value in values if e.ranked(value)]
    sizes: dict[SSAValue, int] = {owner.out: ir.width(owner.x) for owner in gathered if isinstance(owner, dev.GatherOp)}

    def at(index: int, row: int, start: int) -> Operand:
        value = values[index]
        if value in sizes:
            device, inside = divmod(start, sizes[value])
            return reg(bases[index], e.address(value) + (device * e.most + row) * sizes[value] + inside)
        return reg(bases[index], e.row(value, row) + start)

    for row in range(e.layout.rows_of(op.out)):
        start = 0
        while start < op.count:
            n = min(op.count - start, *(size - start % size for size in sizes.values()))
            e.build.add(name, dst=e.row(op.out, row) + start, a=at(0, row, start), b=at(1, row, start), n=n)
            start += n


def emit_sum(e: RowsEmission, op: dev.SumOp) -> None:
    """The second part to the first, then each further one to the sum: all rows at once where parts lie by device."""
    words = ir.width(op.out)
    if e.ranked(op.x):
        n, apart, rows = e.times_rows(words), e.most * words, 1
    else:
        n, apart, rows = Operand(0, words), words, e.most
    for row in range(rows):
        x, y = e.row(op.x, row), e.row(op.out, row)
        for part in range(1, op.parts):
            e.build.add("vadd", dst=y, a=x if part == 1 else y, b=x + part * apart, n=n)


def emit_scale(e: RowsEmission, op: dev.ScaleOp) -> None:
    """Multiplication by a constant."""
    _each(e, op, "vmul", immediate(op.value.value.data))


def emit_activation(e: RowsEmission, op: dev.ActivationOp) -> None:
    """A unary function of every element."""
    _each(e, op, "vunary", {"function": int(Function[op.kind.data.upper()])})


def _each(e: RowsEmission, op: dev.ScaleOp | dev.ActivationOp, name: str, options: dict[str, int]) -> None:
    """All rows at once, or each from a shared operand."""
    if shared(op.x):
        for row in range(e.layout.rows_of(op.out)):
            e.build.add(name, dst=e.row(op.out, row), a=e.address(op.x), n=op.count, **options)
    else:
        (base,) = _bases(e, op.out, op.x)
        e.build.add(name, dst=e.address(op.out), a=reg(base, e.address(op.x)), n=_all_rows(e, op.out), **options)
