"""ONNX operators that work element by element, and reductions."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from onnx import TensorProto

from typebar.compiler.frontend.onnx.calls import Call, Norm, Result, as_tensor, rule
from typebar.compiler.frontend.onnx.values import (
    Filled,
    Moved,
    Product,
    Quantised,
    RealWeight,
    RefusalError,
    ScaleProduct,
    Size,
    Sizes,
    Value,
    Weight,
    as_items,
    broadcast,
    same_shape,
    sizes,
    uniform,
)

Number = float | int | bool

DTYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float32,
    TensorProto.BFLOAT16: torch.float32,
    TensorProto.DOUBLE: torch.float32,
    TensorProto.BOOL: torch.bool,
    TensorProto.INT8: torch.int64,
    TensorProto.INT16: torch.int64,
    TensorProto.INT32: torch.int64,
    TensorProto.INT64: torch.int64,
    TensorProto.UINT8: torch.int64,
    TensorProto.UINT16: torch.int64,
    TensorProto.UINT32: torch.int64,
    TensorProto.UINT64: torch.int64,
}
"""The types that graphs compute in, as they are here: every float is float32 and every whole number int64."""


def rank_of(value: Value) -> int:
    """The number of axes of a value."""
    match value:
        case Sizes():
            return 0 if value.scalar else 1
        case Filled() | Weight():
            return len(value.shape)
        case np.ndarray() | torch.Tensor():
            return value.ndim
    return 0


def shape_of(value: Value) -> tuple[Size, ...]:
    """The shape of a value."""
    match value:
        case Sizes():
            return () if value.scalar else (len(value.items),)
        case Filled() | Weight():
            return tuple(value.shape)
        case np.ndarray() | torch.Tensor():
            return tuple(value.shape)
    return ()


def _truncated(a: Any, b: Any) -> Any:
    """Division as ONNX has it: whole numbers give whole numbers."""
    if isinstance(a, float) or isinstance(b, float):
        return a / b
    return a // b


def elementwise(call: Call, on_numbers: Callable[[Any, Any], Any], on_tensors: Callable[..., torch.Tensor]) -> Value:
    """A binary operation, on sizes as numbers, on uniform tensors once, and on tensors as torch does it."""
    a, b = call.required(0), call.required(1)
    if isinstance(a, Sizes) or isinstance(b, Sizes):
        left, right = as_items(a), as_items(b)
        if left is not None and right is not None:
            return _on_sizes(left, right, on_numbers)
    first, second = uniform(a), uniform(b)
    if on_numbers is operator.mul and isinstance(a if second is not None else b, Sizes):
        zero = second if second is not None else first
        if zero is not None and not zero.value:  # nothing of the length is left
            return _filled(broadcast(shape_of(a), shape_of(b)), 0)
    if first is not None and second is not None and (isinstance(a, Filled) or isinstance(b, Filled)):
        return _filled(broadcast(first.shape, second.shape), on_numbers(first.value, second.value))
    x, y = _one_side(call, 0, b), _one_side(call, 1, a)
    if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
        x, y = call.reader.trimmed(x, y.shape), call.reader.trimmed(y, x.shape)
    return on_tensors(x, y)


def _on_sizes(
    left: tuple[tuple[Size, ...], bool], right: tuple[tuple[Size, ...], bool], function: Callable[[Any, Any], Any]
) -> Value:
    (a, a_scalar), (b, b_scalar) = left, right
    count = max(len(a), len(b))
    if len(a) not in (1, count) or len(b) not in (1, count):
        raise RefusalError(f"vectors of {len(a)} and {len(b)} do not go together", "export the model again")
    made = [function(x, y) for x, y in zip(a * (count // len(a)), b * (count // len(b)), strict=True)]
    made = [bool(v) if isinstance(v, torch.SymBool) else v for v in made]
    if made and all(isinstance(v, bool) for v in made):
        return np.array(made[0] if a_scalar and b_scalar else made)
    return sizes(made, a_scalar and b_scalar)


def _filled(shape: tuple[Size, ...], value: Any) -> Filled:
    if isinstance(value, bool):
        return Filled(shape, value, torch.bool)
    return Filled(shape, value, torch.int64 if isinstance(value, int) else torch.float32)


def _one_side(call: Call, index: int, other: Value) -> torch.Tensor | Number:
    """An operand; a uniform tensor that adds no axis and no size to the other is a number."""
    number = number_beside(call.required(index), other)
    return call.operand(index, rank_of(other)) if number is None else number


def number_beside(value: Value, other: Value) -> Number | None:
    """The one value of a uniform tensor that adds no axis and no size to `other`."""
    if not isinstance(value, Filled) or not isinstance(other, torch.Tensor):
        return None
    return value.value if same_shape(broadcast(value.shape, other.shape), other.shape) else None


def on_both(function: Callable[[Any, Any], torch.Tensor]) -> Callable[[Any, Any], torch.Tensor]:
    """The function, for tensors only: numbers become tensors of the other's type."""

    def call(a: Any, b: Any) -> torch.Tensor:
        like = a if isinstance(a, torch.Tensor) else b
        if not isinstance(a, torch.Tensor):
            a = torch.scalar_tensor(a, dtype=like.dtype, device=like.device)
        if not isinstance(b, torch.Tensor):
            b = torch.scalar_tensor(b, dtype=like.dtype, device=like.device)
        return function(a, b)

    return call


