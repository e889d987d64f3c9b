"""halve: what a gather carries from one product to the next goes in two halves, each beside the other's products.

The devices share out the first half of a product's columns, then the second, so that every gather leaves a half in
order. The first is on its way while the second half is multiplied, and the second while the product that reads them
takes the first half's rows of its weights. That product adds its chunks in the same order as a whole one, for its
second part goes on from the sums of the first: bits do not change, on any number of devices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Operation, SSAValue
from xdsl.passes import ModulePass
from xdsl.rewriter import Rewriter

from typebar.compiler import device_ir as dev
from typebar.compiler import ir
from typebar.compiler.segments import Segment
from typebar.isa.instructions import FORMAT_BYTES, Format
from typebar.isa.machine import Machine


@dataclass(frozen=True)
class HalvePass(ModulePass):
    """Halve gathers between two products by columns, where halves are whole chunks of `lanes` words.

    What is gathered is a product, or one of its results element by element with others. A product takes `port` bytes of
    its weights a cycle and `product` cycles more to its result, a gather's hops take `ring` cycles. Two gathers must
    take no longer than both products, and half the first no less than the wait of the second's parts for one another;
    else a gather stays whole.
    """

    name = "halve"
    lanes: int = 64
    port: int = 4096
    product: int = 0
    ring: int = 0

    @staticmethod
    def of(machine: Machine, devices: int) -> HalvePass:
        """The pass for a ring of machines."""
        matrix, ring = machine.matrix, machine.ring
        port = min(matrix.fifo_port_bytes, machine.peak_macs * FORMAT_BYTES[Format.FP16])
        product = matrix.dot_latency + matrix.accumulate_latency + matrix.epilogue_latency
        return HalvePass(matrix.lanes, port, product, ring.setup_latency + devices // 2 * ring.hop_latency)

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        """Rewrite in place; never fails."""
        for item in list(op.walk()):
            if isinstance(item, dev.GatherOp):
                self._gather(item)

    def _gather(self, gather: dev.GatherOp) -> None:
        reader = _only_user(gather.out)
        if not isinstance(reader, dev.MatrixOp) or reader.x is not gather.out:
            return
        k, unit, pad = (int(a.value.data) for a in (reader.k, reader.row_unit, reader.row_pad))
        if k != ir.width(gather.out) or unit != pad or k % (2 * self.lanes) or _only_user(gather.x) is not gather:
            return
        made = _halves(gather.x, k)
        if made is None:
            return
        first = sum(self._cycles(op) for ops, _ in made for op, _ in ops if isinstance(op, dev.MatrixOp))
        if first < 2 * self.product or first + self._cycles(reader) < 2 * self.ring:
            return
        devices = k // ir.width(gather.x)
        wholes: list[SSAValue] = []
        for ops, value in made:
            for half, whole in ops:
                _insert_before(half, whole if isinstance(whole, dev.BiasOp) else gather)
            gathered = dev.GatherOp(value, devices)
            gathered.out.name_hint = gather.out.name_hint
            _insert_before(gathered, gather)
            wholes.append(gathered.out)
        self._reader(reader, wholes, k // 2)
        _erase(gather)

    def _cycles(self, op: dev.MatrixOp) -> int:
        """Cycles that a product takes for its weights."""
        return int(op.k.value.data) * op.words * (1 if op.int8 else FORMAT_BYTES[Format.FP16]) // self.port

    def _reader(self, reader: dev.MatrixOp, halves: list[SSAValue], k: int) -> None:
        """Replace a product by one for each half of its rows, the second of which goes on from the first's sums."""
        first = dev.MatrixOp(halves[0], reader.pieces, k, k, k, first_row=0)
        activation = None if reader.activation is None else reader.activation.data
        second = dev.MatrixOp(
            halves[1], reader.pieces, k, k, k, reader.scale, reader.bias, activation, first_row=k, addend=first.out
        )
        for made in (first, second):
            made.attributes.update(reader.attributes)
            made.out.name_hint = reader.out.name_hint
        Rewriter.replace_op(reader, [first, second], [second.out])


