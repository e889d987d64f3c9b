"""The whole program: read the descriptor, go through the tokens, loop over layers, stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from xdsl.dialects.builtin import ModuleOp, StringAttr
from xdsl.ir import Operation, SSAValue

from typebar.compiler import device_ir as dev
from typebar.compiler import ir
from typebar.compiler.device_source import AttendOp, CacheOp, PhaseOp, RestoreOp, SaveOp, SourceOp
from typebar.compiler.emit.attention import emit_attention
from typebar.compiler.emit.builder import Builder, R, reg
from typebar.compiler.emit.head import DESCRIPTOR_WORDS, emit_head
from typebar.compiler.emit.loops import emit_loop, layer_strides
from typebar.compiler.emit.prompt import emit_prompt
from typebar.compiler.emit.rows import RowsEmission
from typebar.compiler.emit.source import emit_cache, emit_phase, emit_restore, emit_save
from typebar.compiler.emit.vectors import (
    Emission,
    emit_activation,
    emit_copy,
    emit_first_sum,
    emit_gather,
    emit_last,
    emit_layer_norm,
    emit_load,
    emit_lookup,
    emit_matrix,
    emit_pair,
    emit_rms_norm,
    emit_rotary,
    emit_rotary_row,
    emit_scale,
    emit_score_bias,
    emit_sum,
)
from typebar.compiler.memory import MemoryPlan, program_of, source_of
from typebar.compiler.passes.allocate import AllocatePass
from typebar.compiler.passes.fuse import LOADS
from typebar.compiler.rows import Layout, Tokens, crossing, shared, split_tail, tokens_of
from typebar.isa.errors import TypebarError
from typebar.isa.instructions import WORD_BYTES, Format, Region
from typebar.isa.machine import Machine
from typebar.isa.program import Program

_EMITTERS: dict[type[Operation], Callable[[Emission, Any], None]] = {
    AttendOp: emit_attention,
    CacheOp: emit_cache,
    RestoreOp: emit_restore,
    SaveOp: emit_save,
    dev.ActivationOp: emit_activation,
    dev.AddOp: emit_pair,
    dev.AttentionOp: emit_attention,
    dev.BiasOp: emit_load,
    dev.CopyOp: emit_copy,
    dev.GatherOp: emit_gather,
    dev.LastOp: emit_last,
    dev.LayerNormOp: emit_layer_norm,
    dev.LookupOp: emit_lookup,
    dev.MatrixOp: emit_matrix,
    dev.MulOp: emit_pair,
    dev.ParamOp: emit_load,
    dev.RmsNormOp: emit_rms_norm,
    dev.RotaryOp: emit_rotary,
    dev.RotaryRowOp: emit_rotary_row,
    dev.ScaleOp: emit_scale,
    dev.ScoreBiasOp: emit_score_bias,
    dev.SumOp: emit_sum,
}


ENTRIES = ("encode", "main")
"""Where a program may start: at a new source text, or at tokens. Programs without an encoder have `main` only."""


def emit(module: ModuleOp, machine: Machine, memory: MemoryPlan, fmt: Format) -> Program:
    """Instructions for an allocated `tbd.program`, with `main` as an entry.

    With a `tbd.source` there is the entry `encode` too, which goes on to `main` when the source text is encoded. The
    labels of these names have the entries' instructions. A program that only without blocks fits the program memory
    has none.

    Raises:
        TypebarError: not allocated, or the program exceeds the machine's program memory or ring buffer.
    """
    made = _program(module, machine, memory, fmt, tokens_of(program_of(module)))
    if len(made) * WORD_BYTES > machine.control.program_bytes:
        made = _program(module, machine, memory, fmt, None)
    if len(made) * WORD_BYTES > machine.control.program_bytes:
        raise TypebarError(
            f"the program has {len(made) * WORD_BYTES} bytes and machine {machine.name} holds "
            f"{machine.control.program_bytes}: raise control.program_bytes"
        )
    return made


def _program(module: ModuleOp, machine: Machine, memory: MemoryPlan, fmt: Format, tokens: Tokens | None) -> Program:
    """The instructions, with or without blocks of a prompt's tokens."""
    program, source = program_of(module), source_of(module)
    build = Builder(machine.vector.chains)
    if source is not None:
        _emit_source(_emission(build, source, machine, memory, fmt), source)
    e = _emission(build, program, machine, memory, fmt)
    _prologue(e, source is not None)
    if tokens is not None:
        _emit_prompt(e, program, tokens)
    _begin_token(e)
    before, tail = split_tail(program)
    for op in before + tail:
        if op is tail[0]:
            build.label("tail")
        if isinstance(op, dev.HeadOp):
            _end_of_token(e, op)
        else:
            _emit_op(e, op)
    return build.program()


def _emission(
    build: Builder, program: dev.ProgramOp | SourceOp, machine: Machine, memory: MemoryPlan, fmt: Format
) -> Emission:
    """What emits a program's instructions."""
    if program.step is None:
        raise TypebarError("the program has no registers: run the pass allocate first")
    limits = AllocatePass.of(machine).limits(program, int(program.step.value.data))
    _check_gathers(program, machine)
    return Emission(build, machine, memory, limits, fmt, program)


def _emit_source(e: Emission, source: SourceOp) -> None:
    """Everything from the source text's tokens to K and V of every cross-attention; goes on to `main`."""
    e.build.label("encode")
    _load_word(e, "source", R.SOURCE)
    for op in source.body.block.ops:
        _emit_op(e, op)
    e.build.note("the source text is encoded")
    line, byte = e.memory.io.descriptor_line, 4 * DESCRIPTOR_WORDS["encoded"]
    e.build.add("sstore", region=int(Region.IO), line=line, byte=byte, value=reg(R.SOURCE))


