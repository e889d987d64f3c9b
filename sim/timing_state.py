"""State of the timing simulator's compiled pass, and what all of its units share: hazards, starts, completions.

The formulas are those of `typebar.isa.timing`, compiled as they stand.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numba import njit
from numpy.typing import NDArray

from typebar.isa import timing
from typebar.isa.instructions import MAX_OPERANDS, SCALAR_REGISTERS, Region, Trap, Unit
from typebar.isa.timing import COUNTERS, LATE, Cause, TimingParameters

Ints = NDArray[np.int64]
Function = TypeVar("Function", bound=Callable[..., Any])
_OPTIONS = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "error_model": "numpy", "_nrt": False}


def compiled(function: Function) -> Function:
    """Compile a function that only compiled code calls: no wrapper for Python, no array allocation."""
    dispatcher: Function = njit(**_OPTIONS)(function)
    return dispatcher


def _compiled_formulas(module: ModuleType) -> dict[str, Any]:
    """The module's functions, compiled; they see one another's compiled forms."""
    space = dict(vars(module))
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if function.__module__ == module.__name__ and not name.startswith("_"):
            space[name] = compiled(FunctionType(function.__code__, space, name, function.__defaults__))
    return space


_FORMULAS = _compiled_formulas(timing)


def _formula(function: Function) -> Function:
    dispatcher: Function = _FORMULAS[function.__name__]
    return dispatcher


vector_accesses = _formula(timing.vector_accesses)
vector_count = _formula(timing.vector_count)
vector_rows = _formula(timing.vector_rows)
vector_occupancy = _formula(timing.vector_occupancy)
vector_reduces = _formula(timing.vector_reduces)
vector_latency = _formula(timing.vector_latency)
element_latency = _formula(timing.element_latency)
row_levels = _formula(timing.row_levels)
takes_squares = _formula(timing.takes_squares)
row_written = _formula(timing.row_written)
memory_accesses = _formula(timing.memory_accesses)
blocks_touched = _formula(timing.blocks_touched)
load_occupancy = _formula(timing.load_occupancy)
store_cycles = _formula(timing.store_cycles)
hbm_store_end = _formula(timing.hbm_store_end)
write_slot = _formula(timing.write_slot)
element_bytes = _formula(timing.element_bytes)
matmul_accesses = _formula(timing.matmul_accesses)
fold = _formula(timing.fold)
step_cycles = _formula(timing.step_cycles)
last_hold = _formula(timing.last_hold)
chunk_load = _formula(timing.chunk_load)
rows_needed = _formula(timing.rows_needed)
rows_consumed = _formula(timing.rows_consumed)
matrix_last_row = _formula(timing.matrix_last_row)
matmul_latency = _formula(timing.matmul_latency)
gather_accesses = _formula(timing.gather_accesses)
gather_done = _formula(timing.gather_done)
gather_cycles = _formula(timing.gather_cycles)
stall = _formula(timing.stall)

# Plain integers, which the compiler takes as constants.
SCALAR, MATRIX, VECTOR, MEMORY, RING = (int(unit) for unit in Unit)
FETCH = timing.FETCH_UNIT
UNITS = FETCH + 1
C_ISSUE, C_COMPUTE, C_ACCUMULATE = int(Cause.ISSUE), int(Cause.COMPUTE), int(Cause.ACCUMULATE)
C_WEIGHTS, C_TRANSFER, C_WRITE_SLOT = int(Cause.WEIGHTS), int(Cause.TRANSFER), int(Cause.WRITE_SLOT)
C_FIFO_FULL, C_STORE, C_FETCH = int(Cause.FIFO_FULL), int(Cause.STORE), int(Cause.FETCH)
C_MATRIX, C_MEMORY, C_SKEW = int(Cause.MATRIX), int(Cause.MEMORY), int(Cause.SKEW)
C_BRANCH, C_READ, C_QUEUE = int(Cause.BRANCH), int(Cause.READ), int(Cause.QUEUE)
C_FENCE, C_DRAIN, C_OPERANDS = int(Cause.FENCE), int(Cause.DRAIN), int(Cause.OPERANDS)
C_UNIT = C_MATRIX - MATRIX
"""Waiting for a result of unit u is cause C_UNIT + u."""
KV, IO = int(Region.KV), int(Region.IO)

RUNNING, AT_RING, HALTED = 0, 1, 2
"""Status of a device."""
T_BOUNDS, T_COUNT, T_END = int(Trap.REGISTER_BOUNDS), int(Trap.COUNT), int(Trap.PROGRAM_END)
T_REGION, T_ACCESS = int(Trap.REGION_BOUNDS), int(Trap.REGION_ACCESS)
T_ILLEGAL = int(Trap.ILLEGAL)
T_RING, T_SOFTWARE = int(Trap.RING_MISMATCH), int(Trap.SOFTWARE)

# Columns of `State.counters`, those of COUNTERS; what has one for each HBM region begins with WEIGHTS.
N_INSTRUCTIONS, N_FETCHED, N_USEFUL, N_WRITTEN, N_USEFUL_WRITTEN, N_DDR, N_RING, N_MACS = 0, 1, 3, 5, 6, 7, 8, 9
LOG, TRACE = 0, 1
SLICE = 5
"""Columns of `State.trace` before those of a profile."""
E_ROWS, E_USABLE, E_LINES, E_GATHERS = range(4)
GATHER_N, GATHER_START, GATHER_PC, GATHER_DONE = range(4)
NEVER = -(1 << 62)


class Code(NamedTuple):
    """The program: the arrays of `typebar.isa.program.tables`."""

    opcode: Ints
    modifiers: Ints
    register: Ints
    immediate: Ints


class State(NamedTuple):
    """Everything that lives while the pass runs; D devices, U = 6 units, all int64.

    Circular histories hold as many entries as can still bind: `queue` the last `queue_depth` starts, `stores` and
    `fetches` (first row, last row, end) the HBM stores and the K/V matmuls that may not be over.
    """

    registers: Ints  # [D, 32] scalar registers
    pc: Ints  # [D]
    time: Ints  # [D] cycle in which the next instruction may issue
    status: Ints  # [D]
    free: Ints  # [D, U] first cycle in which the unit may start its next instruction
    done: Ints  # [D, U] completion of the unit's last instruction
    queue: Ints  # [D, U, queue_depth]
    entered: Ints  # [D, U] place of the next entry in `queue`
    write_done: Ints  # [D, segments] completion of the segment's last writer
    write_unit: Ints  # [D, segments]
    write_late: Ints  # [D, segments] 1 if that is a reduction's result
    write_row: Ints  # [D, segments] `row_written` by it, if it is of the vector unit
    read_done: Ints  # [D, U, segments] completion of the segment's last reader in each unit
    region_done: Ints  # [D, regions] completion of the last store to the region
    reduced: Ints  # [D, 3] of the last reduction: completion, levels over rows, whether it takes squares
    left: Ints  # [D] the vector unit's last element result
    events: Ints  # [D, 4] so far: matrix rows requested, the last one's first usable cycle, lines loaded, gathers
    fifo: Ints  # [D, fifo_rows] cycle in which the row's place was freed
    fifo_place: Ints  # [D] place of the next row
    stores: Ints  # [D, ., 3]
    next_store: Ints  # [D]
    fetches: Ints  # [D, ., 3]
    next_fetch: Ints  # [D]
    causes: Ints  # [D, U, causes]
    counters: Ints  # [D, counters]
    io: Ints  # [D, words] the IO region, as scalar loads see it
    values: Ints  # [operand slots] of the instruction in hand
    ranges: Ints  # [MAX_ACCESSES, 3] its operand ranges
    plan: Ints  # [3, steps] its step's rows needed, rows consumed, and the last start of each column group
    gathers: Ints  # [4, D] of the ring instruction: n, start, pc, done
    gather_sends: Ints  # [2, hops, D] when it sends its blocks, by direction
    gather_values: Ints  # [D, 3] its operands
    log: Ints  # [., 5] scalar stores to IO: completion, device, line, byte, value
    trace: Ints  # [., 5] device, unit, start, end, pc; in a profile then the unit's causes and the device's counters
    used: Ints  # [3] rows used of log and trace, and instructions executed by all devices


def new_state(
    p: TimingParameters, segments: int, devices: int, io: NDArray[np.int32], trace: bool, profile: bool = False
) -> State:
    """The state at start: R1 the rank, R2 the number of devices, everything else zero."""

    def zeros(*shape: int) -> Ints:
        return np.zeros(shape, np.int64)

    registers = zeros(devices, SCALAR_REGISTERS)
    registers[:, 1], registers[:, 2] = np.arange(devices), devices
    # A store can bind while it queues or until it is done: see docs/timing.md, "What hardware must remember".
    pending_stores = p.queue_depth + max(p.hbm_latency, p.ddr_latency) + 4
    return State(
        registers=registers,
        pc=zeros(devices),
        time=zeros(devices),
        status=zeros(devices),
        free=zeros(devices, UNITS),
        done=zeros(devices, UNITS),
        queue=zeros(devices, UNITS, p.queue_depth),
        entered=zeros(devices, UNITS),
        write_done=zeros(devices, segments),
        write_unit=zeros(devices, segments),
        write_late=zeros(devices, segments),
        write_row=zeros(devices, segments) - 1,
        read_done=zeros(devices, UNITS, segments),
        region_done=zeros(devices, 16),
        reduced=zeros(devices, 3),
        left=zeros(devices),
        events=zeros(devices, 4),
        fifo=zeros(devices, p.fifo_rows) - 1,
        fifo_place=zeros(devices),
        stores=zeros(devices, pending_stores, 3),
        next_store=zeros(devices),
        fetches=zeros(devices, p.queue_depth + 4, 3),
        next_fetch=zeros(devices),
        causes=zeros(devices, UNITS, len(Cause)),
        counters=zeros(devices, len(COUNTERS)),
        io=np.ascontiguousarray(io, np.int64),
        values=zeros(MAX_OPERANDS),
        ranges=zeros(timing.MAX_ACCESSES, 3),
        plan=zeros(3, p.column_block // p.columns),
        gathers=zeros(4, devices),
        gather_sends=zeros(2, max(1, devices // 2), devices),
        gather_values=zeros(devices, 3),
        log=zeros(max(64, devices), 5),
        trace=zeros(4096 if trace or profile else 0, SLICE + (len(Cause) + len(COUNTERS) if profile else 0)),
        used=zeros(3),
    )


# Shared by all units --------------------------------------------------------------------------------------
@compiled
def in_bounds(s: State, p: TimingParameters, count: int) -> bool:
    """Whether the first `count` operand ranges lie in the register file."""
    inside = True
    for i in range(count):
        inside = inside and s.ranges[i, 0] >= 0 and s.ranges[i, 0] + s.ranges[i, 1] <= p.words
    return inside


@compiled
def later(ready: int, cause: int, done: int, unit: int) -> tuple[int, int]:
    """The later of two waits and the unit that ends it, the lower one if they end together."""
    if done > ready or (done == ready and unit < cause):
        return done, unit
    return ready, cause


@compiled
def operands_ready(s: State, p: TimingParameters, d: int, unit: int, count: int) -> tuple[int, int]:
    """First cycle in which the operand ranges are free of hazards, and the unit that decides it: the lowest of many."""
    ready, cause = 0, unit
    for i in range(count):
        first, words, written = s.ranges[i, 0], s.ranges[i, 1], s.ranges[i, 2]
        for segment in range(first // p.segment_words, (first + words - 1) // p.segment_words + 1):
            if written:
                ordered = s.write_unit[d, segment] == unit and (written == LATE or s.write_late[d, segment] == 0)
            else:
                ordered = unit == VECTOR and s.write_row[d, segment] == first // p.vector_lanes
            if not ordered:
                ready, cause = later(ready, cause, s.write_done[d, segment], s.write_unit[d, segment])
            if written:
                for other in range(MATRIX, RING + 1):
                    if other != unit:
                        ready, cause = later(ready, cause, s.read_done[d, other, segment], other)
    return ready, cause


@compiled
def start_instruction(s: State, d: int, unit: int, t: int, ready: int, cause: int) -> int:
    """Start of the instruction issued at t; charges the unit's idle time before it to the binding constraint."""
    start: int = max(t + 1, s.free[d, unit], ready)
    s.causes[d, unit, cause if ready > t + 1 else C_ISSUE] += start - s.free[d, unit]
    s.queue[d, unit, s.entered[d, unit]] = start
    s.entered[d, unit] += 1
    if s.entered[d, unit] == s.queue.shape[2]:
        s.entered[d, unit] = 0
    return start


