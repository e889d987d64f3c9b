"""Issue of an instruction to each unit: its start, occupancy and completion, and what they cost by cause."""

from __future__ import annotations

from typebar.isa.checks import MAX_DOT_LENGTH
from typebar.isa.machine import LINE_BYTES
from typebar.isa.timing import (
    DDR_REQUEST,
    HBM_DATA,
    HBM_REQUEST,
    LAST_HBM_REGION,
    LOAD,
    S_BYTE,
    S_INNER,
    S_INNER_BYTES,
    S_LINE,
    S_OUTER,
    S_OUTER_BYTES,
    SLOAD,
    SSTORE,
    STORE,
    VCHAIN,
    X_DST_INNER,
    X_DST_OUTER,
    X_FORMAT,
    X_FULL,
    X_INNER,
    X_K,
    X_LINE,
    X_N,
    X_OUTER,
    X_REGION,
    X_SRC_INNER,
    X_SRC_OUTER,
    TimingParameters,
)
from typebar.sim.timing_state import (
    C_ACCUMULATE,
    C_COMPUTE,
    C_FETCH,
    C_FIFO_FULL,
    C_ISSUE,
    C_MATRIX,
    C_OPERANDS,
    C_STORE,
    C_TRANSFER,
    C_UNIT,
    C_WEIGHTS,
    C_WRITE_SLOT,
    E_LINES,
    E_ROWS,
    E_USABLE,
    FETCH,
    GATHER_N,
    GATHER_PC,
    GATHER_START,
    IO,
    KV,
    LOG,
    MATRIX,
    MEMORY,
    N_DDR,
    N_FETCHED,
    N_MACS,
    N_USEFUL,
    N_USEFUL_WRITTEN,
    N_WRITTEN,
    NEVER,
    RING,
    T_ACCESS,
    T_BOUNDS,
    T_COUNT,
    T_ILLEGAL,
    T_REGION,
    VECTOR,
    Code,
    Ints,
    State,
    blocks_touched,
    chunk_load,
    compiled,
    element_bytes,
    element_latency,
    finish_instruction,
    fold,
    gather_accesses,
    hbm_store_end,
    in_bounds,
    last_hold,
    later,
    load_occupancy,
    matmul_accesses,
    matmul_latency,
    matrix_last_row,
    memory_accesses,
    operands_ready,
    overlap_end,
    record_slice,
    remember,
    row_levels,
    row_written,
    rows_consumed,
    rows_needed,
    stall,
    start_instruction,
    step_cycles,
    store_cycles,
    takes_squares,
    vector_accesses,
    vector_count,
    vector_latency,
    vector_occupancy,
    vector_reduces,
    vector_rows,
    write_slot,
)  # fmt: skip

# Every issue function takes the device d, the instruction's index pc and its issue cycle t; it returns a trap or 0.


@compiled
def _bad_counts(p: TimingParameters, outer: int, inner: int) -> bool:
    return outer < 0 or inner < 0 or max(outer, inner, outer * inner) > p.words


# Vector and memory units ----------------------------------------------------------------------------------


@compiled
def issue_vector(s: State, p: TimingParameters, code: Code, d: int, pc: int, t: int) -> int:
    """Issue a vector instruction."""
    opcode = code.opcode[pc]
    if opcode == VCHAIN and p.chains == 0:
        return T_ILLEGAL
    n = vector_count(opcode, s.values)
    if n < 0 or n > p.words:
        return T_COUNT
    count = vector_accesses(opcode, code.modifiers[pc], s.values, s.ranges)
    if not in_bounds(s, p, count):
        return T_BOUNDS
    modifiers = code.modifiers[pc]
    ready, unit = operands_ready(s, p, d, VECTOR, count)
    rows, reduces, squares = vector_rows(p, n), vector_reduces(opcode, modifiers), takes_squares(opcode, modifiers)
    levels = row_levels(rows)
    if reduces and (levels < s.reduced[d, 1] or (s.reduced[d, 2] and not squares)):
        ready, unit = later(ready, unit, s.reduced[d, 0], VECTOR)
    latency = element_latency(p, opcode, modifiers)
    ready, unit = later(ready, unit, s.left[d] - latency, VECTOR)
    start = start_instruction(s, d, VECTOR, t, ready, C_UNIT + unit)
    end = start + vector_occupancy(opcode, modifiers, rows)
    s.free[d, VECTOR], s.left[d] = end, end + latency
    s.causes[d, VECTOR, C_COMPUTE] += end - start
    row = row_written(p, opcode, modifiers, s.values, rows)
    done = finish_instruction(s, p, d, VECTOR, count, end + vector_latency(p, opcode, modifiers, rows), row)
    if reduces:
        s.reduced[d, 0], s.reduced[d, 1], s.reduced[d, 2] = done, levels, 1 if squares else 0
    record_slice(s, d, VECTOR, start, end, pc)
    return 0


