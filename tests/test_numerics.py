"""The golden numerics against exact rational arithmetic, written independently from the design's words."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from typebar.isa.errors import TypebarError
from typebar.isa.numerics import (
    Format,
    NumericFlag,
    add,
    argmax,
    bits_of,
    chunk_sum,
    decode,
    dot,
    encode,
    from_bits,
    maximum,
    mul,
    raw_dtype,
    reduce_max,
    running_max,
    sub,
    sum_squares,
    to_operand,
    tree_sum,
)
from typebar.isa.numerics.dot import sum_bits

NAN = 0x7FC00000
INF = 0x7F800000
TINY = Fraction(1, 2**126)
SPECIAL = [0, 1, 0x7FFFFF, 0x800000, 0x800001, 0x7F7FFFFF, INF, NAN, 0x7F800001, 0x3F800000, 0x3FC00000, 0x33800000]

any_bits = st.one_of(
    st.sampled_from([*SPECIAL, *(bits | 1 << 31 for bits in SPECIAL)]),
    st.integers(0, 2**32 - 1),
    # Neighbouring exponents meet, cancel and tie far more often than random bits do.
    st.builds(
        lambda sign, exponent, fraction: sign << 31 | exponent << 23 | fraction,
        st.integers(0, 1),
        st.integers(120, 130),
        st.sampled_from([0, 1, 0x1000, 0x1FFF, 0x2000, 0x3000, 0x400000, 0x7FE000, 0x7FF000, 0x7FFFFF]),
    ),
)


def value_of(bits: int) -> float:
    """The float32 of a bit pattern."""
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def floats(bits: list[int]) -> np.ndarray:
    return from_bits(np.array(bits, np.uint32))


def one(bits: int) -> np.ndarray:
    return floats([bits])


def is_nan_bits(bits: int) -> bool:
    return bits & 0x7FFFFFFF > INF


def rounded(value: Fraction, digits: int) -> Fraction:
    """To nearest even at `digits` significant bits, exponent unbounded."""
    if value == 0:
        return value
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (exponent - digits + 1)
    return round(value / unit) * unit  # Python's round of a Fraction is to nearest even


def flushed_bits(bits: int) -> int:
    return bits & 1 << 31 if bits & INF == 0 else bits


def float32_bits(exact: Fraction, sign_of_zero: int = 0) -> int:
    """Bits of an exact result by the vector unit's rules."""
    sign = (1 << 31) * (exact < 0)
    if exact == 0:
        return sign_of_zero << 31
    if abs(exact) < TINY:
        return sign
    nearest = rounded(exact, 24)
    if abs(nearest) >= Fraction(2) ** 128:
        return sign | INF
    return struct.unpack("<I", struct.pack("<f", float(nearest)))[0]


def expected_add(a: int, b: int) -> int:
    a, b = flushed_bits(a), flushed_bits(b)
    x, y = value_of(a), value_of(b)
    if math.isnan(x) or math.isnan(y) or (math.isinf(x) and math.isinf(y) and x != y):
        return NAN
    if math.isinf(x) or math.isinf(y):
        return a if math.isinf(x) else b
    both_negative = a >> 31 & b >> 31
    return float32_bits(Fraction(x) + Fraction(y), both_negative)


def expected_mul(a: int, b: int) -> int:
    a, b = flushed_bits(a), flushed_bits(b)
    x, y, sign = value_of(a), value_of(b), (a ^ b) >> 31
    if math.isnan(x) or math.isnan(y) or (math.isinf(x) and y == 0) or (x == 0 and math.isinf(y)):
        return NAN
    if math.isinf(x) or math.isinf(y):
        return sign << 31 | INF
    return float32_bits(Fraction(x) * Fraction(y), sign)


