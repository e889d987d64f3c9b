"""int8 weights: what is quantised and how finely, the same bits on any ring, torch's own reading of the image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, random_model
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from step_models import StepWriter
from test_backend_families import SOURCES, check, fused_by_head, transformer
from transformers import GPT2Config, GPT2LMHeadModel

import typebar
from typebar.compiler import device_ir as dev
from typebar.compiler import ir, quantisation
from typebar.compiler.driver import back_passes, build, write
from typebar.compiler.evaluate import evaluate_step
from typebar.compiler.frontend import DerivedSource, FrontendModel, ModuleSource, load_model
from typebar.compiler.packing import unpack_weights
from typebar.compiler.pipeline import parse, run_passes
from typebar.compiler.quantisation import quantise
from typebar.host.cli import main
from typebar.isa.errors import TypebarError
from typebar.isa.image import Image
from typebar.isa.instructions import Format
from typebar.isa.machine import Machine
from typebar.models import find

TINY = Machine.load("tiny")
MODEL, PROMPT = "folio-draft", "And the king said unto them"


def linear(weight: NDArray[np.float32], layout: str) -> FrontendModel:
    """A model of one matrix."""
    w = StepWriter(weight.shape[0 if layout == "out_in" else 1], 8)
    x = w.embedding("token", "wte", weight.shape[1 if layout == "out_in" else 0])
    logits = w.linear(x, w.vocab, "head", layout=layout)
    w.weights["head.weight"] = weight
    return w.model(logits)


def columns(layout: str, weight: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Integers [columns, inputs] and scales of a matrix."""
    made = quantise(linear(weight, layout))
    integers = made.model.weights.load(f"head.weight.int8.{layout}")
    assert integers.dtype == np.int8 and integers.shape == weight.shape
    return integers if layout == "out_in" else integers.T, made.model.weights.load(f"head.weight.scale.{layout}")


@pytest.mark.parametrize("layout", ["in_out", "out_in"])
@pytest.mark.parametrize("block", [1, 100, 1 << 22])
def test_each_column_fills_its_range_and_is_off_by_half_a_step(
    layout: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantisation, "_BLOCK", block)
    rng = np.random.default_rng(3)
    by_column = (rng.standard_normal((37, 24)) * 10.0 ** rng.integers(-6, 6, (37, 1))).astype(np.float32)
    integers, scale = columns(layout, by_column if layout == "out_in" else np.ascontiguousarray(by_column.T))
    assert (np.abs(integers.astype(int)).max(1) == 127).all()
    error = np.abs(integers.astype(np.float64) * scale[:, None] - by_column)
    assert (error <= 0.5001 * scale[:, None]).all() and (error.max(1) > 0.3 * scale).all()


@pytest.mark.parametrize("tiny", [0.0, 1e-45, 1e-37])
def test_columns_too_small_for_a_scale_are_zero(tiny: float) -> None:
    weight = np.ones((3, 4), np.float32)
    weight[1] = tiny
    integers, scale = columns("out_in", weight)
    assert (integers[1] == 0).all() and (integers[[0, 2]] == 127).all()
    assert np.isfinite(scale).all() and (scale >= np.finfo(np.float32).smallest_normal).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_is_refused(bad: float, tmp_path: Path) -> None:
    weight = np.ones((5, 8), np.float32)
    weight[3, 2] = bad
    with pytest.raises(TypebarError, match=r"'head.weight' holds NaN or infinity"):
        write(build(linear(weight, "out_in"), TINY, 1, Format.INT8), tmp_path / "bad.safetensors")


def test_nothing_is_loaded_before_it_is_packed_and_the_model_stays() -> None:
    model = transformer(fused_by_head(4, 8))
    before, loaded = str(model.module), []

    class Watched(ModuleSource):
        def load(self, name: str) -> np.ndarray:
            loaded.append(name)
            return super().load(name)

    tensors = {name: torch.from_numpy(model.weights.load(name)) for name in model.weights.names()}
    watched = FrontendModel(model.module, DerivedSource(Watched(tensors)), None, model.config, "step")
    made = build(watched, TINY, 2, Format.INT8)
    assert not loaded and str(model.module) == before
    name = "h.1.qkv.weight"
    made.model.lookup(f"{name}.scale.out_in")
    made.model.lookup(f"{name}.int8.out_in")
    assert loaded == [name, name], "the scales are kept, the weight is not"


