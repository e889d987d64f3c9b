"""A prompt by blocks of tokens: everything up to the last attention for a block at once, the rest for the last token.

Each operation is emitted for one group of tokens after the other, so that while one group's product runs, the vector
unit and the ring work on the other's. A block may hold any number of tokens from 2 on; a single token that is left
goes through as a generated one does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from xdsl.ir import Operation, SSAValue

from typebar.compiler import device_ir as dev
from typebar.compiler import ir
from typebar.compiler.device_source import AttendOp
from typebar.compiler.emit import rows
from typebar.compiler.emit.builder import R, reg
from typebar.compiler.emit.loops import emit_loop, layer_strides
from typebar.compiler.emit.rows import RowsEmission, gather
from typebar.compiler.emit.rows_attention import emit_attention
from typebar.compiler.emit.vectors import REGION_REGISTER, emit_load
from typebar.compiler.rows import crossing, needed, place_of, shared
from typebar.compiler.schedule import Part, Turns, schedule
from typebar.isa.errors import TypebarError
from typebar.isa.instructions import Region

_EMITTERS: dict[type[Operation], Callable[[RowsEmission, Any], None]] = {
    AttendOp: emit_attention,
    dev.ActivationOp: rows.emit_activation,
    dev.AddOp: rows.emit_pair,
    dev.AttentionOp: emit_attention,
    dev.BiasOp: emit_load,
    dev.CopyOp: rows.emit_copy,
    dev.GatherOp: rows.emit_gather,
    dev.LastOp: rows.emit_last,
    dev.LayerNormOp: rows.emit_layer_norm,
    dev.LookupOp: rows.emit_lookup,
    dev.MatrixOp: rows.emit_matrix,
    dev.MulOp: rows.emit_pair,
    dev.ParamOp: emit_load,
    dev.RmsNormOp: rows.emit_rms_norm,
    dev.RotaryOp: rows.emit_rotary,
    dev.RotaryRowOp: rows.emit_rotary_row,
    dev.ScaleOp: rows.emit_scale,
    dev.ScoreBiasOp: rows.emit_score_bias,
    dev.SumOp: rows.emit_sum,
}
_POSITIONAL = dev.AttentionOp | dev.LookupOp | dev.RotaryRowOp | dev.ScoreBiasOp
"""Operations that read POSITION or LENGTH: the first position of the group, and the one after its last."""


def emit_prompt(e: RowsEmission, program: dev.ProgramOp, node: Callable[[Operation], str]) -> None:
    """Blocks while two tokens or more are left; goes on to the label `tail` after the last token, or to what follows.

    `node` is what an operation is called in comments.
    """
    build, tokens = e.build, e.layout.tokens
    build.label("prompt")
    build.note(f"two tokens or more go through in blocks of up to {tokens.count}")
    build.branch("bge", "token", reg(R.POSITION), reg(R.LAST))
    build.add("ssub", rd=int(R.T1), a=reg(R.LAST, 1), b=reg(R.POSITION))
    build.add("smin", rd=int(R.ROWS), a=reg(R.T1), b=tokens.rows)
    if tokens.groups > 1:
        build.add("ssub", rd=int(R.T1), a=reg(R.T1), b=reg(R.ROWS))
        build.add("smin", rd=int(R.ROWS_NEXT), a=reg(R.T1), b=tokens.rows)
    build.add("sadd", rd=int(R.LENGTH), a=reg(R.POSITION), b=reg(R.ROWS))
    _emit(e, needed(program), node)
    build.add("ssub", rd=int(R.T1), a=reg(R.LAST), b=reg(R.POSITION))
    build.branch("blt", "last", reg(R.T1), tokens.count)
    build.increase(R.POSITION, tokens.count)
    build.branch("beq", "prompt", 0, 0)
    _last_token(e, program)


def _last_token(e: RowsEmission, program: dev.ProgramOp) -> None:
    """What the tail reads, to where it stands for one token: T1 is the last token's place in the block."""
    build, tokens = e.build, e.layout.tokens
    build.label("last")
    build.note("the last token's row")
    values = [value for value in crossing(program) if not shared(value)]

    def copy(group: int) -> None:
        for value in values:
            stride, start = e.layout.stride(value), place_of(value, group)
            if value in e.layout.dealt:
                assert program.rows_last is not None
                own, start = start, int(program.rows_last.value.data)
                gather(e, start, own, e.layout.own_rows * stride)
            build.add("smul", rd=int(R.OFFSET), a=reg(R.T1), b=build.any_size(stride, R.T0))
            build.add("vmov", dst=place_of(value), b=reg(R.OFFSET, start), n=ir.width(value))

    if tokens.groups > 1:
        first, copied = build.fresh("first"), build.fresh("copied")
        build.branch("blt", first, reg(R.T1), tokens.rows)
        build.increase(R.T1, -tokens.rows)
        copy(1)
        build.branch("beq", copied, 0, 0)
        build.label(first)
        copy(0)
        build.label(copied)
    else:
        copy(0)
    build.add("sadd", rd=int(R.POSITION), a=reg(R.LAST), b=0)
    build.add("sadd", rd=int(R.LENGTH), a=reg(R.LAST, 1), b=0)