def expected_operand(bits: int) -> tuple[int, bool]:
    if is_nan_bits(bits):
        return NAN, False
    sign, largest = bits & 1 << 31, 0x7F7FE000
    value = value_of(bits)
    if math.isinf(value):
        return sign | largest, True
    nearest = rounded(Fraction(value), 11)
    if abs(nearest) >= Fraction(2) ** 128:
        return sign | largest, True
    if abs(nearest) < Fraction(1, 2**50):
        return 0, False
    return struct.unpack("<I", struct.pack("<f", float(nearest)))[0], False


def exponent_of(value: Fraction) -> int:
    """The exponent of a number that float64 holds."""
    return math.frexp(float(value))[1] - 1


def stored_exponent(raw: int, fmt: Format) -> int:
    """The exponent that a raw element shows, whatever its value is."""
    if fmt is Format.INT8:
        return 7
    return max(raw >> 10 & 31, 1) - 15 if fmt is Format.FP16 else (raw >> 7 & 255) - 127


def truncated(value: Fraction, top: int, bits: int) -> Fraction:
    """A magnitude cut to `bits` bits of which the highest is 2^top, with its sign."""
    unit = Fraction(2) ** (top - bits + 1)
    return math.floor(abs(value) / unit) * unit * (1 if value > 0 else -1)


def expected_chunk(w: list[int], x: list[int], exponents: list[int] | None = None) -> int:
    """A chunk's sum of operands, from the design's sentences; `exponents` of w if they are not its values' own."""
    if any(is_nan_bits(bits) for bits in w + x):
        return NAN
    weights, values = ([Fraction(value_of(bits)) for bits in side] for side in (w, x))
    own = exponents or [exponent_of(a) if a else 0 for a in weights]
    lanes = [(a, e, b) for a, e, b in zip(weights, own, values, strict=True) if b]
    if not any(a for a, _, _ in lanes):
        return 0
    x_top = max(exponent_of(b) for _, _, b in lanes)
    w_top = math.ceil(Fraction(max(e for a, e, _ in lanes if a), 4)) * 4
    near = [(truncated(a, w_top, 17), b) for a, e, b in lanes if e > w_top - 16]
    return float32_bits(sum((a * truncated(b, x_top, 24) for a, b in near), Fraction(0)))


@given(any_bits, any_bits)
@example(0x00800000, 0x80800001)  # the difference is below 2^-126
@example(0x80000000, 0x80000000)
@settings(max_examples=1500, deadline=None)
def test_add_and_sub_are_the_exact_sum_rounded_once(a: int, b: int) -> None:
    assert bits_of(add(one(a), one(b)))[0] == expected_add(a, b)
    assert bits_of(sub(one(a), one(b)))[0] == expected_add(a, b ^ 1 << 31)


@given(any_bits, any_bits)
@example(0x00800000, 0x3F7FFFFF)  # rounds to 2^-126, but is below it exactly
@example(0x20000000, 0x1FFFFFFF)
@example(0x20000000, 0x20000000)  # 2^-126 itself
@settings(max_examples=1500, deadline=None)
def test_mul_flushes_by_the_exact_product(a: int, b: int) -> None:
    assert bits_of(mul(one(a), one(b)))[0] == expected_mul(a, b)


def test_tininess_is_detected_before_rounding() -> None:
    almost = one(0x3F7FFFFF)  # 1 - 2^-24
    assert np.float32(almost[0] * np.float32(2.0**-126)) == np.float32(2.0**-126)  # IEEE rounds up to it
    assert bits_of(mul(almost, one(0x00800000)))[0] == 0
    assert bits_of(mul(-almost, one(0x00800000)))[0] == 1 << 31


@given(any_bits)
@example(0x26FFEFFF)  # just below half-way to 2^-49
@example((127 - 50) << 23)
@example(((127 - 50) << 23) - 0x800)  # half-way between the largest operand below 2^-50 and 2^-50: even
@example(((127 - 50) << 23) - 0x801)
@example(0x7F7FEFFF)
@example(0x7F7FF000)
@settings(max_examples=1500, deadline=None)
def test_operands_round_to_eleven_bits(bits: int) -> None:
    operand, flags = to_operand(one(bits))
    expected, overflow = expected_operand(bits)
    assert bits_of(operand)[0] == expected
    assert (flags == NumericFlag.OPERAND_OVERFLOW) == overflow


