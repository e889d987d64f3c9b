"""The vector unit: chains of steps on vectors, a row of the register file a cycle, and reductions.

There is one way through the lanes, that of `vchain`; every other instruction is one with most of its steps left out.
"""

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
from typebar.hw.vector.lanes import LANES, LEAST_DEPTH, LEAST_FUNCTION, Choice, LanePair, LaneTiming
from typebar.hw.vector.recipe import recipe
from typebar.hw.vector.reduction import ReductionTree
from typebar.isa.instructions import TARGET_BITS, Factor, Source
from typebar.isa.machine import Machine, MachineError
from typebar.isa.timing import Cause, longest_latency, timing_parameters

PIPELINE_CYCLES = 5
"""Latency beside the lanes': two cycles of reading, one each to choose operands and results, and the write's second
(WRITE_CYCLES less the one by which a dependent instruction's address comes after its start)."""
REDUCE_CYCLES = 2
"""From the cycle that a reduction without `vector.reduce_latency` would have for its leaves, the one before the
result's, to theirs."""
LEAST = {"latency": PIPELINE_CYCLES + LEAST_DEPTH, "unary_latency": LEAST_FUNCTION, "reduce_latency": REDUCE_CYCLES}
"""The least parameters of a machine's vector unit that the pipeline keeps up with."""


