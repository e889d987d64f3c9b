"""The fast kernels against the golden numerics: every bit and every flag."""

from __future__ import annotations

import os
import signal
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numba import njit

from typebar.isa import numerics as golden
from typebar.isa.errors import TypebarError
from typebar.isa.instructions import Patch
from typebar.isa.layout import PackedLayout
from typebar.isa.numerics import Format, Function, NumericFlag, bits_of, decode, encode, from_bits, raw_dtype
from typebar.sim import kernels, kernels_bits, kernels_jit, kernels_matmul, kernels_simd, kernels_unary

any_bits = st.one_of(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 0x80000000, 1, 0x800000, 0x80800000, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F7FFFFF]),
    st.integers(0x3F000000, 0x40800000),
)
vectors = hnp.arrays(np.uint32, st.integers(0, 70), elements=any_bits).map(from_bits)


def same(fast: Any, slow: Any) -> bool:
    return np.array_equal(bits_of(np.asarray(fast, np.float32)), bits_of(np.asarray(slow, np.float32)))


def pack(raw: np.ndarray, layout: PackedLayout, rng: np.random.Generator) -> np.ndarray:
    """Packed bytes of raw elements, one by one from the layout's addresses, amid random garbage."""
    memory = rng.integers(0, 256, layout.bytes, dtype=np.uint8)
    k, n = np.indices(raw.shape)
    at = layout.offset(k, n)
    for byte in range(raw.itemsize):
        memory[at + byte] = raw.view(np.uint8).reshape(*raw.shape, raw.itemsize)[..., byte]
    return memory


def raw_elements(rng: np.random.Generator, fmt: Format, shape: tuple[int, int], kind: str) -> np.ndarray:
    """Elements of a memory format: any bit pattern, fp16's subnormals, or numbers of like size that cancel and tie."""
    if kind == "any":
        size = raw_dtype(fmt).itemsize
        return rng.integers(0, 256**size, shape, dtype=np.uint64).astype(f"u{size}").view(raw_dtype(fmt))
    if kind == "subnormal" and fmt is Format.FP16:
        return (rng.integers(0, 1 << rng.integers(1, 11), shape) | rng.integers(0, 2, shape) << 15).astype(np.uint16)
    values = rng.integers(-40, 40, shape).astype(np.float32)
    if kind == "normal" and fmt is not Format.INT8:
        values = (rng.standard_normal(shape) * 2.0 ** rng.integers(-12, 12, shape)).astype(np.float32)
    return encode(values, fmt)[0]


def vector_values(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """Register values: any bit pattern, extreme exponents of either end, or ordinary, far apart or not; many zeros."""
    if kind == "any":
        x = from_bits(rng.integers(0, 1 << 32, shape, dtype=np.uint64))
    elif kind == "huge":
        x = np.ldexp(rng.standard_normal(shape), rng.integers(90, 127, shape)).astype(np.float32)
    elif kind == "tiny":
        x = np.ldexp(rng.standard_normal(shape), rng.integers(-55, -40, shape)).astype(np.float32)
    else:
        x = rng.standard_normal(shape).astype(np.float32)
    if kind == "wide":
        x = np.ldexp(x, rng.integers(-20, 1, shape)).astype(np.float32)
    x[rng.random(shape) < 0.2] = 0
    return x


KINDS = st.sampled_from(["any", "huge", "tiny", "wide", "normal"])


@given(
    seed=st.integers(0, 2**32 - 1),
    fmt=st.sampled_from(list(Format)),
    lanes=st.sampled_from([4, 8, 16, 32, 64, 128]),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 300), st.integers(1, 40)),
    block=st.tuples(st.sampled_from([4, 16, 32]), st.sampled_from([1, 2, 4]), st.booleans()),
    kinds=st.tuples(st.sampled_from(["any", "normal", "subnormal", "whole"]), KINDS),
    patch_kind=st.sampled_from(list(Patch)),
    start=st.booleans(),
)
@settings(max_examples=400, deadline=None)
def test_matmul(
    seed: int,
    fmt: Format,
    lanes: int,
    shape: tuple[int, int, int],
    block: tuple[int, int, bool],
    kinds: tuple[str, str],
    patch_kind: Patch,
    start: bool,
) -> None:
    rng = np.random.default_rng(seed)
    (m, k, n), (width, granule, full) = shape, block
    raw = raw_elements(rng, fmt, (k, n), kinds[0])
    x = vector_values(rng, (m, k + 2), kinds[1])  # the two beyond k must not count
    acc = vector_values(rng, (m, n), "any" if kinds[1] == "any" else "normal") if start else None
    weights, patch, patch_at, flags = decode(raw, fmt), None, 0, NumericFlag.NONE
    if patch_kind is not Patch.NONE:
        columns = patch_kind is Patch.COLUMN
        patch = vector_values(rng, (k if columns else n,), kinds[1])
        patch_at = int(rng.integers(0, (n if columns else k) + 2))
        stored, flags = encode(patch, fmt)
        if patch_at < (n if columns else k):
            weights[(slice(None), patch_at) if columns else patch_at] = decode(stored, fmt)
    layout = PackedLayout(k, n, raw.itemsize, lanes, width, granule, full)
    memory = np.concatenate([np.full(64, 0xFF, np.uint8), pack(raw, layout, rng)])
    memory.flags.writeable = bool(seed % 2)
    got, got_flags = kernels.matmul(
        memory, 64, fmt, x, k, n, lanes, width,
        granule=granule, full=full, acc=acc, patch_kind=patch_kind, patch_at=patch_at, patch=patch,
    )  # fmt: skip
    expected, dot_flags = golden.dot(weights, x[:, :k], lanes, acc, fmt=fmt)
    assert same(got, expected)
    assert got_flags == flags | dot_flags


