"""What a token costs, from an allocated program's operations: the analytical model that plans are chosen by.

After Pope et al., "Efficiently Scaling Transformer Inference" (MLSys 2023), a pass takes the longer of its memory's
time and its computing's, and communication between devices comes on top. On this machine they overlap in a known way:
the fetch engine runs ahead of everything, as far as the FIFO and the issue queues reach, and what does not overlap is
the chain of operations that wait for one another. So the model goes through a pass operation by operation, with one
clock for each unit:

- a product starts when its operand and the matrix unit are ready. It ends after its steps (`steps`), and not before its
  last row has arrived: requested in order, a row each fetch slot (`rows_per_write_slot`), at most a FIFO ahead of what
  is consumed; `matmul_latency` later its result may be used.
- vector instructions wait for the one before (`vector_occupancy`, `vector_latency`), for they read what it wrote or
  write the same hazard segment; heads side by side have segments of their own. The lists are those of `compiler.emit`.
- a gather takes `gather_cycles`: setup, and for each hop the block's cycles and the link's latency.
- attention goes through its groups of heads as emitted: scores, softmax, values, and K and V to memory.
- a token begins with scalar loads and the embedding, and the last ends with the logits and the best of all devices.
- nothing issues before the instruction `queue_depth` places earlier in its unit has started; this bounds how far
  weights are fetched ahead.

What it leaves out: that parameters must be loaded, scalar instructions between others, hazards of segments that
unrelated values share, and partial last shards: devices are taken to be equal. The formulas with their names above are
those of `typebar.isa.timing`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Block, Operation, SSAValue

from typebar.compiler import device_ir as dev
from typebar.compiler import ir
from typebar.compiler.device_source import AttendOp
from typebar.compiler.memory import program_of
from typebar.compiler.scratch import Limits, positions_of, rows_of
from typebar.isa import timing
from typebar.isa.errors import TypebarError
from typebar.isa.instructions import FORMAT_BYTES, Format
from typebar.isa.machine import LINE_BYTES, Machine

DESCRIPTOR_LOADS = 5
"""Scalar loads before the first token."""


@dataclass(frozen=True)
class Cost:
    """Cycles of a run of passes, and what they would take each for itself: the terms of the model.

    `hbm`: rows fetched, a row each fetch slot. `compute`: steps of the matrix unit. `vector`: the vector unit's
    instructions with their latencies. `ring`: gathers. `cycles` is at least `hbm` and at least `compute`.
    """

    cycles: float
    hbm: float
    compute: float
    vector: float
    ring: float

    def __sub__(self, other: Cost) -> Cost:
        """Term by term: what a longer run has more than a shorter."""
        return Cost(*(getattr(self, item.name) - getattr(other, item.name) for item in fields(Cost)))


class CostModel:
    """The cost of passes of one allocated program on a ring of machines."""

    def __init__(self, module: ModuleOp, machine: Machine, fmt: Format) -> None:
        """Take the `tbd.program` of a module, after `allocate`; weights and caches have the format `fmt`.

        Raises:
            TypebarError: there is none, or it is not allocated.
        """
        self.program, self.machine = program_of(module), machine
        if self.program.step is None:
            raise TypebarError("the program has no registers: run the pass allocate first")
        self.element = FORMAT_BYTES[fmt]
        self.p = timing.timing_parameters(machine)

    def prompt(self, tokens: int, start: int = 0, vectors: int = 1) -> Cost:
        """The passes over a prompt, from position `start` on, `vectors` tokens a pass; the last gives the first token.

        Raises:
            TypebarError: a number is not positive, or they are no whole passes.
        """
        if min(tokens, vectors) < 1 or tokens % vectors:
            raise TypebarError(f"a prompt of {tokens} tokens has no passes of {vectors}: give a multiple")
        run = _Run(self, vectors)
        run.units.issue = DESCRIPTOR_LOADS * (self.p.line_cycles + self.p.ddr_latency)
        for position in range(start, start + tokens, vectors):
            run.token(position + vectors, last=position + vectors == start + tokens)
        return run.cost()

    def token(self, position: int) -> Cost:
        """One generated token, whose own position in the text is `position`."""
        run = _Run(self, 1)
        run.token(position + 1, last=True)
        return run.cost()


@dataclass
class _Units:
    """When each unit is free, its last reduction is done, and the scalar core goes on."""

    matrix: float = 0
    vector: float = 0
    memory: float = 0
    ring: float = 0
    fetch: float = 0
    reduced: float = 0
    issue: float = 0
    rows: int = 0
    eaten: deque[tuple[int, int, float, float]] = field(default_factory=deque)
    """Rows consumed: (first, after the last, start, end), oldest first."""
    starts: dict[str, deque[float]] = field(default_factory=dict)
    """When each unit's latest `queue_depth` instructions started, oldest first."""

    def requested(self, first: float, rows: int, fifo: int, slot: float) -> float:
        """When the next `rows` rows have been requested, a row a `slot`, none before its place in the FIFO is free.

        The wait is longest for the first row of a product, here or in the FIFO, or for the last.
        """
        freed = self.rows - fifo
        done = max(first, self.freed(freed)) + rows * slot
        for other, _, start, _ in self.eaten:
            if freed < other < freed + rows:
                done = max(done, start + (freed + rows - other) * slot)
        return max(done, self.freed(min(freed + rows, self.rows)))

    def issued(self, unit: str) -> float:
        """When the next instruction for a unit issues: the queue takes it."""
        queue = self.starts[unit]
        self.issue = max(self.issue + 1, queue[0] if len(queue) == queue.maxlen else 0)
        return self.issue

    def begin(self, unit: str, ready: float) -> float:
        """When it starts, its operands being `ready`."""
        start: float = max(self.issued(unit), ready, getattr(self, unit))
        self.starts[unit].append(start)
        return start

    def freed(self, rows: int) -> float:
        """When so many rows have left the FIFO since the run began."""
        if rows <= 0:
            return 0
        while self.eaten and self.eaten[0][1] < rows:
            self.eaten.popleft()
        if not self.eaten:
            return 0
        first, last, start, end = self.eaten[0]
        return start + (end - start) * max(0, rows - first) / (last - first)


