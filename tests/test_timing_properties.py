"""Physics and monotonicity of the timing simulator, on random programs and variations of the shipped machines."""

from __future__ import annotations

import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from typebar.isa.errors import TypebarError
from typebar.isa.instructions import INSTRUCTIONS, Kind
from typebar.isa.layout import packed_layout
from typebar.isa.machine import Machine
from typebar.isa.program import Op, Operand, Program, assemble, op
from typebar.isa.timing import matrix_last_row, timing_parameters
from typebar.sim.timing import TimingResult, run_timing

BYTES = (2, 2, 1, 4)
MACHINES = [Machine.load("tiny"), Machine.load("u280"), Machine.load("u280-dfx").override({"matrix.vectors": "16"})]
"""DFX's takes one vector at a time, and the programs have several."""


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    """A shipped machine with some of the parameters that move time redrawn."""
    base = draw(st.sampled_from(MACHINES))
    choices = {
        "matrix.rows": [1, 2, 4],
        "matrix.accumulate_latency": [1, 4, 40],
        "matrix.dot_latency": [1, 70],
        "hbm.latency": [1, 64, 300],
        "hbm.rows_per_write_slot": [1, 13],
        "hbm.fifo_bytes": [base.hbm.fifo_bytes, 8192 * 8, 8192 * 64],
        "ring.hop_latency": [1, 100],
        "control.queue_depth": [1, 4, 16],
        "control.run_ahead": ["true", "false"],
    }
    changes = {key: str(draw(st.sampled_from(values))) for key, values in choices.items()}
    try:
        machine = base.override(changes)
        run(Program([op("halt")]), machine, 1)
        return machine
    except TypebarError:
        return base


def run(program: Program, machine: Machine, devices: int) -> TimingResult:
    return run_timing(program, machine, devices, np.zeros((devices, 4), np.int32))


@st.composite
def matmuls(draw: st.DrawFn) -> Op:
    return op(
        "matmul",
        format=draw(st.integers(0, 3)),
        region=draw(st.integers(0, 1)),
        full=draw(st.integers(0, 1)),
        k=draw(st.integers(1, 500)),
        n=Operand(1, draw(st.integers(0, 700))),
        line=32 * draw(st.integers(0, 3)),
        outer=draw(st.integers(0, 4)),
        inner=draw(st.integers(1, 2)),
        src=128 * draw(st.integers(0, 8)),
        dst=4096 + 128 * draw(st.integers(0, 8)),
    )


OTHERS = st.sampled_from(
    [
        op("vadd", dst=4096, a=4096, b=0, n=700),
        op("vsumsq", dst=0, a=4096, n=500),
        op("gather", dst=8192, a=4096, n=256),
        op("store", format=0, region=1, a=4096, outer=2, inner=70, outer_bytes=8192, inner_bytes=128),
        op("load", format=3, region=2, dst=1024, n=900),
        op("sload", region=4, rd=3),
        op("vread", rd=4, a=4100),
        op("fence"),
    ]
)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    body = draw(st.lists(st.one_of(matmuls(), OTHERS), min_size=1, max_size=8))
    loop = [op("sadd", rd=9, a=Operand(9), b=-1), op("bne", to=1, a=Operand(9), b=0), op("halt")]
    return Program([op("sadd", rd=9, a=draw(st.integers(1, 3)), b=0), *body, *loop])


def executed_matmuls(program: Program, rank: int) -> list[dict[str, int]]:
    """Field values of every matmul that a device executes."""
    loops = program.ops[0].get("a")
    assert isinstance(loops, Operand)
    found = []
    for item in program.ops:
        if item.kind.name == "matmul":
            values = {}
            for each in item.kind.fields:
                value = item.get(each.name)
                if isinstance(value, Operand):
                    value = value.immediate + (rank if value.register == 1 else 0)
                values[each.name] = value
            found.append(values)
    return found * loops.immediate


