"""Sizes, layouts and latencies that the parts of the matrix unit share.

Lags count from contract time: what the contract puts in cycle c (a load, a step's first read, a pass, a row of
results) happens in the hardware's stage `X` in cycle c + X, for every instruction the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from amaranth.hdl import Cat, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import data

from typebar.hw import delay
from typebar.hw.arith.convert import FORMAT_BITS
from typebar.hw.control.decoder import modifier, slot
from typebar.hw.control.tickets import ticket_bits
from typebar.hw.matrix.epilogue import ACTIVATION_BITS, least_latency
from typebar.hw.memory.fetch import most_freed, port_rows
from typebar.hw.ports import file_rows
from typebar.isa.checks import MAX_DOT_LENGTH
from typebar.isa.instructions import BY_NAME, FORMAT_BYTES, TARGET_BITS, Format
from typebar.isa.machine import Machine, MachineError

ROW_LAG = 3
"""A load's row of the register file, in a register."""
PATCH_LAG = ROW_LAG + 2
"""Last stage of a patch's conversion; the patch can be used in the stage after."""
FIFO_LAG = 4
"""A step's first row address at the FIFO: its rows meet the patch two cycles later."""
RAW_LAG = FIFO_LAG + 3
CONVERTED_LAG = RAW_LAG + 2
TILE_LAG = CONVERTED_LAG + 1
"""Operands of weights and vectors at the dot units."""


def log2(value: int) -> int:
    """The exponent of a power of two."""
    assert value > 0 and value & (value - 1) == 0
    return value.bit_length() - 1


class Load(IntEnum):
    """What a row of the register file is loaded for, in the order of loading."""

    VECTOR = 0
    PATCH_COLUMN = 1
    SCALE_WORD = 2
    SCALE = 3
    BIAS = 4
    PATCH_LANE = 5
    ACCUMULATE = 6


LOAD_BITS = max(Load).bit_length()