@pytest.mark.parametrize("name", SOURCES)
def test_bits_do_not_depend_on_the_number_of_devices(name: str, tmp_path: Path) -> None:
    model = SOURCES[name]()
    first = check(quantise(model).model, tmp_path, 12)
    path, tokens = tmp_path / "int8.safetensors", np.random.default_rng(1).integers(0, model.config["vocab"], 12)
    write(build(model, TINY, 2, Format.INT8), path)
    with typebar.load(path, device="sim") as found, typebar.load(path, device="torch") as fallback:
        assert found.image.manifest.weights_format == "int8"
        assert np.array_equal(found.logits(tokens.tolist()), first)
        exact = evaluate_step(quantise(model).model.module, quantise(model).model.weights, tokens.tolist()).numpy()
        assert np.abs(fallback.logits(tokens.tolist()) - exact).max() <= 1e-5 * np.abs(exact).max()


def tied(layout: str) -> FrontendModel:
    """The head's matrix is the embedding; with in_out a square one is used in both layouts."""
    w = StepWriter(24, 8)
    x = w.embedding("token", "wte", 24)
    if layout == "in_out":
        x = w.linear(x, 24, "square", layout="in_out")
        x = w.linear(x, 24, "square")
    logits = w.linear(x, 24, "head")
    model = w.model(logits)
    text = str(model.module).replace("head.weight", "wte")
    return FrontendModel(parse(text), model.weights, None, model.config, "tied")


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_embeddings_stay_and_a_matrix_may_be_used_twice(layout: str, tmp_path: Path) -> None:
    model, path = tied(layout), tmp_path / "tied.safetensors"
    made = build(model, TINY, 3, Format.INT8)
    write(made, path)
    with Image.open(path) as image:
        found = unpack_weights(image)
        assert np.array_equal(found("wte"), model.weights.load("wte")), "values that fp16 holds"
        for name in quantise(model).model.weights.names():
            if ".int8." in name or ".scale." in name:
                assert np.array_equal(found(name), made.model.lookup(name)), name
        elements = sum(op.weight is not None and 24 * 24 for op in model.module.walk() if isinstance(op, ir.LinearOp))
        assert image.manifest.accounting["weight_bytes"] == elements
    check(quantise(model).model, tmp_path, 8, (2,))


def test_the_pass_alone_only_renames() -> None:
    before = str(transformer(fused_by_head(4, 8)).module)
    after = run_passes(before, ["quantise"])
    for name in ('"h.{}.qkv.weight.scale.out_in"', "head.weight.int8.out_in"):
        assert f"@{name}" in after
    assert run_passes(after, ["quantise"]) == after, "what is int8 stays"


def test_an_encoder_is_quantised_too(tmp_path: Path) -> None:
    family = next(item for item in FAMILIES if item.name == "T5 v1.1")
    model = load_model(random_model(family), {"context": 12, "source_context": 12, "decoder_start_token_id": 0})
    source, tokens = [5, 3, 9, 1], [0, 7, 2]
    rows = []
    for devices in (1, 3):
        path = tmp_path / f"{devices}.safetensors"
        write(build(model, TINY, devices, Format.INT8), path)
        with typebar.load(path, device="sim") as found:
            rows.append(found.logits(tokens, source))
            if devices == 1:
                kinds = {t.meta.get("format") for t in found.image.manifest.tensors if t.meta["kind"] == "matrix"}
                assert kinds == {"int8"}
    assert np.array_equal(rows[0], rows[1])
    made = quantise(model).model
    exact = evaluate_step(made.module, made.weights, tokens, torch.float64, source).numpy()
    plain = evaluate_step(model.module, model.weights, tokens, torch.float64, source).numpy()
    assert np.abs(rows[0] - exact).max() < 0.3 * np.abs(rows[0] - plain).max()


