"""The matrix unit: vectors from the register file times a matrix that streams in from HBM, with an epilogue.

Handshake: `issued.ready` whenever the unit is free by the contract, whatever is offered; a transfer is the
instruction's start. `completed` shows its ticket from `matmul_latency` cycles after the end of its last step.

The sequencer (`steps.py`) and the loader (`loader.py`) keep contract time; weights (`weights.py`), vectors, dot units
and accumulators (`compute.py`) and the epilogue follow it at constant distances, tabulated in `geometry.py`.
"""

from __future__ import annotations

from typing import Any

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from typebar.hw.control.core import issued_layout
from typebar.hw.control.tickets import Domain
from typebar.hw.matrix.compute import Compute, row_words
from typebar.hw.matrix.epilogue import Epilogue
from typebar.hw.matrix.geometry import ROW_LAG, Geometry, delayed, freed_bits, job_from, job_layout
from typebar.hw.matrix.loader import Loader
from typebar.hw.matrix.steps import Steps
from typebar.hw.matrix.weights import Weights
from typebar.hw.memory.fetch import ARRIVED_BITS, FIFO_READ_CYCLES
from typebar.hw.ports import (
    CAUSE_BITS,
    READ_CYCLES,
    WRITE_CYCLES,
    activity_layout,
    completed_shape,
    flag_layout,
    read_port,
    write_port,
)
from typebar.hw.replicate import Shared
from typebar.isa.instructions import TARGET_BITS, Scale
from typebar.isa.machine import Machine
from typebar.isa.timing import Cause, matmul_latency, timing_parameters

assert READ_CYCLES == 2 and WRITE_CYCLES == 2 and FIFO_READ_CYCLES == 2


