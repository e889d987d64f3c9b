"""The compiler's back half: bits independent of the device count, values near float64, bytes counted to the byte."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import typebar
from typebar.compiler.driver import Compiled, build, weights_format, write
from typebar.compiler.evaluate import evaluate_step
from typebar.compiler.frontend import FrontendModel, load_model
from typebar.compiler.memory import IoMap
from typebar.compiler.passes.allocate import AllocationError
from typebar.compiler.pipeline import run_passes
from typebar.compiler.problems import LoweringError
from typebar.isa.errors import TypebarError
from typebar.isa.image import Image
from typebar.isa.instructions import Format, Region
from typebar.isa.machine import Machine
from typebar.isa.program import assemble, disassemble, encode
from typebar.sim.functional import DeviceMemory, FunctionalSimulator
from typebar.sim.timing import TimingResult, run_timing

ODD_SHAPES = {
    "plain": {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 97, "n_positions": 48},
    "heads padded to the alignment": {"n_embd": 60, "n_head": 5, "n_layer": 2, "vocab_size": 50, "n_positions": 32},
    "fewer heads than devices": {"n_embd": 40, "n_head": 2, "n_layer": 1, "vocab_size": 33, "n_positions": 24},
    "several attention blocks": {"n_embd": 24, "n_head": 1, "n_layer": 2, "vocab_size": 41, "n_positions": 150},
    "wide heads in several chunks": {"n_embd": 104, "n_head": 2, "n_layer": 1, "vocab_size": 64, "n_positions": 20},
    "vocabulary smaller than the ring": {"n_embd": 16, "n_head": 2, "n_layer": 1, "vocab_size": 9, "n_positions": 16},
}


def random_model(seed: int = 0, **shape: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(**shape, initializer_range=0.2)).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()  # values that every format of memory can hold exactly
    return model


def root_mean_square(values: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def logits_on(
    source: FrontendModel, folder: Path, machine: str, devices: int, tokens: list[int], settings: str = ""
) -> NDArray[np.float32]:
    path = folder / f"{machine}-{devices}.safetensors"
    made_for = Machine.load(machine).override(dict(item.split("=", 1) for item in settings.split()))
    write(build(source, made_for, devices, Format.FP16), path)
    with typebar.load(path, device=["sim"]) as text_model:
        logits: NDArray[np.float32] = text_model.logits(tokens)
    return logits


@pytest.mark.parametrize("shape", ODD_SHAPES.values(), ids=ODD_SHAPES.keys())
def test_logits_do_not_depend_on_the_number_of_devices(shape: dict[str, int], tmp_path: Path) -> None:
    model = random_model(**shape)
    length = min(shape["n_positions"], 80)
    tokens = np.random.default_rng(1).integers(0, shape["vocab_size"], length).tolist()
    source = load_model(model)
    first = logits_on(source, tmp_path, "tiny", 1, tokens)
    for devices in (2, 3, 4):
        assert np.array_equal(first, logits_on(source, tmp_path, "tiny", devices, tokens)), devices
    exact = evaluate_step(source.module, source.weights, tokens, torch.float64).numpy()
    half = evaluate_step(source.module, source.weights, tokens, torch.float16).numpy()
    assert root_mean_square(first - exact) <= root_mean_square(half - exact)
    assert np.abs(exact).max() > 1, "the model's logits must be worth comparing"


HEAD_WIDTHS = (64, 80, 96, 128)
WIDE_HEADS = {
    f"heads of {width}": {"n_embd": 2 * width, "n_head": 2, "n_layer": 1, "vocab_size": 70, "n_positions": 70}
    for width in HEAD_WIDTHS
}


@pytest.mark.parametrize("shape", (ODD_SHAPES | WIDE_HEADS).values(), ids=(ODD_SHAPES | WIDE_HEADS).keys())
def test_logits_do_not_depend_on_the_words_of_a_register_row(shape: dict[str, int], tmp_path: Path) -> None:
    """No sum's order follows rows; it follows the alignment only where that pads heads (docs/decisions.md, 11)."""
    source = load_model(random_model(**shape))
    length = min(shape["n_positions"], 70)
    tokens = np.random.default_rng(1).integers(0, shape["vocab_size"], length).tolist()
    numerics = "matrix.lanes=32 matrix.fifo_port_bytes=256 matrix.interleave=32 attention_block=128"

    def run(devices: int, lanes: int, align: int) -> NDArray[np.float32]:
        settings = f"{numerics} vector.lanes={lanes} vector.align={align} vector.words=32768"
        return logits_on(source, tmp_path, "tiny", devices, tokens, settings)

    first = run(1, 8, 32)
    for devices, lanes in ((1, 32), (3, 32), (2, 4)):
        assert np.array_equal(first, run(devices, lanes, 32)), (devices, lanes)
    if shape["n_embd"] // shape["n_head"] % 32 == 0:
        for align in (8, 16):
            assert np.array_equal(first, run(1, 8, align)), align


