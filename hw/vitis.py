"""The kernel for Vitis, and what Vitis needs beside its Verilog: description, packaging and link scripts.

Nothing here runs Vitis. The scripts follow AMD's documents on RTL kernels (UG1393, "Packaging RTL Kernels" and "Linking
the System"); the folder's README says what has been checked and what has not.
"""

from __future__ import annotations

from typing import Any
from xml.sax.saxutils import quoteattr

from amaranth.hdl import ClockDomain, ClockSignal, Module, ResetSignal
from amaranth.lib import wiring
from amaranth.lib.wiring import In

from typebar.hw.core import LINKS
from typebar.hw.link import CREDIT_BIT, ROW_BIT, CreditMerger
from typebar.hw.replicate import Shared, convert
from typebar.hw.top import Top, channel_name
from typebar.isa.errors import TypebarError
from typebar.isa.machine import LINE_BYTES, Machine
from typebar.isa.registers import ADDRESS_BITS, pointer_address

KERNEL = "typebar"
"""The kernel's name, and its Verilog module's."""
HBM_CHANNELS = 32
"""Pseudo-channels of a U280's HBM."""
WAIVERS = {
    "ASCRANGE": "a signal of no bits is written [-1:0]",
    "CASEINCOMPLETE": "what a case leaves out keeps the default assigned before it",
    "CMPCONST": "a size of the machine makes a comparison constant",
    "DECLFILENAME": "one file holds all modules",
    "PROCASSINIT": "registers have reset values as initial values too, as FPGAs load them",
    "UNSIGNED": "a size of the machine makes a comparison constant",
    "UNUSEDSIGNAL": "generated names for bits that a machine or an instruction does not use",
    "VARHIDDEN": "an instance and a signal inside another may share a name",
    "WIDTHEXPAND": "operands are written at their own widths and extended, as Verilog does",
    "WIDTHTRUNC": "the same for logical negation of a number",
}
"""Verilator's warnings of style that text written by Yosys is full of, and why each is harmless."""
_CREDIT_USER = f"bit {CREDIT_BIT} a credit, bit {ROW_BIT} a row"


class Kernel(wiring.Component):
    """`hw.top.Top` with its credits on the streams: ports as there, without the credits' own (`hw.link`)."""

    def __init__(self, machine: Machine) -> None:
        """Build the kernel.

        Raises:
            MachineError: the hardware cannot be built for the machine.
        """
        self._shared, self._row_bits = Shared("kernel", Top(machine)), 32 * machine.vector.lanes
        members = self._shared.component.signature.members
        ports: dict[str, Any] = {name: member for name, member in members.items() if not name.endswith("_credit")}
        super().__init__(ports)

    def elaborate(self, platform: object) -> Module:
        """Wires, and a merger for each stream out."""
        m = Module()
        m.submodules.top = top = self._top = self._shared.replica()
        m.domains += ClockDomain("sync")
        m.d.comb += [ClockSignal().eq(self.ap_clk), ResetSignal().eq(~self.ap_rst_n)]
        streams = tuple(f"axis_{name}_{side}_" for name in LINKS for side in ("out", "in"))
        for name, member in self.signature.members.items():
            if not name.startswith(streams):
                mine, inner = getattr(self, name), getattr(top, name)
                m.d.comb += inner.eq(mine) if member.flow is In else mine.eq(inner)
        for name, other in zip(LINKS, reversed(LINKS), strict=True):
            self._send(m, name, other)
            self._receive(m, name, other)
        return m

    def _send(self, m: Module, name: str, other: str) -> None:
        """Rows of a direction, and the credits for the other one: they go to the same neighbour."""
        top, port = self._top, f"axis_{name}_out"
        m.submodules[f"merger_{name}"] = merger = CreditMerger(self._row_bits)
        rows, out = merger.rows, merger.out
        m.d.comb += [
            rows.valid.eq(getattr(top, f"{port}_tvalid")),
            getattr(top, f"{port}_tready").eq(rows.ready),
            getattr(self, f"{port}_tvalid").eq(out.valid),
            out.ready.eq(getattr(self, f"{port}_tready")),
            merger.credit.eq(getattr(top, f"axis_{other}_in_credit")),
        ]
        for field in ("data", "user", "last"):
            m.d.comb += [
                rows.payload[field].eq(getattr(top, f"{port}_t{field}")),
                getattr(self, f"{port}_t{field}").eq(out.payload[field]),
            ]

    def _receive(self, m: Module, name: str, other: str) -> None:
        """Rows of a direction, and the credits for the other one."""
        top, port = self._top, f"axis_{name}_in"
        valid, user, ready = (getattr(self, f"{port}_t{field}") for field in ("valid", "user", "ready"))
        m.d.comb += [
            getattr(top, f"{port}_tvalid").eq(valid & user[ROW_BIT]),
            getattr(top, f"{port}_tdata").eq(getattr(self, f"{port}_tdata")),
            getattr(top, f"{port}_tuser").eq(user[:CREDIT_BIT]),
            getattr(top, f"{port}_tlast").eq(getattr(self, f"{port}_tlast")),
            ready.eq(getattr(top, f"{port}_tready") | ~user[ROW_BIT]),
            getattr(top, f"axis_{other}_out_credit").eq(valid & ready & user[CREDIT_BIT]),
        ]


