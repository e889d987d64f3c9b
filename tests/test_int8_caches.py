"""int8 K and V: scales leave the model's function as it is, nothing calibrated saturates, the same bits everywhere."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, VOCAB, Family, random_model
from step_models import StepWriter
from test_backend_families import SOURCES, check, fused_by_head, separate, transformer
from test_rtl_generation import generate

import typebar
from typebar.compiler import ir
from typebar.compiler.caches import LARGEST, MARGIN, Ranges, calibrate, int8_caches
from typebar.compiler.driver import build, write
from typebar.compiler.evaluate import evaluate_step
from typebar.compiler.frontend import FrontendModel, load_model
from typebar.compiler.interpreter import StepInterpreter
from typebar.compiler.pipeline import parse, run_passes
from typebar.compiler.quantisation import quantise
from typebar.host import study
from typebar.host.cli import main
from typebar.host.driver import DeviceEngine
from typebar.host.rtl import RtlDevice
from typebar.host.simulator import SimulatedDevice
from typebar.isa.errors import TypebarError
from typebar.isa.image import Image
from typebar.isa.instructions import Format
from typebar.isa.machine import Machine
from typebar.models import find

TINY = Machine.load("tiny")
MODEL, TEXT = "folio-draft", "And the king said unto them, Bring me a sword. And they brought a sword before the king."


def tokens_of(model: FrontendModel, count: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, model.config["vocab"], count).tolist()


def unrounded(model: FrontendModel) -> FrontendModel:
    """The folded model without what int8 rounds."""
    module = model.module.clone()
    for op in module.walk():
        if isinstance(op, ir.AttentionOp):
            del op.properties["kv_format"]
    return replace(model, module=module)


def stored(model: FrontendModel, texts: list[list[int]]) -> np.ndarray:
    """All K and V that a folded model's attentions are given."""
    found: list[np.ndarray] = []
    watched = {v.owner for op in model.module.walk() if isinstance(op, ir.AttentionOp) for v in (op.k, op.v)}
    step = StepInterpreter(
        model.module,
        lambda name: torch.from_numpy(model.lookup(name)),
        trace=lambda op, _, value: found.append(value.numpy().copy()) if op in watched else None,
    )
    for text in texts:
        for position, token in enumerate(text):
            step.step(token, position)
    return np.concatenate(found)


def same_function(model: FrontendModel, tokens: list[int]) -> FrontendModel:
    """Folds, and checks that only rounding changes logits, and that the calibration's text fits."""
    made = int8_caches(model, calibrate(model, [tokens]))
    exact = evaluate_step(model.module, model.weights, tokens, torch.float64).numpy()
    plain, folded = (evaluate_step(m.module, m.weights, tokens, torch.float64).numpy() for m in (unrounded(made), made))
    size, step = np.abs(exact).max(), np.abs(folded - exact).max()
    assert np.abs(plain - exact).max() < 2e-6 * size < step < 0.1 * size
    largest = np.abs(stored(unrounded(made), [tokens])).max()
    assert 0.999 * LARGEST / MARGIN < largest < 1.001 * LARGEST / MARGIN
    return made


# The model's function -------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", [item for item in FAMILIES if not item.encoder], ids=lambda item: item.name)
def test_scales_change_nothing_but_rounding(family: Family) -> None:
    model = load_model(random_model(family), {"context": 32})
    made = same_function(model, tokens_of(model, 20))
    parse(str(made.module))
    assert "kv_format" not in str(model.module), "the model itself stays"


def scaled(place: str) -> FrontendModel:
    """Constant factors between products and attention, as ONNX exporters write them."""
    w = StepWriter(43, 24)
    x = w.embedding("token", "wte", 32)
    q, k, v = (w.linear(x, 32, name, bias=True) for name in "qkv")
    q, k = w.emit("scale", [q], {"value": "5.0e-01 : f32"}, 32), w.emit("scale", [k], {"value": "7.0e-01 : f32"}, 32)
    if place == "v":
        v = w.emit("scale", [v], {"value": "3.0e+00 : f32"}, 32)
    if place != "gate":
        q, k = w.rotary(q, 4, 8), w.rotary(k, 4, 8)
    out = w.attention(q, k, v, 4, 4)
    if place == "gate":
        out = w.binary("mul", out, w.linear(x, 32, "gate"))
    return w.model(w.linear(w.add(x, w.linear(out, 32, "o")), 43, "head"))