def test_a_partial_chunk_of_keys_between_vector_bases_is_refused() -> None:
    source = load_model(random_model(**ODD_SHAPES["heads padded to the alignment"]))
    with pytest.raises(TypebarError, match=r"12 words ends 4 words into a chunk of matrix\.lanes = 8, .*\.align = 32"):
        build(source, Machine.load("tiny").override({"vector.align": "32"}), 1, Format.FP16)


@pytest.mark.parametrize("devices", [1, 2])
def test_barriers_change_time_and_no_bit(devices: int, tmp_path: Path) -> None:
    """With `control.barriers` four gathers a layer, on one device too, each followed by a fence."""
    source, tokens = load_model(random_model(**ODD_SHAPES["plain"])), [5, 9, 90, 3]
    apart = Machine.load("tiny").override({"control.barriers": "true"})
    made = build(source, apart, devices, Format.FP16)
    names = [op.kind.name for op in made.program.ops]
    token = made.program.labels["token"]
    gathers, fences = (
        [i for i, name in enumerate(names) if name == kind and i > token] for kind in ("gather", "fence")
    )
    assert len(gathers) == 4 + (devices > 1), "the layers are one loop; the best of all devices is gathered once more"
    assert [index + 1 for index in gathers[:4]] == fences
    path = tmp_path / "barriers.safetensors"
    write(made, path)
    with typebar.load(path, device=["sim"]) as text_model:
        logits = text_model.logits(tokens)
    assert np.array_equal(logits, logits_on(source, tmp_path, "tiny", devices, tokens))
    together = build(source, Machine.load("tiny"), devices, Format.FP16)
    assert timing(made, 3, 3).total_cycles > timing(together, 3, 3).total_cycles


def grouped_model() -> LlamaForCausalLM:
    """Root-mean-square norms, rotary positions and three query heads to a K/V head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48, num_attention_heads=6, num_key_value_heads=2, intermediate_size=64, num_hidden_layers=2,
        vocab_size=70, max_position_embeddings=40, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    return model


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize(
    "model",
    [lambda: random_model(**ODD_SHAPES["plain"]), lambda: random_model(**ODD_SHAPES["several attention blocks"]),
     grouped_model],
    ids=["plain", "several blocks", "grouped"],
)  # fmt: skip
def test_chains_change_time_and_no_bit(model: Callable[[], torch.nn.Module], devices: int, tmp_path: Path) -> None:
    source, results, cycles = load_model(model()), [], []
    tokens = np.random.default_rng(2).integers(0, 41, 30).tolist()
    for flag in ("false", "true"):
        made = build(source, Machine.load("tiny").override({"vector.chains": flag}), devices, Format.FP16)
        assert any(op.kind.name == "vchain" for op in made.program.ops) == (flag == "true")
        path = tmp_path / f"{flag}.safetensors"
        write(made, path)
        with typebar.load(path, device=["sim"]) as text_model:
            generated = text_model.generate(input_ids=tokens[:9], max_new_tokens=8)
            results.append((text_model.logits(tokens), generated.tokens))
        cycles.append(timing(made, 1, 6).total_cycles)
    assert np.array_equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert cycles[1] < cycles[0]


@pytest.mark.parametrize("shape", ODD_SHAPES.values(), ids=ODD_SHAPES.keys())
def test_logits_do_not_depend_on_what_memory_and_registers_held(shape: dict[str, int], tmp_path: Path) -> None:
    """Registers and caches full of NaN, as at power-up or after another image, change nothing."""
    path, tokens = tmp_path / "image.safetensors", [1, 5, 2, 7, 3]
    write(build(load_model(random_model(**shape)), Machine.load("tiny"), 2, Format.FP16), path)
    results = []
    for filler in (0, 0xFF):
        image = Image.open(path)
        devices = memories(image, tokens, filler)
        simulator = FunctionalSimulator(image.program, image.machine, 2, devices)
        for device in range(2):
            simulator.vector_registers(device).view(np.uint8)[:] = filler
        simulator.run()
        io = IoMap(**image.manifest.io)
        parts = [device.regions[Region.IO].view(np.uint32)[16 * io.logits_line :] for device in devices]
        results.append(np.concatenate([part[: io.logits_per_device] for part in parts])[: shape["vocab_size"]])
    assert np.array_equal(results[0], results[1])
    assert np.isfinite(results[0].view(np.float32)).all()


def memories(image: Image, tokens: list[int], filler: int) -> list[DeviceMemory]:
    """Every device's regions: the caches full of `filler`, a request for one token in IO."""
    made = []
    for device in range(image.manifest.devices):
        regions = {region: image.region(device, region) for region in (Region.WEIGHTS, Region.PARAMS, Region.LOCAL)}
        regions[Region.KV] = np.full(image.manifest.regions[Region.KV], filler, np.uint8)
        regions[Region.IO] = np.zeros(image.manifest.regions[Region.IO], np.uint8)
        words = regions[Region.IO].view(np.int32)
        words[:5] = [0, len(tokens), 1, -1, 1]
        words[16 * image.manifest.io["tokens_line"] :][: len(tokens)] = tokens
        made.append(DeviceMemory(regions))
    return made