@compiled
def _scalar_access(s: State, code: Code, d: int, pc: int, done: int) -> None:
    """Value of a scalar load or store: only the IO region holds any in a timing run."""
    opcode, region = code.opcode[pc], code.modifiers[pc, 0]
    line, byte = s.values[0], s.values[1]
    word = (line * LINE_BYTES + byte) >> 2
    held = region == IO and 0 <= word < s.io.shape[1]
    if opcode == SSTORE:
        if held:
            s.io[d, word] = s.values[2]
        if region == IO:
            row = s.used[LOG]
            s.log[row, 0], s.log[row, 1], s.log[row, 2] = done, d, line
            s.log[row, 3], s.log[row, 4] = byte, s.values[2]
            s.used[LOG] = row + 1
    elif code.modifiers[pc, 1] != 0:
        s.registers[d, code.modifiers[pc, 1]] = s.io[d, word] if held else 0


@compiled
def _lines_or_rows(s: State, code: Code, pc: int, block: int) -> tuple[int, int, int]:
    """Lines (or rows) a memory instruction touches, not merged across `outer`, and the first and last of them."""
    opcode = code.opcode[pc]
    if opcode in (SLOAD, SSTORE):
        first = s.values[0] * LINE_BYTES + s.values[1]
        return 1, first // block, first // block
    size = element_bytes(code.modifiers[pc, 0])
    if opcode == LOAD:
        first = s.values[1] * LINE_BYTES + s.values[2]
        n = s.values[3]
        return blocks_touched(first, n, size, size, block), first // block, (first + n * size - 1) // block
    base = s.values[S_LINE] * LINE_BYTES + s.values[S_BYTE]
    outer, inner = s.values[S_OUTER], s.values[S_INNER]
    step = s.values[S_INNER_BYTES]
    if inner == 0:
        return 0, 0, 0
    touched, last = 0, base
    for o in range(outer):
        first = base + o * s.values[S_OUTER_BYTES]
        touched += blocks_touched(first, inner, step, size, block)
        last = first + (inner - 1) * step
    return touched, base // block, (last + size - 1) // block


@compiled
def _store_cycles(s: State, p: TimingParameters, code: Code, pc: int, line_cycles: int) -> int:
    """Cycles in which the store in hand reads its words and hands on its lines, each in `line_cycles`."""
    values, size = s.values, element_bytes(code.modifiers[pc, 0])
    first = values[S_LINE] * LINE_BYTES + values[S_BYTE]
    outer, inner, outer_bytes, inner_bytes = (
        values[S_OUTER],
        values[S_INNER],
        values[S_OUTER_BYTES],
        values[S_INNER_BYTES],
    )
    return int(store_cycles(p, first, outer, inner, outer_bytes, inner_bytes, size, line_cycles))


@compiled
def _load_stalls(s: State, p: TimingParameters, d: int, lines: int) -> int:
    """Cycles by which the lines of the load in hand are late; numbers them."""
    total, before = 0, s.events[d, E_LINES]
    s.events[d, E_LINES] = before + lines
    if p.stall_seed:
        for line in range(lines):
            total += stall(p.stall_seed, d, DDR_REQUEST, before + line)
    return total