class _Run:
    """Passes one after another."""

    def __init__(self, model: CostModel, vectors: int) -> None:
        machine, program = model.machine, model.program
        self.p, self.machine, self.program, self.element = model.p, machine, program, model.element
        self.vectors = vectors
        self.devices = int(program.devices.value.data)
        self.slot = self.p.write_period / (self.p.write_period - 1)
        align, context, step = (int(a.value.data) for a in (program.align, program.context, program.step))  # type: ignore[union-attr]
        self.limits = Limits(
            machine.vector.words, align, step, machine.attention_block, machine.column_block, context, self.devices,
            machine.matrix.vectors,
        )  # fmt: skip
        depth = self.p.queue_depth
        self.units = _Units(starts={unit: deque(maxlen=depth) for unit in ("matrix", "vector", "memory", "ring")})
        self.ready: dict[SSAValue, float] = {}
        self.length = 0
        self.terms = dict.fromkeys(("hbm", "compute", "vector", "ring"), 0.0)

    def cost(self) -> Cost:
        """All so far."""
        u = self.units
        return Cost(max(u.matrix, u.vector, u.ring, u.issue), **self.terms)

    # Passes ---------------------------------------------------------------------------------------------
    def token(self, length: int, last: bool) -> None:
        """One pass, whose last token sees `length` positions; `last`: with logits and what follows from them."""
        u, self.length = self.units, length
        self.ready = {}
        u.issue = max(u.issue, u.memory) + self.p.line_cycles + self.p.ddr_latency
        u.fetch = max(u.fetch, u.issue)
        self.block(self.program.body.block, last)

    def block(self, block: Block, last: bool) -> None:
        """Operations in order; a loop's body as often as it runs."""
        for op in block.ops:
            if isinstance(op, ir.RepeatOp):
                self.loop(op)
            elif isinstance(op, dev.HeadOp):
                if last:
                    self.head(op)
            elif not isinstance(op, ir.YieldOp):
                self.visit(op)

    def loop(self, op: ir.RepeatOp) -> None:
        values = [self.at(value) for value in op.inits]
        body = op.body.block
        end = body.last_op
        assert end is not None
        for _ in range(op.count.value.data):
            self.ready.update(zip(body.args, values, strict=True))
            self.block(body, False)
            values = [self.at(value) for value in end.operands]
        self.ready.update(zip(op.outs, values, strict=True))

    def at(self, value: SSAValue) -> float:
        """When a value may be used; parameters are loaded in time."""
        return self.ready.get(value, 0)

    def visit(self, op: Operation) -> None:
        ready = max((self.at(value) for value in op.operands), default=0.0)
        if isinstance(op, dev.MatrixOp):
            done = self.matrix(op, ready)
        elif isinstance(op, dev.AttentionOp | AttendOp):
            done = self.attention(op, ready)
        elif isinstance(op, dev.GatherOp):
            done = self.gather(ready, ir.width(op.x))
        elif isinstance(op, dev.LookupOp):
            lines = -(-ir.width(op.out) * self.element // LINE_BYTES)
            done = self.load(lines, ir.width(op.out))
        else:
            passes = _vector_passes(op)
            done = self.vector(ready, passes) if passes else ready
        for result in op.results:
            self.ready[result] = done

    # Units ----------------------------------------------------------------------------------------------
    def load(self, lines: int, words: int) -> float:
        """A load that begins as soon as it is issued."""
        u = self.units
        u.memory = u.begin("memory", 0) + timing.load_occupancy(self.p, lines, words) * self.vectors
        return u.memory + self.p.ddr_latency

    def vector(self, ready: float, passes: Sequence[tuple[int, int]]) -> float:
        """Vector instructions, each of which waits for the one before: (opcode, elements)."""
        u, now = self.units, ready
        for opcode, n in passes:
            occupancy = timing.vector_occupancy(self.p, n) * self.vectors
            u.vector = u.begin("vector", max(now, u.reduced) if opcode >= timing.VSUM else now) + occupancy
            now = u.vector + timing.vector_latency(self.p, opcode, occupancy)
            if opcode >= timing.VSUM:
                u.reduced = now
            self.terms["vector"] += occupancy + timing.vector_latency(self.p, opcode, occupancy)
        return now

    def gather(self, ready: float, n: int) -> float:
        """An all-gather of n words a device; with barriers everything waits for it."""
        u = self.units
        took = timing.gather_cycles(self.p, n * self.vectors, self.devices)
        u.ring = u.begin("ring", ready) + took
        self.terms["ring"] += took
        if self.machine.control.barriers:
            u.issue = u.matrix = u.vector = u.fetch = max(u.ring, u.matrix, u.vector)
        return u.ring

    def product(
        self, ready: float, k: int, n: int, size: int, vectors: int = 1, extra: int = 0, full: bool = False
    ) -> float:
        """A matmul: when its result may be used. `extra` are operands of a column block beside the vectors."""
        if k < 1 or n < 1:
            return max(ready, self.units.matrix)
        p, u = self.p, self.units
        compute, rows = steps(p, k, n, size, vectors, extra), rows_of_product(p, k, n, size)
        start = u.begin("matrix", ready)
        first = max(u.fetch, u.issue if p.run_ahead else start)
        requested = max(u.requested(first, rows, p.fifo_rows, self.slot), start + (rows - p.fifo_rows) * self.slot)
        end = max(start + compute, first + p.hbm_latency + compute, requested + p.hbm_latency)
        u.eaten.append((u.rows, u.rows + rows, start, end))
        u.rows += rows
        u.fetch = max(requested, u.freed(u.rows - p.fifo_rows))
        u.matrix = end
        self.terms["compute"] += compute
        self.terms["hbm"] += rows * self.slot
        return end + timing.matmul_latency(p)

    # Operations -----------------------------------------------------------------------------------------
    def matrix(self, op: dev.MatrixOp, ready: float) -> float:
        k, size = int(op.k.value.data), 1 if op.int8 else self.element
        extra = (op.bias is not None) + (op.scale is not None)
        return self.product(ready, k, op.words, size, self.vectors, extra)

    def attention(self, op: dev.AttentionOp | AttendOp, ready: float) -> float:
        """Groups of K/V heads, one after another, in as many turns as the rows need."""
        taken, kv_heads = rows_of(op, self.limits), int(op.kv_heads.value.data)
        length = min(self.length, positions_of(op, self.limits))
        if not isinstance(op, AttendOp) and op.window is not None:
            length = min(length, int(op.window.value.data))
        ready = done = self.vector(ready, [(timing.VMOV, 1)])
        for first in range(0, kv_heads, taken.keys):
            count = min(taken.keys, kv_heads - first)
            for piece in range(taken.pieces):
                rows = taken.of_piece(piece, op.group)
                if positions_of(op, self.limits) > self.machine.attention_block:
                    done = max(done, self.blocks(op, ready, rows, length))
                else:
                    done = self.heads(op, ready, rows, count, length, done)
        self.store(op, ready, kv_heads)
        return done

    def heads(
        self, op: dev.AttentionOp | AttendOp, ready: float, rows: int, count: int, length: int, done: float
    ) -> float:
        """Softmax of a single block of positions for `count` K/V heads side by side, each in segments of its own.

        Results share a segment, so that each waits for the one before, and the first for the earlier ones, `done`.
        """
        size, depth = int(op.head_dim.value.data), int(op.depth.value.data)
        each, words, wide = rows * self.vectors, length * self.vectors, rows > 1
        apart = self.limits.step >= self.machine.segment_words
        clocks = [self.product(ready, depth, length, self.element, each, full=True) for _ in range(count)]
        passes = [(timing.VMOV, words, rows), (timing.VUNARY, words, rows), (timing.VSUM, words, rows)]
        for opcode, n, times in (*passes, (timing.VUNARY, each, 1)):
            for head in range(count):
                before = clocks[head] if apart else max(clocks)
                clocks[head] = self.vector(before, [(opcode, n)] * times)
        for clock in clocks:
            done = self.product(max(clock, done), length, size, self.element, each, 1)
        return self.vector(done, [(timing.VMOV, size * self.vectors)] * (count * rows)) if wide else done

    def blocks(self, op: dev.AttentionOp | AttendOp, ready: float, rows: int, length: int) -> float:
        """Softmax over several blocks of positions, with a running maximum and sum; one K/V head at a time."""
        size, depth = int(op.head_dim.value.data), int(op.depth.value.data)
        each, out = rows * self.vectors, (timing.VMOV, size * self.vectors)
        few, few_unary = (timing.VMOV, each), (timing.VUNARY, each)
        now = done = self.vector(ready, [few, few, (timing.VMOV, size * each)])
        for at in range(0, length, self.machine.attention_block):
            seen = min(self.machine.attention_block, length - at)
            n = seen * self.vectors
            score = self.product(ready, depth, seen, self.element, each, full=True)
            passes = [few, *[(timing.VMOV, n)] * rows, *[(timing.VUNARY, n)] * rows, few, few_unary, few]
            now = self.vector(max(score, now), [*passes, *[(timing.VSUM, n)] * rows, few, few])
            part = self.product(now, seen, size, self.element, each, 1)
            done = self.vector(max(part, done), [out] * (2 * rows))
        return self.vector(done, [few_unary, *[out] * rows])

    def store(self, op: dev.AttentionOp | AttendOp, ready: float, heads: int) -> None:
        """K and V of this pass's tokens to the caches: V is one lane of every column, a line each."""
        if isinstance(op, AttendOp):
            return
        size, depth = int(op.head_dim.value.data), int(op.depth.value.data)
        pieces = -(-size * self.machine.matrix.lanes * self.element // self.p.row_bytes)
        chunks = -(-depth // self.machine.matrix.lanes)
        period, u = self.p.write_period, self.units
        for _ in range(heads):
            for cycles in (chunks * period, max(size, pieces * period)):
                u.memory = u.begin("memory", ready) + cycles * self.vectors

    def head(self, op: dev.HeadOp) -> None:
        """Logits a chunk at a time, their argmax, the best of all devices, and the next token to the host."""
        p, u = self.p, self.units
        k, size = int(op.k.value.data), 1 if op.int8 else self.element
        chunk = op.words if op.chunk is None else int(op.chunk.value.data)
        for at in range(0, op.words, chunk):
            words = min(chunk, op.words - at)
            done = self.product(self.at(op.x), k, words, size)
            passes = [(timing.VUNARY, words)] * len(op.steps or ())
            done = self.vector(done, [*passes, (timing.VARGMAX, words)])
            u.issue = max(u.issue, done) + 2 * p.read_latency
            u.fetch = max(u.fetch, u.issue)
        if self.devices > 1:
            best = self.vector(u.issue, [(timing.VWRITE, 1)] * 2)
            u.issue = self.gather(best, self.limits.align)
            u.issue += 2 * p.read_latency + (self.devices - 1) * (2 * p.read_latency + p.branch_cycles + 4)
        u.issue += p.line_cycles


def _vector_passes(op: Operation) -> list[tuple[int, int]]:
    """The vector instructions of an operation, as `compiler.emit.vectors` writes them: (opcode, elements)."""
    if isinstance(op, dev.LayerNormOp | dev.RmsNormOp):
        n, word = op.count, (timing.VMOV, 1)
        centred = [(timing.VSUM, n), word, (timing.VMOV, n)] if isinstance(op, dev.LayerNormOp) else []
        factors = [op.weight, op.bias] if isinstance(op, dev.LayerNormOp) else [op.weight]
        after = [(timing.VMOV, n)] * (1 + sum(factor is not None for factor in factors))
        return [*centred, (timing.VSUMSQ, n), word, word, (timing.VUNARY, 1), *after]
    if isinstance(op, dev.ActivationOp):
        return [(timing.VUNARY, op.count)]
    if isinstance(op, dev.AddOp | dev.MulOp | dev.ScaleOp | dev.CopyOp):
        return [(timing.VMOV, op.count)]
    if isinstance(op, dev.RotaryOp):
        heads, half, pad = (int(a.value.data) for a in (op.heads, op.half, op.pad))
        return [*[(timing.VMOV, half)] * (2 * heads), (timing.VMOV, heads * pad)]
    return []


def steps(p: timing.TimingParameters, k: int, n: int, size: int, vectors: int, extra: int = 0) -> int:
    """Cycles from a matmul's start to the end of its last step if all its rows are there (docs/timing.md, "Steps").

    `extra` rows of the register file a group of `vector.lanes` columns come with each column block: bias and scales.
    """
    chunks, width = -(-k // p.lanes), timing.fold(p, vectors, size) * p.columns
    modifiers = [0] * (1 + max(timing.X_PATCH, timing.X_ACCUMULATE, timing.X_ADD_BIAS, timing.X_SCALING))
    load = timing.chunk_load(p, modifiers, vectors)
    hold, last = timing.step_cycles(p, vectors, size), timing.last_hold(p, vectors, size)
    whole, rest = divmod(n, p.column_block)
    total = load
    for columns, count in ((p.column_block, whole), (rest, 1 if rest else 0)):
        if count:
            held = -(-columns // width)
            chunk = max(held * hold, load, p.accumulate_latency)
            operands = extra * -(-columns // p.vector_lanes)
            total += count * ((chunks - 1) * chunk + max(held * last, load + operands))
    return total


def rows_of_product(p: timing.TimingParameters, k: int, n: int, size: int) -> int:
    """Rows that a matmul of k x n elements fetches: a burst for each chunk of each column block."""
    chunks, (whole, rest) = -(-k // p.lanes), divmod(n, p.column_block)
    rows = whole * timing.burst_rows(p, p.column_block, size)
    return chunks * (rows + (timing.burst_rows(p, rest, size) if rest else 0))
