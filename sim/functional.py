"""The functional simulator: executes a program bit-exactly on a ring of devices, one instruction after another.

Every device runs the same program on its own memory. A device runs until its next ring instruction or its halt;
when all have got there the ring instruction is carried out for all of them together. Nothing here knows of time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from typebar.isa.errors import TypebarError
from typebar.isa.instructions import WORD_BYTES, Trap
from typebar.isa.machine import MAX_DEVICES, Machine
from typebar.isa.numerics import NumericFlag
from typebar.isa.program import Op, Program, decode_op
from typebar.sim import kernels
from typebar.sim.functional_matmul import MatmulBuilder
from typebar.sim.functional_ops import AT_RING, BUILDERS, Builder, Step, gather
from typebar.sim.functional_state import DeviceMemory, DeviceState, DeviceTrap, StoreHook

__all__ = [
    "DeviceMemory",
    "DeviceTrap",
    "FlagEvent",
    "FunctionalSimulator",
    "RunResult",
    "WatchHook",
]

FailureRule = Callable[[int, int], bool]
"""Called as rule(device, executed) before every instruction; true means that the device is lost from now on."""
WatchHook = Callable[[int, int], None]
"""Called as hook(device, pc) when a device has executed the instruction at pc."""


@dataclass(frozen=True)
class FlagEvent:
    """The first instruction of a device that raised a numeric flag in a run."""

    pc: int
    device: int


@dataclass(frozen=True)
class RunResult:
    """What a run did: instructions executed (all devices together, and by name), and the numeric flags raised,
    each with its first instruction on the lowest device that raised it."""

    instructions: int
    counts: dict[str, int]
    flags: dict[NumericFlag, FlagEvent]


class FunctionalSimulator:
    """A program bound to a machine and the memories of a ring of devices.

    Vector registers outlive a run, as on the device; scalar registers do not.
    """

    def __init__(
        self,
        program: Program | NDArray[np.uint8] | bytes,
        machine: Machine,
        devices: int,
        memories: Sequence[DeviceMemory],
        threads: int | None = None,
        seed: int | None = None,
    ) -> None:
        """Decode the program and bind the memories.

        `program` may be raw words, 64 bytes each, of which some do not decode: those trap when reached. `threads`
        bounds the threads of the matrix kernel (default: as the kernels are set). `seed` fills the vector registers
        with random bit patterns instead of zeros, to show that a program does not lean on them.

        Raises:
            TypebarError: a device or thread count out of range, a memory count other than `devices`, a region that
                is not usable as memory, or raw words that are not whole.
        """
        if not 1 <= devices <= MAX_DEVICES:
            raise TypebarError(f"a ring has 1 to {MAX_DEVICES} devices, not {devices}")
        if len(memories) != devices:
            raise TypebarError(f"{devices} devices need as many memories, not {len(memories)}")
        if threads is not None and threads < 1:
            raise TypebarError(f"threads must be at least 1, not {threads}")
        self._threads = threads
        self._ops: list[Op | None] = [*program.ops] if isinstance(program, Program) else _decode_words(program)
        self._code = _compile(self._ops, machine)
        self._plain = self._code
        self.states = [DeviceState(rank, devices, machine, memory) for rank, memory in enumerate(memories)]
        self._failure: FailureRule | None = None
        self._lost: set[int] = set()
        if seed is not None:
            generator = np.random.default_rng(seed)
            for state in self.states:
                state.words[:] = generator.integers(-(2**31), 2**31, state.words.size, np.int32)

    def vector_registers(self, device: int) -> NDArray[np.float32]:
        """The vector register file of a device, float32 [words]: a live view."""
        return self.states[device].vector

    def scalar_registers(self, device: int) -> list[int]:
        """The scalar registers of a device after a run, as signed 32-bit values."""
        return list(self.states[device].registers)

    def fail_after(self, rule: int | FailureRule | None) -> None:
        """Inject the loss of devices: after a number of instructions of one device, counted over all runs from its
        construction, or when a rule of (device, executed) says so. A lost device stays lost. None takes it back.
        """
        if rule is None:
            self._failure = None
            self._lost.clear()
        elif isinstance(rule, int):
            limit = rule
            self._failure = lambda device, executed: executed >= limit
        else:
            self._failure = rule

    def watch(self, instructions: Iterable[int], hook: WatchHook | None) -> None:
        """Tell `hook` whenever a device has executed one of `instructions`; None takes every watch back.

        The others run at full speed. Not for ring instructions, which no device finishes alone.

        Raises:
            TypebarError: an index outside the program, or that of a ring instruction.
        """
        self._code = list(self._plain)
        if hook is None:
            return
        for pc in instructions:
            op = self._ops[pc] if 0 <= pc < len(self._ops) else None
            if op is None or op.kind.name == "gather":
                raise TypebarError(
                    f"instruction {pc} cannot be watched: it is none of the program, or a ring instruction"
                )
            self._code[pc] = _watched(self._plain[pc], pc, hook)

    def run(
        self,
        entry: int = 0,
        max_instructions: int | None = None,
        on_store: StoreHook | None = None,
    ) -> RunResult:
        """Run from instruction `entry` until every device halts.

        `max_instructions` bounds what one device may execute; `on_store` is told of every `sstore`.

        Raises:
            DeviceTrap: a device stopped with an error; memory and registers stay as its older instructions left them.
            TypebarError: a device executed `max_instructions` and did not halt.
        """
        if entry < 0:
            raise TypebarError(f"an entry point is an instruction index, not {entry}")
        for state in self.states:
            state.reset(entry, len(self._code), on_store)
        before = kernels.threads()
        if self._threads is not None:
            kernels.set_threads(self._threads)
        try:
            while AT_RING in [self._advance(state, max_instructions) for state in self.states]:
                gather(self.states)
        finally:
            kernels.set_threads(before)
        return self._result()

    def _advance(self, state: DeviceState, limit: int | None) -> int:
        """Run one device to its next event."""
        code, counts, failure = self._code, state.counts, self._failure
        length, pc, executed = len(code), state.resume, state.executed
        stop_at = -1 if limit is None else state.started + limit
        try:
            while pc >= 0:
                state.pc = pc
                if failure is not None and self._is_lost(failure, state.rank, executed):
                    raise state.stop(Trap.DEVICE_LOST)
                if executed == stop_at:
                    raise TypebarError(
                        f"device {state.rank} did not halt within {limit} instructions (it is at instruction {pc}):"
                        " raise the limit, or look for an endless loop"
                    )
                if pc >= length:
                    raise state.stop(Trap.PROGRAM_END)
                pc = code[pc](state)
                counts[state.pc] += 1
                executed += 1
        finally:
            state.executed = executed
        return pc

    def _is_lost(self, failure: FailureRule, device: int, executed: int) -> bool:
        if device not in self._lost and failure(device, executed):
            self._lost.add(device)
        return device in self._lost

    def _result(self) -> RunResult:
        counts: dict[str, int] = {}
        flags: dict[NumericFlag, FlagEvent] = {}
        for state in self.states:
            for op, count in zip(self._ops, state.counts, strict=True):
                if count:
                    assert op is not None
                    counts[op.kind.name] = counts.get(op.kind.name, 0) + count
            for flag, pc in state.flags.items():
                flags.setdefault(NumericFlag(flag), FlagEvent(pc, state.rank))
        return RunResult(sum(counts.values()), counts, flags)


def _decode_words(words: NDArray[np.uint8] | bytes) -> list[Op | None]:
    raw = bytes(words)
    if len(raw) % WORD_BYTES:
        raise TypebarError(f"a program is a multiple of {WORD_BYTES} bytes, not {len(raw)}: it is truncated")
    return [decode_op(raw[at : at + WORD_BYTES]) for at in range(0, len(raw), WORD_BYTES)]


def _compile(ops: Sequence[Op | None], machine: Machine) -> list[Step]:
    builders: dict[str, Builder] = {**BUILDERS, "matmul": MatmulBuilder(machine)}
    return [_illegal if op is None else builders[op.kind.name](op, index) for index, op in enumerate(ops)]


def _illegal(state: DeviceState) -> int:
    raise state.stop(Trap.ILLEGAL)


def _watched(step: Step, pc: int, hook: WatchHook) -> Step:
    def watched(state: DeviceState) -> int:
        following = step(state)
        hook(state.rank, pc)
        return following

    return watched
