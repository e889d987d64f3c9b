"""What the names of an ONNX graph stand for while it is read: constants, sizes, uniform tensors, weights, tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

Size: TypeAlias = int | torch.SymInt
"""A number that may depend on how many tokens there are."""

LARGEST = 1 << 31
"""No tensor of more elements than this is made while a graph is read."""


class RefusalError(Exception):
    """An operation cannot be imported: the reason and the remedy, as in problems.Problem."""

    def __init__(self, reason: str, remedy: str) -> None:
        """Remember both."""
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy


@dataclass(frozen=True)
class Sizes:
    """An integer vector, or a scalar, of which at least one element depends on the number of tokens."""

    items: tuple[Size, ...]
    scalar: bool = False


@dataclass(frozen=True)
class Filled:
    """A tensor with one value everywhere: a mask of ones and whatever is computed from it element by element."""

    shape: tuple[Size, ...]
    value: float | int | bool
    dtype: torch.dtype

    def tensor(self, device: torch.device) -> torch.Tensor:
        """The tensor itself."""
        return torch.full(self.shape, self.value, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class Weight:
    """An initialiser that stays a parameter: its name in the file, its shape and the type of its elements."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Moved:
    """A quantised initialiser after operations that only move elements, to be repeated on its real values."""

    weight: Weight
    moves: tuple[Callable[[torch.Tensor], torch.Tensor], ...]


@dataclass(frozen=True)
class RealWeight:
    """A dequantised matrix, still in integers: (values - zero) * scale; several scales go along `axis` of values."""

    weight: Weight
    scale: np.ndarray
    zero: np.ndarray
    axis: int = 1
    transposed: bool = False


@dataclass(frozen=True)
class Quantised:
    """What DynamicQuantizeLinear makes of `x`: `part` is values, scale or zero."""

    x: torch.Tensor
    part: str


@dataclass(frozen=True)
class Product:
    """The integer product of a quantised activation and a quantised weight, before its scales are applied."""

    x: torch.Tensor
    weight: Weight
    zero: np.ndarray
    scale: np.ndarray | None = None


@dataclass(frozen=True)
class ScaleProduct:
    """The scale of a quantised activation times the scale of a weight."""

    x: torch.Tensor
    scale: np.ndarray


@dataclass(frozen=True)
class Absent:
    """The result of an operation that was refused."""


Value: TypeAlias = (
    np.ndarray
    | torch.Tensor
    | Sizes
    | Filled
    | Weight
    | Moved
    | RealWeight
    | Quantised
    | Product
    | ScaleProduct
    | Absent
    | None
)
"""What a name may stand for; None is an optional input left out."""


def same(a: Size, b: Size) -> bool:
    """Whether two sizes are known to be equal, without asking torch to assume so."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    left = a if isinstance(a, int) else a.node.expr
    right = b if isinstance(b, int) else b.node.expr
    return bool(left == right)


def same_shape(a: Sequence[Size], b: Sequence[Size]) -> bool:
    """Whether two shapes are known to be equal."""
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def broadcast(a: Sequence[Size], b: Sequence[Size]) -> tuple[Size, ...]:
    """The shape of an element-wise operation on both; raises RefusalError if they do not go together."""
    rank = max(len(a), len(b))
    left = (*[1] * (rank - len(a)), *a)
    right = (*[1] * (rank - len(b)), *b)
    shape = []
    for x, y in zip(left, right, strict=True):
        if not same(x, y) and not same(x, 1) and not same(y, 1):
            raise RefusalError(f"shapes {show(a)} and {show(b)} do not go together", "export the model again")
        shape.append(y if same(x, 1) else x)
    return tuple(shape)


def show(shape: Sequence[Size]) -> str:
    """A shape for a message."""
    return f"[{', '.join(str(s) for s in shape)}]"


def sizes(items: Sequence[Size], scalar: bool = False) -> np.ndarray | Sizes:
    """An integer vector or scalar: constant if every element is."""
    concrete = [s for s in items if isinstance(s, int)]
    if len(concrete) == len(items):
        array = np.array(concrete, np.int64)
        return array.reshape(()) if scalar else array
    return Sizes(tuple(items), scalar)


def as_items(value: Value) -> tuple[tuple[Size, ...], bool] | None:
    """The elements of an integer scalar or vector and whether it is a scalar, if it is one."""
    if isinstance(value, Sizes):
        return value.items, value.scalar
    if isinstance(value, np.ndarray) and value.ndim <= 1 and value.dtype.kind in "iub":
        return tuple(int(v) for v in value.reshape(-1)), value.ndim == 0
    return None


def uniform(value: Value) -> Filled | None:
    """The value as a uniform tensor, if it is one: a constant of one element is."""
    if isinstance(value, Filled):
        return value
    if isinstance(value, np.ndarray) and value.size == 1:
        return Filled(tuple(value.shape), value.reshape(-1)[0].item(), torch_dtype(value.dtype))
    return None


def require_possible(shape: Sequence[Size]) -> None:
    """Raise RefusalError for a tensor that is too large to be meant."""
    known = math.prod(s for s in shape if isinstance(s, int))
    if known > LARGEST or any(isinstance(s, int) and s < 0 for s in shape):
        raise RefusalError(f"it makes a tensor of {show(shape)}", "no model needs that; export it again")


def torch_dtype(dtype: np.dtype) -> torch.dtype:
    """The type in which a constant's elements are computed: one of float32, int64, bool, int8 and uint8."""
    if dtype.kind == "f" or dtype.name == "bfloat16":
        return torch.float32
    if dtype.kind == "b":
        return torch.bool
    if dtype == np.int8:
        return torch.int8
    if dtype == np.uint8:
        return torch.uint8
    if dtype.kind in "iu":
        return torch.int64
    raise RefusalError(f"it has elements of type {dtype}", "export the model in float32")
