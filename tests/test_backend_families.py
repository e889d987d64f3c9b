"""Steps of every family on the simulated machine: near float64, the same bits on any number of devices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from step_models import StepWriter
from test_backend import memories

import typebar
from typebar.compiler.driver import Compiled, build, write
from typebar.compiler.evaluate import evaluate_step
from typebar.compiler.frontend import FrontendModel
from typebar.compiler.packing import unpack_weights
from typebar.isa.errors import TypebarError
from typebar.isa.image import Image
from typebar.isa.instructions import Format, Region
from typebar.isa.machine import Machine
from typebar.sim.functional import FunctionalSimulator
from typebar.sim.timing import TimingResult, run_timing

TINY = Machine.load("tiny")


def logits_on(
    model: FrontendModel, folder: Path, devices: int, tokens: list[int], machine: Machine = TINY
) -> NDArray[np.float32]:
    path = folder / f"{devices}.safetensors"
    write(build(model, machine, devices, Format.FP16), path)
    with typebar.load(path, device=["sim"]) as text_model:
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


@pytest.mark.parametrize("block", [64, 192, 256])
@pytest.mark.parametrize("window", [1, 20, 70])
def test_windows_skip_what_they_do_not_see(window: int, block: int, tmp_path: Path) -> None:
    """The same bits as a mask over all positions: in blocks that are skipped whole, in part, and in a single one."""
    context, length, machine = 220, 210, TINY.override({"attention_block": str(block)})
    heads = (4, 2, 8) if window == 20 else (2, 2, 8)
    model = transformer(separate(*heads, window=window), context=context, layers=1)
    tokens = np.random.default_rng(1).integers(0, 43, length).tolist()
    seen = logits_on(model, tmp_path, 2, tokens, machine)
    exact = evaluate_step(model.module, model.weights, tokens, torch.float64).numpy()
    half = evaluate_step(model.module, model.weights, tokens, torch.float16).numpy()
    assert rms(seen - exact) <= 1.5 * rms(half - exact)

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
    assert np.array_equal(seen, logits_on(masked, tmp_path, 1, tokens, machine))


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


def int8(w: StepWriter, x: str) -> str:
    q = w.linear(x, 24, "h.{}.q", True, int8=True)
    k, v = w.linear(x, 24, "h.{}.k", False, "in_out", int8=True), w.linear(x, 24, "h.{}.v", int8=True)
    return w.linear(w.attention(q, k, v, 3, 3, scale=0.02), w.widths[x], "h.{}.o", True, "in_out", True)


def mixed(w: StepWriter, x: str) -> str:
    q, k = w.linear(x, 24, "h.{}.q", True, "out_in", True), w.linear(x, 24, "h.{}.k")
    v = w.linear(x, 24, "h.{}.v", True, "out_in", True)
    return w.linear(w.attention(q, k, v, 3, 3), w.widths[x], "h.{}.o")


@pytest.mark.parametrize("attend", [int8, mixed])
def test_int8_weights(attend: Callable[[StepWriter, str], str], tmp_path: Path) -> None:
    model = transformer(attend)
    check(model, tmp_path, 12)
    found = unpack_weights(Image.open(tmp_path / "3.safetensors"))
    for name in model.weights.names():
        assert found(name).dtype == model.weights.load(name).dtype, name
        assert np.array_equal(found(name), model.weights.load(name)), name


def test_values_that_are_no_int8_are_refused(tmp_path: Path) -> None:
    w = StepWriter(19, 8)
    logits = w.linear(w.embedding("token", "wte", 16), 19, "head", int8=True)
    w.weights["head.weight"] = w.weights["head.weight"] + np.float32(0.5)
    with pytest.raises(TypebarError, match=r"'head.weight' has a scale and values that are no int8"):
        write(build(w.model(logits), TINY, 1, Format.FP16), tmp_path / "bad.safetensors")


Make = Callable[[], FrontendModel]


def head(vocab: int, cap: bool = False, int8: bool = False, bias: bool = True) -> FrontendModel:
    w = StepWriter(vocab, 16)
    logits = w.linear(w.scale(w.embedding("token", "wte", 32), 0.37), vocab, "head", bias, "out_in", int8)
    if cap:
        logits = w.scale(w.activation(w.scale(logits, 1 / 3.0), "tanh"), 3.0)
    return w.model(logits)


def parallel() -> FrontendModel:
    """GPT-J's: attention and feed-forward part from one norm, both added at once."""
    w = StepWriter(43, 24)
    x = w.embedding("token", "wte", 32)
    with w.layers(x, 2) as (x, result):
        h = w.norm(x, "h.{}.ln")
        a = separate(4, 4, 8, turned=4, pairing="interleaved")(w, h)
        m = w.linear(w.activation(w.linear(h, 64, "h.{}.up", True), "gelu_tanh"), 32, "h.{}.down", True)
        result.append(w.add(w.add(a, m), x))
    return w.model(w.linear(w.norm(result[0], "ln"), 43, "head", True))


