"""From source parameters to the bytes of an image's tensors, and back.

Each tensor's `meta` says how it was made, so an image alone gives every source parameter back (rounded to the image's
format): the torch device needs no checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from typebar.compiler import tables
from typebar.compiler.segments import Segment
from typebar.isa.errors import TypebarError
from typebar.isa.image import Image
from typebar.isa.image_plan import TensorPlan
from typebar.isa.instructions import FORMAT_BYTES, Format
from typebar.isa.layout import pack, unpack
from typebar.isa.machine import Machine
from typebar.isa.numerics import NumericFlag, decode, encode

Lookup = Callable[[str], NDArray[Any]]
F32 = NDArray[np.float32]


class WeightError(TypebarError):
    """Weights that a machine cannot hold as they are; the message names the parameter and the way out."""


def stored_format(weights: Format) -> Format:
    """The format of what is no product's weight, tables, K and V, in an image whose weights are in `weights`."""
    return Format.FP16 if weights is Format.INT8 else weights


def checked(values: F32, name: str, masks: bool = False) -> F32:
    """The values of a parameter; only `masks` may hold minus infinity.

    Raises:
        WeightError: it holds NaN or infinity.
    """
    if np.isnan(values).any() or (np.isinf(values) & ~(masks & (values < 0))).any():
        raise WeightError(f"parameter {name!r} holds NaN or infinity: mend the checkpoint")
    return values


