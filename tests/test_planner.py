"""The planner: an analytical model near the simulator, and the plans that it chooses by it."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from test_plans import DOWN, PROJECTION, gpt2

import typebar
from typebar.compiler.cost import CostModel
from typebar.compiler.cost_units import matmul_rows, matmul_steps
from typebar.compiler.driver import Compiled, build
from typebar.compiler.frontend import FrontendModel, load_model
from typebar.compiler.plan import COLUMNS, DECODE, EXACT, FASTEST, PHASES, PREFILL, Plan
from typebar.compiler.planner import SIMULATED, choose, propose
from typebar.host.planning import pass_cycles
from typebar.host.report import measure, subject_from
from typebar.isa.errors import TypebarError
from typebar.isa.instructions import Format, Region
from typebar.isa.machine import Machine
from typebar.isa.timing import X_ADD_BIAS, timing_parameters

U280 = Machine.load("u280")
SLOW = U280.override({"ring.hop_latency": "2000"})
"""Where a hop takes 10 us."""


@functools.cache
def shape(name: str) -> FrontendModel:
    return load_model(name)


# The analytical model ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("machine", "name", "devices", "plan"),
    [
        ("u280", "gpt2", 1, COLUMNS),
        ("u280", "gpt2", 8, COLUMNS),
        ("u280", "gpt2", 3, Plan(rows=(PROJECTION, DOWN))),
        ("u280-dfx", "gpt2", 2, COLUMNS),
        pytest.param("u280", "tinyllama-1.1b", 3, COLUMNS, marks=pytest.mark.long),
        pytest.param("u280", "dfx-345m", 4, Plan(rows=(PROJECTION, DOWN)), marks=pytest.mark.long),
    ],
)
def test_the_model_is_within_a_hundredth_of_the_simulator(machine: str, name: str, devices: int, plan: Plan) -> None:
    made = build(shape(name), Machine.load(machine), devices, Format.FP16, plan)
    for phase in PHASES:
        modelled = CostModel(made).token(128) if phase == DECODE else CostModel(made).prompt(64)
        assert modelled.cycles == pytest.approx(pass_cycles(made, phase), rel=0.01), phase


def test_other_machines_are_modelled_too() -> None:
    """A FIFO that fills, queues that hold up, int8 weights that fold, a slow ring, no run-ahead."""
    changes = [
        {"hbm.fifo_bytes": "1048576"},
        {"control.queue_depth": "8"},
        {"control.run_ahead": "false"},
        {"ring.hop_latency": "1000"},
        {"matrix.rows": "2"},
    ]
    for settings in changes:
        for fmt in (Format.FP16, Format.INT8):
            made = build(shape("gpt2"), U280.override(settings), 2, fmt)
            found = CostModel(made).token(128).cycles
            assert found == pytest.approx(pass_cycles(made), rel=0.05), (settings, fmt)


def test_a_prompt_waits_for_the_last_device() -> None:
    """Which adds residual and bias row by row before a gather, where a product goes by rows: 2 % of the time here."""
    machine = U280.override({"vector.lanes": "16", "vector.align": "16"})
    made = build(shape("gpt2"), machine, 4, Format.FP16, Plan(rows=(PROJECTION, DOWN)))
    assert CostModel(made).prompt(64).cycles == pytest.approx(pass_cycles(made, PREFILL), rel=0.01)


def test_terms_are_the_simulators_counts() -> None:
    """Rows of HBM to the byte, gathers and occupied cycles, layers passed over included; no pass beats any of them.

    A gather that the other device began first is over sooner than one that both begin together, by less than a cycle
    on average.
    """
    made = build(shape("gpt2"), U280, 2, Format.FP16)
    cost = CostModel(made).token(64)
    longer, shorter = (measure(subject_from(made), 1, new, 63)[1] for new in (2, 1))
    fetched = sum(
        sign * getattr(run.counters[0], name)
        for sign, run in ((1, longer), (-1, shorter))
        for name in ("weights_fetched_bytes", "kv_fetched_bytes")
    )
    period = U280.hbm.rows_per_write_slot + 1
    assert cost.hbm * (period - 1) / period * U280.row_bytes == pytest.approx(fetched, rel=1e-9)
    causes = [run.causes[0] for run in (longer, shorter)]
    assert cost.vector == causes[0]["vector"]["compute"] - causes[1]["vector"]["compute"]
    transfer, gathers = causes[0]["ring"]["transfer"] - causes[1]["ring"]["transfer"], 12 * 4 + 1
    assert transfer <= cost.ring <= transfer + gathers
    assert cost.cycles > max(cost.hbm, cost.compute, cost.vector, cost.ring)


def test_a_single_product_takes_the_contracts_steps() -> None:
    """Worked by hand: 100 x 600 in fp16 is two chunks of 64 in column blocks of 512 / 32 = 16 steps and of 3.

    Results leave 16 words a row, two rows a step; the bias of 512 columns is 32 rows, four with a chunk's operands.
    """
    p = timing_parameters(U280.override({"vector.lanes": "16", "vector.align": "16"}))
    assert (p.column_block, p.columns, p.vector_lanes, p.accumulate_latency) == (512, 32, 16, 4)
    load, plain = 64 // 16, (0,) * 32
    assert matmul_steps(p, plain, 1, 100, 512, 2) == load + 16 + 16 * 2
    assert matmul_steps(p, plain, 1, 100, 600, 2) == load + 16 + 16 * 2 + 4 + 3 * 2
    biased = tuple(int(i == X_ADD_BIAS) for i in range(32))
    assert matmul_steps(p, biased, 1, 100, 512, 2) == (load + 4) + (load + 28) + 16 * 2
    assert matmul_steps(p, plain, 1, 100, 5 * 512, 2) == load + 5 * (16 + 16 * 2)
    assert matmul_rows(p, 100, 600, 2) == 2 * (512 * 128 // 2048) + 2 * -(-88 * 128 // 2048)


@pytest.mark.parametrize(("tokens", "start"), [(0, 1), (4, -1), (1023, 1)])
def test_prompts_outside_the_context_are_refused(tokens: int, start: int) -> None:
    model = CostModel(build(shape("gpt2"), U280, 2, Format.FP16))
    with pytest.raises(TypebarError, match="are outside the context of 1024"):
        model.prompt(tokens, start)


# The planner ------------------------------------------------------------------------------------------------
def test_copies_are_chosen_where_they_are_faster() -> None:
    """Where a hop takes 10 us, copies of a small matrix beat its gather; at 0.05 us on two devices they do not."""
    plan = choose(shape("gpt2"), SLOW, 8, Format.FP16)
    assert PROJECTION in plan.replicate and plan.exact
    times = [pass_cycles(build(shape("gpt2"), SLOW, 8, Format.FP16, item)) for item in (plan, COLUMNS)]
    assert times[0] < times[1]
    fast = U280.override({"ring.hop_latency": "10"})
    assert choose(shape("gpt2"), fast, 2, Format.FP16) == COLUMNS


def test_rows_are_chosen_only_where_they_are_allowed_and_faster() -> None:
    machine = U280.override({"ring.hop_latency": "1000"})
    plan, exact = (choose(shape("gpt2"), machine, 2, Format.FP16, split=split) for split in (FASTEST, EXACT))
    assert plan.rows == (PROJECTION, DOWN) and not plan.exact and exact.exact
    times = [pass_cycles(build(shape("gpt2"), machine, 2, Format.FP16, item)) for item in (plan, exact, COLUMNS)]
    assert times == sorted(times) and len(set(times)) == 3


def test_the_phase_asked_for_is_the_one_compared() -> None:
    asked = []
    for phase in PHASES:

        def note(made: Compiled, phase: str) -> float:
            asked.append(phase)
            return 0.0

        choose(shape("gpt2"), SLOW, 8, Format.FP16, phase, EXACT, note)
    assert asked == [DECODE] * SIMULATED + [PREFILL] * SIMULATED


def test_no_plan_is_made_for_one_device_or_a_machine_with_barriers() -> None:
    assert choose(shape("gpt2"), SLOW, 1, Format.FP16, split=FASTEST) == COLUMNS
    barriers = SLOW.override({"control.barriers": "true"})
    assert choose(shape("gpt2"), barriers, 8, Format.FP16, split=FASTEST) == COLUMNS


def test_pruned_plans_are_no_better() -> None:
    """What the bound leaves out never beats what it keeps, by the model that it bounds."""
    kept = propose(shape("gpt2"), U280, 4, Format.FP16)
    everything = propose(shape("gpt2"), U280, 4, Format.FP16, prune=False)
    assert len(kept) < len(everything) == 16
    assert everything[0] == kept[0]
    assert all(1.001 * item.cycles >= kept[0].cycles for item in everything)


def test_all_splits_are_proposed_if_any_is_allowed() -> None:
    """Of each pair the first copied or not; the second copied, by rows unless the first is copied, or neither."""
    plans = {item.plan for item in propose(shape("gpt2"), U280, 4, Format.FP16, split=FASTEST, prune=False)}
    assert len(plans) == (3 + 2) * (3 + 2)
    assert all(not set(plan.rows) & set(plan.replicate) for plan in plans)


def test_the_simulator_has_the_last_word() -> None:
    """It sees the model's best plans only, and the fewest cycles that it gives win."""
    proposals = propose(shape("gpt2"), SLOW, 8, Format.FP16)
    assert len(proposals) > SIMULATED
    asked: list[Plan] = []

    def third(made: Compiled, phase: str) -> float:
        asked.append(made.plan)
        return 1.0 if made.plan == proposals[2].plan else 2.0

    assert choose(shape("gpt2"), SLOW, 8, Format.FP16, simulate=third) == proposals[2].plan
    assert asked == [item.plan for item in proposals[:SIMULATED]]


