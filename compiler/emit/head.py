"""The end of a token: logits, their argmax over all devices, the next token, and when to stop."""

from __future__ import annotations

from xdsl.dialects.builtin import FloatAttr, StringAttr

from typebar.compiler import device_ir as dev
from typebar.compiler.emit.builder import R, reg
from typebar.compiler.emit.vectors import Emission
from typebar.compiler.scratch import head_parts
from typebar.isa.instructions import FORMAT_BYTES, Format, Function, Region, Scale, Source
from typebar.isa.layout import packed_layout
from typebar.isa.machine import LINE_BYTES
from typebar.isa.program import float_bits

DESCRIPTOR_WORDS = {"start": 0, "count": 1, "new": 2, "eos": 3, "flags": 4, "source": 5, "generated": 8, "encoded": 9}
"""Words of the descriptor in IO: first position, tokens given from there on, tokens to generate, end id or -1, flags
(bit 0: write logits), tokens of the source text; the device counts the tokens it generated in `generated` and, when it
has encoded it, those of the source text in `encoded`."""
STORE_LOGITS = 1
_IO = int(Region.IO)


def emit_head(e: Emission, op: dev.HeadOp, finished: str) -> None:
    """Logits in chunks, the best of them all, the next token to IO; branches to `finished` when generation ends."""
    build, chunk = e.build, _chunk(op)
    s = e.scratch(op, chunk)
    _first_candidate(e, op)
    parts = list(enumerate(head_parts(op, e.limits, chunk)))
    if chunk >= op.words:
        for part, (start, words) in parts:
            build.constant(R.CHUNK, start)
            _logits(e, op, words, s, part)
            _best_of_part(e, op, s, part)
        for part, _ in parts:
            _take_if_better(e, s["best"] + 2 * part)
    else:
        build.constant(R.CHUNK, 0)
        loop = build.fresh("logits")
        build.label(loop)
        _logits(e, op, chunk, s, 0)
        _best_of_part(e, op, s, 0)
        _take_if_better(e, s["best"])
        build.increase(R.CHUNK, chunk)
        build.branch("blt", loop, reg(R.CHUNK), build.any_size(op.words, R.T0))
    if e.limits.devices > 1:
        _best_of_all(e, s)
    io = e.memory.io
    build.add("sshl", rd=int(R.T1), a=reg(R.POSITION, 1), b=2)
    build.note("the next token")
    build.add("sstore", region=_IO, line=io.tokens_line, byte=reg(R.T1), value=reg(R.INDEX))
    build.increase(R.GENERATED, 1)
    generated = 4 * DESCRIPTOR_WORDS["generated"]
    build.add("sstore", region=_IO, line=io.descriptor_line, byte=generated, value=reg(R.GENERATED))
    build.branch("beq", finished, reg(R.INDEX), reg(R.EOS))
    build.branch("bge", finished, reg(R.GENERATED), reg(R.LEFT))


def _chunk(op: dev.HeadOp) -> int:
    assert op.chunk is not None
    return int(op.chunk.value.data)


def _first_candidate(e: Emission, op: dev.HeadOp) -> None:
    """Best so far: minus infinity at this device's first token; VALID: tokens of the vocabulary from there on."""
    build, vocab = e.build, int(e.program.vocab.value.data)
    build.constant(R.BEST, _signed(float_bits(float("-inf"))))
    build.add("smul", rd=int(R.INDEX), a=reg(R.RANK), b=build.any_size(op.words, R.T0))
    build.add("ssub", rd=int(R.VALID), a=build.any_size(vocab, R.T0), b=reg(R.INDEX))


def _signed(bits: int) -> int:
    return bits - (bits >> 31 << 32)


