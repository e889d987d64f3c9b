"""How a prompt's tokens go side by side: what of a step is computed for several at once, and how values then lie.

`Tokens` of a block go through every operation in groups; the tokens of a group are rows of one matrix instruction, and
groups follow one another operation by operation, so that one group's vectors and gathers overlap with another's
products. A value that depends on the token has a row for each, others are shared. Only the last token of a prompt
needs what stands after the last attention: the *tail* of a step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from xdsl.dialects.builtin import IndexType
from xdsl.ir import Block, BlockArgument, Operation, OpResult, SSAValue

from typebar.compiler import device_ir as dev
from typebar.compiler import ir
from typebar.compiler.device_source import AttendOp
from typebar.compiler.scratch import Limits, positions_of

MAX_GROUPS = 2
"""Groups that the emitter has registers for."""
LAG = 1
"""Operations by which the second group is behind the first."""
HEADS_ALTERNATING = 2
"""K/V heads whose scores have places of their own, so that one's softmax passes while the other's product runs."""


@dataclass(frozen=True)
class Tokens:
    """Tokens of a block: `groups` groups of `rows`."""

    rows: int
    groups: int

    @property
    def count(self) -> int:
        """Tokens of a full block."""
        return self.rows * self.groups


def tokens_of(program: dev.ProgramOp) -> Tokens | None:
    """The blocks in which an allocated program takes a prompt; None if it goes token by token."""
    if program.rows is None or program.groups is None:
        return None
    return Tokens(int(program.rows.value.data), int(program.groups.value.data))


def split_tail(program: dev.ProgramOp) -> tuple[list[Operation], list[Operation]]:
    """A step's operations up to the last attention, or loop with one, and those after it."""
    ops = list(program.body.block.ops)
    last = max((i for i, op in enumerate(ops) if any(_attends(inner) for inner in op.walk())), default=-1)
    return ops[: last + 1], ops[last + 1 :]


def _attends(op: Operation) -> bool:
    return isinstance(op, dev.AttentionOp | AttendOp)


def crossing(program: dev.ProgramOp) -> list[SSAValue]:
    """What the tail reads of the operations before it: computed values, then parameters."""
    before, tail = split_tail(program)
    found: dict[SSAValue, None] = {}
    for op in tail:
        for value in op.operands:
            if not isinstance(value.type, IndexType) and value.owner in before:
                found[value] = None
    return sorted(found, key=shared)


def needed(program: dev.ProgramOp) -> list[Operation]:
    """The operations of a block: those up to the last attention whose results are not the tail's alone."""
    before, tail = split_tail(program)
    return [
        op
        for op in before
        if not (op.results and isinstance(op, dev.ParamOp | dev.BiasOp))
        or any(use.operation not in tail for use in op.results[0].uses)
    ]


def schedule(ops: Sequence[Operation], groups: int) -> list[tuple[Operation, int]]:
    """The order in which operations of a block (no loops) go through the groups: the second group lags `LAG` behind.

    So one group's products run while the vector unit and the ring work for the other. What all tokens share, and loops,
    come once.
    """
    order: list[tuple[Operation, int]] = []
    waiting: deque[Operation] = deque()

    def follow(lag: int) -> None:
        while len(waiting) > lag:
            order.append((waiting.popleft(), 1))

    for op in ops:
        if isinstance(op, ir.RepeatOp):
            follow(0)
        order.append((op, 0))
        if groups > 1 and op.results and not isinstance(op, ir.RepeatOp) and not shared(op.results[0]):
            waiting.append(op)
        follow(LAG)
    follow(0)
    return order


def last_parts(ops: Sequence[Operation], groups: int) -> dict[Operation, Operation]:
    """For each operation of a block that goes through the second group later, the last one started before that."""
    found: dict[Operation, Operation] = {}
    latest = None
    for op, group in schedule(ops, groups):
        if group == 0:
            latest = op
        elif latest is not None:
            found[op] = latest
    return found


def shared(value: SSAValue) -> bool:
    """Whether a value is the same for all tokens of a block."""
    owner = value.owner
    if isinstance(owner, dev.ScoreBiasOp):
        return owner.kind.data == "column"
    return isinstance(owner, dev.ParamOp | dev.BiasOp)


def ranked(value: SSAValue, tokens: Tokens, buffer_words: int) -> bool:
    """Whether a group's gathered rows stay as one gather leaves them: by device, then by row.

    Sums and products with other values can read them so, piece by piece; everything else needs whole rows.
    """
    owner = value.owner
    if not isinstance(owner, dev.GatherOp) or shared(owner.x) or tokens.rows * ir.width(owner.x) > buffer_words:
        return False
    return all(isinstance(use.operation, dev.AddOp | dev.MulOp | dev.SumOp) for use in value.uses)


