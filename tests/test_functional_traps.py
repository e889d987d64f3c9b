"""Every trap, its place and that nothing of the trapping instruction happens; the ring; injected failures."""

from typing import Any

import numpy as np
import pytest
from functional_bench import REGION_BYTES, TINY, Bench
from hypothesis import given, settings
from hypothesis import strategies as st

from typebar.isa.checks import Checker
from typebar.isa.errors import TypebarError
from typebar.isa.instructions import INSTRUCTIONS, TRAP_TEXT, Kind, Patch, Region, Scale, Trap
from typebar.isa.layout import packed_bytes
from typebar.isa.machine import Machine
from typebar.isa.program import Op, Operand, Program, assemble, encode, op
from typebar.sim.functional import DeviceMemory, DeviceTrap, FunctionalSimulator

WORDS = TINY.vector.words
LINES = REGION_BYTES // 64
WIDE = TINY.override({"hbm.channels": "8", "hbm.fifo_bytes": "65536"})  # a memory row of four lines

MATMUL = {
    "dst": 1024, "src": 64, "k": 8, "n": 8, "outer": 2, "inner": 1, "src_outer": 8, "dst_outer": 8,
    "scale": 2048, "bias": 3072, "maximum": 4032, "patch_src": 4096,
}  # fmt: skip

