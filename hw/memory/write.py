"""The line writer: lines to the AXI ports that hold them, and which instructions still have writes on their way.

A line waits at the head until every port that it has bytes for has taken its address and its data, in either order.
A port answers in order, so its oldest unanswered beat names its oldest unfinished instruction.
"""

from __future__ import annotations

from functools import reduce
from operator import or_

from amaranth.hdl import Cat, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out

from typebar.hw.control.tickets import ticket_bits
from typebar.hw.memory.fetch import hbm_address_bits
from typebar.hw.memory.pack import line_layout
from typebar.hw.memory.store import LINE_BITS, ddr_address_bits, log2
from typebar.hw.ports import axi_write
from typebar.hw.replicate import Shared
from typebar.isa.machine import LINE_BYTES, Machine


def unfinished_layout(bits: int) -> data.StructLayout:
    """A ticket that is not done, if `valid`."""
    return data.StructLayout({"valid": 1, "ticket": unsigned(bits)})


def oldest(m: Module, candidates: list[data.View], name: str) -> data.View:
    """The oldest of tickets that are not done: a tree of modular comparisons."""
    level = candidates
    while len(level) > 1:
        following = []
        for place, (left, right) in enumerate(zip(level[::2], level[1::2], strict=False)):
            joined = Signal.like(left, name=f"{name}_{len(level)}_{place}")
            right_older = (left.ticket - right.ticket - 1)[: len(left.ticket)][-1] == 0
            m.d.comb += [
                joined.valid.eq(left.valid | right.valid),
                joined.ticket.eq(Mux(right.valid & (~left.valid | right_older), right.ticket, left.ticket)),
            ]
            following.append(joined)
        if len(level) % 2:
            following.append(level[-1])
        level = following
    return level[0]


def answers(machine: Machine) -> int:
    """Beats of a port that can be without an answer: one a cycle for the longest latency that keeps the contract."""
    return 1 << max(machine.hbm.latency, machine.ddr.latency).bit_length()