def integer() -> FrontendModel:
    """int8 weights from an ONNX file: their scales take those of columns; rows cannot."""
    w = StepWriter(43, 24)
    x = w.embedding("token", "wte", 32)
    q, k, v = (w.linear(x, 32, name, bias=True, int8=True) for name in "qkv")
    out = w.linear(w.attention(q, k, v, 4, 4), 32, "o", int8=True)
    return w.model(w.linear(w.add(x, out), 43, "head"))


def shared_by_layers() -> FrontendModel:
    """One V for all layers, so that they share scales."""
    model = transformer(separate(4, 2, 8, turned=4))
    text = str(model.module).replace("h.{}.v.weight", "h.1.v.weight").replace("h.{}.v.bias", "h.1.v.bias")
    return replace(model, module=parse(text))


ODD: dict[str, Callable[[], FrontendModel]] = {
    "factors": lambda: scaled("k"),
    "a factor of V": lambda: scaled("v"),
    "a gate behind attention": lambda: scaled("gate"),
    "int8 weights": integer,
    "pairs side by side, some of a head": lambda: transformer(separate(4, 2, 8, turned=4, pairing="interleaved")),
    "weights that layers share": shared_by_layers,
}


@pytest.mark.parametrize("name", ODD)
def test_odd_models_keep_their_function_and_their_bits(name: str, tmp_path: Path) -> None:
    model = ODD[name]()
    tokens = tokens_of(model, 12)
    made = int8_caches(model, calibrate(model, [tokens]))
    if name != "weights that layers share":  # one layer of which has the larger range
        same_function(model, tokens)
    first = check(made, tmp_path, 12, (3,))
    exact = evaluate_step(model.module, model.weights, tokens, torch.float64).numpy()
    assert np.abs(first - exact).max() < 0.1 * np.abs(exact).max()


def test_what_a_rotary_position_turns_stays_in_range_everywhere() -> None:
    """Every token was seen at position 0 only; K is that, turned."""
    model = transformer(separate(2, 1, 8, turned=8), layers=1)
    vocab = model.config["vocab"]
    made = int8_caches(model, calibrate(model, [[token] for token in range(vocab)]))
    texts = [tokens_of(model, 40, seed) for seed in range(5)]
    assert np.abs(stored(made, texts)).max() <= LARGEST / MARGIN * 1.001


# Bits -------------------------------------------------------------------------------------------------------
CASES: dict[str, tuple[Callable[[], FrontendModel], int]] = {
    "heads padded": (SOURCES["heads padded"], 12),
    "fused by head": (lambda: transformer(fused_by_head(4, 8)), 12),
    "groups": (lambda: transformer(separate(6, 2, 8, turned=8)), 12),
    "blocks": (lambda: transformer(separate(5, 1, 8), context=150, layers=1), 140),
    "window over blocks": (lambda: transformer(separate(4, 2, 8, window=70), context=150, layers=1), 140),
}


@pytest.mark.parametrize("name", CASES)
def test_bits_do_not_depend_on_the_number_of_devices(name: str, tmp_path: Path) -> None:
    make, length = CASES[name]
    model = make()
    check(int8_caches(model, calibrate(model, [tokens_of(model, length)])), tmp_path, length, (2, 3))


def test_with_int8_weights_too(tmp_path: Path) -> None:
    model = transformer(separate(4, 2, 8, turned=8))
    tokens = np.random.default_rng(1).integers(0, model.config["vocab"], 12).tolist()
    made = int8_caches(model, calibrate(model, [tokens]))
    first = check(quantise(made).model, tmp_path, 12, (3,))
    path = tmp_path / "both.safetensors"
    write(build(made, TINY, 2, Format.INT8), path)
    with typebar.load(path, device="sim") as found, typebar.load(path, device="torch") as fallback:
        assert np.array_equal(found.logits(tokens), first)
        exact = evaluate_step(quantise(made).model.module, quantise(made).model.weights, tokens).numpy()
        assert np.abs(fallback.logits(tokens) - exact).max() <= 1e-5 * np.abs(exact).max()
        accounting = found.image.manifest.accounting
        assert (found.image.manifest.weights_format, accounting["kv_format"]) == ("int8", "int8")


