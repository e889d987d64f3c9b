"""Performance counters: every cycle of every unit by its cause, and what a run moved.

Time is the contract's (docs/timing.md, "Accounting"): cycle 0 is the one in which the first instruction issues, the
last that in which `halt` does. Counters are exact once that cycle is over and the units' delays have passed.
"""

from __future__ import annotations

from collections.abc import Mapping

from amaranth.hdl import Array, Const, Module, Mux, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from typebar.hw.control.checks import DEVICE_BITS, word_bits
from typebar.hw.control.core import issued_layout
from typebar.hw.control.decoder import modifier, slot
from typebar.hw.control.tickets import Domain
from typebar.hw.ports import CAUSE_BITS, activity_layout
from typebar.isa.instructions import FORMAT_BYTES, HBM_REGIONS, Format, Region
from typebar.isa.machine import LINE_BYTES, Machine
from typebar.isa.registers import TOTAL_NAMES
from typebar.isa.timing import LAST_HBM_REGION, STORE, UNIT_NAMES, Cause

COUNTER_BITS = 48
"""Width of a counter: 16 days at 200 MHz."""
SELECT_BITS = 3 + CAUSE_BITS
"""Width of a counter's number: a unit of UNIT_NAMES and a cause, or the number of units and a total."""


class CauseCounters(wiring.Component):
    """Cycles of one unit by cause: counts lengths of runs and adds each to its cause's sum when it ends.

    `counting`: this cycle of `activity` belongs to the run. An idle stretch belongs to `waited` of the active cycle
    that ends it, the last one, when `counting` ends, to DRAIN. `begins` ends a stretch in the same way before a cycle
    that may itself be idle. `clear` sets all to 0. `value` is that of cause
    `select`, a cycle after the run's last at the latest.
    """

    def __init__(self) -> None:
        """One unit's counters."""
        super().__init__(
            {
                "clear": In(1),
                "counting": In(1),
                "activity": In(activity_layout()),
                "begins": In(1),
                "select": In(CAUSE_BITS),
                "value": Out(COUNTER_BITS),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """A run ends in at most one place a cycle, so one memory with one adder holds all sums."""
        m = Module()
        m.submodules.sums = sums = Memory(shape=COUNTER_BITS, depth=1 << CAUSE_BITS, init=[])
        write, own, other = sums.write_port(), sums.read_port(domain="comb"), sums.read_port(domain="comb")
        known = Signal(1 << CAUSE_BITS)
        running, idle, cause, length = Signal(), Signal(), Signal(CAUSE_BITS), Signal(COUNTER_BITS)
        same, ended, charged = Signal(), Signal(), Signal(CAUSE_BITS)
        now = self.activity
        m.d.comb += [
            same.eq(~self.begins & Mux(idle, ~now.active, now.active & (now.cause == cause))),
            ended.eq(running & ~(self.counting & same)),
            charged.eq(Mux(idle, Mux(self.counting, now.waited, int(Cause.DRAIN)), cause)),
            own.addr.eq(charged),
            write.addr.eq(charged),
            write.data.eq(Mux(known.bit_select(charged, 1), own.data, 0) + length),
            write.en.eq(ended),
            other.addr.eq(self.select),
            self.value.eq(Mux(known.bit_select(self.select, 1), other.data, 0)),
        ]
        m.d.sync += running.eq(self.counting)
        with m.If(self.counting):
            m.d.sync += [
                idle.eq(~now.active),
                cause.eq(now.cause),
                length.eq(Mux(running & same, length, 0) + 1),
            ]
        with m.If(ended):
            m.d.sync += known.bit_select(charged, 1).eq(1)
        with m.If(self.clear):
            m.d.sync += [known.eq(0), running.eq(0)]
        return m


class Totals(wiring.Component):
    """Sums over a run, in the order of TOTAL_NAMES.

    `counting` and `committed` count cycles and instructions; `matrix`, `memory` and `ring` with their `started` are
    instructions as they start, `fetched` a row of either HBM region requested, `rows_written` and `lines` what stores
    and DDR accesses move in this cycle. `value` is that of total `select`; starts count four cycles later.
    """

    def __init__(self, machine: Machine) -> None:
        """Take a machine's sizes."""
        self.machine = machine
        units = {domain.name.lower(): domain for domain in (Domain.MATRIX, Domain.MEMORY, Domain.RING)}
        super().__init__(
            {
                "clear": In(1),
                "counting": In(1),
                "committed": In(1),
                **{name: In(issued_layout(machine, domain)) for name, domain in units.items()},
                **{f"{name}_started": In(1) for name in units},
                "devices": In(DEVICE_BITS),
                "fetched": In(len(HBM_REGIONS)),
                "rows_written": In(2),
                "lines": In(2),
                "select": In(CAUSE_BITS),
                "value": Out(COUNTER_BITS),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """Counters of events, and products of operands in registered steps."""
        self._m = m = Module()
        row = self.machine.row_bytes.bit_length() - 1
        line = LINE_BYTES.bit_length() - 1
        added: dict[str, Value] = {
            "cycles": self.counting,
            "instructions": self.committed,
            "weights_fetched_bytes": self.fetched[Region.WEIGHTS] << row,
            "kv_fetched_bytes": self.fetched[Region.KV] << row,
            "kv_written_bytes": self.rows_written << row,
            "ddr_bytes": self.lines << line,
            **self._matmul(),
            **self._store(),
            **self._gather(),
        }
        assert sorted(added) == sorted(TOTAL_NAMES)
        sums = Array(Signal(COUNTER_BITS, name=name) for name in TOTAL_NAMES)
        for name, total in zip(TOTAL_NAMES, sums, strict=True):
            with m.If(self.clear):
                m.d.sync += total.eq(0)
            with m.Else():
                m.d.sync += total.eq(total + added[name])
        m.d.comb += self.value.eq(Mux(self.select < len(TOTAL_NAMES), sums[self.select], 0))
        return m

    def _registered(self, value: Value, bits: int, name: str) -> Signal:
        """The value a cycle later."""
        register = Signal(bits, name=name)
        self._m.d.sync += register.eq(value)
        return register

    def _matmul(self) -> dict[str, Value]:
        """Multiply-accumulates, k x n x vectors, and useful bytes, k x n elements, if there are vectors."""
        item, bits = self.matrix, word_bits(self.machine)
        short = self.machine.matrix.vectors.bit_length()

        def operand(name: str, width: int, gate: Value) -> Signal:
            value = Value.cast(item["values"][slot("matmul", name)])[:width]
            return self._registered(Mux(gate, value, 0), width, name)

        outer, inner = (Value.cast(item["values"][slot("matmul", name)]) for name in ("outer", "inner"))
        some = self.matrix_started & (outer != 0) & (inner != 0)
        k, n = operand("k", 17, some), operand("n", bits, some)
        vectors = self._registered(operand("outer", short, some) * operand("inner", short, some), short, "vectors")
        region, shift = self._kind("matmul", item.modifiers)
        region, shift = (self._registered(self._registered(v, len(v), "kind"), len(v), "kind") for v in (region, shift))
        elements = self._registered(k * n, 17 + bits, "elements")
        useful = {
            f"{name}_useful_bytes": Mux(region == int(number), elements << shift, 0)
            for name, number in (("weights", Region.WEIGHTS), ("kv", Region.KV))
        }
        return {**useful, "macs": self._registered(elements * vectors, 17 + bits + short, "macs")}

    def _kind(self, name: str, modifiers: Value) -> tuple[Value, Value]:
        """Region, and log2 of the element's size."""
        shifts = Array(Const(FORMAT_BYTES[item].bit_length() - 1, 2) for item in Format)
        return modifier(modifiers, name, "region"), shifts[modifier(modifiers, name, "format")[:2]]

    def _store(self) -> dict[str, Value]:
        """Useful bytes of stores to HBM."""
        item, bits = self.memory, word_bits(self.machine)
        region, shift = self._kind("store", item.modifiers)
        here = self.memory_started & (item.opcode == STORE) & (region <= LAST_HBM_REGION)
        outer, inner = (
            self._registered(Mux(here, Value.cast(item["values"][slot("store", name)])[:bits], 0), bits, name)
            for name in ("outer", "inner")
        )
        words = self._registered(outer * inner, bits, "words")
        delayed = self._registered(self._registered(shift, 2, "shift"), 2, "shift")
        return {"kv_useful_written_bytes": words << delayed}

    def _gather(self) -> dict[str, Value]:
        """Bytes sent: a device's words go to every other one."""
        bits = word_bits(self.machine)
        n = Value.cast(self.ring["values"][slot("gather", "n")])[:bits]
        words = self._registered(Mux(self.ring_started, n, 0), bits, "gathered")
        sent = self._registered(words * (self.devices - 1)[:DEVICE_BITS], bits + DEVICE_BITS, "sent")
        return {"ring_bytes": sent << 2}


class Counters(wiring.Component):
    """All counters of a device; `activity_*` by UNIT_NAMES, `select` a unit and a cause, or beyond them a total.

    `begin` clears; `counting` is set in the run's cycles. A unit in `delays` reports each cycle that much later.
    `matrix_begins`: the matrix unit starts an instruction, whose first cycles may be idle too.
    """

    def __init__(self, machine: Machine, delays: Mapping[str, int]) -> None:
        """Take a machine and the delays, in cycles, of those units that have one."""
        self.delays, self._totals = dict(delays), Totals(machine)
        totals = self._totals.signature.members
        inner = {
            name: member for name, member in totals.items() if name not in ("clear", "counting", "select", "value")
        }
        super().__init__(
            {
                "begin": In(1),
                "counting": In(1),
                **{f"activity_{name}": In(activity_layout()) for name in UNIT_NAMES},
                "matrix_begins": In(1),
                **inner,
                "select": In(SELECT_BITS),
                "value": Out(COUNTER_BITS),
            }
        )
        self._inner = tuple(inner)

    def elaborate(self, platform: object) -> Module:
        """Side by side."""
        m = Module()
        m.submodules.totals = totals = self._totals
        m.d.comb += [getattr(totals, name).eq(getattr(self, name)) for name in self._inner]
        m.d.comb += [totals.clear.eq(self.begin), totals.counting.eq(self.counting)]
        unit, cause = self.select[CAUSE_BITS:], self.select[:CAUSE_BITS]
        values = []
        for name in UNIT_NAMES:
            counters, counting = CauseCounters(), self.counting
            m.submodules[name] = counters
            for _ in range(self.delays.get(name, 0)):
                later = Signal(name=f"counting_{name}")
                m.d.sync += later.eq(counting)
                counting = later
            m.d.comb += [
                counters.clear.eq(self.begin),
                counters.counting.eq(counting),
                counters.activity.eq(getattr(self, f"activity_{name}")),
                counters.select.eq(cause),
            ]
            if name == "matrix":
                m.d.comb += counters.begins.eq(self.matrix_begins)
            values.append(counters.value)
        m.d.comb += totals.select.eq(cause)
        m.d.comb += self.value.eq(Array([*values, totals.value, Const(0)])[unit])
        return m