def _logits(e: Emission, op: dev.HeadOp, chunk: int, s: dict[str, int], part: int) -> None:
    """Logits from word CHUNK on, at most `chunk`; T2 is their number."""
    build, element = e.build, FORMAT_BYTES[e.format_of(op)]
    k, words, logits = int(op.k.value.data), op.words, s[f"logits{part}"]
    place = e.memory.places[op]
    build.add("ssub", rd=int(R.T2), a=build.any_size(words, R.T0), b=reg(R.CHUNK))
    build.add("smin", rd=int(R.T2), a=reg(R.T2), b=build.any_size(chunk, R.T0))
    line = build.line(place.line, R.ZERO)
    if chunk < words:
        blocks = e.machine.column_block
        block_lines = packed_layout(k, blocks, e.machine, element).bytes // LINE_BYTES
        build.add("sshr", rd=int(R.T1), a=reg(R.CHUNK), b=blocks.bit_length() - 1)
        build.add("smul", rd=int(R.T1), a=reg(R.T1), b=block_lines)
        build.add("sadd", rd=int(R.T1), a=reg(R.T1), b=line)
        line = reg(R.T1)
    extra = _column_values(e, op, s, part)
    build.note("logits")
    build.add(
        "matmul", format=int(e.format_of(op)), region=int(Region.WEIGHTS), dst=logits, src=e.address(op.x),
        k=k, n=reg(R.T2), line=line, outer=1, inner=1, **extra,
    )  # fmt: skip
    for step in op.steps or ():
        if isinstance(step, StringAttr):
            build.add("vunary", function=int(Function[step.data.upper()]), dst=logits, a=logits, n=reg(R.T2))
        elif isinstance(step, FloatAttr):
            build.add("vmul", dst=logits, a=logits, n=reg(R.T2), b_from=int(Source.IMMEDIATE),
                      imm=float_bits(step.value.data))  # fmt: skip
    skip = build.fresh("unread")
    build.add("sand", rd=int(R.T1), a=reg(R.FLAGS), b=STORE_LOGITS)
    build.branch("beq", skip, reg(R.T1), 0)
    build.add("sshl", rd=int(R.T1), a=reg(R.CHUNK), b=2)
    build.add("store", format=int(Format.FP32), region=_IO, a=logits, line=e.memory.io.logits_line, byte=reg(R.T1),
              outer=1, inner=reg(R.T2), inner_bytes=4)  # fmt: skip
    build.label(skip)


def _best_of_part(e: Emission, op: dev.HeadOp, s: dict[str, int], part: int) -> None:
    """The largest of T2 logits from word CHUNK on, those of the vocabulary, and its index."""
    build = e.build
    build.add("ssub", rd=int(R.T1), a=reg(R.VALID), b=reg(R.CHUNK))
    build.add("smin", rd=int(R.T1), a=reg(R.T1), b=reg(R.T2))
    build.add("smax", rd=int(R.T1), a=reg(R.T1), b=0)
    build.add("smul", rd=int(R.T2), a=reg(R.RANK), b=build.any_size(op.words, R.T0))
    build.add("sadd", rd=int(R.T2), a=reg(R.T2), b=reg(R.CHUNK))
    build.add("vargmax", dst=s["best"] + 2 * part, a=s[f"logits{part}"], n=reg(R.T1), base=reg(R.T2))


def _column_values(e: Emission, op: dev.HeadOp, s: dict[str, int], part: int) -> dict[str, int]:
    """Load the chunk's scales and biases; what the product does with them."""
    build, options = e.build, dict[str, int]()
    for name, option in (("scale", {"scaling": int(Scale.COLUMN)}), ("bias", {"add_bias": 1})):
        place = e.memory.places.get((op, name))
        if place is None:
            continue
        build.add("sshl", rd=int(R.BYTE), a=reg(R.CHUNK), b=2)
        build.add("load", format=int(Format.FP32), region=int(place.region), dst=s[f"{name}{part}"], byte=reg(R.BYTE),
                  n=reg(R.T2), line=build.line(place.line, R.ZERO))  # fmt: skip
        options |= option | {name: s[f"{name}{part}"]}
    return options


def _take_if_better(e: Emission, pair: int, base: R = R.ZERO) -> None:
    """(BEST, INDEX) = the pair at `pair` + R[base] if its value is greater; on a tie the earlier one stays."""
    build = e.build
    keep = build.fresh("keep")
    build.add("vread", rd=int(R.T0), a=reg(base, pair))
    build.add("sfgt", rd=int(R.T1), a=reg(R.T0), b=reg(R.BEST))
    build.branch("beq", keep, reg(R.T1), 0)
    build.add("sadd", rd=int(R.BEST), a=reg(R.T0), b=0)
    build.add("vread", rd=int(R.INDEX), a=reg(base, pair + 1))
    build.label(keep)


def _best_of_all(e: Emission, s: dict[str, int]) -> None:
    """Gather every device's best and choose, lowest rank (and so lowest token) on ties."""
    build, align = e.build, e.limits.align
    build.add("vwrite", dst=s["best"], b=reg(R.BEST))
    build.add("vwrite", dst=s["best"] + 1, b=reg(R.INDEX))
    build.add("gather", dst=s["all"], a=s["best"], n=align)
    build.add("vread", rd=int(R.BEST), a=s["all"])
    build.add("vread", rd=int(R.INDEX), a=s["all"] + 1)
    build.constant(R.OFFSET, align)
    loop = build.fresh("device")
    build.label(loop)
    _take_if_better(e, s["all"], R.OFFSET)
    build.increase(R.OFFSET, align)
    build.branch("blt", loop, reg(R.OFFSET), align * e.limits.devices)