operand_bits = any_bits.map(lambda bits: expected_operand(bits)[0])


@given(st.lists(st.tuples(operand_bits, operand_bits), min_size=1, max_size=9))
@settings(max_examples=1000, deadline=None)
def test_chunk_sum_is_the_specified_one(pairs: list[tuple[int, int]]) -> None:
    w, x = [a for a, _ in pairs], [b for _, b in pairs]
    got = bits_of(chunk_sum(floats(w)[:, None], floats(x)[None]))
    assert got.shape == (1, 1)
    assert got[0, 0] == expected_chunk(w, x)


@given(
    fmt=st.sampled_from([Format.FP16, Format.BF16, Format.INT8]),
    pairs=st.lists(st.tuples(st.integers(0, 2**16 - 1), st.integers(0, 31), operand_bits), min_size=1, max_size=9),
    narrow=st.booleans(),
)
@settings(max_examples=1000, deadline=None)
def test_a_weights_exponent_is_that_of_its_storage(
    fmt: Format, pairs: list[tuple[int, int, int]], narrow: bool
) -> None:
    """fp16's subnormals and int8 are as they lie in memory; infinities are the largest operand."""
    elements = [
        raw & (0x83FF if narrow and fmt is Format.FP16 else 0xFFFF) >> (8 * (fmt is Format.INT8)) for raw, _, _ in pairs
    ]
    raw = np.array(elements, np.uint16).astype(raw_dtype(fmt))
    # Around the magnitudes at which what an unnormalised weight brings is cut off.
    x = [bits if narrow else (bits & 0x807FE000) + (near + 112 << 23) for _, near, bits in pairs]
    x = [NAN if is_nan_bits(bits) else bits for bits in x]
    weights = decode(raw[:, None], fmt)
    w = [expected_operand(int(bits))[0] for bits in bits_of(weights)[:, 0]]
    exponents = [
        127 if expected_operand(int(b))[1] else stored_exponent(e, fmt)
        for b, e in zip(bits_of(weights)[:, 0], elements, strict=True)
    ]
    got, _ = dot(weights, floats(x)[None], 9, fmt=fmt)
    assert bits_of(got)[0, 0] == expected_chunk(w, x, exponents)


def test_an_unnormalised_weight_raises_the_common_exponent() -> None:
    # Ew is -12 beside the smallest of fp16's normals and -8 beside 2^-8, where 2^-24 is the last place: it is kept as
    # fp16, whose exponent is then -14, and as bf16, whose is -24, it is 16 places too low. Beside 2^-7 Ew is -4.
    for top, kept in ((-14, (1, 1)), (-8, (1, 0)), (-7, (0, 0))):
        column = np.array([[2.0**top], [2.0**-24]], np.float32)
        for fmt, times in zip((Format.FP16, Format.BF16), kept, strict=True):
            assert dot(column, np.ones((1, 2), np.float32), 8, fmt=fmt)[0][0, 0] == 2.0**top + times * 2.0**-24


def test_the_weights_common_exponent_goes_by_steps_of_four() -> None:
    # The last place kept is 2^(Ew - 16): 2^-12 beside 8 and 16, 2^-8 beside 32. Beside 2^13 Ew is 16.
    odd = np.float32(1 + 2.0**-10)
    for top, kept in ((3, odd), (4, odd), (5, 1), (8, 1), (9, 1), (12, 1), (13, 0)):
        column = np.array([[2.0**top], [odd], [-(2.0**top)]], np.float32)
        assert dot(column, np.ones((1, 3), np.float32), 8, fmt=Format.BF16)[0][0, 0] == kept


def test_int8_weights_lose_nothing() -> None:
    weights = np.array([[-128.0], [1.0], [127.0]], np.float32)
    got, _ = dot(weights, np.array([[2.0**-13, 1.0, 2.0**-13]], np.float32), 8, fmt=Format.INT8)
    assert got[0, 0] == np.float32(1 - 2.0**-13)