def kernel_files(machine: Machine) -> dict[str, str]:
    """Files by name: Verilog, Verilator's waivers, kernel description, packaging and link scripts, README.

    Raises:
        TypebarError: the machine has more HBM channels than the card.
        MachineError: the hardware cannot be built for the machine.
    """
    if machine.hbm.channels > HBM_CHANNELS:
        raise TypebarError(
            f"{machine.name} has {machine.hbm.channels} HBM channels and an Alveo U280 {HBM_CHANNELS}: choose another"
        )
    return {
        f"{KERNEL}.v": "\n".join(convert(Kernel(machine), KERNEL).values()),
        "waivers.vlt": _waivers(),
        "kernel.xml": _description(machine),
        "package_kernel.tcl": _packaging(machine),
        "link.cfg": _link(machine),
        "README.md": _readme(machine),
    }


def _masters(machine: Machine) -> list[tuple[str, str, int, int]]:
    """Memory ports: argument, port, width in bits, address of the pointer in the control block."""
    found = [
        (f"hbm{channel:02d}", channel_name(channel), 8 * machine.hbm.channel_bytes, pointer_address(channel))
        for channel in range(machine.hbm.channels)
    ]
    return [*found, ("ddr", "m_axi_ddr", 8 * LINE_BYTES, pointer_address(None))]


def _streams() -> list[tuple[str, str]]:
    """Stream ports with their direction."""
    return [(f"axis_{name}_{side}", mode) for name in LINKS for side, mode in (("out", "write"), ("in", "read"))]


def _waivers() -> str:
    lines = ["`verilator_config"]
    for rule, why in WAIVERS.items():
        lines += [f"// {why}", f'lint_off -rule {rule} -file "*{KERNEL}.v"']
    return "\n".join([*lines, ""])


def _description(machine: Machine) -> str:
    """kernel.xml."""

    def element(tag: str, **attributes: object) -> str:
        return f"<{tag} {' '.join(f'{key}={quoteattr(str(value))}' for key, value in attributes.items())}/>"

    addressed = {"portType": "addressable", "base": "0x0"}
    whole, width = "0xFFFFFFFFFFFFFFFF", 32 * machine.vector.lanes
    ports = [
        element("port", name="s_axi_control", mode="slave", range=hex(1 << ADDRESS_BITS), dataWidth=32, **addressed)
    ]
    arguments: list[str] = []
    for name, port, bits, offset in _masters(machine):
        ports.append(element("port", name=port, mode="master", range=whole, dataWidth=bits, **addressed))
        place = {"size": "0x8", "offset": hex(offset), "hostOffset": "0x0", "hostSize": "0x8", "type": "void*"}
        arguments.append(element("arg", name=name, addressQualifier=1, id=len(arguments), port=port, **place))
    for port, mode in _streams():
        ports.append(element("port", name=port, mode=f"{mode}_only", dataWidth=width, portType="stream"))
        place = {"size": "0x0", "offset": "0x0", "hostOffset": "0x0", "hostSize": "0x0", "type": "stream"}
        arguments.append(element("arg", name=port, addressQualifier=4, id=len(arguments), port=port, **place))
    kernel = (
        f'<kernel name="{KERNEL}" language="ip_c" vlnv="typebar:kernel:{KERNEL}:1.0" attributes=""'
        ' preferredWorkGroupSizeMultiple="0" workGroupSize="1" interrupt="false" hwControlProtocol="user_managed">'
    )
    body = ["<ports>", *(f"  {item}" for item in ports), "</ports>", "<args>", *(f"  {item}" for item in arguments)]
    lines = ['<?xml version="1.0" encoding="UTF-8"?>', '<root versionMajor="1" versionMinor="6">', f"  {kernel}"]
    return "\n".join([*lines, *(f"    {item}" for item in body), "    </args>", "  </kernel>", "</root>", ""])


