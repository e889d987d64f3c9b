"""Instructions for everything that is not a loop, a head or an attention."""

from __future__ import annotations

import math
from dataclasses import dataclass

from xdsl.ir import Block, BlockArgument, Operation, OpResult, SSAValue

from typebar.compiler import device_ir as dev
from typebar.compiler import ir
from typebar.compiler.device_source import SourceOp
from typebar.compiler.emit.builder import Builder, R, reg
from typebar.compiler.memory import MemoryPlan, Place
from typebar.compiler.scratch import Limits, scratch_of
from typebar.isa.instructions import FORMAT_BYTES, Activation, Format, Function, Region, Scale, Source
from typebar.isa.machine import LINE_BYTES, Machine
from typebar.isa.program import Operand, float_bits

REGION_REGISTER = {Region.WEIGHTS: R.WEIGHTS, Region.PARAMS: R.PARAMS, Region.LOCAL: R.LOCAL, Region.KV: R.KV}


@dataclass
class Emission:
    """What every emitting function needs."""

    build: Builder
    machine: Machine
    memory: MemoryPlan
    limits: Limits
    format: Format
    program: dev.ProgramOp | SourceOp
    in_loop: bool = False
    summed: Operation | None = None
    """A norm whose first sum is there already."""

    def address(self, value: SSAValue) -> int:
        """Word address of a value."""
        owner = value.owner.parent_op() if isinstance(value.owner, Block) else value.owner
        if isinstance(owner, ir.RepeatOp):
            assert isinstance(value, BlockArgument | OpResult)
            return int(owner.attributes[f"at{value.index}"].value.data)  # type: ignore[attr-defined]
        return int(owner.address)  # type: ignore[union-attr]

    def base(self, region: Region) -> R:
        """The register with the current layer's offset in a region."""
        return REGION_REGISTER[region] if self.in_loop else R.ZERO

    def format_of(self, op: dev.MatrixOp | dev.HeadOp) -> Format:
        """The format of a product's weights."""
        return Format.INT8 if op.int8 else self.format

    def base_of(self, place: Place) -> R:
        """The register with the current layer's offset of a place; what all layers share lies still."""
        return self.base(place.region) if place.stride else R.ZERO

    def scratch(self, op: Operation, chunk: int = 0) -> dict[str, int]:
        """Word addresses of an operation's scratch vectors."""
        start = int(op.properties["scratch"].value.data)  # type: ignore[attr-defined]
        return {name: start + offset for name, offset in scratch_of(op, self.limits, chunk).items()}


