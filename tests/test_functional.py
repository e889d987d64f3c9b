"""The functional simulator: every instruction against the golden numerics, on data with every special value."""

from typing import Any

import numpy as np
import pytest
from functional_bench import SPECIAL_BITS, TINY, Bench, bits, special
from hypothesis import given, settings
from hypothesis import strategies as st

from typebar.isa import numerics as golden
from typebar.isa.instructions import Activation, Format, Function, Patch, Region, Scale
from typebar.isa.layout import element_offset, pack
from typebar.isa.numerics import NumericFlag
from typebar.isa.program import Op, Operand, assemble, float_bits, op
from typebar.sim.functional import DeviceMemory, FlagEvent, FunctionalSimulator

SEEDS = st.integers(0, 2**32 - 1)


# Scalar -------------------------------------------------------------------------------------------------
INT32 = st.one_of(st.integers(-(2**31), 2**31 - 1), st.sampled_from([0, 1, -1, 2**31 - 1, -(2**31), 31, 32]))


def scalar_reference(name: str, a: int, b: int) -> int:
    with np.errstate(over="ignore"):
        x, y = np.int32(a), np.int32(b)
        shift = np.int32(b & 31)
        value = {
            "sadd": lambda: x + y,
            "ssub": lambda: x - y,
            "smul": lambda: x * y,
            "smin": lambda: min(x, y),
            "smax": lambda: max(x, y),
            "sand": lambda: x & y,
            "sshl": lambda: x << shift,
            "sshr": lambda: x >> shift,
        }[name]()
    return int(value)


@given(st.sampled_from(["sadd", "ssub", "smul", "smin", "smax", "sand", "sshl", "sshr"]), INT32, INT32)
@settings(deadline=None, max_examples=120)
def test_arithmetic(name: str, a: int, b: int) -> None:
    bench = Bench()
    bench.run(
        op("sli", rd=4, value=a),
        op("sli", rd=5, value=b),
        op(name, rd=6, a=Operand(4), b=Operand(5)),
        op(name, rd=0, a=Operand(4), b=Operand(5)),
    )
    registers = bench.scalars()
    assert registers[6] == scalar_reference(name, a, b)
    assert registers[0] == 0


@given(INT32, st.integers(-(2**19), 2**19 - 1))
@settings(deadline=None, max_examples=50)
def test_operands_wrap(value: int, immediate: int) -> None:
    bench = Bench()
    bench.run(op("sli", rd=4, value=value), op("sadd", rd=5, a=Operand(4, immediate)))
    assert bench.scalars()[5] == scalar_reference("sadd", value, immediate)


def test_float_compare() -> None:
    words = np.concatenate([SPECIAL_BITS, bits(special(1, 4, plain=True))])
    pairs = [(a, b) for a in words for b in words]
    code = []
    for index, (a, b) in enumerate(pairs):
        code += [op("sli", rd=4, value=int(a.view(np.int32))), op("sli", rd=5, value=int(b.view(np.int32)))]
        code += [op("sfgt", rd=6, a=Operand(4), b=Operand(5)), op("vwrite", dst=index, b=Operand(6))]
    bench = Bench()
    bench.run(*code)
    x, y = golden.canonical(np.array(pairs, np.uint32).view(np.float32)).T
    assert bench.registers.view(np.int32)[: len(pairs)].tolist() == (x > y).astype(int).tolist()


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("beq", lambda a, b: a == b),
        ("bne", lambda a, b: a != b),
        ("blt", lambda a, b: a < b),
        ("bge", lambda a, b: a >= b),
    ],
)
@pytest.mark.parametrize("pair", [(1, 1), (1, 2), (2, 1), (-1, 1), (2**31 - 1, -(2**31)), (-5, -5)])
def test_branches(name: str, taken: Any, pair: tuple[int, int]) -> None:
    bench = Bench()
    bench.run(
        op("sli", rd=4, value=pair[0]),
        op("sli", rd=5, value=pair[1]),
        op(name, to=4, a=Operand(4), b=Operand(5)),
        op("sli", rd=6, value=1),
    )
    assert bench.scalars()[6] == int(not taken(*pair))