@pytest.mark.parametrize("machine", [TINY, TINY.override({"matrix.interleave": "4", "attention_block": "16"})])
def test_prompts_in_blocks_give_the_bits_of_single_tokens(machine: Machine, tmp_path: Path) -> None:
    model = transformer(separate(6, 2, 8, turned=8), context=56)
    tokens, path = tokens_of(model, 56), tmp_path / "image.safetensors"
    made = build(int8_caches(model, calibrate(model, [tokens])), machine, 2, Format.FP16)
    write(made, path)
    block = made.memory.accounting["prompt_rows"] * made.memory.accounting["prompt_groups"]
    assert block > 2
    engine = DeviceEngine(Image.open(path), SimulatedDevice(machine, 2), "sim")
    single = [engine.logits([token]) for token in tokens]
    for length in (2, block, 2 * block + 1):
        engine.reset()
        assert np.array_equal(engine.logits(tokens[:length]), single[length - 1]), length
        assert np.array_equal(engine.logits(tokens[length : length + 5]), single[length + 4]), length


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kv") / "draft.safetensors"
    typebar.compile(MODEL, path, machine="tiny", devices=1, kv="int8", calibrate=[tokens_of(draft(), 60), [5]])
    return path


def draft() -> FrontendModel:
    return load_model(find(MODEL).path)


def test_the_hardware_gives_the_functional_simulators_bits(image: Path) -> None:
    with Image.open(image) as opened:
        expected, memories = generate(opened, SimulatedDevice(TINY, 1), 3)
        hardware = RtlDevice(TINY, 1)
        tokens, found = generate(opened, hardware, 3)
        assert tokens == expected
        for mine, theirs in zip(found, memories, strict=True):
            assert np.array_equal(mine, theirs)
        hardware.native.close()
        kv = memories[0].view(np.int8)
        assert 20 < np.abs(kv.astype(int)).max() <= 127 and np.count_nonzero(kv) > 1000


def test_torch_and_compare_round_as_the_machine_does(image: Path) -> None:
    found = typebar.compare(image, TEXT)
    assert found.first is None
    with typebar.load(image, device="sim") as machine, typebar.load(image, device="torch") as fallback:
        ours, theirs = (m.logits(tokens_of(draft(), 12, 3)) for m in (machine, fallback))
    assert np.abs(ours - theirs).max() < 0.02 * np.abs(theirs).max()
    with pytest.raises(TypebarError, match=r"int8 K and V have their scales in the image's weights.*leave out against"):
        typebar.compare(image, TEXT, against=MODEL)


def test_what_exceeds_the_range_is_reported(tmp_path: Path, image: Path) -> None:
    model = draft()
    found = calibrate(model, [tokens_of(model, 20)])
    narrow = Ranges({key: (k / 8, v / 8) for key, (k, v) in found.found.items()})
    path = tmp_path / "narrow.safetensors"
    write(build(int8_caches(model, narrow), TINY, 1, Format.FP16), path)
    with typebar.load(path, device="sim") as loaded:
        flags = loaded.generate(input_ids=tokens_of(model, 5), max_new_tokens=2).flags
    assert any("a value stored to memory saturated" in flag for flag in flags)
    with typebar.load(image, device="sim") as loaded:
        assert not loaded.generate(input_ids=tokens_of(model, 60)[:20], max_new_tokens=1).flags


# What is refused ----------------------------------------------------------------------------------------------
def reads_k() -> FrontendModel:
    w = StepWriter(43, 24)
    x = w.embedding("token", "wte", 32)
    q, k, v = (w.linear(x, 32, name) for name in "qkv")
    return w.model(w.linear(w.add(k, w.attention(q, k, v, 4, 4)), 43, "head"))


def one_product() -> FrontendModel:
    w = StepWriter(43, 24)
    x = w.embedding("token", "wte", 32)
    q, k = (w.linear(x, 32, name) for name in "qk")
    return w.model(w.linear(w.attention(q, k, k, 4, 4), 43, "head"))


def normed() -> FrontendModel:
    w = StepWriter(43, 24)
    x = w.embedding("token", "wte", 32)
    q, k, v = (w.linear(x, 32, name) for name in "qkv")
    return w.model(w.linear(w.attention(q, w.norm(k, "ln"), v, 4, 4), 43, "head"))


def factor_read() -> FrontendModel:
    w = StepWriter(43, 24)
    x = w.embedding("token", "wte", 32)
    q, k, v = (w.linear(x, 32, name) for name in "qkv")
    k = w.emit("scale", [k], {"value": "5.0e-01 : f32"}, 32)
    return w.model(w.linear(w.add(k, w.attention(q, k, v, 4, 4)), 43, "head"))


