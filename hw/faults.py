"""What goes wrong outside a program: the watchdog, memories' errors, neighbours out of step; and whom to name.

The ledger knows the index of every instruction that is not done, so that a hang can be blamed on the oldest of them.
"""

from __future__ import annotations

from amaranth.hdl import Const, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from typebar.hw.control.checks import TRAP_BITS
from typebar.hw.control.tickets import Domain, ticket_bits
from typebar.isa.instructions import TARGET_BITS, Trap
from typebar.isa.machine import Machine
from typebar.isa.timing import FETCH_UNIT, UNIT_NAMES

UNIT_BITS = (len(UNIT_NAMES) - 1).bit_length()
WATCHDOG_BITS = 32
ISSUE_UNIT = UNIT_NAMES.index("issue")


def unit_number(domain: Domain) -> int:
    """A domain's place in UNIT_NAMES."""
    return FETCH_UNIT if domain is Domain.FETCH else UNIT_NAMES.index(domain.name.lower())


class Ledger(wiring.Component):
    """Which instructions are not done, by domain.

    In: `issued` (domains that take their next ticket), `issuing_pc`, the instruction's, and the tickets `completed`.
    Out, two cycles later: `pcs`, each domain's oldest instruction not done, or its last; and of all domains the oldest
    instruction not done, `unit` and `pc`, if there is one (`valid`). A matmul's fetch half counts as the older one.
    """

    def __init__(self, machine: Machine) -> None:
        """Take the number of instructions that a machine can owe."""
        self.bits = ticket_bits(machine)
        super().__init__(
            {
                "issued": In(len(Domain)),
                "issuing_pc": In(TARGET_BITS),
                "completed": In(data.ArrayLayout(self.bits, len(Domain))),
                "pcs": Out(data.ArrayLayout(TARGET_BITS, len(Domain))),
                "valid": Out(1),
                "unit": Out(UNIT_BITS),
                "pc": Out(TARGET_BITS),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """A memory for each domain, written at issue under the ticket, read at the oldest that is owed."""
        m = Module()
        # No domain owes more than a quarter of its tickets (`ControlCore` sees to it); all together order.
        place_bits = self.bits - 2
        order = Signal(self.bits + len(Domain).bit_length())
        entry = data.StructLayout({"pc": unsigned(TARGET_BITS), "order": unsigned(len(order))})
        best_valid: Value | None = None
        chosen: Value
        with m.If(self.issued.any()):
            m.d.sync += order.eq(order + 1)
        for domain in sorted(Domain, key=lambda item: item is not Domain.FETCH):
            memory = Memory(shape=entry, depth=1 << place_bits, init=[])
            m.submodules[domain.name.lower()] = memory
            write, read = memory.write_port(), memory.read_port()
            last, owes = Signal(self.bits, name="last"), Signal(name=f"owes_{domain.name.lower()}")
            owed = last != self.completed[domain]
            with m.If(self.issued[domain]):
                m.d.sync += last.eq(last + 1)
            m.d.comb += [
                write.addr.eq((last + 1)[:place_bits]),
                write.data.pc.eq(self.issuing_pc),
                write.data.order.eq(order),
                write.en.eq(self.issued[domain]),
                read.addr.eq((self.completed[domain] + owed)[:place_bits]),
                self.pcs[domain].eq(read.data.pc),
            ]
            m.d.sync += owes.eq(owed)
            if best_valid is None:
                best_valid, best = owes, read.data.order
                chosen, pc = Const(unit_number(domain), UNIT_BITS), read.data.pc
                continue
            older = Signal(name=f"older_{domain.name.lower()}")
            m.d.comb += older.eq(owes & (~best_valid | (read.data.order - best)[: len(order)][-1]))
            best_valid, best = best_valid | owes, Mux(older, read.data.order, best)
            chosen, pc = Mux(older, unit_number(domain), chosen), Mux(older, read.data.pc, pc)
        assert best_valid is not None
        m.d.sync += [self.valid.eq(best_valid), self.unit.eq(chosen), self.pc.eq(pc)]
        return m


class Faults(wiring.Component):
    """The first fault of a run, kept until reset.

    TIMEOUT if there was no `progress` for `limit` cycles (0: no limit) while `running`. It names the unit of the
    ledger's oldest instruction (`valid`, `unit`, `pc`): the fetch engine if that is a matmul whose rows are `owed`; if
    there is none, the scalar core at `issue_pc`. BUS for a `fetch_error` or a `memory_error`, RING_MISMATCH for a
    `mismatch`, each at the index beside it. Out: `trap` (0 if all is well), `fault_unit` and `fault_pc`.
    """

    def __init__(self) -> None:
        """No parameters."""
        pc = In(TARGET_BITS)
        super().__init__(
            {
                "running": In(1),
                "progress": In(1),
                "limit": In(WATCHDOG_BITS),
                "valid": In(1),
                "unit": In(UNIT_BITS),
                "pc": pc,
                "issue_pc": pc,
                "owed": In(1),
                "fetch_error": In(1),
                "fetch_pc": pc,
                "memory_error": In(1),
                "memory_pc": pc,
                "mismatch": In(1),
                "mismatch_pc": pc,
                "trap": Out(TRAP_BITS),
                "fault_unit": Out(UNIT_BITS),
                "fault_pc": Out(TARGET_BITS),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """A counter, then the first that speaks."""
        m = Module()
        silent, expired = Signal(WATCHDOG_BITS), Signal()
        with m.If(~self.running | self.progress | expired):
            m.d.sync += silent.eq(0)
        with m.Else():
            m.d.sync += silent.eq(silent + 1)
        m.d.sync += expired.eq(self.running & (silent == self.limit) & (self.limit != 0))
        matrix, fetch = unit_number(Domain.MATRIX), unit_number(Domain.FETCH)
        hung = Mux((self.unit == matrix) & self.owed, fetch, self.unit)
        sources = (
            (self.mismatch, Trap.RING_MISMATCH, unit_number(Domain.RING), self.mismatch_pc),
            (self.fetch_error, Trap.BUS, fetch, self.fetch_pc),
            (self.memory_error, Trap.BUS, unit_number(Domain.MEMORY), self.memory_pc),
            (expired & self.valid, Trap.TIMEOUT, hung, self.pc),
            (expired, Trap.TIMEOUT, ISSUE_UNIT, self.issue_pc),
        )
        with m.If(self.trap == 0):
            for index, (found, trap, unit, pc) in enumerate(sources):
                with m.If(found) if index == 0 else m.Elif(found):
                    m.d.sync += [self.trap.eq(int(trap)), self.fault_unit.eq(unit), self.fault_pc.eq(pc)]
        return m
