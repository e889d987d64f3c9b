"""The timing contract: when every instruction starts, occupies its unit and completes, as pure integer formulas.

The contract itself, rule by rule, is docs/timing.md. The formulas here are its only implementation: the timing
simulator compiles them, the RTL and the compiler's cost model import them. All are functions of plain integers
and of `TimingParameters`; times are cycles of the one clock, counted from 0 at start. No formula depends on data.

Three times describe an instruction: `t`, the cycle in which it issues; `start`, its first cycle in its unit; and
`done`, the first cycle in which a dependent instruction may start.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

from typebar.isa.instructions import (
    BY_NAME,
    Activation,
    Factor,
    Format,
    Operation,
    Patch,
    Reduction,
    Region,
    Scale,
    Source,
    Unit,
)
from typebar.isa.machine import LINE_BYTES, Machine

FETCH_UNIT = len(Unit)
"""The fetch engine is accounted as one more unit, after those of `Unit`."""
UNIT_NAMES = ("issue", "matrix", "vector", "memory", "ring", "fetch")
COUNTERS = (
    "instructions",
    "weights_fetched_bytes",
    "kv_fetched_bytes",
    "weights_useful_bytes",
    "kv_useful_bytes",
    "kv_written_bytes",
    "kv_useful_written_bytes",
    "ddr_bytes",
    "ring_bytes",
    "macs",
)
"""What a run counts besides its cycles: instructions, bytes, multiply-accumulates (docs/timing.md, "Accounting")."""
MAX_ACCESSES = 8
"""Operand ranges that one instruction can name."""


class Cause(IntEnum):
    """What a unit does, or waits for, in a cycle; each cycle of each unit has exactly one."""

    ISSUE = 0
    """Issue: issues an instruction. Other units: the next instruction has not issued yet."""
    COMPUTE = 1
    """Matrix and vector: occupied by an instruction."""
    ACCUMULATE = 2
    """Matrix: a column group waits for its own sum of the previous chunk."""
    WEIGHTS = 3
    """Matrix: the rows of the next step have not arrived. It wins a tie with `ACCUMULATE`, and both with `OPERANDS`."""
    TRANSFER = 4
    """Memory, ring: moves data. Fetch: requests a row."""
    WRITE_SLOT = 5
    """Fetch: the cycle belongs to writes. Memory: waits for a cycle that does."""
    FIFO_FULL = 6
    """Fetch: no free row in the FIFO."""
    STORE = 7
    """Fetch: an older store to the same rows is not done."""
    FETCH = 8
    """Memory: an older fetch of the same rows is not over."""
    MATRIX = 9
    """Waits for a result of the matrix unit (or, fetch without run-ahead: for the instruction to start there)."""
    VECTOR = 10
    """Waits for a result of the vector unit."""
    MEMORY = 11
    """Waits for a result of the memory unit."""
    RING = 12
    """Waits for a result of the ring unit."""
    SKEW = 13
    """Ring: waits longer than the transfer takes, because other devices started later."""
    BRANCH = 14
    """Issue: a taken branch."""
    READ = 15
    """Issue: the latency of a scalar read of the register file."""
    QUEUE = 16
    """Issue: the unit's queue is full."""
    FENCE = 17
    """Issue: fence or halt waits for everything older."""
    DRAIN = 18
    """No instruction is left for this unit."""
    OPERANDS = 19
    """Matrix: the operands of the next chunk are not loaded from the register file."""


class TimingParameters(NamedTuple):
    """The machine parameters that time depends on, with those derived from them, and the seed of `stall`."""

    lanes: int
    columns: int
    rows: int
    vectors: int
    column_block: int
    fifo_port_bytes: int
    dot_latency: int
    accumulate_latency: int
    epilogue_latency: int
    words: int
    segment_words: int
    vector_lanes: int
    vector_levels: int
    vector_latency: int
    unary_latency: int
    reduce_latency: int
    add_latency: int
    chains: int
    row_bytes: int
    row_lines: int
    fifo_rows: int
    hbm_latency: int
    write_period: int
    line_cycles: int
    ddr_latency: int
    clock_mhz: int
    megabits_per_second: int
    hop_latency: int
    setup_latency: int
    buffer_words: int
    queue_depth: int
    branch_cycles: int
    read_latency: int
    run_ahead: int
    stall_seed: int


