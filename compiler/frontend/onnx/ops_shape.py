"""ONNX operators that make, read and change shapes, and those that move elements."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from typebar.compiler.frontend.onnx.calls import Call, Result, as_tensor, rule
from typebar.compiler.frontend.onnx.ops_math import rank_of, shape_of
from typebar.compiler.frontend.onnx.values import (
    Filled,
    Moved,
    Product,
    RealWeight,
    RefusalError,
    Size,
    Sizes,
    Value,
    Weight,
    as_items,
    require_possible,
    same,
    same_shape,
    sizes,
    torch_dtype,
)

_FAR = 2**31 - 1


@rule("Shape")
def shape(call: Call) -> Result:
    """The sizes of a value's axes, or of some of them."""
    value = call.required(0)
    if isinstance(value, Product | RealWeight | Moved):
        raise RefusalError("it takes the shape of a quantised value", "take the shape of what was quantised")
    found = shape_of(value)
    begin, end = call.integer("start", 0), call.integer("end", len(found))
    return sizes(found[slice(begin, end)])


@rule("Size")
def size(call: Call) -> Result:
    """The number of a value's elements."""
    count: Size = 1
    for s in shape_of(call.required(0)):
        count = count * s
    return sizes([count], True)


@rule("Range")
def arange(call: Call) -> Result:
    """start, start + step, ... below the limit."""
    numbers = [call.numbers(i) for i in range(3)]
    if any(n is None or len(n) != 1 for n in numbers):
        raise RefusalError("Range needs three numbers", "export the model again")
    start, limit, step = (n[0] for n in numbers if n is not None)
    return torch.arange(start, limit, step, dtype=torch.int64, device=call.reader.device)


@rule("ConstantOfShape")
def constant_of_shape(call: Call) -> Result:
    """One value everywhere."""
    target = call.numbers(0) or ()
    require_possible(target)
    attribute = call.attributes.get("value")
    array = call.reader.attribute_array(attribute) if attribute is not None else np.zeros(1, np.float32)
    value, dtype = array.reshape(-1)[0].item(), torch_dtype(array.dtype)
    return Filled(tuple(target), value, dtype)


def _moving(call: Call, move: Callable[[torch.Tensor], torch.Tensor]) -> Value:
    """Apply a movement of elements to any value; uniform tensors stay so, and quantised weights move when real."""
    value = call.required(0)
    if isinstance(value, Filled):
        return Filled(tuple(move(value.tensor(call.reader.device)).shape), value.value, value.dtype)
    if isinstance(value, Weight) and value.dtype in (torch.int8, torch.uint8):
        return Moved(value, (move,))
    if isinstance(value, Moved):
        return Moved(value.weight, (*value.moves, move))
    return move(call.tensor(0))


@rule("Reshape")
def reshape(call: Call) -> Result:
    """Another shape for the same elements: 0 copies an axis and -1 is worked out."""
    target, value = call.numbers(1), call.required(0)
    if target is None:
        raise RefusalError("Reshape lacks its shape", "export the model again")
    items = as_items(value) if isinstance(value, Sizes) else None
    if items is not None:
        if len(target) <= 1 and all(same(t, -1) or same(t, len(items[0])) for t in target):
            return sizes(items[0], not target)
        raise RefusalError("it reshapes a shape", "export the model again")
    source = shape_of(value)
    if not call.integer("allowzero", 0):
        target = tuple(source[i] if same(t, 0) and i < len(source) else t for i, t in enumerate(target))
    require_possible([t for t in target if not same(t, -1)])
    general = call.reader.generalised(source, target)
    if (swapped := _swapped_by_reshaping(call, general)) is not None:
        return swapped
    wanted = _without_unknown(source, general)
    return _moving(call, lambda x: x if same_shape(x.shape, wanted) else x.reshape(wanted))


def _without_unknown(source: Sequence[Size], target: Sequence[Size]) -> Sequence[Size]:
    """The target, its -1 resolved where the shape does not change."""
    pairs = list(zip(source, target, strict=False))
    unknown = sum(same(t, -1) for t in target)
    unchanged = len(source) == len(target) and unknown <= 1 and all(same(t, -1) or same(s, t) for s, t in pairs)
    return source if unchanged else target


