"""The manifest of an image: its fields, and the checks that hold before anything runs."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

from typebar.isa.image_plan import (
    PACKED_REGIONS,
    AddressMap,
    ImageError,
    TensorPlan,
    plan_regions,
)
from typebar.isa.instructions import HBM_REGIONS, ISA_VERSION, WORD_BYTES, Format, Region
from typebar.isa.machine import LINE_BYTES, MAX_DEVICES, Machine, MachineError
from typebar.isa.numerics import NUMERICS_VERSION

FORMAT_VERSION = 1
UNKNOWN_DIGEST = "0" * 64
TEXTS = ("program", "graph", "tokenizer")
"""Tensors beside the regions, each with a SHA-256 in the manifest."""


@dataclass(frozen=True)
class TensorRecord(TensorPlan):
    """A tensor as the manifest has it: its plan, its `line` in the region and the SHA-256 of its padded bytes."""

    line: int = 0
    sha256: str = UNKNOWN_DIGEST


@dataclass(frozen=True)
class SourceTensor:
    """Shape and element type of a parameter of the source model."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Manifest:
    """Everything an image says of itself.

    `regions` are bytes on each device; `entries` instruction indices by name; `labels` and `comments` belong to the
    program; `sha256` covers program, graph and tokenizer. `io`, `model`, `accounting` and each tensor's `meta` are
    the compiler's and the host's business and are not interpreted here.
    """

    format_version: int
    isa_version: int
    numerics_version: int
    name: str
    machine: Machine
    contract_hash: str
    timing_hash: str
    devices: int
    weights_format: str
    entries: dict[str, int]
    labels: dict[str, int]
    comments: dict[int, str]
    regions: dict[Region, int]
    io: dict[str, int]
    model: dict[str, Any]
    accounting: dict[str, Any]
    sources: dict[str, SourceTensor]
    source_hash: str
    tensors: tuple[TensorRecord, ...]
    sha256: dict[str, str]

    @cached_property
    def addresses(self) -> AddressMap:
        """Lines, slots and region sizes, worked out afresh from the tensors' lengths."""
        return plan_regions(self.tensors, self.machine, self.devices)


def loads(data: bytes, what: str) -> Any:
    """Strict JSON: no repeated keys, no NaN; a failure is one ImageError that starts with `what`."""
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ImageError(f"{what} is not valid JSON ({error}): the file is corrupt") from None


def dumps(data: Any, what: str) -> bytes:
    """Compact ASCII JSON; a value that JSON cannot hold is one ImageError that starts with `what`."""
    try:
        return json.dumps(data, separators=(",", ":"), allow_nan=False).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise ImageError(f"{what} cannot be written as JSON: {error}") from None


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key is repeated")
    return table


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number")


def _show(value: Any) -> str:
    return reprlib.repr(value)


