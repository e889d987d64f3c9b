"""A prompt by blocks of tokens: everything up to the last attention for a block at once, the rest for the last token.

Each operation is emitted for one group of tokens after the other, so that while one group's product runs, the vector
unit and the ring work on the other's. A block may hold any number of tokens from 2 on; a single token that is left
goes through as a generated one does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from xdsl.ir import Operation, SSAValue

from typebar.compiler import device_ir as dev
from typebar.compiler import ir
from typebar.compiler.device_source import AttendOp
from typebar.compiler.emit import rows
from typebar.compiler.emit.builder import R, reg
from typebar.compiler.emit.loops import emit_loop
from typebar.compiler.emit.rows import RowsEmission
from typebar.compiler.emit.rows_attention import emit_attention
from typebar.compiler.emit.vectors import emit_load
from typebar.compiler.rows import crossing, needed, place_of, schedule, shared
from typebar.isa.errors import TypebarError

_EMITTERS: dict[type[Operation], Callable[[RowsEmission, Any], None]] = {
    AttendOp: emit_attention,
    dev.ActivationOp: rows.emit_activation,
    dev.AddOp: rows.emit_pair,
    dev.AttentionOp: emit_attention,
    dev.BiasOp: emit_load,
    dev.CopyOp: rows.emit_copy,
    dev.GatherOp: rows.emit_gather,
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
    for value in crossing(program):
        if shared(value):
            continue
        stride, between = e.layout.stride(value), e.layout.group_stride(value)
        build.add("smul", rd=int(R.OFFSET), a=reg(R.T1), b=build.any_size(stride, R.T0))
        if tokens.groups > 1 and between != tokens.rows * stride:
            first = build.fresh("first")
            build.branch("blt", first, reg(R.T1), tokens.rows)
            build.increase(R.OFFSET, between - tokens.rows * stride)
            build.label(first)
        build.add("vmov", dst=place_of(value, ""), b=reg(R.OFFSET, e.address(value)), n=ir.width(value))
    build.add("sadd", rd=int(R.POSITION), a=reg(R.LAST), b=0)
    build.add("sadd", rd=int(R.LENGTH), a=reg(R.LAST, 1), b=0)


def _emit(e: RowsEmission, ops: list[Operation], node: Callable[[Operation], str]) -> None:
    """Operations in the order in which they go through the groups; the second group may have no tokens."""
    for op, group in schedule(ops, e.layout.tokens.groups):
        if isinstance(op, ir.RepeatOp):
            emit_loop(e, op, lambda inside: _emit(e, inside, node), lambda value, home: _copy(e, value, home))
            continue
        emitter = _EMITTERS.get(type(op))
        if emitter is None:
            raise TypebarError(f"{op.name} has no instructions: run partition and fuse first")
        skip = e.build.fresh("absent")
        if group:
            e.build.branch("beq", skip, reg(R.ROWS_NEXT), 0)
            _switch(e, op, group)
        e.build.note(f"rows of {node(op)}")
        emitter(e, op)
        if group:
            _switch(e, op, 0)
            e.build.label(skip)


def _switch(e: RowsEmission, op: Operation, group: int) -> None:
    """Go over to a group, in the registers where the operation reads them."""
    if isinstance(op, _POSITIONAL):
        step = (group - e.group) * e.most
        e.build.increase(R.POSITION, step)
        e.build.add("sadd", rd=int(R.LENGTH), a=reg(R.POSITION), b=reg(R.ROWS_NEXT if group else R.ROWS))
    e.group = group


def _copy(e: RowsEmission, value: SSAValue, home: int) -> None:
    """All rows of a value to the place of another one like it."""
    if place_of(value, "rows_") != home:
        e.build.add("vmov", dst=home, b=place_of(value, "rows_"), n=e.layout.words(value))
