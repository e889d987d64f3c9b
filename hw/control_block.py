"""The control block: the AXI4-Lite slave through which the host sets a device up, starts it and asks how it went.

Addresses and meanings are those of `typebar.isa.registers`. One write and one read are in progress at a time: a write
takes effect in the cycle in which both its address and its data are taken, a read's data are there two cycles after
its address was taken. Responses are always OKAY.
"""

from __future__ import annotations

from amaranth.hdl import Const, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from typebar.hw.control.checks import DEVICE_BITS, TRAP_BITS, address_bits
from typebar.hw.counters import COUNTER_BITS, SELECT_BITS
from typebar.isa.instructions import TARGET_BITS, WORD_BITS, WORD_BYTES, Region
from typebar.isa.machine import Machine
from typebar.isa.registers import (
    ADDRESS_BITS,
    HARDWARE_VERSION,
    IDENTITY,
    NUMERIC_FLAGS,
    SOFT_RESET,
    START,
    Address,
    Status,
    isa_hash,
    pointer_address,
    region_address,
)
from typebar.isa.timing import UNIT_NAMES, timing_parameters
from typebar.isa.watchdog import watchdog_cycles

POINTER_BITS = 64
"""Width of a byte address on the platform's buses."""
STATUS_BITS = max(Status).bit_length()
UNIT_BITS = (len(UNIT_NAMES) - 1).bit_length()
WATCHDOG_BITS = 32
_HASH_DIGITS = 16
"""Digits of a hash's first 64 bits."""


def report_layout() -> data.StructLayout:
    """What a device says of its run: see `typebar.isa.registers.Address`."""
    return data.StructLayout(
        {
            "status": unsigned(STATUS_BITS),
            "trap": unsigned(TRAP_BITS),
            "pc": unsigned(TARGET_BITS),
            "trap_code": unsigned(32),
            "unit": unsigned(UNIT_BITS),
            "flags": unsigned(NUMERIC_FLAGS),
            "flag_pcs": data.ArrayLayout(unsigned(TARGET_BITS), NUMERIC_FLAGS),
        }
    )


