"""The kernel: core and control block behind flat AXI ports, as a Vitis RTL kernel has them.

Ports: `ap_clk`, `ap_rst_n` (low resets); `s_axi_control_*`, the AXI4-Lite slave of `typebar.isa.registers`;
`m_axi_hbm00_*` and on, an AXI4 master for each HBM channel, and `m_axi_ddr_*`; streams to and from the ring's
neighbours: `axis_cw_out_*` sends clockwise (to device d + 1), `axis_cw_in_*` receives what the neighbour on the other
side (d - 1) sends clockwise, `axis_ccw_*` likewise anticlockwise. A beat's `tdata` is one row of the register file,
`tuser` the gather's number (bits 0 to 7) and the block's length in words (bits 8 on); `tlast` ends a block. Each
direction has credits beside it: a cycle with `axis_cw_in_credit` tells the sender on the other end, a link's latency
later, in a cycle with its `axis_cw_out_credit`, that a row's place is free.

Masters ask for single beats, in order, without IDs, with full-width data; byte strobes say what a write changes.
"""

from __future__ import annotations

from typing import Any

from amaranth.hdl import Cat, ClockDomain, ClockSignal, DomainRenamer, Module, ResetSignal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from typebar.hw.control_block import POINTER_BITS, ControlBlock
from typebar.hw.core import LINKS, Core
from typebar.hw.replicate import convert
from typebar.isa.machine import LINE_BYTES, Machine
from typebar.isa.registers import ADDRESS_BITS

USER_BITS = 32
_INCREMENTING, _BUFFERABLE = 1, 3
_READ, _WRITE = "ar", "aw"


def master_ports(name: str, data_bytes: int) -> dict[str, wiring.Member]:
    """Members of a full AXI4 master without IDs."""
    ports: dict[str, wiring.Member] = {}
    for channel in (_WRITE, _READ):
        widths = {"addr": POINTER_BITS, "len": 8, "size": 3, "burst": 2, "lock": 1, "cache": 4, "prot": 3, "qos": 4}
        ports |= {f"{name}_{channel}{field}": Out(width) for field, width in widths.items()}
        ports |= {f"{name}_{channel}valid": Out(1), f"{name}_{channel}ready": In(1)}
    ports |= {f"{name}_wdata": Out(8 * data_bytes), f"{name}_wstrb": Out(data_bytes), f"{name}_wlast": Out(1)}
    ports |= {f"{name}_wvalid": Out(1), f"{name}_wready": In(1)}
    ports |= {f"{name}_bresp": In(2), f"{name}_bvalid": In(1), f"{name}_bready": Out(1)}
    ports |= {f"{name}_rdata": In(8 * data_bytes), f"{name}_rresp": In(2), f"{name}_rlast": In(1)}
    return ports | {f"{name}_rvalid": In(1), f"{name}_rready": Out(1)}


def slave_ports(name: str) -> dict[str, wiring.Member]:
    """Members of the AXI4-Lite slave."""
    ports: dict[str, wiring.Member] = {}
    for channel, widths in (
        ("aw", {"addr": ADDRESS_BITS}),
        ("w", {"data": 32, "strb": 4}),
        ("ar", {"addr": ADDRESS_BITS}),
    ):
        ports |= {f"{name}_{channel}{field}": In(width) for field, width in widths.items()}
        ports |= {f"{name}_{channel}valid": In(1), f"{name}_{channel}ready": Out(1)}
    for channel, widths in (("b", {"resp": 2}), ("r", {"data": 32, "resp": 2})):
        ports |= {f"{name}_{channel}{field}": Out(width) for field, width in widths.items()}
        ports |= {f"{name}_{channel}valid": Out(1), f"{name}_{channel}ready": In(1)}
    return ports


def link_ports(name: str, row_bits: int) -> dict[str, wiring.Member]:
    """Members of a ring direction: what leaves and what arrives."""
    ports: dict[str, wiring.Member] = {}
    for side, away in (("out", Out), ("in", In)):
        widths = {"tdata": row_bits, "tuser": USER_BITS, "tlast": 1, "tvalid": 1}
        ports |= {f"{name}_{side}_{field}": away(width) for field, width in widths.items()}
        back = In if away is Out else Out
        ports |= {f"{name}_{side}_tready": back(1), f"{name}_{side}_credit": back(1)}
    return ports


def channel_name(channel: int) -> str:
    """Name of an HBM channel's master."""
    return f"m_axi_hbm{channel:02d}"