def gated() -> FrontendModel:
    """One product for gate and up, sliced; norms without weights; vectors of parameters on split and whole values."""
    w = StepWriter(43, 24)
    x = w.mul(w.embedding("token", "wte", 32), w.parameter("first", 32))
    with w.layers(x, 2) as (x, result):
        x = w.add(x, separate(4, 2, 8)(w, w.norm(x, "", "rms_norm", weight=False)))
        both = w.linear(w.norm(x, "h.{}.ln", "layer_norm", weight=False, bias=True), 100, "h.{}.both", True)
        h = w.mul(w.activation(w.slice(both, 0, 50), "silu"), w.slice(both, 50, 50))
        h = w.add(w.mul(h, w.parameter("h.{}.factor", 50)), w.parameter("shared", 50))
        result.append(w.add(x, w.mul(w.parameter("h.{}.gain", 32), w.linear(h, 32, "h.{}.down"))))
    return w.model(w.linear(w.norm(result[0], "", weight=False, bias=False), 43, "head"))


def post_norm() -> FrontendModel:
    """OPT-350m's: widths change around the layers, which end in a norm."""
    w = StepWriter(43, 24)
    x = w.add(w.linear(w.embedding("token", "wte", 20), 36, "in"), w.embedding("position", "wpe", 36, 2))
    with w.layers(x, 2) as (x, result):
        x = w.norm(w.add(x, separate(3, 3, 12)(w, x)), "h.{}.ln1")
        result.append(w.norm(w.add(x, w.linear(w.linear(x, 40, "h.{}.up"), 36, "h.{}.down", True)), "h.{}.ln2"))
    return w.model(w.linear(w.linear(result[0], 20, "out"), 43, "head"))


def products_only() -> FrontendModel:
    """Layers that begin and end in products of a width that devices round up."""
    w = StepWriter(43, 24)
    x = w.linear(w.embedding("token", "wte", 20), 36, "in")
    with w.layers(x, 3) as (x, result):
        result.append(w.activation(w.linear(x, 36, "h.{}.a", True), "tanh"))
    return w.model(w.linear(result[0], 43, "head"))


def alternating() -> FrontendModel:
    """GPT-Neo's: local and global layers by turns, two in each round of the loop."""
    w = StepWriter(43, 150)
    x = w.embedding("token", "wte", 32)
    with w.layers(x, 2) as (x, result):
        for offset, window in ((0, None), (1, 9)):
            n = f"h.{{2:{offset}}}"
            q, k, v = (w.linear(x, 32, f"{n}.{part}") for part in "qkv")
            x = w.add(x, w.linear(w.attention(q, k, v, 4, 4, window=window, scale=0.5), 32, f"{n}.o"))
            x = w.norm(x, f"{n}.ln")
        result.append(x)
    return w.model(w.linear(result[0], 43, "head"))


def unrolled() -> FrontendModel:
    """Layers of different shapes, and a loop between them."""
    w = StepWriter(43, 24)
    x = w.embedding("token", "wte", 32)
    for number, heads in enumerate((2, 4)):
        q, k, v = (w.linear(x, 32, f"h.{number}.{part}") for part in "qkv")
        x = w.norm(w.add(x, w.attention(q, k, v, heads, heads)), f"h.{number}.ln")
    with w.layers(x, 2, start=2) as (x, result):
        result.append(w.add(x, separate(4, 4, 8)(w, w.norm(x, "h.{}.ln"))))
    x = result[0]
    q, k, v = (w.linear(x, size, f"h.4.{part}") for part, size in (("q", 32), ("k", 8), ("v", 8)))
    x = w.add(x, w.attention(q, k, v, 4, 1))
    return w.model(w.linear(x, 43, "head"))


