"""Operand checks at issue and the ranges an instruction touches: the rules of `typebar.isa.checks` as logic.

Combinational. The order of the rules, and so which trap is named, is that of `isa/checks.py`; the ranges are those of
`isa/timing.py` (`*_accesses`), which differ from the checked ones only for a matmul without rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from amaranth.hdl import Array, Cat, Const, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from typebar.hw.control.decoder import MODIFIER_BITS, modifier, slot
from typebar.isa.checks import MAX_DOT_LENGTH, SCALAR_BYTES
from typebar.isa.instructions import (
    FORMAT_BYTES,
    HBM_REGIONS,
    MAX_OPERANDS,
    OPCODE_BITS,
    WRITABLE_REGIONS,
    Factor,
    Format,
    Operation,
    Patch,
    Reduction,
    Region,
    Scale,
    Source,
    Trap,
)
from typebar.isa.machine import LINE_BYTES, Machine
from typebar.isa.timing import OP

REGION_BITS = (len(Region) - 1).bit_length()
TRAP_BITS = max(Trap).bit_length()
DEVICE_BITS = 7
"""Width of a device count: a ring has 1 to 64 devices."""
_LINE_SHIFT = LINE_BYTES.bit_length() - 1
_BINARY = ("vadd", "vsub", "vmul", "vmax")
_REDUCE = ("vsum", "vsumsq", "vrmax", "vargmax")


def address_bits(machine: Machine) -> int:
    """Width of a region's length in bytes: either memory, whole."""
    return max(machine.hbm.capacity_bytes, machine.ddr.capacity_bytes).bit_length()


def word_bits(machine: Machine) -> int:
    """Width of a number of words, 0 to `vector.words`."""
    return machine.vector.words.bit_length()


def range_layout(machine: Machine) -> data.StructLayout:
    """A range of the register file, first to last word; nothing if not `valid`."""
    bits = word_bits(machine)
    return data.StructLayout({"valid": 1, "first": unsigned(bits), "last": unsigned(bits)})


def rows_layout(machine: Machine) -> data.StructLayout:
    """A range of memory rows of the K/V region, first to last; nothing if not `valid`."""
    bits = max(1, address_bits(machine) - (machine.row_bytes.bit_length() - 1))
    return data.StructLayout({"valid": 1, "first": unsigned(bits), "last": unsigned(bits)})


RANGES = ("dst", "a", "b", "bias", "maximum", "patch")
"""Register operands in the order of their checks; dst and maximum are written, the others read."""
WRITTEN = ("dst", "maximum")
VECTOR_READS = ("a", "b", "bias")
"""Those that a vector instruction reads. A chain's factor counts as a bias and its reduction's result as a maximum."""


@dataclass
class _Range:
    """A register operand under check: `words` (exact, signed) from `base`.

    The bits of `base` in `mask` must be 0 if there are several words.
    """

    base: Signal
    words: Signal
    mask: Signal