REGISTER_BOUNDS: list[tuple[str, dict[str, int]]] = [
    ("vadd", {"dst": -8, "n": 8}),
    ("vadd", {"dst": WORDS - 8, "n": 9}),
    ("vmul", {"a": WORDS, "n": 1}),
    ("vmax", {"b": WORDS, "b_from": 1, "n": 8}),
    ("vmov", {"b": WORDS - 8, "n": 16}),
    ("vmov", {"dst": WORDS, "n": 1, "b_from": 2}),
    ("vunary", {"a": WORDS - 8, "n": 16}),
    ("vunary", {"dst": -8, "n": 16}),
    ("vchain", {"dst": WORDS - 8, "n": 9, "write": 1}),
    ("vchain", {"a": WORDS - 8, "n": 9}),
    ("vchain", {"b": WORDS, "n": 1, "operation": 1}),
    ("vchain", {"scale": WORDS, "n": 1, "scale_from": 1}),
    ("vchain", {"result": WORDS, "reduce": 1}),
    ("vsum", {"dst": WORDS}),
    ("vrmax", {"a": -8, "n": 8}),
    ("vargmax", {"dst": WORDS - 1, "n": 8}),
    ("vread", {"a": -1}),
    ("vwrite", {"dst": WORDS}),
    ("load", {"region": Region.IO, "dst": WORDS - 8, "n": 16}),
    ("store", {"region": Region.IO, "a": WORDS - 8, "outer": 3, "inner": 3}),
    ("gather", {"dst": WORDS - 8, "n": 16}),
    ("gather", {"a": WORDS - 8, "n": 16}),
    ("matmul", {**MATMUL, "src": WORDS - 8}),
    ("matmul", {**MATMUL, "dst": WORDS - 8}),
    ("matmul", {**MATMUL, "dst": WORDS - 8, "dst_outer": 0, "n": 9}),
    ("matmul", {**MATMUL, "scale": WORDS, "scaling": Scale.WORD}),
    ("matmul", {**MATMUL, "scale": WORDS - 4, "scaling": Scale.COLUMN}),
    ("matmul", {**MATMUL, "bias": -8, "add_bias": 1}),
    ("matmul", {**MATMUL, "maximum": WORDS - 1, "row_max": 1}),
    ("matmul", {**MATMUL, "patch_src": WORDS, "patch": Patch.COLUMN}),
    ("matmul", {**MATMUL, "patch_src": WORDS, "patch": Patch.LANE}),
]
MISALIGNED: list[tuple[str, dict[str, int]]] = [
    ("matmul", {**MATMUL, "maximum": 4001, "row_max": 1}),
    ("vsub", {"dst": 4, "n": 2}),
    ("vsub", {"a": 1, "n": 2}),
    ("vsub", {"b": 9, "n": 2}),
    ("vmov", {"b": 4, "n": 8}),
    ("vunary", {"dst": 2, "n": 8}),
    ("vchain", {"dst": 2, "n": 8, "write": 1}),
    ("vchain", {"b": 4, "n": 8, "operation": 4}),
    ("vsumsq", {"a": 2, "n": 8}),
    ("vargmax", {"a": 2, "n": 8}),
    ("vargmax", {"dst": 1003, "n": 8}),
    ("load", {"region": Region.IO, "dst": 3, "n": 2}),
    ("load", {"region": Region.IO, "byte": 1}),
    ("load", {"region": Region.IO, "byte": 2, "format": 3}),
    ("store", {"region": Region.IO, "a": 3, "outer": 2, "inner": 1, "outer_bytes": 2}),
    ("store", {"region": Region.IO, "byte": 3, "outer": 1, "inner": 1}),
    ("store", {"region": Region.KV, "outer": 2, "inner": 1, "outer_bytes": 1}),
    ("store", {"region": Region.KV, "outer": 2, "inner": 1, "inner_bytes": 6, "format": 3}),
    ("sload", {"region": Region.IO, "byte": 2}),
    ("sstore", {"region": Region.IO, "byte": 1}),
    ("gather", {"n": 12}),
    ("gather", {"dst": 4, "n": 8}),
    ("gather", {"a": 4, "n": 8}),
    ("matmul", {**MATMUL, "dst": 1028}),
    ("matmul", {**MATMUL, "src": 68}),
    ("matmul", {**MATMUL, "src_outer": 4}),
    ("matmul", {**MATMUL, "src_inner": 4}),
    ("matmul", {**MATMUL, "dst_outer": 12}),
    ("matmul", {**MATMUL, "dst_inner": 1}),
    ("matmul", {**MATMUL, "scale": 2050, "scaling": Scale.COLUMN}),
    ("matmul", {**MATMUL, "bias": 3076, "add_bias": 1}),
    ("matmul", {**MATMUL, "patch_src": 4097, "patch": Patch.LANE}),
]
COUNT: list[tuple[str, dict[str, int]]] = [
    *[(name, {"n": -1}) for name in ("vadd", "vmov", "vunary", "vchain", "vsum", "vargmax", "gather")],
    *[(name, {"n": WORDS + 8}) for name in ("vadd", "vmov", "vunary", "vchain", "vsum", "vargmax")],
    ("gather", {"n": TINY.ring.buffer_words + 8}),
    ("load", {"region": Region.IO, "n": -1}),
    ("load", {"region": Region.IO, "n": WORDS + 1}),
    ("store", {"region": Region.IO, "outer": -1, "inner": 1}),
    ("store", {"region": Region.IO, "outer": -1, "inner": -1}),
    ("store", {"region": Region.IO, "outer": 1, "inner": -1}),
    ("store", {"region": Region.IO, "outer": 256, "inner": 256}),
    ("store", {"region": Region.IO, "outer": 0, "inner": WORDS + 1}),
    ("store", {"region": Region.IO, "outer": 1, "inner": 1, "outer_bytes": -2}),
    ("store", {"region": Region.IO, "outer": 1, "inner": 1, "inner_bytes": -2}),
    *[
        ("matmul", {**MATMUL, name: -8})
        for name in ("k", "n", "outer", "inner", "src_outer", "src_inner", "dst_outer", "dst_inner")
    ],
    ("matmul", {**MATMUL, "k": 0}),
    ("matmul", {**MATMUL, "k": 65537}),
    ("matmul", {**MATMUL, "outer": 3, "inner": 3}),
    ("matmul", {**MATMUL, "outer": TINY.matrix.vectors + 1}),
    ("matmul", {**MATMUL, "n": WORDS + 1}),
    ("matmul", {**MATMUL, "outer": 256, "inner": 256}),
    ("matmul", {**MATMUL, "src_inner": WORDS + 8}),
    ("matmul", {**MATMUL, "patch_at": -1, "patch": Patch.LANE}),
]
REGION_ACCESS: list[tuple[str, dict[str, int]]] = [
    ("load", {"region": Region.WEIGHTS}),
    ("load", {"region": Region.KV}),
    ("store", {"region": Region.WEIGHTS}),
    ("store", {"region": Region.PARAMS}),
    ("store", {"region": Region.LOCAL}),
    ("sload", {"region": Region.KV}),
    ("sload", {"region": Region.WEIGHTS}),
    ("sstore", {"region": Region.KV}),
    ("sstore", {"region": Region.PARAMS}),
    ("sstore", {"region": Region.LOCAL}),
    ("matmul", {"region": Region.PARAMS, "k": 1}),
    ("matmul", {"region": Region.IO, "k": 1}),
]
REGION_BOUNDS: list[tuple[str, dict[str, int]]] = [
    ("load", {"region": Region.IO, "line": LINES, "n": 1}),
    ("load", {"region": Region.IO, "line": LINES - 1, "n": 33}),
    ("load", {"region": Region.IO, "line": -1, "n": 8}),
    ("load", {"region": Region.IO, "byte": -2, "n": 1}),
    ("store", {"region": Region.KV, "line": LINES, "outer": 1, "inner": 1}),
    ("store", {"region": Region.KV, "byte": -2, "outer": 1, "inner": 1}),
    ("store", {"region": Region.IO, "outer": 2, "inner": 2, "outer_bytes": REGION_BYTES - 4, "inner_bytes": 4}),
    ("store", {"region": Region.IO, "outer": 3, "inner": 1, "outer_bytes": 524286}),
    ("sload", {"region": Region.IO, "line": LINES}),
    ("sload", {"region": Region.IO, "byte": -4}),
    ("sstore", {"region": Region.IO, "byte": REGION_BYTES}),
    ("matmul", {**MATMUL, "line": LINES - 1}),
    ("matmul", {**MATMUL, "line": -1}),
    ("matmul", {**MATMUL, "line": LINES}),
]
OVERLAP: list[tuple[str, dict[str, int]]] = [
    ("vadd", {"dst": 8, "a": 0, "b": 64, "n": 16}),
    ("vsub", {"dst": 0, "a": 64, "b": 8, "n": 9}),
    ("vmul", {"dst": 0, "a": 8, "n": 16, "b_from": 1}),
    ("vmax", {"dst": 8, "a": 0, "n": 16, "b_from": 2}),
    ("vmov", {"dst": 8, "b": 0, "n": 9}),
    ("vunary", {"dst": 0, "a": 8, "n": 16}),
    ("vchain", {"dst": 0, "a": 8, "n": 16, "write": 1}),
    ("vchain", {"dst": 0, "a": 64, "b": 8, "n": 16, "write": 1, "operation": 1}),
    ("gather", {"dst": 8, "a": 0, "n": 16}),
    ("gather", {"dst": 0, "a": 0, "n": 8}),
    ("matmul", {**MATMUL, "dst": 64}),
    ("matmul", {**MATMUL, "dst": 72}),
    ("matmul", {**MATMUL, "dst": 56}),
    ("matmul", {**MATMUL, "scale": 1039, "scaling": Scale.WORD}),
    ("matmul", {**MATMUL, "scale": 1032, "scaling": Scale.COLUMN}),
    ("matmul", {**MATMUL, "bias": 1024, "add_bias": 1}),
    ("matmul", {**MATMUL, "maximum": 1032, "row_max": 1}),
    ("matmul", {**MATMUL, "patch_src": 1032, "patch": Patch.COLUMN}),
    ("matmul", {**MATMUL, "patch_src": 1024, "patch": Patch.LANE}),
    ("matmul", {**MATMUL, "dst_outer": 0}),
    ("matmul", {**MATMUL, "n": 9}),
    ("matmul", {**MATMUL, "outer": 1, "inner": 2}),
    ("matmul", {**MATMUL, "inner": 2, "dst_inner": 8}),
    ("matmul", {**MATMUL, "inner": 3, "dst_outer": 16, "dst_inner": 8}),
    ("matmul", {**MATMUL, "dst_outer": 32, "bias": 1032, "add_bias": 1}),  # between the rows
]
CASES = [
    *[(Trap.REGISTER_BOUNDS, *case) for case in REGISTER_BOUNDS],
    *[(Trap.MISALIGNED, *case) for case in MISALIGNED],
    *[(Trap.COUNT, *case) for case in COUNT],
    *[(Trap.REGION_ACCESS, *case) for case in REGION_ACCESS],
    *[(Trap.REGION_BOUNDS, *case) for case in REGION_BOUNDS],
    *[(Trap.OVERLAP, *case) for case in OVERLAP],
]


