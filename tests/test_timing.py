"""The timing contract, rule by rule, on hand-written programs; every expected cycle is worked out by hand.

`SHORT` is `tiny` with short latencies: 8 lanes x 4 columns x 2 rows, 64-byte rows, HBM latency 20, write slots at
cycles 7, 15, 23 ..., 128 FIFO rows, matmul latency 6 + 4 + 16 = 26, 256-word segments; vector 8 lanes, latency 4,
a function 3 more, a tree's level 4; DDR 2 cycles a line, latency 20; ring 2 words a cycle, hop 20, setup 4; queue 8,
branch 3, read 4.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from typebar.isa.errors import TypebarError
from typebar.isa.machine import Machine
from typebar.isa.program import assemble
from typebar.isa.timing import DDR_REQUEST, HBM_DATA, HBM_REQUEST, LINK_CW, stall
from typebar.sim.timing import StoreRecord, TimingResult, run_timing
from typebar.sim.trace import write_perfetto

TINY = Machine.load("tiny")
SHORT = TINY.override(
    {
        "matrix.dot_latency": "6",
        "matrix.epilogue_latency": "16",
        "vector.segments": "64",
        "vector.latency": "4",
        "vector.unary_latency": "3",
        "vector.reduce_latency": "0",
        "hbm.latency": "20",
        "ddr.latency": "20",
        "ring.setup_latency": "4",
    }
)
MATMUL = "matmul format=fp16 region=weights outer=1 inner=1 k=8"


def run(
    text: str, devices: int = 1, io: list[int] | None = None, stall_seed: int = 0, **settings: object
) -> TimingResult:
    machine = SHORT.override({key.replace("__", "."): str(value).lower() for key, value in settings.items()})
    words = np.array([io or []] * devices, np.int32)
    return run_timing(assemble(text), machine, devices, words, trace=True, stall_seed=stall_seed)


def slices(result: TimingResult, unit: int, device: int = 0) -> list[tuple[int, int]]:
    trace = result.trace
    assert trace is not None
    keep = (trace.unit == unit) & (trace.device == device)
    return [(int(a), int(b)) for a, b in zip(trace.start[keep], trace.end[keep], strict=True)]


MATRIX, VECTOR, MEMORY, RING, FETCH = 1, 2, 3, 4, 5


@pytest.mark.parametrize(
    ("body", "total"),
    [
        ("", 1),
        ("vadd dst=0 a=256 b=512 n=8", 7),  # issue 0, start 1, done 1 + 1 + 4, halt at 6
        ("vadd dst=0 a=256 b=512 n=20", 9),  # three beats
        ("vadd dst=0 a=256 b=512 n=0", 7),  # at least one
        ("vmov b_from=immediate dst=0 n=8", 7),
        ("vwrite dst=0 b=1", 7),
        ("vunary function=exp dst=0 a=256 n=8", 10),
        ("vsum dst=0 a=256 n=8", 19),  # three levels of 4 inside a beat more
        ("vrmax dst=0 a=256 n=17", 29),  # and two over 3 beats: 1 + 3 + 4 + 5 * 4
        ("vargmax dst=0 a=256 n=64", 38),  # 1 + 8 + 4 + 6 * 4
        ("vsumsq dst=0 a=256 n=8", 19),
        ("vchain operation=add function=exp write=1 dst=0 a=256 b=512 n=20", 12),
        ("vchain operation=add write=1 dst=0 a=256 b=512 n=20", 9),
        ("vchain scale_from=value write=1 dst=0 a=256 n=20", 9),
        ("vchain scale_from=word scale=1000 write=1 dst=0 a=256 n=20", 10),  # the factor before three rows
        ("vchain scale_from=word scale=1000 write=1 dst=0 a=256 n=0", 8),
        ("vchain operation=sub write=1 reduce=max dst=0 a=256 n=17 result=3000", 29),
        (
            "vchain scale_from=word scale=1000 reduce=sum a=256 n=17 result=0",
            30,
        ),  # levels for three rows
        ("sload region=io rd=r3 line=0", 24),  # start 1, two cycles, latency 20; issue waits for 23
        ("fence", 2),
    ],
)
def test_one_instruction(body: str, total: int) -> None:
    assert run(f"{body}\nhalt").total_cycles == total


def test_a_tree_level_has_its_own_latency() -> None:
    assert run("vmul dst=0 a=256 b=512 n=8\nhalt", vector__latency=9).total_cycles == 12
    assert run("vmax dst=0 a=256 b=512 n=8\nhalt", vector__add_latency=9).total_cycles == 7
    assert run("vsum dst=0 a=256 n=8\nhalt", vector__latency=9, vector__add_latency=5).total_cycles == 27
    assert run("vsum dst=0 a=256 n=8\nhalt", vector__reduce_latency=2).total_cycles == 21


def test_a_reduction_waits_for_the_one_before_if_that_has_more_levels() -> None:
    result = run("vsum dst=0 a=256 n=9\nvadd dst=512 a=768 b=768 n=8\nvrmax dst=1024 a=1280 n=8\nhalt")
    assert slices(result, VECTOR) == [(1, 3), (3, 4), (23, 24)]  # done of the first: 3 + 4 + (3 + 1) * 4
    assert result.causes[0]["vector"] == {"issue": 1, "compute": 4, "vector": 19, "drain": 17}


@pytest.mark.parametrize(("first", "second"), [(8, 8), (8, 9), (24, 32), (0, 1)])
def test_reductions_of_as_many_levels_follow_one_another(first: int, second: int) -> None:
    result = run(f"vsum dst=0 a=256 n={first}\nvrmax dst=1 a=1280 n={second}\nhalt")
    (start, end), (follows, _) = slices(result, VECTOR)
    assert (start, follows) == (1, max(2, end))


@pytest.mark.parametrize(
    ("first", "second", "start"),
    [
        ("vunary function=exp", "vadd b=768", 5),  # three cycles of the function less the one in which it follows
        ("vunary function=exp", "vunary function=exp", 2),
        ("vadd b=768", "vunary function=exp", 2),
        ("vchain function=exp write=1", "vchain operation=add write=1 b=768", 5),
        ("vchain function=exp write=1", "vrmax", 5),
        ("vchain reduce=sumsq result=4000", "vchain reduce=sumsq result=4001", 2),
        ("vchain reduce=sumsq result=4000", "vchain reduce=sum result=4001", 22),  # done: 2 + 4 + (3 + 1) * 4
        ("vchain reduce=sumsq result=4000", "vsumsq", 22),
        ("vsumsq", "vchain reduce=sumsq result=4001", 2),
    ],
)
def test_results_leave_in_order(first: str, second: str, start: int) -> None:
    result = run(f"{first} dst=0 a=512 n=8\n{second} dst=1024 a=768 n=8\nhalt")
    assert slices(result, VECTOR) == [(1, 2), (start, start + 1)]


TIE = ["load format=fp32 region=io dst={} n=8", "vadd dst={} a=512 b=512 n=8"]


@pytest.mark.parametrize("places", [(0, 256), (256, 0)])
def test_of_results_ready_together_the_lowest_unit_is_charged(places: tuple[int, int]) -> None:
    first, second = (text.format(place) for text, place in zip(TIE, places, strict=True))
    result = run(f"{first}\n{second}\ngather dst=8192 a=0 n=264\nhalt", ddr__latency=4)
    assert slices(result, RING)[0][0] == 7  # 1 + 2 + 4, and 2 + 1 + 4
    assert result.causes[0]["ring"]["vector"] == 7


def test_an_operand_ready_with_the_rows_is_charged() -> None:
    fetch = "matmul format=fp16 region=kv outer=1 inner=1 k=8 n=24 src=256"  # six rows: over at 7
    result = run(f"{fetch}\nvadd dst=8192 a=512 b=512 n=8\n{STORE_ROWS}\nhalt")
    assert slices(result, MEMORY)[0][0] == 7
    assert result.causes[0]["memory"]["vector"] == 7


@pytest.mark.parametrize(
    ("second", "start"),
    [
        ("vadd dst=1024 a=768 b=768 n=8", 2),  # independent: the cycle after issue
        ("vadd dst=1024 a=0 b=768 n=8", 6),  # read after write: done of the first
        ("vadd dst=1024 a=128 b=768 n=8", 6),  # another word of its segment
        ("vadd b_from=word dst=1024 a=768 b=255 n=8", 6),  # one word is an operand too
        ("vadd b_from=immediate dst=1024 a=768 b=0 n=8", 2),  # an unused field is none
        ("vadd dst=0 a=768 b=768 n=8", 2),  # write after write in the same unit
        ("vadd dst=0 a=0 b=768 n=8", 6),  # which is a read as well
        ("vsum dst=0 a=768 n=8", 2),  # a reduction comes later still
        ("vadd dst=256 a=768 b=768 n=8", 2),  # write after read in the same unit
    ],
)
def test_hazards_within_a_unit(second: str, start: int) -> None:
    result = run(f"vadd dst=0 a=256 b=512 n=8\n{second}\nhalt")
    assert slices(result, VECTOR) == [(1, 2), (start, start + 1)]


@pytest.mark.parametrize(
    ("words", "second", "start"),
    [
        (40, "vmul dst=1024 a=0 b=768 n=40", 6),  # five rows, a latency of four: the first is there in time
        (40, "vmul dst=0 a=0 b=768 n=40", 6),  # in place as well
        (40, "vmul dst=1024 a=768 b=0 n=80", 6),  # beyond its end as well
        (40, "vmul b_from=word dst=1024 a=768 b=7 n=40", 6),  # a word of its first row
        (40, "vsum dst=1024 a=0 n=8", 6),
        (40, "vmul b_from=word dst=1024 a=768 b=8 n=40", 10),  # one of the next: done of the first
        (40, "vmul dst=1024 a=8 b=768 n=8", 10),
        (40, "vmul dst=1024 a=0 b=8 n=8", 10),  # both operands count
        (40, "store format=fp32 region=io a=0 outer=1 inner=8 inner_bytes=4", 10),  # in another unit
        (40, "vchain reduce=sum dst=1024 a=0 n=40 result=2000", 6),
        (40, "vchain operation=add write=1 dst=1024 a=768 b=0 n=40", 6),
        (40, "vchain operation=none write=1 dst=1024 a=768 b=8 n=40", 6),  # nothing reads b
        (40, "vchain scale_from=word write=1 dst=1024 a=768 scale=7 n=40", 6),
        (40, "vchain scale_from=word write=1 dst=1024 a=768 scale=8 n=40", 10),
        (32, "vmul dst=1024 a=0 b=768 n=32", 9),  # four rows
        (40, "vunary function=exp dst=1024 a=0 n=40", 6),
    ],
)
def test_a_vector_instruction_follows_another_row_by_row(words: int, second: str, start: int) -> None:
    result = run(f"vadd dst=0 a=256 b=512 n={words}\n{second}\nhalt")
    unit = MEMORY if second.startswith("store") else VECTOR
    assert slices(result, unit)[-1][0] == start


@pytest.mark.parametrize(
    ("first", "second", "start"),
    [
        ("scale_from=value reduce=sum result=3000", "vmul dst=1024 a=0 b=768 n=40", 6),  # its elements like any others
        ("scale_from=word scale=2000", "vmul dst=1024 a=0 b=768 n=40", 7),
        ("function=exp", "vunary function=exp dst=1024 a=0 n=40", 13),  # five rows, a latency of seven
        ("scale_from=value reduce=sum result=128", "vmul dst=1024 a=0 b=768 n=40", 34),  # its result in their segment
        ("scale_from=value reduce=sum result=3000", "vmul b_from=word dst=1024 a=256 b=3000 n=40", 34),
        ("scale_from=value reduce=sum result=3000", "vadd dst=0 a=768 b=768 n=8", 6),  # write after write
        ("scale_from=value reduce=sum result=3000", "vadd dst=3000 a=768 b=768 n=8", 34),
        ("scale_from=value reduce=sum result=3000", "vchain reduce=max a=768 n=40 result=3000", 6),
        ("scale_from=value reduce=sum result=3000", "vchain reduce=max a=768 n=8 result=3000", 34),  # fewer levels
        ("scale_from=value reduce=sum result=3000", "vrmax dst=2999 a=768 n=8", 34),
    ],
)
def test_what_follows_a_chain(first: str, second: str, start: int) -> None:
    result = run(f"vchain write=1 dst=0 a=256 n=40 {first}\n{second}\nhalt")
    assert slices(result, VECTOR)[1][0] == start


def test_a_machine_without_chains_stops_at_one() -> None:
    with pytest.raises(TypebarError, match="ILLEGAL"):
        run("vchain write=1 dst=0 a=256 n=8\nhalt", vector__chains="false")


@pytest.mark.parametrize(("second", "start"), [("vadd dst=128 a=768 b=768 n=8", 18), ("vsum dst=128 a=768 n=8", 2)])
def test_a_write_after_a_reduction_waits_unless_it_is_one(second: str, start: int) -> None:
    result = run(f"vsum dst=0 a=256 n=8\n{second}\nhalt")
    assert slices(result, VECTOR) == [(1, 2), (start, start + 1)]  # done of the first: 2 + 4 + 3 * 4


def test_an_accumulating_matmul_waits_for_the_one_before() -> None:
    one = f"{MATMUL} n=8 dst=0 src=256"
    plain, adds = (slices(run(f"{one}\n{one} accumulate={flag}\nhalt"), MATRIX) for flag in (0, 1))
    assert plain[1][0] == plain[0][1]
    assert adds[1][0] == adds[0][1] + 26


def test_write_after_read_across_units_waits_for_the_reader() -> None:
    result = run("store format=fp32 region=io a=0 outer=1 inner=8 inner_bytes=4\nvadd dst=0 a=256 b=256 n=8\nhalt")
    assert slices(result, MEMORY) == [(1, 3)]
    assert slices(result, VECTOR) == [(23, 24)]  # 1 + 2 + 20
    assert result.causes[0]["vector"] == {"memory": 23, "compute": 1, "drain": 5}
    assert result.total_cycles == 29


def test_vector_read_waits_for_the_writer_and_takes_its_latency() -> None:
    result = run("vadd dst=0 a=256 b=256 n=8\nvread rd=r3 a=5\nhalt")
    assert result.total_cycles == 11  # writer done at 6, next issue at 10
    assert result.causes[0]["issue"] == {"issue": 3, "vector": 5, "read": 3}


def test_vector_read_waits_until_no_gather_needs_the_port_that_it_shares() -> None:
    gather, write = "gather dst=64 a=0 n=16\n", "vwrite dst=256 b=0\n"
    alone = run(gather + "halt")
    done = slices(alone, RING)[0][1]
    result = run(gather + write + "vread rd=r3 a=256\nhalt")
    assert result.total_cycles == done + 4 + 1
    written = slices(result, VECTOR)[0][1] + 4
    assert result.causes[0]["issue"] == {"issue": 4, "vector": written - 2, "ring": done - written, "read": 3}
    younger = run(write + "vread rd=r3 a=256\n" + gather + "halt")
    assert younger.causes[0]["issue"] == {"issue": 4, "vector": 5, "read": 3, "fence": younger.total_cycles - 12}


def test_taken_branches_cost_branch_cycles() -> None:
    result = run("sli rd=r3 value=2\nloop:\nssub rd=r3 a=r3 b=1\nbne to=loop a=r3 b=0\nhalt")
    assert result.total_cycles == 8
    assert result.causes[0]["issue"] == {"issue": 6, "branch": 2}


@pytest.mark.parametrize(
    ("test", "taken"),
    [
        ("sadd rd=r3 a=r4 b=r5", -2),
        ("ssub rd=r3 a=r4 b=r5", -12),
        ("smul rd=r3 a=r4 b=r5", -35),
        ("smul rd=r3 a=r6 b=r6", 0),  # modulo 2^32
        ("smin rd=r3 a=r4 b=r5", -7),
        ("smax rd=r3 a=r4 b=r5", 5),
        ("sand rd=r3 a=r4 b=r5", 1),
        ("sshl rd=r3 a=r4 b=34", -28),
        ("sshr rd=r3 a=r4 b=1", -4),
        ("sfgt rd=r3 a=r5 b=0", 0),  # subnormals are zeros
        ("sfgt rd=r3 a=r8 b=r7", 1),  # -1 > -2
        ("sfgt rd=r3 a=r7 b=r8", 0),
        ("sfgt rd=r3 a=r9 b=r7", 0),  # NaN
        ("sfgt rd=r3 a=r10 b=r8", 1),  # infinity > -1
        ("sload region=io rd=r3 line=0 byte=8", 11),
        ("sload region=params rd=r3 line=0 byte=8", 0),
        ("sload region=io rd=r3 line=7", 0),  # beyond the words given
    ],
)
def test_scalar_values_steer_the_program(test: str, taken: int) -> None:
    constants = {4: -7, 5: 5, 6: 65536, 7: -(2**30), 8: -1082130432, 9: 0x7FC00000, 10: 0x7F800000}
    head = "".join(f"sli rd=r{register} value={value}\n" for register, value in constants.items())
    text = f"{head}{test}\nsstore region=io line=0 byte=4 value=r3\nhalt"
    assert run(text, io=[7, 9, 11]).stores[0].value == taken


def test_queue_space() -> None:
    body = "".join(f"vmov b_from=immediate dst={256 * i} n=80\n" for i in range(4))
    result = run(f"{body}halt", control__queue_depth=2)
    assert slices(result, VECTOR) == [(1, 11), (11, 21), (21, 31), (31, 41)]
    assert result.causes[0]["issue"]["queue"] == 8  # the fourth waits from 3 for the start of the second
    assert result.total_cycles == 46


def test_fence_holds_issue_until_all_is_done() -> None:
    result = run("vadd dst=0 a=256 b=256 n=8\nfence\nvadd dst=512 a=768 b=768 n=8\nhalt")
    assert slices(result, VECTOR) == [(1, 2), (8, 9)]
    assert result.total_cycles == 14


@pytest.mark.parametrize(("region", "start"), [("io", 23), ("params", 3)])
def test_loads_follow_stores_to_their_region(region: str, start: int) -> None:
    result = run(f"sstore region=io line=0 value=1\nload format=fp32 region={region} dst=0 line=5 n=8\nhalt")
    assert slices(result, MEMORY) == [(1, 3), (start, start + 2)]


@pytest.mark.parametrize(
    ("access", "lines", "cycles"),
    [
        ("load format=fp32 region=io dst=0 line=0 n=16", 1, 2),
        ("load format=fp16 region=io dst=0 line=0 n=32", 1, 4),  # four rows of the register file
        ("load format=fp16 region=io dst=0 line=0 byte=2 n=32", 2, 4),
        ("load format=int8 region=io dst=0 line=0 byte=60 n=33", 2, 5),
        ("load format=fp16 region=io dst=0 line=0 n=0", 0, 1),
        ("store format=fp32 region=io a=0 line=0 outer=3 inner=4 outer_bytes=4 inner_bytes=16", 3, 12),  # word by word
        ("store format=fp32 region=io a=0 line=0 outer=3 inner=4 outer_bytes=4 inner_bytes=4", 3, 6),
        (
            "store format=fp16 region=io a=0 line=0 outer=2 inner=25 outer_bytes=64 inner_bytes=2",
            2,
            8,
        ),  # four rows each
        ("store format=fp32 region=io a=0 line=0 byte=8 outer=1 inner=4 inner_bytes=40", 3, 6),
        ("store format=fp32 region=io a=0 line=0 outer=2 inner=4 outer_bytes=4 inner_bytes=640", 8, 16),
        ("store format=fp32 region=io a=0 line=0 outer=5 inner=0", 0, 1),
    ],
)
def test_ddr_moves_whole_lines_and_a_port_rows(access: str, lines: int, cycles: int) -> None:
    result = run(f"{access}\nhalt")
    assert slices(result, MEMORY) == [(1, 1 + cycles)]
    assert result.counters[0].ddr_bytes == 64 * lines


# Matrix ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fields", "fetch", "matrix", "total"),
    [
        ("n=4", (1, 2), (1, 22), 49),  # one row: requested at 1, there at 21, one step, 26 more
        ("n=16", (1, 5), (1, 25), 52),  # two steps of 2 rows: at 22 and at 24, one folded pair of groups each
        ("n=64", (1, 19), (1, 39), 66),  # 16 rows past the write slots 7 and 15, the last at 18
        ("n=4 outer=2", (1, 2), (1, 23), 50),  # two vectors on two rows; their results are two rows
        ("n=4 outer=2 inner=2", (1, 2), (1, 25), 52),  # four: two passes, four rows of results
        ("n=4 outer=2 inner=2 k=16", (1, 3), (1, 29), 56),  # chunks at 21 and 21 + 4
        ("n=5 outer=8", (1, 3), (1, 37), 64),  # the last step's results too are eight rows
        ("n=5", (1, 3), (1, 23), 50),  # the last step lacks columns but not a row
        ("n=4 format=int8", (1, 2), (1, 22), 49),  # half a row is a row
        ("n=4 format=fp32", (1, 3), (1, 23), 50),
    ],
)
def test_matmul(fields: str, fetch: tuple[int, int], matrix: tuple[int, int], total: int) -> None:
    given = {part.split("=")[0] for part in fields.split()}
    base = " ".join(part for part in MATMUL.split() if part.split("=")[0] not in given)
    result = run(f"{base} {fields} src=256\nhalt")
    assert slices(result, FETCH) == [fetch]
    assert slices(result, MATRIX) == [matrix]
    assert result.total_cycles == total


def test_results_wider_than_a_row_of_the_register_file() -> None:
    assert slices(run(f"{MATMUL} n=4 src=256\nhalt", vector__lanes=2), MATRIX) == [(1, 25)]  # 8 columns: four rows
    assert slices(run(f"{MATMUL} n=12 src=256\nhalt", vector__lanes=4), MATRIX) == [(1, 26)]  # steps at 22 and 24


ALL = "patch=column scaling=column add_bias=1 accumulate=1 bias=4096 scale=5120 patch_src=6144 dst=8192"


@pytest.mark.parametrize(
    ("fields", "lanes", "operands", "end"),
    [
        ("k=8 n=4 outer=4 inner=2", 8, 8, 17),  # eight vectors: step at 9; row there at 2, hold 8
        ("k=8 n=4 outer=1 inner=1 scaling=word", 8, 2, 4),  # and a word: step at 3
        (f"k=8 n=4 outer=4 inner=2 {ALL}", 8, 19, 28),  # 8 + 1, and scale, bias, 8 sums: step at 20
        ("k=8 n=20 outer=1 inner=1 patch=lane", 8, 4, 8),  # 1 + 3: steps from 5 on
        ("k=8 n=4 outer=2 inner=1", 4, 4, 7),  # two rows a vector: step at 5, hold 2
        ("k=24 n=4 outer=8 inner=1", 8, 16, 33),  # steps at 9, 17, 25; hold 4, 4, 8
    ],
)
def test_operands_come_a_row_a_cycle(fields: str, lanes: int, operands: int, end: int) -> None:
    text = f"matmul format=fp16 region=weights src=256 {fields}\nhalt"
    result = run(text, hbm__latency=1, vector__lanes=lanes)
    assert slices(result, MATRIX) == [(1, end)]
    assert result.causes[0]["matrix"]["operands"] == operands


def test_operands_of_a_block_load_while_the_block_before_computes() -> None:
    # Each block: 1 + 8 + 8 rows. Steps from 18 to 25, and 17 after the first of them, from 35 to 42.
    text = f"{MATMUL} n=128 src=256 dst=1024 bias=2048 add_bias=1 scale=4096 scaling=column\nhalt"
    result = run(text, hbm__latency=1)
    assert slices(result, MATRIX) == [(1, 43)]
    assert result.causes[0]["matrix"] == {"issue": 1, "compute": 16, "operands": 26, "drain": 27}


def test_scales_and_bias_load_with_all_chunks_of_a_block() -> None:
    # 1 + 8 sums + 1 of the 16 rows of scales and bias: steps at 11 to 17, and at 19, when row 15 is usable; with the
    # last chunk the other 15: steps 16 cycles after the first, from 27 to 31, and as the last rows come, at 33, 35, 37.
    text = "matmul format=fp16 region=weights outer=1 inner=1 k=16 n=64 src=256 dst=1024 accumulate=1"
    result = run(f"{text} bias=2048 add_bias=1 scale=4096 scaling=column\nhalt", hbm__latency=1)
    assert slices(result, MATRIX) == [(1, 38)]
    causes = {"issue": 1, "compute": 16, "operands": 17, "weights": 4, "drain": 27}
    assert result.causes[0]["matrix"] == causes


def test_of_waits_that_end_together_rows_come_before_sums_and_sums_before_operands() -> None:
    assert run(f"{MATMUL} n=4 src=256\nhalt", hbm__latency=1).causes[0]["matrix"]["weights"] == 1
    text = "matmul format=fp16 region=weights outer=4 inner=1 k=16 n=4 src=256\nhalt"
    causes = run(text, hbm__latency=1).causes[0]["matrix"]  # steps at 5 and 5 + 4, both for operands and for the sum
    assert causes == {"issue": 1, "compute": 6, "accumulate": 2, "operands": 4, "drain": 27}


@pytest.mark.parametrize("empty", ["k=8 n=0 outer=1", "k=8 n=4 outer=0"])
def test_an_empty_matmul_takes_one_cycle_and_no_rows(empty: str) -> None:
    result = run(f"matmul format=fp16 region=weights inner=1 src=256 {empty}\nhalt")
    assert slices(result, FETCH) == []
    assert slices(result, MATRIX) == [(1, 2)]
    assert result.total_cycles == 29


def test_a_float32_tile_takes_the_port_two_cycles() -> None:
    text = "matmul format=fp32 region=weights outer=1 inner=1 k=8 n=4 src=256\nhalt"
    assert slices(run(text, matrix__fifo_port_bytes=64), MATRIX) == [(1, 24)]


def test_accumulation_waits_for_the_sum_of_the_previous_chunk() -> None:
    text = "matmul format=fp16 region=weights outer=1 inner=1 k=32 n=4 src=256\nhalt"
    result = run(text, matrix__accumulate_latency=13)
    assert slices(result, MATRIX) == [(1, 61)]  # steps at 21, 34, 47, 60
    assert result.causes[0]["matrix"] == {"issue": 1, "weights": 20, "compute": 4, "accumulate": 36, "drain": 36}


def test_each_column_group_waits_for_its_own_sum() -> None:
    # Rows requested at 6, 8, 9, 10 arrive at 26, 28, 29, 30. The second chunk's groups may not step before 26 + 3 and
    # 28 + 3, so the last step is at 31 although its row is there at 30.
    text = "sli\n" * 5 + "matmul format=fp16 region=weights outer=1 inner=1 k=16 n=8 src=256\nhalt"
    assert slices(run(text, matrix__accumulate_latency=3, matrix__rows=1), MATRIX) == [(6, 32)]


def test_the_fifo_limits_how_far_requests_run_ahead() -> None:
    result = run(f"{MATMUL} n=64 src=256\nhalt", hbm__fifo_bytes=256)
    # Four places: requests at 1-4, 24-27, 48-51 (47 is a write slot), 72-75 (71 is one); steps end at 23, 25, 46, ...
    assert slices(result, FETCH) == [(1, 76)]
    assert slices(result, MATRIX) == [(1, 96)]
    assert result.causes[0]["fetch"] == {"issue": 1, "transfer": 16, "fifo_full": 57, "write_slot": 2, "drain": 47}


@pytest.mark.parametrize(("run_ahead", "fetch", "total"), [(True, (2, 3), 77), (False, (48, 49), 96)])
def test_run_ahead(run_ahead: bool, fetch: tuple[int, int], total: int) -> None:
    result = run(f"{MATMUL} n=4 src=256 dst=512\n{MATMUL} n=4 src=512 dst=1024\nhalt", control__run_ahead=run_ahead)
    assert slices(result, FETCH)[1] == fetch
    assert slices(result, MATRIX)[1][0] == 48  # done of the first: 22 + 26; the step follows its operands, at 49
    assert result.total_cycles == total


STORE_ROWS = "store format=fp16 region=kv a=8192 outer=1 inner=4 inner_bytes=64"


def test_hbm_stores_take_one_write_slot_a_row() -> None:
    result = run(f"{STORE_ROWS}\nhalt")
    assert slices(result, MEMORY) == [(1, 32)]  # slots 7, 15, 23, 31
    assert result.total_cycles == 53
    assert result.causes[0]["memory"] == {"issue": 1, "transfer": 4, "write_slot": 27, "drain": 21}
    assert (result.counters[0].kv_written_bytes, result.counters[0].kv_useful_written_bytes) == (256, 8)


def test_an_hbm_store_also_reads_its_words() -> None:
    text = "store format=fp16 region=kv a=8192 outer=2 inner={} outer_bytes=640 inner_bytes={}\nhalt"
    result = run(text.format(20, 0))  # one row each, slots 7 and 15, but twice 20 words, one by one
    assert slices(result, MEMORY) == [(1, 41)]
    assert result.causes[0]["memory"] == {"issue": 1, "transfer": 2, "write_slot": 38, "drain": 21}
    assert slices(run(text.format(20, 2)), MEMORY) == [(1, 16)]  # twice three rows of the register file


def test_rows_are_not_merged_across_outer() -> None:
    text = "store format=fp16 region=kv a=8192 outer=3 inner=4 outer_bytes=16 inner_bytes=2\nhalt"
    assert run(text).counters[0].kv_written_bytes == 192


@pytest.mark.parametrize(("line", "first"), [(3, 52), (4, 2)])
def test_fetches_wait_for_older_stores_to_their_rows(line: int, first: int) -> None:
    fetch = f"matmul format=fp16 region=kv outer=1 inner=1 k=8 n=4 src=256 line={line}"
    assert slices(run(f"{STORE_ROWS}\n{fetch}\nhalt"), FETCH) == [(first, first + 1)]


@pytest.mark.parametrize(("region", "line", "start"), [("kv", 0, 19), ("kv", 64, 2), ("weights", 0, 2)])
def test_stores_wait_for_older_fetches_of_their_rows(region: str, line: int, start: int) -> None:
    fetch = f"matmul format=fp16 region={region} outer=1 inner=1 k=8 n=64 src=256 line={line}"
    assert slices(run(f"{fetch}\n{STORE_ROWS}\nhalt"), MEMORY)[0][0] == start


def test_counters() -> None:
    matmul = "matmul format=fp16 region=kv outer=3 inner=1 k=12 n=6 src=256 line=2"
    counters = run(f"{MATMUL} n=64 src=256\n{matmul}\nhalt").counters[0]
    assert (counters.weights_fetched_bytes, counters.weights_useful_bytes) == (1024, 1024)
    assert (counters.kv_fetched_bytes, counters.kv_useful_bytes) == (256, 144)  # 96 of 128 bytes in two chunks
    assert (counters.instructions, counters.macs) == (3, 512 + 216)


# Ring --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("devices", "total"), [(1, 8), (2, 31), (3, 32), (4, 55), (5, 56), (6, 79)])
def test_gather(devices: int, total: int) -> None:
    # A block of 8 words takes 4 cycles: sent at 5, there at 29, sent on at 29, there at 53 and so on; done one later.
    # One device has a row of its own to write in cycle 5. Of an odd number, each gets its last two rows in one cycle.
    result = run("gather dst=0 a=8192 n=8\nhalt", devices)
    assert result.device_cycles == (total,) * devices
    assert result.causes[0]["ring"] == {"issue": 1, "transfer": total - 2, "drain": 1}
    assert result.counters[0].ring_bytes == 32 * (devices - 1)


def test_long_blocks_keep_the_link_busy() -> None:
    # 200 words: 100 cycles, a row 4. Sent on at 29, but the link is busy with the own block: 5, 105; there at 225.
    assert run("gather dst=0 a=8192 n=200\nhalt", 4).total_cycles == 227


def test_a_block_is_sent_on_while_it_arrives() -> None:
    # 16 words: 8 cycles, a row 4. Sent at 5, on at 29; there at 57.
    assert run("gather dst=0 a=8192 n=16\nhalt", 4).total_cycles == 59


def test_rows_of_both_directions_are_written_one_a_cycle() -> None:
    # A row a cycle: sent at 5, the first row there at 26; 25 own rows written at 30, 50 of the neighbours by 80.
    result = run("gather dst=0 a=8192 n=200\nhalt", 3, ring__megabits_per_second=51200)
    assert all(slices(result, RING, device) == [(1, 81)] for device in range(3))


def test_one_device_writes_its_own_block_a_row_a_cycle() -> None:
    result = run("gather dst=0 a=8192 n=200\nhalt")
    assert slices(result, RING) == [(1, 1 + 4 + 25 + 1)]


def test_gather_skew() -> None:
    # Rank 0 starts at 4 and sends at 8; rank 1 starts at 12 and sends at 16.
    result = run("beq to=go a=r1 b=0\n" + "sli\n" * 10 + "go:\ngather dst=0 a=8192 n=8\nhalt", 2)
    assert slices(result, RING, 0) == [(4, 41)]
    assert slices(result, RING, 1) == [(12, 33)]
    assert result.causes[0]["ring"] == {"issue": 4, "transfer": 29, "skew": 8, "drain": 1}
    assert result.causes[1]["ring"] == {"issue": 12, "transfer": 21, "drain": 9}


def test_devices_know_rank_and_count() -> None:
    result = run("sstore region=io line=r1 byte=r2+2 value=r1+10\nhalt", 2)
    assert result.stores == (StoreRecord(23, 0, 0, 4, 10), StoreRecord(23, 1, 1, 4, 11))


# Stalls ------------------------------------------------------------------------------------------------------
def test_stalls_are_rare_bounded_and_the_same_everywhere() -> None:
    drawn = np.array([stall(7, 3, HBM_DATA, index) for index in range(20000)])
    assert (drawn > 0).mean() == pytest.approx(1 / 16, abs=0.01)
    assert set(drawn) == set(range(25))
    # Fixed for whoever repeats the hash in another language.
    first = {i: cycles for i in range(64) if (cycles := stall(1, 0, HBM_REQUEST, i))}
    assert first == {21: 5, 31: 17, 41: 8, 45: 11, 49: 16}
    assert len({tuple(stall(*key, i) for i in range(99)) for key in [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1)]}) == 4
    assert not any(stall(0, 0, HBM_DATA, index) for index in range(1000))


def first_stall(port: int, seed: int) -> int:
    """The stall of a port's first event on device 0."""
    return stall(seed, 0, port, 0)