class _Table:
    """Typed look-ups in one JSON object; each failure names the field, its value and what was wanted."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise ImageError(f"manifest: {where} must be an object, not {_show(value)}: compile again")
        self.value: dict[str, Any] = value
        self.where = where
        self.asked: set[str] = set()

    def get(self, key: str) -> Any:
        self.asked.add(key)
        if key not in self.value:
            raise ImageError(f"manifest: {self.where} lacks the field {key!r}: compile again")
        return self.value[key]

    def integer(self, key: str, low: int = 0, high: int = 2**63 - 1) -> int:
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            self._refuse(key, value, f"an integer from {low} to {high}")
        return value

    def text(self, key: str) -> str:
        value = self.get(key)
        if not isinstance(value, str):
            self._refuse(key, value, "text")
        return value

    def digest(self, key: str) -> str:
        value = self.text(key)
        if not re.fullmatch("[0-9a-f]{64}", value):
            self._refuse(key, value, "a SHA-256 in lower-case hexadecimal")
        return value

    def array(self, key: str) -> list[Any]:
        value = self.get(key)
        if not isinstance(value, list):
            self._refuse(key, value, "an array")
        return value

    def table(self, key: str) -> _Table:
        return _Table(self.get(key), f"{self.where}.{key}" if self.where != "the top level" else key)

    def integers(self, key: str, high: int = 2**63 - 1) -> dict[str, int]:
        inner = self.table(key)
        return {name: inner.integer(name, 0, high) for name in inner.value}

    def only_these(self) -> None:
        for key in self.value:
            if key not in self.asked:
                raise ImageError(f"manifest: {self.where} has an unknown field {_show(key)}: compile again")

    def _refuse(self, key: str, value: Any, wanted: str) -> NoReturn:
        raise ImageError(f"manifest: {self.where}: {key} must be {wanted}, not {_show(value)}: compile again")


def parse_manifest(data: Any, words: int) -> Manifest:
    """The manifest in parsed JSON, for a program of `words` instructions, with all its own rules checked.

    Raises:
        ImageError: a version this Typebar does not read, a field missing, unknown or of the wrong type, hashes that
            contradict the machine, an address that is not the layout's, an entry outside the program, or regions
            that do not fit the machine's memories.
    """
    top = _Table(data, "the top level")
    _check_versions(top)
    machine = _machine(top)
    tensors = tuple(_tensor(item, index) for index, item in enumerate(top.array("tensors")))
    weights_format = top.text("weights_format")
    if weights_format not in {item.name.lower() for item in Format}:
        raise ImageError(f"manifest: weights_format {_show(weights_format)} is unknown: compile again")
    digests = top.table("sha256")
    regions = top.table("regions")
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        isa_version=ISA_VERSION,
        numerics_version=NUMERICS_VERSION,
        name=top.text("name"),
        machine=machine,
        contract_hash=top.digest("contract_hash"),
        timing_hash=top.digest("timing_hash"),
        devices=top.integer("devices", 1, MAX_DEVICES),
        weights_format=weights_format,
        entries=top.integers("entries", words - 1),
        labels=top.integers("labels", words),
        comments=_comments(top.table("comments"), words),
        regions={region: regions.integer(region.name.lower()) for region in Region},
        io=top.integers("io"),
        model=top.table("model").value,
        accounting=top.table("accounting").value,
        sources={name: _source(top.table("sources"), name) for name in top.table("sources").value},
        source_hash=top.text("source_hash"),
        tensors=tensors,
        sha256={name: digests.digest(name) for name in TEXTS},
    )
    for table in (top, digests, regions):
        table.only_these()
    _check_addresses(manifest)
    if machine.contract_hash() != manifest.contract_hash or machine.timing_hash() != manifest.timing_hash:
        raise ImageError("manifest: its machine does not hash to its contract and timing hashes: compile again")
    _check_fit(manifest, words)
    return manifest


def check_machine(manifest: Manifest, machine: Machine) -> None:
    """Refuse a machine that differs in a parameter the image depends on; timing may differ.

    Raises:
        ImageError: names each differing parameter with both values.
    """
    if machine.contract_hash() == manifest.contract_hash:
        return
    wanted, given = manifest.machine.contract_parameters(), machine.contract_parameters()
    differing = ", ".join(
        f"{key} {wanted[key]} (not {given[key]})" for key in sorted(wanted) if wanted[key] != given[key]
    )
    raise ImageError(
        f"image is compiled for machine {manifest.machine.name!r}, not {machine.name!r}; it needs {differing}:"
        " compile for this machine"
    )


def check_tokenizer(data: bytes) -> None:
    """Refuse a tokenizer that is neither empty nor a JSON object.

    Raises:
        ImageError: it is neither.
    """
    if data and not isinstance(loads(data, "tokenizer"), dict):
        raise ImageError("tokenizer is not a JSON object: give the contents of a tokenizer.json")


def _check_versions(top: _Table) -> None:
    known = [("format", FORMAT_VERSION), ("isa", ISA_VERSION), ("numerics", NUMERICS_VERSION)]
    for what, version in known:
        found = top.integer(f"{what}_version")
        if found != version:
            remedy = "update Typebar, or compile again" if found > version else "compile the model again"
            raise ImageError(f"image has {what} version {found}, this Typebar reads {version}: {remedy}")


def _machine(top: _Table) -> Machine:
    try:
        return Machine.from_mapping(top.table("machine").value, "image's machine")
    except MachineError as error:
        raise ImageError(" ".join(f"manifest: {error}".split())) from None


def _tensor(item: Any, index: int) -> TensorRecord:
    table = _Table(item, f"tensors[{index}]")
    region = table.text("region")
    if region.upper() not in Region.__members__:
        raise ImageError(f"manifest: tensors[{index}]: region {_show(region)} is unknown: compile again")
    record = TensorRecord(
        name=table.text("name"),
        region=Region[region.upper()],
        device=None if table.get("device") is None else table.integer("device", 0, MAX_DEVICES - 1),
        line=table.integer("line"),
        bytes=table.integer("bytes"),
        sha256=table.digest("sha256"),
        meta=table.table("meta").value,
    )
    table.only_these()
    return record


def _source(sources: _Table, name: str) -> SourceTensor:
    table = sources.table(name)
    shape = table.array("shape")
    if any(not isinstance(size, int) or isinstance(size, bool) or size < 0 for size in shape):
        raise ImageError(f"manifest: sources: shape of {_show(name)} is {_show(shape)}: compile again")
    source = SourceTensor(tuple(shape), table.text("dtype"))
    table.only_these()
    return source


def _comments(table: _Table, words: int) -> dict[int, str]:
    comments = {}
    for key in table.value:
        if not re.fullmatch("0|[1-9][0-9]{0,9}", key) or int(key) >= words:
            raise ImageError(f"manifest: comment at {_show(key)} is outside the program of {words} instructions")
        comments[int(key)] = table.text(key)
    return comments


def _check_addresses(manifest: Manifest) -> None:
    addresses = manifest.addresses
    for record in manifest.tensors:
        line = addresses.lines[record.name]
        if record.line != line:
            end = (record.line * LINE_BYTES + record.bytes, addresses.totals[record.region])
            fault = "outside its region" if end[0] > end[1] else "overlapping, misaligned or after a gap"
            raise ImageError(
                f"manifest: tensor {record.name!r} is at line {record.line}, {fault}; its place is line {line}:"
                " compile again"
            )
    for region, size in manifest.regions.items():
        if region in PACKED_REGIONS and size != addresses.totals[region]:
            raise ImageError(
                f"manifest: region {region.name} has {size} bytes but its tensors take {addresses.totals[region]}:"
                " compile again"
            )
        if size % LINE_BYTES:
            raise ImageError(
                f"manifest: region {region.name} has {size} bytes, no multiple of {LINE_BYTES}: compile again"
            )


def _check_fit(manifest: Manifest, words: int) -> None:
    machine = manifest.machine
    sizes = manifest.regions
    hbm = sum(sizes[region] for region in HBM_REGIONS)
    needs = [
        ("HBM", hbm, machine.hbm.capacity_bytes, "use more devices or a shorter context"),
        ("DDR", sum(sizes.values()) - hbm, machine.ddr.capacity_bytes, "use more devices"),
        ("program memory", words * WORD_BYTES, machine.control.program_bytes, "use a larger machine"),
    ]
    for memory, need, capacity, remedy in needs:
        if need > capacity:
            raise ImageError(f"image needs {need} bytes of {memory} on each device, which has {capacity}: {remedy}")


def tensor_json(record: TensorRecord) -> dict[str, Any]:
    """A tensor's entry in the manifest's JSON."""
    return {
        "name": record.name,
        "region": record.region.name.lower(),
        "device": record.device,
        "line": record.line,
        "bytes": record.bytes,
        "sha256": record.sha256,
        "meta": record.meta,
    }


def machine_json(machine: Machine) -> Mapping[str, Any]:
    """The manifest's fields that a machine determines."""
    return {
        "machine": machine.to_mapping(),
        "contract_hash": machine.contract_hash(),
        "timing_hash": machine.timing_hash(),
    }
