"""Float32 maximum and comparison."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from typebar.hw.arith.float32 import Parts, named
from typebar.hw.arith.pipeline import Pipeline
from typebar.isa.numerics.formats import CANONICAL_NAN

CUTS = 2


class Comparator(wiring.Component):
    """maximum = the larger of a and b, as `numerics.maximum`; greater = a > b, false for NaN, -0 equal to +0.

    `latency` >= 1 cycles, one result a cycle.
    """

    def __init__(self, latency: int) -> None:
        """A comparator of `latency` >= 1 cycles."""
        self.latency = latency
        super().__init__({"a": In(32), "b": In(32), "maximum": Out(32), "greater": Out(1)})

    def elaborate(self, platform: object) -> Module:
        """Order both as integers, then choose: two places to cut."""
        m = Module()
        pipe = Pipeline(m, cuts=CUTS, latency=self.latency)
        a, b = Parts(m, self.a, "a"), Parts(m, self.b, "b")
        flushed = [
            named(m, Cat(Mux(p.zero, 0, bits[:31]), p.sign), "flushed") for p, bits in ((a, self.a), (b, self.b))
        ]
        # Integers ordered like the maximum: ... < -0 < +0 < ...
        orders = [Cat(value[:31] ^ value[31].replicate(31), ~value[31]) for value in flushed]
        above = named(m, orders[0] > orders[1], "above")
        s = pipe.cut(
            a=flushed[0],
            b=flushed[1],
            above=above,
            nan=a.nan | b.nan,
            greater=above & ~(a.nan | b.nan | (a.zero & b.zero)),
        )
        larger = Mux(s.nan, Const(CANONICAL_NAN, 32), Mux(s.above, s.a, s.b))
        s = pipe.cut(maximum=larger, greater=s.greater)
        m.d.comb += [self.maximum.eq(s.maximum), self.greater.eq(s.greater)]
        assert pipe.complete
        return m
