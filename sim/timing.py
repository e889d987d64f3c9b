"""The timing simulator: how many cycles a program takes on a ring of devices, and what every unit did in each.

It executes the scalar core and advances the recurrences of the timing contract (docs/timing.md); it holds no vector
data and no weights. Scalar loads see the caller's copy of the IO region; other loads and vector reads give 0.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from typebar.isa.errors import TypebarError
from typebar.isa.instructions import TRAP_TEXT, Trap
from typebar.isa.machine import MAX_DEVICES, Machine
from typebar.isa.program import Program, tables
from typebar.isa.timing import COUNTERS, STALL_SEEDS, UNIT_NAMES, Cause, timing_parameters
from typebar.sim.timing_core import BUDGET, FINISHED, GROW, advance
from typebar.sim.timing_state import C_DRAIN, LOG, SLICE, TRACE, Code, State, new_state

DEFAULT_MAX_INSTRUCTIONS = 1_000_000_000
_SLICE = 20_000_000
"""Instructions between two returns to Python, so that an interrupt is heard."""


@dataclass(frozen=True)
class Counters:
    """What one device executed and moved; bytes unless named otherwise.

    Fetched bytes are whole rows; useful bytes are k x n elements of each matmul. Written bytes are whole rows of
    HBM, useful ones the elements stored. DDR bytes are whole lines, loads and stores; ring bytes those sent.
    """

    instructions: int
    weights_fetched_bytes: int
    kv_fetched_bytes: int
    weights_useful_bytes: int
    kv_useful_bytes: int
    kv_written_bytes: int
    kv_useful_written_bytes: int
    ddr_bytes: int
    ring_bytes: int
    macs: int


assert tuple(item.name for item in fields(Counters)) == COUNTERS


@dataclass(frozen=True)
class StoreRecord:
    """A scalar store to the IO region: the host can see the value from `cycle` on."""

    cycle: int
    device: int
    line: int
    byte: int
    value: int


@dataclass(frozen=True)
class Trace:
    """Occupancy of units, in order of recording; arrays of one length.

    `unit` indexes `typebar.isa.timing.UNIT_NAMES`; the unit is occupied in cycles `start` to `end` - 1 by the
    instruction at `pc`.

    A profile has device 0 only, and with each slice what the unit and the device had come to when it ended: `causes`
    [slices, causes], cycles of that unit by `Cause`, which sum to `end`; `counters` [slices, counters], by `COUNTERS`.
    Both are None in a plain trace. What a slice cost or moved is its difference from the unit's slice before.
    """

    device: NDArray[np.int64]
    unit: NDArray[np.int64]
    start: NDArray[np.int64]
    end: NDArray[np.int64]
    pc: NDArray[np.int64]
    causes: NDArray[np.int64] | None = None
    counters: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class TimingResult:
    """A timing run. `causes[device][unit][cause]` are cycles that sum to `total_cycles` for every unit."""

    total_cycles: int
    devices: int
    device_cycles: tuple[int, ...]
    causes: tuple[dict[str, dict[str, int]], ...]
    counters: tuple[Counters, ...]
    stores: tuple[StoreRecord, ...]
    trace: Trace | None


def run_timing(
    program: Program,
    machine: Machine,
    devices: int,
    io: NDArray[np.int32],
    *,
    entry: int = 0,
    max_instructions: int = DEFAULT_MAX_INSTRUCTIONS,
    trace: bool = False,
    stall_seed: int = 0,
    profile: bool = False,
) -> TimingResult:
    """Time a program on `devices` devices from instruction `entry` until all have halted.

    `io` [devices, words] is the start of each device's IO region as 32-bit words, for scalar loads; it is not
    changed, and words beyond it read as 0. `max_instructions` counts all devices' instructions together.
    `trace` records what occupies every unit of every device; `profile`, of device 0 only, also what each slice cost.
    `stall_seed`, if not 0, delays memories and links as `typebar.isa.timing.stall` says, for verification.

    Raises:
        TypebarError: a device traps, `max_instructions` is reached, an argument is out of range, or the machine's
            FIFO cannot hold one step of its matrix unit.
    """
    if not 1 <= devices <= MAX_DEVICES:
        raise TypebarError(f"devices = {devices} is outside 1 to {MAX_DEVICES}")
    if io.ndim != 2 or io.shape[0] != devices:
        raise TypebarError(f"the IO words have shape {list(io.shape)}: give one row for each of {devices} devices")
    if not 0 <= stall_seed < STALL_SEEDS:
        raise TypebarError(f"stall_seed = {stall_seed} is outside 0 to {STALL_SEEDS - 1}")
    p = timing_parameters(machine, stall_seed)
    decoded = tables(program)
    code = Code(decoded.opcode, decoded.modifiers, decoded.register, decoded.immediate)
    state = new_state(p, machine.vector.segments, devices, io, trace, profile)
    state.pc[:] = entry
    while True:
        budget = min(max_instructions, int(state.used[2]) + _SLICE)
        reason, device, trap = advance(state, p, code, budget)
        if reason == FINISHED:
            return _result(state, machine)
        if reason == GROW:
            state = _grown(state)
        elif reason != BUDGET:
            raise TypebarError(
                f"timing run: device {device} stops at instruction {state.pc[device]} with {Trap(trap).name}:"
                f" {TRAP_TEXT[Trap(trap)]}"
            )
        elif budget == max_instructions:
            raise TypebarError(
                f"timing run: no end after max_instructions = {max_instructions}: raise it, or look for an endless"
                f" loop at instruction {state.pc[device]} of device {device}"
            )


def _grown(state: State) -> State:
    """The state with room for twice as many records in its log and trace."""
    return state._replace(
        log=np.concatenate([state.log, np.zeros_like(state.log)]),
        trace=np.concatenate([state.trace, np.zeros_like(state.trace)]),
    )


def _result(state: State, machine: Machine) -> TimingResult:
    total = int(state.time.max())
    state.causes[:, :, C_DRAIN] += total - state.free
    if (state.causes < 0).any() or (state.causes.sum(axis=2) != total).any():
        raise AssertionError("the causes of a unit do not sum to the total")
    causes = tuple(
        {
            unit: {Cause(i).name.lower(): int(cycles) for i, cycles in enumerate(row) if cycles}
            for unit, row in zip(UNIT_NAMES, device, strict=True)
        }
        for device in state.causes
    )
    order = np.argsort(state.log[: state.used[LOG], 0], kind="stable")
    return TimingResult(
        total_cycles=total,
        devices=len(state.pc),
        device_cycles=tuple(int(time) for time in state.time),
        causes=causes,
        counters=tuple(Counters(*(int(value) for value in row)) for row in state.counters),
        stores=tuple(StoreRecord(*(int(value) for value in state.log[row])) for row in order),
        trace=_trace(state) if len(state.trace) else None,
    )


def _trace(state: State) -> Trace:
    rows = state.trace[: state.used[TRACE]]
    device, unit, start, end, pc = np.ascontiguousarray(rows[:, :SLICE].T)
    if rows.shape[1] == SLICE:
        return Trace(device, unit, start, end, pc)
    counters = SLICE + len(Cause)
    return Trace(device, unit, start, end, pc, rows[:, SLICE:counters], rows[:, counters:])
