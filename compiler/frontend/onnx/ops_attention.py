"""Attention and rotary positions as single operators: the standard set's from version 23 on, and onnxruntime's."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from typebar.compiler.frontend.onnx.calls import MICROSOFT, Call, Result, rule
from typebar.compiler.frontend.onnx.values import Filled, RefusalError, Value, same

_DECOMPOSE = "export the model without fusing attention"


def _heads(x: torch.Tensor, count: int) -> torch.Tensor:
    """[1, T, heads * size] as [1, heads, T, size]."""
    return x.reshape(x.shape[0], -1, count, x.shape[-1] // count).transpose(1, 2)


def _joined(x: torch.Tensor) -> torch.Tensor:
    """[1, heads, T, size] as [1, T, heads * size]."""
    return x.transpose(1, 2).reshape(x.shape[0], -1, x.shape[1] * x.shape[-1])


def _attend(
    call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Value, causal: bool, scale: float
) -> torch.Tensor:
    """Attention on [1, heads, T, size]; `mask` is boolean or added to the scores."""
    factor = scale or 1 / math.sqrt(q.shape[-1])
    if q.shape[1] != k.shape[1]:
        k, v = (_repeated(x, q.shape[1]) for x in (k, v))
    allowed = None
    if isinstance(mask, torch.Tensor):
        allowed = mask
        if causal:
            raise RefusalError("it has a mask and is causal besides", _DECOMPOSE)
    elif isinstance(mask, Filled) and mask.value not in (0.0, True):
        raise RefusalError("its mask hides everything", "export the model again")
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=causal, scale=factor)


def _repeated(x: torch.Tensor, heads: int) -> torch.Tensor:
    """K or V with each head repeated for its group of query heads."""
    batch, count, length, size = x.shape
    group = heads // count
    if count * group != heads:
        raise RefusalError(f"{count} K/V heads do not divide {heads} heads", "export the model again")
    return x[:, :, None].expand(batch, count, group, length, size).reshape(batch, heads, length, size)


def _empty(value: Value) -> bool:
    shape = getattr(value, "shape", ())
    return value is None or any(same(s, 0) for s in shape)


def _results(call: Call, out: Value, k: Value = None, v: Value = None) -> list[Value]:
    return [out, k, v, None][: len(call.node.output)]


@rule("Attention")
def standard_attention(call: Call) -> Result:
    """The standard operator: 3-D inputs hold all heads in a row, 4-D ones are split already."""
    if call.real("softcap", 0.0):
        raise RefusalError("it caps the scores", "there is no such operation on the machine")
    if not (_empty(call.value(4)) and _empty(call.value(5))):
        raise RefusalError("it reads a cache of a fixed length", "export it without past keys and values")
    q, k, v = (call.tensor(i) for i in range(3))
    flat = q.ndim == 3
    if flat:
        heads, kv_heads = call.integer("q_num_heads", 0), call.integer("kv_num_heads", 0)
        if heads < 1 or kv_heads < 1:
            raise RefusalError("it does not say how many heads there are", "export the model again")
        q, k, v = _heads(q, heads), _heads(k, kv_heads), _heads(v, kv_heads)
    causal = bool(call.integer("is_causal", 0))
    out = _attend(call, q, k, v, call.value(3), causal, call.real("scale", 0.0))
    return _results(call, _joined(out) if flat else out, k, v)


@rule("MultiHeadAttention", domain=MICROSOFT)
def multi_head_attention(call: Call) -> Result:
    """onnxruntime's: query, key and value [1, T, heads * size], one bias for all, an additive bias of the scores."""
    heads = call.integer("num_heads", 0)
    if heads < 1 or call.value(1) is None or call.value(2) is None:
        raise RefusalError("its query, key and value are packed in one tensor", _DECOMPOSE)
    if not _empty(call.value(6)) or not _empty(call.value(7)):
        raise RefusalError("it reads a cache of a fixed length", "export it without past keys and values")
    _require_all_ones(call, 4)
    q, k, v = (call.tensor(i) for i in range(3))
    if call.value(3) is not None:
        sizes = [x.shape[-1] if x.ndim == 3 else x.shape[1] * x.shape[-1] for x in (q, k, v)]
        biased = zip((q, k, v), torch.split(call.tensor(3), sizes), strict=True)
        q, k, v = (x + b if x.ndim == 3 else x + b.reshape(1, x.shape[1], 1, -1) for x, b in biased)
    q, k, v = (_heads(x, heads) if x.ndim == 3 else x for x in (q, k, v))
    causal = bool(call.integer("unidirectional", 0))
    out = _attend(call, q, k, v, call.value(5), causal, call.real("scale", 0.0))
    return _results(call, _joined(out), k, v)


def _require_all_ones(call: Call, index: int) -> None:
    """Refuse a padding mask that is not the mask of a text without padding."""
    mask = call.value(index)
    if mask is not None and not (isinstance(mask, Filled) and mask.value == 1):
        raise RefusalError("its padding mask is not the model's attention mask", _DECOMPOSE)


