"""ONNX operators of neural networks: products, softmax, norms and activations, onnxruntime's fused ones among them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch.nn import functional

from typebar.compiler.frontend.onnx.calls import MICROSOFT, Call, Result, rule
from typebar.compiler.frontend.onnx.ops_math import layer_norm, rank_of
from typebar.compiler.frontend.onnx.ops_quantised import int8_linear
from typebar.compiler.frontend.onnx.values import RealWeight, RefusalError, Value, uniform


@rule("MatMul")
def matmul(call: Call) -> Result:
    """A product of matrices; factors on both operands of a product of activations are put on the product."""
    weight = call.required(1)
    if isinstance(weight, RealWeight):
        return int8_linear(call, call.tensor(0), weight)
    left, right = _without_factor(call, 0), _without_factor(call, 1)
    if left is not None and right is not None and left[0].ndim > 2:
        return torch.matmul(left[0], right[0]) * _joint_factor(left[1] * right[1])
    return torch.matmul(call.tensor(0), call.tensor(1))


def _without_factor(call: Call, index: int) -> tuple[torch.Tensor, float] | None:
    """What was multiplied by a number to make an operand, and the number."""
    maker, made = call.maker(index), call.required(index)
    if maker is None or maker.node.op_type not in ("Mul", "Div") or not isinstance(made, torch.Tensor):
        return None
    for i in (0, 1) if maker.node.op_type == "Mul" else (0,):
        x, factor = maker.value(i), uniform(maker.value(1 - i))
        if isinstance(x, torch.Tensor) and factor is not None and x.ndim == made.ndim and factor.value:
            value = float(factor.value)
            return x, value if maker.node.op_type == "Mul" else 1 / value
    return None


def _joint_factor(product: float) -> float:
    """A product of two rounded roots: 1 / sqrt(n) where it is that but for float32's rounding of the roots."""
    whole = round(1 / (product * product)) if 0 < product < 1e18 else 0
    exact = 1 / math.sqrt(whole) if whole > 0 else product
    return exact if abs(exact - product) <= 2.0**-22 * product else product


@rule("FusedMatMul", domain=MICROSOFT)
def fused_matmul(call: Call) -> Result:
    """alpha * a b, either transposed in its last two axes."""
    if call.integer("transBatchA", 0) or call.integer("transBatchB", 0):
        raise RefusalError("FusedMatMul moves batch axes", "export the model without fusing")
    a, b = call.tensor(0), call.tensor(1)
    a = a.transpose(-2, -1) if call.integer("transA", 0) else a
    b = b.transpose(-2, -1) if call.integer("transB", 0) else b
    alpha, product = call.real("alpha", 1.0), torch.matmul(a, b)
    return product if alpha == 1 else product * alpha


@rule("Gemm")
def gemm(call: Call) -> Result:
    """alpha * a b + beta * c, either of a and b transposed."""
    alpha, beta = call.real("alpha", 1.0), call.real("beta", 1.0)
    weight, bias = call.required(1), call.value(2)
    if call.integer("transA", 0):
        raise RefusalError("Gemm transposes its activation", "export the model again")
    if isinstance(weight, RealWeight):
        turned = replace(weight, transposed=weight.transposed != bool(call.integer("transB", 0)))
        made = int8_linear(call, call.tensor(0), turned)
    elif alpha == beta == 1 and bias is not None and rank_of(bias) == 1:
        x, matrix, c = call.tensor(0), call.tensor(1), call.tensor(2)
        return functional.linear(x, matrix, c) if call.integer("transB", 0) else torch.addmm(c, x, matrix)
    else:
        x, matrix = call.tensor(0), call.tensor(1)
        made = functional.linear(x, matrix) if call.integer("transB", 0) else torch.matmul(x, matrix)
    made = made if alpha == 1 else made * alpha
    if bias is None or beta == 0:
        return made
    return made + (call.tensor(2) if beta == 1 else call.tensor(2) * beta)


@rule("Einsum")
def einsum(call: Call) -> Result:
    """A sum of products by its equation, spelt out as a product of matrices where it is one."""
    equation = call.text("equation", "").replace(" ", "")
    if len(call.inputs) != 2 or "." in equation or "->" not in equation:
        raise RefusalError(f"Einsum {equation!r} is not supported", "write it with MatMul and Transpose")
    (a, b), out = equation.split("->")[0].split(","), equation.split("->")[1]
    x, y = call.tensor(0), call.tensor(1)
    for second, flipped in ((b, y), (b[:-2] + b[:-3:-1], y.transpose(-2, -1) if y.ndim > 1 else y)):
        plain = len(second) >= 2 and len(set(a)) == len(a) and a[-1] == second[-2]
        if plain and out == a[:-1] + second[-1] and second[:-2] in ("", a[:-2]):
            return torch.matmul(x, flipped)
    raise RefusalError(f"Einsum {equation!r} is no product of matrices", "write it with MatMul and Transpose")


