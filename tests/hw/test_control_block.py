"""The control block on its bus, the counters' sums of random activity, and what the ledger and the watchdog blame."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from amaranth.sim import Simulator

from typebar.hw.control.tickets import Domain, ticket_bits
from typebar.hw.control_block import ControlBlock
from typebar.hw.counters import CauseCounters
from typebar.hw.faults import Faults, Ledger, unit_number
from typebar.isa.instructions import Region, Trap
from typebar.isa.machine import Machine
from typebar.isa.registers import (
    HARDWARE_VERSION,
    IDENTITY,
    SOFT_RESET,
    START,
    Address,
    Register,
    Status,
    counter_address,
    isa_hash,
    pointer_address,
    region_address,
    register_address,
    total_address,
)
from typebar.isa.timing import UNIT_NAMES, Cause, timing_parameters
from typebar.isa.watchdog import watchdog_cycles

TINY = Machine.load("tiny")


def simulate(dut: Any, bench: Callable[[Any], Any]) -> None:
    """Run a test bench to its end."""
    simulator = Simulator(dut)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()


class Bus:
    """The host's side of the control block, a transfer at a time; notes pulses and program words."""

    def __init__(self, ctx: Any, dut: ControlBlock) -> None:
        self.ctx, self.dut = ctx, dut
        self.pulses: list[str] = []
        self.words: dict[int, int] = {}

    async def tick(self) -> None:
        ctx, dut = self.ctx, self.dut
        self.pulses += [name for name in ("start", "reset") if ctx.get(getattr(dut, name))]
        if ctx.get(dut.load_enable):
            self.words[ctx.get(dut.load_address)] = ctx.get(dut.load_word)
        await ctx.tick()

    async def until(self, condition: Any) -> None:
        for _ in range(20):
            if self.ctx.get(condition):
                return
            await self.tick()
        raise AssertionError("the bus hangs")

    async def write(self, address: int, value: int, strobe: int = 15, apart: int = 0) -> None:
        ctx, dut = self.ctx, self.dut
        ctx.set(dut.aw.payload.addr, address)
        ctx.set(dut.aw.valid, 1)
        for _ in range(apart):
            await self.tick()
        ctx.set(dut.w.payload.data, value)
        ctx.set(dut.w.payload.strb, strobe)
        ctx.set(dut.w.valid, 1)
        await self.until(dut.aw.ready & dut.w.ready)
        await self.tick()
        ctx.set(dut.aw.valid, 0)
        ctx.set(dut.w.valid, 0)
        await self.until(dut.b.valid)
        ctx.set(dut.b.ready, 1)
        await self.tick()
        ctx.set(dut.b.ready, 0)
        assert not ctx.get(dut.b.valid)

    async def read(self, address: int, wait: int = 0) -> int:
        ctx, dut = self.ctx, self.dut
        ctx.set(dut.ar.payload.addr, address)
        ctx.set(dut.ar.valid, 1)
        await self.until(dut.ar.ready)
        await self.tick()
        ctx.set(dut.ar.valid, 0)
        await self.until(dut.r.valid)
        for _ in range(wait):
            await self.tick()
        value = ctx.get(dut.r.payload.data)
        ctx.set(dut.r.ready, 1)
        await self.tick()
        ctx.set(dut.r.ready, 0)
        return int(value)