def test_a_vectors_small_elements_keep_what_lies_within_24_bits_of_its_largest() -> None:
    ones, top, odd = np.ones((3, 1), np.float32), 2.0**13, np.float32(1 + 2.0**-10)
    for scale, kept in ((1, odd), (2, np.float32(1))):  # 1 + 2^-10 ends at 2^(13 - 23), then a place below the last
        x = np.array([[scale * top, odd, -scale * top]], np.float32)
        assert chunk_sum(ones, x)[0, 0] == kept
    # Magnitudes are truncated before they have signs.
    assert chunk_sum(ones, np.array([[2 * top, -odd, -2 * top]], np.float32))[0, 0] == -1


def test_zeros_of_the_vector_lend_no_exponent_and_zero_weights_none_of_theirs() -> None:
    w = np.array([[2.0**100], [2.0**-20], [0.0]], np.float32)
    assert chunk_sum(w, np.array([[0.0, 2.0**-20, 2.0**-20]], np.float32))[0, 0] == np.float32(2.0**-40)
    assert chunk_sum(w, np.zeros((1, 3), np.float32))[0, 0] == 0
    # The vector's exponent is one for all columns, so it counts beside a zero weight.
    assert chunk_sum(w, np.array([[0.0, 2.0**-20, 2.0**3]], np.float32))[0, 0] == np.float32(2.0**-40)
    assert chunk_sum(w, np.array([[0.0, 2.0**-20, 2.0**4]], np.float32))[0, 0] == 0


def test_rows_of_a_block_do_not_see_one_another() -> None:
    """A masked position has probability 0: what lies in its lane counts for nothing, bit for bit."""
    rng = np.random.default_rng(11)
    weights = (rng.standard_normal((64, 8)) * 2.0 ** rng.integers(-14, 14, (64, 8))).astype(np.float16)
    x = np.tril(rng.random((64, 64))).astype(np.float32)
    operands = to_operand(x)[0]
    got = chunk_sum(weights.astype(np.float32), operands, Format.FP16)
    for row in range(64):
        alone = chunk_sum(weights[: row + 1].astype(np.float32), operands[row : row + 1, : row + 1], Format.FP16)
        assert np.array_equal(bits_of(alone[0]), bits_of(got[row]))
        later = np.where(np.arange(64)[:, None] > row, np.float32(65504), weights.astype(np.float32))
        beside = chunk_sum(later, operands[row : row + 1], Format.FP16)
        assert np.array_equal(bits_of(beside[0]), bits_of(got[row]))


def test_the_exact_sum_fits_its_width() -> None:
    assert [sum_bits(lanes) for lanes in (4, 8, 64, 128)] == [44, 45, 48, 49]
    largest = np.float32(2047 * 2.0**-10)
    for lanes in (8, 64, 128):
        total = lanes * (2047 << 6) * (2047 << 13)
        assert total < 1 << sum_bits(lanes) - 1 <= 2 * total
        got = chunk_sum(np.full((lanes, 1), -largest), np.full((1, lanes), largest, np.float32))
        assert got[0, 0] == np.float32(-lanes * float(largest) ** 2)


def test_dot_accumulates_chunks_in_ascending_order() -> None:
    rng = np.random.default_rng(7)
    k, n, m, lanes = 21, 3, 2, 8
    weights = rng.standard_normal((k, n)).astype(np.float16).astype(np.float32)
    x = rng.standard_normal((m, k)).astype(np.float32)
    start = rng.standard_normal((m, n)).astype(np.float32)
    got, flags = dot(weights, x, lanes, start, fmt=Format.FP16)
    operands = [[expected_operand(int(b))[0] for b in row] for row in bits_of(x)]
    for r in range(m):
        for j in range(n):
            acc = int(bits_of(start)[r, j])
            for c in range(0, k, lanes):
                column = [int(b) for b in bits_of(weights)[c : c + lanes, j]]
                acc = expected_add(acc, expected_chunk(column, operands[r][c : c + lanes]))
            assert bits_of(got)[r, j] == acc
    assert flags == NumericFlag.NONE