def stops(bench: Bench, *code: str | Op) -> DeviceTrap:
    """The trap that ends a run, which must leave registers and memory alone."""
    with pytest.raises(DeviceTrap) as caught:
        bench.run(*code)
    assert all(np.array_equal(bench.memory[region], data) for region, data in bench.memory_before.items())
    assert np.array_equal(bench.registers.view(np.uint32), bench.before.view(np.uint32))
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("trap", "name", "values"), CASES, ids=[f"{trap.name}-{name}-{i}" for i, (trap, name, _) in enumerate(CASES)]
)
def test_operand_traps(trap: Trap, name: str, values: dict[str, int]) -> None:
    code: list[Op] = []
    fields: dict[str, Any] = dict(values)
    for item in op(name).kind.fields:
        value = fields.get(item.name, 0)
        if item.kind is Kind.OPERAND and not -(2**19) <= value < 2**19:
            code.append(op("sli", rd=9, value=value))
            fields[item.name] = Operand(9)
    error = stops(Bench(), *code, op(name, **fields))
    assert (error.trap, error.pc, error.device) == (trap, len(code), 0)
    assert trap.name in str(error)
    assert TRAP_TEXT[trap] in str(error)
    assert trap in op(name).kind.traps


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("vadd", {"dst": WORDS - 8, "a": WORDS - 8, "b": 3, "n": 8, "b_from": 1}),
        ("vadd", {"dst": WORDS - 1, "a": 3, "b": 5, "n": 1}),
        ("vadd", {"dst": 3, "a": -77, "b": 9, "n": 0}),
        ("vadd", {"b": -1, "b_from": 2, "n": 8}),
        ("vunary", {"n": WORDS}),
        ("vchain", {"dst": -1, "b": -1, "scale": -1, "result": -1, "n": 8}),
        ("vchain", {"dst": 0, "a": 8, "n": 16}),
        ("vchain", {"dst": 0, "a": 64, "b": 8, "n": 16, "write": 1}),
        ("vchain", {"dst": 0, "a": 64, "b": 8, "n": 16, "write": 1, "operation": 1, "b_from": 1}),
        ("vchain", {"scale": -1, "scale_from": 1, "b": -1, "operation": 1, "b_from": 1}),
        ("vchain", {"dst": 0, "a": 0, "n": 16, "write": 1, "result": 5, "reduce": 1, "scale": -1, "scale_from": 2}),
        ("vargmax", {"dst": WORDS - 2, "a": WORDS - 8, "n": 8}),
        ("vread", {"a": WORDS - 1}),
        ("gather", {"n": TINY.ring.buffer_words, "a": TINY.ring.buffer_words}),
        ("gather", {"dst": -1, "a": -1, "n": 0}),
        ("load", {"region": Region.IO, "line": LINES - 1, "n": 32}),
        ("load", {"region": Region.IO, "line": LINES, "byte": -2, "n": 1}),
        ("load", {"region": Region.IO, "line": -5, "n": 0}),
        (
            "store",
            {"region": Region.IO, "byte": 2, "outer": 2, "inner": 2, "outer_bytes": REGION_BYTES - 8, "inner_bytes": 4},
        ),
        ("store", {"region": Region.KV, "line": -1, "outer": 0, "inner": 5}),
        ("sload", {"region": Region.IO, "byte": REGION_BYTES - 4}),
        ("matmul", {**MATMUL, "line": LINES - 2}),
        ("matmul", {**MATMUL, "n": 0, "dst": -1, "line": -1}),
        ("matmul", {**MATMUL, "n": 0, "dst": 64, "bias": 64, "add_bias": 1}),
        ("matmul", {**MATMUL, "outer": TINY.matrix.vectors}),
        ("matmul", {**MATMUL, "inner": 2, "dst_outer": 8, "dst_inner": 16}),
        ("matmul", {**MATMUL, "inner": 2, "dst_outer": 16, "dst_inner": 8, "accumulate": 1}),
        ("matmul", {**MATMUL, "dst_outer": 32, "maximum": 1064, "row_max": 1, "bias": 1072, "add_bias": 1}),
        ("vadd", {"dst": 8, "a": 8, "b": 11, "n": 16, "b_from": 1}),
        ("vadd", {"dst": 16, "a": 0, "b": 16, "n": 16}),
        ("vmov", {"dst": 16, "b": 0, "n": 16}),
        ("matmul", {**MATMUL, "outer": 0, "dst": -1, "src": -1, "line": LINES + 100}),
        ("matmul", {**MATMUL, "src": WORDS - 8, "src_outer": 0, "dst": WORDS - 24}),
        (
            "matmul",
            {
                **MATMUL,
                "outer": 1,
                "n": 1,
                "dst": 1027,
                "scale": -1,
                "bias": -1,
                "maximum": -1,
                "patch_src": -1,
                "patch_at": -1,
            },
        ),
        ("matmul", {**MATMUL, "scale": 1003, "scaling": Scale.WORD, "lo": -99, "hi": 99999, "masked": 1}),
        ("matmul", {**MATMUL, "maximum": WORDS - 8, "row_max": 1}),
    ],
)
def test_the_edge_of_what_is_allowed(name: str, values: dict[str, int]) -> None:
    Bench().run(op(name, **values))