@rule("Softmax", "LogSoftmax")
def softmax(call: Call) -> Result:
    """A softmax over one axis."""
    x = call.tensor(0)
    axis = call.integer("axis", -1 if call.opset >= 13 else 1)
    if call.opset < 13 and axis % x.ndim != x.ndim - 1:
        raise RefusalError(f"Softmax joins the axes from {axis} on", "export with operator set 13 or later")
    return functional.log_softmax(x, axis) if call.node.op_type == "LogSoftmax" else functional.softmax(x, axis)


def _norm(call: Call, x: torch.Tensor, weight: int, bias: int | None, rms: bool, eps: float) -> torch.Tensor:
    axis = call.integer("axis", -1)
    if axis not in (-1, x.ndim - 1):
        raise RefusalError(f"it normalises over the axes from {axis} on", "normalise over the last axis")
    w = None if call.value(weight) is None else call.tensor(weight)
    if rms:
        return torch.rms_norm(x, [x.shape[-1]], w, eps)
    return layer_norm(x, w, None if bias is None or call.value(bias) is None else call.tensor(bias), eps)


def _several(call: Call, *first: Value) -> list[Value]:
    """Results in order; the rest, statistics that nothing should read, are left out."""
    return [*first, *[None] * (len(call.node.output) - len(first))][: len(call.node.output)]


@rule("LayerNormalization")
@rule("LayerNormalization", domain=MICROSOFT)
def layer_normalization(call: Call) -> Result:
    """A layer norm."""
    return _several(call, _norm(call, call.tensor(0), 1, 2, False, call.real("epsilon", 1e-5)))


@rule("RMSNormalization", "SimplifiedLayerNormalization")
@rule("SimplifiedLayerNormalization", "RMSNormalization", domain=MICROSOFT)
def rms_normalization(call: Call) -> Result:
    """A norm by the root of the mean square."""
    return _several(call, _norm(call, call.tensor(0), 1, None, True, call.real("epsilon", 1e-5)))


@rule("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def skip_normalization(call: Call) -> Result:
    """A norm of input + skip + bias; the sum is the fourth result."""
    rms = call.node.op_type == "SkipSimplifiedLayerNormalization"
    total, bias = call.tensor(0) + call.tensor(1), 3 if rms else 4
    if call.value(bias) is not None:
        total = total + call.tensor(bias)
    made = _norm(call, total, 2, None if rms else 3, rms, call.real("epsilon", 1e-5))
    return _several(call, made, None, None, total)


@rule("Gelu")
@rule("Gelu", domain=MICROSOFT)
def gelu(call: Call) -> Result:
    """GELU, exact or in its tanh form."""
    return functional.gelu(call.tensor(0), approximate=call.text("approximate", "none"))


@rule("FastGelu", domain=MICROSOFT)
def fast_gelu(call: Call) -> Result:
    """GELU in its tanh form, of a value plus an optional bias."""
    return functional.gelu(_biased(call), approximate="tanh")


@rule("BiasGelu", domain=MICROSOFT)
def bias_gelu(call: Call) -> Result:
    """Exact GELU of a value plus a bias."""
    return functional.gelu(_biased(call))


def _biased(call: Call) -> torch.Tensor:
    return call.tensor(0) if call.value(1) is None else call.tensor(0) + call.tensor(1)


@rule("QuickGelu", domain=MICROSOFT)
def quick_gelu(call: Call) -> Result:
    """x * sigmoid(alpha * x)."""
    x, alpha = call.tensor(0), call.real("alpha", 1.702)
    return functional.silu(x) if alpha == 1 else x * torch.sigmoid(x * alpha)


@rule("Swish", "HardSwish", "Mish", "Elu", "LeakyRelu", "Selu")
def other_activation(call: Call) -> Result:
    """Activations that torch has under its own names; those the machine lacks are refused later."""
    x, kind = call.tensor(0), call.node.op_type
    if kind == "Swish":
        alpha = call.real("alpha", 1.0)
        return functional.silu(x) if alpha == 1 else x * torch.sigmoid(x * alpha)
    functions = {"HardSwish": functional.hardswish, "Mish": functional.mish, "Selu": functional.selu}
    if kind in functions:
        return functions[kind](x)
    alpha = call.real("alpha", 1.0 if kind == "Elu" else 0.01)
    return functional.elu(x, alpha) if kind == "Elu" else functional.leaky_relu(x, alpha)


def constant_vector(call: Call, index: int) -> np.ndarray:
    """A constant input's elements in a row."""
    found = call.constant(index)
    if found is None:
        raise RefusalError(f"{call.node.op_type} lacks its input {index}", "export the model again")
    return found.reshape(-1)
