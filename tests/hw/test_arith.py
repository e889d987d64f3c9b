"""The float32 units and conversions against the golden numerics, bit for bit, at several latencies."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from typebar.hw.arith.add import Adder
from typebar.hw.arith.compare import Comparator
from typebar.hw.arith.convert import (
    Float32FromMemory,
    MemoryFromFloat32,
    OperandFromFloat32,
    OperandFromMemory,
    OperandFromShort,
)
from typebar.hw.arith.multiply import Multiplier
from typebar.hw.arith.pipeline import depths
from typebar.isa.errors import TypebarError
from typebar.isa.instructions import Format
from typebar.isa.numerics import (
    NumericFlag,
    add,
    bits_of,
    canonical,
    decode,
    encode,
    from_bits,
    is_nan,
    maximum,
    mul,
    raw_dtype,
    sub,
    to_operand,
)
from typebar.tests.hw.arith_bench import Bench, operand_bits, survivors, weight_bits

U32Array = NDArray[np.uint32]

BLOCK = 1_000_000
COUNTS = [200_000, pytest.param(10_000_000, marks=pytest.mark.long)]
EXPONENTS = (
    0,
    1,
    2,
    24,
    25,
    76,
    77,
    102,
    103,
    112,
    113,
    118,
    119,
    125,
    126,
    127,
    128,
    133,
    134,
    142,
    143,
    150,
    253,
    254,
    255,
)
FRACTIONS = (
    0,
    1,
    0xFFF,
    0x1000,
    0x1001,
    0x3FFFFF,
    0x400000,
    0x400001,
    0x7FE000,
    0x7FEFFF,
    0x7FF000,
    0x7FFFFE,
    0x7FFFFF,
)
CORNERS = np.array([s << 31 | e << 23 | f for s, e, f in itertools.product((0, 1), EXPONENTS, FRACTIONS)], np.uint32)
PLANTED = ("adder", "multiplier", "comparator", "from_float32", "from_memory", "from_short", "load", "store")


def random_bits(rng: np.random.Generator, n: int) -> U32Array:
    return rng.integers(0, 1 << 32, n, dtype=np.uint32)


def pairs(rng: np.random.Generator, n: int) -> tuple[U32Array, U32Array]:
    """Corner cases with one another and with anything, cancellation, near exponents, products near the limits."""
    a, b = random_bits(rng, n), random_bits(rng, n)
    kind = rng.integers(0, 6, n)
    b = np.where(kind == 1, a ^ 0x80000000 ^ rng.integers(0, 1 << 6, n, dtype=np.uint32), b)
    exponent = (a >> 23 & 255) + rng.integers(-27, 28, n)
    b = np.where(kind == 2, b & 0x807FFFFF | (exponent & 255).astype(np.uint32) << 23, b)
    product = 127 + rng.choice([-127, -126, 127, 128], n) - (a >> 23 & 255).astype(np.int64) + 127
    b = np.where(kind == 3, b & 0x807FFFFF | (product & 255).astype(np.uint32) << 23, b)
    a = np.where((kind == 4) | (kind == 5), rng.choice(CORNERS, n), a)
    b = np.where(kind == 5, rng.choice(CORNERS, n), b)
    return a.astype(np.uint32), b.astype(np.uint32)


def same_as_numpy(a: U32Array, b: U32Array, result: U32Array) -> bool:
    """NumPy's own float32 sum, where neither it nor an input is subnormal or NaN."""
    with np.errstate(all="ignore"):
        plain = bits_of(from_bits(a) + from_bits(b))
    field = [bits & 0x7F800000 for bits in (a, b, plain)]
    usual = (field[0] != 0) & (field[1] != 0) & (field[2] != 0) & ~is_nan(from_bits(plain))
    return bool(usual.sum() > len(a) // 2) and np.array_equal(plain[usual], result[usual])


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    units = {}
    for latency in (1, 4, 9):
        units |= {f"adder{latency}": Adder(latency), f"multiplier{latency}": Multiplier(latency)}
        units |= {f"comparator{latency}": Comparator(latency)}
    for latency in (1, 2):
        units |= {
            f"from_float32{latency}": OperandFromFloat32(latency),
            f"from_memory{latency}": OperandFromMemory(latency),
            f"from_short{latency}": OperandFromShort(latency),
            f"load{latency}": Float32FromMemory(latency),
            f"store{latency}": MemoryFromFloat32(latency),
        }
    broken = [Adder(6), Multiplier(5), Comparator(2), OperandFromFloat32(2), OperandFromMemory(2), OperandFromShort(2)]
    broken += [Float32FromMemory(2), MemoryFromFloat32(2)]
    units |= dict(zip(PLANTED, broken, strict=True))
    return Bench(units, tmp_path_factory.mktemp("arith"), PLANTED)


@pytest.mark.parametrize("count", COUNTS)
def test_float32(bench: Bench, count: int) -> None:
    rng = np.random.default_rng(count)
    for _ in range(-(-count // BLOCK)):
        a, b = pairs(rng, min(count, BLOCK))
        subtract = rng.integers(0, 2, len(a), dtype=np.uint32)
        x, y = from_bits(a), from_bits(b)
        total = bits_of(np.where(subtract == 1, sub(x, y), add(x, y)))
        assert same_as_numpy(a, b ^ subtract << 31, total)
        product, larger = bits_of(mul(x, y)), bits_of(maximum(x, y))
        greater = canonical(x) > canonical(y)
        results = bench.run(a=a, b=b, subtract=subtract)
        for name, outputs in results.items():
            if name.startswith("adder"):
                assert np.array_equal(outputs["result"], total), name
            elif name.startswith("multiplier"):
                assert np.array_equal(outputs["result"], product), name
            elif name.startswith("comparator"):
                assert np.array_equal(outputs["maximum"], larger), name
                assert np.array_equal(outputs["greater"], greater), name


def expected_operand(
    x: NDArray[np.float32], present: U32Array, fmt: Format | None = None
) -> tuple[U32Array, U32Array, U32Array]:
    """Operand bits, 0 for zero, overflow and NaN, lane by lane; those of a weight if `x` lies in memory as `fmt`."""
    operand, _ = to_operand(x)
    nan = is_nan(x)
    with np.errstate(invalid="ignore"):
        overflow = ~nan & (np.abs(x.astype(np.float64)) >= (2 - 2.0**-11) * 2.0**127)
    assert overflow.any() == bool(to_operand(x)[1] & NumericFlag.OPERAND_OVERFLOW)
    there = present == 1
    bits = operand_bits(operand) if fmt is None else weight_bits(operand, fmt)
    return np.where(there, bits, 0), overflow & there, nan & there


def check_operand(outputs: dict[str, U32Array], expected: tuple[U32Array, U32Array, U32Array]) -> None:
    bits, overflow, nan = expected
    assert np.array_equal(outputs["nan"], nan)
    assert np.array_equal(outputs["overflow"], overflow)
    given, place = (outputs["operand"], 19) if "operand" in outputs else (outputs["weight"], 20)
    operand = np.where(given >> place & 1, given, 0)
    assert np.array_equal(operand[~nan], bits[~nan])


def stored_flags(x: NDArray[np.float32], fmt: Format) -> NDArray[np.bool_]:
    """`STORE_SATURATED` of each element: the golden model tells only whether any was out of range."""
    with np.errstate(invalid="ignore"):
        value = canonical(x).astype(np.float64)
        magnitude = np.abs(value)
        if fmt is Format.FP16:
            return magnitude >= 65520
        if fmt is Format.BF16:
            return magnitude >= (2 - 2.0**-8) * 2.0**127
        if fmt is Format.INT8:
            return np.isnan(value) | (value >= 127.5) | (value < -128.5)
    return np.zeros(len(x), np.bool_)


@pytest.mark.parametrize("count", COUNTS)
def test_from_registers(bench: Bench, count: int) -> None:
    """float32 to operands and to memory formats, magnitudes near every format's limits."""
    rng = np.random.default_rng(count + 1)
    for _ in range(-(-count // BLOCK)):
        n = min(count, BLOCK)
        bits = random_bits(rng, n)
        near = rng.choice(CORNERS, n) + rng.integers(-2, 3, n).astype(np.uint32)
        middle = bits & 0x807FFFFF | rng.integers(100, 145, n).astype(np.uint32) << 23
        bits = np.choose(rng.integers(0, 3, n), [bits, near, middle]).astype(np.uint32)
        x, present = from_bits(bits), rng.integers(0, 8, n, dtype=np.uint32).clip(0, 1)
        for fmt in Format:
            raw, flags = encode(x, fmt)
            saturated = stored_flags(x, fmt)
            assert saturated.any() == bool(flags & NumericFlag.STORE_SATURATED)
            unsigned = raw.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[raw.itemsize]).astype(np.uint32)
            results = bench.run(x=bits, present=present, format=np.full(n, fmt, np.uint32))
            for name in ("store1", "store2", "store"):
                assert np.array_equal(results[name]["raw"], unsigned), (name, fmt)
                assert np.array_equal(results[name]["saturated"], saturated), (name, fmt)
        for name in ("from_float321", "from_float322", "from_float32"):
            check_operand(results[name], expected_operand(x, present))


def placed(rng: np.random.Generator, elements: U32Array, fmt: Format) -> U32Array:
    """Elements where the converters to operands take them: an int8 at bit 3, a bf16 in the upper half; noise beside."""
    at, width = {Format.FP16: (0, 16), Format.BF16: (16, 16), Format.INT8: (3, 8), Format.FP32: (0, 32)}[fmt]
    mask = np.uint32(((1 << width) - 1) << at)
    return (elements << np.uint32(at)) & mask | random_bits(rng, len(elements)) & ~mask


@pytest.mark.parametrize("fmt", list(Format))
def test_from_memory(bench: Bench, fmt: Format) -> None:
    """Every element of the short formats, whatever the bits above it hold; float32 at random."""
    rng = np.random.default_rng(int(fmt))
    elements = np.arange(1 << 16, dtype=np.uint32)
    if fmt is Format.FP32:
        elements = np.concatenate([CORNERS, random_bits(rng, 1 << 17)])
    short = {1: np.uint8, 2: np.uint16, 4: np.uint32}[raw_dtype(fmt).itemsize]
    x = decode(elements.astype(short).view(raw_dtype(fmt)), fmt)
    above = 0 if fmt is Format.FP32 else random_bits(rng, len(elements)) << 16
    word, present = placed(rng, elements, fmt), np.ones(len(elements), np.uint32)
    results = bench.run(
        raw=elements | above,
        word=word,
        element=word & 0xFFFF if fmt is Format.INT8 else elements & 0xFFFF,
        present=present,
        format=np.full(len(elements), fmt, np.uint32),
    )
    assert not np.array_equal(operand_bits(x, fmt), operand_bits(x, Format.FP32)) or fmt in (Format.BF16, Format.FP32)
    for name in ("load1", "load2", "load"):
        assert np.array_equal(results[name]["result"], bits_of(x)), name
    for name in ("from_memory1", "from_memory2", "from_memory"):
        check_operand(results[name], expected_operand(x, present, fmt))
    for name in ("from_short1", "from_short2", "from_short"):
        if fmt is not Format.FP32:
            check_operand(results[name], expected_operand(x, present, fmt))


@pytest.mark.parametrize("name", PLANTED)
def test_planted_errors_are_caught(bench: Bench, name: str) -> None:
    """Inverting one bit of any wire shows at some output."""
    rng = np.random.default_rng(7)
    a, b = pairs(rng, 4_000)
    n = len(a)
    inputs = {"a": a, "b": b, "x": a, "raw": a, "word": a, "element": a & 0xFFFF}
    inputs["subtract"] = rng.integers(0, 2, n, dtype=np.uint32)
    inputs |= {"present": rng.integers(0, 2, n, dtype=np.uint32), "format": rng.integers(0, 4, n, dtype=np.uint32)}
    assert len(bench.sites[name]) >= 10
    assert survivors(bench, name, **inputs) == []


def test_a_pipeline_without_registers_is_refused() -> None:
    with pytest.raises(TypebarError, match="at least 1 cycle"):
        depths(cuts=6, latency=0)


def test_registers_are_spread() -> None:
    """As many registers as the latency says, one at the end at least, none of two places differing by more than one."""
    for cuts, latency in itertools.product(range(1, 12), range(1, 30)):
        registers = depths(cuts, latency)
        assert sum(registers) == latency and registers[-1] >= 1 and max(registers) - min(registers) <= 1
