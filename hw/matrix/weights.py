"""The matrix unit's weights: from FIFO rows to a tile of operands, with the patch from the register file.

Stages from contract time: the FIFO's address in FIFO_LAG, its rows in FIFO_LAG + 2, where format, place and patch
choose every element's bits; RAW_LAG, where conversion begins; CONVERTED_LAG; and TILE_LAG, where the tile is at the dot
units until the next one. If a float32 tile is twice the FIFO's port, all but its first read is a cycle later, and the
first half waits behind its converters.
"""

from __future__ import annotations

from typing import Any

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from typebar.hw.arith.convert import OPERAND, MemoryFromFloat32, OperandFromMemory, OperandFromShort
from typebar.hw.matrix.buffer import GroupBuffer
from typebar.hw.matrix.geometry import (
    CONVERTED_LAG,
    FIFO_LAG,
    PATCH_LAG,
    RAW_LAG,
    ROW_LAG,
    Geometry,
    Load,
    below,
    delayed,
    load_layout,
    log2,
    read_layout,
)
from typebar.hw.ports import flag_layout
from typebar.hw.replicate import Shared
from typebar.isa.instructions import Format
from typebar.isa.machine import Machine

_CONVERSION = CONVERTED_LAG - RAW_LAG
_STORING = PATCH_LAG - ROW_LAG