class MatrixUnit(wiring.Component):
    """The matrix unit of a machine.

    Rows of the FIFO: `arrived` counts those that can be used, modulo 2^16, in program order of the instructions that
    have any. `fifo_place` is where the first row of a read lies; `fifo_data` are `port_rows` rows from there on,
    FIFO_READ_CYCLES later. `freed` tells in a step's last cycle how many rows it has consumed.

    Flags: `overflow` (OPERAND_OVERFLOW) and `saturated` (STORE_SATURATED, of a patch).

    Accounting: `activity.waited` is the cause of the idle cycles before an instruction's start in the cycle of the
    transfer (then `begins` is set, and the cycle itself is active only if there is nothing to do), and of those before
    a step in its first cycle. `pc` is the instruction at hand.

    `shared` are the Verilog modules that it instantiates.
    """

    def __init__(self, machine: Machine) -> None:
        """The unit of a machine.

        Raises:
            MachineError: a latency of the machine is too small for the pipeline, or a size cannot be built.
        """
        self.machine, g = machine, Geometry.of(machine)
        self._g = g
        self._epilogue = Epilogue(machine, g.epilogue)
        self._weights, self._compute = Weights(machine), Compute(machine)
        parts = (self._weights, self._compute, self._epilogue)
        self.shared: tuple[Shared, ...] = tuple({item.name: item for part in parts for item in part.shared}.values())
        super().__init__(
            {
                "issued": In(stream.Signature(issued_layout(machine, Domain.MATRIX))),
                "waited": In(CAUSE_BITS),
                "read": Out(read_port(machine)),
                "write": Out(write_port(machine)),
                "arrived": In(ARRIVED_BITS),
                "freed": Out(freed_bits(machine)),
                "fifo_place": Out(range(machine.fifo_rows)),
                "fifo_data": In(8 * g.port_rows * g.row_bytes),
                "completed": Out(completed_shape(machine)),
                "overflow": Out(flag_layout()),
                "saturated": Out(flag_layout()),
                "activity": Out(activity_layout()),
                "begins": Out(1),
                "pc": Out(TARGET_BITS),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """The parts and what goes from one to another."""
        self._m = m = Module()
        machine = self.machine
        m.submodules.loader = loader = Loader(machine)
        m.submodules.steps = steps = Steps(machine)
        incoming, empty = job_from(m, machine, self.issued.payload)
        job, start = Signal(job_layout(machine)), Signal()
        transfer = self.issued.valid & self.issued.ready
        m.d.comb += [
            self.issued.ready.eq(~steps.active),
            start.eq(transfer & ~empty),
            self.begins.eq(transfer),
            loader.advance.eq(steps.advance),
            steps.loaded.eq(loader.ready),
            steps.arrived.eq(self.arrived),
            self.freed.eq(steps.freed),
            self.read.address.eq(loader.address),
            self.pc.eq(job.pc),
        ]
        for part in (loader, steps):
            m.d.comb += [part.start.eq(start), part.incoming.eq(incoming), part.job.eq(job)]
        with m.If(transfer):
            m.d.sync += job.eq(incoming)
        self._datapath(loader, steps)
        self._complete(transfer & empty, incoming.ticket, steps.finish, job.ticket)
        m.d.comb += [
            self.activity.active.eq(steps.computing | (transfer & empty)),
            self.activity.cause.eq(Cause.COMPUTE),
            self.activity.waited.eq(Mux(transfer, self.waited, steps.waited)),
        ]
        return m

    def _datapath(self, loader: Any, steps: Any) -> None:
        """Everything that follows contract time."""
        m, g = self._m, self._g
        m.submodules.weights = weights = self._weights
        m.submodules.compute = compute = self._compute
        load = delayed(m, loader.load, READ_CYCLES, "load")
        row, chunk = row_words(m, g, self.read.data, load)
        load = delayed(m, load, ROW_LAG - READ_CYCLES, "row_load")
        for part in (weights, compute):
            m.d.comb += [part.load.eq(load), part.row.eq(row), part.chunk.eq(chunk)]
        m.d.comb += [
            weights.read.eq(steps.read),
            weights.fifo_data.eq(self.fifo_data),
            self.fifo_place.eq(weights.fifo_place),
            compute.tile.eq(weights.tile),
            compute.own.eq(weights.own),
            compute.nan.eq(weights.nan),
            compute.compute.eq(steps.compute),
            compute.drain.eq(steps.drain),
            self.saturated.eq(weights.saturated),
            # In one cycle both can only belong to one instruction, or the weights to the older one.
            self.overflow.raised.eq(weights.overflow.raised | compute.overflow.raised),
            self.overflow.pc.eq(Mux(weights.overflow.raised, weights.overflow.pc, compute.overflow.pc)),
        ]
        self._finish(compute)

    def _finish(self, compute: Any) -> None:
        """The epilogue."""
        m, result = self._m, compute.result
        m.submodules.epilogue = epilogue = self._epilogue
        m.d.comb += [
            epilogue.valid.eq(result.valid),
            epilogue.sums.eq(compute.sums),
            epilogue.scale.eq(compute.scale),
            epilogue.bias.eq(compute.bias),
            epilogue.present.eq(result.mask),
            epilogue.mask.eq(result.mask),
            epilogue.keep.eq(result.keep),
            epilogue.address.eq(result.address),
            epilogue.use_scale.eq(result.scaling != Scale.NONE),
            epilogue.use_bias.eq(result.add_bias),
            epilogue.activation.eq(result.activation),
            epilogue.row_max.eq(result.row_max),
            epilogue.vector.eq(result.vector),
            epilogue.first_of_vector.eq(result.first),
            epilogue.last_of_instruction.eq(result.last),
            epilogue.maximum.eq(result.maximum),
            self.write.address.eq(epilogue.write.address),
            self.write.mask.eq(epilogue.write.mask),
            self.write.data.eq(epilogue.write.data),
        ]

    def _complete(self, empty: Any, incoming: Any, finish: Any, ticket: Any) -> None:
        """All instructions take as long from their end to their completion, so they keep their order."""
        m = self._m
        entry = Signal(data.StructLayout({"valid": 1, "ticket": self.completed.shape()}))
        m.d.comb += [entry.valid.eq(empty | finish), entry.ticket.eq(Mux(finish, ticket, incoming))]
        done = delayed(m, entry, matmul_latency(timing_parameters(self.machine)), "done")
        with m.If(done.valid):
            m.d.sync += self.completed.eq(done.ticket)