def timing_parameters(machine: Machine, stall_seed: int = 0) -> TimingParameters:
    """The parameters of a machine; `stall_seed` is 0 (no stalls: the contract) or a seed below 2^32."""
    matrix, vector, control = machine.matrix, machine.vector, machine.control
    return TimingParameters(
        lanes=matrix.lanes,
        columns=matrix.columns,
        rows=matrix.rows,
        vectors=matrix.vectors,
        column_block=machine.column_block,
        fifo_port_bytes=matrix.fifo_port_bytes,
        dot_latency=matrix.dot_latency,
        accumulate_latency=matrix.accumulate_latency,
        epilogue_latency=matrix.epilogue_latency,
        words=vector.words,
        segment_words=machine.segment_words,
        vector_lanes=vector.lanes,
        vector_levels=vector.lanes.bit_length() - 1,
        vector_latency=vector.latency,
        unary_latency=vector.unary_latency,
        reduce_latency=vector.reduce_latency,
        add_latency=vector.add_latency,
        chains=int(vector.chains),
        row_bytes=machine.row_bytes,
        row_lines=machine.row_lines,
        fifo_rows=machine.fifo_rows,
        hbm_latency=machine.hbm.latency,
        write_period=machine.hbm.rows_per_write_slot + 1,
        line_cycles=machine.line_cycles,
        ddr_latency=machine.ddr.latency,
        clock_mhz=machine.clock_mhz,
        megabits_per_second=machine.ring.megabits_per_second,
        hop_latency=machine.ring.hop_latency,
        setup_latency=machine.ring.setup_latency,
        buffer_words=machine.ring.buffer_words,
        queue_depth=control.queue_depth,
        branch_cycles=control.branch_cycles,
        read_latency=control.read_latency,
        run_ahead=int(control.run_ahead),
        stall_seed=stall_seed,
    )


# Where fields lie in `typebar.isa.program.tables` ---------------------------------------------------------
def _modifier(name: str, field: str) -> int:
    return [item.name for item in BY_NAME[name].modifiers].index(field)


def _operand(name: str, field: str) -> int:
    return [item.name for item in BY_NAME[name].operands].index(field)


OP = {name: item.opcode for name, item in BY_NAME.items()}
VMOV, VWRITE, VUNARY, VCHAIN = OP["vmov"], OP["vwrite"], OP["vunary"], OP["vchain"]
VSUM, VSUMSQ, VRMAX, VARGMAX = OP["vsum"], OP["vsumsq"], OP["vrmax"], OP["vargmax"]
LOAD, STORE, SLOAD, SSTORE = OP["load"], OP["store"], OP["sload"], OP["sstore"]
MATMUL, GATHER = OP["matmul"], OP["gather"]

FROM_VECTOR, FROM_WORD = int(Source.VECTOR), int(Source.WORD)
SCALE_WORD, SCALE_COLUMN = int(Scale.WORD), int(Scale.COLUMN)
PATCH_COLUMN, PATCH_LANE = int(Patch.COLUMN), int(Patch.LANE)
FACTOR_WORD, NO_OPERATION, NO_FUNCTION = int(Factor.WORD), int(Operation.NONE), int(Activation.NONE)
NO_REDUCTION, SUM_OF_SQUARES = int(Reduction.NONE), int(Reduction.SUMSQ)
LAST_HBM_REGION = int(Region.KV)
"""Regions up to this number lie in HBM, the others in DDR."""
FP32, INT8 = int(Format.FP32), int(Format.INT8)

V_SCALE_FROM, V_OPERATION, V_FUNCTION, V_WRITE, V_REDUCE = (
    _modifier("vchain", f) for f in ("scale_from", "operation", "function", "write", "reduce")
)
V_SCALE, V_RESULT = (_operand("vchain", f) for f in ("scale", "result"))
X_FORMAT, X_REGION, X_FULL = (_modifier("matmul", f) for f in ("format", "region", "full"))
X_ACCUMULATE, X_PATCH, X_SCALING = (_modifier("matmul", f) for f in ("accumulate", "patch", "scaling"))
X_ADD_BIAS, X_ROW_MAX = (_modifier("matmul", f) for f in ("add_bias", "row_max"))
X_DST, X_SRC, X_K, X_N, X_LINE = (_operand("matmul", f) for f in ("dst", "src", "k", "n", "line"))
X_OUTER, X_INNER = (_operand("matmul", f) for f in ("outer", "inner"))
X_SRC_OUTER, X_SRC_INNER = (_operand("matmul", f) for f in ("src_outer", "src_inner"))
X_DST_OUTER, X_DST_INNER = (_operand("matmul", f) for f in ("dst_outer", "dst_inner"))
X_SCALE, X_BIAS, X_MAXIMUM = (_operand("matmul", f) for f in ("scale", "bias", "maximum"))
X_PATCH_SRC = _operand("matmul", "patch_src")
S_LINE, S_BYTE, S_OUTER, S_INNER = (_operand("store", f) for f in ("line", "byte", "outer", "inner"))
S_OUTER_BYTES, S_INNER_BYTES = (_operand("store", f) for f in ("outer_bytes", "inner_bytes"))