class OperandChecker(wiring.Component):
    """Checks an instruction's operand values; everything follows in the same cycle.

    In: `opcode`, `modifiers`, `values` (operands in slot order), the device count and the lengths of the regions.
    Out: `trap` (0 if it may run); the register ranges touched, `dst_read` if dst is also read; `rows` of the K/V region
    touched by a matmul's fetch or an HBM store; `fetches`, whether a matmul has a fetch half; the `region` and the kind
    of a memory instruction (`loads` from DDR, `hbm_store`). All but `trap` hold only if `trap` is 0.
    """

    def __init__(self, machine: Machine) -> None:
        """Take the limits of a machine."""
        self.machine = machine
        super().__init__(
            {
                "opcode": In(OPCODE_BITS),
                "modifiers": In(MODIFIER_BITS),
                "values": In(data.ArrayLayout(signed(32), MAX_OPERANDS)),
                "devices": In(DEVICE_BITS),
                "region_bytes": In(data.ArrayLayout(unsigned(address_bits(machine)), len(Region))),
                "trap": Out(TRAP_BITS),
                "ranges": Out(data.StructLayout({name: range_layout(machine) for name in RANGES})),
                "dst_read": Out(1),
                "rows": Out(rows_layout(machine)),
                "fetches": Out(1),
                "region": Out(REGION_BITS),
                "loads": Out(1),
                "hbm_store": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        """Each instruction sets the operands of shared checks; the first that fails is the trap."""
        self._m = m = Module()
        bits = word_bits(self.machine)
        self._ranges = {
            name: _Range(
                Signal(signed(32), name=f"{name}_base"),
                Signal(signed(2 * bits + 4), name=f"{name}_words"),
                Signal(bits, name=f"{name}_mask"),
            )
            for name in RANGES
        }
        self._illegal = Signal()
        self._bad_count, self._bad_stride, self._bad_access = Signal(), Signal(), Signal()
        self._bad_address, self._bad_region = Signal(), Signal()
        self._no_rows, self._rows_meet = Signal(), Signal()
        self._in_place, self._apart = {name: Signal(name=f"in_place_{name}") for name in ("a", "b")}, Signal()
        self._products()
        with m.Switch(self.opcode):
            for name in (*_BINARY, "vmov", "vunary", *_REDUCE):
                with m.Case(OP[name]):
                    self._vector(name)
            with m.Case(OP["vchain"]):
                self._chain()
            with m.Case(OP["vwrite"]):
                self._range("dst", self._value("vwrite", "dst"), 1, mask=0)
            with m.Case(OP["vread"]):
                self._range("a", self._value("vread", "a"), 1, mask=0)
            with m.Case(OP["gather"]):
                self._gather()
            with m.Case(OP["load"]):
                self._load()
            with m.Case(OP["store"]):
                self._store()
            for name in ("sload", "sstore"):
                with m.Case(OP[name]):
                    self._scalar(name)
            with m.Case(OP["matmul"]):
                self._matmul()
        self._verdict()
        return m

    # Building blocks -----------------------------------------------------------------------------------
    def _value(self, instruction: str, field: str) -> Value:
        return self.values[slot(instruction, field)]

    def _modifier(self, instruction: str, field: str) -> Value:
        return modifier(self.modifiers, instruction, field)

    def _within(self, value: Value, limit: int) -> Value:
        """0 <= value <= limit."""
        return (value >= 0) & (value <= limit)

    def _short(self, value: Value) -> Value:
        """A value already known to lie in 0 .. vector.words."""
        return value[: word_bits(self.machine)]

    def _range(self, name: str, base: Value, words: Value | int, mask: Value | int | None = None) -> None:
        """Set an operand to be checked, by default for a vector's alignment."""
        item = self._ranges[name]
        mask = self.machine.vector.align - 1 if mask is None else mask
        self._m.d.comb += [item.base.eq(base), item.words.eq(words), item.mask.eq(mask)]

    def _size_shift(self, formats: Value) -> Value:
        """log2 of the element size."""
        return Array(Const(FORMAT_BYTES[item].bit_length() - 1, 2) for item in Format)[formats[:2]]

    def _misaligned(self, value: Value, formats: Value) -> Value:
        """Whether a value is no multiple of the element size."""
        shift = self._size_shift(formats)
        return (value[0] & (shift != 0)) | (value[1] & (shift == 2))

    def _is_in(self, region: Value, regions: Sequence[Region] | frozenset[Region]) -> Value:
        return region.matches(*sorted(int(item) for item in regions))

    def _length(self, region: Value) -> Value:
        return Array(self.region_bytes[number] for number in range(len(Region)))[region[:REGION_BITS]]

    def _address(self, instruction: str) -> Value:
        address = Signal(signed(33 + _LINE_SHIFT), name=f"{instruction}_address")
        line, byte = self._value(instruction, "line"), self._value(instruction, "byte")
        self._m.d.comb += address.eq((line << _LINE_SHIFT) + byte)
        return address

    def _products(self) -> None:
        """The rectangle shared by matmul and store: vectors, and the distance from first to last element."""
        m, bits = self._m, word_bits(self.machine)
        outer, inner = Signal(signed(32)), Signal(signed(32))
        is_store = self.opcode == OP["store"]
        m.d.comb += [
            outer.eq(Mux(is_store, self._value("store", "outer"), self._value("matmul", "outer"))),
            inner.eq(Mux(is_store, self._value("store", "inner"), self._value("matmul", "inner"))),
        ]
        self._vectors, self._outer_last, self._inner_last = Signal(2 * bits), Signal(bits), Signal(bits)
        self._counts_ok = Signal()
        words = self.machine.vector.words
        most = Mux(is_store, words, self.machine.matrix.vectors)
        m.d.comb += [
            self._vectors.eq(self._short(outer) * self._short(inner)),
            self._outer_last.eq(self._short(outer) - 1),
            self._inner_last.eq(self._short(inner) - 1),
            self._counts_ok.eq(self._within(outer, words) & self._within(inner, words) & (self._vectors <= most)),
        ]

    def _reaches(self, outer_stride: Value, inner_stride: Value, last_bits: int, name: str) -> tuple[Signal, Signal]:
        """Distances from the first vector to the last of its outer, and of its inner row, given strides.

        Meaningless without vectors, and unless either count fits `last_bits`.
        """
        outer = Signal(last_bits + len(outer_stride), name=f"{name}_outer_reach")
        inner = Signal(last_bits + len(inner_stride), name=f"{name}_inner_reach")
        self._m.d.comb += [
            outer.eq(self._outer_last[:last_bits] * outer_stride),
            inner.eq(self._inner_last[:last_bits] * inner_stride),
        ]
        return outer, inner

    # Instructions --------------------------------------------------------------------------------------
    def _vector(self, name: str) -> None:
        m, n, reduces = self._m, self._value(name, "n"), name in _REDUCE
        m.d.comb += self._bad_count.eq(~self._within(n, self.machine.vector.words))
        results: Value | int = (2 if name == "vargmax" else 1) if reduces else n
        self._range("dst", self._value(name, "dst"), results, mask=1 if reduces else None)
        if name != "vmov":
            self._range("a", self._value(name, "a"), n)
            m.d.comb += self._in_place["a"].eq(not reduces)
        if name == "vmov" or name in _BINARY:
            self._second(name, n)

    def _second(self, name: str, n: Value) -> None:
        """The second operand of a vector instruction: a vector, a word or none."""
        source = self._modifier(name, "b_from")
        with self._m.If(source == Source.VECTOR):
            self._range("b", self._value(name, "b"), n)
            self._m.d.comb += self._in_place["b"].eq(1)
        with self._m.Elif(source == Source.WORD):
            self._range("b", self._value(name, "b"), n != 0)

    def _chain(self) -> None:
        m, n = self._m, self._value("vchain", "n")
        writes, reduction = self._modifier("vchain", "write"), self._modifier("vchain", "reduce")
        m.d.comb += [
            self._illegal.eq(not self.machine.vector.chains),
            self._bad_count.eq(~self._within(n, self.machine.vector.words)),
            self._in_place["a"].eq(1),
        ]
        self._range("dst", self._value("vchain", "dst"), Mux(writes, n, 0))
        self._range("a", self._value("vchain", "a"), n)
        with m.If(self._modifier("vchain", "operation") != Operation.NONE):
            self._second("vchain", n)
        with m.If(self._modifier("vchain", "scale_from") == Factor.WORD):
            self._range("bias", self._value("vchain", "scale"), n != 0)
        self._range("maximum", self._value("vchain", "result"), reduction != Reduction.NONE)

    def _gather(self) -> None:
        m, n = self._m, self._value("gather", "n")
        m.d.comb += self._bad_count.eq(~self._within(n, self.machine.ring.buffer_words))
        total = Signal(self.machine.ring.buffer_words.bit_length() + DEVICE_BITS)
        m.d.comb += total.eq(n[: self.machine.ring.buffer_words.bit_length()] * self.devices)
        over = total > self.machine.vector.words  # more than any base can hold; keeps the sum narrow
        limit = self.machine.vector.words + 1
        self._range("dst", self._value("gather", "dst"), Mux(over, limit, total))
        own = n[: self.machine.ring.buffer_words.bit_length()]
        self._range("a", self._value("gather", "a"), Mux(own > self.machine.vector.words, limit, own))
        m.d.comb += [self._bad_stride.eq((n & (self.machine.vector.align - 1)) != 0), self._apart.eq(1)]

    def _load(self) -> None:
        m, n, region = self._m, self._value("load", "n"), self._modifier("load", "region")
        formats, address = self._modifier("load", "format"), self._address("load")
        end = Signal(signed(len(address) + 2))
        m.d.comb += [
            self._bad_count.eq(~self._within(n, self.machine.vector.words)),
            self._bad_access.eq(self._is_in(region, HBM_REGIONS)),
            self._bad_address.eq(self._misaligned(address, formats)),
            end.eq(address + (self._short(n) << self._size_shift(formats))),
            self._bad_region.eq((n != 0) & ((address < 0) | (end > self._length(region)))),
            self.region.eq(region),
            self.loads.eq(1),
        ]
        self._range("dst", self._value("load", "dst"), n)

    def _store(self) -> None:
        m, region = self._m, self._modifier("store", "region")
        formats, address = self._modifier("store", "format"), self._address("store")
        outer_bytes, inner_bytes = self._value("store", "outer_bytes"), self._value("store", "inner_bytes")
        outer_reach, inner_reach = self._reaches(outer_bytes[:31], inner_bytes[:31], word_bits(self.machine), "store")
        reach = outer_reach + inner_reach
        end = Signal(signed(max(len(reach), len(address)) + 2))
        length = self._length(region)
        none = self._vectors == 0
        row = self.machine.row_bytes.bit_length() - 1
        m.d.comb += [
            self._bad_count.eq(~self._counts_ok | (outer_bytes < 0) | (inner_bytes < 0)),
            self._bad_stride.eq(self._misaligned(outer_bytes, formats) | self._misaligned(inner_bytes, formats)),
            self._bad_access.eq(~self._is_in(region, WRITABLE_REGIONS)),
            self._bad_address.eq(self._misaligned(address, formats)),
            end.eq(address + reach + (1 << self._size_shift(formats))),
            self._bad_region.eq(~none & ((address < 0) | (end > length))),
            self.region.eq(region),
            self.hbm_store.eq(self._is_in(region, HBM_REGIONS)),
            self.rows.valid.eq(self.hbm_store & ~none),
            self.rows.first.eq(address >> row),
            self.rows.last.eq((end - 1) >> row),
        ]
        self._range("a", self._value("store", "a"), self._vectors)

    def _scalar(self, name: str) -> None:
        m, region, address = self._m, self._modifier(name, "region"), self._address(name)
        access = self._is_in(region, HBM_REGIONS)
        if name == "sstore":
            access = access | ~self._is_in(region, WRITABLE_REGIONS)
        m.d.comb += [
            self._bad_access.eq(access),
            self._bad_address.eq((address & (SCALAR_BYTES - 1)) != 0),
            self._bad_region.eq((address < 0) | (address + SCALAR_BYTES > self._length(region))),
            self.region.eq(region),
            self.loads.eq(name == "sload"),
        ]

    def _matmul(self) -> None:
        m, words, align = self._m, self.machine.vector.words, self.machine.vector.align
        k, n = self._value("matmul", "k"), self._value("matmul", "n")
        names = ("src_outer", "src_inner", "dst_outer", "dst_inner")
        strides = {name: self._value("matmul", name) for name in names}
        patch, scaling = self._modifier("matmul", "patch"), self._modifier("matmul", "scaling")
        counts = [self._within(stride, words) for stride in strides.values()]
        counts += [self._counts_ok, self._within(k, MAX_DOT_LENGTH), k != 0, self._within(n, words)]
        counts.append((patch == Patch.NONE) | (self._value("matmul", "patch_at") >= 0))
        short = {name: self._short(stride) for name, stride in strides.items()}
        some = self._vectors != 0
        m.d.comb += [
            self._bad_count.eq(~Cat(counts).all()),
            self._bad_stride.eq(Cat((stride & (align - 1)) != 0 for stride in strides.values()).any()),
            self._no_rows.eq(~some),
            self._apart.eq(1),
            self.dst_read.eq(self._modifier("matmul", "accumulate")),
        ]
        bits = self.machine.matrix.vectors.bit_length()
        dst = self._reaches(short["dst_outer"], short["dst_inner"], bits, "dst")
        src = self._reaches(short["src_outer"], short["src_inner"], bits, "src")
        long_n, long_k = Mux(n > 1, align - 1, 0), Mux(k > 1, align - 1, 0)
        reach = dst[0] + dst[1] + self._short(n)
        self._range("dst", self._value("matmul", "dst"), Mux(some & (n != 0), reach, 0), long_n)
        self._range("a", self._value("matmul", "src"), Mux(some, src[0] + src[1] + k[:17], 0), long_k)
        # Rows of results lie apart if those of one count lie within the other's stride.
        many = {"dst_outer": self._outer_last != 0, "dst_inner": self._inner_last != 0}
        whole = {"dst_outer": dst[0] + self._short(n), "dst_inner": dst[1] + self._short(n)}
        nested = [
            (~many[inside] | (short[inside] >= n)) & (~many[outside] | (short[outside] >= whole[inside]))
            for inside, outside in (("dst_inner", "dst_outer"), ("dst_outer", "dst_inner"))
        ]
        m.d.comb += self._rows_meet.eq(~nested[0] & ~nested[1] & some & (n != 0))
        with m.If(scaling == Scale.COLUMN):
            self._range("b", self._value("matmul", "scale"), n)
        with m.Elif(scaling == Scale.WORD):
            self._range("b", self._value("matmul", "scale"), n != 0)
        with m.If(self._modifier("matmul", "add_bias")):
            self._range("bias", self._value("matmul", "bias"), n)
        with m.If(self._modifier("matmul", "row_max")):
            self._range("maximum", self._value("matmul", "maximum"), self._vectors)
        with m.If(patch == Patch.COLUMN):
            self._range("patch", self._value("matmul", "patch_src"), k)
        with m.Elif(patch == Patch.LANE):
            self._range("patch", self._value("matmul", "patch_src"), n)
        self._matrix_rows(k, n, some)

    def _matrix_rows(self, k: Value, n: Value, some: Value) -> None:
        """Bounds of the packed matrix: `PackedLayout.fetched_end` with shifts for every power of two."""
        m, machine = self._m, self.machine
        region, line = self._modifier("matmul", "region"), self._value("matmul", "line")
        shift = self._size_shift(self._modifier("matmul", "format"))
        lanes = machine.matrix.lanes.bit_length() - 1
        block = machine.column_block.bit_length() - 1
        chunks, blocks_before = Signal(17), Signal(word_bits(machine))
        columns, width = Signal(block + 1), Signal(block + 1)
        lane_rows = Signal(17 + word_bits(machine) + block + 2)
        end = Signal(len(lane_rows) + lanes + 2)
        last = Signal(signed(max(len(end), 32 + _LINE_SHIFT) + 2))
        masks = [machine.column_granule(FORMAT_BYTES[item]) - 1 for item in Format]
        mask = Array(Const(item, block + 1) for item in masks)[self._modifier("matmul", "format")[:2]]
        row = machine.row_bytes.bit_length() - 1
        m.d.comb += [
            chunks.eq((k[:17] + (machine.matrix.lanes - 1)) >> lanes),
            blocks_before.eq((self._short(n) - 1)[: word_bits(machine)] >> block),
            columns.eq(((((self._short(n) - 1) & (machine.column_block - 1)) + 1) + mask) & ~mask),
            width.eq(Mux(self._modifier("matmul", "full"), machine.column_block, columns)),
            lane_rows.eq(((blocks_before * chunks) << block) + (chunks - 1)[:17] * width + columns),
            end.eq((lane_rows << lanes) << shift),
            last.eq((line << _LINE_SHIFT) + end),
            self.fetches.eq((n != 0) & some),
            self._bad_access.eq(~self._is_in(region, HBM_REGIONS)),
            self._bad_address.eq((line & (machine.row_lines - 1)) != 0),
            self._bad_region.eq(self.fetches & ((line < 0) | (last > self._length(region)))),
            self.region.eq(region),
            self.rows.valid.eq(self.fetches & (region == Region.KV)),
            self.rows.first.eq((line << _LINE_SHIFT) >> row),
            self.rows.last.eq((last - 1) >> row),
        ]

    def _overlap(self) -> Value:
        """Whether a result meets an operand that it must be apart from, or one in place that is not the same."""
        m, dst, found = self._m, self.ranges["dst"], [self._rows_meet]
        for name in RANGES[1:]:
            item, meet = self.ranges[name], Signal(name=f"dst_meets_{name}")
            m.d.comb += meet.eq(dst.valid & item.valid & (dst.first <= item.last) & (item.first <= dst.last))
            found.append(self._apart & meet)
            if name in self._in_place:
                found.append(self._in_place[name] & meet & (dst.first != item.first))
        return Cat(found).any()

    # Outcome -------------------------------------------------------------------------------------------
    def _verdict(self) -> None:
        """The first failing rule, in the order of `isa/checks.py`; the ranges for the scoreboard."""
        m, words = self._m, self.machine.vector.words
        verdicts: list[tuple[Value, Trap]] = [(self._illegal, Trap.ILLEGAL), (self._bad_count, Trap.COUNT)]
        for name in RANGES:
            item = self._ranges[name]
            some, bounds, misaligned = (
                Signal(name=f"{name}_some"),
                Signal(name=f"{name}_out"),
                Signal(name=f"{name}_off"),
            )
            last = Signal(signed(max(len(item.words), 32) + 2), name=f"{name}_last")
            m.d.comb += [
                some.eq(item.words > 0),
                last.eq(item.base + item.words - 1),
                bounds.eq(some & ((item.base < 0) | (last >= words))),
                misaligned.eq(some & (item.words > 1) & ((item.base & item.mask) != 0)),
                self.ranges[name].valid.eq(some & ~self._no_rows),
                self.ranges[name].first.eq(item.base),
                self.ranges[name].last.eq(last),
            ]
            verdicts += [(bounds, Trap.REGISTER_BOUNDS), (misaligned, Trap.MISALIGNED)]
        verdicts += [
            (self._bad_stride, Trap.MISALIGNED),
            (self._bad_access, Trap.REGION_ACCESS),
            (self._bad_address, Trap.MISALIGNED),
            (self._bad_region, Trap.REGION_BOUNDS),
            (self._overlap(), Trap.OVERLAP),
        ]
        for index, (failed, trap) in enumerate(verdicts):
            with m.If(failed) if index == 0 else m.Elif(failed):
                m.d.comb += self.trap.eq(int(trap))
