"""Float32 addition and subtraction."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from typebar.hw.arith.float32 import Parts, leading_zeros, named, round_pack, shift_right_sticky
from typebar.hw.arith.pipeline import Pipeline, pick

CUTS = 6


class Adder(wiring.Component):
    """result = a + b, or a - b, as `numerics.add` and `numerics.sub`; `latency` >= 1 cycles, one result a cycle.

    The smaller magnitude is aligned to the larger with guard, round and sticky bits; the sum is normalised and
    rounded once. A sum below 2^-126 is exact and becomes a zero of its sign.
    """

    def __init__(self, latency: int) -> None:
        """An adder of `latency` >= 1 cycles."""
        self.latency = latency
        super().__init__({"a": In(32), "b": In(32), "subtract": In(1), "result": Out(32)})

    def elaborate(self, platform: object) -> Module:
        """Order, align, add, count, normalise, round: six places to cut."""
        m = Module()
        pipe = Pipeline(m, cuts=CUTS, latency=self.latency)
        a, b = Parts(m, self.a, "a"), Parts(m, self.b, "b")
        b_sign = named(m, b.sign ^ self.subtract, "b_sign")
        swap = named(m, self.b[:31] > self.a[:31], "swap")
        big, small = Mux(swap, b.significand, a.significand), Mux(swap, a.significand, b.significand)
        high = named(m, Mux(swap, b.exponent, a.exponent), "high")
        low = Mux(swap, a.exponent, b.exponent)
        s = pipe.cut(
            big=big,
            small=small,
            exponent=high,
            distance=(high - low)[:8],
            sign=Mux(swap, b_sign, a.sign),
            differ=a.sign ^ b_sign,
            infinite=a.infinite | b.infinite,
            nan=a.nan | b.nan | (a.infinite & b.infinite & (a.sign ^ b_sign)),
        )
        flags = ("sign", "differ", "infinite", "nan")
        amount = Mux(s.distance[5:].any(), 31, s.distance[:5])
        aligned = shift_right_sticky(m, Cat(Const(0, 3), s.small), amount, "aligned")
        s = pipe.cut(aligned=aligned, big=s.big, exponent=s.exponent, **pick(s, flags))
        operand = Cat(s.differ, s.aligned ^ s.differ.replicate(27), s.differ)
        total = (Cat(Const(1, 1), Const(0, 3), s.big) + operand)[1:29]
        s = pipe.cut(total=total, exponent=s.exponent, **pick(s, flags))
        zeros = leading_zeros(m, s.total, "total")
        s = pipe.cut(zeros=zeros, total=s.total, exponent=s.exponent, **pick(s, flags))
        exponent = Signal(signed(10))
        m.d.comb += exponent.eq(s.exponent + 1 - s.zeros)
        normal = (s.total << s.zeros)[:28]
        s = pipe.cut(normal=normal, exponent=exponent, **pick(s, flags))
        bits = round_pack(
            m,
            # x - x is +0; (-0) + (-0) keeps its sign.
            sign=s.sign & (s.normal[27] | ~s.differ | s.infinite),
            exponent=s.exponent,
            significand=s.normal[4:],
            guard=s.normal[3],
            sticky=s.normal[:3].any(),
            infinite=s.infinite,
            nan=s.nan,
        )
        m.d.comb += self.result.eq(pipe.cut(bits=bits).bits)
        assert pipe.complete
        return m
