"""A small model with an encoder as the compiler's text, its random weights, and its values by plain formulas."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from typebar.compiler.frontend import FrontendModel
from typebar.compiler.pipeline import parse

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Shape:
    """Sizes and options.

    `carried`: the decoder's loop carries the memory; `apart`: as many of the encoder's layers stand before the loop of
    the others; `fused`: K and V of cross-attention are slices of one product; `biased`: linear operations have biases.
    """

    width: int = 24
    heads: int = 3
    head: int = 8
    hidden: int = 40
    vocab: int = 50
    source: int = 32
    context: int = 16
    layers: tuple[int, int] = (2, 2)
    relative: bool = True
    gated: bool = False
    carried: bool = False
    apart: int = 0
    fused: bool = False
    biased: bool = False

    @property
    def inner(self) -> int:
        """Words of all heads."""
        return self.heads * self.head


class Weights:
    """Random values that fp16 holds, by name; no two names share them."""

    def __init__(self, shape: Shape) -> None:
        """Weights for a shape."""
        self._shape = shape

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter."""
        s, last = self._shape, name.split(".")[-1]
        whole = {
            "shared": (s.vocab, s.width),
            "head": (s.vocab, s.width),
            "encoder.relative": (s.heads, 2 * s.source - 1),
            "decoder.relative": (s.heads, s.context),
        }
        if name in whole:
            return whole[name]
        part = {
            "norm": (s.width,),
            "q": (s.inner, s.width),
            "k": (s.inner, s.width),
            "v": (s.inner, s.width),
            "kv": (2 * s.inner, s.width),
            "o": (s.width, s.inner),
            "up": (s.hidden, s.width),
            "gate": (s.hidden, s.width),
            "down": (s.width, s.hidden),
        }
        return part[name.split(".")[-2]][:1] if last == "bias" else part[last]

    def load(self, name: str) -> NDArray[np.float32]:
        """Values of a parameter."""
        shape = self.shape(name)
        values = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
        if name.endswith(".norm"):
            values = 1 + 0.2 * values
        elif len(shape) == 2 and name != "shared" and "relative" not in name:
            values *= shape[1] ** -0.5
        return values.astype(np.float16).astype(np.float32)


