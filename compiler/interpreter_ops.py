"""What each operation of a step or an encoder computes, in torch: functions of one vector [D] or of rows [S, D]."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch.nn import functional
from xdsl.dialects.builtin import SymbolRefAttr
from xdsl.ir import Operation

from typebar.compiler import ir
from typebar.compiler.passes.activations import FUNCTIONS
from typebar.compiler.passes.attention import MASKED
from typebar.isa.errors import TypebarError

WeightLookup = Callable[[str], torch.Tensor]
"""Gives a parameter's values by its name; called once for every use of a name."""

Function = Callable[..., torch.Tensor]

_FIRST_CAPACITY = 128


class Weights:
    """Tensors by the symbols of one layer, each converted and moved once."""

    def __init__(self, lookup: WeightLookup, dtype: torch.dtype, device: torch.device) -> None:
        """Load nothing yet; `dtype` and `device` are what the tensors become."""
        self.dtype, self.device = dtype, device
        self._lookup = lookup
        self._made: dict[Hashable, torch.Tensor] = {}
        self.layer = (0, 0)

    def name(self, reference: SymbolRefAttr) -> str:
        """What a symbol means in the present `layer`, (start, l)."""
        return ir.layer_name(ir.text(reference), *self.layer)

    def load(self, reference: SymbolRefAttr, shape: Sequence[int | None]) -> torch.Tensor:
        """A tensor as floating point; None stands for any size in `shape`."""
        return self._once(reference, shape, "plain", lambda found: found.to(device=self.device, dtype=self.dtype))

    def load_optional(self, reference: SymbolRefAttr | None, shape: Sequence[int | None]) -> torch.Tensor | None:
        """The same, or None for no symbol."""
        return None if reference is None else self.load(reference, shape)

    def load_scaled(self, op: ir.LinearOp, shape: Sequence[int], axis: int) -> torch.Tensor:
        """An int8 weight times the scales of its columns, which lie along `axis`."""
        assert op.scale is not None
        scale = self.load(op.scale, [ir.width(op.out)])
        spread = scale if axis == 1 else scale[:, None]
        use = self.name(op.scale)
        return self._once(op.weight, shape, use, lambda w: w.to(device=self.device, dtype=self.dtype) * spread)

    def load_bias(self, reference: SymbolRefAttr, shape: Sequence[int | None]) -> torch.Tensor:
        """A table of score biases; entries that mask become minus infinity before they are rounded."""

        def exact(found: torch.Tensor) -> torch.Tensor:
            return found.masked_fill(found <= MASKED, -torch.inf).to(device=self.device, dtype=self.dtype)

        return self._once(reference, shape, "bias", exact)

    def _once(
        self,
        reference: SymbolRefAttr,
        shape: Sequence[int | None],
        use: str,
        convert: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        name = self.name(reference)
        if (name, use) not in self._made:
            self._made[name, use] = convert(self._lookup(name))
        found = self._made[name, use]
        if len(found.shape) != len(shape) or any(s not in (None, f) for s, f in zip(shape, found.shape, strict=True)):
            raise TypebarError(f"weight {name!r} is {list(found.shape)}, the graph needs {list(shape)}")
        return found


class _Heads:
    """The head counts, scale and biases of an attention operation."""

    def __init__(self, op: ir.AttentionOp | ir.CrossAttentionOp) -> None:
        self.kv_heads, self.size = op.kv_heads.value.data, op.head_dim.value.data
        self.heads = op.heads.value.data
        self.group = self.heads // self.kv_heads
        self.scale = op.scale.value.data

    def queries(self, q: torch.Tensor) -> torch.Tensor:
        """[heads * size] as [kv_heads, group, size]."""
        return q.view(self.kv_heads, self.group, self.size)

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """[S, kv_heads * size] as [kv_heads, S, size]."""
        return x.view(len(x), self.kv_heads, self.size).transpose(0, 1)

    def planes(self, bias: torch.Tensor) -> torch.Tensor:
        """[planes, ...] as [kv_heads, group, ...], or [1, 1, ...] if all heads share one plane."""
        outer = (1, 1) if len(bias) == 1 else (self.kv_heads, self.group)
        return bias.view(*outer, *bias.shape[1:])


class _Biased(_Heads):
    """An attention operation with a mask and perhaps a bias, over at most `context` positions."""

    def __init__(self, op: ir.AttentionOp, weights: Weights, context: int, relative: int) -> None:
        super().__init__(op)
        self.context = context
        self.window = op.window.value.data if op.window is not None else context
        self.mask = op.mask.data if op.mask is not None else "causal"
        self.kind = op.bias_kind.data if op.bias_kind is not None else None
        if op.bias is None or self.kind is None:
            return
        sizes = {"relative": [relative], "column": [context], "table": [context, context]}[self.kind]
        self.bias = weights.load_bias(op.bias, [None, *sizes])
        if len(self.bias) not in (1, self.heads):
            name = weights.name(op.bias)
            raise TypebarError(f"bias {name!r} has {len(self.bias)} planes; it needs one, or one for each head")


class StepAttention(_Biased):
    """One attention operation of one layer, with its cache [kv_heads, positions, head_dim], which grows as needed."""

    def __init__(self, op: ir.AttentionOp, weights: Weights, context: int) -> None:
        """Make an empty cache."""
        super().__init__(op, weights, context, context)
        self.rounds = op.kv_format is not None
        shape = (2, self.kv_heads, min(_FIRST_CAPACITY, context), self.size)
        self.cache = torch.zeros(shape, dtype=weights.dtype, device=weights.device)
        self.position = 0

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """softmax(scale * q K^T + bias) V over the positions up to this one, within the window."""
        end = self.position + 1
        if end > self.cache.shape[2]:
            self._grow(end)
        for side, x in enumerate((k, v)):
            stored = x.round().clamp(-128, 127) if self.rounds else x
            self.cache[side, :, self.position] = stored.view(self.kv_heads, self.size)
        begin = max(0, end - self.window)
        keys, values = self.cache[:, :, begin:end]
        scores = self.queries(q) @ keys.transpose(1, 2) * self.scale
        match self.kind:
            case "relative":
                scores = scores + self.planes(self.bias[:, : end - begin].flip(1))
            case "column":
                scores = scores + self.planes(self.bias[:, begin:end])
            case "table":
                scores = scores + self.planes(self.bias[:, self.position, begin:end])
        return (torch.softmax(scores, dim=-1) @ values).reshape(-1)

    def _grow(self, needed: int) -> None:
        kept = self.cache
        capacity = min(self.context, max(needed, 2 * kept.shape[2]))
        self.cache = kept.new_zeros((2, self.kv_heads, capacity, self.size))
        self.cache[:, :, : kept.shape[2]] = kept


class SourceAttention(_Biased):
    """One attention operation of an encoder: every position of the source text at once."""

    def __init__(self, op: ir.AttentionOp, weights: Weights, context: int) -> None:
        """Load the bias, if there is one."""
        super().__init__(op, weights, context, 2 * context - 1)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """softmax(scale * Q K^T + bias) V, rows [S, heads * head_dim] from rows."""
        count = len(q)
        queries = q.view(count, self.kv_heads, self.group, self.size).permute(1, 2, 0, 3)
        keys, values = self.rows(k)[:, None], self.rows(v)[:, None]
        scores = queries @ keys.transpose(2, 3) * self.scale
        places = torch.arange(count, device=q.device)
        apart = places[None, :] - places[:, None]
        match self.kind:
            case "relative":
                scores = scores + self.planes(self.bias[:, apart + self.context - 1])
            case "column":
                scores = scores + self.planes(self.bias[:, None, :count])
            case "table":
                scores = scores + self.planes(self.bias[:, :count, :count])
        if self.mask != "none":
            scores = scores.masked_fill((apart > 0) | (apart <= -self.window), -torch.inf)
        mixed = torch.softmax(scores, dim=-1) @ values
        return mixed.permute(2, 0, 1, 3).reshape(count, -1)


class CrossAttention(_Heads):
    """One cross-attention of one layer: K and V are rows, one for each position of the source text."""

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """softmax(scale * q K^T) V for q [heads * head_dim], k and v [S, kv_heads * head_dim]."""
        scores = self.queries(q) @ self.rows(k).transpose(1, 2) * self.scale
        return (torch.softmax(scores, dim=-1) @ self.rows(v)).reshape(-1)


def function_of(op: Operation, weights: Weights) -> Function:
    """What an operation other than attention computes; raises TypebarError for one that may not stand here."""
    match op:
        case ir.AddOp():
            return lambda a, b: a + b
        case ir.MulOp():
            return lambda a, b: a * b
        case ir.ScaleOp():
            value = op.value.value.data
            return lambda x: x * value
        case ir.SliceOp():
            return _slice(op)
        case ir.ActivationOp():
            return FUNCTIONS[op.kind.data]
        case ir.ParameterOp():
            vector = weights.load(op.source, [ir.width(op.out)])
            return lambda: vector
        case ir.EmbeddingOp():
            table = weights.load(op.weight, (None, ir.width(op.out)))
            offset = op.offset.value.data
            return lambda index: table[index + offset]
        case ir.RotaryOp():
            return _rotary(op, weights)
        case ir.LinearOp():
            return _linear(op, weights)
        case ir.LayerNormOp() | ir.RmsNormOp():
            return _norm(op, weights)
    raise TypebarError(f"{op.name} cannot stand in a step; verify the module")


def _slice(op: ir.SliceOp) -> Function:
    start, size = op.start.value.data, op.size.value.data
    run, stride = op.runs
    if run == size:
        return lambda x: x[..., start : start + size]
    return lambda x: x[..., start:].unfold(-1, run, stride)[..., : size // run, :].flatten(-2)


def _linear(op: ir.LinearOp, weights: Weights) -> Function:
    outputs, inputs = ir.width(op.out), ir.width(op.x)
    transposed = op.layout.data == "in_out"
    shape = (inputs, outputs) if transposed else (outputs, inputs)
    apart = op.scale is not None and weights.dtype != torch.float16  # which cannot hold sums of integers
    plain = op.scale is None or apart
    stored = weights.load(op.weight, shape) if plain else weights.load_scaled(op, shape, int(transposed))
    bias = weights.load_optional(op.bias, (outputs,))
    weight = stored.t() if transposed else stored
    if not apart:
        return lambda x: functional.linear(x, weight, bias)
    scale = weights.load_optional(op.scale, (outputs,))
    if bias is None:
        return lambda x: functional.linear(x, weight) * scale
    return lambda x: functional.linear(x, weight) * scale + bias


def _norm(op: ir.LayerNormOp | ir.RmsNormOp, weights: Weights) -> Function:
    shape = [ir.width(op.x)]
    weight, eps = weights.load_optional(op.weight, shape), op.eps.value.data
    if isinstance(op, ir.RmsNormOp):
        return lambda x: functional.rms_norm(x, shape, weight, eps)
    bias = weights.load_optional(op.bias, shape)
    return lambda x: functional.layer_norm(x, shape, weight, bias, eps)


def _rotary(op: ir.RotaryOp, weights: Weights) -> Function:
    heads, size, turned = op.heads.value.data, op.head_dim.value.data, op.rotary_dim.value.data
    cosines, sines = (weights.load(table, (None, turned // 2)) for table in (op.cos, op.sin))
    halves = op.pairing.data == "half"

    def rotate(x: torch.Tensor, position: int | torch.Tensor) -> torch.Tensor:
        cos, sin = cosines[position].unsqueeze(-2), sines[position].unsqueeze(-2)
        split = x.unflatten(-1, (heads, size))
        pairs = split[..., :turned]
        a, b = pairs.chunk(2, -1) if halves else (pairs[..., 0::2], pairs[..., 1::2])
        rotated = (a * cos - b * sin, b * cos + a * sin)
        joined = torch.cat(rotated, -1) if halves else torch.stack(rotated, -1).flatten(-2)
        return torch.cat((joined, split[..., turned:]), -1).flatten(-2)

    return rotate