@given(
    pairs=st.lists(st.tuples(any_bits, any_bits), min_size=1, max_size=70),
    lanes=st.sampled_from([8, 16, 64]),
)
@example(pairs=[(0x7F7FFFFF, 0x7F7FFFFF)], lanes=8)
@example(pairs=[(0x3F800000, 0x7FC00000), (0x7F800000, 0)], lanes=8)
@example(pairs=[(0x7F000000, 0x3FC00000), (0x7F000000, 0xBFC00000)], lanes=8)
@settings(max_examples=400, deadline=None)
def test_dot_of_any_float32(pairs: list[tuple[int, int]], lanes: int) -> None:
    w, x = from_bits(np.array(pairs, np.uint32)).T
    memory = pack(
        np.ascontiguousarray(w)[:, None].view(np.uint32),
        PackedLayout(len(w), 1, 4, lanes, 4, 1, False),
        np.random.default_rng(0),
    )
    got, flags = kernels.matmul(memory, 0, Format.FP32, x[None].copy(), len(w), 1, lanes, 4)
    expected, expected_flags = golden.dot(w[:, None], x[None], lanes, fmt=Format.FP32)
    assert same(got, expected) and flags == expected_flags


def test_largest_sums_of_128_lanes_do_not_wrap() -> None:
    largest = np.float32(2047 * 2.0**-10)
    for lanes in (64, 128):
        weights = np.full((lanes, 1), largest, np.float32)
        memory = encode(weights, Format.FP16)[0].view(np.uint8).reshape(-1)
        for sign in (1, -1):
            got, _ = kernels.matmul(memory, 0, Format.FP16, sign * weights.T.copy(), lanes, 1, lanes, 4)
            assert got[0, 0] == np.float32(sign * lanes * float(largest) ** 2)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    rng = np.random.default_rng(3)
    k, n = 512, 1100
    raw = encode(rng.standard_normal(k * n).astype(np.float32), Format.FP16)[0]
    x = rng.standard_normal((2, k)).astype(np.float32)
    before = kernels.threads()
    results = []
    for count in (1, 2, 3):
        kernels.set_threads(count)
        assert kernels.threads() == count
        results.append(kernels.matmul(raw.view(np.uint8), 0, Format.FP16, x, k, n, 64, 32)[0])
    kernels.set_threads(before)
    assert same(results[0], results[1]) and same(results[0], results[2])
    assert len(np.unique(results[0])) > 1000


def test_matmul_refuses_what_does_not_fit() -> None:
    x = np.zeros((1, 8), np.float32)
    memory = np.zeros(8 * 4 * 2, np.uint8)
    with pytest.raises(TypebarError, match="lie outside the 64 bytes"):
        kernels.matmul(memory, 2, Format.FP16, x, 8, 4, 8, 4)
    with pytest.raises(TypebarError, match=r"matmul needs x \[m, >= 9\]"):
        kernels.matmul(memory, 0, Format.FP16, x, 9, 4, 8, 4)
    with pytest.raises(TypebarError, match="acc must have shape"):
        kernels.matmul(memory, 0, Format.FP16, x, 8, 4, 8, 4, acc=np.zeros((2, 4), np.float32))
    with pytest.raises(TypebarError, match="a LANE patch of a 8 x 4 matrix needs 4 values"):
        kernels.matmul(memory, 0, Format.FP16, x, 8, 4, 8, 4, patch_kind=Patch.LANE, patch=x[0])
    with pytest.raises(TypebarError, match="threads = 0"):
        kernels.set_threads(0)


