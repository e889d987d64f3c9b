"""Generation on simulated devices and on torch: equal tokens, failures that cost nothing, errors in one line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import typebar
from typebar.compiler import driver
from typebar.compiler.frontend import load_model
from typebar.host import generation
from typebar.host.api import Generation, TextModel, load
from typebar.host.device import DeviceError, Poll
from typebar.host.driver import DeviceEngine
from typebar.host.engine import Engine
from typebar.host.sampling import Sampler, SamplingSettings
from typebar.host.select import Candidate, candidates, simulated, survey
from typebar.host.simulator import Failure, SimulatedDevice
from typebar.isa.errors import TypebarError
from typebar.isa.image import Image
from typebar.isa.instructions import Format, Region
from typebar.isa.machine import Machine
from typebar.isa.registers import Register, Status
from typebar.models import find

PROMPTS = ["In the beginning", "Shall I compare thee", "O my lord,", "And it came to pass"]
NEW = 10


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """The draft model on two machines and one to four devices, compiled from one import."""
    folder, model, made = tmp_path_factory.mktemp("images"), load_model(find("folio-draft").path), {}
    for machine, devices in [("u280", 1), ("u280", 2), ("u280", 3), ("u280", 4), ("tiny", 2)]:
        path = folder / f"{machine}-{devices}.safetensors"
        driver.write(driver.build(model, Machine.load(machine), devices, Format.FP16), path)
        made[machine, devices] = path
    return made


@pytest.fixture(scope="module")
def image(images: dict[tuple[str, int], Path]) -> Path:
    return images["u280", 2]


@pytest.fixture(scope="module")
def model(image: Path) -> TextModel:
    return load(image, "sim")


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    """Hugging Face's float32 model, from the checkpoint and not from an image."""
    made = AutoModelForCausalLM.from_pretrained(find("folio-draft").path, dtype=torch.float32)
    return made.eval()


def reference_logits(reference: torch.nn.Module, tokens: Sequence[int]) -> np.ndarray:
    with torch.inference_mode():
        return reference(torch.tensor([tokens])).logits[0].numpy()


# Equal results ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("place", [("u280", 1), ("u280", 4), ("tiny", 2)])
def test_greedy_tokens_are_torchs(images: dict, place: tuple[str, int], reference: torch.nn.Module) -> None:
    """Teacher-forced along the simulator's own text: each token is torch's, or the margin is within the error."""
    with load(images[place], "sim") as simulator:
        for prompt in PROMPTS[:2]:
            made = simulator.generate(prompt, max_new_tokens=NEW)
            tokens = [*made.prompt_tokens, *made.tokens]
            wanted, got = reference_logits(reference, tokens), simulator.logits(tokens)
            error = np.abs(wanted - got).max()
            assert error < 0.1, "half the last place of fp16 at these logits' size, many times over"
            for position, token in enumerate(tokens[len(made.prompt_tokens) :], len(made.prompt_tokens) - 1):
                assert token == got[position].argmax(), "the device's choice is the largest of its logits"
                assert wanted[position].max() - wanted[position, token] <= 2 * error


def test_logits_do_not_depend_on_the_number_of_devices(images: dict) -> None:
    tokens = load(images["u280", 1]).tokenizer.encode(PROMPTS[0])
    rows = [load(images["u280", devices], "sim").logits(tokens) for devices in (1, 2, 3, 4)]
    for other in rows[1:]:
        assert np.array_equal(rows[0].view(np.int32), other.view(np.int32))


def test_torch_runs_the_image_as_hugging_face_runs_the_checkpoint(image: Path, reference: torch.nn.Module) -> None:
    with load(image, "torch") as model:
        made = model.generate(PROMPTS[0], max_new_tokens=NEW)
        tokens = [*made.prompt_tokens, *made.tokens]
        wanted = reference_logits(reference, tokens)
        assert np.abs(model.logits(tokens) - wanted).max() < 1e-4
        assert made.tokens == wanted.argmax(axis=1)[len(made.prompt_tokens) - 1 : -1].tolist()
        assert made.device == "torch"


