"""Fast numerics for the functional simulator: NumPy in, NumPy out, bit for bit the golden model's results.

Vectors are C-contiguous float32 arrays. Matrices stay in device memory, packed as `typebar.isa.layout` says, and
are read in place. Flags are `typebar.isa.numerics.NumericFlag` bits, returned as plain integers.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numba import config
from numpy.typing import NDArray

from typebar.isa.errors import TypebarError
from typebar.isa.instructions import Format, Patch
from typebar.isa.numerics.formats import LEAST_EXPONENT
from typebar.sim import kernels_matmul
from typebar.sim.kernels_simd import GROUP
from typebar.sim.kernels_vector import (
    add,
    argmax,
    decode,
    encode,
    load,
    maximum,
    mul,
    reduce_max,
    store,
    sub,
    sum_squares,
    tree_sum,
    unary,
)

F32Array = NDArray[np.float32]
Bytes = NDArray[np.uint8]

__all__ = [
    "add",
    "argmax",
    "decode",
    "encode",
    "load",
    "matmul",
    "maximum",
    "mul",
    "reduce_max",
    "set_threads",
    "store",
    "sub",
    "sum_squares",
    "threads",
    "tree_sum",
    "unary",
]

_ELEMENT = {Format.FP16: np.uint16, Format.BF16: np.int16, Format.INT8: np.int8, Format.FP32: np.float32}
"""Element types as the kernels tell formats apart."""
_EXPONENT_BIAS = 127
_PRODUCTS_PER_THREAD = 1 << 19
"""A thread is worth waking for this many products (about 200 microseconds)."""


class _Pool:
    """The kernels' threads: the caller is one of them, the others wait in an executor."""

    def __init__(self) -> None:
        self.count = min(int(config.NUMBA_NUM_THREADS), os.cpu_count() or 1)
        self._executor: ThreadPoolExecutor | None = None
        self._workers = 0

    def executor(self) -> ThreadPoolExecutor:
        """An executor with a worker for every thread but the caller."""
        if self._executor is None or self._workers < self.count - 1:
            if self._executor is not None:
                self._executor.shutdown(wait=False)
            self._workers = self.count - 1
            self._executor = ThreadPoolExecutor(self._workers, thread_name_prefix="typebar-kernel")
        return self._executor

    def forget(self) -> None:
        """Drop the executor, whose threads do not exist in a forked child."""
        self._executor = None


_pool = _Pool()
os.register_at_fork(after_in_child=_pool.forget)


def set_threads(count: int) -> None:
    """Let one `matmul` use this many threads. Raises `TypebarError` below 1. Results do not depend on it."""
    if count < 1:
        raise TypebarError(f"threads = {count} must be at least 1")
    _pool.count = count


def threads() -> int:
    """Threads one `matmul` may use; at first Numba's, which NUMBA_NUM_THREADS sets."""
    return _pool.count


def _elements(memory: Bytes, byte_offset: int, fmt: Format, count: int) -> NDArray[Any]:
    """A read-only view of `count` elements in memory."""
    end = byte_offset + count * np.dtype(_ELEMENT[fmt]).itemsize
    if byte_offset < 0 or end > memory.size:
        raise TypebarError(
            f"the matrix's bytes {byte_offset} to {end} lie outside the {memory.size} bytes of its memory region"
        )
    view = memory[byte_offset:end].view(_ELEMENT[fmt])
    view.flags.writeable = False
    return view


