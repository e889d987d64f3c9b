"""The fetch engine in cocotb, between a memory with seeded stalls and a consumer; runs inside the simulator.

The memory takes a row's requests on the channels at different times and answers in any skew; the last channel is as
late as `typebar.isa.timing.stall` says. What is expected of each cycle follows from docs/timing.md; addresses follow
from `typebar.isa.layout`.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import cocotb
import numpy as np
from amaranth.lib import data
from cocotb.triggers import Timer

from typebar.hw.control.core import issued_layout
from typebar.hw.control.tickets import Domain
from typebar.hw.memory.fetch import (
    ARRIVAL_CYCLES,
    ARRIVED_BITS,
    FIFO_READ_CYCLES,
    REQUEST_CYCLES,
    hbm_row_bits,
    most_freed,
    port_rows,
)
from typebar.hw.ports import activity_layout
from typebar.isa import timing
from typebar.isa.instructions import BY_NAME, FORMAT_BYTES, HBM_REGIONS, Format
from typebar.isa.layout import packed_layout
from typebar.isa.machine import Machine
from typebar.isa.program import Program, op, tables
from typebar.isa.timing import FETCH_UNIT, HBM_DATA, HBM_REQUEST, Cause
from typebar.sim.timing import run_timing

MACHINE = Machine.load("tiny").override(dict(item.split("=") for item in os.environ["TYPEBAR_MACHINE"].split()))
SCALE = int(os.environ.get("TYPEBAR_FETCH_SCALE", "1"))
P = timing.timing_parameters(MACHINE)
CHANNELS, CHANNEL_BITS, ROWS = MACHINE.hbm.channels, 8 * MACHINE.hbm.channel_bytes, MACHINE.fifo_rows
LAYOUT, ACTIVITY, BASE_BITS = issued_layout(MACHINE, Domain.FETCH), activity_layout(), hbm_row_bits(MACHINE)
BASES = (5, (1 << BASE_BITS - 1) + 3)
"""First rows of the two HBM regions."""
QUIET = 2000
"""Cycles without an event after which a run is taken for hung."""


@dataclass(frozen=True)
class Matrix:
    """A matmul's weights, as its fetch half sees them."""

    k: int
    n: int
    format: Format
    region: int
    line: int
    full: int

    def payload(self, ticket: int) -> int:
        """The bits of the instruction as the core issues it."""
        values = [0] * len(BY_NAME["matmul"].operands)
        for name in ("k", "n", "line"):
            values[[item.name for item in BY_NAME["matmul"].operands].index(name)] = getattr(self, name)
        modifiers, offset = 0, 0
        for item in BY_NAME["matmul"].modifiers:
            modifiers |= getattr(self, item.name, 0) << offset
            offset += item.width
        fields = {"opcode": timing.MATMUL, "modifiers": modifiers, "values": values, "pc": ticket, "ticket": ticket}
        return LAYOUT.const(fields).as_value().value

    def rows(self) -> list[int]:
        """The memory rows to fetch, in order, by the layout's byte offsets of used columns."""
        size = FORMAT_BYTES[self.format]
        layout = packed_layout(self.k, self.n, MACHINE, size, bool(self.full))
        rows: list[int] = []
        for block in range(layout.blocks):
            first, last = block * layout.column_block, min(self.n, (block + 1) * layout.column_block) - 1
            for k in range(0, self.k, layout.lanes):
                begin, end = (int(layout.offset(k, n)) for n in (first, last))
                end += layout.lanes * size
                rows += range(begin // MACHINE.row_bytes, -(-end // MACHINE.row_bytes))
        return [BASES[self.region] + self.line // MACHINE.row_lines + row for row in rows]


def word(row: int, channel: int) -> int:
    """What a channel holds at a row."""
    digest = hashlib.blake2b(f"{row} {channel}".encode(), digest_size=CHANNEL_BITS // 8)
    return int.from_bytes(digest.digest(), "little")


class Memory:
    """All channels of HBM; rows are numbered through the run."""

    def __init__(self, seed: int, skew: bool) -> None:
        self.seed, self.skew, self.random = seed, skew, random.Random(seed)
        self.taken = [0] * CHANNELS
        self.age = [0] * CHANNELS
        self.delays: dict[int, list[int]] = {}
        self.requests: list[list[int]] = [[] for _ in range(CHANNELS)]
        self.last_taken: list[int] = []
        self.usable: list[int] = []
        self.answers: list[list[tuple[int, int, int]]] = [[] for _ in range(CHANNELS)]  # cycle, row, response
        self.errors: set[int] = set()

    def _spread(self, worst: int) -> list[int]:
        """A delay for each channel, the largest being `worst`."""
        delays = [self.random.randint(0, worst) if self.skew else worst for _ in range(CHANNELS)]
        delays[self.random.randrange(CHANNELS)] = worst
        return delays

    def ready(self) -> list[int]:
        """Which channels take what they are asked in this cycle."""
        bits = []
        for channel in range(CHANNELS):
            row = self.taken[channel]
            if row not in self.delays:
                self.delays[row] = self._spread(timing.stall(self.seed, 0, HBM_REQUEST, row))
            bits.append(int(self.age[channel] >= self.delays[row][channel]))
        return bits

    def ask(self, cycle: int, channel: int, address: int, ready: int) -> None:
        """AR of a channel is valid in this cycle."""
        if not ready:
            self.age[channel] += 1
            if self.age[channel] > 1:
                assert address == self.requests[channel][-1], "a request changed while it waited"
            else:
                self.requests[channel].append(address)
            return
        if self.age[channel] == 0:
            self.requests[channel].append(address)
        assert address == self.requests[channel][-1], "a request changed while it waited"
        self.age[channel] = 0
        self.taken[channel] += 1
        if min(self.taken) > len(self.last_taken):
            self._answer(cycle)

    def _answer(self, cycle: int) -> None:
        """All channels have taken a row: when each will deliver its part."""
        row, requested = len(self.last_taken), cycle - REQUEST_CYCLES
        self.last_taken.append(cycle)
        late = timing.stall(self.seed, 0, HBM_DATA, row)
        before = self.usable[-1] + 1 if self.usable else 0
        self.usable.append(max(requested + MACHINE.hbm.latency + late, before))
        last = self.usable[-1] - ARRIVAL_CYCLES
        spread = [12 - early for early in self._spread(12)] if self.skew else [0] * CHANNELS
        spread[self.random.randrange(CHANNELS)] = 0
        for channel, early in enumerate(spread):
            earliest = max([cycle + 1] + [at + 1 for at, _, _ in self.answers[channel][-1:]])
            response = int(self.random.random() < 0.01) * 2
            self.answers[channel].append((max(earliest, last - early), self.requests[channel][row], response))

    def answer(self, cycle: int, channel: int) -> tuple[int, int, int]:
        """R of a channel in this cycle: valid, data, response."""
        queue = self.answers[channel]
        if not queue or queue[0][0] != cycle:
            return 0, 0, 0
        _, address, response = queue.pop(0)
        if response:
            self.errors.add(cycle)
        assert address % MACHINE.hbm.channel_bytes == 0
        return 1, word(address // MACHINE.hbm.channel_bytes, channel), response


class Bench:
    """Drives the engine, one cycle at a time, and checks everything that does not depend on who consumes.

    `offers` are matrices with the cycle from which each is offered; `consume(cycle, arrived)` gives the rows freed.
    """

    def __init__(self, dut: Any, memory: Memory, offers: list[tuple[int, Matrix]]) -> None:
        self.dut, self.memory, self.offers = dut, memory, offers
        self.expected = [item.rows() for _, item in offers]
        self.ends = [int(end) for end in np.cumsum([len(rows) for rows in self.expected])]
        self.rows = [row for rows in self.expected for row in rows]
        self.starts: list[int] = []
        self.frees: list[int] = []  # by row: end of the step that frees it
        self.requests: list[int] = []
        self.causes: Counter[int] = Counter()
        self.reference: Counter[int] = Counter()
        self.fetched = [0] * len(HBM_REGIONS)
        self.waited = [int(random.Random(len(offers)).choice(list(Cause))) for _ in offers]
        self.reads: dict[int, list[int]] = {}
        self.random = random.Random(len(self.rows))
        self.idle = 0

    async def run(self, consume: Callable[[int, int], int]) -> None:
        """From reset until all rows are consumed."""
        dut = self.dut
        for name in ("fetch__valid", "fetch__payload", "waited", "write_slot", "freed", "place"):
            getattr(dut, name).value = 0
        for channel in range(CHANNELS):
            for name in ("ar__ready", "r__valid", "r__payload"):
                getattr(dut, f"hbm__{channel}__{name}").value = 0
        dut.bases.value = sum(base << index * BASE_BITS for index, base in enumerate(BASES))
        dut.rst.value = 1
        for _ in range(2):
            await self._half(0)
            await self._half(1)
        dut.rst.value = 0
        cycle, quiet = 0, 0
        while len(self.frees) < len(self.rows):
            before = len(self.frees), len(self.requests)
            await self._cycle(cycle, consume)
            cycle += 1
            quiet = 0 if before != (len(self.frees), len(self.requests)) else quiet + 1
            assert quiet < QUIET, f"the engine hangs after {len(self.requests)} of {len(self.rows)} rows"
        assert self.causes == self.reference, f"{self.causes} instead of {self.reference}"
        regions = Counter(item.region for (_, item), rows in zip(self.offers, self.expected, strict=True) for _ in rows)
        assert self.fetched == [regions[region] for region in range(len(HBM_REGIONS))]

    async def _half(self, level: int) -> None:
        self.dut.clk.value = level
        await Timer(1, "step")

    async def _cycle(self, cycle: int, consume: Callable[[int, int], int]) -> None:
        dut, memory = self.dut, self.memory
        arrived = sum(at <= cycle for at in memory.usable)
        assert int(dut.arrived.value) == arrived % (1 << ARRIVED_BITS), f"cycle {cycle}"
        assert int(dut.error.value) == (cycle - ARRIVAL_CYCLES in memory.errors), f"cycle {cycle}"
        self._read(cycle, arrived)
        freed = consume(cycle, arrived)
        self.frees += [cycle + 1] * freed
        dut.freed.value = freed
        dut.write_slot.value = int(cycle % P.write_period == P.write_period - 1)
        offered = len(self.starts) < len(self.offers) and self.offers[len(self.starts)][0] <= cycle
        dut.fetch__valid.value = int(offered)
        if offered:
            number = len(self.starts)
            dut.fetch__payload.value = self.offers[number][1].payload(number + 1)
            dut.waited.value = self.waited[number]
        ready = memory.ready()
        for channel in range(CHANNELS):
            valid, value, response = memory.answer(cycle, channel)
            getattr(dut, f"hbm__{channel}__ar__ready").value = ready[channel]
            getattr(dut, f"hbm__{channel}__r__valid").value = valid
            getattr(dut, f"hbm__{channel}__r__payload").value = response << CHANNEL_BITS | value
        await self._half(0)
        self._observe(cycle, ready, offered)
        await self._half(1)

    def _observe(self, cycle: int, ready: list[int], offered: bool) -> None:
        """Requests taken, transfer, tickets and activity in this cycle."""
        dut, memory = self.dut, self.memory
        for channel in range(CHANNELS):
            assert int(getattr(dut, f"hbm__{channel}__r__ready").value) == 1
            if int(getattr(dut, f"hbm__{channel}__ar__valid").value):
                memory.ask(cycle, channel, int(getattr(dut, f"hbm__{channel}__ar__payload").value), ready[channel])
        if len(memory.last_taken) > len(self.requests):
            self._request()
        done = sum(end <= len(self.requests) for end in self.ends)
        assert int(dut.completed.value) == done, f"cycle {cycle}"
        free = done == len(self.starts)
        assert int(dut.fetch__ready.value) == free, f"cycle {cycle}"
        activity = data.Const(ACTIVITY, int(dut.activity.value))
        starts = offered and free
        if starts:
            self.starts.append(cycle)
        assert activity["active"] == (starts or not free), f"cycle {cycle}"
        if not activity["active"]:
            self.idle += 1
        else:
            self.causes += Counter({activity["cause"]: 1})
            if self.idle:
                self.causes += Counter({activity["waited"]: self.idle})
                self.reference += Counter({self.waited[len(self.starts) - 1]: self.idle})
            self.idle = 0
        for region in range(len(HBM_REGIONS)):
            self.fetched[region] += int(dut.fetched.value) >> region & 1

    def _request(self) -> None:
        """The contract's recurrence for the row whose request all channels have just taken."""
        row = len(self.requests)
        number = sum(end <= row for end in self.ends)
        before = self.requests[-1] if self.requests else -1
        earliest = max(before + 1, self.starts[number])
        room = max(earliest, self.frees[row - ROWS] + 1 if row >= ROWS else 0)
        late = timing.stall(self.memory.seed, 0, HBM_REQUEST, row)
        expected = timing.fetch_slot(P, room)
        self.reference += Counter(
            {
                int(Cause.FIFO_FULL): room - earliest,
                int(Cause.WRITE_SLOT): expected - room,
                int(Cause.TRANSFER): 1 + late,
            }
        )
        assert self.memory.last_taken[row] - REQUEST_CYCLES == expected + late, f"row {row}"
        addresses = {self.memory.requests[channel][row] for channel in range(CHANNELS)}
        assert addresses == {self.rows[row] * MACHINE.hbm.channel_bytes}, f"row {row} of {self.offers[number][1]}"
        self.requests.append(expected + late)

    def _read(self, cycle: int, arrived: int) -> None:
        """Check what was asked for FIFO_READ_CYCLES ago, and ask for rows that are there."""
        for index, row in enumerate(self.reads.pop(cycle, [])):
            value = int(self.dut.data.value) >> index * CHANNELS * CHANNEL_BITS
            for channel in range(CHANNELS):
                got = value >> channel * CHANNEL_BITS & (1 << CHANNEL_BITS) - 1
                assert got == word(self.rows[row], channel), f"cycle {cycle}: row {row}, channel {channel}"
        if arrived > len(self.frees):
            first = self.random.randrange(len(self.frees), arrived)
            self.dut.place.value = first % ROWS
            self.reads[cycle + FIFO_READ_CYCLES] = list(range(first, min(first + port_rows(MACHINE), arrived)))


def random_matrix(rng: random.Random, most: int) -> Matrix:
    """A matrix of at most about `most` rows; edges of chunks, blocks and rows are likely."""
    size_of = rng.choice(list(Format))
    lanes, block = MACHINE.matrix.lanes, MACHINE.column_block
    k = rng.choice([1, lanes, lanes + 1, rng.randint(1, 6 * lanes)])
    n = rng.choice([1, block, block + 1, 2 * block - 1, rng.randint(1, 3 * block)])
    n = max(1, min(n, most * MACHINE.row_bytes // (-(-k // lanes) * lanes * FORMAT_BYTES[size_of])))
    line = MACHINE.row_lines * rng.randrange(100)
    return Matrix(k, n, size_of, rng.randrange(len(HBM_REGIONS)), line, rng.randrange(2))


@cocotb.test()
async def any_matrices_for_any_consumer(dut: Any) -> None:
    """Addresses, cycles, data, tickets and activity, with and without stalls, for quick and for slow consumers."""
    rows = 0
    for seed in range(6 * SCALE):
        rng = random.Random(seed)
        offers, at = [], 0
        for _ in range(12):
            at += rng.choice([0, 0, rng.randint(1, 60)])
            offers.append((at, random_matrix(rng, 2 * ROWS)))
        bench = Bench(dut, Memory(seed * 77 if seed % 3 else 0, seed % 2 == 1), offers)
        eagerness = rng.choice([0.02, 0.3, 1.0])

        def consume(
            cycle: int, arrived: int, bench: Bench = bench, rng: random.Random = rng, p: float = eagerness
        ) -> int:
            return rng.randint(0, min(most_freed(MACHINE), arrived - len(bench.frees))) if rng.random() < p else 0

        await bench.run(consume)
        rows += len(bench.rows)
        for cause in (Cause.FIFO_FULL, Cause.WRITE_SLOT):
            assert bench.causes[int(cause)] or seed
    print(f"{rows} rows")


def steps(matrix: Matrix, vectors: int, start: int) -> Iterator[tuple[int, int, int, int]]:
    """The matrix unit's steps: rows needed and consumed in all, first cycle but for them, hold. Send each's begin."""
    size = FORMAT_BYTES[matrix.format]
    modifiers = tables(Program([matmul(matrix, vectors)])).modifiers[0]
    width, before, chunk_begin = timing.fold(P, vectors, size) * P.columns, 0, start
    chunks = -(-matrix.k // P.lanes)
    end = start
    for first in range(0, matrix.n, P.column_block):
        columns, sums = min(P.column_block, matrix.n - first), {}
        for chunk in range(chunks):
            load = timing.chunk_load(P, modifiers, vectors, columns, chunk, chunks)
            last = chunk == chunks - 1
            hold = (timing.last_hold if last else timing.step_cycles)(P, vectors, size)
            for step in range(-(-columns // width)):
                earliest = max(end, chunk_begin + load if step == 0 else 0, sums.get(step, 0))
                need = before + timing.rows_needed(P, columns, width, step, size)
                used = before + timing.rows_consumed(P, columns, width, step, size)
                begin = yield need, used, earliest, hold
                sums[step], end = begin + P.accumulate_latency, begin + hold
                chunk_begin = begin if step == 0 else chunk_begin
            before += timing.burst_rows(P, columns, size)


def matmul(matrix: Matrix, vectors: int) -> Any:
    """The instruction, all of its operands in the same few words."""
    stride = MACHINE.vector.align * -(-matrix.n // MACHINE.vector.align)
    names = {name: getattr(matrix, name) for name in ("k", "n", "line", "region", "full")}
    apart = {"src_inner": stride, "dst_inner": stride, "src": MACHINE.vector.words // 2}
    return op("matmul", format=int(matrix.format), outer=1, inner=vectors, **apart, **names)


class Consumer:
    """The matrix unit, by the contract: step after step of the matmuls, each from its simulated start on."""

    def __init__(self, items: list[tuple[Matrix, int]], starts: list[int]) -> None:
        self.items, self.starts, self.ends = items, starts, [-1] * len(items)
        self.number, self.base, self.used, self.freeing = -1, 0, 0, (-1, 0)
        self._next()

    def _next(self) -> None:
        self.base, self.used = self.used, self.used
        self.number += 1
        if self.number < len(self.items):
            self.steps: Any = steps(*self.items[self.number], self.starts[self.number])
            self.step = next(self.steps)

    def __call__(self, cycle: int, arrived: int) -> int:
        """Rows freed in this cycle, the last of a step."""
        if self.freeing[0] < cycle and self.number < len(self.items):
            need, used, earliest, hold = self.step
            if cycle >= earliest and arrived >= self.base + need:
                self.freeing = cycle + hold - 1, self.base + used - self.used
                self.used, self.ends[self.number] = self.base + used, cycle + hold
                try:
                    self.step = self.steps.send(cycle)
                except StopIteration:
                    self._next()
        return self.freeing[1] if self.freeing[0] == cycle else 0


@cocotb.test()
async def requests_are_the_timing_simulators(dut: Any) -> None:
    """First and last requests of matmuls, and ends of their compute halves, equal the timing simulator's."""
    for seed in range(4 * SCALE):
        rng = random.Random(100 + seed)
        count = min(16, MACHINE.control.queue_depth)
        most = min(
            MACHINE.matrix.vectors, MACHINE.vector.words // 4 // (3 * MACHINE.column_block + MACHINE.vector.align)
        )
        items = [(random_matrix(rng, 3 * ROWS), rng.choice([1, 1, rng.randint(1, most)])) for _ in range(count)]
        stall_seed = seed * 1234567
        program = Program([*(matmul(matrix, vectors) for matrix, vectors in items), op("halt")])
        result = run_timing(program, MACHINE, 1, np.zeros((1, 16), np.int32), trace=True, stall_seed=stall_seed)
        trace = result.trace
        assert trace is not None
        slices = {
            unit: [(int(a), int(b)) for a, b in zip(trace.start[mine], trace.end[mine], strict=True)]
            for unit in (1, FETCH_UNIT)
            for mine in [trace.unit == unit]
        }
        consumer = Consumer(items, [start for start, _ in slices[1]])
        # Instruction i issues in cycle i: the queue is deep enough and nothing else is there.
        bench = Bench(dut, Memory(stall_seed, bool(seed % 2)), [(i + 1, item) for i, (item, _) in enumerate(items)])
        await bench.run(consumer)
        edges = [(first, end - 1) for first, end in slices[FETCH_UNIT]]
        firsts = [0, *bench.ends[:-1]]
        got = [(bench.requests[first], bench.requests[end - 1]) for first, end in zip(firsts, bench.ends, strict=True)]
        assert got == edges, f"seed {seed}"
        assert consumer.ends == [end for _, end in slices[1]], f"seed {seed}"