def _packaging(machine: Machine) -> str:
    """Tcl for Vivado: the Verilog becomes an IP with its interfaces and registers, and that a kernel object."""
    buses = ["s_axi_control", *(port for _, port, _, _ in _masters(machine)), *(port for port, _ in _streams())]
    associations = [f"ipx::associate_bus_interfaces -busif {bus} -clock ap_clk $core" for bus in buses]
    registers = []
    for name, port, _, offset in _masters(machine):
        registers += [
            f"set register [ipx::add_register {name} $block]",
            f"set_property address_offset {offset:#x} $register",
            "set_property size 64 $register",
            "set parameter [ipx::add_register_parameter ASSOCIATED_BUSIF $register]",
            f"set_property value {port} $parameter",
        ]
    return "\n".join(
        [
            "# vivado -mode batch -source package_kernel.tcl makes typebar.xo.",
            "set here [file dirname [file normalize [info script]]]",
            "create_project -force packaging $here/packaging -part xcu280-fsvh2892-2L-e",
            f"add_files -norecurse $here/{KERNEL}.v",
            f"set_property top {KERNEL} [current_fileset]",
            "update_compile_order -fileset sources_1",
            "ipx::package_project -root_dir $here/ip -vendor typebar -library kernel -taxonomy /KernelIP -import_files"
            " -set_current true -force",
            "set core [ipx::current_core]",
            f"set_property name {KERNEL} $core",
            "ipx::infer_bus_interface ap_clk xilinx.com:signal:clock_rtl:1.0 $core",
            "ipx::infer_bus_interface ap_rst_n xilinx.com:signal:reset_rtl:1.0 $core",
            *associations,
            "set map [ipx::add_memory_map s_axi_control $core]",
            "set_property slave_memory_map_ref s_axi_control [ipx::get_bus_interfaces s_axi_control -of_objects $core]",
            "set block [ipx::add_address_block control $map]",
            f"set_property range {1 << ADDRESS_BITS} $block",
            *registers,
            "set_property sdx_kernel true $core",
            "set_property sdx_kernel_type rtl $core",
            "set_property ipi_drc {ignore_freq_hz true} $core",
            "set_property vitis_drc {ctrl_protocol user_managed} $core",
            "set_property supported_families {} $core",
            "set_property auto_family_support_level level_2 $core",
            "ipx::create_xgui_files $core",
            "ipx::update_checksums $core",
            "ipx::check_integrity -kernel -xrt $core",
            "ipx::save_core $core",
            f"package_xo -force -xo_path $here/{KERNEL}.xo -kernel_name {KERNEL} -ip_directory $here/ip"
            " -kernel_xml $here/kernel.xml -ctrl_protocol user_managed",
            "close_project -delete",
            "",
        ]
    )


def _link(machine: Machine) -> str:
    """Configuration of `v++ --link`: memory banks, and the ring over two Aurora kernels."""
    banks = [f"sp={KERNEL}_1.hbm{channel:02d}:HBM[{channel}]" for channel in range(machine.hbm.channels)]
    return "\n".join(
        [
            "# v++ --link --platform xilinx_u280_gen3x16_xdma_1_202211_1 --config link.cfg typebar.xo aurora.xo",
            "[connectivity]",
            f"nk={KERNEL}:1:{KERNEL}_1",
            "nk=aurora:2:aurora_next.aurora_previous",
            *banks,
            f"sp={KERNEL}_1.ddr:DDR[0]",
            "# To device rank + 1, and from it",
            f"stream_connect={KERNEL}_1.axis_cw_out:aurora_next.tx_axis",
            f"stream_connect=aurora_next.rx_axis:{KERNEL}_1.axis_ccw_in",
            "# To device rank - 1, and from it",
            f"stream_connect={KERNEL}_1.axis_ccw_out:aurora_previous.tx_axis",
            f"stream_connect=aurora_previous.rx_axis:{KERNEL}_1.axis_cw_in",
            "[clock]",
            f"freqHz={machine.clock_mhz * 1_000_000}:{KERNEL}_1.ap_clk",
            "",
        ]
    )


def _readme(machine: Machine) -> str:
    row_bits = 32 * machine.vector.lanes
    rules = "\n".join(f"- `{rule}`: {why}" for rule, why in WAIVERS.items())
    return f"""# Typebar's kernel for an Alveo U280, machine {machine.name}

**Not run here.** The Verilog is simulated (as `typebar run --device rtl` does) and checked by Verilator's lint; nothing
in this folder has been through Vivado, Vitis or a card.

| File | What it is |
| --- | --- |
| `{KERNEL}.v` | the kernel, module `{KERNEL}`, with every module below it |
| `waivers.vlt` | warnings of style that are off in its lint, see below |
| `kernel.xml` | ports, and the arguments by which XRT knows the memories |
| `package_kernel.tcl` | makes `{KERNEL}.xo`: `vivado -mode batch -source package_kernel.tcl` |
| `link.cfg` | HBM banks, DDR, ring and clock for `v++ --link` |

The host drives the kernel as a user-managed one (`xrt::ip`): `isa/registers.py` has the addresses. It allocates one
buffer in each HBM bank and one in the DDR and writes their device addresses to the pointers' registers.

The ring needs a link kernel that is not in here: two instances of a kernel `aurora` around an Aurora 64B/66B core, one
for each QSFP port, with streams `tx_axis` and `rx_axis`. It has to carry `tdata` ({row_bits} bits), `tuser` (32 bits,
of which {_CREDIT_USER}) and `tlast` of every beat, in order, without loss. Port
`aurora_next` of each card goes to `aurora_previous` of the next.

Lint: `verilator --lint-only -Wall --top-module {KERNEL} waivers.vlt {KERNEL}.v`. Off, because the text is generated:

{rules}
"""