def test_start_state_and_loop() -> None:
    program = assemble(
        """
            sli rd=r9 value=5
        next:
            sadd rd=r10 a=r10 b=r9
            fence
            ssub rd=r9 a=r9 b=1
            bne to=next a=r9
            halt
        """
    )
    memories = [DeviceMemory() for _ in range(3)]
    simulator = FunctionalSimulator(program, TINY, 3, memories, threads=1)
    result = simulator.run()
    for rank in range(3):
        registers = simulator.scalar_registers(rank)
        assert registers == [0, rank, 3, 0, 0, 0, 0, 0, 0, 0, 15] + [0] * 21
    assert result.counts == {"sli": 3, "sadd": 15, "fence": 15, "ssub": 15, "bne": 15, "halt": 3}
    assert result.instructions == 66
    assert simulator.run(entry=5).counts == {"halt": 3}
    assert simulator.scalar_registers(2)[10] == 0


def test_vector_registers_start_as_asked_and_outlive_a_run() -> None:
    program = assemble("vmov dst=8 b_from=immediate imm=2.5 n=8\nhalt")
    simulator = FunctionalSimulator(program, TINY, 1, [DeviceMemory()])
    assert not simulator.vector_registers(0).any()
    simulator.run()
    assert simulator.vector_registers(0)[8:16].tolist() == [2.5] * 8
    garbage = FunctionalSimulator(program, TINY, 2, [DeviceMemory()] * 2, seed=1)
    first, second = (garbage.vector_registers(rank).view(np.uint32).copy() for rank in range(2))
    assert len(np.unique(first)) > 16000
    assert not np.array_equal(first, second)


# Vector -------------------------------------------------------------------------------------------------
BINARY = {"vadd": golden.add, "vsub": golden.sub, "vmul": golden.mul, "vmax": golden.maximum}


@given(st.sampled_from(sorted(BINARY)), st.sampled_from(["vector", "word", "immediate"]), st.integers(0, 70), SEEDS)
@settings(deadline=None, max_examples=150)
def test_binary(name: str, source: str, n: int, seed: int) -> None:
    bench = Bench(seed)
    a, b = bench.words(64, n), bench.words(203 if source == "word" else 200, n)
    imm = int(bits(special(seed, 1))[0])
    bench.run(f"{name} b_from={source} imm=0x{imm:08x} dst=1024 a=64 b={203 if source == 'word' else 200} n={n}")
    right = {"vector": b, "word": bench.before[203:204], "immediate": np.array([imm], np.uint32).view(np.float32)}
    bench.expect(1024, BINARY[name](a, right[source]))


@given(st.sampled_from(["vector", "word", "immediate"]), st.integers(0, 70), SEEDS)
@settings(deadline=None, max_examples=50)
def test_move_keeps_bits(source: str, n: int, seed: int) -> None:
    bench = Bench(seed)
    bench.run(f"vmov b_from={source} imm=0xff800001 dst=1024 b={77 if source == 'word' else 72} n={n}")
    words = {"vector": bench.before[72 : 72 + n], "word": bench.before[77:78]}
    right = words.get(source, np.array([0xFF800001], np.uint32).view(np.float32))
    bench.expect(1024, np.broadcast_to(right, n) if n else np.empty(0, np.float32))


@pytest.mark.parametrize("function", list(Function))
def test_unary(function: Function) -> None:
    bench = Bench(int(function))
    bench.run(f"vunary function={function.name.lower()} dst=2048 a=64 n=900")
    bench.expect(2048, golden.unary(function, bench.before[64:964]))


REDUCE = {"vsum": golden.tree_sum, "vsumsq": golden.sum_squares, "vrmax": golden.reduce_max}


@given(st.sampled_from(sorted(REDUCE)), st.integers(0, 70), SEEDS)
@settings(deadline=None, max_examples=100)
def test_reduce(name: str, n: int, seed: int) -> None:
    bench = Bench(seed, plain=seed % 2 == 0)
    bench.run(f"{name} dst=1003 a=64 n={n}")
    bench.expect(1003, np.array([REDUCE[name](bench.before[64 : 64 + n])], np.float32))


OPERATION = {"none": None, "add": golden.add, "sub": golden.sub, "mul": golden.mul, "max": golden.maximum}
CHAIN_REDUCE = {"none": None, "sum": golden.tree_sum, "sumsq": golden.sum_squares, "max": golden.reduce_max}