def seeds_that_stall(port: int) -> list[int]:
    """Some seeds that delay the first event of a port on device 0, and of the other ports nothing near."""
    others = [other for other in range(5) if other != port]
    found = []
    for seed in range(1, 4000):
        if first_stall(port, seed) and not any(stall(seed, d, o, i) for d in (0, 1) for o in others for i in range(3)):
            found.append(seed)
    return found[:3]


@pytest.mark.parametrize("port", [HBM_REQUEST, HBM_DATA, DDR_REQUEST])
def test_a_stalled_row_or_line_is_late(port: int) -> None:
    for seed in seeds_that_stall(port):
        late = first_stall(port, seed)
        if port == DDR_REQUEST:
            result = run("load format=fp32 region=io dst=0 n=8\nhalt", stall_seed=seed)
            assert slices(result, MEMORY) == [(1, 3 + late)]
            assert result.causes[0]["memory"]["transfer"] == 2 + late
            continue
        result = run(f"{MATMUL} n=4 src=256\nhalt", stall_seed=seed)
        request = 1
        if port == HBM_REQUEST:
            request += late
            assert result.causes[0]["fetch"]["transfer"] == 1 + late
        assert slices(result, FETCH) == [(request, request + 1)]
        assert slices(result, MATRIX) == [(1, request + 21 + (late if port == HBM_DATA else 0))]


