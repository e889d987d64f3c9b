"""The core: control core, units and register file, with the counters and what watches over a run.

Everything is joined here and little is decided: which port of the register file belongs to whom, the phase of write
slots, which cycles are the run's, and what a run's outcome is. Contract time (docs/timing.md) begins in the cycle in
which the first instruction issues.
"""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Any

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from typebar.hw.control.core import ControlCore
from typebar.hw.control.tickets import Domain
from typebar.hw.control_block import report_layout, settings_layout
from typebar.hw.counters import COUNTER_BITS, SELECT_BITS, Counters
from typebar.hw.faults import Faults, Ledger
from typebar.hw.matrix.unit import MatrixUnit
from typebar.hw.memory.fetch import ARRIVED_BITS, FetchEngine, hbm_address_bits
from typebar.hw.memory.store import ddr_address_bits
from typebar.hw.memory.unit import MemoryUnit
from typebar.hw.ports import axi_read, axi_write, link_layout
from typebar.hw.registers import RegisterFile
from typebar.hw.ring import RingUnit
from typebar.hw.vector.unit import VectorUnit
from typebar.isa.instructions import HBM_REGIONS, WORD_BITS, WORD_BYTES
from typebar.isa.machine import LINE_BYTES, Machine
from typebar.isa.numerics import NumericFlag
from typebar.isa.registers import Status
from typebar.isa.timing import UNIT_NAMES

DELAYS = {"vector": 1, "memory": 1}
"""Units that report each cycle to the counters a cycle later."""
LINKS = ("cw", "ccw")


def bus_ports(machine: Machine) -> dict[str, wiring.Member]:
    """Ports to memories and neighbours, which core and kernel share."""
    link = stream.Signature(link_layout(machine))
    address, channel = hbm_address_bits(machine), machine.hbm.channel_bytes
    ports: dict[str, wiring.Member] = {
        "hbm_read": Out(axi_read(address, channel)).array(machine.hbm.channels),
        "hbm_write": Out(axi_write(address, channel)).array(machine.hbm.channels),
        "ddr_read": Out(axi_read(ddr_address_bits(machine), LINE_BYTES)),
        "ddr_write": Out(axi_write(ddr_address_bits(machine), LINE_BYTES)),
    }
    for name in LINKS:
        ports |= {f"{name}_out": Out(link), f"{name}_out_credit": In(1)}
        ports |= {f"{name}_in": In(link), f"{name}_in_credit": Out(1)}
    return ports


