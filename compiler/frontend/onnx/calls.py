"""One ONNX operation about to be carried out: its attributes, its inputs as what each rule needs, and the rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from onnx import AttributeProto, NodeProto

from typebar.compiler.frontend.onnx.values import (
    Filled,
    Moved,
    RealWeight,
    RefusalError,
    Size,
    Sizes,
    Value,
    Weight,
    as_items,
    torch_dtype,
)

MICROSOFT = "com.microsoft"


class Reader(Protocol):
    """What rules ask of the graph's reader."""

    device: torch.device

    def tensor_of(self, weight: Weight) -> torch.Tensor:
        """The parameter that a weight becomes."""

    def buffer(self, name: str, values: np.ndarray) -> torch.Tensor:
        """A constant as a tensor."""

    def values_of(self, weight: Weight) -> np.ndarray:
        """A weight's values, read now."""

    def derived(
        self, weight: Weight, suffix: str, shape: Sequence[int], make: Callable[[], np.ndarray], dtype: torch.dtype
    ) -> Weight:
        """A parameter computed from a weight when it is loaded, called by the weight's name and `suffix`."""

    def generalised(self, source: Sequence[Size], target: Sequence[Size]) -> Sequence[Size]:
        """The target shape of a value, the length that the graph was exported at replaced by the tokens' number."""

    def trimmed(self, x: torch.Tensor, shape: Sequence[Size]) -> torch.Tensor:
        """A constant made for the length that the graph was exported at, cut to what stands beside `shape`."""

    def norm_of(self, value: Value) -> Norm | None:
        """What is known of a value that a decomposed norm made."""

    def note_norm(self, value: torch.Tensor, norm: Norm) -> torch.Tensor:
        """Remember it; returns the value."""

    def attribute_array(self, attribute: AttributeProto) -> np.ndarray:
        """The tensor in an attribute."""

    def maker(self, name: str) -> Call | None:
        """The operation that made a value."""


@dataclass(frozen=True)
class Norm:
    """A layer norm written out in several operations, as far as they have been read."""

    x: torch.Tensor
    eps: float
    weight: torch.Tensor | None = None