def test_order_of_checks() -> None:
    """Counts come first, then registers in field order, then the region's kind, alignment, bounds."""
    fields = {"region": Region.KV, "format": 3, "dst": -4, "line": -1, "byte": 1, "n": -1}
    order = [
        ("n", 8, Trap.COUNT),
        ("dst", 4, Trap.REGISTER_BOUNDS),
        ("dst", 8, Trap.MISALIGNED),
        ("region", Region.IO, Trap.REGION_ACCESS),
        ("byte", 0, Trap.MISALIGNED),
        ("line", 0, Trap.REGION_BOUNDS),
    ]
    for name, mended, trap in order:
        assert stops(Bench(), op("load", **fields)).trap is trap
        fields[name] = mended
    Bench().run(op("load", **fields))


@pytest.mark.parametrize(("line", "trap"), [(2, Trap.MISALIGNED), (4, None), (1020, None), (1024, Trap.REGION_BOUNDS)])
def test_matmul_starts_on_a_memory_row_and_fetches_whole_rows(line: int, trap: Trap | None) -> None:
    checker = Checker(WIDE, [REGION_BYTES] * len(Region))
    operands = (1024, 64, 8, 1, line, 1, 1, *[0] * 11)  # one column of 16 bytes: a row of 256 is fetched
    got = checker.matmul(0, Region.WEIGHTS, 0, 0, 0, 0, 0, operands)
    assert got == (trap or Trap.NONE)
    if trap is None:
        short = Checker(WIDE, [64 * line + 255] * len(Region))
        assert short.matmul(0, Region.WEIGHTS, 0, 0, 0, 0, 0, operands) == Trap.REGION_BOUNDS


