"""Models with an encoder: exact on any number of devices, encoded once a request, and near float64's values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from encoder_decoder import Formulas, Shape, model

import typebar
from typebar.compiler import device_ir as dev
from typebar.compiler.driver import back_passes, build, write
from typebar.compiler.emit.head import DESCRIPTOR_WORDS
from typebar.compiler.pipeline import run_passes
from typebar.host import generation
from typebar.host.api import TextModel
from typebar.host.driver import DeviceEngine
from typebar.host.engine import Engine
from typebar.host.rtl import RtlDevice
from typebar.host.select import Candidate, simulated
from typebar.host.simulator import SimulatedDevice
from typebar.isa.errors import TypebarError
from typebar.isa.image import Image
from typebar.isa.instructions import Format, Region
from typebar.isa.machine import Machine
from typebar.isa.program import assemble, disassemble
from typebar.sim.functional import DeviceMemory, FunctionalSimulator
from typebar.sim.timing import run_timing

TINY = Machine.load("tiny")
SHAPES = {
    "plain": Shape(),
    "gated, heads padded": Shape(width=60, heads=5, head=12, gated=True),
    "several attention blocks": Shape(source=150, context=80, heads=1, layers=(1, 1)),
    "layers apart, the memory carried": Shape(apart=2, carried=True, layers=(4, 2)),
    "fused K and V, biases": Shape(fused=True, biased=True, relative=False, head=20, heads=2),
}


def image_of(shape: Shape, devices: int, folder: Path) -> Path:
    path = folder / f"{devices}.safetensors"
    write(build(model(shape), TINY, devices, Format.FP16), path)
    return path


def texts(shape: Shape, length: int) -> tuple[list[int], list[int]]:
    """A source text and a decoder's tokens."""
    random = np.random.default_rng(length)
    many = min(shape.context, 70 if shape.source > 64 else 8)
    return random.integers(0, shape.vocab, length).tolist(), [0, *random.integers(0, shape.vocab, many - 1).tolist()]