class Packer:
    """Makes each planned tensor's bytes; keeps only the last few sources in memory."""

    _KEPT = 4

    def __init__(self, machine: Machine, fmt: Format, lookup: Lookup) -> None:
        """Pack for a machine, with weights in a format, from parameters that `lookup` loads by name."""
        self.machine, self.format, self._lookup = machine, stored_format(fmt), lookup
        self._kept: dict[str, F32 | NDArray[np.int8]] = {}

    def payload(self, plan: TensorPlan) -> NDArray[np.uint8]:
        """The bytes of one tensor.

        Raises:
            WeightError: a parameter holds NaN or infinity, or a value beyond the format's range.
        """
        make: dict[str, Callable[[TensorPlan], NDArray[np.uint8]]] = {
            "matrix": self._matrix,
            "bias": self._column_values,
            "scale": self._column_values,
            "vector": self._vector,
            "table": self._table,
            "rotary": self._rotary,
            "planes": self._planes,
        }
        return make[plan.meta["kind"]](plan)

    def _source(self, name: str, masks: bool = False) -> F32:
        """Values by name; only `masks` may hold minus infinity."""
        return np.asarray(self._stored(name, masks), np.float32)

    def _stored(self, name: str, masks: bool = False) -> F32 | NDArray[np.int8]:
        """The same; int8 values stay so."""
        if name not in self._kept:
            values = np.asarray(self._lookup(name))
            if values.dtype != np.int8:
                values = checked(np.asarray(values, np.float32), name, masks)
            while len(self._kept) >= self._KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[name] = values
        return self._kept[name]

    def _encoded(self, values: F32 | NDArray[np.int8], name: str, fmt: Format) -> NDArray[Any]:
        if fmt is Format.INT8 and values.dtype == np.int8:
            return values
        values = np.asarray(values, np.float32)
        raw, flags = encode(values, fmt)
        if fmt is Format.INT8 and not np.array_equal(decode(raw, fmt), values):
            raise WeightError(
                f"parameter {name!r} has a scale and values that are no int8: round it, or drop the scale"
            )
        if flags & NumericFlag.STORE_SATURATED:
            largest = float(np.abs(values).max())
            raise WeightError(
                f"parameter {name!r} reaches {largest:g}, beyond {fmt.name.lower()}: compile with --weights bf16"
            )
        return raw

    def _matrix(self, plan: TensorPlan) -> NDArray[np.uint8]:
        meta, fmt = plan.meta, _format(plan.meta, self.format)
        element = FORMAT_BYTES[fmt]
        local = np.zeros((meta["k"], meta["words"]), np.dtype(f"u{element}"))
        rows, places = _held_rows(meta, _rank(plan))
        for segment, words, columns in _held(meta, _rank(plan)):
            source = self._stored(segment.weight)
            part = source[rows][:, columns] if segment.layout == "in_out" else source[columns][:, rows].T
            local[_cells(places, words)] = self._encoded(part, segment.weight, fmt).view(local.dtype)
        return pack(local, self.machine, element)

    def _column_values(self, plan: TensorPlan) -> NDArray[np.uint8]:
        local = np.zeros(plan.bytes // 4, np.float32)
        for segment, words, columns in _held(plan.meta, _rank(plan)):
            name = getattr(segment, plan.meta["kind"])
            if name is not None:
                local[words] = self._source(name)[columns]
        return local.view(np.uint8)

    def _vector(self, plan: TensorPlan) -> NDArray[np.uint8]:
        return np.ascontiguousarray(self._source(plan.meta["symbol"]).reshape(-1)).view(np.uint8)

    def _table(self, plan: TensorPlan) -> NDArray[np.uint8]:
        meta = plan.meta
        raw = self._encoded(self._source(meta["symbol"]), meta["symbol"], self.format)
        rows = np.zeros((meta["rows"], meta["row_bytes"]), np.uint8)
        rows[:, : meta["width"] * FORMAT_BYTES[self.format]] = np.ascontiguousarray(raw).view(np.uint8)
        return rows.reshape(-1)

    def _rotary(self, plan: TensorPlan) -> NDArray[np.uint8]:
        cos, sin = (self._source(plan.meta[key]) for key in ("cos", "sin"))
        return tables.rotary_rows(plan.meta, cos, sin).reshape(-1).view(np.uint8)

    def _planes(self, plan: TensorPlan) -> NDArray[np.uint8]:
        source = self._source(plan.meta["symbol"], masks=True)
        return tables.plane_rows(plan.meta, source, plan.device).reshape(-1).view(np.uint8)


def _rank(plan: TensorPlan) -> int:
    assert plan.device is not None
    return plan.device


Index = NDArray[np.int64] | slice


def _run(places: NDArray[np.int64]) -> Index:
    """The same places as a slice where they follow one another, which is much faster."""
    follow = (
        places.size > 0 and int(places[-1]) - int(places[0]) == places.size - 1 and bool((np.diff(places) == 1).all())
    )
    return slice(int(places[0]), int(places[-1]) + 1) if follow else places


def _cells(rows: Index, columns: Index) -> tuple[Any, Any]:
    """An index of the cells where rows and columns meet."""
    if isinstance(rows, slice) or isinstance(columns, slice):
        return rows, columns
    return rows[:, None], columns


def _held(meta: Mapping[str, Any], rank: int) -> Iterator[tuple[Segment, Index, Index]]:
    """Each segment with the words of the tensor that it fills on a device, and their source columns."""
    at = 0
    for item in meta["segments"]:
        segment = Segment(**item)
        words, columns = segment.columns(rank)
        yield segment, _run(at + words), _run(columns)
        at += segment.words


def _format(meta: Mapping[str, Any], weights: Format) -> Format:
    """A matrix's format: the image's, unless its own is given."""
    return Format[meta["format"].upper()] if "format" in meta else weights


def _held_rows(meta: Mapping[str, Any], rank: int) -> tuple[Index, Index]:
    """The source rows that a matrix has on a device and the position in k of each.

    All rows, unless the device has those that meet its share of the input, or the matrix is some rows of one.
    """
    rows = np.arange(meta["rows"])
    unit, pad = meta["row_unit"], meta["row_pad"]
    places = rows // unit * pad + rows % unit
    if meta.get("by_rows"):
        places = places - rank * meta["k"]
        held = (places >= 0) & (places < meta["k"])
        rows, places = rows[held], places[held]
    return _run(rows + meta.get("first_row", 0)), _run(places)


def unpack_weights(image: Image) -> Lookup:
    """A look-up of source parameters (float32, in their source shapes) from an image alone, unpacked when asked for.

    The look-up raises TypebarError for a name that the image does not hold.
    """
    fmt = stored_format(Format[image.manifest.weights_format.upper()])
    holders: dict[str, list[Any]] = {}
    for record in image.manifest.tensors:
        for name in _names(record.meta):
            holders.setdefault(name, []).append(record)

    def lookup(name: str) -> F32:
        if name not in holders:
            raise TypebarError(f"the image holds no parameter {name!r}: compile it again from its checkpoint")
        records, shape = holders[name], image.manifest.sources[name].shape
        kind = records[0].meta["kind"]
        if kind == "table":
            return _unpack_table(image, records[0], fmt)
        if kind == "vector":
            return image.tensor(records[0].name, None).view(np.float32).reshape(shape).copy()
        if kind == "rotary":
            return tables.rotary_source(records[0].meta, _unpack_rows(image, records[0]), name)
        out = np.zeros(shape, np.float32)
        for record in records:
            if record.meta["kind"] == "planes":
                tables.plane_source(record.meta, _unpack_rows(image, record), record.device, out)
            elif record.meta["kind"] == "matrix":
                _unpack_matrix(image, record, name, out, _format(record.meta, fmt))
            else:
                _unpack_column_values(image, record, name, out)
        return out.astype(np.int8) if image.manifest.sources[name].dtype == "int8" else out

    return lookup


def _names(meta: Mapping[str, Any]) -> Sequence[str]:
    """The source parameters whose values a tensor holds."""
    kind = meta["kind"]
    if kind == "rotary":
        return [meta["cos"], meta["sin"]]
    if "segments" not in meta:
        return [meta["symbol"]]
    key = "weight" if kind == "matrix" else kind
    return list(dict.fromkeys(item[key] for item in meta["segments"] if item[key] is not None))


def _unpack_rows(image: Image, record: Any) -> F32:
    """Rows of a float32 table."""
    words: int = record.meta["row_bytes" if record.meta["kind"] == "rotary" else "plane_bytes"] // 4
    return image.tensor(record.name, record.device)[: record.bytes].view(np.float32).reshape(-1, words)


def _unpack_table(image: Image, record: Any, fmt: Format) -> F32:
    meta = record.meta
    data = image.tensor(record.name, None)[: meta["rows"] * meta["row_bytes"]].reshape(meta["rows"], meta["row_bytes"])
    element = FORMAT_BYTES[fmt]
    return decode(np.ascontiguousarray(data[:, : meta["width"] * element]).view(f"u{element}"), fmt)


def _unpack_column_values(image: Image, record: Any, name: str, out: F32) -> None:
    values = image.tensor(record.name, record.device)[: record.bytes].view(np.float32)
    for segment, words, columns in _held(record.meta, record.device):
        if getattr(segment, record.meta["kind"]) == name:
            out[columns] = values[words]


def _unpack_matrix(image: Image, record: Any, name: str, out: F32, fmt: Format) -> None:
    meta, element = record.meta, FORMAT_BYTES[fmt]
    data = np.ascontiguousarray(image.tensor(record.name, record.device)[: record.bytes])
    rows, places = _held_rows(meta, record.device)
    raw = unpack(data, meta["k"], meta["words"], image.machine, element)[places]
    local = decode(raw.view(np.int8) if fmt is Format.INT8 else raw, fmt)
    for segment, words, columns in _held(meta, record.device):
        if segment.weight == name:
            if segment.layout == "in_out":
                out[_cells(rows, columns)] = local[:, words]
            else:
                out[_cells(columns, rows)] = local[:, words].T
