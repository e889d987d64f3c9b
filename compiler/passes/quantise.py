"""quantise: every product's weight becomes int8 with a float32 scale for each column.

The pass only renames: what the names stand for is in `compiler.quantisation`. Embeddings stay as they are, and so do
weights that are int8 already.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.passes import ModulePass

from typebar.compiler import ir


@dataclass(frozen=True)
class QuantisePass(ModulePass):
    """Give every `tb.linear` an int8 weight and a scale for each column."""

    name = "quantise"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        """Rename the weights and name the scales, in place."""
        for linear in unquantised(op):
            weight, layout = ir.text(linear.weight), linear.layout.data
            linear.properties["weight"] = ir.symbol(values_name(weight, layout))
            linear.properties["scale"] = ir.symbol(scale_name(weight, layout))


def unquantised(module: ModuleOp) -> list[ir.LinearOp]:
    """The linear operations whose weights are real numbers."""
    return [op for op in module.walk() if isinstance(op, ir.LinearOp) and op.scale is None]


def values_name(weight: str, layout: str) -> str:
    """The name of a weight's integers; one weight may be used in both layouts, whose columns are not the same."""
    return f"{weight}.int8.{layout}"


def origin(name: str) -> str:
    """The name of the weight whose integers `name` stands for; any other name as it is."""
    return re.sub(rf"\.int8\.({'|'.join(ir.LAYOUTS)})$", "", name)


def scale_name(weight: str, layout: str) -> str:
    """The name of the scales of a weight's columns."""
    return f"{weight}.scale.{layout}"
