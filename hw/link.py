"""Credits on a ring's links: they travel with the beats that go the other way, since a cable has no wires to spare.

A link joins this device's stream out to a neighbour's stream in, and back. What the ring unit has beside its streams,
a credit for each place that a receiver has emptied, goes to the sender with the rows that go there: bit CREDIT_BIT of
`user` says that a beat brings one, bit ROW_BIT that it is a row. Without a row to carry it a credit travels alone.
"""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

CREDIT_BIT, ROW_BIT = 30, 31
"""In a beat's `user`; below them lie the ring unit's own bits."""
PENDING_BITS = 16


def beat_layout(row_bits: int) -> data.StructLayout:
    """A beat of a link, as AXI4-Stream carries it."""
    return data.StructLayout({"data": unsigned(row_bits), "user": unsigned(32), "last": unsigned(1)})


class CreditMerger(wiring.Component):
    """Puts credits on a stream of rows.

    `rows` come in, beats go `out`, in the same cycle; `credit` for a cycle is one credit to send. A beat that waits to
    be taken stays as it is, as AXI4-Stream demands: a row that comes while a lone credit waits goes after it.
    """

    def __init__(self, row_bits: int) -> None:
        """Rows of `row_bits` bits."""
        layout = beat_layout(row_bits)
        super().__init__({"rows": In(stream.Signature(layout)), "credit": In(1), "out": Out(stream.Signature(layout))})

    def elaborate(self, platform: object) -> Module:
        """A count of credits that wait, and what the waiting beat has promised."""
        m = Module()
        pending, waits = Signal(PENDING_BITS), Signal()
        kept_row, kept_credit, row, credit = Signal(), Signal(), Signal(), Signal()
        rows, out = self.rows, self.out
        sent = out.valid & out.ready
        m.d.comb += [
            row.eq(Mux(waits, kept_row, rows.valid)),
            credit.eq(Mux(waits, kept_credit, self.credit | (pending != 0))),
            out.valid.eq(row | credit),
            out.payload.data.eq(Mux(row, rows.payload.data, 0)),
            out.payload.user.eq(Cat(Mux(row, rows.payload.user[:CREDIT_BIT], 0), credit, row)),
            out.payload.last.eq(rows.payload.last | ~row),
            rows.ready.eq(row & out.ready),
        ]
        m.d.sync += [
            waits.eq(out.valid & ~out.ready),
            kept_row.eq(row),
            kept_credit.eq(credit),
            pending.eq(pending + self.credit - (sent & credit)),
        ]
        return m