class Weights(wiring.Component):
    """Tiles for the dot units.

    `read` comes in contract time, `load` and `row` (its words, the first selected, and its chunk) in ROW_LAG.
    `tile` holds the operands of each column of each group, `nan` tells which columns hold a NaN. A row of dot units
    beyond the groups takes those of group 0. Flags come with their instruction.

    `shared` are the Verilog modules that it instantiates.
    """

    def __init__(self, machine: Machine) -> None:
        """A converter for every element of the widest tile; those of float32 for as many as the port brings."""
        self._machine, g = machine, Geometry.of(machine)
        self._g = g
        self._wide = Shared(f"operand_from_memory_{_CONVERSION}", OperandFromMemory(_CONVERSION))
        self._short = Shared(f"operand_from_short_{_CONVERSION}", OperandFromShort(_CONVERSION))
        self._store = Shared(f"memory_from_float32_{_STORING}", MemoryFromFloat32(_STORING))
        self.shared = (self._wide, self._short, self._store)
        self._count = g.groups * g.tile
        super().__init__(
            {
                "read": In(read_layout(g)),
                "load": In(load_layout(g)),
                "row": In(data.ArrayLayout(32, g.words)),
                "chunk": In(data.ArrayLayout(32, min(g.lanes, g.words))),
                "fifo_place": Out(range(machine.fifo_rows)),
                "fifo_data": In(8 * g.port_rows * g.row_bytes),
                "tile": Out(data.ArrayLayout(OPERAND, self._count)),
                "nan": Out(g.groups * g.columns),
                "overflow": Out(flag_layout()),
                "saturated": Out(flag_layout()),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """Address, choose, convert, keep."""
        m = Module()
        g = self._g
        read = delayed(m, self.read, FIFO_LAG, "read")
        if g.two:
            # What takes one cycle takes the second of two.
            late, chosen = delayed(m, read, 1, "read_late"), Signal(read.shape())
            takes_two = read.valid & (read.format == Format.FP32)
            m.d.comb += [chosen.eq(Mux(takes_two, read, late)), chosen.valid.eq(takes_two | _waits(late))]
            read = chosen
        m.d.comb += self.fifo_place.eq(read.place)
        read = delayed(m, read, 2, "read_row")
        raw, lanes, columns = self._choose(m, read)
        read = delayed(m, read, 1, "read_raw")
        operands, nans, overflows = self._convert(m, read, raw, lanes, columns)
        read = delayed(m, read, _CONVERSION, "read_converted")
        self._keep(m, read, operands, nans)
        raised = Signal()
        m.d.sync += raised.eq(read.valid & Cat(overflows).any())
        m.d.comb += [self.overflow.raised.eq(raised), self.overflow.pc.eq(delayed(m, read.pc, 1, "overflow_pc"))]
        return m

    # Patch ---------------------------------------------------------------------------------------------
    def _patch(self, m: Module, read: Any) -> tuple[list[Value], list[Value]]:
        """The patch's raw elements: of a column by lane, of a lane by column."""
        g, load = self._g, self.load
        raw, saturated = [], []
        for index in range(g.words):
            m.submodules[f"store{index}"] = unit = self._store.replica()
            column = load.kind == Load.PATCH_LANE
            value = Mux(column, self.row[index], self.chunk[index]) if index < len(self.chunk) else self.row[index]
            m.d.comb += [unit.x.eq(value), unit.format.eq(load.format)]
            raw.append(unit.raw)
            saturated.append(unit.saturated)
        first = Signal(range(max(g.lanes, g.block)))
        m.d.comb += first.eq(load.row << log2(g.words))
        present = Signal(g.words)
        m.d.comb += present.eq(Cat(first + index < load.present for index in range(g.words)))
        if g.lanes < g.words:
            kept = Mux(load.kind == Load.PATCH_LANE, (1 << g.words) - 1, (1 << g.lanes) - 1)
            present = present & kept
        present = delayed(m, present, _STORING, "patch_present")
        load = delayed(m, load, _STORING, "patch_load")
        patches = load.valid & load.patches & load.kind.matches(Load.PATCH_COLUMN, Load.PATCH_LANE)
        m.d.sync += [
            self.saturated.raised.eq(patches & (Cat(saturated) & present).any()),
            self.saturated.pc.eq(load.pc),
        ]
        return self._patch_lanes(m, read, load, raw), self._patch_columns(m, read, load, raw)

    def _patch_lanes(self, m: Module, read: Any, load: Any, raw: list[Value]) -> list[Value]:
        """A column's patch: the raw elements of the chunk's lanes."""
        g = self._g
        width = min(g.lanes, g.words)
        m.submodules.patch_column = memory = Memory(shape=32 * g.lanes, depth=2, init=[])
        write, port = memory.write_port(granularity=32 * width), memory.read_port(domain="comb")
        m.d.comb += [
            write.addr.eq(load.chunk),
            write.data.eq(Cat(raw[:width]).replicate(g.slices)),
            write.en.eq(Mux(load.valid & (load.kind == Load.PATCH_COLUMN), 1 << load.row, 0)),
            port.addr.eq(read.chunk),
        ]
        return [port.data[32 * lane : 32 * (lane + 1)] for lane in range(g.lanes)]

    def _patch_columns(self, m: Module, read: Any, load: Any, raw: list[Value]) -> list[Value]:
        """A lane's patch: the raw elements of the tile's columns."""
        g = self._g
        words: list[Value] = []
        for group in range(g.groups):
            buffer = GroupBuffer(g, 1)
            m.submodules[f"patch_lane{group}"] = buffer
            m.d.comb += [
                buffer.write.eq(load.valid & (load.kind == Load.PATCH_LANE)),
                buffer.write_block.eq(load.block),
                buffer.write_row.eq(load.row),
                buffer.words.eq(Cat(raw)),
                buffer.block.eq(read.block),
                buffer.group.eq(read.group + group),
            ]
            words += [buffer.columns[32 * column : 32 * (column + 1)] for column in range(g.columns)]
        if g.two:
            half = g.columns // 2
            words = [
                Mux(read.second, words[index + half], word) if index < half else word
                for index, word in enumerate(words)
            ]
        return words

    # Elements ------------------------------------------------------------------------------------------
    def _choose(self, m: Module, read: Any) -> tuple[list[Value], Value, Value]:
        """Every element's raw bits, in a register; the lanes and the columns that are present, beside them."""
        g = self._g
        by_lane, by_column = self._patch(m, read)
        byte = self._bytes(m, read)
        columns = g.groups * g.columns
        patch_lane, patch_column = Signal(g.lanes), Signal(columns)
        m.d.comb += [
            patch_lane.eq(Mux(read.patch_lane, Const(1, g.lanes) << read.lane_at, 0)),
            patch_column.eq(Mux(read.patch_column, Const(1, columns) << read.column_at, 0)),
        ]
        raw = []
        for element in range(self._count):
            column, lane = divmod(element, g.lanes)
            bits = 32 if self._is_wide(element) else 16
            value = Signal(bits, name=f"raw{element}", reset_less=True)
            stored = Signal(bits, name=f"stored{element}")
            with m.Switch(read.format):
                for fmt, size in ((Format.INT8, 1), (Format.FP32, 4)):
                    if size * 8 <= bits:
                        with m.Case(fmt):
                            m.d.comb += stored.eq(Cat(byte[size * element : size * (element + 1)]))
                with m.Default():
                    if 2 * (element + 1) <= g.port_bytes:
                        m.d.comb += stored.eq(Cat(byte[2 * element : 2 * (element + 1)]))
            patched = Mux(patch_lane[lane], by_column[column], by_lane[lane])
            m.d.sync += value.eq(Mux(patch_lane[lane] | patch_column[column], patched, stored))
            raw.append(value)
        lanes_present, columns_present = Signal(g.lanes), Signal(columns)
        m.d.sync += [
            lanes_present.eq(below(read.lanes, g.lanes)),
            columns_present.eq(Mux(read.valid, below(read.columns, columns), 0)),
        ]
        return raw, lanes_present, columns_present

    def _is_wide(self, element: int) -> bool:
        return 4 * (element + 1) <= self._g.port_bytes

    def _bytes(self, m: Module, read: Any) -> list[Value]:
        """The bytes of a step from its first on; parts of a row are brought forward a tile's bytes at a time."""
        g = self._g
        tile, count = g.tile, max(1, g.port_bytes // g.tile)
        window = []
        for part in range(count):
            choices = [part + offset for offset in range(g.places) if part + offset < g.places] or [part]
            value = Signal(8 * tile, name=f"window{part}")
            with m.Switch(read.offset):
                for offset, source in enumerate(choices[1:], 1):
                    with m.Case(offset):
                        m.d.comb += value.eq(self.fifo_data[8 * tile * source : 8 * tile * (source + 1)])
                with m.Default():
                    m.d.comb += value.eq(self.fifo_data[8 * tile * part : 8 * tile * (part + 1)])
            window.append(value)
        flat = Cat(window)
        return [flat[8 * index : 8 * (index + 1)] for index in range(tile * count)]

    def _convert(
        self, m: Module, read: Any, raw: list[Value], lanes: Value, columns: Value
    ) -> tuple[list[Value], list[Value], list[Value]]:
        """Operands, NaN and overflow of every element."""
        operands, nans, overflows = [], [], []
        for element, bits in enumerate(raw):
            column, lane = divmod(element, self._g.lanes)
            wide = self._is_wide(element)
            m.submodules[f"operand{element}"] = unit = (self._wide if wide else self._short).replica()
            m.d.comb += [
                (unit.raw if wide else unit.element).eq(bits),
                unit.format.eq(read.format),
                unit.present.eq(lanes[lane] & columns[column]),
            ]
            operands.append(unit.operand)
            nans.append(unit.nan)
            overflows.append(unit.overflow)
        return operands, nans, overflows

    def _keep(self, m: Module, read: Any, operands: list[Value], nans: list[Value]) -> None:
        """The tile register: a group of its own for each row of dot units if they are folded."""
        g = self._g
        columns = g.groups * g.columns
        any_nan = [Cat(nans[column * g.lanes : (column + 1) * g.lanes]).any() for column in range(columns)]
        if g.two:
            operands, any_nan = self._join(m, read, operands, any_nan)
        width = len(Value.cast(operands[0]))
        with m.If(read.valid & read.last):
            for column in range(columns):
                same = column % g.columns
                nan = any_nan[column]
                if same != column:
                    nan = Mux(read.folded, nan, any_nan[same])
                m.d.sync += self.nan[column].eq(nan)
                for lane in range(g.lanes):
                    element, shared = column * g.lanes + lane, same * g.lanes + lane
                    value = operands[element]
                    if same != column:
                        value = Mux(read.folded, value, operands[shared])
                    m.d.sync += self.tile.as_value()[width * element : width * (element + 1)].eq(value)

    def _join(
        self, m: Module, read: Any, operands: list[Value], nans: list[Value]
    ) -> tuple[list[Value], list[Value]]:
        """With a float32 tile's second half: the first half from a cycle before, the second from its converters."""
        g = self._g
        half, columns = g.tile // 2, g.columns // 2
        before = [Signal(len(Value.cast(operand)), name=f"held{i}") for i, operand in enumerate(operands[:half])]
        nan_before = [Signal(name=f"held_nan{i}") for i in range(columns)]
        m.d.sync += [held.eq(operand) for held, operand in zip(before, operands, strict=False)]
        m.d.sync += [held.eq(nan) for held, nan in zip(nan_before, nans, strict=False)]
        joined = [Mux(read.second, value, operands[i]) for i, value in enumerate((*before, *operands[:half]))]
        joined_nan = [Mux(read.second, value, nans[i]) for i, value in enumerate((*nan_before, *nans[:columns]))]
        return joined + operands[2 * half :], joined_nan + nans[2 * columns :]


def _waits(late: Any) -> Value:
    return late.valid & (late.format != Format.FP32)
