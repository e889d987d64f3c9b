"""The compiled pass of the timing simulator: the scalar core, in program order, for all devices jointly.

Every unit is in order, so each instruction's times follow from times already known and no event queue is needed. A
device runs until its next ring instruction, which is then resolved for all devices together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numba import njit

from typebar.isa import checks, instructions, timing
from typebar.isa.instructions import BY_NAME
from typebar.isa.timing import OP, SLOAD, TimingParameters
from typebar.sim import timing_state, timing_units
from typebar.sim.timing_state import (
    AT_RING,
    C_BRANCH,
    C_FENCE,
    C_ISSUE,
    C_MEMORY,
    C_QUEUE,
    C_READ,
    C_SKEW,
    C_TRANSFER,
    C_UNIT,
    E_GATHERS,
    GATHER_DONE,
    GATHER_N,
    GATHER_PC,
    GATHER_START,
    HALTED,
    LOG,
    MATRIX,
    MEMORY,
    N_INSTRUCTIONS,
    N_RING,
    RING,
    RUNNING,
    SCALAR,
    T_BOUNDS,
    T_END,
    T_RING,
    T_SOFTWARE,
    TRACE,
    UNITS,
    VECTOR,
    Code,
    State,
    compiled,
    finish_instruction,
    gather_accesses,
    gather_cycles,
    gather_done,
    record_slice,
)  # fmt: skip
from typebar.sim.timing_units import issue_gather, issue_matrix, issue_memory, issue_vector

HALT, TRAP, FENCE, SLI, VREAD = OP["halt"], OP["trap"], OP["fence"], OP["sli"], OP["vread"]
SADD, SSUB, SMUL, SMIN, SMAX = OP["sadd"], OP["ssub"], OP["smul"], OP["smin"], OP["smax"]
SAND, SSHL, SSHR, SFGT = OP["sand"], OP["sshl"], OP["sshr"], OP["sfgt"]
BEQ, BNE, BLT, BGE = OP["beq"], OP["bne"], OP["blt"], OP["bge"]
OPERANDS = np.array([len(BY_NAME[n].operands) if n else 0 for n in map({v: k for k, v in OP.items()}.get, range(256))])
"""Operand slots by opcode."""
UNIT_OF = np.array([int(BY_NAME[n].unit) if n else 0 for n in map({v: k for k, v in OP.items()}.get, range(256))])
"""Unit by opcode."""

FINISHED, GROW, BUDGET, STOPPED = 0, 1, 2, 3
"""Why the pass returned: all devices halted; log or trace is full; the budget is spent; a device trapped."""


@compiled
def _wrap(value: int) -> int:
    """The signed 32-bit integer with the value's low half."""
    return ((value + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)


@compiled
def _float_key(bits: int) -> int:
    """An integer that orders like the float32 with these bits, subnormals as zeros (not for NaN)."""
    magnitude = bits & 0x7FFFFFFF
    if magnitude < 0x00800000:
        return 0
    return -magnitude if bits < 0 else magnitude


@compiled
def _arithmetic(opcode: int, a: int, b: int) -> int:
    """Result of a two-operand scalar instruction."""
    if opcode == SADD:
        return int(_wrap(a + b))
    if opcode == SSUB:
        return int(_wrap(a - b))
    if opcode == SMUL:
        return int(_wrap(a * b))
    if opcode == SMIN:
        return min(a, b)
    if opcode == SMAX:
        return max(a, b)
    if opcode == SAND:
        return a & b
    if opcode == SSHL:
        return int(_wrap(a << (b & 31)))
    if opcode == SSHR:
        return a >> (b & 31)
    if (a & 0x7FFFFFFF) > 0x7F800000 or (b & 0x7FFFFFFF) > 0x7F800000:
        return 0
    return 1 if _float_key(a) > _float_key(b) else 0


@compiled
def _branches(opcode: int, a: int, b: int) -> bool:
    if opcode == BEQ:
        return a == b
    if opcode == BNE:
        return a != b
    return a < b if opcode == BLT else a >= b


@compiled
def _hold(s: State, d: int, ready: int, cause: int) -> None:
    """Nothing issues before `ready`; charges the wait."""
    if ready > s.time[d]:
        s.causes[d, SCALAR, cause] += ready - s.time[d]
        s.time[d] = ready


@compiled
def _wait(s: State, d: int, ready: int, cause: int) -> int:
    """The issue cycle when issue waits until `ready`; charges the wait and the issue cycle itself."""
    _hold(s, d, ready, cause)
    s.causes[d, SCALAR, C_ISSUE] += 1
    return int(s.time[d])


@compiled
def _execute_scalar(s: State, p: TimingParameters, code: Code, d: int, pc: int) -> int:
    """Execute an instruction of the scalar core; sets pc and time. Returns a trap or 0."""
    opcode, rd = code.opcode[pc], code.modifiers[pc, 0]
    a, b = s.values[0], s.values[1]
    if opcode == TRAP:
        return T_SOFTWARE
    if opcode in (HALT, FENCE):
        ready = 0
        for unit in range(UNITS):
            ready = max(ready, s.done[d, unit])
        s.time[d] = _wait(s, d, ready, C_FENCE) + 1
        if opcode == HALT:
            s.status[d] = HALTED
            s.free[d, SCALAR] = s.time[d]
    elif opcode == VREAD:
        if a < 0 or a >= p.words:
            return T_BOUNDS
        segment = a // p.segment_words
        _hold(s, d, s.write_done[d, segment], C_UNIT + s.write_unit[d, segment])
        t = _wait(s, d, s.done[d, RING], C_UNIT + RING)
        s.causes[d, SCALAR, C_READ] += p.read_latency - 1
        s.time[d] = t + p.read_latency
        if rd != 0:
            s.registers[d, rd] = 0
    elif BEQ <= opcode <= BGE:
        s.time[d] = _wait(s, d, 0, C_ISSUE) + 1
        if _branches(opcode, a, b):
            s.causes[d, SCALAR, C_BRANCH] += p.branch_cycles - 1
            s.time[d] += p.branch_cycles - 1
            s.pc[d] = rd
            return 0
    else:
        s.time[d] = _wait(s, d, 0, C_ISSUE) + 1
        if rd != 0:
            s.registers[d, rd] = code.modifiers[pc, 1] if opcode == SLI else _arithmetic(opcode, a, b)
    s.pc[d] = pc + 1
    return 0


@compiled
def _issue(s: State, p: TimingParameters, code: Code, d: int, pc: int, unit: int) -> int:
    """Issue an instruction to a unit once its queue has space; sets pc and time. Returns a trap or 0."""
    t = _wait(s, d, s.queue[d, unit, s.entered[d, unit]], C_QUEUE)
    if unit == VECTOR:
        trap = issue_vector(s, p, code, d, pc, t)
    elif unit == MATRIX:
        trap = issue_matrix(s, p, code, d, pc, t)
    elif unit == MEMORY:
        trap = issue_memory(s, p, code, d, pc, t)
    else:
        trap = issue_gather(s, p, d, pc, t)
        s.status[d] = AT_RING
    s.time[d] = t + 1
    if code.opcode[pc] == SLOAD and s.done[d, MEMORY] > t + 1:
        s.causes[d, SCALAR, C_MEMORY] += s.done[d, MEMORY] - (t + 1)
        s.time[d] = s.done[d, MEMORY]
    s.pc[d] = pc + 1
    return int(trap)


@compiled
def _run_device(s: State, p: TimingParameters, code: Code, d: int, budget: int) -> tuple[int, int]:
    """Run a device to its next ring instruction or halt: (reason or 0, trap). Spends one of `s.used[2]` each."""
    reserve = s.pc.shape[0] + 2
    while s.status[d] == RUNNING:
        if s.used[LOG] + 1 > s.log.shape[0] or (s.trace.shape[0] > 0 and s.used[TRACE] + reserve > s.trace.shape[0]):
            return GROW, 0
        if s.used[2] >= budget:
            return BUDGET, 0
        pc = s.pc[d]
        if pc < 0 or pc >= code.opcode.shape[0]:
            return STOPPED, T_END
        opcode = code.opcode[pc]
        for slot in range(OPERANDS[opcode]):
            s.values[slot] = _wrap(s.registers[d, code.register[pc, slot]] + code.immediate[pc, slot])
        unit = UNIT_OF[opcode]
        trap = _execute_scalar(s, p, code, d, pc) if unit == SCALAR else _issue(s, p, code, d, pc, unit)
        if trap:
            s.pc[d] = pc
            return STOPPED, trap
        s.used[2] += 1
        s.counters[d, N_INSTRUCTIONS] += 1
    return FINISHED, 0


@compiled
def _resolve_ring(s: State, p: TimingParameters) -> None:
    """Complete the ring instruction at which all devices are."""
    devices = s.pc.shape[0]
    n = s.gathers[GATHER_N, 0]
    together = gather_cycles(p, n, devices)
    before = s.events[0, E_GATHERS]
    gather_done(p, n, s.gathers[GATHER_START], s.gather_sends, s.gathers[GATHER_DONE], before)
    s.events[0, E_GATHERS] = before + 1
    for d in range(devices):
        start = s.gathers[GATHER_START, d]
        count = gather_accesses(s.gather_values[d], devices, s.ranges)
        done = finish_instruction(s, p, d, RING, count, s.gathers[GATHER_DONE, d])
        s.free[d, RING] = done
        s.causes[d, RING, C_TRANSFER] += min(done - start, together)
        s.causes[d, RING, C_SKEW] += max(0, done - start - together)
        s.counters[d, N_RING] += 4 * n * (devices - 1)
        s.status[d] = RUNNING
        record_slice(s, d, RING, start, done, s.gathers[GATHER_PC, d])


@compiled
def _advance(s: State, p: TimingParameters, code: Code, budget: int) -> tuple[int, int, int]:
    """Run until all devices halt or something stops the pass: (reason, device, trap)."""
    devices = s.pc.shape[0]
    while True:
        for d in range(devices):
            reason, trap = _run_device(s, p, code, d, budget)
            if reason != FINISHED:
                return reason, d, trap
        for d in range(devices):
            if s.status[d] != s.status[0]:
                return STOPPED, d, T_RING
            if s.status[d] == AT_RING and s.gathers[GATHER_N, d] != s.gathers[GATHER_N, 0]:
                return STOPPED, d, T_RING
        if s.status[0] == HALTED:
            return FINISHED, 0, 0
        if s.trace.shape[0] > 0 and s.used[TRACE] + devices > s.trace.shape[0]:
            return GROW, 0, 0
        _resolve_ring(s, p)


def _cached(sources: str) -> Callable[[State, TimingParameters, Code, int], tuple[int, int, int]]:
    """The pass with a compilation cache that also knows the files which it is compiled from.

    The compiler's cache watches only the file of the cached function; a constant from an enclosing scope is part
    of its key.
    """

    def advance(s: State, p: TimingParameters, code: Code, budget: int) -> tuple[int, int, int]:
        if len(sources) == 0:
            return STOPPED, 0, 0
        return _advance(s, p, code, budget)

    dispatcher: Callable[[State, TimingParameters, Code, int], tuple[int, int, int]] = njit(cache=True)(advance)
    return dispatcher


def _digest() -> str:
    modules = (checks, instructions, timing, timing_state, timing_units)
    files = [str(module.__file__) for module in modules] + [__file__]
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()


advance = _cached(_digest())
"""(state, parameters, code, budget) -> (reason, device, trap): run until `budget` instructions in all have executed,
all devices have halted, a device traps, or log or trace must grow. May be called again with the same state."""