def test_identity_settings_and_what_cannot_be_written() -> None:
    dut = ControlBlock(TINY)

    async def bench(ctx: Any) -> None:
        bus = Bus(ctx, dut)
        assert await bus.read(Address.ID) == IDENTITY
        assert await bus.read(Address.VERSION, wait=3) == HARDWARE_VERSION
        for address, digest in ((Address.ISA_HASH, isa_hash()), (Address.CONTRACT_HASH, TINY.contract_hash())):
            low, high = await bus.read(address), await bus.read(address + 4)
            assert high << 32 | low == int(digest[:16], 16)
        assert await bus.read(Address.CAPABILITIES) == TINY.hbm.channels | 0x100
        assert await bus.read(Address.PROGRAM_WORDS) == TINY.control.program_bytes // 64
        assert await bus.read(Address.WATCHDOG) == watchdog_cycles(timing_parameters(TINY), 2)
        settings = {Address.RANK: 3, Address.DEVICES: 5, Address.ENTRY: 77, Address.LENGTH: 100, Address.WATCHDOG: 9}
        wide = {region_address(region): 0x1000 * (1 + region) for region in Region}
        wide |= {region_address(region, size=True): 0x40000 + region for region in Region}
        wide |= {pointer_address(channel): 0x123456789000 + 64 * (channel or 9) for channel in (None, 0, 1)}
        for address, value in settings.items():
            await bus.write(address, value, apart=2)
        for address, value in wide.items():
            await bus.write(address, value & 0xFFFFFFFF)
            await bus.write(address + 4, value >> 32)
        await bus.write(Address.RANK, 60, strobe=1)
        await bus.write(Address.ID, 0)
        await bus.write(Address.FLAGS, 7)
        assert await bus.read(Address.ID) == IDENTITY and await bus.read(Address.FLAGS) == 0
        assert await bus.read(0x7F8) == 0
        for address, value in settings.items():
            assert await bus.read(address) == value
        for address, value in wide.items():
            assert await bus.read(address) | await bus.read(address + 4) << 32 == value
        assert ctx.get(dut.settings.bases[Region.KV]) == 0x2000 and ctx.get(dut.settings.watchdog) == 9
        assert ctx.get(dut.hbm_pointers[1]) == wide[pointer_address(1)]
        assert not bus.pulses

    simulate(dut, bench)


def test_start_reset_program_and_report() -> None:
    dut = ControlBlock(TINY)

    async def bench(ctx: Any) -> None:
        bus, rng = Bus(ctx, dut), random.Random(2)
        words = [rng.getrandbits(512) for _ in range(3)]
        await bus.write(Address.PROGRAM_INDEX, 7)
        for word in words:
            for part in range(16):
                await bus.write(Address.PROGRAM + 4 * part, word >> 32 * part & 0xFFFFFFFF)
        assert bus.words == {7 + index: word for index, word in enumerate(words)}
        assert await bus.read(Address.PROGRAM_INDEX) == 10
        await bus.write(Address.CONTROL, START)
        await bus.write(Address.CONTROL, SOFT_RESET)
        assert bus.pulses == ["start", "reset"]
        report = {
            "status": Status.RUNNING,
            "trap": Trap.BUS,
            "pc": 4711,
            "trap_code": 0xFFFFFFFE,
            "unit": 5,
            "flags": 5,
        }
        for name, value in report.items():
            ctx.set(dut.report[name], int(value))
        ctx.set(dut.report.flag_pcs[2], 99)
        await bus.write(Address.CONTROL, START)
        await bus.write(Address.PROGRAM + 60, 1)
        assert bus.pulses == ["start", "reset"] and len(bus.words) == 3, "a running program was disturbed"
        places = [Address.STATUS, Address.TRAP, Address.PC, Address.TRAP_CODE, Address.UNIT, Address.FLAGS]
        assert [await bus.read(place) for place in places] == [int(value) for value in report.values()]
        place = register_address(Register.FLAG_PC + 2)
        assert place is not None and await bus.read(place) == 99

    simulate(dut, bench)


def test_counters_are_read_by_their_addresses() -> None:
    dut = ControlBlock(TINY)

    async def bench(ctx: Any) -> None:
        bus, asked = Bus(ctx, dut), []
        ctx.set(dut.counter, 0x1234_89ABCDEF)
        addresses = [counter_address(unit, cause) for unit in UNIT_NAMES for cause in Cause] + [total_address("macs")]
        for address in addresses:
            assert (await bus.read(address), await bus.read(address + 4)) == (0x89ABCDEF, 0x1234)
            asked.append(ctx.get(dut.select))
        expected = [32 * unit + int(cause) for unit in range(len(UNIT_NAMES)) for cause in Cause]
        assert asked == [*expected, 32 * len(UNIT_NAMES) + 10]

    simulate(dut, bench)