def _last_width(n: int, width: int, granule: int, full: bool) -> int:
    """Columns at which the last block is stored, as `PackedLayout.last_width` has it."""
    if full or n == 0:
        return width
    left = n - (n - 1) // width * width
    return -(-left // granule) * granule


def matmul(
    memory: Bytes,
    byte_offset: int,
    fmt: Format,
    x: F32Array,
    k: int,
    n: int,
    lanes: int,
    width: int,
    *,
    granule: int = 1,
    full: bool = False,
    acc: F32Array | None = None,
    patch_kind: Patch = Patch.NONE,
    patch_at: int = 0,
    patch: F32Array | None = None,
) -> tuple[F32Array, int]:
    """Dot products of m vectors with the columns of a packed matrix.

    Args:
        memory: the memory region, uint8, one dimension; only elements below k and n are read.
        byte_offset: where the packed k x n matrix starts.
        fmt: format of its elements.
        x: float32 [m, at least k], register values; they are converted to operands here.
        k, n: rows and columns of the matrix.
        lanes, width, granule, full: the packed layout (`width` is the column block).
        acc: float32 [m, n] to start from, instead of +0.
        patch_kind, patch_at, patch: a column (`patch` has k values) or a lane of every column (n values) that
            comes from registers, rounded to `fmt` first; an index beyond the matrix patches nothing.

    Returns:
        float32 [m, n] and flags.

    Raises:
        TypebarError: the matrix does not lie inside `memory`, or a size does not fit.
    """
    m = x.shape[0]
    if x.ndim != 2 or x.shape[1] < k or not 1 <= lanes <= 128 or width < 1:
        raise TypebarError(
            f"matmul needs x [m, >= {k}], 1 <= lanes <= 128 and width >= 1, not {x.shape}, {lanes} and {width}"
        )
    if acc is not None and acc.shape != (m, n):
        raise TypebarError(f"acc must have shape {(m, n)}, not {acc.shape}")
    out = np.zeros((m, n), np.float32)
    if acc is not None:
        kernels_matmul.start_accumulators(np.ascontiguousarray(acc, np.float32), out)
    if m == 0 or n == 0 or k <= 0:
        return out, 0
    rows = -(-k // lanes) * lanes
    last_width = _last_width(n, width, granule, full)
    # Of the last block only the columns below n need to exist in memory.
    start = (n - 1) // width * width
    end = start * rows + (rows - lanes) * last_width + (n - start) * lanes
    stored = _elements(memory, byte_offset, fmt, end)
    kind = Patch(patch_kind)
    raw_patch, flags = _raw_patch(fmt, kind, patch, k, n)
    shape = (m, rows // lanes)
    padded = -(-lanes // GROUP) * GROUP
    aligned, present = np.zeros(m * shape[1] * padded), np.zeros(m * shape[1] * padded, np.int32)
    units, (gaps, nans) = np.zeros(shape), np.zeros((2, *shape), np.bool_)
    vectors = np.ascontiguousarray(x, np.float32)
    least = _EXPONENT_BIAS + LEAST_EXPONENT[fmt]
    flags |= kernels_matmul.convert_vectors(vectors, k, lanes, padded, aligned, present, units, gaps, nans)

    def columns(first: int, last: int) -> int:
        raised = kernels_matmul.matmul_columns(
            stored, aligned, present, units, gaps, nans, k, lanes, padded, width, n, last_width,
            int(kind), patch_at, raw_patch, first, last, least, out,
        )  # fmt: skip
        return int(raised)

    parts = min(_pool.count, n, m * n * k // _PRODUCTS_PER_THREAD + 1)
    if parts == 1:
        return out, flags | columns(0, n)
    bounds = [n * i // parts for i in range(parts + 1)]
    futures = [_pool.executor().submit(columns, bounds[i], bounds[i + 1]) for i in range(1, parts)]
    flags |= columns(0, bounds[1])
    for future in futures:
        flags |= future.result()
    return out, flags


def _raw_patch(fmt: Format, kind: Patch, patch: F32Array | None, k: int, n: int) -> tuple[NDArray[Any], int]:
    """The patch as read-only raw elements of the format, and the flags of rounding it."""
    raw, flags = np.zeros(0, _ELEMENT[fmt]), 0
    if kind is not Patch.NONE:
        length = k if kind is Patch.COLUMN else n
        if patch is None or patch.shape != (length,):
            raise TypebarError(f"a {kind.name} patch of a {k} x {n} matrix needs {length} values")
        stored, flags = encode(patch, fmt)
        raw = stored.view(_ELEMENT[fmt])
    raw.flags.writeable = False
    return raw, flags