def shared() -> FrontendModel:
    """ALBERT's: one set of weights for all layers, beside norms of their own."""
    w = StepWriter(43, 24)
    x = w.embedding("token", "wte", 32)
    with w.layers(x, 3) as (x, result):
        h = w.norm(x, "h.{}.ln")
        q, k, v = (w.linear(h, 32, part, True) for part in "qkv")
        x = w.add(x, w.linear(w.attention(q, k, v, 4, 4), 32, "o", True))
        result.append(w.add(x, w.linear(w.linear(x, 40, "up", True), 32, "h.{}.down")))
    return w.model(w.linear(result[0], 43, "head"))


def sliced() -> FrontendModel:
    """Slices of values that are no product, and of slices."""
    w = StepWriter(43, 24)
    x = w.embedding("token", "wte", 32)
    low, high = w.slice(x, 0, 16), w.slice(x, 16, 16)
    y = w.linear(w.mul(low, high), 24, "y", True)
    z = w.add(w.slice(w.slice(y, 0, 16, 8, 16), 0, 8), w.slice(w.slice(y, 4, 16), 4, 8))
    return w.model(w.linear(z, 43, "head"))


def carrying() -> FrontendModel:
    """Two values from layer to layer, exchanged on the way, and the first one again after the loop."""
    w = StepWriter(43, 24)
    x = w.embedding("token", "wte", 32)
    with w.carrying([x, x], 3) as ((a, b), results):
        results += [w.add(b, w.linear(w.norm(a, "h.{}.ln"), 32, "h.{}.a")), a]
    a, b = results
    with w.carrying([a, b], 2, start=3) as ((a, b), results):
        results += [b, a]
    return w.model(w.linear(w.add(w.mul(results[0], w.parameter("p", 32)), w.add(results[1], x)), 43, "head"))


SHAPES: dict[str, Make] = {
    "carrying": carrying,
    "head with bias": lambda: head(43),
    "head with a soft cap": lambda: head(43, cap=True),
    "int8 head": lambda: head(43, cap=True, int8=True),
    "parallel": parallel,
    "gated": gated,
    "post-norm": post_norm,
    "products only": products_only,
    "alternating": alternating,
    "unrolled": unrolled,
    "shared": shared,
    "sliced": sliced,
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_other_families(name: str, tmp_path: Path) -> None:
    check(SHAPES[name](), tmp_path, 100 if name == "alternating" else 16)


@pytest.mark.parametrize("int8", [False, True])
def test_logits_in_chunks_with_biases(int8: bool, tmp_path: Path) -> None:
    """More logits than fit the registers at a time."""
    made = build(head(9000, True, int8), TINY, 1, Format.FP16)
    assert any(label.startswith("logits") for label in made.program.labels)
    check(head(9000, True, int8), tmp_path, 3, (2, 3))


FILLED: dict[str, Make] = {
    "rotary": lambda: transformer(separate(6, 2, 12, turned=8, pairing="interleaved")),
    "bias": lambda: transformer(biased("table", 4)),
    "bias in blocks": lambda: transformer(biased("relative", 1, 6, 2), context=150, layers=1),
    "window": lambda: transformer(separate(4, 2, 8, window=9), context=150, layers=1),
    "int8": lambda: transformer(int8),
    "gated": gated,
    "unrolled": unrolled,
}


@pytest.mark.parametrize("name", FILLED)
def test_results_do_not_depend_on_what_memory_and_registers_held(name: str, tmp_path: Path) -> None:
    path, model = tmp_path / "image.safetensors", FILLED[name]()
    tokens = np.random.default_rng(2).integers(0, 43, min(model.config["context"], 130)).tolist()
    write(build(model, TINY, 3, Format.FP16), path)
    results = []
    for filler in (0, 0xFF):
        image = Image.open(path)
        devices = memories(image, tokens, filler)
        simulator = FunctionalSimulator(image.program, image.machine, 3, devices)
        for device in range(3):
            simulator.vector_registers(device).view(np.uint8)[:] = filler
        simulator.run()
        io = image.manifest.io
        parts = [d.regions[Region.IO].view(np.float32)[16 * io["logits_line"] :] for d in devices]
        results.append(np.concatenate([part[: io["logits_per_device"]] for part in parts])[:43])
    assert np.isfinite(results[0]).all()
    assert np.array_equal(results[0], results[1])


@pytest.mark.parametrize("name", FILLED)
def test_steps_take_time_on_the_timing_simulator(name: str) -> None:
    result = timing(build(FILLED[name](), TINY, 2, Format.FP16), 10)
    for causes in result.causes:
        assert all(sum(unit.values()) == result.total_cycles for unit in causes.values())
