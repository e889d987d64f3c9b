"""Plans: matrices that every device holds whole change time and memory, and no bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import typebar
from typebar.compiler.driver import build, write
from typebar.compiler.frontend import FrontendModel, load_model
from typebar.compiler.packing import unpack_weights
from typebar.compiler.pipeline import run_passes
from typebar.compiler.plan import COLUMNS, Plan
from typebar.compiler.problems import LoweringError
from typebar.isa.errors import TypebarError
from typebar.isa.image import Image
from typebar.isa.instructions import Format, Region
from typebar.isa.machine import Machine

FRONT = Path(__file__).parent / "compiler/front"
ATTENTION, PROJECTION = "transformer.h.{}.attn.c_attn.weight", "transformer.h.{}.attn.c_proj.weight"
UP, DOWN = "transformer.h.{}.mlp.c_fc.weight", "transformer.h.{}.mlp.c_proj.weight"
PLANS = {
    "projection": Plan((PROJECTION,)),
    "up": Plan((UP,)),
    "down": Plan((DOWN,)),
    "both": Plan((UP, DOWN)),
    "attention": Plan((ATTENTION,)),
    "all": Plan((ATTENTION, PROJECTION, UP, DOWN)),
}
TOKENS = [5, 9, 30, 3, 17]


def gpt2() -> GPT2LMHeadModel:
    """Five heads of 12, padded one by one; 60 columns, which divide by no device count here without padding."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=60, n_head=5, n_layer=2, vocab_size=50, n_positions=32)).eval()


def llama() -> LlamaForCausalLM:
    """Six query heads on two K/V heads, turned by their positions; two products that are multiplied."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 56}
    return LlamaForCausalLM(
        LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=61, max_position_embeddings=32)  # type: ignore[arg-type]
    ).eval()


def logits(source: FrontendModel, path: Path, devices: int, plan: Plan) -> NDArray[np.float32]:
    write(build(source, Machine.load("tiny"), devices, Format.FP16, plan), path)
    with typebar.load(path, device="sim") as model:
        result: NDArray[np.float32] = model.logits(TOKENS)
    return result


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_replicated_matrices_change_no_bit(plan: Plan, tmp_path: Path) -> None:
    source = load_model(gpt2())
    first = logits(source, tmp_path / "1", 1, COLUMNS)
    for devices in (1, 2, 3, 4):
        assert np.array_equal(first, logits(source, tmp_path / "n", devices, plan)), devices


@pytest.mark.parametrize(
    "replicated",
    [
        ("self_attn.o_proj",),
        ("mlp.gate_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ],
    ids=lambda names: "+".join(name.rpartition(".")[2] for name in names),
)
def test_grouped_queries_and_gated_products_change_no_bit(replicated: tuple[str, ...], tmp_path: Path) -> None:
    source = load_model(llama())
    plan = Plan(tuple(f"model.layers.{{}}.{name}.weight" for name in replicated))
    first = logits(source, tmp_path / "1", 1, COLUMNS)
    for devices in (2, 3):
        assert np.array_equal(first, logits(source, tmp_path / "n", devices, plan)), devices


def gathers(plan: Plan, devices: int = 2) -> int:
    made = build(load_model(gpt2()), Machine.load("tiny"), devices, Format.FP16, plan)
    return sum(op.kind.name == "gather" for op in made.program.ops)


def test_every_replicated_matrix_saves_its_gather() -> None:
    """Four a layer, the layers being one loop, and that of the best of all devices."""
    assert gathers(COLUMNS) == 5
    assert [gathers(PLANS[name]) for name in ("projection", "both", "attention", "all")] == [4, 3, 4, 1]


def test_an_image_counts_and_holds_every_copy(tmp_path: Path) -> None:
    """Every device has the whole matrix in its memory; the model's own bytes and passes stay what they are."""
    source, machine = load_model(gpt2()), Machine.load("tiny")
    columns = build(source, machine, 3, Format.FP16)
    made = build(source, machine, 3, Format.FP16, PLANS["up"])
    rounded = 64 * 240 * 2 * 2  # 60 rows in chunks of 8, 240 columns, two layers, two bytes
    spared = 64 * 80 * 2 * 2
    totals = [item.memory.addresses.totals[Region.WEIGHTS] for item in (made, columns)]
    packed = [item.memory.accounting["packed_weight_bytes"] for item in (made, columns)]
    assert packed[0] - packed[1] == 3 * (rounded - spared)
    assert rounded - spared <= totals[0] - totals[1] <= rounded - spared + 2 * 4096
    for name in ("weight_bytes", "macs_per_token", "kv_bytes_per_position"):
        assert made.memory.accounting[name] == columns.memory.accounting[name]
    write(made, tmp_path / "image")
    with Image.open(tmp_path / "image") as image:
        assert image.manifest.accounting["plan"] == {"replicate": [UP]}
        unpacked = unpack_weights(image)(UP.format(1))
    assert np.array_equal(unpacked, source.lookup(UP.format(1)).astype(np.float16))


def test_copies_that_do_not_fit_are_refused() -> None:
    source, machine = load_model(gpt2()), Machine.load("tiny")
    capacity = build(source, machine, 4, Format.FP16).memory
    needed = capacity.addresses.totals[Region.WEIGHTS] + capacity.kv_bytes
    small = machine.override({"hbm.capacity_bytes": str(-(-needed // 4096) * 4096)})
    build(source, small, 4, Format.FP16)
    with pytest.raises(TypebarError, match=r"the model needs \d+ bytes of HBM"):
        build(source, small, 4, Format.FP16, PLANS["both"])


def partitioned(options: str, step: str = "gpt2_step.mlir") -> str:
    return run_passes((FRONT / step).read_text(), [f"partition{{devices=2 align=8 {options}}}"])


def test_a_plan_is_a_pass_option() -> None:
    columns, whole = partitioned(""), partitioned(f'replicate="{PROJECTION}","{DOWN}"')
    assert (columns.count("tbd.gather"), whole.count("tbd.gather")) == (4, 2)
    assert "%proj_all" in columns and "%proj_all" not in whole
    assert columns.count("share = 2") == 0 and whole.count("share = 2") == 4, "two matrices and their biases"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ('"nothing"', "replicate names 'nothing', which is no matrix of this step: what can be replicated is tran"),
        ('"transformer.wte.weight"', "'transformer.wte.weight', which can only be split: what can be"),
    ],
)
def test_plans_for_other_matrices_are_refused(names: str, message: str) -> None:
    with pytest.raises(TypebarError, match=message):
        partitioned(f"replicate={names}")


def test_q_without_k_and_v_is_refused() -> None:
    plan = Plan(("model.layers.{}.self_attn.q_proj.weight",))
    with pytest.raises(LoweringError, match="only some of the matrices of q, k and v are replicated"):
        build(load_model(llama()), Machine.load("tiny"), 2, Format.FP16, plan)
