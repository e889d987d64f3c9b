"""Resources of a machine's kernel by unit, beside DFX's and what an Alveo U280 has.

Out of context, from Yosys (`hw.synthesis` says how it counts); nothing is placed or routed. The platform's shell, PCIe
and all, is counted as what the platform keeps of the device; links (Aurora) and the memories' interconnect are not in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from typebar.hw.control.core import ControlCore
from typebar.hw.control_block import POINTER_BITS, ControlBlock
from typebar.hw.core import DELAYS
from typebar.hw.counters import Counters
from typebar.hw.faults import Ledger
from typebar.hw.matrix.unit import MatrixUnit
from typebar.hw.memory.fetch import FetchEngine
from typebar.hw.memory.unit import MemoryUnit
from typebar.hw.registers import RegisterFile
from typebar.hw.ring import RingUnit
from typebar.hw.synthesis import KINDS, Module, Resources, add, synthesise, total
from typebar.hw.vector.unit import VectorUnit
from typebar.isa.machine import Machine

UNITS: Mapping[str, Callable[[Machine], Any]] = {
    "matrix": MatrixUnit,
    "control": ControlCore,
    "registers": RegisterFile,
    "vector": VectorUnit,
    "memory": MemoryUnit,
    "ring": RingUnit,
    "fetch": FetchEngine,
    "counters": lambda machine: Counters(machine, DELAYS),
    "ledger": Ledger,
    "control block": ControlBlock,
}
"""Those that take longest first."""
U280: Resources = {"LUT": 1_303_680, "FF": 2_607_360, "DSP": 9_024, "BRAM": 2_016, "URAM": 960}
"""An Alveo U280 (DS963)."""
SHELL: Resources = {"LUT": 234_680, "FF": 457_360, "DSP": 534, "BRAM": 529, "URAM": 0}
"""What the platform xilinx_u280_gen3x16_xdma keeps: the device less the 1,069 k LUTs, 2,150 k registers, 1,487 block
RAMs, 960 UltraRAMs and 8,490 DSPs that UG1120 leaves to kernels."""
DFX_SHARE: Resources = {"LUT": 0.3993, "FF": 0.4252, "DSP": 0.3915, "BRAM": 0.5913, "URAM": 0.1083}
"""Share of a U280 that DFX took (Hong et al., MICRO 2022, section 6), shell included."""
LIMIT = 0.70
"""Share of each resource up to which a design is taken to be routable."""


@dataclass(frozen=True)
class Report:
    """Resources of a machine's kernel; `units` with the modules of each."""

    machine: str
    units: Mapping[str, list[Module]]
    ports: Resources

    def rows(self) -> dict[str, Resources]:
        """Resources by unit, the ports' own logic last."""
        return {name: total(modules) for name, modules in self.units.items()} | {"ports": add([self.ports])}

    def kernel(self) -> Resources:
        """The sum of the units."""
        return add(self.rows().values())

    def shares(self) -> Resources:
        """Shares of a U280, shell included."""
        kernel = self.kernel()
        return {kind: (kernel[kind] + SHELL[kind]) / U280[kind] for kind in KINDS}


def report(machine: Machine, processes: int = 2) -> Report:
    """Synthesise every unit of a machine, `processes` at a time; minutes, for a large machine.

    Raises:
        TypebarError: the machine cannot be built, or Yosys failed.
    """
    with ProcessPoolExecutor(processes) as pool:
        runs = {name: pool.submit(_unit, name, machine) for name in UNITS}
        units = {name: run.result() for name, run in runs.items()}
    # Each master adds the platform's pointer to its read and write addresses, a LUT a bit.
    masters = machine.hbm.channels + 1
    return Report(machine.name, units, {"LUT": 2 * masters * POINTER_BITS})


def _unit(name: str, machine: Machine) -> list[Module]:
    return synthesise(UNITS[name](machine))