def _swapped_by_reshaping(call: Call, target: Sequence[Size]) -> Value:
    """Keys transposed as exporters write it: leading axes joined, the last two swapped, leading axes restored.

    That is x.reshape(leading axes, T, size).transpose(-2, -1), in which the heads can be seen.
    """
    turn = call.maker(0)
    join = turn.maker(0) if turn is not None and turn.node.op_type == "Transpose" else None
    if turn is None or join is None or join.node.op_type != "Reshape" or turn.integers("perm") != [0, 2, 1]:
        return None
    x, joined, turned = join.value(0), turn.value(0), call.value(0)
    if not (isinstance(x, torch.Tensor) and isinstance(joined, torch.Tensor) and isinstance(turned, torch.Tensor)):
        return None
    rows, columns = joined.shape[-2:]
    if len(target) < 3 or not same(target[-2], columns) or not (same(target[-1], rows) or same(target[-1], -1)):
        return None
    if any(same(t, -1) for t in target[:-2]) or not same_shape(x.shape[-2:], (rows, columns)):
        return None
    wanted = (*target[:-2], rows, columns)
    plain = x if same_shape(x.shape, wanted) else x.reshape(wanted)
    return plain.transpose(-2, -1)


@rule("Flatten")
def flatten(call: Call) -> Result:
    """Two axes: those before `axis` and those from it on."""
    axis = call.integer("axis", 1)

    def move(x: torch.Tensor) -> torch.Tensor:
        rows: Size = 1
        for s in x.shape[: axis % x.ndim if axis < 0 else axis]:
            rows = rows * s
        return x.reshape(rows, -1) if not same(rows, 0) else x.reshape(rows, 1)

    return _moving(call, move)


@rule("Transpose")
def transpose(call: Call) -> Result:
    """Axes in another order."""
    value = call.required(0)
    order = call.integers("perm") or list(range(rank_of(value)))[::-1]
    if isinstance(value, RealWeight) and order == [1, 0]:
        return replace(value, transposed=not value.transposed)
    if len(order) == 2 and sorted(order) == [0, 1] and rank_of(value) == 2:
        return _moving(call, lambda x: x.t() if order == [1, 0] else x)
    if order == [0, 2, 3, 1]:  # keys, [1, T, heads, size], as the product with the queries needs them
        return _moving(call, lambda x: x.permute(0, 2, 1, 3).transpose(2, 3))
    return _moving(call, lambda x: x.permute(order))


def _with_axes(count: int, rank: int, axes: Sequence[int]) -> list[int]:
    found = sorted(a % count if -count <= a < count else count for a in axes)
    if any(a >= count for a in found) or len(set(found)) != len(found):
        raise RefusalError(f"axes {list(axes)} do not fit {rank} axes", "export the model again")
    return found


@rule("Unsqueeze")
def unsqueeze(call: Call) -> Result:
    """Axes of size one, put in."""
    value, axes = call.required(0), call.axes(1) or []
    if isinstance(value, Sizes) and value.scalar and axes in ([0], [-1]):
        return sizes(value.items)
    rank = rank_of(value) + len(axes)

    def move(x: torch.Tensor) -> torch.Tensor:
        for axis in _with_axes(x.ndim + len(axes), x.ndim, axes):
            x = x.unsqueeze(axis)
        return x

    _with_axes(max(rank, 1), rank_of(value), axes if not isinstance(value, Moved) else [])
    return _moving(call, move)


@rule("Squeeze")
def squeeze(call: Call) -> Result:
    """Axes of size one, taken out."""
    value, axes = call.required(0), call.axes(1)
    if isinstance(value, Sizes):
        if value.scalar or len(value.items) != 1:
            raise RefusalError("it takes an axis out of a shape", "export the model again")
        return sizes(value.items, True)

    def move(x: torch.Tensor) -> torch.Tensor:
        chosen = axes if axes is not None else [i for i, s in enumerate(x.shape) if same(s, 1)]
        for axis in reversed(_with_axes(x.ndim, x.ndim, chosen)):
            if not same(x.shape[axis], 1):
                raise RefusalError(f"axis {axis} of {tuple(x.shape)} has more than one element", "mend the graph")
            x = x.squeeze(axis)
        return x

    return _moving(call, move)


@rule("Expand")
def expand(call: Call) -> Result:
    """Axes of size one repeated, both ways round."""
    target, source = call.numbers(1) or (), shape_of(call.required(0))
    require_possible(target)
    rank = max(len(source), len(target))
    left, right = ((*[1] * (rank - len(s)), *s) for s in (source, call.reader.generalised(source, target)))
    wanted = [b if same(a, 1) else a for a, b in zip(left, right, strict=True)]
    for a, b in zip(left, right, strict=True):
        if not same(a, 1) and not same(b, 1) and not same(a, b):
            raise RefusalError(f"{tuple(source)} does not expand to {tuple(target)}", "export the model again")
    if same_shape(source, wanted):
        return call.required(0)
    return _moving(call, lambda x: x.expand(wanted))