def test_a_second_request_does_not_see_the_first(image: Path, model: TextModel) -> None:
    first = model.generate(PROMPTS[1], max_new_tokens=NEW)
    model.generate(PROMPTS[2], max_new_tokens=2 * NEW)
    assert model.generate(PROMPTS[1], max_new_tokens=NEW) == first
    assert load(image, "sim").generate(PROMPTS[1], max_new_tokens=NEW) == first


def test_streamed_text_is_the_text(model: TextModel) -> None:
    pieces: list[str] = []
    made = model.generate(PROMPTS[3], max_new_tokens=20, streamer=pieces.append)
    whole, prompt = model.tokenizer.decode([*made.prompt_tokens, *made.tokens]), PROMPTS[3]
    assert "".join(pieces) == made.text == whole.removeprefix(prompt)
    assert len(pieces) > 5


def test_sampling_repeats_with_its_seed(model: TextModel) -> None:
    def draw(seed: int | None) -> Generation:
        return model.generate(
            PROMPTS[0], max_new_tokens=NEW, do_sample=True, temperature=0.9, top_k=200, top_p=0.95, seed=seed
        )

    free = draw(None)
    assert draw(1) == draw(1) and draw(free.seed) == free
    assert len({tuple(draw(seed).tokens) for seed in range(4)}) == 4


def test_sampling_the_only_candidate_is_greedy(model: TextModel) -> None:
    greedy = model.generate(PROMPTS[0], max_new_tokens=NEW)
    sampled = model.generate(PROMPTS[0], max_new_tokens=NEW, do_sample=True, top_k=1, seed=0)
    assert sampled.tokens == greedy.tokens


