"""ONNX files: the graph, and its tensors read one at a time from the file itself or from files beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]
from onnx import TensorProto, helper, numpy_helper

from typebar.isa.errors import TypebarError

_WIDTHS: Mapping[int, str] = {
    TensorProto.FLOAT: "<f4",
    TensorProto.FLOAT16: "<f2",
    TensorProto.DOUBLE: "<f8",
    TensorProto.INT8: "i1",
    TensorProto.UINT8: "u1",
    TensorProto.INT16: "<i2",
    TensorProto.UINT16: "<u2",
    TensorProto.INT32: "<i4",
    TensorProto.UINT32: "<u4",
    TensorProto.INT64: "<i8",
    TensorProto.UINT64: "<u8",
    TensorProto.BOOL: "?",
}
"""Element types read straight from their bytes; bfloat16 is widened."""

_LONGEST_PATH = 1000


@dataclass(frozen=True)
class StoredTensor:
    """An initialiser: where its values lie; nothing is read before `load`."""

    proto: TensorProto
    place: tuple[Path, int] | None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that the file declares."""
        return tuple(self.proto.dims)

    @property
    def dtype(self) -> np.dtype:
        """The type of an element; bfloat16 counts as float32."""
        code = self.proto.data_type
        return np.dtype(_WIDTHS[code] if code != TensorProto.BFLOAT16 else "<f4")

    def load(self) -> np.ndarray:
        """The values: memory-mapped if they lie in a file of their own; raises TypebarError if they cannot be read."""
        if self.place is None:
            return _embedded(self.proto)
        path, offset = self.place
        half = self.proto.data_type == TensorProto.BFLOAT16
        kind, count = np.dtype("<u2") if half else self.dtype, math.prod(self.shape)
        if count == 0:
            return np.zeros(self.shape, self.dtype)
        try:
            stored: np.ndarray = np.memmap(path, kind, "r", offset, (count,))
        except (OSError, ValueError) as error:
            raise TypebarError(f"cannot read {path}: {error}; copy the model again") from error
        values = (stored.astype(np.uint32) << 16).view(np.float32) if half else stored
        return values.reshape(self.shape)


@dataclass(frozen=True)
class OnnxFile:
    """A model as its file has it; `tensors` are the initialisers of its graph and of all graphs within."""

    path: Path
    model: onnx.ModelProto
    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)


def read_file(path: Path) -> OnnxFile:
    """Read a model; raises TypebarError for what is no ONNX model or names data that are not there.

    External data must lie in the model's own folder: absolute paths, `..` and links that lead elsewhere are refused.
    """
    try:
        model = onnx.load_model(path, format="protobuf", load_external_data=False)
    except (DecodeError, OSError, ValueError, RuntimeError) as error:
        raise TypebarError(f"cannot read {path} as ONNX: {_line(error)}; export the model again") from error
    _check_text(model, path)
    if not model.graph.node and not model.graph.output:
        raise TypebarError(f"{path} holds no ONNX graph; export the model again")
    return OnnxFile(path, model, {})


def _check_text(message: Any, path: Path) -> None:
    """Refuse text that is not UTF-8, which arrives as bytes."""
    stack = [message]
    while stack:
        top = stack.pop()
        if isinstance(top, TensorProto):  # its other fields are values, perhaps many
            texts: list[Any] = [top.name]
            stack.extend(top.external_data)
        else:
            texts = []
            for field, value in top.ListFields():
                values = [value] if isinstance(value, str | bytes | Message) else value
                if field.type == field.TYPE_STRING:
                    texts.extend(values)
                elif field.type == field.TYPE_MESSAGE:
                    stack.extend(values)
        if any(not isinstance(text, str) for text in texts):
            raise TypebarError(f"{path} holds a name that is no text; export the model again")


