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

from amaranth.hdl import ClockDomain, ClockSignal, Module, ResetSignal, Shape, Signal, Value
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from typebar.isa.machine import LINE_BYTES, Machine
from typebar.isa.registers import ADDRESS_BITS

POINTER_BITS = 64
"""Width of the masters' byte addresses."""
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
        """Take a machine."""
        self.machine = machine
        ports: dict[str, wiring.Member] = {"ap_clk": In(1), "ap_rst_n": In(1), **slave_ports("s_axi_control")}
        for channel in range(machine.hbm.channels):
            ports |= master_ports(channel_name(channel), machine.hbm.channel_bytes)
        ports |= master_ports("m_axi_ddr", LINE_BYTES)
        for direction in ("cw", "ccw"):
            ports |= link_ports(f"axis_{direction}", 32 * machine.vector.lanes)
        super().__init__(ports)

    def elaborate(self, platform: object) -> Module:
        """Clock and reset of everything inside."""
        m = Module()
        m.domains += ClockDomain("sync")
        m.d.comb += [ClockSignal().eq(self.ap_clk), ResetSignal().eq(~self.ap_rst_n)]
        return m
