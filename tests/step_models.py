"""Small steps of every kind, written out, with random weights: what the compiler's back half is tested on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from typebar.compiler.frontend import DerivedSource, FrontendModel, ModuleSource
from typebar.compiler.pipeline import parse

_TYPE = "tensor<{}xf32>"


class StepWriter:
    """Writes a `tb.step` line by line and draws the weights that it names; values are known by name and width.

    Inside `layers` a name may hold `{}` or `{step:offset}`; weights are drawn for every layer.
    """

    def __init__(self, vocab: int, context: int, seed: int = 0) -> None:
        self.vocab, self.context = vocab, context
        self.rng = np.random.default_rng(seed)
        self.weights: dict[str, NDArray[np.float32] | NDArray[np.int8]] = {}
        self.lines: list[str] = []
        self.widths: dict[str, int] = {}
        self.loop: tuple[int, int] | None = None
        self.serial = 0

    # Text -----------------------------------------------------------------------------------------------
    def emit(self, name: str, operands: list[str], properties: dict[str, object], width: int, hint: str = "v") -> str:
        self.serial += 1
        result = f"%{hint}{self.serial}"
        types = ", ".join("index" if o in ("%token", "%position") else _TYPE.format(self.widths[o]) for o in operands)
        listed = ", ".join(f"{key} = {value}" for key, value in properties.items() if value is not None)
        self.lines.append(
            f"{result} = tb.{name}({', '.join(operands)}) {{{listed}}} : ({types}) -> {_TYPE.format(width)}"
        )
        self.widths[result] = width
        return result

    def names(self, template: str) -> list[str]:
        from typebar.compiler.ir import layer_name

        if self.loop is None:
            return [template]
        start, count = self.loop
        return list(dict.fromkeys(layer_name(template, start, layer) for layer in range(count)))

    def weight(self, template: str, shape: tuple[int, ...], scale: float = 1.0, shift: float = 0.0) -> str:
        for name in self.names(template):
            if name not in self.weights:
                drawn = self.rng.standard_normal(shape) * scale + shift
                self.weights[name] = drawn.astype(np.float16).astype(np.float32)
        return f'@"{template}"'

    def put(self, name: str, values: NDArray[np.float32]) -> str:
        self.weights[name] = np.ascontiguousarray(values, np.float32)
        return f'@"{name}"'

    # Operations -----------------------------------------------------------------------------------------
    def embedding(self, index: str, name: str, width: int, offset: int = 0, rows: int | None = None) -> str:
        rows = rows or (self.vocab if index == "token" else self.context + offset)
        table = self.weight(name, (rows, width))
        return self.emit("embedding", [f"%{index}"], {"weight": table, "offset": offset}, width)

    def linear(
        self, x: str, width: int, name: str, bias: bool = False, layout: str = "out_in", int8: bool = False
    ) -> str:
        k = self.widths[x]
        shape = (width, k) if layout == "out_in" else (k, width)
        properties: dict[str, object] = {"layout": f'"{layout}"'}
        if int8:
            for one in self.names(f"{name}.weight"):
                self.weights[one] = self.rng.integers(-127, 128, shape).astype(np.int8)
            properties |= {"weight": f'@"{name}.weight"', "scale": self.weight(f"{name}.scale", (width,), 0.002, 0.01)}
        else:
            properties["weight"] = self.weight(f"{name}.weight", shape, 1 / k**0.5)
        properties["bias"] = self.weight(f"{name}.bias", (width,), 0.3) if bias else None
        return self.emit("linear", [x], properties, width)

    def slice(self, x: str, start: int, size: int, run: int | None = None, stride: int | None = None) -> str:
        return self.emit("slice", [x], {"start": start, "size": size, "run": run, "stride": stride}, size)

    def attention(
        self, q: str, k: str, v: str, heads: int, kv_heads: int, window: int | None = None, bias: str | None = None,
        kind: str | None = None, scale: float | None = None,
    ) -> str:  # fmt: skip
        size = self.widths[q] // heads
        properties: dict[str, object] = {
            "heads": heads, "kv_heads": kv_heads, "head_dim": size,
            "scale": f"{scale if scale is not None else float(np.float32(size**-0.5)):.9e} : f32",
            "mask": '"causal"' if window is None else '"window"', "window": window,
            "bias": bias, "bias_kind": None if kind is None else f'"{kind}"',
        }  # fmt: skip
        return self.emit("attention", [q, k, v], properties, self.widths[q])

    def rotary(self, x: str, heads: int, turned: int, pairing: str = "half", base: float = 50.0) -> str:
        angles = np.outer(np.arange(self.context), base ** (-np.arange(turned // 2) / (turned // 2)))
        cos, sin = self.put("cos", np.cos(angles)), self.put("sin", np.sin(angles))
        size = self.widths[x] // heads
        properties = {
            "heads": heads, "head_dim": size, "rotary_dim": turned, "pairing": f'"{pairing}"', "cos": cos, "sin": sin
        }  # fmt: skip
        return self.emit("rotary", [x, "%position"], properties, self.widths[x])

    def norm(self, x: str, name: str, kind: str = "layer_norm", weight: bool = True, bias: bool = True) -> str:
        width = self.widths[x]
        properties: dict[str, object] = {"eps": "1.000000e-05 : f32"}
        if weight:
            properties["weight"] = self.weight(f"{name}.weight", (width,), 0.2, 1.0)
        if bias and kind == "layer_norm":
            properties["bias"] = self.weight(f"{name}.bias", (width,), 0.2)
        return self.emit(kind, [x], properties, width)

    def binary(self, kind: str, left: str, right: str) -> str:
        return self.emit(kind, [left, right], {}, self.widths[left])

    def add(self, left: str, right: str) -> str:
        return self.binary("add", left, right)

    def mul(self, left: str, right: str) -> str:
        return self.binary("mul", left, right)

    def scale(self, x: str, value: float) -> str:
        return self.emit("scale", [x], {"value": f"{value:.9e} : f32"}, self.widths[x])

    def activation(self, x: str, kind: str) -> str:
        return self.emit("activation", [x], {"kind": f'"{kind}"'}, self.widths[x])

    def parameter(self, name: str, width: int) -> str:
        self.serial += 1
        result = f"%p{self.serial}"
        self.lines.append(
            f"{result} = tb.parameter {{source = {self.weight(name, (width,), 0.3, 1.0)}}} : {_TYPE.format(width)}"
        )
        self.widths[result] = width
        return result

    @contextmanager
    def layers(self, x: str, count: int, start: int = 0) -> Iterator[tuple[str, list[str]]]:
        """A loop over layers: gives its argument and a list to put the layer's result and get the loop's from."""
        with self.carrying([x], count, start) as (arguments, results):
            yield arguments[0], results

    @contextmanager
    def carrying(self, inits: list[str], count: int, start: int = 0) -> Iterator[tuple[list[str], list[str]]]:
        """A loop that carries several values from layer to layer."""
        self.serial += 1
        types = [_TYPE.format(self.widths[x]) for x in inits]
        arguments, outs = ([f"%{name}{self.serial}_{i}" for i in range(len(inits))] for name in ("x", "out"))
        self.lines.append(
            f"{', '.join(outs)} = tb.repeat({', '.join(inits)}) attributes {{count = {count}, start = {start}}} {{"
        )
        listed = ", ".join(f"{name} : {type}" for name, type in zip(arguments, types, strict=True))
        self.lines.append(f"^layer{self.serial}({listed}):")
        for x, argument, out in zip(inits, arguments, outs, strict=True):
            self.widths[argument] = self.widths[out] = self.widths[x]
        self.loop = (start, count)
        results: list[str] = []
        yield arguments, results
        self.loop = None
        joined = ", ".join(types)
        self.lines.append(f"tb.yield({', '.join(results)}) : {joined}")
        self.lines.append(f"}} : ({joined}) -> ({joined})")
        results[:] = outs

    def model(self, logits: str) -> FrontendModel:
        """The finished model."""
        body = "\n    ".join(self.lines)
        text = f"""builtin.module {{
  tb.step attributes {{vocab = {self.vocab}, context = {self.context}}} {{
  ^step(%token : index, %position : index):
    {body}
    tb.return({logits}) : {_TYPE.format(self.vocab)}
  }}
}}"""
        tensors = {name: torch.from_numpy(values) for name, values in self.weights.items()}
        config = {"vocab": self.vocab, "context": self.context, "eos_token_id": None}
        return FrontendModel(parse(text), DerivedSource(ModuleSource(tensors)), None, config, "step")
