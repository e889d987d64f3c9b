"""The matrix unit's weights: from FIFO rows to a tile of operands, with the patch from the register file.

Stages from contract time: the FIFO's address in FIFO_LAG, its rows in FIFO_LAG + 2, where format, place and patch
choose every element's bits; RAW_LAG, where conversion begins, of all but the groups that only int8 has; CONVERTED_LAG;
and TILE_LAG, where the tile is at the dot units until the next one. If a float32 tile is twice the FIFO's port, all but
its first read is a cycle later, and the first half waits behind its converters.
"""

from __future__ import annotations

from typing import Any

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from typebar.hw.arith.convert import WEIGHT, MemoryFromFloat32, placed
from typebar.hw.matrix.buffer import GroupBuffer
from typebar.hw.matrix.column import Int8Column, WeightColumn
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
from typebar.hw.memory.fetch import FIFO_READ_CYCLES
from typebar.hw.ports import flag_layout
from typebar.hw.replicate import Shared
from typebar.isa.instructions import Format
from typebar.isa.machine import Machine

_STORING = PATCH_LAG - ROW_LAG


class Weights(wiring.Component):
    """Tiles for the dot units.

    `read` comes in contract time, `load` and `row` (its words, the first selected, and its chunk) in ROW_LAG.
    `tile` holds the weights of each column of each whole group, `nan` tells which columns hold a NaN. A row of dot
    units beyond the groups takes those of group 0. `own` are the groups that only int8 has, in RAW_LAG of a step's
    read and then only. Flags come with their instruction.

    `shared` are the Verilog modules that it instantiates.
    """

    def __init__(self, machine: Machine) -> None:
        """A converter for every element of the widest tile; those of float32 for as many as the port brings."""
        self._machine, g = machine, Geometry.of(machine)
        self._g = g
        latency = CONVERTED_LAG - RAW_LAG + 1
        self._columns = [self._column(latency, wide) for wide in (False, True)]
        self._store = Shared(f"memory_from_float32_{_STORING}", MemoryFromFloat32(_STORING))
        self._int8 = Shared(f"int8_column_{g.lanes}", Int8Column(g.lanes))
        inner = [item for column in self._columns for item in column.component.shared]
        self.shared = (*self._columns, *inner, self._store, self._int8)
        super().__init__(
            {
                "read": In(read_layout(g)),
                "load": In(load_layout(g)),
                "row": In(data.ArrayLayout(32, g.words)),
                "chunk": In(data.ArrayLayout(32, min(g.lanes, g.words))),
                "fifo_place": Out(range(machine.fifo_rows)),
                "fifo_data": In(8 * g.port_rows * g.row_bytes),
                "tile": Out(WEIGHT.size * g.whole_groups * g.tile),
                "own": Out(8 * (g.groups - g.whole_groups) * g.tile),
                "nan": Out(g.whole_groups * g.columns),
                "overflow": Out(flag_layout()),
                "saturated": Out(flag_layout()),
            }
        )

    def _column(self, latency: int, wide: bool) -> Shared:
        lanes = self._g.lanes
        return Shared(f"{'wide' if wide else 'short'}_column_{lanes}", WeightColumn(lanes, latency, wide))

    def elaborate(self, platform: object) -> Module:
        """Address, choose and convert, keep."""
        m = Module()
        read = delayed(m, self.read, FIFO_LAG, "read")
        m.d.comb += self.fifo_place.eq(read.place)
        read = delayed(m, read, FIFO_READ_CYCLES, "read_row")
        columns = self._convert(m, read)
        read = delayed(m, read, CONVERTED_LAG - RAW_LAG + 1, "read_converted")
        self._keep(m, read, [column.weights for column in columns], [column.nan for column in columns])
        raised = Signal()
        m.d.sync += raised.eq(read.valid & Cat(column.overflow for column in columns).any())
        m.d.comb += [self.overflow.raised.eq(raised), self.overflow.pc.eq(delayed(m, read.pc, 1, "overflow_pc"))]
        return m

    # Patch ---------------------------------------------------------------------------------------------
    def _patch(self, m: Module, read: Any) -> tuple[Value, list[Value]]:
        """The patch's raw elements: of a column, all lanes; of a lane by column."""
        g, load = self._g, self.load
        raw, saturated = [], []
        load_format = delayed(m, load.format, _STORING, "patch_format")
        for index in range(g.words):
            m.submodules[f"store{index}"] = unit = self._store.replica()
            column = load.kind == Load.PATCH_LANE
            value = Mux(column, self.row[index], self.chunk[index]) if index < len(self.chunk) else self.row[index]
            m.d.comb += [unit.x.eq(value), unit.format.eq(load.format)]
            low = placed(unit.raw[:8], unit.raw[:16], load_format == Format.INT8)
            raw.append(Cat(low, Mux(load_format == Format.BF16, unit.raw[:16], unit.raw[16:])))
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

    def _patch_lanes(self, m: Module, read: Any, load: Any, raw: list[Value]) -> Value:
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
        return port.data

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
    def _convert(self, m: Module, read: Any) -> list[Any]:
        """A converter for each column, with its share of the FIFO's rows."""
        g = self._g
        by_lane, by_column = self._patch(m, read)
        window, count = self._window(m, read), g.groups * g.columns
        patch_lane, patch_column, present = Signal(g.lanes), Signal(count), Signal(count)
        lanes_present, lane_patch = Signal(g.lanes), Signal(len(by_lane))
        m.d.comb += [
            patch_lane.eq(Mux(read.patch_lane, Const(1, g.lanes) << read.lane_at, 0)),
            patch_column.eq(Mux(read.patch_column, Const(1, count) << read.column_at, 0)),
            lane_patch.eq(Mux(read.patch_column, by_lane, 0)),
            lanes_present.eq(below(read.lanes, g.lanes)),
            present.eq(Mux(read.valid, below(read.columns, count), 0)),
        ]
        columns, own = [], []
        for index in range(count):
            whole = index < g.whole_groups * g.columns
            sizes = [size for size in (1, 2, 4) if size * g.lanes * (index + 1) <= g.port_bytes]
            column = (self._columns[4 in sizes] if whole else self._int8).replica()
            m.submodules[f"column{index}"] = column
            for size in sizes if whole else (1,):
                width = 8 * size * g.lanes
                m.d.comb += getattr(column, f"bytes_{size}").eq(window[width * index : width * (index + 1)])
            m.d.comb += [
                column.patch_lane.eq(patch_lane),
                column.patch_column.eq(patch_column[index]),
                column.by_column.eq(Mux(read.patch_lane, by_column[index], 0)),
                column.by_lane.eq(lane_patch),
                column.lanes_present.eq(lanes_present),
                column.column_present.eq(present[index]),
            ]
            if whole:
                m.d.comb += column.format.eq(read.format)
                columns.append(column)
            else:
                own.append(column.values)
        m.d.comb += self.own.eq(Cat(own))
        return columns

    def _window(self, m: Module, read: Any) -> Value:
        """The bytes of a step from its first on; parts of a row are brought forward a tile's bytes at a time."""
        g = self._g
        window = []
        for part in range(g.port_bytes // g.tile):
            value = Signal(8 * g.tile, name=f"window{part}")
            with m.Switch(read.offset):
                for offset in range(1, g.places - part):
                    with m.Case(offset):
                        m.d.comb += value.eq(self.fifo_data.word_select(part + offset, 8 * g.tile))
                with m.Default():
                    m.d.comb += value.eq(self.fifo_data.word_select(part, 8 * g.tile))
            window.append(value)
        return Cat(window)

    def _keep(self, m: Module, read: Any, operands: list[Value], nans: list[Value]) -> None:
        """The tile register: a group of its own for each row of dot units if they are folded."""
        g = self._g
        complete, folded = read.valid & read.last, read.folded
        if g.two:
            operands, nans = self._joined(m, read, operands), self._joined(m, read, nans)
            late = delayed(m, read, 1, "read_late")
            complete, folded = (read.valid & read.second) | (late.valid & late.last & ~late.second), late.folded
        width = WEIGHT.size * g.lanes
        # Signals without a reset, and without a name for each field of each element.
        tile, any_nan = Signal(len(self.tile), reset_less=True), Signal(len(self.nan), reset_less=True)
        m.d.comb += [self.tile.eq(tile), self.nan.eq(any_nan)]
        with m.If(complete):
            for column, (value, nan) in enumerate(zip(operands, nans, strict=True)):
                same = column % g.columns
                if same != column:
                    value = Mux(folded, value, operands[same])
                    nan = Mux(folded, nan, nans[same])
                m.d.sync += [tile[width * column : width * (column + 1)].eq(value), any_nan[column].eq(nan)]

    def _joined(self, m: Module, read: Any, columns: list[Value]) -> list[Value]:
        """What was converted a cycle before, but for a float32 tile's second half.

        That half comes a cycle after the first, from the same converters.
        """
        half = self._g.columns // 2
        held = [Signal(len(value), name=f"held{index}", reset_less=True) for index, value in enumerate(columns)]
        m.d.sync += [late.eq(value) for late, value in zip(held, columns, strict=True)]
        second = [Mux(read.second, value, late) for value, late in zip(columns[:half], held[half:], strict=False)]
        return [*held[:half], *second, *held[2 * half :]]
