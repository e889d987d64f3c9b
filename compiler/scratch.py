"""Scratch space in the register file that an operation's instructions need beside operands and result.

The allocator reserves it and the emitter uses it; this is the one place that says how much and where.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from xdsl.ir import Operation

from typebar.compiler import device_ir as dev
from typebar.compiler.device_source import AttendOp


@dataclass(frozen=True)
class Limits:
    """What allocation must know of the machine and the program: sizes in words.

    Places start at multiples of `step`: a hazard segment, or the register alignment where segments are too few.
    `macs` multiply-accumulates and `lanes` vector elements a cycle are all that an order of operations is chosen by;
    `buffer` words are the most that a device can send at once.
    """

    words: int
    align: int
    step: int
    attention_block: int
    column_block: int
    context: int
    devices: int
    vectors: int
    chains: bool
    macs: int
    lanes: int
    buffer: int

    def round(self, words: int) -> int:
        """Words rounded up to the alignment of a vector's base."""
        return -(-words // self.align) * self.align

    def step_of(self, words: int) -> int:
        """Where a place of so many words may start: at a multiple of this."""
        return self.step


HEADS_TOGETHER, HEADS_IN_CHAINS = 4, 8
"""Query heads whose attention is computed side by side, without and with chains: enough to cover latencies."""


@dataclass(frozen=True)
class Rows:
    """How the query heads of an attention are taken: `rows` of one K/V head at a time, `keys` K/V heads together.

    The query heads of one K/V head take `pieces` turns, the last of which may have fewer rows.
    """

    rows: int
    pieces: int
    keys: int

    def of_piece(self, piece: int, group: int) -> int:
        """Rows of one turn."""
        return min(self.rows, group - piece * self.rows)


def positions_of(op: dev.AttentionOp | AttendOp, limits: Limits) -> int:
    """The most positions that an attention sees."""
    return int(op.context.value.data) if isinstance(op, AttendOp) else limits.context


def rows_of(op: dev.AttentionOp | AttendOp, limits: Limits) -> Rows:
    """As many query heads of a K/V head as the matrix unit takes and a quarter of the registers holds the scores of.

    Those with score biases of their own come one by one, for the biases are the matrix unit's and the same in all rows.
    """
    context = positions_of(op, limits)
    length = min(limits.round(context), limits.attention_block)
    fits = 1 if _own_bias(op) else max(1, min(limits.vectors, limits.words // 4 // length))
    pieces = -(-op.group // fits)
    rows = -(-op.group // pieces)
    most = HEADS_IN_CHAINS if limits.chains else HEADS_TOGETHER
    together = most // rows if pieces == 1 and context <= limits.attention_block else 1
    return Rows(rows, pieces, max(1, min(together, int(op.kv_heads.value.data))))


_BLOCK_TURNS = 2
"""Blocks of positions that have scratch vectors at a time."""


def overlapping(op: dev.AttentionOp | AttendOp) -> bool:
    """Whether blocks of positions overlap: not with a window or biases, whose places and masks depend on the block."""
    return op.bias is None and (isinstance(op, AttendOp) or op.window is None)


def _own_bias(op: dev.AttentionOp | AttendOp) -> bool:
    return op.planes is not None and op.planes.value.data > 1


def scratch_of(op: Operation, limits: Limits, chunk: int = 0) -> Mapping[str, int]:
    """Offsets in words of an operation's scratch vectors, by name; the key `total` has the whole size.

    `chunk` is the number of logits that `tbd.head` computes at a time.
    """
    offsets, total = {}, 0
    for apart in _vectors(op, limits, chunk):
        total = -(-total // limits.step) * limits.step
        for name, words in apart.items():
            offsets[name] = total
            total += limits.round(words)
    return offsets | {"total": total}


def _vectors(op: Operation, limits: Limits, chunk: int) -> list[dict[str, int]]:
    """Words of each scratch vector; those of different groups lie in different hazard segments if possible."""
    if isinstance(op, dev.LayerNormOp):
        return [{"mean": 1, "variance": 1}]
    if isinstance(op, dev.RmsNormOp):
        return [{"variance": 1}]
    if isinstance(op, dev.AttentionOp | AttendOp):
        return _attention(op, limits)
    if isinstance(op, dev.RotaryOp):
        return [{"crossed": int(op.heads.value.data) * int(op.pad.value.data)}]
    if isinstance(op, dev.HeadOp):
        return _head(op, limits, chunk)
    return []


def head_parts(op: dev.HeadOp, limits: Limits, chunk: int) -> list[tuple[int, int]]:
    """First word and words of the parts in which a chunk of logits is computed.

    All at once where they fit, but for the last twelfth: while it is computed, the vector unit looks for the largest of
    the others, and only its own are left when the last weight has come.
    """
    last = -(-chunk // 12 // limits.column_block) * limits.column_block
    if chunk < op.words or not limits.chains or chunk < 2 * last or last % limits.align:
        return [(0, chunk)]
    first = (chunk - last) // limits.column_block * limits.column_block
    return [(0, first), (first, chunk - first)]


def _head(op: dev.HeadOp, limits: Limits, chunk: int) -> list[dict[str, int]]:
    """The best logit and its index of each part, and the parts' logits and what is loaded for them."""
    everyone = {"all": limits.devices * limits.align} if limits.devices > 1 else {}
    piece, parts = op.pieces[0], head_parts(op, limits, chunk)
    groups = []
    for part, (_, words) in enumerate(parts):
        loaded = {f"{n}{part}": words for n, symbol in (("scale", piece.scale), ("bias", piece.bias)) if symbol}
        groups.append({f"logits{part}": words} | loaded)
    groups[0] = {"best": 2 * len(parts)} | groups[0] | everyone
    return groups


def _attention(op: dev.AttentionOp | AttendOp, limits: Limits) -> list[dict[str, int]]:
    taken = rows_of(op, limits)
    rows, context = taken.rows, positions_of(op, limits)
    if context > limits.attention_block and overlapping(op):
        turns = [
            {f"scores{turn}": rows * limits.attention_block, f"maximum{turn}": rows} for turn in range(_BLOCK_TURNS)
        ]
        running = {f"{name}{turn}": rows for name in ("running", "correction") for turn in range(_BLOCK_TURNS)}
        parts = {f"part{turn}": rows * int(op.pad.value.data) for turn in range(_BLOCK_TURNS)}
        return [{"scale": 1}, *turns, {"running_sum": rows} | running, parts, {"sum": rows}]
    if context > limits.attention_block:
        running = {name: rows for name in ("running_maximum", "running_sum", "correction")}
        running["part"] = rows * int(op.pad.value.data)
        return [{"scale": 1, "maximum": rows, "sum": rows, "scores": rows * limits.attention_block} | running]
    each = {"maximum": rows, "sum": 0 if limits.chains else rows, "scores": rows * limits.round(context)}
    heads = ({f"{name}{head}": words for name, words in each.items()} for head in range(taken.keys))
    if not limits.chains:
        return [{"scale": 1}, *heads]
    lines = taken.keys * rows
    return [{"scale": 1}, {"sum": lines}, {"part": lines * int(op.pad.value.data)}, *heads]
