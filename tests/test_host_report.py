"""The figures of `simulate`, each against its definition worked out independently."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

import typebar
from typebar.compiler import driver
from typebar.compiler.frontend import load_model
from typebar.host import report as host_report
from typebar.host.report import SimulationReport, simulate
from typebar.isa.errors import TypebarError
from typebar.isa.image import Image
from typebar.isa.instructions import Format
from typebar.isa.machine import Machine
from typebar.isa.program import encode
from typebar.models import find

PROMPT, NEW, DEVICES = 9, 7, 3


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("image") / "draft.safetensors"
    return typebar.compile("folio-draft", out, devices=DEVICES).path


@pytest.fixture(scope="module")
def report(image: Path) -> SimulationReport:
    return simulate(image, prompt_tokens=PROMPT, new_tokens=NEW)


def model_bytes() -> tuple[int, int]:
    """Bytes of fp16 weights in a pass with logits, and of K and V a position, from the checkpoint's configuration."""
    config = json.loads((find("folio-draft").path / "config.json").read_text())
    width, layers, vocab = config["n_embd"], config["n_layer"], config["vocab_size"]
    return 2 * (layers * 12 * width**2 + vocab * width), 2 * 2 * layers * width


def test_cycles_add_up(report: SimulationReport) -> None:
    assert report.prefill["cycles"] + report.decode["cycles"] == report.total_cycles
    assert set(report.units) == {"issue", "matrix", "vector", "memory", "ring", "fetch"}
    for causes in report.units.values():
        assert sum(causes.values()) == report.total_cycles and min(causes.values()) >= 0
    assert report.breakdown == report.units["matrix"]
    assert report.prefill["ms"] == pytest.approx(report.prefill["cycles"] / 200e3)
    assert report.host_ms == pytest.approx(2e-3 + (64 + 4 * (PROMPT + NEW)) / 16e6)
    assert report.total_ms == pytest.approx(report.total_cycles / 200e3 + report.host_ms)


def test_decode_is_measured_against_the_models_own_bytes(report: SimulationReport) -> None:
    weights, kv = model_bytes()
    useful = weights + kv * np.mean([position + 1 for position in range(PROMPT, PROMPT + NEW - 1)])
    seconds = report.decode["cycles"] / 200e6 / (NEW - 1)
    limit = useful / DEVICES / 409.6e9
    assert report.decode["tokens"] == NEW - 1
    assert report.decode["hbm_bytes_per_token"] == useful
    assert report.decode["limit_ms_per_token"] == pytest.approx(limit * 1e3)
    assert report.decode["ms_per_token"] == pytest.approx(seconds * 1e3)
    assert report.decode["tokens_per_s"] == pytest.approx(1 / seconds)
    assert report.decode["hbm_utilization"] == pytest.approx(limit / seconds) and limit < seconds


@pytest.mark.parametrize("prompt", [PROMPT, 70])
@pytest.mark.parametrize("devices", [1, 2, 3, 4])
def test_bytes_are_the_models_and_the_rest_is_padding(devices: int, prompt: int) -> None:
    """A group of the prompt's tokens reads the weights once, the logits' apart; on one and two devices all divides."""
    weights, kv = model_bytes()
    config = json.loads((find("folio-draft").path / "config.json").read_text())
    head, passes = 2 * config["vocab_size"] * config["n_embd"], prompt + NEW - 1
    made = driver.build(load_model(find("folio-draft").path), Machine.load("u280"), devices, Format.FP16)
    rows = made.memory.accounting["prompt_rows"]
    ends = [*range(rows, prompt, rows), prompt]
    hbm = simulate("folio-draft", devices=devices, prompt_tokens=prompt, new_tokens=NEW, plan="columns").hbm
    assert hbm["weight_bytes"] == weights * (len(ends) + NEW - 1) - head * (len(ends) - 1)
    assert hbm["kv_bytes"] == kv * (sum(ends) + sum(range(prompt + 1, passes + 1)))
    assert hbm["kv_stored_bytes"] == kv * passes
    assert (hbm["weight_padding_bytes"] == 0) == (devices <= 2) and min(hbm.values()) >= 0
    assert hbm["total_bytes"] == sum(value for name, value in hbm.items() if name != "total_bytes")


def test_prefill_ends_with_the_first_token(image: Path, report: SimulationReport) -> None:
    one = simulate(image, prompt_tokens=PROMPT, new_tokens=1)
    assert one.prefill == report.prefill
    assert one.decode["tokens"] == 0 and one.decode["ms_per_token"] is None and one.decode["hbm_utilization"] is None
    longer = simulate(image, prompt_tokens=PROMPT + 1, new_tokens=1)
    assert longer.prefill["cycles"] > one.prefill["cycles"]
    json.dumps(one.to_json(), allow_nan=False)


@pytest.mark.parametrize("position", [1, 63, 64, 200])
def test_a_token_may_be_timed_without_the_tokens_before_it(image: Path, position: int) -> None:
    """A token at a position takes what it takes at the end of a whole generation, and finds the same bytes."""
    whole = [simulate(image, prompt_tokens=1, new_tokens=n).total_cycles for n in (position + 2, position + 3)]
    alone, longer = (simulate(image, prompt_tokens=1, new_tokens=n, start=position) for n in (2, 3))
    assert longer.total_cycles - alone.total_cycles == whole[1] - whole[0]
    weights, kv = model_bytes()
    assert alone.decode["hbm_bytes_per_token"] == weights + kv * (position + 2)
    assert alone.hbm["kv_bytes"] == kv * (2 * position + 3) and alone.hbm["kv_stored_bytes"] == 2 * kv
    assert alone.hbm["kv_padding_bytes"] >= 0