def test_cycles_go_to_the_cause_that_ends_a_stretch() -> None:
    dut = CauseCounters()

    async def bench(ctx: Any) -> None:
        rng = random.Random(6)
        for _ in range(12):
            expected, idle, length = [0] * 32, 0, rng.randrange(1, 120)
            ctx.set(dut.clear, 1)
            await ctx.tick()
            ctx.set(dut.clear, 0)
            ctx.set(dut.counting, 1)
            for _ in range(length):
                active, cause, waited = rng.random() < 0.5, rng.randrange(3), rng.randrange(20)
                begins = rng.random() < 0.1
                ctx.set(dut.activity, {"active": active, "cause": cause, "waited": waited})
                ctx.set(dut.begins, begins)
                if active or begins:
                    expected[waited] += idle
                    idle = 0
                expected[cause] += active
                idle += not active
                await ctx.tick()
            ctx.set(dut.counting, 0)
            expected[int(Cause.DRAIN)] += idle
            await ctx.tick()
            for cause in range(32):
                ctx.set(dut.select, cause)
                assert ctx.get(dut.value) == expected[cause]
            await ctx.tick().repeat(1 + rng.randrange(3))

    simulate(dut, bench)


def test_the_ledger_names_the_oldest() -> None:
    dut, mask = Ledger(TINY), (1 << ticket_bits(TINY)) - 1

    async def bench(ctx: Any) -> None:
        rng = random.Random(9)
        given: list[tuple[Domain, int]] = []
        last, done = dict.fromkeys(Domain, 0), dict.fromkeys(Domain, 0)
        for pc in range(1500):
            domains = [Domain.MATRIX, Domain.FETCH] if rng.random() < 0.3 else [rng.choice(list(Domain)[:4])]
            owed = {domain: sum(item[0] is domain for item in given) for domain in Domain}
            if rng.random() < 0.5 and max(owed.values()) < 60:
                ctx.set(dut.issued, sum(1 << domain for domain in domains))
                given += [(domain, pc) for domain in sorted(domains, reverse=True)]
                for domain in domains:
                    last[domain] = last[domain] + 1 & mask
            else:
                ctx.set(dut.issued, 0)
            ctx.set(dut.issuing_pc, pc)
            await ctx.tick()
            ctx.set(dut.issued, 0)
            for domain in Domain:
                if any(item[0] is domain for item in given) and rng.random() < 0.2:
                    given.remove(next(item for item in given if item[0] is domain))
                    done[domain] = done[domain] + 1 & mask
                ctx.set(dut.completed[domain], done[domain])
            await ctx.tick().repeat(3)
            assert ctx.get(dut.valid) == bool(given)
            if given:
                domain, at = given[0]
                assert (ctx.get(dut.unit), ctx.get(dut.pc)) == (unit_number(domain), at)

    simulate(dut, bench)


def test_the_watchdog_speaks_after_its_limit_and_the_first_fault_stays() -> None:
    dut = Faults()

    async def bench(ctx: Any) -> None:
        ctx.set(dut.running, 1)
        ctx.set(dut.valid, 1)
        ctx.set(dut.unit, unit_number(Domain.MATRIX))
        ctx.set(dut.pc, 17)
        await ctx.tick().repeat(300)
        assert ctx.get(dut.trap) == 0, "no limit"
        ctx.set(dut.running, 0)
        await ctx.tick()
        ctx.set(dut.running, 1)
        ctx.set(dut.limit, 50)
        for _ in range(3):
            await ctx.tick().repeat(45)
            ctx.set(dut.progress, 1)
            await ctx.tick()
            ctx.set(dut.progress, 0)
        assert ctx.get(dut.trap) == 0
        ctx.set(dut.owed, 1)
        await ctx.tick().repeat(53)
        assert ctx.get(dut.trap) == Trap.TIMEOUT
        assert (ctx.get(dut.fault_unit), ctx.get(dut.fault_pc)) == (unit_number(Domain.FETCH), 17)
        ctx.set(dut.mismatch, 1)
        await ctx.tick().repeat(2)
        assert ctx.get(dut.trap) == Trap.TIMEOUT

    simulate(dut, bench)