def element_bytes(format_number: int) -> int:
    """Bytes of an element of a `Format`."""
    if format_number == FP32:
        return 4
    return 1 if format_number == INT8 else 2


# Accesses to the register file ----------------------------------------------------------------------------
# Each function lists an instruction's operand ranges as rows (first word, words, `READ`, `WRITTEN` or `LATE`) of `out`
# and returns their number. `modifiers` and `values` are indexed as in `typebar.isa.program.tables`; values are final.
READ, WRITTEN, LATE = range(3)
"""A range is read; written; or written as a reduction's result, after those of older instructions of the unit."""


def add_access(out: Any, count: int, first: int, words: int, written: int) -> int:
    """Append one range, unless it is empty."""
    if words > 0:
        out[count, 0] = first
        out[count, 1] = words
        out[count, 2] = written
        return count + 1
    return count


def vector_accesses(opcode: int, modifiers: Any, values: Any, out: Any) -> int:
    """Words that a vector instruction reads and writes; it reads one word of `b` if `b_from` is word."""
    if opcode == VWRITE:
        return add_access(out, 0, values[0], 1, WRITTEN)
    if opcode >= VSUM:
        count = add_access(out, 0, values[1], values[2], READ)
        return add_access(out, count, values[0], 2 if opcode == VARGMAX else 1, LATE)
    if opcode == VUNARY:
        count = add_access(out, 0, values[1], values[2], READ)
        return add_access(out, count, values[0], values[2], WRITTEN)
    if opcode == VMOV:
        n, b, count = values[2], values[1], 0
    else:
        n, b = values[3], values[2]
        count = add_access(out, 0, values[1], n, READ)
    if opcode == VCHAIN and modifiers[V_SCALE_FROM] == FACTOR_WORD:
        count = add_access(out, count, values[V_SCALE], min(n, 1), READ)
    if opcode != VCHAIN or modifiers[V_OPERATION] != NO_OPERATION:
        if modifiers[0] == FROM_VECTOR:
            count = add_access(out, count, b, n, READ)
        elif modifiers[0] == FROM_WORD:
            count = add_access(out, count, b, min(n, 1), READ)
    if opcode != VCHAIN or modifiers[V_WRITE]:
        count = add_access(out, count, values[0], n, WRITTEN)
    if opcode == VCHAIN and modifiers[V_REDUCE] != NO_REDUCTION:
        count = add_access(out, count, values[V_RESULT], 1, LATE)
    return count


def memory_accesses(opcode: int, values: Any, out: Any) -> int:
    """Words that a memory instruction reads or writes; scalar loads and stores touch none."""
    if opcode == LOAD:
        return add_access(out, 0, values[0], values[3], WRITTEN)
    if opcode == STORE:
        return add_access(out, 0, values[0], values[S_OUTER] * values[S_INNER], READ)
    return 0


def gather_accesses(values: Any, devices: int, out: Any) -> int:
    """Words that a gather reads and writes."""
    count = add_access(out, 0, values[1], values[2], READ)
    return add_access(out, count, values[0], values[2] * devices, WRITTEN)


def covered_words(outer: int, stride_outer: int, inner: int, stride_inner: int, words: int) -> int:
    """Words from the first to the last touched by `outer` x `inner` vectors of `words` words; strides >= 0."""
    if outer <= 0 or inner <= 0 or words <= 0:
        return 0
    return (outer - 1) * stride_outer + (inner - 1) * stride_inner + words