def test_wide_model_with_heads_that_do_not_divide(tmp_path: Path) -> None:
    """Line 3: 1600 wide, 25 heads, 50,257 tokens, on 1 to 4 devices."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=1600, n_head=25, n_layer=2)).eval()
    source = load_model(model)
    tokens = [464, 3139, 286, 4881, 318]
    first = logits_on(source, tmp_path, "u280", 1, tokens)
    assert first.shape == (5, 50257)
    for devices in (2, 3, 4):
        assert np.array_equal(first, logits_on(source, tmp_path, "u280", devices, tokens)), devices


@pytest.mark.parametrize("machine", ["tiny", "u280", "u280-dfx"])
def test_bf16_weights_run(machine: str, tmp_path: Path) -> None:
    model = random_model(**ODD_SHAPES["plain"])
    tokens = [5, 9, 90, 3]
    path = tmp_path / "bf16.safetensors"
    typebar.compile(model, path, machine=machine, devices=2, weights="bf16")
    with typebar.load(path, device=["sim"]) as text_model:
        logits = text_model.logits(tokens)
    source = load_model(model)
    exact = evaluate_step(source.module, source.weights, tokens, torch.float64).numpy()
    assert np.abs(logits - exact).max() < 0.02 * np.abs(exact).max()


@functools.cache
def shape(name: str) -> FrontendModel:
    return load_model(name)


def compiled(name: str, machine: str = "u280", devices: int = 4) -> Compiled:
    return build(shape(name), Machine.load(machine), devices, weights_format("fp16"))


def timing(made: Compiled, prompt: int, new: int) -> TimingResult:
    io = np.zeros((made.devices, made.memory.io.bytes // 4), np.int32)
    io[:, :4] = [0, prompt, new, -1]
    return run_timing(made.program, made.machine, made.devices, io)


def test_gpt2_xl_program_is_small_and_round_trips() -> None:
    """Line 4: at most 64 KiB; lengths are data, so the bytes cannot depend on them."""
    made = compiled("gpt2-xl")
    assert encode(made.program).size <= 64 * 1024
    assert assemble(disassemble(made.program)) == made.program


def ceil(value: int, step: int) -> int:
    return -(-value // step) * step


def test_hbm_bytes_are_the_models_bytes_plus_padding_plus_caches() -> None:
    """Line 7, worked out here from the shape alone: gpt2 on 3 devices of u280, 1 token in, 8 out."""
    made = compiled("gpt2", devices=3)
    result = timing(made, 1, 8)  # blocks of a prompt's tokens read weights less often: test_prompt_blocks
    width, heads, layers, vocab, element, row, lanes, block = 768, 12, 12, 50257, 2, 2048, 64, 512
    granule, align = row // (lanes * element), made.machine.vector.align
    local_heads = ceil(heads, 3) // 3

    def share(columns: int) -> int:
        return ceil(ceil(columns, align) // align, 3) // 3 * align

    def packed(k: int, columns: int) -> int:
        return ceil(k, lanes) * ceil(columns, granule) * element

    layer = packed(width, 3 * local_heads * 64) + packed(width, share(width))
    layer += packed(width, share(4 * width)) + packed(4 * width, share(width))
    head = packed(width, share(vocab))
    passes, heads_run = 1 + 7, 8
    weights = passes * layers * layer + heads_run * head
    caches = 0
    for position in range(passes):
        length = position + 1
        k_bytes = sum(ceil(min(block, length - b) * lanes * element, row) for b in range(0, length, block))
        v_bytes = ceil(length, lanes) // lanes * ceil(64 * lanes * element, row)
        caches += layers * local_heads * (k_bytes + v_bytes)
    for counters in result.counters:
        assert counters.weights_fetched_bytes == weights
        assert counters.kv_fetched_bytes == caches
        stored = passes * layers * local_heads * 2 * 64 * element
        assert counters.kv_useful_written_bytes == stored
    parameters = layers * 12 * width * width + width * vocab
    assert made.memory.accounting["weight_bytes"] == parameters * element
    assert made.memory.accounting["macs_per_token"] == parameters
    assert made.memory.accounting["kv_bytes_per_position"] == layers * 2 * width * element
    assert made.memory.accounting["packed_weight_bytes"] == 3 * (layers * layer + head)


@pytest.mark.parametrize("name", ["gpt2", "dfx-345m"])
@pytest.mark.parametrize("machine", ["u280", "u280-dfx"])
def test_time_is_never_below_physics(name: str, machine: str) -> None:
    """Line 7 on compiled programs: bytes over bandwidth, operations over peak, causes that sum to the total."""
    made = compiled(name, machine, 2)
    result = timing(made, 3, 3)
    peak = made.machine.matrix.lanes * made.machine.matrix.columns * made.machine.matrix.rows
    for device, counters in enumerate(result.counters):
        moved = counters.weights_fetched_bytes + counters.kv_fetched_bytes + counters.kv_written_bytes
        assert result.total_cycles * made.machine.row_bytes >= moved
        assert result.total_cycles * peak >= counters.macs
        for unit, causes in result.causes[device].items():
            assert sum(causes.values()) == result.total_cycles, unit


def test_register_file_too_small_is_one_clear_line() -> None:
    machine = Machine.load("tiny").override({"vector.words": "512", "vector.segments": "64", "attention_block": "64"})
    with pytest.raises(AllocationError, match=r"needs \d+ words of registers and the machine has 512: use a machine"):
        build(
            load_model(random_model(n_embd=128, n_head=2, n_layer=1, n_positions=32, vocab_size=64)),
            machine,
            1,
            Format.FP16,
        )


def test_memory_too_small_is_one_clear_line() -> None:
    with pytest.raises(TypebarError, match=r"needs \d+ bytes of HBM .* machine tiny has 67108864: use more devices"):
        build(shape("gpt2"), Machine.load("tiny").override({"vector.words": "131072"}), 1, Format.FP16)


def test_heads_wider_than_a_column_block_are_refused() -> None:
    model = random_model(n_embd=80, n_head=1, n_layer=1, n_positions=16, vocab_size=16)
    with pytest.raises(TypebarError, match="attention heads of 80 exceed a column block of 64"):
        build(load_model(model), Machine.load("tiny"), 1, Format.FP16)


@pytest.mark.parametrize("devices", [0, 65])
def test_ring_size_is_checked(devices: int) -> None:
    with pytest.raises(TypebarError, match=f"a ring has 1 to 64 devices, not {devices}"):
        build(load_model(random_model(**ODD_SHAPES["plain"])), Machine.load("tiny"), devices, Format.FP16)


@pytest.mark.parametrize(("value", "message"), [(float("nan"), "NaN or infinity"), (1e5, "beyond fp16: compile with")])
def test_weights_that_memory_cannot_hold_leave_no_file(value: float, message: str, tmp_path: Path) -> None:
    model = random_model(**ODD_SHAPES["plain"])
    model.transformer.h[1].mlp.c_fc.weight.data[3, 4] = value
    with pytest.raises(TypebarError, match=message):
        typebar.compile(model, tmp_path / "bad.safetensors", machine="tiny", devices=2)
    assert list(tmp_path.iterdir()) == []


def test_logits_from_no_linear_operation_are_refused_with_a_reason() -> None:
    class Normed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(11, 16)
            self.head, self.norm = torch.nn.Linear(16, 11), torch.nn.LayerNorm(11)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.norm(self.head(self.table(input_ids)))
            return result

    source = load_model(Normed(), {"context": 8})
    with pytest.raises(LoweringError, match="logits do not come from a linear operation"):
        build(source, Machine.load("tiny"), 1, Format.FP16)


def test_memory_is_laid_out_from_shapes_alone() -> None:
    """The same plan with and without weights: a shape's addresses are those of a checkpoint of that shape."""
    facts = ODD_SHAPES["plain"]
    made = build(load_model(random_model(**facts)), Machine.load("tiny"), 2, Format.FP16)
    again = build(load_model(random_model(seed=1, **facts)), Machine.load("tiny"), 2, Format.FP16)
    assert np.array_equal(encode(made.program), encode(again.program))
    assert made.memory.addresses == again.memory.addresses


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('weight = @"transformer.h.{}.ln_2.weight", bias = @"transformer.h.{}.ln_2.bias", ', ""),
        (', bias = @"transformer.h.{}.mlp.c_fc.bias"', ', scale = @"s"'),
        (', bias = @"transformer.h.{}.mlp.c_fc.bias"', ', scale = @"s", bias = @"b"'),
        (', bias = @"transformer.h.{}.ln_2.bias"', ""),
    ],
)
def test_the_text_of_a_device_program_is_read_back(old: str, new: str) -> None:
    """Operands that may be missing, in every combination: what is printed reads as the same."""
    step = (Path(__file__).parent / "compiler/front/gpt2_step.mlir").read_text()
    assert old in step
    text = run_passes(step.replace(old, new), ["partition{devices=2 align=8}", "fuse{hoist=false}"])
    assert "tbd.program" in text
    assert run_passes(text, []) == text