_Made = list[tuple[Operation, Operation]]
"""New operations, and what each stands for a half of."""


def _insert_before(op: Operation, place: Operation) -> None:
    block = place.parent_block()
    assert block is not None
    block.insert_op_before(op, place)


def _only_user(value: SSAValue) -> object:
    users = [use.operation for use in value.uses]
    return users[0] if len(users) == 1 else None


def _halves(value: SSAValue, size: int) -> list[tuple[_Made, SSAValue]] | None:
    """The operations that make each half of a device's share of `size` words, if halves have a form."""
    found: list[tuple[_Made, SSAValue]] = []
    for half in (0, 1):
        ops: _Made = []
        made = _half(value, size, half, ops)
        if made is None:
            return None
        found.append((ops, made))
    return found


def _half(value: SSAValue, size: int, half: int, ops: _Made) -> SSAValue | None:
    """One half of a share, or None, by copies of the operations that make it, which are added to `ops`."""
    op = value.owner
    made: Operation | None = None
    if isinstance(op, dev.BiasOp):
        pieces = _half_segments(op.pieces, size, half, ir.width(value))
        made = None if pieces is None else dev.BiasOp(pieces, op.scales is not None)
    elif isinstance(op, dev.MatrixOp) and op.by_rows is None and op.first_row is None:
        pieces = _half_segments(op.pieces, size, half, ir.width(value))
        if pieces is None or _only_user(value) is None:
            return None
        scale, bias = (None if operand is None else _half(operand, size, half, ops) for operand in (op.scale, op.bias))
        if (scale is None) != (op.scale is None) or (bias is None) != (op.bias is None):
            return None
        k, unit, pad = (int(a.value.data) for a in (op.k, op.row_unit, op.row_pad))
        activation = None if op.activation is None else op.activation.data
        made = dev.MatrixOp(op.x, pieces, k, unit, pad, scale, bias, activation)
    elif isinstance(op, dev.AddOp | dev.MulOp) and _only_user(value) is not None:
        sides = [_half(side, size, half, ops) for side in (op.lhs, op.rhs)]
        if sides[0] is None or sides[1] is None:
            return None
        made = type(op)(sides[0], sides[1], ir.width(sides[0]))
    elif isinstance(op, dev.ActivationOp) and _only_user(value) is not None:
        x = _half(op.x, size, half, ops)
        made = None if x is None else dev.ActivationOp(x, op.kind.data, ir.width(x))
    if made is None:
        return None
    assert isinstance(op, Operation)
    made.attributes.update(op.attributes)
    made.results[0].name_hint = value.name_hint
    ops.append((made, op))
    return made.results[0]


def _half_segments(pieces: list[Segment], size: int, half: int, words: int) -> list[Segment] | None:
    """The columns of one half, shared out evenly; None where devices have unequal numbers of granules of it."""
    whole = pieces[0]
    devices = size // words
    plain = whole.unit == whole.pad and whole.share == 1 and not whole.run and not whole.turned
    if len(pieces) != 1 or not plain or whole.size != size or size % (2 * devices * whole.unit):
        return None
    part = size // 2
    per_device = part // devices // whole.unit
    return [replace(whole, start=whole.start + half * part, size=part, per_device=per_device)]


def _erase(gather: dev.GatherOp) -> None:
    """Erase what was replaced, from the gather up."""
    waiting: list[Operation] = [gather]
    while waiting:
        op = waiting.pop()
        if op.parent is None or any(result.uses for result in op.results):
            continue
        makers = [operand.owner for operand in op.operands]
        Rewriter.erase_op(op)
        waiting += [
            maker
            for maker in makers
            if isinstance(maker, dev.MatrixOp | dev.BiasOp | dev.AddOp | dev.MulOp | dev.ActivationOp)
        ]
