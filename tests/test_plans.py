"""Plans: matrices that every device holds whole change no bit; rows change the order of additions, alike on all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, Family, random_model
from numpy.typing import NDArray
from test_families import CONTEXT, Reference, check_error, config_of
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import typebar
from typebar.compiler import device_ir as dev
from typebar.compiler import ir
from typebar.compiler.driver import allocated, build, write
from typebar.compiler.frontend import FrontendModel, load_model
from typebar.compiler.memory import program_of
from typebar.compiler.packing import unpack_weights
from typebar.compiler.pipeline import run_passes
from typebar.compiler.plan import COLUMNS, Plan
from typebar.compiler.planner import matrices
from typebar.compiler.problems import LoweringError
from typebar.host.driver import DeviceEngine
from typebar.host.simulator import SimulatedDevice
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
ROWS = Plan(rows=(PROJECTION, DOWN))
TINY = Machine.load("tiny")
TOKENS = [5, 9, 30, 3, 17]


def gpt2(width: int = 60) -> GPT2LMHeadModel:
    """Five heads of 12, padded one by one; 60 columns, which divide by no device count here without padding."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=width, n_head=5, n_layer=2, vocab_size=50, n_positions=32)).eval()


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


def long(*values: object, name: str | None = None) -> Any:
    """A case of a kind of which a quicker one is always run."""
    return pytest.param(*values, id=name, marks=pytest.mark.long)


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(plan, id=name) if name in ("projection", "both", "all") else long(plan, name=name)
        for name, plan in PLANS.items()
    ],
)
def test_replicated_matrices_change_no_bit(plan: Plan, tmp_path: Path) -> None:
    source = load_model(gpt2())
    first = logits(source, tmp_path / "1", 1, COLUMNS)
    for devices in (1, 2, 3, 4):
        assert np.array_equal(first, logits(source, tmp_path / "n", devices, plan)), devices


@pytest.mark.parametrize(
    "replicated",
    [
        ("self_attn.o_proj",),
        long(("mlp.gate_proj",), name="gate_proj"),
        ("mlp.gate_proj", "mlp.up_proj"),
        long(("mlp.down_proj",), name="down_proj"),
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
    return sum(op.kind.name == "gather" for op in made.program.ops[made.program.labels["token"] :])


def test_every_replicated_matrix_saves_its_gather() -> None:
    """Of a token four a layer, the layers being one loop, and that of the best of all devices."""
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
        assert image.manifest.accounting["plan"] == {"replicate": [UP], "rows": []}
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (f'by_rows="{UP}"', rf"mlp.c_fc.weight', which can only be split by columns: .* is {PROJECTION[:15]}"),
        ('by_rows="nothing"', "by_rows names 'nothing', which is no matrix of this step"),
        (f'by_rows="{DOWN}" replicate="{UP}"', "mlp.c_proj.weight', which can only be split by columns"),
        (f'by_rows="{DOWN}" replicate="{DOWN}"', "mlp.c_proj.weight', which can only be split by columns"),
    ],
)
def test_rows_of_other_matrices_are_refused(options: str, message: str) -> None:
    """Only a matrix whose input the devices share out has rows for each: not the first of an FFN, or after a copy."""
    with pytest.raises(TypebarError, match=message):
        partitioned(options)


def test_q_without_k_and_v_is_refused() -> None:
    plan = Plan(("model.layers.{}.self_attn.q_proj.weight",))
    with pytest.raises(LoweringError, match="only some of the matrices of q, k and v are replicated"):
        build(load_model(llama()), Machine.load("tiny"), 2, Format.FP16, plan)


# Rows -----------------------------------------------------------------------------------------------------
def by_rows(source: FrontendModel, devices: int) -> Plan:
    """Rows wherever they can be."""
    found = [item for item in matrices(source, TINY, devices, Format.FP16) if item.shared_out]
    return Plan(rows=tuple(name for item in found for name in item.names))


def test_rows_save_a_gather_each_and_add_partial_sums_in_order() -> None:
    """The last of the sums' operands are the parts one after another; bias and residual follow."""
    text = partitioned(f'by_rows="{PROJECTION}","{DOWN}"')
    assert (partitioned("").count("tbd.gather"), text.count("tbd.gather"), text.count("tbd.sum")) == (4, 2, 2)
    made = build(load_model(gpt2()), TINY, 3, Format.FP16, ROWS)
    module = allocated(load_model(gpt2()), TINY, 3, ROWS)
    totals = [op for op in program_of(module).walk() if isinstance(op, dev.SumOp)]
    assert len(totals) == 2 and all(op.parts == 3 for op in totals)
    for op in totals:
        gathered, out, words = op.x.owner, op.address, ir.width(op.out)
        assert isinstance(gathered, dev.GatherOp)
        start = gathered.address
        adds = [
            tuple(item.get(name).immediate for name in ("dst", "a", "b"))  # type: ignore[union-attr]
            for item in made.program.ops
            if item.kind.name == "vadd" and item.get("b").register == 0  # type: ignore[union-attr]
        ]
        first = adds.index((out, start, start + words))
        assert adds[first + 1] == (out, out, start + 2 * words)