REFUSED: dict[str, tuple[Callable[[], FrontendModel], str]] = {
    "another reader": (reads_k, "tb.add.* reads its queries, K or V too: compile without int8 K and V"),
    "one product": (one_product, "queries, K and V share columns of a product: compile without"),
    "a norm": (normed, "its K are not columns of a product, straight or turned by their position: compile without"),
    "a factor": (factor_read, "K and V of .*: tb.* multiplies more than K and V by 0.5: compile without"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_scales_that_cannot_be_folded(name: str) -> None:
    make, message = REFUSED[name]
    model = make()
    with pytest.raises(TypebarError, match=message):
        calibrate(model, [[1, 2]])


def test_an_encoder_is_refused() -> None:
    family = next(item for item in FAMILIES if item.encoder)
    model = load_model(random_model(family), {"context": 12, "source_context": 12, "decoder_start_token_id": 0})
    with pytest.raises(TypebarError, match="int8 K and V are for decoders, and this model has an encoder: compile"):
        int8_caches(model, None)


def test_texts_that_calibrate_nothing() -> None:
    model = transformer(separate(4, 2, 8))
    for texts, message in (
        ([[]], "at least one token"),
        ([[VOCAB]], "outside the vocabulary"),
        ([[1] * 41], "in a context of 40"),
    ):
        with pytest.raises(TypebarError, match=message):
            calibrate(model, texts)
    with pytest.raises(TypebarError, match=r"has a shape but no values: calibrate int8 K and V on a text"):
        int8_caches(model, None).lookup("h.1.k.weight.kv0")


# Through the host ---------------------------------------------------------------------------------------------
def said(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main([*words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, text = str(tmp_path / "cli.safetensors"), tmp_path / "text.txt"
    text.write_text(TEXT)
    ring = ("--machine", "tiny", "--devices", "2")
    facts = said(capsys, "compile", MODEL, "-o", out, *ring, "--kv", "int8", "--calibrate", str(text))
    assert (facts["kv"], facts["weights"]) == ("int8", "fp16")
    times = [said(capsys, "simulate", out, *kv, "--new-tokens", "2") for kv in ((), ("--kv", "int8"))]
    times.append(said(capsys, "simulate", "--shape", MODEL, *ring, "--kv", "int8", "--new-tokens", "2"))
    assert times[0]["total_cycles"] == times[1]["total_cycles"] == times[2]["total_cycles"]
    plain = said(capsys, "simulate", "--shape", MODEL, *ring, "--new-tokens", "2")
    for name in ("kv_bytes", "kv_stored_bytes"):
        assert 2 * times[0]["hbm"][name] == plain["hbm"][name] > 0
    assert times[0]["hbm"]["weight_bytes"] == plain["hbm"]["weight_bytes"]
    other = str(tmp_path / "plain.safetensors")
    assert said(capsys, "compile", MODEL, "-o", other, *ring)["kv"] == "fp16"
    for words, message in (
        (("simulate", other, "--kv", "int8"), "the image's K and V are not int8: leave --kv out, or compile again"),
        (("compile", MODEL, "-o", other, "--kv", "int8"), "--kv int8 needs the ranges of K and V: give --calibrate"),
        (("compile", MODEL, "-o", other, "--calibrate", str(text)), "--calibrate finds the scales of int8 K and V"),
        (
            ("compile", MODEL, "-o", other, "--kv", "int8", "--calibrate", str(tmp_path / "none.txt")),
            r"the calibration text .* cannot be read",
        ),
    ):
        assert main([*words]) == 2
        error = capsys.readouterr().err
        assert re.search(message, error), error


def test_a_report_is_of_the_same_program(image: Path) -> None:
    cases = [
        study._case(source, machine, 1, None, {}, 4, 2, kv)
        for source, machine, kv in ((image, None, "int8"), (MODEL, "tiny", "int8"), (MODEL, "tiny", None))
    ]
    first, second, plain = (case.subject.accounting["kv_bytes_per_position"] for case in cases)
    assert 2 * first == 2 * second == plain
    points = [study._point(case, case.subject, 16) for case in cases]
    assert points[0].kv_limit_ms == points[1].kv_limit_ms and points[0].ms == points[1].ms
    assert cases[1].options[-2:] == ["--kv", "int8"]


def test_the_pass_alone_only_renames() -> None:
    after = run_passes(str(transformer(fused_by_head(4, 8)).module), ["scale-caches"])
    for name in ('"h.{}.qkv.weight.kv0"', '"h.{}.o.weight.kv0"', 'kv_format = "int8"'):
        assert name in after
    assert run_passes(after, ["scale-caches"]) == after, "what is int8 stays"
    assert "kv0.int8" in run_passes(after, ["quantise"])
