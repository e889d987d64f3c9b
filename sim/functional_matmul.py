"""The functional simulator's matrix instruction: operands, the matrix kernel, and the epilogue step by step.

All rows are computed from the registers as they were; then the results are written, and the row maxima. The checks
keep operands and results apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from typebar.isa.instructions import FORMAT_BYTES, Activation, Format, Function, Patch, Scale
from typebar.isa.machine import LINE_BYTES, Machine
from typebar.isa.program import Op
from typebar.sim import kernels
from typebar.sim.functional_ops import Step, modifier, operand_pairs
from typebar.sim.functional_state import DeviceState, strided

MASKED_BITS = 0xFF7FFFFF
"""What a masked score becomes: the most negative finite float32."""

_MASKED = np.array(MASKED_BITS, np.uint32).view(np.float32)
_WORD_BYTES = 4
_SIGN = 1 << 31
_MASK = (1 << 32) - 1


@dataclass(frozen=True)
class _Modifiers:
    """The fields of a matmul that are no operands."""

    element: Format
    region: int
    full: bool
    accumulate: bool
    patch: Patch
    scaling: int
    add_bias: bool
    masked: bool
    function: Function | None
    row_max: bool
    mask_outer: int
    mask_inner: int

    @staticmethod
    def of(op: Op) -> _Modifiers:
        activation = modifier(op, "activation")
        return _Modifiers(
            Format(modifier(op, "format")),
            modifier(op, "region"),
            bool(modifier(op, "full")),
            bool(modifier(op, "accumulate")),
            Patch(modifier(op, "patch")),
            modifier(op, "scaling"),
            bool(modifier(op, "add_bias")),
            bool(modifier(op, "masked")),
            None if activation == Activation.NONE else Function(activation - 1),
            bool(modifier(op, "row_max")),
            modifier(op, "mask_outer"),
            modifier(op, "mask_inner"),
        )

    @property
    def plain(self) -> bool:
        """True if the epilogue has no step."""
        steps = (self.add_bias, self.masked, self.function is not None, self.row_max)
        return self.scaling == Scale.NONE and not any(steps)


def _rows(
    vector: NDArray[np.float32], base: int, length: int, outer: int, inner: int, outer_step: int, inner_step: int
) -> NDArray[np.float32]:
    """Register words as a matrix [outer * inner, length]; it may alias the registers."""
    if outer * inner == 1:
        return vector[base : base + length].reshape(1, length)
    shape, steps = (outer, inner, length), (outer_step, inner_step, 1)
    view = strided(vector, np.float32, base * _WORD_BYTES, shape, [step * _WORD_BYTES for step in steps])
    return view.reshape(outer * inner, length)


def _epilogue(
    state: DeviceState, how: _Modifiers, result: NDArray[np.float32], operands: tuple[int, ...]
) -> NDArray[np.float32] | None:
    """Apply the steps to `result` [rows, n]; returns the row maxima if they are asked for."""
    n, inner = operands[3], operands[6]
    scale_at, bias_at, lo, hi = operands[11:15]
    vector = state.vector
    scale = vector[scale_at : scale_at + (n if how.scaling == Scale.COLUMN else 1)]
    bias = vector[bias_at : bias_at + n]
    maxima = np.empty(len(result), np.float32) if how.row_max else None
    for index, row in enumerate(result):
        values = row
        if how.scaling != Scale.NONE:
            values = kernels.mul(values, scale)
        if how.add_bias:
            values = kernels.add(values, bias)
        if how.masked:
            shift = how.mask_outer * (index // inner) + how.mask_inner * (index % inner)
            first = min(max(lo + shift, 0), n)
            values[:first] = _MASKED
            values[max(min(hi + shift, n), first) :] = _MASKED
        if how.function is not None:
            values = kernels.unary(how.function, values)
        row[:] = values
        if maxima is not None:
            maxima[index] = kernels.reduce_max(values)
    return maxima


class MatmulBuilder:
    """Decodes matmul instructions for one machine."""

    def __init__(self, machine: Machine) -> None:
        """Keep the machine's packed layout constants."""
        self._lanes = machine.matrix.lanes
        self._block = machine.column_block
        self._granules = {element: machine.column_granule(size) for element, size in FORMAT_BYTES.items()}

    def __call__(self, op: Op, index: int) -> Step:
        """The step of one matmul."""
        how, pairs, following = _Modifiers.of(op), operand_pairs(op), index + 1
        lanes, block, granule = self._lanes, self._block, self._granules[how.element]
        element, region = how.element, how.region

        def step(state: DeviceState) -> int:
            registers, vector = state.registers, state.vector
            operands = tuple([((registers[r] + i + _SIGN) & _MASK) - _SIGN for r, i in pairs])
            trap = state.checker.matmul(
                element, region, how.full, how.patch, how.scaling, how.add_bias, how.row_max, operands
            )
            if trap:
                raise state.stop(trap)
            dst, src, k, n, line, outer, inner, src_outer, src_inner, dst_outer, dst_inner = operands[:11]
            rows = outer * inner
            if rows == 0 or n == 0:
                return following
            x = _rows(vector, src, k, outer, inner, src_outer, src_inner)
            start = _rows(vector, dst, n, outer, inner, dst_outer, dst_inner) if how.accumulate else None
            patch_kind, patch = how.patch, None
            patch_src, patch_at = operands[16:18]
            if patch_kind is Patch.COLUMN and patch_at < n:
                patch = vector[patch_src : patch_src + k]
            elif patch_kind is Patch.LANE and patch_at < k:
                patch = vector[patch_src : patch_src + n]
            else:
                patch_kind = Patch.NONE  # also raises no flags
            result, flags = kernels.matmul(
                state.memory[region], LINE_BYTES * line, element, x, k, n, lanes, block,
                granule=granule, full=how.full, acc=start, patch_kind=patch_kind, patch_at=patch_at, patch=patch,
            )  # fmt: skip
            if flags:
                state.raise_flags(flags)
            maxima = None if how.plain else _epilogue(state, how, result, operands)
            for row in range(rows):
                at = dst + row // inner * dst_outer + row % inner * dst_inner
                vector[at : at + n] = result[row]
            if maxima is not None:
                vector[operands[15] : operands[15] + rows] = maxima
            return following

        return step
