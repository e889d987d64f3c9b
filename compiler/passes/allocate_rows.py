"""allocate, for blocks of a prompt's tokens: how many tokens go side by side, and where their rows lie.

Blocks use the whole register file: nothing of a step for one token is live meanwhile. What the tail of the step reads
of a block, the last token's row, is copied to where the step for one token has it, and has that place to itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from xdsl.ir import SSAValue

from typebar.compiler import device_ir as dev
from typebar.compiler import ir
from typebar.compiler.passes.lifetimes import Lifetimes
from typebar.compiler.passes.slots import Slot, record
from typebar.compiler.passes.spread import spread
from typebar.compiler.rows import MAX_GROUPS, PREFIXES, Layout, Tokens, crossing, needed, place_of, shared, split_tail
from typebar.compiler.scratch import Limits

MOST_ROWS = 8
"""Tokens of a group, unless hiding fetches takes more: each costs instructions, and 16 bring 0.7 % (decision 32)."""
_NEAR = (4000, 2000, 1000, 500, 1)
"""Cycles to try between uses of a hazard segment by different groups."""


def allocate_rows(program: dev.ProgramOp, limits: Limits, least: int) -> None:
    """Choose the largest blocks that fit, and set each group's places; nothing if none of two tokens does.

    Two groups where each has `least` rows, so that reading weights for each does not hold up the matrix unit; else one.
    """
    if not possible(program):
        return
    norms = [op for op in needed(program) for op in op.walk() if isinstance(op, dev.LayerNormOp | dev.RmsNormOp)]
    widest = max((limits.round(ir.width(op.out)) for op in norms), default=0)
    for tokens, step in _candidates(limits, least, widest):
        layout = Layout.of(program, replace(limits, step=step), tokens)
        if _try(program, layout, limits.step):
            program.rows, program.groups = ir.number(tokens.rows), ir.number(tokens.groups)
            program.rows_step = ir.number(step)
            return


def possible(program: dev.ProgramOp) -> bool:
    """Whether blocks have a form: something mixes positions, no loop carries a parameter, and no table comes last."""
    loops = [op for op in program.walk() if isinstance(op, ir.RepeatOp)]
    carried = [value for loop in loops for value in (*loop.inits, *_yielded(loop))]
    _, tail = split_tail(program)
    late = any(isinstance(op, dev.LookupOp) for op in tail)
    return bool(needed(program)) and not late and not any(shared(value) for value in carried)


def _yielded(loop: ir.RepeatOp) -> list[SSAValue]:
    last = loop.body.block.last_op
    return list(last.operands) if last is not None else []


def _candidates(limits: Limits, least: int, widest: int) -> Iterator[tuple[Tokens, int]]:
    """Blocks to try, best first.

    Groups that share no hazard segment overlap, and rows that the devices share evenly are normed once: both are worth
    more than size. A gather of the `widest` norm's rows must fit the ring.
    """
    most = min(limits.vectors, max(MOST_ROWS, 2 * least))
    for groups in range(MAX_GROUPS, 0, -1):
        for step in dict.fromkeys((limits.step, limits.align)):
            for rows in range(most, max(2, least if groups > 1 else 0) - 1, -1):
                if rows < limits.devices or (
                    rows % limits.devices == 0 and rows // limits.devices * widest <= limits.buffer
                ):
                    yield Tokens(rows, groups), step


def _try(program: dev.ProgramOp, layout: Layout, segment: int) -> bool:
    lives = Lifetimes(needed(program), layout)
    fixed = []
    for value in crossing(program):
        if not shared(value):
            lives.keep(value)
            fixed.append(Slot(layout.stride(value), lives.end, lives.end, at=place_of(value)))
    whole = [layout.tokens.rows * layout.stride(value) for value in crossing(program) if value in layout.dealt]
    last = Slot(max(whole, default=0), lives.end, lives.end)
    if whole:
        lives.slots[0].append(last)
    if not any(spread(lives.slots, fixed, layout, segment, lives.cycles, near) for near in _NEAR):
        return False
    for prefix, group in zip(("rows_", *PREFIXES[1:]), lives.slots, strict=False):
        record(group, prefix)
    program.rows_last = ir.number(last.at)
    return True