@given(
    k=st.integers(1, 40),
    n=st.integers(0, 150),
    full=st.booleans(),
    size=st.sampled_from([0, 2, 3]),
    line=st.integers(0, 9),
)
@settings(deadline=None, max_examples=80)
def test_a_packed_matrix_is_exactly_inside_its_own_bytes(k: int, n: int, full: bool, size: int, line: int) -> None:
    stored = packed_bytes(k, n, WIDE, {0: 2, 2: 1, 3: 4}[size], full)
    operands = (4096, 64, k, n, 4 * line, 1, 1, *[0] * 11)
    fits = Checker(WIDE, [256 * line + stored] * len(Region))
    assert fits.matmul(size, Region.KV, full, 0, 0, 0, 0, operands) == Trap.NONE
    if stored and not full:
        tight = Checker(WIDE, [256 * line + stored - 1] * len(Region))
        assert tight.matmul(size, Region.KV, full, 0, 0, 0, 0, operands) == Trap.REGION_BOUNDS


@given(
    counts=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    strides=st.tuples(*[st.sampled_from([0, 8, 16, 24, 32, 48])] * 4),
    places=st.tuples(*[st.integers(0, 24)] * 4),
    k=st.integers(1, 24),
    n=st.integers(1, 24),
    choice=st.tuples(st.sampled_from(list(Patch)), st.sampled_from(list(Scale)), st.booleans(), st.booleans()),
)
@settings(deadline=None, max_examples=300)
def test_what_passes_the_overlap_check_writes_no_word_twice_and_none_that_it_reads(
    counts: tuple[int, int],
    strides: tuple[int, int, int, int],
    places: tuple[int, int, int, int],
    k: int,
    n: int,
    choice: tuple[Patch, Scale, bool, bool],
) -> None:
    (outer, inner), (src_outer, src_inner, dst_outer, dst_inner) = counts, strides
    scale, bias, maximum, patch_src = (8 * place for place in places)
    patch, scaling, add_bias, row_max = choice
    operands = (64, 128, k, n, 0, outer, inner, *strides, scale, bias, 0, 0, maximum, patch_src, 0)
    verdict = Checker(TINY, [REGION_BYTES] * 5).matmul(0, 0, 0, patch, scaling, add_bias, row_max, operands)
    written, read = [], set()
    for o in range(outer):
        for i in range(inner):
            written += range(64 + o * dst_outer + i * dst_inner, 64 + o * dst_outer + i * dst_inner + n)
            read |= set(range(128 + o * src_outer + i * src_inner, 128 + o * src_outer + i * src_inner + k))
    written += range(maximum, maximum + outer * inner * row_max)
    read |= set(range(scale, scale + {Scale.NONE: 0, Scale.WORD: 1, Scale.COLUMN: n}[scaling]))
    read |= set(range(bias, bias + n * add_bias))
    read |= set(range(patch_src, patch_src + {Patch.NONE: 0, Patch.COLUMN: k, Patch.LANE: n}[patch]))
    results = set(written[: outer * inner * n])
    assert verdict in (Trap.NONE, Trap.OVERLAP)
    if verdict is Trap.NONE:
        assert len(set(written)) == len(written)
        assert not results & read
    elif len(set(written)) == len(written):  # refused: its range meets an operand, or its rows interleave
        first, last = min(results), max(results)
        assert read & set(range(first, last + 1)) or row_max or outer * inner > 1