@rule("Attention", domain=MICROSOFT)
def packed_attention(call: Call) -> Result:
    """onnxruntime's: the projection [in, 3 * width] of q, k and v inside."""
    heads = call.integer("num_heads", 0)
    if heads < 1 or call.integer("do_rotary", 0) or not _empty(call.value(4)):
        raise RefusalError("it rotates positions or reads a cache of a fixed length", _DECOMPOSE)
    mask = call.value(3)
    if mask is not None and not isinstance(mask, Filled):
        raise RefusalError("its padding mask is not the model's attention mask", _DECOMPOSE)
    packed = torch.matmul(call.tensor(0), call.tensor(1))
    if call.value(2) is not None:
        packed = packed + call.tensor(2)
    given = call.integers("qkv_hidden_sizes")
    q, k, v = (_heads(x, heads) for x in torch.split(packed, given or packed.shape[-1] // 3, -1))
    causal = bool(call.integer("unidirectional", 0))
    out = _attend(call, q, k, v, call.value(5), causal, call.real("scale", 0.0))
    return _results(call, _joined(out))


@rule("GroupQueryAttention", domain=MICROSOFT)
def group_query_attention(call: Call) -> Result:
    """onnxruntime's, always causal: query heads share K/V heads; rotary positions and a window are optional."""
    heads, kv_heads = call.integer("num_heads", 0), call.integer("kv_num_heads", 0)
    if heads < 1 or kv_heads < 1 or call.real("softcap", 0.0) or call.integer("smooth_softmax", 0):
        raise RefusalError("it caps scores or does not say how many heads there are", _DECOMPOSE)
    if not _empty(call.value(3)) or not _empty(call.value(4)):
        raise RefusalError("it reads a cache of a fixed length", "export it without past keys and values")
    q = call.tensor(0)
    if call.value(1) is None:
        size = q.shape[-1] // (heads + 2 * kv_heads)
        q, k, v = torch.split(q, [heads * size, kv_heads * size, kv_heads * size], -1)
    else:
        k, v = call.tensor(1), call.tensor(2)
    q, k, v = _heads(q, heads), _heads(k, kv_heads), _heads(v, kv_heads)
    if call.integer("do_rotary", 0):
        cos, sin = (call.tensor(i)[: q.shape[2]] for i in (7, 8))
        pairs = bool(call.integer("rotary_interleaved", 0))
        q, k = (_rotate(x, cos, sin, pairs) for x in (q, k))
    window, mask = call.integer("local_window_size", -1), None
    if window > 0:
        places = torch.arange(q.shape[2], device=call.reader.device)
        apart = places[:, None] - places[None, :]
        mask = (apart >= 0) & (apart < window)
    out = _attend(call, q, k, v, mask, mask is None, call.real("scale", 0.0))
    return _results(call, _joined(out), k, v)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotary positions on [1, heads, T, size] with tables [T, rotary / 2]."""
    turned = 2 * cos.shape[-1]
    head, rest = (x, None) if turned == x.shape[-1] else (x[..., :turned], x[..., turned:])
    if interleaved:
        cos, sin = (t.repeat_interleave(2, -1) for t in (cos, sin))
        other = torch.stack((-head[..., 1::2], head[..., ::2]), -1).flatten(-2)
    else:
        cos, sin = (torch.cat((t, t), -1) for t in (cos, sin))
        other = torch.cat((-head[..., turned // 2 :], head[..., : turned // 2]), -1)
    made = head * cos + other * sin
    return made if rest is None else torch.cat((made, rest), -1)


def _table_rows(call: Call, table: int, positions: int) -> torch.Tensor:
    """The rows of a table, [T, rotary / 2]; all tokens stand in one text, so the positions are one vector."""
    if call.value(positions) is None:
        return call.tensor(table).reshape(-1, call.tensor(table).shape[-1])
    return torch.embedding(call.tensor(table), call.tensor(positions).reshape(-1))


@rule("RotaryEmbedding")
def standard_rotary(call: Call) -> Result:
    """The standard operator: input, cos and sin tables, positions."""
    return _rotary(call, 1, 2, 3)


@rule("RotaryEmbedding", domain=MICROSOFT)
def rotary(call: Call) -> Result:
    """onnxruntime's: input, positions, cos and sin tables."""
    if call.real("scale", 1.0) != 1.0:
        raise RefusalError("it scales the positions", _DECOMPOSE)
    return _rotary(call, 2, 3, 1)


def _rotary(call: Call, cos: int, sin: int, positions: int) -> Result:
    x, heads = call.tensor(0), call.integer("num_heads", 0)
    flat = x.ndim == 3
    if flat:
        tables = call.tensor(cos).shape[-1] * 2
        heads = heads or x.shape[-1] // tables
        x = _heads(x, heads)
    cosines, sines = (_table_rows(call, i, positions) for i in (cos, sin))
    made = _rotate(x, cosines, sines, bool(call.integer("interleaved", 0)))
    return _joined(made) if flat else made