class Core(wiring.Component):
    """The core of a machine.

    `start` begins a run with `settings`, which hold; `load_*` write program memory while none is running. `report`, and
    the `counter` that `select` names, are what the control block shows. `hbm_read` and `hbm_write`, by channel, and
    `ddr_read` and `ddr_write` address bytes of the channels' and the DDR's own memory. Links as `RingUnit` has them.

    After a fault (`hw.faults`) the core stands still until it is reset.
    """

    def __init__(self, machine: Machine) -> None:
        """Build the units.

        Raises:
            MachineError: a latency of the machine is too small for a unit's pipeline, or a size cannot be built.
        """
        self.machine = machine
        self._control, self._registers = ControlCore(machine), RegisterFile(machine)
        self._matrix, self._vector = MatrixUnit(machine), VectorUnit(machine)
        self._memory, self._ring, self._fetch = MemoryUnit(machine), RingUnit(machine), FetchEngine(machine)
        super().__init__(
            {
                "start": In(1),
                "settings": In(settings_layout(machine)),
                "load_enable": In(1),
                "load_address": In(range(machine.control.program_bytes // WORD_BYTES)),
                "load_word": In(WORD_BITS),
                "report": Out(report_layout()),
                "select": In(SELECT_BITS),
                "counter": Out(COUNTER_BITS),
                **bus_ports(machine),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """Units, their wires, time, counters, outcome."""
        self._m = m = Module()
        m.submodules.control, m.submodules.registers = self._control, self._registers
        m.submodules.matrix, m.submodules.vector = self._matrix, self._vector
        m.submodules.memory, m.submodules.ring, m.submodules.fetch = self._memory, self._ring, self._fetch
        self._units: dict[Domain, tuple[Any, Any]] = {
            Domain.MATRIX: (self._matrix, self._matrix.issued),
            Domain.VECTOR: (self._vector, self._vector.issued),
            Domain.MEMORY: (self._memory, self._memory.memory),
            Domain.RING: (self._ring, self._ring.issued),
            Domain.FETCH: (self._fetch, self._fetch.fetch),
        }
        self._settings()
        self._streams()
        self._register_file()
        self._buses()
        self._time()
        self._count()
        self._outcome()
        return m

    # Wires ---------------------------------------------------------------------------------------------
    def _settings(self) -> None:
        """What the host set, to whom it concerns."""
        m, control, settings = self._m, self._control, self.settings
        m.d.comb += [
            control.start.eq(self.start),
            control.entry.eq(settings.entry),
            control.length.eq(settings.length),
            control.rank.eq(settings.rank),
            control.devices.eq(settings.devices),
            control.region_bytes.eq(settings.sizes),
            control.load_enable.eq(self.load_enable),
            control.load_address.eq(self.load_address),
            control.load_word.eq(self.load_word),
            self._ring.rank.eq(settings.rank),
            self._ring.devices.eq(settings.devices),
        ]
        for index in range(len(settings.bases)):
            m.d.comb += self._memory.bases[index].eq(settings.bases[index])
        for region in sorted(HBM_REGIONS):
            m.d.comb += self._fetch.bases[int(region)].eq(settings.bases[int(region)])

    def _streams(self) -> None:
        """Instructions to the units, tickets back."""
        m, control = self._m, self._control
        self._starts = {}
        for domain, (unit, port) in self._units.items():
            issued = getattr(control, domain.name.lower())
            wiring.connect(m, issued, port)
            m.d.comb += [control.completed[domain].eq(unit.completed), unit.waited.eq(control.waited[domain])]
            self._starts[domain] = issued.valid & issued.ready
        m.d.comb += [
            control.scalar_valid.eq(self._memory.scalar_valid),
            control.scalar_data.eq(self._memory.scalar_data),
            self._matrix.arrived.eq(self._fetch.arrived),
            self._matrix.fifo_data.eq(self._fetch.data),
            self._fetch.place.eq(self._matrix.fifo_place),
            self._fetch.freed.eq(self._matrix.freed),
        ]

    def _register_file(self) -> None:
        """Every port of the register file has one user; `vread` takes a word through the idle ring's."""
        m, file, control = self._m, self._registers, self._control
        users = {
            "read_vector_a": self._vector.read_a,
            "read_vector_b": self._vector.read_b,
            "read_matrix": self._matrix.read,
            "read_memory": self._memory.read,
            "write_vector": self._vector.write,
            "write_reduce": self._vector.write_reduce,
            "write_matrix": self._matrix.write,
            "write_memory": self._memory.write,
            "write_ring_cw": self._ring.ring_cw,
            "write_ring_ccw": self._ring.ring_ccw,
        }
        for name, port in users.items():
            wiring.connect(m, getattr(file, name), port)
        lanes = self.machine.vector.lanes.bit_length() - 1
        row = control.read_address >> lanes
        m.d.comb += [
            file.read_ring.address.eq(Mux(control.read_enable, row, self._ring.read.address)),
            self._ring.read.data.eq(file.read_ring.data),
            control.read_data.eq(file.read_ring.data[control.read_address[:lanes]]),
        ]

    def _buses(self) -> None:
        """Memories and links."""
        m = self._m
        for channel in range(self.machine.hbm.channels):
            wiring.connect(m, wiring.flipped(self.hbm_read[channel]), self._fetch.hbm[channel])
            wiring.connect(m, wiring.flipped(self.hbm_write[channel]), self._memory.hbm_write[channel])
        wiring.connect(m, wiring.flipped(self.ddr_read), self._memory.ddr_read)
        wiring.connect(m, wiring.flipped(self.ddr_write), self._memory.ddr_write)
        for name in LINKS:
            ring = self._ring
            wiring.connect(m, wiring.flipped(getattr(self, f"{name}_out")), getattr(ring, f"{name}_out"))
            wiring.connect(m, wiring.flipped(getattr(self, f"{name}_in")), getattr(ring, f"{name}_in"))
            m.d.comb += [
                getattr(ring, f"{name}_out_credit").eq(getattr(self, f"{name}_out_credit")),
                getattr(self, f"{name}_in_credit").eq(getattr(ring, f"{name}_in_credit")),
            ]

    # Time ----------------------------------------------------------------------------------------------
    def _time(self) -> None:
        """`_counting` in the run's cycles; write slots from cycle 0 on until the next start."""
        m, control = self._m, self._control
        period = self.machine.hbm.rows_per_write_slot + 1
        begun, begins, phase = Signal(), Signal(), Signal(range(period))
        self._counting = Signal()
        m.d.comb += [
            begins.eq(control.activity.active & ~begun),
            self._counting.eq(control.running & (begins | begun)),
            self._fetch.write_slot.eq(begun & (phase == period - 1)),
            self._memory.write_slot.eq(self._fetch.write_slot),
        ]
        with m.If(self.start):
            m.d.sync += [begun.eq(0), phase.eq(0)]
        with m.Elif(begins | begun):
            m.d.sync += [begun.eq(1), phase.eq(Mux(phase == period - 1, 0, phase + 1))]

    def _count(self) -> None:
        """Activities and traffic to the counters."""
        m, control, memory = self._m, self._control, self._memory
        m.submodules.counters = counters = Counters(self.machine, DELAYS)
        activities = {"issue": control.activity}
        activities |= {domain.name.lower(): unit.activity for domain, (unit, _) in self._units.items()}
        assert sorted(activities) == sorted(UNIT_NAMES)
        for name, activity in activities.items():
            m.d.comb += getattr(counters, f"activity_{name}").eq(activity)
        for domain in (Domain.MATRIX, Domain.MEMORY, Domain.RING):
            name = domain.name.lower()
            m.d.comb += [
                getattr(counters, name).eq(getattr(control, name).payload),
                getattr(counters, f"{name}_started").eq(self._starts[domain]),
            ]
        m.d.comb += [
            counters.begin.eq(self.start),
            counters.counting.eq(self._counting),
            counters.matrix_begins.eq(self._matrix.begins),
            counters.committed.eq(control.commit_valid),
            counters.devices.eq(self.settings.devices),
            counters.fetched.eq(self._fetch.fetched),
            counters.rows_written.eq(memory.rows_moved),
            counters.lines.eq(memory.lines_moved),
            counters.select.eq(self.select),
            self.counter.eq(counters.value),
        ]

    # Outcome -------------------------------------------------------------------------------------------
    def _progress(self) -> Value:
        """Whether an instruction issued, started or was done, or a word passed a port, in the cycle before."""
        m, control = self._m, self._control
        before, moved, progress = Signal.like(control.completed), Signal(), Signal()
        streams: list[Any] = [getattr(self, f"{name}_{side}") for name in LINKS for side in ("out", "in")]
        for port in (*(self.hbm_read[c] for c in range(self.machine.hbm.channels)), self.ddr_read):
            streams += [port.ar, port.r]
        for port in (*(self.hbm_write[c] for c in range(self.machine.hbm.channels)), self.ddr_write):
            streams += [port.aw, port.w, port.b]
        m.d.sync += [
            before.eq(control.completed),
            moved.eq(Cat(item.valid & item.ready for item in streams).any()),
            progress.eq(
                moved
                | control.commit_valid
                | reduce(or_, self._starts.values())
                | (before.as_value() != control.completed.as_value())
            ),
        ]
        return progress

    def _owed_rows(self) -> Value:
        """Whether rows have been requested that have not arrived."""
        m, fetch, requested = self._m, self._fetch, Signal(ARRIVED_BITS)
        m.d.sync += requested.eq(requested + fetch.fetched.any())
        return requested != fetch.arrived

    def _outcome(self) -> None:
        """The watchdog and other faults, numeric flags, and what the host is told."""
        m, control, report = self._m, self._control, self.report
        m.submodules.ledger, m.submodules.faults = ledger, faults = Ledger(self.machine), Faults()
        status = Signal(Status)
        m.d.comb += [
            ledger.issued.eq(control.issued),
            ledger.issuing_pc.eq(control.commit_pc),
            ledger.completed.eq(control.completed),
            faults.running.eq(status == Status.RUNNING),
            faults.progress.eq(self._progress()),
            faults.limit.eq(self.settings.watchdog),
            faults.valid.eq(ledger.valid),
            faults.unit.eq(ledger.unit),
            faults.pc.eq(ledger.pc),
            faults.issue_pc.eq(control.commit_pc),
            faults.owed.eq(self._owed_rows()),
            faults.fetch_error.eq(self._fetch.error),
            faults.fetch_pc.eq(self._fetch.pc),
            faults.memory_error.eq(self._memory.error),
            faults.memory_pc.eq(ledger.pcs[Domain.MEMORY]),
            faults.mismatch.eq(self._ring.mismatch),
            faults.mismatch_pc.eq(self._ring.mismatch_pc),
            control.stop.eq(faults.trap != 0),
            report.status.eq(status),
            report.trap.eq(control.trap),
            report.pc.eq(control.trap_pc),
            report.trap_code.eq(control.trap_code),
        ]
        with m.If(faults.trap != 0):
            m.d.comb += [
                status.eq(Status.ERROR),
                report.trap.eq(faults.trap),
                report.pc.eq(faults.fault_pc),
                report.unit.eq(faults.fault_unit),
            ]
        with m.Elif(control.trap != 0):
            m.d.comb += status.eq(Mux(control.idle, Status.ERROR, Status.RUNNING))
        with m.Elif(control.running):
            m.d.comb += status.eq(Status.RUNNING)
        with m.Elif(control.halted):
            m.d.comb += status.eq(Status.DONE)
        self._flags()

    def _flags(self) -> None:
        """Numeric flags of the run, each with the first instruction that raised it."""
        m, report = self._m, self.report
        sources: dict[NumericFlag, list[Any]] = {
            NumericFlag.OPERAND_OVERFLOW: [self._matrix.overflow],
            NumericFlag.STORE_SATURATED: [self._matrix.saturated, self._memory.saturated],
            NumericFlag.ARGMAX_NAN: [self._vector.argmax_nan],
        }
        for flag, found in sources.items():
            bit = int(flag).bit_length() - 1
            kept, pc = Signal(name=f"flag_{bit}"), Signal.like(report.flag_pcs[bit], name=f"flag_pc_{bit}")
            m.d.comb += [report.flags[bit].eq(kept), report.flag_pcs[bit].eq(pc)]
            for item in found:
                with m.If(item.raised & ~kept):
                    m.d.sync += [kept.eq(1), pc.eq(item.pc)]
            with m.If(self.start):
                m.d.sync += [kept.eq(0), pc.eq(0)]