def is_uniform(value: Value, other: Value, number: Number) -> bool:
    """Whether `value` is `number` everywhere and combining it with `other` leaves the other's shape."""
    found = uniform(value)
    if found is None or not isinstance(other, torch.Tensor) or found.value != number:
        return False
    return same_shape(broadcast(found.shape, other.shape), other.shape)


@rule("Add")
def add(call: Call) -> Result:
    """a + b; a uniform zero, as a mask of ones makes it, adds nothing."""
    a, b = call.required(0), call.required(1)
    for value, other in ((a, b), (b, a)):
        if is_uniform(value, other, 0):
            return other
        norm = call.reader.norm_of(other)
        if norm is not None and norm.weight is not None and _vector(value, norm.x):
            return layer_norm(norm.x, norm.weight, _as_vector(call, value), norm.eps)
    return elementwise(call, operator.add, lambda x, y: x + y)


@rule("Sub")
def subtract(call: Call) -> Result:
    """a - b."""
    if is_uniform(call.required(1), call.required(0), 0):
        return call.required(0)
    return elementwise(call, operator.sub, lambda x, y: x - y)


@rule("Mul")
def multiply(call: Call) -> Result:
    """a * b; the scales of quantised products are set aside."""
    a, b = call.required(0), call.required(1)
    for x, y in ((a, b), (b, a)):
        if isinstance(x, Quantised | Product):
            return _scaled(call, x, y)
        if is_uniform(x, y, 1):
            return y
        norm = call.reader.norm_of(y)
        if norm is not None and norm.weight is None and _vector(x, norm.x):
            weight = _as_vector(call, x)
            made = layer_norm(norm.x, weight, None, norm.eps)
            return call.reader.note_norm(made, Norm(norm.x, norm.eps, weight))
    return elementwise(call, operator.mul, lambda x, y: x * y)


def _scaled(call: Call, a: Quantised | Product, b: Value) -> Value:
    if isinstance(a, Quantised) and a.part == "scale":
        scale = call.reader.values_of(b) if isinstance(b, Weight) else b
        if isinstance(scale, np.ndarray):
            return ScaleProduct(a.x, scale.astype(np.float32))
    if isinstance(a, Product) and a.scale is None and isinstance(b, ScaleProduct) and a.x is b.x:
        from typebar.compiler.frontend.onnx.ops_quantised import int8_linear

        return int8_linear(call, a.x, RealWeight(a.weight, b.scale, a.zero))
    if isinstance(a, Product) and isinstance(b, np.ndarray | Weight):
        more = call.reader.values_of(b) if isinstance(b, Weight) else b
        return Product(a.x, a.weight, a.zero, more if a.scale is None else a.scale * more)
    if isinstance(a, Product) and a.scale is not None and isinstance(b, Quantised) and b.part == "scale":
        from typebar.compiler.frontend.onnx.ops_quantised import int8_linear

        return int8_linear(call, a.x, RealWeight(a.weight, a.scale, a.zero))
    raise RefusalError(
        "it scales a quantised product in an unknown way", "quantise with onnxruntime's quantize_dynamic"
    )


@rule("Div")
def divide(call: Call) -> Result:
    """a / b; 1 / sqrt(x) is a reciprocal root, and x / sqrt(y) a product with one."""
    b = call.maker(1)
    a = uniform(call.required(0))
    if b is not None and b.node.op_type == "Sqrt" and isinstance(call.required(1), torch.Tensor):
        if (norm := _centred(call, b)) is not None:
            return call.reader.note_norm(layer_norm(norm.x, None, None, norm.eps), norm)
        root = torch.rsqrt(b.tensor(0))
        if a is not None and a.value == 1 and rank_of(call.required(0)) <= root.ndim:
            return root
        if isinstance(call.required(0), torch.Tensor):
            return call.tensor(0) * root
    whole = all(as_items(v) is not None or (isinstance(v, torch.Tensor) and not v.is_floating_point())
                for v in call.inputs[:2])  # fmt: skip
    if whole and any(isinstance(v, torch.Tensor) for v in call.inputs[:2]):
        return elementwise(call, _truncated, lambda x, y: torch.div(x, y, rounding_mode="trunc"))
    return elementwise(call, _truncated, lambda x, y: x / y)