class WriteTracker(wiring.Component):
    """The beats of one port that have no answer yet.

    `push` a beat's `ticket` when the port has taken it, unless `full`. `b_*` is the port's answer channel. `first` is
    the oldest beat's ticket. `error` in the cycle after a bad answer.
    """

    def __init__(self, machine: Machine) -> None:
        """Take a machine."""
        self.bits, self.depth = ticket_bits(machine), answers(machine)
        super().__init__(
            {
                "push": In(1),
                "ticket": In(self.bits),
                "full": Out(1),
                "b_valid": In(1),
                "b_ready": Out(1),
                "b_resp": In(2),
                "first_valid": Out(1),
                "first_ticket": Out(self.bits),
                "error": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """A queue of tickets."""
        m = Module()
        m.submodules.queue = queue = SyncFIFO(width=self.bits, depth=self.depth)
        m.d.comb += [
            queue.w_data.eq(self.ticket),
            queue.w_en.eq(self.push),
            queue.r_en.eq(self.b_valid),
            self.full.eq(~queue.w_rdy),
            self.b_ready.eq(queue.r_rdy),
            self.first_valid.eq(queue.r_rdy),
            self.first_ticket.eq(queue.r_data),
        ]
        m.d.sync += self.error.eq(self.b_valid & self.b_ready & (self.b_resp != 0))
        return m


class LineWriter(wiring.Component):
    """Writes lines to DDR and to the HBM channels.

    `lines` as they leave the packer. `unfinished`: the oldest instruction with a beat that has no answer; a cycle late.
    `written`: the last line of an instruction is in `unfinished`'s hands (or already done). `error`: a bad answer.
    """

    def __init__(self, machine: Machine) -> None:
        """Take a machine; `tracker` is the module of a port's tracker."""
        self.machine, hbm = machine, machine.hbm
        self.tracker = Shared("write_tracker", WriteTracker(machine))
        super().__init__(
            {
                "lines": In(stream.Signature(line_layout(machine))),
                "ddr": Out(axi_write(ddr_address_bits(machine), LINE_BYTES)),
                "hbm": Out(axi_write(hbm_address_bits(machine), hbm.channel_bytes)).array(hbm.channels),
                "unfinished": Out(unfinished_layout(ticket_bits(machine))),
                "written": Out(1),
                "error": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """The beats of a line lie side by side: beat j of each group of channels, and of DDR its only one."""
        m = Module()
        channel_bytes = self.machine.hbm.channel_bytes
        beats = max(1, LINE_BYTES // channel_bytes)
        beat_bytes = min(LINE_BYTES, channel_bytes)
        line, lines = self.lines.payload, self.lines
        sent_address, sent_data = Signal(beats), Signal(beats)
        taken_address: list[list[Value]] = [[] for _ in range(beats)]
        taken_data: list[list[Value]] = [[] for _ in range(beats)]
        pushes: list[tuple[Signal, Value]] = []
        blocked: list[Value] = []
        firsts, errors = [], []
        has = [line.strobe[j * beat_bytes : (j + 1) * beat_bytes].any() for j in range(beats)]
        for name, port, beat, chosen in self._ports(m, line, beats, has):
            m.submodules[f"tracker_{name}"] = tracker = self.tracker.replica()
            present, push = Signal(name=f"present_{name}"), Signal(name=f"push_{name}")
            first = Signal(unfinished_layout(tracker.ticket.shape().width), name=f"first_{name}")
            blocked.append(chosen & tracker.full)
            m.d.comb += [
                present.eq(lines.valid & chosen & ~tracker.full),
                port.aw.valid.eq(present & ~sent_address[beat]),
                port.w.valid.eq(present & ~sent_data[beat]),
                tracker.push.eq(push),
                tracker.ticket.eq(line.ticket),
                tracker.b_valid.eq(port.b.valid),
                tracker.b_resp.eq(port.b.payload.resp),
                port.b.ready.eq(tracker.b_ready),
                first.valid.eq(tracker.first_valid),
                first.ticket.eq(tracker.first_ticket),
            ]
            taken_address[beat].append(port.aw.valid & port.aw.ready)
            taken_data[beat].append(port.w.valid & port.w.ready)
            pushes.append((push, chosen))
            firsts.append(first)
            errors.append(tracker.error)
        address, words = sent_address | Cat(map(_any, taken_address)), sent_data | Cat(map(_any, taken_data))
        needed = Mux(line.hbm, Cat(has), 1)
        whole = ((address & words) | ~needed)[:beats].all()
        m.d.comb += [lines.ready.eq(whole & ~Cat(blocked).any())]
        moved = lines.valid & lines.ready
        m.d.comb += [push.eq(moved & chosen) for push, chosen in pushes]
        m.d.sync += [
            sent_address.eq(Mux(moved, 0, address)),
            sent_data.eq(Mux(moved, 0, words)),
            self.written.eq(moved & line.last),
            self.unfinished.eq(oldest(m, firsts, "oldest")),
            self.error.eq(Cat(errors).any()),
        ]
        return m

    def _ports(
        self, m: Module, line: data.View, beats: int, has: list[Value]
    ) -> list[tuple[str, data.View, int, Value]]:
        """Every port with its name, the beat that is its own, and whether this line has bytes for it."""
        machine, channel_bytes = self.machine, self.machine.hbm.channel_bytes
        share = max(1, channel_bytes // LINE_BYTES)
        width = 8 * min(LINE_BYTES, channel_bytes)
        inside = log2(machine.row_bytes) - LINE_BITS
        row, place = line.line >> inside, line.line[:inside]
        m.d.comb += [
            self.ddr.aw.payload.addr.eq(line.line << LINE_BITS),
            self.ddr.w.payload.data.eq(line.data),
            self.ddr.w.payload.strb.eq(line.strobe),
        ]
        ports = [("ddr", self.ddr, 0, ~line.hbm)]
        for channel, port in enumerate(self.hbm):
            group, beat = divmod(channel, beats)
            chosen = line.hbm & (place[log2(share) :] == group) & has[beat]
            strobe = line.strobe[beat * width // 8 : (beat + 1) * width // 8]
            m.d.comb += [
                port.aw.payload.addr.eq(row << log2(channel_bytes)),
                port.w.payload.data.eq(Cat([line.data[beat * width : (beat + 1) * width]] * share)),
                port.w.payload.strb.eq(Mux(place[0], strobe << LINE_BYTES, strobe) if share > 1 else strobe),
            ]
            ports.append((f"hbm_{channel}", port, beat, chosen))
        return ports


def _any(values: list[Value]) -> Value:
    return reduce(or_, values)
