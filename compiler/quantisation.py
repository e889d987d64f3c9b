"""int8 weights: symmetric, with a float32 scale for each output column, made when they are packed.

A column's scale is its largest magnitude over 127, and q = round(w / scale), nearest even. Finer choices, clipping by
squared error or scaling inputs by the activations' size, were measured and do not pay (docs/decisions.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from typebar.compiler import ir
from typebar.compiler.device_ir import context
from typebar.compiler.frontend import DerivedSource, FrontendModel, WeightSource
from typebar.compiler.packing import checked
from typebar.compiler.passes.quantise import QuantisePass, scale_name, unquantised, values_name

LARGEST = 127
"""-128 is not used, so that a column and its negative have the same magnitudes."""
_BLOCK = 1 << 22
"""Elements of a column block: temporaries are no larger."""
_SMALLEST = np.finfo(np.float32).smallest_normal
"""The machine takes smaller scales as zero."""


@dataclass(frozen=True)
class Quantised:
    """A model whose products have int8 weights, and what was made of what: `origins` is a weight's own name by that of
    its integers, `scales` the names of the scales."""

    model: FrontendModel
    origins: dict[str, str]
    scales: frozenset[str]


def quantise(model: FrontendModel) -> Quantised:
    """The lowered model with int8 weights in all its products; nothing is loaded or computed before it is asked for.

    `model` itself stays as it is. Embeddings are not quantised, nor is what is int8 already.
    """
    module, weights = model.module.clone(), DerivedSource(model.weights)
    origins: dict[str, str] = {}
    scales: set[str] = set()
    for op in unquantised(module):
        layout, template = op.layout.data, ir.text(op.weight)
        for weight in _names(op, template):
            values, scale = values_name(weight, layout), scale_name(weight, layout)
            if values in origins:
                continue
            column = _Columns(model.weights, weight, layout)
            weights.define(values, model.weights.shape(weight), column.integers)
            weights.define(scale, (ir.width(op.out),), column.scales)
            origins[values] = weight
            scales.add(scale)
    QuantisePass().apply(context(), module)
    return Quantised(replace(model, module=module, weights=weights), origins, frozenset(scales))


def _names(op: ir.LinearOp, template: str) -> Iterator[str]:
    """What a weight's name means in each layer of the loop that the operation stands in."""
    loop = op.parent_op()
    if not isinstance(loop, ir.RepeatOp):
        yield template
        return
    for layer in range(loop.count.value.data):
        yield ir.layer_name(template, loop.start.value.data, layer)


class _Columns:
    """A weight's integers and scales, worked out column block by column block."""

    def __init__(self, source: WeightSource, name: str, layout: str) -> None:
        self._source, self._name, self._axis = source, name, 1 if layout == "in_out" else 0
        self._made: NDArray[np.float32] | None = None

    def scales(self) -> NDArray[np.float32]:
        """A scale for each column, worked out once and kept."""
        if self._made is None:
            self._made = self._scales(self._load())
        return self._made

    def integers(self) -> NDArray[np.int8]:
        """The weight in its own shape."""
        weight = self._load()
        if self._made is None:
            self._made = self._scales(weight)
        found = np.empty(weight.shape, np.int8)
        for block in self._blocks(weight):
            scale = self._made[block]
            spread, index = (scale, (slice(None), block)) if self._axis else (scale[:, None], (block, slice(None)))
            found[index] = np.rint(weight[index] / spread)
        return found

    def _load(self) -> NDArray[np.float32]:
        return checked(np.asarray(self._source.load(self._name), np.float32), self._name)

    def _scales(self, weight: NDArray[np.float32]) -> NDArray[np.float32]:
        found = np.empty(weight.shape[self._axis], np.float32)
        for block in self._blocks(weight):
            part = weight[:, block] if self._axis else weight[block]
            found[block] = np.abs(part).max(axis=1 - self._axis, initial=0)
        found /= LARGEST
        # Such a column is all zeros to the machine; so are its integers, whatever they are multiplied by.
        found[found < _SMALLEST] = 1
        return found

    def _blocks(self, weight: NDArray[np.float32]) -> Iterator[slice]:
        columns = weight.shape[self._axis]
        step = max(1, _BLOCK // max(1, weight.shape[1 - self._axis]))
        for start in range(0, columns, step):
            yield slice(start, min(start + step, columns))