def emit_lookup(e: Emission, op: dev.LookupOp) -> None:
    """Embedding row of the token or of the position."""
    place = e.memory.places[op]
    row_lines = -(-ir.width(op.out) * FORMAT_BYTES[e.format] // LINE_BYTES)
    assert isinstance(op.index, BlockArgument)
    index = R.TOKEN if op.index.index == 0 else R.POSITION
    e.build.add("smul", rd=int(R.T1), a=reg(index, op.offset.value.data), b=row_lines)
    add_line(e, place)
    e.build.add(
        "load", format=int(e.format), region=int(Region.PARAMS), dst=op.address, line=reg(R.T1), n=ir.width(op.out)
    )


def add_line(e: Emission, place: Place) -> None:
    """Add a table's line to T1."""
    e.build.increase(R.T1, place.line)
    if e.base_of(place) is not R.ZERO:
        e.build.add("sadd", rd=int(R.T1), a=reg(R.T1), b=reg(e.base_of(place)))


def emit_rotary_row(e: Emission, op: dev.RotaryRowOp) -> None:
    """This position's rotary factors."""
    place, words = e.memory.places[op], ir.width(op.out)
    e.build.add("smul", rd=int(R.T1), a=reg(R.POSITION), b=-(-words * 4 // LINE_BYTES))
    add_line(e, place)
    e.build.add("load", format=int(Format.FP32), region=int(place.region), dst=op.address, line=reg(R.T1), n=words)


def emit_score_bias(e: Emission, op: dev.ScoreBiasOp) -> None:
    """This position's row of each plane, as far as attention sees."""
    build, place = e.build, e.memory.places[op]
    context, kind = int(op.context.value.data), op.kind.data
    plane_lines = -(-4 * math.prod(op.shape) // LINE_BYTES)
    byte: Operand | int = 0
    if kind == "relative":
        build.add("ssub", rd=int(R.T2), a=build.any_size(context - 1, R.T0), b=reg(R.POSITION))
        build.add("sshl", rd=int(R.T2), a=reg(R.T2), b=2)
        byte = reg(R.T2)
    elif kind == "table":
        build.add("smul", rd=int(R.T2), a=reg(R.POSITION), b=build.any_size(4 * context, R.T0))
        byte = reg(R.T2)
    for plane in range(int(op.planes.value.data)):
        line = build.line(place.line + plane * plane_lines, e.base_of(place))
        build.add(
            "load", format=int(Format.FP32), region=int(place.region), dst=op.address + plane * int(op.row.value.data),
            line=line, byte=byte, n=reg(R.LENGTH),
        )  # fmt: skip


def emit_rotary(e: Emission, op: dev.RotaryOp) -> None:
    """Each head times the factors, plus its exchanged halves times the crossed factors."""
    build, x, row, y = e.build, e.address(op.x), e.address(op.row), op.address
    heads, half, pad = (int(a.value.data) for a in (op.heads, op.half, op.pad))
    crossed = e.scratch(op)["crossed"]
    if pad > 2 * half:
        build.add("vmov", b_from=int(Source.IMMEDIATE), dst=crossed, n=heads * pad)
    for at in range(0, heads * pad, pad):
        build.add("vmul", dst=y + at, a=x + at, b=row, n=pad)
        build.add("vmul", dst=crossed + at, a=x + at + half, b=row + pad, n=half)
        build.add("vmul", dst=crossed + at + half, a=x + at, b=row + pad + half, n=half)
    build.add("vadd", dst=y, a=y, b=crossed, n=heads * pad)


def emit_copy(e: Emission, op: dev.CopyOp) -> None:
    """Words as they are."""
    e.build.add("vmov", dst=op.address, b=e.address(op.x) + int(op.start.value.data), n=op.count)


def emit_load(e: Emission, op: dev.ParamOp | dev.BiasOp) -> None:
    """A float32 vector from PARAMS or LOCAL."""
    place = e.memory.places[op]
    line = e.build.line(place.line, e.base_of(place))
    e.build.add(
        "load", format=int(Format.FP32), region=int(place.region), dst=e.address(op.out), line=line, n=ir.width(op.out)
    )


def epilogue(e: Emission, op: dev.MatrixOp) -> dict[str, int]:
    """The epilogue's options of a matrix instruction, and whether it goes on from the sums in its place."""
    extra: dict[str, int] = {} if op.addend is None else {"accumulate": 1}
    if op.scale is not None:
        extra |= {"scaling": int(Scale.COLUMN), "scale": e.address(op.scale)}
    if op.bias is not None:
        extra |= {"add_bias": 1, "bias": e.address(op.bias)}
    if op.activation is not None:
        extra["activation"] = int(Activation[op.activation.data.upper()])
    return extra


def emit_matrix(e: Emission, op: dev.MatrixOp) -> None:
    """One matrix instruction with its epilogue."""
    place = e.memory.places[op]
    line = e.build.line(place.line, e.base_of(place))
    e.build.add(
        "matmul", format=int(e.format_of(op)), region=int(Region.WEIGHTS), dst=op.address, src=e.address(op.x),
        k=int(op.k.value.data), n=op.words, line=line, outer=1, inner=1, **epilogue(e, op),
    )  # fmt: skip


def emit_gather(e: Emission, op: dev.GatherOp) -> None:
    """All-gather over the ring; with `control.barriers` nothing issues until it and all before it is done."""
    e.build.add("gather", dst=op.address, a=e.address(op.x), n=ir.width(op.x))
    if e.machine.control.barriers:
        e.build.add("fence")


def emit_sum(e: Emission, op: dev.SumOp) -> None:
    """The second part to the first, then each further one to the sum."""
    x, y, n = e.address(op.x), op.address, ir.width(op.out)
    for part in range(1, op.parts):
        e.build.add("vadd", dst=y, a=x if part == 1 else y, b=x + part * n, n=n)


def emit_last(e: Emission, op: dev.LastOp) -> None:
    """One vector instruction on every device."""
    build, y, x = e.build, op.address, e.address(op.x)
    done = begin_last(e, y, op.count)
    if op.bias is None:
        build.add("vmov", dst=y, b=x, n=op.count)
    else:
        build.add("vadd", dst=y, a=x, b=e.address(op.bias), n=op.count)
    build.label(done)


def begin_last(e: Emission, dst: int, n: Operand | int) -> str:
    """Zeros on all devices but the last, which goes on with the next instruction, others at the label returned."""
    build, mine, done = e.build, e.build.fresh("last_device"), e.build.fresh("others")
    build.branch("bge", mine, reg(R.RANK), e.limits.devices - 1)
    build.add("vmov", b_from=int(Source.IMMEDIATE), dst=dst, n=n)
    build.branch("beq", done, 0, 0)
    build.label(mine)
    return done


def immediate(value: float) -> dict[str, int]:
    """A constant as a vector instruction's second operand."""
    return {"b_from": int(Source.IMMEDIATE), "imm": float_bits(value)}


def emit_first_sum(e: Emission, op: dev.LayerNormOp | dev.RmsNormOp) -> None:
    """What a norm needs of x first: its sum, or the sum of its squares."""
    if isinstance(op, dev.LayerNormOp):
        e.build.add("vsum", dst=e.scratch(op)["mean"], a=e.address(op.x), n=op.count)
    else:
        e.build.add("vsumsq", dst=e.scratch(op)["variance"], a=e.address(op.x), n=op.count)


def emit_layer_norm(e: Emission, op: dev.LayerNormOp) -> None:
    """Mean, centred values, variance, scale: ten vector instructions."""
    n, x, y, build = op.count, e.address(op.x), op.address, e.build
    scratch = e.scratch(op)
    mean, variance, word = scratch["mean"], scratch["variance"], int(Source.WORD)
    if op is not e.summed:
        emit_first_sum(e, op)
    build.add("vmul", dst=mean, a=mean, n=1, **immediate(1.0 / n))
    build.add("vsub", b_from=word, dst=y, a=x, b=mean, n=n)
    build.add("vsumsq", dst=variance, a=y, n=n)
    build.add("vmul", dst=variance, a=variance, n=1, **immediate(1.0 / n))
    build.add("vadd", dst=variance, a=variance, n=1, **immediate(op.eps.value.data))
    build.add("vunary", function=int(Function.RSQRT), dst=variance, a=variance, n=1)
    build.add("vmul", b_from=word, dst=y, a=y, b=variance, n=n)
    if op.weight is not None:
        build.add("vmul", dst=y, a=y, b=e.address(op.weight), n=n)
    if op.bias is not None:
        build.add("vadd", dst=y, a=y, b=e.address(op.bias), n=n)


def emit_rms_norm(e: Emission, op: dev.RmsNormOp) -> None:
    """Mean square, scale."""
    n, x, y, build = op.count, e.address(op.x), op.address, e.build
    variance = e.scratch(op)["variance"]
    if op is not e.summed:
        emit_first_sum(e, op)
    build.add("vmul", dst=variance, a=variance, n=1, **immediate(1.0 / n))
    build.add("vadd", dst=variance, a=variance, n=1, **immediate(op.eps.value.data))
    build.add("vunary", function=int(Function.RSQRT), dst=variance, a=variance, n=1)
    build.add("vmul", b_from=int(Source.WORD), dst=y, a=x, b=variance, n=n)
    if op.weight is not None:
        build.add("vmul", dst=y, a=y, b=e.address(op.weight), n=n)


def emit_pair(e: Emission, op: dev.AddOp | dev.MulOp) -> None:
    """Addition or multiplication of two vectors."""
    name = "vadd" if isinstance(op, dev.AddOp) else "vmul"
    e.build.add(name, dst=op.address, a=e.address(op.lhs), b=e.address(op.rhs), n=op.count)


def emit_scale(e: Emission, op: dev.ScaleOp) -> None:
    """Multiplication by a constant."""
    e.build.add("vmul", dst=op.address, a=e.address(op.x), n=op.count, **immediate(op.value.value.data))


def emit_activation(e: Emission, op: dev.ActivationOp) -> None:
    """A unary function of every element."""
    function = int(Function[op.kind.data.upper()])
    e.build.add("vunary", function=function, dst=op.address, a=e.address(op.x), n=op.count)
