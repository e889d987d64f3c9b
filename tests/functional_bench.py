"""A device with known registers and memory, on which a test runs a few instructions and sees what changed."""

from collections.abc import Callable

import numpy as np

from typebar.isa.instructions import Region
from typebar.isa.machine import Machine
from typebar.isa.program import Op, Program, assemble, op
from typebar.sim.functional import DeviceMemory, FunctionalSimulator, RunResult

TINY = Machine.load("tiny")
REGION_BYTES = 65536
SPECIAL_BITS = np.array(
    [0, 1 << 31, 1, 0x80000001, 0x007FFFFF, 0x00800000, 0x80800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000,
     0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0x3F800000, 0xBF800000, 0x477FF000, 0x7F7FF000],
    np.uint32,
)  # fmt: skip
"""Zeros, subnormals, edges of the normal range, infinities, NaNs, ones, fp16's and the operands' overflow edges."""


def bits(values: np.ndarray) -> np.ndarray:
    """The bit patterns of float32 values."""
    return np.asarray(values, np.float32).view(np.uint32)


def special(seed: int, count: int, plain: bool = False) -> np.ndarray:
    """float32 values: normally distributed, and unless `plain` mixed with any bit patterns and special values."""
    generator = np.random.default_rng(seed)
    values = generator.standard_normal(count).astype(np.float32)
    if plain:
        return values
    kind = generator.integers(0, 8, count)
    words = values.view(np.uint32)
    words[kind == 0] = generator.choice(SPECIAL_BITS, count)[kind == 0]
    words[kind == 1] = generator.integers(0, 2**32, count, np.uint32)[kind == 1]
    return values


class Bench:
    """One device; `before` and `memory_before` are copies of its state before the last run."""

    def __init__(self, seed: int = 0, machine: Machine = TINY, plain: bool = False) -> None:
        generator = np.random.default_rng(seed)
        self.machine = machine
        self.registers = special(seed, machine.vector.words, plain)
        self.memory = {region: generator.integers(0, 256, REGION_BYTES, np.uint8) for region in Region}
        self.restore_point = self.registers.copy()
        self.before = self.registers.copy()
        self._simulator: FunctionalSimulator | None = None

    def words(self, address: int, count: int) -> np.ndarray:
        """Registers as they are now, copied."""
        return self.registers[address : address + count].copy()

    def restore(self) -> None:
        """Set the registers back to the start."""
        self.registers[:] = self.restore_point

    def run(self, *code: str | Op, on_store: Callable[[int, int, int, int], None] | None = None) -> RunResult:
        """Run assembly text or instructions, then halt."""
        ops = [one for part in code for one in (assemble(part).ops if isinstance(part, str) else [part])]
        program = Program([*ops, op("halt")])
        simulator = FunctionalSimulator(program, self.machine, 1, [DeviceMemory(self.memory)], threads=1)
        simulator.vector_registers(0).view(np.uint32)[:] = self.registers.view(np.uint32)
        self.before = self.registers.copy()
        self.memory_before = {region: data.copy() for region, data in self.memory.items()}
        self._simulator = simulator
        try:
            return simulator.run(max_instructions=10_000, on_store=on_store)
        finally:
            self.registers.view(np.uint32)[:] = simulator.vector_registers(0).view(np.uint32)

    def scalars(self) -> list[int]:
        """The scalar registers after the last run."""
        assert self._simulator is not None
        return self._simulator.scalar_registers(0)

    def expect(self, address: int, values: np.ndarray) -> None:
        """The last run changed the registers from `address` on to `values`, bit for bit, and no other register."""
        expected = self.before.copy()
        expected.view(np.uint32)[address : address + len(values)] = bits(values)
        wrong = np.flatnonzero(bits(expected) != bits(self.registers))
        assert wrong.size == 0, f"registers {wrong[:5]}: {self.registers[wrong[:5]]}, not {expected[wrong[:5]]}"
