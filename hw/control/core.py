"""The control core: fetch, decode, operands, issue; program memory, scalar registers, checks, scoreboard and queues.

Four stages, all advancing together: F addresses program memory, D decodes, X adds immediates to registers, I executes
a scalar instruction or checks and issues to a unit. I holds everything behind it until its instruction has issued, for
`vread` and `sload` until the value has come. I's result goes to X in the same cycle, so dependent scalar instructions
issue in consecutive cycles. A taken branch addresses program memory from I, which costs three cycles.
"""

from __future__ import annotations

from amaranth.hdl import Array, Cat, Const, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from typebar.hw.control.checks import DEVICE_BITS, TRAP_BITS, OperandChecker, address_bits
from typebar.hw.control.decoder import DECODED, MODIFIER_BITS, Decoder, modifier, slot
from typebar.hw.control.queue import TicketQueue, Waits
from typebar.hw.control.scalar import ScalarUnit
from typebar.hw.control.scoreboard import FETCH_DOMAINS, Scoreboard
from typebar.hw.control.tickets import UNIT_DOMAINS, Domain, ticket_bits
from typebar.hw.ports import CAUSE_BITS, READ_CYCLES, activity_layout, deep
from typebar.hw.replicate import Shared
from typebar.isa.instructions import (
    COUNT_REGISTER,
    DEVICE_REGISTER,
    INSTRUCTIONS,
    MAX_OPERANDS,
    OPCODE_BITS,
    REGISTER_BITS,
    SCALAR_REGISTERS,
    TARGET_BITS,
    WORD_BITS,
    WORD_BYTES,
    Activation,
    Kind,
    Reduction,
    Region,
    Trap,
    Unit,
)
from typebar.isa.machine import Machine, MachineError
from typebar.isa.timing import OP, VARGMAX, VCHAIN, VRMAX, VSUM, VSUMSQ, VUNARY, Cause

PIPELINE_BRANCH_CYCLES = 3
"""From a branch in stage I to its target there."""
PIPELINE_READ_CYCLES = READ_CYCLES + 2
"""From the issue of a `vread`, whose address stands a cycle later at the earliest behind all writes, to the next."""


def unit_of(domain: Domain) -> Unit:
    """The unit whose instructions a domain counts; fetch halves are the matrix unit's."""
    return Unit.MATRIX if domain is Domain.FETCH else Unit(domain + 1)


def operand_slots(domain: Domain) -> int:
    """Operands that the widest instruction of a domain has."""
    return max(len(item.operands) for item in INSTRUCTIONS if item.unit is unit_of(domain))


def issued_layout(machine: Machine, domain: Domain) -> data.StructLayout:
    """What a unit gets: the instruction with its operand values, its index, and the ticket it completes."""
    return data.StructLayout(
        {
            "opcode": unsigned(OPCODE_BITS),
            "modifiers": unsigned(MODIFIER_BITS),
            "values": data.ArrayLayout(signed(32), operand_slots(domain)),
            "pc": unsigned(TARGET_BITS),
            "ticket": unsigned(ticket_bits(machine)),
        }
    )