def stored_tensor(tensor: TensorProto, folder: Path) -> StoredTensor:
    """An initialiser, its declared size checked against the data; raises TypebarError with what is wrong."""
    name = tensor.name
    if tensor.data_type not in _WIDTHS and tensor.data_type != TensorProto.BFLOAT16:
        raise TypebarError(f"initialiser {name!r} has elements of type {_type_name(tensor.data_type)}; use float32")
    if any(d < 0 for d in tensor.dims) or math.prod(tensor.dims) > 1 << 40:
        raise TypebarError(f"initialiser {name!r} declares the shape {list(tensor.dims)}; export the model again")
    width = 2 if tensor.data_type == TensorProto.BFLOAT16 else np.dtype(_WIDTHS[tensor.data_type]).itemsize
    needed = math.prod(tensor.dims) * width
    if tensor.data_location != TensorProto.EXTERNAL:
        _check_embedded(tensor, needed)
        return StoredTensor(tensor, None)
    entries = {e.key: e.value for e in tensor.external_data}
    path = _inside(folder, entries.get("location", ""), name)
    offset, length = (_whole(entries.get(key), key, name) for key in ("offset", "length"))
    if length is not None and length != needed:
        raise TypebarError(f"initialiser {name!r} has {length} bytes of data for {list(tensor.dims)}; export it again")
    start, size = offset or 0, path.stat().st_size
    if start > size or needed > size - start:
        raise TypebarError(
            f"initialiser {name!r} needs bytes {start} to {start + needed} of {path.name}, which has {size}; "
            "copy the model again with its data"
        )
    return StoredTensor(tensor, (path, start))


def _inside(folder: Path, location: str, name: str) -> Path:
    """The file that an external tensor names, which must lie in the model's folder or below."""
    windows, posix = PureWindowsPath(location), PurePosixPath(location)
    parts = windows.parts
    if not location or len(location) > _LONGEST_PATH or "\0" in location:
        raise TypebarError(f"initialiser {name!r} names no file for its data; export the model again")
    outside = f"initialiser {name!r} has its data in {location!r}, outside the model's folder; put it beside the model"
    if posix.is_absolute() or windows.drive or windows.root or ".." in parts:
        raise TypebarError(outside)
    root = folder.resolve()
    try:
        path = (root / posix).resolve()
        regular = path.is_file()
    except (OSError, RuntimeError, ValueError) as error:
        raise TypebarError(f"initialiser {name!r} has its data in {location!r}, which cannot be read") from error
    if not path.is_relative_to(root):
        raise TypebarError(outside)
    if not regular:
        raise TypebarError(f"initialiser {name!r} has its data in {location!r}, which is not there; copy it too")
    return path


def _whole(text: str | None, key: str, name: str) -> int | None:
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise TypebarError(f"initialiser {name!r} has the {key} {text[:30]!r} in its data; it must be a whole number")
    return int(text)


def _check_embedded(tensor: TensorProto, needed: int) -> None:
    found = len(tensor.raw_data) if tensor.HasField("raw_data") else None
    if found is None:
        field_name = helper.tensor_dtype_to_field(tensor.data_type)
        if len(getattr(tensor, field_name)) != math.prod(tensor.dims):
            raise TypebarError(f"initialiser {tensor.name!r} has too many or too few values for {list(tensor.dims)}")
    elif found != needed:
        raise TypebarError(f"initialiser {tensor.name!r} has {found} bytes for {list(tensor.dims)}, not {needed}")


def _embedded(tensor: TensorProto) -> np.ndarray:
    if tensor.HasField("raw_data") and tensor.data_type in _WIDTHS:
        values = np.frombuffer(tensor.raw_data, _WIDTHS[tensor.data_type])
    else:
        try:
            values = np.asarray(numpy_helper.to_array(tensor))
        except (ValueError, TypeError, OverflowError) as error:
            raise TypebarError(f"initialiser {tensor.name!r} cannot be read: {_line(error)}") from error
        if tensor.data_type == TensorProto.BFLOAT16:
            values = values.astype(np.float32)
    return values.reshape(tuple(tensor.dims))


def attribute_tensor(tensor: TensorProto, folder: Path) -> np.ndarray:
    """The values of a tensor in an attribute."""
    return stored_tensor(tensor, folder).load()


def _type_name(code: int) -> str:
    try:
        return str(TensorProto.DataType.Name(code)).lower()
    except ValueError:
        return f"number {code}"


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