def test_a_late_row_holds_up_those_behind_it() -> None:
    seed = seeds_that_stall(HBM_DATA)[0]
    assert not stall(seed, 0, HBM_DATA, 1)
    late = first_stall(HBM_DATA, seed)  # two rows: there at 21 + late, and one later
    assert slices(run(f"{MATMUL} n=8 src=256\nhalt", stall_seed=seed), MATRIX) == [(1, 23 + late)]


def test_a_stalled_block_is_late_on_its_way_round() -> None:
    seed = next(s for s in seeds_that_stall(LINK_CW) if not stall(s, 1, LINK_CW, 0))
    result = run("gather dst=0 a=8192 n=8\nhalt", 2, stall_seed=seed)
    late = first_stall(LINK_CW, seed)  # only device 1 waits for it; device 0 until it has sent
    assert slices(result, RING, 1) == [(1, 30 + late)]
    assert slices(result, RING, 0) == [(1, max(30, 10 + late))]
    assert result.causes[1]["ring"]["skew"] == late


# Errors and the trace ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sli rd=r3", "instruction 1 with PROGRAM_END"),
        ("beq to=9", "instruction 9 with PROGRAM_END"),
        ("trap code=3\nhalt", "instruction 0 with SOFTWARE"),
        ("vadd dst=16384 n=1\nhalt", "REGISTER_BOUNDS"),
        ("vadd dst=-8 n=8\nhalt", "REGISTER_BOUNDS"),
        ("vread rd=r3 a=16384\nhalt", "REGISTER_BOUNDS"),
        ("vadd n=-1\nhalt", "COUNT"),
        ("matmul outer=1 inner=1 k=65537 n=1\nhalt", "COUNT"),
        ("matmul outer=1 inner=1 k=0 n=1\nhalt", "COUNT"),
        ("matmul outer=3 inner=3 k=1 n=1\nhalt", "COUNT"),
        ("matmul outer=-1 inner=1 k=1 n=1\nhalt", "COUNT"),
        ("matmul region=io outer=1 inner=1 k=1 n=1\nhalt", "REGION_ACCESS"),
        ("matmul line=-1 outer=1 inner=1 k=1 n=1\nhalt", "REGION_BOUNDS"),
        ("store region=params outer=1 inner=1\nhalt", "REGION_ACCESS"),
        ("store region=io outer=16384 inner=16384\nhalt", "COUNT"),
        ("load region=weights n=1\nhalt", "REGION_ACCESS"),
        ("sload region=io line=-1\nhalt", "REGION_BOUNDS"),
        ("gather n=4097\nhalt", "COUNT"),
        ("gather n=r1+8\nhalt", "device 1 stops at instruction 1 with RING_MISMATCH"),
        ("beq to=end a=r1 b=0\ngather n=8\nend:\nhalt", "device 1 stops at instruction 2 with RING_MISMATCH"),
        ("loop:\nbeq to=loop", "max_instructions = 1000"),
    ],
)
def test_bad_programs_stop_with_one_line(text: str, message: str) -> None:
    with pytest.raises(TypebarError, match=message) as caught:
        run_timing(assemble(text), TINY, 2, np.zeros((2, 4), np.int32), max_instructions=1000)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "empty",
    ["load region=io line=-1 n=0", "store region=io line=-1 outer=1 inner=0", "matmul line=-1 outer=1 inner=1 k=1 n=0"],
)
def test_what_moves_nothing_may_name_any_address(empty: str) -> None:
    assert run(f"{empty}\nhalt").total_cycles > 0