def test_unbound_regions_hold_nothing() -> None:
    simulator = FunctionalSimulator(Program([op("sload", region=Region.IO, rd=4)]), TINY, 1, [DeviceMemory()])
    with pytest.raises(DeviceTrap) as caught:
        simulator.run()
    assert caught.value.trap is Trap.REGION_BOUNDS


# Sequencing ---------------------------------------------------------------------------------------------
def run(program: Any, devices: int = 1, entry: int = 0, **options: Any) -> FunctionalSimulator:
    simulator = FunctionalSimulator(program, TINY, devices, [DeviceMemory() for _ in range(devices)], threads=1)
    simulator.run(entry, **options)
    return simulator


@pytest.mark.parametrize(
    ("text", "entry", "pc"),
    [
        ("fence\nfence", 0, 2),
        ("beq to=9", 0, 9),
        ("", 0, 0),
        ("halt", 5, 5),
        ("bne to=0 a=1\nbeq to=1048575", 1, 1048575),
    ],
)
def test_program_end(text: str, entry: int, pc: int) -> None:
    with pytest.raises(DeviceTrap) as caught:
        run(assemble(text), entry=entry)
    assert (caught.value.trap, caught.value.pc) == (Trap.PROGRAM_END, pc)


def test_software_trap_carries_its_code() -> None:
    with pytest.raises(DeviceTrap, match=r"device 0 stopped at instruction 1 with SOFTWARE with code -6: ") as caught:
        run(assemble("sli rd=r5 value=-7\ntrap code=r5+1"))
    assert caught.value.code == -6


def test_illegal_words_trap_only_when_reached() -> None:
    words = np.concatenate([encode(assemble("beq to=2\nhalt\nfence")), np.full(64, 255, np.uint8)])
    with pytest.raises(DeviceTrap) as caught:
        run(words)
    assert (caught.value.trap, caught.value.pc) == (Trap.ILLEGAL, 3)
    run(words.tobytes(), entry=1)
    with pytest.raises(TypebarError, match="a program is a multiple of 64 bytes, not 63: it is truncated"):
        run(words[:63])