@given(
    st.sampled_from(["none", "word", "value"]),
    st.sampled_from(sorted(OPERATION)),
    st.sampled_from(["vector", "word", "immediate"]),
    st.sampled_from(list(Activation)),
    st.integers(0, 1),
    st.sampled_from(sorted(CHAIN_REDUCE)),
    st.integers(0, 70),
    SEEDS,
)
@settings(deadline=None, max_examples=300)
def test_chain(
    factor: str, operation: str, source: str, activation: Activation, write: int, reduce: str, n: int, seed: int
) -> None:
    bench = Bench(seed, plain=seed % 2 == 0)
    x, immediate, value = bench.words(64, n), *(int(word) for word in bits(special(seed, 2)))
    b = 203 if source == "word" else 200
    text = f"vchain b_from={source} imm=0x{immediate:08x} scale_from={factor} operation={operation} write={write}"
    text += f" function={activation.name.lower()} reduce={reduce} dst=1024 a=64 b={b} n={n} result=1500"
    bench.run(
        op("sli", rd=9, value=value - (value >> 31 << 32)),
        *assemble(f"{text} scale={'r9' if factor == 'value' else 311}").ops,
    )

    def floats(*words: int) -> np.ndarray:
        return np.array(words, np.uint32).view(np.float32)

    if factor != "none":
        x = golden.mul(x, bench.before[311:312] if factor == "word" else floats(value))
    right = {"vector": bench.before[200 : 200 + n], "word": bench.before[203:204], "immediate": floats(immediate)}
    if (apply := OPERATION[operation]) is not None:
        x = apply(x, right[source])
    if activation != Activation.NONE:
        x = golden.unary(Function(activation - 1), x)
    fold = CHAIN_REDUCE[reduce]
    expected = bench.before[1024:1501].copy()
    if write:
        expected[:n] = x
    if fold is not None:
        expected[-1] = fold(x)
    bench.expect(1024, expected)


def test_a_chain_may_lie_in_place_and_its_result_anywhere() -> None:
    bench = Bench(3)
    old = bench.before
    for a, b, result in ((64, 256, 70), (256, 64, 256), (64, 64, 2000)):
        bench.restore()
        bench.run(f"vchain operation=sub write=1 reduce=sum dst=64 a={a} b={b} n=40 result={result}")
        x = golden.sub(old[a : a + 40], old[b : b + 40])
        expected = old[64:2001].copy()
        expected[:40] = x
        expected[result - 64] = golden.tree_sum(x)
        bench.expect(64, expected)


@given(st.integers(0, 70), st.integers(-(2**19), 2**19 - 1), SEEDS)
@settings(deadline=None, max_examples=80)
def test_argmax(n: int, base: int, seed: int) -> None:
    bench = Bench(seed, plain=seed % 2 == 0)
    result = bench.run(f"vargmax dst=1002 a=64 n={n} base={base}")
    index, value, flags = golden.argmax(bench.before[64 : 64 + n])
    place = np.array([base + index], np.int32).view(np.float32)
    bench.expect(1002, np.concatenate([np.array([value], np.float32), place]))
    assert result.flags == ({flags: FlagEvent(0, 0)} if flags else {})


def test_vector_words_and_scalars() -> None:
    bench = Bench(5)
    bench.run(op("vread", rd=4, a=1001), op("vwrite", dst=77, b=Operand(4, 1)))
    value = int(bench.before.view(np.int32)[1001])
    assert bench.scalars()[4] == value
    bench.expect(77, np.array([scalar_reference("sadd", value, 1)], np.int32).view(np.float32))


def test_results_may_replace_operands() -> None:
    bench = Bench(3)
    old = bench.before
    for text, expected in [
        ("vadd dst=64 a=64 b=256 n=40", golden.add(old[64:104], old[256:296])),
        ("vsub dst=64 a=256 b=64 n=40", golden.sub(old[256:296], old[64:104])),
        ("vadd dst=64 a=64 b=64 n=40", golden.add(old[64:104], old[64:104])),
        ("vmov dst=64 b=64 n=40", old[64:104]),
        ("vunary function=relu dst=64 a=64 n=40", golden.unary(Function.RELU, old[64:104])),
    ]:
        bench.restore()
        bench.run(text)
        bench.expect(64, expected)


@pytest.mark.parametrize("word", [64, 71, 72, 103])
def test_one_word_is_read_before_anything_is_written(word: int) -> None:
    bench = Bench(3)
    old = bench.before
    for text, expected in [
        (f"vmul b_from=word dst=64 a=64 b={word} n=40", golden.mul(old[64:104], old[word])),
        (f"vsub b_from=word dst=64 a=256 b={word} n=40", golden.sub(old[256:296], old[word])),
        (f"vmov b_from=word dst=64 b={word} n=40", np.full(40, old[word])),
    ]:
        bench.restore()
        bench.run(text)
        bench.expect(64, expected)


