"""A look through a GGUF file's header before any library reads it: what it says must fit in the file.

The format is that of ggml's docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from typebar.isa.errors import TypebarError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""The size in bytes of each kind of value that is a number."""
_UNSIGNED = {0: "<B", 2: "<H", 4: "<I", 10: "<Q"}
_STRING, _ARRAY = 8, 9
_MOST_AXES = 4
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True)
class Header:
    """What a header says: whole numbers by their keys, and the tensors' shapes by their names."""

    numbers: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def elements(self) -> int:
        """How many elements all tensors have together."""
        return sum(prod(shape) for shape in self.shapes.values())


class _DamageError(Exception):
    pass


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def skip(self, count: int) -> None:
        if count > len(self.data) - self.at:
            raise _DamageError(f"its header goes on for {count} bytes at byte {self.at}, beyond its end")
        self.at += count

    def number(self, format: str) -> int:
        start = self.at
        self.skip(struct.calcsize(format))
        value: int = struct.unpack_from(format, self.data, start)[0]
        return value

    def text(self) -> str:
        count = self.number("<Q")
        start = self.at
        self.skip(count)
        try:
            return self.data[start : self.at].decode()
        except UnicodeDecodeError as error:
            raise _DamageError(f"the text at byte {start} is no UTF-8") from error

    def value(self) -> int | None:
        """The next value if it is a whole number without a sign; others are passed over."""
        kind = self.number("<I")
        if kind in _UNSIGNED:
            return self.number(_UNSIGNED[kind])
        if kind != _ARRAY:
            self._pass_over(kind, 1)
            return None
        self._pass_over(self.number("<I"), self.number("<Q"))
        return None

    def _pass_over(self, kind: int, count: int) -> None:
        if kind in _SCALARS:
            self.skip(_SCALARS[kind] * count)
        elif kind == _STRING:
            self.most(count, 8, "texts")
            for _ in range(count):
                self.text()
        else:
            raise _DamageError(f"it has a value of the unknown kind {kind} at byte {self.at}")

    def most(self, count: int, size: int, what: str) -> None:
        """Refuse more things of at least `size` bytes than the rest of the file holds."""
        if count > (len(self.data) - self.at) // size:
            raise _DamageError(f"it declares {count} {what}, more than it has bytes for")


def read_header(path: Path, block_sizes: Mapping[int, tuple[int, int]]) -> Header:
    """Read and check a GGUF file's header; `block_sizes` has each tensor type's (elements, bytes) of a block.

    Raises:
        TypebarError: the file cannot be read, is no GGUF file, is cut short, or its header says what cannot be.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(_Reader(data), block_sizes)
    except (OSError, ValueError, _DamageError) as error:
        raise TypebarError(f"{path} is no whole GGUF file: {error}; copy it again") from error


def _read(reader: _Reader, block_sizes: Mapping[int, tuple[int, int]]) -> Header:
    reader.skip(len(_MAGIC))
    if reader.data[: len(_MAGIC)] != _MAGIC:
        raise _DamageError("it does not start with GGUF")
    version = reader.number("<I")
    if version not in _VERSIONS:
        raise _DamageError(f"its version is {version}, and versions 2 and 3 are read")
    tensors, values = reader.number("<Q"), reader.number("<Q")
    reader.most(tensors, 24, "tensors")
    reader.most(values, 12, "values")
    header = Header()
    for _ in range(values):
        key = reader.text()
        number = reader.value()
        if number is not None:
            header.numbers[key] = number
    ends = [_tensor(reader, header, block_sizes) for _ in range(tensors)]
    alignment = header.numbers.get("general.alignment", _DEFAULT_ALIGNMENT)
    if alignment == 0 or alignment & (alignment - 1):
        raise _DamageError(f"its alignment is {alignment}, no power of two")
    start = -(-reader.at // alignment) * alignment
    if start + max(ends, default=0) > len(reader.data):
        raise _DamageError(f"it ends after {len(reader.data)} bytes, and its tensors after {start + max(ends)}")
    return header


def _tensor(reader: _Reader, header: Header, block_sizes: Mapping[int, tuple[int, int]]) -> int:
    """Read one tensor's description; returns where its data end, from the start of all data."""
    name = reader.text()
    axes = reader.number("<I")
    if axes > _MOST_AXES:
        raise _DamageError(f"its tensor {name!r} has {axes} axes")
    shape = tuple(reader.number("<Q") for _ in range(axes))
    kind, start = reader.number("<I"), reader.number("<Q")
    if name in header.shapes:
        raise _DamageError(f"it has two tensors {name!r}")
    if kind not in block_sizes:
        raise _DamageError(f"its tensor {name!r} is of the unknown type {kind}")
    elements, size = block_sizes[kind]
    if shape and shape[0] % elements:
        raise _DamageError(f"its tensor {name!r} has rows of {shape[0]}, no multiple of {elements}")
    header.shapes[name] = shape
    return start + prod(shape) // elements * size