def test_an_endless_loop_meets_the_limit() -> None:
    with pytest.raises(TypebarError, match="device 0 did not halt within 100 instructions"):
        run(assemble("again:\nbeq to=again"), max_instructions=100)
    run(assemble("fence\nhalt"), max_instructions=2)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: FunctionalSimulator(Program([]), TINY, 0, []), "a ring has 1 to 64 devices, not 0"),
        (lambda: FunctionalSimulator(Program([]), TINY, 2, [DeviceMemory()]), "2 devices need as many memories, not 1"),
        (lambda: FunctionalSimulator(Program([]), TINY, 1, [DeviceMemory()], threads=0), "threads must be at least 1"),
        (lambda: run(Program([]), entry=-1), "an entry point is an instruction index, not -1"),
        (lambda: DeviceMemory({Region.IO: np.zeros(4, np.int32)}).by_number(), "region IO must be a contiguous vector"),
        (
            lambda: DeviceMemory({Region.KV: read_only()}).by_number(),
            "region KV must be writable: copy the array first",
        ),
    ],
)
def test_construction_errors(call: Any, text: str) -> None:
    with pytest.raises(TypebarError) as caught:
        call()
    assert text in str(caught.value)


def read_only() -> np.ndarray:
    data = np.zeros(64, np.uint8)
    data.flags.writeable = False
    return data


def test_weights_may_be_read_only() -> None:
    DeviceMemory({Region.WEIGHTS: read_only(), Region.PARAMS: read_only(), Region.LOCAL: read_only()}).by_number()


IMMEDIATES = st.one_of(st.integers(-9, 80), st.integers(-(2**19), 2**19 - 1), st.just(0))


@st.composite
def legal_ops(draw: st.DrawFn) -> Op:
    """Any instruction, its operands often small enough to do something."""
    kind = draw(st.sampled_from(INSTRUCTIONS))
    values: dict[str, int | Operand] = {}
    for item in kind.fields:
        if item.kind is Kind.OPERAND:
            values[item.name] = draw(st.builds(Operand, st.integers(0, 4), IMMEDIATES))
        elif item.kind is Kind.ENUM and item.values is not None:
            values[item.name] = draw(st.sampled_from([int(value) for value in item.values]))
        else:
            values[item.name] = draw(st.integers(0, (1 << min(item.width, 5)) - 1))
    return Op(kind, values)


@given(st.lists(legal_ops(), max_size=6), st.lists(st.integers(-(2**31), 2**31 - 1), min_size=2, max_size=2))
@settings(deadline=None, max_examples=300)
def test_any_program_halts_or_traps(ops: list[Op], values: list[int]) -> None:
    """Whatever the operands, only the declared outcomes: never an exception of the simulator's own."""
    start = [op("sli", rd=3, value=values[0]), op("sli", rd=4, value=values[1])]
    memories = [
        DeviceMemory({region: np.zeros(4096, np.uint8) for region in Region if region is not Region.LOCAL})
        for _ in range(2)
    ]
    simulator = FunctionalSimulator(Program([*start, *ops, op("halt")]), TINY, 2, memories, threads=1)
    try:
        simulator.run(max_instructions=200)
    except DeviceTrap as error:
        declared = {Trap.SOFTWARE, Trap.PROGRAM_END, Trap.RING_MISMATCH}
        reached = error.pc < len(start) + len(ops)
        assert error.trap in declared or (reached and error.trap in ops[error.pc - 2].kind.traps)
    except TypebarError as error:
        assert "did not halt within 200 instructions" in str(error)


# Ring ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("devices", [1, 2, 3, 4])
def test_gather_joins_blocks_in_rank_order_bit_for_bit(devices: int) -> None:
    program = assemble(
        """
            sli rd=r9 value=3
        again:
            gather dst=1024 a=64 n=16
            vmov dst=64 b=1032 n=16
            ssub rd=r9 a=r9 b=1
            bne to=again a=r9
            halt
        """
    )
    simulator = FunctionalSimulator(program, TINY, devices, [DeviceMemory()] * devices, seed=4)
    blocks = [simulator.vector_registers(rank)[64:80].view(np.uint32).copy() for rank in range(devices)]
    rest = [simulator.vector_registers(rank)[1024:1056].view(np.uint32).copy() for rank in range(devices)]
    for _ in range(3):
        joined = np.concatenate(blocks)
        for rank in range(devices):
            rest[rank][: min(joined.size, 32)] = joined[:32]
            blocks[rank] = rest[rank][8:24].copy()
    simulator.run()
    for rank in range(devices):
        assert np.array_equal(simulator.vector_registers(rank)[1024:1056].view(np.uint32)[: 16 * devices], joined[:32])
        assert np.array_equal(simulator.vector_registers(rank)[64:80].view(np.uint32), blocks[rank])