class Call:
    """A node with the values of its inputs."""

    def __init__(self, node: NodeProto, inputs: list[Value], opset: int, reader: Reader) -> None:
        """Remember all."""
        self.node = node
        self.inputs = inputs
        self.opset = opset
        self.reader = reader
        self.attributes = {a.name: a for a in node.attribute}

    def value(self, index: int) -> Value:
        """Input `index`, None if it is left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def required(self, index: int) -> Value:
        """Input `index`; raises RefusalError if it is left out."""
        value = self.value(index)
        if value is None:
            raise RefusalError(f"{self.node.op_type} lacks its input {index}", "export the model again")
        return value

    def integer(self, name: str, default: int) -> int:
        """A whole-number attribute."""
        attribute = self._typed(name, AttributeProto.INT)
        return int(attribute.i) if attribute is not None else default

    def real(self, name: str, default: float) -> float:
        """A floating-point attribute."""
        attribute = self._typed(name, AttributeProto.FLOAT)
        return float(attribute.f) if attribute is not None else default

    def text(self, name: str, default: str) -> str:
        """A string attribute."""
        attribute = self._typed(name, AttributeProto.STRING)
        return attribute.s.decode(errors="replace") if attribute is not None else default

    def integers(self, name: str) -> list[int] | None:
        """An attribute that lists whole numbers, None if it is absent."""
        attribute = self._typed(name, AttributeProto.INTS)
        return [int(v) for v in attribute.ints] if attribute is not None else None

    def _typed(self, name: str, kind: int) -> Any:
        attribute = self.attributes.get(name)
        if attribute is not None and attribute.type != kind:
            raise RefusalError(f"attribute {name!r} has the wrong type", "export the model again")
        return attribute

    def constant(self, index: int) -> np.ndarray | None:
        """Input `index` as a constant, None if it is left out; raises RefusalError if it depends on the tokens."""
        value = self.value(index)
        if isinstance(value, Weight):
            return self.reader.values_of(value)
        if value is None or isinstance(value, np.ndarray):
            return value
        what = f"input {index} of {self.node.op_type}"
        raise RefusalError(f"{what} is not a constant", "export the model with this value fixed")

    def numbers(self, index: int) -> tuple[Size, ...] | None:
        """Input `index` as whole numbers that depend on the length at most, None if it is left out."""
        value = self.value(index)
        if value is None:
            return None
        items = as_items(self.constant(index) if isinstance(value, Weight) else value)
        if items is None:
            rule = f"input {index} of {self.node.op_type}, a size or an index, depends on the tokens' values"
            raise RefusalError(rule, "shapes may depend on the number of tokens alone")
        return items[0]

    def fixed(self, index: int) -> list[int] | None:
        """Input `index` as whole numbers known now, None if it is left out."""
        numbers = self.numbers(index)
        if numbers is None:
            return None
        if any(not isinstance(n, int) for n in numbers):
            raise RefusalError(f"input {index} of {self.node.op_type} depends on the length", "export it as a constant")
        return [int(n) for n in numbers]

    def axes(self, index: int) -> list[int] | None:
        """The axes: an attribute in older operator sets, input `index` in newer ones."""
        listed = self.integers("axes")
        return listed if listed is not None else self.fixed(index)

    def tensor(self, index: int) -> torch.Tensor:
        """Input `index` as a tensor."""
        return as_tensor(self.required(index), self, self.node.input[index])

    def operand(self, index: int, rank: int) -> torch.Tensor | float | int | bool:
        """Input `index` as a number, if it is one and no axis comes of it, else as a tensor."""
        value = self.required(index)
        if isinstance(value, np.ndarray) and value.size == 1 and value.ndim <= rank:
            torch_dtype(value.dtype)
            number: float | int | bool = value.reshape(-1)[0].item()
            return number
        return self.tensor(index)

    def maker(self, index: int) -> Call | None:
        """The operation that made input `index`."""
        return self.reader.maker(self.node.input[index]) if index < len(self.node.input) else None


def as_tensor(value: Value, call: Call, name: str) -> torch.Tensor:
    """A value as a tensor; raises RefusalError for quantised values outside the operations that know them."""
    reader = call.reader
    match value:
        case torch.Tensor():
            return value
        case np.ndarray():
            return reader.buffer(name, value)
        case Weight():
            return reader.tensor_of(value)
        case Filled():
            return value.tensor(reader.device)
        case Sizes(items=items, scalar=scalar):
            parts = [torch.scalar_tensor(s, dtype=torch.int64, device=reader.device) for s in items]
            return parts[0] if scalar else torch.stack(parts)
        case RealWeight():
            real = real_weight(call, value.weight, value.scale, value.zero, value.axis)
            return real.t() if value.transposed else real
        case Moved():
            raise RefusalError("it uses a quantised weight as it is", "dequantise it first with DequantizeLinear")
    rule = f"{call.node.op_type} takes a quantised value that it is not known to take"
    raise RefusalError(rule, "use DynamicQuantizeLinear, MatMulInteger, Cast and Mul as onnxruntime writes them")


def real_weight(call: Call, weight: Weight, scale: np.ndarray, zero: np.ndarray, axis: int = -1) -> torch.Tensor:
    """The weight, (values - zero) * scale with one scale or one for each element of an axis, as a float32 parameter."""
    shape = [1] * len(weight.shape)
    if scale.size > 1:
        if not -len(shape) <= axis < len(shape) or weight.shape[axis] != scale.size or zero.size not in (1, scale.size):
            raise RefusalError(f"it has {scale.size} scales for {list(weight.shape)}", "quantise the weights again")
        shape[axis] = -1

    def by_axis(values: np.ndarray) -> np.ndarray:
        return values.reshape(shape) if values.size > 1 else values.reshape(())

    def make() -> np.ndarray:
        stored = call.reader.values_of(weight).astype(np.int32) - by_axis(zero).astype(np.int32)
        return np.asarray(stored.astype(np.float32) * by_axis(scale).astype(np.float32))

    return call.reader.tensor_of(call.reader.derived(weight, "real", weight.shape, make, torch.float32))


Result: TypeAlias = Value | Sequence[Value]
Rule: TypeAlias = Callable[[Call], Result]

RULES: dict[tuple[str, str], Rule] = {}
"""What carries out each operator, by operator set and name."""


def rule(*names: str, domain: str = "") -> Callable[[Rule], Rule]:
    """Register the function below as the rule of the operators `names`."""

    def register(function: Rule) -> Rule:
        RULES.update({(domain, name): function for name in names})
        return function

    return register