@rule("Tile")
def tile(call: Call) -> Result:
    """Everything repeated along each axis."""
    counts = call.fixed(1) or []
    require_possible(counts)
    require_possible([s * c for s, c in zip(shape_of(call.required(0)), counts, strict=False)])
    return _moving(call, lambda x: x.repeat(counts))


@rule("Concat")
def concat(call: Call) -> Result:
    """Values one after the other along an axis; empty ones, such as a cache without positions, are left out."""
    axis = call.integer("axis", 0)
    parts = [as_items(v) for v in call.inputs]
    if all(p is not None and not p[1] for p in parts) and any(isinstance(v, Sizes) for v in call.inputs):
        return sizes([item for p in parts if p is not None for item in p[0]])
    full = [i for i, v in enumerate(call.inputs) if not _empty(v)] or [0]
    if len(full) == 1:
        return call.required(full[0])
    values = [call.required(i) for i in full]
    uniform = [v for v in values if isinstance(v, Filled)]
    if len(uniform) == len(values) and len({v.value for v in uniform}) == 1:
        joined = torch.cat([v.tensor(call.reader.device) for v in uniform], axis)
        return Filled(tuple(joined.shape), uniform[0].value, uniform[0].dtype)
    return torch.cat([call.tensor(i) for i in full], axis)


def _empty(value: Value) -> bool:
    return not isinstance(value, Moved | Product | RealWeight) and any(same(s, 0) for s in shape_of(value))


