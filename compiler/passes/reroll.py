"""reroll: write equal consecutive layers once, as `tb.repeat`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp, SymbolRefAttr
from xdsl.ir import Block, BlockArgument, Operation, OpResult, Region, SSAValue
from xdsl.passes import ModulePass
from xdsl.rewriter import Rewriter

from typebar.compiler import ir

_NUMBER = re.compile(r"\d+")
_TRIED = 32


class Reroll(ModulePass):
    """Make loops of runs of layers, or of groups of layers, that differ only in the numbers in their weights' names."""

    name = "reroll"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        """Rewrite every step in place."""
        for step in op.body.block.ops:
            if isinstance(step, ir.StepOp | ir.EncoderOp):
                while (loop := _find(step.body.block)) is not None:
                    _rewrite(step.body.block, loop)


@dataclass
class _Loop:
    """`count` layers of `period` operations from operation `first`; the carried values in the order of their slots.

    From one layer to the next the numbers in names go up by `step`: by one, or by as many layers of the source as
    make one of the loop.

    A slot is (number in the layer of the operation that yields it, or None for a value that no layer changes; the
    result's number; the value that the first layer receives).
    """

    ops: list[Operation]
    first: int
    period: int
    count: int
    start: int = 0
    step: int = 1
    slots: list[tuple[int | None, int, SSAValue]] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.first + self.period * self.count

    def layer(self, number: int) -> list[Operation]:
        begin = self.first + self.period * number
        return self.ops[begin : begin + self.period]