@pytest.mark.parametrize(
    "family",
    [FAMILIES[0], long(FAMILIES[5]), FAMILIES[8], next(family for family in FAMILIES if family.encoder)],
    ids=lambda family: family.name,
)
def test_rows_are_as_near_as_columns(family: Family, tmp_path: Path) -> None:
    """Logits keep the families' bound, and repeat bit for bit on as many devices, also after other ways to the text."""
    model = random_model(family)
    source = load_model(model, config_of(family))
    text = np.random.default_rng(4).integers(3, 90, 11).tolist() if family.encoder else None
    reference, start = Reference(model, text), [0] if family.encoder else [5, 9, 30, 3, 17, 40, 8]
    tokens = start + reference.greedy(start, 12)
    exact, explained = reference.exact_and_explained(tokens)
    for devices in (2, 3):
        plan = by_rows(source, devices)
        assert len(plan.rows) >= 2 and len(tokens) <= CONTEXT
        path = tmp_path / f"{devices}"
        write(build(source, TINY, devices, Format.FP16, plan), path)
        with typebar.load(path, device=["sim"]) as image:
            found = image.logits(tokens, text)
            assert np.array_equal(image.logits(tokens[:6], text), found[:6])
        check_error(family.name, found, exact, explained)


@pytest.mark.parametrize(
    ("width", "fmt", "devices"),
    [
        (60, Format.INT8, 3),
        (40, Format.FP16, 3),
        long(60, Format.FP16, 2),
        long(40, Format.INT8, 2),
        long(40, Format.FP16, 4),
    ],
    ids=str,
)
def test_rows_are_the_same_on_every_device(width: int, fmt: Format, devices: int, tmp_path: Path) -> None:
    """What the logits come from: in blocks of a prompt and token by token, on heads padded one by one.

    Where the width is that of whole registers the last device adds bias and residual, before the sum.
    """
    source = load_model(gpt2(width))
    named = [item for item in matrices(source, TINY, devices, fmt) if item.shared_out]
    plan = Plan(rows=tuple(name for item in named for name in item.names))
    made = build(source, TINY, devices, fmt, plan)
    assert sum(isinstance(op, dev.LastOp) for op in allocated(made.model, TINY, devices, plan).walk()) == (
        2 if width == 40 else 0
    )
    write(made, tmp_path / "image")
    ring = SimulatedDevice(TINY, devices)
    engine = DeviceEngine(Image.open(tmp_path / "image"), ring, "sim")
    whole = engine.logits(TOKENS)
    head = next(
        op for op in program_of(allocated(made.model, TINY, devices, plan)).walk() if isinstance(op, dev.HeadOp)
    )
    at, words = int(head.x.owner.address), int(head.k.value.data)  # type: ignore[union-attr]
    shares = [ring.vector_registers(rank)[at : at + words].copy() for rank in range(devices)]
    assert np.abs(shares[0]).max() > 0.1
    assert all(np.array_equal(share, shares[0]) for share in shares)
    engine.reset()
    for token in TOKENS:
        last = engine.logits([token])
    assert np.array_equal(last, whole)


def test_rows_are_packed_once_and_unpacked_whole(tmp_path: Path) -> None:
    """Each device has its own rows, and together the matrix; the model's bytes stay what they are."""
    source = load_model(gpt2())
    columns, made = (build(source, TINY, 3, Format.FP16, plan) for plan in (COLUMNS, ROWS))
    for name in ("weight_bytes", "macs_per_token", "kv_bytes_per_position"):
        assert made.memory.accounting[name] == columns.memory.accounting[name]
    write(made, tmp_path / "image")
    with Image.open(tmp_path / "image") as image:
        assert image.manifest.accounting["plan"] == {"replicate": [], "rows": [PROJECTION, DOWN]}
        for name in (PROJECTION.format(0), DOWN.format(1)):
            assert np.array_equal(unpack_weights(image)(name), source.lookup(name).astype(np.float16))


def test_rows_are_columns_on_one_device(tmp_path: Path) -> None:
    source = load_model(gpt2())
    assert np.array_equal(logits(source, tmp_path / "a", 1, ROWS), logits(source, tmp_path / "b", 1, COLUMNS))