def _emit(e: RowsEmission, ops: list[Operation], node: Callable[[Operation], str]) -> None:
    """Operations in the order in which they go through the groups."""
    for item in schedule(ops, e.layout):
        if isinstance(item, Part):
            _emit_part(e, item, node, {})
        else:
            _emit_turns(e, item, node)


def _emit_turns(e: RowsEmission, item: Turns, node: Callable[[Operation], str]) -> None:
    """A loop, and what is left of its last layer."""
    steps = layer_strides(e, item.loop)

    def emit(parts: Iterable[Part]) -> None:
        for part in parts:
            _emit_part(e, part, node, steps)

    emit_loop(e, item.loop, steps, lambda _: emit(item.turn), lambda value, home: _copy(e, value, home))
    e.in_loop = True
    emit(item.rest)
    e.in_loop = False


def _emit_part(e: RowsEmission, part: Part, node: Callable[[Operation], str], steps: Mapping[Region, int]) -> None:
    """An operation for a group. The second may have no tokens, and a late part no layer before the loop's first."""
    op, build = part.op, e.build
    emitter = _EMITTERS.get(type(op))
    if emitter is None:
        raise TypebarError(f"{op.name} has no instructions: run partition and fuse first")
    skip = build.fresh("absent")
    if part.group:
        build.branch("beq", skip, reg(R.ROWS_NEXT), 0)
    if part.late:
        build.branch("beq", skip, reg(R.LAYER), 0)
        _shift(e, op, steps, -1)
    if part.group:
        _switch(e, op, part.group)
    build.note(f"rows of {node(op)}")
    emitter(e, op)
    if part.group:
        _switch(e, op, 0)
    if part.late:
        _shift(e, op, steps, 1)
    if part.group:
        build.label(skip)


def _shift(e: RowsEmission, op: Operation, steps: Mapping[Region, int], layers: int) -> None:
    """Go over to another layer, in the registers that the operation reads."""
    for region, stride in steps.items():
        if (region is Region.KV) == isinstance(op, dev.AttentionOp | AttendOp):
            e.build.increase(REGION_REGISTER[region], layers * stride)


def _switch(e: RowsEmission, op: Operation, group: int) -> None:
    """Go over to a group, in the registers where the operation reads them."""
    if isinstance(op, _POSITIONAL):
        step = (group - e.group) * e.most
        e.build.increase(R.POSITION, step)
        e.build.add("sadd", rd=int(R.LENGTH), a=reg(R.POSITION), b=reg(R.ROWS_NEXT if group else R.ROWS))
    e.group = group


def _copy(e: RowsEmission, value: SSAValue, home: SSAValue) -> None:
    """All rows of a value to the place of another one like it."""
    for group in range(e.layout.tokens.groups):
        if place_of(value, group) != place_of(home, group):
            e.build.add("vmov", dst=place_of(home, group), b=place_of(value, group), n=e.layout.words(value))
