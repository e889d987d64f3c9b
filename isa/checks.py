"""The operand checks of every instruction, as integer rules: what traps, with which code, in which order.

A device checks an instruction's operands when it issues, in program order; on a trap every older instruction
finishes, the trapping one and all younger ones have no effect, and the control block holds code and index.

Rules of every method below:

* Operand values are 32-bit signed integers; sums and products of them are exact (no wrap-around).
* The first rule that fails, in the order of the code, names the trap: counts (COUNT), then register operands in the
  order of the fields, each its bounds (REGISTER_BOUNDS) before its alignment (MISALIGNED), then strides (MISALIGNED),
  then the region's kind (REGION_ACCESS), the address's alignment (MISALIGNED) and its bounds (REGION_BOUNDS), last
  the overlap of results and operands (OVERLAP, below).
* A register operand of w words at address a: nothing is checked if w = 0; otherwise 0 <= a and
  a + w <= vector.words; and a must be a multiple of vector.align if w > 1. Only operands that are *words* by nature
  may lie anywhere: one-word operands and results. The pair that vargmax writes starts at an even word.
* A result and an operand that an instruction reads bit by bit while it writes must be the same words or apart, where
  a method says *in place*; where it says *apart*, only that. Nothing is checked if no word is written. Operands of one
  word are read first and may lie inside the result, except a matmul's.
* Operands of steps that are switched off are not looked at.
* Before any operand, the instruction's own index must be below the program's length (PROGRAM_END: a branch outside
  the program traps at its target, not at the branch), then its word must decode (ILLEGAL).
* A region that is not bound has length 0. An access of no bytes is inside every region.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from typebar.isa.instructions import (
    FORMAT_BYTES,
    HBM_REGIONS,
    WRITABLE_REGIONS,
    Factor,
    Format,
    Operation,
    Patch,
    Reduction,
    Region,
    Scale,
    Source,
    Trap,
)
from typebar.isa.layout import packed_layout
from typebar.isa.machine import LINE_BYTES, Machine

MAX_DOT_LENGTH = 65536
"""The largest k of one matmul."""
SCALAR_BYTES = 4
"""Bytes that sload and sstore move."""

_SIZES = tuple(FORMAT_BYTES[item] for item in Format)
_IN_HBM = tuple(item in HBM_REGIONS for item in Region)
_WRITABLE = tuple(item in WRITABLE_REGIONS for item in Region)


def _meet(first: int, words: int, other: int, other_words: int) -> bool:
    """Whether two ranges of words have one in common."""
    return first < other + other_words and other < first + words and words > 0 and other_words > 0


def _rows_apart(n: int, outer: int, outer_stride: int, inner: int, inner_stride: int) -> bool:
    """Whether `outer` x `inner` rows of n words, in either nesting, have no word in common."""
    inner_row, outer_row = (inner - 1) * inner_stride + n, (outer - 1) * outer_stride + n
    inner_inside = (inner == 1 or inner_stride >= n) and (outer == 1 or outer_stride >= inner_row)
    outer_inside = (outer == 1 or outer_stride >= n) and (inner == 1 or inner_stride >= outer_row)
    return inner_inside or outer_inside


class Checker:
    """The checks of one device: a machine's limits and the lengths in bytes of its bound regions, by number.

    Every method takes an instruction's operand values under the names of its fields and returns the trap,
    `Trap.NONE` if the instruction may run.
    """

    __slots__ = (
        "_align_mask",
        "_buffer_words",
        "_chains",
        "_fetched_end",
        "_region_bytes",
        "_row_lines",
        "_vectors",
        "_words",
    )

    def __init__(self, machine: Machine, region_bytes: Sequence[int]) -> None:
        """Take the limits; `region_bytes` has one length for each `Region`, 0 where none is bound."""
        self._region_bytes = tuple(region_bytes)
        self._words = machine.vector.words
        self._align_mask = machine.vector.align - 1
        self._chains = machine.vector.chains
        self._vectors = machine.matrix.vectors
        self._buffer_words = machine.ring.buffer_words
        self._row_lines = machine.row_lines

        def fetched_end(k: int, n: int, size: int, full: int) -> int:
            return packed_layout(k, n, machine, size, bool(full)).fetched_end()

        self._fetched_end = lru_cache(maxsize=8192)(fetched_end)

    # Building blocks -----------------------------------------------------------------------------------
    def word(self, address: int, words: int = 1) -> Trap:
        """A register operand that may lie anywhere: bounds only (vread, vwrite)."""
        if words > 0 and (address < 0 or address + words > self._words):
            return Trap.REGISTER_BOUNDS
        return Trap.NONE

    def _vector(self, address: int, words: int) -> Trap:
        if words > 0:
            if address < 0 or address + words > self._words:
                return Trap.REGISTER_BOUNDS
            if words > 1 and address & self._align_mask:
                return Trap.MISALIGNED
        return Trap.NONE

    def _memory(self, region: int, address: int, last: int, size: int) -> Trap:
        """`size`-byte elements from byte address `address` to the one at `last`; below `address`: none."""
        if address % size:
            return Trap.MISALIGNED
        if last >= address and (address < 0 or last + size > self._region_bytes[region]):
            return Trap.REGION_BOUNDS
        return Trap.NONE

    @staticmethod
    def _in_place(dst: int, source: int, n: int) -> Trap:
        """A result and a source of n words each: the same words or apart."""
        return Trap.OVERLAP if dst != source and _meet(dst, n, source, n) else Trap.NONE

    # Vector --------------------------------------------------------------------------------------------
    def binary(self, one_word: bool, immediate: bool, dst: int, a: int, b: int, n: int) -> Trap:
        """vadd, vsub, vmul, vmax: 0 <= n <= vector.words; dst, a (n words); b (n words, one word or none). In place
        with a, and with b if it is a vector.
        """
        if not 0 <= n <= self._words:
            return Trap.COUNT
        trap = self._vector(dst, n) or self._vector(a, n)
        if not trap and not immediate:
            trap = self._vector(b, min(n, 1) if one_word else n)
        if trap or one_word or immediate:
            return trap or self._in_place(dst, a, n)
        return self._in_place(dst, a, n) or self._in_place(dst, b, n)

    def move(self, one_word: bool, immediate: bool, dst: int, b: int, n: int) -> Trap:
        """vmov: as vadd, without a."""
        if not 0 <= n <= self._words:
            return Trap.COUNT
        trap = self._vector(dst, n)
        if trap or immediate:
            return trap
        if one_word:
            return self._vector(b, min(n, 1))
        return self._vector(b, n) or self._in_place(dst, b, n)

    def unary(self, dst: int, a: int, n: int) -> Trap:
        """vunary: 0 <= n <= vector.words; dst, a (n words), in place."""
        if not 0 <= n <= self._words:
            return Trap.COUNT
        return self._vector(dst, n) or self._vector(a, n) or self._in_place(dst, a, n)

    def reduce(self, dst: int, a: int, n: int, results: int = 1) -> Trap:
        """vsum, vsumsq, vrmax (one result), vargmax (two): 0 <= n <= vector.words; dst (one word anywhere, two at an
        even address); a (n words).
        """
        if not 0 <= n <= self._words:
            return Trap.COUNT
        trap = self.word(dst, results)
        if not trap and dst % results:
            trap = Trap.MISALIGNED
        return trap or self._vector(a, n)

    def chain(
        self, b_from: int, scale_from: int, operation: int, write: int, reduce: int, operands: Sequence[int]
    ) -> Trap:
        """vchain; `operands` are the operand values in the order of the fields. First, ILLEGAL without vector.chains.

        0 <= n <= vector.words; dst (n words, if it writes); a (n words); b as vadd's, if there is an operation; scale
        (one word, none if n is 0), if it is from a word; result (one word anywhere), if it reduces. If it writes, in
        place with a, and with b if that is a vector; the result may lie anywhere, for it is written last.
        """
        if not self._chains:
            return Trap.ILLEGAL
        dst, a, b, n, scale, result = operands
        if not 0 <= n <= self._words:
            return Trap.COUNT
        from_vector = operation != Operation.NONE and b_from == Source.VECTOR
        from_word = operation != Operation.NONE and b_from == Source.WORD
        written = n if write else 0
        trap = (
            self._vector(dst, written)
            or self._vector(a, n)
            or self._vector(b, n if from_vector else min(n, 1) if from_word else 0)
            or self._vector(scale, min(n, 1) if scale_from == Factor.WORD else 0)
            or self.word(result, int(reduce != Reduction.NONE))
        )
        if trap or not write:
            return trap
        return self._in_place(dst, a, n) or (self._in_place(dst, b, n) if from_vector else Trap.NONE)

    # Memory --------------------------------------------------------------------------------------------
    def load(self, format: int, region: int, dst: int, line: int, byte: int, n: int) -> Trap:
        """load: 0 <= n <= vector.words; dst (n words); a DDR region; 64*line + byte a multiple of the element's
        size, all n elements inside the region.
        """
        if not 0 <= n <= self._words:
            return Trap.COUNT
        trap = self._vector(dst, n)
        if trap:
            return trap
        if _IN_HBM[region]:
            return Trap.REGION_ACCESS
        size, address = _SIZES[format], LINE_BYTES * line + byte
        return self._memory(region, address, address + (n - 1) * size, size)

    def store(
        self,
        format: int,
        region: int,
        a: int,
        line: int,
        byte: int,
        outer: int,
        inner: int,
        outer_bytes: int,
        inner_bytes: int,
    ) -> Trap:
        """store: outer, inner and outer x inner in 0 .. vector.words, both strides >= 0 (COUNT); a (outer x inner
        words); both strides multiples of the element's size; a writable region; the first address a multiple of
        the element's size, all elements inside the region.
        """
        count = outer * inner
        if outer < 0 or inner < 0 or max(outer, inner, count) > self._words:
            return Trap.COUNT
        if outer_bytes < 0 or inner_bytes < 0:
            return Trap.COUNT
        trap = self._vector(a, count)
        if trap:
            return trap
        size, address = _SIZES[format], LINE_BYTES * line + byte
        if outer_bytes % size or inner_bytes % size:
            return Trap.MISALIGNED
        if not _WRITABLE[region]:
            return Trap.REGION_ACCESS
        last = address + (outer - 1) * outer_bytes + (inner - 1) * inner_bytes if count else address - 1
        return self._memory(region, address, last, size)

    def scalar(self, region: int, line: int, byte: int, write: bool) -> Trap:
        """sload, sstore: a DDR region, for sstore a writable one; 64*line + byte a multiple of 4, four bytes inside."""
        if _IN_HBM[region] or (write and not _WRITABLE[region]):
            return Trap.REGION_ACCESS
        address = LINE_BYTES * line + byte
        return self._memory(region, address, address, SCALAR_BYTES)

    # Matrix --------------------------------------------------------------------------------------------
    def matmul(
        self,
        format: int,
        region: int,
        full: int,
        patch: int,
        scaling: int,
        add_bias: int,
        row_max: int,
        operands: Sequence[int],
    ) -> Trap:
        """matmul; `operands` are the operand values in the order of the fields.

        Counts: 1 <= k <= 65536; r = outer x inner <= matrix.vectors; n, outer, inner and the four strides in
        0 .. vector.words; patch_at >= 0 if there is a patch.
        Registers: src, from the first of r rows' first word to the last row's last (k words a row; none if r is 0);
        dst likewise (n words a row); scale (n words or one); bias (n words); maximum (r words); patch_src (k words for
        a column, n for a lane). The four strides must be multiples of vector.align.
        Region: an HBM region; line a multiple of a memory row's lines; every memory row that the fetch touches lies
        inside (no row is fetched if n or r is 0).
        Overlap: the range that dst covers apart from those of src, scale, bias, patch_src and maximum; its rows apart
        from one another: those of one outer count inside one outer stride, or the other way round.
        """
        (dst, src, k, n, line, outer, inner, src_outer, src_inner, dst_outer, dst_inner,
         scale, bias, _lo, _hi, maximum, patch_src, patch_at) = operands  # fmt: skip
        rows, words, mask = outer * inner, self._words, self._align_mask
        strides = (src_outer, src_inner, dst_outer, dst_inner)
        if min(n, outer, inner, *strides) < 0 or not 0 < k <= MAX_DOT_LENGTH or rows > self._vectors:
            return Trap.COUNT
        if max(n, outer, inner, *strides) > words or (patch != Patch.NONE and patch_at < 0):
            return Trap.COUNT
        trap = (
            self._rows(dst, n, rows, (outer - 1) * dst_outer + (inner - 1) * dst_inner)
            or self._rows(src, k, rows, (outer - 1) * src_outer + (inner - 1) * src_inner)
            or (scaling != Scale.NONE and self._vector(scale, n if scaling == Scale.COLUMN else min(n, 1)))
            or (add_bias and self._vector(bias, n))
            or (row_max and self._vector(maximum, rows))
            or (patch != Patch.NONE and self._vector(patch_src, k if patch == Patch.COLUMN else n))
        )
        if trap:
            return Trap(trap)
        if (src_outer | src_inner | dst_outer | dst_inner) & mask:
            return Trap.MISALIGNED
        if not _IN_HBM[region]:
            return Trap.REGION_ACCESS
        if line % self._row_lines:
            return Trap.MISALIGNED
        if not n or not rows:
            return Trap.NONE
        end = self._fetched_end(k, n, _SIZES[format], full)
        if line < 0 or LINE_BYTES * line + end > self._region_bytes[region]:
            return Trap.REGION_BOUNDS
        sources = [(src, (outer - 1) * src_outer + (inner - 1) * src_inner + k)]
        if scaling != Scale.NONE:
            sources.append((scale, n if scaling == Scale.COLUMN else 1))
        if add_bias:
            sources.append((bias, n))
        if row_max:
            sources.append((maximum, rows))
        if patch != Patch.NONE:
            sources.append((patch_src, k if patch == Patch.COLUMN else n))
        covered = (outer - 1) * dst_outer + (inner - 1) * dst_inner + n
        if any(_meet(dst, covered, *source) for source in sources):
            return Trap.OVERLAP
        return Trap.NONE if _rows_apart(n, outer, dst_outer, inner, dst_inner) else Trap.OVERLAP

    def _rows(self, base: int, length: int, rows: int, last: int) -> Trap:
        """Rows of `length` words from `base`, the last one `last` words further on."""
        if rows == 0 or length == 0:
            return Trap.NONE
        if base < 0 or base + last + length > self._words:
            return Trap.REGISTER_BOUNDS
        if length > 1 and base & self._align_mask:
            return Trap.MISALIGNED
        return Trap.NONE

    # Ring ----------------------------------------------------------------------------------------------
    def gather(self, dst: int, a: int, n: int, devices: int) -> Trap:
        """gather: 0 <= n <= ring.buffer_words; dst (devices x n words); a (n words); n a multiple of vector.align; dst
        apart from a.

        When all devices have reached their next ring instruction, or halted, it must be the same instruction with
        the same n on all of them: otherwise RING_MISMATCH, on the first device that differs from device 0.
        """
        if not 0 <= n <= self._buffer_words:
            return Trap.COUNT
        trap = self._vector(dst, n * devices) or self._vector(a, n)
        if trap:
            return trap
        if n & self._align_mask:
            return Trap.MISALIGNED
        return Trap.OVERLAP if _meet(dst, n * devices, a, n) else Trap.NONE
