"""Machine descriptions: one TOML file becomes one frozen, validated dataclass that every other part takes.

Units are in the field names or in the field's note: bytes, words (float32), cycles of the one clock, rows (one
beat on every HBM channel at once).
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from typebar.isa.errors import TypebarError

LINE_BYTES = 64
"""Memory addresses in instructions count lines of this many bytes (one 512-bit AXI beat), on every machine."""
MAX_DEVICES = 64
"""The largest ring."""


class MachineError(TypebarError):
    """A machine file or an override breaks a rule; the message names rule, value and limit."""


def _param(note: str, low: float, high: float, *, contract: bool = False, power: bool = False) -> Any:
    return field(metadata={"note": note, "low": low, "high": high, "contract": contract, "power": power})


@dataclass(frozen=True)
class Matrix:
    """The matrix unit: `columns` x `rows` dot units of length `lanes`."""

    lanes: int = _param("length of one dot product", 4, 128, contract=True, power=True)
    columns: int = _param("weight columns side by side", 1, 256, contract=True, power=True)
    rows: int = _param("vectors side by side; folds into further columns for a single vector", 1, 16, power=True)
    interleave: int = _param("column groups whose accumulators interleave", 1, 64, contract=True, power=True)
    vectors: int = _param("most vectors (outer x inner) of one instruction", 1, 64, contract=True)
    fifo_port_bytes: int = _param("bytes a cycle from the FIFO into the unit", 16, 65536, power=True)
    dot_latency: int = _param("cycles from operands to a chunk sum", 1, 128)
    accumulate_latency: int = _param("cycles of the float32 accumulator's adder", 1, 64)
    epilogue_latency: int = _param("cycles from accumulator to register file, all steps", 1, 256)


@dataclass(frozen=True)
class Vector:
    """The vector register file and the vector unit."""

    chains: bool = field(
        metadata={
            "note": "the unit has vchain, and compiled programs use it; else it traps ILLEGAL",
            "contract": True,
        }
    )
    words: int = _param("float32 words in the register file", 256, 524287, contract=True)
    align: int = _param("word alignment of a vector's base", 1, 128, contract=True, power=True)
    segments: int = _param("hazard segments of the register file", 8, 256, power=True)
    lanes: int = _param("float32 lanes of the vector unit; words in a row of the register file", 2, 256, power=True)
    ultra_copies: int = _param("readers of the register file whose copy is UltraRAM, not block RAM", 0, 5)
    latency: int = _param(
        "cycles from an element's last cycle of occupancy to its result's use, any instruction without function", 1, 256
    )
    unary_latency: int = _param("cycles more of an instruction with a unary function", 0, 64)
    reduce_latency: int = _param("cycles from an element's result into a reduction's tree", 0, 64)
    add_latency: int = _param("cycles of one level of a reduction's tree", 1, 64)


@dataclass(frozen=True)
class Hbm:
    """High-bandwidth memory, all channels in lock step: one row is `channels` x `channel_bytes`."""

    channels: int = _param("channels", 1, 64, contract=True, power=True)
    channel_bytes: int = _param("bytes a channel moves a cycle", 8, 128, contract=True, power=True)
    capacity_bytes: int = _param("bytes", 65536, 2**40, contract=True)
    latency: int = _param("cycles from request to data in the FIFO", 1, 4096)
    rows_per_write_slot: int = _param("fetch slots between two write/refresh slots", 1, 1024)
    fifo_bytes: int = _param("bytes of run-ahead FIFO", 256, 2**26)


@dataclass(frozen=True)
class Ddr:
    """Plain DRAM: embeddings, norms, biases, host-visible memory."""

    capacity_bytes: int = _param("bytes", 65536, 2**44, contract=True)
    bytes_per_cycle: int = _param("bytes a cycle; one port moves at most a line", 4, LINE_BYTES, power=True)
    latency: int = _param("cycles from request to first data", 1, 4096)


@dataclass(frozen=True)
class Ring:
    """Links to the two ring neighbours."""

    megabits_per_second: int = _param("payload rate of one link in one direction", 1, 10_000_000)
    hop_latency: int = _param("cycles from the last word sent to the last word received", 1, 100_000)
    setup_latency: int = _param("cycles from start to the first word on the link", 1, 100_000)
    buffer_words: int = _param("largest block one device may send in one instruction", 16, 2**22, contract=True)


@dataclass(frozen=True)
class Control:
    """Scalar core, queues, program memory."""

    run_ahead: bool = field(metadata={"note": "fetch halves run ahead of compute halves", "contract": False})
    barriers: bool = field(
        metadata={
            "note": "compiled programs fence after every all-gather, and gather on a single device too",
            "contract": True,
        }
    )
    program_bytes: int = _param("program memory", 4096, 2**24, contract=True)
    queue_depth: int = _param("entries of each unit's in-order queue", 1, 64)
    branch_cycles: int = _param("issue cycles of a taken branch", 1, 64)
    read_latency: int = _param("cycles of a scalar read of the register file", 1, 64)


@dataclass(frozen=True)
class HostLink:
    """The host's PCIe connection."""

    megabytes_per_second: int = _param("payload rate", 1, 1_000_000)
    latency_ns: int = _param("one way, per transfer", 0, 10_000_000)