@rule("Split")
def split(call: Call) -> Result:
    """Parts along an axis: of the sizes given, else as equal as can be."""
    axis, given = call.integer("axis", 0), call.integers("split") or call.fixed(1)
    value, count = call.required(0), len(call.node.output)
    if isinstance(value, Sizes):
        given = given or [math.ceil(len(value.items) / count)] * count
        starts = np.cumsum([0, *given])
        return [sizes(value.items[a : a + n]) for a, n in zip(starts, given, strict=False)]
    x = call.tensor(0)
    if given is None:
        length = x.shape[axis]
        if not isinstance(length, int):
            raise RefusalError("it splits the axis of the tokens", "a model must treat every position alike")
        each = -(-length // call.integer("num_outputs", count))
        given = [min(each, length - i * each) for i in range(count)]
    if any(n < 0 for n in given):
        raise RefusalError(f"it splits into parts of {given}", "export the model again")
    return list(torch.split(x, given, axis))


@rule("Slice")
def cut(call: Call) -> Result:
    """A range of each axis; starts and ends may depend on the number of tokens."""
    value = call.required(0)
    if call.opset < 10:
        starts, ends, axes = call.integers("starts") or [], call.integers("ends") or [], call.integers("axes")
        steps: Sequence[Size] = [1] * len(starts)
    else:
        starts, ends = list(call.numbers(1) or ()), list(call.numbers(2) or ())
        axes, steps = call.fixed(3), call.numbers(4) or [1] * len(starts)
    axes = axes if axes is not None else list(range(len(starts)))
    if not len(starts) == len(ends) == len(axes) == len(steps):
        raise RefusalError("starts, ends, axes and steps of a Slice differ in number", "export the model again")
    if isinstance(value, Sizes):
        items = value.items[_python_slice(starts, ends, steps)] if not value.scalar and len(starts) == 1 else None
        if items is None:
            raise RefusalError("it slices a shape along several axes", "export the model again")
        return sizes(items)
    if isinstance(value, np.ndarray):
        value = call.tensor(0)
    plan = list(zip(axes, starts, ends, steps, strict=True))

    def move(x: torch.Tensor) -> torch.Tensor:
        for axis, start, end, step in plan:
            x = _cut_axis(x, axis, start, end, step)
        return x

    return _moving(call, move)


def _python_slice(starts: Sequence[Size], ends: Sequence[Size], steps: Sequence[Size]) -> slice:
    numbers = (starts[0], ends[0], steps[0])
    if any(not isinstance(n, int) for n in numbers) or steps[0] == 0:
        raise RefusalError("it slices a shape at a place that depends on the length", "export the model again")
    start, end, step = (int(n) for n in numbers)
    return slice(start, None if step < 0 and end < -_FAR else end, step)


def _cut_axis(x: torch.Tensor, axis: int, start: Size, end: Size, step: Size) -> torch.Tensor:
    length = x.shape[axis]
    if isinstance(step, int) and step < 0:
        if step == -1 and isinstance(end, int) and end < -_FAR and (same(start, -1) or _beyond(start, length)):
            return x.flip(axis)
        raise RefusalError("it slices backwards", "slice forwards")
    if isinstance(start, int) and start == 0 and _beyond(end, length) and same(step, 1):
        return x
    if isinstance(end, int) and end > _FAR:
        end = 2**63 - 1
    return torch.ops.aten.slice.Tensor(x, axis % x.ndim, start, end, step)


def _beyond(end: Size, length: Size) -> bool:
    return same(end, length) or (isinstance(end, int) and (end > _FAR or (isinstance(length, int) and end >= length)))


@rule("Gather")
def gather(call: Call) -> Result:
    """Rows of a table, or elements of a shape, by index."""
    value, axis = call.required(0), call.integer("axis", 0)
    if isinstance(value, Sizes):
        return _gather_sizes(value, call)
    index = call.required(1)
    if isinstance(index, np.ndarray) and index.size == 1 and index.ndim <= 1:
        place = int(index.reshape(-1)[0])
        if index.ndim == 0:
            return _moving(call, lambda x: x.select(axis, place))
        return _moving(call, lambda x: x.narrow(axis, place % _length(x, axis), 1))
    chosen = as_tensor(index, call, call.node.input[1])
    if chosen.is_floating_point():
        raise RefusalError("its indices are floating point", "index with whole numbers")

    def move(x: torch.Tensor) -> torch.Tensor:
        if axis % x.ndim == 0 and x.ndim == 2 and x.is_floating_point():
            return torch.embedding(x, chosen)
        rows = x.index_select(axis, chosen.reshape(-1))
        place = axis % x.ndim
        return rows.reshape(*x.shape[:place], *chosen.shape, *x.shape[place + 1 :])

    return _moving(call, move)


def _length(x: torch.Tensor, axis: int) -> Size:
    size: Size = x.shape[axis]
    return size


def _gather_sizes(value: Sizes, call: Call) -> Value:
    places = call.fixed(1) or []
    index = call.required(1)
    if value.scalar or any(not -len(value.items) <= p < len(value.items) for p in places):
        raise RefusalError(f"it takes axis {places} of a shape of {len(value.items)}", "export the model again")
    return sizes([value.items[p] for p in places], rank_of(index) == 0)


@rule("GatherElements")
def gather_elements(call: Call) -> Result:
    """Elements along an axis by an index of the same rank."""
    return torch.gather(call.tensor(0), call.integer("axis", 0), call.tensor(1))


@rule("GatherND")
def gather_nd(call: Call) -> Result:
    """Elements or slices by index vectors, which lie along the last axis of the indices."""
    x, index = call.tensor(0), call.tensor(1)
    depth = index.shape[-1]
    if call.integer("batch_dims", 0) or not isinstance(depth, int) or depth > x.ndim:
        raise RefusalError("GatherND has batch axes or too long an index", "export the model again")
    return torch.ops.aten.index.Tensor(x, [index.select(-1, i) for i in range(depth)])


@rule("ScatterND")
def scatter_nd(call: Call) -> Result:
    """A copy with elements or slices replaced, by index vectors along the last axis of the indices."""
    x, index, updates = call.tensor(0), call.tensor(1), call.tensor(2)
    depth = index.shape[-1]
    if call.text("reduction", "none") != "none" or not isinstance(depth, int) or depth > x.ndim:
        raise RefusalError("ScatterND adds up or has too long an index", "export the model again")
    return torch.ops.aten.index_put.default(x, [index.select(-1, i) for i in range(depth)], updates)


@rule("Pad")
def pad(call: Call) -> Result:
    """A constant around the edges."""
    if call.text("mode", "constant") != "constant" or call.value(3) is not None:
        raise RefusalError("it pads by reflection, repetition or along chosen axes", "pad with a constant")
    pads = call.numbers(1) or ()
    rank = len(pads) // 2
    fill = call.constant(2)
    flat = [p for axis in reversed(range(rank)) for p in (pads[axis], pads[axis + rank])]
    if all(same(p, 0) for p in flat):
        return call.required(0)
    return torch.nn.functional.pad(call.tensor(0), flat, value=0.0 if fill is None else fill.reshape(-1)[0].item())


@rule("Identity", "Dropout")
def identity(call: Call) -> Result:
    """The value itself: there is no dropout at inference."""
    training = call.constant(2) if call.node.op_type == "Dropout" else None
    if training is not None and bool(training.reshape(-1)[0]):
        raise RefusalError("it drops values out as in training", "export the model for inference")
    return [call.required(0), *[None] * (len(call.node.output) - 1)]