# Memory -------------------------------------------------------------------------------------------------
@given(st.sampled_from(list(Format)), st.sampled_from([Region.PARAMS, Region.LOCAL, Region.IO]), SEEDS)
@settings(deadline=None, max_examples=80)
def test_load(element: Format, region: Region, seed: int) -> None:
    bench = Bench(seed)
    size = golden.raw_dtype(element).itemsize
    n, line, byte = seed % 50, seed % 7, size * (seed % 11)
    bench.run(f"load format={element.name.lower()} region={region.name.lower()} dst=128 line={line} byte={byte} n={n}")
    start = 64 * line + byte
    raw = bench.memory_before[region][start : start + n * size].view(golden.raw_dtype(element))
    bench.expect(128, golden.decode(raw, element))


@given(
    element=st.sampled_from(list(Format)),
    region=st.sampled_from([Region.KV, Region.IO]),
    counts=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    strides=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    seed=SEEDS,
)
@settings(deadline=None, max_examples=150)
def test_store(element: Format, region: Region, counts: tuple[int, int], strides: tuple[int, int], seed: int) -> None:
    bench = Bench(seed)
    dtype = golden.raw_dtype(element)
    outer_bytes, inner_bytes = (stride * dtype.itemsize for stride in strides)
    result = bench.run(
        f"store format={element.name.lower()} region={region.name.lower()} a=64 line=3 byte={dtype.itemsize}"
        f" outer={counts[0]} inner={counts[1]} outer_bytes={outer_bytes} inner_bytes={inner_bytes}"
    )
    raw, flags = golden.encode(bench.before[64 : 64 + counts[0] * counts[1]], element)
    expected = bench.memory_before[region].copy()
    for o in range(counts[0]):
        for i in range(counts[1]):
            at = 192 + dtype.itemsize + o * outer_bytes + i * inner_bytes
            expected[at : at + dtype.itemsize] = raw[o * counts[1] + i : o * counts[1] + i + 1].view(np.uint8)
    assert np.array_equal(bench.memory[region], expected)
    assert result.flags == ({flags: FlagEvent(0, 0)} if flags else {})
    bench.expect(0, bench.before[:0])


def test_scalar_memory_and_the_store_hook() -> None:
    bench = Bench(9)
    seen: list[tuple[int, int, int, int]] = []
    bench.run(
        op("sload", region=Region.PARAMS, rd=4, line=2, byte=12),
        op("sload", region=Region.PARAMS, rd=0, line=2, byte=12),
        op("sstore", region=Region.IO, line=1, byte=-4, value=Operand(4, 1)),
        on_store=lambda *event: seen.append(event),
    )
    word = int(bench.memory_before[Region.PARAMS][140:144].view(np.int32)[0])
    assert bench.scalars()[4] == word
    expected = bench.memory_before[Region.IO].copy()
    expected[60:64].view(np.int32)[0] = scalar_reference("sadd", word, 1)
    assert np.array_equal(bench.memory[Region.IO], expected)
    assert seen == [(0, 1, -4, scalar_reference("sadd", word, 1))]