class _Text:
    """Lines of a block."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self.lines, self.count = shape, list[str](), 0

    def op(self, name: str, operands: list[str], attributes: str, sizes: list[int], out: int) -> str:
        self.count += 1
        value, types = f"%v{self.count}", ", ".join(_vector(size) for size in sizes)
        self.lines.append(f"{value} = tb.{name}({', '.join(operands)}) {{{attributes}}} : ({types}) -> {_vector(out)}")
        return value

    def linear(self, x: str, name: str, size: int, out: int) -> str:
        bias = f', bias = @"{name}.bias"' if self.shape.biased else ""
        return self.op("linear", [x], f'weight = @"{name}", layout = "out_in"{bias}', [size], out)

    def norm(self, x: str, name: str) -> str:
        width = self.shape.width
        return self.op("rms_norm", [x], f'weight = @"{name}.norm", eps = 1.0e-06 : f32', [width], width)

    def add(self, a: str, b: str) -> str:
        width = self.shape.width
        return self.op("add", [a, b], "", [width, width], width)

    def attention(self, x: str, other: str, name: str, extra: str) -> str:
        s = self.shape
        q = self.linear(x, f"{name}.q", s.width, s.inner)
        if s.fused and x != other:
            both = self.linear(other, f"{name}.kv", s.width, 2 * s.inner)
            k, v = (
                self.op("slice", [both], f"start = {at}, size = {s.inner}", [2 * s.inner], s.inner)
                for at in (0, s.inner)
            )
        else:
            k, v = (self.linear(other, f"{name}.{part}", s.width, s.inner) for part in "kv")
        kind = "attention" if x == other else "cross_attention"
        numbers = f"heads = {s.heads}, kv_heads = {s.heads}, head_dim = {s.head}, scale = 0.5 : f32"
        made = self.op(kind, [q, k, v], numbers + extra, [s.inner] * 3, s.inner)
        return self.linear(made, f"{name}.o", s.inner, s.width)

    def layer(self, x: str, name: str, extra: str, memory: str | None) -> str:
        s = self.shape
        normed = self.norm(x, f"{name}.own")
        x = self.add(x, self.attention(normed, normed, f"{name}.own", extra))
        if memory is not None:
            x = self.add(x, self.attention(self.norm(x, f"{name}.cross"), memory, f"{name}.cross", ""))
        normed = self.norm(x, f"{name}.feed")
        up = self.linear(normed, f"{name}.feed.up", s.width, s.hidden)
        kind = "gelu_tanh" if s.gated else "relu"
        up = self.op("activation", [up], f'kind = "{kind}"', [s.hidden], s.hidden)
        if s.gated:
            gate = self.linear(normed, f"{name}.feed.gate", s.width, s.hidden)
            up = self.op("mul", [up, gate], "", [s.hidden] * 2, s.hidden)
        return self.add(x, self.linear(up, f"{name}.feed.down", s.hidden, s.width))

    def loop(self, x: str, name: str, count: int, start: int, extra: str, memory: str | None) -> str:
        """Layers `start` to `start` + `count`; with `carried` the memory goes through the loop as well."""
        width, carried = _vector(self.shape.width), self.shape.carried and memory is not None
        inits, args = ([x, str(memory)], ["%x", "%carried"]) if carried else ([x], ["%x"])
        outs = [f"%l{self.count}", f"%m{self.count}"][: len(args)]
        numbers = f"attributes {{count = {count}, start = {start}}}"
        self.lines.append(f"{', '.join(outs)} = tb.repeat({', '.join(inits)}) {numbers} {{")
        self.lines.append(f"^layer({', '.join(f'{arg} : {width}' for arg in args)}):")
        args[0] = self.layer("%x", name, extra, args[1] if carried else memory)
        types = ", ".join([width] * len(args))
        self.lines.append(f"tb.yield({', '.join(args)}) : {types}")
        self.lines.append(f"}} : ({types}) -> ({types})")
        return outs[0]


def _vector(size: int) -> str:
    return f"tensor<{size}xf32>"


def _half(shape: Shape, encoder: bool) -> str:
    text, width = _Text(shape), _vector(shape.width)
    name, context = ("encoder", shape.source) if encoder else ("step", shape.context)
    side, layers = ("encoder", shape.layers[0]) if encoder else ("decoder", shape.layers[1])
    extra = f', mask = "{"none" if encoder else "causal"}"'
    if shape.relative:
        extra += f', bias = @"{side}.relative", bias_kind = "relative"'
    memory = None if encoder else "%memory"
    x = "%x0"
    text.lines.append(f"%x0 = tb.embedding(%token) {{weight = @shared, offset = 0}} : (index) -> {width}")
    first = shape.apart if encoder else 0
    for layer in range(first):
        x = text.layer(x, f"{side}.{layer}", extra, memory)
    x = text.norm(text.loop(x, f"{side}.{{}}", layers - first, first, extra, memory), f"{side}.last")
    size = shape.width
    if not encoder:
        x, size = text.op("linear", [x], 'weight = @head, layout = "out_in"', [size], shape.vocab), shape.vocab
    arguments = "%token: index, %position: index" + ("" if encoder else f", %memory: {width}")
    return "\n".join(
        [
            f"tb.{name} attributes {{vocab = {shape.vocab}, context = {context}}} {{",
            f"^body({arguments}):",
            *text.lines,
            f"tb.return({x}) : {_vector(size)}",
            "}",
        ]
    )


def model(shape: Shape) -> FrontendModel:
    """The model, lowered."""
    module = parse(f"builtin.module {{\n{_half(shape, True)}\n{_half(shape, False)}\n}}")
    config = {"vocab": shape.vocab, "context": shape.context, "eos_token_id": 1, "decoder_start_token_id": 0}
    return FrontendModel(module, Weights(shape), None, config, "small")


class Formulas:
    """The same model in a floating-point type, all positions at once, from the definitions."""

    def __init__(self, shape: Shape, dtype: type = np.float64) -> None:
        """The weights in `dtype`."""
        self.shape, self.weights, self.dtype = shape, Weights(shape), dtype

    def _load(self, name: str) -> F64:
        return self.weights.load(name).astype(self.dtype)

    def _linear(self, x: F64, name: str) -> F64:
        return x @ self._load(name).T + (self._load(f"{name}.bias") if self.shape.biased else self.dtype(0))

    def _norm(self, x: F64, name: str) -> F64:
        mean = (x.astype(np.float64) ** 2).mean(-1, keepdims=True)
        return (x / np.sqrt(mean + 1e-6)).astype(self.dtype) * self._load(f"{name}.norm")

    def _attention(self, x: F64, other: F64, name: str, bias: F64 | None, causal: bool) -> F64:
        s = self.shape
        if s.fused and x is not other:
            k, v = np.split(self._linear(other, f"{name}.kv"), 2, axis=-1)
        else:
            k, v = (self._linear(other, f"{name}.{part}") for part in "kv")
        q, k, v = (a.reshape(len(a), s.heads, s.head).swapaxes(0, 1) for a in (self._linear(x, f"{name}.q"), k, v))
        scores = self.dtype(0.5) * (q @ k.swapaxes(1, 2)) + (self.dtype(0) if bias is None else bias)
        if causal:
            scores = np.where(np.tril(np.ones(scores.shape[1:], bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (weights / weights.sum(-1, keepdims=True)).astype(self.dtype) @ v
        return self._linear(mixed.swapaxes(0, 1).reshape(len(x), -1), f"{name}.o")

    def _layer(self, x: F64, name: str, bias: F64 | None, memory: F64 | None) -> F64:
        normed = self._norm(x, f"{name}.own")
        x = x + self._attention(normed, normed, f"{name}.own", bias, memory is not None)
        if memory is not None:
            x = x + self._attention(self._norm(x, f"{name}.cross"), memory, f"{name}.cross", None, False)
        normed = self._norm(x, f"{name}.feed")
        up = self._linear(normed, f"{name}.feed.up")
        if self.shape.gated:
            gelu = up / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
            up = gelu.astype(self.dtype) * self._linear(normed, f"{name}.feed.gate")
        else:
            up = np.maximum(up, 0)
        return x + self._linear(up, f"{name}.feed.down")

    def logits(self, source: list[int], tokens: list[int]) -> F64:
        """Logits [T, vocab] after each of `tokens`, for a source text."""
        s, encoder, decoder = self.shape, None, None
        if s.relative:
            away = np.arange(len(source)) - np.arange(len(source))[:, None]
            encoder = self._load("encoder.relative")[:, away + s.source - 1]
            back = np.arange(len(tokens))[:, None] - np.arange(len(tokens))
            decoder = self._load("decoder.relative")[:, np.maximum(back, 0)]
        x = self._load("shared")[source]
        for layer in range(s.layers[0]):
            x = self._layer(x, f"encoder.{layer}", encoder, None)
        memory, x = self._norm(x, "encoder.last"), self._load("shared")[tokens]
        for layer in range(s.layers[1]):
            x = self._layer(x, f"decoder.{layer}", decoder, memory)
        return self._norm(x, "decoder.last") @ self._load("head").T