def test_bad_arguments_stop_with_one_line() -> None:
    program = assemble("halt")
    with pytest.raises(TypebarError, match="devices = 0 is outside 1 to 64"):
        run_timing(program, TINY, 0, np.zeros((0, 4), np.int32))
    with pytest.raises(TypebarError, match=r"shape \[1, 4\]: give one row for each of 2 devices"):
        run_timing(program, TINY, 2, np.zeros((1, 4), np.int32))
    with pytest.raises(TypebarError, match="stall_seed = 4294967296 is outside 0 to 4294967295"):
        run_timing(program, TINY, 1, np.zeros((1, 4), np.int32), stall_seed=1 << 32)


def test_a_fifo_that_cannot_hold_one_step_is_refused() -> None:
    with pytest.raises(TypebarError, match="hold one step of the matrix unit, 1024 bytes"):
        TINY.override({"matrix.rows": "16", "matrix.fifo_port_bytes": "1024", "hbm.fifo_bytes": "512"})


def test_entry_and_growing_records() -> None:
    body = "sstore region=io value=r3\nvwrite dst=0 b=1\nssub rd=r3 a=r3 b=1"
    text = f"trap code=1\nsli rd=r3 value=3000\nloop:\n{body}\nbne to=loop a=r3 b=0\nhalt"
    io = np.zeros((2, 4), np.int32)
    result = run_timing(assemble(text), TINY, 2, io, entry=1, trace=True)
    assert [s.value for s in result.stores if s.device == 1] == list(range(3000, 0, -1))
    assert len(slices(result, MEMORY, 1)) == len(slices(result, VECTOR, 1)) == 3000
    assert not io.any()