class VectorUnit(wiring.Component):
    """The vector unit of a machine.

    `issued`: a transfer is an instruction's start. Its row i is addressed 1 + i cycles later (2 + i if the word of a
    factor comes first), on `read_a` (operand a) and `read_b`, and its result given to `write` `vector.latency` - 1
    cycles after that, or `vector.unary_latency` later if it has a function; so an instruction that starts at `done`
    reads it. Reductions leave a word, vargmax two, through `write_reduce` in the last cycle before `done`.
    `ready`: the last row is being addressed, or none, and if a function is still under way, the offered instruction
    has one too, or its results come after all of it. What else docs/timing.md has an instruction wait for it has waited
    for before it comes.

    `completed`: the ticket of the last instruction done. `waited`: the core's cause of a wait that ends with the
    transfer; `activity` has it, and the occupied cycles, a cycle later. `argmax_nan`: the vargmax at `pc` met a NaN.
    `shared` are the modules whose text goes beside this one's.
    """

    def __init__(self, machine: Machine) -> None:
        """Take a machine.

        Raises:
            MachineError: a latency is less than the pipeline needs.
        """
        vector = machine.vector
        for key, least in LEAST.items():
            if getattr(vector, key) < least:
                raise MachineError(
                    f"{machine.name}: vector.{key} = {getattr(vector, key)} is faster than the hardware's pipeline:"
                    f" set it to {least} or more"
                )
        self.machine = machine
        self.lanes, self.rows = vector.lanes, file_rows(machine)
        self._timing = LaneTiming.of(vector.latency - PIPELINE_CYCLES, vector.unary_latency, vector.add_latency)
        self._pair = Shared("vector_lanes", LanePair(self._timing))
        self._tree = ReductionTree(vector.add_latency, self.lanes, self.rows)
        self.shared = (self._pair, *self._tree.shared)
        self._longest = longest_latency(timing_parameters(machine))
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
        x, y, factor = self._operands()
        self._compute(x, y, factor)
        self._retire()
        return m

    # Start ---------------------------------------------------------------------------------------------
    def _start(self) -> None:
        """What is presented: registers loaded by a transfer, rows that advance, and when the next may start."""
        m, item = self._m, self.issued.payload
        offered = recipe(m, item.opcode, item.modifiers, item["values"])
        self._now = now = Signal(self._instruction_layout(), reset_less=True)
        self._running = Signal()
        self._left, self._first = Signal(range(self.rows)), Signal()
        # A factor's word is addressed in a cycle of its own, before the rows.
        self._fetching = fetching = Signal()
        rows = {name: Signal(range(self.rows), name=f"row_{name}", reset_less=True) for name in ("dst", "a", "b")}
        first_b = Signal.like(rows["b"], name="first_row_b", reset_less=True)
        self._row_dst = rows["dst"]
        transfer, free, span = Signal(), Signal(), Signal(range(self.rows))
        count = offered.n[: self.machine.vector.words.bit_length()]
        fetches = offered.scale_from == Factor.WORD
        m.d.comb += [
            free.eq((self._left == 0) & ~fetching),
            transfer.eq(self.issued.valid & self.issued.ready),
            span.eq(Mux(count == 0, 0, (count - 1)[self._lane_bits :])),
            self.read_a.address.eq(rows["a"]),
            self.read_b.address.eq(rows["b"]),
        ]
        with m.If(transfer):
            m.d.sync += [self._running.eq(1), self._first.eq(~fetches), fetching.eq(fetches), self._left.eq(span)]
            m.d.sync += [row.eq(offered[name][self._lane_bits :]) for name, row in rows.items()]
            m.d.sync += first_b.eq(offered.b[self._lane_bits :])
            with m.If(fetches):
                m.d.sync += rows["b"].eq(offered.scale[self._lane_bits :])
            m.d.sync += self._load(now, offered, count, span)
        with m.Elif(fetching):
            m.d.sync += [self._first.eq(1), fetching.eq(0), rows["b"].eq(first_b)]
        with m.Else():
            m.d.sync += [self._running.eq(self._left != 0), self._first.eq(0)]
            m.d.sync += [row.eq(row + 1) for row in rows.values()]
            with m.If(self._left != 0):
                m.d.sync += self._left.eq(self._left - 1)
        waited = self._order(transfer, free, offered.functional)
        self._remember(transfer & offered.reduces, offered)
        m.d.comb += [self.activity.active.eq(self._running), self.activity.cause.eq(Cause.COMPUTE)]
        with m.If(transfer):
            m.d.sync += self.activity.waited.eq(waited)

    def _order(self, transfer: Value, free: Value, functional: Value) -> Value:
        """Results leave in order: what has no function starts `unary_latency` cycles after the end of what has.

        Returns the cause of the wait that ends with a transfer: this one's, if none that counts before it took as long.
        """
        m, cycles = self._m, self.machine.vector.unary_latency
        left, late, held = Signal(range(cycles + 1)), Signal(), Signal()
        blocked = (left != 0) & ~functional
        m.d.comb += self.issued.ready.eq(free & ~blocked)
        with m.If(transfer):
            m.d.sync += left.eq(Mux(functional, cycles, 0))
        with m.Elif(free & (left != 0)):
            m.d.sync += left.eq(left - 1)
        # `late`: the wait has just ended; `held`: it was all that the offered instruction waited for.
        m.d.sync += [late.eq(free & (left == 1)), held.eq(self.issued.valid & free & blocked)]
        after = self.waited.matches(Cause.MEMORY, Cause.RING)
        return Mux(late & ~functional & (held | after), int(Cause.VECTOR), self.waited)

    def _remember(self, starts: Value, offered: Any) -> None:
        """What becomes of the results of reductions under way, in order; `_held` is the oldest.

        One can start in each cycle of the oldest's latency, and in the one before.
        """
        m, layout = self._m, self._reduction_layout()
        depth = 1 << (self._longest + 1).bit_length()
        m.submodules.reductions = memory = Memory(shape=layout, depth=depth, init=[])
        write, read = memory.write_port(), memory.read_port(domain="comb")
        m.d.comb += [
            write.en.eq(starts),
            write.data.sums.eq(offered.sums),
            write.data.ordered.eq(offered.ordered),
            write.data.dst.eq(offered.result),
            write.data.base.eq(offered.base),
        ]
        m.d.sync += [write.addr.eq(write.addr + starts), read.addr.eq(read.addr + self._tree.found)]
        self._held = read.data

    def _instruction_layout(self) -> data.StructLayout:
        """What stays while an instruction's rows are presented; `span` is their number less one."""
        return data.StructLayout(
            {
                "ticket": unsigned(ticket_bits(self.machine)),
                "span": range(self.rows),
                "pc": unsigned(TARGET_BITS),
                "empty": 1,
                "tail": unsigned(self._lane_bits),
                "lane_dst": unsigned(self._lane_bits),
                "operands": self._operand_layout(),
                "writes": 1,
                "reduces": 1,
                "steps": self._step_layout(),
            }
        )

    def _operand_layout(self) -> data.StructLayout:
        """How operands are chosen; `single`: one element, at any place in its rows."""
        lane = unsigned(self._lane_bits)
        return data.StructLayout(
            {
                "single": 1,
                "b_from": Source,
                "lane_a": lane,
                "lane_b": lane,
                "imm": unsigned(32),
                "from_value": 1,
                "factor": unsigned(32),
            }
        )

    def _step_layout(self) -> data.StructLayout:
        """What the lanes are told of an instruction."""
        return data.StructLayout(
            {
                "scaled": 1,
                "subtract": 1,
                "take_y": 1,
                "choice": Choice,
                "functional": 1,
                "function": unsigned(FUNCTION_BITS),
                "squares": 1,
                "sums": 1,
                "ordered": 1,
            }
        )

    def _reduction_layout(self) -> data.StructLayout:
        """What stays until a reduction's result is there."""
        dst = range(self.machine.vector.words)
        return data.StructLayout({"sums": 1, "ordered": 1, "dst": dst, "base": signed(32)})

    def _load(self, now: Any, offered: Any, count: Value, span: Value) -> list[Any]:
        """Assignments of an instruction to `now`."""
        item, lanes = self.issued.payload, slice(0, self._lane_bits)
        steps = [
            now.steps[name].eq(offered[name])
            for name in ("subtract", "take_y", "choice", "functional", "function", "squares", "sums", "ordered")
        ]
        return [
            *steps,
            now.steps.scaled.eq(offered.scale_from != Factor.NONE),
            now.ticket.eq(item.ticket),
            now.span.eq(span),
            now.pc.eq(item.pc),
            now.empty.eq(count == 0),
            now.tail.eq(count[lanes]),
            now.lane_dst.eq(offered.dst[lanes]),
            now.operands.single.eq(count == 1),
            now.operands.b_from.eq(offered.b_from),
            now.operands.lane_a.eq(offered.a[lanes]),
            now.operands.lane_b.eq(offered.b[lanes]),
            now.operands.imm.eq(offered.imm),
            now.operands.from_value.eq(offered.scale_from == Factor.VALUE),
            now.operands.factor.eq(offered.scale),
            now.writes.eq(offered.writes),
            now.reduces.eq(offered.reduces),
        ]

    # Rows ----------------------------------------------------------------------------------------------
    def _operands(self) -> tuple[Signal, Signal, Signal]:
        """x and y of every lane, and the factor, registered.

        One word for all lanes is chosen with the first row and held; a factor's word came the cycle before.
        """
        m, words = self._m, data.ArrayLayout(unsigned(32), self.lanes)
        by = delayed(m, self._now.operands, READ_CYCLES, "operands")
        first = delayed(m, self._first, READ_CYCLES, "operands_first")
        fetched = delayed(m, self._fetching, READ_CYCLES, "operands_fetched")
        a, b = self.read_a.data, self.read_b.data
        held, word = Signal(32, reset_less=True), Signal(32)
        m.d.comb += word.eq(held)
        with m.If(first):
            m.d.comb += word.eq(Mux(by.b_from == Source.IMMEDIATE, by.imm, b[by.lane_b]))
        m.d.sync += held.eq(word)
        factor = Signal(32, reset_less=True)
        with m.If(fetched):
            m.d.sync += factor.eq(b[by.factor[: self._lane_bits]])
        with m.Elif(first & by.from_value):
            m.d.sync += factor.eq(by.factor)
        x, y = Signal(words, reset_less=True), Signal(words, reset_less=True)
        each = (by.b_from == Source.VECTOR) & ~by.single
        for lane in range(self.lanes):
            m.d.sync += [x[lane].eq(Mux(by.single, a[by.lane_a], a[lane])), y[lane].eq(Mux(each, b[lane], word))]
        return x, y, factor

    def _mask(self) -> Signal:
        """Lanes that hold an element in the row presented; a single one is in all, and written where dst lies."""
        m, now = self._m, self._now
        mask = Signal(self.lanes)
        m.d.comb += mask.eq(-1)
        with m.If(now.operands.single):
            m.d.comb += mask.eq(1 << now.lane_dst)
        with m.Elif(self._left == 0):
            below = Cat(now.tail > lane for lane in range(self.lanes))
            m.d.comb += mask.eq(Mux(now.empty, 0, Mux(now.tail == 0, (1 << self.lanes) - 1, below)))
        return mask

    def _row_layout(self) -> data.StructLayout:
        """What travels beside a row."""
        return data.StructLayout(
            {
                "mask": self.lanes,
                "single": 1,
                "row": range(self.rows),
                "first": 1,
                "last": 1,
                "pc": unsigned(TARGET_BITS),
                "steps": self._step_layout(),
            }
        )

    def _compute(self, x: Signal, y: Signal, factor: Signal) -> None:
        """Lanes with what travels beside them, the write of their results, and the reduction."""
        m, now, timing = self._m, self._now, self._timing
        here, valid = Signal(self._row_layout()), Signal(data.StructLayout({"writes": 1, "reduces": 1}))
        m.d.comb += [
            here.mask.eq(self._mask()),
            here.single.eq(now.operands.single),
            here.row.eq(self._row_dst),
            here.first.eq(self._first),
            here.last.eq(self._left == 0),
            here.pc.eq(now.pc),
            here.steps.eq(now.steps),
            valid.writes.eq(self._running & ~self._fetching & now.writes),
            valid.reduces.eq(self._running & ~self._fetching & now.reduces),
        ]
        # Each moment of a row: its factor's product is there, its second operand, its operation's results, its own.
        scaling = delayed(m, here, READ_CYCLES + 1 + timing.factor, "scaling")
        operating = delayed(m, scaling, timing.operands - timing.factor, "operating")
        choosing = delayed(m, operating, timing.operation, "choosing")
        early = delayed(m, choosing, 1, "early")
        late = delayed(m, early, timing.function, "late")
        valid_early = delayed(m, valid, READ_CYCLES + 1 + timing.result, "valid_early", reset=True)
        functional = data.View(valid.shape(), valid_early.as_value() & early.steps.functional.replicate(2))
        valid_late = delayed(m, functional, timing.function, "valid_late", reset=True)
        # Never both: what has no function starts late enough.
        is_late = Signal()
        end, valid_end = Signal(self._row_layout(), name="end"), Signal(valid.shape(), name="valid_end")
        m.d.comb += [
            is_late.eq(valid_late.as_value().any()),
            end.eq(Mux(is_late, late, early)),
            valid_end.eq(Mux(is_late, valid_late, valid_early.as_value() & ~early.steps.functional.replicate(2))),
            self.write.address.eq(end.row),
            self.write.mask.eq(Mux(valid_end.writes, end.mask, 0)),
        ]
        pairs = []
        for index in range(0, self.lanes, LANES):
            m.submodules[f"lanes{index}"] = pair = self._pair.replica()
            pairs.append(pair)
            m.d.comb += [
                pair.x.eq(x.as_value()[32 * index : 32 * (index + LANES)]),
                pair.y.eq(y.as_value()[32 * index : 32 * (index + LANES)]),
                pair.factor.eq(factor),
                pair.scaled.eq(scaling.steps.scaled),
                pair.subtract.eq(operating.steps.subtract),
                pair.take_y.eq(operating.steps.take_y),
                pair.choice.eq(choosing.steps.choice),
                pair.function.eq(early.steps.function),
                pair.late.eq(is_late),
            ]
        m.d.comb += self.write.data.eq(Cat(pair.result for pair in pairs))
        self._reduce(pairs, end, valid_end.reduces)

    def _reduce(self, pairs: list[Any], end: Any, reduces: Value) -> None:
        """Leaves of results, or of their squares once these are there; the tree."""
        m, square = self._m, self._timing.square
        squared = delayed(m, end, square, "squared")
        valid_squared = delayed(m, reduces & end.steps.squares, square, "valid_squared", reset=True)
        leaf, valid_leaf = Signal(self._row_layout(), name="leaf"), Signal()
        m.d.comb += [
            leaf.eq(Mux(valid_squared, squared, end)),
            valid_leaf.eq(valid_squared | (reduces & ~end.steps.squares)),
        ]
        # A single element is in all lanes, and counts in the first.
        keep = Signal(self.lanes)
        m.d.comb += keep.eq(Mux(leaf.single, 1, leaf.mask))
        # Within the only row +0 extends to a power of two, and -0, which changes no sum, beyond.
        sign = [Const(0, 1)] + [
            leaf.first & leaf.last & ~keep[1 << lane.bit_length() - 1] for lane in range(1, self.lanes)
        ]
        for index, pair in zip(range(0, self.lanes, LANES), pairs, strict=True):
            both = slice(index, index + LANES)
            m.d.comb += [
                pair.square.eq(valid_squared),
                pair.keep.eq(keep[both]),
                pair.padding_sign.eq(Mux(leaf.steps.sums, Cat(sign[both]), (1 << LANES) - 1)),
                pair.infinite.eq(~leaf.steps.sums),
                pair.ordered.eq(leaf.steps.ordered),
            ]
        more = self.machine.vector.reduce_latency - REDUCE_CYCLES
        after = delayed(m, leaf, 1, "after")
        valid_after = delayed(m, valid_leaf, 1, "valid_after", reset=True)
        m.d.comb += [
            self.argmax_nan.raised.eq(reduce(or_, (pair.nan for pair in pairs)) & valid_after),
            self.argmax_nan.pc.eq(after.pc),
        ]
        entering = delayed(m, Cat(after.first, after.last, after.steps.ordered), more, "entering")
        m.submodules.tree = tree = self._tree
        m.d.comb += [
            tree.valid.eq(delayed(m, valid_after, more, "valid_entering", reset=True)),
            Cat(tree.first, tree.last, tree.ordered).eq(entering),
            tree.leaves.eq(delayed(m, Cat(pair.leaf for pair in pairs), more, "leaves")),
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
        m, now, levels, vector = self._m, self._now, self._tree.lane_levels, self.machine.vector
        latency, tree = Signal(range(self._longest)), Signal(range(self._longest))
        with m.If(now.reduces):
            for extra in range(self._tree.row_levels + 1):
                # As many levels over rows as the number of rows less one has bits.
                with m.If((now.span >> extra == 0) & ((now.span >> extra - 1 != 0) if extra else 1)):
                    m.d.comb += tree.eq(vector.reduce_latency + vector.add_latency * (levels + extra))
        function = Mux(now.steps.functional, vector.unary_latency, 0)
        square = Mux(now.steps.squares, vector.add_latency, 0)
        m.d.comb += latency.eq(vector.latency - 2 + function + square + tree)
        retires, ticket = Signal(), Signal(ticket_bits(self.machine), reset_less=True)
        remaining = Signal(range(self._longest), reset_less=True)
        m.d.sync += [
            retires.eq(self._running & (self._left == 0) & ~self._fetching),
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
