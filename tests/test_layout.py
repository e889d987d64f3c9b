"""Packed matrices: the formula, padding, round trips, what a fetch touches, speed at GPT-2 XL's size."""

import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from typebar.isa.errors import TypebarError
from typebar.isa.layout import element_offset, pack, packed_bytes, packed_layout, unpack
from typebar.isa.machine import Machine

TINY = Machine.load("tiny")
WIDE = TINY.override({"hbm.channels": "8", "hbm.fifo_bytes": "65536"})  # rows of 256 bytes: a real granule
MACHINES = [TINY, WIDE, Machine.load("u280")]

sizes = st.tuples(st.integers(0, 40), st.integers(0, 150))


def numbered(rows: int, columns: int, element_bytes: int) -> np.ndarray:
    """Elements that differ, and are not zero, as far as their width allows."""
    count = np.arange(1, rows * columns + 1).reshape(rows, columns)
    values = count % (2 ** (8 * element_bytes) - 1) + 1
    return np.asarray(values, f"u{element_bytes}")


def by_hand(matrix: np.ndarray, lanes: int, block: int, granule: int, full: bool) -> list[int]:
    """The stored elements, by the sentence that defines the layout."""
    rows, columns = matrix.shape
    stored = []
    for first in range(0, columns, block):
        width = min(block, columns - first)
        width = block if full else -(-width // granule) * granule
        for chunk in range(0, rows, lanes):
            for column in range(first, first + width):
                for row in range(chunk, chunk + lanes):
                    inside = row < rows and column < columns
                    stored.append(int(matrix[row, column]) if inside else 0)
    return stored


@pytest.mark.parametrize("element_bytes", [1, 2, 4])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (8, 64), (9, 65), (17, 130), (24, 3), (3, 200)])
@pytest.mark.parametrize("machine", [TINY, WIDE], ids=["tiny", "wide"])
def test_pack_is_the_definition(machine: Machine, shape: tuple[int, int], full: bool, element_bytes: int) -> None:
    matrix = numbered(*shape, element_bytes)
    granule = max(1, machine.row_bytes // (machine.matrix.lanes * element_bytes))
    expected = by_hand(matrix, machine.matrix.lanes, 64, granule, full)
    packed = pack(matrix, machine, element_bytes, full)
    assert packed.view(matrix.dtype).tolist() == expected


@given(
    shape=sizes,
    element_bytes=st.sampled_from([1, 2, 4]),
    full=st.booleans(),
    machine=st.sampled_from(MACHINES),
)
@settings(deadline=None, max_examples=60)
def test_round_trip_size_and_offsets(shape: tuple[int, int], element_bytes: int, full: bool, machine: Machine) -> None:
    matrix = numbered(*shape, element_bytes)
    packed = pack(matrix, machine, element_bytes, full)
    assert packed.size == packed_bytes(*shape, machine, element_bytes, full)
    assert np.array_equal(unpack(packed, *shape, machine, element_bytes, full), matrix)
    if matrix.size:
        k, n = np.arange(shape[0])[:, None], np.arange(shape[1])
        offsets = element_offset(k, n, *shape, machine, element_bytes, full)
        assert np.array_equal(packed.view(matrix.dtype)[offsets // element_bytes], matrix)
        assert np.count_nonzero(packed.view(matrix.dtype)) == matrix.size  # all the rest is zero


@given(shape=sizes, element_bytes=st.sampled_from([1, 2, 4]), machine=st.sampled_from(MACHINES))
@settings(deadline=None, max_examples=60)
def test_every_chunk_starts_on_a_memory_row(shape: tuple[int, int], element_bytes: int, machine: Machine) -> None:
    layout = packed_layout(*shape, machine, element_bytes)
    assert layout.block_bytes % machine.row_bytes == 0
    assert layout.last_width * layout.lanes * element_bytes % machine.row_bytes == 0
    assert layout.fetched_end() == layout.bytes
    grown = packed_layout(*shape, machine, element_bytes, full=True)
    assert grown.fetched_end() % machine.row_bytes == 0
    assert grown.fetched_end() <= grown.bytes


def test_a_full_layout_does_not_move_as_columns_grow() -> None:
    for k, n in [(0, 0), (9, 63), (4, 64)]:
        near = element_offset(k, n, 20, n + 1, TINY, 2, full=True)
        assert near == element_offset(k, n, 20, 300, TINY, 2, full=True)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: packed_bytes(-1, 3, TINY, 2), "a packed matrix cannot be -1 x 3"),
        (lambda: packed_bytes(1, 3, TINY, 3), "packed elements have 1, 2 or 4 bytes, not 3"),
        (lambda: pack(np.zeros((2, 2), np.uint16), TINY, 4), "pack needs a [K, N] matrix of 4-byte elements"),
        (lambda: pack(np.zeros(4, np.uint16), TINY, 2), "pack needs a [K, N] matrix of 2-byte elements"),
        (
            lambda: unpack(np.zeros(7, np.uint8), 8, 1, TINY, 2),
            "a packed 8 x 1 matrix has 64 bytes, not 7 of uint8",
        ),
        (lambda: element_offset(8, 0, 8, 1, TINY, 2), "element (8, 0) is outside the packed 8 x 1 matrix"),
        (lambda: element_offset(0, -1, 8, 1, TINY, 2), "element (0, -1) is outside"),
    ],
)
def test_errors_name_the_value(call, text: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(TypebarError, match=re.escape(text)):
        call()


def test_a_gpt2_xl_matrix_packs_in_well_under_a_second() -> None:
    machine = Machine.load("u280")
    matrix = np.arange(1600 * 6400, dtype=np.uint32).astype(np.uint16).reshape(1600, 6400)
    began = time.process_time()
    packed = pack(matrix, machine, 2)
    took = time.process_time() - began
    assert took < 1
    assert np.array_equal(unpack(packed, 1600, 6400, machine, 2), matrix)
