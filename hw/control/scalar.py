"""The scalar core's arithmetic: results of scalar instructions and conditions of branches, in one cycle."""

from __future__ import annotations

from amaranth.hdl import Module, Mux, Signal, Value, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from typebar.hw.control.decoder import MODIFIER_BITS, modifier
from typebar.isa.instructions import OPCODE_BITS
from typebar.isa.timing import OP

_INFINITY = 0x7F800000
_SMALLEST_NORMAL = 0x00800000
_MAGNITUDE = 0x7FFFFFFF


def _float_greater(a: Value, b: Value) -> Value:
    """float32(a) > float32(b): false with NaN, subnormals are zeros."""
    keys, nan = [], []
    for value in (a, b):
        magnitude = value & _MAGNITUDE
        key = Mux(magnitude < _SMALLEST_NORMAL, 0, Mux(value[31], -magnitude, magnitude))
        keys.append(key)
        nan.append(magnitude > _INFINITY)
    return ~nan[0] & ~nan[1] & (keys[0] > keys[1])


class ScalarUnit(wiring.Component):
    """Combinational: `result` of a scalar instruction on operands `a` and `b`, `taken` of a branch."""

    def __init__(self) -> None:
        """The unit has no parameters."""
        super().__init__(
            {
                "opcode": In(OPCODE_BITS),
                "modifiers": In(MODIFIER_BITS),
                "a": In(signed(32)),
                "b": In(signed(32)),
                "result": Out(32),
                "taken": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """One case for each opcode; `sli` passes its constant on."""
        m = Module()
        a, b = Signal(32), Signal(32)
        m.d.comb += [a.eq(self.a), b.eq(self.b)]
        results = {
            "sli": modifier(self.modifiers, "sli", "value"),
            "sadd": self.a + self.b,
            "ssub": self.a - self.b,
            "smul": self.a * self.b,
            "smin": Mux(self.a < self.b, self.a, self.b),
            "smax": Mux(self.a > self.b, self.a, self.b),
            "sand": self.a & self.b,
            "sshl": a << b[:5],
            "sshr": self.a >> b[:5],
            "sfgt": _float_greater(a, b),
        }
        conditions = {
            "beq": self.a == self.b,
            "bne": self.a != self.b,
            "blt": self.a < self.b,
            "bge": self.a >= self.b,
        }
        with m.Switch(self.opcode):
            for name, value in results.items():
                with m.Case(OP[name]):
                    m.d.comb += self.result.eq(value)
            for name, condition in conditions.items():
                with m.Case(OP[name]):
                    m.d.comb += self.taken.eq(condition)
        return m
