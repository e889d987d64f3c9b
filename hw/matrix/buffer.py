"""Words of column blocks, which come from the register file by the row and go to the dot units by the column group."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from typebar.hw.matrix.geometry import Geometry, log2


class GroupBuffer(wiring.Component):
    """Words of two column blocks, for each of `vectors` vectors: written a register row a cycle, read a column group.

    Reads follow `block`, `vector` and `group` in the same cycle; a write can be read in the cycle after.
    """

    def __init__(self, g: Geometry, vectors: int) -> None:
        """A buffer for a geometry's column blocks."""
        self._g, self._vectors = g, vectors
        super().__init__(
            {
                "write": In(1),
                "write_block": In(1),
                "write_vector": In(range(vectors)),
                "write_row": In(range(max(1, g.block_rows))),
                "words": In(32 * g.words),
                "block": In(1),
                "vector": In(range(vectors)),
                "group": In(range(g.interleave + g.groups)),
                "columns": Out(32 * g.columns),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """A row of memory is as wide as a register row or a column group, whichever is wider."""
        m = Module()
        g = self._g
        rows, groups = max(1, g.columns // g.words), max(1, g.words // g.columns)
        depth = g.block // max(g.columns, g.words)
        vectors = 1 << (self._vectors - 1).bit_length()
        m.submodules.memory = memory = Memory(shape=32 * g.words * rows, depth=2 * vectors * depth, init=[])
        write, read = memory.write_port(granularity=32 * g.words), memory.read_port(domain="comb")
        bits = log2(depth)
        m.d.comb += [
            write.addr.eq(Cat((self.write_row >> log2(rows))[:bits], self.write_vector, self.write_block)),
            write.data.eq(self.words.replicate(rows)),
            write.en.eq(Mux(self.write, 1 << (self.write_row & (rows - 1)), 0)),
            read.addr.eq(Cat((self.group >> log2(groups))[:bits], self.vector, self.block)),
        ]
        part = self.group & (groups - 1)
        m.d.comb += self.columns.eq(read.data.word_select(part, 32 * g.columns))
        return m