@pytest.mark.parametrize("device", ["sim", "torch"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_generation_stops_after_the_end_token(image: Path, device: str, do_sample: bool) -> None:
    with load(image, device) as model:
        free = model.generate(PROMPTS[0], max_new_tokens=NEW, do_sample=do_sample, seed=1, eos_token_id=-1)
        assert free.finish_reason == "length" and len(free.tokens) == NEW
        end = free.tokens[4]
        made = model.generate(PROMPTS[0], max_new_tokens=NEW, do_sample=do_sample, seed=1, eos_token_id=end)
    assert made.tokens == free.tokens[: free.tokens.index(end) + 1]
    assert made.finish_reason == "stop"


def test_a_models_own_list_of_ends_stops_generation(model: TextModel, tmp_path: Path) -> None:
    """The device knows the first end only, here one that never comes; the host finds the others."""
    free = model.generate(PROMPTS[0], max_new_tokens=NEW, eos_token_id=-1).tokens
    end, never = free[4], next(token for token in range(9, 99) if token not in free)
    brought = load_model(find("folio-draft").path, {"eos_token_id": [never, end]})
    driver.write(driver.build(brought, Machine.load("u280"), 2, Format.FP16), tmp_path / "image.safetensors")
    for device in ("sim", "torch"):
        with load(tmp_path / "image.safetensors", device) as several:
            made = several.generate(PROMPTS[0], max_new_tokens=NEW)
            assert made.tokens == free[: free.index(end) + 1]
            assert made.finish_reason == "stop"
            assert several.generate(PROMPTS[0], max_new_tokens=NEW, eos_token_id=-1).tokens == free


def test_the_context_can_be_filled(images: dict) -> None:
    with load(images["u280", 1], "sim") as model:
        context = model.image.manifest.model["context"]
        ids = [5 + i % 100 for i in range(context - 2)]
        assert len(model.generate(input_ids=ids, max_new_tokens=2, eos_token_id=-1).tokens) == 2
        one = model.generate(input_ids=ids[:3], max_new_tokens=1, eos_token_id=-1)
    assert len(one.tokens) == 1


# Failures -----------------------------------------------------------------------------------------------
def lossy(failure: Failure) -> Candidate:
    """A simulator that loses a device when `failure` says so."""

    def make(image: Image) -> Engine:
        return DeviceEngine(image, SimulatedDevice(image.machine, image.manifest.devices, failure), "sim")

    return Candidate("sim[0]", make)


def generated(path: Path, chain: list[Candidate], do_sample: bool, note: Callable[[int], None]) -> tuple[list, list]:
    """Tokens, and the reasons given."""
    with Image.open(path, verify=False) as image:
        engines = generation.Chain(image, chain, [])
        sampler = Sampler(SamplingSettings(seed=9)) if do_sample else None
        request = generation.Request([990, 411, 259], NEW, (), sampler)
        generation.run(engines, request, note)
        return request.tokens, engines.reasons


@pytest.mark.parametrize("do_sample", [False, True])
def test_losing_a_device_costs_no_token(image: Path, do_sample: bool) -> None:
    """Lost before the first token, after the last, and after every one between."""
    spare = Candidate("sim[1]", simulated)
    wanted, reasons = generated(image, [spare], do_sample, lambda token: None)
    assert len(wanted) == NEW and reasons == []
    for count in range(NEW + 1):
        seen: list[int] = []
        broken = lossy(lambda rank, executed, seen=seen, count=count: len(seen) >= count)
        tokens, reasons = generated(image, [broken, spare], do_sample, seen.append)
        assert tokens == wanted == seen
        if count == NEW and do_sample:
            assert reasons == [], "nothing was left to launch"
            continue
        (reason,) = reasons
        assert reason.startswith(f"sim[0]: failed after {count} token")
        assert "DEVICE_LOST" in reason and reason.endswith("; continued on sim[1]")


def test_losing_a_device_inside_a_token_costs_nothing(image: Path) -> None:
    """Lost anywhere: caches are half written then."""
    spare, executed_by = Candidate("sim[1]", simulated), [0, 0]

    def counting(rank: int, executed: int) -> bool:
        executed_by[rank] = executed
        return False

    wanted, _ = generated(image, [lossy(counting)], False, lambda token: None)
    random = np.random.default_rng(1)
    for rank, limit in zip([0, 1] * 6, random.integers(1, min(executed_by), 12), strict=True):
        seen: list[int] = []
        broken = lossy(lambda who, executed, rank=rank, limit=limit: who == rank and executed >= limit)
        tokens, reasons = generated(image, [broken, spare], False, seen.append)
        assert tokens == wanted == seen and len(reasons) == 1


def test_several_devices_may_fail(image: Path) -> None:
    wanted, _ = generated(image, [Candidate("sim", simulated)], False, lambda token: None)
    seen: list[int] = []
    chain = [lossy(lambda rank, executed, count=count: len(seen) >= count) for count in (2, 2, 5)]
    tokens, reasons = generated(image, [*chain, Candidate("sim", simulated)], False, seen.append)
    assert tokens == wanted == seen and len(reasons) == 3


def test_torch_carries_on_for_the_simulator(image: Path) -> None:
    with load(image, [lossy(lambda rank, executed: executed > 1500), "torch"]) as model:
        made = model.generate(PROMPTS[0], max_new_tokens=NEW)
        assert made.device == "torch" and len(made.tokens) == NEW
        assert any("failed after" in reason and "continued on torch" in reason for reason in made.reasons)
    with load(image, "sim") as whole:
        assert whole.generate(PROMPTS[0], max_new_tokens=NEW).tokens == made.tokens


def test_logits_are_computed_again_after_a_failure(image: Path, model: TextModel) -> None:
    tokens = model.tokenizer.encode(PROMPTS[1])
    with load(image, [lossy(lambda rank, executed: executed > 700), "sim"]) as broken:
        assert np.array_equal(broken.logits(tokens), model.logits(tokens))
        assert len(broken.reasons) == 1


def test_no_device_left_is_an_error(image: Path) -> None:
    with (
        load(image, [lossy(lambda rank, executed: executed > 50)]) as model,
        pytest.raises(DeviceError, match=r"no device is left.*DEVICE_LOST") as caught,
    ):
        model.generate(PROMPTS[0], max_new_tokens=NEW)
    assert "\n" not in str(caught.value)


def test_an_abandoned_request_leaves_the_device_usable(image: Path, model: TextModel) -> None:
    def stop(piece: str) -> None:
        raise KeyboardInterrupt

    with load(image, "sim") as other:
        with pytest.raises(KeyboardInterrupt):
            other.generate(PROMPTS[0], max_new_tokens=NEW, streamer=stop)
        assert other.generate(PROMPTS[0], max_new_tokens=NEW) == model.generate(PROMPTS[0], max_new_tokens=NEW)


# Devices ------------------------------------------------------------------------------------------------
class PolledDevice(SimulatedDevice):
    """Behaves like a card: contents are copied, and the host sees memory only now and then."""

    def allocate(self, rank: int, region: Region, size: int, contents: np.ndarray | None = None) -> None:
        super().allocate(rank, region, size, None if contents is None else contents.copy())

    def wait(self, poll: Poll | None = None) -> None:
        calls = iter(range(10**9))
        super().wait(None if poll is None else lambda: poll() if next(calls) % 7 == 6 else None)


def test_the_driver_works_for_a_device_that_is_polled(image: Path, model: TextModel) -> None:
    def make(opened: Image) -> Engine:
        return DeviceEngine(opened, PolledDevice(opened.machine, 2), "sim")

    with load(image, [Candidate("polled", make)]) as polled:
        assert polled.generate(PROMPTS[0], max_new_tokens=NEW).tokens == (
            model.generate(PROMPTS[0], max_new_tokens=NEW).tokens
        )


def test_a_simulated_device_keeps_its_rules(image: Path) -> None:
    device = SimulatedDevice(Machine.load("u280"), 2)
    with pytest.raises(TypebarError, match="no program"):
        device.launch(0)
    with pytest.raises(TypebarError, match="not running"):
        device.wait()
    with pytest.raises(TypebarError, match="not bound"):
        device.read(0, Region.IO, 0, 4)
    device.allocate(0, Region.IO, 64)
    with pytest.raises(TypebarError, match="outside region IO of 64 bytes"):
        device.write(0, Region.IO, 62, np.zeros(4, np.uint8))
    with pytest.raises(TypebarError, match="there is no device 2"):
        device.read(2, Region.IO, 0, 4)
    for region, size in [(Region.KV, 64), (Region.LOCAL, 32)]:
        with pytest.raises(TypebarError, match="cannot be bound to 64 fixed bytes"):
            device.allocate(0, region, size, np.zeros(64, np.uint8))
    with Image.open(image, verify=False) as opened:
        with pytest.raises(TypebarError, match=r"2 devices and .* has 3"):
            DeviceEngine(opened, SimulatedDevice(opened.machine, 3), "sim")
        DeviceEngine(opened, device, "sim")
        with pytest.raises(TypebarError, match="WEIGHTS of device 0 is bound to fixed contents"):
            device.write(0, Region.WEIGHTS, 0, np.zeros(4, np.uint8))
        device.launch(0)
        with pytest.raises(TypebarError, match="already running"):
            device.launch(0)


def test_registers_say_how_a_launch_ended(image: Path) -> None:
    with Image.open(image, verify=False) as opened:
        device = SimulatedDevice(opened.machine, 2, lambda rank, executed: rank == 1 and executed >= 300)
        engine = DeviceEngine(opened, device, "sim")
        assert device.register(0, Register.STATUS) == Status.IDLE
        with pytest.raises(DeviceError, match="device 1 stopped at instruction"):
            engine.logits([1, 2])
        assert device.register(0, Register.STATUS) == Status.ERROR
        assert device.register(1, Register.TRAP) == 10 and device.register(0, Register.TRAP) == 0
        assert device.register(1, Register.PC) > 0 and device.register(1, Register.INSTRUCTIONS) == 300


def test_a_module_compiles_and_its_overflow_is_reported(tmp_path: Path) -> None:
    """Weights so large that a logit becomes NaN: the flag comes back with its place."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=61, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    module = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for linear in (module.transformer.h[0].mlp.c_fc, module.transformer.h[0].mlp.c_proj):
            linear.weight.normal_(0, 1e30)
    path = typebar.compile(module, tmp_path / "m.safetensors", "tiny", 2, "bf16", config={"name": "small"})
    with load(path, "sim") as model:
        assert model.image.manifest.model["name"] == "small"
        made = model.generate(input_ids=[1, 2, 3], max_new_tokens=2)
    assert made.text is None and any("instruction" in flag and "NaN" in flag for flag in made.flags)
    with load(path, "sim") as model, pytest.raises(TypebarError, match="no tokenizer: give input_ids"):
        model.generate("text")


# Choice and errors --------------------------------------------------------------------------------------
def test_auto_says_what_it_passed_over(image: Path) -> None:
    with load(image) as model:
        made = model.generate(PROMPTS[0], max_new_tokens=1)
    assert made.device == "torch" and made.reasons[0].startswith("xrt not taken: no XRT device found")
    found = survey()
    assert [item.name for item in found] == ["xrt", "torch-cuda", "torch-cpu"] and found[-1].available
    assert len(made.reasons) == 1 + (not torch.cuda.is_available())
    assert candidates("torch")[1] == candidates(["torch"])[1] == []


def test_a_candidate_that_does_not_open_is_passed_over(image: Path) -> None:
    def broken(opened: Image) -> Engine:
        raise DeviceError("no such card")

    with load(image, [Candidate("card", broken), "sim"]) as model:
        assert model.reasons == ["card not taken: no such card"]
    with pytest.raises(DeviceError, match="no device is left to run the image: card not taken: no such card"):
        load(image, [Candidate("card", broken)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"input_ids": []}, "the prompt is empty"),
        ({}, "exactly one of prompt"),
        ({"prompt": "a", "input_ids": [1]}, "exactly one of prompt"),
        ({"prompt": ["a"]}, "must be text, not list: give token ids as input_ids"),
        ({"input_ids": [1, 4096]}, "token 4096 is outside the vocabulary: ids go from 0 to 4095"),
        ({"input_ids": [-1]}, "token -1 is outside"),
        ({"input_ids": [1.5]}, "token 1.5 is not an integer"),
        ({"input_ids": np.array([[1, 2]])}, "is not an integer: give a flat sequence"),
        ({"input_ids": [1] * 257}, "257 tokens exceed the model's context of 256"),
        ({"input_ids": [1] * 256}, "256 tokens and leaves no room in the model's context of 256"),
        ({"input_ids": [1] * 250, "max_new_tokens": 7}, "max_new_tokens = 7 exceed .* ask for at most 6"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens must be an integer, at least 1, not 0"),
        ({"prompt": "a", "do_sample": True, "temperature": 0.0}, "temperature must be a finite number above 0"),
        ({"prompt": "a", "temperature": 0.5}, "act only when sampling"),
        ({"prompt": "a", "eos_token_id": 4096}, "eos_token_id must be from 0 to 4095, or -1 for none, not 4096"),
    ],
)
def test_bad_requests_are_one_line(model: TextModel, arguments: dict, message: str) -> None:
    with pytest.raises(TypebarError, match=message) as caught:
        model.generate(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: candidates("gpu"), "no device 'gpu': choose one of auto, sim, rtl, torch"),
        (lambda: candidates([]), "the list of devices is empty"),
        (lambda: load("nowhere.safetensors", "gpu"), "no device 'gpu'"),
        (lambda: load("nowhere.safetensors"), "nowhere.safetensors"),
        (lambda: typebar.compile("gpt2", "x"), "'gpt2' is a shape without weights"),
        (lambda: typebar.compile("gpt5", "x"), "no model 'gpt5': give a checkpoint directory, an .onnx"),
        (lambda: typebar.compile("folio", "x", weights="fp8"), "choose fp16, bf16 or int8"),
        (lambda: typebar.compile("folio", "x", machine="u9"), "unknown machine 'u9'"),
        (lambda: typebar.compile("folio-draft", "x", devices=0), "1 to 64 devices, not 0"),
    ],
)
def test_bad_calls_are_one_line(call: Callable[[], object], message: str) -> None:
    with pytest.raises(TypebarError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