@settings(max_examples=80, deadline=None)
@given(programs(), machines(), st.integers(1, 3))
def test_never_beats_physics(program: Program, machine: Machine, devices: int) -> None:
    result = run(program, machine, devices)
    row, lanes = machine.row_bytes, machine.matrix.lanes
    peak = lanes * machine.matrix.columns * machine.matrix.rows
    for device, counters in enumerate(result.counters):
        fetched = {0: 0, 1: 0}
        useful, macs = 0, 0
        for v in executed_matmuls(program, device):
            vectors, e = v["outer"] * v["inner"], BYTES[v["format"]]
            if vectors:
                widths = [min(machine.column_block, v["n"] - c) for c in range(0, v["n"], machine.column_block)]
                rows = sum(-(-width * lanes * e // row) for width in widths)
                fetched[v["region"]] += -(-v["k"] // lanes) * rows * row
                useful += v["k"] * v["n"] * e
                macs += v["k"] * v["n"] * vectors
        assert (counters.weights_fetched_bytes, counters.kv_fetched_bytes) == (fetched[0], fetched[1])
        assert counters.weights_useful_bytes + counters.kv_useful_bytes == useful <= sum(fetched.values())
        assert counters.macs == macs
        rows = sum(fetched.values()) // row
        written = counters.kv_written_bytes // row
        assert result.device_cycles[device] >= rows + written
        assert result.device_cycles[device] >= -(-macs // peak)
        assert (
            result.total_cycles >= rows * (machine.hbm.rows_per_write_slot + 1) // machine.hbm.rows_per_write_slot - 1
        )
        for causes in result.causes[device].values():
            assert sum(causes.values()) == result.total_cycles
            assert all(cycles > 0 for cycles in causes.values())
        assert result.causes[device]["fetch"].get("transfer", 0) == rows


@settings(max_examples=60, deadline=None)
@given(
    programs(),
    machines(),
    st.integers(1, 3),
    st.sampled_from(
        ["hbm.fifo_bytes", "control.queue_depth", "control.run_ahead", "hbm.latency", "matrix.dot_latency"]
    ),
)
def test_a_better_machine_is_never_slower(program: Program, machine: Machine, devices: int, key: str) -> None:
    better = {
        "hbm.fifo_bytes": str(2 * machine.hbm.fifo_bytes),
        "control.queue_depth": str(2 * machine.control.queue_depth),
        "control.run_ahead": "true",
        "hbm.latency": "1",
        "matrix.dot_latency": "1",
    }
    before = run(program, machine, devices).total_cycles
    assert run(program, machine.override({key: better[key]}), devices).total_cycles <= before


EXTREMES = st.sampled_from([0, 1, 2, 8, 64, 255, 256, 257, -1, -8, 65536, 2**19 - 1, -(2**19)])
SMALL = Machine.load("tiny").override({"vector.words": "256", "vector.segments": "8"})


@st.composite
def any_op(draw: st.DrawFn) -> Op:
    """Any legal instruction, its operands often extreme."""
    kind = draw(st.sampled_from(INSTRUCTIONS))
    values: dict[str, int | Operand] = {}
    for item in kind.fields:
        if item.kind is Kind.OPERAND:
            values[item.name] = Operand(draw(st.sampled_from([0, 0, 0, 1, 4, 5])), draw(EXTREMES))
        elif item.values is not None:
            values[item.name] = draw(st.sampled_from([int(value) for value in item.values]))
        elif item.kind is Kind.INT32:
            values[item.name] = draw(st.sampled_from([0, 1, 8, 2**31 - 1, -(2**31), -1]))
        else:
            values[item.name] = draw(
                st.integers(0, {Kind.FLAG: 1, Kind.REGISTER: 6, Kind.TARGET: 12}.get(item.kind, 9))
            )
    return Op(kind, values)


@settings(max_examples=300, deadline=None)
@given(st.lists(any_op(), min_size=1, max_size=10), st.integers(1, 3))
def test_any_legal_program_ends_in_a_result_or_one_line(ops: list[Op], devices: int) -> None:
    program = Program([*ops, op("halt")])
    try:
        result = run_timing(program, SMALL, devices, np.zeros((devices, 4), np.int32), max_instructions=100)
    except TypebarError as error:
        assert "\n" not in str(error) and str(error).startswith("timing run: ")
    else:
        assert result.total_cycles > 0


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(MACHINES), st.integers(1, 500), st.integers(1, 3000), st.sampled_from(BYTES), st.booleans())
def test_the_last_row_is_that_of_the_layout(machine: Machine, k: int, n: int, size: int, full: bool) -> None:
    p = timing_parameters(machine)
    end = packed_layout(k, n, machine, size, full).fetched_end()
    assert matrix_last_row(p, 3 * machine.row_lines, k, n, size, int(full)) == 3 + end // machine.row_bytes - 1


def test_the_same_run_twice_is_the_same() -> None:
    program = assemble("matmul format=int8 outer=1 inner=1 k=640 n=640 dst=4096\ngather dst=8192 a=4096 n=256\nhalt")
    assert run(program, MACHINES[1], 4) == run(program, MACHINES[1], 4)


def test_streaming_advances_twenty_million_device_cycles_a_second() -> None:
    body = """
    sli rd=r3 value=300
loop:
    matmul format=fp16 region=weights dst=4096 src=0 k=1600 n=4800 outer=1 inner=1
    vadd dst=16384 a=4096 b=4096 n=1600
    gather dst=20480 a=16384 n=400
    vmov b_from=vector dst=0 b=20480 n=1600
    ssub rd=r3 a=r3 b=1
    bne to=loop a=r3 b=0
    halt
"""
    program = assemble(body)
    run(program, MACHINES[1], 1)
    before = time.process_time()
    result = run(program, MACHINES[1], 4)
    assert result.total_cycles * 4 / (time.process_time() - before) > 20e6