# Matrix -------------------------------------------------------------------------------------------------
def matmul_reference(
    bench: Bench, matrix: np.ndarray, element: Format, values: dict[str, int]
) -> tuple[np.ndarray, NumericFlag]:
    """Registers after a matmul, by its pseudocode, from the golden dot product; and the flags."""
    field = {name: values.get(name, 0) for name in MATMUL_FIELDS}
    if field["n"] == 0:
        return bench.before.copy(), NumericFlag.NONE
    k, n, old = field["k"], field["n"], bench.before
    new, flags = old.copy(), NumericFlag.NONE
    raw = matrix.copy()
    if field["patch"] != Patch.NONE:
        at, source, column = field["patch_at"], field["patch_src"], field["patch"] == Patch.COLUMN
        stored, raised = golden.encode(old[source : source + (k if column else n)], element)
        used = field["outer"] * field["inner"] > 0 and at < (n if column else k)
        if used:
            raw[(slice(None), at) if column else at] = stored
            flags = raised
    weights = golden.decode(raw, element)
    maxima = []
    for o in range(field["outer"]):
        for i in range(field["inner"]):
            src = field["src"] + o * field["src_outer"] + i * field["src_inner"]
            y = field["dst"] + o * field["dst_outer"] + i * field["dst_inner"]
            start = old[None, y : y + n] if field["accumulate"] else None
            result, raised = golden.dot(
                weights, old[None, src : src + k], bench.machine.matrix.lanes, start, fmt=element
            )
            flags |= raised
            row = result[0]
            if field["scaling"]:
                wide = n if field["scaling"] == Scale.COLUMN else 1
                row = golden.mul(row, old[field["scale"] : field["scale"] + wide])
            if field["add_bias"]:
                row = golden.add(row, old[field["bias"] : field["bias"] + n])
            if field["masked"]:
                step = o * field["mask_outer"] + i * field["mask_inner"]
                inside = (np.arange(n) >= field["lo"] + step) & (np.arange(n) < field["hi"] + step)
                row = np.where(inside, row, np.finfo(np.float32).min)
            if field["activation"]:
                row = golden.unary(Function(field["activation"] - 1), row)
            new[y : y + n] = row
            maxima.append(golden.reduce_max(row))
    if field["row_max"]:
        new[field["maximum"] : field["maximum"] + len(maxima)] = maxima
    return new, flags


MATMUL_FIELDS = [item.name for item in op("matmul").kind.fields]


@st.composite
def matmuls(draw: st.DrawFn) -> tuple[Format, dict[str, int]]:
    """A legal matmul on registers laid out without overlap."""
    k, n = draw(st.sampled_from([1, 5, 8, 13, 24])), draw(st.sampled_from([0, 1, 3, 64, 67, 130]))
    outer, inner = draw(st.sampled_from([(1, 1), (1, 1), (2, 3), (3, 1), (0, 2), (1, 2)]))
    element = draw(st.sampled_from(list(Format)))
    flags = {
        name: draw(st.integers(0, 1))
        for name in ("full", "accumulate", "add_bias", "masked", "row_max", "mask_outer", "mask_inner")
    }
    values = {
        "format": int(element),
        "patch": draw(st.sampled_from(list(Patch))),
        "scaling": draw(st.sampled_from(list(Scale))),
        "activation": draw(st.sampled_from(list(Activation))),
        "dst": 4096, "src": 512, "k": k, "n": n, "line": draw(st.integers(0, 5)),
        "outer": outer, "inner": inner, "src_outer": 128, "src_inner": 32, "dst_outer": 1024, "dst_inner": 256,
        "scale": 8192, "bias": 8448, "lo": draw(st.integers(-5, 20)), "hi": draw(st.integers(-5, 140)),
        "maximum": 9024, "patch_src": 9216,
        "patch_at": draw(st.sampled_from([0, 1, 4, 7, 12, 66, 200])),
    }  # fmt: skip
    return element, values | flags


@given(matmuls(), st.sampled_from([Region.WEIGHTS, Region.KV]), st.booleans(), SEEDS)
@settings(deadline=None, max_examples=150)
def test_matmul(case: tuple[Format, dict[str, int]], region: Region, plain: bool, seed: int) -> None:
    element, values = case
    bench = Bench(seed, plain=plain)
    dtype, shape = golden.raw_dtype(element), (values["k"], values["n"])
    matrix = np.random.default_rng(seed).integers(0, 256, (*shape, dtype.itemsize), np.uint8)
    matrix = matrix.view(dtype)[..., 0]
    if plain:
        matrix = golden.encode(special(seed, matrix.size, plain=True), element)[0].reshape(shape)
    packed = pack(matrix, bench.machine, dtype.itemsize, bool(values["full"]))
    bench.memory[region][64 * values["line"] : 64 * values["line"] + packed.size] = packed
    expected, flags = matmul_reference(bench, matrix, element, values)
    result = bench.run(op("matmul", region=region, **values))
    bench.expect(0, expected)
    assert {int(flag) for flag in result.flags} == {bit for bit in (1, 2, 4) if flags & bit}