def matmul_accesses(modifiers: Any, values: Any, out: Any) -> int:
    """Words that a matmul reads and writes; strided operands count as the range that covers them."""
    outer, inner, k, n = values[X_OUTER], values[X_INNER], values[X_K], values[X_N]
    if outer <= 0 or inner <= 0:
        return 0
    words = covered_words(outer, values[X_SRC_OUTER], inner, values[X_SRC_INNER], k)
    count = add_access(out, 0, values[X_SRC], words, READ)
    if modifiers[X_SCALING] == SCALE_WORD:
        count = add_access(out, count, values[X_SCALE], min(n, 1), READ)
    elif modifiers[X_SCALING] == SCALE_COLUMN:
        count = add_access(out, count, values[X_SCALE], n, READ)
    if modifiers[X_ADD_BIAS]:
        count = add_access(out, count, values[X_BIAS], n, READ)
    if modifiers[X_PATCH] == PATCH_COLUMN:
        count = add_access(out, count, values[X_PATCH_SRC], k, READ)
    elif modifiers[X_PATCH] == PATCH_LANE:
        count = add_access(out, count, values[X_PATCH_SRC], n, READ)
    words = covered_words(outer, values[X_DST_OUTER], inner, values[X_DST_INNER], n)
    if modifiers[X_ACCUMULATE]:
        count = add_access(out, count, values[X_DST], words, READ)
    count = add_access(out, count, values[X_DST], words, WRITTEN)
    if modifiers[X_ROW_MAX]:
        count = add_access(out, count, values[X_MAXIMUM], outer * inner, WRITTEN)
    return count


# Vector unit ----------------------------------------------------------------------------------------------
def vector_count(opcode: int, values: Any) -> int:
    """The element count operand of a vector instruction (1 for vwrite)."""
    if opcode == VWRITE:
        return 1
    return int(values[2] if opcode >= VSUM or opcode in (VUNARY, VMOV) else values[3])


