# amaranth: UnusedElaboratable=no
"""The unary functions in hardware against the golden model, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from typebar.hw.arith.unary import LEADING_BITS, UnaryEvaluator
from typebar.isa.errors import TypebarError
from typebar.isa.instructions import Format
from typebar.isa.machine import Machine
from typebar.isa.numerics import Function, bits_of, decode, from_bits, unary
from typebar.isa.numerics.unary import ROM
from typebar.isa.numerics.unary_errors import sweep_inputs
from typebar.isa.numerics.unary_rom import OFFSET_BITS
from typebar.tests.hw.arith_bench import Bench, survivors

U32Array = NDArray[np.uint32]

LATENCIES = (2, Machine.load("u280").vector.latency)
EDGES = np.array([4.0, 8.0, 9.0, 18.0, 64.0, 87.0, 88.7, 103.9, 128.0, 2.0**126, 2.0**127, 2.0**-126], np.float32)
"""Where a function changes its way, overflows or vanishes."""


def fp16_inputs() -> U32Array:
    return bits_of(decode(np.arange(1 << 16, dtype=np.uint16), Format.FP16))


def random_inputs(rng: np.random.Generator, n: int) -> U32Array:
    """Any bits, moderate values, and neighbours of the edges."""
    bits = rng.integers(0, 1 << 32, n, dtype=np.uint32)
    moderate = bits & 0x807FFFFF | rng.integers(95, 136, n).astype(np.uint32) << 23
    near = bits_of(rng.choice(EDGES, n)) + rng.integers(-4, 5, n).astype(np.uint32) ^ bits & 0x80000000
    kind = rng.integers(0, 4, n)
    return np.choose(kind, [bits, moderate, moderate, near]).astype(np.uint32)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    units = {f"unary{latency}": UnaryEvaluator(latency, lanes=2) for latency in LATENCIES}
    units["broken"] = UnaryEvaluator(11, lanes=2)
    return Bench(units, tmp_path_factory.mktemp("unary"), ("broken",))


def check(bench: Bench, function: Function, bits: U32Array) -> None:
    """The second lane gets the values in reverse order."""
    expected = bits_of(unary(function, from_bits(bits)))
    both = np.stack([bits, bits[::-1]], axis=1)
    results = bench.run(x=both, select=np.full(len(bits), function, np.uint32))
    for name, outputs in results.items():
        assert np.array_equal(outputs["result"], np.stack([expected, expected[::-1]], axis=1)), name


@pytest.mark.parametrize("function", list(Function))
def test_every_fp16_input(bench: Bench, function: Function) -> None:
    check(bench, function, fp16_inputs())


@pytest.mark.parametrize("function", list(Function))
def test_float32_inputs(bench: Bench, function: Function) -> None:
    check(bench, function, random_inputs(np.random.default_rng(int(function)), 30_000))


@pytest.mark.long
@pytest.mark.parametrize("function", list(Function))
def test_float32_sweep(bench: Bench, function: Function) -> None:
    check(bench, function, bits_of(sweep_inputs()))


def test_functions_in_turn(bench: Bench) -> None:
    """A new function in every cycle."""
    rng = np.random.default_rng(1)
    bits = random_inputs(rng, 5_000)
    functions = rng.integers(0, len(Function), len(bits), dtype=np.uint32)
    expected = np.zeros_like(bits)
    for function in Function:
        mine = functions == function
        expected[mine] = bits_of(unary(function, from_bits(bits[mine])))
    for name, outputs in bench.run(x=np.stack([bits, bits], axis=1), select=functions).items():
        assert np.array_equal(outputs["result"][:, 1], expected), name


def test_planted_errors_are_caught(bench: Bench) -> None:
    """Inverting any one register bit shows, but for the rounding bit of an argument of exp from 128 on."""
    rng = np.random.default_rng(2)
    bits = random_inputs(rng, 8_000)
    functions = rng.integers(0, len(Function), len(bits), dtype=np.uint32)
    assert len(bench.sites["broken"]) > 500
    assert survivors(bench, "broken", x=np.stack([bits, bits], axis=1), select=functions) == ["product_2[0]"] * 2


def test_curve_values_leave_few_leading_zeros() -> None:
    """What the normalisation of the product relies on, over every word at 2^11 offsets, both ends included."""
    c0, c1, c2, c3, _ = ROM.T
    half = 1 << (OFFSET_BITS - 2)
    smallest = np.full(len(ROM), 1 << 62)
    end = 1 << (OFFSET_BITS - 1)
    for t in [*range(-end, end, 1 << 7), end - 1]:
        s = c2 + ((c3 * t + half) >> (OFFSET_BITS - 1))
        s = c1 + ((s * t + half) >> (OFFSET_BITS - 1))
        smallest = np.minimum(smallest, c0 + ((s * t + half) >> (OFFSET_BITS - 1)))
    assert smallest.min() >= 1 << (32 - LEADING_BITS - 1)


def test_a_latency_of_one_is_refused() -> None:
    with pytest.raises(TypebarError, match="at least 2 cycles"):
        UnaryEvaluator(1)