def test_matmul_on_wider_rows_and_lanes() -> None:
    machine = TINY.override({"hbm.channels": "8", "hbm.fifo_bytes": "65536", "matrix.lanes": "16"})
    bench = Bench(2, machine, plain=True)
    values = {"dst": 4096, "src": 512, "k": 40, "n": 77, "line": 8, "outer": 1, "inner": 1}
    matrix = golden.encode(special(4, 40 * 77, plain=True), Format.FP16)[0].reshape(40, 77)
    packed = pack(matrix, machine, 2)
    bench.memory[Region.WEIGHTS][512 : 512 + packed.size] = packed
    expected, _ = matmul_reference(bench, matrix, Format.FP16, values)
    bench.run(op("matmul", **values))
    bench.expect(0, expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"src": 4096 + 224},  # inputs right behind the results
        {"dst_outer": 24, "dst_inner": 72, "accumulate": 1},  # rows of the outer count inside those of the inner
        {"src_outer": 0, "src_inner": 8, "maximum": 4080},  # inputs over one another, maxima right before the results
        {"scale": 512, "bias": 520, "patch_src": 536, "scaling": int(Scale.COLUMN), "add_bias": 1, "patch": 2},
        {"outer": 1, "inner": 6, "dst_outer": 0},  # a count of one needs no stride
    ],
)
def test_matmul_operands_side_by_side(changes: dict[str, int]) -> None:
    bench = Bench(6, plain=True)
    values = {
        "dst": 4096, "src": 512, "k": 24, "n": 20, "outer": 3, "inner": 2, "src_outer": 48, "src_inner": 24,
        "dst_outer": 64, "dst_inner": 32, "row_max": 1, "maximum": 9024, **changes,
    }  # fmt: skip
    matrix = golden.encode(special(4, 24 * 20, plain=True), Format.BF16)[0].reshape(24, 20)
    packed = pack(matrix, bench.machine, 2)
    bench.memory[Region.WEIGHTS][: packed.size] = packed
    expected, _ = matmul_reference(bench, matrix, Format.BF16, values)
    bench.run(op("matmul", format=Format.BF16, **values))
    bench.expect(0, expected)


def test_flags_keep_the_first_instruction() -> None:
    bench = Bench(plain=True)
    bench.registers[64] = np.float32(1e30)
    bench.registers[72] = np.float32("nan")
    store = op("store", region=Region.KV, format=Format.FP16, a=64, outer=1, inner=1)
    result = bench.run(op("fence"), store, store, op("vargmax", dst=90, a=72, n=8))
    assert result.flags == {
        NumericFlag.STORE_SATURATED: FlagEvent(1, 0),
        NumericFlag.ARGMAX_NAN: FlagEvent(3, 0),
    }
    assert bench.run(op("fence")).flags == {}


# Caches -------------------------------------------------------------------------------------------------
def key_store(position: int, head: int) -> Op:
    """Write one key to its column of a cache of positions."""
    offset = int(element_offset(0, position, head, position + 1, TINY, 2, full=True))
    lanes = TINY.matrix.lanes
    return op(
        "store", region=Region.KV, format=Format.FP16, a=64, byte=offset, outer=head // lanes, inner=lanes,
        outer_bytes=TINY.column_block * lanes * 2, inner_bytes=2,
    )  # fmt: skip


def value_store(position: int, head: int, line: int) -> Op:
    """Write one value to its lane of every column of a cache."""
    offset = int(element_offset(position, 0, position + 1, head, TINY, 2))
    return op(
        "store", region=Region.KV, format=Format.FP16, a=64, line=line, byte=offset, outer=1, inner=head,
        inner_bytes=TINY.matrix.lanes * 2,
    )  # fmt: skip


