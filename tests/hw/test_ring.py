"""The ring unit on Verilator, 1 to 5 of them on their links: values and times of every gather against the contract."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field

import numpy as np
import pytest

from typebar.hw.ports import activity_layout, completed_shape, file_rows
from typebar.hw.ring import RingUnit
from typebar.isa.errors import TypebarError
from typebar.isa.machine import Machine
from typebar.isa.timing import Cause, gather_cycles, gather_done, timing_parameters
from typebar.tests.hw.native import U32Array
from typebar.tests.hw.ring_bench import MOST, Ring

SEED = 1
MACHINES = {
    "tiny": {"vector.words": "1024", "ring.buffer_words": "512"},
    "two cycles a row, short hops": {
        "vector.words": "1024", "vector.lanes": "16", "vector.align": "16", "ring.megabits_per_second": "51000",
        "ring.hop_latency": "4", "ring.setup_latency": "4", "ring.buffer_words": "1024",
    },
    "hardly more than a cycle a row": {
        "vector.words": "1024", "ring.megabits_per_second": "48301", "ring.hop_latency": "11",
        "ring.buffer_words": "512",
    },
    "a row a cycle, long hops": {
        "vector.words": "1024", "ring.megabits_per_second": "51200", "ring.hop_latency": "37",
        "ring.setup_latency": "5", "ring.buffer_words": "1024",
    },
}  # fmt: skip


@dataclass
class Gather:
    """A gather on all devices: words, and by device the rows of operand and result, start and done."""

    n: int
    a: list[int]
    dst: list[int]
    starts: list[int]
    done: list[int]


@dataclass
class Plan:
    """Gathers on a ring, and the register files before and after them, [devices, rows, lanes]."""

    devices: int
    gathers: list[Gather]
    before: U32Array
    after: U32Array
    origin: int = field(default=0)


def _done(machine: Machine, n: int, starts: list[int], stalled: bool, before: int) -> list[int]:
    """When a gather is done: the contract's recurrence, and time to write all rows."""
    p, devices = timing_parameters(machine, SEED if stalled else 0), len(starts)
    done = np.zeros(devices, np.int64)
    gather_done(p, n, np.array(starts), np.zeros((2, max(1, devices // 2), devices), np.int64), done, before)
    return [int(cycle) for cycle in done]


def _plan(machine: Machine, devices: int, count: int, seed: int, stalled: bool, origin: int) -> Plan:
    """Random gathers, many of the result before, with devices that start together, apart, or one of them very late."""
    random = np.random.default_rng(seed)
    rows, lanes = file_rows(machine), machine.vector.lanes
    unit = machine.vector.align // lanes
    words = random.integers(0, 1 << 32, (devices, rows, lanes), np.uint32)
    plan = Plan(devices, [], words.copy(), words)
    free = [origin] * devices
    for index in range(count):
        most = min(rows // (devices + 1), machine.ring.buffer_words // lanes)
        n = int(random.choice([0, 1, 2, most, *random.integers(0, most + 1, 6)])) // unit * unit
        slack = rows - (devices + 1) * n
        a, dst = [], []
        for _ in range(devices):
            first, second = sorted(int(x) // unit * unit for x in random.integers(0, slack + 1, 2))
            below = random.random() < 0.5
            a.append(first if below else second + devices * n)
            dst.append(second + n if below else first)
        late = int(random.choice([0, 0, 1, 3, 40, 2000]))
        delays = random.integers(0, late + 1, devices) if random.random() < 0.5 else np.zeros(devices, int)
        delays[random.integers(devices)] += late
        starts = [free[d] + int(delays[d]) for d in range(devices)]
        free = _done(machine, n * lanes, starts, stalled, index)
        plan.gathers.append(Gather(n * lanes, a, dst, starts, free))
        block = np.concatenate([words[d, a[d] : a[d] + n] for d in range(devices)])
        for d in range(devices):
            words[d, dst[d] : dst[d] + len(block)] = block
    return plan


def _inputs(machine: Machine, plan: Plan, stalled: bool) -> tuple[int, dict[str, U32Array]]:
    """Load the register files, start every gather, read them back; the read starts `file_rows` before the end."""
    rows, lanes = file_rows(machine), machine.vector.lanes
    end = max(plan.gathers[-1].done) + 4
    cycles = end + rows + 1
    given = {"devices": np.full(cycles, plan.devices, np.uint32), "stalls": np.full(cycles, stalled, np.uint32)}
    given["rst"] = np.array([1, 1], np.uint32)
    load = np.zeros((2 + MOST * rows, 1), np.uint32)
    load_row, load_data = np.zeros_like(load), np.zeros((len(load), lanes), np.uint32)
    for d in range(plan.devices):
        span = slice(2 + d * rows, 2 + (d + 1) * rows)
        load[span, 0], load_row[span, 0], load_data[span] = 1 << d, np.arange(rows), plan.before[d]
    given |= {"load": load, "load_row": load_row, "load_data": load_data}
    given["dump_row"] = np.concatenate([np.zeros(end, np.uint32), np.arange(rows, dtype=np.uint32)])
    for d in range(plan.devices):
        each = {name: np.zeros(cycles, np.uint32) for name in ("start", "n", "dst", "a", "pc", "ticket")}
        for index, gather in enumerate(plan.gathers):
            at = gather.starts[d]
            values = (1, gather.n, gather.dst[d] * lanes, gather.a[d] * lanes, 100 + index, index + 1)
            for name, value in zip(each, values, strict=True):
                each[name][at] = value
        given |= {f"{name}_{d}": value for name, value in each.items()}
    return cycles, given


def _origin(machine: Machine) -> int:
    return MOST * file_rows(machine) + 6


def _check_times(machine: Machine, plan: Plan, out: dict[str, U32Array]) -> None:
    """Ready, completed, activity and register writes of every device in every cycle."""
    p, tickets, layout = timing_parameters(machine), 1 << completed_shape(machine), activity_layout()
    codes = {
        cause: layout.const({"active": 1, "cause": int(cause), "waited": int(Cause.FETCH)}).as_bits()
        for cause in (Cause.TRANSFER, Cause.SKEW)
    }
    origin, end = _origin(machine), max(plan.gathers[-1].done) + 3
    for d in range(plan.devices):
        ready, completed, active = np.ones(end, int), np.zeros(end, int), np.zeros(end, int)
        may_write = np.zeros(end, bool)
        for index, gather in enumerate(plan.gathers):
            start, done = gather.starts[d], gather.done[d]
            together = gather_cycles(p, gather.n, plan.devices)
            ready[start + 1 : done] = 0
            completed[done:] = (index + 1) % tickets
            active[start : min(done, start + together)] = codes[Cause.TRANSFER]
            active[min(done, start + together) : done] = codes[Cause.SKEW]
            may_write[start + 1 : done] = True
        for name, expected in (("ready", ready), ("completed", completed)):
            mine = out[f"{name}_{d}"][origin:end]
            differ = np.flatnonzero(mine != expected[origin:])
            assert not len(differ), f"device {d} of {plan.devices}: {name} in cycle {origin + differ[0]}"
        mine = out[f"activity_{d}"][origin:end]
        is_active = (mine & 1).astype(bool)
        assert np.array_equal(np.where(is_active, mine, 0), active[origin:]), f"device {d}: activity"
        assert (out[f"writes_{d}"] != 3).all(), f"device {d}: two rows in a cycle"
        assert not (out[f"writes_{d}"][origin:end].astype(bool) & ~may_write[origin:]).any(), f"device {d}: writes"
        assert not out[f"mismatch_{d}"].any()


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name == "tiny" else pytest.mark.long) for name in MACHINES],
)
def ring(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ring:
    machine = Machine.load("tiny").override(MACHINES[request.param])
    return Ring(machine, tmp_path_factory.mktemp("ring"), SEED)


@pytest.mark.parametrize("stalled", [False, True])
@pytest.mark.parametrize("devices", range(1, MOST + 1))
def test_gathers_keep_the_contract(ring: Ring, devices: int, stalled: bool) -> None:
    machine = ring.machine
    plan = _plan(machine, devices, 40, 100 * devices + stalled, stalled, _origin(machine))
    cycles, given = _inputs(machine, plan, stalled)
    out = ring.run(cycles, given)
    _check_times(machine, plan, out)
    for d in range(devices):
        dump = out[f"dump_{d}"][-1 - file_rows(machine) : -1]
        assert np.array_equal(dump, plan.after[d]), f"device {d} of {devices}"


@pytest.mark.parametrize("devices", [2, 3, 5])
def test_links_that_stall_anywhere_lose_nothing(ring: Ring, devices: int) -> None:
    machine, random = ring.machine, np.random.default_rng(devices)
    plan = _plan(machine, devices, 8, devices, False, _origin(machine))
    for index, gather in enumerate(plan.gathers):
        gather.starts = [_origin(machine) + 4000 * index + int(random.integers(500)) for _ in range(devices)]
        gather.done = [start + 3400 for start in gather.starts]
    cycles, given = _inputs(machine, plan, False)
    share = np.repeat(random.choice([0.0, 0.3, 0.9], (1 + cycles // 700, 2 * MOST)), 700, axis=0)[:cycles]
    bits = random.random((cycles, 2 * MOST)) < share
    given["jitter"] = (bits << np.arange(2 * MOST)).sum(axis=1).astype(np.uint32)
    out = ring.run(cycles, given)
    for d in range(devices):
        assert np.array_equal(out[f"dump_{d}"][-1 - file_rows(machine) : -1], plan.after[d]), f"device {d}"
        assert out[f"completed_{d}"][-1] == len(plan.gathers) and not out[f"mismatch_{d}"].any()


def test_another_length_or_number_is_a_mismatch(ring: Ring) -> None:
    machine = ring.machine
    align = machine.vector.align // machine.vector.lanes
    for kind in ("length", "number"):
        plan = _plan(machine, 3, 4, 5, False, _origin(machine))
        cycles, given = _inputs(machine, plan, False)
        # Device 1 differs from its third gather on: another length, or it leaves one out.
        at = plan.gathers[2].starts[1]
        if kind == "length":
            words = align * machine.vector.lanes
            given["n_1"][at] = 2 * words if plan.gathers[2].n == words else words
        else:
            given["start_1"][at] = 0
        out = ring.run(cycles, given)
        for d in range(3):
            wrong = np.flatnonzero(out[f"mismatch_{d}"])
            assert out[f"completed_{d}"][-1] == 2
            if len(wrong):
                index = int(out[f"mismatch_pc_{d}"][-1]) - 100
                assert index == (3 if kind == "number" and d == 1 else 2)
        assert any(out[f"mismatch_{d}"].any() for d in range(3)), kind


def test_waiting_is_told(ring: Ring) -> None:
    """A device whose neighbour never starts says so, without end, and one that moves does not for long."""
    machine = ring.machine
    plan = _plan(machine, 2, 1, 3, False, _origin(machine))
    gather = plan.gathers[0]
    gather.starts, gather.done = [_origin(machine)] * 2, [_origin(machine) + 3000] * 2
    cycles, given = _inputs(machine, plan, False)
    given["start_1"][:] = 0
    out = ring.run(cycles, given)
    p = timing_parameters(machine)
    busy = gather_cycles(p, gather.n, 2)
    assert out["waiting_0"][gather.starts[0] + busy :].all() and not out["waiting_1"].any()
    assert not out["completed_0"].any() and not out["waiting_0"][: gather.starts[0] + p.setup_latency].any()


@pytest.mark.parametrize(
    ("key", "value"), [("setup_latency", "3"), ("hop_latency", "3"), ("megabits_per_second", "51201")]
)
def test_a_machine_faster_than_the_unit_is_refused(key: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RingUnit, "_MustUse__silence", True)
    with pytest.raises(TypebarError, match=key):
        RingUnit(Machine.load("tiny").override({f"ring.{key}": value}))
    gc.collect()  # while an unused unit is no cause for a warning