def test_dot_is_never_minus_zero() -> None:
    weights = np.array([[1.0], [-1.0]], np.float32)
    got, _ = dot(weights, np.ones((1, 2), np.float32), 1, np.full((1, 1), -0.0, np.float32), fmt=Format.FP32)
    assert bits_of(got)[0, 0] == 0
    got, _ = dot(-weights, np.zeros((1, 2), np.float32), 2, fmt=Format.FP32)
    assert bits_of(got)[0, 0] == 0


def test_dot_reports_overflowing_operands_and_bad_shapes() -> None:
    _, flags = dot(np.ones((1, 1), np.float32), np.full((1, 1), np.inf, np.float32), 8, fmt=Format.FP32)
    assert flags == NumericFlag.OPERAND_OVERFLOW
    with pytest.raises(TypebarError, match="dot needs weights"):
        dot(np.ones((2, 1), np.float32), np.ones((1, 3), np.float32), 8, fmt=Format.FP32)


@given(st.lists(any_bits, max_size=13))
@settings(max_examples=500, deadline=None)
def test_tree_sum_pairs_neighbours(bits: list[int]) -> None:
    def tree(level: list[int]) -> int:
        if len(level) == 1:
            return level[0]
        return tree([expected_add(a, b) for a, b in zip(level[::2], level[1::2], strict=True)])

    def padded(values: list[int]) -> list[int]:
        return values + [0] * ((1 << max(len(values) - 1, 0).bit_length()) - len(values))

    clean = [NAN if is_nan_bits(b) else flushed_bits(b) for b in bits]
    assert bits_of(tree_sum(floats(bits)))[()] == tree(padded(clean))
    squares = [expected_mul(b, b) for b in bits]
    assert bits_of(sum_squares(floats(bits)))[()] == tree(padded(squares))


@given(st.lists(any_bits, min_size=1, max_size=9))
@settings(max_examples=500, deadline=None)
def test_maxima(bits: list[int]) -> None:
    clean = [NAN if is_nan_bits(b) else flushed_bits(b) for b in bits]

    def key(b: int) -> tuple[bool, float, int]:
        return is_nan_bits(b), 0.0 if is_nan_bits(b) else value_of(b), -(b >> 31)

    best = max(clean, key=key)
    x = floats(bits)
    assert bits_of(reduce_max(x))[()] == best
    assert bits_of(running_max(x[0], x))[()] == best
    pairwise = x[:1]
    for value in x:
        pairwise = maximum(pairwise, np.array([value]))
    assert bits_of(pairwise)[0] == best
    numbers = [-math.inf if is_nan_bits(b) else value_of(b) for b in clean]
    index, value, flags = argmax(x)
    assert index == numbers.index(max(numbers)) and value == max(numbers)
    assert (flags == NumericFlag.ARGMAX_NAN) == any(map(is_nan_bits, bits))


def test_empty_reductions() -> None:
    empty = np.zeros(0, np.float32)
    assert bits_of(tree_sum(empty))[()] == 0
    assert reduce_max(empty) == -np.inf
    assert argmax(empty) == (0, -np.inf, NumericFlag.NONE)


def stored_fp16(value: float) -> int:
    """fp16 bits by a search over all finite fp16 numbers: nearest, even on ties."""
    exact = abs(Fraction(value))
    low, high = 0, 0x7BFF
    numbers = ALL_FP16
    while low < high:  # the last number not above the value
        middle = (low + high + 1) // 2
        low, high = (middle, high) if numbers[middle] <= exact else (low, middle - 1)
    if low < 0x7BFF:
        below, above = exact - numbers[low], numbers[low + 1] - exact
        low += above < below or (above == below and low % 2 == 1)
    return low | (math.copysign(1, value) < 0) << 15