def _find(block: Block) -> _Loop | None:
    """The loop that covers the most operations, with the fewest carried values and the earliest start."""
    ops = [op for op in block.ops if not isinstance(op, ir.ReturnOp)]
    keys: dict[object, int] = {}
    signatures = [keys.setdefault(_signature(op), len(keys)) for op in ops]
    index = {op: i for i, op in enumerate(ops)}
    runs = sorted(_runs(signatures), key=lambda r: (-(r[2] // r[1] + 1) * r[1], r[1]))
    for first, period, length in runs[:_TRIED]:
        found = []
        for shift in range(min(period, length - period + 1)):
            loop = _Loop(ops, first + shift, period, (length - shift) // period + 1)
            if any(isinstance(op, ir.AttentionOp | ir.CrossAttentionOp) for op in loop.layer(0)) and _fits(loop, index):
                found.append(loop)
        if found:
            return min(found, key=lambda loop: (-loop.count, len(loop.slots), loop.first))
    return None


def _signature(op: Operation) -> tuple[object, ...]:
    """Equal for operations that may be the same one in different layers."""
    properties = tuple(
        (name, _NUMBER.sub("#", ir.text(a)) if isinstance(a, SymbolRefAttr) else a)
        for name, a in sorted(op.properties.items())
    )
    regions = (id(op),) if op.regions else ()
    return (op.name, properties, tuple(o.type for o in op.operands), tuple(r.type for r in op.results), regions)


def _runs(signatures: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first, period, length) of every run in which operation i equals operation i + period, of a period or more."""
    total = len(signatures)
    for period in range(2, total // 2 + 1):
        length = 0
        for i in range(total - period + 1):
            if i < total - period and signatures[i] == signatures[i + period]:
                length += 1
                continue
            if length >= period:
                yield i - length, period, length
            length = 0


def _fits(loop: _Loop, index: dict[Operation, int]) -> bool:
    """Whether names and operands allow the loop; fills in its start and slots."""
    found = {s for j in range(loop.period) for s in _counts([loop.layer(k)[j] for k in range(loop.count)])}
    counts = [c for c in found if c is not None]
    if len(counts) != len(found) or len({step for _, step in counts}) > 1:
        return False
    starts, loop.step = [first for first, _ in counts] or [0], counts[0][1] if counts else 1
    if max(starts) - min(starts) >= loop.step:
        return False
    loop.start = starts[0] if loop.step == 1 else 0
    for j in range(loop.period):
        for position in range(len(loop.layer(0)[j].operands)):
            if not _add_slot(loop, index, j, position):
                return False
    return _results_are_carried(loop, index)


def _counts(ops: Sequence[Operation]) -> Iterator[tuple[int, int] | None]:
    """First number and step, for every symbol that numbers the layers; None for one that numbers them otherwise."""
    for name, attribute in ops[0].properties.items():
        if not isinstance(attribute, SymbolRefAttr):
            continue
        texts = [_text(op, name) for op in ops]
        if len(set(texts)) > 1:
            numbered = _numbered(texts)
            yield numbered[1:] if numbered is not None else None


def _text(op: Operation, name: str) -> str:
    attribute = op.properties[name]
    assert isinstance(attribute, SymbolRefAttr)
    return ir.text(attribute)


def _numbered(texts: Sequence[str]) -> tuple[str, int, int] | None:
    """The template, the first number and the step of names that count evenly upwards; None for others.

    The number may stand in several places of a name, if it is the same in all of them.
    """
    rows = [_NUMBER.findall(text) for text in texts]
    varying = [i for i in range(len(rows[0])) if len({row[i] for row in rows}) > 1]
    if not varying or "{" in texts[0] or any(len({row[i] for i in varying}) > 1 for row in rows):
        return None
    numbers = [row[varying[0]] for row in rows]
    first = int(numbers[0])
    step = int(numbers[1]) - first
    if step < 1 or any(number != str(first + k * step) for k, number in enumerate(numbers)):
        return None
    layer = ir.LAYER if step == 1 else f"{{{step}:{first}}}"
    template, end = "", 0
    for place, match in enumerate(_NUMBER.finditer(texts[0])):
        template += texts[0][end : match.start()] + (layer if place in varying else match.group())
        end = match.end()
    return template + texts[0][end:], first, step


def _place(value: SSAValue, index: dict[Operation, int]) -> tuple[int, int]:
    """The number of the operation that makes a value, -1 for a block argument, and the result's number."""
    return (index[value.op], value.index) if isinstance(value, OpResult) else (-1, 0)


def _add_slot(loop: _Loop, index: dict[Operation, int], j: int, position: int) -> bool:
    """Check one operand of operation j over all layers; an operand from outside its layer takes a slot."""
    values = [loop.layer(k)[j].operands[position] for k in range(loop.count)]
    if isinstance(values[0], BlockArgument) and len(set(values)) == 1:  # the loop's body sees the step's arguments
        return True
    places = [_place(v, index) for v in values]
    begins = [loop.first + k * loop.period for k in range(loop.count)]
    inside = [begin <= place < begin + loop.period for begin, (place, _) in zip(begins, places, strict=True)]
    if all(inside):
        return len({(place - begin, r) for begin, (place, r) in zip(begins, places, strict=True)}) == 1
    if any(inside):
        return False
    if len(set(values)) == 1:
        slot: tuple[int | None, int, SSAValue] = (None, 0, values[0])
    else:
        back = {(place - begin, r) for begin, (place, r) in zip(begins[:-1], places[1:], strict=True)}
        source, result = next(iter(back))
        if len(back) != 1 or not 0 <= source < loop.period:
            return False
        slot = (source, result, values[0])
    if slot not in loop.slots:
        loop.slots.append(slot)
    return True


def _results_are_carried(loop: _Loop, index: dict[Operation, int]) -> bool:
    """Whether what follows the loop uses nothing but the last layer's yielded values."""
    yielded = {(source, result) for source, result, _ in loop.slots}
    for i in range(loop.first, loop.end):
        for number, result in enumerate(loop.ops[i].results):
            for use in result.uses:
                user = index.get(use.operation, loop.end)
                last = loop.first + (loop.count - 1) * loop.period
                if user >= loop.end and (i < last or (i - last, number) not in yielded):
                    return False
    return True


def _rewrite(block: Block, loop: _Loop) -> None:
    inits = [init for _, _, init in loop.slots]
    body = Block(arg_types=[v.type for v in inits])
    mapping: dict[SSAValue, SSAValue] = {}
    layers = [loop.layer(k) for k in range(loop.count)]
    for j, op in enumerate(layers[0]):
        operands = [_operand(loop, body, mapping, j, i) for i in range(len(op.operands))]
        new = op.create(
            operands=operands,
            result_types=[r.type for r in op.results],
            properties=dict(op.properties),
            attributes=dict(op.attributes),
        )
        for name, attribute in op.properties.items():
            if isinstance(attribute, SymbolRefAttr):
                numbered = _numbered([_text(layer[j], name) for layer in layers])
                if numbered is not None:
                    new.properties[name] = ir.symbol(numbered[0])
        for old, result in zip(op.results, new.results, strict=True):
            mapping[old] = result
            result.name_hint = old.name_hint
        body.add_op(new)
    yields = [
        body.args[n] if source is None else mapping[layers[0][source].results[number]]
        for n, (source, number, _) in enumerate(loop.slots)
    ]
    body.add_op(ir.YieldOp(*yields))
    repeat = ir.RepeatOp(inits, loop.count, loop.start, Region([body]))
    block.insert_op_before(repeat, loop.ops[loop.first])
    for (source, number, _), out in zip(loop.slots, repeat.outs, strict=True):
        if source is not None:
            layers[-1][source].results[number].replace_uses_with_if(out, lambda use: use.operation not in layers[-1])
    for op in reversed(loop.ops[loop.first : loop.end]):
        Rewriter.erase_op(op)


def _operand(loop: _Loop, body: Block, mapping: dict[SSAValue, SSAValue], j: int, position: int) -> SSAValue:
    """What stands for operand `position` of the first layer's operation j inside the loop."""
    value = loop.layer(0)[j].operands[position]
    if value in mapping or isinstance(value, BlockArgument):
        return mapping.get(value, value)
    later = loop.layer(1)[j].operands[position]
    for n, (source, result, init) in enumerate(loop.slots):
        if init is value and (later is value if source is None else later is loop.layer(0)[source].results[result]):
            return body.args[n]
    raise AssertionError("every operand from outside has a slot")