def _load_word(e: Emission, name: str, register: R) -> None:
    """A word of the descriptor to a register."""
    line, byte = e.memory.io.descriptor_line, 4 * DESCRIPTOR_WORDS[name]
    e.build.note(name)
    e.build.add("sload", region=int(Region.IO), rd=int(register), line=line, byte=byte)


def _check_gathers(program: dev.ProgramOp | SourceOp, machine: Machine) -> None:
    for op in program.walk():
        if isinstance(op, dev.GatherOp) and ir.width(op.x) > machine.ring.buffer_words:
            raise TypebarError(
                f"a device would send {ir.width(op.x)} words at once and machine {machine.name} buffers "
                f"{machine.ring.buffer_words}: use more devices or raise ring.buffer_words"
            )


def _prologue(e: Emission, encoded: bool) -> None:
    """Read the descriptor."""
    build = e.build
    build.label("main")
    registers = {"start": R.POSITION, "count": R.LAST, "new": R.LEFT, "eos": R.EOS, "flags": R.FLAGS}
    if encoded:
        registers["source"] = R.SOURCE
    for name, register in registers.items():
        _load_word(e, name, register)
    build.add("sadd", rd=int(R.LAST), a=reg(R.LAST, -1), b=reg(R.POSITION))
    build.constant(R.GENERATED, 0)


def _emit_prompt(e: Emission, program: dev.ProgramOp, tokens: Tokens) -> None:
    """Blocks of a prompt's tokens; goes on to `tail` where the last token went through in one."""
    assert program.rows_step is not None
    limits = replace(e.limits, step=int(program.rows_step.value.data))
    emit_prompt(
        RowsEmission(
            e.build, e.machine, e.memory, limits, e.format, program, layout=Layout.of(program, limits, tokens)
        ),
        program,
        _node,
    )
    for value in crossing(program):
        if shared(value) and isinstance(value.owner, Operation):
            _emit_op(e, value.owner)
    e.build.branch("beq", "tail", 0, 0)


def _begin_token(e: Emission) -> None:
    """The loop over tokens that go through one by one."""
    build, io = e.build, e.memory.io
    build.label("token")
    build.add("sshl", rd=int(R.T1), a=reg(R.POSITION), b=2)
    build.add("sload", region=int(Region.IO), rd=int(R.TOKEN), line=io.tokens_line, byte=reg(R.T1))
    build.add("sadd", rd=int(R.LENGTH), a=reg(R.POSITION), b=1)


def _end_of_token(e: Emission, head: dev.HeadOp) -> None:
    build, context = e.build, e.limits.context
    build.note("inside the prompt no logits are needed")
    build.branch("blt", "next", reg(R.POSITION), reg(R.LAST))
    emit_head(e, head, "done")
    build.label("next")
    build.increase(R.POSITION, 1)
    build.branch("blt", "token", reg(R.POSITION), build.any_size(context, R.T0))
    build.label("done")
    build.add("halt")


def _emit_op(e: Emission, op: Operation) -> None:
    if isinstance(op, ir.RepeatOp):
        _emit_loop(e, op)
        return
    if isinstance(op, PhaseOp):
        emit_phase(e, op, lambda item: _emit_op(e, item))
        return
    emitter = _EMITTERS.get(type(op))
    if emitter is None:
        raise TypebarError(f"{op.name} has no instructions: run partition and fuse first")
    e.build.note(_node(op))
    emitter(e, op)


def _node(op: Operation) -> str:
    """What an operation is called in comments: its kind, the parameters it reads and the exporter's node."""
    if isinstance(op, dev.MatrixOp | dev.BiasOp):
        names = [(item.bias if isinstance(op, dev.BiasOp) else item.weight) or "" for item in op.pieces]
    elif isinstance(op, dev.ParamOp):
        names = [ir.text(op.symbol_)]
    elif isinstance(op, dev.LookupOp):
        names = [ir.text(op.table)]
    else:
        names = []
    node = op.attributes.get("node")
    words = [op.name.removeprefix("tbd."), *dict.fromkeys(names)]
    return " ".join(words) + (f" ({node.data})" if isinstance(node, StringAttr) else "")


def _emit_loop(e: Emission, loop: ir.RepeatOp) -> None:
    def copy(value: SSAValue, home: SSAValue) -> None:
        if e.address(value) != e.address(home):
            e.build.add("vmov", dst=e.address(home), b=e.address(value), n=ir.width(value))

    def emit(ops: list[Operation]) -> None:
        for op in ops:
            _emit_op(e, op)

    def ahead() -> None:
        if norm is not None:
            emit_first_sum(e, norm)

    norm = _norm_of_handed_on(loop) if e.build.chains else None
    e.summed = norm
    emit_loop(e, loop, layer_strides(e, loop), emit, copy, ahead)
    e.summed = None


def _norm_of_handed_on(loop: ir.RepeatOp) -> dev.LayerNormOp | dev.RmsNormOp | None:
    """The norm that a layer begins with, if it takes all that layers hand on.

    Its first sum can then be one chain with the addition that ends the layer before. The word where it goes is free
    from there on: only what layers hand on and what outlives the loop is held then, and the loads in between write
    what the norm or something after it uses.
    """
    block = loop.body.block
    first = next((op for op in block.ops if not isinstance(op, LOADS)), None)
    if isinstance(first, dev.LayerNormOp | dev.RmsNormOp) and len(block.args) == 1 and first.x is block.args[0]:
        return first
    return None
