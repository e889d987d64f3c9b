"""How a prompt's tokens go side by side: what of a step is computed for several at once, and how values then lie.

`Tokens` of a block go through every operation in groups; the tokens of a group are rows of one matrix instruction, and
one group's vectors and gathers overlap with another's products (`typebar.compiler.schedule`). A value that depends on
the token has a row for each, in a place of its own for each group; others are shared. Only the last token of a prompt
needs what stands after the last attention: the *tail* of a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from xdsl.dialects.builtin import IndexType
from xdsl.ir import Block, BlockArgument, Operation, OpResult, SSAValue

from typebar.compiler import device_ir as dev
from typebar.compiler import ir
from typebar.compiler.device_source import AttendOp
from typebar.compiler.scratch import Limits, positions_of

MAX_GROUPS = 2
"""Groups that the emitter has registers for."""
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


def shared(value: SSAValue) -> bool:
    """Whether a value is the same for all tokens of a block."""
    owner = value.owner
    if isinstance(owner, dev.ScoreBiasOp):
        return owner.kind.data == "column"
    return isinstance(owner, dev.ParamOp | dev.BiasOp)


def ranked(value: SSAValue, layout: Layout) -> bool:
    """Whether a group's gathered rows stay as one gather leaves them: by device, then by row.

    Sums and products with other values can read them so, piece by piece; everything else needs whole rows.
    """
    owner = value.owner
    if not isinstance(owner, dev.GatherOp) or shared(owner.x):
        return False
    if layout.tokens.rows * ir.width(owner.x) > layout.limits.buffer:
        return False
    return all(isinstance(use.operation, dev.AddOp | dev.MulOp | dev.SumOp) for use in value.uses)


def _dealt(program: dev.ProgramOp) -> frozenset[SSAValue]:
    """Values of which a device needs the rows of its own tokens only, as all that reads them works row by row.

    These are norms, what is done element by element, and what loops hand on; a norm gathers its rows if others want
    them whole. The tail's operands are gathered once, at the prompt's end.
    """
    _, tail = split_tail(program)
    ops = [op for op in program.walk() if op not in tail]
    ties = [tie for op in ops if isinstance(op, ir.RepeatOp) for tie in _handed_on(op)]
    makers = _ELEMENTWISE | _NORMS | dev.LookupOp
    found: set[SSAValue] = {value for op in ops if isinstance(op, makers) for value in op.results}
    found |= {value for tie in ties for value in tie}

    def fits(value: SSAValue) -> bool:
        if any(value in tie and not found.issuperset(tie) for tie in ties):
            return False
        readers = [use.operation for use in value.uses if use.operation not in tail]
        return all(
            isinstance(op, _NORMS | ir.RepeatOp | ir.YieldOp) or (isinstance(op, _ELEMENTWISE) and op.out in found)
            for op in readers
        )

    while unfit := {value for value in found if not fits(value)}:
        found -= unfit
    return frozenset(found)


def _handed_on(loop: ir.RepeatOp) -> list[tuple[SSAValue, ...]]:
    """The values that a loop hands on from one layer to the next, each with all that stand for it."""
    body = loop.body.block
    assert isinstance(body.last_op, ir.YieldOp)
    return list(zip(loop.inits, body.args, loop.outs, body.last_op.values, strict=True))


_ELEMENTWISE = dev.AddOp | dev.MulOp | dev.ScaleOp | dev.ActivationOp
_NORMS = dev.LayerNormOp | dev.RmsNormOp


@dataclass(frozen=True)
class Layout:
    """Sizes in words of what a block's operations work on. Of `dealt` values a device has its own tokens' rows only."""

    limits: Limits
    tokens: Tokens
    dealt: frozenset[SSAValue] = frozenset()

    @staticmethod
    def of(program: dev.ProgramOp, limits: Limits, tokens: Tokens) -> Layout:
        """The layout of a program's blocks."""
        layout = Layout(limits, tokens)
        return replace(layout, dealt=_dealt(program)) if layout.own_rows < tokens.rows else layout

    def stride(self, value: SSAValue) -> int:
        """From one row of a value to the next."""
        return self.limits.round(ir.width(value))

    def words(self, value: SSAValue) -> int:
        """A group's rows of a value, or the one of a shared value."""
        return (1 if shared(value) else self.rows_of(value)) * self.stride(value)

    def rows_of(self, value: SSAValue) -> int:
        """Rows that a device has of a group's rows of a value."""
        return self.own_rows if value in self.dealt else self.tokens.rows

    def step(self, words: int) -> int:
        """Places of so many words start at a multiple of this: what fills half a hazard segment has its own."""
        return self.limits.step if 2 * words >= self.limits.step else self.limits.align

    @property
    def own_rows(self) -> int:
        """Rows of a group that are a device's own: its share, if the devices share them evenly, or all."""
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
        whole = rows == self.tokens.rows or not op.results or op.results[0] in self.dealt
        own = {} if whole else {"own": rows * self.stride(op.results[0])}
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


PREFIXES = ("", "rows_", "next_")
"""Before the names of attributes with places: in the step for one token, and in the groups of a block."""


def place_of(value: SSAValue, group: int | None = None) -> int:
    """A value's word address: in the step for one token, or in a group of a block. Only after `allocate`."""
    prefix = PREFIXES[0 if group is None else 1 if shared(value) else 1 + group]
    owner = value.owner.parent_op() if isinstance(value.owner, Block) else value.owner
    assert isinstance(value, BlockArgument | OpResult) and isinstance(owner, Operation)
    if isinstance(owner, ir.RepeatOp):
        return int(owner.attributes[f"{prefix}at{value.index}"].value.data)  # type: ignore[attr-defined]
    return int(owner.properties[f"{prefix}at"].value.data)  # type: ignore[attr-defined]


def scratch_at(op: Operation, group: int) -> int:
    """Word address of an operation's scratch space for a group of a block. Only after `allocate`."""
    return int(op.properties[f"{PREFIXES[1 + group]}scratch"].value.data)  # type: ignore[attr-defined]
