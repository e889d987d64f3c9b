"""Columns of the matrix unit's tile: elements chosen by format and patch, and converted to operands."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from typebar.hw.arith.convert import FORMAT_BITS, INT8_AT, WEIGHT, OperandFromMemory, OperandFromShort, placed
from typebar.hw.replicate import Shared
from typebar.isa.instructions import Format


class WeightColumn(wiring.Component):
    """Weights (`WEIGHT`), that is operands, of `lanes` elements, `latency` cycles after their bits.

    `bytes_1`, `bytes_2` and `bytes_4` hold the elements if they have that many bytes; `wide` columns have the last.
    Lanes in `patch_lane` come from `by_column`, and with `patch_column` all come from `by_lane`: elements as the
    converters take them, and all zeros where there is no such patch. Only lanes in `lanes_present` of a
    `column_present` are. `nan` and `overflow` are those of any.

    `shared` are the Verilog modules that it instantiates.
    """

    def __init__(self, lanes: int, latency: int, wide: bool) -> None:
        """A column of a tile; `latency` >= 2, the first cycle for the choice."""
        self._lanes, self._wide, self.latency = lanes, wide, latency
        kind, name = (OperandFromMemory, "memory") if wide else (OperandFromShort, "short")
        self._unit = Shared(f"operand_from_{name}_{latency - 1}", kind(latency - 1))
        self.shared = (self._unit,)
        super().__init__(
            {
                "bytes_1": In(8 * lanes),
                "bytes_2": In(16 * lanes),
                **({"bytes_4": In(32 * lanes)} if wide else {}),
                "format": In(FORMAT_BITS),
                "patch_lane": In(lanes),
                "patch_column": In(1),
                "by_column": In(32),
                "by_lane": In(32 * lanes),
                "lanes_present": In(lanes),
                "column_present": In(1),
                "weights": Out(WEIGHT.size * lanes),
                "nan": Out(1),
                "overflow": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """Choose, keep for a cycle, convert."""
        m = Module()
        bits = 32 if self._wide else 16
        fmt = Signal(FORMAT_BITS)
        m.d.sync += fmt.eq(self.format)
        units = []
        for lane in range(self._lanes):
            raw, patched = Signal(bits, name=f"raw{lane}", reset_less=True), Signal(name=f"patched{lane}")
            m.d.comb += patched.eq(self.patch_lane[lane] | self.patch_column)
            patch = (self.by_column | self.by_lane[32 * lane : 32 * (lane + 1)])[:bits]
            m.d.sync += raw.eq(Mux(patched, patch, self._stored(lane)))
            with m.If(~(self.column_present & self.lanes_present[lane])):
                m.d.sync += raw.eq(0)
            m.submodules[f"operand{lane}"] = unit = self._unit.replica()
            m.d.comb += [(unit.word if self._wide else unit.element).eq(raw), unit.format.eq(fmt)]
            units.append(unit)
        m.d.comb += [
            self.weights.eq(Cat(unit.weight for unit in units)),
            self.nan.eq(Cat(unit.nan for unit in units).any()),
            self.overflow.eq(Cat(unit.overflow for unit in units).any()),
        ]
        return m

    def _stored(self, lane: int) -> Value:
        """An element's bits from the FIFO, as the converters take them."""
        byte, short = self.bytes_1[8 * lane : 8 * (lane + 1)], self.bytes_2[16 * lane : 16 * (lane + 1)]
        low = placed(byte, short, self.format == Format.INT8)
        if not self._wide:
            return low
        word = self.bytes_4[32 * lane : 32 * (lane + 1)]
        # An int8 leaves the other bits to the words: one bit of the format then chooses them.
        assert Format.INT8 & 2 and Format.FP32 & 2 and not Format.FP16 & 2 and not Format.BF16 & 2
        is_long, is_int8 = self.format[1], self.format == Format.INT8
        return Cat(placed(byte, Mux(is_long, word[:16], short), is_int8), Mux(is_long, word[16:], short))


class Int8Column(wiring.Component):
    """Elements of `lanes` int8 as they are, a cycle after their bits; other ports are those of `WeightColumn`."""

    def __init__(self, lanes: int) -> None:
        """A column of a tile."""
        self._lanes = lanes
        super().__init__(
            {
                "bytes_1": In(8 * lanes),
                "patch_lane": In(lanes),
                "patch_column": In(1),
                "by_column": In(32),
                "by_lane": In(32 * lanes),
                "lanes_present": In(lanes),
                "column_present": In(1),
                "values": Out(8 * lanes),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """Choose."""
        m = Module()
        values = Signal(8 * self._lanes, reset_less=True)
        m.d.comb += self.values.eq(values)
        for lane in range(self._lanes):
            patched = self.patch_lane[lane] | self.patch_column
            patch = (self.by_column | self.by_lane[32 * lane : 32 * (lane + 1)])[INT8_AT : INT8_AT + 8]
            bits = slice(8 * lane, 8 * (lane + 1))
            m.d.sync += values[bits].eq(Mux(patched, patch, self.bytes_1[bits]))
            with m.If(~(self.column_present & self.lanes_present[lane])):
                m.d.sync += values[bits].eq(0)
        return m
