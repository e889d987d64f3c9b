"""Proof that ring credits never overflow a receiver, whatever the units around sender and receiver do."""

from __future__ import annotations

from pathlib import Path

import pytest
from amaranth.hdl import Assert, Assume, Module, ResetSignal, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In

from typebar.hw import ring
from typebar.hw.ring import Receiver, Sender
from typebar.isa.machine import Machine
from typebar.tests.hw.formal.prove import Opened, run_sby

MACHINE = Machine.load("tiny").override({"vector.lanes": "2", "ring.buffer_words": "16"})
PLACES = 4
"""Rows of the receiver: what is proved does not depend on how many, so few will do."""
LINKED = ("link", "credit")


class CreditHarness(wiring.Component):
    """A sender and its neighbour's receiver, a register on the link and one on the credits; all else is free."""

    def __init__(self, plant: bool = False) -> None:
        self.plant = plant
        self.parts = {"sender": Opened(Sender(MACHINE)), "receiver": Opened(Receiver(MACHINE, clockwise=True))}
        self._free = {
            f"{part}_{name}": (component, name)
            for part, component in self.parts.items()
            for name, member in component.signature.members.items()
            if member.flow is In and name not in LINKED
        }
        shapes = {
            name: Value.cast(getattr(component, member)).shape() for name, (component, member) in self._free.items()
        }
        super().__init__({**{name: In(shape) for name, shape in shapes.items()}, "ready": In(1)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        sender, receiver = self.parts["sender"], self.parts["receiver"]
        m.submodules.sender, m.submodules.receiver = sender, receiver
        for name, (component, member) in self._free.items():
            m.d.comb += Value.cast(getattr(component, member)).eq(Value.cast(getattr(self, name)))
        moving, returning = Signal(), Signal()
        away = sender.link
        m.d.sync += [moving.eq(away.valid & away.ready), returning.eq(receiver.credit)]
        m.d.comb += [
            Assume(~ResetSignal()),
            away.ready.eq(self.ready),
            receiver.link.valid.eq(moving),
            sender.credit.eq(returning | self.plant),
        ]
        pointers = {name: receiver.registers[name] for name in ("written", "drained_to", "returned")}
        bits = len(pointers["written"])
        held, undrained, unreturned = (
            (pointers[later] - pointers[earlier])[:bits]
            for later, earlier in (("written", "returned"), ("written", "drained_to"), ("drained_to", "returned"))
        )
        m.d.comb += [
            # A row on the link has a place, and no place is promised twice.
            Assert(receiver.link.ready),
            Assert(held <= PLACES),
            Assert(~moving | (held < PLACES)),
            Assert(sender.free + away.valid + moving + held + returning == PLACES),
            Assert(held == undrained + unreturned),
        ]
        return m


@pytest.mark.parametrize("plant", [False, True], ids=["kept", "a credit too many is told apart"])
def test_credits_never_overflow(tmp_path: Path, plant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "places", lambda machine: PLACES)
    mode, depth = ("bmc", 8) if plant else ("prove", 3)
    assert run_sby(CreditHarness(plant), tmp_path, mode, depth, timeout=200) == ("FAIL" if plant else "PASS")