def test_perfetto_file(tmp_path: Path) -> None:
    program = assemble(f'{MATMUL} n=64 src=256    ; layer 0 "qkv"\ngather dst=0 a=8192 n=8\nhalt')
    result = run_timing(program, TINY, 2, np.zeros((2, 0), np.int32), trace=True)
    path = tmp_path / "trace.json"
    write_perfetto(result, TINY, program, path)
    events = json.loads(path.read_text())["traceEvents"]
    tracks = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert tracks[1, FETCH] == "fetch" and len(tracks) == 10
    spans = {(e["pid"], tracks[e["pid"], e["tid"]]): e for e in events if e["ph"] == "X"}
    assert len(spans) == 6  # fetch, matrix, ring on each device
    assert spans[1, "fetch"]["name"] == 'matmul: layer 0 "qkv"'
    assert (spans[1, "fetch"]["ts"], spans[1, "fetch"]["dur"]) == (0.005, 0.09)  # cycles 1 to 18 of 5 ns
    assert [p.name for p in tmp_path.iterdir()] == ["trace.json"]


def test_perfetto_errors(tmp_path: Path) -> None:
    program = assemble("halt")
    result = run_timing(program, TINY, 1, np.zeros((1, 0), np.int32))
    with pytest.raises(TypebarError, match="trace=True"):
        write_perfetto(result, TINY, program, tmp_path / "x.json")
    traced = run_timing(program, TINY, 1, np.zeros((1, 0), np.int32), trace=True)
    with pytest.raises(TypebarError, match="cannot write trace"):
        write_perfetto(traced, TINY, program, tmp_path / "missing" / "x.json")
    assert list(tmp_path.iterdir()) == []