@compiled
def _hbm_store(
    s: State, p: TimingParameters, code: Code, d: int, pc: int, t: int, ready: int, unit: int
) -> tuple[int, int]:
    """Start and completion of a store to HBM: every row takes one write slot, every line a cycle."""
    rows, first, last = _lines_or_rows(s, code, pc, p.row_bytes)
    cause = C_UNIT + unit
    if rows > 0:
        fetched = overlap_end(s.fetches[d], s.next_fetch[d], first, last, ready)
        if fetched > ready:
            ready, cause = fetched, C_FETCH
    start = start_instruction(s, d, MEMORY, t, ready, cause)
    end = hbm_store_end(p, start, rows, _store_cycles(s, p, code, pc, 1))
    done = max(end + p.hbm_latency, s.done[d, MEMORY])
    if rows > 0:
        s.next_store[d] = remember(s.stores[d], s.next_store[d], first, last, done)
    s.free[d, MEMORY] = end
    s.causes[d, MEMORY, C_TRANSFER] += max(1, rows)
    s.causes[d, MEMORY, C_WRITE_SLOT] += end - start - max(1, rows)
    s.counters[d, N_WRITTEN] += rows * p.row_bytes
    s.counters[d, N_USEFUL_WRITTEN] += s.values[S_OUTER] * s.values[S_INNER] * element_bytes(code.modifiers[pc, 0])
    return start, done


@compiled
def _ddr_access(
    s: State, p: TimingParameters, code: Code, d: int, pc: int, t: int, region: int, ready: int, unit: int
) -> tuple[int, int]:
    """Start and completion of a load or store in DDR; a load follows older stores to its region."""
    opcode = code.opcode[pc]
    loads = opcode in (LOAD, SLOAD)
    if loads:
        ready, unit = later(ready, unit, s.region_done[d, region], MEMORY)
    start = start_instruction(s, d, MEMORY, t, ready, C_UNIT + unit)
    lines, _, _ = _lines_or_rows(s, code, pc, LINE_BYTES)
    occupancy = 1
    if loads:
        words = s.values[3] if opcode == LOAD else 0
        occupancy = load_occupancy(p, lines, words, _load_stalls(s, p, d, lines))
    elif opcode == STORE:
        occupancy = max(1, _store_cycles(s, p, code, pc, p.line_cycles))
    else:
        occupancy = p.line_cycles
    done = max(start + occupancy + p.ddr_latency, s.done[d, MEMORY])
    if not loads:
        s.region_done[d, region] = done
    s.free[d, MEMORY] = start + occupancy
    s.causes[d, MEMORY, C_TRANSFER] += occupancy
    s.counters[d, N_DDR] += lines * LINE_BYTES
    return start, done


@compiled
def issue_memory(s: State, p: TimingParameters, code: Code, d: int, pc: int, t: int) -> int:
    """Issue a memory instruction; the value of a scalar load is in its register on return."""
    opcode = code.opcode[pc]
    region = code.modifiers[pc, 1] if opcode in (LOAD, STORE) else code.modifiers[pc, 0]
    if (region <= LAST_HBM_REGION) if opcode != STORE else (region != KV and region != IO):
        return T_ACCESS
    if opcode == LOAD and (s.values[3] < 0 or s.values[3] > p.words):
        return T_COUNT
    if opcode == STORE:
        if _bad_counts(p, s.values[S_OUTER], s.values[S_INNER]):
            return T_COUNT
        if s.values[S_OUTER_BYTES] < 0 or s.values[S_INNER_BYTES] < 0:
            return T_COUNT
    place, elements = 0 if opcode in (SLOAD, SSTORE) else 1, 1
    if opcode == LOAD:
        elements = s.values[3]
    elif opcode == STORE:
        elements = s.values[S_OUTER] * s.values[S_INNER]
    if elements > 0 and s.values[place] * LINE_BYTES + s.values[place + 1] < 0:
        return T_REGION
    count = memory_accesses(opcode, s.values, s.ranges)
    if not in_bounds(s, p, count):
        return T_BOUNDS
    ready, unit = operands_ready(s, p, d, MEMORY, count)
    if region <= LAST_HBM_REGION:
        start, done = _hbm_store(s, p, code, d, pc, t, ready, unit)
    else:
        start, done = _ddr_access(s, p, code, d, pc, t, region, ready, unit)
    done = finish_instruction(s, p, d, MEMORY, count, done)
    record_slice(s, d, MEMORY, start, s.free[d, MEMORY], pc)
    if opcode in (SLOAD, SSTORE):
        _scalar_access(s, code, d, pc, done)
    return 0


