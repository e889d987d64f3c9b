"""Gathers between two products in halves: which ones, with the bits of whole ones, and sooner."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_rtl_generation import generate
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from xdsl.ir import SSAValue

import typebar
from typebar.compiler import device_ir as dev
from typebar.compiler import ir
from typebar.compiler.driver import allocated, as_stored, build, write
from typebar.compiler.frontend import FrontendModel, load_model
from typebar.compiler.memory import program_of
from typebar.compiler.packing import unpack_weights
from typebar.compiler.passes.halve import HalvePass
from typebar.compiler.rows import place_of
from typebar.host.rtl import RtlDevice
from typebar.host.simulator import SimulatedDevice
from typebar.isa.image import Image
from typebar.isa.instructions import Format
from typebar.isa.machine import Machine

TINY = Machine.load("tiny").override(
    {"ring.hop_latency": "8", "matrix.dot_latency": "8", "matrix.epilogue_latency": "16", "vector.latency": "12"}
)
LANES = TINY.matrix.lanes
TOKENS = [5, 9, 30, 3, 17, 41, 2]
INNER = 64 * LANES


def gpt2(inner: int = INNER) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 64, "n_head": 4, "n_inner": inner, "n_layer": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, vocab_size=50, n_positions=32)).eval()  # type: ignore[arg-type]


def llama() -> LlamaForCausalLM:
    """What is gathered is the product of two matrices' results, one of them through an activation."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": INNER}
    return LlamaForCausalLM(
        LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=61, max_position_embeddings=32)  # type: ignore[arg-type]
    ).eval()


def parts(
    source: FrontendModel, devices: int, machine: Machine = TINY, fmt: Format = Format.FP16
) -> list[dev.MatrixOp]:
    """The products by parts of their rows, in a layer."""
    program = program_of(allocated(as_stored(source, fmt)[0], machine, devices))
    return [op for op in program.walk() if isinstance(op, dev.MatrixOp) and op.first_row is not None]


def logits(source: FrontendModel, path: Path, devices: int, fmt: Format) -> NDArray[np.float32]:
    write(build(source, TINY, devices, fmt), path)
    with typebar.load(path, device="sim") as model:
        found: NDArray[np.float32] = model.logits(TOKENS)
    return found


@pytest.mark.parametrize("fmt", [Format.FP16, Format.INT8], ids=["fp16", "int8"])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_halves_have_the_bits_of_one_device(make: type, fmt: Format, tmp_path: Path) -> None:
    source = load_model(make())
    assert not parts(source, 1, fmt=fmt)
    first = logits(source, tmp_path / "1", 1, fmt)
    for devices in (2, 4):
        assert len(parts(source, devices, fmt=fmt)) == 2, devices
        assert np.array_equal(first, logits(source, tmp_path / "n", devices, fmt)), devices


def test_layers_that_share_their_matrices(tmp_path: Path) -> None:
    """Their names have no layer in them."""
    model = gpt2()
    model.transformer.h[1].mlp = model.transformer.h[0].mlp
    source = load_model(model)
    assert parts(source, 2)
    first, found = (logits(source, tmp_path / "image", devices, Format.FP16) for devices in (1, 2))
    assert np.array_equal(first, found)


def test_the_first_half_travels_beside_the_second_product() -> None:
    program = program_of(allocated(load_model(gpt2()), TINY, 2))
    names = [op.name for op in program.walk() if isinstance(op, dev.MatrixOp | dev.GatherOp)]
    halves = ["tbd.matrix", "tbd.gather"] * 2 + ["tbd.matrix"] * 2
    assert any(names[at : at + len(halves)] == halves for at in range(len(names)))
    first, second = parts(load_model(gpt2()), 2)
    assert (int(first.first_row.value.data), int(second.first_row.value.data)) == (0, INNER // 2)  # type: ignore[union-attr]
    assert second.addend is first.out and place_of(second.out) == place_of(first.out)
    assert first.bias is None and first.activation is None and second.bias is not None


@pytest.mark.parametrize(
    ("inner", "devices", "halved"),
    [
        (INNER, 4, True),
        (INNER, 3, False),  # a half is no whole number of granules for each
        (INNER + 2 * LANES, 4, False),
        (INNER + LANES, 2, False),  # chunks of a half are not whole
    ],
)
def test_only_halves_of_whole_chunks_shared_out_evenly(inner: int, devices: int, halved: bool) -> None:
    assert bool(parts(load_model(gpt2(inner)), devices)) == halved


@pytest.mark.parametrize(
    "changes",
    [{"control.barriers": "true"}, {"ring.hop_latency": "500"}, {"matrix.epilogue_latency": "200"}],
    ids=["barriers", "long hops", "late products"],
)
def test_gathers_stay_whole_where_halves_bring_nothing(changes: dict[str, str]) -> None:
    assert parts(load_model(gpt2()), 2)
    assert not parts(load_model(gpt2()), 2, TINY.override(changes))


def test_weights_come_back_whole_from_the_image(tmp_path: Path) -> None:
    source = load_model(gpt2())
    write(build(source, TINY, 2, Format.FP16), tmp_path / "image")
    lookup, name = unpack_weights(Image.open(tmp_path / "image")), "transformer.h.1.mlp.c_proj.weight"
    assert np.array_equal(lookup(name), source.weights.load(name).astype(np.float16).astype(np.float32))


def test_halves_are_sooner_where_hops_are_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def token() -> float:
        write(build(load_model(gpt2()), TINY, 4, Format.FP16), tmp_path / "image")
        run = typebar.simulate(tmp_path / "image", prompt_tokens=4, new_tokens=2)
        return float(run.decode["cycles"])

    halved = token()
    monkeypatch.setattr("typebar.compiler.passes.halve.HalvePass.apply", lambda *_: None)
    whole = token()
    assert halved < whole


def test_the_hardware_gives_the_functional_simulators_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine.load("tiny")  # whose model other tests build, too; there halves bring nothing
    monkeypatch.setattr(HalvePass, "of", staticmethod(lambda machine, _: HalvePass(machine.matrix.lanes)))
    write(build(load_model(gpt2(16 * LANES)), machine, 2, Format.FP16), tmp_path / "image")
    with Image.open(tmp_path / "image") as image:
        expected, memories = generate(image, SimulatedDevice(machine, 2), 3)
        hardware = RtlDevice(machine, 2)
        tokens, found = generate(image, hardware, 3)
        hardware.native.close()
    assert parts(load_model(gpt2(16 * LANES)), 2, machine) and tokens == expected
    for mine, theirs in zip(found, memories, strict=True):
        assert np.array_equal(mine, theirs)


def test_what_a_layer_loads_first_waits_for_nothing_of_the_layer_before() -> None:
    """In hazard segments of their own, its loads run ahead of the ring and the norm that end the layer before."""
    program = program_of(allocated(load_model(gpt2()), TINY, 2))
    loop = next(op for op in program.walk() if isinstance(op, ir.RepeatOp))
    ops = list(loop.body.block.ops)
    products = [at for at, op in enumerate(ops) if isinstance(op, dev.MatrixOp)]
    loads = [op for op in ops[: products[0]] if isinstance(op, dev.ParamOp | dev.BiasOp)]
    late = [value for op in ops[products[-1] :] for value in op.results]
    assert loads and late

    def segments(value: SSAValue) -> set[int]:
        first = place_of(value)
        return set(range(first // TINY.segment_words, (first + ir.width(value) - 1) // TINY.segment_words + 1))

    for load in loads:
        assert not any(segments(load.out) & segments(value) for value in late), load