def test_a_cache_written_by_stores_reads_like_a_packed_matrix_and_a_patch_like_a_store() -> None:
    head, positions, line = 16, 70, 200
    generator = np.random.default_rng(7)
    keys = generator.standard_normal((positions, head)).astype(np.float32)
    query = generator.standard_normal(head).astype(np.float32)
    weights = generator.standard_normal(positions).astype(np.float32)
    bench = Bench(1)
    for position in range(positions):
        bench.registers[64 : 64 + head] = keys[position]
        bench.run(key_store(position, head), value_store(position, head, line))
    stored = golden.encode(keys, Format.FP16)[0]
    cache = bench.memory[Region.KV]
    k_offsets = element_offset(np.arange(head)[:, None], np.arange(positions), head, positions, TINY, 2, full=True)
    assert np.array_equal(cache.view(np.uint16)[k_offsets // 2], stored.T)
    for length in (1, 64, 65, positions):
        bench.registers[512 : 512 + head] = query
        bench.registers[1024 : 1024 + length] = weights[:length]
        bench.registers[64 : 64 + head] = keys[length - 1]
        scores = op("matmul", region=Region.KV, full=1, dst=2048, src=512, k=head, n=length, outer=1, inner=1)
        mixed = op("matmul", region=Region.KV, line=line, dst=3072, src=1024, k=length, n=head, outer=1, inner=1)
        bench.run(scores, mixed)
        got = bench.registers[2048 : 2048 + length].copy(), bench.registers[3072 : 3072 + head].copy()
        halves = golden.decode(stored[:length], Format.FP16)
        expected = golden.dot(np.ascontiguousarray(halves.T), query[None], 8, fmt=Format.FP16)[0][0]
        assert np.array_equal(bits(got[0]), bits(expected))
        expected = golden.dot(halves, weights[None, :length], 8, fmt=Format.FP16)[0][0]
        assert np.array_equal(bits(got[1]), bits(expected))
        # The last position from registers gives the same, whatever memory holds there.
        kept = cache.copy()
        k_place = k_offsets[:, length - 1] // 2
        cache.view(np.uint16)[k_place] = 0x7E00
        v_place = element_offset(length - 1, np.arange(head), length, head, TINY, 2) // 2 + line * 32
        cache.view(np.uint16)[v_place] = 0xFC00
        patch = {"patch_src": Operand(0, 64), "patch_at": Operand(0, length - 1)}
        bench.run(
            Op(scores.kind, {**scores.values, **patch, "patch": Patch.COLUMN}),
            Op(mixed.kind, {**mixed.values, **patch, "patch": Patch.LANE}),
        )
        assert np.array_equal(bits(bench.registers[2048 : 2048 + length]), bits(got[0]))
        assert np.array_equal(bits(bench.registers[3072 : 3072 + head]), bits(got[1]))
        cache[:] = kept


def test_attention_program() -> None:
    """One head over 21 positions, two queries at once: causal scores, softmax in place, mix, divide.

    The mask's lower end moves with its upper end, so it starts low enough to keep column 0 for every row.
    """
    head, length = 16, 21
    generator = np.random.default_rng(11)
    keys, values = generator.standard_normal((2, length, head)).astype(np.float32)
    queries = generator.standard_normal((2, head)).astype(np.float32)
    bench = Bench(8)
    packed_keys = pack(golden.encode(keys.T, Format.FP16)[0], TINY, 2, full=True)
    packed_values = pack(golden.encode(values, Format.FP16)[0], TINY, 2)
    bench.memory[Region.KV][: packed_keys.size] = packed_keys
    bench.memory[Region.KV][64 * 400 : 64 * 400 + packed_values.size] = packed_values
    bench.registers[512:528], bench.registers[544:560] = queries
    scale = float_bits(0.25)
    bench.run(
        f"""
            vmov dst=900 b_from=immediate imm=0x{scale:08x} n=1
            sli rd=r7 value={length}
            matmul region=kv full=1 scaling=word masked=1 mask_outer=1 row_max=1 dst=1024 src=512 k={head} n=r7 \
                outer=2 inner=1 src_outer=32 dst_outer=64 scale=900 lo=-1 hi=r7-1 maximum=904
            sli rd=r8 value=1024
            sli rd=r9 value=904
        row:
            vsub b_from=word dst=r8 a=r8 b=r9 n=r7
            vunary function=exp dst=r8 a=r8 n=r7
            vsum dst=r9+10 a=r8 n=r7
            sadd rd=r8 a=r8+64
            sadd rd=r9 a=r9+1
            blt to=row a=r9 b=906
            matmul region=kv line=400 dst=2048 src=1024 k=r7 n={head} outer=2 inner=1 src_outer=64 dst_outer=32
            vunary function=recip dst=920 a=914 n=1
            vunary function=recip dst=921 a=915 n=1
            vmul b_from=word dst=2048 a=2048 b=920 n={head}
            vmul b_from=word dst=2080 a=2080 b=921 n={head}
        """
    )
    k16, v16 = keys.astype(np.float16).astype(float), values.astype(np.float16).astype(float)
    for row, at in enumerate((2048, 2080)):
        visible = length - 1 + row
        scores = k16[:visible] @ queries[row].astype(float) / 4
        weights = np.exp(scores - scores.max())
        exact = weights @ v16[:visible] / weights.sum()
        assert np.abs(bench.registers[at : at + head] - exact).max() < 2e-3