def settings_layout(machine: Machine) -> data.StructLayout:
    """What the host sets before a run; widths are the machine's."""
    return data.StructLayout(
        {
            "rank": unsigned(DEVICE_BITS),
            "devices": unsigned(DEVICE_BITS),
            "entry": unsigned(TARGET_BITS),
            "length": range(machine.control.program_bytes // WORD_BYTES + 1),
            "watchdog": unsigned(WATCHDOG_BITS),
            "bases": data.ArrayLayout(unsigned(address_bits(machine)), len(Region)),
            "sizes": data.ArrayLayout(unsigned(address_bits(machine)), len(Region)),
        }
    )


def lite_ports() -> dict[str, wiring.Member]:
    """The five channels of the slave, seen from it."""
    return {
        "aw": In(stream.Signature(data.StructLayout({"addr": unsigned(ADDRESS_BITS)}))),
        "w": In(stream.Signature(data.StructLayout({"data": unsigned(32), "strb": unsigned(4)}))),
        "b": Out(stream.Signature(data.StructLayout({"resp": unsigned(2)}))),
        "ar": In(stream.Signature(data.StructLayout({"addr": unsigned(ADDRESS_BITS)}))),
        "r": Out(stream.Signature(data.StructLayout({"data": unsigned(32), "resp": unsigned(2)}))),
    }


class ControlBlock(wiring.Component):
    """The control block of a machine.

    `aw`, `w`, `b`, `ar`, `r`: the bus. `start` and `reset` for a cycle; `settings` and pointers hold; `load_*` writes
    program memory, a word a cycle. `report` is what the registers show; `select` asks for a counter, `counter` answers
    in the same cycle.
    """

    def __init__(self, machine: Machine) -> None:
        """Take a machine."""
        self.machine = machine
        self.words = machine.control.program_bytes // WORD_BYTES
        super().__init__(
            {
                **lite_ports(),
                "start": Out(1),
                "reset": Out(1),
                "settings": Out(settings_layout(machine)),
                "ddr_pointer": Out(POINTER_BITS),
                "hbm_pointers": Out(data.ArrayLayout(unsigned(POINTER_BITS), machine.hbm.channels)),
                "load_enable": Out(1),
                "load_address": Out(range(self.words)),
                "load_word": Out(WORD_BITS),
                "report": In(report_layout()),
                "select": Out(SELECT_BITS),
                "counter": In(COUNTER_BITS),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """Settings by address, then the two halves of the bus."""
        self._m = m = Module()
        self._settings = self._places()
        most = watchdog_cycles(timing_parameters(self.machine), devices=2)
        m.d.sync += [self.start.eq(0), self.reset.eq(0), self.load_enable.eq(0)]
        self._watchdog = Signal(WATCHDOG_BITS, init=min(most, (1 << WATCHDOG_BITS) - 1))
        self._settings[int(Address.WATCHDOG)] = self._watchdog
        m.d.comb += self.settings.watchdog.eq(self._watchdog)
        self._write()
        self._read()
        return m

    def _places(self) -> dict[int, Value]:
        """Registers that are read and written, by address of a 32-bit word."""
        settings, index = self.settings, Signal(range(self.words), name="program_index")
        self._index = index
        places: dict[int, Value] = {
            int(Address.RANK): settings.rank,
            int(Address.DEVICES): settings.devices,
            int(Address.ENTRY): settings.entry,
            int(Address.LENGTH): settings.length,
            int(Address.PROGRAM_INDEX): index,
        }
        wide: dict[int, Value] = {}
        for region in Region:
            wide[region_address(region)] = settings.bases[int(region)]
            wide[region_address(region, size=True)] = settings.sizes[int(region)]
        wide[pointer_address(None)] = self.ddr_pointer
        for channel in range(self.machine.hbm.channels):
            wide[pointer_address(channel)] = self.hbm_pointers[channel]
        for address, value in wide.items():
            places[address] = value[:32]
            if len(value) > 32:
                places[address + 4] = value[32:]
        return places

    def _write(self) -> None:
        """Address and data are taken together."""
        m = self._m
        taken, place = Signal(), self.aw.payload.addr[2:]
        whole, word = self.w.payload.strb.all(), self.w.payload.data
        m.d.comb += [
            taken.eq(self.aw.valid & self.w.valid & ~self.b.valid),
            self.aw.ready.eq(taken),
            self.w.ready.eq(taken),
        ]
        with m.If(taken):
            m.d.sync += self.b.valid.eq(1)
        with m.Elif(self.b.ready):
            m.d.sync += self.b.valid.eq(0)
        running = self.report.status == int(Status.RUNNING)
        m.d.comb += self.load_address.eq(self._index)
        with m.If(self.load_enable):
            m.d.sync += self._index.eq(self._index + 1)
        with m.If(taken & whole), m.Switch(place):
            with m.Case(Address.CONTROL >> 2):
                m.d.sync += [
                    self.start.eq(word[START.bit_length() - 1] & ~running),
                    self.reset.eq(word[SOFT_RESET.bit_length() - 1]),
                ]
            for address, value in self._settings.items():
                with m.Case(address >> 2):
                    m.d.sync += value.eq(word)
            for index in range(WORD_BITS // 32):
                with m.Case((Address.PROGRAM >> 2) + index):
                    m.d.sync += self.load_word.word_select(index, 32).eq(word)
                    if index == WORD_BITS // 32 - 1:
                        m.d.sync += self.load_enable.eq(~running)

    def _constants(self) -> dict[int, int]:
        """What the hardware is."""
        hashes = {Address.ISA_HASH: isa_hash(), Address.CONTRACT_HASH: self.machine.contract_hash()}
        found = {
            int(Address.ID): IDENTITY,
            int(Address.VERSION): HARDWARE_VERSION,
            int(Address.CAPABILITIES): self.machine.hbm.channels | int(self.machine.control.run_ahead) << 8,
            int(Address.PROGRAM_WORDS): self.words,
        }
        for address, digest in hashes.items():
            first = int(digest[:_HASH_DIGITS], 16)
            found |= {int(address): first & 0xFFFFFFFF, address + 4: first >> 32}
        return found

    def _read(self) -> None:
        """The address is registered, then the data."""
        m, report = self._m, self.report
        address, asked, value = Signal(ADDRESS_BITS), Signal(), Signal(32)
        m.d.comb += [
            self.ar.ready.eq(~asked & ~self.r.valid),
            self.select.eq((address >> 3)[:SELECT_BITS]),
        ]
        with m.If(self.ar.valid & self.ar.ready):
            m.d.sync += [address.eq(self.ar.payload.addr), asked.eq(1)]
        with m.If(asked):
            m.d.sync += [asked.eq(0), self.r.valid.eq(1), self.r.payload.data.eq(value)]
        with m.Elif(self.r.ready):
            m.d.sync += self.r.valid.eq(0)
        shown: dict[int, Value] = {place: Const(number, 32) for place, number in self._constants().items()}
        shown |= {
            int(Address.STATUS): report.status,
            int(Address.TRAP): report.trap,
            int(Address.PC): report.pc,
            int(Address.TRAP_CODE): report.trap_code,
            int(Address.UNIT): report.unit,
            int(Address.FLAGS): report.flags,
            **{Address.FLAG_PC + 4 * index: report.flag_pcs[index] for index in range(NUMERIC_FLAGS)},
            **self._settings,
        }
        with m.If(address >= int(Address.COUNTERS)):
            high = self.counter[32:]
            m.d.comb += value.eq(Mux(address[2], high, self.counter[:32]))
        with m.Else(), m.Switch(address[2:]):
            for place, register in shown.items():
                with m.Case(place >> 2):
                    m.d.comb += value.eq(register)
