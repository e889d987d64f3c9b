"""Packed matrices: the order in which elements of a matrix lie in HBM, so that fetching is one ascending stream.

A matrix of `rows` (K, the length of a dot product) by `columns` (N) is stored

    for each column block b of `column_block` columns         (the last one may be narrower)
        for each chunk c of `lanes` rows
            for each column j of the block
                `lanes` consecutive elements: rows c*lanes .. c*lanes + lanes - 1 of column b*column_block + j

so element (k, n) lies, counted in elements, at

    b * padded_rows * column_block  +  c * block_width(b) * lanes  +  j * lanes  +  l
    with b, j = divmod(n, column_block) and c, l = divmod(k, lanes)

Rows are padded to whole chunks. The last block is stored at its columns rounded up to the machine's column granule,
so that every chunk starts on a memory row; or at the full block width (`full`: a cache that grows by columns).
Padding is zero in weights; nothing reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from typebar.isa.errors import TypebarError
from typebar.isa.machine import Machine


@dataclass(frozen=True)
class PackedLayout:
    """Where the elements of one packed matrix lie; build it with `packed_layout`.

    `rows` (K) and `columns` (N) are the matrix's own; `lanes`, `column_block` and `granule` the machine's.
    """

    rows: int
    columns: int
    element_bytes: int
    lanes: int
    column_block: int
    granule: int
    full: bool

    @property
    def chunks(self) -> int:
        """Chunks of `lanes` rows in every column block."""
        return -(-self.rows // self.lanes)

    @property
    def blocks(self) -> int:
        """Column blocks."""
        return -(-self.columns // self.column_block)

    @property
    def last_width(self) -> int:
        """Columns at which the last column block is stored (0 for a matrix without columns)."""
        if self.full or self.columns == 0:
            return min(self.blocks, 1) * self.column_block
        left = self.columns - (self.blocks - 1) * self.column_block
        return -(-left // self.granule) * self.granule

    @property
    def block_bytes(self) -> int:
        """Bytes from one column block to the next."""
        return self.chunks * self.lanes * self.column_block * self.element_bytes

    @property
    def bytes(self) -> int:
        """Bytes of the stored matrix, padding included."""
        if self.blocks == 0:
            return 0
        last = self.chunks * self.lanes * self.last_width * self.element_bytes
        return (self.blocks - 1) * self.block_bytes + last

    def chunk_bytes(self, block: Any) -> Any:
        """Bytes from one chunk to the next in a column block (an integer or an array of them)."""
        width = np.where(np.asarray(block) == self.blocks - 1, self.last_width, self.column_block)
        return width * (self.lanes * self.element_bytes)

    def offset(self, k: Any, n: Any) -> NDArray[np.int64]:
        """Byte offset of element (k, n) from the matrix's address; integers or arrays that broadcast.

        Raises:
            TypebarError: an index outside the matrix.
        """
        k, n = np.asarray(k, np.int64), np.asarray(n, np.int64)
        if np.any((k < 0) | (k >= self.rows)) or np.any((n < 0) | (n >= self.columns)):
            raise TypebarError(f"element ({k}, {n}) is outside the packed {self.rows} x {self.columns} matrix")
        block, j = np.divmod(n, self.column_block)
        chunk, lane = np.divmod(k, self.lanes)
        inside = (j * self.lanes + lane) * self.element_bytes
        return np.asarray(block * self.block_bytes + chunk * self.chunk_bytes(block) + inside, np.int64)

    def fetched_end(self) -> int:
        """Bytes from the matrix's address to the end of the last memory row that a fetch of it touches.

        Of each chunk only the columns below `columns` are fetched, in whole memory rows; the last chunk of the
        last block lies furthest.
        """
        if self.blocks == 0 or self.chunks == 0:
            return 0
        used = self.columns - (self.blocks - 1) * self.column_block
        used = -(-used // self.granule) * self.granule
        lane_bytes = self.lanes * self.element_bytes
        last_chunk = (self.blocks - 1) * self.block_bytes + (self.chunks - 1) * self.last_width * lane_bytes
        return last_chunk + used * lane_bytes


def packed_layout(rows: int, columns: int, machine: Machine, element_bytes: int, full: bool = False) -> PackedLayout:
    """The layout of a `rows` x `columns` matrix of elements of `element_bytes` on a machine.

    Raises:
        TypebarError: a negative size, or an element size other than 1, 2 or 4 bytes.
    """
    if rows < 0 or columns < 0:
        raise TypebarError(f"a packed matrix cannot be {rows} x {columns}: sizes must not be negative")
    if element_bytes not in (1, 2, 4):
        raise TypebarError(f"packed elements have 1, 2 or 4 bytes, not {element_bytes}")
    granule = machine.column_granule(element_bytes)
    return PackedLayout(rows, columns, element_bytes, machine.matrix.lanes, machine.column_block, granule, full)


def packed_bytes(rows: int, columns: int, machine: Machine, element_bytes: int, full: bool = False) -> int:
    """Bytes of a packed `rows` x `columns` matrix, padding included (raises as `packed_layout` does)."""
    return packed_layout(rows, columns, machine, element_bytes, full).bytes


def element_offset(
    k: Any,
    n: Any,
    rows: int,
    columns: int,
    machine: Machine,
    element_bytes: int,
    full: bool = False,
) -> NDArray[np.int64]:
    """Byte offset of element (k, n) of a packed matrix from its address; k and n broadcast.

    Raises:
        TypebarError: an index outside the matrix, or as `packed_layout` does.
    """
    return packed_layout(rows, columns, machine, element_bytes, full).offset(k, n)


def pack(matrix: NDArray[Any], machine: Machine, element_bytes: int, full: bool = False) -> NDArray[np.uint8]:
    """Bytes of a matrix [K, N] of raw elements (any dtype of `element_bytes`), packed, padding zero.

    Raises:
        TypebarError: not a matrix, or its elements have another size.
    """
    if matrix.ndim != 2 or matrix.dtype.itemsize != element_bytes:
        raise TypebarError(
            f"pack needs a [K, N] matrix of {element_bytes}-byte elements, not {matrix.dtype} {matrix.shape}"
        )
    rows, columns = matrix.shape
    layout = packed_layout(rows, columns, machine, element_bytes, full)
    out = np.zeros(layout.bytes, np.uint8)
    for stored, source in _pieces(out.view(matrix.dtype), matrix, layout):
        stored[...] = source
    return out


def unpack(
    data: NDArray[np.uint8],
    rows: int,
    columns: int,
    machine: Machine,
    element_bytes: int,
    full: bool = False,
) -> NDArray[Any]:
    """The raw elements [rows, columns], unsigned integers of `element_bytes`, of packed bytes.

    Raises:
        TypebarError: fewer or more bytes than the packed matrix has.
    """
    layout = packed_layout(rows, columns, machine, element_bytes, full)
    if data.dtype != np.uint8 or data.ndim != 1 or data.size != layout.bytes:
        raise TypebarError(
            f"a packed {rows} x {columns} matrix has {layout.bytes} bytes, not {data.size} of {data.dtype}"
        )
    matrix = np.empty((rows, columns), np.dtype(f"u{element_bytes}"))
    for stored, target in _pieces(data.view(matrix.dtype), matrix, layout):
        target[...] = stored
    return matrix


def _pieces(
    stored: NDArray[Any], matrix: NDArray[Any], layout: PackedLayout
) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """Pairs of equal-shaped views, [blocks, chunks, columns, lanes], that together cover the matrix."""
    lanes, block = layout.lanes, layout.column_block
    if layout.blocks == 0 or layout.chunks == 0:
        return []
    ahead = layout.blocks - 1
    split = ahead * layout.chunks * block * lanes
    parts = [
        (stored[:split].reshape(ahead, layout.chunks, block, lanes), matrix[:, : ahead * block]),
        (stored[split:].reshape(1, layout.chunks, layout.last_width, lanes), matrix[:, ahead * block :]),
    ]
    whole = layout.rows // lanes
    pieces: list[tuple[NDArray[Any], NDArray[Any]]] = []
    for memory, source in parts:
        count = memory.shape[0]
        if count == 0:
            continue
        width = source.shape[1] // count
        body = source[: whole * lanes].reshape(whole, lanes, count, width).transpose(2, 0, 3, 1)
        pieces.append((memory[:, :whole, :width], body))
        if whole < layout.chunks:
            tail = source[whole * lanes :].reshape(-1, count, width).transpose(1, 2, 0)
            pieces.append((memory[:, whole, :width, : tail.shape[2]], tail))
    return pieces