def test_a_start_beyond_the_context_is_refused(image: Path) -> None:
    with pytest.raises(TypebarError, match=r"start = 254, prompt_tokens = 1 and new_tokens = 2 exceed the context of"):
        simulate(image, prompt_tokens=1, new_tokens=2, start=254)
    with pytest.raises(TypebarError, match="start must be an integer, at least 0, not -1"):
        simulate(image, start=-1)


def test_a_model_needs_no_image(image: Path, report: SimulationReport) -> None:
    """Compiling without weights gives the very program, and so the same cycles."""
    other = simulate("folio-draft", devices=DEVICES, prompt_tokens=PROMPT, new_tokens=NEW).to_json()
    mine = report.to_json()
    for figures in (mine, other):
        del figures["device_cycles_per_s"], figures["wall_s"]
    assert other == mine
    with Image.open(image) as opened:
        assert mine["program_bytes"] == encode(opened.program).size


def test_timing_parameters_may_be_changed(image: Path, report: SimulationReport) -> None:
    slower = simulate(image, settings={"ring.hop_latency": "1000"}, prompt_tokens=PROMPT, new_tokens=NEW)
    assert slower.total_cycles > report.total_cycles and slower.program_sha256 == report.program_sha256
    as_number = simulate(image, settings={"ring.hop_latency": 1000}, prompt_tokens=PROMPT, new_tokens=NEW)
    assert as_number.total_cycles == slower.total_cycles
    slow_clock = simulate(image, settings={"clock_mhz": "100"}, prompt_tokens=PROMPT, new_tokens=NEW)
    assert slow_clock.prefill["ms"] > report.prefill["ms"] and slow_clock.clock_mhz == 100


def test_a_trace_is_written(image: Path, tmp_path: Path, report: SimulationReport) -> None:
    out = tmp_path / "trace.json"
    traced = simulate(image, prompt_tokens=PROMPT, new_tokens=NEW, trace=out)
    assert traced.total_cycles == report.total_cycles
    events = json.loads(out.read_text())["traceEvents"]
    assert len(events) > report.instructions / 3


def test_a_trace_that_cannot_be_written_is_found_first(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_report, "run_timing", lambda *_, **__: pytest.fail("the simulation has started"))
    with pytest.raises(TypebarError, match="No such folder; create it or name another"):
        simulate(image, trace=tmp_path / "none" / "trace.json")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # the superuser may write anywhere
    with pytest.raises(TypebarError, match="its folder is not writable; name another"):
        simulate(image, trace=tmp_path / "trace.json")


def test_the_images_own_format_may_be_named(image: Path, report: SimulationReport) -> None:
    named = simulate(image, weights="fp16", prompt_tokens=PROMPT, new_tokens=NEW)
    assert named.total_cycles == report.total_cycles


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_tokens": 250, "new_tokens": 7}, "250 and new_tokens = 7 exceed the context of 256"),
        ({"prompt_tokens": 0}, "prompt_tokens must be an integer, at least 1, not 0"),
        ({"new_tokens": 0}, "new_tokens must be an integer, at least 1, not 0"),
        ({"devices": 2}, "the image is for 3 devices, not 2"),
        ({"machine": "tiny"}, "compiled for machine 'u280', not 'tiny'"),
        ({"machine": "u9"}, "unknown machine 'u9'"),
        ({"settings": {"matrix.interleave": "8"}}, "it needs matrix.interleave 16 \\(not 8\\)"),
        ({"settings": {"hbm.latency": "0"}}, "hbm.latency = 0 is outside"),
        ({"settings": {"hbm.speed": "3"}}, "unknown machine parameter 'hbm.speed'"),
        ({"settings": {"hbm.latency": 1.5}}, "hbm.latency"),
        ({"settings": ["hbm.latency=80"]}, "settings must be a mapping, not \\['hbm.latency=80'\\]"),
        ({"weights": "bf16"}, "the image has fp16 weights, not bf16: leave it out or compile for bf16"),
        ({"machine": 3}, "machine cannot be 3: give a shipped machine's name"),
        ({"trace": 3}, "trace must be a path, not 3"),
        ({"trace": "."}, "trace '.' is a directory: name a file"),
    ],
)
def test_bad_arguments_are_one_line(image: Path, arguments: dict, message: str) -> None:
    with pytest.raises(TypebarError, match=message) as caught:
        simulate(image, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ("gpt5", {}, "no image or model 'gpt5': give an image, a checkpoint directory, .* or one of gpt2,"),
        ("gpt2", {"devices": 65}, "1 to 64 devices, not 65"),
        ("gpt2", {"weights": "fp8"}, "choose fp16, bf16 or int8"),
        ("gpt2", {"devices": "4"}, "1 to 64 devices, not '4': give an integer in that range"),
        ("gpt2", {"devices": 2.0}, "1 to 64 devices, not 2.0"),
        ("gpt2", {"devices": True}, "1 to 64 devices, not True"),
        (None, {}, "cannot simulate None: give an image"),
        (3, {}, "cannot simulate 3: give an image"),
    ],
)
def test_bad_sources_are_one_line(source: str, arguments: dict, message: str) -> None:
    with pytest.raises(TypebarError, match=message) as caught:
        simulate(source, **arguments)
    assert "\n" not in str(caught.value)