class Top(wiring.Component):
    """The kernel of a machine."""

    def __init__(self, machine: Machine) -> None:
        """Build the core.

        Raises:
            MachineError: the hardware cannot be built for the machine.
        """
        self.machine = machine
        self._core, self._block = Core(machine), ControlBlock(machine)
        ports: dict[str, wiring.Member] = {"ap_clk": In(1), "ap_rst_n": In(1), **slave_ports("s_axi_control")}
        for channel in range(machine.hbm.channels):
            ports |= master_ports(channel_name(channel), machine.hbm.channel_bytes)
        ports |= master_ports("m_axi_ddr", LINE_BYTES)
        for direction in LINKS:
            ports |= link_ports(f"axis_{direction}", 32 * machine.vector.lanes)
        super().__init__(ports)

    def elaborate(self, platform: object) -> Module:
        """Two clock domains of one clock: a soft reset is the core's alone."""
        self._m = m = Module()
        core, block = self._core, self._block
        m.domains += [ClockDomain("sync"), ClockDomain("core")]
        m.submodules.control_block = block
        m.submodules.core = DomainRenamer("core")(core)
        m.d.comb += [
            ClockSignal().eq(self.ap_clk),
            ResetSignal().eq(~self.ap_rst_n),
            ClockSignal("core").eq(self.ap_clk),
            ResetSignal("core").eq(~self.ap_rst_n | block.reset),
            core.start.eq(block.start),
            core.settings.eq(block.settings),
            core.load_enable.eq(block.load_enable),
            core.load_address.eq(block.load_address),
            core.load_word.eq(block.load_word),
            core.select.eq(block.select),
            block.report.eq(core.report),
            block.counter.eq(core.counter),
        ]
        self._slave()
        for channel in range(self.machine.hbm.channels):
            ports = core.hbm_read[channel], core.hbm_write[channel]
            self._master(channel_name(channel), *ports, block.hbm_pointers[channel], self.machine.hbm.channel_bytes)
        self._master("m_axi_ddr", core.ddr_read, core.ddr_write, block.ddr_pointer, LINE_BYTES)
        for direction in LINKS:
            self._link(direction)
        return m

    def _port(self, name: str, field: str) -> Any:
        return getattr(self, f"{name}_{field}")

    def _slave(self) -> None:
        """The control block's bus."""
        m, block, name = self._m, self._block, "s_axi_control"
        for channel, fields in (("aw", ("addr",)), ("w", ("data", "strb")), ("ar", ("addr",))):
            inner = getattr(block, channel)
            m.d.comb += [
                inner.valid.eq(self._port(name, f"{channel}valid")),
                self._port(name, f"{channel}ready").eq(inner.ready),
                *(inner.payload[field].eq(self._port(name, f"{channel}{field}")) for field in fields),
            ]
        for channel, fields in (("b", ("resp",)), ("r", ("data", "resp"))):
            inner = getattr(block, channel)
            m.d.comb += [
                self._port(name, f"{channel}valid").eq(inner.valid),
                inner.ready.eq(self._port(name, f"{channel}ready")),
                *(self._port(name, f"{channel}{field}").eq(inner.payload[field]) for field in fields),
            ]

    def _master(self, name: str, read: Any, write: Any, pointer: Value, data_bytes: int) -> None:
        """A memory's port: byte addresses from the platform's pointer on, and what never changes."""
        m = self._m
        for channel, inner in ((_READ, read.ar), (_WRITE, write.aw)):
            m.d.comb += [
                self._port(name, f"{channel}valid").eq(inner.valid),
                inner.ready.eq(self._port(name, f"{channel}ready")),
                self._port(name, f"{channel}addr").eq(pointer + inner.payload.addr),
                self._port(name, f"{channel}size").eq(data_bytes.bit_length() - 1),
                self._port(name, f"{channel}burst").eq(_INCREMENTING),
                self._port(name, f"{channel}cache").eq(_BUFFERABLE),
            ]
        m.d.comb += [
            self._port(name, "wvalid").eq(write.w.valid),
            write.w.ready.eq(self._port(name, "wready")),
            self._port(name, "wdata").eq(write.w.payload.data),
            self._port(name, "wstrb").eq(write.w.payload.strb),
            self._port(name, "wlast").eq(1),
            write.b.valid.eq(self._port(name, "bvalid")),
            write.b.payload.resp.eq(self._port(name, "bresp")),
            self._port(name, "bready").eq(write.b.ready),
            read.r.valid.eq(self._port(name, "rvalid")),
            read.r.payload.data.eq(self._port(name, "rdata")),
            read.r.payload.resp.eq(self._port(name, "rresp")),
            self._port(name, "rready").eq(read.r.ready),
        ]

    def _link(self, direction: str) -> None:
        """A ring direction's two streams and their credits."""
        m, core = self._m, self._core
        name, away, home = f"axis_{direction}", getattr(core, f"{direction}_out"), getattr(core, f"{direction}_in")
        sequence = len(away.payload.sequence)
        m.d.comb += [
            self._port(name, "out_tdata").eq(away.payload.row),
            self._port(name, "out_tuser").eq(Cat(away.payload.sequence, away.payload.words)),
            self._port(name, "out_tlast").eq(away.payload.last),
            self._port(name, "out_tvalid").eq(away.valid),
            away.ready.eq(self._port(name, "out_tready")),
            getattr(core, f"{direction}_out_credit").eq(self._port(name, "out_credit")),
            home.payload.row.eq(self._port(name, "in_tdata")),
            home.payload.sequence.eq(self._port(name, "in_tuser")[:sequence]),
            home.payload.words.eq(self._port(name, "in_tuser")[sequence:]),
            home.payload.last.eq(self._port(name, "in_tlast")),
            home.valid.eq(self._port(name, "in_tvalid")),
            self._port(name, "in_tready").eq(home.ready),
            self._port(name, "in_credit").eq(getattr(core, f"{direction}_in_credit")),
        ]


def verilog(machine: Machine) -> str:
    """Verilog of a machine's kernel, module `kernel`, with every module below it.

    Raises:
        MachineError: the hardware cannot be built for the machine.
    """
    return "\n".join(convert(Top(machine), "kernel").values())
