"""The vector unit: elementwise instructions and reductions, a row of the register file a cycle."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Any

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from typebar.hw.arith.unary import FUNCTION_BITS
from typebar.hw.control.completion import CompletionLine
from typebar.hw.control.core import issued_layout
from typebar.hw.control.decoder import modifier, slot
from typebar.hw.control.tickets import Domain, ticket_bits
from typebar.hw.delay import delayed
from typebar.hw.ports import (
    CAUSE_BITS,
    READ_CYCLES,
    activity_layout,
    completed_shape,
    file_rows,
    flag_layout,
    read_port,
    write_port,
)
from typebar.hw.replicate import Shared
from typebar.hw.vector.lanes import LANES, Choice, LanePair
from typebar.hw.vector.reduction import ReductionTree
from typebar.isa.instructions import BY_NAME, TARGET_BITS, Source, Unit
from typebar.isa.machine import Machine, MachineError
from typebar.isa.timing import OP, VARGMAX, VSUM, VSUMSQ, Cause

PIPELINE_CYCLES = 5
"""Latency beside the lanes': two cycles of reading, one each to choose operands and results, and the write's second
(WRITE_CYCLES less the one by which a dependent instruction's address comes after its start)."""
LEAST_LATENCY = PIPELINE_CYCLES + 2
"""The unary functions take two cycles at least."""
ELEMENTWISE = [item for item in BY_NAME.values() if item.unit is Unit.VECTOR and item.opcode < VSUM]
REDUCTIONS = [item for item in BY_NAME.values() if item.unit is Unit.VECTOR and item.opcode >= VSUM]
CHOICES = {"vadd": Choice.SUM, "vsub": Choice.SUM, "vmax": Choice.MAXIMUM, "vunary": Choice.UNARY}
"""Whose result an instruction returns; those left out, what moves through."""


class VectorUnit(wiring.Component):
    """The vector unit of a machine.

    `issued`: a transfer is an instruction's start. Its row i is addressed 1 + i cycles later, on `read_a` (operand a)
    and `read_b`, and its result given to `write` `vector.latency` - 1 cycles after that; so an instruction that starts
    at `done` reads it. Reductions leave a word, vargmax two, through `write_reduce` in the last cycle before `done`.
    `ready`: the last row is being addressed, or none. What else docs/timing.md has an instruction wait for, a reduction
    for one of more levels too, it has waited for before it comes.

    `completed`: the ticket of the last instruction done. `waited`: the core's cause of a wait that ends with the
    transfer; `activity` has it, and the occupied cycles, a cycle later. `argmax_nan`: the vargmax at `pc` met a NaN.
    `shared` are the modules whose text goes beside this one's.
    """

    def __init__(self, machine: Machine) -> None:
        """Take a machine.

        Raises:
            MachineError: vector.latency is less than the pipeline needs.
        """
        vector = machine.vector
        if vector.latency < LEAST_LATENCY:
            raise MachineError(
                f"{machine.name}: vector.latency = {vector.latency} is faster than the hardware's pipeline:"
                f" set it to {LEAST_LATENCY} or more"
            )
        self.machine = machine
        self.lanes, self.rows = vector.lanes, file_rows(machine)
        self._depth = vector.latency - PIPELINE_CYCLES
        self._pair = Shared("vector_lanes", LanePair(self._depth))
        self._tree = ReductionTree(vector.add_latency, self.lanes, self.rows)
        self.shared = (self._pair, *self._tree.shared)
        self._longest = vector.latency + vector.add_latency * (self._tree.lane_levels + self._tree.row_levels)
        super().__init__(
            {
                "issued": In(stream.Signature(issued_layout(machine, Domain.VECTOR))),
                "waited": In(CAUSE_BITS),
                "read_a": Out(read_port(machine)),
                "read_b": Out(read_port(machine)),
                "write": Out(write_port(machine)),
                "write_reduce": Out(write_port(machine)),
                "completed": Out(completed_shape(machine)),
                "argmax_nan": Out(flag_layout()),
                "activity": Out(activity_layout()),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """Start; present a row a cycle; read, choose operands, compute, write; beside it, reduce and complete."""
        self._m = m = Module()
        self._lane_bits = self.lanes.bit_length() - 1
        self._start()
        x, y = self._operands()
        self._compute(x, y)
        self._retire()
        return m

    # Start ---------------------------------------------------------------------------------------------
    def _decode(self) -> dict[str, Signal]:
        """Operands and modifiers of the offered instruction by name; 0 where it has none."""
        m, item = self._m, self.issued.payload
        found = {name: Signal(signed(32), name=f"offered_{name}") for name in ("dst", "a", "b", "n", "base", "imm")}
        found |= {"b_from": Signal(Source, name="offered_b_from"), "function": Signal(FUNCTION_BITS)}
        with m.Switch(item.opcode):
            for kind in (*ELEMENTWISE, *REDUCTIONS):
                with m.Case(kind.opcode):
                    for operand in kind.operands:
                        m.d.comb += found[operand.name].eq(item["values"][slot(kind.name, operand.name)])
                    for other in kind.modifiers:
                        m.d.comb += found[other.name].eq(modifier(item.modifiers, kind.name, other.name))
                    if kind.name == "vwrite":
                        m.d.comb += [
                            found["imm"].eq(found["b"]),
                            found["b_from"].eq(Source.IMMEDIATE),
                            found["n"].eq(1),
                        ]
                    if kind.name == "vsumsq":
                        m.d.comb += found["b"].eq(found["a"])
        return found

    def _start(self) -> None:
        """What is presented: registers loaded by a transfer, rows that advance, and when the next may start."""
        m, item, offered = self._m, self.issued.payload, self._decode()
        self._now = now = Signal(self._instruction_layout(), reset_less=True)
        self._running = Signal()
        self._left, self._first = Signal(range(self.rows)), Signal()
        rows = {name: Signal(range(self.rows), name=f"row_{name}", reset_less=True) for name in ("dst", "a", "b")}
        self._row_dst = rows["dst"]
        transfer, reduction = Signal(), Signal()
        span = Signal(range(self.rows))
        count = offered["n"][: self.machine.vector.words.bit_length()]
        m.d.comb += [
            reduction.eq(item.opcode >= VSUM),
            self.issued.ready.eq(self._left == 0),
            transfer.eq(self.issued.valid & self.issued.ready),
            span.eq(Mux(count == 0, 0, (count - 1)[self._lane_bits :])),
            self.read_a.address.eq(rows["a"]),
            self.read_b.address.eq(rows["b"]),
        ]
        with m.If(transfer):
            m.d.sync += [self._running.eq(1), self._first.eq(1), self._left.eq(span)]
            m.d.sync += [row.eq(offered[name][self._lane_bits :]) for name, row in rows.items()]
            m.d.sync += self._load(now, offered, count, span, reduction)
        with m.Else():
            m.d.sync += [self._running.eq(self._left != 0), self._first.eq(0)]
            m.d.sync += [row.eq(row + 1) for row in rows.values()]
            with m.If(self._left != 0):
                m.d.sync += self._left.eq(self._left - 1)
        self._remember(transfer & reduction, offered)
        m.d.comb += [self.activity.active.eq(self._running), self.activity.cause.eq(Cause.COMPUTE)]
        with m.If(transfer):
            m.d.sync += self.activity.waited.eq(self.waited)

    def _remember(self, starts: Value, offered: dict[str, Signal]) -> None:
        """What becomes of the results of reductions under way, in order; `_held` is the oldest.

        One can start in each cycle of the oldest's latency, and in the one before.
        """
        m, layout = self._m, self._reduction_layout()
        depth = 1 << (self._longest + 1).bit_length()
        m.submodules.reductions = memory = Memory(shape=layout, depth=depth, init=[])
        write, read = memory.write_port(), memory.read_port(domain="comb")
        opcode = self.issued.payload.opcode
        m.d.comb += [
            write.en.eq(starts),
            write.data.sums.eq(opcode.matches(VSUM, VSUMSQ)),
            write.data.ordered.eq(opcode == VARGMAX),
            write.data.dst.eq(offered["dst"]),
            write.data.base.eq(offered["base"]),
        ]
        m.d.sync += [write.addr.eq(write.addr + starts), read.addr.eq(read.addr + self._tree.found)]
        self._held = read.data

    def _instruction_layout(self) -> data.StructLayout:
        """What stays while an instruction's rows are presented; `span` is their number less one."""
        return data.StructLayout(
            {
                "reduces": 1,
                "ticket": unsigned(ticket_bits(self.machine)),
                "span": range(self.rows),
                "sums": 1,
                "ordered": 1,
                "pc": unsigned(TARGET_BITS),
                "empty": 1,
                "tail": unsigned(self._lane_bits),
                "lane_dst": unsigned(self._lane_bits),
                "operands": self._operand_layout(),
                "function": unsigned(FUNCTION_BITS),
                "subtract": 1,
                "take_y": 1,
                "product": 1,
                "choice": Choice,
            }
        )

    def _operand_layout(self) -> data.StructLayout:
        """How operands are chosen; `single`: one element, at any place in its rows."""
        lane = unsigned(self._lane_bits)
        return data.StructLayout({"single": 1, "b_from": Source, "lane_a": lane, "lane_b": lane, "imm": unsigned(32)})

    def _reduction_layout(self) -> data.StructLayout:
        """What stays until a reduction's result is there."""
        dst = range(self.machine.vector.words)
        return data.StructLayout({"sums": 1, "ordered": 1, "dst": dst, "base": signed(32)})

    def _load(self, now: Any, offered: dict[str, Signal], count: Value, span: Value, reduction: Value) -> list[Any]:
        """Assignments of an instruction to `now`."""
        item, lanes = self.issued.payload, slice(0, self._lane_bits)
        opcode = item.opcode
        statements = [
            now.reduces.eq(reduction),
            now.ticket.eq(item.ticket),
            now.span.eq(span),
            now.sums.eq(opcode.matches(VSUM, VSUMSQ)),
            now.ordered.eq(opcode == VARGMAX),
            now.pc.eq(item.pc),
            now.empty.eq(count == 0),
            now.tail.eq(count[lanes]),
            now.lane_dst.eq(Mux(reduction, 0, offered["dst"][lanes])),
            now.operands.single.eq(count == 1),
            now.operands.b_from.eq(offered["b_from"]),
            now.operands.lane_a.eq(offered["a"][lanes]),
            now.operands.lane_b.eq(offered["b"][lanes]),
            now.operands.imm.eq(offered["imm"]),
            now.function.eq(offered["function"]),
            now.subtract.eq(opcode == OP["vsub"]),
            now.take_y.eq(opcode.matches(OP["vmov"], OP["vwrite"])),
            now.product.eq(opcode.matches(OP["vmul"], VSUMSQ)),
        ]
        choice: Value = Const(Choice.MOVED)
        for name, value in CHOICES.items():
            choice = Mux(opcode == OP[name], value, choice)
        return [*statements, now.choice.eq(choice)]

    # Rows ----------------------------------------------------------------------------------------------
    def _operands(self) -> tuple[Signal, Signal]:
        """x and y of every lane, registered; one word for all lanes is chosen with the first row and held."""
        m, words = self._m, data.ArrayLayout(unsigned(32), self.lanes)
        by = delayed(m, self._now.operands, READ_CYCLES, "operands")
        first = delayed(m, self._first, READ_CYCLES, "operands_first")
        a, b = self.read_a.data, self.read_b.data
        held, word = Signal(32, reset_less=True), Signal(32)
        m.d.comb += word.eq(held)
        with m.If(first):
            m.d.comb += word.eq(Mux(by.b_from == Source.IMMEDIATE, by.imm, b[by.lane_b]))
        m.d.sync += held.eq(word)
        x, y = Signal(words, reset_less=True), Signal(words, reset_less=True)
        each = (by.b_from == Source.VECTOR) & ~by.single
        for lane in range(self.lanes):
            m.d.sync += [x[lane].eq(Mux(by.single, a[by.lane_a], a[lane])), y[lane].eq(Mux(each, b[lane], word))]
        return x, y

    def _mask(self) -> Signal:
        """Lanes that hold an element in the row presented."""
        m, now = self._m, self._now
        mask = Signal(self.lanes)
        m.d.comb += mask.eq(-1)
        with m.If(now.operands.single):
            m.d.comb += mask.eq(1 << now.lane_dst)
        with m.Elif(self._left == 0):
            below = Cat(now.tail > lane for lane in range(self.lanes))
            m.d.comb += mask.eq(Mux(now.empty, 0, Mux(now.tail == 0, (1 << self.lanes) - 1, below)))
        return mask

    def _compute(self, x: Signal, y: Signal) -> None:
        """Lanes with what travels beside them, the write of their results, and the reduction."""
        m, now, depth = self._m, self._now, self._depth
        early = delayed(m, Cat(now.subtract, now.take_y, now.function), READ_CYCLES + 1, "early")
        beside = data.StructLayout(
            {
                "mask": self.lanes,
                "row": range(self.rows),
                "first": 1,
                "last": 1,
                "product": 1,
                "choice": Choice,
                "sums": 1,
                "ordered": 1,
                "pc": unsigned(TARGET_BITS),
            }
        )
        here = Signal(beside)
        valid = Signal(data.StructLayout({"writes": 1, "reduces": 1}))
        m.d.comb += [
            here.mask.eq(self._mask()),
            here.row.eq(self._row_dst),
            here.first.eq(self._first),
            here.last.eq(self._left == 0),
            here.product.eq(now.product),
            here.choice.eq(now.choice),
            here.sums.eq(now.sums),
            here.ordered.eq(now.ordered),
            here.pc.eq(now.pc),
            valid.writes.eq(self._running & ~now.reduces),
            valid.reduces.eq(self._running & now.reduces),
        ]
        # Three moments: before the lanes' last step, after it, and with the results.
        before = delayed(m, here, READ_CYCLES + depth, "before")
        after = delayed(m, before, 1, "after")
        at_end = delayed(m, after, 1, "end")
        valid_after = delayed(m, valid, READ_CYCLES + depth + 1, "valid", reset=True)
        valid_end = delayed(m, valid_after, 1, "valid_end", reset=True)
        # Within the only row +0 extends to a power of two, and -0, which changes no sum, beyond.
        sign = [Const(0, 1)] + [
            before.first & before.last & ~before.mask[1 << lane.bit_length() - 1] for lane in range(1, self.lanes)
        ]
        leaves, results, nans = [], [], []
        for index in range(0, self.lanes, LANES):
            m.submodules[f"lanes{index}"] = pair = self._pair.replica()
            both = slice(index, index + LANES)
            m.d.comb += [
                pair.x.eq(x.as_value()[32 * index : 32 * (index + LANES)]),
                pair.y.eq(y.as_value()[32 * index : 32 * (index + LANES)]),
                Cat(pair.subtract, pair.take_y, pair.function).eq(early),
                pair.product.eq(before.product),
                pair.keep.eq(before.mask[both]),
                pair.padding_sign.eq(Mux(before.sums, Cat(sign[both]), (1 << LANES) - 1)),
                pair.infinite.eq(~before.sums),
                pair.ordered.eq(before.ordered),
                pair.choice.eq(after.choice),
            ]
            leaves.append(pair.leaf)
            results.append(pair.result)
            nans.append(pair.nan)
        m.d.comb += [
            self.write.address.eq(at_end.row),
            self.write.mask.eq(Mux(valid_end.writes, at_end.mask, 0)),
            self.write.data.eq(Cat(results)),
            self.argmax_nan.raised.eq(reduce(or_, nans) & valid_after.reduces),
            self.argmax_nan.pc.eq(after.pc),
        ]
        m.submodules.tree = tree = self._tree
        m.d.comb += [
            tree.valid.eq(valid_after.reduces),
            tree.first.eq(after.first),
            tree.last.eq(after.last),
            tree.ordered.eq(after.ordered),
            tree.leaves.eq(Cat(leaves)),
        ]
        self._write_reduced(tree)

    def _write_reduced(self, tree: ReductionTree) -> None:
        """The result of a reduction, into its word, or for vargmax into an even word and the next."""
        m, held, port = self._m, self._held, self.write_reduce
        value, index = Signal(32), Signal(32)
        mask, words = Signal(self.lanes), Signal(port.data.shape(), reset_less=True)
        address = Signal.like(port.address, reset_less=True)
        lane, row = held.dst[: self._lane_bits], held.dst[self._lane_bits :]
        m.d.comb += [
            value.eq(Mux(held.sums, tree.element.sum, tree.element.maximum)),
            index.eq(held.base + tree.element.place),
            port.address.eq(address),
            port.mask.eq(mask),
            port.data.eq(words),
        ]
        m.d.sync += address.eq(row)
        m.d.sync += mask.eq(Mux(tree.found, Cat(1, held.ordered) << lane, 0))
        for number in range(self.lanes):
            m.d.sync += words[number].eq(Mux(held.ordered, index, value) if number % 2 else value)

    # Completion ----------------------------------------------------------------------------------------
    def _retire(self) -> None:
        """Publish tickets, from the cycle after the last row's on."""
        m, now, levels = self._m, self._now, self._tree.lane_levels
        cycles, step = self.machine.vector.latency - 2, self.machine.vector.add_latency
        latency = Signal(range(self._longest))
        m.d.comb += latency.eq(cycles)
        with m.If(now.reduces):
            for extra in range(self._tree.row_levels + 1):
                # As many levels over rows as the number of rows less one has bits.
                with m.If((now.span >> extra == 0) & ((now.span >> extra - 1 != 0) if extra else 1)):
                    m.d.comb += latency.eq(cycles + step * (levels + extra))
        retires, ticket = Signal(), Signal(ticket_bits(self.machine), reset_less=True)
        remaining = Signal(range(self._longest), reset_less=True)
        m.d.sync += [
            retires.eq(self._running & (self._left == 0)),
            ticket.eq(now.ticket),
            remaining.eq(latency),
        ]
        m.submodules.line = line = CompletionLine(ticket_bits(self.machine), self._longest - 2)
        m.d.comb += [
            line.enter.eq(retires),
            line.ticket.eq(ticket),
            line.latency.eq(remaining),
            self.completed.eq(line.completed),
        ]
