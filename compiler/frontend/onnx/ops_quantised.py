"""Quantised ONNX operators: weights stay int8 with a float32 scale per column, activations are not quantised.

`DynamicQuantizeLinear`, `MatMulInteger`, `Cast` and `Mul`, as onnxruntime writes them, become `typebar::int8_linear`.
The machine keeps activations in its operand format, which is finer than the 8 bits that the graph rounds them to.
"""

from __future__ import annotations

import numpy as np
import torch

from typebar.compiler.frontend.onnx.calls import MICROSOFT, Call, Result, real_weight, rule
from typebar.compiler.frontend.onnx.values import (
    Moved,
    Product,
    Quantised,
    RealWeight,
    RefusalError,
    Weight,
)

_TOOL = "quantise the weights with onnxruntime's quantize_dynamic, per tensor or per column"


@torch.library.custom_op("typebar::int8_linear", mutates_args=())  # type: ignore[untyped-decorator]
def _int8_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x times an int8 weight [in, out], each column multiplied by its float32 scale [out]."""
    return torch.matmul(x, weight.to(x.dtype)) * scale


@_int8_linear.register_fake  # type: ignore[untyped-decorator]
def _(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


def int8_linear(call: Call, x: torch.Tensor, matrix: RealWeight) -> torch.Tensor:
    """x times a dequantised matrix, which stays int8 with a scale for each column.

    It becomes float32 where it cannot: values that do not fit int8 once their zero point is taken off, scales by row.
    """
    weight, zero = matrix.weight, matrix.zero.reshape(-1).astype(np.int64)
    if len(weight.shape) != 2 or weight.dtype not in (torch.int8, torch.uint8):
        raise RefusalError(f"its quantised weight is {list(weight.shape)}, {weight.dtype}", _TOOL)
    columns = weight.shape[0] if matrix.transposed else weight.shape[1]
    by_column = (matrix.axis % 2 == 0) == matrix.transposed
    for what, given in (("scales", matrix.scale), ("zero points", zero)):
        if given.size not in (1, weight.shape[matrix.axis % 2]):
            raise RefusalError(f"it has {given.size} {what} for {list(weight.shape)}", _TOOL)
    by_row = (matrix.scale.size > 1 or zero.size > 1) and not by_column
    if by_row or not _fits_int8(call, weight, zero, matrix.axis):
        real = real_weight(call, weight, matrix.scale, zero, matrix.axis)
        return torch.matmul(x, real.t() if matrix.transposed else real)
    values = weight
    if weight.dtype != torch.int8 or zero.any() or matrix.transposed:
        shift = zero.reshape((-1, 1) if matrix.axis % 2 == 0 else (1, -1))

        def make() -> np.ndarray:
            shifted = call.reader.values_of(weight).astype(np.int64) - shift
            return np.asarray((shifted.T if matrix.transposed else shifted).astype(np.int8))

        shape = weight.shape[::-1] if matrix.transposed else weight.shape
        values = call.reader.derived(weight, "int8", shape, make, torch.int8)
    vector = np.broadcast_to(matrix.scale.reshape(-1).astype(np.float32), (columns,))
    scales = call.reader.derived(values, "scale", (columns,), lambda: np.array(vector), torch.float32)
    tensors = (call.reader.tensor_of(v) for v in (values, scales))
    made: torch.Tensor = torch.ops.typebar.int8_linear(x, *tensors)
    return made


def _fits_int8(call: Call, weight: Weight, zero: np.ndarray, axis: int) -> bool:
    """Whether the values less their zero points are int8."""
    if (weight.dtype == torch.int8 and not zero.any()) or (weight.dtype == torch.uint8 and np.all(zero == 128)):
        return True
    stored = call.reader.values_of(weight)
    if not stored.size:
        return True
    low, high = (ends(axis=1 - axis % 2).astype(np.int64) - zero for ends in (stored.min, stored.max))
    return bool(low.min() >= -128 and high.max() <= 127)


def _zero_point(call: Call, index: int) -> np.ndarray:
    given = call.constant(index)
    return np.zeros(1, np.int64) if given is None else given.reshape(-1)


@rule("DynamicQuantizeLinear")
def quantise(call: Call) -> Result:
    """The activation, remembered as it is; its scale and zero point cancel in the product that follows."""
    x = call.tensor(0)
    return [Quantised(x, part) for part in ("values", "scale", "zero")]


@rule("MatMulInteger")
def integer_product(call: Call) -> Result:
    """A quantised activation times a quantised weight, before the scales."""
    x, weight, zero = call.required(0), call.required(1), call.value(2)
    if not isinstance(x, Quantised) or x.part != "values" or not isinstance(weight, Weight):
        raise RefusalError("it is no product of a quantised activation and a quantised weight", _TOOL)
    if not isinstance(zero, Quantised) or zero.part != "zero" or zero.x is not x.x:
        raise RefusalError("its activation has a zero point of another value", _TOOL)
    return Product(x.x, weight, _zero_point(call, 3))


@rule("MatMulIntegerToFloat", "DynamicQuantizeMatMul", domain=MICROSOFT)
def float_product(call: Call) -> Result:
    """onnxruntime's fused forms: scales are applied inside, and perhaps a bias."""
    if call.node.op_type == "DynamicQuantizeMatMul":
        x, places = call.tensor(0), (1, 2, 3, 4)
    else:
        activation = call.required(0)
        if not isinstance(activation, Quantised):
            raise RefusalError("its first input is no quantised activation", _TOOL)
        x, places = activation.x, (1, 3, 5, 6)
    weight, scale = call.required(places[0]), call.constant(places[1])
    if not isinstance(weight, Weight) or scale is None:
        raise RefusalError("its weight is not an initialiser", _TOOL)
    made = int8_linear(call, x, RealWeight(weight, scale.reshape(-1), _zero_point(call, places[2])))
    return made if call.value(places[3]) is None else made + call.tensor(places[3])


@rule("DequantizeLinear")
def dequantise(call: Call) -> Result:
    """(x - zero) * scale: a matrix stays in integers, anything else becomes a float32 parameter."""
    value, scale, zero = call.required(0), call.constant(1), _zero_point(call, 2)
    if scale is None:
        raise RefusalError("DequantizeLinear lacks its scale", "export the model again")
    if isinstance(value, Quantised) and value.part == "values":
        return value.x
    weight = value.weight if isinstance(value, Moved) else value
    if not isinstance(weight, Weight):
        raise RefusalError("it dequantises something that is no weight", _TOOL)
    if isinstance(value, Moved) and scale.size != 1:
        raise RefusalError("it moves a weight's elements before it applies a scale for each column", _TOOL)
    axis = call.integer("axis", 1)
    if isinstance(value, Weight) and len(weight.shape) == 2 and axis in (-2, -1, 0, 1):
        return RealWeight(weight, scale.reshape(-1), zero, axis % 2)
    real = real_weight(call, weight, scale, zero, axis)
    for move in value.moves if isinstance(value, Moved) else ():
        real = move(real)
    return real