def test_matmul_without_products_returns_the_accumulators() -> None:
    acc = np.array([[-0.0, 2.0**-140, 3.0]], np.float32)
    got, flags = kernels.matmul(
        np.zeros(0, np.uint8), 0, Format.FP16, np.zeros((1, 0), np.float32), 0, 3, 8, 4, acc=acc
    )
    assert bits_of(got).tolist() == [[0x80000000, 0, 0x40400000]] and flags == 0


@given(vectors, st.integers(0, 2**32 - 1))
@settings(max_examples=300, deadline=None)
def test_elementwise(a: np.ndarray, seed: int) -> None:
    rng = np.random.default_rng(seed)
    b = from_bits(rng.permutation(np.concatenate([bits_of(a), rng.integers(0, 1 << 32, a.size, np.uint64)]))[: a.size])
    for name in ("add", "sub", "mul", "maximum"):
        fast, slow = getattr(kernels, name), getattr(golden, name)
        assert same(fast(a, b), slow(a, b))
        if a.size:
            assert same(fast(a, b[0]), slow(a, b[0]))
    for function in Function:
        assert same(kernels.unary(function, a), golden.unary(function, a))


@given(vectors)
@settings(max_examples=300, deadline=None)
def test_reductions(x: np.ndarray) -> None:
    assert same(kernels.tree_sum(x), golden.tree_sum(x))
    assert same(kernels.sum_squares(x), golden.sum_squares(x))
    assert same(kernels.reduce_max(x), golden.reduce_max(x))
    index, value, flags = kernels.argmax(x)
    expected = golden.argmax(x)
    assert (index, flags) == (expected[0], expected[2]) and same(value, expected[1])


def test_products_just_below_the_normal_numbers_flush() -> None:
    a, b = from_bits(np.array([[0x3F7FFFFF, 0xBF7FFFFF, 0x3F800000, 0x20000000], [0x00800000] * 3 + [0x1FFFFFFF]]))
    got = kernels.mul(a, b)
    assert bits_of(got).tolist() == [0, 1 << 31, 0x00800000, 0]
    assert same(got, golden.mul(a, b))


def test_the_zeros_that_extend_a_sum_are_positive() -> None:
    for length in (1, 2, 3, 4, 5, 6, 7, 9):
        x = np.full(length, -0.0, np.float32)
        negative = length in (1, 2, 4)
        assert bits_of(np.array(kernels.tree_sum(x)))[()] == negative << 31
        assert same(kernels.tree_sum(x), golden.tree_sum(x))


def test_unary_functions_on_every_fp16_number_and_on_random_bits() -> None:
    rng = np.random.default_rng(5)
    x = np.concatenate(
        [
            np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32),
            from_bits(rng.integers(0, 1 << 32, 100_000, dtype=np.uint64)),
            rng.uniform(-20, 20, 100_000).astype(np.float32),
            np.nextafter(np.float32([2, 4, 8, 9, 17, 18, 88.7, 128]), np.float32(0)),
        ]
    )
    for function in Function:
        assert same(kernels.unary(function, x), golden.unary(function, x))
    with pytest.raises(TypebarError, match="unary function must be one of"):
        kernels.unary(99, x)  # type: ignore[arg-type]


@given(vectors, st.sampled_from(list(Format)))
@settings(max_examples=300, deadline=None)
def test_stores_and_loads(x: np.ndarray, fmt: Format) -> None:
    raw, flags = kernels.encode(x, fmt)
    expected, expected_flags = golden.encode(x, fmt)
    assert np.array_equal(raw, expected) and raw.dtype == expected.dtype and flags == expected_flags
    memory = np.concatenate([np.zeros(3, np.uint8), raw.view(np.uint8)])
    assert same(kernels.load(memory, 3, fmt, x.size), golden.decode(expected, fmt))


@pytest.mark.parametrize("fmt", [Format.FP16, Format.BF16])
def test_every_half_and_its_neighbourhood(fmt: Format) -> None:
    raw = np.arange(1 << 16, dtype=np.uint16)
    assert same(kernels.decode(raw, fmt), golden.decode(raw, fmt))
    shift = 13 if fmt is Format.FP16 else 16
    top = np.arange(0, 1 << 32, 1 << (shift - 1), dtype=np.uint64)
    for offset in (0, 1, (1 << (shift - 1)) - 1):  # ties and either side of them
        x = from_bits(top[::3] + offset)
        assert np.array_equal(kernels.encode(x, fmt)[0], golden.encode(x, fmt)[0])


