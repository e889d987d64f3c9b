"""Attention of one token over several blocks of positions, a block's scores computed while the one before is weighted.

Every block adds to a running maximum, sum and result (Milakov and Gimelshein 2018). Blocks take turns in two sets of
scratch vectors, each written by one unit and in hazard segments of its own where there are enough, so the vector unit
goes from one block's softmax to the next's: the scores are there already, and what needs the product of weights and V
comes a block later. What an instruction computes, and in which order a value changes, is that of one block after the
other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from typebar.compiler.emit.builder import R, reg
from typebar.compiler.emit.vectors import Emission
from typebar.isa.instructions import Function, Source
from typebar.isa.program import Operand, Value, float_bits

_WORD, _IMMEDIATE = int(Source.WORD), int(Source.IMMEDIATE)


@dataclass(frozen=True)
class Blocks:
    """One turn's query heads: the instructions' fields that do not depend on the block, and words where results lie.

    `scores` and `values` are fields of the two products, but for those below; `out` has the rows of the result, each of
    `size` words. `k_lines` and `v_lines` are a block's lines, `block` its positions, `length` all positions seen.
    """

    scores: dict[str, Value]
    values: dict[str, Value]
    out: Sequence[Operand]
    size: int
    stride: int
    pad: int
    block: int
    length: Operand
    k_lines: int
    v_lines: int


def emit_blocks(e: Emission, s: dict[str, int], a: Blocks) -> None:
    """All blocks: from line CHUNK on K, from line V_LINE on V; `s` are the operation's scratch vectors."""
    build, rows = e.build, len(a.out)
    build.add("vmov", b_from=_IMMEDIATE, imm=float_bits(float("-inf")), dst=s["running1"], n=rows)
    for name, words in (("correction1", rows), ("sum", rows), ("running_sum", rows), ("part1", rows * a.pad)):
        build.add("vmov", b_from=_IMMEDIATE, dst=s[name], n=words)
    for out in a.out:
        build.add("vmov", b_from=_IMMEDIATE, dst=out, n=a.size)
    build.constant(R.BLOCK, 0)
    build.add("smin", rd=int(R.T1), a=a.length, b=a.block)
    _scores(e, s, a, 0, reg(R.CHUNK), reg(R.POSITION))
    build.add("vmax", dst=s["running0"], a=s["maximum0"], b=s["running1"], n=rows)
    loop, done = build.fresh("block"), build.fresh("blocks")
    ends = [build.fresh("end"), build.fresh("end")]
    build.label(loop)
    for turn in (0, 1):
        _block(e, s, a, turn)
        build.branch("bge", ends[turn], 0, reg(R.T1))
    build.branch("beq", loop, 0, 0)
    for turn in (0, 1):
        build.label(ends[turn])
        _add_sums(e, s, rows)
        for row, out in enumerate(a.out):
            build.add("vmul", b_from=_WORD, dst=out, a=out, b=s[f"correction{turn}"] + row, n=a.size)
        for row, out in enumerate(a.out):
            build.add("vadd", dst=out, a=out, b=s[f"part{turn}"] + row * a.pad, n=a.size)
        if turn == 0:
            build.branch("beq", done, 0, 0)
    build.label(done)
    build.add("vunary", function=int(Function.RECIP), dst=s["running_sum"], a=s["running_sum"], n=rows)
    for row, out in enumerate(a.out):
        build.add("vmul", b_from=_WORD, dst=out, a=out, b=s["running_sum"] + row, n=a.size)


def _block(e: Emission, s: dict[str, int], a: Blocks, turn: int) -> None:
    """One block, its scores and running maximum being there; T1 becomes the positions after it, 0 or less for none."""
    build, rows, other = e.build, len(a.out), 1 - turn
    running, correction = s[f"running{turn}"], s[f"correction{turn}"]
    weights = [s[f"scores{turn}"] + row * a.stride for row in range(rows)]
    build.add("ssub", rd=int(R.T1), a=a.length, b=reg(R.BLOCK))
    build.add("smin", rd=int(R.BLOCK_LENGTH), a=reg(R.T1), b=a.block)
    build.add("ssub", rd=int(R.PATCH), a=reg(R.POSITION), b=reg(R.BLOCK))
    build.add("sadd", rd=int(R.T1), a=reg(R.T1), b=-a.block)
    last, length = build.fresh("last"), reg(R.BLOCK_LENGTH)
    build.increase(R.CHUNK, a.k_lines)
    build.branch("bge", last, 0, reg(R.T1))
    _scores(e, s, a, other, reg(R.CHUNK), reg(R.PATCH, -a.block))
    build.label(last)
    _add_sums(e, s, rows)

    def subtract(row: int) -> None:
        build.add("vsub", b_from=_WORD, dst=weights[row], a=weights[row], b=running + row, n=length)

    def exponential(row: int) -> None:
        build.add("vunary", function=int(Function.EXP), dst=weights[row], a=weights[row], n=length)

    def total(row: int) -> None:
        build.add("vsum", dst=s["sum"] + row, a=weights[row], n=length)

    def rescale(row: int) -> None:
        build.add("vmul", b_from=_WORD, dst=a.out[row], a=a.out[row], b=s[f"correction{other}"] + row, n=a.size)

    build.each(_alternating(rows), subtract, exponential, total, rescale)
    build.add("vsub", dst=correction, a=s[f"running{other}"], b=running, n=rows)
    build.add("vunary", function=int(Function.EXP), dst=correction, a=correction, n=rows)
    for row, out in enumerate(a.out):
        build.add("vadd", dst=out, a=out, b=s[f"part{other}"] + row * a.pad, n=a.size)
    build.add("vmul", dst=s["running_sum"], a=s["running_sum"], b=correction, n=rows)
    values = _patched(a.values, reg(R.PATCH))
    build.add("matmul", dst=s[f"part{turn}"], src=weights[0], k=length, line=reg(R.V_LINE), **values)
    seen = build.fresh("seen")
    build.branch("bge", seen, 0, reg(R.T1))
    build.add("vmax", dst=s[f"running{other}"], a=s[f"maximum{other}"], b=running, n=rows)
    build.label(seen)
    build.increase(R.V_LINE, a.v_lines)
    build.increase(R.BLOCK, a.block)


def _alternating(rows: int) -> list[int]:
    """The rows of a block in an order in which one and the next lie in different hazard segments, if in several."""
    half = -(-rows // 2)
    return [row for pair in zip_longest(range(half), range(half, rows)) for row in pair if row is not None]


def _scores(e: Emission, s: dict[str, int], a: Blocks, turn: int, line: Operand, patch_at: Operand) -> None:
    """A block's scores and their maxima; T1 has the positions from it on, of which it sees `block` at the most."""
    build = e.build
    build.add("smin", rd=int(R.T2), a=reg(R.T1), b=a.block)
    build.add(
        "matmul", dst=s[f"scores{turn}"], n=reg(R.T2), line=line, scale=s["scale"], maximum=s[f"maximum{turn}"],
        **_patched(a.scores, patch_at),
    )  # fmt: skip


def _patched(fields: dict[str, Value], at: Operand) -> dict[str, Value]:
    """A product's fields, with the place of this position's K or V if registers hold it."""
    return fields | {"patch_at": at} if "patch" in fields else fields


def _add_sums(e: Emission, s: dict[str, int], rows: int) -> None:
    """The block before's sums of weights, once it has changed the running ones' scale."""
    e.build.add("vadd", dst=s["running_sum"], a=s["running_sum"], b=s["sum"], n=rows)
