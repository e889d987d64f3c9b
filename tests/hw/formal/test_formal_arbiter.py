"""Proof that the ring's arbiter is a naive one, that nobody is granted what is not theirs, and that nobody starves."""

from __future__ import annotations

from pathlib import Path

import pytest
from amaranth.hdl import Array, Assert, Assume, Module, Mux, ResetSignal, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In

from typebar.hw.arbiter import TurnArbiter
from typebar.tests.hw.formal.prove import Opened, run_sby

CLAIMS = ("as the naive one", "one at a time", "only who asks", "urgent first", "no starvation")


class ArbiterHarness(wiring.Component):
    """The arbiter beside a naive one: a line of two, of which the first that asks is granted the place.

    `claim` alone is looked at, with a fault between the arbiter and its surroundings that breaks it; otherwise all are,
    and there is no fault.
    """

    def __init__(self, claim: str = "") -> None:
        self.claim, self.dut = claim, Opened(TurnArbiter())
        super().__init__({"urgent": In(1), "requests": In(2)})

    def elaborate(self, platform: object) -> Module:
        m, dut = Module(), self.dut
        m.submodules.dut = dut
        grants, naive, line = Signal(2), Signal(2), Array(Signal(name=f"line_{i}", init=i) for i in range(2))
        self._connect(m, grants)
        # Whoever beats the other goes to the end of the line.
        with m.If(self.urgent):
            m.d.comb += naive.eq(0b00)
        with m.Elif(self.requests == 0b11):
            m.d.comb += naive.eq(1 << line[0])
            m.d.sync += [line[0].eq(line[1]), line[1].eq(line[0])]
        with m.Else():
            m.d.comb += naive.eq(self.requests)
        # Who asked in vain the last time that the place was theirs to have.
        lost = Signal(2)
        with m.If(~self.urgent):
            m.d.sync += lost.eq(self.requests & ~grants)
        claims: dict[str, Value] = {
            "as the naive one": grants == naive,
            "one at a time": self.urgent + grants[0] + grants[1] <= 1,
            "only who asks": grants & ~self.requests == 0,
            "urgent first": ~self.urgent | (grants == 0),
            "no starvation": self.urgent | (lost & self.requests & ~grants == 0),
        }
        assert tuple(claims) == CLAIMS
        # What induction needs to know besides: the turn is the line's, and is that of who asked in vain.
        turn = dut.registers["turn"]
        known = [line[0] == turn, line[1] == ~turn, (lost == 0) | (lost == Mux(turn, 0b10, 0b01))]
        wanted = [claims[self.claim]] if self.claim else [*claims.values(), *known]
        m.d.comb += [Assume(~ResetSignal()), *map(Assert, wanted)]
        return m

    def _connect(self, m: Module, grants: Signal) -> None:
        """The arbiter's ports, with the fault that the claim is to tell apart."""
        asked, given = self.requests, self.dut.grants
        m.d.comb += [self.dut.urgent.eq(self.urgent), self.dut.requests.eq(asked), grants.eq(given)]
        match self.claim:
            case "as the naive one":  # The other requester wins the first time.
                m.d.comb += [self.dut.requests.eq(asked[::-1]), grants.eq(given[::-1])]
            case "one at a time":  # Both are granted what they ask for.
                m.d.comb += grants.eq(Mux(self.urgent, 0, asked))
            case "only who asks":  # A place that nobody asks for is given away.
                m.d.comb += grants.eq(Mux((asked == 0) & ~self.urgent, 0b01, given))
            case "urgent first":
                m.d.comb += self.dut.urgent.eq(0)
            case "no starvation":  # The same requester wins every time.
                m.d.comb += grants.eq(Mux(asked[0] & ~self.urgent, 0b01, given))


def test_arbiter_is_naive_fair_and_exclusive_for_ever(tmp_path: Path) -> None:
    assert run_sby(ArbiterHarness(), tmp_path, "prove", 2) == "PASS"


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_faulty_arbiter_breaks_each_claim(tmp_path: Path, claim: str) -> None:
    assert run_sby(ArbiterHarness(claim), tmp_path, "bmc", 4) == "FAIL"
