"""A kernel that does nothing but try its ports, with the real one's, to test the native harness by."""

from __future__ import annotations

from enum import IntEnum
from functools import cache

from amaranth.back import verilog
from amaranth.hdl import Array, Cat, ClockDomain, ClockSignal, Module, Mux, ResetSignal, Signal
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In

from typebar.hw.top import channel_name, link_ports, master_ports, slave_ports
from typebar.isa.machine import LINE_BYTES, Machine

BLOCK = 4
"""Beats of a block on a link."""
LOG = 1024


class Command(IntEnum):
    """What to do `COUNT` times."""

    NONE = 0
    READ = 1
    WRITE = 2
    SEND = 3


class Place(IntEnum):
    """Registers. The logs have an entry for each request taken and each response: the cycle, for reads also a word."""

    COMMAND = 0x00
    PORT = 0x04
    ADDRESS = 0x08
    ADDRESS_HIGH = 0x0C
    COUNT = 0x10
    DATA = 0x14
    STROBE = 0x18
    INDEX = 0x1C
    REQUEST = 0x40
    RESPONSE = 0x44
    WORD = 0x48
    RESPONSES = 0x4C
    CODE = 0x50
    CREDITS = 0x54
    CREDITED = 0x58


class Probe(wiring.Component):
    """Issues commands as fast as the ports take them; a port is a memory's number, or a link's direction."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        ports = {"ap_clk": In(1), "ap_rst_n": In(1), **slave_ports("s_axi_control")}
        for channel in range(machine.hbm.channels):
            ports |= master_ports(channel_name(channel), machine.hbm.channel_bytes)
        ports |= master_ports("m_axi_ddr", LINE_BYTES)
        for direction in ("cw", "ccw"):
            ports |= link_ports(f"axis_{direction}", 32 * machine.vector.lanes)
        super().__init__(ports)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.domains += ClockDomain("sync")
        m.d.comb += [ClockSignal().eq(self.ap_clk), ResetSignal().eq(~self.ap_rst_n)]
        values = {place: Signal(32, name=place.name.lower()) for place in Place if place < Place.REQUEST}
        now, sent, words, got = (Signal(32, name=name) for name in ("now", "sent", "words", "got"))
        request, response, word, code = Signal(), Signal(), Signal(32), Signal(2)
        m.d.sync += now.eq(now + 1)
        logs = {Place.REQUEST: (request, now, sent), Place.RESPONSE: (response, now, got)}
        logs[Place.WORD] = (response, word, got)
        found = {place: Signal(32) for place in (Place.CODE, Place.CREDITS, Place.CREDITED)} | {Place.RESPONSES: got}
        for place, (enable, entry, at) in logs.items():
            log = Memory(shape=32, depth=LOG, init=[])
            m.submodules[f"log_{place.name.lower()}"] = log
            write, read = log.write_port(), log.read_port(domain="comb")
            m.d.comb += [write.en.eq(enable), write.addr.eq(at), write.data.eq(entry)]
            m.d.comb += read.addr.eq(values[Place.INDEX])
            found[place] = read.data
        m.d.sync += [sent.eq(sent + request), got.eq(got + response)]
        with m.If(response):
            m.d.sync += found[Place.CODE].eq(found[Place.CODE] | code)
        self._memories(m, values, (sent, words), (request, response, word, code))
        self._links(m, values, sent, (request, response, word))
        with m.If(self.axis_cw_out_credit | self.axis_ccw_out_credit):
            m.d.sync += [found[Place.CREDITS].eq(found[Place.CREDITS] + 1), found[Place.CREDITED].eq(now)]
        self._bus(m, values, found, (sent, words, got, found[Place.CODE], found[Place.CREDITS]))
        return m

    def _memories(self, m: Module, values: dict, counts: tuple, events: tuple) -> None:
        (sent, words), (request, response, word, code) = counts, events
        channels = self.machine.hbm.channels
        for index in range(channels + 1):
            name = channel_name(index) if index < channels else "m_axi_ddr"
            width = self.machine.hbm.channel_bytes if index < channels else LINE_BYTES
            pin = {key.removeprefix(f"{name}_"): getattr(self, key) for key in self.signature.members if name in key}
            chosen = values[Place.PORT] == index
            reads, writes = values[Place.COMMAND] == Command.READ, values[Place.COMMAND] == Command.WRITE
            base = Cat(values[Place.ADDRESS], values[Place.ADDRESS_HIGH])
            left = sent < values[Place.COUNT]
            m.d.comb += [
                pin["arvalid"].eq(chosen & reads & left),
                pin["araddr"].eq(base + sent * width),
                pin["awvalid"].eq(chosen & writes & left),
                pin["awaddr"].eq(base + sent * width),
                pin["wvalid"].eq(chosen & writes & (words < values[Place.COUNT])),
                pin["wdata"].eq((values[Place.DATA] + words)[:32].replicate(width // 4)),
                pin["wstrb"].eq(values[Place.STROBE].replicate(-(-width // 32))),
                pin["wlast"].eq(1),
                pin["rready"].eq(1),
                pin["bready"].eq(1),
            ]
            with m.If(chosen & (reads | writes)):
                m.d.comb += [
                    request.eq((pin["arvalid"] & pin["arready"]) | (pin["awvalid"] & pin["awready"])),
                    response.eq(pin["rvalid"] | pin["bvalid"]),
                    word.eq(pin["rdata"]),
                    code.eq(Mux(pin["rvalid"], pin["rresp"], pin["bresp"])),
                ]
                m.d.sync += words.eq(words + (pin["wvalid"] & pin["wready"]))

    def _links(self, m: Module, values: dict, sent: Signal, events: tuple) -> None:
        request, response, word = events
        for direction, name in enumerate(("cw", "ccw")):
            pin = {key: getattr(self, f"axis_{name}_{key}") for key in ("out_tvalid", "out_tready", "out_tdata")}
            pin |= {key: getattr(self, f"axis_{name}_{key}") for key in ("out_tlast", "out_tuser", "in_tvalid")}
            into = {key: getattr(self, f"axis_{name}_in_{key}") for key in ("tdata", "tuser", "tready", "tvalid")}
            sends = (values[Place.COMMAND] == Command.SEND) & (values[Place.PORT] == direction)
            m.d.comb += [
                pin["out_tvalid"].eq(sends & (sent < values[Place.COUNT])),
                pin["out_tdata"].eq(sent + values[Place.DATA]),
                pin["out_tuser"].eq(sent << 16),
                pin["out_tlast"].eq(sent % BLOCK == BLOCK - 1),
                into["tready"].eq(1),
                getattr(self, f"axis_{name}_in_credit").eq(into["tvalid"]),
            ]
            with m.If(sends):
                m.d.comb += request.eq(pin["out_tvalid"] & pin["out_tready"])
            with m.If(into["tvalid"]):
                m.d.comb += [response.eq(1), word.eq(into["tdata"][:32] + into["tuser"])]

    def _bus(self, m: Module, values: dict, found: dict, cleared: tuple) -> None:
        """One transfer at a time; a command starts the counts again."""
        pin = {key: getattr(self, f"s_axi_control_{key}") for key in ("awvalid", "awready", "wvalid", "wready")}
        pin |= {key: getattr(self, f"s_axi_control_{key}") for key in ("bvalid", "bready", "arvalid", "arready")}
        pin |= {key: getattr(self, f"s_axi_control_{key}") for key in ("rvalid", "rready", "awaddr", "araddr")}
        writes = pin["awvalid"] & pin["wvalid"] & ~pin["bvalid"]
        reads = pin["arvalid"] & ~pin["rvalid"]
        m.d.comb += [pin["awready"].eq(writes), pin["wready"].eq(writes), pin["arready"].eq(reads)]
        m.d.sync += [
            pin["bvalid"].eq(writes | (pin["bvalid"] & ~pin["bready"])),
            pin["rvalid"].eq(reads | (pin["rvalid"] & ~pin["rready"])),
        ]
        with m.If(writes):
            for place, value in values.items():
                with m.If(pin["awaddr"] == place):
                    m.d.sync += value.eq(self.s_axi_control_wdata)
            with m.If(pin["awaddr"] == Place.COMMAND):
                m.d.sync += [item.eq(0) for item in cleared]
        with m.If(reads):
            words = Array(found.get(address, values.get(address, 0)) for address in range(0, 0x5C, 4))
            m.d.sync += self.s_axi_control_rdata.eq(words[pin["araddr"] >> 2])


@cache
def text(machine: Machine) -> str:
    """The probe's Verilog."""
    return verilog.convert(Probe(machine), name="kernel", emit_src=False)
