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
from typebar.compiler.driver import Compiled, build, write
from typebar.compiler.evaluate import evaluate_step
from typebar.compiler.frontend import FrontendModel
from typebar.compiler.packing import unpack_weights
from typebar.isa.image import Image
from typebar.isa.instructions import Format
from typebar.isa.machine import Machine
from typebar.sim.timing import TimingResult, run_timing

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


ROTARY = {
    "halves of whole heads": (4, 4, 16, 16, "half"),
    "neighbours": (4, 4, 16, 16, "interleaved"),
    "halves padded": (3, 3, 12, 12, "half"),
    "part of a head": (4, 4, 12, 4, "half"),
    "part of a head, neighbours": (4, 4, 20, 8, "interleaved"),
    "grouped": (6, 2, 12, 12, "interleaved"),
}


@pytest.mark.parametrize("shape", ROTARY.values(), ids=ROTARY.keys())
def test_rotary_positions(shape: tuple[int, int, int, int, str], tmp_path: Path) -> None:
    heads, kv_heads, size, turned, pairing = shape
    check(transformer(separate(heads, kv_heads, size, turned=turned, pairing=pairing)), tmp_path, 20)


def test_rotary_positions_of_a_fused_product_take_one_product(tmp_path: Path) -> None:
    def attend(w: StepWriter, x: str) -> str:
        qkv = w.linear(x, (4 + 2 + 2) * 16, "h.{}.qkv", True)
        q, k, v = w.slice(qkv, 0, 64), w.slice(qkv, 64, 32), w.slice(qkv, 96, 32)
        return w.linear(w.attention(w.rotary(q, 4, 8), w.rotary(k, 2, 8), v, 4, 2), w.widths[x], "h.{}.o")

    model = transformer(attend)
    made = build(model, TINY, 2, Format.FP16)
    assert sum(plan.meta["kind"] == "matrix" for plan in made.memory.plans) == 2 * (2 * 4 + 1)
    check(model, tmp_path, 20)


def biased(kind: str, planes: int, heads: int = 4, kv_heads: int = 4, size: int = 8, layered: bool = False,
           window: int | None = None) -> Callable[[StepWriter, str], str]:  # fmt: skip
    def attend(w: StepWriter, x: str) -> str:
        shape = (planes, w.context, w.context) if kind == "table" else (planes, w.context)
        name = "h.{}.bias" if layered else "bias"
        reference = w.weight(name, shape, 1.0)
        for one in w.names(name):
            w.weights[one][..., 3] = -np.inf if kind != "table" else w.weights[one][..., 3]
            if kind == "table":
                w.weights[one][:, 9:, 2:5] = -np.inf
        q, k, v = (
            w.linear(x, count * size, f"h.{{}}.{part}")
            for part, count in zip("qkv", (heads, kv_heads, kv_heads), strict=True)
        )
        out = w.attention(q, k, v, heads, kv_heads, bias=reference, kind=kind, window=window)
        return w.linear(out, w.widths[x], "h.{}.o")

    return attend


BIASES = {
    "relative": ("relative", 4),
    "relative for all": ("relative", 1),
    "column": ("column", 4),
    "table": ("table", 4),
    "table for all": ("table", 1),
    "relative, grouped": ("relative", 6, 6, 2),
    "relative for all, grouped": ("relative", 1, 6, 2),
    "relative, of each layer": ("relative", 4, 4, 4, 8, True),
}


@pytest.mark.parametrize("options", BIASES.values(), ids=BIASES.keys())
@pytest.mark.parametrize("context", [24, 150])
def test_score_biases(options: tuple[str, int], context: int, tmp_path: Path) -> None:
    model = transformer(biased(*options), context=context, layers=2 if context == 24 else 1)
    check(model, tmp_path, 22 if context == 24 else 140, (2, 3, 4) if context == 24 else (3,))


@pytest.mark.parametrize("context", [60, 200])
@pytest.mark.parametrize("window", [1, 7, 20, 70])
def test_windows_skip_what_they_do_not_see(window: int, context: int, tmp_path: Path) -> None:
    """The same bits as a mask over all positions."""
    length = min(context, 160)
    heads = (4, 2, 8) if window == 20 else (2, 2, 8)
    seen = check(transformer(separate(*heads, window=window), context=context, layers=1), tmp_path, length, (2,))

    def attend(w: StepWriter, x: str) -> str:
        bias = np.zeros((1, w.context), np.float32)
        bias[:, window:] = -np.inf
        mask = w.put("mask", bias)
        q = w.linear(x, heads[0] * 8, "h.{}.q", True)
        k = w.linear(x, heads[1] * 8, "h.{}.k", False, "in_out")
        v = w.linear(x, heads[1] * 8, "h.{}.v", True)
        out = w.attention(q, k, v, heads[0], heads[1], bias=mask, kind="relative")
        return w.linear(out, w.widths[x], "h.{}.o", True)

    masked = transformer(attend, context=context, layers=1)
    tokens = np.random.default_rng(1).integers(0, 43, length).tolist()
    assert np.array_equal(seen, logits_on(masked, tmp_path, 1, tokens))


def test_a_window_fetches_less(tmp_path: Path) -> None:
    """The timing simulator needs no more K and V than the blocks that a window touches."""
    plain, windowed = (transformer(separate(2, 2, 8, window=w), context=200, layers=1) for w in (None, 7))
    fetched = [timing(build(m, TINY, 1, Format.FP16), 190).counters[0].kv_fetched_bytes for m in (plain, windowed)]
    assert fetched[1] < fetched[0] / 2


def timing(made: Compiled, prompt: int) -> TimingResult:
    io = np.zeros((made.devices, made.memory.io.bytes // 4), np.int32)
    io[:, :4] = [0, prompt, 1, -1]
    return run_timing(made.program, made.machine, made.devices, io)


def test_windows_and_biases_together(tmp_path: Path) -> None:
    for context, length in ((60, 60), (200, 150)):
        check(transformer(biased("relative", 4, window=20), context=context, layers=1), tmp_path, length, (2,))