def layer_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """A layer norm over the last axis."""
    return torch.nn.functional.layer_norm(x, [x.shape[-1]], weight, bias, eps)


def _vector(value: Value, x: torch.Tensor) -> bool:
    return isinstance(value, Weight | np.ndarray | torch.Tensor) and shape_of(value) == (x.shape[-1],)


def _as_vector(call: Call, value: Value) -> torch.Tensor:
    return call.tensor(0 if value is call.required(0) else 1)


def _centred(call: Call, root: Call) -> Norm | None:
    """(x - mean(x)) / sqrt(mean((x - mean(x)) ** 2) + eps), of which `call` is the division: x and eps."""
    centre, shifted = call.maker(0), root.maker(0)
    if centre is None or centre.node.op_type != "Sub" or shifted is None or shifted.node.op_type != "Add":
        return None
    x, mean = centre.value(0), centre.maker(1)
    if not isinstance(x, torch.Tensor) or mean is None or not _is_mean(mean) or mean.value(0) is not x:
        return None
    for i in (0, 1):
        eps, variance = uniform(shifted.value(1 - i)), shifted.maker(i)
        if eps is None or variance is None or not _is_mean(variance):
            continue
        square = variance.maker(0)
        if square is not None and _is_square_of(square, call.required(0)):
            return Norm(x, float(eps.value))
    return None


def _is_mean(call: Call) -> bool:
    x = call.value(0)
    last = isinstance(x, torch.Tensor) and call.axes(1) in ([-1], [x.ndim - 1])
    return call.node.op_type == "ReduceMean" and last and bool(call.integer("keepdims", 1))


def _is_square_of(call: Call, value: Value) -> bool:
    exponent = uniform(call.value(1))
    if call.node.op_type == "Pow":
        return call.value(0) is value and exponent is not None and exponent.value == 2
    return call.node.op_type == "Mul" and call.value(0) is value and call.value(1) is value


@rule("Pow")
def power(call: Call) -> Result:
    """a ** b."""
    return elementwise(call, operator.pow, lambda x, y: x**y)


@rule("Mod")
def modulo(call: Call) -> Result:
    """The remainder, with the divisor's sign unless fmod is asked for."""
    if call.integer("fmod", 0):
        return elementwise(call, lambda x, y: float(np.fmod(x, y)), on_both(torch.fmod))
    return elementwise(call, operator.mod, lambda x, y: x % y)


@rule("Min", "Max")
def extremum(call: Call) -> Result:
    """The least or the greatest of any number of inputs."""
    least = call.node.op_type == "Min"
    on_numbers = torch.sym_min if least else torch.sym_max
    result = call.required(0)
    for value in call.inputs[1:]:
        step = Call(call.node, [result, value], call.opset, call.reader)
        result = elementwise(step, on_numbers, on_both(torch.minimum if least else torch.maximum))
    return result


_UNARY: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[Any], Any] | None]] = {
    "Neg": (torch.neg, operator.neg),
    "Abs": (torch.abs, abs),
    "Not": (torch.logical_not, operator.not_),
    "Sqrt": (torch.sqrt, None),
    "Exp": (torch.exp, None),
    "Log": (torch.log, None),
    "Sin": (torch.sin, None),
    "Cos": (torch.cos, None),
    "Tanh": (torch.tanh, None),
    "Erf": (torch.erf, None),
    "Relu": (torch.relu, None),
    "Sigmoid": (torch.sigmoid, None),
    "Floor": (torch.floor, None),
    "Ceil": (torch.ceil, None),
    "Round": (torch.round, None),
    "Sign": (torch.sign, None),
    "IsNaN": (torch.isnan, None),
    "Softplus": (torch.nn.functional.softplus, None),
}


@rule(*_UNARY)
def unary(call: Call) -> Result:
    """A function of each element."""
    on_tensor, on_number = _UNARY[call.node.op_type]
    value = call.required(0)
    items = as_items(value) if isinstance(value, Sizes) else None
    if items is not None and on_number is not None:
        return sizes([on_number(v) for v in items[0]], items[1])
    if isinstance(value, Filled) and on_number is not None:
        return _filled(value.shape, on_number(value.value))
    return on_tensor(call.tensor(0))