# Matrix unit and fetch engine -----------------------------------------------------------------------------
@compiled
def _plan_chunk(s: State, p: TimingParameters, columns: int, step_columns: int, size: int) -> int:
    """Lay out the steps of a chunk of `columns` columns in `State.plan`; their number."""
    steps = -(-columns // step_columns)
    for step in range(steps):
        s.plan[0, step] = rows_needed(p, columns, step_columns, step, size)
        s.plan[1, step] = rows_consumed(p, columns, step_columns, step, size)
        s.plan[2, step] = NEVER
    return steps


@compiled
def _stream(
    s: State,
    p: TimingParameters,
    modifiers: Ints,
    d: int,
    start: int,
    fetch_start: int,
    k: int,
    n: int,
    vectors: int,
    size: int,
) -> tuple[int, int, int, int]:
    """Run the fetch and step recurrences of one matmul.

    Returns the end of the last step, the first and the last request's cycle, and the rows fetched.
    """
    fifo, places, plan = s.fifo[d], s.fifo.shape[1], s.plan
    place, request, slot = s.fifo_place[d], fetch_start - 1, write_slot(p, fetch_start)
    usable, before = s.events[d, E_USABLE], s.events[d, E_ROWS]
    end, first_request, rows = start, NEVER, 0
    full, slots_lost, stalled, weights, accumulate, operands = 0, 0, 0, 0, 0, 0
    chunks, chunk_begin = -(-k // p.lanes), start
    step_columns = fold(p, vectors, size) * p.columns
    for first_column in range(0, n, p.column_block):
        columns = min(p.column_block, n - first_column)
        steps = _plan_chunk(s, p, columns, step_columns, size)
        for chunk in range(chunks):
            requested, freed, oldest = 0, 0, place
            loaded = chunk_begin + chunk_load(p, modifiers, vectors, columns, chunk, chunks)
            hold = last_hold(p, vectors, size) if chunk == chunks - 1 else step_cycles(p, vectors, size)
            for step in range(steps):
                while requested < plan[0, step]:
                    earliest = request + 1
                    request = max(earliest, fifo[place] + 1)
                    full += request - earliest
                    if request >= slot:
                        if request > slot:
                            slot = write_slot(p, request)
                        if request == slot:
                            request += 1
                            slots_lost += 1
                            slot += p.write_period
                    if p.stall_seed:
                        delay = stall(p.stall_seed, d, HBM_REQUEST, before + rows)
                        request += delay
                        stalled += delay
                    if rows == 0:
                        first_request = request
                    delay = stall(p.stall_seed, d, HBM_DATA, before + rows) if p.stall_seed else 0
                    usable = max(request + p.hbm_latency + delay, usable + 1)
                    rows += 1
                    requested += 1
                    place += 1
                    if place == places:
                        place = 0
                summed = plan[2, step] + p.accumulate_latency
                begin = max(end, usable, summed, loaded)
                if begin == usable:
                    weights += begin - end
                elif begin == summed:
                    accumulate += begin - end
                else:
                    operands += begin - end
                if step == 0:
                    chunk_begin, loaded = begin, NEVER
                plan[2, step] = begin
                end = begin + hold
                while freed < plan[1, step]:
                    fifo[oldest] = end
                    freed += 1
                    oldest += 1
                    if oldest == places:
                        oldest = 0
    s.fifo_place[d] = place
    s.events[d, E_USABLE], s.events[d, E_ROWS] = usable, before + rows
    s.causes[d, FETCH, C_TRANSFER] += rows + stalled
    s.causes[d, FETCH, C_FIFO_FULL] += full
    s.causes[d, FETCH, C_WRITE_SLOT] += slots_lost
    s.causes[d, MATRIX, C_WEIGHTS] += weights
    s.causes[d, MATRIX, C_ACCUMULATE] += accumulate
    s.causes[d, MATRIX, C_OPERANDS] += operands
    s.causes[d, MATRIX, C_COMPUTE] += end - start - weights - accumulate - operands
    return end, first_request, request, rows


@compiled
def _fetch_start(s: State, p: TimingParameters, d: int, t: int, start: int, first: int, last: int) -> int:
    """First cycle in which the fetch half of a matmul may request a row; charges the fetch engine's idle time."""
    begin: int = max(t + 1, s.free[d, FETCH])
    cause = C_ISSUE
    if first <= last:
        stored = overlap_end(s.stores[d], s.next_store[d], first, last, begin)
        if stored > begin:
            begin, cause = stored, C_STORE
    if p.run_ahead == 0 and start > begin:
        begin, cause = start, C_MATRIX
    s.causes[d, FETCH, cause] += begin - s.free[d, FETCH]
    return begin


@compiled
def issue_matrix(s: State, p: TimingParameters, code: Code, d: int, pc: int, t: int) -> int:
    """Issue a matmul: its fetch half to the fetch engine, its compute half to the matrix unit."""
    modifiers, values = code.modifiers[pc], s.values
    k, n, outer, inner = values[X_K], values[X_N], values[X_OUTER], values[X_INNER]
    if k < 1 or k > MAX_DOT_LENGTH or n < 0 or n > p.words:
        return T_COUNT
    if _bad_counts(p, outer, inner) or outer * inner > p.vectors:
        return T_COUNT
    for stride in (values[X_SRC_OUTER], values[X_SRC_INNER], values[X_DST_OUTER], values[X_DST_INNER]):
        if stride < 0 or stride > p.words:
            return T_COUNT
    region, line = modifiers[X_REGION], values[X_LINE]
    if region > LAST_HBM_REGION:
        return T_ACCESS
    if line < 0 and n > 0 and outer * inner > 0:
        return T_REGION
    count = matmul_accesses(modifiers, values, s.ranges)
    if not in_bounds(s, p, count):
        return T_BOUNDS
    vectors, size = outer * inner, element_bytes(modifiers[X_FORMAT])
    ready, unit = operands_ready(s, p, d, MATRIX, count)
    start = start_instruction(s, d, MATRIX, t, ready, C_UNIT + unit)
    end = start + 1
    if n == 0 or vectors == 0:
        s.causes[d, MATRIX, C_COMPUTE] += 1
    else:
        first, last = 0, -1
        if region == KV:
            first, last = line // p.row_lines, matrix_last_row(p, line, k, n, size, modifiers[X_FULL])
        begin = _fetch_start(s, p, d, t, start, first, last)
        end, first_request, request, rows = _stream(s, p, modifiers, d, start, begin, k, n, vectors, size)
        s.free[d, FETCH] = request + 1
        if region == KV:
            s.next_fetch[d] = remember(s.fetches[d], s.next_fetch[d], first, last, request + 1)
        s.counters[d, N_FETCHED + region] += rows * p.row_bytes
        s.counters[d, N_USEFUL + region] += k * n * size
        s.counters[d, N_MACS] += k * n * vectors
        record_slice(s, d, FETCH, first_request, request + 1, pc)
    s.free[d, MATRIX] = end
    finish_instruction(s, p, d, MATRIX, count, end + matmul_latency(p))
    record_slice(s, d, MATRIX, start, end, pc)
    return 0


# Ring unit ------------------------------------------------------------------------------------------------
@compiled
def issue_gather(s: State, p: TimingParameters, d: int, pc: int, t: int) -> int:
    """Issue a gather up to its start; it completes when all devices have come to theirs."""
    n = s.values[2]
    if n < 0 or n > p.buffer_words:
        return T_COUNT
    count = gather_accesses(s.values, s.pc.shape[0], s.ranges)
    if not in_bounds(s, p, count):
        return T_BOUNDS
    ready, unit = operands_ready(s, p, d, RING, count)
    s.gathers[GATHER_N, d] = n
    s.gathers[GATHER_START, d] = start_instruction(s, d, RING, t, ready, C_UNIT + unit)
    s.gathers[GATHER_PC, d] = pc
    for slot in range(3):
        s.gather_values[d, slot] = s.values[slot]
    return 0
