"""The figures of a performance report, each against its definition worked out independently."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from families import FAMILIES, random_model

import typebar
from typebar.host.cli import main
from typebar.host.page import page
from typebar.host.profile import HEAD, LINEAR, SCORES, VALUES, layer_numbers, products
from typebar.host.report import Subject, compiled_subject, measure, subject_of
from typebar.host.study import Study, model_of_image, study
from typebar.isa.errors import TypebarError
from typebar.isa.image import Image
from typebar.isa.instructions import Format
from typebar.isa.machine import Machine
from typebar.isa.program import assemble, encode
from typebar.models import find

PROMPT, NEW, DEVICES = 9, 7, 2
U280 = Machine.load("u280")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("image") / "draft.safetensors"
    return typebar.compile("folio-draft", out, devices=DEVICES).path


@pytest.fixture(scope="module")
def found(image: Path) -> Study:
    return study(image, prompt_tokens=PROMPT, new_tokens=NEW)


@pytest.fixture(scope="module")
def subject(image: Path) -> Subject:
    return subject_of(image, None, None, None, {})


def sizes() -> dict[str, int]:
    config: dict[str, int] = json.loads((find("folio-draft").path / "config.json").read_text())
    return config


def weight_count() -> int:
    width, layers, vocab = (sizes()[name] for name in ("n_embd", "n_layer", "vocab_size"))
    return layers * 12 * width**2 + vocab * width


def test_the_parts_of_a_token_add_up_to_it(found: Study, subject: Subject) -> None:
    """The last of three tokens: it takes what a generation one token longer takes longer.

    Passes are cut at the end of their last product; how long the search of the largest logit and the token's store
    take after it differs by some cycles from token to token.
    """
    longer, shorter = (measure(subject, PROMPT, new)[0].total_cycles for new in (3, 2))
    mine = [item for item in found.products if item.phase == "decode"]
    cycles = sum(item.cycles for item in mine)
    assert cycles == sum(layer["cycles"] for layer in found.layers) == pytest.approx(longer - shorter, rel=0.01)
    assert found.timeline["cycles"] == pytest.approx(longer - shorter, rel=0.01)
    for item in (*mine, *(item for item in found.products if item.phase == "prefill")):
        assert sum(item.causes.values()) == item.cycles >= item.busy > 0
    for cause in {cause for item in mine for cause in item.causes}:
        by_layer = sum(layer["causes"].get(cause, 0) for layer in found.layers)
        assert by_layer == sum(item.causes.get(cause, 0) for item in mine)


def test_a_token_reads_and_multiplies_what_the_model_has(found: Study) -> None:
    """On two devices every shape divides, and device 0 has one half."""
    mine = {item.role: item for item in found.products if item.phase == "decode"}
    width, layers, heads = (sizes()[name] for name in ("n_embd", "n_layer", "n_head"))
    assert list(mine) == ["attn.c_attn", SCORES, VALUES, "attn.c_proj", "mlp.c_fc", "mlp.c_proj", HEAD]
    weights = sum(item.macs for item in mine.values() if item.kind in (LINEAR, HEAD))
    assert weights == weight_count() // DEVICES
    assert mine["mlp.c_fc"].macs == mine["mlp.c_fc"].useful_bytes // 2 == layers * 4 * width**2 // DEVICES
    for kind in (SCORES, VALUES):
        assert mine[kind].macs == layers * width * (PROMPT + 2) // DEVICES and heads % DEVICES == 0
    for item in found.products:
        assert item.operations_per_byte == pytest.approx(2 * item.macs / item.fetched_bytes)
        assert item.operations_per_s == pytest.approx(2 * item.macs / item.cycles * 200e6)
        assert item.operations_per_s <= found.roofs["compute_operations_per_s"] == 2 * 64 * 32 * 2 * 200e6
    prompt = {item.role: item for item in found.products if item.phase == "prefill"}
    assert prompt["mlp.c_fc"].macs == PROMPT * mine["mlp.c_fc"].macs and prompt[HEAD].macs == mine[HEAD].macs
    assert found.roofs["hbm_peak_bytes_per_s"] == 409.6e9
    assert found.roofs["hbm_declared_bytes_per_s"] == pytest.approx(409.6e9 * 13 / 14)


def test_layers_are_told_apart(found: Study) -> None:
    numbers = [layer["layer"] for layer in found.layers]
    assert numbers == [*range(sizes()["n_layer"]), None]
    head = next(item for item in found.products if item.role == HEAD and item.phase == "decode")
    assert found.layers[-1]["causes"] == head.causes
    assert len({layer["causes"]["compute"] for layer in found.layers[:-1]}) == 1


def test_layers_with_loops_and_leaps_within() -> None:
    """A turn is counted by an instruction that no branch leaps over and no inner loop repeats."""
    one = "matmul k=64 n=16 outer=1 inner=1\n"
    text = f"layer_1:\n{one}beq to=over a=r5 b=1\n{one}over:\nheads_2:\n{one}blt to=heads_2 a=r4 b=2\n{one}"
    program = assemble(f"{one}{text}blt to=layer_1 a=r3 b=3\n{one}halt")
    first, skipped, inner, last, after = 1, 3, 4, 6, 8
    assert [pc for pc, op in enumerate(program.ops) if op.kind.name == "matmul"] == [0, 1, 3, 4, 6, 8]
    turns = [[first, skipped, inner, inner, last], [first, inner, last], [first, skipped, inner, last]]
    pcs = [0, *(pc for turn in turns for pc in turn), after]
    wanted = [-1, *(number for number, turn in enumerate(turns) for _ in turn), -1]
    assert layer_numbers(program, np.array(pcs), set(products(program))).tolist() == wanted
    leapt = assemble(f"layer_1:\nbeq to=over a=r5 b=1\n{one}over:\n{one}{one}blt to=layer_1 a=r3 b=3\nhalt")
    assert layer_numbers(leapt, np.array([2, 3, 1, 2, 3]), {1, 2, 3}).tolist() == [0, 0, 1, 1, 1]


def test_bytes_over_time_are_those_moved(found: Study, subject: Subject) -> None:
    runs = [measure(subject, PROMPT, new)[1] for new in (3, 2)]
    moved = {
        name: getattr(runs[0].counters[0], name) - getattr(runs[1].counters[0], name)
        for name in ("weights_fetched_bytes", "kv_fetched_bytes", "kv_written_bytes", "ring_bytes")
    }
    line = found.timeline
    width = line["cycles"] / len(line["hbm"])
    ring = moved.pop("ring_bytes")
    assert sum(line["hbm"]) * width * U280.row_bytes == pytest.approx(sum(moved.values()))
    assert sum(line["ring"]) * width * 2 * 97000 / 8 / 200 == pytest.approx(ring)
    busy = sum(item.busy for item in found.products if item.phase == "decode")
    assert sum(line["matrix"]) * width == pytest.approx(busy)
    for use in ("hbm", "ring", "matrix"):
        assert min(line[use]) >= 0 and max(line[use]) <= 1.0001 and len(line[use]) == len(found.detail[use])
    detail = found.detail
    assert detail["first"] + detail["cycles"] / 2 == pytest.approx(line["cycles"] / 2)


def test_points_have_their_limits(found: Study) -> None:
    width, layers = sizes()["n_embd"], sizes()["n_layer"]
    assert [point.devices for point in found.devices] == [1, 2, 3, 4, 6, 8]
    assert [point.context for point in found.contexts] == [64, 128, 255] and sizes()["n_positions"] == 256
    assert {point.context for point in found.devices} == {PROMPT + NEW - 1}
    for point in (*found.devices, *found.contexts):
        kv = layers * 2 * width * point.context
        assert point.bytes_ms == pytest.approx(2 * (weight_count() + kv) / (point.devices * 409.6e9) * 1e3)
        assert point.compute_ms == pytest.approx((weight_count() + kv) / (point.devices * 4096 * 200e6) * 1e3)
        assert point.kv_limit_ms == pytest.approx(2 * kv / (point.devices * 409.6e9) * 1e3)
        assert point.limit_ms is not None and point.ms is not None and point.kv_ms is not None
        assert point.limit_ms == max(point.bytes_ms, point.compute_ms)
        assert point.kv_limit_ms < point.kv_ms < point.ms > point.limit_ms
        assert point.declared_ms == pytest.approx(point.bytes_ms * 14 / 13)


def test_commands_print_the_figures_again(found: Study, capsys: pytest.CaptureFixture[str]) -> None:
    def printed(command: str) -> dict[str, dict[str, float]]:
        capsys.readouterr()
        words = shlex.split(command)
        assert words[0] == "typebar" and main(words[1:]) == 0
        figures: dict[str, dict[str, float]] = json.loads(capsys.readouterr().out)
        return figures

    whole = printed(found.simulate_command)
    for name in ("prefill", "decode", "breakdown", "hbm", "program_sha256", "total_cycles"):
        assert whole[name] == found.simulation[name]
    assert found.ttft_ms == whole["prefill"]["ms"] + 2 * 1000e-6
    for point in (*found.contexts, *(point for point in found.devices if point.devices == DEVICES)):
        assert printed(point.command)["decode"]["ms_per_token"] == point.ms
    assert printed(found.devices[0].command) == json.loads(json.dumps(found.to_json()))


def test_points_of_a_shape_print_again(capsys: pytest.CaptureFixture[str], found: Study) -> None:
    """Without an image every number of devices has its own command, and settings are part of it."""
    settings = {"ring.hop_latency": "90", "hbm.rows_per_write_slot": "13"}
    other = study("folio-draft", devices=DEVICES, settings=settings, prompt_tokens=PROMPT, new_tokens=NEW)
    for point in (other.devices[2], other.contexts[0]):
        capsys.readouterr()
        assert "--set ring.hop_latency=90" in point.command and main(shlex.split(point.command)[1:]) == 0
        assert json.loads(capsys.readouterr().out)["decode"]["ms_per_token"] == point.ms
    assert other.devices[0].ms == found.devices[0].ms  # one device has no ring
    assert (other.devices[1].ms or 0) < (found.devices[1].ms or 0)


def test_what_does_not_fit_is_said_in_one_line() -> None:
    tight = {"hbm.capacity_bytes": str(1 << 20)}
    found = study("folio-draft", devices=4, settings=tight, prompt_tokens=2, new_tokens=2)
    one, *_, eight = found.devices
    assert one.ms is None and one.refused is not None and "\n" not in one.refused and "use more devices" in one.refused
    assert eight.ms is not None and eight.refused is None


def test_an_images_model_compiles_to_its_own_program(image: Path, subject: Subject) -> None:
    with Image.open(image) as opened:
        model, program = model_of_image(opened), encode(opened.program)
        again = compiled_subject(model, opened.machine, DEVICES, Format.FP16)
    assert (encode(again.program) == program).all()
    assert asdict(again.io) == asdict(subject.io) and again.entry == subject.entry
    assert {name: again.accounting[name] for name in subject.accounting} == subject.accounting


def test_one_new_token_is_refused(image: Path) -> None:
    with pytest.raises(TypebarError, match="new_tokens = 1 leaves no token to decode: ask for at least 2"):
        study(image, new_tokens=1)


@pytest.mark.parametrize("name", ["T5 v1.0", "GPT-Neo", "Mistral"])
def test_other_families_have_reports(name: str, tmp_path: Path) -> None:
    """Cross-attention, layers that take turns, and windows, which bound what a pass reads of K and V."""
    family = next(item for item in FAMILIES if item.name == name)
    model = random_model(family)
    image = typebar.compile(model, tmp_path / "model.safetensors", devices=1)
    found = study(image, prompt_tokens=6, new_tokens=5)
    mine = [item for item in found.products if item.phase == "decode"]
    assert sum(item.cycles for item in mine) == sum(layer["cycles"] for layer in found.layers)
    assert [layer["layer"] for layer in found.layers] == [0, 1, None]
    roles = [item.role for item in mine]
    assert len(set(roles)) == len(roles) and (f"{SCORES}, source text" in roles) == family.encoder
    (point,) = found.contexts
    assert point.context == 63 and point.bytes_ms is not None and point.kv_limit_ms is not None
    config = model.config
    if name == "Mistral":
        # Two query heads for each of K and V: their operations take as long as their bytes.
        macs = config.num_hidden_layers * 2 * config.num_attention_heads * config.head_dim * config.sliding_window
        assert point.kv_limit_ms == pytest.approx(macs / (2048 * 200e6) * 1e3)
    if name == "T5 v1.0":  # six source positions, whose K and V the encoder's pass stored
        words = config.num_decoder_layers * 2 * config.num_heads * config.d_kv
        assert point.kv_limit_ms == pytest.approx(2 * words * (63 + 6) / 409.6e9 * 1e3)
    assert "</html>" in page(found)
