"""The unary functions: special cases, measured errors, the ROM against its generator, widths."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from typebar.isa.errors import TypebarError
from typebar.isa.numerics import Function, bits_of, from_bits, unary, unary_generator, unary_rom, unary_table
from typebar.isa.numerics.unary import LOG2_E, ROM, _round
from typebar.isa.numerics.unary_errors import (
    REFERENCES,
    UnaryError,
    format_report,
    fp16_inputs,
    measure,
    sweep_inputs,
)

INF, NAN = np.float32(np.inf), np.float32(np.nan)
Z, M = np.float32(0.0), np.float32(-0.0)
SPECIALS = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 2.0**-149, -(2.0**-149)], np.float32)
EXPECTED = {
    Function.EXP: [1, 1, INF, Z, NAN, 1, 1],
    Function.RECIP: [INF, -INF, Z, M, NAN, INF, -INF],
    Function.RSQRT: [INF, INF, Z, NAN, NAN, INF, INF],
    Function.TANH: [Z, M, 1, -1, NAN, Z, M],
    Function.SIGMOID: [0.5, 0.5, 1, Z, NAN, 0.5, 0.5],
    Function.GELU_ERF: [Z, M, INF, M, NAN, Z, M],
    Function.GELU_TANH: [Z, M, INF, M, NAN, Z, M],
    Function.SILU: [Z, M, INF, M, NAN, Z, M],
    Function.RELU: [Z, Z, INF, Z, NAN, Z, Z],
}
ULP_LIMIT = {
    Function.EXP: 1.0,
    Function.RECIP: 0.75,
    Function.RSQRT: 0.75,
    Function.TANH: 2.0,
    Function.SIGMOID: 2.5,
    Function.SILU: 2.5,
}
"""Limits for every input with a normal result; the documentation quotes them."""


@pytest.mark.parametrize("function", list(Function))
def test_special_cases(function: Function) -> None:
    expected = np.array(EXPECTED[function], np.float32)
    expected[np.isnan(expected)] = from_bits(np.array([0x7FC00000], np.uint32))[0]
    assert np.array_equal(bits_of(unary(function, SPECIALS)), bits_of(expected))
    other_nan = from_bits(np.array([0xFF800001, 0x7FFFFFFF], np.uint32))
    assert set(bits_of(unary(function, other_nan)).tolist()) == {0x7FC00000}


@pytest.mark.parametrize("inputs", ["fp16", "sweep"])
@pytest.mark.parametrize("function", list(REFERENCES))
def test_errors_stay_within_the_documented_limits(function: Function, inputs: str) -> None:
    error = measure(function, fp16_inputs() if inputs == "fp16" else sweep_inputs()[::3], inputs)
    assert error.relative < 1e-6
    assert error.ulp >= 0.49, "a measurement below half an ULP over so many inputs measures nothing"
    if function in ULP_LIMIT:
        assert error.ulp < ULP_LIMIT[function]
    else:  # GELU: results below 2^-24 in magnitude may be far off, or -0, relatively
        assert error.ulp_above_floor < 11


def test_powers_of_two_are_exact() -> None:
    powers = np.ldexp(np.float32(1), np.arange(-126, 127)).astype(np.float32)
    for sign in (1, -1):
        assert np.array_equal(unary(Function.RECIP, sign * powers), sign / powers)
    even = powers[::2]
    assert np.array_equal(unary(Function.RSQRT, even), (1 / np.sqrt(even.astype(np.float64))).astype(np.float32))
    assert np.array_equal(unary(Function.EXP, np.zeros(3, np.float32)), np.ones(3))


def test_exp_overflows_and_underflows_where_it_should() -> None:
    x = np.array([88.72283, 88.72284, -87.33654, -87.33655, 3e38, -3e38], np.float32)
    y = unary(Function.EXP, x)
    assert np.isfinite(y[0]) and y[1] == np.inf and y[4] == np.inf
    assert y[2] >= np.float32(2.0**-126) and bits_of(y[3:4])[0] == 0 and bits_of(y[5:])[0] == 0


def test_reciprocals_below_the_normal_numbers_are_zeros_of_their_sign() -> None:
    x = from_bits(np.array([0x7E800000, 0x7E800001, 0xFE800001, 0x7F7FFFFF], np.uint32))
    assert bits_of(unary(Function.RECIP, x)).tolist() == [0x00800000, 0, 0x80000000, 0]


def test_tails_keep_their_relative_precision() -> None:
    x = np.array([-17.99, -18.0, -40.0, -86.0], np.float32)
    for function in (Function.SIGMOID, Function.SILU):
        exact = REFERENCES[function](x.astype(np.longdouble))
        assert np.all(np.abs(unary(function, x) - exact) < 2.0**-22 * np.abs(exact))
    x = np.array([9.0, 100.0, 3e38], np.float32)
    assert np.array_equal(unary(Function.TANH, x), np.ones(3))
    for function in (Function.GELU_ERF, Function.GELU_TANH, Function.SILU):
        assert np.array_equal(unary(function, x[1:]), x[1:])


def test_relu_is_the_maximum_with_zero() -> None:
    x = np.array([-3.5, 2.25, -np.inf], np.float32)
    assert np.array_equal(bits_of(unary(Function.RELU, x)), bits_of(np.array([0, 2.25, 0], np.float32)))


def test_unknown_function_is_refused() -> None:
    with pytest.raises(TypebarError, match="unary function must be one of"):
        unary(99, np.zeros(1, np.float32))  # type: ignore[arg-type]


def test_rom_is_what_the_generator_writes() -> None:
    source = unary_generator.source_text(unary_generator.generate())
    assert Path(unary_table.__file__).read_text(encoding="utf-8") == source


def test_rom_words_round_trip_and_regions_tile_the_rom() -> None:
    for word in [(1, -1, -(2**24), 2**20 - 1, 63), (2**29 - 1, 2**26 - 1, 0, -(2**20), 0)]:
        assert unary_rom.unpack_word(unary_rom.pack_word(word)) == word
    with pytest.raises(ValueError, match="do not fit"):
        unary_rom.pack_word((1 << 29, 0, 0, 0, 0))
    assert sum(field.bits for field in unary_rom.FIELDS) == unary_rom.WORD_BITS
    regions = sorted(unary_rom.REGIONS.values(), key=lambda region: region.base)
    ends = [0, *(region.base + region.segments for region in regions)]
    assert [region.base for region in regions] == ends[:-1] and ends[-1] == unary_rom.ROM_WORDS == len(ROM)


def test_horner_sums_fit_the_stated_widths() -> None:
    half, extremes = 1 << 16, range(-(1 << 17), 1 << 17, (1 << 18) // 64 - 1)
    c0, c1, c2, c3, _ = ROM.T
    for t in itertools.chain(extremes, [(1 << 17) - 1]):
        s = c2 + ((c3 * t + half) >> 17)
        assert np.abs(s).max() < 1 << 26
        s = c1 + ((s * t + half) >> 17)
        assert np.abs(s).max() < 1 << 26
        p = c0 + ((s * t + half) >> 17)
        assert p.min() > 0 and p.max() < 1 << 30
    assert LOG2_E < 1 << 34 and round(np.longdouble(2) ** 33 / np.log(np.longdouble(2))) == LOG2_E


def test_results_are_rounded_once_to_nearest_even() -> None:
    rng = np.random.default_rng(2)
    ties = (rng.integers(1 << 23, 1 << 24, 2000) << 1 | 1) << rng.integers(0, 28, 2000)
    p = np.concatenate([ties, ties + 1, ties - 1, rng.integers(1, 1 << 53, 2000), np.arange(1, 70), [0, 2**24 - 1]])
    for power in (-52, -140, -179, 80):
        exact = np.ldexp(p.astype(np.float64), power)  # p has at most 53 bits
        with np.errstate(over="ignore"):
            expected = np.where(exact < 2.0**-126, 0, exact).astype(np.float32)
        assert np.array_equal(_round(p, np.full_like(p, power)), bits_of(expected))


def test_report_prints_a_line_for_each_function() -> None:
    lines = format_report([UnaryError(Function.EXP, "fp16", 0.5, 1.0, 0.5, 1e-8, 1e-8)]).splitlines()
    assert len(lines) == 2 and lines[1].startswith("EXP") and "0.500" in lines[1]