def root_mean_square(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values.astype(np.float64)))))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_logits_are_equal_on_any_ring_and_near_float64(shape: Shape, tmp_path: Path) -> None:
    """One image does all lengths, one request after another: the longest first, then shorter ones."""
    lengths = (shape.source, 1, 5, shape.source // 2 + 1)
    rows: dict[int, list[np.ndarray]] = {length: [] for length in lengths}
    for devices in (1, 2, 3, 4):
        with typebar.load(image_of(shape, devices, tmp_path), device=["sim"]) as text_model:
            for length in lengths:
                source, tokens = texts(shape, length)
                rows[length].append(text_model.logits(tokens, source))
    for length, found in rows.items():
        for other in found[1:]:
            assert np.array_equal(found[0].view(np.int32), other.view(np.int32)), length
        exact, half = (Formulas(shape, dtype).logits(*texts(shape, length)) for dtype in (np.float64, np.float16))
        assert root_mean_square(found[0] - exact) <= root_mean_square(half - exact)
        assert np.abs(exact).max() > 1, "the logits must be worth comparing"


@pytest.mark.parametrize("shape", [SHAPES["plain"], SHAPES["several attention blocks"]])
def test_nothing_depends_on_what_memory_and_registers_held(shape: Shape, tmp_path: Path) -> None:
    """Registers, caches and saved rows full of NaN change nothing."""
    source, tokens = texts(shape, 7)
    results = []
    with Image.open(image_of(shape, 2, tmp_path)) as image:
        io, size = image.manifest.io, image.manifest.regions[Region.IO]
        for filler in (0, 0xFF):
            memories = []
            for rank in range(2):
                regions = {item: image.region(rank, item) for item in (Region.WEIGHTS, Region.PARAMS, Region.LOCAL)}
                regions[Region.KV] = np.full(image.manifest.regions[Region.KV], filler, np.uint8)
                regions[Region.IO] = np.full(size, filler, np.uint8)
                words = regions[Region.IO].view(np.int32)
                request = {"start": 0, "count": len(tokens), "new": 1, "eos": -1, "flags": 1, "source": len(source)}
                for name, value in request.items():
                    words[DESCRIPTOR_WORDS[name]] = value
                words[16 * io["tokens_line"] :][: len(tokens)] = tokens
                words[16 * io["source_line"] :][: len(source)] = source
                memories.append(DeviceMemory(regions))
            simulator = FunctionalSimulator(image.program, TINY, 2, memories)
            for rank in range(2):
                simulator.vector_registers(rank).view(np.uint8)[:] = filler
            simulator.run(image.manifest.entries["encode"])
            parts = [item.regions[Region.IO].view(np.uint32)[16 * io["logits_line"] :] for item in memories]
            results.append(np.concatenate([part[: io["logits_per_device"]] for part in parts])[: shape.vocab])
    assert np.array_equal(results[0], results[1])
    assert np.isfinite(results[0].view(np.float32)).all()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_of(SHAPES["plain"], 2, tmp_path_factory.mktemp("image"))


def test_generation_follows_the_logits_and_requests_do_not_mix(image: Path) -> None:
    with typebar.load(image, "sim") as text_model:
        for length in (20, 3):
            source, _ = texts(SHAPES["plain"], length)
            made = text_model.generate(input_ids=source, max_new_tokens=10, eos_token_id=-1)
            assert made.prompt_tokens == source and len(made.tokens) == 10
            rows = text_model.logits([0, *made.tokens[:-1]], source)
            assert made.tokens == rows.argmax(axis=1).tolist()
            sampled = text_model.generate(
                input_ids=source, max_new_tokens=10, eos_token_id=-1, do_sample=True, top_k=1, seed=0
            )
            assert sampled.tokens == made.tokens


def test_several_tokens_may_end_a_text(image: Path) -> None:
    source, _ = texts(SHAPES["plain"], 9)
    with typebar.load(image, "sim") as text_model:
        free = text_model.generate(input_ids=source, max_new_tokens=12, eos_token_id=-1).tokens
        absent = next(token for token in range(50) if token not in free)
        end = free[5]
        made = text_model.generate(input_ids=source, max_new_tokens=12, eos_token_id=[absent, end])
    assert made.tokens == free[: free.index(end) + 1] and made.finish_reason == "stop"


def test_losing_a_device_costs_no_token(image: Path) -> None:
    """The next device encodes the source text again and carries on from the last token."""
    source, _ = texts(SHAPES["plain"], 6)
    wanted = run(image, [Candidate("sim", simulated)], source)
    for count in (0, 1, 5):
        seen: list[int] = []

        def broken(opened: Image, seen: list[int] = seen, count: int = count) -> Engine:
            device = SimulatedDevice(opened.machine, 2, lambda rank, executed: len(seen) >= count and executed > 200)
            return DeviceEngine(opened, device, "sim")

        assert run(image, [Candidate("lossy", broken), Candidate("sim", simulated)], source, seen) == wanted == seen


def run(path: Path, chain: list[Candidate], source: list[int], seen: list[int] | None = None) -> list[int]:
    with Image.open(path, verify=False) as opened:
        engines = generation.Chain(opened, chain, [])
        request = generation.Request([0], 8, (), None, source)
        generation.run(engines, request, (seen if seen is not None else []).append)
        assert len(engines.reasons) == len(chain) - 1
    return request.tokens


def test_torch_carries_on(image: Path) -> None:
    source, tokens = texts(SHAPES["plain"], 11)
    with typebar.load(image, "torch") as text_model:
        found = text_model.logits(tokens, source)
        short, _ = texts(SHAPES["plain"], 2)
        again = text_model.logits(tokens, short)
    formulas = Formulas(SHAPES["plain"])
    assert np.abs(found - formulas.logits(source, tokens)).max() < 1e-4
    assert np.abs(again - formulas.logits(short, tokens)).max() < 1e-4


def bad_calls(text_model: TextModel) -> None:
    cases = [
        (lambda: text_model.generate(input_ids=[2] * 33), "33 tokens exceed the encoder's context of 32"),
        (lambda: text_model.generate(input_ids=[]), "the source text is empty"),
        (lambda: text_model.generate(input_ids=[50]), "token 50 is outside the vocabulary"),
        (lambda: text_model.generate(input_ids=[2], max_new_tokens=16), "exceed the model's context of 16"),
        (lambda: text_model.chat_prompt([{"role": "user", "content": "x"}]), "no chat template"),
        (lambda: text_model.logits([0]), "give a source text besides"),
    ]
    for call, message in cases:
        with pytest.raises(TypebarError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_bad_requests_are_one_line(image: Path) -> None:
    with typebar.load(image, "sim") as text_model:
        bad_calls(text_model)
    with Image.open(image) as opened, pytest.raises(TypebarError, match="no source text yet: call encode first"):
        simulated(opened).logits([0])


def test_an_unknown_first_token_is_one_line(tmp_path: Path) -> None:
    source = model(SHAPES["plain"])
    source.config["decoder_start_token_id"] = None
    with pytest.raises(TypebarError, match="the decoder's first token is None: give config="):
        write(build(source, TINY, 1, Format.FP16), tmp_path / "x.safetensors")


def test_the_program_is_independent_of_lengths_and_round_trips() -> None:
    short, long = (build(model(Shape(source=n, context=c)), TINY, 2, Format.FP16) for n, c in ((20, 10), (60, 40)))
    assert len(short.program) == len(long.program) < 1400
    assert assemble(disassemble(long.program)) == long.program


def test_every_cross_attention_key_is_computed_once() -> None:
    """Weight and cache traffic of the timing simulator is what the accounting says, padding apart."""
    made = build(model(Shape(vocab=48)), TINY, 1, Format.FP16)
    io = np.zeros((1, made.memory.io.bytes // 4), np.int32)
    counts = []
    for source, new in ((3, 1), (3, 2), (9, 1), (9, 2)):
        for name, value in {"count": 1, "new": new, "eos": -1, "source": source}.items():
            io[:, DESCRIPTOR_WORDS[name]] = value
        counts.append(run_timing(made.program, TINY, 1, io, entry=made.program.labels["encode"]).counters[0])
    accounts = made.memory.accounting
    useful = [item.weights_useful_bytes for item in counts]
    assert useful[1] - useful[0] == useful[3] - useful[2] == accounts["weight_bytes"], "a token reads no memory side"
    assert useful[2] - useful[0] == 6 * accounts["source_weight_bytes"]
    stored = [item.kv_useful_written_bytes for item in counts]
    assert stored[1] - stored[0] == accounts["kv_bytes_per_position"]
    per_position = accounts["source_kv_bytes_per_position"] + accounts["cross_kv_bytes_per_position"]
    assert stored[2] - stored[0] == 6 * per_position
    read = [item.kv_useful_bytes for item in counts]
    own, cross = accounts["source_kv_bytes_per_position"], accounts["cross_kv_bytes_per_position"]
    assert read[2] - read[0] == (81 - 9) * own + 6 * cross


def test_simulation_reports_the_encoder(image: Path) -> None:
    report = typebar.simulate(image, prompt_tokens=12, new_tokens=4)
    encode, prefill = report.encode, report.prefill
    assert encode["tokens"] == prefill["tokens"] == 12
    assert 0 < encode["cycles"] < prefill["cycles"] < report.total_cycles
    assert report.decode["tokens"] == 3 and report.decode["cycles"] == report.total_cycles - prefill["cycles"]
    assert all(report.hbm[name] >= 0 for name in report.hbm)
    longer = typebar.simulate(image, prompt_tokens=24, new_tokens=4)
    assert longer.encode["cycles"] > 1.8 * encode["cycles"]
    with pytest.raises(TypebarError, match="prompt_tokens = 33 exceed the encoder's context of 32"):
        typebar.simulate(image, prompt_tokens=33, new_tokens=1)


def test_every_pass_leaves_text_that_can_be_read() -> None:
    module = model(SHAPES["layers apart, the memory carried"]).module
    options = ["partition{devices=2 align=8}", "fuse", "phases", "allocate{words=16384 segment=1024}"]
    text = run_passes(str(module), options)
    assert text.count("tbd.phase") == 7 and "tb.encoder" not in text
    assert run_passes(text, []) == text
    for step in back_passes(TINY, 2):
        step.apply(dev.context(), module)
        module.verify()


def test_the_hardware_does_the_same_in_the_simulators_cycles(tmp_path: Path) -> None:
    """A launch that encodes and one that goes on: tokens, caches, rows, and cycles."""
    made = build(model(Shape(layers=(2, 1))), TINY, 1, Format.FP16)
    path = tmp_path / "image.safetensors"
    write(made, path)
    simulated_ring, hardware, memories = SimulatedDevice(TINY, 1), RtlDevice(TINY, 1), []
    with Image.open(path) as opened:
        for device in (simulated_ring, hardware):
            engine, tokens = DeviceEngine(opened, device, "test"), list[int]()
            cycles = []
            engine.encode([4, 7, 9])
            for entry, fed in (("encode", [0]), ("main", tokens)):
                position = engine.position
                engine.greedy(fed[-1:], 2, None, tokens.append)
                if device is hardware:
                    io = np.zeros((1, made.memory.io.bytes // 4), np.int32)
                    request = {"start": position, "count": 1, "new": 2, "eos": -1, "source": 3}
                    for name, value in request.items():
                        io[:, DESCRIPTOR_WORDS[name]] = value
                    timed = run_timing(made.program, TINY, 1, io, entry=made.program.labels[entry])
                    cycles.append((hardware.total(0, "cycles"), timed.total_cycles))
            sizes = opened.manifest.regions
            memories.append((tokens, [device.read(0, item, 0, sizes[item]) for item in (Region.KV, Region.IO)]))
    hardware.native.close()
    (wanted, theirs), (found, mine) = memories
    assert wanted == found and len(found) == 4
    assert all(np.array_equal(a, b) for a, b in zip(theirs, mine, strict=True))
    assert all(measured == expected for measured, expected in cycles), cycles