@pytest.mark.parametrize("chains", [True, False])
def test_scales_take_no_segment_from_what_is_computed(chains: bool) -> None:
    """On `u280` the 16 segments are enough for a GPT-2 layer, so that one head never waits for another.

    Without chains attention needs more of them: scales and biases then share theirs.
    """
    machine = Machine.load("u280").override({"vector.chains": str(chains).lower()})
    torch.manual_seed(1)
    config = GPT2Config(n_embd=64, n_head=8, n_layer=2, vocab_size=97, n_positions=64)
    module = quantise(load_model(GPT2LMHeadModel(config))).model.module
    for step in back_passes(machine, 2):
        step.apply(dev.context(), module)
    program = next(op for op in module.body.block.ops if isinstance(op, dev.ProgramOp))
    assert program.step is not None and program.step.value.data == machine.segment_words
    (loop,) = (op for op in program.body.block.ops if isinstance(op, ir.RepeatOp))
    for product in (op for op in loop.body.block.ops if isinstance(op, dev.MatrixOp)):
        assert product.scale is not None and product.bias is not None
        loaded = [value.owner for value in (product.scale, product.bias)]
        segments = {op.address // machine.segment_words for op in loaded if isinstance(op, dev.BiasOp)}
        assert len(segments) == (2 if chains else 1)


# Through the host -----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("int8") / "draft.safetensors"
    typebar.compile(MODEL, path, machine="tiny", devices=2, weights="int8")
    return path


def test_compare_explains_int8_and_shows_what_it_costs(image: Path) -> None:
    own, cost = (typebar.compare(image, PROMPT, against=against) for against in (None, MODEL))
    assert own.first is None and cost.first is None
    assert [row.name for row in own.rows] == [row.name for row in cost.rows]
    assert own.rows[1].name == "transformer.h.0.attn.c_proj"
    for near, far in zip(own.rows[1:], cost.rows[1:], strict=True):
        assert far.image.rms > 5 * near.image.rms
        assert 0.9 < far.image.rms / far.explained.rms < 1.1, "all of the cost is the quantisation's"


def test_compare_finds_a_layer_that_quantising_does_not_explain(image: Path, tmp_path: Path) -> None:
    tensors = load_file(find(MODEL).path / "model.safetensors")
    name = "transformer.h.1.mlp.c_fc.weight"
    noise = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(5))
    tensors[name] = (tensors[name].float() * (1 + 0.1 * noise)).half()
    for file in find(MODEL).path.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    first = typebar.compare(image, PROMPT, against=tmp_path).first
    assert first is not None and (first.layer, first.name) == ("layer 1", "transformer.h.1.mlp.c_proj")


def said(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main([*words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_commands(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "cli.safetensors")
    ring = ("--machine", "tiny", "--devices", "2", "--weights", "int8")
    facts = said(capsys, "compile", MODEL, "-o", out, *ring)
    assert facts["weights"] == "int8" and Path(out).read_bytes() == image.read_bytes()
    assert said(capsys, "check", MODEL, *ring)["ok"]
    times = [said(capsys, "simulate", source, *ring, "--new-tokens", "2") for source in (str(image),)]
    times.append(said(capsys, "simulate", "--shape", MODEL, *ring, "--new-tokens", "2"))
    assert times[0]["total_cycles"] == times[1]["total_cycles"]
    assert main(["simulate", str(image), "--weights", "fp16"]) == 2
    assert "the image has int8 weights, not fp16" in capsys.readouterr().err


def test_int8_halves_the_bytes_of_a_pass() -> None:
    fp16, int8 = (
        typebar.simulate(MODEL, machine="tiny", devices=2, weights=w, new_tokens=2).hbm for w in ("fp16", "int8")
    )
    assert int8["weight_bytes"] * 2 == fp16["weight_bytes"] and int8["kv_bytes"] == fp16["kv_bytes"]
