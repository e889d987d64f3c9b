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
    """What allocation must know of the machine and the program: sizes in words."""

    words: int
    align: int
    segment: int
    attention_block: int
    column_block: int
    context: int
    devices: int

    def round(self, words: int) -> int:
        """Words rounded up to the alignment of a vector's base."""
        return -(-words // self.align) * self.align


def scratch_of(op: Operation, limits: Limits, chunk: int = 0) -> Mapping[str, int]:
    """Offsets in words of an operation's scratch vectors, by name; the key `total` has the whole size.

    `chunk` is the number of logits that `tbd.head` computes at a time.
    """
    if isinstance(op, dev.LayerNormOp):
        sizes = {"mean": 1, "variance": 1}
    elif isinstance(op, dev.RmsNormOp):
        sizes = {"variance": 1}
    elif isinstance(op, dev.AttentionOp):
        sizes = {"scale": 1, "maximum": 1, "sum": 1, "scores": min(limits.context, limits.attention_block)}
        if limits.context > limits.attention_block:
            sizes |= {"running_maximum": 1, "running_sum": 1, "correction": 1, "part": int(op.pad.value.data)}
    elif isinstance(op, dev.HeadOp):
        sizes = {"best": 2, "logits": chunk}
        if limits.devices > 1:
            sizes |= {"all": limits.devices * limits.align}
    else:
        sizes = {}
    offsets, total = {}, 0
    for name, words in sizes.items():
        offsets[name] = total
        total += limits.round(words)
    return offsets | {"total": total}