def test_strided_store_and_its_bounds() -> None:
    memory = np.full(64, 0xEE, np.uint8)
    x = np.arange(6, dtype=np.float32)
    flags = kernels.store(memory, 4, Format.FP16, x, 3, 24, 8)
    for o in range(2):
        for i in range(3):
            at = 4 + 24 * o + 8 * i
            assert memory[at : at + 2].view(np.float16)[0] == 3 * o + i
    assert flags == 0 and np.count_nonzero(memory != 0xEE) <= 12
    assert kernels.store(memory, 0, Format.INT8, np.array([1000], np.float32), 1, 0, 0) == NumericFlag.STORE_SATURATED
    with pytest.raises(TypebarError, match="store of bytes"):
        kernels.store(memory, 60, Format.FP16, x, 3, 24, 8)
    with pytest.raises(TypebarError, match="load of bytes"):
        kernels.load(memory, 60, Format.FP16, 3)
    with pytest.raises(TypebarError, match="second operand must have 1 or 6 elements"):
        kernels.add(x, x[:2])


def test_the_processors_flush_mode_has_no_say() -> None:
    bits = np.concatenate([np.arange(0x7FFF00, 0x800100), np.arange(0, 64), np.arange(0x33000000, 0x33000040)])
    x = from_bits(np.concatenate([bits, bits | 1 << 31]).astype(np.uint32))
    halves = np.arange(0, 1 << 16, 7, dtype=np.uint16)

    def results() -> list[np.ndarray]:
        y = x[::-1].copy()
        weights = np.ascontiguousarray(halves[: x.size]).view(np.uint8)
        dots = kernels.matmul(weights, 0, Format.FP16, x[None], x.size, 1, 64, 4)[0]
        both = [f(x, y) for k in (kernels, golden) for f in (k.add, k.sub, k.mul, k.maximum)]
        both += [k.unary(function, x) for k in (kernels, golden) for function in Function]
        both += [k.encode(x, Format.FP16)[0].astype(np.uint32) for k in (kernels, golden)]
        both += [k.decode(halves, Format.FP16) for k in (kernels, golden)]
        both += [dots, golden.dot(decode(halves[: x.size], Format.FP16)[:, None], x[None], 64, fmt=Format.FP16)[0]]
        return [value.view(np.uint32) for value in both]

    expected = results()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        assert np.float32(2.0**-126) * np.float32(0.5) == 0  # the mode is on
        flushed = results()
    finally:
        torch.set_flush_denormal(False)
    assert all(np.array_equal(a, b) for a, b in zip(expected, flushed, strict=True))


def test_fp16_decodes_without_a_conversion_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = np.arange(1 << 16, dtype=np.uint16)
    exact = raw.view(np.float16).astype(np.float32)
    for in_hardware in (False, kernels_simd._HALF_IN_HARDWARE):
        monkeypatch.setattr(kernels_simd, "_HALF_IN_HARDWARE", in_hardware)

        @njit  # type: ignore[untyped-decorator]
        def decode_both(source, one_by_one, grouped):  # type: ignore[no-untyped-def]
            for i in range(source.size):
                one_by_one[i] = kernels_simd.as_operand(source[i])
            kernels_simd.decode_groups(source, 0, source.size // kernels_simd.GROUP, grouped)

        scalars, groups = np.empty((2, raw.size), np.float32)
        decode_both(raw, scalars, groups)
        for values in (scalars, groups):
            assert np.array_equal(values, exact, equal_nan=True)
            assert np.array_equal(np.signbit(values), np.signbit(exact))


def test_kernels_work_in_a_forked_child() -> None:
    x = np.ones((1, 512), np.float32)
    memory = encode(np.ones(512 * 1024, np.float32), Format.FP16)[0].view(np.uint8)

    def total() -> float:
        return float(kernels.matmul(memory, 0, Format.FP16, x, 512, 1024, 64, 32)[0].sum())

    before = kernels.threads()
    kernels.set_threads(2)
    expected = total()
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a child that waits for threads it does not have would wait for ever
        os._exit(0 if total() == expected else 1)
    kernels.set_threads(before)
    assert expected == 512 * 1024 and os.waitpid(child, 0)[1] == 0


def test_cached_kernels_are_tied_to_every_source() -> None:
    for kernel in (kernels_unary.unary_kernel, kernels_matmul.matmul_columns, kernels_bits.f32_add):
        assert kernels_jit._DIGEST in kernel._cache._cache_file._source_stamp