@dataclass(frozen=True)
class Machine:
    """One accelerator device and its links.

    Raises:
        MachineError: from `load`, `from_mapping` or `override`, if a parameter is unknown, missing, of the
            wrong type, out of range, or breaks a rule that ties it to another.
    """

    name: str
    description: str
    matrix: Matrix
    vector: Vector
    hbm: Hbm
    ddr: Ddr
    ring: Ring
    control: Control
    host: HostLink
    clock_mhz: int = _param("the one clock", 1, 2000)
    attention_block: int = _param("positions per attention block; part of the numerics", 4, 65536, contract=True)

    # Derived sizes -------------------------------------------------------------------------------------
    @property
    def row_bytes(self) -> int:
        """Bytes one fetch slot moves: one beat on every HBM channel."""
        return self.hbm.channels * self.hbm.channel_bytes

    @property
    def row_lines(self) -> int:
        """Lines of `LINE_BYTES` in a row (matrix operands start at a multiple of it)."""
        return max(1, self.row_bytes // LINE_BYTES)

    @property
    def column_block(self) -> int:
        """Columns that the memory layout keeps together: interleave x columns."""
        return self.matrix.interleave * self.matrix.columns

    @property
    def peak_macs(self) -> int:
        """Multiply-accumulates that the matrix unit does in a cycle: rows x columns x lanes."""
        return self.matrix.rows * self.matrix.columns * self.matrix.lanes

    @property
    def fifo_rows(self) -> int:
        """Rows the run-ahead FIFO holds."""
        return self.hbm.fifo_bytes // self.row_bytes

    @property
    def hbm_bytes_per_second(self) -> float:
        """Peak HBM bandwidth of one device, the denominator of every utilisation figure."""
        return self.row_bytes * self.clock_mhz * 1e6

    @property
    def line_cycles(self) -> int:
        """Cycles that a line takes between DDR and the device."""
        return LINE_BYTES // self.ddr.bytes_per_cycle

    @property
    def segment_words(self) -> int:
        """Words in one hazard segment of the register file."""
        return -(-self.vector.words // self.vector.segments)

    def column_granule(self, element_bytes: int) -> int:
        """Columns are padded to this many, so that each chunk of a column block starts on a row."""
        return max(1, self.row_bytes // (self.matrix.lanes * element_bytes))

    def fold(self, vectors: int, element_bytes: int) -> int:
        """Column groups taken in one step: for a single vector rows fold into columns, if the FIFO port feeds them."""
        if vectors > 1:
            return 1
        fed = self.matrix.fifo_port_bytes // (self.matrix.columns * self.matrix.lanes * element_bytes)
        return max(1, min(self.matrix.rows, fed))

    # Identity ------------------------------------------------------------------------------------------
    def to_mapping(self) -> dict[str, Any]:
        """The machine as plain nested data, the shape of its TOML file."""
        return asdict(self)

    def parameters(self) -> dict[str, Any]:
        """Every parameter by its dotted name, such as `matrix.lanes`."""
        return _flatten(self)

    def contract_parameters(self) -> dict[str, Any]:
        """The parameters an image depends on, by dotted name."""
        keys = _contract_keys()
        return {key: value for key, value in _flatten(self).items() if key in keys}

    def contract_hash(self) -> str:
        """SHA-256 over the parameters an image depends on; loading requires it to match."""
        return _digest(self.contract_parameters())

    def timing_hash(self) -> str:
        """SHA-256 over all other parameters: they move time, or name what the hardware is made of."""
        keep = _contract_keys() | {"name", "description"}
        return _digest({k: v for k, v in _flatten(self).items() if k not in keep})

    # Construction --------------------------------------------------------------------------------------
    @staticmethod
    def from_mapping(data: Mapping[str, Any], origin: str = "machine") -> Machine:
        """Build and validate a machine from nested plain data (a parsed TOML file or an image's manifest)."""
        machine: Machine = _build(Machine, data, origin, "")
        _check_rules(machine, origin)
        return machine

    @staticmethod
    def load(source: str | Path) -> Machine:
        """Load a machine by shipped name (`tiny`, `u280-dfx`, `u280`) or from a TOML file.

        Raises:
            MachineError: no such machine or file, not TOML, or a rule broken.
        """
        path = Path(source)
        if path.suffix == ".toml":
            if not path.is_file():
                raise MachineError(f"machine file {str(source)!r} does not exist: give a shipped name or a .toml file")
            text = path.read_text(encoding="utf-8")
        else:
            if str(source) not in shipped_machines():
                known = ", ".join(shipped_machines())
                raise MachineError(f"unknown machine {str(source)!r}: choose one of {known}, or give a .toml file")
            text = (resources.files("typebar.isa") / "machines" / f"{source}.toml").read_text(encoding="utf-8")
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise MachineError(f"machine file {str(source)!r} is not TOML: {error}") from None
        return Machine.from_mapping(data, str(source))

    def override(self, settings: Mapping[str, str]) -> Machine:
        """A copy with `section.key=value` settings applied and validated again.

        Raises:
            MachineError: unknown key, a value that does not parse, or a rule broken.
        """
        machine = self
        flat = _flatten(self)
        for key, text in settings.items():
            if key not in flat or key in ("name", "description"):
                raise MachineError(f"unknown machine parameter {key!r}: `typebar machines --json` lists them all")
            value = _parse(key, text, type(flat[key]))
            section, _, leaf = key.rpartition(".")
            if section:
                part = replace(getattr(machine, section), **{leaf: value})
                machine = replace(machine, **{section: part})
            else:
                machine = replace(machine, **{leaf: value})
        return Machine.from_mapping(machine.to_mapping(), machine.name)


def shipped_machines() -> list[str]:
    """Names of the machines that come with the package, sorted."""
    folder = resources.files("typebar.isa") / "machines"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def _digest(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _flatten(machine: Machine) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in machine.to_mapping().items():
        if isinstance(value, dict):
            flat.update({f"{key}.{leaf}": item for leaf, item in value.items()})
        else:
            flat[key] = value
    return flat


def _contract_keys() -> set[str]:
    keys = set()
    for outer in fields(Machine):
        section = _SECTIONS.get(outer.name)
        if section is None:
            if outer.metadata.get("contract"):
                keys.add(outer.name)
        else:
            keys |= {f"{outer.name}.{leaf.name}" for leaf in fields(section) if leaf.metadata["contract"]}
    return keys


_SECTIONS: dict[str, Any] = {
    "matrix": Matrix,
    "vector": Vector,
    "hbm": Hbm,
    "ddr": Ddr,
    "ring": Ring,
    "control": Control,
    "host": HostLink,
}


def _parse(key: str, text: str, kind: type) -> Any:
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.strip().lower()]
        return int(text.strip().replace("_", ""), 0)
    except (ValueError, KeyError):
        wanted = "true or false" if kind is bool else "an integer"
        raise MachineError(f"machine parameter {key} must be {wanted}, not {text!r}") from None


def _build(cls: Any, data: Any, origin: str, prefix: str) -> Any:
    if not isinstance(data, Mapping):
        raise MachineError(f"{origin}: {prefix.rstrip('.') or 'machine'} must be a table of parameters, not {data!r}")
    names = {item.name for item in fields(cls)}
    for key in data:
        if key not in names:
            raise MachineError(f"{origin}: unknown machine parameter {prefix}{key}: remove it or correct its name")
    values: dict[str, Any] = {}
    for item in fields(cls):
        key = prefix + item.name
        if item.name not in data:
            raise MachineError(f"{origin}: machine parameter {key} is missing: add it")
        values[item.name] = _check_value(item, data[item.name], key, origin)
    return cls(**values)


def _check_value(item: Any, value: Any, key: str, origin: str) -> Any:
    if item.name in _SECTIONS and is_dataclass(_SECTIONS[item.name]):
        return _build(_SECTIONS[item.name], value, origin, f"{item.name}.")
    if item.type in ("str", "bool"):
        wanted = {"str": str, "bool": bool}[item.type]
        if not isinstance(value, wanted):
            raise MachineError(f"{origin}: machine parameter {key} must be {item.type}, not {value!r}")
        return value
    if not isinstance(value, int) or isinstance(value, bool):
        raise MachineError(f"{origin}: machine parameter {key} must be an integer, not {value!r}")
    low, high = item.metadata["low"], item.metadata["high"]
    if not low <= value <= high:
        raise MachineError(f"{origin}: machine parameter {key} = {value} is outside {low} to {high}")
    if item.metadata["power"] and value & (value - 1):
        raise MachineError(f"{origin}: machine parameter {key} = {value} must be a power of two")
    return value


def _check_rules(machine: Machine, origin: str) -> None:
    """Rules that tie parameters to one another."""
    matrix, vector, row = machine.matrix, machine.vector, machine.row_bytes
    tile_bytes = matrix.columns * matrix.lanes
    port_rows = max(1, matrix.fifo_port_bytes // row)
    step_bytes = max(machine.fold(1, size) * size * tile_bytes for size in (1, 2, 4))
    rules: list[tuple[bool, str]] = [
        (row >= LINE_BYTES, f"hbm.channels x hbm.channel_bytes = {row}"
         f" must be at least one line of {LINE_BYTES} bytes"),
        (machine.attention_block % machine.column_block == 0,
         f"attention_block = {machine.attention_block} must be a multiple of the column block {machine.column_block}"
         " (matrix.interleave x matrix.columns)"),
        (machine.attention_block % matrix.lanes == 0,
         f"attention_block = {machine.attention_block} must be a multiple of matrix.lanes = {matrix.lanes}"),
        (machine.column_block * matrix.lanes % row == 0,
         f"a chunk of a column block, {machine.column_block * matrix.lanes} bytes at int8, must be a whole number of"
         f" {row}-byte rows"),
        (matrix.vectors <= vector.align,
         f"matrix.vectors = {matrix.vectors} must not exceed vector.align = {vector.align}"),
        (matrix.fifo_port_bytes >= 2 * tile_bytes,
         f"matrix.fifo_port_bytes = {matrix.fifo_port_bytes} must feed one 16-bit tile, {2 * tile_bytes} bytes"),
        (vector.align % vector.lanes == 0,
         f"vector.align = {vector.align} must be a multiple of vector.lanes = {vector.lanes}: a vector starts on a row"
         " of the register file"),
        (vector.words % (vector.align * vector.segments) == 0,
         f"vector.words = {vector.words} must be a multiple of vector.align x vector.segments ="
         f" {vector.align * vector.segments}"),
        (machine.hbm.fifo_bytes % row == 0 and machine.hbm.fifo_bytes >= step_bytes,
         f"hbm.fifo_bytes = {machine.hbm.fifo_bytes} must be whole rows of {row} bytes and hold one step of the matrix"
         f" unit, {step_bytes} bytes"),
        (machine.fifo_rows % port_rows == 0,
         f"hbm.fifo_bytes = {machine.hbm.fifo_bytes} must be a multiple of matrix.fifo_port_bytes ="
         f" {matrix.fifo_port_bytes}"),
        (machine.attention_block <= vector.words // 2,
         f"attention_block = {machine.attention_block} must fit half the register file, {vector.words // 2} words"),
        (machine.control.program_bytes % LINE_BYTES == 0,
         f"control.program_bytes = {machine.control.program_bytes} must be a multiple of {LINE_BYTES}"),
    ]  # fmt: skip
    for holds, message in rules:
        if not holds:
            raise MachineError(f"{origin}: {message}")