class ControlCore(wiring.Component):
    """The control core of a machine. `shared` are the Verilog modules that it instantiates.

    Control: `start` (one cycle) runs the `length` instructions in program memory from `entry` as device `rank` of
    `devices`, with regions of `region_bytes`; `running` until `halted` or `trap` (with `trap_pc`, and `trap_code` of
    the `trap` instruction) is set; `idle` when every issued instruction is done as well. Program memory is written
    through `load_*`, a word a cycle, while not running.

    Units: streams `matrix`, `vector`, `memory`, `ring`, `fetch`; a transfer is the instruction's start. `completed` is
    the last ticket done of each domain: a unit sets it in the first cycle in which a dependent instruction may start
    (`done`), and it covers all older ones. `waited` has for each domain the cause of its head's wait in the queue,
    valid with the transfer. `activity` is the scalar core's own; its first active cycle is the contract's cycle 0.
    `stop` ends the run at once, for whoever finds a fault.

    `vread`: `read_enable` for `read_latency` - 1 cycles from the one after its issue on, no gather being in flight;
    `read_address` holds, and `read_data` must have the word in the last of them. `sload`: `scalar_valid` with
    `scalar_data` for one cycle, the one before the instruction's `done`.

    `issued`: domains whose next ticket is given out in this cycle, to the instruction at `commit_pc`.

    `commit_*`: an instruction leaves stage I, for verification: its index and, if it writes one, register and value.
    """

    def __init__(self, machine: Machine) -> None:
        """Take a machine.

        Raises:
            MachineError: branches or scalar reads must be faster than the pipeline.
        """
        control = machine.control
        for key, least in (("branch_cycles", PIPELINE_BRANCH_CYCLES), ("read_latency", PIPELINE_READ_CYCLES)):
            if getattr(control, key) < least:
                raise MachineError(
                    f"{machine.name}: control.{key} = {getattr(control, key)} is faster than the hardware's pipeline:"
                    f" set it to {least} or more"
                )
        self.machine, self.bits = machine, ticket_bits(machine)
        self.words = control.program_bytes // WORD_BYTES
        self.shared = (Shared("queue_waits", Waits(control.queue_depth, self.bits, tuple(Domain))),)
        ports = {domain.name.lower(): Out(stream.Signature(issued_layout(machine, domain))) for domain in Domain}
        super().__init__(
            {
                "start": In(1),
                "entry": In(TARGET_BITS),
                "length": In(range(self.words + 1)),
                "rank": In(DEVICE_BITS),
                "devices": In(DEVICE_BITS),
                "region_bytes": In(data.ArrayLayout(unsigned(address_bits(machine)), len(Region))),
                "load_enable": In(1),
                "load_address": In(range(self.words)),
                "load_word": In(WORD_BITS),
                **ports,
                "completed": In(data.ArrayLayout(self.bits, len(Domain))),
                "waited": Out(data.ArrayLayout(unsigned(CAUSE_BITS), len(Domain))),
                "activity": Out(activity_layout()),
                "stop": In(1),
                "issued": Out(len(Domain)),
                "read_enable": Out(1),
                "read_address": Out(range(machine.vector.words)),
                "read_data": In(32),
                "scalar_valid": In(1),
                "scalar_data": In(32),
                "running": Out(1),
                "halted": Out(1),
                "idle": Out(1),
                "trap": Out(TRAP_BITS),
                "trap_pc": Out(TARGET_BITS),
                "trap_code": Out(32),
                "commit_valid": Out(1),
                "commit_pc": Out(TARGET_BITS),
                "commit_write": Out(1),
                "commit_register": Out(REGISTER_BITS),
                "commit_value": Out(32),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """Stage by stage, last first."""
        self._m = m = Module()
        self._advance, self._redirect = Signal(), Signal()
        self._pc, self._valid, self._outside = Signal(TARGET_BITS), Signal(), Signal()
        self._decoded = Signal(DECODED)
        self._values = Signal(data.ArrayLayout(signed(32), MAX_OPERANDS))
        self._result, self._writes, self._rd = Signal(32), Signal(), Signal(REGISTER_BITS)
        self._executed = Signal()
        x_pc, x_valid, x_outside, x_decoded = Signal(TARGET_BITS), Signal(), Signal(), Signal(DECODED)
        d_pc, d_valid, d_outside, word = self._fetch()
        m.submodules.decoder = decoder = Decoder()
        m.d.comb += decoder.word.eq(word)
        with m.If(self._advance):
            m.d.sync += [
                x_pc.eq(d_pc),
                x_outside.eq(d_outside),
                x_decoded.eq(decoder.decoded),
                x_valid.eq(d_valid & self.running & ~self._redirect),
                self._pc.eq(x_pc),
                self._outside.eq(x_outside),
                self._decoded.eq(x_decoded),
                self._valid.eq(x_valid & self.running & ~self._redirect),
            ]
            for index, value in enumerate(self._operands(x_decoded)):
                m.d.sync += self._values[index].eq(value)
        self._issue()
        return m

    # F and D -------------------------------------------------------------------------------------------
    def _fetch(self) -> tuple[Value, Value, Value, Value]:
        """Program memory and its address; D's index, validity, being outside the program, and word."""
        m = self._m
        m.submodules.program = program = Memory(shape=WORD_BITS, depth=self.words, init=[], attrs=deep(self.words))
        write, read = program.write_port(), program.read_port()
        target = modifier(self._decoded["modifiers"], "beq", "to")
        fetch_pc, address = Signal(TARGET_BITS), Signal(TARGET_BITS)
        hold = Signal(range(max(2, self.machine.control.branch_cycles - PIPELINE_BRANCH_CYCLES + 1)))
        pc, valid, outside = Signal(TARGET_BITS), Signal(), Signal()
        extra = self.machine.control.branch_cycles - PIPELINE_BRANCH_CYCLES
        wait = (hold != 0) if extra == 0 else (hold != 0) | self._redirect
        m.d.comb += [
            address.eq(Mux(self._redirect, target, fetch_pc)),
            read.addr.eq(address),
            read.en.eq(self._advance),
            write.addr.eq(self.load_address),
            write.data.eq(self.load_word),
            write.en.eq(self.load_enable & ~self.running),
        ]
        with m.If(self._advance):
            m.d.sync += [
                pc.eq(address),
                outside.eq(address >= self.length),
                valid.eq(self.running & ~wait),
                fetch_pc.eq(Mux(wait, address, address + 1)),
            ]
        with m.If(self._redirect):
            m.d.sync += hold.eq(max(0, extra - 1))
        with m.Elif(hold != 0):
            m.d.sync += hold.eq(hold - 1)
        with m.If(self.start):
            m.d.sync += [fetch_pc.eq(self.entry), valid.eq(0)]
        return pc, valid, outside, read.data

    # X -------------------------------------------------------------------------------------------------
    def _operands(self, decoded: data.View) -> list[Value]:
        """Operand values: register, or the result that I writes in this cycle, plus immediate."""
        m = self._m
        m.submodules.registers = registers = Memory(shape=32, depth=SCALAR_REGISTERS, init=[])
        write, written = registers.write_port(), Signal(SCALAR_REGISTERS)
        m.d.comb += [write.addr.eq(self._rd), write.data.eq(self._result), write.en.eq(self._writes)]
        with m.If(self.start):
            m.d.sync += written.eq(0)
        with m.Elif(self._writes):
            m.d.sync += written.bit_select(self._rd, 1).eq(1)
        values = []
        for index in range(MAX_OPERANDS):
            number, value = decoded["register"][index], Signal(signed(32), name=f"operand_{index}")
            read = registers.read_port(domain="comb")
            initial = Mux(number == DEVICE_REGISTER, self.rank, Mux(number == COUNT_REGISTER, self.devices, 0))
            stored = Mux(written.bit_select(number, 1), read.data, initial)
            current = Mux(self._writes & (self._rd == number), self._result, stored)
            m.d.comb += [read.addr.eq(number), value.eq(current + decoded["immediate"][index])]
            values.append(value)
        return values

    # I -------------------------------------------------------------------------------------------------
    def _issue(self) -> None:
        """Check, execute or issue what is in I; `_executed` in its last cycle there."""
        m, decoded, opcode = self._m, self._decoded, self._decoded["opcode"]
        m.submodules.checker = self._checker = checker = OperandChecker(self.machine)
        m.submodules.scalar = scalar = ScalarUnit()
        self._issued = Array(Signal(self.bits, name=f"issued_{item.name.lower()}") for item in Domain)
        self._gathers = self._issued[Domain.RING] != self.completed[Domain.RING]
        trap, live, finished = Signal(TRAP_BITS), Signal(), Signal()
        m.d.comb += [
            checker.opcode.eq(opcode),
            checker.modifiers.eq(decoded["modifiers"]),
            checker.values.eq(self._values),
            checker.devices.eq(self.devices),
            checker.region_bytes.eq(self.region_bytes),
            scalar.opcode.eq(opcode),
            scalar.modifiers.eq(decoded["modifiers"]),
            scalar.a.eq(self._values[0]),
            scalar.b.eq(self._values[1]),
            trap.eq(checker.trap),
            live.eq(self.running & self._valid & (trap == 0)),
        ]
        with m.If(self._outside):
            m.d.comb += trap.eq(int(Trap.PROGRAM_END))
        with m.Elif(decoded["illegal"]):
            m.d.comb += trap.eq(int(Trap.ILLEGAL))
        with m.Elif(opcode == OP["trap"]):
            m.d.comb += trap.eq(int(Trap.SOFTWARE))
        reading, loading = self._read(live), self._to_units(live)
        barrier = opcode.matches(OP["halt"], OP["fence"])
        with m.If(opcode == OP["vread"]):
            m.d.comb += finished.eq(reading)
        with m.Elif(decoded["unit"] != Unit.SCALAR):
            m.d.comb += finished.eq(loading)
        with m.Elif(barrier):
            m.d.comb += finished.eq(self._drained)
        with m.Else():
            m.d.comb += finished.eq(1)
        m.d.comb += [
            self._executed.eq(live & finished),
            self._advance.eq(~self._valid | self._executed),
            self._redirect.eq(self._executed & scalar.taken),
            self._result.eq(scalar.result),
        ]
        with m.If(opcode == OP["vread"]):
            m.d.comb += self._result.eq(self.read_data)
        with m.Elif(opcode == OP["sload"]):
            m.d.comb += self._result.eq(self.scalar_data)
        self._write_back()
        self._account(live, barrier)
        self._state(trap, barrier)

    def _account(self, live: Value, barrier: Value) -> None:
        """What the scalar core does in this cycle; between instructions only a branch's bubbles are left."""
        m, opcode, board = self._m, self._decoded["opcode"], self._board
        begun, cause, active = Signal(), Signal(CAUSE_BITS), Signal()
        m.d.comb += [
            active.eq(live | (self.running & ~self._valid & begun)),
            self.activity.eq(Cat(active, cause, Const(int(Cause.ISSUE), CAUSE_BITS))),
        ]
        with m.If(self.start | ~self.running):
            m.d.sync += begun.eq(0)
        with m.Elif(live):
            m.d.sync += begun.eq(1)
        with m.If(~self._valid):
            m.d.comb += cause.eq(int(Cause.BRANCH))
        with m.Elif(opcode == OP["vread"]):
            with m.If(self.read_enable):
                m.d.comb += cause.eq(int(Cause.READ))
            with m.Else():
                with m.If(self._gathers):
                    m.d.comb += cause.eq(int(Cause.RING))
                for domain in reversed(UNIT_DOMAINS):
                    with m.If(board.waits[domain.name.lower()].valid):
                        m.d.comb += cause.eq(int(Cause[domain.name]))
        with m.Elif(self._loaded):
            m.d.comb += cause.eq(int(Cause.MEMORY))
        with m.Elif(barrier):
            m.d.comb += cause.eq(Mux(self._executed, int(Cause.ISSUE), int(Cause.FENCE)))
        with m.Elif(self._decoded["unit"] != Unit.SCALAR):
            m.d.comb += cause.eq(Mux(self._push, int(Cause.ISSUE), int(Cause.QUEUE)))

    def _write_back(self) -> None:
        """Which register the instruction in I writes; the commit port."""
        m, opcode, modifiers = self._m, self._decoded["opcode"], self._decoded["modifiers"]
        writes = Signal()
        with m.Switch(opcode):
            for kind in INSTRUCTIONS:
                if any(item.kind is Kind.REGISTER for item in kind.fields):
                    with m.Case(kind.opcode):
                        m.d.comb += [self._rd.eq(modifier(modifiers, kind.name, "rd")), writes.eq(1)]
        m.d.comb += [
            self._writes.eq(self._executed & writes & (self._rd != 0)),
            self.commit_valid.eq(self._executed),
            self.commit_pc.eq(self._pc),
            self.commit_write.eq(self._writes),
            self.commit_register.eq(self._rd),
            self.commit_value.eq(self._result),
        ]

    def _read(self, live: Value) -> Value:
        """`vread`: wait for the writer and all gathers, then for `read_latency`; true in the last of these cycles."""
        m, board = self._m, self._scoreboard()
        cycles = self.machine.control.read_latency - 1
        waiting = Signal(range(cycles + 1))
        written = ~Cat(board.waits[domain.name.lower()].valid for domain in UNIT_DOMAINS).any()
        reads = live & (self._decoded["opcode"] == OP["vread"])
        m.d.comb += [self.read_enable.eq(waiting != 0), self.read_address.eq(self._values[slot("vread", "a")])]
        with m.If(waiting != 0):
            m.d.sync += waiting.eq(waiting - 1)
        with m.Elif(reads & written & ~self._gathers):
            m.d.sync += waiting.eq(cycles)
        return waiting == 1

    def _scoreboard(self) -> Scoreboard:
        """The scoreboard, looking at the instruction in I."""
        m, checker, decoded = self._m, self._checker, self._decoded
        m.submodules.scoreboard = self._board = board = Scoreboard(self.machine)
        m.d.comb += [
            board.ranges.eq(checker.ranges),
            board.dst_read.eq(checker.dst_read),
            board.rows.eq(checker.rows),
            board.fetches.eq(checker.fetches),
            board.region.eq(checker.region),
            board.loads.eq(checker.loads),
            board.hbm_store.eq(checker.hbm_store),
            board.stores.eq(decoded["opcode"].matches(OP["store"], OP["sstore"])),
            board.dst_reduced.eq(decoded["opcode"].matches(VSUM, VSUMSQ, VRMAX, VARGMAX)),
            board.unit.eq(decoded["unit"] - 1),
            board.completed.eq(self.completed),
        ]
        self._chains(board)
        return board

    def _chains(self, board: Scoreboard) -> None:
        """What the scoreboard must know of a chain."""
        opcode, modifiers = self._decoded["opcode"], self._decoded["modifiers"]
        chain = opcode == VCHAIN
        function, reduction = (modifier(modifiers, "vchain", name) for name in ("function", "reduce"))
        self._m.d.comb += [
            board.reduces.eq(board.dst_reduced | (chain & (reduction != Reduction.NONE))),
            board.squares.eq(chain & (reduction == Reduction.SUMSQ)),
            board.functional.eq((opcode == VUNARY) | (chain & (function != Activation.NONE))),
        ]

    def _to_units(self, live: Value) -> Value:
        """Queues and their tickets; true in the last cycle in I of an instruction of a unit."""
        m, board, decoded = self._m, self._board, self._decoded
        issued = self._issued
        depth, (waits,) = self.machine.control.queue_depth, self.shared
        self._queues = {
            item: TicketQueue(issued_layout(self.machine, item), depth, self.bits, shared=waits)
            for item in UNIT_DOMAINS
        }
        fetch_layout, stores = issued_layout(self.machine, Domain.FETCH), {Domain.MEMORY: Cause.STORE}
        self._queues[Domain.FETCH] = TicketQueue(fetch_layout, depth + 1, self.bits, FETCH_DOMAINS, stores)
        loaded, push = Signal(), Signal()
        unit = decoded["unit"] - 1
        ready = Signal()
        for domain in UNIT_DOMAINS:
            with m.If(unit == domain):
                m.d.comb += ready.eq(self._queues[domain].i.ready & ~self._crowded(domain))
        can_fetch = self._queues[Domain.FETCH].i.ready & ~self._crowded(Domain.FETCH)
        room = board.ready & (can_fetch | ~board.fetches)
        m.d.comb += [
            push.eq(live & (decoded["unit"] != Unit.SCALAR) & ready & room & ~loaded),
            board.issue.eq(push),
            board.ticket.eq(issued[unit[:2]] + 1),
            board.fetch_ticket.eq(issued[Domain.FETCH] + 1),
        ]
        for domain, queue in self._queues.items():
            here = push & (board.fetches if domain is Domain.FETCH else unit == domain)
            waits = board.fetch_waits if domain is Domain.FETCH else board.waits
            m.submodules[f"{domain.name.lower()}_queue"] = queue
            self._connect(domain, queue)
            m.d.comb += [queue.i.valid.eq(here), queue.waits.eq(waits), queue.completed.eq(self.completed)]
            m.d.comb += self.issued[domain].eq(here)
            with m.If(here):
                m.d.sync += issued[domain].eq(issued[domain] + 1)
        self._drained = Cat(issued[domain] == self.completed[domain] for domain in Domain).all()
        # sload stays in I until its value comes.
        is_load = decoded["opcode"] == OP["sload"]
        with m.If(self._executed):
            m.d.sync += loaded.eq(0)
        with m.Elif(push & is_load):
            m.d.sync += loaded.eq(1)
        self._loaded, self._push = loaded, push
        return Mux(is_load, loaded & self.scalar_valid, push)

    def _crowded(self, domain: Domain) -> Value:
        """Whether a unit owes more than its latencies explain: with a memory that is late, tickets could wrap."""
        return (self._issued[domain] - self.completed[domain])[: self.bits][-2:] != 0

    def _connect(self, domain: Domain, queue: TicketQueue) -> None:
        """A queue's payload from stage I, and its output to the port."""
        m, decoded, item = self._m, self._decoded, queue.i.payload
        port = getattr(self, domain.name.lower())
        m.d.comb += [
            item.opcode.eq(decoded["opcode"]),
            item.modifiers.eq(decoded["modifiers"]),
            item.pc.eq(self._pc),
            item.ticket.eq(self._issued[domain] + 1),
        ]
        for index in range(operand_slots(domain)):
            m.d.comb += item["values"][index].eq(self._values[index])
        permit: Value = Const(1, 1)
        waited: Value = queue.waited
        if domain is Domain.FETCH and not self.machine.control.run_ahead:
            permit, held = self._compute_started(), Signal()
            m.d.sync += held.eq(queue.o.valid & port.ready & ~permit)
            waited = Mux(held, int(Cause.MATRIX), waited)
        m.d.comb += [
            self.waited[domain].eq(waited),
            port.payload.eq(queue.o.payload),
            port.valid.eq(queue.o.valid & permit),
            queue.o.ready.eq(port.ready & permit),
        ]

    def _compute_started(self) -> Value:
        """Without run-ahead: whether the compute half of the fetch queue's head has started, or starts now."""
        m, port = self._m, self.matrix
        rows_left = Signal(range(self.machine.control.queue_depth + 3))
        p = port.payload
        k, n = p["values"][slot("matmul", "k")], p["values"][slot("matmul", "n")]
        outer, inner = p["values"][slot("matmul", "outer")], p["values"][slot("matmul", "inner")]
        starts = port.valid & port.ready & (k != 0) & (n != 0) & (outer != 0) & (inner != 0)
        leaves = self.fetch.valid & self.fetch.ready
        m.d.sync += rows_left.eq(rows_left + starts - leaves)
        return (rows_left != 0) | starts

    def _state(self, trap: Value, barrier: Value) -> None:
        """Running, halted, trapped."""
        m = self._m
        m.d.comb += self.idle.eq(~self.running & self._drained)
        with m.If(self.stop):
            m.d.sync += [self.running.eq(0), self._valid.eq(0)]
        with m.Elif(self.start):
            m.d.sync += [
                self.running.eq(1),
                self.halted.eq(0),
                self._valid.eq(0),
                self.trap.eq(0),
                self.trap_code.eq(0),
            ]
        with m.Elif(self.running & self._valid & (trap != 0)):
            m.d.sync += [self.running.eq(0), self.trap.eq(trap), self.trap_pc.eq(self._pc), self._valid.eq(0)]
            with m.If(trap == int(Trap.SOFTWARE)):
                m.d.sync += self.trap_code.eq(self._values[slot("trap", "code")])
        with m.Elif(self._executed & (self._decoded["opcode"] == OP["halt"])):
            m.d.sync += [self.running.eq(0), self.halted.eq(1), self._valid.eq(0)]
