"""From source parameters to the bytes of an image's tensors, and back.

Each tensor's `meta` says how it was made, so an image alone gives every source parameter back (rounded to the image's
format): the torch device needs no checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from typebar.compiler.device_ir import Segment
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


class Packer:
    """Makes each planned tensor's bytes; keeps only the last few sources in memory."""

    _KEPT = 4

    def __init__(self, machine: Machine, fmt: Format, lookup: Lookup) -> None:
        """Pack for a machine, in a format, from parameters that `lookup` loads by name."""
        self.machine, self.format, self._lookup = machine, fmt, lookup
        self._kept: dict[str, F32] = {}

    def payload(self, plan: TensorPlan) -> NDArray[np.uint8]:
        """The bytes of one tensor.

        Raises:
            WeightError: a parameter holds NaN or infinity, or a value beyond the format's range.
        """
        make = {"matrix": self._matrix, "bias": self._bias, "vector": self._vector, "table": self._table}
        return make[plan.meta["kind"]](plan)

    def _source(self, name: str) -> F32:
        if name not in self._kept:
            values = np.asarray(self._lookup(name), np.float32)
            if not np.isfinite(values).all():
                raise WeightError(f"parameter {name!r} holds NaN or infinity: mend the checkpoint")
            while len(self._kept) >= self._KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[name] = values
        return self._kept[name]

    def _encoded(self, values: F32, name: str) -> NDArray[Any]:
        raw, flags = encode(values, self.format)
        if flags & NumericFlag.STORE_SATURATED:
            largest = float(np.abs(values).max())
            raise WeightError(
                f"parameter {name!r} reaches {largest:g}, beyond {self.format.name.lower()}:"
                " compile with --weights bf16"
            )
        return raw

    def _matrix(self, plan: TensorPlan) -> NDArray[np.uint8]:
        meta, element = plan.meta, FORMAT_BYTES[self.format]
        local = np.zeros((meta["k"], meta["words"]), np.dtype(f"u{element}"))
        rows = _row_places(meta)
        at = 0
        for segment in _segments(meta):
            for word, column, count in segment.columns(_rank(plan)):
                source = self._source(segment.weight)
                part = (
                    source[:, column : column + count]
                    if segment.layout == "in_out"
                    else source[column : column + count].T
                )
                local[rows, at + word : at + word + count] = self._encoded(part, segment.weight)
            at += segment.words
        return pack(local, self.machine, element)

    def _bias(self, plan: TensorPlan) -> NDArray[np.uint8]:
        local = np.zeros(plan.bytes // 4, np.float32)
        at = 0
        for segment in _segments(plan.meta):
            if segment.bias is not None:
                source = self._source(segment.bias)
                for word, column, count in segment.columns(_rank(plan)):
                    local[at + word : at + word + count] = source[column : column + count]
            at += segment.words
        return local.view(np.uint8)

    def _vector(self, plan: TensorPlan) -> NDArray[np.uint8]:
        return np.ascontiguousarray(self._source(plan.meta["symbol"]).reshape(-1)).view(np.uint8)

    def _table(self, plan: TensorPlan) -> NDArray[np.uint8]:
        meta = plan.meta
        raw = self._encoded(self._source(meta["symbol"]), meta["symbol"])
        rows = np.zeros((meta["rows"], meta["row_bytes"]), np.uint8)
        rows[:, : meta["width"] * FORMAT_BYTES[self.format]] = np.ascontiguousarray(raw).view(np.uint8)
        return rows.reshape(-1)


def _rank(plan: TensorPlan) -> int:
    assert plan.device is not None
    return plan.device


def _segments(meta: Mapping[str, Any]) -> list[Segment]:
    return [Segment(**item) for item in meta["segments"]]


def _row_places(meta: Mapping[str, Any]) -> NDArray[np.int64]:
    """The position in k of each source row."""
    index = np.arange(meta["rows"])
    unit, pad = meta["row_unit"], meta["row_pad"]
    places: NDArray[np.int64] = index // unit * pad + index % unit
    return places


def unpack_weights(image: Image) -> Lookup:
    """A look-up of source parameters (float32, in their source shapes) from an image alone, unpacked when asked for.

    The look-up raises TypebarError for a name that the image does not hold.
    """
    fmt = Format[image.manifest.weights_format.upper()]
    holders: dict[str, list[Any]] = {}
    for record in image.manifest.tensors:
        for name in _names(record.meta):
            holders.setdefault(name, []).append(record)

    def lookup(name: str) -> F32:
        if name not in holders:
            raise TypebarError(f"the image holds no parameter {name!r}: compile it again from its checkpoint")
        records = holders[name]
        kind = records[0].meta["kind"]
        if kind == "table":
            return _unpack_table(image, records[0], fmt)
        if kind == "vector":
            return (
                image.tensor(records[0].name, None).view(np.float32).reshape(image.manifest.sources[name].shape).copy()
            )
        out = np.zeros(image.manifest.sources[name].shape, np.float32)
        for record in records:
            if record.meta["kind"] == "bias":
                _unpack_bias(image, record, name, out)
            else:
                _unpack_matrix(image, record, name, out, fmt)
        return out

    return lookup


def _names(meta: Mapping[str, Any]) -> Sequence[str]:
    """The source parameters whose values a tensor holds."""
    kind = meta["kind"]
    if kind in ("table", "vector"):
        return [meta["symbol"]]
    key = "bias" if kind == "bias" else "weight"
    return list(dict.fromkeys(item[key] for item in meta["segments"] if item[key] is not None))


def _unpack_table(image: Image, record: Any, fmt: Format) -> F32:
    meta = record.meta
    data = image.tensor(record.name, None)[: meta["rows"] * meta["row_bytes"]].reshape(meta["rows"], meta["row_bytes"])
    element = FORMAT_BYTES[fmt]
    return decode(np.ascontiguousarray(data[:, : meta["width"] * element]).view(f"u{element}"), fmt)


def _unpack_bias(image: Image, record: Any, name: str, out: F32) -> None:
    values = image.tensor(record.name, record.device)[: record.bytes].view(np.float32)
    at = 0
    for segment in _segments(record.meta):
        if segment.bias == name:
            for word, column, count in segment.columns(record.device):
                out[column : column + count] = values[at + word : at + word + count]
        at += segment.words


def _unpack_matrix(image: Image, record: Any, name: str, out: F32, fmt: Format) -> None:
    meta, element = record.meta, FORMAT_BYTES[fmt]
    data = np.ascontiguousarray(image.tensor(record.name, record.device)[: record.bytes])
    local = decode(unpack(data, meta["k"], meta["words"], image.machine, element), fmt)[_row_places(meta)]
    at = 0
    for segment in _segments(meta):
        if segment.weight == name:
            for word, column, count in segment.columns(record.device):
                part = local[:, at + word : at + word + count]
                if segment.layout == "in_out":
                    out[:, column : column + count] = part
                else:
                    out[column : column + count] = part.T
        at += segment.words
