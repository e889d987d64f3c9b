"""Steps of every family on the simulated machine: near float64, the same bits on any number of devices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from step_models import StepWriter

import typebar
from typebar.compiler.driver import build, write
from typebar.compiler.evaluate import evaluate_step
from typebar.compiler.frontend import FrontendModel
from typebar.compiler.packing import unpack_weights
from typebar.isa.image import Image
from typebar.isa.instructions import Format
from typebar.isa.machine import Machine

TINY = Machine.load("tiny")


def logits_on(model: FrontendModel, folder: Path, devices: int, tokens: list[int]) -> NDArray[np.float32]:
    path = folder / f"{devices}.safetensors"
    write(build(model, TINY, devices, Format.FP16), path)
    with typebar.load(path, device="sim") as text_model:
        logits: NDArray[np.float32] = text_model.logits(tokens)
    return logits


def rms(values: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def check(model: FrontendModel, folder: Path, length: int, devices: tuple[int, ...] = (2, 3, 4)) -> NDArray[np.float32]:
    """Logits on one device, equal on others, and closer to float64 than float16 arithmetic comes."""
    tokens = np.random.default_rng(1).integers(0, model.config["vocab"], length).tolist()
    first = logits_on(model, folder, 1, tokens)
    for count in devices:
        assert np.array_equal(first, logits_on(model, folder, count, tokens)), count
    exact = evaluate_step(model.module, model.weights, tokens, torch.float64).numpy()
    half = evaluate_step(model.module, model.weights, tokens, torch.float16).numpy()
    assert rms(first - exact) <= 1.5 * rms(half - exact), (rms(first - exact), rms(half - exact), rms(exact))
    assert rms(exact) > 0.3, "the model's logits must be worth comparing"
    return first


def transformer(
    attend: Callable[[StepWriter, str], str], width: int = 32, context: int = 40, vocab: int = 43, layers: int = 2,
    rows: bool = False,
) -> FrontendModel:  # fmt: skip
    """Embedding, layers of `attend` and a small feed-forward part, norm, head."""
    w = StepWriter(vocab, context)
    x = w.embedding("token", "wte", width)
    if rows:
        x = w.add(x, w.embedding("position", "wpe", width, offset=2))
    with w.layers(x, layers, start=1) as (x, result):
        x = w.add(x, attend(w, w.norm(x, "h.{}.ln1")))
        h = w.activation(w.linear(w.norm(x, "h.{}.ln2", "rms_norm"), 48, "h.{}.up", bias=True), "relu")
        result.append(w.add(x, w.linear(h, width, "h.{}.down")))
    return w.model(w.linear(w.norm(result[0], "ln"), vocab, "head"))


def separate(
    heads: int, kv_heads: int, size: int, bias: bool = True, **options: object
) -> Callable[[StepWriter, str], str]:
    def attend(w: StepWriter, x: str) -> str:
        q = w.linear(x, heads * size, "h.{}.q", bias)
        k = w.linear(x, kv_heads * size, "h.{}.k", False, "in_out")
        v = w.linear(x, kv_heads * size, "h.{}.v", bias)
        turned = options.get("turned")
        if turned is not None:
            pairing = str(options.get("pairing", "half"))
            q, k = w.rotary(q, heads, turned, pairing), w.rotary(k, kv_heads, turned, pairing)
        out = w.attention(q, k, v, heads, kv_heads, window=options.get("window"))
        return w.linear(out, w.widths[x], "h.{}.o", bias)

    return attend


def fused_by_head(heads: int, size: int) -> Callable[[StepWriter, str], str]:
    """BLOOM's and GPT-NeoX's [heads, 3, size]."""

    def attend(w: StepWriter, x: str) -> str:
        qkv = w.linear(x, 3 * heads * size, "h.{}.qkv", True)
        parts = [w.slice(qkv, i * size, heads * size, size, 3 * size) for i in range(3)]
        return w.linear(w.attention(*parts, heads, heads), w.widths[x], "h.{}.o", True)

    return attend


SOURCES = {
    "separate q, k and v": lambda: transformer(separate(4, 4, 8)),
    "heads padded": lambda: transformer(separate(3, 3, 12), rows=True),
    "fused by head": lambda: transformer(fused_by_head(4, 8)),
    "fused by head, padded": lambda: transformer(fused_by_head(3, 12)),
    "inner size unlike the model's": lambda: transformer(separate(6, 6, 8)),
}


@pytest.mark.parametrize("name", SOURCES)
def test_queries_keys_and_values_from_any_columns(name: str, tmp_path: Path) -> None:
    check(SOURCES[name](), tmp_path, 12)


GROUPED = {
    "two per key head": (4, 2, 8),
    "one key head": (5, 1, 8),
    "one key head, more queries than a matrix instruction takes": (11, 1, 8),
    "padded": (6, 3, 12),
    "groups of three": (9, 3, 8),
}


@pytest.mark.parametrize("heads", GROUPED.values(), ids=GROUPED.keys())
def test_heads_that_share_keys(heads: tuple[int, int, int], tmp_path: Path) -> None:
    check(transformer(separate(*heads)), tmp_path, 12, (2, 3, 4, 6))


@pytest.mark.parametrize("heads", [(4, 2, 8), (5, 1, 8)], ids=["grouped", "one"])
def test_heads_that_share_keys_over_blocks_of_positions(heads: tuple[int, int, int], tmp_path: Path) -> None:
    check(transformer(separate(*heads), context=150, layers=1), tmp_path, 140, (3,))


def test_every_parameter_comes_back_from_the_image(tmp_path: Path) -> None:
    model = transformer(fused_by_head(3, 12))
    for devices in (1, 3):
        path = tmp_path / f"{devices}.safetensors"
        write(build(model, TINY, devices, Format.FP16), path)
        found = unpack_weights(Image.open(path))
        for name in model.weights.names():
            assert np.array_equal(found(name), model.weights.load(name)), name
