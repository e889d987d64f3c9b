"""Plans: matrices that every device holds whole change time and memory, and no bit."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import typebar
from typebar.compiler.cost import CostModel, rows_of_product, steps
from typebar.compiler.driver import Compiled, allocated, build, write
from typebar.compiler.frontend import FrontendModel, load_model
from typebar.compiler.packing import unpack_weights
from typebar.compiler.pipeline import run_passes
from typebar.compiler.plan import COLUMNS, Plan
from typebar.compiler.planner import PREFILL, SIMULATED, choose, propose
from typebar.compiler.problems import LoweringError
from typebar.host.planning import pass_cycles
from typebar.host.report import measure, subject_from
from typebar.isa.errors import TypebarError
from typebar.isa.image import Image
from typebar.isa.instructions import Format, Region
from typebar.isa.machine import Machine
from typebar.isa.timing import timing_parameters

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


# The analytical model and the planner ---------------------------------------------------------------------
@functools.cache
def shape(name: str) -> FrontendModel:
    return load_model(name)


WIDE = {"matrix.columns": "32", "matrix.fifo_port_bytes": "4096", "hbm.fifo_bytes": "16777216"}


@pytest.mark.parametrize("settings", [{}, WIDE], ids=["u280", "u280 that catches up"])
@pytest.mark.parametrize(("name", "devices"), [("gpt2", 1), ("gpt2", 2), ("gpt2", 8), ("tinyllama-1.1b", 3)])
def test_the_model_is_within_a_tenth_of_the_simulator(name: str, devices: int, settings: dict[str, str]) -> None:
    machine = Machine.load("u280").override(settings)
    proposals = {item.plan: item for item in propose(shape(name), machine, devices, Format.FP16)}
    made = build(shape(name), machine, devices, Format.FP16)
    assert proposals[COLUMNS].cycles == pytest.approx(pass_cycles(made), rel=0.1)
    prefill = propose(shape(name), machine, devices, Format.FP16, PREFILL)
    assert min(prefill, key=lambda item: item.plan != COLUMNS).cycles == pytest.approx(
        pass_cycles(made, PREFILL), rel=0.1
    )


def test_copies_are_chosen_where_they_are_faster() -> None:
    """Where a hop takes 10 us, copies of a small matrix beat its gather; at 0.05 us on two devices they do not."""
    slow = Machine.load("u280").override({**WIDE, "ring.hop_latency": "2000"})
    plan = choose(shape("gpt2"), slow, 8, Format.FP16)
    assert PROJECTION in plan.replicate
    times = [pass_cycles(build(shape("gpt2"), slow, 8, Format.FP16, item)) for item in (plan, COLUMNS)]
    assert times[0] < times[1]
    fast = Machine.load("u280").override({**WIDE, "ring.hop_latency": "10"})
    assert choose(shape("gpt2"), fast, 2, Format.FP16) == COLUMNS


def test_no_plan_is_made_for_one_device_or_a_machine_with_barriers() -> None:
    slow = Machine.load("u280").override({**WIDE, "ring.hop_latency": "2000"})
    assert choose(shape("gpt2"), slow, 1, Format.FP16) == COLUMNS
    assert choose(shape("gpt2"), slow.override({"control.barriers": "true"}), 8, Format.FP16) == COLUMNS


def test_pruned_plans_are_no_better() -> None:
    """What the bound leaves out never beats what it keeps, by the model that it bounds."""
    machine = Machine.load("u280").override(WIDE)
    kept = propose(shape("gpt2"), machine, 4, Format.FP16)
    everything = propose(shape("gpt2"), machine, 4, Format.FP16, prune=False)
    assert len(kept) < len(everything) == 16
    assert everything[0] == kept[0]
    assert all(item.cycles >= kept[0].cycles for item in everything)


def test_the_simulator_has_the_last_word() -> None:
    """It sees the model's best plans only, and the fewest cycles that it gives win."""
    machine = Machine.load("u280").override({**WIDE, "ring.hop_latency": "2000"})
    proposals = propose(shape("gpt2"), machine, 8, Format.FP16)
    assert len(proposals) > SIMULATED
    asked: list[Plan] = []

    def third(made: Compiled) -> float:
        asked.append(made.plan)
        return 1.0 if made.plan == proposals[2].plan else 2.0

    assert choose(shape("gpt2"), machine, 8, Format.FP16, simulate=third) == proposals[2].plan
    assert asked == [item.plan for item in proposals[:SIMULATED]]