@compiled
def finish_instruction(s: State, p: TimingParameters, d: int, unit: int, count: int, done: int, row: int = -1) -> int:
    """Record completion, in order within the unit, and the operand ranges' new last reader or writer.

    `row` is `row_written`.
    """
    done = max(done, s.done[d, unit])
    s.done[d, unit] = done
    for i in range(count):
        first, words, written = s.ranges[i, 0], s.ranges[i, 1], s.ranges[i, 2]
        for segment in range(first // p.segment_words, (first + words - 1) // p.segment_words + 1):
            if written:
                s.write_done[d, segment] = done
                s.write_unit[d, segment] = unit
                s.write_late[d, segment] = 1 if written == LATE else 0
                s.write_row[d, segment] = -1 if written == LATE else row
            else:
                s.read_done[d, unit, segment] = done
    return done


@compiled
def record_slice(s: State, d: int, unit: int, start: int, end: int, pc: int) -> None:
    """Record occupancy of a unit, if a trace is wanted; the caller has seen to the room.

    A profile is of device 0 only, with the unit's causes and the device's counters as they stand after the slice.
    """
    if s.trace.shape[0] == 0 or (d > 0 and s.trace.shape[1] > SLICE):
        return
    row = s.used[TRACE]
    s.trace[row, 0], s.trace[row, 1], s.trace[row, 2] = d, unit, start
    s.trace[row, 3], s.trace[row, 4] = end, pc
    s.used[TRACE] = row + 1
    if s.trace.shape[1] > SLICE:
        causes, counters = s.causes.shape[2], s.counters.shape[1]
        for i in range(causes):
            s.trace[row, SLICE + i] = s.causes[d, unit, i]
        for i in range(counters):
            s.trace[row, SLICE + causes + i] = s.counters[d, i]


@compiled
def overlap_end(history: Ints, place: int, first: int, last: int, bound: int) -> int:
    """Latest end, above `bound`, in a circular history of (first row, last row, end) that overlaps the rows.

    Ends grow with age reversed, so the search stops at the first that is not above `bound`.
    """
    size = history.shape[0]
    for i in range(1, size + 1):
        entry = place - i
        if entry < 0:
            entry += size
        if history[entry, 2] <= bound:
            break
        if history[entry, 0] <= last and history[entry, 1] >= first:
            return int(history[entry, 2])
    return bound


@compiled
def remember(history: Ints, place: int, first: int, last: int, end: int) -> int:
    """Add to a circular history; the next place."""
    history[place, 0], history[place, 1], history[place, 2] = first, last, end
    return place + 1 if place + 1 < history.shape[0] else 0
