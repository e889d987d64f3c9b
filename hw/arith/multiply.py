"""Float32 multiplication."""

from __future__ import annotations

from amaranth.hdl import Module, Mux, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from typebar.hw.arith.float32 import BIAS, Parts, round_pack
from typebar.hw.arith.pipeline import Pipeline, pick

CUTS = 5


class Multiplier(wiring.Component):
    """result = a * b, as `numerics.mul`; `latency` >= 1 cycles, one result a cycle.

    One 24 x 24-bit product (two DSP slices), normalised by at most one place, rounded once. The two registers
    behind the product are those of the slices.
    """

    def __init__(self, latency: int) -> None:
        """A multiplier of `latency` >= 1 cycles."""
        self.latency = latency
        super().__init__({"a": In(32), "b": In(32), "result": Out(32)})

    def elaborate(self, platform: object) -> Module:
        """Take apart, multiply (two places to cut), normalise, round."""
        m = Module()
        pipe = Pipeline(m, cuts=CUTS, latency=self.latency)
        a, b = Parts(m, self.a, "a"), Parts(m, self.b, "b")
        exponent = Signal(signed(10))
        m.d.comb += exponent.eq(a.exponent + b.exponent - BIAS)
        s = pipe.cut(
            a=a.significand,
            b=b.significand,
            exponent=exponent,
            sign=a.sign ^ b.sign,
            infinite=a.infinite | b.infinite,
            nan=a.nan | b.nan | (a.infinite & b.zero) | (a.zero & b.infinite),
        )
        flags = ("sign", "infinite", "nan")
        s = pipe.cut(product=s.a * s.b, exponent=s.exponent, **pick(s, flags))
        s = pipe.cut(product=s.product, exponent=s.exponent, **pick(s, flags))
        carry = s.product[47]
        exponent = Signal(signed(11))
        m.d.comb += exponent.eq(s.exponent + carry)
        s = pipe.cut(
            significand=Mux(carry, s.product[24:], s.product[23:47]),
            guard=Mux(carry, s.product[23], s.product[22]),
            sticky=s.product[:22].any() | (carry & s.product[22]),
            exponent=exponent,
            **pick(s, flags),
        )
        bits = round_pack(m, **vars(s))
        m.d.comb += self.result.eq(pipe.cut(bits=bits).bits)
        assert pipe.complete
        return m