@dataclass(frozen=True)
class Geometry:
    """A machine's matrix unit; `words` is W, the words in a row of the register file."""

    machine: Machine
    lanes: int
    columns: int
    rows: int
    interleave: int
    vectors: int
    words: int
    port_bytes: int
    row_bytes: int

    @staticmethod
    def of(machine: Machine) -> Geometry:
        """The geometry of a machine.

        Raises:
            MachineError: the unit cannot be built or cannot keep the machine's latencies.
        """
        matrix = machine.matrix
        g = Geometry(
            machine, matrix.lanes, matrix.columns, matrix.rows, matrix.interleave, matrix.vectors,
            machine.vector.lanes, matrix.fifo_port_bytes, machine.row_bytes,
        )  # fmt: skip
        for key, least in (
            ("dot_latency", TILE_LAG + 1),
            ("accumulate_latency", 2),
            ("epilogue_latency", least_latency(machine) + 2 + g.two),
        ):
            if getattr(matrix, key) < least:
                raise MachineError(
                    f"{machine.name}: matrix.{key} = {getattr(matrix, key)} is faster than the hardware's pipeline:"
                    f" set it to {least} or more"
                )
        if g.block < g.words:
            raise MachineError(
                f"{machine.name}: a column block of {g.block} columns (matrix.interleave x matrix.columns) is narrower"
                f" than a register row of vector.lanes = {g.words} words: raise one of the former"
            )
        if g.two and g.columns == 1:
            raise MachineError(
                f"{machine.name}: matrix.columns = 1 needs matrix.fifo_port_bytes of at least {4 * g.lanes}, a float32"
                f" column, not {g.port_bytes}"
            )
        if machine.hbm.latency < FIFO_LAG + g.two:
            raise MachineError(
                f"{machine.name}: hbm.latency = {machine.hbm.latency} could bring a row before the one in its place is"
                f" read: set it to {FIFO_LAG + g.two} or more"
            )
        return g

    # Sizes ---------------------------------------------------------------------------------------------
    @property
    def block(self) -> int:
        """Columns of a column block."""
        return self.interleave * self.columns

    @property
    def block_rows(self) -> int:
        """Register rows of a column block."""
        return self.block // self.words

    @property
    def passes(self) -> int:
        """Most passes of a step."""
        return -(-self.vectors // self.rows)

    @property
    def slices(self) -> int:
        """Register rows of one chunk of a vector."""
        return max(1, self.lanes // self.words)

    @property
    def pieces(self) -> int:
        """Chunks in one register row."""
        return max(1, self.words // self.lanes)

    @property
    def tile(self) -> int:
        """Elements that one row of dot units takes a cycle."""
        return self.columns * self.lanes

    @property
    def groups(self) -> int:
        """Most column groups in one step."""
        return max(self.fold(element) for element in Format)

    @property
    def whole_groups(self) -> int:
        """Most column groups in one step of another format than int8; the rest need no converters."""
        return max(self.fold(element) for element in Format if element is not Format.INT8)

    @property
    def two(self) -> int:
        """1 if the FIFO takes two cycles for a float32 tile; then everything behind it comes a cycle later."""
        return int(self.port_bytes < 4 * self.tile)

    @property
    def port_rows(self) -> int:
        """Rows that come from the FIFO in a cycle."""
        return port_rows(self.machine)

    @property
    def places(self) -> int:
        """Places in a FIFO row at which a step can begin."""
        return max(1, self.row_bytes // self.tile)

    def fold(self, element: Format) -> int:
        """Column groups in a step for a single vector."""
        return self.machine.fold(1, FORMAT_BYTES[element])

    # Stages --------------------------------------------------------------------------------------------
    @property
    def dot(self) -> int:
        """Latency of the dot units."""
        return self.machine.matrix.dot_latency - TILE_LAG

    @property
    def add(self) -> int:
        """Latency of the accumulators' adders; storing the sum is the cycle more."""
        return self.machine.matrix.accumulate_latency - 1

    @property
    def epilogue(self) -> int:
        """Latency of the epilogue: read-out is a cycle before it, the maxima one behind."""
        return self.machine.matrix.epilogue_latency - 2 - self.two

    @property
    def vector_lag(self) -> int:
        """A pass's address at the buffers of vectors."""
        return TILE_LAG - 1 + self.two

    @property
    def sum_lag(self) -> int:
        """A pass's address at the accumulators, one stage before its chunk sums."""
        return TILE_LAG + self.two + self.dot - 1

    @property
    def drain_lag(self) -> int:
        """A result row's address at the accumulators, when the last sum of its step is written."""
        return self.sum_lag + 1 + self.add

    @property
    def result_lag(self) -> int:
        """A row of results at the epilogue."""
        return self.drain_lag + 2


def job_layout(machine: Machine) -> data.StructLayout:
    """An instruction: what the unit keeps of it. `row` and `word` are an address's parts; strides are in rows."""
    word, row = log2(machine.vector.lanes), unsigned((file_rows(machine) - 1).bit_length())
    place = data.StructLayout({"word": unsigned(word), "row": row})
    count = unsigned(machine.matrix.vectors.bit_length())
    modifiers = {
        item.name: unsigned(item.width) for item in BY_NAME["matmul"].modifiers if item.name not in ("region", "full")
    }
    places = {name: place for name in ("dst", "src", "scale", "bias", "patch_src")}
    strides = {name: row for name in ("src_outer", "src_inner", "dst_outer", "dst_inner")}
    return data.StructLayout(
        {
            **modifiers,
            **places,
            **strides,
            "k": unsigned(MAX_DOT_LENGTH.bit_length()),
            "n": unsigned(machine.vector.words.bit_length()),
            "outer": count,
            "inner": count,
            "vectors": count,
            "lo": signed(32),
            "hi": signed(32),
            "maximum": unsigned((machine.vector.words - 1).bit_length()),
            "patch_at": unsigned(32),
            "pc": unsigned(TARGET_BITS),
            "ticket": unsigned(ticket_bits(machine)),
        }
    )


def job_from(m: Module, machine: Machine, payload: Any) -> tuple[Any, Value]:
    """The job of a matmul as the control core hands it over, and whether there is nothing to do."""
    job = Signal(job_layout(machine), name="incoming")
    word = log2(machine.vector.lanes)
    values = {item.name: payload["values"][slot("matmul", item.name)] for item in BY_NAME["matmul"].operands}
    for name in (item.name for item in BY_NAME["matmul"].modifiers if item.name not in ("region", "full")):
        m.d.comb += job[name].eq(modifier(payload["modifiers"], "matmul", name))
    for name in ("dst", "src", "scale", "bias", "patch_src"):
        m.d.comb += job[name].as_value().eq(values[name])
    for name in ("src_outer", "src_inner", "dst_outer", "dst_inner"):
        m.d.comb += job[name].eq(values[name] >> word)
    for name in ("k", "n", "outer", "inner", "lo", "hi", "maximum", "patch_at"):
        m.d.comb += job[name].eq(values[name])
    m.d.comb += [
        job.vectors.eq(job.outer * job.inner),
        job.pc.eq(payload["pc"]),
        job.ticket.eq(payload["ticket"]),
    ]
    return job, (values["n"] == 0) | (values["outer"] == 0) | (values["inner"] == 0)


def load_layout(g: Geometry) -> data.StructLayout:
    """A load of one register row, as it travels beside its data."""
    return data.StructLayout(
        {
            "valid": unsigned(1),
            "kind": unsigned(LOAD_BITS),
            "word": unsigned(log2(g.words)),
            "piece": unsigned(log2(g.pieces)),
            "row": range(max(g.slices, g.block_rows)),
            "vector": range(g.vectors),
            "single": unsigned(1),
            "chunk": unsigned(1),
            "block": unsigned(1),
            "present": range(max(g.lanes, g.block) + 1),
            "patches": unsigned(1),
            "format": unsigned(FORMAT_BITS),
            "pc": unsigned(TARGET_BITS),
        }
    )


def read_layout(g: Geometry) -> data.StructLayout:
    """A read of the FIFO: the step's tile, or half of one.

    `columns` and `lanes` are those present; `group` is the first column group, within the block. `column_at` and
    `lane_at` are where the patch lies, from this tile's first column and lane.
    """
    return data.StructLayout(
        {
            "valid": unsigned(1),
            "second": unsigned(1),
            "last": unsigned(1),
            "place": range(g.machine.fifo_rows),
            "offset": range(g.places),
            "format": unsigned(FORMAT_BITS),
            "folded": unsigned(1),
            "columns": range(g.groups * g.columns + 1),
            "lanes": range(g.lanes + 1),
            "group": range(g.interleave + g.groups),
            "patch_column": unsigned(1),
            "patch_lane": unsigned(1),
            "column_at": range(g.groups * g.columns),
            "lane_at": range(g.lanes),
            "chunk": unsigned(1),
            "block": unsigned(1),
            "pc": unsigned(TARGET_BITS),
        }
    )


def pass_layout(g: Geometry) -> data.StructLayout:
    """One cycle of the dot units: `rows` vectors and a tile."""
    return data.StructLayout(
        {
            "valid": unsigned(1),
            "number": range(g.passes),
            "step": range(g.interleave),
            "group": range(g.interleave + g.groups),
            "folded": unsigned(1),
            "first": unsigned(1),
            "accumulate": unsigned(1),
            "chunk": unsigned(1),
            "block": unsigned(1),
        }
    )


def drain_layout(g: Geometry) -> data.StructLayout:
    """One row of results on its way to the epilogue; `row` is the register row within the block."""
    return data.StructLayout(
        {
            "valid": unsigned(1),
            "vector": range(g.vectors),
            "step": range(g.interleave),
            "group": range(g.interleave + g.groups),
            "row": range(g.block_rows + g.groups * max(1, g.columns // g.words)),
            "part": range(max(1, g.groups * g.columns // g.words)),
            "folded": unsigned(1),
            "single": unsigned(1),
            "block": unsigned(1),
            "first": unsigned(1),
            "last": unsigned(1),
            "address": range(file_rows(g.machine)),
            "mask": unsigned(g.words),
            "keep": unsigned(g.words),
            "scaling": unsigned(2),
            "add_bias": unsigned(1),
            "activation": unsigned(ACTIVATION_BITS),
            "row_max": unsigned(1),
            "maximum": range(g.machine.vector.words),
        }
    )


def freed_bits(machine: Machine) -> int:
    """Width of the number of rows that a step frees."""
    return most_freed(machine).bit_length()


def step_groups(m: Module, g: Geometry, job: Any) -> tuple[Value, Value]:
    """Whether the rows of dot units are folded, and the binary logarithm of the column groups in a step."""
    folded, shift = Signal(name="folded"), Signal(range(log2(g.groups) + 1), name="group_shift")
    m.d.comb += folded.eq(job.vectors == 1)
    with m.If(folded), m.Switch(job.format):
        for element in Format:
            with m.Case(element):
                m.d.comb += shift.eq(log2(g.fold(element)))
    return folded, shift


def delayed(m: Module, value: Any, cycles: int, name: str) -> Any:
    """A value some cycles later; a layout's `valid` bit is reset, the rest may become shift-register LUTs."""
    layout, bits = value.shape(), Value.cast(value)
    checked = isinstance(layout, data.StructLayout) and "valid" in layout.members
    result = Signal(layout, name=name)
    m.d.comb += Value.cast(result).eq(delay.delayed(m, bits, cycles, name))
    if checked:
        m.d.comb += result.valid.eq(delay.delayed(m, value.valid, cycles, f"{name}_valid", reset=True))
    return result


def minimum(m: Module, value: Value, limit: int, name: str) -> Signal:
    """min(value, limit), in the bits that limit needs."""
    result = Signal(range(limit + 1), name=name)
    m.d.comb += result.eq(Mux(value > limit, limit, value))
    return result


def below(count: Value, positions: int) -> Value:
    """One bit for each position: whether it is below `count`."""
    return Cat(count > position for position in range(positions))
