"""Scratch space in the register file that an operation's instructions need beside operands and result.

The allocator reserves it and the emitter uses it; this is the one place that says how much and where.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from xdsl.ir import Operation

from typebar.compiler import device_ir as dev


@dataclass(frozen=True)
class Limits:
    """What allocation must know of the machine and the program: sizes in words.

    Places start at multiples of `step`: a hazard segment, or the register alignment where segments are too few.
    """

    words: int
    align: int
    step: int
    attention_block: int
    column_block: int
    context: int
    devices: int

    def round(self, words: int) -> int:
        """Words rounded up to the alignment of a vector's base."""
        return -(-words // self.align) * self.align


HEADS_TOGETHER = 4
"""Heads whose attention is computed step by step side by side: enough to cover the vector unit's latencies."""


def heads_together(op: dev.AttentionOp, limits: Limits) -> int:
    """Heads of a group; one where the context takes several blocks of positions."""
    return min(int(op.heads.value.data), HEADS_TOGETHER) if limits.context <= limits.attention_block else 1


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
    if isinstance(op, dev.AttentionOp):
        if limits.context > limits.attention_block:
            running = {"running_maximum": 1, "running_sum": 1, "correction": 1, "part": int(op.pad.value.data)}
            return [{"scale": 1, "maximum": 1, "sum": 1, "scores": limits.attention_block} | running]
        heads = range(heads_together(op, limits))
        each = {"maximum": 1, "sum": 1, "scores": limits.context}
        return [{"scale": 1}, *({f"{name}{head}": words for name, words in each.items()} for head in heads)]
    if isinstance(op, dev.HeadOp):
        everyone = {"all": limits.devices * limits.align} if limits.devices > 1 else {}
        return [{"best": 2, "logits": chunk} | everyone]
    return []