def test_plans_that_do_not_fit_are_not_proposed() -> None:
    memory = build(shape("gpt2"), SLOW, 8, Format.FP16).memory
    needed = memory.addresses.totals[Region.WEIGHTS] + memory.kv_bytes
    small = SLOW.override({"hbm.capacity_bytes": str(-(-needed // 4096) * 4096)})
    assert [item.plan for item in propose(shape("gpt2"), small, 8, Format.FP16)] == [COLUMNS]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"phase": "both"}, "there is no phase 'both': choose decode or prefill"),
        ({"split": "all"}, "there is no split 'all': choose exact or fastest"),
    ],
)
def test_an_unknown_phase_or_split_is_refused(given: dict[str, str], message: str) -> None:
    with pytest.raises(TypebarError, match=message):
        propose(shape("gpt2"), U280, 2, Format.FP16, **given)  # type: ignore[arg-type]


# What a caller asks for -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ((), ())),
        pytest.param({"plan": "columns"}, ((), ()), marks=pytest.mark.long),
        ({"plan": "columns", "split": "exact"}, ((), ())),
        pytest.param({"plan": "model"}, ((PROJECTION,), ()), marks=pytest.mark.long),
        ({"split": "exact"}, ((PROJECTION,), ())),
        pytest.param({"plan": "simulate"}, ((PROJECTION,), ()), marks=pytest.mark.long),
        ({"split": "fastest"}, ((PROJECTION,), (DOWN,))),
        ({"plan": "simulate", "split": "fastest", "phase": "prefill"}, ((), (PROJECTION, DOWN))),
    ],
)
def test_images_say_how_they_were_planned(
    given: dict[str, str], expected: tuple[tuple[str, ...], tuple[str, ...]], tmp_path: Path
) -> None:
    slow = Machine.load("tiny").override({"ring.hop_latency": "200"})
    made = typebar.compile(gpt2(), tmp_path / "image", machine=slow, devices=2, **given)  # type: ignore[arg-type]
    plan = made.manifest.accounting["plan"]
    assert (tuple(plan["replicate"]), tuple(plan["rows"])) == expected
    assert typebar.simulate(made.path, prompt_tokens=2, new_tokens=2).plan == plan
    with pytest.raises(TypebarError, match="an image has its plan already"):
        typebar.simulate(made.path, plan="model")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"plan": "best"}, "plan cannot be 'best': choose model, simulate or columns"),
        ({"split": "all"}, "split cannot be 'all': choose exact or fastest"),
        ({"phase": "both"}, "phase cannot be 'both': choose decode or prefill"),
        ({"plan": "columns", "split": "fastest"}, "plan = 'columns' leaves split = 'fastest' no choice"),
        ({"plan": "columns", "phase": "decode"}, "plan = 'columns' leaves phase = 'decode' no choice"),
    ],
)
def test_other_ways_to_plan_are_refused(given: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(TypebarError, match=message):
        typebar.compile(gpt2(), tmp_path / "image", machine="tiny", devices=2, **given)  # type: ignore[arg-type]
    with pytest.raises(TypebarError, match=message):
        typebar.simulate("gpt2", **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("data", [None, [], {}, {"replicate": "a", "rows": []}, {"replicate": [1], "rows": []},
                                  {"replicate": []}, {"replicate": [], "rows": [], "heads": []}])  # fmt: skip
def test_only_plans_are_read_as_plans(data: object) -> None:
    assert Plan.from_json(Plan(("a", "b"), ("c",)).to_json()) == Plan(("a", "b"), ("c",))
    with pytest.raises(TypebarError, match="is no plan of matrices: compile again"):
        Plan.from_json(data)