def test_plans_that_do_not_fit_are_not_proposed() -> None:
    machine = Machine.load("u280").override({**WIDE, "ring.hop_latency": "2000"})
    memory = build(shape("gpt2"), machine, 8, Format.FP16).memory
    needed = memory.addresses.totals[Region.WEIGHTS] + memory.kv_bytes
    small = machine.override({"hbm.capacity_bytes": str(-(-needed // 4096) * 4096)})
    assert [item.plan for item in propose(shape("gpt2"), small, 8, Format.FP16)] == [COLUMNS]


def test_an_unknown_phase_is_refused() -> None:
    with pytest.raises(TypebarError, match="there is no phase 'both': choose decode or prefill"):
        propose(shape("gpt2"), Machine.load("u280"), 2, Format.FP16, "both")


@pytest.mark.parametrize(("tokens", "vectors"), [(0, 1), (3, 2), (4, 0)])
def test_prompts_are_whole_passes(tokens: int, vectors: int) -> None:
    machine = Machine.load("u280")
    model = CostModel(allocated(shape("gpt2"), machine, 2), machine, Format.FP16)
    with pytest.raises(TypebarError, match="has no passes of"):
        model.prompt(tokens, vectors=vectors)


def test_terms_are_the_simulators_counts() -> None:
    """Rows of HBM to the byte, and no pass faster than any of its terms; a prompt in blocks streams weights once."""
    machine, made = Machine.load("u280"), build(shape("gpt2"), Machine.load("u280"), 2, Format.FP16)
    model = CostModel(allocated(shape("gpt2"), machine, 2), machine, Format.FP16)
    cost = model.token(64)
    longer, shorter = (measure(subject_from(made), 1, new, 64)[1].counters[0] for new in (2, 1))
    fetched = sum(
        getattr(longer, name) - getattr(shorter, name) for name in ("weights_fetched_bytes", "kv_fetched_bytes")
    )
    period = machine.hbm.rows_per_write_slot + 1
    assert cost.hbm * (period - 1) / period * machine.row_bytes == pytest.approx(fetched, rel=0.001)
    assert cost.cycles > max(cost.hbm, cost.compute)
    whole, single = model.prompt(16, vectors=16), model.prompt(16)
    assert whole.hbm < single.hbm / 8
    assert whole.cycles < single.cycles


def test_a_single_product_takes_the_contracts_steps() -> None:
    """Worked by hand on u280: 100 x 600 in fp16 is two chunks of 64 in column blocks of 512 / 16 = 32 steps each."""
    p = timing_parameters(Machine.load("u280").override({"matrix.interleave": "32"}))
    assert p.column_block == 512
    load = 64 // 16
    assert steps(p, 100, 600, 2, 1) == load + 2 * 32 + 2 * 6
    assert rows_of_product(p, 100, 600, 2) == 2 * (512 * 128 // 2048) + 2 * -(-88 * 128 // 2048)
    with_bias = steps(p, 100, 512, 2, 1, extra=1)
    assert with_bias == load + 32 + max(32, load + 512 // 16)


@pytest.mark.parametrize("plan", ["model", "simulate", "columns"])
def test_images_say_how_they_were_planned(plan: str, tmp_path: Path) -> None:
    slow = Machine.load("tiny").override({"ring.hop_latency": "2000"})
    made = typebar.compile(gpt2(), tmp_path / "image", machine=slow, devices=2, plan=plan)
    replicated = made.manifest.accounting["plan"]["replicate"]
    assert replicated == [] if plan == "columns" else PROJECTION in replicated
    assert typebar.simulate(made.path, prompt_tokens=2, new_tokens=2).plan == {"replicate": replicated}


def test_other_ways_to_plan_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypebarError, match="plan cannot be 'best': choose model, simulate or columns"):
        typebar.compile(gpt2(), tmp_path / "image", machine="tiny", devices=2, plan="best")
    with pytest.raises(TypebarError, match="plan cannot be 'best'"):
        typebar.simulate("gpt2", plan="best")


@pytest.mark.parametrize("data", [None, [], {}, {"replicate": "a"}, {"replicate": [1]}, {"replicate": [], "rows": []}])
def test_only_plans_are_read_as_plans(data: object) -> None:
    assert Plan.from_json(Plan(("a", "b")).to_json()) == Plan(("a", "b"))
    with pytest.raises(TypebarError, match="is no list of replicated matrices: compile again"):
        Plan.from_json(data)
