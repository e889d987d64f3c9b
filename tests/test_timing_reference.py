"""The timing simulator against an independent reference that steps through the contract cycle by cycle.

The reference shares no formula with the simulator, only the seeded stalls of the world outside: it enumerates bytes and
rows, keeps real queues and a FIFO, and asks in every cycle what may happen in that cycle.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from typebar.isa.errors import TypebarError
from typebar.isa.machine import Machine
from typebar.isa.program import Op, Operand, Program, op
from typebar.isa.timing import COUNTERS, UNIT_NAMES, Cause, stall
from typebar.sim.timing import TimingResult, run_timing

SIZES = (2, 2, 1, 4)
REDUCTIONS = ("vsum", "vsumsq", "vrmax", "vargmax")
UNITS = ("matrix", "vector", "memory", "ring")
CHARGED = [(unit, cause) for unit in UNITS for cause in ("issue", *UNITS)]
CHARGED += [("memory", "fetch"), ("matrix", "compute"), ("matrix", "weights"), ("matrix", "accumulate")]
CHARGED += [("matrix", "operands")]
"""Causes that the reference works out, cycle for cycle."""


@dataclass
class Step:
    """A step of a matmul: rows needed and freed, its column group, whether it opens a column block, the cycles it
    holds, and, if it opens a chunk, the cycles that the chunk's operands take to load."""

    needed: int
    freed: int
    group: int
    first: bool
    hold: int
    load: int = 0


@dataclass(eq=False)
class Instruction:
    """One executed instruction; `waits` are older ones whose completion it needs, `rows` its KV row range."""

    pc: int
    op: Op
    values: dict[str, int]
    issued: int
    waits: list[Instruction] = field(default_factory=list)
    start: int = -1
    done: int = -1
    over: int = -1
    rows: tuple[int, int] | None = None
    row_waits: list[Instruction] = field(default_factory=list)
    requests: list[int] = field(default_factory=list)
    usable: list[int] = field(default_factory=list)  # cycle from which each requested row's bytes are there
    steps: list[Step] = field(default_factory=list)
    left: int = 0
    loading: int = -1  # cycle in which the next chunk's operands began to load
    stepped: int = 0
    groups: dict[int, int] = field(default_factory=dict)
    reads: set[int] = field(default_factory=set)
    writes: set[int] = field(default_factory=set)

    def complete(self, cycle: int) -> bool:
        return 0 <= self.done <= cycle


def ceil(a: int, b: int) -> int:
    return (a + b - 1) // b


