"""The clocks of one device's units, for the cost model: what each instruction waits for and how long it takes.

The rules are those of docs/timing.md and the formulas those of `typebar.isa.timing`, but for the matrix unit, whose
steps and rows are added up here without going through them one by one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING

from typebar.isa import timing
from typebar.isa.instructions import Region, Unit
from typebar.isa.machine import LINE_BYTES
from typebar.isa.timing import (
    LAST_HBM_REGION,
    LOAD,
    S_BYTE,
    S_INNER,
    S_INNER_BYTES,
    S_LINE,
    S_OUTER,
    S_OUTER_BYTES,
    SSTORE,
    STORE,
    X_FORMAT,
    X_FULL,
    X_INNER,
    X_K,
    X_LINE,
    X_N,
    X_OUTER,
    X_REGION,
    TimingParameters,
)

if TYPE_CHECKING:
    from typebar.compiler.cost import Cost

_MATRIX, _VECTOR, _MEMORY, _RING = int(Unit.MATRIX), int(Unit.VECTOR), int(Unit.MEMORY), int(Unit.RING)
_KV = int(Region.KV)
_UNITS = len(Unit)
_STORES = 128
"""Stores to HBM that a fetch of the same rows may have to wait for."""

Ranges = list[tuple[int, int, int, int]]
"""Operands by hazard segment: (first segment, last, 1 if written, first row)."""


class Units:
    """When each unit is free and what it has done, and when each segment of the register file may be used.

    `time` is when the next instruction may issue; `fetch` when the fetch engine is free; `rows` those fetched so far.
    """

    def __init__(self, p: TimingParameters, devices: int) -> None:
        """Begin at cycle 0."""
        self.p, self.devices = p, devices
        segments = -(-p.words // p.segment_words)
        self.time: float = 0
        self.fetch: float = 0
        self.rows = 0
        self.free: list[float] = [0] * _UNITS
        self.done: list[float] = [0] * _UNITS
        self.starts: list[deque[float]] = [deque(maxlen=p.queue_depth) for _ in range(_UNITS)]
        self.written: list[tuple[float, int, bool, int]] = [(0, 0, False, -1)] * segments
        self.read_by: list[list[float]] = [[0] * segments for _ in range(_UNITS)]
        self.left: float = 0
        self.reduced: tuple[float, int, bool] = (0, 0, False)
        self.stored: dict[int, float] = {}
        self.stores: deque[tuple[int, int, float]] = deque(maxlen=_STORES)
        self.eaten: deque[tuple[int, int, float, float]] = deque()
        self.terms = dict.fromkeys(("hbm", "compute", "vector", "ring"), 0.0)
        self.slot = p.write_period / (p.write_period - 1)
        self.accesses: dict[tuple[int, int], int] = {}
        self.gathering: float = 0
        self.pending: Ranges = []

    def cost(self, cycles: float | None = None) -> Cost:
        """All so far, or up to a cycle that has come: until the matrix unit is free."""
        from typebar.compiler.cost import Cost

        return Cost(self.free[_MATRIX] if cycles is None else cycles, **self.terms)

    def fence(self) -> None:
        """Nothing issues before all is done."""
        self.time = max(self.time, max(self.done) + 1)
        self.free[_MATRIX] = max(self.free[_MATRIX], self.time)

    def read(self, word: int) -> None:
        """A scalar read of a word, after all gathers, through whose port it goes."""
        ready = max(self.written[word // self.p.segment_words][0], self.done[_RING])
        self.time = max(self.time - 1, ready) + self.p.read_latency

    def skip(self, each: Cost, times: int, rows: int) -> None:
        """Let `times` stretches pass that cost `each` and fetch so many rows, and leave everything else as it is."""
        after, more = each.cycles * times, rows * times
        self.time, self.fetch, self.rows = self.time + after, self.fetch + after, self.rows + more
        self.free, self.done = ([time + after for time in clocks] for clocks in (self.free, self.done))
        self.starts = [deque((time + after for time in queue), queue.maxlen) for queue in self.starts]
        self.written = [(time + after, *rest) for time, *rest in self.written]  # type: ignore[misc]
        self.read_by = [[time + after for time in clocks] for clocks in self.read_by]
        self.left += after
        self.reduced = (self.reduced[0] + after, *self.reduced[1:])
        self.stored = {region: time + after for region, time in self.stored.items()}
        self.eaten = deque((a + more, b + more, x + after, y + after) for a, b, x, y in self.eaten)
        for name in self.terms:
            self.terms[name] += getattr(each, name) * times

    # Issue and hazards ------------------------------------------------------------------------------------
    def issue(self, opcode: int, unit: int, modifiers: Sequence[int], values: Sequence[int]) -> float:
        """Issue an instruction to a unit as soon as its queue has a place; when it is done, or a gather starts."""
        queue = self.starts[unit]
        if len(queue) == queue.maxlen:
            self.time = max(self.time, queue[0])
        self.time += 1
        if unit == _VECTOR:
            return self.vector(opcode, modifiers, values)
        if unit == _MATRIX:
            return self.matmul(modifiers, values)
        if unit == _MEMORY:
            return self.memory(opcode, modifiers, values)
        return self.gather(values)

    def ranges(self, count: int) -> Ranges:
        """The first `count` operand ranges in hand, by segment."""
        found, size = [], self.p.segment_words
        for i in range(count):
            first, words = self.accesses[i, 0], self.accesses[i, 1]
            row = first // self.p.vector_lanes
            found.append((first // size, (first + words - 1) // size, self.accesses[i, 2], row))
        return found

    def begin(self, unit: int, ranges: Ranges, ready: float = 0) -> float:
        """When an instruction starts: after its issue, its unit's last one, and what its operands wait for."""
        ready = max(ready, self.time, self.free[unit])
        for first, last, written, row in ranges:
            for segment in range(first, last + 1):
                done, writer, late, first_row = self.written[segment]
                if done > ready:
                    ordered = unit == _VECTOR and first_row == row
                    if written:
                        ordered = writer == unit and (written == timing.LATE or not late)
                    ready = ready if ordered else done
                if written:
                    for other in (_MATRIX, _VECTOR, _MEMORY, _RING):
                        if other != unit and self.read_by[other][segment] > ready:
                            ready = self.read_by[other][segment]
        self.starts[unit].append(ready)
        return ready

    def finish(self, unit: int, ranges: Ranges, done: float, row: int = -1) -> float:
        """Note when an instruction is done, in order in its unit."""
        done = self.done[unit] = max(done, self.done[unit])
        for first, last, written, _ in ranges:
            for segment in range(first, last + 1):
                if written:
                    late = written == timing.LATE
                    self.written[segment] = (done, unit, late, -1 if late else row)
                else:
                    self.read_by[unit][segment] = done
        return done

    # Units ------------------------------------------------------------------------------------------------
    def vector(self, opcode: int, modifiers: Sequence[int], values: Sequence[int]) -> float:
        """A vector instruction."""
        p = self.p
        ranges = self.ranges(timing.vector_accesses(opcode, modifiers, values, self.accesses))
        rows = timing.vector_rows(p, timing.vector_count(opcode, values))
        reduces, squares = timing.vector_reduces(opcode, modifiers), timing.takes_squares(opcode, modifiers)
        order = (timing.row_levels(rows), squares)
        latency, after = timing.element_latency(p, opcode, modifiers), 0.0
        if reduces and (order[0] < self.reduced[1] or order[1] < self.reduced[2]):
            after = self.reduced[0]
        start = self.begin(_VECTOR, ranges, max(after, self.left - latency))
        occupancy = timing.vector_occupancy(opcode, modifiers, rows)
        self.free[_VECTOR] = start + occupancy
        self.left = start + occupancy + latency
        self.terms["vector"] += occupancy
        row = timing.row_written(p, opcode, modifiers, values, rows)
        done = start + occupancy + timing.vector_latency(p, opcode, modifiers, rows)
        done = self.finish(_VECTOR, ranges, done, row)
        if reduces:
            self.reduced = (done, *order)
        return done

    def memory(self, opcode: int, modifiers: Sequence[int], values: Sequence[int]) -> float:
        """A load or a store, of vectors or of a word."""
        p = self.p
        region = modifiers[1] if opcode in (LOAD, STORE) else modifiers[0]
        ranges = self.ranges(timing.memory_accesses(opcode, values, self.accesses))
        if opcode == STORE:
            return self.store(region, modifiers, values, ranges)
        if opcode == SSTORE:
            start = self.begin(_MEMORY, ranges)
            occupancy, words = p.line_cycles, 0
        else:
            start, lines, words = self.begin(_MEMORY, ranges, self.stored.get(region, 0)), 1, 0
            if opcode == LOAD:
                size, words = timing.element_bytes(modifiers[0]), values[3]
                first = values[1] * LINE_BYTES + values[2]
                lines = timing.blocks_touched(first, words, size, size, LINE_BYTES)
            occupancy = timing.load_occupancy(p, lines, words)
        self.free[_MEMORY] = start + occupancy
        done = self.finish(_MEMORY, ranges, start + occupancy + p.ddr_latency)
        if opcode == SSTORE:
            self.stored[region] = done
        return done

    def store(self, region: int, modifiers: Sequence[int], values: Sequence[int], ranges: Ranges) -> float:
        """A store to the caches in HBM, or to DDR."""
        p, size = self.p, timing.element_bytes(modifiers[0])
        first, hbm = values[S_LINE] * LINE_BYTES + values[S_BYTE], region <= LAST_HBM_REGION
        outer, inner, apart, step = (values[i] for i in (S_OUTER, S_INNER, S_OUTER_BYTES, S_INNER_BYTES))
        cycles = timing.store_cycles(p, first, outer, inner, apart, step, size, 1 if hbm else p.line_cycles)
        start = self.begin(_MEMORY, ranges)
        if not hbm:
            self.free[_MEMORY] = start + max(1, cycles)
            done = self.finish(_MEMORY, ranges, self.free[_MEMORY] + p.ddr_latency)
            self.stored[region] = done
            return done
        rows = sum(timing.blocks_touched(first + o * apart, inner, step, size, p.row_bytes) for o in range(outer))
        self.free[_MEMORY] = float(timing.hbm_store_end(p, round(start), rows, cycles))
        done = self.finish(_MEMORY, ranges, self.free[_MEMORY] + p.hbm_latency)
        if rows:
            last = first + max(0, outer - 1) * apart + max(0, inner - 1) * step + size - 1
            self.stores.append((first // p.row_bytes, last // p.row_bytes, done))
        return done

    def gather(self, values: Sequence[int]) -> float:
        """An all-gather up to its start; `gathered` has the rest, when all devices have come to theirs."""
        self.pending = self.ranges(timing.gather_accesses(values, self.devices, self.accesses))
        self.terms["ring"] += timing.gather_cycles(self.p, values[2], self.devices)
        self.gathering = self.begin(_RING, self.pending)
        return self.gathering

    def gathered(self, done: float) -> None:
        """The gather in hand is done."""
        self.free[_RING] = self.finish(_RING, self.pending, done)

    # Matrix unit and fetch engine ---------------------------------------------------------------------------
    def matmul(self, modifiers: Sequence[int], values: Sequence[int]) -> float:
        """A product: it ends after its steps, and not before its last row has arrived.

        Rows are requested in order, a row each fetch slot, at most a FIFO ahead of what is consumed.
        """
        p = self.p
        vectors, k, n = values[X_OUTER] * values[X_INNER], values[X_K], values[X_N]
        ranges = self.ranges(timing.matmul_accesses(modifiers, values, self.accesses))
        start = self.begin(_MATRIX, ranges)
        if n < 1 or vectors < 1:
            self.free[_MATRIX] = start + 1
            return self.finish(_MATRIX, ranges, start + 1 + timing.matmul_latency(p))
        size = timing.element_bytes(modifiers[X_FORMAT])
        compute, rows = matmul_steps(p, tuple(modifiers), vectors, k, n, size), matmul_rows(p, k, n, size)
        first = max(self.fetch, self.time if p.run_ahead else start)
        if modifiers[X_REGION] == _KV:
            line = values[X_LINE]
            last = timing.matrix_last_row(p, line, k, n, size, modifiers[X_FULL])
            first = max(first, self.after_stores(line // p.row_lines, last, first))
        requested = max(self.requested(first, rows), start + (rows - p.fifo_rows) * self.slot)
        end = max(start + compute, first + p.hbm_latency + compute, requested + p.hbm_latency)
        self.eaten.append((self.rows, self.rows + rows, start, end))
        self.rows += rows
        self.fetch = max(requested, self.freed(self.rows - p.fifo_rows))
        self.free[_MATRIX] = end
        self.terms["compute"] += compute
        self.terms["hbm"] += rows * self.slot
        return self.finish(_MATRIX, ranges, end + timing.matmul_latency(p))

    def after_stores(self, first: int, last: int, bound: float) -> float:
        """When the last store to some rows is done, if that is after `bound`."""
        for low, high, done in reversed(self.stores):
            if done <= bound:
                break
            if low <= last and high >= first:
                return done
        return bound

    def requested(self, first: float, rows: int) -> float:
        """When the next `rows` rows have been requested, none before its place in the FIFO is free.

        The wait is longest for the first row of a product, here or in the FIFO, or for the last.
        """
        freed = self.rows - self.p.fifo_rows
        done = max(first, self.freed(freed)) + rows * self.slot
        for other, _, start, _ in self.eaten:
            if freed < other < freed + rows:
                done = max(done, start + (freed + rows - other) * self.slot)
        return max(done, self.freed(min(freed + rows, self.rows)))

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


def meet(ring: Sequence[Units], n: int) -> None:
    """Complete the gather of n words in hand on the first device of a ring and, if it is another, on the last.

    Devices between them start with the first. Starts count in whole cycles from the first device's, so that gathers of
    layers that are alike are worked out once.
    """
    first = ring[0]
    start, late = first.gathering, round(ring[-1].gathering - first.gathering)
    for units, done in zip(ring, _gather_done(first.p, n, first.devices, late), strict=False):
        units.gathered(start + done)


@lru_cache(maxsize=4096)
def _gather_done(p: TimingParameters, n: int, devices: int, late: int) -> tuple[int, int]:
    """When a gather is done on the first device and on the last, which starts `late` cycles after all others, at 0."""
    starts, done = [0] * (devices - 1) + [late], [0] * devices
    timing.gather_done(p, n, starts, dict.fromkeys(product(range(2), range(devices), range(devices)), 0), done)
    return done[0], done[-1]


@lru_cache(maxsize=4096)
def matmul_steps(p: TimingParameters, modifiers: tuple[int, ...], vectors: int, k: int, n: int, size: int) -> int:
    """Cycles from a matmul's start to the end of its last step if all its rows are there (docs/timing.md, "Steps").

    Column blocks after the first are alike, and one of them is gone through.
    """
    whole, rest = divmod(n, p.column_block)
    begin = end = 0
    for columns, count in ((p.column_block, min(whole, 1)), (p.column_block, max(0, whole - 1)), (rest, int(rest > 0))):
        if count:
            begin, after = _block_steps(p, modifiers, vectors, k, columns, size, (begin, end))
            begin, end = begin + (count - 1) * (after - end), end + count * (after - end)
    return end


def _block_steps(
    p: TimingParameters, modifiers: tuple[int, ...], vectors: int, k: int, columns: int, size: int, at: tuple[int, int]
) -> tuple[int, int]:
    """Beginning of the last chunk and end of a block of `columns` columns, from those of the block before."""
    begin, end = at
    chunks, held = -(-k // p.lanes), -(-columns // (timing.fold(p, vectors, size) * p.columns))
    for chunk in range(chunks):
        loaded = begin + timing.chunk_load(p, modifiers, vectors, columns, chunk, chunks)
        begin = max(end, loaded, begin + p.accumulate_latency if chunk else 0)
        hold = timing.step_cycles if chunk < chunks - 1 else timing.last_hold
        end = begin + held * hold(p, vectors, size)
    return begin, end


def matmul_rows(p: TimingParameters, k: int, n: int, size: int) -> int:
    """Rows that a matmul of k x n elements fetches: a burst for each chunk of each column block."""
    chunks, (whole, rest) = -(-k // p.lanes), divmod(n, p.column_block)
    rows = whole * timing.burst_rows(p, p.column_block, size)
    return chunks * (rows + (timing.burst_rows(p, rest, size) if rest else 0))