def vector_rows(p: TimingParameters, n: int) -> int:
    """Rows of the register file that n elements take, one a cycle: max(1, ceil(n / lanes))."""
    return max(1, -(-n // p.vector_lanes))


def vector_occupancy(opcode: int, modifiers: Any, rows: int) -> int:
    """Cycles that an instruction over `rows` rows occupies the vector unit: a word that is a factor takes one more."""
    return rows + (1 if opcode == VCHAIN and modifiers[V_SCALE_FROM] == FACTOR_WORD else 0)


def vector_reduces(opcode: int, modifiers: Any) -> bool:
    """Whether a vector instruction has a reduction's result."""
    return bool(opcode >= VSUM or (opcode == VCHAIN and modifiers[V_REDUCE] != NO_REDUCTION))


def element_latency(p: TimingParameters, opcode: int, modifiers: Any) -> int:
    """Cycles that an element takes to its result, the latency of an instruction that does not reduce."""
    function = opcode == VUNARY or (opcode == VCHAIN and modifiers[V_FUNCTION] != NO_FUNCTION)
    return p.vector_latency + (p.unary_latency if function else 0)


def row_levels(rows: int) -> int:
    """Levels of a reduction's tree over its rows: ceil(log2(rows))."""
    levels = 0
    while (rows - 1) >> levels > 0:
        levels += 1
    return levels


def takes_squares(opcode: int, modifiers: Any) -> bool:
    """Whether a reduction squares its elements' results first; vsumsq multiplies its elements with themselves."""
    return bool(opcode == VCHAIN and modifiers[V_REDUCE] == SUM_OF_SQUARES)


def vector_latency(p: TimingParameters, opcode: int, modifiers: Any, rows: int) -> int:
    """Cycles from the last cycle of occupancy to done.

    A reduction adds log2(lanes) levels inside a row and `row_levels` over the rows; squares take a level's time.
    """
    latency = element_latency(p, opcode, modifiers)
    if not vector_reduces(opcode, modifiers):
        return latency
    levels = p.vector_levels + row_levels(rows) + (1 if takes_squares(opcode, modifiers) else 0)
    return latency + p.reduce_latency + p.add_latency * levels


def longest_latency(p: TimingParameters) -> int:
    """The greatest `vector_latency`: of a chain with every step over the whole register file."""
    levels = p.vector_levels + row_levels(vector_rows(p, p.words)) + 1
    return p.vector_latency + p.unary_latency + p.reduce_latency + p.add_latency * levels


def row_written(p: TimingParameters, opcode: int, modifiers: Any, values: Any, rows: int) -> int:
    """The first row of the elements that a vector instruction writes, if others can read behind it row by row, else -1.

    They can if its first row's result is there when they can start: when its occupancy is over.
    """
    return -1 if rows <= element_latency(p, opcode, modifiers) else int(values[0]) // p.vector_lanes


# Memory unit ----------------------------------------------------------------------------------------------
def blocks_touched(first: int, count: int, stride: int, size: int, block: int) -> int:
    """Distinct aligned blocks (lines or rows) of `block` bytes that `count` elements touch.

    Element i has `size` bytes, aligned, at byte `first + i * stride`, stride not negative.
    """
    if count <= 0:
        return 0
    if stride > block:
        return count
    return (first + (count - 1) * stride + size - 1) // block - first // block + 1


def load_occupancy(p: TimingParameters, lines: int, n: int, stalls: int = 0) -> int:
    """Cycles that a load of n words in `lines` lines occupies the memory unit; `stalls` are those of its lines.

    Lines arrive one every `line_cycles`, and one row of the register file is written a cycle; neither goes on while a
    line's request is stalled. A scalar load has one line and no words.
    """
    return max(1, lines * p.line_cycles, -(-n // p.vector_lanes)) + stalls


def store_cycles(
    p: TimingParameters, first: int, outer: int, inner: int, outer_bytes: int, inner_bytes: int, size: int, cycles: int
) -> int:
    """Cycles in which a store reads its words and hands on its lines, each line in `cycles` cycles.

    An outer row is read in pieces, one a cycle: rows of the register file if its elements are adjacent in memory,
    single words if not. It takes as long as its pieces or its lines, whichever is longer; `first` is a byte address.
    A store to DDR occupies the unit for this long at `line_cycles` a line, at least one cycle.
    """
    pieces = -(-inner // p.vector_lanes) if inner_bytes == size else inner
    total = 0
    for o in range(outer):
        lines = blocks_touched(first + o * outer_bytes, inner, inner_bytes, size, LINE_BYTES)
        total += max(pieces, lines * cycles)
    return total


def hbm_store_end(p: TimingParameters, start: int, rows: int, cycles: int) -> int:
    """First free cycle of the unit after a store to HBM of `rows` memory rows, whose `store_cycles` are `cycles`.

    Line for line (`store_cycles` at one cycle a line), and one write slot a row.
    """
    if rows == 0:
        return start + 1
    return max(write_slot(p, start) + (rows - 1) * p.write_period + 1, start + cycles)


def write_slot(p: TimingParameters, cycle: int) -> int:
    """The first write slot at or after a cycle: one cycle in `write_period`, the last of each period."""
    return cycle + (p.write_period - 1 - cycle) % p.write_period


def fetch_slot(p: TimingParameters, cycle: int) -> int:
    """The first fetch slot at or after a cycle: all cycles that are no write slots."""
    return cycle + 1 if cycle % p.write_period == p.write_period - 1 else cycle


# Matrix unit ----------------------------------------------------------------------------------------------
def fold(p: TimingParameters, vectors: int, size: int) -> int:
    """Column groups consumed in a step (`Machine.fold`): rows fold into columns for a single vector."""
    if vectors > 1:
        return 1
    return max(1, min(p.rows, p.fifo_port_bytes // (p.columns * p.lanes * size)))


def step_cycles(p: TimingParameters, vectors: int, size: int) -> int:
    """Cycles a step holds its columns: ceil(vectors / rows), or the FIFO port's time for them if that is longer.

    Only float32 matrices can exceed the port: a machine must feed one 16-bit tile a cycle.
    """
    passes = -(-vectors // p.rows)
    return max(passes, -(-fold(p, vectors, size) * p.columns * p.lanes * size // p.fifo_port_bytes))


def last_hold(p: TimingParameters, vectors: int, size: int) -> int:
    """Cycles a step of a column block's last chunk holds its columns: their results leave a row a cycle.

    A partly filled last step counts as a full one.
    """
    row_writes = -(-fold(p, vectors, size) * p.columns // p.vector_lanes)
    return max(step_cycles(p, vectors, size), vectors * row_writes)


def chunk_load(p: TimingParameters, modifiers: Any, vectors: int, columns: int, chunk: int, chunks: int) -> int:
    """Cycles that the operands of one chunk take through the unit's port of the register file, a row a cycle.

    They are the chunk of each vector, and of a column patch; with the first of a column block of `columns` columns also
    a lane patch, the sums that accumulators start from, and a scale word. The block's column scales and bias, which
    results need, come along with its `chunks` chunks, no more with each than one vector's, the rest with the last.
    """
    vector_rows = max(1, p.lanes // p.vector_lanes)
    rows = vector_rows * (vectors + (1 if modifiers[X_PATCH] == PATCH_COLUMN else 0))
    column_rows = -(-columns // p.vector_lanes)
    if chunk == 0:
        whole = (vectors if modifiers[X_ACCUMULATE] else 0) + (1 if modifiers[X_PATCH] == PATCH_LANE else 0)
        rows += column_rows * whole + (1 if modifiers[X_SCALING] == SCALE_WORD else 0)
    late = (1 if modifiers[X_ADD_BIAS] else 0) + (1 if modifiers[X_SCALING] == SCALE_COLUMN else 0)
    left = max(0, column_rows * late - chunk * vector_rows)
    return rows + (left if chunk == chunks - 1 else min(left, vector_rows))


def burst_rows(p: TimingParameters, columns: int, size: int) -> int:
    """Rows fetched for `columns` used columns of one chunk of a column block."""
    return -(-columns * p.lanes * size // p.row_bytes)


def rows_needed(p: TimingParameters, columns: int, step_columns: int, step: int, size: int) -> int:
    """Rows of a burst that must have arrived before step `step` of the chunk, counted from the burst's first."""
    return -(-min((step + 1) * step_columns, columns) * p.lanes * size // p.row_bytes)


def rows_consumed(p: TimingParameters, columns: int, step_columns: int, step: int, size: int) -> int:
    """Rows of a burst whose last used byte is consumed by step `step` or an earlier one."""
    if (step + 1) * step_columns >= columns:
        return burst_rows(p, columns, size)
    return (step + 1) * step_columns * p.lanes * size // p.row_bytes


def matrix_last_row(p: TimingParameters, line: int, k: int, n: int, size: int, full: int) -> int:
    """Last row, in the region, that a matmul fetches; the first is line / row_lines. k and n are at least 1."""
    blocks, chunks = -(-n // p.column_block), -(-k // p.lanes)
    columns = n - (blocks - 1) * p.column_block
    granule = max(1, p.row_bytes // (p.lanes * size))
    width = p.column_block if full else -(-columns // granule) * granule
    chunk = ((blocks - 1) * chunks * p.column_block + (chunks - 1) * width) * p.lanes * size // p.row_bytes
    return line // p.row_lines + chunk + burst_rows(p, columns, size) - 1


def matmul_latency(p: TimingParameters) -> int:
    """Cycles from the end of the last step to done."""
    return p.dot_latency + p.accumulate_latency + p.epilogue_latency


# Ring -----------------------------------------------------------------------------------------------------
NEVER = 1 << 62
"""Later than any cycle."""


def slice_cycles(p: TimingParameters, n: int) -> int:
    """Cycles that n words take on one link: max(1, ceil(32 n clock / rate))."""
    return max(1, -(-n * 32 * p.clock_mhz // p.megabits_per_second))


def ahead_cycles(p: TimingParameters, n: int) -> int:
    """Cycles from the beginning of a block of n words until a neighbour sends it on: its first row has come."""
    return slice_cycles(p, min(n, p.vector_lanes)) + p.hop_latency


def row_arrival(p: TimingParameters, n: int, sent: int, row: int) -> int:
    """When the neighbour has a row of a block of n words whose sending began at `sent`."""
    return sent + slice_cycles(p, min(n, (row + 1) * p.vector_lanes)) + p.hop_latency


def gather_cycles(p: TimingParameters, n: int, devices: int) -> int:
    """Cycles from start to done of a gather whose devices all start in the same cycle."""
    rows = -(-n // p.vector_lanes)
    sent, written = p.setup_latency, p.setup_latency + rows
    for hop in range(devices // 2):
        # The other way round goes one block less, or as many.
        together = 2 if hop < (devices - 1) // 2 else 1
        for row in range(max(1, rows)):
            # Rows that come together are written one after the other.
            written = max(written + min(rows, 1), row_arrival(p, n, sent, row)) + min(rows, 1) * (together - 1)
        sent += max(slice_cycles(p, n), ahead_cycles(p, n))
    return written + 1


def gather_done(p: TimingParameters, n: int, starts: Any, sends: Any, done: Any, before: int = 0) -> None:
    """Completion of one gather on all devices: `starts` [N] in, `done` [N] out, `sends` [2, max(1, N // 2), N] scratch.

    `before` gathers have gone before it in the run (they number the blocks for `stall`).

    Clockwise (d to d + 1) a block travels N // 2 hops, anticlockwise (N - 1) // 2. A device sends its own block
    `setup_latency` after its start, then forwards block by block: each when its first row has arrived and the link
    is free. Done is one cycle after the last sending and the last row written: rows enter the register file one a
    cycle in the order in which they arrive, the device's own from the setup's end on and before all others.
    """
    devices, cycles = len(starts), slice_cycles(p, n)
    for direction in range(2):
        hops = devices // 2 if direction == 0 else (devices - 1) // 2
        for hop in range(hops):
            for d in range(devices):
                if hop == 0:
                    sends[direction, 0, d] = starts[d] + p.setup_latency
                else:
                    free = sends[direction, hop - 1, d] + cycles
                    free += stall(p.stall_seed, d, LINK_CW + direction, before * hops + hop - 1)
                    first = block_arrival(p, sends, direction, hop - 1, d, devices, before) + ahead_cycles(p, n)
                    sends[direction, hop, d] = max(free, first)
    for d in range(devices):
        end = rows_written(p, n, starts[d], sends, d, devices, before)
        for direction in range(2):
            hops = devices // 2 if direction == 0 else (devices - 1) // 2
            if hops > 0:
                last = stall(p.stall_seed, d, LINK_CW + direction, before * hops + hops - 1)
                end = max(end, sends[direction, hops - 1, d] + cycles + last)
        done[d] = end + 1


def block_arrival(p: TimingParameters, sends: Any, direction: int, hop: int, d: int, devices: int, before: int) -> int:
    """When the neighbour from which device d receives in a direction began to send a block, its stall included."""
    hops = devices // 2 if direction == 0 else (devices - 1) // 2
    source = (d + devices - 1) % devices if direction == 0 else (d + 1) % devices
    delay = stall(p.stall_seed, source, LINK_CW + direction, before * hops + hop)
    return int(sends[direction, hop, source]) + delay


def rows_written(p: TimingParameters, n: int, start: int, sends: Any, d: int, devices: int, before: int) -> int:
    """When the last row of a gather is in a device's register file: both directions' rows merged as they arrive."""
    rows = -(-n // p.vector_lanes)
    written, count, each = start + p.setup_latency + rows, max(1, rows), min(rows, 1)
    left, right = devices // 2 * count, (devices - 1) // 2 * count
    cw = ccw = 0
    while cw < left or ccw < right:
        first = second = NEVER
        if cw < left:
            sent = block_arrival(p, sends, 0, cw // count, d, devices, before)
            first = row_arrival(p, n, sent, cw % count)
        if ccw < right:
            sent = block_arrival(p, sends, 1, ccw // count, d, devices, before)
            second = row_arrival(p, n, sent, ccw % count)
        # Blocks without rows have none to write.
        written = max(written + each, min(first, second))
        if first <= second:
            cw += 1
        else:
            ccw += 1
    return written


# Stalls, for verification -----------------------------------------------------------------------------------
HBM_REQUEST, HBM_DATA, DDR_REQUEST, LINK_CW, LINK_CCW = range(5)
"""Ports that `stall` delays. The index of an event counts through the run, from 0 on each device: the matrix rows
requested (both HBM ports), the lines of loads and scalar loads, the blocks sent on a link."""
STALL_SEEDS = 1 << 32
"""Seeds are below this number."""


def mixed(x: int) -> int:
    """A bijection of 32-bit integers that spreads every bit: xorshifts and odd multipliers below 2^31."""
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x68E31DA5 & 0xFFFFFFFF
    return x ^ x >> 16


def stall(seed: int, rank: int, port: int, index: int) -> int:
    """Cycles by which the outside world delays event `index` at a port of device `rank`: 0, or now and then 1 to 24.

    The contract knows no stalls (seed 0). With a seed below 2^32 both simulators and the hardware's test bench delay
    the same events alike, which shows that nothing leans on the memories' and links' regularity.
    """
    if seed == 0:
        return 0
    h = mixed(mixed(mixed(seed) ^ (rank * 8 + port)) ^ (index & 0xFFFFFFFF))
    return 1 + (h >> 8) % 24 if h % 16 == 0 else 0