ALL_FP16 = [Fraction(struct.unpack("<e", struct.pack("<H", bits))[0]) for bits in range(0x7C00)]


@given(any_bits)
@example(0x33000000)  # 2^-25, half-way to the smallest subnormal
@example(0x33000001)
@example(0x387FF000)  # half-way to the smallest normal
@example(0x477FEFFF)
@example(0x477FF000)  # 65520
@example(0x3F808000)  # bf16 ties, to the even one below and above
@example(0x3F818000)
@example(0x3F000000)  # int8 ties: 0.5, 1.5, -2.5
@example(0x3FC00000)
@example(0xC0200000)
@settings(max_examples=1000, deadline=None)
def test_stores_round_to_nearest_even_and_saturate(bits: int) -> None:
    clean = flushed_bits(bits)
    value = value_of(clean)
    sign = clean >> 31
    raw, flags = encode(one(bits), Format.FP16)
    bf16, bf16_flags = encode(one(bits), Format.BF16)
    int8, int8_flags = encode(one(bits), Format.INT8)
    saturated = NumericFlag.STORE_SATURATED
    if math.isnan(value):
        assert (raw[0], bf16[0], int8[0]) == (0x7E00, 0x7FC0, 0)
        assert (flags, bf16_flags, int8_flags) == (0, 0, saturated)
        return
    if abs(value) >= 65520:
        assert (raw[0], flags) == (sign << 15 | 0x7BFF, saturated)
    else:
        assert (raw[0], flags) == (stored_fp16(value), 0)
    nearest = rounded(Fraction(value), 8) if math.isfinite(value) else Fraction(2) ** 128
    if abs(nearest) >= Fraction(2) ** 128:
        assert (bf16[0], bf16_flags) == (sign << 15 | 0x7F7F, saturated)
    else:
        expected = struct.unpack("<I", struct.pack("<f", math.copysign(float(nearest), value)))[0] >> 16
        assert (bf16[0], bf16_flags) == (expected, 0)
    whole = round(Fraction(value)) if math.isfinite(value) else int(math.copysign(1000, value))
    assert int8[0] == min(max(whole, -128), 127)
    assert (int8_flags == saturated) == (not -128 <= whole <= 127)


def test_every_16_and_8_bit_element_decodes_exactly_and_survives_a_round_trip() -> None:
    for fmt, size in ((Format.FP16, 1 << 16), (Format.BF16, 1 << 16), (Format.INT8, 1 << 8)):
        raw = np.arange(size, dtype=np.uint32).astype(np.dtype(f"u{raw_dtype(fmt).itemsize}")).view(raw_dtype(fmt))
        values = decode(raw, fmt)
        if fmt is Format.FP16:
            exact = [struct.unpack("<e", struct.pack("<H", bits))[0] for bits in range(size)]
        elif fmt is Format.BF16:
            exact = [value_of(bits << 16) for bits in range(size)]
        else:
            exact = [float(np.int8(bits - 256 * (bits > 127))) for bits in range(size)]
        assert np.array_equal(values.astype(np.float64), np.array(exact), equal_nan=True)
        assert set(bits_of(values[np.isnan(values)]).tolist()) <= {NAN}
        keep = np.isfinite(values) & ~((fmt is Format.BF16) & (np.abs(values) < 2.0**-126))
        again, flags = encode(values[keep], fmt)
        assert np.array_equal(again, raw[keep]) and flags == NumericFlag.NONE


def test_float32_moves_bit_for_bit() -> None:
    raw = np.array([0, 1, 0x80000001, 0x7F800001, NAN, 0xFFFFFFFF], np.uint32)
    values = decode(raw, Format.FP32)
    again, flags = encode(values, Format.FP32)
    assert np.array_equal(again, raw) and flags == NumericFlag.NONE


def test_decode_refuses_the_wrong_element_type() -> None:
    with pytest.raises(TypebarError, match="raw FP16 elements must have type uint16"):
        decode(np.zeros(1, np.int8), Format.FP16)