@dataclass(frozen=True)
class Layout:
    """Sizes in words of what a block's operations work on."""

    limits: Limits
    tokens: Tokens

    def stride(self, value: SSAValue) -> int:
        """From one row of a value to the next."""
        return self.limits.round(ir.width(value))

    def group_stride(self, value: SSAValue) -> int:
        """From one group's rows to the next group's: 0 for shared values."""
        return 0 if shared(value) else self._apart(self.tokens.rows * self.stride(value))

    def words(self, value: SSAValue) -> int:
        """The whole value."""
        rows = 1 if shared(value) else self.tokens.rows
        return (self.tokens.groups - 1) * self.group_stride(value) + rows * self.stride(value)

    def step(self, words: int) -> int:
        """Places of so many words start at a multiple of this: what fills half a hazard segment has its own."""
        return self.limits.step if 2 * words >= self.limits.step else self.limits.align

    def _apart(self, words: int) -> int:
        step = self.step(words)
        return -(-words // step) * step

    @property
    def own_rows(self) -> int:
        """Rows of a group that one device norms: its share, if the devices share them evenly, or all."""
        share, rest = divmod(self.tokens.rows, self.limits.devices)
        return self.tokens.rows if rest else share

    def heads(self, op: dev.AttentionOp | AttendOp) -> int:
        """Query heads of a K/V head that go into one matrix instruction with all tokens of a group."""
        own = (op.planes is not None and op.planes.value.data > 1) or per_token_bias(op)
        return 1 if own else max(1, min(op.group, self.limits.vectors // self.tokens.rows))

    def scratch(self, op: Operation) -> Mapping[str, int]:
        """Offsets of an operation's scratch vectors, by name; the key `total` has the whole size."""
        offsets, total = {}, 0
        for name, words in self._vectors(op).items():
            rounded = self.limits.round(words)
            total = -(-total // self.step(rounded)) * self.step(rounded)
            offsets[name] = total
            total += rounded
        return offsets | {"total": total}

    def _vectors(self, op: Operation) -> dict[str, int]:
        rows = self.own_rows
        own = {"own": rows * self.stride(op.results[0])} if op.results and rows < self.tokens.rows else {}
        if isinstance(op, dev.LayerNormOp):
            return {"mean": rows, "variance": rows} | own
        if isinstance(op, dev.RmsNormOp):
            return {"variance": rows} | own
        if isinstance(op, dev.RotaryOp):
            return {"crossed": int(op.heads.value.data) * int(op.pad.value.data)}
        if isinstance(op, dev.AttentionOp | AttendOp):
            return self._attention(op)
        return {}

    def _attention(self, op: dev.AttentionOp | AttendOp) -> dict[str, int]:
        rows = self.tokens.rows * self.heads(op)
        sizes = {"scale": 1}
        for head in range(self.alternating(op)):
            sizes |= {f"maximum{head}": rows, f"sum{head}": rows, f"scores{head}": rows * self.score_stride(op)}
        if self.context(op) > self.limits.attention_block:
            sizes |= dict.fromkeys(("running_maximum", "running_sum", "correction"), rows)
            sizes["part"] = rows * int(op.pad.value.data)
        return sizes

    def score_stride(self, op: dev.AttentionOp | AttendOp) -> int:
        """From one row of scores to the next."""
        return self.limits.round(min(self.context(op), self.limits.attention_block))

    def alternating(self, op: dev.AttentionOp | AttendOp) -> int:
        """K/V heads taken together."""
        if self.context(op) > self.limits.attention_block:
            return 1
        return min(HEADS_ALTERNATING, int(op.kv_heads.value.data))

    def context(self, op: dev.AttentionOp | AttendOp) -> int:
        """The most positions that an attention sees."""
        return positions_of(op, self.limits)


def per_token_bias(op: dev.AttentionOp | AttendOp) -> bool:
    """Whether each token has biases of its own for its scores, which one matrix instruction cannot add to its rows."""
    return op.bias is not None and not shared(op.bias)


def place_of(value: SSAValue, prefix: str) -> int:
    """A value's word address: in the step for one token, or with the prefix `rows_` in blocks.

    Only after `allocate`.
    """
    owner = value.owner.parent_op() if isinstance(value.owner, Block) else value.owner
    assert isinstance(value, BlockArgument | OpResult) and isinstance(owner, Operation)
    if isinstance(owner, ir.RepeatOp):
        return int(owner.attributes[f"{prefix}at{value.index}"].value.data)  # type: ignore[attr-defined]
    return int(owner.properties[f"{prefix}at"].value.data)  # type: ignore[attr-defined]