def test_gather_next_to_its_source() -> None:
    checker = Checker(TINY, [0] * 5)
    assert [checker.gather(64, a, 8, 3) for a in (56, 64, 80, 88)] == [
        Trap.NONE,
        Trap.OVERLAP,
        Trap.OVERLAP,
        Trap.NONE,
    ]


@pytest.mark.parametrize(
    ("text", "device", "pc"),
    [
        ("bne to=end a=r1 b=0\ngather a=256 n=8\nend:\nhalt", 1, 2),  # device 1 halts
        ("beq to=end a=r1 b=0\ngather a=256 n=8\nend:\nhalt", 0, 2),  # device 0 halts
        ("sshl rd=r4 a=8 b=r1\ngather a=256 n=r4\nhalt", 1, 1),  # lengths 8 and 16
        ("gather a=256 n=8\nbne to=end a=r1 b=2\ngather a=256 n=8\nend:\nhalt", 2, 2),  # device 2 gathers twice
    ],
)
def test_ring_mismatch(text: str, device: int, pc: int) -> None:
    devices = 3 if "b=2" in text else 2
    with pytest.raises(DeviceTrap) as caught:
        run(assemble(text), devices)
    error = caught.value
    assert error.trap is Trap.RING_MISMATCH
    if devices == 2:
        assert (error.device, error.pc) == (device, pc)
    else:
        assert (error.device, error.pc) == (0, 3)  # device 0 halted where device 2 went on


def test_a_trap_on_one_device_names_it() -> None:
    with pytest.raises(DeviceTrap) as caught:
        run(assemble("bne to=end a=r1 b=1\nvread a=-1\nend:\nhalt"), 3)
    assert (caught.value.device, caught.value.pc, caught.value.trap) == (1, 1, Trap.REGISTER_BOUNDS)


# Injected failures --------------------------------------------------------------------------------------
def test_a_lost_device_stays_lost() -> None:
    simulator = FunctionalSimulator(assemble("fence\nfence\nhalt"), TINY, 2, [DeviceMemory()] * 2)
    simulator.run()
    simulator.fail_after(5)
    for pc in (2, 0):
        with pytest.raises(DeviceTrap, match="the device stopped answering") as caught:
            simulator.run()
        assert (caught.value.trap, caught.value.pc, caught.value.device) == (Trap.DEVICE_LOST, pc, 0)
    simulator.fail_after(None)
    simulator.run()


def test_a_rule_loses_one_device() -> None:
    simulator = FunctionalSimulator(assemble("gather a=256 n=8\nfence\nhalt"), TINY, 3, [DeviceMemory()] * 3)
    simulator.fail_after(lambda device, executed: device == 2 and executed >= 4)
    simulator.run()
    with pytest.raises(DeviceTrap) as caught:
        simulator.run()
    assert (caught.value.device, caught.value.pc) == (2, 1)


def test_a_machine_without_chains_has_no_such_instruction() -> None:
    checker = Checker(TINY.override({"vector.chains": "false"}), [0] * 5)
    assert checker.chain(0, 0, 0, 0, 0, [0, 0, 0, -1, 0, 0]) is Trap.ILLEGAL
    assert Checker(TINY, [0] * 5).chain(0, 0, 0, 0, 0, [0, 0, 0, -1, 0, 0]) is Trap.COUNT


def test_machines_differ_in_limits() -> None:
    small = TINY.override({"ring.buffer_words": "16"})
    assert Checker(small, [0] * 5).gather(0, 64, 24, 1) is Trap.COUNT
    assert Checker(TINY, [0] * 5).gather(0, 64, 24, 1) is Trap.NONE
    assert Checker(Machine.load("u280"), [0] * 5).gather(0, 64, 24, 1) is Trap.MISALIGNED