class Device:
    def __init__(self, rank: int, ring: list[Device], program: Program, m: Machine, seed: int) -> None:
        self.rank, self.ring, self.program, self.m, self.seed = rank, ring, program, m, seed
        self.registers = [0] * 32
        self.registers[1] = rank
        self.pc, self.next_issue, self.halted = 0, 0, -1
        self.waiting: Instruction | None = None
        self.queues: dict[str, deque[Instruction]] = {u: deque() for u in ("MATRIX", "VECTOR", "MEMORY", "RING")}
        self.current: dict[str, Instruction | None] = dict.fromkeys(self.queues)
        self.busy_until = dict.fromkeys(self.queues, 0)
        self.last_done = dict.fromkeys(self.queues, 0)
        self.every: list[Instruction] = []
        self.fetch_queue: deque[Instruction] = deque()
        self.row_ends: list[int] = []  # cycle in which each consumed row's place became free
        self.requested = 0
        self.request_cycle: dict[int, int] = {}  # by running row number
        self.fetch_counts = {"transfer": 0, "fifo_full": 0, "write_slot": 0}
        self.request_delay = -1  # cycles by which the next request is still delayed; -1: not drawn
        self.last_usable = 0
        self.lines = 0
        self.waited: Counter[tuple[str, str]] = Counter()  # cycles by unit and cause
        self.last_reduction: Instruction | None = None
        self.last_left = 0  # cycle in which the vector unit's last element result is there
        self.gathers: list[Instruction] = []
        self.arrivals: dict[tuple[int, int, int], int] = {}  # (gather, direction, block) -> when its sending began
        self.sends: dict[tuple[int, int], list[int]] = {}  # (gather, direction) -> start cycles
        self.ring_rows = self.ring_written = 0  # rows of the gather received and written; when the last of them was
        self.slices: list[tuple[int, str, int, int, int]] = []
        self.log: list[tuple[int, int, int, int, int]] = []

    # What an instruction touches ----------------------------------------------------------------------
    def flag(self, i: Instruction, name: str) -> int:
        value = i.op.get(name)
        assert isinstance(value, int)
        return value

    def accesses(self, i: Instruction) -> tuple[set[int], set[int]]:
        v, name = i.values, i.op.kind.name
        reads: set[int] = set()
        writes: set[int] = set()

        def add(into: set[int], base: int, words: int) -> None:
            into |= {w // self.m.segment_words for w in range(base, base + words)}

        if name == "matmul":
            if v["outer"] * v["inner"]:
                for side, words, into in (("src", v["k"], reads), ("dst", v["n"], writes)):
                    last = (v["outer"] - 1) * v[f"{side}_outer"] + (v["inner"] - 1) * v[f"{side}_inner"]
                    add(into, v[side], last + words if words else 0)
                if self.flag(i, "accumulate"):
                    reads |= writes
                scaling, patch = self.flag(i, "scaling"), self.flag(i, "patch")
                add(reads, v["scale"], (0, min(1, v["n"]), v["n"])[scaling])
                add(reads, v["bias"], v["n"] * self.flag(i, "add_bias"))
                add(reads, v["patch_src"], (0, v["k"], v["n"])[patch])
                add(writes, v["maximum"], v["outer"] * v["inner"] * self.flag(i, "row_max"))
        elif name == "gather":
            add(reads, v["a"], v["n"])
            add(writes, v["dst"], v["n"] * len(self.ring))
        elif name == "load":
            add(writes, v["dst"], v["n"])
        elif name == "store":
            add(reads, v["a"], v["outer"] * v["inner"])
        elif name == "vwrite":
            add(writes, v["dst"], 1)
        elif name in REDUCTIONS:
            add(reads, v["a"], v["n"])
            add(writes, v["dst"], 2 if name == "vargmax" else 1)
        elif name == "vchain":
            for part, words in self.chain_reads(i).items():
                add(reads, v[part], words)
            add(writes, v["dst"], v["n"] * self.flag(i, "write"))
            add(writes, v["result"], min(1, self.flag(i, "reduce")))
        elif i.op.kind.unit.name == "VECTOR":
            add(writes, v["dst"], v["n"])
            if "a" in v:
                add(reads, v["a"], v["n"])
            if "b" in v:
                add(reads, v["b"], (v["n"], min(1, v["n"]), 0)[self.flag(i, "b_from")])
        return reads, writes

    def chain_reads(self, i: Instruction) -> dict[str, int]:
        """Words of each operand that a chain reads."""
        n = i.values["n"]
        second = (n, min(1, n), 0)[self.flag(i, "b_from")] if self.flag(i, "operation") else 0
        return {"a": n, "b": second, "scale": min(1, n) * (self.flag(i, "scale_from") == 1)}

    def hazards(self, i: Instruction) -> None:
        reads, writes = self.accesses(i)
        for segment in reads | writes:
            last = next((older for older in reversed(self.every) if segment in older.writes), None)
            written = segment in writes and not (last and self.in_order(last, i, segment))
            if last and (written or (segment in reads and not self.follows(last, i, segment))):
                i.waits.append(last)
        for older in self.every:
            if older.op.kind.unit != i.op.kind.unit and older.reads & writes:
                i.waits.append(older)
        i.reads, i.writes = reads, writes
        if i.op.kind.name in ("load", "sload"):
            region = i.op.get("region")
            i.waits += [o for o in self.every if "store" in o.op.kind.name and o.op.get("region") == region]

    def reduces(self, i: Instruction) -> bool:
        name = i.op.kind.name
        return name in REDUCTIONS or (name == "vchain" and self.flag(i, "reduce") != 0)

    def late(self, i: Instruction, segment: int) -> bool:
        """Whether what an instruction writes last in a segment is the result of a reduction."""
        place = i.values.get("result" if i.op.kind.name == "vchain" else "dst", 0)
        return self.reduces(i) and (i.op.kind.name != "vchain" or place // self.m.segment_words == segment)

    def in_order(self, older: Instruction, i: Instruction, segment: int) -> bool:
        """Whether the younger of two instructions' results in a segment is written later in any case.

        A chain may write both elements and a result there; its elements are written first.
        """
        if older.op.kind.unit != i.op.kind.unit or not self.late(older, segment):
            return older.op.kind.unit == i.op.kind.unit
        elements = range(i.values["dst"], i.values["dst"] + i.values.get("n", 1))
        if i.op.kind.name == "vchain" and not self.flag(i, "write"):
            elements = range(0)
        return self.late(i, segment) and (
            i.op.kind.name in REDUCTIONS or all(word // self.m.segment_words != segment for word in elements)
        )

    def follows(self, older: Instruction, i: Instruction, segment: int) -> bool:
        """Whether the unit has the older one's rows where, and as long as, the younger one reads them in turn."""
        if {older.op.kind.unit.name, i.op.kind.unit.name} != {"VECTOR"} or self.late(older, segment):
            return False
        if self.rows(older) <= self.element_latency(older):
            return False
        rows, lanes = set(), self.m.vector.lanes
        reads = {"a": i.values["n"]} if "a" in i.values else {}
        if i.op.kind.name == "vchain":
            reads = self.chain_reads(i)
        elif "b" in i.values and "n" in i.values:
            reads["b"] = (i.values["n"], 1, 0)[self.flag(i, "b_from")]
        for name, words in reads.items():
            first = i.values[name]
            if any(word // self.m.segment_words == segment for word in range(first, first + words)):
                rows.add(first // lanes)
        return rows == {older.values["dst"] // lanes}

    def plan_matmul(self, i: Instruction) -> None:
        """Enumerate bursts byte by byte: rows each step needs in all, rows it frees, the range of rows."""
        v, m = i.values, self.m
        e, lanes, width = SIZES[self.flag(i, "format")], m.matrix.lanes, m.column_block
        vectors, k, n = v["outer"] * v["inner"], v["k"], v["n"]
        if not (vectors and n):
            return
        fold = m.fold(vectors, e)
        port = ceil(fold * m.matrix.columns * lanes * e, m.matrix.fifo_port_bytes)
        per_step, rows_so_far, freed, chunks = fold * m.matrix.columns, 0, 0, ceil(k, lanes)
        hold = max(ceil(vectors, m.matrix.rows), port)
        results = vectors * len(range(0, per_step, m.vector.lanes))
        last_byte = 0
        for block in range(ceil(n, width)):
            columns = min(width, n - block * width)
            stored = width if self.flag(i, "full") else ceil(columns, m.column_granule(e)) * m.column_granule(e)
            there = {"scale": self.flag(i, "scaling") == 2, "bias": self.flag(i, "add_bias")}
            operands = [name for name, used in there.items() if used]
            late = [(name, row) for name in operands for row in range(0, columns, m.vector.lanes)]
            for chunk in range(chunks):
                base = v["line"] * 64 + (block * chunks * width + chunk * stored) * lanes * e
                assert base % m.row_bytes == 0
                last_byte = base + columns * lanes * e - 1
                load = self.operand_rows(i, columns, chunk == 0)
                several = len(late) if chunk == chunks - 1 else len(range(0, lanes, m.vector.lanes))
                load += len(late[:several])
                del late[:several]
                for group, first in enumerate(range(0, columns, per_step)):
                    end = min(first + per_step, columns) * lanes * e
                    needed = (end - 1) // m.row_bytes + 1
                    gone = needed if end == columns * lanes * e else end // m.row_bytes
                    held = max(hold, results) if chunk == chunks - 1 else hold
                    step = Step(rows_so_far + needed, rows_so_far + gone - freed, group, chunk == 0, held)
                    step.load = load if group == 0 else 0
                    i.steps.append(step)
                    freed = rows_so_far + gone
                rows_so_far += ceil(columns * lanes * e, m.row_bytes)
        if i.op.get("region") == 1:
            i.rows = (v["line"] * 64 // m.row_bytes, last_byte // m.row_bytes)
        self.fetch_queue.append(i)

    def operand_rows(self, i: Instruction, columns: int, opens_block: bool) -> int:
        """Rows of the register file read for a chunk: its part of each vector, and the epilogue's for the block."""
        v, width, rows = i.values, self.m.vector.lanes, 0
        vectors, patch, scaling = v["outer"] * v["inner"], self.flag(i, "patch"), self.flag(i, "scaling")
        for _ in range(vectors + (patch == 1)):
            rows += len(range(0, self.m.matrix.lanes, width))
        if opens_block:
            whole = [patch == 2, *[self.flag(i, "accumulate")] * vectors]
            rows += sum(map(bool, whole)) * len(range(0, columns, width)) + (scaling == 1)
        return rows

    def bytes_of(self, i: Instruction) -> list[list[int]]:
        """Byte addresses of every element, one list for each outer count."""
        v = i.values
        base = v["line"] * 64 + v["byte"]
        if i.op.kind.name in ("sload", "sstore"):
            return [[base]]
        e = SIZES[self.flag(i, "format")]
        if i.op.kind.name == "load":
            return [[base + j * e for j in range(v["n"])]]
        return [
            [base + o * v["outer_bytes"] + j * v["inner_bytes"] for j in range(v["inner"])] for o in range(v["outer"])
        ]

    # A cycle -------------------------------------------------------------------------------------------
    def is_write_slot(self, c: int) -> bool:
        rows = self.m.hbm.rows_per_write_slot
        return c % (rows + 1) == rows

    def finish(self, i: Instruction, done: int) -> None:
        unit = i.op.kind.unit.name
        i.done = max(done, self.last_done[unit])
        self.last_done[unit] = i.done

    def start_units(self, c: int) -> None:
        for unit, queue in self.queues.items():
            if not queue or self.current[unit] or c < self.busy_until[unit] or c <= queue[0].issued:
                continue
            i = queue[0]
            reduction = self.last_reduction if self.reduces(i) else None
            if reduction and self.levels(reduction) <= self.levels(i) and self.squares(reduction) <= self.squares(i):
                reduction = None
            if unit == "VECTOR" and c + self.element_latency(i) < self.last_left:
                continue
            if not all(w.complete(c) for w in i.waits) or (reduction and not reduction.complete(c)):
                continue
            if unit == "MEMORY" and any(w.over < 0 or w.over > c for w in i.row_waits):
                continue
            queue.popleft()
            i.start = c
            left = unit == "VECTOR" and c + self.element_latency(i) == self.last_left
            self.charge_idle(i, unit, c, [*i.waits, reduction] if reduction else i.waits, left)
            if self.reduces(i):
                self.last_reduction = i
            getattr(self, f"start_{unit.lower()}")(i, c)

    def charge_idle(self, i: Instruction, unit: str, c: int, waits: list[Instruction], left: bool) -> None:
        """Charge the idle cycles before a start to what ended them; `left`: older results have left the vector unit."""
        causes = [w.op.kind.unit for w in waits if w.done == c] + [i.op.kind.unit] * left
        cause = "fetch"
        if c == i.issued + 1:
            cause = "issue"
        elif causes:
            cause = min(causes).name.lower()
        self.waited[unit.lower(), cause] += c - self.busy_until[unit]

    def stall(self, port: int, index: int) -> int:
        return stall(self.seed, self.rank, port, index)

    def rows(self, i: Instruction) -> int:
        return max(1, ceil(i.values.get("n", 1), self.m.vector.lanes))

    def element_latency(self, i: Instruction) -> int:
        v, name = self.m.vector, i.op.kind.name
        function = name == "vunary" or (name == "vchain" and self.flag(i, "function") != 0)
        return v.latency + (v.unary_latency if function else 0)

    def squares(self, i: Instruction) -> bool:
        return i.op.kind.name == "vchain" and i.op.get("reduce") == 2

    def levels(self, i: Instruction) -> int:
        """Levels of the tree over a reduction's rows."""
        return (self.rows(i) - 1).bit_length()

    def start_vector(self, i: Instruction, c: int) -> None:
        v, name = self.m.vector, i.op.kind.name
        beats = self.rows(i) + (name == "vchain" and self.flag(i, "scale_from") == 1)
        tree = v.reduce_latency + v.add_latency * (v.lanes.bit_length() - 1 + self.levels(i) + self.squares(i))
        self.occupy(i, c + beats)
        self.last_left = c + beats + self.element_latency(i)
        self.finish(i, self.last_left + (tree if self.reduces(i) else 0))

    def occupy(self, i: Instruction, end: int) -> None:
        unit = i.op.kind.unit.name
        self.busy_until[unit] = end
        self.slices.append((self.rank, unit.lower(), i.start, end, i.pc))

    def start_memory(self, i: Instruction, c: int) -> None:
        places = self.bytes_of(i)
        if i.op.kind.name == "store" and i.op.get("region") == 1:
            i.left = sum(len({b // self.m.row_bytes for b in run}) for run in places)
            i.loading = c + sum(max(self.pieces(i), n) for n in self.lines_of(i, places))
            if i.left:
                self.current["MEMORY"] = i
            else:
                self.occupy(i, c + 1)
                self.finish(i, c + 1 + self.m.hbm.latency)
            return
        lines, each = self.lines_of(i, places), 64 // self.m.ddr.bytes_per_cycle
        if i.op.kind.name in ("load", "sload"):
            beats = max(1, each * sum(lines), len(range(0, i.values.get("n", 1), self.m.vector.lanes)))
            beats += sum(self.stall(2, self.lines + j) for j in range(sum(lines)))
            self.lines += sum(lines)
        else:
            beats = max(1, sum(max(self.pieces(i), n * each) for n in lines))
        self.occupy(i, c + beats)
        self.finish(i, c + beats + self.m.ddr.latency)
        if i.op.kind.name == "sstore" and i.op.get("region") == 4:
            v = i.values
            self.log.append((i.done, self.rank, v["line"], v["byte"], v["value"]))

    def lines_of(self, i: Instruction, places: list[list[int]]) -> list[int]:
        """Lines that each outer row touches."""
        e = 4 if i.op.kind.name[0] == "s" and i.op.kind.name != "store" else SIZES[self.flag(i, "format")]
        return [len({b // 64 for b in run} | {(b + e - 1) // 64 for b in run}) for run in places]

    def pieces(self, i: Instruction) -> int:
        """Reads of the register file for one outer row of a store."""
        if i.op.kind.name == "sstore":
            return 0
        together = i.values["inner_bytes"] == SIZES[self.flag(i, "format")]
        return len(range(0, i.values["inner"], self.m.vector.lanes if together else 1))

    def start_matrix(self, i: Instruction, c: int) -> None:
        x = self.m.matrix
        if i.steps:
            self.current["MATRIX"] = i
            self.busy_until["MATRIX"] = i.loading = c
        else:
            self.waited["matrix", "compute"] += 1
            self.occupy(i, c + 1)
            self.finish(i, c + 1 + x.dot_latency + x.accumulate_latency + x.epilogue_latency)

    def start_ring(self, i: Instruction, c: int) -> None:
        self.gathers.append(i)
        self.current["RING"] = i

    def step_memory(self, c: int) -> None:
        i = self.current["MEMORY"]
        if i:
            i.left -= self.is_write_slot(c)
            if i.left <= 0 and c + 1 >= i.loading:
                self.occupy(i, c + 1)
                self.finish(i, c + 1 + self.m.hbm.latency)
                self.current["MEMORY"] = None

    def step_fetch(self, c: int) -> None:
        if not self.fetch_queue:
            return
        i = self.fetch_queue[0]
        if c <= i.issued or (i.start < 0 and not self.m.control.run_ahead):
            return
        if not all(w.complete(c) for w in i.row_waits):
            return
        held = self.requested - sum(end < c for end in self.row_ends)
        if held >= self.m.hbm.fifo_bytes // self.m.row_bytes:
            self.fetch_counts["fifo_full"] += 1
            return
        if self.request_delay < 0:
            # The row shows in a fetch slot; how long it then waits to be taken is no matter of slots.
            if self.is_write_slot(c):
                self.fetch_counts["write_slot"] += 1
                return
            self.request_delay = self.stall(0, self.requested)
        if self.request_delay > 0:
            self.request_delay -= 1
            self.fetch_counts["transfer"] += 1
        else:
            self.fetch_counts["transfer"] += 1
            i.requests.append(c)
            self.last_usable = max(self.last_usable + 1, c + self.m.hbm.latency + self.stall(1, self.requested))
            i.usable.append(self.last_usable)
            self.requested += 1
            self.request_delay = -1
            if len(i.requests) == i.steps[-1].needed:
                i.over = c + 1
                self.slices.append((self.rank, "fetch", i.requests[0], c + 1, i.pc))
                self.fetch_queue.popleft()

    def step_matrix(self, c: int) -> None:
        i, x = self.current["MATRIX"], self.m.matrix
        if not i or c < self.busy_until["MATRIX"]:
            return
        step = i.steps[i.stepped]
        if len(i.requests) < step.needed:
            return
        ready = {"weights": i.usable[step.needed - 1]}
        if not step.first:
            ready["accumulate"] = i.groups[step.group] + x.accumulate_latency
        if step.load:
            ready["operands"] = i.loading + step.load
        if c < max(ready.values()):
            return
        if c > self.busy_until["MATRIX"]:
            cause = next(name for name, cycle in ready.items() if cycle == c)
            self.waited["matrix", cause] += c - self.busy_until["MATRIX"]
        if step.load:
            i.loading = c
        i.groups[step.group] = c
        i.stepped += 1
        end = c + step.hold
        self.waited["matrix", "compute"] += step.hold
        self.row_ends += [end] * step.freed
        self.busy_until["MATRIX"] = end
        if i.stepped == len(i.steps):
            self.occupy(i, end)
            self.finish(i, end + x.dot_latency + x.accumulate_latency + x.epilogue_latency)
            self.current["MATRIX"] = None

    def step_ring(self, c: int) -> None:
        i = self.current["RING"]
        if not i:
            return
        number, devices, n = len(self.gathers) - 1, len(self.ring), i.values["n"]
        hops = (devices // 2, (devices - 1) // 2)
        last = i.start + self.m.ring.setup_latency + ceil(n, self.m.vector.lanes)
        whole = True
        for direction in range(2):
            sends = self.sends.setdefault((number, direction), [])
            block = len(sends)
            here = i.start + self.m.ring.setup_latency
            if block:
                here = self.row_times(number, direction, block, n)[0] if self.received(number, direction, block) else -1
            takes = [
                self.link_time(n) + self.stall(3 + direction, number * hops[direction] + j) for j in range(devices)
            ]
            free = sends[-1] + takes[block - 1] if sends else 0
            if block < hops[direction] and 0 <= here <= c and free <= c:
                sends.append(c)
                neighbour = self.ring[(self.rank + (1 if direction == 0 else -1)) % devices]
                neighbour.arrivals[number, direction, block + 1] = c + takes[block] - self.link_time(n)
            whole = whole and len(sends) == hops[direction]
            whole = whole and all(self.received(number, direction, j) for j in range(1, hops[direction] + 1))
            last = max([last, *(s + took for s, took in zip(sends, takes, strict=False))])
        self.write_row(i, c, number, n)
        if whole and self.ring_rows == len(self.all_rows(number, n)) and c >= max(last, self.ring_written):
            last = max(last, self.ring_written)
            self.ring_rows = self.ring_written = 0
            self.current["RING"] = None
            self.occupy(i, last + 1)
            self.finish(i, last + 1)

    def link_time(self, words: int) -> int:
        return max(1, ceil(words * 32 * self.m.clock_mhz, self.m.ring.megabits_per_second))

    def received(self, number: int, direction: int, block: int) -> bool:
        return (number, direction, block) in self.arrivals

    def row_times(self, number: int, direction: int, block: int, n: int) -> list[int]:
        """When each row of a received block has come; that of an empty block stands for it."""
        began, lanes = self.arrivals[number, direction, block], self.m.vector.lanes
        ends = [min(n, end + lanes) for end in range(0, max(n, 1), lanes)]
        return [began + self.link_time(words) + self.m.ring.hop_latency for words in ends]

    def all_rows(self, number: int, n: int) -> list[int]:
        blocks = [key[1:] for key in self.arrivals if key[0] == number]
        return sorted(time for block in blocks for time in self.row_times(number, *block, n))

    def write_row(self, i: Instruction, c: int, number: int, n: int) -> None:
        """One received row in a cycle, after the own ones; rows of empty blocks take none."""
        own = i.start + self.m.ring.setup_latency + ceil(n, self.m.vector.lanes)
        come = [time for time in self.all_rows(number, n) if time <= c + 1]
        if c >= own and n and self.ring_rows < len(come):
            self.ring_rows += 1
            self.ring_written = c + 1
        elif n == 0:
            self.ring_rows = len(come)
            self.ring_written = max([0, *come])

    def step_issue(self, c: int) -> None:
        if self.halted >= 0 or c < self.next_issue:
            return
        if self.waiting:
            if not self.waiting.complete(c):
                return
            self.waiting = None
        o = self.program.ops[self.pc]
        name, unit = o.kind.name, o.kind.unit.name
        values = {}
        for item in o.kind.operands:
            value = o.get(item.name)
            assert isinstance(value, Operand)
            values[item.name] = self.registers[value.register] + value.immediate
        if unit != "SCALAR":
            if len(self.queues[unit]) >= self.m.control.queue_depth:
                return
            self.enqueue(Instruction(self.pc, o, values, c))
            self.next_issue = c + 1
            if name == "sload":
                self.waiting = self.every[-1]
                self.registers[self.flag(self.waiting, "rd")] = 0
        elif name in ("halt", "fence"):
            if not all(i.complete(c) for i in self.every):
                return
            self.halted = c + 1 if name == "halt" else -1
            self.next_issue = c + 1
        elif name == "vread":
            segment = values["a"] // self.m.segment_words
            writers = [i for i in self.every if segment in i.writes]
            if not all(i.complete(c) for i in (*writers[-1:], *(o for o in self.every if o.op.kind.name == "gather"))):
                return
            self.next_issue = c + self.m.control.read_latency
        else:
            self.next_issue = c + 1
            if name == "bne" and values["a"] != values["b"]:
                self.pc, self.next_issue = int(str(o.get("to"))), c + self.m.control.branch_cycles
                return
            if name in ("sadd", "smul"):
                a, b = values["a"], values["b"]
                self.registers[int(str(o.get("rd")))] = a + b if name == "sadd" else a * b
        self.pc += 1

    def enqueue(self, i: Instruction) -> None:
        self.hazards(i)
        if i.op.kind.name == "matmul":
            self.plan_matmul(i)
            partners = "store"
        elif i.op.kind.name == "store" and i.op.get("region") == 1:
            places = [b // self.m.row_bytes for run in self.bytes_of(i) for b in run]
            i.rows = (min(places), max(places)) if places else None
            partners = "matmul"
        if i.rows:
            lo, hi = i.rows
            near = [o for o in self.every if o.rows and o.rows[0] <= hi and o.rows[1] >= lo]
            i.row_waits = [o for o in near if o.op.kind.name == partners]
        self.queues[i.op.kind.unit.name].append(i)
        self.every.append(i)


def reference(program: Program, m: Machine, devices: int, seed: int, limit: int = 200_000) -> tuple[list[Device], int]:
    ring: list[Device] = []
    for rank in range(devices):
        ring.append(Device(rank, ring, program, m, seed))
        ring[-1].registers[2] = devices
    for c in range(limit):
        for d in ring:
            d.start_units(c)
        for d in ring:
            d.step_memory(c)
            d.step_fetch(c)
            d.step_matrix(c)
            d.step_ring(c)
        for d in ring:
            d.step_issue(c)
        if all(d.halted >= 0 for d in ring):
            return ring, max(d.halted for d in ring)
    raise AssertionError("the reference did not end")


# Random machines and programs -------------------------------------------------------------------------------
def random_machine(rng: random.Random) -> Machine:
    """A small machine whose every parameter that moves time is drawn; few segments, so that hazards abound."""
    pick = rng.choice
    while True:
        settings = {
            "attention_block": 64,
            "matrix.lanes": pick([4, 8]),
            "matrix.columns": pick([2, 4]),
            "matrix.rows": pick([1, 2, 4]),
            "matrix.interleave": pick([4, 8]),
            "matrix.fifo_port_bytes": pick([32, 64, 128]),
            "matrix.dot_latency": pick([1, 6]),
            "matrix.accumulate_latency": pick([1, 4, 13]),
            "matrix.epilogue_latency": pick([1, 9]),
            "vector.words": 512,
            "vector.segments": pick([8, 16]),
            "vector.lanes": pick([2, 4, 8]),
            "vector.latency": pick([1, 5, 14]),
            "vector.unary_latency": pick([0, 3, 11]),
            "vector.reduce_latency": pick([0, 2]),
            "vector.add_latency": pick([1, 4]),
            "hbm.latency": pick([1, 7, 30]),
            "hbm.rows_per_write_slot": pick([1, 2, 5]),
            "hbm.fifo_bytes": pick([256, 512, 1024, 4096]),
            "ddr.bytes_per_cycle": pick([4, 16, 64]),
            "ddr.latency": pick([1, 25]),
            "ring.megabits_per_second": pick([1600, 12800]),
            "ring.hop_latency": pick([1, 20]),
            "ring.setup_latency": pick([1, 4]),
            "control.queue_depth": pick([1, 2, 5]),
            "control.branch_cycles": pick([1, 3]),
            "control.read_latency": pick([1, 4]),
            "control.run_ahead": pick(["true", "false"]),
        }
        try:
            machine = Machine.load("tiny").override({key: str(value) for key, value in settings.items()})
            run_timing(Program([op("halt")]), machine, 1, np.zeros((1, 0), np.int32))
            return machine
        except TypebarError:
            continue


def random_matmul(rng: random.Random) -> Op:
    outer, inner = rng.choice([(1, 1), (1, 1), (2, 1), (1, 3), (2, 3), (0, 1)])
    k, n = rng.choice([1, 5, 8, 20, 33]), rng.choice([0, 3, 8, 16, 17, 40])
    return op(
        "matmul",
        format=rng.randrange(4),
        region=rng.randrange(2),
        full=rng.randrange(2),
        accumulate=rng.randrange(2),
        patch=rng.randrange(3),
        scaling=rng.randrange(3),
        add_bias=rng.randrange(2),
        row_max=rng.randrange(2),
        dst=rng.randrange(20) * 8,
        src=rng.randrange(20) * 8,
        k=k,
        n=Operand(1, n),
        line=2 * rng.randrange(12),
        outer=outer,
        inner=inner,
        src_outer=rng.choice([0, 40]),
        src_inner=rng.choice([0, 48]),
        dst_outer=rng.choice([0, 64]),
        dst_inner=rng.choice([0, 48]),
        scale=rng.randrange(300),
        bias=rng.randrange(300),
        maximum=rng.randrange(300),
        patch_src=rng.randrange(300),
        patch_at=rng.randrange(10),
    )


def random_op(rng: random.Random) -> Op:
    address = rng.choice([Operand(0, 8 * rng.randrange(40)), Operand(5, 8 * rng.randrange(20))])
    n, other = rng.choice([0, 1, 8, 13, 40]), 8 * rng.randrange(40)
    kind = rng.randrange(13)
    if kind < 3:
        return random_matmul(rng)
    if kind == 3:
        name = rng.choice(["vadd", "vmul", "vmax", "vsub"])
        return op(name, dst=address, a=other, b=rng.randrange(300), n=n, b_from=rng.randrange(3))
    if kind == 4:
        return op("vmov", dst=address, b=other, n=n, b_from=rng.randrange(3))
    if kind == 5:
        return op(rng.choice(["vsum", "vsumsq", "vrmax", "vargmax"]), dst=rng.randrange(300), a=address, n=n)
    if kind == 12:
        return op(
            "vchain",
            dst=address,
            a=rng.choice([address, Operand(0, other)]),
            b=rng.choice([other, rng.randrange(300)]),
            n=n,
            scale=rng.randrange(300),
            result=rng.randrange(300),
            b_from=rng.randrange(3),
            scale_from=rng.randrange(3),
            operation=rng.randrange(5),
            write=int(rng.random() < 0.75),
            reduce=rng.randrange(4),
            function=rng.choice([0, 0, 1]),
        )
    if kind == 6:
        return rng.choice([op("vunary", dst=address, a=other, n=n), op("vwrite", dst=rng.randrange(512), b=3)])
    if kind == 7:
        return op("load", format=rng.randrange(4), region=4, dst=address, line=rng.randrange(9), byte=4, n=n)
    if kind == 8:
        return op(
            "store",
            format=rng.randrange(4),
            region=rng.choice([1, 1, 1, 4]),
            a=address,
            line=rng.randrange(24),
            byte=rng.choice([0, 12]),
            outer=rng.randrange(4),
            inner=rng.choice([0, 1, 5, 11]),
            outer_bytes=rng.choice([0, 64, 300]),
            inner_bytes=rng.choice([4, 32, 64, 100, 132]),
        )
    if kind == 9:
        return op("sstore", region=4, line=1, byte=Operand(1, 4), value=Operand(1, 7))
    if kind == 10:
        return rng.choice([op("sload", region=4, rd=8, line=1, byte=400), op("vread", rd=8, a=rng.randrange(512))])
    return rng.choice([op("gather", dst=address, a=other, n=rng.choice([0, 8, 24])), op("fence")])


def random_program(rng: random.Random) -> Program:
    """A body run 1 to 3 times, longer on higher ranks (by a loop before it and by matmul columns)."""
    body = [random_op(rng) for _ in range(rng.randint(1, 14))]
    delay = rng.choice([0, 9, 60])
    head = [
        op("sadd", rd=6, a=rng.randint(1, 3), b=0),
        op("smul", rd=7, a=Operand(1), b=delay),
        op("sadd", rd=7, a=Operand(7), b=1),
        op("sadd", rd=7, a=Operand(7), b=-1),
        op("bne", to=3, a=Operand(7), b=0),
    ]
    tail = [
        op("sadd", rd=6, a=Operand(6), b=-1),
        op("sadd", rd=5, a=Operand(5), b=8),
        op("bne", to=len(head), a=Operand(6), b=0),
        op("halt"),
    ]
    return Program(head + body + tail)


def compare(result: TimingResult, ring: list[Device], total: int) -> None:
    assert result.trace is not None
    t = result.trace
    names = ("issue", "matrix", "vector", "memory", "ring", "fetch")
    got = sorted(
        (int(d), names[u], int(s), int(e), int(pc))
        for d, u, s, e, pc in zip(t.device, t.unit, t.start, t.end, t.pc, strict=True)
    )
    assert got == sorted(s for d in ring for s in d.slices)
    assert result.total_cycles == total
    assert result.device_cycles == tuple(d.halted for d in ring)
    assert sorted((s.cycle, s.device, s.line, s.byte, s.value) for s in result.stores) == sorted(
        entry for d in ring for entry in d.log
    )
    for d, causes, counters in zip(ring, result.causes, result.counters, strict=True):
        assert {key: causes["fetch"].get(key, 0) for key in d.fetch_counts} == d.fetch_counts
        for (unit, cause), cycles in d.waited.items():
            assert causes[unit].get(cause, 0) == cycles, (unit, cause)
        total_waited = sum(d.waited.values())
        assert total_waited == sum(causes[unit].get(cause, 0) for unit, cause in CHARGED)
        fetched = counters.weights_fetched_bytes + counters.kv_fetched_bytes
        assert fetched == d.requested * d.m.row_bytes


def check(seed: int) -> None:
    rng = random.Random(seed)
    machine, program, devices = random_machine(rng), random_program(rng), rng.randint(1, 4)
    stalls = rng.choice([0, 0, rng.randrange(1, 1 << 32)])
    io = np.zeros((devices, 0), np.int32)
    result = run_timing(program, machine, devices, io, trace=True, stall_seed=stalls)
    compare(result, *reference(program, machine, devices, stalls))
    profiled = run_timing(program, machine, devices, io, profile=True, stall_seed=stalls)
    compare_profile(profiled, result)


def compare_profile(profiled: TimingResult, traced: TimingResult) -> None:
    """A profile is the trace of device 0; its causes sum to each slice's end, and it ends at the run's own counters."""
    profile, trace = profiled.trace, traced.trace
    assert profile is not None and trace is not None and profile.causes is not None and profile.counters is not None
    assert profiled.total_cycles == traced.total_cycles and trace.causes is None
    mine = trace.device == 0
    for name in ("device", "unit", "start", "end", "pc"):
        assert (getattr(profile, name) == getattr(trace, name)[mine]).all(), name
    assert (profile.causes.sum(axis=1) == profile.end).all()
    for unit, name in enumerate(UNIT_NAMES):
        rows = np.flatnonzero(profile.unit == unit)
        assert (np.diff(profile.causes[rows], axis=0) >= 0).all()
        if len(rows):
            last = {Cause(i).name.lower(): int(n) for i, n in enumerate(profile.causes[rows[-1]]) if n}
            known = dict(traced.causes[0][name])
            known["drain"] = known.get("drain", 0) - (traced.total_cycles - int(profile.end[rows[-1]]))
            assert last == {cause: cycles for cause, cycles in known.items() if cycles}
    moved = profile.counters.max(axis=0, initial=0)
    final = [getattr(traced.counters[0], name) for name in COUNTERS]
    assert moved[1:].tolist() == final[1:]  # slices do not count the scalar core's instructions after them


@settings(max_examples=250, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_equals_the_cycle_stepped_reference(seed: int) -> None:
    check(seed)