@rule("Reciprocal")
def reciprocal(call: Call) -> Result:
    """1 / x; that of a root is a reciprocal root."""
    maker = call.maker(0)
    if maker is not None and maker.node.op_type == "Sqrt":
        return torch.rsqrt(maker.tensor(0))
    return torch.reciprocal(call.tensor(0))


@rule("Clip")
def clip(call: Call) -> Result:
    """x between two bounds."""
    low, high = (call.constant(i) for i in (1, 2))
    bounds = [None if b is None else b.reshape(-1)[0].item() for b in (low, high)]
    if call.opset < 11:
        bounds = [call.real("min", -3.4e38), call.real("max", 3.4e38)]
    return torch.clamp(call.tensor(0), *bounds)


@rule("Cast", "CastLike")
def cast(call: Call) -> Result:
    """To another type, of which there are three here: float32, int64 and bool."""
    value = call.required(0)
    if call.node.op_type == "CastLike":
        other = call.required(1)
        wanted = other.dtype if isinstance(other, torch.Tensor | Filled | Weight) else None
        if wanted is None:
            raise RefusalError("CastLike follows something that is no tensor", "use Cast")
    else:
        code = call.integer("to", 0)
        if code not in DTYPES:
            raise RefusalError(f"it casts to element type {code}", "export the model in float32")
        wanted = DTYPES[code]
    if isinstance(value, Product | RealWeight | Moved | Quantised):
        return value
    if isinstance(value, Sizes) and wanted == torch.int64:
        return value
    if isinstance(value, Filled):
        convert = {torch.bool: bool, torch.int64: int, torch.float32: float}[wanted]
        return Filled(value.shape, convert(value.value), wanted)
    if isinstance(value, Weight) and value.dtype == wanted:
        return value
    tensor = call.tensor(0)
    return tensor if tensor.dtype == wanted else tensor.to(wanted)


@rule("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL2")
def reduce(call: Call) -> Result:
    """A reduction over some axes, or all."""
    kind, keep = call.node.op_type, bool(call.integer("keepdims", 1))
    value, axes = call.required(0), call.axes(1)
    items = as_items(value) if isinstance(value, Sizes) else None
    if items is not None and kind in ("ReduceProd", "ReduceSum"):
        total: Size = 1 if kind == "ReduceProd" else 0
        for item in items[0]:
            total = total * item if kind == "ReduceProd" else total + item
        return sizes([total], not keep)
    if not axes and call.integer("noop_with_empty_axes", 0):
        return value
    x, square = call.tensor(0), call.maker(0)
    if square is not None and square.node.op_type == "Mul" and square.value(0) is square.value(1):
        x = square.tensor(0) ** 2  # one way to write a square is enough for what follows
    over = axes or list(range(x.ndim))
    functions: dict[str, Callable[[], torch.Tensor]] = {
        "ReduceMean": lambda: x.mean(over, keepdim=keep),
        "ReduceSum": lambda: x.sum(over, keepdim=keep),
        "ReduceMax": lambda: x.amax(over, keepdim=keep),
        "ReduceMin": lambda: x.amin(over, keepdim=keep),
        "ReduceProd": lambda: x.prod(over[0], keepdim=keep),
        "ReduceL2": lambda: x.square().sum(over, keepdim=keep).sqrt(),
    }
    return functions[kind]()


@rule("CumSum")
def cumulative_sum(call: Call) -> Result:
    """Sums along one axis, from its start."""
    axis = (call.fixed(1) or [0])[0]
    if call.integer("exclusive", 0) or call.integer("reverse", 0):
        raise RefusalError("it sums exclusively or backwards", "write it with a plain cumulative sum")
    return torch.cumsum(call.tensor(0), axis)


@rule("Trilu")
def triangle(call: Call) -> Result:
    """The upper or the lower triangle of the last two axes."""
    k = (call.fixed(1) or [0])[0]
    return torch.triu(call.tensor(0), k) if call.integer("upper", 1) else torch.tril(call.tensor(0), k)


@rule("Sum")
def total(call: Call) -> Result:
    """The sum of any number of inputs."""
    result = call.required(0)
    for i in range(1, len(call.inputs)):
        other = as_tensor(call.required(i), call, call.node.input[i])
        result = as_tensor(result, call, call.node.input[0]) + other
    return result
